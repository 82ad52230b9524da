#!/usr/bin/env bash
# Run a command in another root: in_root.sh ROOT [SOURCE:TARGET...] -- COMMAND...   in a mount namespace of its own
set -euo pipefail
root=$1
shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf; do
    if [ -f "$file" ]; then
        [ -e "$root$file" ] || touch "$root$file"
        mount --bind "$file" "$root$file"
    fi
done
for folder in /etc/ssl/certs /etc/apt/apt.conf.d; do mount --bind "$folder" "$root$folder"; done
while [ "$1" != -- ]; do
    mkdir -p "$root${1#*:}"
    mount --rbind "${1%%:*}" "$root${1#*:}"
    shift
done
shift
cd "$root"
mkdir -p old
pivot_root . old
umount -l /old
cd /
exec "$@"
