"""What `ToLinen` refuses, and the words for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen
from flax.core import meta

import nnx

from . import layout as layout_lib
from .flax_nnx import is_of_flax_nnx


def check_arguments(model: linen.Module) -> None:
  cls = model.nnx_class
  kind = type(cls).__name__
  if not isinstance(cls, type) and (
    isinstance(cls, nnx.Pytree) or is_of_flax_nnx(cls)
  ):
    raise TypeError(
      "`nnx_class` must be a class of Modules, but got an instance of"
      f" `{kind}`: pass `ToLinen({kind}, args=...)`."
    )
  if isinstance(cls, linen.Module) or _is_class_of(cls, linen.Module):
    name = kind if isinstance(cls, linen.Module) else cls.__name__
    raise TypeError(
      f"`nnx_class` must be a class of `nnx`, but got `{name}` of Linen: it"
      " needs no bridge, use it as it is."
    )
  if is_of_flax_nnx(cls):
    raise TypeError(
      f"`nnx_class` must be a class of `nnx`, but got `{cls.__name__}` of"
      " `flax.nnx`: pass a function that returns"
      " `nnx.bridge.from_flax_nnx(...)` of an object of it."
    )
  if not callable(cls):
    raise TypeError(
      "`nnx_class` must be a class of Modules or a function that makes one, but"
      f" got {cls!r}."
    )
  if not isinstance(model.args, (tuple, list)):
    raise TypeError(
      "`args` must be a tuple of arguments of the Module, but got"
      f" {model.args!r}: write `args=(...,)`, or use `to_linen`."
    )
  if not isinstance(model.kwargs, Mapping):
    raise TypeError(
      "`kwargs` must map names to arguments of the Module, but got"
      f" {model.kwargs!r}."
    )
  if "rngs" in model.kwargs and not model.skip_rng:
    raise ValueError(
      "`kwargs` must not have `rngs`, since the keys given to `init` make them:"
      " leave it out, or pass `skip_rng=True` to keep yours."
    )
  for name in ("metadata_type", "metadata_fn"):
    value = getattr(model, name)
    if value is not None and not callable(value):
      raise TypeError(
        f"`{name}` must be a class or function, or None, but got {value!r}."
      )
  if _is_class_of(model.metadata_type, meta.Partitioned):
    raise TypeError(
      "`metadata_type` must take the type, value and metadata of a Variable,"
      f" but got `{model.metadata_type.__name__}`: pass a function of the"
      " Variable as `metadata_fn` instead."
    )


def _is_class_of(value: Any, base: type) -> bool:
  return isinstance(value, type) and issubclass(value, base)


def check_made(model: linen.Module, made: Any) -> Any:
  if not isinstance(made, nnx.Pytree):
    raise TypeError(
      f"`nnx_class` of {describe(model)} must make a Module of `nnx`, but made"
      f" an object of type `{type(made).__module__}.{type(made).__name__}`."
    )
  return made


def method_of(cls: Any, method: Any) -> Callable[..., Any]:
  """Returns the function to call with the Module as its first argument."""
  if callable(method):
    return method
  name = method or "__call__"
  if not isinstance(name, str):
    raise TypeError(
      f"`nnx_method` must be a function or the name of a method, but got"
      f" {method!r}."
    )
  if isinstance(cls, type) and not callable(getattr(cls, name, None)):
    raise AttributeError(
      f"`nnx_method` must name a method of `{cls.__name__}`, but it has no"
      f" `{name}`."
    )
  return lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs)


def describe(model: linen.Module) -> str:
  name = getattr(model.nnx_class, "__name__", repr(model.nnx_class))
  path = "/".join(model.scope.path) if model.scope is not None else ""
  return f"`ToLinen({name})`" + (f" at `{path}`" if path else "")


def missing_text(
  model: linen.Module, slot: layout_lib.Slot, collections: Mapping
) -> str:
  path = "/".join(map(str, slot.path))
  return (
    f"{describe(model)} needs the variable `{path}` in the collection"
    f" `{slot.collection or layout_lib.COLLECTION}`, but the variables given"
    f" have {sorted(collections) or 'no collections'}. Pass all the variables"
    " that `init` returned."
  )


def check_streams(model: linen.Module, defaulted: Mapping[str, list]) -> None:
  """Refuses randomness for which nobody gave a key."""
  for tag, counters in defaulted.items():
    if any(count.raw_value is not before for count, before in counters):
      raise ValueError(
        f"{describe(model)} drew random numbers from the stream `{tag}`, but"
        f" no key was given for it: pass `rngs={{{tag!r}: key}}` to `apply`."
      )
