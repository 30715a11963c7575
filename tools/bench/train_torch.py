"""The models of `train_models` in PyTorch, and a step of training them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from tools.bench import train_models


class _Bottleneck(nn.Module):
  def __init__(self, inputs: int, features: int, strides: int):
    super().__init__()
    outputs = 4 * features
    self.conv1 = _conv(inputs, features, 1, 1)
    self.norm1 = nn.BatchNorm2d(features)
    self.conv2 = _conv(features, features, 3, strides)
    self.norm2 = nn.BatchNorm2d(features)
    self.conv3 = _conv(features, outputs, 1, 1)
    self.norm3 = nn.BatchNorm2d(outputs)
    self.shortcut = None
    if strides > 1 or inputs != outputs:
      self.shortcut = _conv(inputs, outputs, 1, strides)
      self.shortcut_norm = nn.BatchNorm2d(outputs)

  def forward(self, x):
    y = functional.relu(self.norm1(self.conv1(x)))
    y = functional.relu(self.norm2(self.conv2(y)))
    y = self.norm3(self.conv3(y))
    if self.shortcut is not None:
      x = self.shortcut_norm(self.shortcut(x))
    return functional.relu(x + y)


def _conv(inputs: int, outputs: int, size: int, strides: int) -> nn.Conv2d:
  return nn.Conv2d(
    inputs, outputs, size, strides, padding=size // 2, bias=False
  )


class _ResNet(nn.Module):
  def __init__(self, spec: train_models.ResNet):
    super().__init__()
    features = spec.features
    self.conv = _conv(3, features, 7, 2)
    self.norm = nn.BatchNorm2d(features)
    blocks, inputs = [], features
    for stage, count in enumerate(spec.blocks):
      for block in range(count):
        strides = 2 if stage and not block else 1
        blocks.append(_Bottleneck(inputs, features, strides))
        inputs = 4 * features
      features *= 2
    self.blocks = nn.ModuleList(blocks)
    self.head = nn.Linear(inputs, spec.classes)

  def forward(self, images):
    x = functional.relu(self.norm(self.conv(images)))
    x = functional.max_pool2d(x, 3, 2, 1)
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean((2, 3)))


class _Attention(nn.Module):
  def __init__(self, features: int, heads: int):
    super().__init__()
    self.heads = heads
    self.query = nn.Linear(features, features)
    self.key = nn.Linear(features, features)
    self.value = nn.Linear(features, features)
    self.out = nn.Linear(features, features)

  def forward(self, x, is_causal):
    query, key, value = (
      project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
      for project in (self.query, self.key, self.value)
    )
    y = functional.scaled_dot_product_attention(
      query, key, value, is_causal=is_causal
    )
    return self.out(y.transpose(1, 2).flatten(2))


class _Block(nn.Module):
  def __init__(self, spec: train_models.Transformer):
    super().__init__()
    features = spec.features
    self.norm1 = nn.LayerNorm(features, eps=1e-6)
    self.attention = _Attention(features, spec.heads)
    self.norm2 = nn.LayerNorm(features, eps=1e-6)
    self.wide = nn.Linear(features, 4 * features)
    self.narrow = nn.Linear(4 * features, features)

  def forward(self, x, is_causal):
    x = x + self.attention(self.norm1(x), is_causal)
    y = functional.gelu(self.wide(self.norm2(x)), approximate="tanh")
    return x + self.narrow(y)


class _ViT(nn.Module):
  def __init__(self, spec: train_models.ViT):
    super().__init__()
    self.embed = nn.Conv2d(3, spec.features, spec.patch, spec.patch)
    self.position = nn.Parameter(torch.zeros(spec.tokens, spec.features))
    self.blocks = nn.ModuleList(_Block(spec) for _ in range(spec.layers))
    self.norm = nn.LayerNorm(spec.features, eps=1e-6)
    self.head = nn.Linear(spec.features, spec.classes)

  def forward(self, images):
    x = self.embed(images).flatten(2).transpose(1, 2) + self.position
    for block in self.blocks:
      x = block(x, False)
    return self.head(self.norm(x).mean(1))


class _GPT(nn.Module):
  def __init__(self, spec: train_models.GPT):
    super().__init__()
    self.embed = nn.Embedding(spec.words, spec.features)
    self.position = nn.Parameter(torch.zeros(spec.tokens, spec.features))
    self.blocks = nn.ModuleList(_Block(spec) for _ in range(spec.layers))
    self.norm = nn.LayerNorm(spec.features, eps=1e-6)
    self.head = nn.Linear(spec.features, spec.words, bias=False)

  def forward(self, words):
    x = self.embed(words) + self.position
    for block in self.blocks:
      x = block(x, True)
    return self.head(self.norm(x))


_TYPES: dict[type, Callable[[Any], nn.Module]] = {
  train_models.ResNet: _ResNet,
  train_models.ViT: _ViT,
  train_models.GPT: _GPT,
}

# What we call the entries of a state of PyTorch.
_NAMES = {
  "weight": ("kernel", "scale", "embedding"),
  "running_mean": ("mean",),
  "running_var": ("var",),
}


def _as_torch(array: jax.Array, shape: tuple[int, ...]) -> torch.Tensor:
  """Turns an array into an entry of the shape given."""
  values = np.asarray(array)
  if len(shape) == 4:  # from [h, w, in, out]
    values = values.transpose(3, 2, 0, 1)
  elif len(shape) == 2 and values.shape != shape:  # from [in, out]
    values = values.reshape(shape[::-1]).T
  return torch.from_numpy(np.array(values.reshape(shape)))


def _state(
  model: nn.Module, arrays: dict[str, jax.Array]
) -> dict[str, torch.Tensor]:
  """Returns the state of a model that has the values of ours, by path."""
  state = {}
  for name, value in model.state_dict().items():
    folder, _, last = name.replace(".", "/").rpartition("/")
    for ours in _NAMES.get(last, (last,)):
      path = f"{folder}/{ours}" if folder else ours
      if path in arrays:
        state[name] = _as_torch(arrays[path], tuple(value.shape))
  return state


class Step:
  """A step of training, with the losses of `train_models` and AdamW or SGD.

  Args:
    spec: of the model.
    dtype: that of `torch.autocast`, if it is not float32.
    compiled: whether `torch.compile` has the model.
    make_optimizer: of the parameters.
  """

  def __init__(
    self,
    spec: train_models.Spec,
    dtype: str,
    compiled: bool,
    make_optimizer: Callable[[Any], Any],
  ):
    self._model = _TYPES[type(spec)](spec)
    inputs, labels = train_models.batch(spec)
    self._inputs = torch.from_numpy(np.array(inputs))
    if isinstance(spec, train_models.GPT):
      self._inputs = self._inputs.long()
    else:
      self._inputs = self._inputs.permute(0, 3, 1, 2)  # channels are last
      self._model = self._model.to(memory_format=torch.channels_last)
    self._labels = torch.from_numpy(np.array(labels)).long()
    self._half = None if dtype == "float32" else getattr(torch, dtype)
    self._call = torch.compile(self._model) if compiled else self._model
    self._make_optimizer = make_optimizer

  def start(self, arrays: dict[str, jax.Array]) -> Any:
    """Gives the model our values, by path, and returns a new optimizer."""
    state = _state(self._model, arrays)
    fault = self._model.load_state_dict(state, strict=False)
    missing = [
      name for name in fault.missing_keys if not name.endswith("_tracked")
    ]
    if missing:
      raise ValueError(f"the model has {missing}, and ours does not")
    return self._make_optimizer(self._model.parameters())

  def __call__(self, optimizer: Any) -> torch.Tensor:
    """Takes a step and returns the loss."""
    optimizer.zero_grad()
    with torch.autocast("cpu", self._half, enabled=self._half is not None):
      logits = self._call(self._inputs)
    loss = functional.cross_entropy(
      logits.float().flatten(0, -2), self._labels.flatten()
    )
    loss.backward()
    optimizer.step()
    return loss.detach()
