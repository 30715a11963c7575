"""Sizes of a decoder, and what follows from them alone."""

from __future__ import annotations

import dataclasses

from tools.plan import refusal

# Bytes of an element.
DTYPES = {
  "float32": 4.0,
  "bfloat16": 2.0,
  "float16": 2.0,
  "float8": 1.0,
  "int8": 1.0,
  "int4": 0.5,
}


def element_bytes(dtype: str) -> float:
  """Returns the bytes of an element.

  >>> element_bytes("int4")
  0.5
  """
  if dtype not in DTYPES:
    raise refusal.Refused(
      f"A dtype must be one of {', '.join(DTYPES)}, but got `{dtype}`."
    )
  return DTYPES[dtype]


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder: blocks of attention and a perceptron, each behind a norm.

  Example:
    >>> round(MODELS["llama2-70b"].parameters / 1e9, 2)
    68.98

  Attributes:
    layers: how many blocks.
    features: of each token.
    heads: of queries.
    kv_heads: of keys and values.
    head_dim: features of a head.
    hidden: features inside of the perceptron, of one expert where there are
      several.
    vocabulary: how many tokens there are.
    gated: whether the perceptron has a gate, and so three matrices, not two.
    tied: whether the head is the table of the embeddings.
    experts: perceptrons of a layer.
    used: how many of them see a token.
  """

  layers: int
  features: int
  heads: int
  kv_heads: int
  head_dim: int
  hidden: int
  vocabulary: int
  gated: bool = True
  tied: bool = False
  experts: int = 1
  used: int = 1

  def __post_init__(self):
    refusal.check_sizes(
      self,
      *(
        name
        for name, value in vars(self).items()
        if not isinstance(value, bool)
      ),
    )
    refusal.check_divides("kv_heads", self.kv_heads, "heads", self.heads)
    if self.used > self.experts:
      raise refusal.Refused(
        f"`used` must be at most `experts`={self.experts}, but got {self.used}."
      )

  @property
  def query_size(self) -> int:
    """Features of all queries of a token."""
    return self.heads * self.head_dim

  @property
  def kv_size(self) -> int:
    """Features of all keys of a token, and so of all values."""
    return self.kv_heads * self.head_dim

  @property
  def attention(self) -> int:
    """Parameters of a layer's projections of the attention."""
    return self.features * (2 * self.query_size + 2 * self.kv_size)

  @property
  def expert(self) -> int:
    """Parameters of one perceptron."""
    return (3 if self.gated else 2) * self.features * self.hidden

  @property
  def router(self) -> int:
    """Parameters that choose among a layer's experts."""
    return self.features * self.experts if self.experts > 1 else 0

  @property
  def shared(self) -> int:
    """Parameters of a layer that are not an expert's; norms among them."""
    routed = self.experts > 1
    return (
      self.attention
      + self.router
      + 2 * self.features
      + (0 if routed else self.expert)
    )

  @property
  def routed(self) -> int:
    """Parameters of a layer's experts, where there are several."""
    return self.experts * self.expert if self.experts > 1 else 0

  @property
  def table(self) -> int:
    """Parameters of the embeddings, and so of the head."""
    return self.vocabulary * self.features

  @property
  def parameters(self) -> int:
    """All parameters."""
    ends = self.table * (1 if self.tied else 2) + self.features
    return self.layers * (self.shared + self.routed) + ends

  @property
  def multiplied(self) -> int:
    """Parameters of a layer that multiply a token."""
    return self.attention + self.router + self.used * self.expert

  def variables(self, layers: int) -> int:
    """Returns how many arrays the parameters are, of so many layers."""
    return (9 if self.gated else 8) * layers + 3

  def between(self, tensor: int = 1, stream: int = 1) -> float:
    """Returns how many elements move, of a token, between a layer's products.

    Args:
      tensor: parts into which heads and hidden features are split.
      stream: the same of what goes from layer to layer.
    """
    split = 2 * (self.query_size + self.kv_size) + 3 * self.hidden * self.used
    return 10 * self.features / stream + split / tensor

  def forward_flops(self, length: int) -> float:
    """Returns the operations that a token takes forward.

    Args:
      length: tokens of its sequence; half of them are before it.
    """
    attended = 2 * length * self.query_size
    return self.layers * (2 * self.multiplied + attended) + 2 * self.table

  def cache_bytes(self, context: int, dtype: str) -> float:
    """Returns the bytes of the keys and values of one sequence."""
    return 2 * self.layers * context * self.kv_size * element_bytes(dtype)


MODELS = {
  "llama2-7b": Model(32, 4096, 32, 32, 128, 11008, 32000),
  "llama2-13b": Model(40, 5120, 40, 40, 128, 13824, 32000),
  "llama2-70b": Model(80, 8192, 64, 8, 128, 28672, 32000),
  "llama3-8b": Model(32, 4096, 32, 8, 128, 14336, 128256),
  "llama3-70b": Model(80, 8192, 64, 8, 128, 28672, 128256),
  "llama3-405b": Model(126, 16384, 128, 8, 128, 53248, 128256),
  "mixtral-8x7b": Model(32, 4096, 32, 8, 128, 14336, 32000, experts=8, used=2),
}
