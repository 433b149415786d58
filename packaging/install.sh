#!/bin/sh
# Installs the programs, units and manuals beside this script; "install.sh DIRECTORY" below another root. A changed configuration is kept.
set -eu
cd "$(dirname "$0")"
root=${1:-}
# systemd 232 has what the closer units use.
version=$(systemctl --version 2>/dev/null | sed -n '1s/systemd \([0-9]*\).*/\1/p')
units=systemd/al2
[ "${version:-0}" -lt 247 ] || units=systemd/al2023
config=etc/soci-snapshotter-grpc/config.toml
(cd usr && tar -cf - .) | (mkdir -p "$root/usr" && cd "$root/usr" && tar --no-overwrite-dir -xf -)
mkdir -p "$root/usr/lib/systemd/system" "$root/etc/soci-snapshotter-grpc" && install -d -m 700 "$root/var/lib/soci-snapshotter-grpc"
cp "$units"/* "$root/usr/lib/systemd/system/"
[ -e "$root/$config" ] || cp "$config" "$root/$config"
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    systemd-tmpfiles --create /usr/lib/tmpfiles.d/soci-snapshotter.conf
    journalctl --update-catalog
    systemctl daemon-reload
    systemctl try-restart soci-custodian.service soci-snapshotter.service
fi
echo "installed ($units); next: systemctl enable --now soci-snapshotter.socket"
