#!/usr/bin/env bash
# Noisy Student self-training as a shell loop over the stages: teacher -> labels -> balance -> student -> labels -> ...
#
#   ./run.sh              the whole loop on the drawn demo data
#   ./run.sh DATA         the same on your own folder: train/<class>/, val/<class>/, unlabeled/
#   ./run.sh test         the tests
#
# Without torch a .venv is made first. The same command again continues: each stage goes on where it stopped, and a
# finished one says so. Settings are variables:  STEPS=5000 ARCHS="efficientnet_b0 efficientnet_b1" ./run.sh DATA
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
DATA=${1:-data/demo}

SEEDS=${SEEDS:-0}               # "0 1 2 3 4": the whole loop for each; the table is of all of them
ROUNDS=${ROUNDS:-2}             # students, each the next one's teacher
ARCHS=${ARCHS:-efficientnet_b0} # models. A list: the teacher's, then a student's a round; the last one repeats
IMAGE_SIZE=${IMAGE_SIZE:-}      # pixels, such a list; none: 01 takes the images' size, a student its teacher's
RATIO=${RATIO:-1}               # unlabelled images for each labelled one; a list, one a round
BATCH=${BATCH:-32}              # labelled images a step of a student
STEPS=${STEPS:-}                # of every training; none: as the recipe says
EPOCHS=${EPOCHS:-}              # in place of STEPS: a student's passes over the labelled images
INIT=${INIT:-}                  # weights that every model starts from: a file, or published (those of ARCHS)
RECIPE=${RECIPE:-$here/recipes/$([ -z "$INIT" ] && echo small || echo finetune).txt} # flags of 01 and 04
NOISE=${NOISE:-}                # more of them, such as "--num-ops 2 --magnitude 9"
THRESHOLD=${THRESHOLD:-auto}    # of the confidence; auto: chosen on half of val/, 0.3: the paper's for 1,000 classes
RELABEL=${RELABEL:-0}           # 1: each student relabels what the first teacher's labels selected, as in the paper
FIXRES=${FIXRES:-1}             # 0: no fine-tuning of the last student at a quarter more pixels
CONTROL=${CONTROL:-1}           # 0: no control, and a teacher of BATCH images a step, as in the paper
if [ "$DATA" = --help ]; then sed -n '2,/^CONTROL=/s/^# \{0,1\}//p; /^[A-Z]*=/p' "$0"; exit; fi

if [ -d "$here/.venv" ] || ! python3 -c "import torch, torchvision, h5py, PIL" 2>/dev/null; then
    [ -d "$here/.venv" ] || python3 -m venv "$here/.venv"
    PATH=$here/.venv/bin:$PATH
    python3 -m pip install --quiet -r "$here/requirements.txt" # seconds where all is there
fi
if [ "$DATA" = test ]; then
    python3 -m pip install --quiet -r "$here/tests/requirements.txt"
    exec python3 -m pytest -q -n 2 --dist loadgroup "$here/tests"
fi
gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))} # processes of a stage

stage() { # stage FILE FLAGS... --out PATH: on NPROC processes; drawing and selecting are the work of one
    echo "== ${1%.py} ${!#}"
    case "$NPROC $1" in
    "1 "* | *" 00_"* | *" 03_"*) python3 "$here/$1" "${@:2}" ;;
    *) python3 -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$here/$1" "${@:2}" ;;
    esac
}
nth() { # nth N LIST...: its entry N, from 0, or the last one
    local list=("${@:2}")
    [ $# = 1 ] || echo "${list[$(($1 < ${#list[@]} ? $1 : ${#list[@]} - 1))]}"
}
model() { # model N: the flags of the N-th model, the teacher being 0
    local size=$(nth "$1" $IMAGE_SIZE)
    echo "--arch $(nth "$1" $ARCHS) ${size:+--image-size $size}"
}

[ $# -gt 0 ] || stage 00_prepare_data.py demo --out "$DATA"
[ -d "$DATA/unlabeled" ] || { echo "error: $DATA has no folder unlabeled/ of images without labels" >&2 && exit 2; }
OUT=${OUT:-runs/$(basename "$(cd "$DATA" && pwd)")} # everything is written below it
corrupt=$(python3 -c "import cv2, scipy" 2>/dev/null && echo --corrupt || echo "scipy or OpenCV is missing: no corruptions" >&2)
train=(--data "$DATA" "@$RECIPE" $NOISE --batch-size "$BATCH") # what all trainings have in common
[ -z "$INIT" ] || train+=(--init "$INIT")
[ -z "$STEPS" ] || train+=(--steps "$STEPS")
[ -z "$EPOCHS" ] || train+=(--epochs "$EPOCHS")
models=()
for seed in $SEEDS; do
    run=$OUT/seed$seed
    # With --ratio a step has as many images as a student's, all of them labelled.
    ratio=$([ "$CONTROL" = 0 ] && echo 0 || nth 0 $RATIO)
    stage 01_train_teacher.py "${train[@]}" $(model 0) --ratio "$ratio" --seed "$seed:teacher" --out "$run/teacher"
    teacher=$run/teacher/model.pt models+=("$run/teacher/model.pt")
    if [ "$CONTROL" != 0 ]; then # the last student's training without unlabelled images: the fair comparison
        stage 01_train_teacher.py "${train[@]}" $(model "$ROUNDS") --ratio "$(nth $((ROUNDS - 1)) $RATIO)" \
            --seed "$seed:control" --out "$run/control"
        models+=("$run/control/model.pt")
    fi
    for ((round = 1; round <= ROUNDS; round++)); do
        labels=$run/labels$round.h5 selected=$run/selected$round.h5 truth=$DATA/unlabeled_truth.csv
        if [ "$RELABEL" != 0 ] && [ "$round" != 1 ]; then
            stage 02_pseudo_label.py --teacher "$teacher" --unlabeled "$run/selected1.h5" --out "$selected"
        else
            stage 02_pseudo_label.py --teacher "$teacher" --unlabeled "$DATA/unlabeled" --out "$labels"
            [ -e "$truth" ] && truth=(--truth "$truth") || truth=() # it measures the labels, and chooses nothing
            stage 03_balance.py "$labels" --threshold "$THRESHOLD" ${truth[@]+"${truth[@]}"} --out "$selected"
        fi
        stage 04_train_student.py --pseudo-labels "$selected" "${train[@]}" $(model "$round") \
            --ratio "$(nth $((round - 1)) $RATIO)" --seed "$seed:student$round" --out "$run/student$round"
        teacher=$run/student$round/model.pt models+=("$run/student$round/model.pt")
    done
    if [ "$FIXRES" != 0 ]; then # as many images a step as a student of RATIO 1
        stage 05_fixres_finetune.py --checkpoint "$teacher" --data "$DATA" --batch-size $((2 * BATCH)) --out "$run/fixres"
        models+=("$run/fixres/model.pt")
    fi
done
stage 06_eval_robustness.py "${models[@]}" --data "$DATA" --val-half judge $corrupt --fgsm 2 --num-images 500 \
    --out "$OUT/robustness" # the table, and what the last student gained over the control
if [ -e "$OUT/robustness/verdict.md" ]; then cp "$OUT/robustness/verdict.md" "$OUT/verdict.md"; fi
