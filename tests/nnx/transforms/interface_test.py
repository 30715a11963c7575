"""What all transforms have in common: signatures, decorators, refusals."""

import inspect

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both

X = jnp.linspace(0.0, 1.0, 3)
MESH = jax.make_mesh((1,), ("data",))
SPEC = jax.sharding.PartitionSpec()

SIGNATURES = (
  "checkify",
  "cond",
  "custom_vjp",
  "eval_shape",
  "fori_loop",
  "grad",
  "jit",
  "jvp",
  "make_jaxpr",
  "pmap",
  "remat",
  "scan",
  "shard_map",
  "switch",
  "transform_metadata",
  "value_and_grad",
  "vjp",
  "vmap",
  "while_loop",
)

# Each calls a function of one array under a transform.
TRANSFORMS = {
  "checkify": lambda f: nnx.checkify(f)(X),
  "cond": lambda f: nnx.cond(True, f, lambda x: x, X),
  # By itself it runs the function without a trace of its own.
  "custom_vjp": lambda f: jax.jit(_custom_vjp(f))(X),
  "eval_shape": lambda f: nnx.eval_shape(f, X),
  "fori_loop": lambda f: nnx.fori_loop(0, 2, lambda i, x: f(x), X),
  "grad": lambda f: nnx.grad(lambda x: f(x).sum())(X),
  "jit": lambda f: nnx.jit(f)(X),
  "jit_partial": lambda f: nnx.jit_partial(f, X)(),
  "jvp": lambda f: nnx.jvp(f, (X,), (X,)),
  "make_jaxpr": lambda f: nnx.make_jaxpr(f)(X),
  "pmap": lambda f: nnx.pmap(f)(X[None]),
  "remat": lambda f: jax.grad(lambda x: nnx.remat(f)(x).sum())(X),
  "scan": lambda f: nnx.scan(lambda c, x: (f(c), x))(X, X),
  "shard_map": lambda f: _shard_map(f)(X),
  "switch": lambda f: nnx.switch(0, [f, lambda x: x], X),
  "value_and_grad": lambda f: nnx.value_and_grad(lambda x: f(x).sum())(X),
  "vjp": lambda f: nnx.vjp(f, X),
  "vmap": lambda f: nnx.vmap(f)(X[None]),
  "while_loop": lambda f: nnx.while_loop(lambda x: x.sum() < 9, f, X),
}

# The options of each transform that is a decorator, given without a function.
DECORATORS = {
  "grad": {"argnums": 0},
  "jit": {"donate_argnums": ()},
  "jvp": {"has_aux": False},
  "make_jaxpr": {"static_argnums": ()},
  "pmap": {"in_axes": 0},
  "remat": {"prevent_cse": False},
  "scan": {"length": 3},
  "shard_map": {"mesh": MESH, "in_specs": SPEC, "out_specs": SPEC},
  "value_and_grad": {"has_aux": False},
  "vjp": {"has_aux": False},
  "vmap": {"in_axes": 0},
}


def _custom_vjp(f):
  function = nnx.custom_vjp(f)
  function.defvjp(lambda x: (f(x), ()), lambda residuals, g: (g,))
  return function


def _shard_map(f):
  return nnx.shard_map(f, mesh=MESH, in_specs=SPEC, out_specs=SPEC)


class InterfaceTest(parameterized.TestCase):
  @parameterized.parameters(*SIGNATURES)
  def test_parameters_of_flax(self, name):
    ours, theirs = (
      inspect.signature(getattr(lib, name)).parameters.values()
      for lib in (nnx, flax_nnx)
    )
    for keyword in (False, True):
      a, b = (
        [p.name for p in parameters if (p.kind is p.KEYWORD_ONLY) == keyword]
        for parameters in (ours, theirs)
      )
      self.assertEqual(*(map(sorted, (a, b)) if keyword else (a, b)))

  def test_jit_partial_takes_the_options_of_jit(self):
    theirs = inspect.signature(flax_nnx.jit_partial).parameters.values()
    options = {p.name for p in theirs if p.kind is p.KEYWORD_ONLY}
    self.assertLessEqual(options, set(inspect.signature(nnx.jit).parameters))

  @parameterized.parameters(*DECORATORS)
  def test_decorator_with_and_without_options(self, name):
    def f(*args):
      return (args[0], jnp.sin(args[-1])) if name == "scan" else args[0].sum()

    args = {
      "jvp": ((X,), (X,)),
      "pmap": (X[None],),
      "scan": (X, X),
      "vjp": (X,),
    }.get(name, (X,))
    transform, options = getattr(nnx, name), DECORATORS[name]
    results = [transform(f, **options)(*args), transform(**options)(f)(*args)]
    if name == "make_jaxpr":
      self.assertEqual(*map(str, results))
    else:
      leaves = [
        [leaf for leaf in jax.tree.leaves(result) if not callable(leaf)]
        for result in results
      ]
      jax.tree.map(np.testing.assert_array_equal, *leaves)

  @parameterized.parameters(*TRANSFORMS)
  def test_writing_to_a_captured_model_is_refused(self, name):
    model = both.models(nnx).Tied()
    before = np.asarray(model.second.mean)
    with self.assertRaises(nnx.TraceContextError) as caught:
      TRANSFORMS[name](lambda x: model.second(x))
    text = str(caught.exception)
    self.assertIn("`second.mean` of a `Tied`", text)
    self.assertRegex(text, r'made at ".*both\.py", line \d+')
    self.assertIn("Pass the model as an argument", text)
    np.testing.assert_array_equal(model.second.mean, before)

  @parameterized.parameters(*TRANSFORMS)
  def test_reading_a_captured_model(self, name):
    model = both.models(nnx).Dense()
    TRANSFORMS[name](lambda x: x + model.bias)
    self.assertIsInstance(model.bias[...], jax.Array)


if __name__ == "__main__":
  absltest.main()
