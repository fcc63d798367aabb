#!/usr/bin/env bash
# The runs behind docs/results.md. Interrupted and started again, it continues.
#
#   tests/evidence.sh demo              run.sh as it is, five seeds: does a student beat its control?
#   tests/evidence.sh cifar10 DATA      the same on CIFAR-10 with 4,000 labels, nothing chosen on its test images, and
#                                       the teacher with the recipe before today's
#   tests/evidence.sh claims            what the papers say of noise, labels, selection and order, one arm each, on the demo
#   tests/evidence.sh steady            the demo's teacher alone, with today's recipe and the one before it: the spread
#
# Arms share teacher, labels and number of steps of a seed. Variables: SEEDS, OUT (runs/evidence), ARMS (names; all), and
# those of run.sh. A seed ends with docs/results/NAME/seedN.json, arms that are there already stay in it, and
# docs/results.md is made of these files. Two at a time, each with its own seeds, use two cores best
# (the second once data/demo is drawn):
#
#   OMP_NUM_THREADS=1 SEEDS="0 2 4" taskset -c 0 tests/evidence.sh demo
set -euo pipefail
what=${1:?demo, cifar10, claims or steady}
[ "$what" != cifar10 ] || : "${2:?DATA, the folder of CIFAR-10}"
data=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
COMMIT=$(git rev-parse --short HEAD 2>/dev/null || echo unknown) # of the code that runs, however long it takes
export COMMIT
OUT=${OUT:-runs/evidence}/$what
case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac
[ ! -e .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH

case $what in # the seeds of `steady` are those on which the recipe was found
demo) SEEDS=${SEEDS:-0 1 2 3 4} ;;
cifar10) SEEDS=${SEEDS:-0 1 2 3 4} ;;
claims) SEEDS=${SEEDS:-0 1 2 3 4 5 6 7} ;;
steady) SEEDS=${SEEDS:-100 101 102 103 104 105 106 107 108 109} ;;
*) echo "error: $what: expected demo, cifar10, claims or steady" >&2 && exit 2 ;;
esac
if [ -z "$data" ]; then # the same drawn images for all seeds
    data=data/demo number=0
    [ "$what" != steady ] || data=data/demo-seed100 number=100
    [ -e "$data/unlabeled_truth.csv" ] || python3 00_prepare_data.py demo --out "$data" --seed $number
fi

arm() { # arm NAME COMMAND...: a training into $run/NAME, if ARMS has its name; the last of equal flags counts
    [[ " ${ARMS:-$1} " != *" $1 "* ]] || python3 "${@:2}" --out "$run/$1"
}
claims() { # one round, nothing chosen on val: every arm differs from student1 in what its name says, and in nothing else
    local student control balance labels teacher epochs passes more n=300 # labelled images
    SEEDS=$1 OUT=$run CHOOSE=0 THRESHOLD=${THRESHOLD:-0.5} ROUNDS=1 FIXRES_STEPS=0 TABLE=0 BATCH=32 RATIO=1 ./run.sh "$data"
    student=$(cat "$run/.done/student1") control=$(cat "$run/.done/control") balance=$(cat "$run/.done/balance1")
    student=${student% --out *} control=${control% --out *} balance=${balance% --out *}
    labels="$run/logits1.h5" teacher="$run/teacher/model.pt"
    [[ $student =~ --epochs\ ([0-9.]+) ]] && epochs=${BASH_REMATCH[1]} # of 32 labelled and 32 unlabelled images a step
    select_() { # select_ NAME FLAGS...: another selection of the same labels
        [ -e "$run/$1.h5" ] || python3 $balance "${@:2}" --out "$run/$1.h5"
    }
    arm without-randaugment $student --num-ops 0
    arm without-model-noise $student --dropout 0 --drop-path 0
    arm without-noise $student --num-ops 0 --dropout 0 --drop-path 0
    python3 02_pseudo_label.py --teacher "$teacher" --noised --out "$run/noised.h5"
    [ -e "$run/noised-balanced.h5" ] || python3 ${balance/"$labels"/"$run/noised.h5"} --out "$run/noised-balanced.h5"
    arm noised-teacher $student --pseudo-labels "$run/noised-balanced.h5"
    arm hard-labels $student --temperature 0
    select_ unbalanced --per-class all
    arm unbalanced $student --pseudo-labels "$run/unbalanced.h5"
    select_ share-0.125 --fraction 0.125 --seed "$1"
    arm share-0.125 $student --pseudo-labels "$run/share-0.125.h5"
    # As many images a step, and as many steps of warm-up.
    more="--batch-size 16 --ratio 3 --warmup-epochs $((50 * 16 / n + 1)) --epochs $(python3 -c "print($epochs / 2)")"
    arm ratio-3 $student $more
    arm larger-student $student --arch efficientnet_b1
    arm larger-control $control --arch efficientnet_b1
    arm from-its-teacher $student --init "$teacher"
    # Half of the steps on the selection alone, half on the labelled images: together as many as student1's.
    passes=$(python3 -c "import json, sys
print($epochs * $n / json.load(open(sys.argv[1]))['examples'])" "$run/balanced1.json")
    arm pretrained $student --unlabeled-only --batch-size 64 --epochs "$passes" --eval-every 0
    arm finetuned $control --init "$run/pretrained/model.pt" --epochs "$epochs"
    # The teacher labels the labelled images on the fly, in the control's batches.
    more="--batch-size 64 --warmup-epochs $((50 * 64 / n + 1)) --epochs $(python3 -c "print($epochs * 2)")"
    arm consistency ${student/"--pseudo-labels $run/balanced1.h5"/} --consistency kl --ratio 0 $more
}
steady() { # STEPS steps of 64 labelled images, as run.sh trains a teacher
    local recipe number epochs flags
    recipe=$(sed 's/#.*//' recipes/small.txt | xargs) number=$(find "$data/train/" -type f | wc -l)
    epochs=$(python3 -c "print(${STEPS:-1012} * 64 / $number)")
    flags="--arch efficientnet_b0 --image-size 32 --batch-size 64 --epochs $epochs --eval-every 0 --seed $1"
    flags+=" --warmup-epochs $((50 * 64 / number + 1)) ${NOISE:-}"
    arm before 01_train_teacher.py --data "$data" ${recipe/--classifier-lr 0.03/} --weight-decay 0.02 $flags
    arm classifier-lr 01_train_teacher.py --data "$data" $recipe --weight-decay 0.02 $flags
    arm today 01_train_teacher.py --data "$data" $recipe $flags
}
for seed in $SEEDS; do
    run=$OUT/seed$seed
    case $what in
    demo) SEEDS=$seed OUT=$run ./run.sh "$data" ;;
    cifar10) # the threshold comes from other seeds than these: `choices` in docs/results.md
        SEEDS=$seed OUT=$run CHOOSE=0 THRESHOLD=${THRESHOLD:-0.5} ./run.sh "$data"
        teacher=$(sed 's/--classifier-lr [0-9.]*//; s/ --out .*//' "$run/.done/teacher")
        arm before $teacher --weight-decay 0.02 ;;
    claims) claims "$seed" ;;
    steady) steady "$seed" ;;
    esac
    case $what in # run.sh has measured its own models; what is measured stays measured
    cifar10) python3 06_eval_robustness.py "$run"/{teacher,control,student1,student2,untuned,fixres,before}/model.pt \
        --data "$data" --corrupt --num-images 500 --out "$run/robustness" ;;
    claims) python3 06_eval_robustness.py "$run"/*/model.pt --data "$data" --corrupt --num-images 200 --out "$run/robustness" ;;
    steady) python3 06_eval_robustness.py "$run"/*/model.pt --data "$data" --out "$run/robustness" ;;
    esac
    python3 tests/results.py "$what" "seed$seed" "$run/robustness/robustness.json"
done
