#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: guestrun.sh FOLDER PAYLOAD SECONDS command [args...]
# Boots what make-root.sh made in FOLDER, with PAYLOAD copied to /opt/cenote and systemd as PID 1,
# and runs one command there as root: its output is our output, its exit status is ours. What the
# guest writes vanishes with it.
#
# Exit status besides: 124 after SECONDS, 125 when the guest ended without one; then stderr has the
# end of its console.
#
# Needs the Debian packages qemu-system-x86 and cpio. Where the machine has no KVM that works, the
# guest is emulated: three to ten times slower than the machine.
set -euo pipefail
folder=$1 payload=$2 seconds=$3
shift 3
run=$(mktemp -d "${TMPDIR:-/tmp}/guestrun.XXXXXX")
trap 'rm -rf "$run"' EXIT

# /dev/kvm alone proves nothing: in a guest without nested virtualization it opens and cannot run.
if [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
    accel=(-accel kvm -cpu host)
else
    # with four levels of page tables it boots faster
    accel=(-accel tcg,thread=multi -cpu max,la57=off)
fi

mkdir "$run/add"
cp -r "$payload" "$run/add/payload"
printf '%q ' exec "$@" >"$run/add/payload.sh"
(cd "$run/add" && find . | cpio --quiet -o -H newc) >"$run/add.cpio"
cat "$folder/initrd" "$run/add.cpio" >"$run/initrd"
touch "$run/console" "$run/status"
mkfifo "$run/said"
cat "$run/said" &
reader=$!

state=0
timeout --foreground -k 5 "$seconds" qemu-system-x86_64 -M q35 "${accel[@]}" -m 1G -smp 2 \
    -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$folder/kernel.elf" -initrd "$run/initrd" \
    -append "console=ttyS0 panic=-1 quiet loglevel=4 no_timer_check random.trust_cpu=on mitigations=off" \
    -drive "file=$folder/root.img,format=raw,if=none,id=disk,snapshot=on" \
    -device virtio-blk-pci,drive=disk -device virtio-rng-pci \
    -serial "file:$run/console" -serial "file:$run/said" -serial "file:$run/status" \
    </dev/null >"$run/qemu" 2>&1 || state=$?
: <>"$run/said" # the reader must not wait for a qemu that never opened it
wait "$reader"
status=$(tr -dc 0-9 <"$run/status")
if [ "$state" != 0 ] || [ -z "$status" ]; then
    cat "$run/qemu" "$run/console" | tail -n 40 >&2
    echo "guestrun: the guest ended with status $state, without that of its command" >&2
    [ "$state" = 124 ] && exit 124
    exit 125
fi
exit "$status"
