"""What the installers say where they cannot install."""

import os
import pathlib
import subprocess

import pytest

INSTALLER = pathlib.Path("tools/install_bazel_debian.sh").resolve()


def install(tmp_path, cwd=None, **env):
  prefix = tmp_path / "cache" / "bazel"
  done = subprocess.run(
    [INSTALLER, prefix],
    cwd=cwd,
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


def test_a_python_out_of_reach_is_said_in_one_sentence(tmp_path):
  done = subprocess.run(
    [INSTALLER.with_name("install_python_debian.sh"), tmp_path / "python"],
    env=os.environ | {"DEBIAN_MIRROR": (tmp_path / "nowhere").as_uri()},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (1, "")
  last = done.stderr.splitlines()[-1]
  assert last.startswith("install_python_debian.sh: no Python 3.14 here, and ")
  assert not list(tmp_path.glob("python*/"))


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


@pytest.mark.parametrize("name", ["bazel", "bazel.new"])
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_it_did_not_make_is_left_alone(tmp_path, name, kind):
  cache = tmp_path / "cache"
  cache.mkdir()
  mine = tmp_path / "mine" if kind == "link" else cache / name
  if kind == "file":
    mine.write_text("years of work")
  else:
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
  if kind == "link":
    (cache / name).symlink_to(mine)
  # A prefix that is a link is where that leads.
  refused = mine if name == "bazel" else cache / name
  done, _ = install(tmp_path, DEBIAN_MIRROR=(tmp_path / "nowhere").as_uri())
  assert done.returncode == 1
  assert done.stderr == (
    f"tools/bazel: no Bazel here, and `{refused}`, which this script did not "
    "make, is not an empty directory: name another PREFIX or remove it "
    "yourself; install bazelisk, which reads .bazelversion, and run it as "
    "`bazel`.\n"
  )
  assert (cache / name).is_symlink() == (kind == "link")
  text = mine if kind == "file" else mine / "thesis.tex"
  assert text.read_text() == "years of work"


def test_a_lock_file_keeps_what_is_in_it(tmp_path):
  lock = tmp_path / "cache" / "bazel.lock"
  lock.parent.mkdir()
  lock.write_text("mine")
  install(tmp_path, DEBIAN_MIRROR=(tmp_path / "nowhere").as_uri())
  assert lock.read_text() == "mine"


def test_an_empty_directory_and_what_it_left_itself_are_taken(tmp_path):
  prefix = tmp_path / "cache" / "bazel"
  prefix.mkdir(parents=True)
  work = tmp_path / "cache" / "bazel.new"
  work.mkdir()
  (work / ".install_bazel_debian").touch()
  (work / "half").write_text("of an installation")
  nowhere = (tmp_path / "nowhere").as_uri()
  done, left = install(tmp_path, DEBIAN_MIRROR=nowhere)
  assert "no Debian archive in reach" in done.stderr
  assert not left


# Stand-ins that write down what apt is told, and install nothing.
_APT_GET = """#!/bin/sh
case "$*" in
  *indextargets*) exit 0 ;;
esac
cat "$APT_CONFIG" "$(dirname "$APT_CONFIG")/sources.list" > "$TOLD"
exit 1
"""

_APT_CONFIG = """#!/bin/sh
case "$3" in
  Dir::Etc::sourcelist/f) echo "x='$SOURCES'" ;;
  Dir::Etc::sourceparts/d) echo "x='$SOURCES.d'" ;;
esac
[ "$1" = dump ] || exit 0
cat <<'END'
Acquire::http::Proxy "http://proxy:8080";
Acquire::http::Proxy::archive.example "DIRECT";
Acquire::https::CaInfo "/etc/ssl/own.pem";
acquire::https::archive.example::sslcert "/etc/ssl/me.pem";
Acquire::Retries "3";
Acquire::AllowInsecureRepositories "true";
Acquire::AllowWeakRepositories "1";
Acquire::AllowDowngradeToInsecureRepositories "yes";
Acquire::Check-Date "false";
Acquire::https::Verify-Peer "false";
Acquire::https::archive.example::Verify-Host "false";
Acquire::gpgv::Options:: "--ignore-time-conflict";
Acquire::By-Hash "no";
Acquire::IndexTargets::deb::Packages::MetaKey "elsewhere";
APT::Get::AllowUnauthenticated "true";
APT::Authentication::TrustCDROM "true";
APT::Update::Pre-Invoke:: "touch invoked";
END
"""


def _told_to_apt(tmp_path, cwd=None, **env):
  """Installs with stand-ins for apt; returns the lines that apt was told."""
  programs = tmp_path / "bin"
  programs.mkdir()
  for name, text in (("apt-get", _APT_GET), ("apt-config", _APT_CONFIG)):
    (programs / name).write_text(text)
    (programs / name).chmod(0o755)
  sources = tmp_path / "sources.list"
  sources.write_text(
    "deb [arch=amd64 trusted=yes] http://archive.example/debian stable main\n"
  )
  told = tmp_path / "told"
  done, _ = install(
    tmp_path,
    cwd,
    PATH=f"{programs}:{os.environ['PATH']}",
    SOURCES=str(sources),
    TOLD=str(told),
    **env,
  )
  assert "no Debian archive in reach" in done.stderr, done.stderr
  return told.read_text().splitlines()


def test_options_of_the_host_that_switch_checks_off_do_not_hold(tmp_path):
  told = _told_to_apt(tmp_path)
  for kept in (
    'Acquire::http::Proxy "http://proxy:8080";',
    'Acquire::http::Proxy::archive.example "DIRECT";',
    'Acquire::https::CaInfo "/etc/ssl/own.pem";',
    'acquire::https::archive.example::sslcert "/etc/ssl/me.pem";',
    'Acquire::Retries "3";',
  ):
    assert kept in told
  text = "\n".join(told).lower()
  for gone in (
    "insecure", "weak", "check-date", "verify", "gpgv", "by-hash",
    "unauthenticated", "trust", "invoke", "metakey",
  ):  # fmt: skip
    assert gone not in text, gone


def test_an_archive_that_the_host_trusts_must_still_be_signed(tmp_path):
  told = _told_to_apt(tmp_path)
  assert [line for line in told if line.startswith("deb")] == [
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    " http://archive.example/debian sid main"
  ]


def test_modules_of_the_callers_directory_are_not_run(tmp_path):
  here = tmp_path / "here"
  here.mkdir()
  for name in ("glob", "re", "subprocess", "base64", "zipfile"):
    (here / f"{name}.py").write_text(
      f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(0)\n"
    )
  _told_to_apt(tmp_path, here, PYTHONPATH=str(here))
  assert not (tmp_path / "ran").exists()


def test_every_python_that_it_starts_is_isolated():
  shared = INSTALLER.with_name("debian.sh").read_text()
  lines = [*INSTALLER.read_text().splitlines(), *shared.splitlines()]
  started = [line for line in lines if line.lstrip().startswith("python3")]
  assert len(started) == 2
  for line in started:
    assert "python3 -I - " in line
