#!/bin/sh
# Install the programs that gpujobd is compared with, where we are root; none of them is started as a service.
set -eu

missing=""
want() { # want PACKAGE COMMAND
    command -v "$2" > /dev/null || missing="$missing $1"
}

PATH=$PATH:/usr/sbin:/sbin
want beanstalkd beanstalkd
want redis-server redis-server
want strace strace
want e2fsprogs mkfs.ext4
want mount losetup
[ -n "$missing" ] || exit 0

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
fi
apt-get update -qq
# shellcheck disable=SC2086  # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $missing > /dev/null
