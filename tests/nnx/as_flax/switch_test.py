"""`flax.nnx` is `nnx` under the switch, however it is turned."""

import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap

from absl.testing import absltest, parameterized

FOLDER = os.path.join("tests", "nnx", "as_flax")
PROGRAM = os.path.join(FOLDER, "program.py")
STARTUP = os.path.join("nnx", "as_flax", "startup")


def run(*args, path=(), **options):
  """What a fresh Python prints; `PYTHONPATH` gets further folders."""
  folders = [*path, *(p for p in sys.path if os.path.abspath(p) != STARTUP)]
  return subprocess.run(
    [sys.executable, "-W", "ignore", *args],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(folders),
      **options,
    },
    capture_output=True,
    text=True,
    check=False,
  )


class SwitchTest(parameterized.TestCase):
  def passes(self, *args, **options):
    done = run(*args, **options)
    self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
    return done.stdout

  def check(self, code, **options):
    return self.passes("-c", textwrap.dedent(code), **options)

  def fails(self, code, text):
    done = run("-c", textwrap.dedent(code))
    self.assertEqual(done.returncode, 1, done.stdout)
    self.assertRegex(done.stderr.strip().splitlines()[-1], text)

  @parameterized.named_parameters(
    ("program", ["-m", "nnx.as_flax", PROGRAM, "a", "--b"]),
    ("module", ["-m", "nnx.as_flax", "-m", "program", "a", "--b"]),
  )
  def test_command(self, args):
    printed = self.passes(*args, path=[FOLDER])
    self.assertEqual(printed, "nnx.nn.linear () a --b\n")

  def test_command_without_a_program(self):
    for args in ([], ["-m"], ["--help"]):
      done = run("-m", "nnx.as_flax", *args)
      self.assertIn("usage: python -m nnx.as_flax", done.stderr)

  def test_without_a_line_in_the_program(self):
    printed = self.passes(PROGRAM, path=[os.path.abspath(STARTUP)])
    self.assertEqual(printed, "nnx.nn.linear ()\n")
    self.assertEqual(self.passes(PROGRAM), "flax.nnx.nn.linear ()\n")

  def test_startup_imports_nothing(self):
    printed = self.check(
      "import sys; print('jax' in sys.modules, 'nnx' in sys.modules)",
      path=[os.path.abspath(STARTUP)],
    )
    self.assertEqual(printed, "False False\n")

  def test_startup_runs_the_sitecustomize_that_it_hides(self):
    with tempfile.TemporaryDirectory() as folder:
      pathlib.Path(folder, "sitecustomize.py").write_text(
        "print('of the host')"
      )
      printed = self.check("", path=[os.path.abspath(STARTUP), folder])
    self.assertEqual(printed, "of the host\n")

  def test_pytest_plugin(self):
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder, "some_test.py")
      file.write_text(
        "from flax import nnx\n"
        "def test(): assert nnx.Linear.__module__ == 'nnx.nn.linear'\n"
      )
      printed = self.passes(
        *("-m", "pytest", "-p", "nnx.as_flax.pytest_plugin"),
        *("-c", "/dev/null", "-p", "no:cacheprovider", str(file)),
      )
    self.assertIn("flax.nnx: nnx, by nnx.as_flax", printed)
    self.assertIn("1 passed", printed)

  def test_names_and_modules_are_ours(self):
    self.check("""
      import nnx.as_flax
      import sys, pkgutil, importlib
      import flax
      assert "flax.nnx" not in sys.modules
      from flax import nnx as theirs
      import flax.nnx as also
      import nnx
      assert theirs is also is flax.nnx is nnx
      from flax.nnx import bridge, statelib
      from flax.nnx.nn.linear import Conv, Embed, default_kernel_init
      from flax.nnx.bridge.wrappers import ToNNX
      import flax.nnx.transforms.autodiff as autodiff
      import bridge as ours
      assert statelib is nnx.statelib and Conv is nnx.Conv
      assert ToNNX is ours.ToNNX and autodiff is nnx.transforms.autodiff
      assert bridge is nnx.bridge and bridge.module.Scope is ours.Scope
      assert nnx.helpers.TrainState is nnx.TrainState
      assert nnx.__name__ == nnx.__spec__.name == "nnx"
      for name in ("nothing", "containers_", "nn.nothing"):
        assert importlib.util.find_spec(f"flax.nnx.{name}") is None
      loaded = [m for m in sys.modules.values()
                if "flax/nnx/" in str(getattr(m, "__file__", ""))]
      assert not loaded, loaded
    """)

  def test_flax_agrees(self):
    self.check("""
      import nnx.as_flax, nnx
      before = nnx.errors.TraceContextError
      import flax, jax, pickle
      from flax import linen, errors
      assert errors.TraceContextError is nnx.TraceContextError
      assert issubclass(errors.TraceContextError, errors.FlaxError)
      assert issubclass(errors.TraceContextError, before)
      p = nnx.Param(1)
      try:
        jax.jit(lambda: setattr(p, "value", 2))()
      except errors.FlaxError as error:
        assert str(error).startswith("Cannot change `Param`"), error
        assert type(pickle.loads(pickle.dumps(error))) is type(error)
      else:
        assert False
      for option, switch in (
        ("nnx_graph_mode", nnx.set_graph_mode),
        ("nnx_graph_updates", nnx.set_graph_updates),
      ):
        assert switch.current_value()
        flax.config.update(option, False)
        assert not switch.current_value()
        with switch(True):
          assert switch.current_value()
        assert not switch.current_value()
        flax.config.update(option, True)
        assert switch.current_value()
      assert nnx.using_eager_sharding()
      flax.config.update("flax_always_shard_variable", False)
      assert not nnx.using_eager_sharding()
      with nnx.use_eager_sharding(True):
        assert nnx.using_eager_sharding()
      assert not nnx.using_eager_sharding()
    """)

  def test_flax_imported_before_is_no_matter(self):
    self.check("""
      import flax.linen
      import nnx.as_flax
      import nnx, flax.nnx
      assert flax.nnx is nnx
      assert flax.errors.TraceContextError is nnx.TraceContextError
    """)

  def test_options_in_the_environment(self):
    code = """
      import nnx.as_flax
      from flax import nnx
      print(nnx.set_graph_mode.current_value())
    """
    self.assertEqual(self.check(code, NNX_GRAPH_MODE="false"), "False\n")
    done = run("-c", textwrap.dedent(code), FLAX_PYTREE_MODULE="false")
    self.assertIn(
      "`flax.config.flax_pytree_module` must be `True` where `nnx.as_flax` puts"
      " `nnx` in the place of `flax.nnx`, but is `False`.",
      done.stderr,
    )

  def test_options_that_are_set_later(self):
    self.check("""
      import flax, nnx.as_flax
      from flax import nnx
      for option, value in (
        ("flax_pytree_module", False), ("flax_max_repr_depth", 2)
      ):
        before = getattr(flax.config, option)
        try:
          flax.config.update(option, value)
        except ValueError as error:
          assert f"`flax.config.{option}` must be" in str(error)
        else:
          raise AssertionError(option)
        assert getattr(flax.config, option) == before
        flax.config.update(option, before)
      flax.config.update("nnx_graph_mode", False)
      assert nnx.set_graph_mode.current_value() is False
      flax.config.update("flax_always_shard_variable", False)
      assert not nnx.Param(1).eager_sharding
      assert "eager_sharding" not in repr(nnx.Param(1))
      assert "eager_sharding" in repr(nnx.Param(1, eager_sharding=True))
      with flax.config.temp_flip_flag("hijax_variable", False):
        pass
    """)

  def test_too_late(self):
    self.fails(
      """
      import sys, types
      from flax import nnx
      lib = sys.modules["some_lib"] = types.ModuleType("some_lib")
      class Model(nnx.Module): pass
      Model.__module__ = "some_lib"
      lib.Model, lib.jit = Model, nnx.jit
      import nnx.as_flax
      """,
      "ImportError: `nnx.as_flax` must come before `flax.nnx` is loaded, but it"
      " was loaded already: `__main__` holds `nnx`, `Model`; `some_lib` holds"
      " `Model`, `jit`. Write `import nnx.as_flax` above every other import of"
      " the program, or run it as `python -m nnx.as_flax program.py`",
    )

  def test_too_late_changes_nothing(self):
    self.check("""
      import sys, flax.nnx, nnx
      finders = list(sys.meta_path)
      try:
        import nnx.as_flax
      except ImportError as error:
        assert "`__main__` holds `flax`" in str(error)
      assert finders == sys.meta_path and "nnx.as_flax" not in sys.modules
      assert flax.nnx.__name__ == "flax.nnx"
      assert flax.errors.TraceContextError is not nnx.TraceContextError
    """)

  def test_bridge_alone_loads_no_flax_nnx(self):
    self.check("""
      import bridge, sys
      bridge.ToNNX
      assert "flax.nnx" not in sys.modules
      import nnx.as_flax
    """)

  def test_the_real_one_is_there_under_another_name(self):
    self.check("""
      import nnx.as_flax
      import bridge, flax, nnx, optax, sys
      from flax import nnx as ours
      theirs = nnx.as_flax.flax_nnx()
      assert theirs is sys.modules["_flax_nnx"] and theirs is not ours is nnx
      assert theirs.__name__ == "_flax_nnx"
      assert sys.modules["flax.nnx"] is flax.nnx is nnx
      rngs = theirs.Rngs(0)
      model = theirs.Sequential(theirs.Linear(2, 3, rngs=rngs),
                                theirs.relu,
                                theirs.BatchNorm(3, rngs=rngs),
                                theirs.Dropout(0.5, rngs=rngs))
      converted = bridge.from_flax_nnx(model)
      assert type(converted.layers[0]) is nnx.Linear
      assert converted.layers[1] is nnx.relu
      found = nnx.to_flat_state(nnx.state(converted, nnx.Param))
      wanted = theirs.to_flat_state(theirs.state(model, theirs.Param))
      assert list(found.paths) == list(wanted.paths), (found, wanted)
      optimizer = theirs.Optimizer(model, optax.adam(0.1), wrt=theirs.Param)
      assert type(bridge.from_flax_nnx(optimizer)) is nnx.Optimizer
      for wrong in (lambda: nnx.state(model), lambda: nnx.jit(model.__call__)):
        try:
          wrong()
        except TypeError as error:
          assert "`nnx.bridge.from_flax_nnx(...)`" in str(error), error
        else:
          assert False
      try:
        bridge.ToLinen(theirs.Linear, args=(2, 3))
      except TypeError as error:
        assert "of `flax.nnx`" in str(error), error
    """)


if __name__ == "__main__":
  absltest.main()
