#!/bin/sh
# Install what the fault suite needs and this host lacks, by name: Debian packages if we are root, the Python
# binding of FUSE into the environment PYTHON belongs to. What cannot be had is said; its rows then skip.
#
#     needs.sh PYTHON
set -u

python=$1
export DEBIAN_FRONTEND=noninteractive

missing=""
want() { # want PACKAGE COMMAND: the package, unless the command is there
    command -v "$2" > /dev/null || missing="$missing $1"
}

PATH=$PATH:/usr/sbin:/sbin
want strace strace
want e2fsprogs mkfs.ext4
want xfsprogs mkfs.xfs
want btrfs-progs mkfs.btrfs
want mount losetup
want fuse3 fusermount3
want gcc gcc
want pkg-config pkg-config
pkg-config --exists fuse3 2> /dev/null || missing="$missing libfuse3-dev"

if [ -n "$missing" ]; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
        # shellcheck disable=SC2086  # a list of words
        apt-get install -qq --no-install-recommends $missing > /dev/null ||
            { apt-get update -qq && apt-get install -qq --no-install-recommends $missing > /dev/null; } ||
            echo "needs.sh: cannot be installed, rows that need it skip:$missing" >&2
    else
        echo "needs.sh: not root, rows that need these packages skip:$missing" >&2
    fi
fi

"$python" -c 'import pyfuse3' 2> /dev/null || "$python" -m pip install --quiet 'pyfuse3>=3.3' ||
    echo "needs.sh: pyfuse3 cannot be installed, rows that need it skip" >&2
exit 0
