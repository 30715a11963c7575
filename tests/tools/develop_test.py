"""`tools/bazel run //tools:develop`: what it puts into the checkout."""

import pathlib
import sys

import pytest

from tools import develop


def test_extensions_are_put_beside_their_sources(tmp_path):
  built, checkout = tmp_path / "built", tmp_path / "checkout"
  for folder in (built, checkout):
    for name in ("bridge", "kernels/op", "nnx"):
      (folder / name).mkdir(parents=True)
  (built / "kernels/op/_op_cpu.so").write_text("new")
  (checkout / "kernels/op/_op_cpu.so").write_text("old")
  placed = develop.place_extensions(built, checkout)
  assert placed == [checkout / "kernels/op/_op_cpu.so"]
  assert placed[0].read_text() == "new"


@pytest.mark.parametrize(
  "version, end", [((3, 11), "3_11.txt"), ((3, 14), "3_12.txt")]
)
def test_lock_file_of_a_python(version, end):
  assert develop.lock_for(version).endswith(end)


def test_environment_is_made_once_and_finds_the_checkout(tmp_path, monkeypatch):
  commands = []

  def run(command, **_):
    commands.append(command)
    site = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    (tmp_path / ".venv" / site / "site-packages").mkdir(
      parents=True, exist_ok=True
    )

  monkeypatch.setattr(develop.subprocess, "run", run)
  lock = tmp_path / "lock.txt"
  lock.write_text("jax==1\n")
  develop.make_environment(lock, tmp_path)
  develop.make_environment(lock, tmp_path)
  assert [command[2] for command in commands] == ["venv", "pip"]
  assert f"--requirement={lock}" in commands[1]
  (pth,) = tmp_path.glob(".venv/lib/*/site-packages/*.pth")
  assert pathlib.Path(pth.read_text().strip()) == tmp_path
  lock.write_text("jax==2\n")
  develop.make_environment(lock, tmp_path)
  assert len(commands) == 4
