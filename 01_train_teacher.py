"""Stage 01: train the teacher, an ordinary supervised classifier, with the noise that its student will get.

The teacher minimizes, over the labelled images x_i and the parameters of f,

    (1/n) sum_i CE(y_i, f_noised(x_i))

RandAugment noises the input, dropout and stochastic depth noise the model (Xie et al., 1911.04252, algorithm 1, step
1). What is kept is the running average of the weights. What the paper adds is the difference to 04's loop, from
`# Train.` on. With --ratio the same command trains the student's control: the labels alone, in equal steps.

reads   DATA/train, DATA/val; --init: weights to start from, of this toolkit, torchvision or timm
writes  OUT/model.pt (hand-off), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b0
    torchrun --nproc-per-node 8 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b7
    python 01_train_teacher.py --init tf_efficientnet_b7_ns.pth --arch tf_efficientnet_b7 --epochs 0 --classes names.txt
"""

import argparse
import contextlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import add_model_flags, add_noise_flags, add_optimization_flags, add_run_flags, argument_parser  # program
from common import at_least, fail, print0
from common import init_processes  # processes
from common import build_model  # models
from common import head_names, initial_weights, own_names  # weights
from common import normalize, view_of  # views
from common import ImageList, check_copies, labeled_images  # listing
from common import plan_of  # optimization
from common import compare_inputs, previous_run  # checkpoints
from common import check_parts, model_of, setup_of  # training
from common import Run  # the training run


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; --epochs 0 needs no train/")
    add("--out", type=Path, default=Path("runs/teacher"), help="folder of the results; the same command resumes it")
    add("--classes", type=Path, help="with --init and --epochs 0: one class a line, the names of the outputs in order")
    add("--ratio", type=at_least(0), default=0.0, help="extra labelled images per labelled one, as a student's control")
    add_model_flags(parser)
    add_noise_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    return parser.parse_args()


def output_names(args: argparse.Namespace) -> list[str]:
    """What the outputs of weights are called that do not say it: the lines of --classes, or the folders of DATA."""
    if args.classes:
        try:
            return args.classes.read_text("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            fail(f"--classes {args.classes}: expected a text file with one class a line ({error})")
    if not args.data:
        fail("--classes FILE or --data: one of them must say what the outputs are called")
    names = labeled_images(args.data, "train" if (args.data / "train").is_dir() else "val")[2]
    if all(name.isdecimal() for name in names):
        fail(f"--classes: the folders of {args.data} are numbers, which may stand in another order than the outputs")
    print0(f"the outputs are called as the folders of {args.data}, in this order: {', '.join(names[:5])} ...")
    return names


def is_probe(args: argparse.Namespace, initial: dict) -> bool:
    """Whether DATA/train has other classes than the weights: then --epochs 0 fits a classifier to it."""
    if args.classes or not args.data or not (args.data / "train").is_dir():
        return False
    names = labeled_images(args.data, "train")[2]
    if "classes" in initial:
        return set(names) != set(initial["classes"])
    model = build_model(initial["arch"])
    weights = own_names(initial, model.state_dict())
    return len(weights.get(f"{head_names(model)[0]}.weight", ())) != len(names)


def labeled_data(args: argparse.Namespace, initial: dict) -> tuple:
    """(images and labels of train, images and labels of val, classes). With --epochs 0 train may be empty."""
    nothing = ImageList.of("", []), np.zeros(0, np.int64)
    if args.init and 0 in (args.epochs, args.steps) and not is_probe(args, initial):
        classes = initial.get("classes") or output_names(args)
        return nothing, labeled_images(args.data, "val", classes)[:2] if args.data else nothing, classes
    if not args.data:
        fail("--data: a data directory with train/<class>/ is needed, but for --init with --epochs 0")
    *train, classes = labeled_images(args.data, "train")
    return train, labeled_images(args.data, "val", classes)[:2], classes


def default_size(images: ImageList, initial: dict, usual: int) -> int:
    """The model's size or, where it is smaller, the images' median short side in steps of 32; both in pixels.

    From weights on a GPU always the model's; on a CPU, for the time, the images', but at least 96: below, little is
    left of a published network's last maps.
    """
    if not len(images) or "format" in initial or (initial and torch.cuda.is_available()):
        return usual
    sides = []
    for row in np.linspace(0, len(images) - 1, 300).astype(int):
        with contextlib.suppress(Exception), images.open(row) as file:  # the training reports what is unreadable
            sides.append(min(Image.open(file).size))
    most = usual if initial or torch.cuda.is_available() else min(usual, 64)  # a CPU has not the time for more
    size = min(most, max(96 if initial else 32, int(np.median(sides or [usual])) // 32 * 32))
    print0(f"--image-size {size}: the median short side is {np.median(sides or [usual]):g} pixels, at most {most}")
    return size


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    resumed = previous_run(args)

    # Images and labels.
    initial = initial_weights(args.init, args.arch, args.image_size) if args.init else {}
    (train_images, labels), (val_images, val_labels), classes = labeled_data(args, initial)
    inputs = compare_inputs(args, resumed, train=train_images, val=val_images)
    check_copies(train_images, labels, val_images)
    all_targets = torch.from_numpy(labels)  # int64 (images,)

    # What the flags and the weights to start from say about the model and its images.
    usual = initial.get("image_size") or view_of(args.arch or "efficientnet_b0").image_size
    setup = setup_of(args, {}, initial, args.image_size or default_size(train_images, initial, usual))
    view, recipe = setup.view, setup.recipe

    # A step takes n labelled images, and more in place of the unlabelled ones of a student.
    num_labeled = args.batch_size + round(args.ratio * args.batch_size)
    check_parts(num_labeled, f"--batch-size {args.batch_size} --ratio {args.ratio:g}", args, processes)

    # The model and its training run. An epoch is counted in --batch-size images, without those of --ratio: so a student
    # with the same flags takes as many steps.
    model, header, origin = model_of("teacher", setup, (train_images, labels), classes, args, processes)
    header["inputs"] = inputs
    if args.data:
        header["data"] = os.path.abspath(args.data)  # the next student's default
    unlabeled = Path(args.data or "", "unlabeled")  # 04 counts them too: its control takes as many steps
    num_unlabeled = num_labeled - args.batch_size
    plan = plan_of(args, recipe.epochs, len(train_images), unlabeled=unlabeled, num_unlabeled=num_unlabeled)
    run = Run(args, processes, model, header, plan, train_images, (val_images, val_labels), resumed)
    run.announce(
        f"{len(train_images)} labelled images of {len(classes)} classes, {len(val_images)} val",
        f"{num_labeled} a step",
        f"RandAugment {recipe.num_ops} ops of magnitude {recipe.magnitude:g}",
        origin,
    )

    # Train.
    labeled_batches = run.batches(train_images, num_labeled, "labeled", noised=setup.crop)
    for labeled in run.steps(labeled_batches):  # sets the rate, seeds the noise
        # The noise is drawn on the whole batch, as uint8 (n, 3, H, W), on the device.
        images = labeled.views[-1].to(processes.device, non_blocking=True)
        images = setup.noise(images, run.generator)
        # y of the readable images, int64 (n,); an unreadable image has no place in the batch.
        target = all_targets[labeled.rows].to(processes.device, non_blocking=True)
        for part_target, part_images in run.parts(target, images):
            with run.amp:  # 16-bit products where --precision says so; the loss is in float32
                logits = run.ddp_model(normalize(part_images, view)).float()
            loss = F.cross_entropy(logits, part_target, label_smoothing=args.label_smoothing, reduction="sum")
            run.backward(loss / run.counts[0])  # the mean over the readable images of all processes
        run.end_step()  # the optimizer's step and the average of the weights; logs, evaluates, saves where it is time
    run.finish()  # evaluates, draws curves.png, writes model.pt


if __name__ == "__main__":
    main()
