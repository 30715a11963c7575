# For the installers beside this file, which source it: packages of a newer Debian
# in a private prefix.  No root, no dpkg database, no newer libc for the host.
#
# The caller sets WANTED (what it installs, in a word or two), PREFIX, SUITES (to look
# in, best first), MARKER (a directory with this file in it was made by that caller, and
# may be removed) and PROVIDED (packages that apt is to take for installed), and
# defines `die`, which ends it with a reason.
#   DEBIAN_MIRROR   the archive, if not the one in apt's own configuration
# shellcheck shell=bash
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# debian_begin PROGRAM: ends the caller where PREFIX has that program already, whose
# path it prints; otherwise makes WORK, which goes when the caller ends, with ROOT
# (to be filled, and moved to PREFIX), APT, DEBS and LOG in it.
debian_begin() {
  if [ -x "$PREFIX/$1" ]; then
    echo "$PREFIX/$1"
    exit 0
  fi
  local tool directory
  for tool in apt-get apt-config dpkg-deb flock python3; do
    command -v "$tool" >/dev/null ||
      die "without \`$tool\` none can be installed from a Debian archive"
  done
  [ -r "$KEYRING" ] ||
    die "without Debian's keyring (\`$KEYRING\`) none can be installed from its archive"

  # One installer at a time; whoever waited finds the other's work done.
  mkdir -p "$(dirname "$PREFIX")"
  exec 9>> "$PREFIX.lock"
  flock 9
  if [ -x "$PREFIX/$1" ]; then
    echo "$PREFIX/$1"
    exit 0
  fi

  # Everything is made here and renamed at the end.  What a killed installer left
  # is removed under the lock, so that it can only be dead; nothing else is.
  WORK=$PREFIX.new
  for directory in "$PREFIX" "$WORK"; do
    if [ ! -L "$directory" ] && [ -f "$directory/$MARKER" ]; then
      rm -rf "$directory"
    elif [ -e "$directory" ] || [ -L "$directory" ]; then
      rmdir "$directory" 2>/dev/null ||
        die "\`$directory\`, which this script did not make, is not an empty directory: name another PREFIX or remove it yourself"
    fi
  done
  mkdir "$WORK"
  touch "$WORK/$MARKER"
  trap 'rm -rf "$WORK"' EXIT
  trap 'exit 130' INT TERM HUP
  ROOT=$WORK/root
  APT=$WORK/apt
  DEBS=$APT/cache/archives
  LOG=$WORK/log
  mkdir -p "$ROOT" "$APT/lists/partial" "$DEBS/partial"
  touch "$ROOT/$MARKER"
  debian_configure
}

# The archives that this machine's own apt uses, best guess first: what apt knows
# to be Debian's, then whatever its sources name.  (`indextargets` knows origins
# only after an `apt-get update`, and the lists may be empty.)
debian_archives() {
  if [ -n "${DEBIAN_MIRROR:-}" ]; then
    echo "$DEBIAN_MIRROR"
    return
  fi
  {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null || true
    python3 -I - <<'PY'
import glob, os, re, subprocess

def setting(name, default):
  out = subprocess.run(["apt-config", "shell", "x", name], capture_output=True, text=True).stdout
  match = re.match(r"x='(.*)'", out)
  return match[1] if match else default

listed = [setting("Dir::Etc::sourcelist/f", "/etc/apt/sources.list")]
parts = setting("Dir::Etc::sourceparts/d", "/etc/apt/sources.list.d")
listed += sorted(glob.glob(os.path.join(parts, "*")))
for name in listed:
  try:
    text = open(name, encoding="utf-8", errors="replace").read()
  except OSError:
    continue
  text = re.sub(r"(?m)^\s*#.*\n?", "", text)
  if name.endswith(".sources"):
    for stanza in re.split(r"\n\s*\n", re.sub(r"\n[ \t]+", " ", text)):
      fields = {k.lower(): v.split() for k, v in re.findall(r"(?m)^([\w-]+):[ \t]*(.*)$", stanza)}
      if "deb" in fields.get("types", ()) and "main" in fields.get("components", ()) \
          and fields.get("enabled", ["yes"])[0].lower() not in ("no", "false", "0"):
        print("\n".join(fields.get("uris", ())))
  else:
    for uri in re.findall(r"(?m)^\s*deb\s+(?:\[[^\]]*\]\s*)?(\S+)\s+\S+\s.*\bmain\b", text):
      print(uri)
PY
  } | sed 's:/*$::' | grep -v -e security -e '^cdrom:' | awk 'NF && !seen[$0]++'
}

# A configuration of apt's own that touches nothing of the host's.  Of the host's
# options those hold that say how to reach an archive, by name: others switch the
# checks of signatures and certificates off.
debian_configure() {
  local package
  local reach='Proxy|Proxy-?Auto-?Detect|CaInfo|CaPath|CrlFile|SslCert|SslKey|Timeout'
  {
    cat <<EOF
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "$APT/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$APT";
Dir::State::lists "$APT/lists";
Dir::State::status "$APT/status";
Dir::Cache "$APT/cache";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Debug::NoLocking "true";
EOF
    apt-config dump |
      grep -i -E "^Acquire::(Retries|ForceIPv[46]|(https?|ftp|socks5h?)(::[^ ]+)?::($reach)(::[^ ]+)?) " || true
    echo 'Acquire::Languages "none";'
    echo 'Acquire::Check-Valid-Until "false";'
  } > "$APT/apt.conf"
  for package in $PROVIDED; do
    printf '%s\n' "Package: $package" "Status: install ok installed" \
      "Version: 9999:9" "Architecture: all" "Multi-Arch: foreign" \
      "Maintainer: none <none@localhost>" "Description: provided by the host" ""
  done > "$APT/status"
}

# debian_fetch FETCH: brings apt the lists of one archive and suite after the other, till
# FETCH has put everything into $DEBS.  Leaves their names in `archive` and `suite`.
debian_fetch() {
  local tried=
  for archive in $(debian_archives); do
    for suite in $SUITES; do
      tried="$tried $archive ($suite)"
      if APT_CONFIG=$APT/apt.conf debian_try "$1" >> "$LOG" 2>&1; then
        return
      fi
      rm -f "$DEBS"/*.deb
    done
  done
  [ -z "${NNX_VERBOSE:-}" ] || cat "$LOG" >&2
  die "no Debian archive in reach that offers $WANTED (tried:${tried:- none in apt\'s sources}; NNX_VERBOSE=1 shows why)"
}

debian_try() {
  echo "deb [signed-by=$KEYRING] $archive $suite main" > "$APT/sources.list"
  apt-get -qq -o APT::Update::Error-Mode=any update && "$1"
}

debian_unpack() {
  local deb
  for deb in "$DEBS"/*.deb; do
    dpkg-deb -x "$deb" "$ROOT" >> "$LOG" 2>&1 ||
      die "the packages of one could not be unpacked into \`$WORK\` (is the disk full?)"
  done
}
