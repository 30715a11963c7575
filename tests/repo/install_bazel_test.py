"""What the installer says where it cannot install."""

import os
import pathlib
import subprocess

INSTALLER = pathlib.Path("tools/install_bazel_debian.sh").resolve()


def install(tmp_path, **env):
  prefix = tmp_path / "cache" / "bazel"
  done = subprocess.run(
    [INSTALLER, prefix],
    env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | env,
    capture_output=True,
    text=True,
  )
  left = {path.name for path in prefix.parent.glob("*")}
  return done, left - {"bazel.lock"}


def test_an_archive_out_of_reach_is_said_in_one_sentence(tmp_path):
  nowhere = (tmp_path / "nowhere").as_uri()
  done, left = install(tmp_path, DEBIAN_MIRROR=nowhere)
  assert done.returncode == 1
  assert done.stdout == ""
  assert done.stderr.splitlines()[-1] == (
    "tools/bazel: no Bazel here, and no Debian archive in reach that offers "
    f"Bazel 7 (tried: {nowhere} (forky) {nowhere} (sid); NNX_VERBOSE=1 shows "
    "why); install bazelisk, which reads .bazelversion, and run it as `bazel`."
  )
  assert not left


def test_a_machine_without_apt_is_told_of_bazelisk(tmp_path):
  (tmp_path / "bin").mkdir()
  for tool in ("bash", "dirname", "realpath"):
    (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
  done, left = install(tmp_path, PATH=str(tmp_path / "bin"))
  assert done.returncode == 1
  assert done.stderr == (
    "tools/bazel: no Bazel here, and without `apt-get` none can be installed "
    "from a Debian archive; install bazelisk, which reads .bazelversion, and "
    "run it as `bazel`.\n"
  )
  assert not left


def test_an_installed_bazel_is_used_as_it_is(tmp_path):
  bazel = tmp_path / "cache" / "bazel" / "bin" / "bazel"
  bazel.parent.mkdir(parents=True)
  bazel.write_text("#!/bin/sh\n")
  bazel.chmod(0o755)
  done, _ = install(tmp_path)
  assert (done.returncode, done.stdout) == (0, f"{bazel}\n")
