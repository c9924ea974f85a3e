#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: make-root.sh SUITE FOLDER [PYTHON]
# Makes what guestrun.sh boots: a small Debian with systemd and the packages that cenote imports, and
# the kernel of the same release. Half a minute, 100 MB of downloads, 330 MB of disk.
#
# SUITE: trixie has systemd 257, bookworm 252. PYTHON: its pip fetches wheels for the guest's python.
#
# Needs root and the Debian packages mmdebstrap, cpio, e2fsprogs, xz-utils (elsewhere than on Debian
# also debian-archive-keyring). Nothing is installed on this machine, no loop device is used.
# guestrun.sh needs root.img, initrd and kernel.elf of FOLDER; they are moved there last.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
suite=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
python=${3:-python3}
# dbus: `systemctl clean` asks systemd by the bus, the other verbs of root do not
PACKAGES=systemd,systemd-sysv,dbus,passwd,kmod,python3,busybox-static
SITE=opt/site

[ "$(id -u)" = 0 ] || { echo "make-root: needs root, for the owners of files in the guest" >&2; exit 2; }
mapfile -t WHEELS < <("$python" - "$here/../../pyproject.toml" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
PY
)
work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/tree

# The kernel is unpacked, not installed: its package would want an initramfs of its own.
fetch_kernel='cd "$1/var/tmp" && chroot "$1" sh -ec "cd /var/tmp
    name=\$(apt-cache depends linux-image-cloud-amd64 | sed -n \"s/.*Depends: \\(linux-image-.*\\)/\\1/p\")
    apt-get -qq -o APT::Sandbox::User=root download \$name"'
mmdebstrap --quiet --variant=minbase --include="$PACKAGES" --customize-hook="$fetch_kernel" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' "$suite" "$tree"
kernel=$tree/var/tmp/kernel
dpkg-deb -x "$tree"/var/tmp/linux-image-*.deb "$kernel"
[ -d "$kernel/lib" ] || ln -s usr/lib "$kernel/lib"
rm "$tree"/var/tmp/linux-image-*.deb

version=$(chroot "$tree" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
platforms=()
for platform in 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${platform}_x86_64"); done
"$python" -m pip install -q --disable-pip-version-check --no-compile --target "$tree/$SITE" \
    --python-version "$version" --implementation cp --only-binary=:all: \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform any "${WHEELS[@]}"
# a fifth of it, and nobody imports them
rm -rf "$tree/$SITE"/numpy/*/tests "$tree/$SITE"/numpy/tests
chroot "$tree" python3 -m compileall -q "/$SITE"
# the project's own packages come with each guest
printf '/%s\n/opt/cenote/lib\n' "$SITE" >"$tree/usr/lib/python3/dist-packages/cenote.pth"
: >"$tree/etc/machine-id"

# The initramfs: busybox, and the modules that a disk needs, in the order in which they are loaded.
mkdir -p "$work"/init/{bin,modules,proc,sys,dev,disk}
cp "$tree/bin/busybox" "$work/init/bin/"
install -m 0755 "$here/init.sh" "$work/init/init"
release=$(ls "$kernel/lib/modules")
chroot "$tree" depmod -b /var/tmp/kernel "$release"
number=10
for name in virtio_pci virtio_blk virtio-rng; do
    chroot "$tree" modprobe -d /var/tmp/kernel -S "$release" --show-depends "$name"
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
    target=$work/init/modules/$number-$(basename "${file%%.ko*}").ko
    case $file in
        *.xz) xz -dc "$tree$file" ;;
        *.zst) zstd -qdc "$tree$file" ;;
        *) cat "$tree$file" ;;
    esac >"$target"
    number=$((number + 1))
done
(cd "$work/init" && find . | cpio --quiet -o -H newc) >"$work/initrd"
# Emulated, a kernel takes seconds to unpack itself.
"$python" "$here/unpack_kernel.py" "$kernel"/boot/vmlinuz-* "$work/kernel.elf"
rm -r "$kernel"
truncate -s 700M "$work/root.img"
mke2fs -q -t ext4 -O ^has_journal -d "$tree" "$work/root.img"
mv "$work/root.img" "$work/initrd" "$work/kernel.elf" "$folder/"
