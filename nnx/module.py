"""Modules, and copies of Modules with other attributes."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from nnx import environment, filterlib
from nnx.graphlib import traversal
from nnx.module_base import Module as Module
from nnx.module_base import first_from as first_from
from nnx.module_base import iter_children as iter_children
from nnx.module_base import iter_module_children as iter_module_children
from nnx.module_base import iter_modules as iter_modules
from nnx.module_base import not_found_error
from nnx.module_capture import capture as capture

A = TypeVar("A")

Filter = filterlib.Filter


def with_attributes(
  node: A,
  /,
  *,
  only: Filter = ...,
  raise_if_not_found: bool = True,
  graph: bool | None = None,
  **attributes: Any,
) -> A:
  """Copies an object, with attributes of its modules set.

  The copy shares the Variables of the original.

  Example:

    >>> import nnx
    >>> class Noise(nnx.Module):
    ...   def __init__(self):
    ...     self.deterministic = False
    >>> noise = Noise()
    >>> nnx.with_attributes(noise, deterministic=True).deterministic
    True
    >>> noise.deterministic
    False

  Args:
    node: an object, or a pytree of objects.
    only: a filter of the modules.
    raise_if_not_found: whether each attribute must be found at least once.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.
    **attributes: names and values, set where a module has the attribute.

  Returns:
    The copy.

  Raises:
    ValueError: if no selected module has one of the attributes.
  """
  environment.check_flags(raise_if_not_found=raise_if_not_found)
  selected = filterlib.to_predicate(only)
  remaining = set(attributes)

  def visit(path, value):
    if isinstance(value, Module) and selected(path, value):
      for name, attribute in attributes.items():
        if hasattr(value, name):
          setattr(value, name, attribute)
          remaining.discard(name)
    return value

  result = traversal.recursive_map(visit, node, graph=graph)
  if remaining and raise_if_not_found:
    raise not_found_error(remaining)
  return result


def _view_parameters(node: Any) -> tuple[set[str], bool]:
  """Lists the names that `set_view` takes, and whether it takes any."""
  kinds = inspect.Parameter
  parameters = inspect.signature(node.set_view).parameters
  names = {
    name
    for name, parameter in parameters.items()
    if parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
  }
  any_name = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
  return names, any_name


def view(
  node: A,
  /,
  *,
  only: Filter = ...,
  raise_if_not_found: bool = True,
  graph: bool | None = None,
  **kwargs: Any,
) -> A:
  """Copies an object into another mode, by its modules' `set_view`.

  The copy shares the Variables of the original. Each module whose class has a
  method `set_view` gets the keywords that this method takes.

  Example:

    >>> import nnx
    >>> class Noise(nnx.Module):
    ...   deterministic = False
    ...
    ...   def set_view(self, deterministic: bool | None = None):
    ...     if deterministic is not None:
    ...       self.deterministic = deterministic
    >>> noise = Noise()
    >>> nnx.view(noise, deterministic=True).deterministic, noise.deterministic
    (True, False)

  Args:
    node: an object, or a pytree of objects.
    only: a filter of the modules.
    raise_if_not_found: whether each keyword must be taken by a module.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.
    **kwargs: keywords for `set_view`.

  Returns:
    The copy.

  Raises:
    ValueError: if no selected module takes one of the keywords.
  """
  environment.check_flags(raise_if_not_found=raise_if_not_found)
  selected = filterlib.to_predicate(only)
  remaining = set(kwargs)

  def visit(path, value):
    if hasattr(type(value), "set_view") and selected(path, value):
      names, any_name = _view_parameters(value)
      taken = (
        kwargs
        if any_name
        else {name: kwargs[name] for name in kwargs if name in names}
      )
      value.set_view(**taken)
      remaining.difference_update(taken)
    return value

  result = traversal.recursive_map(visit, node, graph=graph)
  if remaining and raise_if_not_found:
    raise ValueError(
      f"Unused keys found in nnx.view: {sorted(remaining)}. Each must be a"
      " parameter of `set_view` of one of the modules; `nnx.view_info` lists"
      " them."
    )
  return result


def view_info(
  node: Any, /, *, only: Filter = ..., graph: bool | None = None
) -> str:
  """Describes what `view` can set on an object.

  Example:

    >>> import nnx
    >>> class Noise(nnx.Module):
    ...   def set_view(self, deterministic: bool | None = None):
    ...     '''Sets the mode.
    ...
    ...     Args:
    ...       deterministic: whether to add nothing.
    ...     '''
    >>> print(nnx.view_info(Noise()))
    Noise:
      deterministic: bool | None = None
        whether to add nothing.

  Args:
    node: an object, or a pytree of objects.
    only: a filter of the modules.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.

  Returns:
    A paragraph for each class with a method `set_view`, by name.
  """
  selected = filterlib.to_predicate(only)
  classes = {
    type(value)
    for path, value in traversal.iter_graph(node, graph=graph)
    if hasattr(type(value), "set_view") and selected(path, value)
  }
  lines = []
  for cls in sorted(classes, key=lambda cls: cls.__qualname__):
    lines.append(f"{cls.__qualname__}:")
    signature = inspect.signature(cls.set_view)
    descriptions = _argument_descriptions(inspect.getdoc(cls.set_view))
    if descriptions is None:
      lines.append(f"  set_view{signature}")
      continue
    for name, parameter in signature.parameters.items():
      if name in ("self", "args", "kwargs"):
        continue
      lines.append(f"  {_parameter_text(parameter)}")
      lines.extend(f"    {line}" for line in descriptions.get(name, ()))
  return "\n".join(lines)


def _parameter_text(parameter: inspect.Parameter) -> str:
  annotation = parameter.annotation
  if isinstance(annotation, type):
    annotation = annotation.__name__
  text = parameter.name
  if annotation is not inspect.Parameter.empty:
    text += f": {annotation}"
  if parameter.default is not inspect.Parameter.empty:
    text += f" = {parameter.default}"
  return text


def _argument_descriptions(doc: str | None) -> dict[str, list[str]] | None:
  """Reads the `Args:` section of a docstring: lines by argument."""
  if doc is None:
    return None
  descriptions: dict[str, list[str]] = {}
  current = None
  inside = False
  for line in doc.splitlines():
    indent = len(line) - len(line.lstrip())
    if not inside:
      inside = line.strip() == "Args:"
    elif line.strip() and indent == 0:
      break
    elif indent == 2 and ":" in line:
      name, _, rest = line.strip().partition(":")
      current = descriptions.setdefault(name, [])
      current.append(rest.strip())
    elif current is not None and line.strip():
      current.append(line.strip())
  return descriptions
