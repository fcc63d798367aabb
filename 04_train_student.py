"""Stage 04: train the noised student, equal or larger than its teacher, on labelled and unlabelled images together.

Its input is augmented and its layers are dropped, and its targets for the unlabelled images x~ are the clean teacher's
soft labels y~. Both kinds go through one forward pass, so batch norm sees both (1911.04252, algorithm 1, step 3):

    loss = (1/n) sum_i CE(y_i, f_noised(x_i)) + w (1/m) sum_i CE(y~_i, f_noised(x~_i)),    w = ratio = m / n

(w as in the official code, main.py:547-550: every image counts the same; the paper's algorithm 1 has w = 1.)
The labels come from a selection (02, 03), or, with --teacher alone, from the teacher on the fly: no filter, no balance.

reads   DATA/train, DATA/val; balanced.h5 and the logits.h5 and images it names, or the teacher and DATA/unlabeled
writes  OUT/model.pt (hand-off: the next teacher), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 04_train_student.py --teacher runs/teacher/model.pt --pseudo-labels runs/balanced.h5 --out runs/student
    torchrun --nproc-per-node 8 04_train_student.py --teacher runs/teacher/model.pt
"""

import argparse
import copy
import math
import os
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import (
    CHECKPOINT_FORMAT,
    DONE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LOGITS_FORMAT,
    TODO,
    Batch,
    ImageDataset,
    ImageRows,
    StopSignal,
    append_metrics,
    argument_parser,
    at_least,
    autocast,
    build_model,
    check_images,
    cut_metrics,
    default_crop_fraction,
    diverged,
    draw_curves,
    evaluate,
    fail,
    flags_of,
    image_rows,
    init_processes,
    labeled_images,
    learning_rate,
    load_batches,
    load_model,
    make_optimizer,
    map_dataset,
    micro_batches,
    normalize,
    open_label_file,
    parallel,
    previous_run,
    progress,
    rand_augment,
    read_classes,
    read_selection,
    reduce_sum,
    save_checkpoint,
    small_image_noise,
    soft_cross_entropy,
    step_generator,
    train_keys,
    unlabeled_images,
    update_ema,
    view_of,
)

# Epochs, RandAugment ops and magnitude, unlabelled images a labelled one of the official script
# (local_scripts/imagenet/train.sh:37-76); L0 and L1 as B7; the paper's ratio for L2 is 14, in its last round 28.
RECIPES = {
    "efficientnet_b0": (700, 0, 0, 1),
    "efficientnet_b1": (700, 0, 0, 3),
    "efficientnet_b2": (700, 2, 6, 3),
    "efficientnet_b3": (700, 2, 12, 3),
    "efficientnet_b4": (700, 2, 15, 3),
    "efficientnet_b5": (350, 2, 18, 3),
    "efficientnet_b6": (350, 2, 24, 3),
    "efficientnet_b7": (350, 2, 27, 3),
    "efficientnet_l0": (350, 2, 27, 3),
    "efficientnet_l1": (350, 2, 27, 3),
    "efficientnet_l2": (350, 2, 27, 14),
}
OTHER_RECIPE = (350, 2, 9, 3)  # any torchvision model: RandAugment's own setting for ResNet-50 (1909.13719)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, help="labels on the fly; beside --pseudo-labels it only gives the defaults")
    add("--pseudo-labels", type=Path, help="balanced.h5: the selected unlabelled images and their labels")
    add("--logits", type=Path, nargs="+", default=[], help="newer labels of the selected images: see 02 --only")
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; None: the teacher's own")
    add(
        "--unlabeled", type=Path, help="where the unlabelled images are; None: where they were labelled, DATA/unlabeled"
    )
    add("--out", type=Path, default=Path("runs/student"), help="folder of the results; run again on it to go on")
    add(
        "--ratio",
        type=at_least(0),
        help="unlabelled images a labelled one; None: official, 1 for B0, else 3, 14 for L2",
    )
    add("--unlabeled-weight", type=at_least(0), help="w of the loss; None: the ratio (official); 1 is algorithm 1's")
    add("--temperature", type=at_least(0), help="T of softmax(teacher's logits / T), 0: hard labels; None: 1, top-p 0")
    add("--unlabeled-only", action="store_true", help="pre-train on the selection alone, as the billion-scale recipe")
    add("--arch", help="efficientnet_b0..b7, _l0.._l2, also behind tf_, or torchvision's; None: the teacher's own")
    add("--small-images", action=argparse.BooleanOptionalAction, help="model and noise for 32 px; None: as the teacher")
    add("--dropout", type=at_least(0), help="rate before the classifier; None: the model's own (B0 0.2 ... B7 0.5)")
    add("--drop-path", type=at_least(0), help="stochastic depth of the last block; None: the model's own (paper: 0.2)")
    add("--bn-momentum", type=at_least(0), default=0.01, help="of running statistics (official); 0.1 in short runs")
    add("--zero-init-residual", action="store_true", help="blocks start as the identity: short runs learn sooner")
    add("--image-size", type=at_least(1, int), help="training resolution in pixels; None: the teacher's own")
    add("--batch-size", type=at_least(1, int), default=256, help="labelled images a step, all processes (paper: 2048)")
    add("--accumulate", type=at_least(1, int), default=1, help="parts a step: less memory; batch norm sees one part")
    add("--checkpoint-activations", action="store_true", help="EfficientNets: less memory, slower, same results")
    add("--epochs", type=at_least(0), help="passes over the labelled images; None: the paper's, 700 to B4, 350 above")
    add(
        "--optimizer", choices=["rmsprop", "sgd", "adamw"], default="rmsprop", help="rmsprop: TensorFlow's, the paper's"
    )
    add("--lr", type=at_least(0), help="peak learning rate; None: 0.016 x batch size / 256 (paper: 0.128 at 2048)")
    add("--schedule", choices=["staircase", "cosine", "constant"], default="staircase", help="staircase: 145 x 0.97")
    add("--warmup-epochs", type=at_least(0), default=5.0, help="linear warm-up from 0")
    add("--weight-decay", type=at_least(0), default=1e-5, help="of everything but batch norms; decoupled in adamw")
    add("--label-smoothing", type=at_least(0), default=0.1, help="of the hard labels")
    add("--ema-decay", type=at_least(0), default=0.9999, help="of the averaged weights, which are those that are kept")
    add("--num-ops", type=at_least(0, int), help="RandAugment ops an image; None: 2, but 0 for B0 and B1 (official)")
    add("--magnitude", type=at_least(0), help="of RandAugment on a scale of 10 without a cap; None: B2 6 ... B7, L* 27")
    add(
        "--min-crop-area",
        type=at_least(0),
        default=0.08,
        help="smallest random crop, as a share of the area; not with small images",
    )
    add("--hflip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images, not digits")
    add("--eval-every", type=at_least(0), default=1.0, help="epochs between evaluations on val, at which it also saves")
    add("--save-every", type=at_least(1, int), default=1000, help="steps between saving last.pt: what a crash can cost")
    add("--max-bad", type=at_least(0), default=1.0, help="percent of unreadable labelled images up to which it goes on")
    add("--seed", type=at_least(0, int), default=0, help="of weights, order, crops and noise")
    add("--workers", type=at_least(0, int), help="loaders a process; None: 0 on CPUs, its share of the cores on GPUs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs where there are any")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on GPUs, else fp32")
    add("--compile", action="store_true", help="torch.compile the model: a minute at the start, faster steps")
    return parser.parse_args()


def noisy_student_loss(logits, targets, pseudo_logits, pseudo_targets, num_pseudo, unlabeled_weight, label_smoothing):
    """(labelled mean + unlabeled_weight * unlabelled mean, the two means) of one process's share of the batch.

    logits (n, C), targets int64 (n,); pseudo_logits (m, C), pseudo_targets: probabilities (m, C); n or m may be 0.
    num_pseudo: the readable unlabelled images of a process, averaged over the processes: so the mean of their losses is
    the global one. Only labels that people gave are smoothed here (official main.py:502-541).
    """
    labeled = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / max(1, len(targets))
    unlabeled = soft_cross_entropy(pseudo_logits, pseudo_targets).sum() / (num_pseudo or 1)
    return labeled + unlabeled_weight * unlabeled, labeled, unlabeled


class Selection:
    """The training examples of a balanced.h5: their images, hard labels and logits (mapped, never read as a whole).

    `newer`: logits files of the same images to take the labels from instead; what they could not read is left out.
    """

    def __init__(self, path: Path, newer: list[Path], folder: Path | None):
        files, columns, self.method = read_selection(path)
        number, row, label = columns.values()
        roots = {file.attrs["root"] for file in files.values()}
        if folder and len(roots) > 1:
            fail(
                f"--unlabeled: {path} is of several folders, which must be where they were: {', '.join(sorted(roots))}"
            )
        newer = [open_label_file(name, LOGITS_FORMAT) for name in newer]
        self.logits, images, status = {}, [], []
        for i, file in files.items():
            rows = row[number == i]
            images.append(image_rows(file, folder)[rows])
            if newer:
                same = [f for f in newer if len(roots) == 1 or f.attrs["root"] == file.attrs["root"]]
                same = [f for f in same if len(f["status"]) == len(file["status"])]
                same = [f for f in same if np.array_equal(image_rows(f).path[rows], images[-1].path)]
                if not same:
                    fail(f"--logits: none of them has the images of {file.filename} in its rows")
                files[i] = file = same[0]
                label[number == i] = map_dataset(file, "label")[rows]
            status.append(map_dataset(file, "status")[rows])
            if num_todo := (status[-1] == TODO).sum():
                fail(f"{file.filename} is unfinished: {num_todo} selected images have no label: run 02 again on it")
            self.logits[i] = map_dataset(file, "logits")
        if len({file.attrs["teacher_sha256"] for file in files.values()}) > 1:
            fail(f"{path}: its labels are of several teachers: {', '.join(file.filename for file in files.values())}")
        self.source = dict(file.attrs)
        self.classes = read_classes(file)
        if len(roots) > 1:  # paths from the top
            images = [replace(r, root="/", path=np.char.add(os.fsencode(r.root[1:] + "/"), r.path)) for r in images]
        columns = (np.concatenate([getattr(rows, name) for rows in images]) for name in ("path", "offset", "size"))
        done = np.concatenate(status) == DONE
        self.images = ImageRows(images[0].root, *columns)[done]
        order = np.argsort(number, kind="stable")[done]
        self.number, self.row, self.label = number[order], row[order], torch.from_numpy(label[order]).long()

    def read_logits(self, examples: np.ndarray) -> torch.Tensor:
        logits = np.empty((len(examples), len(self.classes)), dtype=np.float32)
        number, row = self.number[examples], self.row[examples]
        for i in np.unique(number):
            logits[number == i] = self.logits[i][row[number == i]]
        return torch.from_numpy(logits)


def pseudo_targets(logits, labels, temperature: float, label_smoothing: float) -> torch.Tensor:
    """Probabilities (m, C): softmax(logits / T), T = 0: one-hot, smoothed as labels of people (main.py:518-541)"""
    if temperature:
        return (logits / temperature).softmax(1)
    num_classes = logits.shape[1]
    return F.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes


def main() -> None:
    args = parse_args()
    processes = init_processes(args.device)
    begun = previous_run(args.out, args, may_differ=("save_every", "checkpoint_activations"))
    if not args.teacher and not args.pseudo_labels:
        fail("--teacher or --pseudo-labels: one of them must say what the unlabelled images show")
    if args.unlabeled_only and not args.pseudo_labels:
        fail("--unlabeled-only needs --pseudo-labels: an epoch is a pass over the selected images")
    if args.logits and not args.pseudo_labels:
        fail("--logits needs --pseudo-labels: they replace the labels of a selection")
    selection = Selection(args.pseudo_labels, args.logits, args.unlabeled) if args.pseudo_labels else None
    teacher, source = (None, selection.source) if selection else (None, {})
    if args.teacher:
        teacher, source = load_model(args.teacher, processes.device, fuse=True)
    num_parts = processes.world_size * args.accumulate
    if args.batch_size % num_parts:
        fail(f"--batch-size {args.batch_size} cannot be split in {num_parts} parts (processes x --accumulate)")

    # data
    teachers_data = source.get("data") if teacher else os.path.dirname(source["root"])
    data = args.data or Path(teachers_data or ".")
    rows, labels, classes = labeled_images(data, "train")
    val_rows, val_labels, _ = labeled_images(data, "val", classes)
    arch = args.arch or source["arch"]
    small_images = args.small_images
    if small_images is None and teacher:
        small_images = source["arch_options"]["small_images"]
    image_size = args.image_size or int(source["image_size"])
    preprocessing = {"image_size": image_size, "crop_fraction": default_crop_fraction(image_size)}
    preprocessing |= {"interpolation": "bicubic", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    noised = {"image_size": image_size, "min_area": None if small_images else args.min_crop_area, "hflip": args.hflip}
    good = check_images(ImageDataset(rows, clean=view_of(preprocessing)), args.max_bad, processes, args.workers)
    rows, labels = rows[good], labels[good]
    targets = torch.from_numpy(labels)
    unlabeled = selection.images if selection else unlabeled_images(args.unlabeled or data / "unlabeled")
    if not os.path.isdir(unlabeled.root):
        fail(f"the folder of the unlabelled images is gone, {unlabeled.root}: say where it is with --unlabeled")
    labels_of = selection.classes if selection else source["classes"]
    if sorted(labels_of) != sorted(classes):
        fail(f"{data}/train has the classes {' '.join(classes[:5])} ..., the pseudo-labels {' '.join(labels_of[:5])}")
    columns = [labels_of.index(name) for name in classes]
    on_the_fly = view_of(source) if not selection else None

    # what follows from the flags
    num_images = [len(rows), len(unlabeled)]
    epochs, num_ops, magnitude, ratio = (
        given if given is not None else default
        for given, default in zip(
            (args.epochs, args.num_ops, args.magnitude, args.ratio),
            RECIPES.get(arch.removeprefix("tf_"), OTHER_RECIPE),
            strict=True,
        )
    )
    peak = args.lr if args.lr is not None else 0.016 * args.batch_size / 256
    num_labeled, num_unlabeled = args.batch_size, round(ratio * args.batch_size)  # a step
    if args.unlabeled_only:
        num_labeled, num_unlabeled = 0, args.batch_size
    if num_unlabeled % num_parts:
        fail(f"--ratio {ratio:g}: {num_unlabeled} unlabelled images a step cannot be split in {num_parts} parts")
    steps_per_epoch = len(unlabeled) / num_unlabeled if args.unlabeled_only else len(rows) / num_labeled
    unlabeled_weight = ratio if args.unlabeled_weight is None else args.unlabeled_weight
    top_p = selection is not None and selection.method == "top-p"
    temperature = args.temperature if args.temperature is not None else 0 if top_p else 1
    total_steps = round(epochs * steps_per_epoch)
    log_every = max(1, min(100, total_steps // 100))

    # model
    torch.manual_seed(args.seed)
    arch_options = {"small_images": small_images, "dropout": args.dropout, "drop_path": args.drop_path}
    arch_options |= {"zero_init_residual": args.zero_init_residual or None}
    try:
        model = build_model(arch, len(classes), **arch_options)
    except ValueError as error:
        fail(f"--arch: {error}")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = args.bn_momentum
    model.to(processes.device, memory_format=torch.channels_last)
    ema_model = copy.deepcopy(model)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    amp, scaler = autocast(args.precision, processes.device)
    start = 0
    if begun:
        start = begun["training"]["step"]
        if begun["training"]["images"] != num_images:
            fail(
                f"{args.out} was begun with {begun['training']['images']} images, not {num_images}: take another --out"
            )
        model.load_state_dict(begun["training"]["model"])
        ema_model.load_state_dict(begun["model"])
        optimizer.load_state_dict(begun["training"]["optimizer"])
        scaler.load_state_dict(begun["training"]["scaler"])
    header = {
        "format": CHECKPOINT_FORMAT,
        "stage": "student",
        "arch": arch,
        "arch_options": arch_options,
        "classes": classes,
        **preprocessing,
        "args": flags_of(args),
        "data": os.path.abspath(data),  # the next student's default
    }
    if processes.is_main:
        cut_metrics(args.out, start)
        print(
            f"{arch} at {image_size} px, {sum(p.numel() for p in model.parameters()):,} parameters; "
            f"{len(rows)} labelled images of {len(classes)} classes, {len(unlabeled)} unlabelled, {len(val_rows)} val; "
            f"{num_labeled} + {num_unlabeled} a step, {total_steps} steps, {steps_per_epoch:.1f} an epoch, "
            f"from step {start}; peak lr {peak:g}; RandAugment {num_ops} ops of magnitude {magnitude:g}; "
            f"{processes.world_size} x {processes.device.type}",
            flush=True,
        )
        if not selection:
            print(
                f"labels come from {args.teacher} on the fly, all of them: no confidence filter, no balance", flush=True
            )

    # train
    ddp_model = parallel(model, processes, args.compile, args.checkpoint_activations)
    dataset = ImageDataset(rows, noised=noised, seed=args.seed)
    keys = train_keys(len(rows), num_labeled, args.seed, 0, range(start, total_steps), processes)
    batches = load_batches(dataset, keys, processes, args.workers)
    dataset = ImageDataset(unlabeled, clean=on_the_fly, noised=noised, seed=args.seed)
    keys = train_keys(len(unlabeled), num_unlabeled, args.seed, 1, range(start, total_steps), processes)
    unlabeled_batches = load_batches(dataset, keys, processes, args.workers)
    nothing = Batch(
        torch.zeros(0, dtype=torch.int64), [torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8)], []
    )
    bad = {}  # unreadable unlabelled images that this process met: row -> reason
    stop = StopSignal(processes)
    loss_sum = torch.zeros(3, device=processes.device)
    logged = start

    def save(name: str, step: int, metrics: dict) -> None:
        training = {
            "step": step,
            "images": num_images,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        extra = {"training": training | {"scaler": scaler.state_dict()}} if name == "last.pt" else {}
        save_checkpoint(args.out / name, header | {"model": ema_model.state_dict(), "metrics": metrics} | extra)

    pairs = zip(batches if num_labeled else repeat(nothing), unlabeled_batches, strict=False)
    for step, (batch, pseudo) in enumerate(progress(pairs, total_steps, args.out.name, processes, start), start):
        lr = learning_rate(step, total_steps, steps_per_epoch, peak, args.schedule, args.warmup_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = step_generator(args.seed, step, processes.rank)
        bad.update(pseudo.errors)
        batch, pseudo = (part if len(part.rows) else nothing for part in (batch, pseudo))
        images = torch.cat([batch.views[0], pseudo.views[-1]]).to(processes.device, non_blocking=True)
        if num_ops:
            images = rand_augment(images, num_ops, magnitude, generator)
        if small_images:
            images = small_image_noise(images, args.hflip, generator)
        target = targets[batch.rows].to(processes.device, non_blocking=True)
        if selection:
            examples = pseudo.rows.numpy()
            pseudo_labels = selection.label[examples]
            # hard labels alone: the logits need not be read
            pseudo_logits = selection.read_logits(examples) if temperature else torch.zeros(len(examples), len(classes))
        else:
            clean_images = pseudo.views[0].to(processes.device, non_blocking=True).tensor_split(args.accumulate)
            with amp, torch.no_grad():
                pseudo_logits = [teacher(normalize(part, source["mean"], source["std"])) for part in clean_images]
            pseudo_logits = torch.cat(pseudo_logits).float()
            pseudo_labels = pseudo_logits.argmax(1)
        probs = pseudo_targets(pseudo_logits, pseudo_labels, temperature, args.label_smoothing)
        # the readable ones of a part, in the mean over the processes
        num_pseudo = reduce_sum(torch.tensor(float(len(pseudo.rows))), processes).item() / num_parts
        probs = probs[:, columns].to(processes.device, non_blocking=True)
        optimizer.zero_grad()
        parts = target, images[: len(target)], images[len(target) :], probs
        for part_target, part_images, part_unlabeled, part_probs in micro_batches(ddp_model, args.accumulate, *parts):
            with amp:
                logits = ddp_model(normalize(torch.cat([part_images, part_unlabeled]), header["mean"], header["std"]))
            logits, n = logits.float(), len(part_target)
            loss, labeled_loss, unlabeled_loss = noisy_student_loss(
                logits[:n], part_target, logits[n:], part_probs, num_pseudo, unlabeled_weight, args.label_smoothing
            )
            scaler.scale(loss / args.accumulate).backward()
            loss_sum += torch.stack([loss, labeled_loss, unlabeled_loss]).detach() / args.accumulate
        scaler.step(optimizer)
        scaler.update()
        update_ema(ema_model, model, step + 1, args.ema_decay)

        done, epoch = step + 1, (step + 1) / steps_per_epoch
        stopped = stop()
        evaluates = (
            done < total_steps
            and args.eval_every
            and epoch // args.eval_every > (step / steps_per_epoch) // args.eval_every
        )
        saves = stopped or evaluates or done % args.save_every == 0
        if saves or done % log_every == 0 or done == total_steps:
            # the only host synchronisation of the loop
            means = (reduce_sum(loss_sum, processes) / processes.world_size / (done - logged)).tolist()
            if not math.isfinite(means[0]):
                diverged(args.out)
            line = {"step": done, "epoch": epoch, "lr": lr}
            line |= dict(zip(("loss", "loss_labeled", "loss_unlabeled"), means, strict=True))
            if evaluates and not stopped:
                line |= evaluate(ema_model, val_rows, val_labels, header, processes, args.workers)
            if processes.is_main:
                append_metrics(args.out, **line)
                if saves:
                    print(", ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
                    save("last.pt", done, line)
            loss_sum.zero_()
            logged = done
        if stopped:
            raise SystemExit(143)

    # evaluate and save: model.pt last of what others need, for it says that the run is finished
    metrics = evaluate(ema_model, val_rows, val_labels, header, processes, args.workers)
    if processes.is_main:
        append_metrics(args.out, step=total_steps, epoch=epochs, **metrics)
        draw_curves(args.out)
        save("model.pt", total_steps, metrics)
        save("last.pt", total_steps, metrics)
        print(f"{args.out / 'model.pt'}: val_top1 {metrics['val_top1']:.2f} on {len(val_rows)} images", flush=True)
    if bad:
        print(f"{len(bad)} unlabelled images are unreadable and were left out; the first: {next(iter(bad.values()))}")
    if stop():
        raise SystemExit(143)


if __name__ == "__main__":
    main()
