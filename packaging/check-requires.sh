#!/bin/bash
# rpm -qp --requires PACKAGE | check-requires.sh amzn2|amzn2023: everything that the package needs is in every installation of that distribution.
# What is allowed is written out: neither distribution's repositories have to be there to know it.
set -euo pipefail
case ${1:-} in
    amzn2) glibc=26 rpm='CompressedFileNames PayloadFilesHavePrefix FileDigests' ;; # rpm 4.11, glibc 2.26
    amzn2023) glibc=34 rpm='CompressedFileNames PayloadFilesHavePrefix FileDigests' ;;
    *) echo "usage: check-requires.sh amzn2|amzn2023" >&2; exit 2 ;;
esac
refuse() { echo "check-requires: $1 does not have: $2" >&2; refused=yes; }
refused=no
while IFS= read -r need; do
    case $need in
        '' | /bin/sh | systemd | ca-certificates | 'rtld(GNU_HASH)' | 'config(soci-snapshotter) = '*) ;;
        # Of the package soci-snapshotter-selinux, which is for Amazon Linux 2023.
        container-selinux | policycoreutils | 'soci-snapshotter = '*) [ "$1" = amzn2023 ] || refuse "$1" "$need" ;;
        'rpmlib('*)
            feature=${need#rpmlib(}
            case " $rpm " in *" ${feature%%)*} "*) ;; *) refuse "$1's rpm" "$need" ;; esac ;;
        # Libraries of glibc, without or with a version of their symbols; and gcc's, whose versions are older than either distribution.
        lib[cm].so.6*'('* | libpthread.so.0'('* | libdl.so.2'('* | librt.so.1'('* | ld-linux-x86-64.so.2'('* | ld-linux-aarch64.so.1'('*)
            if [[ $need =~ GLIBC_2\.([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -gt $glibc ]; then refuse "$1's glibc 2.$glibc" "$need"; fi ;;
        'libgcc_s.so.1()(64bit)' | 'libgcc_s.so.1(GCC_'[34].*')(64bit)') ;;
        *) refuse "$1" "$need" ;;
    esac
done
[ $refused = no ]
