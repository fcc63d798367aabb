"""Stage 01: train the teacher, an ordinary supervised classifier, with the noise of its student.

The teacher minimizes, over the labelled images x_i and the parameters of f,

    (1/n) sum_i CE(y_i, f_noised(x_i))

RandAugment noises the input, dropout and stochastic depth noise the model (Xie et al., 1911.04252,
algorithm 1, step 1). What is kept is the running average of the weights. What the paper adds is the
difference to 04's loop, from `# Train.` on. With --ratio the same command trains the student's
control: the labels alone, in equal steps.

reads   DATA/train, DATA/val; --init: weights to start from, of this toolkit, torchvision or timm
writes  OUT/model.pt (hand-off), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b0
    torchrun --nproc-per-node 8 01_train_teacher.py --data DATA --arch efficientnet_b7
    python 01_train_teacher.py --init b7.pth --arch tf_efficientnet_b7 --epochs 0 --classes FILE
"""

import argparse
import contextlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import add_model_flags, add_optimization_flags, add_run_flags, argument_parser  # program
from common import at_least, fail, print0
from common import init_processes  # processes
from common import build_model  # models
from common import fixes_size, head_names, initial_weights, own_names  # weights
from common import normalize, view_of  # views
from common import ImageList, check_copies, labeled_images, nfc  # listing
from common import check_parts  # batches
from common import plan_of  # optimization
from common import compare_inputs, previous_run  # checkpoints
from common import model_of, setup_of  # training
from common import Run  # the training run


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="directory with train/<class>/, maybe val/<class>/")
    add("--out", type=Path, default=Path("runs/teacher"), help="results; run again to resume")
    add("--classes", type=Path, help="with --init --epochs 0: names of the outputs, one a line")
    add("--ratio", type=at_least(0), default=0.0, help="for a control: extra images per image of the batch")
    add("--own-size", action="store_true", help="the image size of the weights, whatever --image-size")
    add_model_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    return parser.parse_args()


def output_names(args: argparse.Namespace) -> list[str]:
    """The names of foreign weights' outputs: the lines of --classes, or the folders of DATA."""
    if args.classes:
        try:
            return nfc(args.classes.read_text("utf-8-sig")).splitlines()
        except (OSError, ValueError) as error:
            fail(f"--classes {args.classes}: expected a text file, one class a line ({error})")
    names = labeled_images(args.data, "train" if (args.data / "train").is_dir() else "val")[2]
    if all(name.isdecimal() for name in names):
        fail(f"--classes: the folders of {args.data} are numbers, maybe not the outputs' own order")
    print0(f"the outputs are called as the folders of {args.data}: {', '.join(names[:5])} ...")
    return names


def is_probe(args: argparse.Namespace, initial: dict) -> bool:
    """Whether DATA/train has other classes than the weights: --epochs 0 then fits a classifier."""
    if args.classes or not args.data or not (args.data / "train").is_dir():
        return False
    names = labeled_images(args.data, "train")[2]
    if "classes" in initial:
        return set(names) != set(initial["classes"])
    try:
        model = build_model(initial["arch"])
        weights = own_names(initial, model.state_dict())
    except ValueError as error:
        fail(f"--init {args.init} does not fit --arch {initial['arch']}: {error}")
    return len(weights.get(f"{head_names(model)[0]}.weight", ())) != len(names)


def labeled_data(args: argparse.Namespace, initial: dict) -> tuple:
    """(images and labels of train, those of val, classes). With --epochs 0 train may be empty."""
    trains = not args.init or 0 not in (args.epochs, args.steps)
    if trains and args.classes:
        fail("--classes names the outputs of --init with --epochs 0; a training's classes are its folders")
    if not args.data and (trains or not (args.classes or "classes" in initial)):
        fail("--data: where is train/? Only --init --epochs 0 --classes FILE needs no data")
    if trains or is_probe(args, initial):
        *train, classes = labeled_images(args.data, "train")
        return train, labeled_images(args.data, "val", classes)[:2], classes
    nothing = ImageList.of("", []), np.zeros(0, np.int64)
    classes = initial.get("classes") or output_names(args)
    val = labeled_images(args.data, "val", classes)[:2] if args.data else nothing
    return nothing, val, classes


def default_size(images: ImageList, initial: dict, usual: int) -> int:
    """The model's size or, if smaller, the images' median short side in steps of 32, in pixels."""
    on_gpu = torch.cuda.is_available()
    if not len(images) or fixes_size(initial) or (initial and on_gpu):
        return usual
    sides = []
    for row in np.linspace(0, len(images) - 1, 300).astype(int):
        with contextlib.suppress(Exception), images.open(row) as file:  # the training reports it
            sides.append(min(Image.open(file).size))
    side = np.median(sides or [usual])
    least = 96 if initial else 32  # below 96 little is left of a published network's last maps
    most = usual if initial or on_gpu else min(usual, 64)  # a CPU has not the time for more
    size = min(most, max(least, int(side) // 32 * 32))
    print0(f"--image-size {size}: the median short side is {side:g} pixels, at most {most}")
    return size


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    resumed = previous_run(args)

    # Images and labels.
    asked_size = None if args.own_size else args.image_size
    initial = initial_weights(args.init, args.arch, asked_size) if args.init else {}
    (train_images, labels), (val_images, val_labels), classes = labeled_data(args, initial)
    inputs = compare_inputs(args, resumed, train=train_images, val=val_images)
    check_copies(train_images, labels, val_images)

    # What the flags and the weights to start from say about the model and its images.
    usual = initial.get("image_size") or view_of(args.arch or "efficientnet_b0").image_size
    size = usual if args.own_size else args.image_size or default_size(train_images, initial, usual)
    setup = setup_of(args, {}, initial, size)
    view, recipe = setup.view, setup.recipe

    # A step takes n labelled images, and more in place of the unlabelled ones of a student.
    num_unlabeled = round(args.ratio * args.batch_size)
    num_labeled = args.batch_size + num_unlabeled
    scale = num_labeled / args.batch_size  # a student's loss is a mean + ratio x a mean: 1 + ratio means
    check_parts(num_labeled, f"--batch-size {args.batch_size} --ratio {args.ratio}", args, processes)

    # The model and its run. Epochs and --steps auto are counted as in 04: as many steps as a student.
    model, header, origin = model_of("teacher", setup, (train_images, labels), classes, args, processes)
    header["inputs"] = inputs
    if args.data:
        header["data"] = os.path.abspath(args.data)  # the next student's default
    unlabeled = f"{args.data}/unlabeled"
    plan = plan_of(args, recipe.epochs, len(train_images), unlabeled=unlabeled, num_unlabeled=num_unlabeled)
    run = Run(args, processes, model, header, plan, train_images, (val_images, val_labels), resumed)
    sizes = f"{len(train_images)} labelled images of {len(classes)} classes, {len(val_images)} val"
    noise = f"RandAugment {recipe.num_ops} ops of magnitude {recipe.magnitude:g}"
    run.announce(sizes, f"{num_labeled} a step", noise, origin)

    # Train.
    labeled_batches = run.batches(train_images, num_labeled, "labeled", noised=setup.crop)
    for labeled in run.steps(labeled_batches):  # sets rate, seed, counts
        # The last view of an image is its random crop. The noise (common's add_noise) is drawn on
        # the whole batch, uint8 (n, 3, H, W), on the device.
        images = labeled.views[-1]
        images = setup.noise(images.to(processes.device, non_blocking=True), run.generator)
        # y of the readable images, int64 (n,); an unreadable image has no place in the batch.
        target = torch.from_numpy(labels)[labeled.rows].to(processes.device, non_blocking=True)
        for part_target, part_images in run.parts(target, images):
            with run.amp:  # 16-bit products where --precision says so; the loss is in float32
                logits = run.forward(normalize(part_images, view)).float()
            loss = F.cross_entropy(logits, part_target, label_smoothing=args.label_smoothing, reduction="sum")
            run.backward(scale * loss / run.counts[0])  # the mean over the readable images of all processes
        run.end_step()  # updates the weights and their average; logs, evaluates, saves
    run.finish()  # evaluates, draws curves.png, writes model.pt


if __name__ == "__main__":
    main()
