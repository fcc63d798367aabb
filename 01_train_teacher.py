"""Stage 01: train the teacher, an ordinary supervised classifier, with the noise that its student will get.

The teacher minimizes, over the labelled images x_i and the parameters of f,

    (1/n) sum_i CE(y_i, f_noised(x_i))

RandAugment noises the input, dropout and stochastic depth noise the model (Xie et al., 1911.04252, algorithm 1, step
1). What is kept is the running average of the weights. `diff 01_train_teacher.py 04_train_student.py` shows what the
paper adds.

reads   DATA/train, DATA/val; --init: weights to start from, of this toolkit, torchvision or timm
writes  OUT/model.pt (hand-off), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b0
    torchrun --nproc-per-node 8 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b7
    python 01_train_teacher.py --data DATA --init tf_efficientnet_b7_ns.pth --arch tf_efficientnet_b7 --epochs 0
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import add_device_flags, add_init_flag, add_model_flags, add_noise_flags, add_optimization_flags
from common import add_run_flags, argument_parser, print0  # the program
from common import init_processes  # processes
from common import normalize  # views
from common import unreadable_images  # batches
from common import plan_of  # optimization
from common import data_inputs, input_digests, labeled_data, previous_run, resume_or_exit  # checkpoints
from common import check_parts, model_noise, model_of, setup_of  # training
from common import Run  # the training run


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; --epochs 0 needs no train/")
    add("--out", type=Path, default=Path("runs/teacher"), help="folder of the results; the same command resumes it")
    add_init_flag(add)
    add_model_flags(parser)
    add_noise_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    add_device_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    processes = init_processes(args.device, args.workers, args.out)
    begun = previous_run(args)

    # What the flags and the weights to start from say about the model and its images.
    setup = setup_of(args, {})
    view, recipe = setup.view, setup.recipe

    # A step takes n labelled images.
    num_labeled = args.batch_size
    check_parts(args.batch_size, f"--batch-size {args.batch_size}", args, processes)

    # Images and labels. With --epochs 0 train/ gives nothing but the names of the classes, and may be missing.
    (train_images, labels), (val_images, val_labels), classes = labeled_data(args, setup.initial, setup.arch)
    init_file = None if args.init == "published" else args.init
    inputs = {init_file: init_file} | (data_inputs(args.data, train_images, val_images) if args.data else {})
    inputs = input_digests(inputs, processes)
    resume_or_exit(args, begun, inputs)
    bad = unreadable_images(train_images, view, args, processes, begun)
    train_images, labels = train_images.without(bad), np.delete(labels, bad)
    targets = torch.from_numpy(labels)  # int64 (images,)

    # The model, and the books of its training.
    stage = "teacher"
    model, arch_options, origin = model_of(stage, setup, classes, args)
    plan = plan_of(args, recipe.epochs, len(train_images) / num_labeled)
    header = {"stage": stage, "arch": setup.arch, "arch_options": arch_options, "classes": classes, **view.header}
    header |= {"data": os.path.abspath(args.data)} if args.data else {}  # the next student's default
    header |= {"inputs": inputs}
    run = Run(args, processes, model, header, plan, (val_images, val_labels), num_labeled, bad, begun, setup.noise)
    run.announce(
        f"{len(train_images)} labelled images of {len(classes)} classes, {len(val_images)} val",
        f"{num_labeled} a step",
        f"RandAugment {recipe.num_ops} ops of magnitude {recipe.magnitude:g}, {model_noise(model)}",
    )
    print0(f"{origin}; the clean view: {view}")

    # Train.
    labeled_batches = run.batches(train_images, num_labeled, "labeled", noised=setup.crop)
    for batch in run.steps(labeled_batches):
        # The noise is drawn on the whole batch, as uint8 (n, 3, H, W), on the device.
        images = batch.views[-1].to(processes.device, non_blocking=True)
        images = setup.noise(images, run.generator)
        # y of the readable images, int64 (n,); an unreadable image has no place in the batch.
        target = targets[batch.rows].to(processes.device, non_blocking=True)
        for part_target, part_images in run.parts(target, images):
            with run.amp:  # 16-bit products where --precision says so; the loss is in float32
                logits = run.ddp_model(normalize(part_images, view)).float()
            loss = F.cross_entropy(logits, part_target, label_smoothing=args.label_smoothing, reduction="sum")
            run.backward(loss / run.counts[0])  # the mean over the readable images of all processes
        run.end_step()  # the optimizer's step and the average of the weights; logs, evaluates, saves where it is time
    run.finish()  # evaluates, draws curves.png, writes model.pt


if __name__ == "__main__":
    main()
