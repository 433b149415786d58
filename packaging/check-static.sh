#!/bin/bash
# check-static.sh PROGRAM…: no program may need a loader or a library; each runs on any Linux of its architecture.
set -euo pipefail
[ $# -gt 0 ] || { echo "check-static: no programs" >&2; exit 2; }
for program; do
    # readelf, unlike ldd, reads programs of any architecture; what it cannot read it may call a success.
    headers=$(readelf -lW "$program") needs=$(readelf -dW "$program" | grep -o 'Shared library: .*' || true)
    [[ $headers = *LOAD* ]] || { echo "check-static: $program is no program" >&2; exit 1; }
    if [[ $headers = *INTERP* ]] || [ -n "$needs" ]; then
        echo "check-static: $program is not static:" >&2
        printf '%s\n' "$headers" "$needs" | grep -E 'interpreter|Shared library' >&2
        exit 1
    fi
    echo "check-static: ${program##*/}: no loader, no libraries"
done
