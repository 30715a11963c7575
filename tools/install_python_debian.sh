#!/bin/bash
# Installs the Python 3.14 of Debian testing or sid, with its C headers, into a private
# prefix on an older Debian, and prints its path.  It runs on that suite's libc, and
# host's compilers build for it.  For tests of the newest Python where no other way to
# one is reached; see wheel/check.sh.
#
#   usage: install_python_debian.sh [PREFIX]
#   default prefix: ${XDG_CACHE_HOME:-~/.cache}/fused_nnx/python3.14
#   DEBIAN_MIRROR   the archive, if not the one in apt's own configuration
set -euo pipefail

HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
PYTHON=python3.14
PREFIX=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/fused_nnx/$PYTHON}")
SUITES="forky sid"
PROVIDED="ca-certificates debconf media-types netbase openssl-provider-legacy perl tzdata"
WANTED="Python 3.14"
MARKER=.install_python_debian

die() {
  echo "install_python_debian.sh: no $WANTED here, and $1." >&2
  exit 1
}
# shellcheck source=tools/debian.sh
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"
debian_begin usr/bin/$PYTHON
echo "Installing $WANTED into $PREFIX, once (about 20 MB to fetch)" >&2

fetch() {
  apt-get -qq -y --download-only install $PYTHON libstdc++6 || return 1
  (cd "$DEBS" && apt-get -qq download lib$PYTHON-dev) || return 1
}
debian_fetch fetch
debian_unpack

cd "$ROOT"
loader=$(echo usr/lib/*-linux-gnu/ld-linux*.so.*)
lib=$(dirname "$loader")
# Debian has this one for each architecture, where compilers of its own look.
ln -s "../$(basename "$lib")" "usr/include/$PYTHON/"
# A Python finds its library by where it was called, be that a link of a virtual
# environment, and calls itself so again.
mv usr/bin/$PYTHON usr/lib/$PYTHON/program
cat > usr/bin/$PYTHON <<EOF
#!/bin/bash
exec "$PREFIX/$loader" --library-path "$PREFIX/$lib" \\
  --argv0 "\$0" "$PREFIX/usr/lib/$PYTHON/program" "\$@"
EOF
chmod +x usr/bin/$PYTHON

cd "$(dirname "$PREFIX")"
mv -T "$ROOT" "$PREFIX"
if ! "$PREFIX/usr/bin/$PYTHON" --version >&2; then
  rm -rf "$PREFIX"
  die "the one that $archive ($suite) offers does not start on this machine"
fi
echo "$PREFIX/usr/bin/$PYTHON"
