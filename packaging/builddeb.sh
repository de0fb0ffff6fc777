#!/bin/bash
# Build the Debian packages in a clean Debian 13, from packaging/debian, and have lintian judge them.
#
#   builddeb.sh [--version V] [--no-check] OUTDIR
#
#   --version V   the packages call themselves V, as in 0.1.0~previous: what an upgrade is tested from
#   --no-check    without the quick tests and lintian
#   OUTDIR        has the packages of this build afterwards; those of an earlier one go
#
# Prints the paths of the packages, one a line; all else goes to stderr. The build root has what debian/control names as
# Build-Depends and no network. Each build is kept under the hash of all that it was made from, beside the roots of
# tests/host/testhost.sh, and is made once; what nobody asked for in a week goes. Needs what testhost.sh needs.
set -euo pipefail

version='' check=yes outdir=''
while [ $# -gt 0 ]; do
    case $1 in
        --version) version=$2; shift 2 ;;
        --no-check) check=no; shift ;;
        -*) echo "builddeb.sh: unknown option $1" >&2; exit 2 ;;
        *) outdir=$1; shift ;;
    esac
done
[ -n "$outdir" ] || { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
mkdir -p "$outdir"
outdir=$(realpath "$outdir")
cd "$(dirname "$(realpath "$0")")/.."

testhost() { tests/host/testhost.sh "$@"; }
# The names without versions and profiles: dpkg-buildpackage holds them to those.
build_depends() { sed -n '/^Build-Depends:/,/^[^ ]/s/^ \([a-z0-9.+-]*\).*/\1/p' packaging/debian/control; }
export TESTHOST_PACKAGES
TESTHOST_PACKAGES=build-essential,lintian,$(build_depends | paste -sd,)
base=$(testhost build)

# What git knows or would know. Nothing that is only tested with is in the packages.
files() {
    git -c safe.directory="$PWD" ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' file; do
            [ -e "$file" ] || [ -L "$file" ] || continue  # deleted, and git does not know yet
            [[ $check = no && $file = tests/* ]] || printf '%s\0' "$file"
        done
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Times and owners say nothing: a fresh clone of the same content is the same build.
released=$(sed -n 's/^ -- .*>  //p' packaging/debian/changelog | head -1)
files | sort --zero-terminated | tar --create --file "$work/tree.tar" --mtime="$released" --mode=u+rw,go=rX \
    --owner=0 --group=0 --numeric-owner --no-recursion --null --files-from -
key=$({ cat "$work/tree.tar"; printf '%s\n' "$base" "$version" "$check"; } | sha256sum | cut -c1-16)
kept=$(dirname "$base")/packages/$key
mkdir -p "$(dirname "$kept")"
find "$(dirname "$kept")" -mindepth 1 -maxdepth 1 -mtime +7 -exec rm -rf {} +

build() {
    testhost chroot --private-network --bind-ro="$work/tree.tar:/tree.tar" --bind="$kept.new:/out" -- \
        bash -euc '
            version=$1 check=$2
            useradd --create-home builder         # a package is not built as root
            mkdir -p /build/gpujobd
            cd /build/gpujobd
            tar --extract --file /tree.tar
            cp --archive packaging/debian debian  # where dpkg and debhelper look; what they leave there stays here
            [ -z "$version" ] || sed -i "1s/([^)]*)/($version)/" debian/changelog
            chown -R builder: /build
            [ $check = yes ] || export DEB_BUILD_OPTIONS=nocheck DEB_BUILD_PROFILES=nocheck
            runuser -u builder -- dpkg-buildpackage --build=binary --no-sign
            [ $check = no ] || runuser -u builder -- lintian --fail-on error,warning --info --display-info \
                --tag-display-limit 0 ../*.changes
            cp ../*.deb ../*.buildinfo ../*.changes /out' \
        builddeb "$version" "$check" >&2
}
exec 9> "$kept.lock"
flock 9  # whoever asks for the same waits for it
if [ ! -d "$kept" ]; then
    rm -rf "$kept.new"
    mkdir "$kept.new"
    build
    mv "$kept.new" "$kept"
fi
touch "$kept" "$kept.lock"

rm -f "$outdir"/{gpujobd,gpujobd-notify,jobctl}_*.deb
cp "$kept"/*.deb "$outdir"
ls "$outdir"/{gpujobd,gpujobd-notify,jobctl}_*.deb
