"""Published times of real systems, beside what a plan says of them.

Nothing in `chips.py` was chosen to meet them. Where a page tells a share of the
promised arithmetic (MFU) it is made tokens a second as that page counts, with
all of the attention or the half below the diagonal.
"""

from __future__ import annotations

import dataclasses

from tools.plan import chips, decoding, mesh, model, parts, training

_MAXTEXT = "MaxText, getting_started/Run_Llama2.md and its configurations, 2024"
_TIERING = "MaxText, Optimized models tiering, 2025"
_LLAMA = "Grattafiori et al., The Llama 3 Herd of Models, 2024, table 4"
_NEMO = "NVIDIA NeMo Framework 24.12, Performance Benchmarks (FP8), 2024"
_TENSORRT = "NVIDIA TensorRT-LLM 0.5.0, Performance, and its blog on H200, 2023"
_VLLM = "vLLM, performance benchmark, build 9515: 32 tokens in, 128 out, 2024"
_NIM = "NVIDIA NIM for LLMs, Performance, version 1.8.0, 2025"


@dataclasses.dataclass(frozen=True)
class Figure:
  """A published time of a step, or what says the same.

  Attributes:
    system: what ran on what.
    published: tokens a second of each device.
    source: who says so.
    name: of the model.
    chip: of the device.
    mesh: as far as it is told.
    job: the same.
  """

  system: str
  published: float
  source: str
  name: str
  chip: str
  mesh: mesh.Mesh
  job: training.Job | decoding.Job

  def plan(self) -> parts.Plan:
    """Returns the same step on paper."""
    sizes, chip = model.MODELS[self.name], chips.CHIPS[self.chip]
    if isinstance(self.job, training.Job):
      return training.plan(sizes, chip, self.mesh, self.job)
    return decoding.plan(sizes, chip, self.mesh, self.job)

  @property
  def predicted(self) -> float:
    """Tokens a second of each device, on paper."""
    plan = self.plan()
    return plan.tokens_per_second / plan.devices


def _from_share(
  name: str, chip: str, share: float, length: int, all_pairs: bool
) -> float:
  """Returns the tokens a second of a device that a published MFU means."""
  sizes = model.MODELS[name]
  flops = 3 * sizes.forward_flops(2 * length if all_pairs else length)
  return share * chips.CHIPS[chip].products["bfloat16"].promised / flops


def _maxtext(
  name: str,
  chip: str,
  devices: int,
  published: float,
  source: str,
  rows: int,
  length: int,
  recompute: str,
) -> Figure:
  return Figure(
    f"{name}, {devices} {chip}, {length} tokens",
    published,
    source,
    name,
    chip,
    mesh.Mesh(fsdp=devices),
    training.Job(
      batch=rows * devices,
      length=length,
      recompute=recompute,
      gradients="bfloat16",
    ),
  )


def _llama(devices: int, sequence: int, length: int, flops: float) -> Figure:
  groups = devices // (8 * 16 * sequence)
  batch = 2**24 // length
  # Their pages do not say how attention is counted; here by its half.
  each = 3 * model.MODELS["llama3-405b"].forward_flops(length)
  return Figure(
    f"llama3-405b, {devices} h100, {length} tokens",
    flops / each,
    _LLAMA,
    "llama3-405b",
    "h100",
    mesh.Mesh(tensor=8, sequence=sequence, pipeline=16, fsdp=groups),
    training.Job(
      batch=batch,
      length=length,
      microbatches=batch // groups,
      # Its first chunk of layers has the embedding alone: a layer a chunk.
      interleave=8,
      recompute="elementwise",
      keep_gathered=True,
      split_residual=True,
    ),
  )


def _nemo(
  name: str,
  devices: int,
  published: float,
  batch: int,
  length: int,
  axes: mesh.Mesh,
  interleave: int,
) -> Figure:
  return Figure(
    f"{name}, {devices} h100, {length} tokens, FP8",
    published,
    _NEMO,
    name,
    "h100",
    axes,
    training.Job(
      batch=batch,
      length=length,
      microbatches=batch // axes.batch,
      interleave=interleave,
      recompute="elementwise",
      products="float8",
      weights="bfloat16",
      gradients="bfloat16",
      keep_gathered=True,
      split_residual=True,
    ),
  )


def _decoded(
  name: str,
  chip: str,
  tensor: int,
  batch: int,
  context: int,
  step: float,
  source: str,
  dtype: str,
) -> Figure:
  return Figure(
    f"{name}, {tensor} {chip}, {batch} x {context} tokens, {dtype}",
    batch / step / tensor,
    source,
    name,
    chip,
    mesh.Mesh(tensor=tensor),
    decoding.Job(
      batch=batch,
      context=context,
      weights=dtype,
      cache=dtype,
    ),
  )


TRAINING = (
  _maxtext(
    "llama2-70b",
    "v5e",
    256,
    _from_share("llama2-70b", "v5e", 0.57, 2048, all_pairs=True),
    _MAXTEXT,
    2,
    2048,
    "full",
  ),
  _maxtext(
    "llama2-70b",
    "v5p",
    64,
    _from_share("llama2-70b", "v5p", 0.65, 4096, all_pairs=True),
    _MAXTEXT,
    2,
    4096,
    "mlp",
  ),
  _maxtext("llama2-70b", "v5p", 512, 692, _TIERING, 2, 4096, "mlp"),
  _maxtext("llama2-70b", "v6e", 256, 900, _TIERING, 4, 4096, "full"),
  _llama(8192, 1, 8192, 430e12),
  _llama(16384, 1, 8192, 400e12),
  _llama(16384, 16, 131072, 380e12),
  _nemo("llama3-8b", 8, 12273, 128, 8192, mesh.Mesh(sequence=2, fsdp=4), 1),
  _nemo(
    "llama2-70b",
    64,
    1728,
    128,
    4096,
    mesh.Mesh(tensor=4, pipeline=4, fsdp=4),
    20,
  ),
  _nemo(
    "llama3-70b",
    64,
    1524,
    128,
    8192,
    mesh.Mesh(tensor=4, sequence=2, pipeline=4, fsdp=2),
    5,
  ),
)

# The middle of the output is the context; of those whose input is short.
DECODING = (
  _decoded("llama3-8b", "h200", 1, 8, 96, 0.833421 / 128, _VLLM, "bfloat16"),
  _decoded("llama3-70b", "h200", 4, 8, 96, 2.07753 / 128, _VLLM, "bfloat16"),
  _decoded("mixtral-8x7b", "h200", 2, 8, 96, 1.91744 / 128, _VLLM, "bfloat16"),
  _decoded("llama3-70b", "h100", 2, 1, 1500, 18.91e-3, _NIM, "float8"),
  _decoded("llama2-7b", "h100", 1, 64, 1152, 64 / 5367, _TENSORRT, "float8"),
  _decoded("llama2-70b", "h100", 4, 64, 1152, 64 / 2616, _TENSORRT, "float8"),
  _decoded("llama2-13b", "h200", 1, 128, 1152, 128 / 4750, _TENSORRT, "float8"),
  _decoded("llama2-70b", "h200", 4, 512, 1152, 512 / 6616, _TENSORRT, "float8"),
)
