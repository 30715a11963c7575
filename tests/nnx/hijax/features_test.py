"""What hijax Variables can do, with each version of jax."""

import copy
import dataclasses
import functools
import os
import pickle
import subprocess
import sys

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.engine import boxes
from tests.nnx.hijax import cases

MODES = (
  {"graph": True, "graph_updates": True},
  {"graph": True, "graph_updates": False},
  {"graph": False},
)


class FeaturesTest(parameterized.TestCase):
  """What holds with every version of jax."""

  def test_jit(self):
    v = nnx.Param(jnp.ones(2), hijax=True, axis="embed")

    @jax.jit
    def f(v, x):
      self.assertIsInstance(v, nnx.Param)
      self.assertTrue(v.hijax)
      self.assertFalse(v.ref)
      self.assertEqual(v.axis, "embed")
      v[...] += x
      return v.sum()

    self.assertEqual(f(v, 2.0), 6.0)
    self.assertEqual(f(v, 2.0), 10.0)
    np.testing.assert_array_equal(v[...], [5.0, 5.0])

  def test_closures(self):
    v = nnx.Param(jnp.array(1.0), hijax=True)

    @jax.jit
    def f(x):
      v[...] *= 2
      return x * v[...]

    self.assertEqual(f(3.0), 6.0)
    self.assertEqual(jax.grad(f)(3.0), 4.0)
    np.testing.assert_array_equal(
      jax.vmap(lambda x: x * v[...])(jnp.ones(2)), 4
    )
    jax.lax.scan(lambda c, x: (c, f(x)), 0.0, jnp.ones(3))
    self.assertEqual(v[...], 32.0)
    jax.lax.fori_loop(0, 2, lambda i, c: c + f(1.0), 0.0)
    self.assertEqual(v[...], 128.0)

    def halve():
      v[...] /= 2

    jax.jit(lambda p: jax.lax.cond(p, halve, lambda: None))(True)
    self.assertEqual(v[...], 64.0)

  @parameterized.product(mode=MODES, kind=("hijax", "ref"))
  def test_loops_of_nnx(self, mode, kind):
    v = nnx.Variable(jnp.array(1.0), **{kind: True})

    def body(v):
      v[...] *= 2
      return v

    loop = functools.partial(nnx.while_loop, **mode)
    self.assertIs(loop(lambda v: v[...] < 20, body, v), v)
    self.assertEqual(v[...], 32.0)
    jax.jit(lambda v: (loop(lambda v: v[...] < 100, body, v), None)[1])(v)
    self.assertEqual(v[...], 128.0)
    nnx.fori_loop(0, 2, lambda i, v: body(v), v, **mode)
    self.assertEqual(v[...], 512.0)

  def test_pytrees(self):
    v = nnx.Variable({"a": jnp.array(0), "b": [jnp.ones(2)]}, hijax=True)

    @jax.jit
    def f(v):
      v["a"] += 1
      v["b"] = [v["b"][0] * 2]

    f(v)
    f(v)
    self.assertEqual(v["a"], 2)
    np.testing.assert_array_equal(v["b"][0], [4.0, 4.0])

  def test_structure(self):
    v = nnx.Variable({}, hijax=True)

    @jax.jit
    def f(v):
      v["new"] = jnp.ones(2)

    if boxes.CHANGES_STRUCTURE:
      f(v)
      self.assertEqual(list(v.get_value()), ["new"])
    else:
      with self.assertRaisesRegex(TypeError, "must keep the structure, shapes"):
        f(v)
      w = nnx.Param(jnp.ones(2), hijax=True)
      with self.assertRaisesRegex(TypeError, "must keep the structure, shapes"):
        jax.jit(lambda w: w.set_value(jnp.ones(3)))(w)
    v.set_value({"other": 1})
    self.assertEqual(v.get_value(), {"other": 1})

  def test_copies(self):
    v = nnx.Param(jnp.array(1.0), hijax=True, axis="embed")
    others = [
      v.copy(),
      copy.copy(v),
      copy.deepcopy(v),
      pickle.loads(pickle.dumps(v)),
      nnx.clone(v),
      nnx.clone(v, arrays=True),
      nnx.merge(*nnx.split(v), copy=True),
    ]
    v[...] += 1
    for other in others:
      self.assertTrue(other.hijax)
      self.assertEqual(other.axis, "embed")
      self.assertEqual(other[...], 1.0)
      jax.jit(lambda x: x.set_value(x[...] + 4))(other)
      self.assertEqual(other[...], 5.0)
    self.assertEqual(v[...], 2.0)

  def test_of_flax(self):
    theirs = flax_nnx.Param(jnp.ones(2), hijax=True)
    ours = nnx.bridge.from_flax_nnx(flax_nnx.Dict(p=theirs)).p
    np.testing.assert_array_equal(ours[...], [1.0, 1.0])

  def test_mutable(self):
    for kept in ({"hijax": True}, {"ref": True}, {}):
      v = nnx.Param(jnp.array(3.0), **kept)
      frozen = nnx.with_vars(v, mutable=False)
      self.assertFalse(frozen.mutable)
      self.assertFalse(frozen.ref)
      grads = jax.grad(lambda p: p[...] ** 2)(frozen)
      self.assertIsInstance(grads, nnx.Param)
      self.assertEqual(grads[...], 6.0)
      for write in (
        lambda p: p.set_value(1.0),
        lambda p: p.set_raw_value(1.0),
        lambda p: nnx.update(nnx.Dict(p=p), {"p": jnp.array(1.0)}),
      ):
        with self.assertRaisesRegex(ValueError, "`mutable=False` must not be"):
          write(frozen)
      with self.assertRaisesRegex(ValueError, "`mutable` must stay"):
        frozen.set_metadata(mutable=True)
      again = nnx.with_vars(frozen, mutable=True)
      self.assertEqual((again.hijax, again.ref), (v.hijax, v.ref))
      again[...] += 1
      self.assertEqual((again[...], v[...], frozen[...]), (4.0, 3.0, 3.0))

  @parameterized.parameters("hijax", "ref")
  def test_derivatives_are_refused_in_words(self, kind):
    model = nnx.Dict(w=nnx.Param(jnp.ones(2), **{kind: True}))
    for transform in (nnx.grad, nnx.value_and_grad):
      for step in (transform, lambda fun, t=transform: nnx.jit(t(fun))):
        with self.assertRaisesRegex(
          TypeError, rf"`\w+\.w` is a Variable with `{kind}=True`.*with_vars"
        ):
          step(lambda model: model.w[...].sum())(model)
    plain = nnx.with_vars(model, hijax=False, ref=False)
    grads = nnx.grad(lambda model: model.w[...].sum())(plain)
    np.testing.assert_array_equal(grads["w"][...], jnp.ones(2))

  def test_switches_are_fixed(self):
    v = nnx.Param(1.0, hijax=True)
    with self.assertRaisesRegex(ValueError, "`hijax` must stay as .* `True`"):
      v.set_metadata(hijax=False)
    with self.assertRaisesRegex(ValueError, "`hijax` must stay .* deleted"):
      v.del_metadata("hijax")
    v.set_metadata({"a": 1})
    self.assertEqual(v.get_metadata(exclude_required=True), {"a": 1})
    with self.assertRaisesRegex(ValueError, "`hijax` must be given once"):
      nnx.Param(nnx.VariableMetadata(1, metadata={"hijax": True}), hijax=False)

  def test_given_by_initializer(self):
    init = nnx.with_metadata(lambda: jnp.ones(2), hijax=True)
    self.assertTrue(nnx.Param(init()).hijax)

  def test_leaves(self):
    model = nnx.Dict(a=nnx.Param(jnp.ones(2), hijax=True))

    @jax.jit
    def f(model):
      (leaf,) = jax.tree.leaves(model)
      leaf[...] = 2 * leaf[...] + 1
      return jnp.sum(leaf[...])

    self.assertEqual(f(model), 6.0)
    np.testing.assert_array_equal(model.a[...], [3.0, 3.0])


@cases.needs_mutable_types
class MutableTypesTest(absltest.TestCase):
  """What needs jax's mutable types."""

  def test_conditions_of_loops(self):
    v = nnx.Variable(jnp.array(1.0), hijax=True)

    def body(i):
      v[...] *= 2
      return i + 1

    def condition(i):
      return v[...] < 20

    for loop in (jax.lax.while_loop, nnx.while_loop):
      for run in (lambda f: f(), lambda f: jax.jit(f)()):
        for read in (condition, jax.jit(condition)):
          with self.assertRaisesRegex(
            TypeError, "`cond_fun` of .* must not read a hijax .*`Variable`"
          ):
            run(lambda loop=loop, read=read: loop(read, body, 0))
    with self.assertRaisesRegex(TypeError, "jax does not follow .* of a loop"):
      jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0], c[1] + 1), (v, 0))
    self.assertEqual(v[...], 1.0)

  def test_metadata_comes_back(self):
    v = nnx.Param(jnp.ones(2), hijax=True, step=1)

    @jax.jit
    def f(v):
      v.set_metadata(step=v.step + 1, new="b")

    f(v)
    (leaf,), treedef = jax.tree.flatten(v)
    self.assertEqual(jax.tree.unflatten(treedef, [leaf]).step, 2)
    self.assertEqual(nnx.split(v)[0], nnx.split(nnx.clone(v))[0])
    self.assertEqual(
      v.get_metadata(exclude_required=True), {"step": 2, "new": "b"}
    )
    f(v)
    self.assertEqual(v.step, 3)

  def test_errors(self):
    v, x = nnx.Param(jnp.array(1.0), hijax=True), jnp.ones(2)

    def loss(v):
      return v[...] ** 2

    def scan(carry, v):
      return carry + v[...], None

    def write(carry):
      v[...] = v[...] * 0.5 + jax.lax.stop_gradient(carry)
      return carry * v[...]

    for text, f in (
      ("type `Param`, must not be returned .* no mutable", jax.jit(lambda: v)),
      ("does not differentiate .* `nnx.with_vars", lambda: jax.grad(loss)(v)),
      ("does not diff.*stop_gradient", lambda: jax.grad(v.set_value)(1.0)),
      ("must not hold values with an axis", lambda: jax.vmap(v.set_value)(x)),
      (
        "jax does not follow .* the body of a loop close over it",
        lambda: jax.lax.scan(lambda c, _: (c.set_value(1), None), v, None, 2),
      ),
      ("jax does not follow .* `jax.remat`", lambda: jax.remat(loss)(v)),
      (
        "jax does not differentiate branches and loops that .* `Param`",
        lambda: jax.grad(
          lambda x: jax.lax.fori_loop(0, 2, lambda i, c: write(c), x)
        )(1.0),
      ),
      (
        "must not be returned .*, nor be used in a branch that jax different",
        lambda: jax.grad(
          lambda x: jax.lax.cond(x > 0, lambda v: x * v[...], loss, v)
        )(1.0),
      ),
      ("<value of a hijax Param: ", lambda: jax.lax.scan(scan, 0.0, v)),
    ):
      with self.assertRaisesRegex(Exception, text):
        f()
    self.assertEqual(v[...], 1.0)

  def test_jaxpr(self):
    v = nnx.Param(jnp.ones(2), hijax=True)

    @jax.make_jaxpr
    def f(v):
      v[...] *= nnx.Param(2.0, hijax=True)[...]

    text = str(f(v))
    for word in ("Param()", "new_variable", "get_variable", "set_variable"):
      self.assertIn(word, text)

  def test_arithmetic_of_leaves(self):
    model = nnx.Dict(a=nnx.Param(jnp.ones(2), hijax=True))
    for f in (lambda x: x, jax.jit):
      doubled = f(lambda m: jax.tree.map(lambda x: 1 + x * 2, m))(model)
      np.testing.assert_array_equal(doubled.a.value, [3.0, 3.0])
    doubled.a[...] += 1  # From here on, in a box of its own.
    jax.jit(lambda m: m.a.set_value(m.a[...] + 1))(doubled)
    np.testing.assert_array_equal(doubled.a.value, [5.0, 5.0])
    self.assertEqual(model.a[...].sum(), 2.0)


class DefaultsTest(absltest.TestCase):
  def test_environment(self):
    program = (
      "import nnx; print(nnx.Param(1.0).hijax, nnx.var_defaults().hijax)"
    )
    for value, wanted in (("true", "True True"), ("0", "False False")):
      environment = os.environ | {
        "NNX_HIJAX_VARIABLE": value,
        "PYTHONPATH": os.pathsep.join(sys.path),
      }
      printed = subprocess.check_output(
        [sys.executable, "-c", program], env=environment, text=True
      )
      self.assertEqual(printed.strip(), wanted)


class MetadataTest(absltest.TestCase):
  def test_fields(self):
    self.assertEqual(
      [field.name for field in dataclasses.fields(nnx.VariableMetadata)],
      [
        "raw_value",
        "set_value_hooks",
        "get_value_hooks",
        "create_value_hooks",
        "add_axis_hooks",
        "remove_axis_hooks",
        "metadata",
      ],
    )
    made = nnx.VariableMetadata(1.0, on_get_value=len, metadata={"a": 1})
    other = dataclasses.replace(made, raw_value=2.0, metadata={"a": 2})
    self.assertEqual(other.on_get_value, (len,))
    self.assertEqual(
      dataclasses.asdict(other),
      {
        "raw_value": 2.0,
        "set_value_hooks": (),
        "get_value_hooks": (len,),
        "create_value_hooks": (),
        "add_axis_hooks": (),
        "remove_axis_hooks": (),
        "metadata": {"a": 2},
      },
    )
    other.on_set_value = abs
    self.assertEqual(other.set_value_hooks, (abs,))
    self.assertEqual(nnx.Param(other).on_set_value, (abs,))


if __name__ == "__main__":
  absltest.main()
