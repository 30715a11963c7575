"""Checks records against `schema.json`.

Understands the part of JSON Schema that the file uses and refuses the rest, so
that a keyword cannot be added there without being checked here.
"""

import functools
import json
import pathlib
from typing import Any

_PATH = pathlib.Path(__file__).with_name("schema.json")
_TYPES: dict[str, type | tuple[type, ...]] = {
  "array": list,
  "boolean": bool,
  "integer": int,
  "null": type(None),
  "number": (int, float),
  "object": dict,
  "string": str,
}
_ANNOTATIONS = {"$schema", "title", "description"}


@functools.cache
def load() -> dict[str, Any]:
  """Returns the schema as a dictionary."""
  return json.loads(_PATH.read_text())


def validate(records: Any) -> None:
  """Checks a whole result file.

  Args:
    records: what `json.load` returned, or what is about to be written.

  Raises:
    ValueError: if the records do not follow `schema.json`; says where.

  Example:
    >>> validate([])
  """
  _validate(records, load(), "records")


def _has_type(value: Any, name: str) -> bool:
  if isinstance(value, bool) and name != "boolean":
    return False
  return isinstance(value, _TYPES[name])


def _validate(value: Any, schema: dict[str, Any], where: str) -> None:
  """Raises `ValueError` if `value` at `where` does not follow `schema`."""
  for keyword, wanted in schema.items():
    if keyword in _ANNOTATIONS:
      continue
    if keyword == "type":
      names = wanted if isinstance(wanted, list) else [wanted]
      if not any(_has_type(value, name) for name in names):
        raise ValueError(
          f"`{where}` must be of type {' or '.join(names)}, but got {value!r}."
        )
    elif keyword == "enum":
      if value not in wanted:
        raise ValueError(
          f"`{where}` must be one of {wanted}, but got {value!r}."
        )
    elif keyword == "minLength":
      if len(value) < wanted:
        raise ValueError(
          f"`{where}` must have at least {wanted} characters, but got "
          f"{value!r}."
        )
    elif keyword == "minimum":
      if value < wanted:
        raise ValueError(
          f"`{where}` must be at least {wanted}, but got {value!r}."
        )
    elif keyword == "exclusiveMinimum":
      # Written so that not-a-number fails.
      if value is not None and not value > wanted:
        raise ValueError(
          f"`{where}` must be greater than {wanted}, but got {value!r}."
        )
    elif keyword == "required":
      missing = sorted(set(wanted) - set(value))
      if missing:
        raise ValueError(f"`{where}` must have the keys {missing}.")
    elif keyword == "properties":
      for key, inner in wanted.items():
        if key in value:
          _validate(value[key], inner, f"{where}.{key}")
    elif keyword == "additionalProperties":
      extra = sorted(set(value) - set(schema.get("properties", {})))
      if wanted is False and extra:
        raise ValueError(
          f"`{where}` must not have the keys {extra}: describe them in "
          "schema.json first."
        )
      if isinstance(wanted, dict):
        for key in extra:
          _validate(value[key], wanted, f"{where}.{key}")
    elif keyword == "items":
      for index, item in enumerate(value):
        _validate(item, wanted, f"{where}[{index}]")
    else:
      raise ValueError(
        f"Keyword `{keyword}` of schema.json is not understood: teach "
        "tools/bench/schema.py to check it."
      )
