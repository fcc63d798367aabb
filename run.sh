#!/usr/bin/env bash
# Noisy Student self-training as a shell loop over the stages: teacher -> labels -> balance -> student -> labels -> ...
#
#   ./run.sh              the whole loop on the drawn demo data
#   ./run.sh DATA_DIR     the same on your own folder: train/<class>/, val/<class>/, unlabeled/
#   ./run.sh test         the tests
#
# Without torch a .venv is made first. Interrupted and started again, it continues; a finished stage is not run twice.
# What changes often is a variable:  STEPS=5000 ARCHS="efficientnet_b0 efficientnet_b1" ./run.sh DATA_DIR
# With SEEDS="0 1 2 3 4" the whole loop runs once for each, into OUT/seed0 ..., and the table is of all of them.
# What is not set is chosen for the images, and it says what and why.
set -euo pipefail # all of this in bash 3.2 too: macOS has no newer one
data=${1:-}
if [ "$data" = --help ] || [ "$data" = -h ]; then # the head of this file and its settings
    sed -n -e '2,/^set /s/^# \{0,1\}//p' -e '/^SEEDS=/,/^NPROC=/s/^\([A-Z_]*=\)${[A-Z_]*:-\(.*\)}  */\1\2   /p' "$0" |
        sed -e 's/^SEEDS=[^ ]*/SEEDS=0/' -e 's/^OUT=[^#]*#/OUT=runs\/<folder of the data>   #/' -e 's/^NPROC=[^#]*#/NPROC=<GPUs, or 1>   #/'
    exit
fi
absolute() { # macOS has no realpath -m; a slash at the end would make it another command
    local path=$1
    case $path in /*) ;; *) path=$PWD/$path ;; esac
    while [ "$path" != / ] && [ "$path" != "${path%/}" ]; do path=${path%/}; done
    echo "$path"
}
[ -z "$data" ] || [ "$data" = test ] || data=$(absolute "$data")
[ ! -d "$data" ] || data=$(cd "$data" && pwd) # of . the name
[ -z "${INIT:-}" ] || [ "$INIT" = published ] || INIT=$(absolute "$INIT")
[ -z "${OUT:-}" ] || OUT=$(absolute "$OUT")
[ ! -e "${RECIPE:-}" ] || RECIPE=$(absolute "$RECIPE") # else one of this folder
cd "$(dirname "$0")"

# ---------------------------------------------------------------------------------------------------- python
floors='
import sys
if sys.version_info < (3, 11):
    sys.exit("error: Python %d.%d was found, 3.11 or newer is needed: put one first in PATH" % sys.version_info[:2])
from importlib.metadata import distributions
found, short = {package.name.lower(): package.version for package in distributions() if package.name}, 0
for name, low in ("torch", "2.11"), ("torchvision", "0.26"), ("pillow", "13.0"), ("numpy", "1.0"), ("h5py", "3.0"):
    if name not in found or [*map(int, found[name].split(".")[:2])] < [*map(int, low.split("."))]:
        words, short = (name, found.get(name, "none"), low, sys.executable, name, low), 3
        print("%s: %s was found, %s or newer is needed: %s -m pip install \"%s>=%s\"" % words, file=sys.stderr)
sys.exit(short)'
packages() { # packages REQUIREMENTS_FILE: a .venv with these packages, unless python3 has torch and all else already
    local stamp=.venv/.installed-${1//\//-} short=0
    if [ ! -e .venv/bin/python ]; then
        python3 -c "$floors" || short=$?
        if [ $short = 0 ] && [ "$1" = requirements.txt ]; then return; fi
        [ $short = 0 ] || [ $short = 3 ] || exit 2 # the line above says why
        echo "$1 is installed into .venv" >&2
        python3 -m venv .venv
    fi
    if ! cmp -s "$1" "$stamp"; then
        .venv/bin/python -m pip install --quiet -r "$1"
        cp "$1" "$stamp" # an interrupted installation is done again
    fi
}
packages requirements.txt
[ "$data" = test ] && packages tests/requirements.txt
[ ! -e .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
python3 -c "$floors" || exit 2
if [ "$data" = test ]; then exec python3 -m pytest -q -n 2 --dist loadgroup tests; fi

# ---------------------------------------------------------------------------------------------------- settings
SEEDS=${SEEDS:-${SEED:-0}}          # several: the whole loop for each, on the same data
ROUNDS=${ROUNDS:-2}                 # self-training rounds
CHOOSE=${CHOOSE:-1}                 # 0: nothing is chosen on val; THRESHOLD is 0.5, the last student teaches the next one
ARCHS=${ARCHS:-efficientnet_b0}     # the models. Lists: the teacher's, then a student's a round; the last one repeats
IMAGE_SIZE=${IMAGE_SIZE:-}          # pixels, chosen for the images; the fine-tuning at the end adds a quarter
RATIO=${RATIO:-1}                   # unlabelled images for each labelled one; a step of the teacher has BATCH x (1 + RATIO) labelled ones
STEPS=${STEPS:-}                    # of a student, chosen for the images; the teacher and the control get as many
EPOCHS=${EPOCHS:-}                  # a student's passes over the labelled images, in place of STEPS
BATCH=${BATCH:-32}                  # labelled images a step
INIT=${INIT:-}                      # weights that every model starts from: a file, or published (of ARCHS)
RECIPE=${RECIPE:-}                  # the flags of 01 and 04, chosen for the images
NOISE=${NOISE:-}                    # flags after those, such as "--num-ops 2 --magnitude 9"
THRESHOLD=${THRESHOLD:-}            # of the confidence, chosen in each round; the paper's 0.3 is for 1,000 classes
RELABEL=${RELABEL:-0}               # 1: each student relabels what the first teacher selected, as in the paper
FIXRES_STEPS=${FIXRES_STEPS:-200}   # of the fine-tuning, for a set as small as the demo; 0: none (a ViT has one size alone)
CONTROL=${CONTROL:-1}               # 0 leaves out the fair comparison: the same training on the labelled images alone
numbers() { # numbers PATTERN NAME...: a setting with another word in it ends the run
    local name word
    for name in "${@:2}"; do
        for word in ${!name}; do
            [[ ! $word =~ ^($1)$ ]] || continue
            echo "error: $name=${!name}: $word is not such a number; lists have spaces between their numbers" >&2
            exit 2
        done
    done
}
numbers '0|[1-9][0-9]*' SEEDS ROUNDS BATCH IMAGE_SIZE
numbers '[0-9]+|[0-9]*[.][0-9]+' STEPS EPOCHS RATIO FIXRES_STEPS
SEEDS=$(echo $SEEDS) SEED=${SEEDS%% *}
several=$([ "$SEEDS" = "$SEED" ] || echo yes)
demo_seed=$([ -n "$several" ] && echo 0 || echo "$SEED")
if [ -z "$data" ]; then demo=demo$([ "$demo_seed" = 0 ] || echo "-seed$demo_seed"); fi
data=${data:-data/$demo}
OUT=${OUT:-$PWD/runs/$(basename "$data")}  # where everything is written

latest="" # the mark of the stage before: what is older than it may rest on what is gone, and asks its stage again
stage() { # stage NAME COMMAND...: run a stage, unless it was finished with the very same command
    local name=$1 done=$OUT/.done/$1 before=$latest command=${*:2}
    latest=$done
    if [ -e "$done" ] && [ -e "${!#}" ]; then # each command ends with the path of what it writes
        if [ "$(cat "$done")" != "$command" ]; then
            echo "error: ${!#} was made by another command ($(cat "$done")); choose another OUT or remove it" >&2
            exit 2
        fi
        if [ ! "$before" -nt "$done" ]; then echo "done: $name"; return; fi
    fi
    echo "== $name: $command"
    case "${NPROC:-1} $2" in # drawing and selecting are the work of one process
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
calc() { LC_ALL=C awk "BEGIN { printf \"%.12g\", $1 }"; } # elsewhere some awks print 3,5

# ---------------------------------------------------------------------------------------------------- choices
[ -z "${demo:-}" ] || stage data 00_prepare_data.py demo --seed "$demo_seed" --out "$data"
look='
import contextlib, io, sys, warnings, numpy, torch, PIL.Image
from common import judged_half, labeled_images
with contextlib.redirect_stdout(io.StringIO()): # the stages will say it
    train, _, classes = labeled_images(sys.argv[1], "train")
    judged, sides = judged_half(labeled_images(sys.argv[1], "val", classes)[0]), [0]
warnings.simplefilter("ignore")
for row in numpy.linspace(0, len(train) - 1, 300).astype(int):
    with contextlib.suppress(Exception), train.open(row) as file: # the stages count what is unreadable
        sides.append(min(PIL.Image.open(file).size))
print(torch.cuda.device_count(), len(train), int(numpy.median(sides[1:] or sides)), (~judged).sum(), judged.sum())'
found=$(python3 -c "$look" "$data")
read -r gpus images side num_choose num_judge <<<"$found"
if [ -z "$(find -L "$data/unlabeled" -type f 2>/dev/null | head -n 1)" ]; then
    echo "error: $data: no folder unlabeled/ with images that have no label" >&2
    exit 2
fi
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))} # processes; on 2 CPU cores one of two threads is faster than two: 27 s against 30

if [ -z "$IMAGE_SIZE" ]; then
    most=224 why=""
    [ -n "$INIT" ] || [ "$gpus" != 0 ] || most=64 why=", at most 64 without INIT and without a GPU"
    IMAGE_SIZE=$((side < 64 ? 32 : side < most ? side / 32 * 32 : most))
    echo "IMAGE_SIZE=$IMAGE_SIZE: the labelled images' short side is $side in the median; 32 to 224 in steps of 32$why"
fi
# The length, in one place: 1,012 steps up to 300 labelled images (measured on the demo), then with the power 3/4 of
# their number up to ten times as many. With 4,000 of CIFAR-10 students passed their control at 11,085 steps, not yet at
# 3,695 (docs/results.md). So many passes as for 300 are too few for 100, and a week for 30,000.
if [ -z "$STEPS$EPOCHS" ]; then
    STEPS=$(calc "int(1012 * ($images < 300 ? 1 : $images > 6463 ? 10 : ($images / 300)^0.75))")
    echo "STEPS=$STEPS: for $images labelled images, $BATCH a step: $(calc "int($STEPS * $BATCH / $images)") passes"
fi
crop=${crop:-}
if [ -z "$RECIPE" ]; then
    RECIPE=recipes/finetune.txt why="from INIT's weights"
    [ -n "$INIT" ] || RECIPE=recipes/small.txt why="from scratch" crop="--min-crop-area 0.08" # above 64 pixels: the paper's
    echo "RECIPE=$RECIPE: $why"
fi
recipe=$(sed 's/#.*//' "$RECIPE" | xargs) # stands in the commands, so that another recipe is another command
if [ "$CHOOSE" != 0 ] && [ $((num_choose < num_judge ? num_choose : num_judge)) -lt 20 ]; then
    CHOOSE=0 why="THRESHOLD=${THRESHOLD:-0.5}, and the last student teaches the next one"
    echo "CHOOSE=0: half of the $((num_choose + num_judge)) images in val is too few to choose on: $why"
fi
judge=""
if [ "$CHOOSE" != 0 ]; then
    judge="--val-half judge" why="the next teacher and, if not given, THRESHOLD: of those that leave two thirds of val"
    why="$why the lowest above which 90 percent are right, else that with the largest share right"
    echo "CHOOSE=$CHOOSE: on $num_choose images of val, $why; the other $num_judge judge in the table"
fi
better='import json, sys
top1 = {path: results["clean"]["top1"] for path, results in json.load(open(sys.argv[1])).items()}
old, new = (top1[path] for path in sys.argv[2:])
print("old" if old > new else "new", f"{new:.2f} percent against {old:.2f}")'

# ---------------------------------------------------------------------------------------------------- several seeds
table() { # table MODELS...: it keeps what it measured, so that again it takes seconds; the verdict beside the results
    python3 06_eval_robustness.py "$@" --data "$data" --corrupt --fgsm 2 --num-images 500 $judge --out "$OUT/robustness"
    rm -f "$OUT/verdict.md"
    if [ -e "$OUT/robustness/verdict.md" ]; then
        cp "$OUT/robustness/verdict.md" "$OUT/verdict.md"
    else
        echo "no verdict: it needs a control and a student (CONTROL=$CONTROL ROUNDS=$ROUNDS)"
    fi
}
if [ -n "$several" ]; then
    export IMAGE_SIZE STEPS RECIPE CHOOSE NPROC crop
    models=() names=(teacher control)
    for ((round = 1; round <= ROUNDS; round++)); do names+=("student$round"); done
    for seed in $SEEDS; do
        SEEDS=$seed OUT=$OUT/seed$seed TABLE=0 bash run.sh "$data"
        for name in "${names[@]}" untuned fixres; do
            [ ! -e "$OUT/seed$seed/$name/model.pt" ] || models+=("$OUT/seed$seed/$name/model.pt")
        done
    done
    table "${models[@]}"
    exit
fi

# ---------------------------------------------------------------------------------------------------- the loop
epochs() { # epochs ROUND: of a student
    echo "${EPOCHS:-$(calc "$(of_round "$1" $STEPS) * $BATCH / $images")}"
}
train() { # train ROUND BATCH EPOCHS: the flags that all trainings share
    local size=$(of_round "$1" $IMAGE_SIZE)
    echo "$recipe $([ "$size" -le 64 ] || echo "$crop") $NOISE --arch $(of_round "$1" $ARCHS) --image-size $size"
    echo "--batch-size $2 --epochs $3 --eval-every $(calc "int($3 / 5) + 1")"
    # 50 steps of warm-up in short runs, if the recipe does not say
    [[ $recipe == *--warmup-epochs* ]] || echo "--warmup-epochs $(calc "int(50 * $2 / $images) + 1")"
}
images_a_step() { # images_a_step ROUND: of a student, labelled and unlabelled; 04 rounds so too, a half to the even number
    echo $((BATCH + $(LC_ALL=C printf %.0f "$(calc "$BATCH * $(of_round "$1" $RATIO)")")))
}
supervised() { # supervised ROUND: as many images in as many steps, with the same noise, as a student of that round
    local all=$(images_a_step "$1")
    train "$1" "$all" "$(calc "$(epochs "$1") * $all / $BATCH")"
}
init=()
[ -z "$INIT" ] || init=(--init "$INIT")

flags=$(supervised 0) # set -e sees a mistake in an assignment, not in an argument
stage teacher 01_train_teacher.py --data "$data" $flags ${init[@]+"${init[@]}"} --seed "$SEED" --out "$OUT/teacher"
models=("$OUT/teacher/model.pt")
if [ "$CONTROL" != 0 ]; then # the last student's architecture, and other random numbers than the teacher's
    flags=$(supervised "$ROUNDS")
    stage control 01_train_teacher.py --data "$data" $flags ${init[@]+"${init[@]}"} --seed $((SEED + 1000)) \
        --out "$OUT/control"
    models+=("$OUT/control/model.pt")
fi
choose() { # choose NAME OLD NEW: `next`, old or new: which model is right on more of the half to choose on, and `why`
    stage "$1" 06_eval_robustness.py "$2" "$3" --data "$data" --val-half choose --out "$OUT/choice"
    found=$(python3 -c "$better" "$OUT/choice/robustness.json" "$2" "$3")
    read -r next why <<<"$found"
}

teacher=$OUT/teacher student=$OUT/teacher labeled_by="" taught=""
for ((round = 1; round <= ROUNDS; round++)); do
    student=$OUT/student$round logits=$OUT/logits$round.h5 val=$OUT/val$round.h5
    if [ "$RELABEL" != 0 ] && [ "$round" != 1 ]; then
        labels=(--pseudo-labels "$selection" --logits "$logits")
        stage "label$round" 02_pseudo_label.py --teacher "$teacher/model.pt" --only "$selection" --out "$logits"
    elif [ "$labeled_by" != "$teacher" ]; then # one that teaches again has labelled already
        selection=$OUT/balanced$round.h5 labeled_by=$teacher rule=(--threshold "${THRESHOLD:-0.5}")
        labels=(--pseudo-labels "$selection")
        stage "label$round" 02_pseudo_label.py --teacher "$teacher/model.pt" --unlabeled "$data/unlabeled" --out "$logits"
        if [ "$CHOOSE" != 0 ] && [ -z "$THRESHOLD" ]; then
            stage "val$round" 02_pseudo_label.py --teacher "$teacher/model.pt" --unlabeled "$data/val" --out "$val"
            rule=(--calibration "$val" --val-half choose --min-precision 0.9 --min-share 0.67)
        fi
        [ ! -e "$data/unlabeled_truth.csv" ] || rule+=(--truth "$data/unlabeled_truth.csv")
        stage "balance$round" 03_balance.py "$logits" "${rule[@]}" --out "$selection"
    fi
    flags=$(train "$round" "$BATCH" "$(epochs "$round")")
    stage "student$round" 04_train_student.py --teacher "$teacher/model.pt" "${labels[@]}" \
        --data "$data" --ratio "$(of_round "$round" $RATIO)" $flags ${init[@]+"${init[@]}"} \
        --seed $((SEED + 100 * round)) --out "$student"
    models+=("$student/model.pt") both=("$teacher/model.pt" "$student/model.pt") next=student
    taught="$taught, student$round by $(basename "$teacher")"
    if [ "$CHOOSE" != 0 ] && [ "$round" -lt "$ROUNDS" ]; then
        choose "choice$round" "${both[@]}"
        [ "$next" = old ] && next=teacher || next=student
        echo "the $next of round $round teaches in round $((round + 1)): student$round has $why of its teacher"
    fi
    [ "$next" = teacher ] || teacher=$student
done
# The last student at a larger resolution, untuned and tuned.
size=$(of_round "$ROUNDS" $IMAGE_SIZE) all=$(images_a_step "$ROUNDS")
if [ "$FIXRES_STEPS" != 0 ]; then
    larger=(--checkpoint "$student/model.pt" --image-size $((size * 5 / 4)) --data "$data" --batch-size $all)
    stage untuned 05_fixres_finetune.py "${larger[@]}" --epochs 0 --out "$OUT/untuned"
    tuned=$(calc "int($FIXRES_STEPS * $all / $images) + 1") # passes
    stage fixres 05_fixres_finetune.py "${larger[@]}" --epochs "$tuned" --optimizer adamw --lr 1e-3 \
        --schedule cosine --bn-momentum 0.1 --seed "$SEED" --out "$OUT/fixres"
    models+=("$OUT/untuned/model.pt" "$OUT/fixres/model.pt")
fi
[ -z "$taught" ] || echo "Taught: ${taught#, }."
result=$student/model.pt why=""
if [ "$FIXRES_STEPS" != 0 ] && [ "$CHOOSE" != 0 ]; then
    choose choice "$result" "$OUT/fixres/model.pt"
    [ "$next" = old ] || result=$OUT/fixres/model.pt
    why=": fixres has $why of $(basename "$student")"
elif [ "$FIXRES_STEPS" != 0 ]; then
    why=", or $OUT/fixres/model.pt where that is better (CHOOSE=0)"
fi
echo "The result is $result$why."
[ "${TABLE:-1}" = 0 ] || table "${models[@]}"
