#!/bin/bash
# Installs the Bazel 7 that Debian testing or sid packages into a private prefix
# on an older Debian, and prints the path of its launcher.  No root, no dpkg
# database, no newer libc for the host: build actions still use the host's gcc,
# python3 and bash.  For machines that reach a Debian archive and little else;
# anywhere else bazelisk does the same from .bazelversion.
#
#   usage: install_bazel_debian.sh [PREFIX]
#   default prefix: ${XDG_CACHE_HOME:-~/.cache}/fused_nnx/bazel; a directory that
#                   this script did not make must be empty
#   DEBIAN_MIRROR   the archive, if not the one in apt's own configuration
#   BAZEL_SUITES    the suites to look in, "forky sid" by default
set -euo pipefail

HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
PREFIX=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/fused_nnx/bazel}")
SUITES=${BAZEL_SUITES:-forky sid}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
# libblake3 is an undeclared need of Bazel's JNI library.
PACKAGES="bazel-bootstrap bazel-rules-shell libblake3-0"
JRE=openjdk-21-jre-headless
# A directory with this file in it was made here, and may be removed.
MARKER=.install_bazel_debian

if [ -x "$PREFIX/bin/bazel" ]; then
  echo "$PREFIX/bin/bazel"
  exit 0
fi

die() {
  echo "tools/bazel: $1; install bazelisk, which reads .bazelversion, and run it as \`bazel\`." >&2
  exit 1
}

for tool in apt-get apt-config dpkg-deb flock python3; do
  command -v "$tool" >/dev/null ||
    die "no Bazel here, and without \`$tool\` none can be installed from a Debian archive"
done
[ -r "$KEYRING" ] ||
  die "no Bazel here, and without Debian's keyring (\`$KEYRING\`) none can be installed from its archive"

# One installer at a time; whoever waited finds the other's work done.
mkdir -p "$(dirname "$PREFIX")"
exec 9>> "$PREFIX.lock"
flock 9
if [ -x "$PREFIX/bin/bazel" ]; then
  echo "$PREFIX/bin/bazel"
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
      die "no Bazel here, and \`$directory\`, which this script did not make, is not an empty directory: name another PREFIX or remove it yourself"
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
mkdir -p "$ROOT" "$APT/lists/partial" "$DEBS/partial" "$WORK/patchelf"
touch "$ROOT/$MARKER"

echo "Installing Bazel 7 into $PREFIX, once (about 170 MB to fetch)" >&2

# The archives that this machine's own apt uses, best guess first: what apt knows
# to be Debian's, then whatever its sources name.  (`indextargets` knows origins
# only after an `apt-get update`, and the lists may be empty.)
archives() {
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
REACH='Proxy|Proxy-?Auto-?Detect|CaInfo|CaPath|CrlFile|SslCert|SslKey|Timeout'
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
    grep -i -E "^Acquire::(Retries|ForceIPv[46]|(https?|ftp|socks5h?)(::[^ ]+)?::($REACH)(::[^ ]+)?) " || true
  echo 'Acquire::Languages "none";'
  echo 'Acquire::Check-Valid-Until "false";'
} > "$APT/apt.conf"
# What the host provides, or running Bazel does not need, is declared installed,
# so that apt resolves only what Bazel itself runs on.
for package in build-essential python3 unzip perl debconf zlib1g-dev \
    default-jdk-headless default-jre-headless libjs-jquery node-core-js \
    protobuf-compiler-grpc-java-plugin node-html5shiv openssl-provider-legacy; do
  printf '%s\n' "Package: $package" "Status: install ok installed" \
    "Version: 9999:9" "Architecture: all" "Multi-Arch: foreign" \
    "Maintainer: none <none@localhost>" "Description: provided by the host" ""
done > "$APT/status"

fetch() {  # fetch ARCHIVE SUITE: everything needed into $DEBS, or non-zero
  echo "deb [signed-by=$KEYRING] $1 $2 main" > "$APT/sources.list"
  apt-get -qq -o APT::Update::Error-Mode=any update || return 1
  local version
  version=$(apt-cache show --no-all-versions bazel-bootstrap | sed -n 's/^Version: //p')
  case $version in
    7.*) ;;
    *) echo "$1 $2 offers bazel-bootstrap '$version'"; return 1 ;;
  esac
  # shellcheck disable=SC2086  # a list of names
  apt-get -qq -y --download-only install $PACKAGES || return 1
  (cd "$DEBS" && apt-get -qq download "$JRE") || return 1
  (cd "$WORK/patchelf" && apt-get -qq download patchelf) || return 1
}
fetched=
tried=
for archive in $(archives); do
  for suite in $SUITES; do
    tried="$tried $archive ($suite)"
    if APT_CONFIG=$APT/apt.conf fetch "$archive" "$suite" >> "$LOG" 2>&1; then
      fetched=1
      break 2
    fi
    rm -f "$DEBS"/*.deb "$WORK"/patchelf/*.deb
  done
done
if [ -z "$fetched" ]; then
  [ -z "${NNX_VERBOSE:-}" ] || cat "$LOG" >&2
  die "no Bazel here, and no Debian archive in reach that offers Bazel 7 (tried:${tried:- none in apt\'s sources}; NNX_VERBOSE=1 shows why)"
fi

unpack() {
  for deb in "$DEBS"/*.deb; do dpkg-deb -x "$deb" "$ROOT"; done
  dpkg-deb -x "$WORK"/patchelf/*.deb "$WORK/patchelf"
}
unpack >> "$LOG" 2>&1 || die "no Bazel here, and the packages of one could not be unpacked into \`$WORK\` (is the disk full?)"

# From here on the paths of the prefix are written into the files, while they
# still lie in $ROOT.
cd "$ROOT"
loader=$(echo usr/lib/*-linux-gnu/ld-linux*.so.*)
lib=$(dirname "$loader")
arch=$(basename "$lib")
jvm=$(find usr/lib/jvm -mindepth 1 -maxdepth 1 -type d -name 'java-*-openjdk-*')
share=$PREFIX/usr/share/bazel
patchelf() {  # it is of the same suite, and so needs that one's libc as well
  "$ROOT/$loader" --library-path "$ROOT/$lib" "$WORK/patchelf/usr/bin/patchelf" "$@"
}
for file in usr/bin/bazel usr/libexec/"$arch"/bazel/* "$lib"/bazel/*.so \
    "$jvm"/bin/* "$jvm"/lib/jspawnhelper "$jvm"/lib/*.so "$jvm"/lib/server/*.so; do
  # Not every file here is a program or a library.
  old=$(patchelf --print-rpath "$file" 2>/dev/null) || continue
  patchelf --force-rpath --set-rpath "${old:+$old:}$PREFIX/$lib" "$file"
  if patchelf --print-interpreter "$file" >/dev/null 2>&1; then
    patchelf --set-interpreter "$PREFIX/$loader" "$file"
  fi
done
cacerts=$(readlink "$jvm/lib/security/cacerts")
find "$jvm" -type l -lname '/etc/*' | while read -r link; do
  ln -sfn "$PREFIX$(readlink "$link")" "$link"
done

python3 -I - "$ROOT" "$PREFIX" "$cacerts" <<'PY'
import base64, hashlib, os, re, struct, sys, zipfile

root, prefix, cacerts = sys.argv[1:]

# The client puts the jars of this file on the server's class path.  Their
# manifests name further ones by absolute path, so the list is closed over here.
listing = root + "/usr/share/bazel/bazel_classpath_debian_depends.txt"
todo, seen = open(listing).read().split(), []
for jar in todo:  # grows while it is walked
  if jar in seen or not os.path.exists(root + jar):
    continue
  seen.append(jar)
  with zipfile.ZipFile(root + jar) as archive:
    names = archive.namelist()
    manifest = archive.read("META-INF/MANIFEST.MF").decode() if "META-INF/MANIFEST.MF" in names else ""
  manifest = manifest.replace("\r", "").replace("\n ", "")
  path = re.search(r"^Class-Path: (.*)$", manifest, re.M)
  todo += ["/usr/share/java/" + os.path.basename(j) for j in path[1].split()] if path else []
with open(listing, "w") as out:
  out.write("".join(prefix + jar + "\n" for jar in seen))

# The host's certificates as a Java key store, for downloads by Bazel itself.
bundle = "/etc/ssl/certs/ca-certificates.crt"
pem = open(bundle).read() if os.path.exists(bundle) else ""
certificates = [
  base64.b64decode(text)
  for text in re.findall(r"-----BEGIN CERTIFICATE-----(.*?)-----END", pem, re.S)
]

def utf(text):
  return struct.pack(">H", len(text)) + text.encode()

store = struct.pack(">III", 0xFEEDFEED, 2, len(certificates))
for i, der in enumerate(certificates):
  store += struct.pack(">I", 2) + utf(f"ca{i}") + struct.pack(">Q", 0)
  store += utf("X.509") + struct.pack(">I", len(der)) + der
salt = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"  # the format's own
store += hashlib.sha1(salt + store).digest()
os.makedirs(os.path.dirname(root + cacerts), exist_ok=True)
with open(root + cacerts, "wb") as out:
  out.write(store)
PY

# The rule sets that come with it stand in for those that a WORKSPACE file, or
# Bazel's own suffix to it, would download.
mkdir -p etc/bazel bin
for pair in rules_cc=rules/cc rules_java=rules/java rules_proto=rules/proto \
    rules_python=rules/python rules_license=rules/license rules_shell=rules/shell \
    platforms=tools/platforms bazel_skylib=tools/skylib bazel_features=tools/features; do
  if [ -d "usr/share/bazel/${pair#*=}" ]; then
    echo "common --override_repository=${pair%%=*}=$share/${pair#*=}"
  fi
done > etc/bazel/repositories.bazelrc
cat > bin/bazel <<EOF
#!/bin/bash
exec "$PREFIX/usr/bin/bazel" --nosystem_rc \\
  --bazelrc="$PREFIX/etc/bazel/repositories.bazelrc" \\
  --install_base="$share" --trust_install_base \\
  --server_javabase="$PREFIX/$jvm" "\$@"
EOF
chmod +x bin/bazel

cd "$(dirname "$PREFIX")"
mv -T "$ROOT" "$PREFIX"
if ! "$PREFIX/bin/bazel" --version >&2; then
  rm -rf "$PREFIX"
  die "no Bazel here, and the one that $archive ($suite) offers does not start on this machine"
fi
echo "$PREFIX/bin/bazel"
