#!/bin/bash
# check-glibc.sh VERSION PROGRAM…: no program may need a symbol of a glibc newer than VERSION.
set -euo pipefail
limit=$1; shift
for program; do
    # Undefined versions only; readelf, unlike ldd, reads programs of any architecture.
    newest=$(readelf -W --version-info "$program" | grep -o 'Name: GLIBC_[0-9.]*' | sed 's/.*GLIBC_//' | sort -uV | tail -n 1)
    [ -n "$newest" ] || { echo "check-glibc: $program names no glibc at all" >&2; exit 1; }
    if [ "$(printf '%s\n' "$newest" "$limit" | sort -V | tail -n 1)" != "$limit" ]; then
        echo "check-glibc: $program needs GLIBC_$newest, newer than $limit:" >&2
        readelf -W --dyn-syms "$program" | grep "@GLIBC_$newest" >&2
        exit 1
    fi
    echo "check-glibc: ${program##*/}: GLIBC_$newest at most"
done
