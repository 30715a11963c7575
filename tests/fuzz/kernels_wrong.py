"""A fuzzer of calls with one thing wrong: each must be refused in words.

Refused is a ValueError or TypeError whose text is a sentence that names what is
wrong in backticks; the arguments stay as they were.
"""

from collections.abc import Callable
import functools
import re
from typing import Any

import jax
import numpy as np

from kernels import batch_stat, decode_attention, kv_cache
from tests.fuzz import kernels_attention, worker
from tests.fuzz import kernels_data as data

pick, chance = data.pick, data.chance
NAN, INF = float("nan"), float("inf")

# A wrong value of an argument, drawn; NONE where the call has nothing to spoil.
NONE = object()
Arguments = dict[str, Any]
Wrong = Callable[[np.random.Generator, Any], Any]


def refuses(function: Any, arguments: Arguments, spoilt: str) -> None:
  """Checks that a call is refused, and that its arguments are as they were."""
  arrays = {
    name: jax.numpy.asarray(value)
    for name, value in arguments.items()
    if isinstance(value, np.ndarray) and value.dtype.itemsize < 8
  }
  before = {name: np.array(value) for name, value in arrays.items()}
  try:
    function(**(arguments | arrays))
  except (ValueError, TypeError) as error:
    text = str(error)
    named = re.search(r"`.+`", text) or "keyword argument" in text
    assert named, f"{spoilt}: `{text}` does not name an argument"
    assert text.rstrip().endswith((".", "'", "?")), f"{spoilt}: `{text}`"
    assert "Traceback" not in text and len(text) < 800, f"{spoilt}: `{text}`"
  else:
    raise AssertionError(f"{function.__name__} takes {spoilt}")
  for name, value in arrays.items():
    data.assert_same(value, before[name], f"{name} after {spoilt}")


def _one_more(rng, x):
  """One axis longer by one."""
  if x is None or x.ndim == 0:
    return NONE
  axis = int(rng.integers(x.ndim))
  return np.concatenate([x, x.take([0], axis)], axis) if x.size else NONE


def _rank(rng, x):
  """An axis more or less."""
  if x is None or x.size == 0 or x.ndim == 0:
    return NONE
  return x[None] if chance(rng) else x[0]


def _axis_more(rng, x):
  return NONE if x is None else np.asarray(x)[None, None]


def _no_float(rng, x):
  if x is None:
    return NONE
  return np.asarray(x).astype(pick(rng, np.int32, np.complex64, np.bool_))


def _no_integer(rng, x):
  if x is None:
    return NONE
  return np.asarray(x).astype(pick(rng, np.float32, np.complex64, np.bool_))


def _other_float(rng, x):
  if x is None:
    return NONE
  others = [name for name in data.FLOATS if name != x.dtype.name]
  return x.astype(data.dtype_of(pick(rng, *others)))


def _no_array(rng, x):
  del x
  return pick(rng, None, "text", object(), {1: 2}, print)


def _no_array_if_given(rng, x):
  return NONE if x is None else pick(rng, "text", object(), {1: 2})


def one_of(*values: Any) -> Wrong:
  """A wrong value that does not depend on the right one."""
  return lambda rng, x: pick(rng, *values)


def if_given(*values: Any) -> Wrong:
  """The same, of an argument that is not None."""
  return lambda rng, x: NONE if x is None else pick(rng, *values)


def unless_given(*values: Any) -> Wrong:
  """The same, of an argument that is None."""
  return lambda rng, x: pick(rng, *values) if x is None else NONE


_STATIC: dict[str, tuple[Wrong, ...]] = {
  "layout": (one_of("bshn", "BSNH", None, 3, ("bsnh",)),),
  "implementation": (one_of("fastest", None, 3, "tpu"),),
}

# What goes wrong with an argument, whatever the others are.
_CACHE: dict[str, tuple[Wrong, ...]] = _STATIC | {
  "cache_k": (_one_more, _rank, _no_array, _no_float),
  "cache_v": (_rank, _no_array, _no_float),
  "new_k": (_one_more, _rank, _no_array, _no_float),
  "new_v": (_one_more, _rank, _no_array, _no_float),
  "index": (
    _axis_more, _no_array, _no_integer,
    one_of(-1, 2**31, 2**32 + 3, np.int64(2**32), np.int64(2**40 + 1), 1.5, -7),
  ),
  "lengths": (_axis_more, _no_integer, one_of(-1, 1000, 2**32, 0.5, "all")),
  "layer": (
    if_given(-1, 99, 2**32, np.int64(2**33), 0.0, np.zeros(2, "i4")),
    unless_given(0),
  ),
  "block_table": (
    _axis_more, _no_integer,
    lambda rng, x: NONE if x is None else np.full_like(x, -1),
    lambda rng, x: NONE if x is None else np.full_like(x, 99999),
    lambda rng, x: NONE if x is None else x + np.int64(2**32),
    unless_given("text", np.zeros((3,), "i4")),
  ),
  "cache_batch_index": (
    _axis_more, _no_integer,
    lambda rng, x: NONE if x is None else np.full_like(x, -1),
    lambda rng, x: NONE if x is None else np.full_like(x, 99999),
    lambda rng, x: NONE if x is None else x + np.int64(2**32),
  ),
  "k_scale": (_axis_more, _no_float, unless_given(1.0), if_given(None, 1)),
  "v_scale": (_axis_more, _no_float, unless_given(1.0), if_given(None, 1)),
  "block_tabel": (one_of(None, 3),),
}  # fmt: skip

_ATTENTION: dict[str, tuple[Wrong, ...]] = _CACHE | {
  "q": (_rank, _no_array, _no_float),
  "left_padding": (_axis_more, _no_integer, _no_array_if_given),
  "scale": (one_of(NAN, INF, -INF, "large"),),
  "window": (
    one_of(
      0, -1, 2.5, NAN, "3", (1,), (1, 2, 3), (-2, 0), (1.9, 0), (0, 0.5),
      (NAN, 1), (None, 1), {},
    ),
  ),
  "chunk": (one_of(0, -1, 2.7, NAN, INF, "3", (2,)),),
  "softcap": (one_of(0.0, 0, -1.0, NAN, INF, "3"),),
  "alibi_slopes": (_one_more, _axis_more, _no_float, _no_array_if_given),
  "bias": (_rank, _no_float, _no_array_if_given, unless_given(1.0)),
  "mask": (
    _rank, _no_array_if_given,
    lambda rng, x: NONE if x is None else x.astype(np.float32),
  ),
  "sinks": (_one_more, _axis_more, _no_float, _no_array_if_given),
  "qv": (_one_more, _rank, _no_float, _other_float, _no_array_if_given),
  "rope_cos": (_one_more, _rank, _no_float, if_given(None)),
  "rope_sin": (_one_more, _rank, _no_float, if_given(None)),
  "rope_positions": (
    _axis_more, _no_integer,
    lambda rng, x: NONE if x is None else np.full_like(x, 10**6),
    lambda rng, x: NONE if x is None else np.full_like(x, -1),
    lambda rng, x: NONE if x is None else x + np.int64(2**32),
  ),
  "out_dtype": (one_of("int8", "int32", "complex64", "float8_e5m2", "half?"),),
  "sink": (one_of(None, 3),),
}  # fmt: skip


def _cannot_spoil(name: str, arguments: Arguments, value: Any) -> bool:
  """Whether what looks wrong may be right beside the other arguments."""
  given = arguments.get(name)
  if name == "cache_k" and isinstance(value, np.ndarray):
    # One dtype for both is checked first, and so is wrong in any case.
    return False
  if name in ("index", "lengths") and isinstance(value, np.ndarray):
    return value.ndim < 2 and np.issubdtype(value.dtype, np.integer)
  if name == "index" and isinstance(value, int) and arguments.get("ring"):
    return 0 <= value < 2**31
  if name in ("k_scale", "v_scale") and isinstance(value, np.ndarray):
    shapes = (value.shape == (1, 1), value.ndim < 3)
    return np.issubdtype(value.dtype, np.floating) and all(shapes)
  if name == "lengths" and given is None and isinstance(value, np.ndarray):
    return True
  return False


def _spoil_and_call(
  rng: np.random.Generator,
  function: Any,
  arguments: Arguments,
  table: dict[str, tuple[Wrong, ...]],
) -> None:
  while True:
    name = pick(rng, *table)
    wrong = pick(rng, *table[name])
    value = wrong(rng, arguments.get(name))
    if value is not NONE and not _cannot_spoil(name, arguments, value):
      break
  shown = value
  if isinstance(value, np.ndarray) and value.size > 8:
    shown = f"{value.dtype.name}{list(value.shape)}"
  refuses(function, arguments | {name: value}, f"`{name}={shown!r}`")


def attention_calls(rng: np.random.Generator) -> worker.Case:
  """Calls of `update`, `decode_attention` and `attend`."""
  problem = kernels_attention.draw_problem(rng)
  kind = pick(rng, "update", "attention")
  table = dict(_CACHE if kind == "update" else _ATTENTION)
  args, index, kwargs = kernels_attention.draw_arrays(rng, problem, known=True)
  if "lengths" in kwargs:
    kwargs["lengths"] = np.maximum(kwargs["lengths"], 1)
  names = ["cache_k", "cache_v", "q", "new_k", "new_v"]
  arguments = dict(zip(names, args)) | {"index": index}
  arguments |= problem.static | kwargs
  if problem.addressing != "aligned" and chance(rng):
    both = {"block_table", "cache_batch_index"}
    table |= dict.fromkeys(both, (unless_given(np.zeros(problem.b, "i4")),))
  if kind == "update" and problem.appends:
    function: Any = kv_cache.update
    arguments.pop("q")
    keep = {*kernels_attention.UPDATE_OPTIONS, *names, "index", "lengths"}
    arguments = {k: v for k, v in arguments.items() if k in keep}
  else:
    table = dict(_ATTENTION)
    function = decode_attention.decode_attention
    if not problem.appends:
      function = decode_attention.attend
      for name in ("new_k", "new_v"):
        table.pop(name)
  if "rope_cos" in arguments:
    arguments["rope_positions"] = np.zeros((problem.b, problem.t), np.int32)
  if not problem.appends:
    table |= {
      "index": (_axis_more, _no_array, one_of(-1, 2**31, np.int64(2**32), 0.5)),
      # The tokens' own positions are those of the last keys.
      "lengths": (_axis_more, _no_integer, one_of(0.5, "all")),
      "block_table": (_axis_more, _no_integer),
      "cache_batch_index": (_axis_more, _no_integer),
      "cache_k": (_rank, _no_array, _no_float),
    }
  if arguments.get("ring"):
    # A ring's tokens may be anywhere.
    table["index"] = (_axis_more, _no_array, one_of(-1, 0.5, "3"))
  jax.block_until_ready(function(**arguments))

  def case(rng: np.random.Generator) -> None:
    _spoil_and_call(rng, function, arguments, table)

  return case


_FEATURES: tuple[Wrong, ...] = (_one_more, _axis_more, _no_float, _no_array)

_UPDATE: dict[str, tuple[Wrong, ...]] = {
  "implementation": _STATIC["implementation"],
  "x": (_no_float, one_of(np.float32(3), "text", None, object())),
  "mean": _FEATURES,
  "var": _FEATURES,
  "momentum": (
    one_of(-0.1, 1.1, NAN, INF, -INF, np.zeros(2, "f4"), "fast", None),
  ),
  "feature_axis": (one_of(9, -9, 1.0, (0,), "last", None),),
  "mask": (
    lambda rng, x: np.ones((2, 3, 5, 7, 11, 13), bool),
    lambda rng, x: np.ones((1234,), bool),
    one_of("text", object()),
  ),
  "axis_index_groups": (one_of([[0]], ((0, 1),)),),
  "momentun": (one_of(0.9),),
}

_NORM: dict[str, tuple[Wrong, ...]] = _UPDATE | {
  "scale": (_one_more, _axis_more, _no_float, one_of("text", object())),
  "bias": (_one_more, _axis_more, _no_float, one_of("text", object())),
  "epsilon": (one_of(-1e-3, NAN, "small", None, -INF),),
  "activation": (one_of("gelu", "ReLU", 3, True),),
  "dtype": (one_of("int32", "bool", "complex64", "floaty"),),
}


def statistics_calls(rng: np.random.Generator) -> worker.Case:
  """Calls of `batch_stat.update` and `batch_norm`."""
  rank = int(rng.integers(1, 5))
  shape = tuple(int(size) for size in rng.integers(1, 6, rank))
  axis = int(rng.integers(rank))
  channels = (shape[axis],)
  arguments: Arguments = {
    "x": data.normal(rng, shape, pick(rng, *data.FLOATS)),
    "mean": data.normal(rng, channels, "float32"),
    "var": np.abs(data.normal(rng, channels, "float32")),
    "momentum": float(rng.random()),
    "feature_axis": axis,
  }
  function, table = batch_stat.update, dict(_UPDATE)
  if chance(rng):
    function, table = batch_stat.batch_norm, dict(_NORM)
    arguments["scale"] = data.normal(rng, channels, "float32")
    arguments["bias"] = data.normal(rng, channels, "float32")
  jax.block_until_ready(function(**arguments))

  def case(rng: np.random.Generator) -> None:
    _spoil_and_call(rng, function, arguments, table)

  return case


_MERGE: dict[str, tuple[Wrong, ...]] = {
  "out_a": (_one_more, _rank, _no_float, _no_array),
  "out_b": (_one_more, _rank, _no_float, _no_array),
  "lse_a": (_one_more, _rank, _no_float, _no_array),
  "lse_b": (_one_more, _rank, _no_float, _no_array),
}


def merge_calls(rng: np.random.Generator) -> worker.Case:
  """Calls of `merge`, `quantize`, `scale_for` and `rope_tables`."""
  shape = tuple(int(size) for size in rng.integers(2, 5, 4))
  out = [data.normal(rng, shape, "float32") for _ in range(2)]
  lse = [data.normal(rng, shape[:-1], "float32") for _ in range(2)]
  arguments = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), (
    out[0], lse[0], out[1], lse[1]
  )))  # fmt: skip
  others = (
    (decode_attention.rope_tables, {"positions": 4, "dim": 6},
     {"dim": (one_of(5, 7, 1),)}),
    (kv_cache.quantize, {"x": out[0], "scale": 0.1, "dtype": "int8"},
     {"dtype": (one_of("int4", "float32", "bool"),)}),
    (kv_cache.scale_for, {"x": out[0], "dtype": "int8"},
     {"dtype": (one_of("int4", "float32", "bool"),)}),
  )  # fmt: skip
  calls = ((decode_attention.merge, arguments, _MERGE),) * 6 + others
  call = functools.partial(_spoil_and_call)

  def case(rng: np.random.Generator) -> None:
    call(rng, *pick(rng, *calls))

  return case


FAMILIES = {
  "attention_calls": attention_calls,
  "statistics_calls": statistics_calls,
  "merge_calls": merge_calls,
}
