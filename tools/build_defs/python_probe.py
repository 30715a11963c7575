"""Prints, as JSON, what a build has to know of the Python that runs this.

Any Python may be asked, an old one too, and so this is written in what all of
them understand.
"""

import json
import os
import sys
import sysconfig

OLDEST = (3, 11)
NEWEST = (3, 14)
OTHERWISE = "or name another interpreter with --repo_env=NNX_PYTHON=..."


def refusal(
  executable,
  implementation,
  version,
  gil_disabled,
  include,
  otherwise=OTHERWISE,
):
  """Says why a Python cannot be built with, or returns None.

  Args:
    executable: its path.
    implementation: the name, such as `cpython`.
    version: major and minor number.
    gil_disabled: whether it is a free-threaded build.
    include: the directory of its C headers.
    otherwise: what else there is to do.
  """
  if (
    implementation != "cpython"
    or gil_disabled
    or not OLDEST <= tuple(version) <= NEWEST
  ):
    return (
      "CPython %d.%d to %d.%d, with the global lock, is needed, but `%s` is "
      "%s %d.%d%s: install python3, python3-dev and python3-pip of such a "
      "version, %s"
    ) % (
      OLDEST
      + NEWEST
      + (executable, implementation)
      + tuple(version)
      + (" (free-threaded)" if gil_disabled else "", otherwise)
    )
  if not os.path.exists(os.path.join(include, "Python.h")):
    return (
      "`%s` has no headers (`%s` holds no Python.h): install its development "
      "package, such as Debian's python%d.%d-dev, %s"
    ) % ((executable, include) + tuple(version) + (otherwise,))
  return None


def describe():
  """Returns what `refusal` asks of the Python that runs this."""
  if hasattr(sys, "implementation"):
    implementation = sys.implementation.name
  else:
    implementation = "python"
  return {
    # The interpreter itself, not a shim that leads to it.
    "executable": sys.executable,
    "implementation": implementation,
    "version": sys.version_info[:2],
    "gil_disabled": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "include": sysconfig.get_path("include"),
  }


def main():
  """Prints `executable`, `version` and `include`, and `refusal` or null."""
  found = describe()
  found["refusal"] = refusal(**found)
  print(json.dumps(found))


if __name__ == "__main__":
  main()
