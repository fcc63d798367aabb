#!/usr/bin/env bash
# Noisy Student self-training as a shell loop over the stages: teacher -> labels -> balance -> student -> labels -> ...
#   ./run.sh              the whole loop on the drawn demo data; ./run.sh test: the tests
#   ./run.sh DATA         the same on your own folder: train/<class>/, val/<class>/, unlabeled/
# The same command again continues. Settings are variables:  STEPS=5000 ARCHS="resnet18 resnet50" ./run.sh DATA
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) DATA=${1:-data/demo}
SEEDS=${SEEDS:-0}               # "0 1 2 3 4": the whole loop for each; the table is of all of them
ROUNDS=${ROUNDS:-2}             # students, each the next one's teacher
ARCHS=${ARCHS:-efficientnet_b0} # models. A list: the teacher's, then a student's a round; the last one repeats
IMAGE_SIZE=${IMAGE_SIZE:-}      # pixels, such a list; none: 01 chooses the teacher's by its images, the others take it
RATIO=${RATIO:-1}               # unlabelled images for each labelled one; a list, one a round
BATCH=${BATCH:-32}              # labelled images a step of a student; like ARCHS and RATIO in place of RECIPE's
STEPS=${STEPS:-}                # of every training but 05's; none: as the recipe says
EPOCHS=${EPOCHS:-}              # in place of STEPS: a student's passes over the labelled images
INIT=${INIT:-}                  # weights that every model starts from: a file, or published (those of ARCHS)
RECIPE=${RECIPE:-$here/recipes/$([ -z "$INIT" ] && echo small || echo finetune).txt} # flags of 01 and 04
NOISE=${NOISE:-}                # more of them, such as "--num-ops 2 --magnitude 9"
THRESHOLD=${THRESHOLD:-auto}    # of the confidence; auto: chosen on half of val/, 0.3: the paper's for 1,000 classes
RELABEL=${RELABEL:-0}           # 1: each student, alone, relabels what the first labels selected, as in the paper
FIXRES=${FIXRES:-1}             # 0: no fine-tuning of the last student at a quarter more pixels
CONTROL=${CONTROL:-1}           # 0: no control, and a teacher of BATCH images a step, as in the paper
[[ $DATA != -* ]] || { sed -n '2,/^set /s/^# \{0,1\}//p; /^[A-Z_]*=\${/p' "$0" && exit; }
if [ -d "$here/.venv" ] || ! python3 -c "import torch, torchvision, h5py, PIL" 2>/dev/null; then
    [ -d "$here/.venv" ] || python3 -m venv "$here/.venv"; PATH=$here/.venv/bin:$PATH
    python3 -m pip install --quiet -r "$here/requirements.txt" # seconds where all is there
fi
if [ "$DATA" = test ]; then
    python3 -m pip install --quiet -r "$here/tests/requirements.txt"
    exec python3 -m pytest -q -n 2 --dist loadgroup "$here/tests"
fi
NPROC=${NPROC:-$({ nvidia-smi -L || echo GPU; } 2>/dev/null | grep -c ^GPU)} # processes of a stage: GPUs
stage() { # stage FILE FLAGS... --out PATH: on NPROC processes; drawing and selecting are the work of one
    echo "== ${1%.py} ${!#}"
    local launch="-m torch.distributed.run --standalone --nproc-per-node $NPROC"
    [ "$NPROC" != 1 ] && [[ $1 != 0[03]* ]] || launch=
    python3 $launch "$here/$1" "${@:2}"
}
nth() { # nth N LIST...: its entry N, from 0, or the last one
    local list=("${@:2}") && echo "${list[$1]:-${list[*]: -1}}"
}
model() { # model N: the flags of the N-th model, the teacher being 0
    local size=$(nth "$1" $sizes)
    echo "--arch $(nth "$1" $ARCHS) ${size:+--image-size $size}"
}
[ $# -gt 0 ] || stage 00_prepare_data.py demo --out "$DATA"
PYTHONPATH=$here python3 -c "import sys, common; common.unlabeled_images(*sys.argv[1:])" "$DATA/unlabeled" "$DATA" # any?
OUT=${OUT:-runs/$(basename "$(cd "$DATA" && pwd)")} # everything is written below it
corrupt=$(python3 -c "import cv2, scipy" 2>/dev/null && echo --corrupt || echo "no corruptions: pip install scipy opencv-python-headless" >&2)
models=() train=(--data "$DATA" "@$RECIPE" $NOISE --batch-size "$BATCH")
train+=(${STEPS:+--steps $STEPS} ${EPOCHS:+--epochs $EPOCHS} ${INIT:+--init "$INIT"})
for seed in $SEEDS; do
    run=$OUT/seed$seed teacher=$OUT/seed$seed/teacher/model.pt probe=$OUT/seed$seed/probe_full sizes=$IMAGE_SIZE
    ratio=$([ "$CONTROL" = 0 ] && echo 0 || nth 0 $RATIO) # as many images a step as a student, all of them labelled
    stage 01_train_teacher.py "${train[@]}" $(model 0) --ratio "$ratio" --seed "$seed:teacher" --out "$run/teacher"
    [ -n "$sizes" ] || sizes=$(python3 -c "import sys, torch; print(torch.load(sys.argv[1], 'meta')['image_size'])" "$teacher")
    if [ -n "$INIT" ]; then # what one would do without all this: logistic regression on the weights' frozen features
        stage 01_train_teacher.py "${train[@]}" $(model "$ROUNDS") --epochs 0 --out "$run/probe"
        stage 01_train_teacher.py "${train[@]}" --arch "$(nth "$ROUNDS" $ARCHS)" --epochs 0 --own-size --out "$probe"
        stage 02_pseudo_label.py --data "$DATA" --teacher "$probe/model.pt" --unlabeled "$DATA/unlabeled" --out "$probe/labels.h5"
        models+=("$run/probe/model.pt")
        cmp -s "$run"/probe{,_full}/metrics.jsonl || [ $? != 1 ] || models+=("$probe/model.pt") # if they differ
    fi
    models+=("$teacher")
    if [ "$CONTROL" != 0 ]; then # the last student's training without unlabelled images: the fair comparison
        stage 01_train_teacher.py "${train[@]}" $(model "$ROUNDS") --ratio "$(nth $((ROUNDS - 1)) $RATIO)" \
            --seed "$seed:control" --out "$run/control"
        models+=("$run/control/model.pt")
    fi
    for ((round = 1; round <= ROUNDS; round++)); do
        labels=$run/labels$round.h5 selected=$run/selected$round.h5 student=$run/student$round
        if [ "$RELABEL" != 0 ] && [ "$round" != 1 ]; then
            stage 02_pseudo_label.py --data "$DATA" --teacher "$teacher" --unlabeled "$run/selected1.h5" --out "$selected"
        else # with INIT the mean of two teachers: each is sure of other images. A truth only measures the labels
            stage 02_pseudo_label.py --data "$DATA" --teacher "$teacher" --unlabeled "$DATA/unlabeled" --out "$labels"
            truth=$DATA/unlabeled_truth.csv; [ -e "$truth" ] || truth=
            stage 03_balance.py ${INIT:+"$probe/labels.h5"} "$labels" --threshold "$THRESHOLD" \
                ${truth:+--truth "$truth"} ${INIT:+--per-class all} --out "$selected" # balancing cost 1 to 4 points of 60
        fi
        stage 04_train_student.py --pseudo-labels "$selected" "${train[@]}" $(model "$round") \
            --ratio "$(nth $((round - 1)) $RATIO)" --seed "$seed:student$round" ${INIT:+--temperature 0} --out "$student"
        teacher=$student/model.pt models+=("$student/model.pt")
    done
    [ "$FIXRES" != 0 ] || continue
    stage 05_fixres_finetune.py --checkpoint "$teacher" --data "$DATA" --batch-size $((2 * BATCH)) --out "$run/fixres"
    models+=("$run/fixres/model.pt")
done
stage 06_eval_robustness.py "${models[@]}" --data "$DATA" --val-half judge $corrupt --fgsm 2 --num-images 200 --out "$OUT/robustness"
cp "$OUT/robustness/robustness.md" "$OUT/verdict.md"
[ "$CONTROL" != 0 ] || echo "Without a control: what the unlabelled images gave is not known." | tee -a "$OUT/verdict.md"
