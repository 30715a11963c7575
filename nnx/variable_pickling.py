"""How Variables are pickled: by attributes that programs of Flax know too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from nnx import tracers
from nnx.variable_metadata import HasMetadata, is_ref, normalize_metadata


class _MetadataView(MutableMapping):
  """The metadata of a Variable, read and written as those of a dict."""

  def __init__(self, variable: HasMetadata):
    self._variable = variable

  def __getitem__(self, name: str) -> Any:
    return self._variable.get_metadata(name)

  def __setitem__(self, name: str, value: Any) -> None:
    self._variable.set_metadata(name, value)

  def __delitem__(self, name: str) -> None:
    self._variable.del_metadata(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._variable.get_metadata())

  def __len__(self) -> int:
    return len(self._variable.get_metadata())

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Mapping) and dict(self) == dict(other)

  def __repr__(self) -> str:
    return repr(self._variable.get_metadata())


# Metadata by which Flax says how it keeps a Variable.
_FLAX_METADATA = frozenset(
  "is_hijax has_ref is_mutable hijax ref mutable eager_sharding".split()
)


class Pickled(HasMetadata):
  """The part of a Variable that is pickled, and the attributes named in it."""

  __slots__ = ()

  @property
  def _raw_value(self) -> Any:
    return self.raw_value

  @_raw_value.setter
  def _raw_value(self, value: Any) -> None:
    # They set it where the check of the trace is to be avoided.
    with tracers.unchecked():
      self.raw_value = value

  @property
  def _var_metadata(self) -> MutableMapping[str, Any]:
    return _MetadataView(self)

  @_var_metadata.setter
  def _var_metadata(self, metadata: Mapping[str, Any]) -> None:
    self._replace_metadata(normalize_metadata(metadata))

  @property
  def _trace_state(self) -> tracers.TraceState:
    return tracers.TraceState.of(self)

  @_trace_state.setter
  def _trace_state(self, state: tracers.TraceState) -> None:
    tracers.TraceState.of(self)._jax_trace = state._jax_trace

  def __getstate__(self) -> dict[str, Any]:
    raw: Any = self.raw_value
    return {
      "_raw_value": raw[...] if is_ref(raw) else raw,
      "_trace_state": tracers.TraceState(),
      "_var_metadata": dict(self._metadata),
    }

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    metadata = state["_var_metadata"]
    if metadata.get("hijax") is False or "is_hijax" in metadata:
      # Pickled by Flax, which writes down all of its switches.
      kept = "ref" if metadata.get("ref") else None
      metadata = {
        name: value
        for name, value in metadata.items()
        if name not in _FLAX_METADATA or name == kept
      }
    metadata = normalize_metadata(metadata)
    self._replace_metadata(metadata)
    self._stored = self._in_store(state["_raw_value"], metadata)
