"""Linen's errors in terms of the bridged module, with what to do."""

from __future__ import annotations

import functools
import re
from typing import Any

from flax import errors, linen

_FIXES = {
  errors.InvalidRngError: (
    "Give the module a stream for it, as in `ToNNX(module,"
    " rngs=nnx.Rngs(0, {name}=1))`, or the call a key,"
    " `rngs={{{name!r}: key}}`."
  ),
  errors.ScopeParamNotFoundError: (
    "Call `lazy_init` with samples of the arguments, or load variables that"
    " have it by `bridge.load_linen_variables`."
  ),
  errors.ScopeVariableNotFoundError: (
    "Call `lazy_init` with samples of the arguments, or load variables that"
    " have it by `bridge.load_linen_variables`."
  ),
  errors.ScopeCollectionNotFound: (
    "Call `lazy_init` with samples of the arguments, or load variables that"
    " have it by `bridge.load_linen_variables`."
  ),
  errors.ModifyScopeVariableError: (
    "Pass `mutable=[{collection!r}]`, or leave `mutable` out, which lets the"
    " module write all that it has but parameters."
  ),
  errors.ScopeParamShapeError: (
    "Call it with arguments of the shapes that it was initialised with, or make"
    " it anew."
  ),
  errors.NameInUseError: "Rename one of the two in the Linen module.",
}


# Of a class that says nothing.
_DUPLICATE = "Duplicate use of scope name"


def explained(error: Exception, module: str) -> Exception:
  """Returns an error of Linen that also says which bridged module it is about.

  Example:

    >>> from bridge import linen_errors
    >>> from flax import errors
    >>> error = errors.NameInUseError("param", "w", "Dense")
    >>> print(linen_errors.explained(error, "`ToNNX(Dense)`"))
    `ToNNX(Dense)`: Could not create param "w" in Module Dense: Name in use. \
Rename one of the two in the Linen module.

  Args:
    error: what Linen raised.
    module: how to call the bridged module.

  Returns:
    An exception of the same class, that is a `ValueError` as well; the error
    itself if there is nothing to add.
  """
  fix = _FIXES.get(type(error))
  if type(error) is ValueError and str(error).startswith(_DUPLICATE):
    fix = _FIXES[errors.NameInUseError]
  if fix is None:
    return error
  text = re.sub(r" *\(https?://\S+\) *$", "", str(error))
  where = ""
  names = re.findall(r'"([^"]*)"', text)
  collection = re.search(r'collection "([^"]*)"', text)
  if isinstance(error, errors.InvalidRngError):
    # Linen says the name of the submodule alone.
    where = f" (at `{_path(error, text.split()[0])}`)"
  fix = fix.format(
    name=names[-1] if names else "", collection=collection and collection[1]
  )
  kind: Any = type(error)
  cls = kind if kind is ValueError else _class(kind)
  return cls(f"{module}{where}: {text.rstrip('.')}. {fix}")


@functools.cache
def _class(cls: type[Exception]) -> type[Exception]:
  def init(self: Any, text: str) -> None:
    ValueError.__init__(self, text)

  # To pyright all of these are ValueErrors already.
  return type(cls.__name__, (cls, ValueError), {"__init__": init})  # pyright: ignore[reportGeneralTypeIssues]


def _path(error: BaseException, name: str) -> str:
  """Returns the path of the Linen module of a name that an error came from.

  Args:
    error: the error. Frames of flax may be missing from its traceback.
    name: the module's own name.
  """
  path: tuple[str, ...] = ()
  traceback = error.__traceback__
  while traceback is not None:
    module = traceback.tb_frame.f_locals.get("self")
    if isinstance(module, linen.Module) and module.scope is not None:
      path = module.scope.path
    traceback = traceback.tb_next
  return "/".join(path if path[-1:] == (name,) else (*path, name))
