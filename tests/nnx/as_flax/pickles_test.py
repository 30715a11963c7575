"""Pickles of flax.nnx load under the switch, and ours without it."""

import os
import subprocess
import sys
import tempfile
import textwrap

from absl.testing import absltest


def run(code, *args):
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *args],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
    },
    capture_output=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr.decode()


# Prints the pickle of a dict of objects; `nnx` is Flax's or ours.
MAKE = """
  import pickle, sys
  import jax, jax.numpy as jnp

  def make(nnx):
    rngs = nnx.Rngs(0)
    values = {
      "param": nnx.Param(jnp.ones(2), tag="a"),
      "state": nnx.state(nnx.Linear(2, 3, rngs=rngs)),
      "rngs": nnx.Rngs(0, params=1),
      "dict": nnx.Dict(a=nnx.Param(1.0), n=3),
      "list": nnx.List([nnx.Param(1.0), "x", nnx.Param(2.0)]),
      "linear": nnx.Linear(2, 4, rngs=rngs),
      "norm": nnx.BatchNorm(4, rngs=rngs),
      "groups": nnx.GroupNorm(4, num_groups=2, rngs=rngs),
      "layernorm": nnx.LayerNorm(4, rngs=rngs),
      "attention": nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs),
      "conv": nnx.Conv(4, 3, (3,), rngs=rngs),
      "embed": nnx.Embed(2, 3, rngs=rngs),
      "dropout": nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
      "average": nnx.metrics.Average(),
      "filter": nnx.All(nnx.Param, nnx.WithTag("a")),
      "axes": nnx.StateAxes({nnx.Param: 0, ...: None}),
    }
    return values

  def results(nnx, values):
    x = jnp.arange(8.0).reshape(1, 2, 4)
    outs = {}
    for name in ("groups", "layernorm", "attention", "conv", "dropout", "norm"):
      outs[name] = values[name](x)
    outs["linear"] = values["linear"](x[..., :2])
    outs["embed"] = values["embed"](jnp.arange(2))
    outs["key"] = jax.random.key_data(values["rngs"].params())
    outs["list"] = [values["list"][i].get_value() for i in (0, 2)]
    outs["param"] = values["param"].get_value()
    outs["state"] = values["state"]["kernel"].get_value()
    return jax.device_get(outs)
"""


class PicklesTest(absltest.TestCase):
  def passes(self, code, *args):
    status, printed, error = run(code, *args)
    self.assertEqual(status, 0, error)
    return printed

  def test_flax_nnx_under_the_switch(self):
    file = self.file()
    self.passes(
      MAKE
      + """
  from flax import nnx
  values = make(nnx)
  data = pickle.dumps(values)
  with open(sys.argv[1], "wb") as out:
    pickle.dump((data, results(nnx, values)), out)
      """,
      file,
    )
    self.passes(
      MAKE
      + """
  import nnx.as_flax
  import nnx, numpy as np
  data, wanted = pickle.load(open(sys.argv[1], "rb"))
  values = pickle.loads(data)
  for name, value in make(nnx).items():
    assert type(values[name]) is type(value), name
  got = results(nnx, values)
  for name in wanted:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      got[name], wanted[name])
  kept = values["param"].get_metadata()
  assert kept["tag"] == "a", kept
  assert kept == make(nnx)["param"].get_metadata(), kept
  assert len(values["list"]) == 3 and values["list"][1] == "x"
  assert values["axes"] == nnx.StateAxes({nnx.Param: 0, ...: None})
  assert values["filter"] == nnx.All(nnx.Param, nnx.WithTag("a"))
  model = values["dict"]
  assert nnx.jit(lambda m: m.a[...] * m.n)(model) == 3
  assert len(nnx.to_flat_state(nnx.state(values["attention"]))) == 8
      """,
      file,
    )

  def test_graphdef_of_flax_nnx_is_refused(self):
    file = self.file()
    self.passes(
      """
      import pickle, sys
      from flax import nnx
      graphdef = nnx.graphdef(nnx.Dict(a=nnx.Param(1)))
      pickle.dump(graphdef, open(sys.argv[1], "wb"))
      """,
      file,
    )
    status, _, error = run(
      """
      import nnx.as_flax
      import pickle, sys
      pickle.load(open(sys.argv[1], "rb"))
      """,
      file,
    )
    self.assertEqual(status, 1)
    self.assertIn("One that `flax.nnx` has pickled is of another kind", error)

  def test_ours_without_the_switch(self):
    file = self.file()
    self.passes(
      MAKE
      + """
  import nnx.as_flax
  from flax import nnx
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(2, 3, rngs=rngs)
  values = make(nnx)
  layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(nnx.Sequential(layer))
  pickle.dump((values, graphdef, state), open(sys.argv[1], "wb"))
      """,
      file,
    )
    self.passes(
      MAKE
      + """
  import nnx
  values, graphdef, state = pickle.load(open(sys.argv[1], "rb"))
  results(nnx, values)
  assert type(nnx.merge(graphdef, state)) is nnx.Sequential
  assert not any(name.split(".")[0] == "flax" for name in sys.modules)
      """,
      file,
    )

  def file(self):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    return os.path.join(folder.name, "pickle")


if __name__ == "__main__":
  absltest.main()
