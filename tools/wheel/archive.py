"""Writes the wheel: a zip of the packages, with what pyproject.toml says of it.

In it `kernels` and `bridge` are inside of `nnx`, where no other package can
have their names; see CONTRIBUTING.md. `//:wheel` calls this, as `backend` does.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Iterable, Mapping
import hashlib
import pathlib
import platform
import re
import sys
from typing import Any
import zipfile

PACKAGES = ("bridge", "kernels", "nnx")
# What the types of the other packages are in a checkout.
_IN_CHECKOUTS = ("nnx/bridge.pyi", "nnx/kernels.pyi")
# The oldest glibc that comes with a libstdc++ of that GLIBCXX_3.4.x, or newer.
_GLIBC_OF = {0: 17, 20: 24, 23: 26, 25: 28, 27: 31, 29: 34, 30: 35, 31: 39}


def is_shipped(path: str) -> bool:
  """Tells whether a file, named from the root, goes into a wheel."""
  return (
    path.split("/")[0] in PACKAGES
    and path.endswith((".py", ".pyi", ".so", "/py.typed"))
    and path not in _IN_CHECKOUTS
    and not path.endswith("/arg_specs.py")  # for tests and the bench
  )


def place(path: str) -> str:
  """Returns the name in a wheel of a file, named from the root."""
  return path if path.startswith("nnx/") else f"nnx/{path}"


def platform_tag(libraries: Iterable[bytes]) -> str:
  """Returns the oldest Linux that has all symbols that libraries need."""
  needed = {17}
  for library in libraries:
    for name, version in re.findall(
      rb"\0(GLIBC_2|GLIBCXX_3\.4)\.(\d+)", library
    ):
      number = int(version)
      if name == b"GLIBCXX_3.4":
        number = _GLIBC_OF[max(n for n in _GLIBC_OF if n <= number)]
      needed.add(number)
  return f"manylinux_2_{max(needed)}_{platform.machine()}"


def metadata(project: Mapping[str, Any], readme: str) -> str:
  """Makes METADATA from the table `project` of pyproject.toml."""
  lines = [
    "Metadata-Version: 2.1",
    f"Name: {project['name']}",
    f"Version: {project['version']}",
    f"Summary: {project['description']}",
    f"License: {project['license']}",
    f"Requires-Python: {project['requires-python']}",
    *(f"Classifier: {name}" for name in project["classifiers"]),
    *(f"Requires-Dist: {each}" for each in project["dependencies"]),
  ]
  for extra, dependencies in project["optional-dependencies"].items():
    lines.append(f"Provides-Extra: {extra}")
    lines += [
      f"Requires-Dist: {each} ; extra == '{extra}'" for each in dependencies
    ]
  lines += ["Description-Content-Type: text/markdown", "", readme]
  return "\n".join(lines)


def _record(contents: Mapping[str, bytes], folder: str) -> bytes:
  rows = []
  for name, data in contents.items():
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    rows.append(f"{name},sha256={digest.rstrip(b'=').decode()},{len(data)}")
  return "\n".join([*rows, f"{folder}/RECORD,,", ""]).encode()


def _project(root: pathlib.Path) -> dict[str, Any]:
  import tomllib  # not in Pythons that are to be refused in words

  return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def read_dependencies(root: pathlib.Path) -> list[str]:
  """Returns what a release requires."""
  return _project(root)["dependencies"]


def read_project(root: pathlib.Path) -> tuple[str, str]:
  """Returns the stem of a release's file names, and its METADATA."""
  project = _project(root)
  stem = f"{project['name'].replace('-', '_')}-{project['version']}"
  readme = (root / "README.md").read_text(encoding="utf-8")
  return stem, metadata(project, readme)


def write(
  out: pathlib.Path, root: pathlib.Path, files: Mapping[str, pathlib.Path]
) -> pathlib.Path:
  """Writes a wheel of this Python for files.

  Args:
    out: the folder to write it to.
    root: where pyproject.toml, README.md and LICENSE are.
    files: where they are, by their names in the wheel.

  Returns:
    The wheel.
  """
  stem, about = read_project(root)
  contents = {name: files[name].read_bytes() for name in sorted(files)}
  libraries = [data for name, data in contents.items() if name.endswith(".so")]
  python = "cp{}{}".format(*sys.version_info)
  tag = f"{python}-{python}-{platform_tag(libraries)}"
  info = f"{stem}.dist-info"
  contents |= {
    f"{info}/LICENSE": (root / "LICENSE").read_bytes(),
    f"{info}/METADATA": about.encode(),
    f"{info}/WHEEL": (
      "Wheel-Version: 1.0\nGenerator: fused_nnx\nRoot-Is-Purelib: false\n"
      f"Tag: {tag}\n"
    ).encode(),
  }
  contents[f"{info}/RECORD"] = _record(contents, info)
  wheel = out / f"{stem}-{tag}.whl"
  with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in contents.items():
      entry = zipfile.ZipInfo(name)  # of one date, so that wheels are equal
      entry.external_attr = 0o644 << 16
      archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
  return wheel


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("files", help="lines of a name from the root and a path")
  options = parser.parse_args()
  pairs = [
    line.split("\t")
    for line in pathlib.Path(options.files).read_text().splitlines()
  ]
  files = {place(n): pathlib.Path(p) for n, p in pairs if is_shipped(n)}
  options.out.mkdir(parents=True, exist_ok=True)
  write(options.out, pathlib.Path(), files)


if __name__ == "__main__":
  main()
