#!/bin/bash
# Packages of the working tree, made on any Debian 12 machine for Amazon Linux 2 and 2023.
#
#   build.sh tools            what the rest needs that this machine lacks (root; packages, zig, Rust's library for aarch64)
#   build.sh srpm             target/rpm/SRPMS: complete sources, for "rpmbuild --rebuild" without a network
#   build.sh rebuild          proves that, for this machine's architecture and glibc: rebuilds the source package without a network
#   build.sh rpm              target/rpm/RPMS: both distributions, both architectures; checked by rpmlint
#   build.sh dist             target/dist: a tar per architecture and SHA256SUMS, for those without rpm
#
# ARCHES and DISTS choose a part ("x86_64 aarch64", "amzn2 amzn2023"), RELEASE is the package's release (1). Programs are compiled once per
# architecture, for glibc 2.26; what cargo keeps between builds is in target/package (or $CARGO_TARGET_DIR/package). While working on packages,
# BUILT=DIRECTORY GLIBC=VERSION packages programs that are there already.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
SOURCE=$PWD
CACHE=${SOCI_LAB_CACHE:-${HOME:-/root}/.cache/soci-lab}
WORK=${CARGO_TARGET_DIR:-$SOURCE/target}
TOP=$WORK/rpm
ARCHES=${ARCHES:-x86_64 aarch64}
DISTS=${DISTS:-amzn2 amzn2023}
RELEASE=${RELEASE:-1}
GLIBC=${GLIBC:-2.26} # of Amazon Linux 2
NAME=soci-snapshotter
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
export PATH=$CACHE/zig/bin:$PATH:${HOME:-/root}/.cargo/bin LC_ALL=C.UTF-8

say() { echo "build.sh: $*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null; }

tools() {
    local packages="rpm createrepo-c rpmlint checkpolicy semodule-utils qemu-user-static cpio python3-venv mmdebstrap binutils"
    if ! { have rpmbuild && have createrepo_c && have rpmlint && have checkmodule && have semodule_package && have qemu-aarch64-static && have cpio; }; then
        say "installing $packages"
        apt-get -q update >/dev/null </dev/null || say "apt-get update complained; going on with what is there"
        DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $packages >/dev/null </dev/null
    fi
    if ! have cargo-zigbuild || ! { have zig || python3 -m ziglang version >/dev/null 2>&1; }; then
        say "installing zig and cargo-zigbuild"
        python3 -m venv "$CACHE/zig"
        "$CACHE/zig/bin/pip" -q install ziglang cargo-zigbuild
    fi
    for arch in $ARCHES; do
        [ -d "$(rustc --print sysroot)/lib/rustlib/$arch-unknown-linux-gnu/lib" ] && continue
        have rustup || die "Rust's library for $arch is missing and there is no rustup to fetch it"
        rustup -q target add "$arch-unknown-linux-gnu"
    done
    # The loader and libraries that programs for aarch64 are tried with.
    if [[ " $ARCHES " = *" aarch64 "* ]] && [ ! -e "$CACHE/guests/arm64/lib/ld-linux-aarch64.so.1" ]; then
        mkdir -p "$CACHE/guests"
        apt-config dump | grep -E '^Acquire::(http|https|Check|Retries)' >"$CACHE/apt.conf" || true
        mmdebstrap --quiet --variant=extract --architectures=arm64 --mode=root --aptopt="$CACHE/apt.conf" --include=libc6,libgcc-s1 \
            bookworm "$CACHE/guests/arm64.part" >/dev/null
        mv "$CACHE/guests/arm64.part" "$CACHE/guests/arm64"
    fi
}

# What git knows, and new files it does not ignore: as it is, committed or not.
sources() {
    mkdir -p "$TOP"/{SOURCES,SRPMS,RPMS,BUILD,BUILDROOT}
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do [ -e "$file" ] && printf '%s\0' "$file"; done |
        tar --null -T - -czf "$TOP/SOURCES/$NAME-$VERSION.tar.gz" --owner=0 --group=0 --transform "s,^,$NAME-$VERSION/,"
    local lock
    lock=$(sha256sum Cargo.lock | cut -c1-16)
    if [ "$(cat "$TOP/crates.lock" 2>/dev/null)" != "$lock" ]; then
        say "collecting crates"
        rm -rf "$TOP/vendor"
        mkdir "$TOP/vendor"
        cargo vendor --locked --quiet "$TOP/vendor" >/dev/null
        # Import libraries of systems we do not build for: nine tenths of it all. Never compiled, so cargo does not miss them.
        find "$TOP/vendor" \( -name '*.a' -o -name '*.lib' -o -name '*.dll' \) -delete
        tar -C "$TOP" -czf "$TOP/SOURCES/$NAME-$VERSION-crates.tar.gz" --owner=0 --group=0 vendor
        rm -rf "$TOP/vendor"
        echo "$lock" >"$TOP/crates.lock"
    fi
    # The spec in the source package knows what it was made from; outside of a repository nobody does.
    { echo "%global soci_revision $(git rev-parse HEAD 2>/dev/null || echo unknown)"; cat packaging/$NAME.spec; } >"$TOP/SOURCES/$NAME.spec"
}

rpmbuild_for() { # rpmbuild_for WHAT DIST ARCH MORE…
    local what=$1 dist=$2 arch=$3; shift 3
    # --nodeps: Debian's rpm knows of no Debian packages.
    rpmbuild "$what" --nodeps --target "$arch" --define "_topdir $TOP" --define "dist .$dist" --define "amzn ${dist#amzn}" \
        --define "soci_release $RELEASE" "$@" "$TOP/SOURCES/$NAME.spec"
}

srpm() {
    sources
    # The same for both distributions, so without a name of either.
    rpmbuild -bs --nodeps --define "_topdir $TOP" --define "soci_release $RELEASE" --define "amzn 2023" "$TOP/SOURCES/$NAME.spec" >"$TOP/srpm.log" 2>&1 || { tail -n 30 "$TOP/srpm.log" >&2; die "no source package"; }
    ls "$TOP/SRPMS/$NAME-$VERSION-$RELEASE.src.rpm"
}

compile() {
    local arch=$1
    say "compiling for $arch"
    SOCI_VERSION=$VERSION SOCI_REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown) CARGO_PROFILE_RELEASE_STRIP=debuginfo \
        CARGO_TARGET_DIR=$WORK/package cargo zigbuild --quiet --release --locked --bins --target "$arch-unknown-linux-gnu.$GLIBC"
    built=$WORK/package/$arch-unknown-linux-gnu/release
}

packages() {
    local dist
    for dist in $DISTS; do ls "$TOP"/RPMS/*/"$NAME"*-"$VERSION-$RELEASE.$dist".*.rpm; done
}

rpms() {
    sources
    local arch dist built
    for arch in $ARCHES; do
        if [ -n "${BUILT:-}" ]; then
            built=$TOP/built; mkdir -p "$built"
            local program
            for program in soci soci-snapshotter-grpc soci-mount soci-custodian; do strip -o "$built/$program" "$BUILT/$program"; done
        else
            compile "$arch"
        fi
        local run=()
        [ "$arch" = "$(uname -m)" ] || run=(--define "soci_run qemu-$arch-static -L $CACHE/guests/arm64")
        for dist in $DISTS; do
            say "$arch, $dist"
            rpmbuild_for -bb "$dist" "$arch" --define "soci_built $built" --define "soci_glibc $GLIBC" \
                "${run[@]}" >"$TOP/$arch-$dist.log" 2>&1 || { tail -n 40 "$TOP/$arch-$dist.log" >&2; die "see $TOP/$arch-$dist.log"; }
            grep -E '^(check-glibc|smoke):' "$TOP/$arch-$dist.log"
        done
    done
    # A layer has one index, whatever machine made it.
    local indexes
    indexes=$(for arch in $ARCHES; do for dist in $DISTS; do grep '^smoke: index' "$TOP/$arch-$dist.log"; done; done | sort -u)
    [ "$(echo "$indexes" | wc -l)" = 1 ] || die "the architectures disagree about an index: $indexes"
    local package
    for package in $(packages); do
        [ "$GLIBC" = 2.26 ] || { say "made for glibc $GLIBC: not for any distribution, and not checked against one"; break; }
        dist=${package%.*.rpm}
        rpm -qp --requires "$package" | packaging/check-requires.sh "${dist##*.}" || die "$package cannot be installed"
    done
    # Its exit status knows only of errors; a warning that no line of the configuration waives counts, too.
    rpmlint --config packaging/rpmlint.toml $(packages) >"$TOP/rpmlint.log" 2>&1 || true
    if grep -E ': [EW]: |Traceback' "$TOP/rpmlint.log" >&2 || ! grep -q ' packages and ' "$TOP/rpmlint.log"; then die "rpmlint is not content"; fi
    packages
    made=" $DISTS "
}

rebuild() {
    srpm >/dev/null
    say "rebuilding the source package without a network"
    unshare -n rpmbuild --rebuild --nodeps --define "_topdir $TOP/rebuild" --define "amzn 2023" "$TOP/SRPMS/$NAME-$VERSION-$RELEASE.src.rpm" \
        >"$TOP/rebuild.log" 2>&1 || { tail -n 40 "$TOP/rebuild.log" >&2; die "see $TOP/rebuild.log"; }
    ls "$TOP"/rebuild/RPMS/*/*.rpm
}

dist() {
    [[ ${made:-} = *' amzn2 '* ]] || DISTS=amzn2 rpms >/dev/null
    local arch directory out=$WORK/dist
    rm -rf "$out"; mkdir -p "$out"
    for arch in $ARCHES; do
        directory=$NAME-$VERSION-linux-$arch
        mkdir "$out/$directory"
        rpm2cpio "$TOP/RPMS/$arch/$NAME-$VERSION-$RELEASE.amzn2.$arch.rpm" | (cd "$out/$directory" && cpio -idm --quiet --no-absolute-filenames)
        # Which systemd it will meet is not known here.
        rm -r "$out/$directory/usr/lib/systemd/system"
        cp -r systemd "$out/$directory/systemd"
        cp packaging/install.sh "$out/$directory/install.sh"
        tar -C "$out" -czf "$out/$directory.tar.gz" --owner=0 --group=0 "$directory"
        rm -r "${out:?}/$directory"
    done
    (cd "$out" && sha256sum -- *.tar.gz >SHA256SUMS)
    ls "$out"/*
}

[ $# -gt 0 ] || set -- help
for target; do
    case $target in
        tools) tools ;;
        srpm) tools; srpm ;;
        rpm) tools; rpms ;;
        rebuild) tools; rebuild ;;
        dist) tools; dist ;;
        *) sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
