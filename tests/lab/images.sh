#!/bin/bash
# Builds real container images from Debian and PyPI packages, for the demo and the bench: one OCI layout per image.
#
#   images.sh NAME…      numpy redis nginx node postgres rabbitmq ffmpeg tensorflow torch gigabyte
#
# The layouts go to $SOCI_LAB_CACHE/images/NAME (tag "latest") and are kept: an image that is already there is not built again.
# Nobody's registry is asked: the base comes from mmdebstrap, every further layer is what a package manager changed, as umoci sees
# it. Such layers carry no entries for the parent directories that did not change, like those of BuildKit: worth testing with.
set -euo pipefail
CACHE=${SOCI_LAB_CACHE:-${HOME:-/root}/.cache/soci-lab}
IMAGES=$CACHE/images
SUITE=bookworm
PYTHON=3.11 # what SUITE carries
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
umask 022

die() { echo "images.sh: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die "building images needs root (chroot, device nodes)"
mkdir -p "$IMAGES"
# One build at a time, whoever asks: two would only share the two cores, and the second finds the first one's result.
exec 9>"$CACHE/images.lock"; flock 9

WORK=
finish() {
    [ -n "$WORK" ] || return 0
    umount -l "$WORK/bundle/rootfs/proc" 2>/dev/null || true
    rm -rf "$WORK"
}
trap finish EXIT

base_tar() {
    local tar=$CACHE/rootfs-$SUITE.tar
    [ -s "$tar" ] && return 0
    # The host's own settings for reaching a Debian mirror (proxies, time-outs) are the ones that work here.
    apt-config dump | grep -E '^Acquire::(http|https|Check|Retries)' >"$CACHE/apt.conf" || true
    mmdebstrap --quiet --variant=minbase --mode=root --format=tar --aptopt="$CACHE/apt.conf" "$SUITE" "$tar.part"
    mv "$tar.part" "$tar"
}

# begin NAME: a bundle to change, holding the base layer
begin() {
    base_tar
    WORK=$(mktemp -d "$CACHE/build.XXXXXX")
    LAYOUT=$WORK/layout BUNDLE=$WORK/bundle ROOT=$WORK/bundle/rootfs
    umoci init --layout "$LAYOUT"
    umoci new --image "$LAYOUT:step"
    umoci raw add-layer --image "$LAYOUT:step" "$CACHE/rootfs-$SUITE.tar"
    umoci config --image "$LAYOUT:step" --architecture amd64 --os linux --config.cmd /bin/bash \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    umoci unpack --image "$LAYOUT:step" "$BUNDLE"
}

# layer: what changed since the last one becomes a layer
layer() { umoci repack --refresh-bundle --image "$LAYOUT:step" "$BUNDLE"; }

debian() {
    printf '#!/bin/sh\nexit 101\n' >"$ROOT/usr/sbin/policy-rc.d"; chmod 755 "$ROOT/usr/sbin/policy-rc.d"
    cp "$CACHE/apt.conf" "$ROOT/etc/apt/apt.conf.d/00lab"
    cp /etc/resolv.conf /etc/hosts "$ROOT/etc/"
    mount -t proc proc "$ROOT/proc"
    chroot "$ROOT" sh -c "apt-get -q update && apt-get -q install -y --no-install-recommends $*"
    umount "$ROOT/proc"
    rm -rf "$ROOT"/var/lib/apt/lists/* "$ROOT"/var/cache/apt/* "$ROOT/var/log/apt" "$ROOT/var/log/dpkg.log" \
        "$ROOT/var/cache/ldconfig/aux-cache" "$ROOT/etc/apt/apt.conf.d/00lab" "$ROOT/usr/sbin/policy-rc.d"
    layer
}

pypi() {
    python3 -m pip install -q --no-cache-dir --only-binary=:all: --python-version "$PYTHON" \
        --target "$ROOT/usr/local/lib/python$PYTHON/dist-packages" "$@"
    layer
}

# file PATH: standard input becomes a file of its own small last layer, as an application on top of its runtime is
file() { mkdir -p "$ROOT/$(dirname "$1")"; cat >"$ROOT/$1"; layer; }

# gigabyte: one layer of more than 10^9 compressed bytes, of what tensorflow consists of, three times
gigabyte() {
    [ -f "$IMAGES/tensorflow/index.json" ] || (flock -u 9; SOCI_LAB_CACHE=$CACHE "$0" tensorflow)
    umoci unpack --image "$IMAGES/tensorflow:latest" "$WORK/tensorflow"
    mkdir "$ROOT/opt/"{1,2,3}
    for copy in 1 2 3; do
        cp -a "$WORK/tensorflow/rootfs/usr/local/lib/python$PYTHON/dist-packages" "$ROOT/opt/$copy/"
    done
    rm -rf "$WORK/tensorflow"
    layer
}

# end NAME: only a finished image gets the name
end() {
    umoci tag --image "$LAYOUT:step" latest
    umoci rm --image "$LAYOUT:step"
    umoci gc --layout "$LAYOUT"
    rm -rf "$IMAGES/$1"
    mv "$LAYOUT" "$IMAGES/$1"
    rm -rf "$WORK"; WORK=
    echo "$1: $(du -sm "$IMAGES/$1" | cut -f1) MB in $IMAGES/$1" >&2
}

build() {
    case $1 in
    nginx) begin; debian nginx-light ;;
    redis) begin; debian redis-server ;;
    rabbitmq) begin; debian erlang-base; debian rabbitmq-server ;;
    ffmpeg) begin; debian ffmpeg ;;
    node) begin; debian nodejs npm ;;
    postgres) begin; debian postgresql ;;
    numpy) begin; debian python3; debian python3-numpy ;;
    tensorflow) begin; debian python3; pypi tensorflow-cpu ;;
    torch) begin; debian python3; pypi numpy; pypi torch ;;
    gigabyte) begin; gigabyte ;;
    *) die "no recipe for '$1'" ;;
    esac
    file app/main.js <<'JS'
require("http").createServer((q, r) => r.end("x")).listen(8080, () => console.log("READY"))
JS
    end "$1"
}

for name; do
    [ -f "$IMAGES/$name/index.json" ] || build "$name" >&2
done
