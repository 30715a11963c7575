"""What a checkpoint says about its architecture.

Llama (SmolLM2 among them), Qwen 3 and Gemma 3 are one decoder with some parts
more or less. `Config` says which; nothing else asks for a model's name.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from examples.llm import rotary

# What transformers leaves out of a file where it is as it always was.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {"max_position_embeddings": 2048},
  "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
  "gemma3": {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
  },
}
ARCHITECTURES = tuple(_DEFAULTS)

# Of six layers of Gemma 3, the last sees everything and the others a window.
_GEMMA_PATTERN = 6


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes and the parts of a decoder.

  Attributes:
    architecture: one of `ARCHITECTURES`.
    vocabulary: how many tokens there are.
    features: of each token.
    hidden: features inside of a layer's MLP.
    heads: of queries.
    kv_heads: of keys and values, a divisor of `heads`.
    head_dim: features of a head.
    windows: for each layer, how many keys a token sees; all, if None.
    rope: the rotary embedding of layers that see all keys.
    local_rope: that of layers with a window.
    epsilon: of the norms.
    scale: factor of the attention's logits.
    context: the longest text that the model was trained for.
    tied: whether the head is the table of the embeddings.
    attention_bias: whether the projections of the attention have biases.
    mlp_bias: whether those of the MLP have.
    qk_norm: whether queries and keys are normalised.
    post_norms: whether what a layer adds is normalised as well.
    norm_offset: added to the scales of norms, which checkpoints of Gemma keep
      around 0.
    embed_scale: factor of the embeddings.
    gelu: whether the MLP's gate is GELU, else SiLU.
  """

  architecture: str
  vocabulary: int
  features: int
  hidden: int
  heads: int
  kv_heads: int
  head_dim: int
  windows: tuple[int | None, ...]
  rope: rotary.Rotary
  local_rope: rotary.Rotary
  epsilon: float
  scale: float
  context: int
  tied: bool
  attention_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  norm_offset: float = 0.0
  embed_scale: float = 1.0
  gelu: bool = False

  @property
  def layers(self) -> int:
    """How many layers there are."""
    return len(self.windows)


def from_json(values: Mapping[str, Any]) -> Config:
  """Reads what `config.json` of a checkpoint holds.

  Args:
    values: the parsed file. Of a model that sees images as well, the part for
      text is taken.

  Raises:
    ValueError: if the model is none of `ARCHITECTURES`, or has a part that this
      package has not.
  """
  values = values.get("text_config", values)
  architecture = values.get("model_type", "").removesuffix("_text")
  if architecture not in ARCHITECTURES:
    raise ValueError(
      f"`model_type` must be one of {', '.join(ARCHITECTURES)}, but the"
      f" checkpoint's is `{values.get('model_type')}`."
    )
  values = {"rms_norm_eps": 1e-6} | _DEFAULTS[architecture] | dict(values)
  gemma = architecture == "gemma3"
  heads = values["num_attention_heads"]
  head_dim = values.get("head_dim") or values["hidden_size"] // heads
  rope, local_rope = _ropes(values, head_dim)
  for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
    if values.get(cap):
      raise ValueError(
        f"`{cap}` must be null, as in Gemma 3, but is {values[cap]}: the model"
        " here has no such part."
      )
  return Config(
    architecture=architecture,
    vocabulary=values["vocab_size"],
    features=values["hidden_size"],
    hidden=values["intermediate_size"],
    heads=heads,
    kv_heads=values.get("num_key_value_heads") or heads,
    head_dim=head_dim,
    windows=_windows(values, gemma),
    rope=rope,
    local_rope=local_rope,
    epsilon=values["rms_norm_eps"],
    scale=(values["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
    context=values["max_position_embeddings"],
    tied=values.get("tie_word_embeddings", False),
    attention_bias=values.get("attention_bias", False),
    mlp_bias=values.get("mlp_bias", False),
    qk_norm=architecture in ("qwen3", "gemma3"),
    post_norms=gemma,
    norm_offset=1.0 if gemma else 0.0,
    embed_scale=math.sqrt(values["hidden_size"]) if gemma else 1.0,
    gelu=gemma,
  )


def _windows(values: Mapping[str, Any], gemma: bool) -> tuple[int | None, ...]:
  """Returns for each layer how many keys a token sees."""
  layers = values["num_hidden_layers"]
  types = values.get("layer_types")
  if types is None:
    every = values.get("sliding_window_pattern") or _GEMMA_PATTERN
    types = [
      "sliding_attention" if gemma and (i + 1) % every else "full_attention"
      for i in range(layers)
    ]
  window = values.get("sliding_window")
  return tuple(
    window if kind == "sliding_attention" else None for kind in types
  )


def _ropes(
  values: Mapping[str, Any], head_dim: int
) -> tuple[rotary.Rotary, rotary.Rotary]:
  """Returns the rotations of layers that see everything, and of the others.

  Newer files have `rope_parameters`, which may be one for each kind of layer;
  older ones `rope_theta`, `rope_local_base_freq` and `rope_scaling`.
  """
  parameters = values.get("rope_parameters")
  if parameters is None:
    base = values.get("rope_theta", 10000.0)
    full = dict(values.get("rope_scaling") or {}) | {"rope_theta": base}
    local = {"rope_theta": values.get("rope_local_base_freq", base)}
  elif "full_attention" in parameters:
    full = parameters["full_attention"]
    local = parameters.get("sliding_attention", full)
  else:
    full = local = parameters
  context = values["max_position_embeddings"]
  return (
    rotary.from_json(full, head_dim, context),
    rotary.from_json(local, head_dim, context),
  )
