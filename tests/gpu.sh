#!/usr/bin/env bash
# What waits for a GPU, or for files that were not at hand. What is missing is left out, with a line that says why.
#
#   tests/gpu.sh                        a line a step, then a summary; status 1 if a step failed: its log says how
#   IMAGENET=DIR SVHN=DIR tests/gpu.sh  also published weights to their top-1, and SVHN from 97.9 to 98.6 percent
#
# IMAGENET  a data directory whose val/ has ImageNet's 1,000 folders      MODELS  which weights: b0 b1 ... b7 l2
# WEIGHTS   a folder with tf_efficientnet_b0_ns-*.pth ...; without it timm downloads them
# SVHN      what `python 00_prepare_data.py svhn --out DIR` wrote. The training continues if it is started again.
# OUT       where everything is written: runs/gpu
# Without a GPU the stages run once on the CPU, in fp32: a few minutes, to see that this script works.
set -uo pipefail
cd "$(dirname "$0")/.."
[ ! -e .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
OUT=${OUT:-runs/gpu} IMAGENET=${IMAGENET:-} WEIGHTS=${WEIGHTS:-} SVHN=${SVHN:-} MODELS=${MODELS:-b0 b7}
mkdir -p "$OUT" && run=$(mktemp -d "$OUT/run-XXXX") || exit 2
failed=() skipped=() done=0

step() { # step NAME COMMAND...
    local name=$1 began=$SECONDS state=ok
    "${@:2}" >"$run/$name.log" 2>&1 || { state=FAILED && failed+=("$name"); }
    [ $state = FAILED ] || done=$((done + 1))
    printf '%-8s%-22s%6d s  %.110s\n' $state "$name" $((SECONDS - began)) "$(tail -n 1 "$run/$name.log")"
}
skip() { # skip NAME WHY
    printf '%-8s%-22s          %s\n' skipped "$1" "$2" && skipped+=("$1")
}
smoke() { # smoke NAME LAUNCHER PRECISION [FLAG OF THE TRAININGS]: every stage that has a model, on a few images
    local out=$run/$1 launcher=$2 precision="--precision $3" small="--data $run/data --batch-size 8 --epochs 1 ${4:-}"
    step "$1-01" $launcher 01_train_teacher.py $small $precision --image-size 32 --out "$out/teacher"
    step "$1-02" $launcher 02_pseudo_label.py --teacher "$out/teacher/model.pt" $precision --out "$out/logits.h5"
    step "$1-03" python 03_balance.py "$out/logits.h5" --threshold 0 --out "$out/balanced.h5"
    step "$1-04" $launcher 04_train_student.py --pseudo-labels "$out/balanced.h5" $small $precision --out "$out/student"
    step "$1-05" $launcher 05_fixres_finetune.py --checkpoint "$out/student/model.pt" $small $precision --out "$out/fixres"
    step "$1-06" $launcher 06_eval_robustness.py "$out/student/model.pt" --data "$run/data" --corrupt --num-images 8 \
        --fgsm 2 $precision --out "$out/robustness"
}
same_labels() { # same_labels A.h5 B.h5: to a thousandth of the largest logit
    python -c 'import sys, h5py, numpy as np
a, b = (h5py.File(path)["logits"][:].astype(np.float32) for path in sys.argv[1:])
print(f"logits to {abs(a).max():.2f}, largest difference {abs(a - b).max():.5f}")
sys.exit(bool(abs(a - b).max() > abs(a).max() / 1000))' "$@"
}
top1() { # top1 FOLDER PUBLISHED: what the checkpoint reached, within 0.3 percent points
    python -c 'import sys, torch
top1 = torch.load(f"{sys.argv[1]}/model.pt", weights_only=True)["metrics"]["val_top1"]
print(f"top-1 {top1:.2f}, published {sys.argv[2]}")
sys.exit(abs(top1 - float(sys.argv[2])) > 0.3)' "$@"
}

gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 2
echo "$gpus GPUs; logs in $run"
step 00 python 00_prepare_data.py demo --out "$run/demo"
for folder in "$run"/demo/{train/*,val/*,unlabeled}; do # 8 images of each
    mkdir -p "$run/data/${folder#"$run/demo/"}" && cp $(ls -d "$folder"/* | head -n 8) "$run/data/${folder#"$run/demo/"}"
done
if [ "$gpus" -gt 0 ]; then
    for precision in fp32 bf16 fp16; do smoke $precision python $precision; done
    smoke compiled python bf16 --compile
    step labels-gpu env NVIDIA_TF32_OVERRIDE=0 python 02_pseudo_label.py --teacher "$run/fp32/teacher/model.pt" \
        --precision fp32 --out "$run/gpu.h5"
else
    smoke fp32 python fp32
    skip precisions "no GPU: bf16, fp16, --compile, and GPUs' labels beside CPUs'"
fi
step labels-cpu env CUDA_VISIBLE_DEVICES= python 02_pseudo_label.py --teacher "$run/fp32/teacher/model.pt" --out "$run/cpu.h5"
[ "$gpus" -eq 0 ] || step labels-compared same_labels "$run/gpu.h5" "$run/cpu.h5"
two="python -m torch.distributed.run --standalone --nproc-per-node 2" # with synchronised batch norm
if [ "$gpus" -gt 1 ]; then smoke two-gpus "$two" auto; else skip two-gpus "$gpus GPUs, 2 are needed"; fi

declare -A published=([b0]=78.68 [b1]=81.39 [b2]=82.41 [b3]=84.05 [b4]=85.16 [b5]=86.10 [b6]=86.48 [b7]=86.85 [l2]=88.36)
for model in $MODELS; do # published: what timm measured with these files, at the size and crop that they are made for
    out=$OUT/ns-$model
    file=$(ls "${WEIGHTS:-/nowhere}"/tf_efficientnet_"$model"_ns-* 2>/dev/null | head -n 1)
    [ -n "$IMAGENET" ] || { skip "published-$model" "set IMAGENET to a data directory" && continue; }
    step "published-$model" python 01_train_teacher.py --init "${file:-published}" --arch "tf_efficientnet_$model" \
        --epochs 0 --data "$IMAGENET" --out "$out"
    step "top1-$model" top1 "$out" "${published[$model]}"
done
if [ -n "$SVHN" ] && [ "$gpus" -gt 0 ]; then
    out=$OUT/svhn
    step svhn-01 python 01_train_teacher.py @recipes/svhn.txt --ratio 0 --data "$SVHN" --out "$out/teacher"
    step svhn-teacher top1 "$out/teacher" 97.9
    step svhn-02 python 02_pseudo_label.py --teacher "$out/teacher/model.pt" --out "$out/logits.h5"
    step svhn-03 python 03_balance.py "$out/logits.h5" --threshold 0.3 --per-class 53113 --out "$out/balanced.h5"
    step svhn-04 python 04_train_student.py @recipes/svhn.txt --teacher "$out/teacher/model.pt" \
        --pseudo-labels "$out/balanced.h5" --out "$out/student"
    step svhn-student top1 "$out/student" 98.6
else
    skip svhn "set SVHN to its data directory, on a machine with a GPU"
fi
echo "$done steps done, ${#skipped[@]} left out (${skipped[*]:-}), ${#failed[@]} failed (${failed[*]:-})"
[ ${#failed[@]} -eq 0 ]
