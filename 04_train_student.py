"""Stage 04: train the noised student, equal or larger than its teacher, on labelled and unlabelled images together.

Its input is augmented and its layers are dropped, and its targets for the unlabelled images x~ are the clean teacher's
soft labels y~. Both kinds go through one forward pass, so batch norm sees both (1911.04252, algorithm 1, step 3):

    loss = (1/n) sum_i CE(y_i, f_noised(x_i)) + w (1/m) sum_i CE(y~_i, f_noised(x~_i)),    w = ratio = m / n

(w as in the official code, main.py:547-550: every image counts the same; the paper's algorithm 1 has w = 1.)
The labels come from a selection (02, 03), or, with --teacher alone, from the teacher on the fly: no filter, no balance.

--consistency kl --ratio 0 is consistency training with supervision (Keras example, Paul 2021): the labelled images are
the unlabelled ones too, and their two losses, the second tempered, are averaged.

reads   DATA/train, DATA/val; balanced.h5 and the logits.h5 and images it names, or the teacher and DATA/unlabeled;
        --init: weights to start from, of this toolkit, torchvision or timm
writes  OUT/model.pt (hand-off: the next teacher), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 04_train_student.py --teacher runs/teacher/model.pt --pseudo-labels runs/balanced.h5 --out runs/student
    torchrun --nproc-per-node 8 04_train_student.py --teacher runs/teacher/model.pt
"""

import argparse
import os
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import add_device_flags, add_init_flag, add_model_flags, add_noise_flags, add_optimization_flags
from common import add_run_flags, argument_parser, at_least, fail, file_sha256, print0  # the program
from common import Processes, from_rank0, init_processes  # processes
from common import View, crop_mode_of, normalize  # views
from common import ImageList, digests_of, labeled_images, unlabeled_images  # listing
from common import Batch, unreadable_images  # batches
from common import DONE, LOGITS_FORMAT, TODO, image_list, map_dataset, open_label_file  # label files
from common import columns_of, options_of, read_classes
from common import SelectedImages, newer_file, of_file, read_selection  # selections
from common import plan_of, soft_cross_entropy  # optimization
from common import data_inputs, data_of, input_digests, load_model, previous_run, read_checkpoint  # checkpoints
from common import resume_or_exit
from common import autocast, check_parts, model_noise, model_of, precision_of, setup_of  # training
from common import Run  # the training run


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument_group("images and labels").add_argument
    add("--teacher", type=Path, help="labels on the fly; beside --pseudo-labels it only gives the defaults")
    add("--pseudo-labels", type=Path, help="balanced.h5: the selected unlabelled images and their labels")
    add("--logits", type=Path, nargs="+", default=[], help="newer labels of the selected images: see 02 --only")
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; None: the teacher's own")
    add("--unlabeled", type=Path, help="their folder; None: where they were labelled, on the fly DATA/unlabeled")
    add("--out", type=Path, default=Path("runs/student"), help="folder of the results; the same command resumes it")
    add("--ratio", type=at_least(0), help="unlabelled images a labelled one; None: 1 for B0, 14 for L2, else 3")
    add("--unlabeled-weight", type=at_least(0), help="w of the loss; None: the ratio (official), 1 if unlabelled only")
    add("--temperature", type=at_least(0), help="T of softmax(logits / T); 0: hard; None: 1, --consistency 10, top-p 0")
    add("--unlabeled-only", action="store_true", help="pre-train on the selection alone, as the billion-scale recipe")
    add("--clean-unlabeled", action="store_true", help="unlabelled images without crop, mirroring and RandAugment")
    add("--consistency", choices=["kl"], help="(CE + KL(teacher || student at T 10)) / 2; --ratio 0: of one image")
    add_init_flag(add)
    add_model_flags(parser)
    add_noise_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    add_device_flags(parser)
    parser.set_defaults(label_smoothing=None)
    args = parser.parse_args()
    if args.temperature is None and args.consistency:
        args.temperature = 10.0
    if args.label_smoothing is None:
        args.label_smoothing = 0.0 if args.consistency else 0.1
    if not args.teacher and not args.pseudo_labels:
        fail("--teacher or --pseudo-labels: one of them must say what the unlabelled images show")
    if args.unlabeled_only and not args.pseudo_labels:
        fail("--unlabeled-only needs --pseudo-labels: an epoch is a pass over the selected images")
    if args.logits and not args.pseudo_labels:
        fail("--logits needs --pseudo-labels: they replace the labels of a selection")
    if args.consistency and not args.temperature:
        fail("--consistency kl compares probabilities: --temperature 0, hard labels, leaves none")
    if args.consistency and (args.unlabeled_only or args.unlabeled_weight is not None):
        fail("--consistency kl is the mean of two losses: without --unlabeled-only and --unlabeled-weight")
    if args.consistency and args.ratio == 0 and args.pseudo_labels:
        fail("--consistency kl --ratio 0: the teacher labels the labelled images on the fly, without --pseudo-labels")
    if args.consistency and args.ratio != 0:
        print0("--consistency kl of other images than the labelled ones: a deviation from its source, see --ratio 0")
    return args


def noisy_student_loss(
    logits, targets, pseudo_logits, pseudo_targets, num_labeled, num_pseudo, weight, label_smoothing, temperature=1.0
):
    """(labelled mean + weight * unlabelled mean, the two means) of one process's share of the batch.

    logits (n, C), targets int64 (n,); pseudo_logits (m, C), pseudo_targets: probabilities (m, C); n or m may be 0.
    num_labeled, num_pseudo: n and m in the mean over the processes, so that the mean of their losses is the global one.
    Only labels that people gave are smoothed here (official main.py:502-541). temperature: the student's outputs are
    tempered as its teacher's are; with the teacher's alone it would learn to be unsure.
    """
    labeled = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / (num_labeled or 1)
    unlabeled = soft_cross_entropy(pseudo_logits / temperature, pseudo_targets).sum() / (num_pseudo or 1)
    return labeled + weight * unlabeled, labeled, unlabeled


def consistency_loss(logits, targets, student_logits, probs, num_labeled, num_pseudo, label_smoothing, temperature):
    """(mean of the two, CE(y, s), KL(p || softmax(s / T))) of one process's share, as `noisy_student_loss` has them.

    probs: the teacher's softmax(t / T). No T squared, as in the Keras example. Its gradient is a tenth of T = 1's.
    """
    labeled = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / (num_labeled or 1)
    entropy = -torch.xlogy(probs, probs).sum(1)
    divergence = (soft_cross_entropy(student_logits / temperature, probs) - entropy).sum() / (num_pseudo or 1)
    return (labeled + divergence) / 2, labeled, divergence


def pseudo_targets(logits: Tensor, labels: Tensor, temperature: float, label_smoothing: float) -> Tensor:
    """Probabilities (m, C): softmax(logits / T), or for T = 0 one-hot and smoothed (official main.py:518-541)."""
    if temperature:
        return (logits / temperature).softmax(1)
    num_classes = logits.shape[1]
    return F.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes


class TeachersLabels:
    """Labels that the teacher gives while the student trains: from the clean view, as stage 02 would give them.

    Called with a batch of unlabelled images whose first view is the clean one, it returns targets (m, C) in the order
    of `classes`. `source` has the defaults of the student: arch, arch_options, image_size, crop mode, data.
    """

    def __init__(self, args: argparse.Namespace, processes: Processes):
        self.teacher, self.source = load_model(args.teacher, processes.device, fuse=True)
        self.args, self.device, self.classes = args, processes.device, self.source["classes"]
        self.view, (self.amp, _) = View.of(self.source), autocast(precision_of(args.precision, processes), self.device)
        self.temperature = 1 if args.temperature is None else args.temperature
        print0(f"labels come from {args.teacher} on the fly, all of them: no confidence filter, no balance")

    @cached_property
    def images(self) -> ImageList:
        data = data_of(self.args, self.source)
        return unlabeled_images(self.args.unlabeled or data / "unlabeled", data)

    @property
    def inputs(self) -> dict:
        return {self.images.root: self.images}

    def __call__(self, batch: Batch) -> Tensor:
        images = batch.views[0].to(self.device, non_blocking=True)
        with self.amp, torch.no_grad():  # in as many parts as the student's batch, for the memory
            parts = images.tensor_split(self.args.accumulate)
            logits = torch.cat([self.teacher(normalize(part, self.view)) for part in parts]).float()
        return pseudo_targets(logits, logits.argmax(1), self.temperature, self.args.label_smoothing)


class StoredLabels:
    """The labels of a selection (03), from the logits files that it names (02) or from newer ones of the same images.

    Called with a batch of selected images it returns targets (m, C) in the order of `classes`. Nothing is read as a
    whole: the columns are mapped, and the processes and loaders of a machine share one copy. `source` has the defaults
    of the student: arch, image_size, crop mode, data.
    """

    view = None  # no clean view is needed

    def __init__(self, args: argparse.Namespace):
        path, folder = args.pseudo_labels, args.unlabeled
        files, columns, method = read_selection(path)
        number, row, self.label = columns.values()
        roots = {file.attrs["root"] for file in files.values()}
        if folder and len(roots) > 1:
            known = ", ".join(sorted(roots))
            fail(f"--unlabeled: {path} is of several folders, which must be where they were: {known}")
        lists = {i: image_list(file, folder) for i, file in files.items()}
        self.newer_label = {}
        newer = [open_label_file(name, LOGITS_FORMAT) for name in args.logits]
        done = np.ones(len(row), dtype=bool)
        for i, file in files.items():
            (rows,) = of_file(i, number, row)
            if newer:
                files[i] = file = newer_file(newer, file, lists[i], rows, ignore_root=len(roots) == 1)
                if method != "top-p":  # there the label is the class under which the image was chosen
                    self.newer_label[i] = map_dataset(file, "label")
            status = map_dataset(file, "status")[rows]
            if num_todo := (status == TODO).sum():
                fail(f"{file.filename} is unfinished: {num_todo} selected images have no label: run 02 again on it")
            done[number == i] = status == DONE
        if len({file.attrs["teacher_sha256"] for file in files.values()}) > 1:
            fail(f"{path}: its labels are of several teachers: {', '.join(file.filename for file in files.values())}")
        if not done.all():  # what the teacher of the newer labels could not read is left out
            number, row, self.label = number[done], row[done], self.label[done]
        self.path, self.files = path, files
        self.images, self.classes = SelectedImages(lists, number, row), read_classes(file)
        self.logits = {i: map_dataset(file, "logits") for i, file in files.items()}
        self.source = {"arch": file.attrs["arch"], "image_size": int(file.attrs["image_size"])}
        self.source |= {"data": os.path.dirname(file.attrs["root"]), "arch_options": options_of(file)}
        self.source |= {"crop_mode": crop_mode_of(file.attrs)}
        if args.teacher and file_sha256(args.teacher) != file.attrs["teacher_sha256"]:
            print0(f"--teacher {args.teacher} gives the defaults alone: the labels are of {file.attrs['teacher']}")
        self.temperature = (0 if method == "top-p" else 1) if args.temperature is None else args.temperature
        self.label_smoothing = args.label_smoothing

    @property
    def inputs(self) -> dict:
        """The selection, and of each logits file the rows in use: others may still be being filled."""
        rows = {i: of_file(i, self.images.file_number, self.images.row)[0] for i in self.files}
        return {self.path: self.path} | {file.filename: (file, rows[i]) for i, file in self.files.items()}

    def look_up(self, columns: dict[int, np.ndarray], examples: np.ndarray) -> np.ndarray:
        """The entries of the examples in a column of each logits file."""
        number, row = self.images.file_number[examples], self.images.row[examples]
        first = next(iter(columns.values()))
        values = np.empty((len(examples), *first.shape[1:]), first.dtype)
        for i in np.unique(number):
            values[number == i] = columns[i][row[number == i]]
        return values

    def __call__(self, batch: Batch) -> Tensor:
        examples = batch.rows.numpy()
        labels = self.look_up(self.newer_label, examples) if self.newer_label else self.label[examples]
        logits = np.zeros((len(examples), len(self.classes)))  # hard labels alone do not need them
        if self.temperature:
            logits = self.look_up(self.logits, examples)
        logits, labels = torch.from_numpy(logits).float(), torch.from_numpy(labels.astype(np.int64))
        return pseudo_targets(logits, labels, self.temperature, self.label_smoothing)


def main() -> None:
    args = parse_args()
    processes = init_processes(args.device, args.workers, args.out)
    begun = previous_run(args)

    # What the unlabelled images are said to show, and what the student takes over from its teacher unless a flag says
    # otherwise: the data, the architecture, the image size and the crop mode.
    labels_of = StoredLabels(args) if args.pseudo_labels else TeachersLabels(args, processes)
    source = read_checkpoint(args.teacher) if args.teacher else labels_of.source
    setup = setup_of(args, source)
    view, recipe = setup.view, setup.recipe

    # A step takes n labelled images and m = ratio x n unlabelled ones.
    num_labeled, num_unlabeled = args.batch_size, round(recipe.ratio * args.batch_size)
    unlabeled_weight = recipe.ratio if args.unlabeled_weight is None else args.unlabeled_weight
    if args.unlabeled_only:
        num_labeled, num_unlabeled = 0, args.batch_size
        unlabeled_weight = 1 if args.unlabeled_weight is None else args.unlabeled_weight
    if recipe.ratio and not num_unlabeled:
        fail(f"--ratio {recipe.ratio:g} of --batch-size {args.batch_size} is no image; --ratio 0 means none")
    same_images = args.consistency and not num_unlabeled  # the labelled images carry both losses
    check_parts(args.batch_size, f"--batch-size {args.batch_size}", args, processes)
    check_parts(num_unlabeled, f"--ratio {recipe.ratio:g}: {num_unlabeled} unlabelled images a step", args, processes)

    # Images and labels. Classes are matched by name: the teacher's may stand in another order.
    data = data_of(args, source)
    train_images, labels, classes = labeled_images(data, "train")
    val_images, val_labels, _ = labeled_images(data, "val", classes)
    if same_images:
        labels_of.images = train_images
    pseudo_images = labels_of.images
    if pseudo_images.is_lost:
        fail(f"--unlabeled: say where the images are, they are not where they were ({pseudo_images.name(0)})")
    columns = columns_of(classes, labels_of.classes, data)
    init_file = None if args.init == "published" else args.init
    inputs = {args.teacher: args.teacher, init_file: init_file, **labels_of.inputs}
    inputs = input_digests(inputs | data_inputs(data, train_images, val_images), processes)
    resume_or_exit(args, begun, inputs)
    bad = unreadable_images(train_images, view, args, processes, begun)
    train_images, labels = train_images.without(bad), np.delete(labels, bad)
    targets = torch.from_numpy(labels)  # int64 (images,)

    # The model, and the books of its training. An epoch is a pass over the labelled images, or over the selected ones.
    stage = "student"
    model, arch_options, origin = model_of(stage, setup, classes, args)
    steps_per_epoch = len(train_images) / num_labeled if num_labeled else len(pseudo_images) / num_unlabeled
    plan = plan_of(args, recipe.epochs, steps_per_epoch)
    header = {"stage": stage, "arch": setup.arch, "arch_options": arch_options, "classes": classes, **view.header}
    header |= {"data": os.path.abspath(data), "inputs": inputs}  # data: the next student's default
    num_images = num_labeled + num_unlabeled
    run = Run(args, processes, model, header, plan, (val_images, val_labels), num_images, bad, begun, setup.noise)
    run.announce(
        f"{len(train_images)} labelled images of {len(classes)} classes, {len(val_images)} val",
        f"{len(pseudo_images)} unlabelled images",
        f"{num_labeled} + {num_unlabeled} a step",
        f"RandAugment {recipe.num_ops} ops of magnitude {recipe.magnitude:g}, {model_noise(model)}",
        origin,
    )

    # Train. An unlabelled image is seen twice where a teacher labels on the fly: whole by the teacher, cropped by the
    # student. There the images of val are left out too; of the stored labels stage 02 has left them out.
    held_out = from_rank0(digests_of(val_images) if labels_of.view and processes.is_main else (), processes)
    clean, noised = labels_of.view, view if args.clean_unlabeled else setup.crop  # None: no such view is made
    labeled_views = {"clean": clean if same_images else None, "noised": setup.crop}
    labeled_batches = run.batches(train_images, num_labeled, "labeled", **labeled_views)
    views = {"clean": clean, "noised": noised, "held_out": held_out}
    unlabeled_batches = run.batches(pseudo_images, num_unlabeled, "unlabeled", **views)
    loss_of = consistency_loss if args.consistency else partial(noisy_student_loss, weight=unlabeled_weight)
    loss_of = partial(loss_of, label_smoothing=args.label_smoothing, temperature=labels_of.temperature or 1.0)
    for batch, pseudo in run.steps(labeled_batches, unlabeled_batches):
        # The last view of each image is the student's. Both kinds get the same noise, as one uint8 batch
        # (n + m, 3, H, W), the labelled ones first; with --clean-unlabeled they alone get it.
        images = torch.cat([batch.views[-1], pseudo.views[-1]]).to(processes.device, non_blocking=True)
        num_noised = len(batch.rows) if args.clean_unlabeled else len(images)
        images = torch.cat([setup.noise(images[:num_noised], run.generator), images[num_noised:]])
        # y of the readable images, int64 (n,); an unreadable image has no place in the batch.
        target = targets[batch.rows].to(processes.device, non_blocking=True)
        # y~, probabilities (m, C), the columns in the order of the student's classes: stored ones, or those of a
        # teacher that sees the clean view. same_images: it labels the labelled images, and they carry both losses.
        probs = labels_of(batch if same_images else pseudo)[:, columns].to(processes.device, non_blocking=True)
        tensors = target, images[: len(target)], images[len(target) :], probs
        # Gradient accumulation: both kinds are cut into --accumulate parts, which need less memory.
        for part_target, part_labeled, part_unlabeled, part_probs in run.parts(*tensors):
            # One forward pass for both kinds, so that batch norm sees both.
            with run.amp:
                logits = run.ddp_model(normalize(torch.cat([part_labeled, part_unlabeled]), view)).float()
            labeled_logits = logits[: len(part_target)]
            pseudo_logits = logits if same_images else logits[len(part_target) :]
            # The readable images n and m of a part, in the mean over parts and processes, as run.steps counted them:
            # divided by these, the sums of the losses of all parts and processes give the mean over the step.
            counts = run.counts[0], run.counts[0 if same_images else 1]
            # The cross-entropy with y, that with y~ at --temperature, and their weighted sum, which trains.
            losses = loss_of(labeled_logits, part_target, pseudo_logits, part_probs, *counts)
            run.backward(losses[0], loss_labeled=losses[1], loss_unlabeled=losses[2])  # the last two are only logged
        run.end_step()  # the optimizer's step and the average of the weights; logs, evaluates, saves where it is time
    run.finish()  # evaluates, draws curves.png, writes model.pt


if __name__ == "__main__":
    main()
