"""Displays of objects in notebooks, by treescope where it is installed."""

from __future__ import annotations

from typing import Any

from nnx import reprlib


def display(*targets: Any) -> None:
  """Shows objects: by treescope in a notebook, as text elsewhere.

  Example:

    >>> import nnx
    >>> nnx.display(nnx.Param(1))
    Param(
      value=1
    )

  Args:
    *targets: anything.
  """
  treescope = _treescope() if reprlib.in_notebook() else None
  for target in targets:
    if treescope is None:
      print(target)
    else:
      treescope.display(target, ignore_exceptions=True, autovisualize=True)


def _treescope() -> Any:
  """Returns the package, or None where it is not installed."""
  try:
    import treescope
  except ImportError:
    return None
  return treescope


def to_treescope(
  target: reprlib.Displayable, path: str | None, subtree_renderer: Any
) -> Any:
  """Renders an object for treescope from what its class says that it shows.

  Example:

    >>> import nnx
    >>> hasattr(nnx.Param(1), "__treescope_repr__")  # which calls this
    True

  Args:
    target: an object of this library.
    path: where it is, as treescope says it.
    subtree_renderer: renders what is inside.

  Returns:
    treescope's rendering.
  """
  from treescope import rendering_parts, repr_lib

  parts = target._display()
  if parts.separator != "=":
    return repr_lib.render_dictionary_wrapper(
      object_type=parts.type or type(target),
      wrapped_dict=_plain_dict(parts),
      path=path,
      subtree_renderer=subtree_renderer,
    )
  comment = None
  if parts.comment:
    comment = rendering_parts.comment_color(
      rendering_parts.text(f" # {parts.comment}")
    )
  children = []
  for i, (label, value) in enumerate(parts.items):
    last = i == len(parts.items) - 1
    name = "" if label is None else f"{label}="
    child_path = None
    if path is not None:
      child_path = f"{path}[{i}]" if label is None else f"{path}.{label}"
    comma = (
      rendering_parts.fold_condition(expanded=rendering_parts.text(","))
      if last
      else rendering_parts.siblings(
        ",", rendering_parts.fold_condition(collapsed=rendering_parts.text(" "))
      )
    )
    children.append(
      rendering_parts.build_full_line_with_annotations(
        rendering_parts.siblings_with_annotations(
          name, subtree_renderer(value, path=child_path)
        ),
        comma,
      )
    )
  # Text in angle brackets is not Python code.
  less = rendering_parts.roundtrip_condition(
    roundtrip=rendering_parts.text("<")
  )
  more = rendering_parts.roundtrip_condition(
    roundtrip=rendering_parts.text(">")
  )
  return rendering_parts.build_foldable_tree_node_from_children(
    prefix=rendering_parts.siblings(
      less,
      rendering_parts.maybe_qualified_type_name(parts.type or type(target)),
      parts.start,
    ),
    children=children,
    suffix=rendering_parts.siblings(parts.end, more),
    path=path,
    first_line_annotation=comment,
  )


def _plain_dict(parts: reprlib.Parts) -> dict[Any, Any]:
  return {
    label: _plain_dict(value) if isinstance(value, reprlib.Parts) else value
    for label, value in parts.items
  }


reprlib.set_notebook_renderer(to_treescope)
