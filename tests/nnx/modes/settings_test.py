"""Arguments before switches before the environment: which mode a call is in."""

import functools
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.graphlib import modes

LIBRARIES = (nnx, flax_nnx)
SWITCHES = ("graph", "graph_updates")


def switch_of(lib, name):
  return lib.set_graph_mode if name == "graph" else lib.set_graph_updates


def make_model(lib):
  class Model(lib.Module):
    def __init__(self):
      self.w = lib.Param(jnp.array([2.0, 3.0]))

  return Model()


def loss(model):
  return (model.w[...] ** 2).sum()


# Functions that a mode changes: of a library and keyword arguments, a maker of
# the function, and whether what it does is of the tree mode.


def by_grad(lib, **modes):
  return lib.grad(loss, **modes)


def by_grad_decorator(lib, **modes):
  return lib.grad(argnums=0, **modes)(loss)


def by_value_and_grad(lib, **modes):
  both = lib.value_and_grad(loss, **modes)
  return lambda model: both(model)[1]


def by_value_and_grad_decorator(lib, **modes):
  both = lib.value_and_grad(argnums=0, **modes)(loss)
  return lambda model: both(model)[1]


def gives_states(lib, function):
  return isinstance(function(make_model(lib)), lib.State)


def by_split_rngs(lib, **modes):
  return functools.partial(lib.split_rngs, splits=2, **modes)


def by_fork_rngs(lib, **modes):
  return functools.partial(lib.fork_rngs, **modes)


def changes_in_place(lib, function):
  rngs = lib.Rngs(0)
  before = jax.random.key_data(rngs.default.key[...])
  function(rngs)
  return not np.array_equal(jax.random.key_data(rngs.default.key[...]), before)


def by_split_rngs_decorator(lib, **modes):
  return lib.split_rngs(splits=2, **modes)(lambda rngs: rngs)


def by_fork_rngs_decorator(lib, **modes):
  return lib.fork_rngs(**modes)(lambda rngs: rngs)


def hands_over_the_object(lib, function):
  rngs = lib.Rngs(0)
  return function(rngs) is rngs


# What makes the function, how it shows, and whether the mode is that in which
# it is made rather than called.
CHANGED = {
  "grad": (by_grad, gives_states, True),
  "grad_decorator": (by_grad_decorator, gives_states, True),
  "value_and_grad": (by_value_and_grad, gives_states, True),
  "value_and_grad_decorator": (
    by_value_and_grad_decorator,
    gives_states,
    True,
  ),
  "split_rngs": (by_split_rngs, changes_in_place, False),
  "fork_rngs": (by_fork_rngs, changes_in_place, False),
  "split_rngs_decorator": (
    by_split_rngs_decorator,
    hands_over_the_object,
    True,
  ),
  "fork_rngs_decorator": (by_fork_rngs_decorator, hands_over_the_object, True),
}
NAMED = [(name, name) for name in CHANGED]

PROGRAM = """
import nnx
from tests.nnx.modes import settings_test
for name, (make, graphs, _) in settings_test.CHANGED.items():
  assert not graphs(nnx, make(nnx)), name
  assert graphs(nnx, make(nnx, graph=True, graph_updates=True)), name
  with nnx.set_graph_mode(True), nnx.set_graph_updates(True):
    assert graphs(nnx, make(nnx)), name
"""


class ModesTest(parameterized.TestCase):
  @parameterized.named_parameters(*NAMED)
  def test_graphs_unless_asked(self, name):
    make, graphs, _ = CHANGED[name]
    for lib in LIBRARIES:
      self.assertTrue(graphs(lib, make(lib)))
      self.assertTrue(graphs(lib, make(lib, graph=True, graph_updates=True)))

  @parameterized.named_parameters(*NAMED)
  def test_by_argument(self, name):
    make, graphs, _ = CHANGED[name]
    for lib in LIBRARIES:
      for switch in SWITCHES:
        self.assertFalse(graphs(lib, make(lib, **{switch: False})))

  @parameterized.named_parameters(*NAMED)
  def test_by_context_decorator_and_value(self, name):
    make, graphs, _ = CHANGED[name]
    for lib in LIBRARIES:
      for switch in SWITCHES:
        setter = switch_of(lib, switch)
        with setter(False):
          self.assertFalse(graphs(lib, make(lib)))
          with setter(True):
            self.assertTrue(graphs(lib, make(lib)))
          self.assertFalse(graphs(lib, make(lib)))
        decorated = setter(False)(lambda lib: graphs(lib, make(lib)))
        self.assertFalse(decorated(lib))
        setter(False)
        try:
          self.assertFalse(graphs(lib, make(lib)))
        finally:
          setter(True)
        self.assertTrue(graphs(lib, make(lib)))

  @parameterized.named_parameters(*NAMED)
  def test_an_argument_is_before_a_switch(self, name):
    make, graphs, _ = CHANGED[name]
    for lib in LIBRARIES:
      with lib.set_graph_mode(False), lib.set_graph_updates(False):
        self.assertTrue(graphs(lib, make(lib, graph=True, graph_updates=True)))
        self.assertFalse(graphs(lib, make(lib, graph=True)))
        self.assertFalse(graphs(lib, make(lib, graph_updates=True)))

  @parameterized.named_parameters(*NAMED)
  def test_the_switch_counts_as_in_flax_when_made_or_when_called(self, name):
    make, graphs, when_made = CHANGED[name]
    for lib in LIBRARIES:
      for switch in SWITCHES:
        setter = switch_of(lib, switch)
        with setter(False):
          function = make(lib)
        self.assertEqual(graphs(lib, function), not when_made)
        function = make(lib)
        with setter(False):
          self.assertEqual(graphs(lib, function), when_made)

  def test_custom_vjp(self):
    for lib in LIBRARIES:
      for switch in SWITCHES:
        kinds = []

        def run(modes, lib=lib, kinds=kinds):
          f = lib.custom_vjp(lambda model: model.w[...].sum(), **modes)

          def fwd(model, f=f):
            return f(model), model

          def bwd(residual, cotangent):
            tree = not isinstance(cotangent, tuple)
            kinds.append(tree)
            if tree:
              return (jax.tree.map(lambda w: 5 * w, residual),)
            ((updates,), _) = cotangent
            return (jax.tree.map(lambda w: 5 * jnp.ones_like(w), updates),)

          f.defvjp(fwd, bwd)
          return lib.grad(f, **modes)(make_model(lib))

        run({switch: False})
        with switch_of(lib, switch)(False):
          grads = run({})
          run({"graph": True, "graph_updates": True})
        self.assertEqual(kinds, [True, True, False])
        np.testing.assert_allclose(grads.w[...], [10, 15])

  @parameterized.parameters("NNX_GRAPH_MODE", "NNX_GRAPH_UPDATES")
  def test_by_environment(self, variable):
    for text in ("false", "0", "off"):
      self.run_with({variable: text})

  def run_with(self, environment):
    root = pathlib.Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *sys.path])
    return subprocess.run(
      [sys.executable, "-c", PROGRAM],
      env={**os.environ, "PYTHONPATH": path, **environment},
      check=True,
      capture_output=True,
      text=True,
    )

  def test_an_environment_that_is_no_truth_value_is_refused(self):
    with self.assertRaises(subprocess.CalledProcessError) as caught:
      self.run_with({"NNX_GRAPH_MODE": "maybe"})
    self.assertIn(
      "`NNX_GRAPH_MODE` must be `true` or `false`, but is `maybe`.",
      caught.exception.stderr,
    )

  def test_compat_is_in_graph_mode_whatever_the_switches_say(self):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
      self.assertTrue(gives_states(nnx, nnx.compat.grad(loss)))
      both = nnx.compat.value_and_grad(loss)
      self.assertTrue(gives_states(nnx, lambda m: both(m)[1]))
      for split in (
        functools.partial(nnx.compat.split_rngs, splits=2),
        nnx.compat.fork_rngs,
      ):
        self.assertTrue(changes_in_place(nnx, split))

  def test_errors_know_what_compat_has(self):
    libraries = {"functools", "typing"}  # that its module imports
    for name in {*dir(nnx), *dir(nnx.compat)} - libraries:
      if not name.startswith("_"):
        with self.subTest(name):
          named = "nnx.compat" in modes.way_out(name)
          self.assertEqual(named, hasattr(nnx.compat, name))

  def test_what_uses_streams_inside_runs_in_every_mode(self):
    cell = nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0))
    layer = nnx.RNN(cell, broadcast_rngs="params")
    x = jnp.ones((1, 4, 2))
    made = nnx.Scan.constructor(
      nnx.Linear, state_axes={nnx.Param: 0}, length=2, scan_output=False
    )
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
      got = layer(x)
      # Filters of axes inside, which these modes refuse.
      stacked = made(3, 3, rngs=nnx.Rngs(0))
      y = stacked(jnp.ones((1, 3)))
    np.testing.assert_array_equal(got, layer(x))
    self.assertEqual(y.shape, (1, 3))


if __name__ == "__main__":
  absltest.main()
