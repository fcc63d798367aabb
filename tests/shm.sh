#!/usr/bin/env bash
# 01 with two loaders and a /dev/shm of 64 MB, as Docker gives: one line and status 2 within two minutes. Needs root.
#   bash tests/shm.sh DATA
set -uo pipefail
[ "${2:-}" = inside ] || exec unshare --mount bash "$0" "$1" inside # where the mount is seen by nobody else
mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 1
here=$(cd "$(dirname "$0")/.." && pwd) out=$(mktemp -d)
timeout -k 5 120 python3 "$here/01_train_teacher.py" --data "$1" --out "$out" --arch shufflenet_v2_x0_5 --image-size 512 \
    --batch-size 64 --steps 20 --workers 2 2>"$out/stderr"
status=$? && cat "$out/stderr"
[ $status = 2 ] && grep -q -e --shm-size "$out/stderr" && echo "as it should be"
