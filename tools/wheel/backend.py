"""What pip calls to build this workspace without Bazel (PEP 517 and 660).

Sources are those that the BUILD files list, as `tools.gpu_build` reads them,
and the wheel is that of `//:wheel`, as `archive` writes it.
"""

from __future__ import annotations

import io
import os
import pathlib
import tarfile
import tempfile

from tools import gpu_build
from tools.build_defs import python_probe
from tools.wheel import archive

ROOT = gpu_build.ROOT


def _check_python() -> None:
  refusal = python_probe.refusal(
    **python_probe.describe(),
    otherwise="or call the pip of another interpreter",
  )
  if refusal:
    raise RuntimeError(refusal)


def _build_extensions(objects: pathlib.Path, out: pathlib.Path) -> None:
  _check_python()
  targets = gpu_build.read_targets(ROOT, ("kernels", "nnx"))
  builder = gpu_build.Builder(objects, None, os.cpu_count() or 1, out)
  _, failures = builder.build(targets)
  if failures:
    raise RuntimeError("\n".join(failures.values()))


def _sources() -> dict[str, pathlib.Path]:
  return {
    path.relative_to(ROOT).as_posix(): path
    for package in archive.PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.is_file()
  }


def _write(directory: str, files: dict[str, pathlib.Path]) -> str:
  return archive.write(pathlib.Path(directory), ROOT, files).name


def get_requires_for_build_wheel(config_settings=None):
  """Returns the jax whose headers are read; refuses a Python that has none."""
  _check_python()
  return archive.read_dependencies(ROOT)


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
  """Builds a wheel with the extensions for the CPU."""
  files = {
    archive.place(name): path
    for name, path in _sources().items()
    if archive.is_shipped(name) and path.suffix != ".so"
  }
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, "out")
    _build_extensions(pathlib.Path(folder), out)
    for path in out.rglob("*.so"):
      files[archive.place(path.relative_to(out).as_posix())] = path
    return _write(wheel_directory, files)


def build_editable(
  wheel_directory, config_settings=None, metadata_directory=None
):
  """Builds the extensions beside their sources, and a wheel that names them."""
  with tempfile.TemporaryDirectory() as folder:
    _build_extensions(pathlib.Path(folder), ROOT)
    pth = pathlib.Path(folder, "fused_nnx.pth")
    pth.write_text(f"{ROOT}\n")
    return _write(wheel_directory, {pth.name: pth})


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
  """Writes METADATA, which needs no compiler."""
  stem, about = archive.read_project(ROOT)
  info = pathlib.Path(metadata_directory, f"{stem}.dist-info")
  info.mkdir()
  (info / "METADATA").write_text(about, encoding="utf-8")
  return info.name


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_sdist(sdist_directory, config_settings=None):
  """Archives what `build_wheel` reads."""
  stem, about = archive.read_project(ROOT)
  names = [
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "tools/build_defs/python_probe.py",
    "tools/gpu_build.py",
    "tools/wheel/archive.py",
    "tools/wheel/backend.py",
    *(n for n in _sources() if not n.endswith((".so", ".pyc"))),
  ]
  name = f"{stem}.tar.gz"
  with tarfile.open(pathlib.Path(sdist_directory, name), "w:gz") as sdist:
    for each in sorted(names):
      sdist.add(ROOT / each, f"{stem}/{each}")
    data = about.encode()
    entry = tarfile.TarInfo(f"{stem}/PKG-INFO")
    entry.size = len(data)
    sdist.addfile(entry, io.BytesIO(data))
  return name
