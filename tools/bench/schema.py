"""Checks records against `schema.json`."""

import functools
import json
import math
import pathlib
from typing import Any

import jsonschema
from jsonschema import exceptions, validators

_PATH = pathlib.Path(__file__).with_name("schema.json")
_TYPES = jsonschema.Draft202012Validator.TYPE_CHECKER


def _is_number(checker: Any, value: Any) -> bool:
  """Says whether JSON has such a number: it has no NaN and no infinity."""
  del checker
  return _TYPES.is_type(value, "number") and math.isfinite(value)


_Validator = validators.extend(
  jsonschema.Draft202012Validator,
  type_checker=_TYPES.redefine("number", _is_number),
)


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
  error = exceptions.best_match(_Validator(load()).iter_errors(records))
  if error is not None:
    where = error.json_path.replace("$", "records", 1)
    raise ValueError(
      f"`{where}` must follow tools/bench/schema.json, but {error.message}."
    )
