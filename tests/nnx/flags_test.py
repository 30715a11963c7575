"""What is neither True nor False is refused wherever a switch is asked for."""

import contextlib
import inspect

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx

PACKAGES = (
  "nnx.graphlib",
  "nnx.module",
  "nnx.rnglib",
  "nnx.transforms",
  "nnx.variablelib",
)
WRONG = ("no", 0, 1, [], np.ones(1))


def functions_with_flags():
  """Lists the functions of `nnx` and their arguments that are bools."""
  for name, function in vars(nnx).items():
    if not inspect.isfunction(function):
      continue
    if not function.__module__.startswith(PACKAGES):
      continue
    for parameter in inspect.signature(function).parameters.values():
      if parameter.annotation in ("bool", "bool | None"):
        yield f"{name}_{parameter.name}", function, parameter.name


class Anything(nnx.Module):
  """A model, and also a function, and several."""

  def __call__(self):
    return jnp.ones(2)

  def __iter__(self):
    return iter([self])


def call(function, **flags):
  """Calls a function with something for whatever it must be given."""
  args, kwargs = [], {}
  for parameter in inspect.signature(function).parameters.values():
    if parameter.default is not parameter.empty:
      continue
    if parameter.kind is parameter.KEYWORD_ONLY:
      kwargs[parameter.name] = Anything()
    elif parameter.kind in (
      parameter.POSITIONAL_ONLY,
      parameter.POSITIONAL_OR_KEYWORD,
    ):
      args.append(Anything())
  result = function(*args, **kwargs, **flags)
  if inspect.isgenerator(result):
    list(result)
  elif isinstance(result, contextlib.AbstractContextManager):
    with result:
      pass


class FlagsTest(parameterized.TestCase):
  @parameterized.named_parameters(*functions_with_flags())
  def test_functions(self, function, name):
    for wrong in WRONG:
      with self.assertRaisesRegex(
        TypeError, f"^`{name}` must be True or False, but got "
      ):
        call(function, **{name: wrong})

  def test_there_are_such_functions(self):
    names = {name for name, *_ in functions_with_flags()}
    for name in (
      "clone_variables",
      "grad_has_aux",
      "jit_graph",
      "merge_copy",
      "scan_reverse",
      "split_graph",
      "vmap_graph_updates",
      "with_vars_hijax",
    ):
      self.assertIn(name, names)

  @parameterized.parameters(
    (nnx.set_graph_mode, "graph_mode"),
    (nnx.set_graph_updates, "graph_updates"),
    (nnx.set_named_scopes, "named_scopes"),
    (nnx.use_eager_sharding, "eager_sharding"),
  )
  def test_setters(self, setter, name):
    for wrong in (*WRONG, None):
      with self.assertRaisesRegex(
        TypeError, f"^`{name}` must be True or False, but got "
      ):
        setter(wrong)
    with setter(np.True_):
      pass

  @parameterized.parameters("hijax", "ref", "mutable", "eager_sharding")
  def test_variables(self, name):
    p = nnx.Param(1.0)
    for make in (
      nnx.Param,
      p.copy,
      lambda value, **kw: nnx.Param.from_metadata(value, kw),
      lambda value, **kw: nnx.VariableMetadata(value, metadata=kw),
      lambda value, **kw: p.set_metadata(**kw),
      lambda value, **kw: p.set_metadata(name, kw[name]),
      lambda value, **kw: nnx.set_metadata(p, **kw),
    ):
      for wrong in WRONG:
        with self.assertRaisesRegex(
          TypeError, f"^`{name}` must be True or False, but got "
        ):
          make(1.0, **{name: wrong})

  def test_defaults_stay_where_they_are_refused(self):
    with self.assertRaisesRegex(TypeError, "^`hijax` must be True or False"):
      nnx.var_defaults(ref=True, hijax="yes")
    self.assertEqual(dict(nnx.var_defaults()), {"hijax": False, "ref": False})

  def test_derivative(self):
    f = nnx.custom_vjp(lambda x: x)
    with self.assertRaisesRegex(TypeError, "^`symbolic_zeros` must be True or"):
      f.defvjp(lambda x: (x, x), lambda x, g: (g,), symbolic_zeros="no")

  def test_bools_of_numpy(self):
    p = nnx.Param(jnp.ones(2), hijax=np.True_, ref=np.False_, mutable=np.True_)
    self.assertIs(p.hijax, True)
    self.assertIs(p.mutable, True)
    self.assertFalse(nnx.with_vars(p, hijax=np.False_).hijax)
    with nnx.set_graph_mode(np.False_):
      self.assertIs(nnx.set_graph_mode.current_value(), False)
    grads = nnx.grad(lambda p: p.sum(), graph=np.False_)(nnx.Param(jnp.ones(2)))
    self.assertIsInstance(grads, nnx.Param)
    with self.assertRaisesRegex(TypeError, "must be True or False, but got"):
      jax.jit(lambda flag: nnx.split(p, graph=flag))(True)


if __name__ == "__main__":
  absltest.main()
