"""Writes the BUILD files of a directory made by `pip install --target`.

Each distribution becomes one `py_library`, with what it requires as `deps`.
Its files are given to Bazel as whole directories, the largest ones that no
other distribution has files in: few labels, and small runfiles.
"""

import collections
import importlib.metadata
import os
import re
import sys

from pip._vendor.packaging import requirements

_HEADERS = {
  "jaxlib": "jaxlib/include",
  "pybind11": "pybind11/include",
}

_PACKAGE = """\
package(default_visibility = ["//visibility:public"])
"""

_ROOT = """\
load("@rules_python//python:defs.bzl", "py_library")

py_library(
    name = "packages",
    visibility = ["//visibility:public"],
    deps = {deps},
)
"""

_LIBRARY = """
py_library(
    name = "{name}.lib",
    data = {data},
    imports = ["."],
    deps = {deps},
)
"""

_HEADER_LIBRARY = """
cc_library(
    name = "{name}.headers",
    hdrs = glob(["{include}/**/*.h", "{include}/**/*.hpp"], allow_empty = True),
    includes = ["{include}"],
)
"""

_ALIAS = """
alias(
    name = "{alias}",
    actual = "//site:{actual}",
)
"""


def _normalize(name: str) -> str:
  return re.sub(r"[-_.]+", "_", name).lower()


def _prefixes(path: str) -> list[str]:
  parts = path.split("/")
  return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _labels(names) -> str:
  return "[" + ", ".join(f'"{name}"' for name in sorted(names)) + "]"


def _requires(dist, known) -> set[str]:
  found = set()
  for text in dist.requires or ():
    requirement = requirements.Requirement(text)
    marker = requirement.marker
    name = _normalize(requirement.name)
    if name in known and (marker is None or marker.evaluate({"extra": ""})):
      found.add(name)
  return found - {_normalize(dist.metadata["Name"])}


def main(site: str) -> None:
  """Writes the package `site`, and one a distribution beside it."""
  dists = {
    _normalize(dist.metadata["Name"]): dist
    for dist in importlib.metadata.distributions(path=[site])
  }
  files = {}
  owners = collections.defaultdict(set)
  for name, dist in dists.items():
    files[name] = [
      str(file)
      for file in dist.files or ()
      if not str(file).startswith("..")
      and os.path.exists(os.path.join(site, file))
    ]
    for file in files[name]:
      for prefix in _prefixes(file):
        owners[prefix].add(name)

  build = [
    'load("@rules_cc//cc:defs.bzl", "cc_library")\n'
    'load("@rules_python//python:defs.bzl", "py_library")\n\n' + _PACKAGE
  ]
  for name, dist in sorted(dists.items()):
    data = {
      next((p for p in _prefixes(file) if owners[p] == {name}), file)
      for file in files[name]
    }
    deps = {f":{dep}.lib" for dep in _requires(dist, dists)}
    build.append(
      _LIBRARY.format(name=name, data=_labels(data), deps=_labels(deps))
    )
    package = _PACKAGE
    for alias in (name, "pkg"):
      package += _ALIAS.format(alias=alias, actual=f"{name}.lib")
    if name in _HEADERS:
      build.append(_HEADER_LIBRARY.format(name=name, include=_HEADERS[name]))
      package += _ALIAS.format(alias="headers", actual=f"{name}.headers")
    os.makedirs(name, exist_ok=True)
    with open(os.path.join(name, "BUILD.bazel"), "w") as out:
      out.write(package)
  with open(os.path.join(site, "BUILD.bazel"), "w") as out:
    out.write("".join(build))
  with open("BUILD.bazel", "w") as out:
    everything = _labels(f"//site:{name}.lib" for name in dists)
    out.write(_ROOT.format(deps=everything))


if __name__ == "__main__":
  main(sys.argv[1])
