"""Checkpoints in folders, as transformers has them."""

import json
import pathlib
import re
from typing import Any

import numpy as np

from examples.llm import config as config_lib


class Checkpoint:
  """A folder's weights.

  Args:
    path: of a folder with `config.json` and `*.safetensors`.

  Attributes:
    config: the model's.
    names: of the weights of the part for text.

  Raises:
    FileNotFoundError: if there are no such files.
    ValueError: if the model is of another architecture.
  """

  def __init__(self, path: str | pathlib.Path):
    import safetensors

    path = pathlib.Path(path)
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    self.config = config_lib.from_json(values)
    files = sorted(path.glob("*.safetensors"))
    if not files:
      raise FileNotFoundError(f"`{path}` must have files `*.safetensors`.")
    self._stored = {}
    for file in files:
      opened = safetensors.safe_open(file, framework="numpy")
      for name in opened.keys():
        if "vision_tower" in name or "multi_modal_projector" in name:
          continue
        self._stored[_short(name)] = opened, name
    self.names = frozenset(self._stored)

  def read(self, name: str, dtype: Any) -> np.ndarray:
    """Returns a weight.

    Args:
      name: one of `names`.
      dtype: of the result.
    """
    opened, stored = self._stored[name]
    return opened.get_tensor(stored).astype(dtype, copy=False)


def _short(name: str) -> str:
  return re.sub(r"^(model\.|language_model\.)*", "", name)
