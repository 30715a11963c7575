"""The step of decoding on paper: a token more for each sequence."""

from __future__ import annotations

import dataclasses

from tools.plan import chips as chips_lib
from tools.plan import fabric, refusal, training
from tools.plan import mesh as mesh_lib
from tools.plan import model as model_lib
from tools.plan import parts as parts_lib

# Norm, queries with keys and values, their rotation with the cache's update,
# attention, its output; norm, into the perceptron, its gate, out of it.
_KERNELS = 9


@dataclasses.dataclass(frozen=True)
class Job:
  """What is decoded, and how.

  Attributes:
    batch: sequences, on all devices.
    context: tokens of each in the cache.
    slots: tokens for which a cache has room; `context`, if None.
    weights: dtype of the parameters.
    cache: dtype of keys and values.
    compute: dtype of products and of what is sent.
    reserve: share of the memory that is left alone.
  """

  batch: int
  context: int
  slots: int | None = None
  weights: str = "bfloat16"
  cache: str = "bfloat16"
  compute: str = "bfloat16"
  reserve: float = 0.05

  def __post_init__(self):
    refusal.check_sizes(self, "batch", "context")
    if self.slots is not None and self.slots < self.context:
      raise refusal.Refused(
        f"`slots` must be at least `context`={self.context}, but got"
        f" {self.slots}."
      )
    refusal.check_shares(self, "reserve")


def _touched(model: model_lib.Model, mesh: mesh_lib.Mesh, rows: float) -> float:
  """Returns the experts of a device that some token goes to, as expected."""
  here = model.experts / mesh.expert
  if model.experts == 1:
    return here
  missed = (1 - model.used / model.experts) ** (rows * mesh.expert)
  return here * (1 - missed)


def plan(
  model: model_lib.Model,
  chip: chips_lib.Chip,
  mesh: mesh_lib.Mesh,
  job: Job,
) -> parts_lib.Plan:
  """Returns a step of decoding.

  In a pipeline the batch is in as many parts as there are stages, and every
  stage is at work on one; a step is over when all have passed all.

  Args:
    model: what decodes.
    chip: each device of the mesh.
    mesh: how they are counted.
    job: what.

  Raises:
    Refused: if something does not divide, or does not fit.
  """
  training.check_divides(model, mesh)
  stages = mesh.pipeline
  refusal.check_divides(
    "data x fsdp x expert x pipeline", mesh.batch * stages, "batch", job.batch
  )
  slots = job.slots or job.context
  refusal.check_divides("sequence", mesh.sequence, "slots", slots)
  layers, ends = training.stage_layers(model, stages)
  rows = job.batch // (mesh.batch * stages)
  kv = max(1.0, model.kv_heads / mesh.tensor) * model.head_dim
  size = model_lib.element_bytes
  weights, compute = size(job.weights), size(job.compute)

  shared = layers * model.shared / mesh.tensor
  routed = layers * model.routed / mesh.expert / mesh.tensor
  table = model.table / mesh.tensor if ends else 0.0
  tables = table * (1 if model.tied or stages > 1 else 2)
  whole = (shared + routed + tables) * weights
  gathered = 2 * whole / layers if mesh.fsdp > 1 else 0.0
  token = 2 * layers * kv * size(job.cache) / mesh.sequence
  widest = max(model.features, 3 * model.hidden * model.used / mesh.tensor)
  memory = {
    "weights": whole / mesh.fsdp + gathered,
    "cache": rows * stages * slots * token,
    "activations": rows
    * (4 * widest * compute + model.vocabulary / mesh.tensor * 4),
  }
  capacity = chip.memory * (1 - job.reserve)
  parts_lib.check_fits(memory, capacity)

  rate = chip.product_rate(job.compute).reached
  touched = (
    layers * _touched(model, mesh, rows) * model.expert / mesh.tensor
    if model.experts > 1
    else 0.0
  )
  products = parts_lib.roofline(
    "products",
    stages * 2 * rows * layers * model.multiplied / mesh.tensor,
    rate,
    stages * (shared + touched) * weights,
    chip.weights.reached,
  )
  head = parts_lib.roofline(
    "head",
    stages * 2 * rows * table,
    rate,
    stages * table * weights,
    chip.weights.reached,
  )
  # Each query head attends to its own keys, whatever the layout.
  attended = 4 * rows * job.context * model.query_size / mesh.tensor
  cache = parts_lib.roofline(
    "cache read",
    stages * layers * attended / mesh.sequence,
    chip.attention.reached,
    stages * rows * job.context * token,
    chip.cache_rate(job.cache).reached,
  )
  norms = parts_lib.roofline(
    "norms",
    0.0,
    1.0,
    stages * layers * rows * model.between(mesh.tensor) * compute,
    chip.norms.reached,
  )
  kernels = stages * layers * _KERNELS * chip.kernel
  found = [
    products,
    head,
    cache,
    norms,
    parts_lib.Part("starting kernels", kernels, kernels, "kernels"),
  ]
  tiers = chip.fabric.tiers(mesh)
  row = rows * model.features * compute
  if mesh.tensor > 1:
    one = fabric.reduce_seconds(tiers["tensor"], row)
    logits = fabric.gather_seconds(
      tiers["tensor"], rows * model.vocabulary * compute
    )
    busy = stages * (2 * layers * one + (one + logits if ends else 0.0))
    found.append(parts_lib.network("tensor all-reduce", busy))
  if mesh.sequence > 1:
    # A sum, a maximum and a normaliser for each head, in float32.
    partial = rows * model.heads / mesh.tensor * (model.head_dim + 2) * 4
    one = fabric.reduce_seconds(tiers["sequence"], partial)
    found.append(
      parts_lib.network("sequence all-reduce", stages * layers * one)
    )
  if mesh.expert > 1:
    one = fabric.exchange_seconds(tiers["expert"], row * model.used)
    found.append(
      parts_lib.network("expert all-to-all", stages * 2 * layers * one)
    )
  if mesh.fsdp > 1:
    one = fabric.gather_seconds(tiers["fsdp"], whole)
    found.append(parts_lib.network("fsdp gather", stages * one))
  if stages > 1:
    one = fabric.shift_seconds(tiers["pipeline"], row)
    found.append(parts_lib.network("pipeline shift", stages * one))
  host = model.variables(layers) * chip.calling_host
  found.append(parts_lib.host(host, found, chip.queued))
  context = 4 * job.context * model.query_size * model.layers
  return parts_lib.Plan(
    parts=tuple(found),
    memory=memory,
    capacity=capacity,
    tokens=job.batch,
    devices=mesh.devices,
    flops=job.batch * (model.forward_flops(0) + context),
    peak=chip.product_rate(job.compute).promised,
  )
