"""Updates in place, and Python code that runs in the middle of a call."""

import gc
import signal
import sys
import threading

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms.in_place_steps import SIZE, Case, started, step


class InterruptedTest(Case):
  """Python code that runs in the middle of a call, and what it finds."""

  def test_finalizers(self):
    variable, seen = started(), []

    class Cycle:
      def __init__(self):
        self.me = self

      def __del__(self):
        array = variable.value
        seen.append((array, array + 0, np.asarray(array)[0]))

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    self.addCleanup(gc.set_threshold, *thresholds)
    for _ in range(200):
      Cycle()
      step(variable, 1.0)
    gc.collect()
    self.assertNotEmpty(seen)
    for array, again, first in seen:
      np.testing.assert_array_equal(array, first)
      np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(variable.value, 202.0)
    self.assertTrue(gc.isenabled())

  @parameterized.parameters(False, True)
  def test_signals(self, raises):
    variable, seen, raised = started(), [], 0
    armed = False

    class Interrupt(BaseException):
      pass

    def handle(number, frame):
      nonlocal armed
      if not armed:
        return
      seen.append(np.array(variable.value)[0])
      # Jax's own Python code does not expect it everywhere.
      if raises and frame.f_code.co_filename == __file__:
        armed = False
        raise Interrupt

    signal.signal(signal.SIGALRM, handle)
    self.addCleanup(signal.signal, signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 3e-4)
    steps = 0
    while len(seen) < 100:
      try:
        armed = True
        step(variable, 1.0)
        step(variable, 1.0)
        armed = False
        steps += 2
      except Interrupt:
        raised += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    value = np.array(variable.value)
    self.assertTrue((value == value[0]).all())
    self.assertBetween(value[0], steps + 2, steps + 2 + 2 * raised)
    self.assertEqual(seen, sorted(seen))

  def test_the_collector_seems_to_be_on(self):
    variable, seen, stop = started(), set(), threading.Event()

    def look():
      while not stop.is_set():
        seen.add(gc.isenabled())

    thresholds = gc.get_threshold()
    interval = sys.getswitchinterval()
    self.addCleanup(sys.setswitchinterval, interval)
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(500):
      step(variable, 1.0)
    stop.set()
    thread.join()
    self.assertEqual(seen, {True})
    self.assertEqual(gc.get_threshold(), thresholds)

  def test_the_collector_runs_while_a_program_is_made(self):
    thresholds = []

    @nnx.jit
    def add(variable):
      thresholds.append(gc.get_threshold())
      variable.value = variable.value + 1

    variable = nnx.Param(jnp.zeros(SIZE))
    add(variable)
    add(variable)
    with jax.default_matmul_precision("highest"):  # a program of its own
      add(variable)
    self.assertEqual(thresholds, 2 * [gc.get_threshold()])
    np.testing.assert_array_equal(variable.value, 3.0)

  def test_threads_that_read(self):
    variable, errors, stop = started(), [], threading.Event()

    def read():
      try:
        while not stop.is_set():
          value = np.asarray(variable.value)
          assert (value == value[0]).all()
      except BaseException as e:
        errors.append(e)

    threads = [threading.Thread(target=read) for _ in range(2)]
    interval = sys.getswitchinterval()
    self.addCleanup(sys.setswitchinterval, interval)
    sys.setswitchinterval(1e-6)
    for thread in threads:
      thread.start()
    for _ in range(500):
      step(variable, 1.0)
    stop.set()
    for thread in threads:
      thread.join()
    self.assertEmpty(errors)
    np.testing.assert_array_equal(variable.value, 502.0)


if __name__ == "__main__":
  absltest.main()
