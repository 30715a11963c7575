"""Several virtual CPU devices in one test process."""

import unittest

import jax


def use_cpu_devices(count: int) -> None:
  """Asks for virtual devices; call it when a test file is imported.

  Args:
    count: How many.
  """
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # too late, another file was faster: need_devices will say so


def need_devices(count: int) -> None:
  """Skips a test that has too few devices.

  Args:
    count: How many it needs.

  Raises:
    unittest.SkipTest: If there are fewer.
  """
  if jax.device_count() < count:
    raise unittest.SkipTest(
      f"needs {count} devices, here are {jax.device_count()}: run this file in"
      " a process of its own"
    )


def auto_mesh(shape: tuple[int, ...], names: tuple[str, ...]):
  """Returns a mesh on which `jit` decides the shardings.

  Args:
    shape: Of the mesh.
    names: Of its axes.
  """
  return jax.make_mesh(
    shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names)
  )
