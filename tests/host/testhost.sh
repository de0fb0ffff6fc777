#!/bin/bash
# A test host: Debian 13 with its real systemd, booted in a throw-away copy of a cached root, isolated from the machine.
#
# Needs root, util-linux and overlayfs; mmdebstrap and systemd-container are fetched by apt where they are missing. The
# machine itself need not run systemd, and its cgroups may still be v1: a test host sees cgroup v2 and nothing else.
#
#   testhost.sh build                     make the cached base root, or find it; prints its path
#   testhost.sh boot [--keep] [NSPAWN-ARG..]  boot a copy-on-write copy of the base.
#                                         --keep: go on with the copy of the last boot, as after a reboot
#                                         NSPAWN-ARG: as in --bind-ro=/my/tree:/src
#   testhost.sh run CMD [ARG..]           run CMD as root in the booted host; its exit status is ours
#   testhost.sh root                      print where the / of the booted host is, seen from here
#   testhost.sh stop                      shut down cleanly, or by force after 30 s; no process, mount or cgroup is left
#   testhost.sh status | log              is it up? | what its console printed
#   testhost.sh chroot [NSPAWN-ARG.. --] CMD  run CMD in a throw-away copy of the base, without systemd but with the
#                                         machine's network: what needs Debian's versions of things
#
# A booted host has no network: what apt is to install there is in the base, or is a file.
#
# TESTHOST_DIR       where base and copies are kept: ~/.cache/testhost. Not on an overlay or nfs: the kernel refuses
# TESTHOST_NAME      a name for each host that runs at the same time: testhost
# TESTHOST_SUITE     Debian's suite: trixie
# TESTHOST_PACKAGES  packages of the base, comma-separated, beside systemd and dbus: what gpujobd depends on
# TESTHOST_MORE      packages beside those
# TESTHOST_TTL       seconds after which a forgotten host is killed: 3600
set -euo pipefail

SUITE=${TESTHOST_SUITE:-trixie}
export TESTHOST_NAME=${TESTHOST_NAME:-testhost}
DIR=${TESTHOST_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/testhost}
# libbpf1: without it DeviceAllow= and IPAddressDeny= are accepted and do nothing. libnss-systemd: names of DynamicUser=.
PACKAGES=systemd,systemd-sysv,dbus,libnss-systemd,libbpf1,procps,${TESTHOST_PACKAGES:-\
python3,python3-trio,python3-outcome,python3-msgspec,python3-psutil,python3-sdnotify,python3-click,python3-httpx}${TESTHOST_MORE:+,$TESTHOST_MORE}
KEY=$(printf '%s\n' "$SUITE" "$PACKAGES" 3 | sha256sum | cut -c1-12)  # a higher number makes every base anew
BASE=$DIR/base-$SUITE-$KEY                # never booted or written to once it is built
SELF=$(realpath "$0")

say() { echo "testhost: $*" >&2; }
die() { say "$*"; exit 1; }
host() { NAME=$1; WORK=$DIR/host-$1; }   # WORK: overlay (upper, work, root), pids, console.log
host "$TESTHOST_NAME"

# A pid is ours only while its start time is the noted one; a zombie is gone, since a PID 1 that is no real init may
# reap it seconds later.
started() { sed -n 's/.*) //; /^Z/!p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20 || true; }
note() { echo "$2 $(started "$2")" > "$WORK/$1"; }
alive() {  # alive FILE: print the pid noted there, or fail
    local pid start
    read -r pid start 2>/dev/null < "$WORK/$1" || return 1
    [ -n "$start" ] && [ "$(started "$pid")" = "$start" ] && echo "$pid"
}
child() { local c=''; read -r c _ 2>/dev/null < "/proc/$1/task/$1/children" || true; echo "$c"; }
leader() {  # the booted systemd
    local n; n=$(alive nspawn) && n=$(child "$n") && [ -n "$n" ] && echo "$n"
}

need() {  # need COMMAND PACKAGE
    command -v "$1" >/dev/null && return
    say "installing $2"
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -y install --no-install-recommends "$2" >/dev/null
}

build() {
    [ "$(id -u)" = 0 ] || die "must be root"
    need mmdebstrap mmdebstrap; need systemd-nspawn systemd-container
    mkdir -p "$DIR"
    exec 9> "$DIR/lock"; flock 9              # one build at a time
    if [ ! -d "$BASE" ]; then
        rm -rf --one-file-system "$BASE.tmp"
        # no mirror named: mmdebstrap takes Debian's, with -updates and -security
        mmdebstrap --quiet --mode=root --variant=minbase --include="$PACKAGES" \
            --customize-hook='echo testhost > "$1/etc/hostname"' \
            --customize-hook='echo 127.0.0.1 localhost testhost > "$1/etc/hosts"' \
            "$SUITE" "$BASE.tmp" >&2
        mv "$BASE.tmp" "$BASE"
        say "built $BASE"
    fi
    exec 9>&-
}

# The stages of a start. Each runs in the namespaces that the one before made, so that the overlay, the cgroup2 mount and
# all processes vanish with the first of them.
stage1() {  # a mount namespace of its own: the overlay, and a branch of the cgroup v2 tree
    # volatile: unmounting does not sync the disk, which takes seconds on a busy one
    mount -t overlay overlay "$WORK/root" \
        -o "lowerdir=$BASE,upperdir=$WORK/upper,workdir=$WORK/work,volatile"
    mount -t cgroup2 cgroup2 "$WORK/cg"       # works beside v1, with the controllers that v1 has left
    local c; for c in $(cat "$WORK/cg/cgroup.controllers"); do
        echo "+$c" 2>/dev/null > "$WORK/cg/cgroup.subtree_control" || true
    done
    mkdir -p "$WORK/cg/testhost-$NAME"
    echo $$ > "$WORK/cg/testhost-$NAME/cgroup.procs"
    exec timeout --foreground -s KILL "${TESTHOST_TTL:-3600}" \
        unshare --cgroup --pid --fork --kill-child --mount-proc "$SELF" _stage2 "$@"
}
stage2() {  # a cgroup namespace of its own: that branch is all of /sys/fs/cgroup, and v2
    umount -R /sys/fs/cgroup 2>/dev/null || true
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mount -t tmpfs tmpfs /run                 # the state of nspawn goes with us
    # register=no, keep-unit: there may be no systemd and no machined out here to ask for a scope.
    # CAP_BPF and bpf(): the device and IP filters of systemd are BPF programs.
    exec systemd-nspawn --quiet --directory="$WORK/root" --machine="$NAME" \
        --register=no --keep-unit --link-journal=no --timezone=off \
        --capability=CAP_BPF --system-call-filter=bpf "$@"
}
fresh() {  # fresh [--keep]: the directories of the overlay
    drop_cgroup
    rm -rf --one-file-system "$WORK/work"     # the work folder of a volatile overlay is used once
    [ "${1:-}" = --keep ] || rm -rf --one-file-system "$WORK/upper"
    mkdir -p "$WORK"/{upper,work,root,cg}
}
drop_cgroup() {  # the empty branch outlives its processes; take it away
    mkdir -p "$WORK/cg"
    unshare --mount --propagation private sh -c 'mount -t cgroup2 cgroup2 "$1" &&
        if [ -d "$1/$2" ]; then find "$1/$2" -depth -type d -exec rmdir {} +; fi' \
        sh "$WORK/cg" "testhost-$NAME"
}

boot() {
    local keep='' pid nspawn lead i
    if [ "${1:-}" = --keep ]; then keep=--keep; shift; fi
    alive pid >/dev/null && die "already booted (testhost.sh stop)"
    build; fresh $keep
    setsid unshare --mount --propagation private "$SELF" _stage1 --boot --private-network \
        --resolv-conf=off "$@" > "$WORK/console.log" 2>&1 < /dev/null &
    pid=$!; note pid $pid
    for ((i = 0; i < 600; i++)); do           # 30 s for systemd to come up
        kill -0 $pid 2>/dev/null || break
        # $pid became timeout, which runs unshare, which runs nspawn, which runs systemd
        nspawn=$(child "$(child $pid)"); lead=${nspawn:+$(child "$nspawn")}
        if [ -n "$lead" ] && [ "$(cat "/proc/$lead/comm" 2>/dev/null)" = systemd ] &&
           [ -S "/proc/$lead/root/run/dbus/system_bus_socket" ]; then
            note nspawn "$nspawn"
            # waits for the end of the start-up; whether "degraded" is bad is for the caller to say
            case $(run timeout 60 systemctl is-system-running --wait 2>/dev/null || true) in
                running) say "booted: running"; return ;;
                degraded) say "booted: degraded"; (run systemctl --failed --no-legend) >&2; return ;;
            esac
        fi
        sleep 0.05
    done
    cat "$WORK/console.log" >&2; stop; die "boot failed"
}

run() {  # this process becomes CMD: called last, or in a subshell
    local lead cg
    lead=$(leader) || die "not booted (testhost.sh boot)"
    # a cgroup of the host: otherwise the process would be in none that its systemd can see
    cg=/proc/$(alive nspawn)/root/sys/fs/cgroup/payload/testhost-run
    mkdir -p "$cg" && echo $BASHPID > "$cg/cgroup.procs"
    exec nsenter --target "$lead" --all --root --wd env -i HOME=/root LANG=C.UTF-8 TERM=dumb \
        SYSTEMD_PAGER= DEBIAN_FRONTEND=noninteractive \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

stop() {
    local pid nspawn i
    if pid=$(alive pid); then
        if nspawn=$(alive nspawn); then
            kill -TERM "$nspawn"              # nspawn then halts the systemd inside
            for ((i = 0; i < 600; i++)); do alive pid >/dev/null || break; sleep 0.05; done
            if alive pid >/dev/null; then say "no clean shutdown in 30 s; killing it"; fi
        fi
        kill -KILL $(child "$pid") "$pid" 2>/dev/null || true  # --kill-child takes the rest along
        while alive pid >/dev/null; do sleep 0.05; done
    fi
    if [ -d "$WORK" ]; then
        rm -f "$WORK"/{pid,nspawn}
        for i in 1 2 3 4 5; do drop_cgroup 2>/dev/null && return; sleep 0.1; done; drop_cgroup
    fi
}

in_chroot() {
    local args=()
    if [[ " $* " == *" -- "* ]]; then while [ "$1" != -- ]; do args+=("$1"); shift; done; shift; fi
    TESTHOST_NAME=$NAME-chroot-$$; host "$TESTHOST_NAME"
    build; fresh
    export SYSTEMD_NSPAWN_TMPFS_TMP=0         # else /tmp is a tenth of the memory: too small for a test suite
    trap 'drop_cgroup; rm -rf --one-file-system "$WORK"' EXIT
    unshare --mount --propagation private "$SELF" _stage1 --as-pid2 --console=autopipe \
        --resolv-conf=copy-host "${args[@]}" -- "$@"
}

case ${1:-} in
    build) build; echo "$BASE" ;;
    boot) shift; boot "$@" ;;
    run) shift; run "$@" ;;
    stop) stop ;;
    root) echo "/proc/$(leader || die "not booted")/root" ;;
    status) if leader >/dev/null; then run systemctl is-system-running; else echo stopped; exit 3; fi ;;
    log) cat "$WORK/console.log" ;;
    chroot) shift; in_chroot "$@" ;;
    _stage1) shift; stage1 "$@" ;;
    _stage2) shift; stage2 "$@" ;;
    *) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
