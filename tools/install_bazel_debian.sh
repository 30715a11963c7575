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
# libblake3 is an undeclared need of Bazel's JNI library.
PACKAGES="bazel-bootstrap bazel-rules-shell libblake3-0"
JRE=openjdk-21-jre-headless
# What the host provides, or running Bazel does not need, is declared installed, so
# that apt resolves only what Bazel itself runs on.
PROVIDED="build-essential python3 unzip perl debconf zlib1g-dev default-jdk-headless
  default-jre-headless libjs-jquery node-core-js protobuf-compiler-grpc-java-plugin
  node-html5shiv openssl-provider-legacy"
WANTED="Bazel 7"
MARKER=.install_bazel_debian

die() {
  echo "tools/bazel: no Bazel here, and $1; install bazelisk, which reads .bazelversion, and run it as \`bazel\`." >&2
  exit 1
}
# shellcheck source=tools/debian.sh
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"
debian_begin bin/bazel
echo "Installing Bazel 7 into $PREFIX, once (about 170 MB to fetch)" >&2

fetch() {
  local version
  rm -f "$WORK"/patchelf/*.deb
  version=$(apt-cache show --no-all-versions bazel-bootstrap | sed -n 's/^Version: //p')
  case $version in
    7.*) ;;
    *) echo "$archive $suite offers bazel-bootstrap '$version'"; return 1 ;;
  esac
  # shellcheck disable=SC2086  # a list of names
  apt-get -qq -y --download-only install $PACKAGES || return 1
  (cd "$DEBS" && apt-get -qq download "$JRE") || return 1
  (cd "$WORK/patchelf" && apt-get -qq download patchelf) || return 1
}
mkdir "$WORK/patchelf"
debian_fetch fetch
debian_unpack
dpkg-deb -x "$WORK"/patchelf/*.deb "$WORK/patchelf"

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
  die "the one that $archive ($suite) offers does not start on this machine"
fi
echo "$PREFIX/bin/bazel"
