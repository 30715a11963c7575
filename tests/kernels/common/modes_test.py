"""Every op on caches under every kind of mesh axes.

With axes that the compiler splits by, explicit ones, a `shard_map` over all of
them and over some: the numbers are those of one device, what comes out lies
where the cache's split says, nothing is gathered and every cache is donated.
"""

import contextlib
import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from kernels import decode_attention, kv_cache
from kernels.decode_attention import ffi as decode_ffi
from kernels.kv_cache import ffi as update_ffi
from tests.testing import devices, hlo, tolerances

devices.use_cpu_devices(8)

MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
TARGETS = {
  "update": update_ffi.TARGET,
  "decode": decode_ffi.APPEND_TARGET,
  "attend": decode_ffi.ATTEND_TARGET,
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# Kinds of the axes, and how many of them a `shard_map` around takes.
MODES = {
  "auto": ((AUTO, AUTO), 0),
  "explicit": ((EXPLICIT, EXPLICIT), 0),
  "mixed": ((EXPLICIT, AUTO), 0),
  "whole": ((AUTO, AUTO), 2),
  "whole of explicit": ((EXPLICIT, EXPLICIT), 2),
  "partial": ((AUTO, AUTO), 1),
  # Here jax makes the other axes whole at the boundary, whatever is inside.
  "partial of explicit": ((EXPLICIT, EXPLICIT), 1),
}

B, S, T, N, G, H = 4, 16, 2, 4, 2, 8

# What is given to the op; by which axes rows, slots and heads are split.
CASES = {
  "plain": ({}, ("x", None, "y")),
  "values of another size": ({"dv": 12}, ("x", None, "y")),
  "bnsh": ({"layout": "bnsh", "dv": 4}, ("x", None, "y")),
  "ring": ({"ring": True, "window": 12, "dv": 4}, ("x", None, "y")),
  "int8": ({"dtype": "int8", "dv": 12}, ("x", None, "y")),
  "float8": ({"dtype": "float8_e4m3fn"}, ("x", None, "y")),
  "layers": ({"layers": 3, "dv": 4}, ("x", None, "y")),
  "lengths": ({"lengths": np.int32([2, 0, 1, 2])}, ("x", None, "y")),
  "paged": ({"paged": True, "dv": 12}, (None, None, "y")),
  "paged by blocks": ({"paged": True, "dv": 12}, ("x", None, "y")),
  "paged int8": ({"paged": True, "dtype": "int8"}, ("x", None, "y")),
  "rows by number": (
    {"cache_batch_index": np.int32([3, 0, 2, 1])}, (None, None, "y")
  ),
  "by length": ({"dv": 4}, ("x", "y", None)),
  "ring by length": ({"ring": True, "window": 12}, ("x", "y", None)),
  "int8 by length": ({"dtype": "int8", "dv": 4}, ("x", "y", None)),
}  # fmt: skip

# Options of attention alone, some of them together.
_RNG = np.random.default_rng(0)
ATTENTION = {
  "softcap and sinks": {
    "softcap": 3.0, "sinks": np.arange(N * G, dtype=np.float32)
  },
  "bias and mask": {
    "bias": _RNG.normal(size=(B, N * G, T, S)).astype(np.float32),
    "mask": _RNG.random((1, N * G, 1, S)) < 0.8,
  },
  "alibi and padding": {
    "alibi_slopes": np.linspace(0, 0.3, N * G, dtype=np.float32),
    "left_padding": np.int32([0, 1, 0, 2]), "window": (5, -1),
  },
  "chunk": {"chunk": 4, "scale": 0.3},
  "rope": {
    "rope_cos": np.cos(_RNG.normal(size=(64, 4))).astype(np.float32),
    "rope_sin": np.sin(_RNG.normal(size=(64, 4))).astype(np.float32),
    "rope_cached_keys": True,
  },
}  # fmt: skip


def _random(rng, *shape, dtype="float32"):
  if dtype == "int8":
    return jnp.asarray(rng.integers(-100, 100, shape), dtype)
  return jnp.asarray(rng.normal(size=shape), dtype)


class Case:
  """Arguments of a call, and where they lie.

  Attributes:
    crosses: Whether devices hold different keys of the same sequence.
    by_hand: Axes that a `shard_map` can split by and the op need not know.
  """

  def __init__(
    self, split, layout="bsnh", dv=H, dtype="float32", layers=0, paged=False,
    **options,
  ):  # fmt: skip
    rng = np.random.default_rng(1)
    rows, slots, heads = split
    options |= {"layout": layout}

    def order(tokens, heads):
      return (heads, tokens) if layout == "bnsh" else (tokens, heads)

    stack = (layers,) if layers else ()
    count, length = (B * 4, S // 4) if paged else (B, S)
    cache = functools.partial(
      _random, rng, *stack, count, *order(length, N), dtype=dtype
    )
    tokens = functools.partial(_random, rng, B)
    index = np.int32([0, 3, 14, 7])
    if options.get("ring"):
      index = np.int32([0, 3, 34, 18])
    self._arrays = [
      cache(H), cache(dv), tokens(*order(T, N * G), H), tokens(*order(T, N), H),
      tokens(*order(T, N), dv), jnp.asarray(index),
    ]  # fmt: skip
    if layers:
      options["layer"] = 1
    if paged:
      blocks = rng.permutation(count).reshape(B, 4)
      options["block_table"] = blocks.astype(np.int32)
    if dtype != "float32":
      options["k_scale"] = np.float32(0.02)
      options["v_scale"] = np.linspace(0.01, 0.04, N, dtype=np.float32)
    aligned = not paged and "cache_batch_index" not in options
    each = P(rows if aligned else None)
    self._cache = P(*(None,) * len(stack), rows, *order(slots, heads))
    self._tokens = P(*each, *order(None, heads))
    self._lse = P(*each, heads)
    self._specs = [*[self._cache] * 2, *[self._tokens] * 3, each]
    per_head, per_logit = P(heads), P(*each, heads, None, slots)
    specs = {
      "lengths": each, "left_padding": each, "block_table": P(*each, None),
      "cache_batch_index": each, "v_scale": per_head, "sinks": per_head,
      "alibi_slopes": per_head, "bias": per_logit,
      "mask": P(None, *per_logit[1:]),
      "rope_cos": P(), "rope_sin": P(),
    }  # fmt: skip
    # What is split is an argument, as a `shard_map` must split it too.
    self._names = [name for name in options if name in specs]
    self._arrays += [options.pop(name) for name in self._names]
    self._specs += [specs[name] for name in self._names]
    self._options = options
    self.crosses = bool(slots or (rows and not aligned))
    self.by_hand = [rows] * aligned + [heads] * bool(heads)

  def call(self, op, implementation):
    """Returns a function, its arguments, their specs and the results'."""

    def run(k, v, q, new_k, new_v, index, *rest):
      options = {
        **self._options,
        **dict(zip(self._names, rest, strict=True)),
        "implementation": implementation,
      }
      if op == "update":
        known = {n: o for n, o in options.items() if n != "window"}
        return kv_cache.update(k, v, new_k, new_v, index, **known)
      if op == "decode":
        return decode_attention.decode_attention(
          k, v, q, new_k, new_v, index, return_lse=True, **options
        )
      return decode_attention.attend(
        k, v, q, index + T, return_lse=True, **options
      )

    caches = [self._cache] * 2
    results = {
      "update": caches,
      "decode": [*caches, self._tokens, self._lse],
      "attend": [self._tokens, self._lse],
    }[op]
    return run, self._arrays, self._specs, results


@functools.cache
def _on_one_device(name, op):
  run, arrays, *_ = _case(name).call(op, "xla")
  return [np.asarray(x, np.float32) for x in jax.jit(run)(*arrays)]


@functools.cache
def _case(name):
  options, split = CASES.get(name) or (ATTENTION[name], ("x", None, "y"))
  return Case(split, **options)


def _of(spec, names):
  """Returns what of a spec a `shard_map` over these axes says."""
  return P(*(entry if entry in names else None for entry in spec))


class ModesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def check(self, mode, name, op, implementation="cpu"):
    case = _case(name)
    kinds, manual = MODES[mode]
    by_hand = set(case.by_hand[:manual])
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    fn, arrays, specs, results = case.call(op, implementation)
    if manual:
      fn = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(_of(spec, by_hand) for spec in specs),
        out_specs=tuple(_of(spec, by_hand) for spec in results),
        axis_names=by_hand,
      )
    placed = [
      jax.device_put(x, NamedSharding(mesh, spec))
      for x, spec in zip(arrays, specs, strict=True)
    ]
    step = jax.jit(fn, donate_argnums=() if op == "attend" else (0, 1))
    explicit = AxisType.Explicit in kinds
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
      compiled = hlo.compiled(step.lower(*placed))
    if not explicit or len(by_hand) != 1:
      self.check_program(compiled, placed, case, op, implementation)
    for got, want, spec in zip(
      compiled(*placed), _on_one_device(name, op), results, strict=True
    ):
      lies = NamedSharding(mesh, spec)
      self.assertTrue(got.sharding.is_equivalent_to(lies, got.ndim), spec)
      tolerances.assert_close(
        np.asarray(got, np.float32), want, "float32", reduced=8
      )

  def check_program(self, compiled, placed, case, op, implementation):
    text = compiled.as_text()
    for move in MOVES:
      self.assertEmpty(hlo.instructions(text, move), move)
    self.assertEqual(
      bool(hlo.instructions(text, "all-reduce")),
      case.crosses and op != "update",
    )
    self.assertEqual(
      hlo.custom_calls(text, TARGETS[op]), int(implementation == "cpu")
    )
    if op == "attend":
      return
    shapes = [x.sharding.shard_shape(x.shape) for x in placed[:2]]
    held = sum(map(np.prod, shapes)) * placed[0].dtype.itemsize
    self.assertGreaterEqual(hlo.aliased_bytes(compiled), held)
    for shape in shapes if implementation == "cpu" else ():
      self.assertEmpty(hlo.instructions(text, "copy", shape))

  @parameterized.product(mode=tuple(MODES), name=tuple(CASES))
  def test_decoding(self, mode, name):
    self.check(mode, name, "decode")

  @parameterized.product(
    mode=("auto", "explicit", "whole of explicit"), name=tuple(ATTENTION)
  )
  def test_options_of_attention(self, mode, name):
    self.check(mode, name, "decode")

  @parameterized.product(op=("update", "attend"), name=tuple(CASES))
  def test_explicit_axes(self, op, name):
    self.check("explicit", name, op)

  @parameterized.product(
    name=("values of another size", "paged", "int8", "layers"),
    op=("update", "decode"),
  )
  def test_plain_xla(self, name, op):
    self.check("explicit", name, op, "xla")


if __name__ == "__main__":
  absltest.main()
