#!/bin/bash
# Makes a Debian 12 machine able to run the demo, the tests and the bench. Idempotent; when nothing is missing it takes milliseconds.
#
# Needs: root, git, make, and a Rust toolchain (Debian's is too old; this script says so and installs none). Everything else comes from
# Debian's packages and, what Debian 12 is too old for, from the Go module proxy, through whatever mirrors this machine is set up to use.
# Results that are not packages live in $SOCI_LAB_CACHE (default ~/.cache/soci-lab):
#   bin/c2/{containerd,ctr,containerd-shim-runc-v2}   containerd 2.2
#   bin/static/…                                      the same, statically linked, if SOCI_LAB_STATIC is set
#   bin/registry3                                     distribution v3
#   bin/referrers                                     a registry with the referrers API
#   bin/rpull                                         a client that sends the labels of ctr-remote or nerdctl
#   bin/nfqdelay                                      delay for the shaped link
#   bin/bbolt                                         bbolt's own tool: checks the database that the soci tool writes
set -euo pipefail
LAB=$(dirname "$(readlink -f "$0")"); cd "$LAB"
CACHE=${SOCI_LAB_CACHE:-${HOME:-/root}/.cache/soci-lab}
BIN=$CACHE/bin
CONTAINERD=v2.2.1
DISTRIBUTION=v3.0.0
BBOLT=v1.4.3  # what containerd 2.2 uses
GO=1.25.5     # fetched only if the machine's own Go is older than GO_AT_LEAST
GO_AT_LEAST=24 # containerd 2.2 wants go 1.24

PACKAGES="ca-certificates systemd gcc libc6-dev libnetfilter-queue-dev pkg-config
    containerd runc docker-registry docker.io stargz-snapshotter skopeo umoci mmdebstrap
    fuse3 iproute2 iptables e2fsprogs btrfs-progs mount procps util-linux jq busybox-static python3 python3-pip xz-utils"
COMMANDS="gcc systemd-analyze containerd runc docker-registry dockerd docker ctr-remote skopeo umoci mmdebstrap
    fusermount3 ip tc iptables mkfs.ext4 mkfs.btrfs losetup nsenter jq python3"

say() { echo "setup: $*" >&2; }
die() { echo "setup: $*" >&2; exit 1; }
# Something to run that never asks.
quietly() { "$@" </dev/null >>"$CACHE/setup.log" 2>&1 || { tail -n 30 "$CACHE/setup.log" >&2; die "'$*' failed; all of it is in $CACHE/setup.log"; }; }

command -v cargo >/dev/null || PATH=$PATH:${HOME:-/root}/.cargo/bin
command -v cargo >/dev/null || die "no cargo. Install Rust 1.88 or newer with rustup (Debian 12's own rustc, 1.63, is too old), then run this again."

installed() {
    local command
    for command in $COMMANDS; do command -v "$command" >/dev/null || return 1; done
    [ -x /bin/busybox ] || return 1
}

stamp=$BIN/stamp
wanted=$(cat setup.sh nfqdelay.c {referrers,rpull}/{main.go,go.mod} | sha256sum | cut -c1-16)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && installed && { [ -z "${SOCI_LAB_STATIC:-}" ] || [ -x "$BIN/static/ctr" ]; } && exit 0

[ "$(id -u)" = 0 ] || die "something is missing and installing it needs root"
mkdir -p "$BIN"
exec 9>"$CACHE/setup.lock"; flock 9
: >"$CACHE/setup.log"

if ! installed || ! dpkg -s libnetfilter-queue-dev >/dev/null 2>&1; then
    say "installing Debian packages (containerd, runc, registry, …)"
    export DEBIAN_FRONTEND=noninteractive
    # Packages of daemons must not start them: the tests run their own, with their own roots.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get -q update </dev/null >>"$CACHE/setup.log" 2>&1 || say "apt-get update complained; going on with what is there"
    quietly apt-get -q install -y --no-install-recommends $PACKAGES
    installed || die "a command of '$COMMANDS' is still missing"
fi

# A Go that can build containerd 2.2. An old one fetches a new one as the module it is published as; that is how Go itself does it since 1.21.
go_command() {
    local go minor dir
    for go in "$(command -v go || true)" /usr/local/go/bin/go /usr/lib/go-1.*/bin/go; do
        [ -x "$go" ] || continue
        minor=$(GOTOOLCHAIN=local "$go" version | sed -n 's/.*go1\.\([0-9]*\).*/\1/p')
        [ "${minor:-0}" -ge "$GO_AT_LEAST" ] && { echo "$go"; return; }
    done
    if [ ! -x "${go:=$(command -v go || true)}" ]; then
        quietly apt-get -q install -y --no-install-recommends golang-go
        go=$(command -v go)
    fi
    say "fetching Go $GO"
    cd /
    dir=$("$go" mod download -json "golang.org/toolchain@v0.0.1-go$GO.linux-$(dpkg --print-architecture)" 2>>"$CACHE/setup.log" |
        tee -a "$CACHE/setup.log" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
    [ -n "$dir" ] || die "could not get Go $GO; see $CACHE/setup.log"
    chmod -R u+x "$dir/bin" "$dir/pkg/tool"
    echo "$dir/bin/go"
}

have() { local f; for f; do [ -x "$BIN/$f" ] || return 1; done; }
build_go() (
    export GOTOOLCHAIN=local GOFLAGS="-mod=mod -buildvcs=false" CGO_ENABLED=1
    go=$(go_command)
    if ! have c2/containerd c2/ctr c2/containerd-shim-runc-v2 || ! "$BIN/c2/containerd" --version | grep -q " $CONTAINERD "; then
        say "building containerd $CONTAINERD (a few minutes)"
        cd /
        GOBIN=$BIN/c2 quietly nice "$go" install -p 2 -tags no_btrfs,no_devmapper,no_zfs \
            -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$CONTAINERD" \
            github.com/containerd/containerd/v2/cmd/{containerd,ctr,containerd-shim-runc-v2}@$CONTAINERD
    fi
    # For guests whose glibc is older than this machine's (vm-tests asks for it).
    if [ -n "${SOCI_LAB_STATIC:-}" ] && ! have static/containerd static/ctr static/containerd-shim-runc-v2; then
        say "building containerd $CONTAINERD, statically linked (a few minutes)"
        cd /
        GOBIN=$BIN/static CGO_ENABLED=0 quietly nice "$go" install -p 2 -tags no_btrfs,no_devmapper,no_zfs \
            -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$CONTAINERD" \
            github.com/containerd/containerd/v2/cmd/{containerd,ctr,containerd-shim-runc-v2}@$CONTAINERD
    fi
    if ! have registry3; then
        say "building distribution $DISTRIBUTION (a minute)"
        cd /
        GOBIN=$BIN/tmp CGO_ENABLED=0 quietly nice "$go" install -p 2 -ldflags "-s -w" github.com/distribution/distribution/v3/cmd/registry@$DISTRIBUTION
        mv "$BIN/tmp/registry" "$BIN/registry3"; rmdir "$BIN/tmp"
    fi
    if ! have bbolt; then
        say "building bbolt $BBOLT"
        cd /
        GOBIN=$BIN CGO_ENABLED=0 quietly nice "$go" install -p 2 -ldflags "-s -w" go.etcd.io/bbolt/cmd/bbolt@$BBOLT
    fi
    for program in referrers rpull; do
        have $program && [ "$BIN/$program" -nt "$LAB/$program/main.go" ] && continue
        say "building $program"
        source=$(mktemp -d); cp "$LAB/$program"/* "$source"; cd "$source" # built elsewhere: go.sum is not ours to keep
        CGO_ENABLED=0 quietly nice "$go" build -p 2 -ldflags "-s -w" -o "$BIN/$program" .
        rm -rf "$source"
    done
)
build_go
quietly gcc -O2 -Wall -o "$BIN/nfqdelay" nfqdelay.c -lnetfilter_queue
echo "$wanted" >"$stamp"
say "done"
