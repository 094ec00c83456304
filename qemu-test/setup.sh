#!/usr/bin/env bash
# Installs the Debian packages named in packages.txt, those that are missing, without asking and without starting
# the services that some of them bring.
set -euo pipefail
cd "$(dirname "$0")"
missing=()
while read -r name; do
    if [ -n "$name" ] && ! dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed; then
        missing+=("$name")
    fi
done <packages.txt
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
root=()
if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "error: installing packages needs root; run this once yourself:" >&2
        echo "  sudo apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    root=(sudo -n)
fi
log=$(mktemp)
echo "==> install ${missing[*]}" >&2
# RUNLEVEL=1 keeps Debian's maintainer scripts from starting what they install.
if ! { "${root[@]}" apt-get update && "${root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: cannot install packages: the whole log is in $log" >&2
    exit 1
fi
rm -f "$log"
