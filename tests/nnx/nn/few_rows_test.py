"""Layers whose products of few rows are `kernels.matmul` on the CPU."""

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common import dispatch
import nnx
from nnx import kernels
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array
from tests.testing import interception

pytestmark = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="layers take it on the CPU"
)

LAYERS = {
  "Linear": (("Linear", 64, 96), (3, 64)),
  "one row": (("Linear", 64, 96), (64,)),
  "LinearGeneral": (("LinearGeneral", 64, (4, 24)), (2, 2, 64)),
  "several axes": (
    ("LinearGeneral", (4, 16), (4, 24), -1),
    (2, 2, 4, 16),
  ),
  "Einsum": (("Einsum", "...a,ahb->...hb", (64, 4, 24)), (2, 2, 64)),
  "Einsum of two": (("Einsum", "nthb,hba->nta", (4, 16, 96)), (2, 2, 4, 16)),
}


def pair(name, *args, **kwargs):
  if args[2:] == (-1,):
    args, kwargs = args[:2], kwargs | {"axis": (-2, -1)}
  return comparison.pair(name, *args, **kwargs)


def program(layer, *xs, call=None):
  """What the layer computes, as a function of its state."""
  graphdef, state = nnx.split(layer)
  leaves, treedef = jax.tree.flatten(state)

  def function(leaves, *xs):
    model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
    return model(*xs) if call is None else call(model, *xs)

  return function, leaves, *xs


def chosen(layer, *xs, **kwargs):
  return [
    (choice.op, choice.implementation)
    for choice in kernels.explain(*program(layer, *xs, **kwargs))
  ]


def is_plain(layer, *xs, **kwargs):
  function, *args = program(layer, *xs, **kwargs)
  text = str(jax.make_jaxpr(function)(*args))
  assert ("dot_general" in text) != ("matmul[" in text)
  return "dot_general" in text


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_computes_what_flax_does(name, dtype):
  arguments, shape = LAYERS[name]
  ours, theirs = pair(*arguments, dtype=jnp.dtype(dtype))
  x = array(*shape)
  assert chosen(ours, x) == [("matmul", "cpu")]
  rtol = {"float32": 5e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
  comparison.assert_same(ours, theirs, x, rtol=rtol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_of_a_table_take_it(dtype):
  ours, theirs = comparison.pair("Embed", 96, 64, dtype=jnp.dtype(dtype))
  x = array(3, 64)

  def attend(layer, x):
    return layer.attend(x)

  assert chosen(ours, x, call=attend) == [("matmul_transposed", "cpu")]
  rtol = {"float32": 5e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
  comparison.assert_same(ours, theirs, x, rtol=rtol, call=attend)
  assert is_plain(ours, array(40, 64), call=attend)


def test_projections_of_attention_take_it():
  layer = nnx.MultiHeadAttention(
    4, 64, decode=True, is_causal=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
  )
  layer.init_cache((2, 16, 64))
  names = [name for name, _ in chosen(layer, array(2, 1, 64))]
  assert names == ["matmul"] * 3 + ["decode_attention", "matmul"]


def doubled(*args, **kwargs):
  return 2 * _PLAIN(*args, **kwargs)


_PLAIN = lax.dot_general


def test_a_program_that_would_tell_keeps_its_product():
  def linear(features=64, **kwargs):
    return nnx.Linear(features, 96, rngs=nnx.Rngs(0), **kwargs)

  few = array(3, 64)
  assert not is_plain(linear(), few)
  assert is_plain(linear(), array(33, 64))
  assert is_plain(linear(), array(0, 64))
  assert is_plain(linear(features=40), array(3, 40))
  assert is_plain(linear(precision="highest"), few)
  assert is_plain(linear(preferred_element_type=jnp.float32), few)
  assert is_plain(linear(dot_general=doubled), few)
  assert is_plain(linear(dtype=jnp.float8_e4m3fn), few)
  with jax.default_matmul_precision("bfloat16"):
    assert is_plain(linear(), few)
  general = nnx.LinearGeneral(64, 96, axis=0, rngs=nnx.Rngs(0))
  assert is_plain(general, array(64, 3))
  for equation, shape in (("ab,bc->ca", (64, 96)), ("aa,ac->ac", (64, 96))):
    einsum = nnx.Einsum(equation, shape, rngs=nnx.Rngs(0))
    x = array(3, 64) if "ab" in equation else array(64, 64)
    assert is_plain(einsum, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("rows, features", [(32, 64), (33, 64), (1, 63)])
def test_bounds_are_those_of_the_kernels(rows, features, dtype):
  layer = nnx.Linear(64, features, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
  x, kernel = array(rows, 64), layer.kernel.value
  (choice,) = kernels.explain(
    kernels.matmul, x.astype(dtype), kernel.astype(dtype)
  )
  # Where the processor multiplies pairs of bfloat16, the kernel takes more.
  takes_more = rows > 32 and dtype == "bfloat16"
  assert takes_more or choice.implementation == (
    "xla" if rows > 32 or features < 64 or dtype == "float8_e4m3fn" else "cpu"
  )
  assert is_plain(layer, x) == (takes_more or choice.implementation == "xla")


@pytest.mark.parametrize("by", ["attribute", "code"])
def test_a_function_that_replaces_the_product_is_called(by):
  layer, x = nnx.Linear(64, 96, use_bias=False, rngs=nnx.Rngs(0)), array(3, 64)
  want = layer(x)

  def twice(name, original, *args, **kwargs):
    return 2 * original(*args, **kwargs)

  with interception.replaced(["jax.lax.dot_general"], twice, by):
    got = layer(x), jax.jit(lambda x: layer(x))(x)
  for y in got:
    np.testing.assert_allclose(y, 2 * want, rtol=1e-4, atol=1e-5)


def test_an_exported_program_needs_no_library():
  layer, x = nnx.Linear(64, 96, rngs=nnx.Rngs(0)), array(3, 64)
  function, *args = program(layer, x)
  exported = export.export(jax.jit(function))(*args)
  assert "custom_call" not in exported.mlir_module()
  restored = export.deserialize(exported.serialize())
  np.testing.assert_allclose(restored.call(*args), layer(x), 1e-5, 1e-5)


def test_over_several_devices_the_compiler_splits_a_plain_product():
  op = next(
    equation.primitive
    for equation in jax.make_jaxpr(kernels.matmul)(
      array(3, 64), array(64, 96)
    ).eqns
  )
  op = dispatch.op_of(op)
  avals = [jax.typeof(a) for a in (array(3, 64), array(64, 96))]
  params = {"batch_axes": 0, "dtype": jnp.dtype("float32"), "precision": None}
  for placement, want in {
    dispatch.Placement("cpu"): "cpu",
    dispatch.Placement("cpu", devices=2): "xla",
    dispatch.Placement("cpu", exported=True): "xla",
    dispatch.Placement("tpu"): "xla",
  }.items():
    choice = op.choose(placement, avals, implementation="unseen", **params)
    assert choice.implementation == want, choice
    assert choice.reason.endswith(".")


def test_transforms_go_through():
  layer, x = nnx.Linear(64, 96, use_bias=False, rngs=nnx.Rngs(0)), array(3, 64)
  kernel = layer.kernel.value
  (back,) = jax.linear_transpose(layer, x)(jnp.ones((3, 96)))
  np.testing.assert_allclose(back, jnp.ones((3, 96)) @ kernel.T, 1e-4, 1e-4)
  many = array(5, 3, 64)
  np.testing.assert_allclose(jax.vmap(layer)(many), many @ kernel, 1e-4, 1e-4)
  loss = lambda x: jnp.sum(jnp.sin(layer(x)))  # noqa: E731
  plain = lambda x: jnp.sum(jnp.sin(x @ kernel))  # noqa: E731
  for transform in (jax.grad, lambda f: jax.jacfwd(jax.grad(f))):
    np.testing.assert_allclose(
      transform(loss)(x[0]), transform(plain)(x[0]), 1e-3, 1e-3
    )
  saved = jax.checkpoint(
    loss, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  )
  np.testing.assert_allclose(jax.grad(saved)(x), jax.grad(loss)(x), 1e-4, 1e-4)


def test_flops_are_those_of_the_product():
  rows = []
  nnx.tabulate(
    nnx.Linear(64, 96, use_bias=False, rngs=nnx.Rngs(0)),
    array(3, 64),
    row_filter=lambda row: not rows.append(row),
    compute_flops=True,
    compute_vjp_flops=True,
  )
  assert rows[0].flops == 2 * 3 * 64 * 96
  assert rows[0].vjp_flops >= 2 * rows[0].flops
