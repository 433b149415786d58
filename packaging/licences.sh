#!/bin/bash
# licences.sh VENDOR_DIR: the licence texts of every crate that is linked into the programs, each text once, to standard output.
# Run it where Cargo.toml is. A crate that brings no text is under a licence of which another crate brings it, or this fails.
set -euo pipefail
vendor=$1
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir "$work/texts" "$work/users"
# Tests' and build scripts' crates are not in the programs.
cargo tree --frozen --edges normal --target all --prefix none --format '{p}|{l}' | sed 's/ (\*)$//; s/ (proc-macro)//' | sort -u |
while IFS='|' read -r package licence; do
    name=${package%% *} version=${package#* v}; version=${version%% *}
    [ "$name" != soci-snapshotter ] || continue
    # cargo vendor adds the version to the directory where there are several.
    directory=$vendor/$name-$version; [ -d "$directory" ] || directory=$vendor/$name
    found=no
    for text in "$directory"/{LICEN[SC]E*,licen[sc]e*,COPYING*,COPYRIGHT*,NOTICE*,UNLICENSE*}; do
        [ -f "$text" ] || continue
        sum=$(sha256sum "$text" | cut -c1-64)
        cp "$text" "$work/texts/$sum"
        echo "$name $version ($licence)" >>"$work/users/$sum"
        found=yes
    done
    [ $found = yes ] || echo "$name $version: $licence" >>"$work/without"
done
echo "The programs of soci-snapshotter contain these crates, under these licences."
if [ -e "$work/without" ]; then
    echo
    echo "Crates whose packages carry no text of their own; the texts of their licences are below:"
    sed 's/^/    /' "$work/without"
fi
for users in "$work"/users/*; do
    printf '\n%s\n' "--------------------------------------------------------------------------------"
    sort -u "$users" | sed 's/^/    /'
    echo
    cat "$work/texts/${users##*/}"
done
count=$(cat "$work"/users/* | sort -u | wc -l)
[ "$count" -gt 50 ] || { echo "licences.sh: only $count crates found below $vendor" >&2; exit 1; }
