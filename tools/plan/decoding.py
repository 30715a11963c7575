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


@dataclasses.dataclass(frozen=True)
class _Step:
  """A step on a device, as its parts see it.

  Attributes:
    model: what decodes.
    chip: the device.
    mesh: how devices are counted.
    job: what.
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
  def stages(self) -> int:
    """The parts of the batch, each of which passes the stage."""
    return self.mesh.pipeline

  @property
  def rows(self) -> int:
    """The sequences of a part."""
    return self.job.batch // (self.mesh.batch * self.stages)

  @property
  def shared(self) -> float:
    """The parameters that every token goes through."""
    return self.layers * self.model.shared / self.mesh.tensor

  @property
  def table(self) -> float:
    """Those of the head."""
    return self.model.table / self.mesh.tensor if self.ends else 0.0

  @property
  def whole(self) -> float:
    """Bytes of the parameters, gathered."""
    model, mesh = self.model, self.mesh
    routed = self.layers * model.routed / mesh.expert / mesh.tensor
    tables = self.table * (1 if model.tied or self.stages > 1 else 2)
    return (self.shared + routed + tables) * self.weights

  @property
  def weights(self) -> float:
    """Bytes of a parameter."""
    return model_lib.element_bytes(self.job.weights)

  @property
  def compute(self) -> float:
    """Bytes of a number that is computed."""
    return model_lib.element_bytes(self.job.compute)

  @property
  def token(self) -> float:
    """Bytes of a token in the cache."""
    kv = max(1.0, self.model.kv_heads / self.mesh.tensor) * self.model.head_dim
    number = model_lib.element_bytes(self.job.cache)
    return 2 * self.layers * kv * number / self.mesh.sequence

  def memory(self, slots: int) -> dict[str, float]:
    """Returns the bytes of each kind."""
    model, mesh = self.model, self.mesh
    gathered = 2 * self.whole / self.layers if mesh.fsdp > 1 else 0.0
    widest = max(model.features, 3 * model.hidden * model.used / mesh.tensor)
    return {
      "weights": self.whole / mesh.fsdp + gathered,
      "cache": self.rows * self.stages * slots * self.token,
      "activations": self.rows
      * (4 * widest * self.compute + model.vocabulary / mesh.tensor * 4),
    }

  def computed(self) -> list[parts_lib.Part]:
    """Returns what the device does by itself."""
    model, mesh, job, chip = self.model, self.mesh, self.job, self.chip
    stages, rows, layers = self.stages, self.rows, self.layers
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
      stages * (self.shared + touched) * self.weights,
      chip.weights.reached,
    )
    head = parts_lib.roofline(
      "head",
      stages * 2 * rows * self.table,
      rate,
      stages * self.table * self.weights,
      chip.weights.reached,
    )
    # Each query head attends to its own keys, whatever the layout.
    attended = 4 * rows * job.context * model.query_size / mesh.tensor
    cache = parts_lib.roofline(
      "cache read",
      stages * layers * attended / mesh.sequence,
      chip.attention.reached,
      stages * rows * job.context * self.token,
      chip.cache_rate(job.cache).reached,
    )
    norms = parts_lib.roofline(
      "norms",
      0.0,
      1.0,
      stages * layers * rows * model.between(mesh.tensor) * self.compute,
      chip.norms.reached,
    )
    kernels = stages * layers * _KERNELS * chip.kernel
    starting = parts_lib.Part("starting kernels", kernels, kernels, "kernels")
    return [products, head, cache, norms, starting]

  def waiting(self) -> list[parts_lib.Part]:
    """Returns the collectives, for which all wait."""
    model, mesh, stages = self.model, self.mesh, self.stages
    rows, layers = self.rows, self.layers
    tiers = self.chip.fabric.tiers(mesh)
    row = rows * model.features * self.compute
    found = []
    if mesh.tensor > 1:
      one = fabric.reduce_seconds(tiers["tensor"], row)
      logits = fabric.gather_seconds(
        tiers["tensor"], rows * model.vocabulary * self.compute
      )
      busy = stages * (2 * layers * one + (one + logits if self.ends else 0.0))
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
      one = fabric.gather_seconds(tiers["fsdp"], self.whole)
      found.append(parts_lib.network("fsdp gather", stages * one))
    if stages > 1:
      one = fabric.shift_seconds(tiers["pipeline"], row)
      found.append(parts_lib.network("pipeline shift", stages * one))
    return found


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
  step = _Step(model, chip, mesh, job, layers, ends)
  memory = step.memory(slots)
  capacity = chip.memory * (1 - job.reserve)
  parts_lib.check_fits(memory, capacity)

  found = [*step.computed(), *step.waiting()]
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
