"""Stage 04: train the noised student, equal or larger than its teacher, on both kinds of images.

Its input is augmented and its layers are dropped. Its targets for the unlabelled images x~ are the
clean teacher's soft labels y~. Both kinds go through one forward pass, so batch norm sees both
(1911.04252, algorithm 1, step 3):

    loss = (1/n) sum_i CE(y_i, f_noised(x_i)) + w (1/m) sum_i CE(y~_i, f_noised(x~_i)),    w = m / n

w is the ratio, as in the official code (main.py:547-550): every image counts the same. In the
paper's algorithm 1 it is 1. The labels come from a label file (02, 03) or, with --teacher alone,
from the teacher on the fly: unfiltered.

--consistency kl --ratio 0 is consistency training with supervision (Keras example, Paul 2021): the
labelled images carry both losses, the second one tempered, and the two are averaged.

reads   DATA/train, DATA/val; a label file and its images, or the teacher and DATA/unlabeled;
        --init: weights to start from, of this toolkit, torchvision or timm
writes  OUT/model.pt (the next teacher), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 04_train_student.py --teacher runs/teacher/model.pt --pseudo-labels runs/balanced.h5
    torchrun --nproc-per-node 8 04_train_student.py --teacher runs/teacher/model.pt
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import add_model_flags, add_optimization_flags, add_run_flags, argument_parser  # program
from common import at_least, fail, print0
from common import Processes, init_processes  # processes
from common import fixes_size, initial_weights  # weights
from common import View, normalize  # views
from common import ImageList, check_copies, data_of, digests_of, labeled_images, unlabeled_images  # listing
from common import Batch, check_parts  # batches
from common import DONE, TODO, check_label_rows, open_label_file  # label files
from common import plan_of  # optimization
from common import compare_inputs, load_model, previous_run, read_checkpoint  # checkpoints
from common import autocast, model_of, precision_of, setup_of  # training
from common import Run  # the training run


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument_group("images and labels").add_argument
    add("--teacher", type=Path, help="checkpoint: labels on the fly, or defaults for the file")
    add("--pseudo-labels", type=Path, help="label file of 03 or 02: unlabelled images and labels")
    add("--data", type=Path, help="directory with train/<class>/, maybe val/; None: the teacher's")
    add("--unlabeled", type=Path, help="folder of these images; None: as in the file, or DATA/unlabeled")
    add("--out", type=Path, default=Path("runs/student"), help="results; run again to resume")
    add("--ratio", type=at_least(0), help="unlabelled per labelled image; None: B0 1, L2 14, else 3")
    add("--unlabeled-weight", type=at_least(0), help="w of the loss; None: the ratio, or 1 if unlabelled only")
    add("--temperature", type=at_least(0), help="softmax(logits / T); 0: hard labels; None: 1, kl 10, top-p 0")
    add("--unlabeled-only", action="store_true", help="pre-train on the selection (billion-scale)")
    add("--consistency", choices=["kl"], help="(CE + KL(teacher || student)) / 2; --ratio 0: of labelled images")
    add_model_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(label_smoothing=None)
    args = parser.parse_args()
    if args.label_smoothing is None:
        args.label_smoothing = 0.0 if args.consistency else 0.1
    if not args.teacher and not args.pseudo_labels:
        fail("--teacher or --pseudo-labels: give one of them: the unlabelled images need labels")
    if args.unlabeled_only and not args.pseudo_labels:
        fail("--unlabeled-only needs --pseudo-labels: an epoch is a pass over its images")
    if args.consistency and (args.temperature == 0 or args.unlabeled_only or args.unlabeled_weight is not None):
        fail("--consistency kl is a mean: without --temperature 0, --unlabeled-only and --unlabeled-weight")
    if args.consistency and args.ratio == 0 and args.pseudo_labels:
        fail("--consistency kl --ratio 0: the teacher labels on the fly, without --pseudo-labels")
    return args


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """-sum_c p_c log softmax(logits)_c of each image, (N,) (official main.py:300-304)."""
    return -(probs * F.log_softmax(logits.float(), dim=1)).sum(1)


def noisy_student_loss(
    logits, targets, pseudo_logits, pseudo_targets, num_labeled, num_pseudo, weight, label_smoothing, temperature=1.0
):
    """(labelled mean + weight * unlabelled mean, the two means) of a part of the batch.

    logits (n, C), targets int64 (n,); pseudo_logits (m, C), pseudo_targets: probabilities (m, C).
    n or m may be 0. num_labeled, num_pseudo: what the sums are divided by, an even share of the
    step's n and m: n / (processes x parts). So the average over the parts is the step's mean. Hard
    pseudo-labels are smoothed already, soft ones never (official main.py:502-541). temperature: the
    student's. If only the teacher's were above 1, the student would learn to be underconfident.
    """
    labeled = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / (num_labeled or 1)
    unlabeled = soft_cross_entropy(pseudo_logits / temperature, pseudo_targets).sum() / (num_pseudo or 1)
    return labeled + weight * unlabeled, labeled, unlabeled


def consistency_loss(logits, targets, student_logits, probs, num_labeled, num_pseudo, label_smoothing, temperature):
    """(mean of the two, CE(y, s), KL(p || softmax(s / T))), as `noisy_student_loss` has them.

    probs: p, the teacher's softmax(t / T). No T squared, as in the Keras example, so for large T
    the gradient falls about as 1 / T squared.
    """
    labeled = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / (num_labeled or 1)
    log_probs = F.log_softmax((student_logits / temperature).float(), dim=1)
    divergence = F.kl_div(log_probs, probs, reduction="sum") / (num_pseudo or 1)
    return (labeled + divergence) / 2, labeled, divergence


def loss_function(args: argparse.Namespace, ratio: float, temperature: float) -> partial:
    """`noisy_student_loss` or `consistency_loss`, with what the flags say."""
    options = {"label_smoothing": args.label_smoothing}
    if args.consistency:
        return partial(consistency_loss, temperature=temperature, **options)
    weight = args.unlabeled_weight
    if weight is None:
        weight = 1.0 if args.unlabeled_only else ratio
    # A T below 1 is of the targets alone: that sharpens them (UDA, 1904.12848). If the student were
    # divided by it too, nothing would be sharper.
    return partial(noisy_student_loss, weight=weight, temperature=max(temperature, 1.0), **options)


def pseudo_targets(logits: Tensor, labels: Tensor, temperature: float, label_smoothing: float) -> Tensor:
    """(m, C): softmax(logits / T); for T = 0 one-hot and smoothed (official main.py:518-541)."""
    if temperature:
        return (logits / temperature).softmax(1)
    num_classes = logits.shape[1]
    return F.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes


def temperature_of(args: argparse.Namespace, usual: float) -> float:
    if args.temperature is not None:
        return args.temperature
    return 10.0 if args.consistency else usual  # 10: the Keras example's


class TeachersLabels:
    """Labels that the teacher gives while the student trains: from the clean view, as in 02.

    Called with a batch whose first view is the clean one, it returns targets (m, C) in the order of
    `classes`. `source` has the defaults of the student.
    """

    def __init__(self, args: argparse.Namespace, processes: Processes):
        self.args = args
        self.device = processes.device
        self.teacher, self.source = load_model(args.teacher, self.device, fuse=True)
        self.classes = self.source["classes"]
        self.view = View.of(self.source)
        self.amp, _ = autocast(precision_of(args.precision, self.device), self.device)
        self.temperature = temperature_of(args, usual=1.0)
        self.images = ImageList.of("", [])  # --ratio 0: none
        if args.ratio != 0:
            data = data_of(args, self.source)
            self.images = unlabeled_images(args.unlabeled or data / "unlabeled", data)
        self.rows = np.arange(len(self.images))  # each image once
        print0(f"labels come from {args.teacher} on the fly, unfiltered and unbalanced")

    def __call__(self, batch: Batch) -> Tensor:
        images = batch.views[0].to(self.device, non_blocking=True)
        with self.amp, torch.no_grad():  # split like the student's batch, to save memory
            parts = images.tensor_split(self.args.accumulate)
            logits = torch.cat([self.teacher(normalize(part, self.view)) for part in parts]).float()
        return pseudo_targets(logits, logits.argmax(1), self.temperature, self.args.label_smoothing)


class StoredLabels:
    """The labels of a file of stage 03 or 02, each row repeated `copies` times.

    Called with a batch it returns such targets too. `source`: of --teacher, or what the file says.
    """

    def __init__(self, args: argparse.Namespace):
        labels = open_label_file(args.pseudo_labels)
        check_label_rows(labels)
        path, attrs = labels.path, labels.attrs
        status = labels.column("status")
        if (status == TODO).any():
            fail(f"{path}: {(status == TODO).sum()} images have no label yet: run 02 again on it")
        rows = np.flatnonzero(status == DONE)
        copies = labels.column("copies")[rows]
        if not len(rows) or not copies.all():
            fail(f"{path}: no row is labelled, or copies of a labelled row is 0")
        if len(rows) < len(labels):
            print0(f"{path}: {len(labels) - len(rows)} unreadable or held-out images are left out")
        self.rows = np.repeat(rows, copies)  # int64 (M,): rows of the file
        if args.unlabeled:
            attrs["root"] = args.unlabeled
        self.images = labels.images
        if not os.path.isdir(self.images.root):
            fail(f"--unlabeled: say where the images are, they are not in {self.images.root}")
        self.classes = labels.classes
        self.view = None  # no clean view is needed
        self.label_smoothing = args.label_smoothing
        self.temperature = temperature_of(args, 0.0 if attrs.get("method") == "top-p" else 1.0)
        if self.temperature and "logits" not in labels.places:
            fail(f"--temperature {self.temperature:g}: {path} has no logits: relabel it with 02")
        self.labels = labels
        self.source = {**attrs, "arch_options": json.loads(attrs.get("arch_options", "{}"))}
        if args.teacher:
            self.source = read_checkpoint(args.teacher)
        for name in ("arch", "image_size"):
            if not (args.init or getattr(args, name) or name in self.source):
                fail(f"--{name.replace('_', '-')}: {path} does not say it")

    def __call__(self, batch: Batch) -> Tensor:
        rows = self.rows[batch.rows.numpy()]
        labels = torch.from_numpy(self.labels.column("label")[rows].astype(np.int64))
        logits = torch.zeros(len(rows), len(self.classes))  # hard labels need no logits
        if self.temperature:  # mapped anew for each batch, or all of the file comes to count as memory
            logits = torch.from_numpy(self.labels.column("logits")[rows]).float()
        return pseudo_targets(logits, labels, self.temperature, self.label_smoothing)


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    resumed = previous_run(args)

    # The labels of the unlabelled images, and the settings that the student inherits unless a flag
    # overrides them: the data, the architecture, the image size and the crop mode.
    pseudo_labels = StoredLabels(args) if args.pseudo_labels else TeachersLabels(args, processes)
    source = pseudo_labels.source

    # Images and labels. Classes are matched by name, and numbered as the teacher's.
    data = data_of(args, source)
    train_images, labels, classes = labeled_images(data, "train", pseudo_labels.classes)
    val_images, val_labels, _ = labeled_images(data, "val", classes)
    on_the_fly = {} if args.pseudo_labels else {"unlabeled": pseudo_labels.images}
    inputs = compare_inputs(args, resumed, train=train_images, val=val_images, **on_the_fly)
    check_copies(train_images, labels, val_images)

    # What the flags, the weights to start from and the teacher say about the model and its images.
    initial = initial_weights(args.init, args.arch or source.get("arch"), args.image_size) if args.init else {}
    says_size = initial if fixes_size(initial) else initial | source
    setup = setup_of(args, source, initial, args.image_size or says_size["image_size"])
    view, recipe = setup.view, setup.recipe

    # A step takes n labelled images and m = ratio x n unlabelled ones.
    num_labeled, num_unlabeled = args.batch_size, round(recipe.ratio * args.batch_size)
    if args.unlabeled_only:
        num_labeled, num_unlabeled = 0, args.batch_size
    if recipe.ratio and not num_unlabeled:
        fail(f"--ratio {recipe.ratio:g} of --batch-size {args.batch_size} is no image; 0: none")
    for num in (num_labeled, num_unlabeled):
        check_parts(num, f"--batch-size {args.batch_size} --ratio {recipe.ratio}", args, processes)
    same_images = bool(args.consistency) and not num_unlabeled  # labelled ones carry both losses

    # The model and its training run. An epoch is a pass over the labelled images, if there are any.
    model, header, origin = model_of("student", setup, (train_images, labels), classes, args, processes)
    header |= {"inputs": inputs, "data": os.path.abspath(data)}  # data: the next student's default
    num_pseudo = len(pseudo_labels.rows)
    num_epoch = len(train_images) if num_labeled else num_pseudo
    plan = plan_of(args, recipe.epochs, num_epoch, unlabeled=pseudo_labels.images.root, num_unlabeled=num_unlabeled)
    run = Run(args, processes, model, header, plan, train_images, (val_images, val_labels), resumed)
    sizes = f"{len(train_images)} labelled, {num_pseudo} unlabelled, {len(val_images)} val; {len(classes)} classes"
    noise = f"RandAugment {recipe.num_ops} ops of magnitude {recipe.magnitude:g}"
    run.announce(sizes, f"{num_labeled} + {num_unlabeled} a step", noise, origin)

    # Train. The student sees a random crop, which setup.noise noises below, the teacher on the fly
    # the image's clean view. Copies of val are skipped, in a file that does not know them too.
    clean = pseudo_labels.view
    held_out = digests_of(val_images) if num_unlabeled else frozenset()
    of_labeled = {"clean": clean if same_images else None, "noised": setup.crop}
    of_unlabeled = {"clean": clean, "noised": setup.crop, "held_out": held_out, "repeated": pseudo_labels.rows}
    labeled_batches = run.batches(train_images, num_labeled, "labeled", **of_labeled)
    unlabeled_batches = run.batches(pseudo_labels.images, num_unlabeled, "unlabeled", **of_unlabeled)
    loss_of = loss_function(args, recipe.ratio, pseudo_labels.temperature)
    for labeled, unlabeled in run.steps(labeled_batches, unlabeled_batches):  # sets rate, seed, counts
        # The last view of an image is its random crop. The noise (common's add_noise) is drawn on
        # the whole batch, uint8 (n + m, 3, H, W), on the device. n or m may be 0.
        images = torch.cat([labeled.views[-1], unlabeled.views[-1]])
        images = setup.noise(images.to(processes.device, non_blocking=True), run.generator)
        # y of the readable images, int64 (n,); an unreadable image has no place in the batch.
        target = torch.from_numpy(labels)[labeled.rows].to(processes.device, non_blocking=True)
        # y~, probabilities (m, C); same_images: those of the labelled images.
        probs = pseudo_labels(labeled if same_images else unlabeled)
        probs = probs.to(processes.device, non_blocking=True)
        tensors = target, *images.tensor_split([len(target)]), probs
        for part_target, part_labeled, part_unlabeled, part_probs in run.parts(*tensors):
            part_images = torch.cat([part_labeled, part_unlabeled])  # so batch norm sees both kinds
            with run.amp:  # 16-bit products where --precision says so; the loss is in float32
                logits = run.forward(normalize(part_images, view)).float()
            labeled_logits, pseudo_logits = logits.tensor_split([len(part_target)])
            # An even share of the step's readable images: their number / (processes x parts). The
            # parts' gradients then average to that of the mean over the step.
            share_n, share_m = run.counts
            if same_images:  # the Keras example: the labelled logits carry both losses
                pseudo_logits, share_m = logits, share_n
            losses = loss_of(labeled_logits, part_target, pseudo_logits, part_probs, share_n, share_m)
            loss, loss_labeled, loss_unlabeled = losses
            run.backward(loss, loss_labeled=loss_labeled, loss_unlabeled=loss_unlabeled)
        run.end_step()  # updates the weights and their average; logs, evaluates, saves
    run.finish()  # evaluates, draws curves.png, writes model.pt


if __name__ == "__main__":
    main()
