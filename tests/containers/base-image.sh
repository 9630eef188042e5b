#!/usr/bin/env bash
# Makes $1 out of Debian's own packages: a stand-in for python:3.x-slim where that cannot be pulled. As root; some three minutes.
# Python is Debian 12's 3.11, and the certificates are this machine's.
set -euo pipefail

image=$1
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mirror=$(awk '/^URIs/ {print $2; exit}' /etc/apt/sources.list.d/*.sources)
debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$root" "$mirror" >/dev/null
ln -sf /usr/bin/python3 "$root/usr/local/bin/python"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
rm -f "$root/etc/apt/sources.list"
cp /etc/apt/sources.list.d/*.sources "$root/etc/apt/sources.list.d/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
tar -C "$root" -c . | podman import --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' --change 'CMD ["python3"]' - "$image"
