"""The step of training on paper."""

from __future__ import annotations

import dataclasses

from tools.plan import chips as chips_lib
from tools.plan import fabric, refusal
from tools.plan import mesh as mesh_lib
from tools.plan import model as model_lib
from tools.plan import parts as parts_lib

RECOMPUTED = ("elementwise", "mlp", "full")
SCHEDULES = ("1f1b", "gpipe")

# Of the attention, the gradient takes five products where the value takes two.
ATTENTION_GRADIENT = 2.5

# Logits are written, read for their sum, and read and written by the gradient,
# in float32.
_LOGITS_BYTES = 4 * 4.0


@dataclasses.dataclass(frozen=True)
class Job:
  """What is trained on, and how.

  Attributes:
    batch: sequences of a step, on all devices.
    length: tokens of a sequence.
    microbatches: parts of a device's batch, one after the other.
    interleave: parts of each stage of a pipeline, each of some layers.
    schedule: in which order a pipeline goes through its microbatches; the
      memory is another, the bubble the same.
    recompute: what the gradient computes again, of each layer: what is
      elementwise, the wide products of the perceptron too, or all but the last
      product.
    compute: dtype of what is computed and of what is sent.
    products: dtype in which matrices are multiplied; `compute`, if None.
    weights: dtype in which parameters are kept.
    gradients: dtype of gradients, also when they are summed.
    moments: dtype of Adam's two moments.
    keep_gathered: whether parameters that fsdp gathered stay until the step's
      end, rather than being gathered for each use.
    split_residual: whether what is between the layers is split over the tensor
      axis too; each all-reduce is then a reduce-scatter and a gather.
    projections: products that make queries, keys and values of a layer's input:
      the gradient of each is summed over the tensor axis by itself.
    overlap: share of the arithmetic behind which collectives of fsdp and data
      can hide.
    reserve: share of the memory that is left alone.
  """

  batch: int
  length: int
  microbatches: int = 1
  interleave: int = 1
  schedule: str = "1f1b"
  recompute: str = "full"
  compute: str = "bfloat16"
  products: str | None = None
  weights: str = "float32"
  gradients: str = "float32"
  moments: str = "float32"
  keep_gathered: bool = False
  split_residual: bool = False
  projections: int = 1
  overlap: float = 1.0
  reserve: float = 0.05

  def __post_init__(self):
    refusal.check_sizes(
      self, "batch", "length", "microbatches", "interleave", "projections"
    )
    for name, allowed in (
      ("recompute", RECOMPUTED),
      ("schedule", SCHEDULES),
    ):
      if getattr(self, name) not in allowed:
        raise refusal.Refused(
          f"`{name}` must be one of {', '.join(allowed)}, but got"
          f" `{getattr(self, name)}`."
        )
    refusal.check_shares(self, "overlap", "reserve")


def check_divides(model: model_lib.Model, mesh: mesh_lib.Mesh) -> None:
  """Raises if a mesh does not divide a model."""
  for name in ("heads", "hidden", "vocabulary"):
    refusal.check_divides("tensor", mesh.tensor, name, getattr(model, name))
  if model.kv_heads % mesh.tensor and mesh.tensor % model.kv_heads:
    raise refusal.Refused(
      f"`kv_heads`={model.kv_heads} must be a multiple of"
      f" `tensor`={mesh.tensor}, or divide it, but does neither."
    )
  refusal.check_divides("expert", mesh.expert, "experts", model.experts)


def stage_layers(
  model: model_lib.Model, pipeline: int, interleave: int = 1
) -> tuple[int, bool]:
  """Returns the layers of the longest stage, and whether it has an end too.

  An end is the embedding or the head. They count as a layer each where that
  makes the stages equal.

  >>> stage_layers(model_lib.MODELS["llama3-405b"], 16)
  (8, False)
  >>> stage_layers(model_lib.MODELS["llama3-70b"], 4)
  (20, True)
  """
  pieces = pipeline * interleave
  if model.layers % pieces == 0:
    return model.layers // pipeline, True
  if (model.layers + 2) % pieces == 0:
    return (model.layers + 2) // pipeline, False
  raise refusal.Refused(
    f"`layers`={model.layers}, or two more for embedding and head, must be a"
    f" multiple of `pipeline` x `interleave`={pieces}, but is not."
  )


def _recomputed(model: model_lib.Model, recompute: str) -> float:
  """Returns the parameters of a layer whose products are computed again."""
  inwards = model.used * model.expert * (2 / 3 if model.gated else 1 / 2)
  if recompute == "elementwise":
    return 0.0
  if recompute == "mlp":
    return inwards
  return model.attention + model.router + inwards


def saved_bytes(
  model: model_lib.Model, mesh: mesh_lib.Mesh, job: Job, recompute: str
) -> float:
  """Returns the bytes that a layer keeps of a token for its gradient."""
  stream = mesh.tensor if job.split_residual else 1
  if recompute == "full":
    elements = model.features / stream
  else:
    inside = 2 * model.query_size + 2 * model.kv_size
    if recompute == "elementwise":
      inside += (2 if model.gated else 1) * model.hidden * model.used
    elements = 2 * model.features / stream + inside / mesh.tensor
  return elements * model_lib.element_bytes(job.compute)


def _local(
  model: model_lib.Model, mesh: mesh_lib.Mesh, layers: int, ends: bool
) -> float:
  """Returns the parameters of the longest stage on a device, gathered."""
  here = layers * (model.shared + model.routed / mesh.expert)
  if ends:
    alone = mesh.pipeline == 1 and not model.tied
    here += model.table * (2 if alone else 1) + model.features
  return here / mesh.tensor


@dataclasses.dataclass(frozen=True)
class _Step:
  """A step on a device, as its parts see it.

  Attributes:
    model: what is trained.
    chip: the device.
    mesh: how devices are counted.
    job: what on.
    layers: those of the longest stage.
    ends: whether that has an embedding or a head too.
  """

  model: model_lib.Model
  chip: chips_lib.Chip
  mesh: mesh_lib.Mesh
  job: Job
  layers: int
  ends: bool

  @property
  def tokens(self) -> float:
    """Those of a microbatch."""
    rows = self.job.batch // (self.mesh.batch * self.job.microbatches)
    return rows * self.job.length / self.mesh.sequence

  @property
  def each(self) -> int:
    """The layers that it goes through in a step, for each microbatch anew."""
    return self.job.microbatches * self.layers

  @property
  def full(self) -> bool:
    """Whether the whole layer is computed again."""
    return self.job.recompute == "full"

  @property
  def passes(self) -> int:
    """Forward, twice as much for the gradient, and what is done again."""
    return 3 + self.full

  @property
  def stream(self) -> int:
    """The parts of what is between the layers."""
    return self.mesh.tensor if self.job.split_residual else 1

  @property
  def size(self) -> float:
    """Bytes of a number that is computed."""
    return model_lib.element_bytes(self.job.compute)

  @property
  def gathered(self) -> float:
    """The parameters, gathered."""
    return _local(self.model, self.mesh, self.layers, self.ends)

  @property
  def own(self) -> float:
    """The parameters that it keeps."""
    return self.gathered / self.mesh.fsdp

  def memory(self) -> dict[str, float]:
    """Returns the bytes of each kind."""
    model, mesh, job, layers = self.model, self.mesh, self.job, self.layers
    size = model_lib.element_bytes
    if job.schedule == "gpipe":
      in_flight: float = job.microbatches
    else:
      in_flight = min(job.microbatches, mesh.pipeline)
      if job.interleave > 1:
        in_flight *= 1 + (mesh.pipeline - 1) / (mesh.pipeline * job.interleave)
    saved = saved_bytes(model, mesh, job, job.recompute)
    # The layer whose gradient is computed, or the logits and theirs.
    working = saved_bytes(model, mesh, job, "elementwise") * self.tokens
    if self.ends:
      logits = self.tokens * model.vocabulary / mesh.tensor
      working = max(working, logits * (size(job.compute) + 4))
    copies = 0.0
    if mesh.fsdp > 1:
      # One layer's worth: what was used gives way to what comes.
      whole = self.gathered if job.keep_gathered else self.gathered / layers
      copies = whole * size(job.compute)
    elif job.weights != job.compute:
      copies = self.gathered / layers * size(job.compute)
    return {
      "weights": self.own * size(job.weights) + copies,
      "gradients": self.own
      * size(job.gradients)
      * (mesh.fsdp if job.keep_gathered and job.microbatches > 1 else 1),
      "optimizer": self.own * 2 * size(job.moments),
      "activations": in_flight * layers * saved * self.tokens + working,
    }

  def products(self) -> parts_lib.Part:
    """Returns those of the layers."""
    model, mesh, tokens = self.model, self.mesh, self.tokens
    again = _recomputed(model, self.job.recompute)
    flops = 2 * tokens * (3 * model.multiplied + again) / mesh.tensor
    inputs = (
      4 * model.features
      + (
        2 * (model.query_size + model.kv_size)
        + (3 if model.gated else 2) * model.hidden * model.used
      )
      / mesh.tensor
    )
    held = model.shared + model.routed / mesh.expert
    moved = self.passes * (tokens * inputs + held / mesh.tensor) * self.size
    return parts_lib.roofline(
      "products",
      self.each * flops,
      self.product_rate.reached,
      self.each * moved,
      self.chip.weights.reached,
    )

  @property
  def product_rate(self) -> chips_lib.Rate:
    """That of products in the layers."""
    return self.chip.product_rate(self.job.products or self.job.compute)

  def head(self) -> parts_lib.Part:
    """Returns the products and the loss behind the last layer."""
    if not self.ends:
      return parts_lib.Part("head and loss", 0.0, 0.0, "arithmetic")
    model, mesh, tokens = self.model, self.mesh, self.tokens
    micro, table = self.job.microbatches, model.table / mesh.tensor
    return parts_lib.roofline(
      "head and loss",
      micro * 6 * tokens * table,
      self.chip.product_rate(self.job.compute).reached,
      micro
      * (
        3 * table * self.size
        + tokens * model.vocabulary / mesh.tensor * _LOGITS_BYTES
      ),
      self.chip.copy.reached,
    )

  def attention(self) -> parts_lib.Part:
    """Returns what is between its projections."""
    model, mesh, tokens = self.model, self.mesh, self.tokens
    attended = 2 * tokens * self.job.length * model.query_size / mesh.tensor
    return parts_lib.roofline(
      "attention",
      self.each * attended * (1 + ATTENTION_GRADIENT + self.full),
      self.chip.attention.reached,
      self.each
      * self.passes
      * tokens
      * 2
      * (model.query_size + model.kv_size)
      / mesh.tensor
      * self.size,
      self.chip.copy.reached,
    )

  def norms(self) -> parts_lib.Part:
    """Returns what is between the products."""
    between = self.model.between(self.mesh.tensor, self.stream)
    return parts_lib.roofline(
      "norms",
      0.0,
      1.0,
      # Forward, again, and twice as much for the gradient.
      self.each * 4 * self.tokens * between * self.size,
      self.chip.norms.reached,
    )

  def optimizer(self) -> parts_lib.Part:
    """Returns Adam's pass over the parameters."""
    size, job = model_lib.element_bytes, self.job
    return parts_lib.roofline(
      "optimizer",
      0.0,
      1.0,
      self.own
      * (2 * size(job.weights) + 4 * size(job.moments) + size(job.gradients)),
      self.chip.copy.reached,
    )

  def ring(self, attention: parts_lib.Part) -> parts_lib.Part:
    """Returns keys and values that go around, behind attention."""
    kv = max(1.0, self.model.kv_heads / self.mesh.tensor) * self.model.head_dim
    # Values and gradients of both go around the ring.
    one = (self.mesh.sequence - 1) * fabric.shift_seconds(
      self.chip.fabric.tiers(self.mesh)["sequence"],
      2 * self.tokens * kv * self.size,
    )
    busy = self.each * (3 + self.full) * one
    behind = min(busy, self.job.overlap * attention.busy)
    return parts_lib.network("sequence ring", busy, behind)

  def waiting(self, attention: parts_lib.Part) -> list[parts_lib.Part]:
    """Returns the collectives for which the arithmetic waits."""
    model, mesh, tokens, size = self.model, self.mesh, self.tokens, self.size
    micro, tiers = self.job.microbatches, self.chip.fabric.tiers(mesh)
    found = []
    if mesh.tensor > 1:
      row = tokens * model.features * size
      one = fabric.reduce_seconds(tiers["tensor"], row)
      # The gradients of the projections travel in one message.
      several = fabric.reduce_seconds(
        tiers["tensor"], self.job.projections * row
      )
      count = self.each * (3 + self.full) + (2 * micro if self.ends else 0)
      found.append(
        parts_lib.network(
          "tensor all-reduce", count * one + self.each * several
        )
      )
    if mesh.sequence > 1:
      found.append(self.ring(attention))
    if mesh.expert > 1:
      one = fabric.exchange_seconds(
        tiers["expert"], tokens * model.used * model.features * size
      )
      count = self.each * (4 + self.full)
      found.append(parts_lib.network("expert all-to-all", count * one))
    if mesh.pipeline > 1:
      crossed = tokens * model.features / self.stream * size
      one = fabric.shift_seconds(tiers["pipeline"], crossed)
      count = 2 * micro * self.job.interleave
      found.append(parts_lib.network("pipeline shift", count * one))
    return found

  def hiding(self) -> list[tuple[str, float]]:
    """Returns the collectives that can go on behind arithmetic."""
    model, mesh, job = self.model, self.mesh, self.job
    tiers = self.chip.fabric.tiers(mesh)
    summed = model_lib.element_bytes(job.gradients)
    found = []
    if mesh.fsdp > 1:
      gather = fabric.gather_seconds(tiers["fsdp"], self.gathered * self.size)
      scatter = fabric.gather_seconds(tiers["fsdp"], self.gathered * summed)
      turns = 1 if job.keep_gathered else job.microbatches
      uses = 1 if job.keep_gathered else 2
      found.append(("fsdp gather", uses * turns * gather))
      found.append(("fsdp reduce-scatter", turns * scatter))
    copies = tuple(tiers["sequence"]) + tuple(tiers["data"])
    if copies:
      found.append(
        ("data all-reduce", fabric.reduce_seconds(copies, self.own * summed))
      )
    if mesh.expert > 1:
      held = model.shared + model.routed / mesh.expert
      shared = self.own * model.shared / held
      found.append(
        (
          "expert all-reduce",
          fabric.reduce_seconds(tiers["expert"], shared * summed),
        )
      )
    return found


def _checked(
  model: model_lib.Model, chip: chips_lib.Chip, mesh: mesh_lib.Mesh, job: Job
) -> _Step:
  """Returns the step, after it has been seen that all divides."""
  check_divides(model, mesh)
  refusal.check_divides(
    "data x fsdp x expert x microbatches",
    mesh.batch * job.microbatches,
    "batch",
    job.batch,
  )
  splits = mesh.sequence * (mesh.tensor if job.split_residual else 1)
  refusal.check_divides(
    "sequence, and tensor if it splits the residual",
    splits,
    "length",
    job.length,
  )
  if mesh.pipeline == 1 and job.interleave > 1:
    raise refusal.Refused(
      f"`interleave`={job.interleave} needs a pipeline, but `pipeline` is 1."
    )
  layers, ends = stage_layers(model, mesh.pipeline, job.interleave)
  return _Step(model, chip, mesh, job, layers, ends)


def plan(
  model: model_lib.Model,
  chip: chips_lib.Chip,
  mesh: mesh_lib.Mesh,
  job: Job,
) -> parts_lib.Plan:
  """Returns a step of training.

  Args:
    model: what is trained.
    chip: each device of the mesh.
    mesh: how they are counted.
    job: what on.

  Raises:
    Refused: if something does not divide, or does not fit.
  """
  step = _checked(model, chip, mesh, job)
  capacity = chip.memory * (1 - job.reserve)
  memory = step.memory()
  parts_lib.check_fits(memory, capacity)

  attention = step.attention()
  computed = [step.products(), attention, step.norms(), step.head()]
  waiting = step.waiting(attention)
  found = [*computed, *waiting]
  if mesh.pipeline > 1:
    work = sum(part.seconds for part in found)
    bubble = work * (mesh.pipeline - 1) / (job.microbatches * job.interleave)
    found.append(parts_lib.Part("pipeline bubble", bubble, bubble, "bubble"))

  # What hides behind arithmetic does so together, and the first layer's and the
  # last one's have nothing to hide behind.
  hidden = job.overlap * sum(part.busy for part in computed)
  hidden -= sum(part.busy - part.seconds for part in waiting)
  for name, busy in step.hiding():
    behind = min(hidden, busy * (1 - 1 / (step.layers + 1)))
    found.append(parts_lib.network(name, busy, behind))
    hidden -= behind
  found.append(step.optimizer())

  # Each has two moments.
  host = 3 * model.variables(step.layers) * chip.training_host
  found.append(parts_lib.host(host, found, chip.queued))
  return parts_lib.Plan(
    parts=tuple(found),
    memory=memory,
    capacity=capacity,
    tokens=job.batch * job.length,
    devices=mesh.devices,
    flops=3 * job.batch * job.length * model.forward_flops(job.length),
    peak=step.product_rate.promised,
  )
