#!/usr/bin/env bash
# Noisy Student self-training as a shell loop over the stages: teacher -> labels -> balance -> student -> labels -> ...
#
#   ./run.sh              the whole loop on the drawn demo data
#   ./run.sh DATA_DIR     the same on your own folder: train/<class>/, val/<class>/, unlabeled/
#   ./run.sh test         the tests
#
# Without torch a .venv is made first. Interrupted and started again, it continues; a finished stage is not run twice.
# What changes often is a variable:  EPOCHS=100 ARCHS="efficientnet_b0 efficientnet_b1" ./run.sh DATA_DIR
set -euo pipefail
data=${1:-}
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; } # macOS has no realpath -m
[ -z "$data" ] || [ "$data" = test ] || data=$(absolute "$data")
cd "$(dirname "$0")"

# ---------------------------------------------------------------------------------------------------- python
new_enough="
import h5py, numpy, PIL, torch, torchvision
from importlib.metadata import version
for name, low in ('torch', (2, 11)), ('torchvision', (0, 26)), ('pillow', (13, 0)):
    assert tuple(map(int, version(name).split('+')[0].split('.')[:2])) >= low
"
packages() { # packages REQUIREMENTS_FILE: a .venv with these packages, unless python3 has torch and all else already
    local stamp=.venv/.installed-${1//\//-}
    if [ ! -e .venv ] && [ "$1" = requirements.txt ] && python3 -c "$new_enough" 2>/dev/null; then return; fi
    [ -e .venv/bin/python ] || python3 -m venv .venv
    if ! cmp -s "$1" "$stamp"; then
        .venv/bin/python -m pip install --quiet -r "$1"
        cp "$1" "$stamp" # an interrupted installation is done again
    fi
}
packages requirements.txt
[ "$data" = test ] && packages tests/requirements.txt
[ -e .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
if [ "$data" = test ]; then exec python3 -m pytest -q -n 2 --dist loadgroup tests; fi

# ---------------------------------------------------------------------------------------------------- settings
SEED=${SEED:-0}
ROUNDS=${ROUNDS:-2}                 # self-training rounds
ARCHS=${ARCHS:-efficientnet_b0}     # the teacher, then one student a round; the last one repeats
IMAGE_SIZE=${IMAGE_SIZE:-32}        # pixels; the fine-tuning at the end adds a quarter
THRESHOLD=${THRESHOLD:-0.5}         # of the confidence; the paper's 0.3 is for 1,000 classes
EPOCHS=${EPOCHS:-54}                # of a student, in passes over the labelled images
FIXRES_STEPS=${FIXRES_STEPS:-200}   # of the fine-tuning, for a set as small as the demo
CONTROL=${CONTROL:-1}               # 0 leaves out the fair comparison: the same training on the labelled images alone
gpus=$(python3 -c "import torch; print(torch.cuda.device_count())")
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))} # processes; on 2 CPU cores one of two threads is faster than two: 27 s against 30
if [ -z "$data" ]; then demo=demo && [ "$SEED" = 0 ] || demo=demo-seed$SEED; fi
data=${data:-data/$demo}
OUT=$(absolute "${OUT:-runs/$(basename "$data")}")

# Small data in minutes is not ImageNet in days. The stages' defaults are the paper's; these work here, and why:
noise="--num-ops 2 --magnitude 5 --min-crop-area 0.7"     # a figure of 20 pixels does not survive the paper's 27 and 0.08
steps="--optimizer adamw --lr 4e-3 --weight-decay 0.02 --schedule cosine" # too few steps for RMSprop and its staircase
start="--zero-init-residual"                              # hundreds of steps earlier out of the plateau at the beginning
average="--average 0.99 --bn-momentum 0.1"                # 0.9999 and 0.01 would still remember the first weights
BATCH=16 RATIO=3 # labelled images a step, unlabelled ones for each; the teacher and the control get as many in all

# ---------------------------------------------------------------------------------------------------- the loop
stage() { # stage NAME COMMAND...: run a stage, unless it was finished with the very same command
    local name=$1 done=$OUT/.done/$1 command=${*:2}
    if [ -e "$done" ]; then
        if [ "$(cat "$done")" = "$command" ]; then echo "done: $name"; return; fi
        echo "error: $OUT/$name was made by another command ($(cat "$done")); choose another OUT or remove it" >&2
        exit 2
    fi
    echo "== $name: $command"
    case "$NPROC $2" in # drawing and selecting are the work of one process
    "1 "* | *" 00_"* | *" 03_"*) python3 "${@:2}" ;;
    *) python3 -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "${@:2}" ;;
    esac
    mkdir -p "$OUT/.done"
    echo "$command" >"$done.new" && mv "$done.new" "$done"
}
archs=($ARCHS)
arch_of() { echo "${archs[$(($1 < ${#archs[@]} ? $1 : ${#archs[@]} - 1))]}"; } # arch_of ROUND; 0 is the teacher

[ -z "${demo:-}" ] || stage data 00_prepare_data.py demo --out "$data" --seed "$SEED"
all=$((BATCH * (1 + RATIO)))
images=$(find -L "$data/train" -type f | wc -l)
warmup() { echo $((50 * $1 / images + 1)); } # 50 steps, in epochs
train="--image-size $IMAGE_SIZE $noise $steps $start $average"
truth=""
[ ! -e "$data/unlabeled_truth.csv" ] || truth="--truth $data/unlabeled_truth.csv"

# The teacher and the control see as many images in as many steps, with the same noise, as a student: a fair comparison.
supervised="--data $data --batch-size $all --epochs $((EPOCHS * (1 + RATIO))) --warmup-epochs $(warmup $all) \
    --eval-every $((EPOCHS * (1 + RATIO) / 5 + 1)) $train"
stage teacher 01_train_teacher.py $supervised --arch "$(arch_of 0)" --seed "$SEED" --out "$OUT/teacher"
models="$OUT/teacher/model.pt"
if [ "$CONTROL" != 0 ]; then # the last student's architecture, and other random numbers than the teacher's
    stage control 01_train_teacher.py $supervised --arch "$(arch_of "$ROUNDS")" --seed $((SEED + 1000)) --out "$OUT/control"
    models="$models $OUT/control/model.pt"
fi
teacher=$OUT/teacher
for round in $(seq "$ROUNDS"); do
    student=$OUT/student$round
    stage "label$round" 02_pseudo_label.py --teacher "$teacher/model.pt" --unlabeled "$data/unlabeled" --out "$OUT/logits$round.h5"
    stage "balance$round" 03_balance.py "$OUT/logits$round.h5" --threshold "$THRESHOLD" $truth --out "$OUT/balanced$round.h5"
    stage "student$round" 04_train_student.py --teacher "$teacher/model.pt" --pseudo-labels "$OUT/balanced$round.h5" \
        --data "$data" --arch "$(arch_of "$round")" --batch-size $BATCH --ratio $RATIO --epochs "$EPOCHS" \
        --warmup-epochs "$(warmup $BATCH)" --eval-every $((EPOCHS / 5 + 1)) $train --seed $((SEED + 100 * round)) --out "$student"
    teacher=$student models="$models $student/model.pt"
done
# At 32 pixels the last feature map is a single one, at 40 it is 2 x 2: more than the head must adapt.
stage fixres 05_fixres_finetune.py --checkpoint "$teacher/model.pt" --image-size $((IMAGE_SIZE * 5 / 4)) --data "$data" \
    --batch-size $all --epochs $((FIXRES_STEPS * all / images + 1)) --frozen-blocks 5 --optimizer adamw --lr 1e-3 --schedule cosine \
    --seed "$SEED" --out "$OUT/fixres"
# It keeps what it measured: again, it prints the table in seconds.
python3 06_eval_robustness.py $models "$OUT/fixres/model.pt" --data "$data" --corrupt --fgsm 2 --num-images 500 \
    --out "$OUT/robustness"
