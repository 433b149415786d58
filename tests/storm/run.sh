#!/bin/bash
# make storm: thousands of faults, crashes and kills, about two hours on two cores that have nothing else to do. Each part prints one line that begins
# with its name and ends after its limit whatever happens; the others run all the same, and the end says which failed.
#
# ARGS="kills faults" for some of: faults crash kills kernel61 cuts orders.  SCALE=5 for five percent of everything.
set -u
cd "$(dirname "$0")/../.."
SCALE=${SCALE:-100} CARGO=${CARGO:-cargo} log=$(mktemp -d) failed=
trap 'rm -rf "$log"' EXIT
parts=${*:-faults crash kills kernel61 cuts orders}

of() { echo $(($1 * SCALE / 100 > 0 ? $1 * SCALE / 100 : 1)); }

# NAME MINUTES PATTERN COMMAND…: what of the command's output is the result, or, if it fails, its end.
part() {
    local name=$1 minutes=$2 result=$3 code began=$SECONDS
    shift 3
    timeout --kill-after=60 "${minutes}m" "$@" >"$log/$name" 2>&1
    code=$?
    if [ $code = 0 ] && grep -qE "$result" "$log/$name"; then
        grep -ohE "($result).*" "$log/$name" | sed "s/^/$name: /"
    else
        tail -n 40 "$log/$name"
        [ $code != 124 ] || echo "$name: it was not ready after $minutes minutes"
        echo "$name: FAILED ($code)"
        failed="$failed $name"
    fi
    echo "$name: $((SECONDS - began)) s"
}

# What is killed is what is shipped: how long a start takes is how long reads stall. BUILT=target/debug for another build.
release() {
    [ -n "${BUILT:-}" ] || { "$CARGO" build --quiet --release --bins && BUILT=${CARGO_TARGET_DIR:-$PWD/target}/release; } || exit 1
    export BUILT
}

it() { "$CARGO" test --test it -- --nocapture "$@"; }
export -f it
export CARGO

$CARGO test --quiet --no-run --lib --test it || exit 1
for part in $parts; do
    case $part in
    faults)
        SOCI_FAULTS=$(of 10000) part faults 30 'fault storm: ' bash -c 'it daemon::faults::privileged_random_faults' ;;
    crash)
        SOCI_CRASH_SEEDS=$(seq -s, 11 $((10 + $(of 6)))) part crash 20 'killed at [0-9]+ places|test result: ok' bash -c 'it crash::' ;;
    kills)
        release
        part kills 40 'storm on .*' "$CARGO" run --quiet --package vm-tests -- storm nspawn "$(of 1000)" ;;
    kernel61)
        release
        part kernel61 30 'storm on .*' "$CARGO" run --quiet --package vm-tests -- storm qemu "$(of 20)" ;;
    cuts)
        release
        part cuts 60 'power cuts: .*' "$CARGO" run --quiet --package vm-tests -- power-cuts n="$(of 20)" ;;
    orders)
        SOCI_MODEL_SEEDS=$(seq -s, 100 $((99 + $(of 40)))) part model 20 'test result: ok' bash -c 'it model::'
        SOCI_EXPLORE=$(of 50) part orders 20 'test result: ok' "$CARGO" test --lib -- shuttle ;;
    *)
        echo "$part: there is no such part" >&2
        exit 2 ;;
    esac
done
[ -z "$failed" ] || { echo "make storm: failed:$failed"; exit 1; }
