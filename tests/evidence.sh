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
# those of run.sh. A seed ends with docs/results/NAME/seedN.json; arms that are there already stay in it, and
# docs/results.md is made of these files. On two cores run it twice, each with its own seeds (the second one once
# data/demo is drawn):
#
#   OMP_NUM_THREADS=1 SEEDS="0 2 4" taskset -c 0 tests/evidence.sh demo
#
# The arms noised-teacher, share-0.125 and untuned, and the choices on half of val, can be run at commit 790848a.
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
demo | cifar10) SEEDS=${SEEDS:-0 1 2 3 4} ;;
claims) SEEDS=${SEEDS:-0 1 2 3 4 5 6 7} ;;
steady) SEEDS=${SEEDS:-100 101 102 103 104 105 106 107 108 109} ;;
*) echo "error: $what: expected demo, cifar10, claims or steady" >&2 && exit 2 ;;
esac
if [ -z "$data" ]; then # the same drawn images for all seeds
    data=data/demo number=0
    [ "$what" != steady ] || data=data/demo-seed100 number=100
    [ -e "$data/unlabeled_truth.csv" ] || python3 00_prepare_data.py demo --out "$data" --seed $number
fi
train=(--data "$data" @recipes/small.txt --batch-size 32 --ratio 1) # as run.sh trains

arm() { # arm NAME COMMAND...: a training into $run/NAME, if ARMS has its name; the last of equal flags counts
    [[ " ${ARMS:-$1} " != *" $1 "* ]] || python3 "${@:2}" --out "$run/$1"
}
claims() { # one round, nothing chosen on val: every arm differs from student1 in what its name says, and in nothing else
    local steps=${STEPS:-1000} teacher=$run/teacher/model.pt
    SEEDS=$seed OUT=$base THRESHOLD=0.5 ROUNDS=1 FIXRES=0 STEPS=$steps ./run.sh "$data"
    local base_student=(04_train_student.py "${train[@]}" --steps "$steps" --seed "$seed:student1")
    local control=(01_train_teacher.py "${train[@]}" --steps "$steps" --seed "$seed:control")
    local student=("${base_student[@]}" --pseudo-labels "$run/selected1.h5")
    arm without-randaugment "${student[@]}" --num-ops 0
    arm without-model-noise "${student[@]}" --dropout 0 --drop-path 0
    arm without-noise "${student[@]}" --num-ops 0 --dropout 0 --drop-path 0
    arm hard-labels "${student[@]}" --temperature 0
    python3 03_balance.py "$run/labels1.h5" --threshold 0.5 --per-class all --out "$run/unbalanced.h5"
    arm unbalanced "${base_student[@]}" --pseudo-labels "$run/unbalanced.h5"
    # As many images a step, and as many steps of warm-up.
    arm ratio-3 "${student[@]}" --batch-size 16 --ratio 3 --warmup-epochs 2.5
    arm larger-student "${student[@]}" --arch efficientnet_b1
    arm larger-control "${control[@]}" --arch efficientnet_b1
    arm from-its-teacher "${student[@]}" --init "$teacher"
    # Half of the steps on the selection alone, half on the labelled images: together as many as student1's.
    arm pretrained "${student[@]}" --unlabeled-only --batch-size 64 --steps $((steps / 2)) --warmup-epochs 1 --eval-every 0
    arm finetuned "${control[@]}" --init "$run/pretrained/model.pt" --steps $((steps / 2))
    # The teacher labels the labelled images on the fly, in the control's batches.
    arm consistency "${base_student[@]}" --teacher "$teacher" --consistency kl --ratio 0 --batch-size 64 --warmup-epochs 10
}
measure() { # measure FLAGS...: all models of the seed on all of val
    results=$run/robustness
    python3 06_eval_robustness.py "$run"/*/model.pt --data "$data" "$@" --out "$results"
}
for seed in $SEEDS; do
    base=$OUT/$seed run=$OUT/$seed/seed$seed
    teacher=(01_train_teacher.py "${train[@]}" --seed "$seed:teacher" --eval-every 0)
    case $what in
    demo)
        SEEDS=$seed OUT=$base ./run.sh "$data"
        results=$base/robustness ;; # of the half of val on which nothing was chosen
    cifar10) # the threshold comes from other seeds than these: `choices` in docs/results.md
        SEEDS=$seed OUT=$base THRESHOLD=0.5 ./run.sh "$data"
        arm before "${teacher[@]}" --classifier-lr 1 --weight-decay 0.02
        measure --corrupt --num-images 500 ;;
    claims)
        claims
        measure --corrupt --num-images 200 ;;
    steady)
        arm before "${teacher[@]}" --classifier-lr 1 --weight-decay 0.02
        arm classifier-lr "${teacher[@]}" --weight-decay 0.02
        arm today "${teacher[@]}"
        measure ;;
    esac
    python3 tests/results.py "$what" "seed$seed" "$results/robustness.json"
done
