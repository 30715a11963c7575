"""Transforms inside of transforms, in the four modes, against flax.nnx."""

import functools
from typing import NamedTuple

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.engine import boxes
from tests.nnx.modes import programs

# Transforms of a function of a model and a number that returns a number; what
# they return is such a function, so that they go into each other.


def scan(lib, f, **mode):
  def body(total, model, x):
    return total + f(model, x)

  run = lib.scan(body, in_axes=(lib.Carry, None, 0), out_axes=lib.Carry, **mode)
  return lambda model, x: run(jnp.zeros(()), model, x * jnp.array([0.5, 1.0]))


def fori_loop(lib, f, **mode):
  def body(i, value):
    model, x, total = value
    return model, x, total + f(model, x + i)

  def run(model, x):
    init = model, x, jnp.zeros(())
    return lib.fori_loop(0, 2, body, init, **mode)[2]

  return run


def grad(lib, f, **mode):
  def run(model, x):
    value, gradient = lib.value_and_grad(f, argnums=1, **mode)(model, x)
    return value + gradient

  return run


def grad_of_model(lib, f, **mode):
  def run(model, x):
    return lib.grad(f, **mode)(model, x).w[...].sum()

  return run


OUTER = (
  programs.jit,
  programs.remat,
  programs.cond,
  programs.switch,
  scan,
  fori_loop,
  grad,
  grad_of_model,
)


def writes_a_little(lib, model, x):
  del lib
  y = model(x)
  model.mean[...] = model.mean[...] * 0.5 + x
  return y


def adds(lib, model, x):
  model.size = model.size + 1
  return model(x)


def moves_an_array(lib, model, x):
  del lib
  model.plain.table = model.plain.table * 2.0
  return model(x)


class Program(NamedTuple):
  """Transforms from the inside out, what is done, and what is given."""

  transforms: tuple
  effect: object
  argument: object


PROGRAMS = strategies.builds(
  Program,
  strategies.lists(strategies.sampled_from(OUTER), min_size=1, max_size=3).map(
    tuple
  ),
  strategies.sampled_from(
    (programs.reads, writes_a_little, adds, moves_an_array)
  ),
  strategies.sampled_from(
    (
      programs.tree,
      programs.shared_variable,
      programs.shared_module,
      programs.shared_plain,
    )
  ),
)


def run(lib, program, mode):
  def call():
    model = program.argument(lib)
    function = functools.partial(program.effect, lib)
    for transform in program.transforms:
      function = transform(lib, function, **programs.MODES[mode])
    return model, function(model, jnp.array(0.5))

  return programs.outcome(lib, call)


class CompositionTest(parameterized.TestCase):
  @parameterized.parameters(*programs.MODES)
  @hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
  )
  @hypothesis.given(program=PROGRAMS)
  def test_does_what_flax_does(self, mode, program):
    # What is the same for all iterations and written is carried here; Flax
    # forgets it in graph mode.
    forgets = mode == "graph" and scan in program.transforms
    hypothesis.assume(not forgets or program.effect is programs.reads)
    # And loops over a copy for each place of what is shared in tree mode, which
    # is refused here.
    shared = program.argument is not programs.tree
    copies = mode == "tree" and fori_loop in program.transforms
    hypothesis.assume(not (copies and shared))
    theirs, their_error = run(flax_nnx, program, mode)
    ours, error = run(nnx, program, mode)
    if their_error is not None:
      self.assertIsNotNone(error, f"Flax: {their_error}")
      return
    self.assertIsNone(error)
    self.assertEqual(ours, theirs)


# The fourth mode: transforms of jax itself on hijax Variables. With `eager`
# they are what they mean, step by step in Python, on Variables that are not
# hijax. jax has none yet in `jax.remat`, nor where it differentiates branches
# and loops.


def of_jit(f, eager):
  return f if eager else jax.jit(f)


def of_cond(f, eager):
  def run(model, x):
    return jax.lax.cond(x > -1e6, f, lambda _, x: x, model, x)

  return f if eager else run


def of_switch(f, eager):
  def run(model, x):
    return jax.lax.switch(1, [lambda: x, lambda: f(model, x)])

  return f if eager else run


def of_scan(f, eager):
  def run(model, x):
    if eager:
      return f(model, x * 0.5) + f(model, x)
    return jax.lax.scan(
      lambda total, factor: (total + f(model, x * factor), None),
      jnp.zeros(()),
      jnp.array([0.5, 1.0]),
    )[0]

  return run


def of_fori_loop(f, eager):
  def run(model, x):
    if eager:
      return f(model, x) + f(model, x + 1)
    return jax.lax.fori_loop(
      0, 2, lambda i, total: total + f(model, x + i), jnp.zeros(())
    )

  return run


def of_grad(f, eager):
  def run(model, x):
    if eager:
      value, gradient = flax_nnx.value_and_grad(f, argnums=1)(model, x)
    else:
      value, gradient = jax.value_and_grad(lambda x: f(model, x))(x)
    return value + gradient

  return run


def reads(model, x):
  return model(x)


def writes(model, x):
  model.mean[...] = model.mean[...] * 0.5 + jax.lax.stop_gradient(x)
  return model(x)


def reads_what_it_writes(model, x):
  writes(model, x)
  model.mean[...] = model.mean[...] + 1.0
  return model(x) * model.mean[...].sum()


HIJAX_PROGRAMS = strategies.builds(
  Program,
  strategies.builds(
    lambda first, rest: (*first, *rest),
    strategies.lists(strategies.sampled_from((of_jit, of_grad)), max_size=2),
    strategies.lists(
      strategies.sampled_from(
        (of_jit, of_cond, of_switch, of_scan, of_fori_loop)
      ),
      min_size=1,
      max_size=2,
    ),
  ),
  strategies.sampled_from((reads, writes, reads_what_it_writes)),
  # A `jax.Ref`, which later versions have, must be there once.
  strategies.sampled_from(
    (programs.tree, programs.shared_variable)
    if boxes.CHANGES_STRUCTURE
    else (programs.tree,)
  ),
)


class HijaxTest(absltest.TestCase):
  @hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
  )
  @hypothesis.given(program=HIJAX_PROGRAMS)
  def test_does_what_its_steps_do(self, program):
    results = []
    for lib, eager in ((flax_nnx, True), (nnx, False)):
      with lib.var_defaults(hijax=not eager):
        model = program.argument(lib)
      function = program.effect
      for transform in program.transforms:
        function = transform(function, eager)
      y = function(model, jnp.array(0.5))
      results.append((y, model.w[...], model.mean[...]))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results
    )


if __name__ == "__main__":
  absltest.main()
