#!/bin/bash
# smoke.sh DIRECTORY [RUNNER…]: the programs in DIRECTORY start, agree with their configuration, resolve names, and index a layer; a RUNNER
# (an emulator) runs them.
# Prints the digest of the index, which depends on the layer alone: every architecture must print the same.
set -euo pipefail
built=$(readlink -f "$1"); shift
config=$(readlink -f "$(dirname "$0")/../etc/soci-snapshotter-grpc/config.toml")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
fail() { echo "smoke: $*" >&2; exit 1; }
for program in soci soci-snapshotter-grpc soci-mount soci-custodian; do
    "$@" "$built/$program" --version
done
"$@" "$built/soci-snapshotter-grpc" --config "$config" config check --strict

cd "$work"
# Nobody answers there, and to a build without a network not even that is said; but the name was understood, by whatever resolver is linked in.
"$@" "$built/soci" doctor localhost:1/app:1 >said 2>&1 || true
grep -q 'tcp connect error' said || fail "soci did not try to connect to localhost: $(cat said)"

# An image of one layer, two files in it, as builders write it.
mkdir -p files layout/blobs/sha256
seq 1 400000 >files/numbers
head -c 3000000 /dev/zero >files/zeros
tar -C files --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --format=gnu -cf layer.tar numbers zeros
gzip -6nc layer.tar >layer.tar.gz
put() { # put FILE MEDIA_TYPE: into the layout; prints its descriptor
    local digest; digest=$(sha256sum <"$1" | cut -c1-64)
    cp "$1" "layout/blobs/sha256/$digest"
    printf '{"mediaType":"%s","digest":"sha256:%s","size":%s}' "$2" "$digest" "$(stat -c %s "$1")"
}
layer=$(put layer.tar.gz application/vnd.oci.image.layer.v1.tar+gzip)
printf '{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' "$(sha256sum <layer.tar | cut -c1-64)" >config
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' \
    "$(put config application/vnd.oci.image.config.v1+json)" "$layer" >manifest
printf '{"schemaVersion":2,"manifests":[%s]}' "$(put manifest application/vnd.oci.image.manifest.v1+json)" >layout/index.json
echo '{"imageLayoutVersion":"1.0.0"}' >layout/oci-layout

"$@" "$built/soci" convert --standalone layout indexed --format oci-dir --min-layer-size 0 --all-platforms >/dev/null
ztoc=$(grep -rhao '"mediaType":"application/octet-stream","digest":"sha256:[0-9a-f]*"' indexed/blobs/sha256 | grep -o 'sha256:[0-9a-f]*' | head -n 1)
[ -n "$ztoc" ] || fail "no index was made"
"$@" "$built/soci" ztoc info --layout indexed "$ztoc" >info
grep -q '"numbers"' info && grep -q '"zeros"' info || fail "the index does not list the layer's files: $(cat info)"
"$@" "$built/soci" ztoc get-file --layout indexed "$ztoc" numbers >found
cmp found files/numbers || fail "a file that was got through the index is another"
echo "smoke: index $ztoc"
