#!/usr/bin/env bash
# The runs behind docs/results.md. Each finished run is kept; interrupted and started again, it continues.
#
#   tests/evidence.sh demo              run.sh as it is, five seeds: does a student beat its control?
#   tests/evidence.sh cifar10 DATA_DIR  the same on CIFAR-10 with 4,000 labels, nothing chosen on its test images
#   tests/evidence.sh claims            what the papers say of noise, labels, selection and order, one arm each, on the demo
#
# Arms share teacher, labels and number of steps of a seed. Variables: SEEDS, OUT (runs/evidence), ARMS (names; all).
# Each ends with docs/results/NAME.json, and docs/results.md is made of these files: python tests/results.py
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?demo, cifar10 or claims}
OUT=${OUT:-runs/evidence}
[ ! -e .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH

case $what in
demo) SEEDS=${SEEDS:-0 1 2 3 4} OUT=$OUT/demo ./run.sh ;;
cifar10) # STEPS and THRESHOLD come from other seeds than these; see docs/results.md
    SEEDS=${SEEDS:-0 1 2 3 4} OUT=$OUT/cifar10 CHOOSE=0 THRESHOLD=${THRESHOLD:-0.5} STEPS=${STEPS:-6250} ./run.sh "$2" ;;
claims)
    SEEDS=${SEEDS:-0 1 2 3 4 5 6 7}
    # One round, nothing chosen on val: every arm differs from student1 in what its name says, and in nothing else.
    SEEDS=$SEEDS OUT=$OUT/claims CHOOSE=0 THRESHOLD=${THRESHOLD:-0.5} FIXRES_STEPS=0 ./run.sh
    for seed in $SEEDS; do
        run=$OUT/claims/seed$seed
        [[ $SEEDS == *" "* ]] || run=$OUT/claims
        student=$(cat "$run/.done/student1") control=$(cat "$run/.done/control") balance=$(cat "$run/.done/balance1")
        student=${student% --out *} control=${control% --out *} balance=${balance% --out *}
        labels="$run/logits1.h5" teacher="$run/teacher/model.pt"
        arm() { # arm NAME COMMAND...: a training, if ARMS has its name; the last of equal flags counts
            [[ " ${ARMS:-$1} " != *" $1 "* ]] || python3 "${@:2}" --out "$run/$1"
        }
        select_() { # select_ NAME FLAGS...: another selection of the same labels
            [ -e "$run/$1.h5" ] || python3 $balance "${@:2}" --out "$run/$1.h5"
        }
        arm without-randaugment $student --num-ops 0
        arm without-model-noise $student --dropout 0 --drop-path 0
        arm without-noise $student --num-ops 0 --dropout 0 --drop-path 0
        [ -e "$run/noised.h5" ] || python3 02_pseudo_label.py --teacher "$teacher" --noised --out "$run/noised.h5"
        [ -e "$run/noised-balanced.h5" ] || python3 ${balance/"$labels"/"$run/noised.h5"} --out "$run/noised-balanced.h5"
        arm noised-teacher $student --pseudo-labels "$run/noised-balanced.h5"
        arm hard-labels $student --temperature 0
        select_ unbalanced --per-class all
        arm unbalanced $student --pseudo-labels "$run/unbalanced.h5"
        for share in 0.125 0.25 0.5; do
            select_ "share-$share" --fraction $share
            arm "share-$share" $student --pseudo-labels "$run/share-$share.h5"
        done
        arm ratio-1 $student --ratio 1
        arm larger-student $student --arch efficientnet_b1
        arm larger-control $control --arch efficientnet_b1
        arm from-its-teacher $student --init "$teacher"
        # Three quarters of the steps on the selection alone, one on the labelled images: together as many as student1's.
        [[ $student =~ --epochs\ ([0-9.]+) ]] && epochs=${BASH_REMATCH[1]}
        passes=$(python3 -c "import json, os, sys
rows, epochs, folders = json.load(open(sys.argv[1]))['examples'], float(sys.argv[2]), os.walk(sys.argv[3])
print(3 * epochs * sum(len(files) for _, _, files in folders) / rows)" "$run/balanced1.json" "$epochs" data/demo/train)
        arm pretrained $student --unlabeled-only --batch-size 64 --epochs "$passes" --eval-every 0
        arm finetuned $control --init "$run/pretrained/model.pt" --epochs "$epochs"
        arm consistency $student --consistency kl --ratio 0
    done ;;
*) echo "error: $what: expected demo, cifar10 or claims" >&2 && exit 2 ;;
esac
models=()
for model in "$OUT/$what"/{,seed*/}*/model.pt; do [ ! -e "$model" ] || models+=("$model"); done
[ "$what" != claims ] || python3 06_eval_robustness.py "${models[@]}" --data data/demo --corrupt --num-images 500 --out "$OUT/claims/robustness"
python3 tests/results.py "$what" "$OUT/$what/robustness/robustness.json"
