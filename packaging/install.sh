#!/bin/sh
# Installs the programs, units and manuals beside this script, for those who have no rpm. They are static: any libc will do.
#
#   install.sh               here; what runs already is restarted, and running containers notice nothing
#   install.sh DIRECTORY     below another root, for an image
#   install.sh --remove      stops and takes away what was installed; configuration and images stay
#
# A configuration that is there is kept.
set -eu
cd "$(dirname "$0")"
config=etc/soci-snapshotter-grpc/config.toml
units="soci-snapshotter.socket soci-snapshotter.service soci-mount.service soci-custodian.socket soci-custodian.service"

if [ "${1:-}" = --remove ]; then
    if [ -d /run/systemd/system ]; then
        systemctl disable $units >/dev/null 2>&1 || :
        # Sockets first, or a connection would start what has just been stopped.
        timeout 60 systemctl stop soci-snapshotter.socket soci-custodian.socket || :
        timeout 60 systemctl stop soci-snapshotter.service soci-custodian.service || :
    fi
    # Detaches the mount, which never waits for containers that use it.
    timeout 30 /usr/libexec/soci-snapshotter/soci-mount --unmount || :
    [ ! -d /run/systemd/system ] || timeout 60 systemctl stop soci-mount.service || :
    find usr ! -type d | while IFS= read -r file; do rm -f "/$file"; done
    for unit in $units; do rm -f "/usr/lib/systemd/system/$unit"; done
    rmdir /usr/libexec/soci-snapshotter /usr/share/licenses/soci-snapshotter /usr/share/doc/soci-snapshotter 2>/dev/null || :
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; journalctl --update-catalog; fi
    echo "removed; /etc/soci-snapshotter-grpc and the images in /var/lib/soci-snapshotter-grpc were left in place"
    exit 0
fi

root=${1:-}
# The closer units use what came until 247 (ProtectProc=); the others do with 219.
version=$(systemctl --version 2>/dev/null | sed -n '1s/systemd \([0-9]*\).*/\1/p')
set=al2
[ "${version:-0}" -lt 247 ] || set=al2023
(cd usr && tar -cf - .) | (mkdir -p "$root/usr" && cd "$root/usr" && tar --no-overwrite-dir -xf -)
mkdir -p "$root/usr/lib/systemd/system" "$root/etc/soci-snapshotter-grpc" && install -d -m 700 "$root/var/lib/soci-snapshotter-grpc"
cp systemd/$set/* "$root/usr/lib/systemd/system/"
[ -e "$root/$config" ] || cp "$config" "$root/$config"
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    systemd-tmpfiles --create /usr/lib/tmpfiles.d/soci-snapshotter.conf
    journalctl --update-catalog
    systemctl daemon-reload
    systemctl try-restart soci-custodian.service soci-snapshotter.service
fi
echo "installed, with the units in systemd/$set; next: systemctl enable --now soci-snapshotter.socket"
