"""Stage 04: train the noised student, equal or larger than its teacher, on labelled and unlabelled images together.

Its input is augmented and its layers are dropped, and its targets for the unlabelled images x~ are the clean teacher's
soft labels y~. Both kinds go through one forward pass, so batch norm sees both (1911.04252, algorithm 1, step 3):

    loss = (1/n) sum_i CE(y_i, f_noised(x_i)) + w (1/m) sum_i CE(y~_i, f_noised(x~_i)),    w = ratio = m / n

(w as in the official code, main.py:547-550: every image counts the same; the paper's algorithm 1 has w = 1.)
The labels come from a label file (02, 03), or, with --teacher alone, from the teacher on the fly: unfiltered.

--consistency kl --ratio 0 is consistency training with supervision (Keras example, Paul 2021): the labelled images are
the unlabelled ones too, and their two losses, the second tempered, are averaged.

reads   DATA/train, DATA/val; balanced.h5 and its images, or the teacher and DATA/unlabeled; --init: weights to start
        from, of this toolkit, torchvision or timm
writes  OUT/model.pt (hand-off: the next teacher), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 04_train_student.py --teacher runs/teacher/model.pt --pseudo-labels runs/balanced.h5 --out runs/student
    torchrun --nproc-per-node 8 04_train_student.py --teacher runs/teacher/model.pt
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import add_model_flags, add_noise_flags, add_optimization_flags, add_run_flags, argument_parser  # program
from common import at_least, fail, print0
from common import Processes, init_processes  # processes
from common import initial_weights  # weights
from common import View, normalize  # views
from common import ImageList, check_copies, labeled_images, unlabeled_images  # listing
from common import Batch, digests_of  # batches
from common import DONE, TODO, check_label_rows, open_label_file  # label files
from common import plan_of  # optimization
from common import compare_inputs, data_of, load_model, previous_run, read_checkpoint  # checkpoints
from common import autocast, check_parts, model_of, precision_of, setup_of  # training
from common import Run  # the training run


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument_group("images and labels").add_argument
    add("--teacher", type=Path, help="checkpoint: labels on the fly, or defaults for --pseudo-labels")
    add("--pseudo-labels", type=Path, help="label file of 03 or 02: the unlabelled images and their labels")
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; None: the teacher's own")
    add(
        "--unlabeled", type=Path, help="folder of these images; None: where 02 labelled them, on the fly DATA/unlabeled"
    )
    add("--out", type=Path, default=Path("runs/student"), help="folder of the results; the same command resumes it")
    add("--ratio", type=at_least(0), help="unlabelled images per labelled one; None: 1 for B0, 14 for L2, else 3")
    add("--unlabeled-weight", type=at_least(0), help="w of the loss; None: the ratio (official), 1 if unlabelled only")
    add("--temperature", type=at_least(0), help="T of softmax(logits / T); 0: hard; None: 1, --consistency 10, top-p 0")
    add("--unlabeled-only", action="store_true", help="pre-train on the selection alone (billion-scale)")
    add(
        "--consistency",
        choices=["kl"],
        help="(CE + KL(teacher || student) at T 10) / 2; --ratio 0: both on the labelled images",
    )
    add_model_flags(parser)
    add_noise_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(label_smoothing=None)
    args = parser.parse_args()
    if args.label_smoothing is None:
        args.label_smoothing = 0.0 if args.consistency else 0.1
    if not args.teacher and not args.pseudo_labels:
        fail("--teacher or --pseudo-labels: give one of them: the unlabelled images need labels")
    if args.unlabeled_only and not args.pseudo_labels:
        fail("--unlabeled-only needs --pseudo-labels: an epoch is a pass over the selected images")
    if args.consistency and args.temperature == 0:
        fail("--consistency kl compares probabilities, but --temperature 0 gives hard labels")
    if args.consistency and (args.unlabeled_only or args.unlabeled_weight is not None):
        fail("--consistency kl is the mean of two losses: without --unlabeled-only and --unlabeled-weight")
    if args.consistency and args.ratio == 0 and args.pseudo_labels:
        fail("--consistency kl --ratio 0: the teacher labels the labelled images on the fly, without --pseudo-labels")
    return args


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """-sum_c p_c log softmax(logits)_c of each image, (N,) (official main.py:300-304)."""
    return -(probs * F.log_softmax(logits.float(), dim=1)).sum(1)


def noisy_student_loss(
    logits, targets, pseudo_logits, pseudo_targets, num_labeled, num_pseudo, weight, label_smoothing, temperature=1.0
):
    """(labelled mean + weight * unlabelled mean, the two means) of one part of a process's share of the batch.

    logits (n, C), targets int64 (n,); pseudo_logits (m, C), pseudo_targets: probabilities (m, C); n or m may be 0.
    num_labeled, num_pseudo: n and m averaged over parts and processes, so that the parts' losses average to the step's.
    Only human labels are smoothed here (official main.py:502-541). temperature: of the student, as of its teacher. If
    only the teacher's were above 1, the student would learn to be underconfident.
    """
    labeled = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / (num_labeled or 1)
    unlabeled = soft_cross_entropy(pseudo_logits / temperature, pseudo_targets).sum() / (num_pseudo or 1)
    return labeled + weight * unlabeled, labeled, unlabeled


def consistency_loss(logits, targets, student_logits, probs, num_labeled, num_pseudo, label_smoothing, temperature):
    """(mean of the two, CE(y, s), KL(p || softmax(s / T))) of one process's share, as `noisy_student_loss` has them.

    probs: the teacher's softmax(t / T). No T squared, as in the Keras example, so for large T its gradient falls about
    as 1 / T squared.
    """
    labeled = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / (num_labeled or 1)
    entropy = -torch.xlogy(probs, probs).sum(1)
    divergence = (soft_cross_entropy(student_logits / temperature, probs) - entropy).sum() / (num_pseudo or 1)
    return (labeled + divergence) / 2, labeled, divergence


def loss_function(args: argparse.Namespace, weight: float, temperature: float) -> Callable:
    """`noisy_student_loss` or `consistency_loss`, with what the flags say.

    A temperature below 1 is of the targets alone: that sharpens them (UDA, 1904.12848). If the student were divided by
    it too, nothing would be sharper.
    """
    if args.consistency:
        loss_of = partial(consistency_loss, temperature=temperature)
    else:
        loss_of = partial(noisy_student_loss, weight=weight, temperature=max(temperature, 1.0))
    return partial(loss_of, label_smoothing=args.label_smoothing)


def pseudo_targets(logits: Tensor, labels: Tensor, temperature: float, label_smoothing: float) -> Tensor:
    """Probabilities (m, C): softmax(logits / T), or for T = 0 one-hot and smoothed (official main.py:518-541)."""
    if temperature:
        return (logits / temperature).softmax(1)
    num_classes = logits.shape[1]
    return F.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes


def default_temperature(args: argparse.Namespace, is_hard: bool = False) -> float:
    if args.temperature is not None:
        return args.temperature
    if args.consistency:
        return 10.0
    return 0.0 if is_hard else 1.0


class TeachersLabels:
    """Labels that the teacher gives while the student trains: from the clean view, as stage 02 would give them.

    Called with a batch whose first view is the clean one, it returns targets (m, C) in the order of `classes`.
    """

    def __init__(self, args: argparse.Namespace, processes: Processes):
        self.teacher, self.source = load_model(args.teacher, processes.device, fuse=True)
        self.args, self.device = args, processes.device
        self.classes, self.view = self.source["classes"], View.of(self.source)
        self.amp, _ = autocast(precision_of(args.precision, processes.device), self.device)
        self.temperature = default_temperature(args)
        data = data_of(args, self.source)
        self.images = ImageList.of("", [])  # --ratio 0: none
        if args.ratio != 0:
            self.images = unlabeled_images(args.unlabeled or data / "unlabeled", data)
        self.rows = None  # each image once
        print0(f"labels come from {args.teacher} on the fly, unfiltered and unbalanced")

    def __call__(self, batch: Batch) -> Tensor:
        images = batch.views[0].to(self.device, non_blocking=True)
        with self.amp, torch.no_grad():  # split like the student's batch, to save memory
            parts = images.tensor_split(self.args.accumulate)
            logits = torch.cat([self.teacher(normalize(part, self.view)) for part in parts]).float()
        return pseudo_targets(logits, logits.argmax(1), self.temperature, self.args.label_smoothing)


class StoredLabels:
    """The labels of a file of stage 03 or 02, each row repeated `copies` times.

    Called with a batch it returns targets (m, C) in the order of `classes`. `source` has the defaults of the student.
    """

    view = None  # no clean view is needed
    rows: np.ndarray  # int64 (M,): rows of the file, each repeated `copies` times

    def __init__(self, args: argparse.Namespace):
        labels = open_label_file(args.pseudo_labels)
        check_label_rows(labels)
        status, copies = labels.column("status"), labels.column("copies")
        done = status == DONE
        if (status == TODO).any():
            fail(f"{labels.path} is unfinished: {(status == TODO).sum()} images have no label: run 02 again on it")
        if not copies[done].all() or not done.any():
            fail(f"{labels.path}: copies of a labelled row is 0, or no row is labelled")
        if not done.all():
            print0(f"{labels.path}: {len(done) - done.sum()} unreadable or held-out images are left out")
        self.rows = np.repeat(np.arange(len(labels)), np.where(done, copies, 0))
        images = labels.images
        if args.unlabeled:
            images = replace(images, root=os.path.abspath(args.unlabeled))
        if not os.path.isdir(images.root):
            fail(f"--unlabeled: say where the images are, they are not where they were ({images.root})")
        self.images, self.classes = images, labels.classes
        self.label, self.label_smoothing = labels.column("label"), args.label_smoothing
        self.temperature = default_temperature(args, is_hard=labels.attrs.get("method") == "top-p")
        self.logits = labels.column("logits") if "logits" in labels.places else None
        if self.temperature and self.logits is None:
            fail(f"--temperature {self.temperature:g}: {labels.path} has no logits: label it with 02 --unlabeled first")
        self.source = {**labels.attrs, "arch_options": json.loads(labels.attrs.get("arch_options", "{}"))}

    def __call__(self, batch: Batch) -> Tensor:
        rows = self.rows[batch.rows.numpy()]
        logits = np.zeros((len(rows), len(self.classes)))  # hard labels do not need them
        if self.temperature:
            logits = self.logits[rows]
        labels = torch.from_numpy(self.label[rows].astype(np.int64))
        return pseudo_targets(torch.from_numpy(logits).float(), labels, self.temperature, self.label_smoothing)


def columns_of(classes: list[str], teachers: list[str], data: Path) -> list[int]:
    """Where the classes of the data stand among the teacher's. They are matched by name."""
    if differing := set(classes) ^ set(teachers):
        fail(f"{data}/train and the pseudo-labels differ in these classes: {', '.join(sorted(differing)[:5])}")
    return [teachers.index(name) for name in classes]


def sizes_of_step(args: argparse.Namespace, ratio: float, processes: Processes) -> tuple[int, int, float]:
    """(n, m, w): the labelled and the unlabelled images of a step, and the weight of the loss of the latter."""
    num_labeled, num_unlabeled, weight = args.batch_size, round(ratio * args.batch_size), ratio
    if args.unlabeled_only:
        num_labeled, num_unlabeled, weight = 0, args.batch_size, 1.0
    if ratio and not num_unlabeled:
        fail(f"--ratio {ratio:g} of --batch-size {args.batch_size} is no image; --ratio 0 means none")
    check_parts(num_labeled, f"--batch-size {args.batch_size}", args, processes)
    check_parts(num_unlabeled, f"--ratio {ratio:g}: {num_unlabeled} unlabelled images a step", args, processes)
    return num_labeled, num_unlabeled, weight if args.unlabeled_weight is None else args.unlabeled_weight


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    resumed = previous_run(args)

    # The labels of the unlabelled images, and the teacher's settings that the student inherits unless a flag overrides
    # them: the data, the architecture, the image size and the crop mode.
    pseudo_labels = StoredLabels(args) if args.pseudo_labels else TeachersLabels(args, processes)
    source = read_checkpoint(args.teacher) if args.teacher else pseudo_labels.source

    # Images and labels.
    data = data_of(args, source)
    train_images, labels, classes = labeled_images(data, "train")
    val_images, val_labels, _ = labeled_images(data, "val", classes)
    columns = columns_of(classes, pseudo_labels.classes, data)
    all_targets = torch.from_numpy(labels)  # int64 (images,)
    on_the_fly = {} if args.pseudo_labels else {"unlabeled": pseudo_labels.images}
    inputs = compare_inputs(args, resumed, train=train_images, val=val_images, **on_the_fly)
    check_copies(train_images, labels, val_images)

    # What the flags, the weights to start from and the teacher say about the model and its images.
    initial = initial_weights(args.init, args.arch or source.get("arch"), args.image_size) if args.init else {}
    for name in ("arch", "image_size"):
        if not getattr(args, name) and name not in (initial or source):
            fail(f"--{name.replace('_', '-')}: {args.pseudo_labels} does not say it")
    setup = setup_of(args, source, initial, args.image_size or (initial or source)["image_size"])
    view, recipe = setup.view, setup.recipe

    # A step takes n labelled images and m = ratio x n unlabelled ones.
    num_labeled, num_unlabeled, unlabeled_weight = sizes_of_step(args, recipe.ratio, processes)
    same_images = bool(args.consistency) and not num_unlabeled  # the labelled images carry both losses
    pseudo_images = train_images if same_images else pseudo_labels.images
    num_pseudo = len(pseudo_images if pseudo_labels.rows is None else pseudo_labels.rows)

    # The model and its training run. An epoch is a pass over the labelled images, or over the selected ones.
    model, header, origin = model_of("student", setup, (train_images, labels), classes, args, processes)
    header |= {"inputs": inputs, "data": os.path.abspath(data)}  # data: the next student's default
    num_epoch = len(train_images) if num_labeled else num_pseudo
    plan = plan_of(args, recipe.epochs, num_epoch, unlabeled=data / "unlabeled", num_unlabeled=num_unlabeled)
    run = Run(args, processes, model, header, plan, train_images, (val_images, val_labels), resumed)
    sizes = f"{len(train_images)} labelled, {num_pseudo} unlabelled, {len(val_images)} val; {len(classes)} classes"
    noise = f"RandAugment {recipe.num_ops} ops of magnitude {recipe.magnitude:g}"
    run.announce(sizes, f"{num_labeled} + {num_unlabeled} a step", noise, origin)

    # Train. A teacher that labels on the fly sees each image's clean view; the student sees a random crop, which
    # setup.noise noises below. On the fly, copies of val are skipped here; for stored labels 02 has skipped them.
    clean, crop = pseudo_labels.view, setup.crop  # clean: None for stored labels
    held_out = digests_of(val_images) if clean and num_unlabeled else frozenset()
    of_labeled = {"clean": clean if same_images else None, "noised": crop}
    of_unlabeled = {"clean": clean, "noised": crop, "held_out": held_out, "repeated": pseudo_labels.rows}
    labeled_batches = run.batches(train_images, num_labeled, "labeled", **of_labeled)  # of 0 images: empty batches
    unlabeled_batches = run.batches(pseudo_images, num_unlabeled, "unlabeled", **of_unlabeled)
    loss_of = loss_function(args, unlabeled_weight, pseudo_labels.temperature)
    for labeled, unlabeled in run.steps(labeled_batches, unlabeled_batches):  # sets the rate, seeds the noise
        # The last view of each image is the student's. Both kinds are noised alike, as one uint8 batch
        # (n + m, 3, H, W), the labelled ones first.
        images = torch.cat([labeled.views[-1], unlabeled.views[-1]]).to(processes.device, non_blocking=True)
        images = setup.noise(images, run.generator)
        # y of the readable images, int64 (n,); an unreadable image has no place in the batch.
        target = all_targets[labeled.rows].to(processes.device, non_blocking=True)
        # y~, probabilities (m, C) in the order of the student's classes; same_images: those of the labelled images.
        probs = pseudo_labels(labeled if same_images else unlabeled)[:, columns]
        probs = probs.to(processes.device, non_blocking=True)
        # The gradients are set to zero, and both kinds cut into --accumulate parts, which need less memory.
        tensors = target, images[: len(target)], images[len(target) :], probs
        for part_target, part_labeled, part_unlabeled, part_probs in run.parts(*tensors):
            # One forward pass for both kinds, so that batch norm sees both.
            with run.amp:
                logits = run.ddp_model(normalize(torch.cat([part_labeled, part_unlabeled]), view)).float()
            # Readable images a part, averaged over this step's parts and processes. backward divides by the parts and
            # DDP by the processes, so the gradient is that of the mean over all readable images of the step.
            mean_n, mean_m = run.counts
            labeled_logits, pseudo_logits = logits[: len(part_target)], logits[len(part_target) :]
            if same_images:  # the Keras example: the labelled logits carry both losses, each a mean over n
                pseudo_logits, mean_m = logits, mean_n
            losses = loss_of(labeled_logits, part_target, pseudo_logits, part_probs, mean_n, mean_m)
            loss, loss_labeled, loss_unlabeled = losses
            run.backward(loss, loss_labeled=loss_labeled, loss_unlabeled=loss_unlabeled)  # these two are only logged
        run.end_step()  # the optimizer's step and the average of the weights; logs, evaluates, saves where it is time
    run.finish()  # evaluates, draws curves.png, writes model.pt


if __name__ == "__main__":
    main()
