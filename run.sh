#!/usr/bin/env bash
# Noisy Student self-training as a shell loop over the stages: teacher -> labels -> balance -> student -> labels -> ...
#
#   ./run.sh              the whole loop on the drawn demo data
#   ./run.sh DATA_DIR     the same on your own folder: train/<class>/, val/<class>/, unlabeled/
#   ./run.sh test         the tests
#
# Without torch a .venv is made first. Interrupted and started again, it continues; a finished stage is not run twice.
# What changes often is a variable:  STEPS=5000 ARCHS="efficientnet_b0 efficientnet_b1" ./run.sh DATA_DIR
set -euo pipefail
data=${1:-}
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; } # macOS has no realpath -m
[ -z "$data" ] || [ "$data" = test ] || data=$(absolute "$data")
[ -z "${INIT:-}" ] || [ "$INIT" = published ] || INIT=$(absolute "$INIT")
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
# Lists: the teacher, then one student a round; the last one repeats.
ARCHS=${ARCHS:-efficientnet_b0}
IMAGE_SIZE=${IMAGE_SIZE:-32}        # pixels; the fine-tuning at the end adds a quarter
RATIO=${RATIO:-3}                   # unlabelled images for each labelled one; the teacher gets as many labelled ones in all
STEPS=${STEPS:-1012}                # of a student; the teacher and the control get as many (54 passes over the demo's labels)
EPOCHS=${EPOCHS:-}                  # passes over the labelled images, in place of STEPS
BATCH=${BATCH:-16}                  # labelled images a step
INIT=${INIT:-}                      # weights that every model starts from: a file, or published (of ARCHS)
RECIPE=${RECIPE:-recipes/$([ -z "$INIT" ] && echo small || echo finetune).txt} # the flags of 01 and 04
NOISE=${NOISE:-}                    # flags after those, such as "--num-ops 2 --magnitude 9"
THRESHOLD=${THRESHOLD:-0.5}         # of the confidence; the paper's 0.3 is for 1,000 classes
RELABEL=${RELABEL:-0}               # 1: each student relabels what the first teacher selected, as in the paper
FIXRES_STEPS=${FIXRES_STEPS:-200}   # of the fine-tuning, for a set as small as the demo; 0: none (a ViT has one size alone)
CONTROL=${CONTROL:-1}               # 0 leaves out the fair comparison: the same training on the labelled images alone
gpus=$(python3 -c "import torch; print(torch.cuda.device_count())")
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))} # processes; on 2 CPU cores one of two threads is faster than two: 27 s against 30
if [ -z "$data" ]; then demo=demo && [ "$SEED" = 0 ] || demo=demo-seed$SEED; fi
data=${data:-data/$demo}
OUT=$(absolute "${OUT:-runs/$(basename "$data")}")

# Small data in minutes is not ImageNet in days. The stages' defaults are the paper's; the recipe says what works here.
# Its flags stand in the commands, so that another recipe is another command.
recipe=$(sed 's/#.*//' "$RECIPE" | xargs)

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
of_round() { # of_round ROUND LIST...: the entry of a round, of which 0 is the teacher's
    local list=("${@:2}")
    echo "${list[$(($1 < ${#list[@]} ? $1 : ${#list[@]} - 1))]}"
}

[ -z "${demo:-}" ] || stage data 00_prepare_data.py demo --out "$data" --seed "$SEED"
images=$(find -L "$data/train" -type f | wc -l)
calc() { awk "BEGIN { printf \"%.12g\", $1 }"; }
epochs() { # epochs ROUND: of a student
    echo "${EPOCHS:-$(calc "$(of_round "$1" $STEPS) * $BATCH / $images")}"
}
train() { # train ROUND BATCH EPOCHS: the flags that all trainings share
    echo "$recipe $NOISE --arch $(of_round "$1" $ARCHS) --image-size $(of_round "$1" $IMAGE_SIZE) --batch-size $2"
    echo "--epochs $3 --eval-every $(calc "int($3 / 5) + 1") ${INIT:+--init $INIT}"
    # 50 steps of warm-up in short runs, if the recipe does not say
    [[ $recipe == *--warmup-epochs* ]] || echo "--warmup-epochs $((50 * $2 / images + 1))"
}
supervised() { # supervised ROUND: as many images in as many steps, with the same noise, as a student of that round
    local parts=$((1 + $(of_round "$1" $RATIO)))
    train "$1" $((BATCH * parts)) "$(calc "$(epochs "$1") * $parts")"
}
truth=""
[ ! -e "$data/unlabeled_truth.csv" ] || truth="--truth $data/unlabeled_truth.csv"

stage teacher 01_train_teacher.py --data "$data" $(supervised 0) --seed "$SEED" --out "$OUT/teacher"
models="$OUT/teacher/model.pt"
if [ "$CONTROL" != 0 ]; then # the last student's architecture, and other random numbers than the teacher's
    stage control 01_train_teacher.py --data "$data" $(supervised "$ROUNDS") --seed $((SEED + 1000)) --out "$OUT/control"
    models="$models $OUT/control/model.pt"
fi
teacher=$OUT/teacher
for round in $(seq "$ROUNDS"); do
    student=$OUT/student$round selection=$OUT/balanced$round.h5 newer=""
    if [ "$RELABEL" = 0 ] || [ "$round" = 1 ]; then
        stage "label$round" 02_pseudo_label.py --teacher "$teacher/model.pt" --unlabeled "$data/unlabeled" --out "$OUT/logits$round.h5"
        stage "balance$round" 03_balance.py "$OUT/logits$round.h5" --threshold "$THRESHOLD" $truth --out "$selection"
    else
        selection=$OUT/balanced1.h5 newer="--logits $OUT/logits$round.h5"
        stage "label$round" 02_pseudo_label.py --teacher "$teacher/model.pt" --only "$selection" --out "$OUT/logits$round.h5"
    fi
    stage "student$round" 04_train_student.py --teacher "$teacher/model.pt" --pseudo-labels "$selection" $newer \
        --data "$data" --ratio "$(of_round "$round" $RATIO)" $(train "$round" "$BATCH" "$(epochs "$round")") \
        --seed $((SEED + 100 * round)) --out "$student"
    teacher=$student models="$models $student/model.pt"
done
# The last student at a larger resolution, untuned and tuned.
size=$(of_round "$ROUNDS" $IMAGE_SIZE) all=$((BATCH * (1 + $(of_round "$ROUNDS" $RATIO))))
if [ "$FIXRES_STEPS" != 0 ]; then
    larger=(--checkpoint "$teacher/model.pt" --image-size $((size * 5 / 4)) --data "$data" --batch-size $all)
    stage untuned 05_fixres_finetune.py "${larger[@]}" --epochs 0 --out "$OUT/untuned"
    stage fixres 05_fixres_finetune.py "${larger[@]}" --epochs $((FIXRES_STEPS * all / images + 1)) --optimizer adamw --lr 1e-3 \
        --schedule cosine --bn-momentum 0.1 --seed "$SEED" --out "$OUT/fixres"
    models="$models $OUT/untuned/model.pt $OUT/fixres/model.pt"
fi
# It keeps what it measured: again, it prints the table in seconds.
python3 06_eval_robustness.py $models --data "$data" --corrupt --fgsm 2 --num-images 500 \
    --out "$OUT/robustness"
