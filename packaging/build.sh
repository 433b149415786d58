#!/bin/bash
# Packages of the working tree, made on any Debian 12 machine for Amazon Linux 2 and 2023.
#
#   build.sh tools            what the rest needs that this machine lacks (root; packages, zig, Rust's libraries for the others)
#   build.sh srpm             target/rpm/SRPMS: complete sources, for "rpmbuild --rebuild" without a network
#   build.sh rebuild          proves that, for this machine's architecture and glibc: rebuilds the source package without a network
#   build.sh rpm              target/rpm/RPMS: both distributions, both architectures; checked by rpmlint
#   build.sh dist             target/dist: a tar of static programs per architecture and SHA256SUMS, for those without rpm
#
# ARCHES and DISTS choose a part ("x86_64 aarch64", "amzn2 amzn2023"), RELEASE is the package's release (1). Programs are compiled once per
# architecture and libc (glibc 2.26 for rpm, musl for the tar); what cargo keeps between builds is in target/package (or
# $CARGO_TARGET_DIR/package). While working on packages, BUILT=DIRECTORY GLIBC=VERSION packages programs that are there already; a tar of
# them says in its name that it is not static.
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
PROGRAMS="soci soci-snapshotter-grpc soci-mount soci-custodian"
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
    local arch libc
    for arch in $ARCHES; do
        for libc in gnu musl; do
            [ -d "$(rustc --print sysroot)/lib/rustlib/$arch-unknown-linux-$libc/lib" ] && continue
            have rustup || die "Rust's library for $arch with $libc is missing and there is no rustup to fetch it"
            rustup -q target add "$arch-unknown-linux-$libc"
        done
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

rpmbuild_for() { # rpmbuild_for DIST ARCH DIRECTORY MORE…: packages the programs in DIRECTORY
    local dist=$1 arch=$2 built=$3 log=$TOP/$2-$1.log; shift 3
    say "$arch, $dist"
    [ "$arch" = "$(uname -m)" ] || set -- "$@" --define "soci_run qemu-$arch-static -L $CACHE/guests/arm64"
    # --nodeps: Debian's rpm knows of no Debian packages.
    rpmbuild -bb --nodeps --target "$arch" --define "_topdir $TOP" --define "dist .$dist" --define "soci_release $RELEASE" \
        --define "soci_built $built" "$@" "$TOP/SOURCES/$NAME.spec" >"$log" 2>&1 || { tail -n 40 "$log" >&2; die "see $log"; }
    grep -E '^(check-glibc|check-static|smoke):' "$log"
}

# A layer has one index, whatever machine or libc made it.
one_index() {
    local indexes
    indexes=$(grep -h '^smoke: index' "$TOP"/*-{amzn,static,dynamic}*.log 2>/dev/null | sort -u) || true
    [ "$(echo "$indexes" | wc -l)" = 1 ] || die "the programs disagree about an index: $indexes"
}

srpm() {
    sources
    # The same for both distributions, so without a name of either.
    rpmbuild -bs --nodeps --define "_topdir $TOP" --define "soci_release $RELEASE" --define "amzn 2023" "$TOP/SOURCES/$NAME.spec" >"$TOP/srpm.log" 2>&1 || { tail -n 30 "$TOP/srpm.log" >&2; die "no source package"; }
    ls "$TOP/SRPMS/$NAME-$VERSION-$RELEASE.src.rpm"
}

compile() { # compile ARCH LIBC: sets $built
    local target=$1-unknown-linux-$2
    say "compiling for $1, $2"
    SOCI_VERSION=$VERSION SOCI_REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown) CARGO_PROFILE_RELEASE_STRIP=debuginfo \
        CARGO_TARGET_DIR=$WORK/package cargo zigbuild --quiet --release --locked --bins --target "$target"
    built=$WORK/package/${target%%.*}/release
}

# Programs that are there already, as cargo would have stripped them: sets $built.
take() {
    built=$TOP/built; mkdir -p "$built"
    local program
    for program in $PROGRAMS; do strip -o "$built/$program" "$BUILT/$program"; done
}

packages() {
    local dist
    for dist in $DISTS; do ls "$TOP"/RPMS/*/"$NAME"*-"$VERSION-$RELEASE.$dist".*.rpm; done
}

rpms() {
    sources
    local arch dist built
    rm -f "$TOP"/*-amzn*.log
    for arch in $ARCHES; do
        if [ -n "${BUILT:-}" ]; then take; else compile "$arch" "gnu.$GLIBC"; fi
        for dist in $DISTS; do rpmbuild_for "$dist" "$arch" "$built" --define "amzn ${dist#amzn}" --define "soci_glibc $GLIBC"; done
    done
    one_index
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
}

rebuild() {
    srpm >/dev/null
    say "rebuilding the source package without a network"
    # Crates that were compiled by an earlier run are taken from it.
    CARGO_TARGET_DIR=$WORK/rebuild unshare -n rpmbuild --rebuild --nodeps --define "_topdir $TOP/rebuild" --define "amzn 2023" "$TOP/SRPMS/$NAME-$VERSION-$RELEASE.src.rpm" \
        >"$TOP/rebuild.log" 2>&1 || { tail -n 40 "$TOP/rebuild.log" >&2; die "see $TOP/rebuild.log"; }
    ls "$TOP"/rebuild/RPMS/*/*.rpm
}

dist() {
    sources
    local arch directory built out=$WORK/dist
    rm -rf "$out"; mkdir -p "$out"
    rm -f "$TOP"/*-static.log "$TOP"/*-dynamic.log
    for arch in $ARCHES; do
        local kind=static
        directory=$NAME-$VERSION-linux-$arch
        if [ -n "${BUILT:-}" ]; then
            kind=dynamic directory=$NAME-$VERSION-dynamic-linux-$arch
            take
            rpmbuild_for dynamic "$arch" "$built" --define "amzn 2" --define "soci_glibc $GLIBC"
        else
            compile "$arch" musl
            rpmbuild_for static "$arch" "$built" --define "amzn 2" --define "soci_static 1"
        fi
        # As a package knows what belongs where, the tar is made of one.
        mkdir "$out/$directory"
        rpm2cpio "$TOP/RPMS/$arch/$NAME-$VERSION-$RELEASE.$kind.$arch.rpm" | (cd "$out/$directory" && cpio -idm --quiet --no-absolute-filenames)
        rm "$TOP/RPMS/$arch/$NAME-$VERSION-$RELEASE.$kind.$arch.rpm"
        # Which systemd it will meet is not known here.
        rm -r "$out/$directory/usr/lib/systemd/system"
        cp -r systemd "$out/$directory/systemd"
        cp packaging/install.sh "$out/$directory/install.sh"
        tar -C "$out" -czf "$out/$directory.tar.gz" --owner=0 --group=0 "$directory"
        rm -r "${out:?}/$directory"
    done
    one_index
    (cd "$out" && sha256sum -- *.tar.gz >SHA256SUMS)
    check_tars "$out"
    ls "$out"/*
}

# As those who fetch them will: the sums, what is inside, and that an installation of it is complete and runs.
check_tars() {
    (cd "$1" && sha256sum --quiet --check SHA256SUMS) || die "SHA256SUMS is wrong"
    local tar work program arch
    for tar in "$1"/*.tar.gz; do
        work=$(mktemp -d -p "$TOP")
        tar -C "$work" --strip-components=1 -xzf "$tar"
        "$work/install.sh" "$work/root" >/dev/null
        [[ $tar = *-dynamic-* ]] || find "$work" -type f -perm -100 ! -name '*.sh' -exec packaging/check-static.sh {} + >/dev/null || die "$tar is not static"
        arch=${tar##*-linux-} arch=${arch%.tar.gz}
        for program in bin/soci bin/soci-snapshotter-grpc libexec/$NAME/soci-mount libexec/$NAME/soci-custodian; do
            if [ "$arch" = "$(uname -m)" ]; then set --; else set -- "qemu-$arch-static"; fi
            "$@" "$work/root/usr/$program" --version | grep -q "$VERSION" || die "$tar: $program does not run"
        done
        rm -r "$work"
    done
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
