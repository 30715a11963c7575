"""Makes the checkout usable without Bazel: `tools/bazel run //tools:develop`.

Puts the extensions beside their sources, and makes `.venv`, a virtual
environment with the packages of the lock file, which finds the checkout. Then
`.venv/bin/python`, its `pytest` and an IDE work.
"""

import os
import pathlib
import shutil
import subprocess
import sys

PACKAGES = ("bridge", "kernels", "nnx")
LOCKS = {
  (3, 11): "tools/build_defs/requirements_lock_3_11.txt",
  (3, 12): "tools/build_defs/requirements_lock_3_12.txt",
}


def place_extensions(
  built: pathlib.Path, checkout: pathlib.Path
) -> list[pathlib.Path]:
  """Copies the extensions of one tree to the same places of another."""
  placed = []
  for package in PACKAGES:
    for path in sorted((built / package).rglob("*.so")):
      target = checkout / path.relative_to(built)
      new = target.with_name(target.name + ".new")
      shutil.copyfile(path, new)
      new.chmod(0o755)
      os.replace(new, target)  # a process may have the one before open
      placed.append(target)
  return placed


def lock_for(version: tuple[int, int]) -> str:
  """Returns the newest lock file that is not newer than a Python."""
  return LOCKS[max(oldest for oldest in LOCKS if oldest <= version)]


def make_environment(lock: pathlib.Path, checkout: pathlib.Path) -> None:
  """Makes or renews `.venv`; of a lock file that it has already, it is done."""
  folder = checkout / ".venv"
  stamp = folder / "packages"
  wanted = f"{sys.version}\n{lock.read_text()}"
  if stamp.exists() and stamp.read_text() == wanted:
    return
  print(f"Installing packages into {folder}", flush=True)
  clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

  def python(program: str | pathlib.Path, *arguments: str | pathlib.Path):
    subprocess.run([program, "-m", *arguments], env=clean, check=True)

  python(sys.executable, "venv", "--clear", folder)
  python(
    folder / "bin" / "python",
    "pip",
    "install",
    "--quiet",
    "--disable-pip-version-check",
    "--no-deps",
    "--require-hashes",
    "--only-binary=:all:",
    f"--requirement={lock}",
  )
  (site,) = folder.glob("lib/python*/site-packages")
  (site / "fused_nnx.pth").write_text(f"{checkout}\n")
  stamp.write_text(wanted)


def main() -> None:
  if "BUILD_WORKSPACE_DIRECTORY" not in os.environ:
    raise SystemExit("develop: run me as `tools/bazel run //tools:develop`.")
  checkout = pathlib.Path(os.environ["BUILD_WORKSPACE_DIRECTORY"])
  for path in place_extensions(pathlib.Path(), checkout):
    print(path.relative_to(checkout))
  lock = pathlib.Path(lock_for(sys.version_info[:2]))
  make_environment(lock.absolute(), checkout)
  print(f"Ready: {checkout}/.venv/bin/python; pytest is beside it.")


if __name__ == "__main__":
  main()
