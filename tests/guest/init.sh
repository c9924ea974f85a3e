#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# PID 1 of a guest until systemd takes over: mounts the disk, adds what guestrun.sh gave, and has
# systemd run one command. The second serial line has what it says, the third its exit status.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
for module in /modules/*.ko; do $B insmod "$module" || echo "guest: $module cannot be loaded"; done
$B mount -t ext4 /dev/vda /disk || { echo "guest: no disk"; $B poweroff -f; }
$B cp -r /payload /disk/opt/cenote
$B mkdir -p /disk/run
$B mount -t tmpfs -o mode=755 tmpfs /disk/run
units=/disk/run/systemd/system
$B mkdir -p $units/multi-user.target.wants
for unit in getty.target systemd-logind.service; do $B ln -s /dev/null $units/$unit; done
$B cp $B /payload.sh /disk/run/
$B cat >$units/guest.service <<'UNIT'
[Unit]
After=basic.target
[Service]
Type=simple
ExecStart=/run/busybox sh /run/guest-command
UNIT
$B ln -s ../guest.service $units/multi-user.target.wants/
$B cat >/disk/run/guest-command <<'COMMAND'
B=/run/busybox
for line in 1 2; do $B stty -F /dev/ttyS$line raw -echo; done
cd /opt/cenote
/bin/sh /run/payload.sh >/dev/ttyS1 2>&1 </dev/null
echo $? >/dev/ttyS2
# a tty is empty when its last line was written, which is before it was sent
$B stty -F /dev/ttyS1 -a >/dev/null; exec 8>/dev/ttyS1; exec 8>&-; exec 8>/dev/ttyS2; exec 8>&-
echo o >/proc/sysrq-trigger
COMMAND
for folder in proc sys dev; do $B mount --move /$folder /disk/$folder; done
exec $B switch_root /disk /lib/systemd/systemd --unit=multi-user.target --show-status=no
