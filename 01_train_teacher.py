"""Stage 01: train the teacher, an ordinary supervised classifier, with the noise that its student will get.

The teacher minimizes (1/n) sum_i CE(y_i, f_noised(x_i)) over the labelled images: RandAugment on the input, dropout and
stochastic depth in the model (Xie et al., 1911.04252, algorithm 1, step 1). What is kept is the running average of the
weights. `diff 01_train_teacher.py 04_train_student.py` shows what the paper adds.

reads   DATA/train, DATA/val; --init: weights to start from, of this toolkit, torchvision or timm
writes  OUT/model.pt (hand-off), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b0
    torchrun --nproc-per-node 8 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b7
    python 01_train_teacher.py --data DATA --init tf_efficientnet_b7_ns.pth --arch tf_efficientnet_b7 --epochs 0
"""

import argparse
import copy
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (
    CHECKPOINT_FORMAT,
    EFFICIENTNETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageDataset,
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
    init_processes,
    labeled_images,
    learning_rate,
    load_batches,
    load_weights,
    make_optimizer,
    micro_batches,
    normalize,
    own_names,
    parallel,
    previous_run,
    progress,
    rand_augment,
    read_file,
    reduce_sum,
    save_checkpoint,
    small_image_noise,
    step_generator,
    train_keys,
    update_ema,
    view_of,
)

# Epochs, RandAugment ops and magnitude of the official script (local_scripts/imagenet/train.sh:37-76); L0 and L1 as L2.
RECIPES = {
    "efficientnet_b0": (700, 0, 0),
    "efficientnet_b1": (700, 0, 0),
    "efficientnet_b2": (700, 2, 6),
    "efficientnet_b3": (700, 2, 12),
    "efficientnet_b4": (700, 2, 15),
    "efficientnet_b5": (350, 2, 18),
    "efficientnet_b6": (350, 2, 24),
    "efficientnet_b7": (350, 2, 27),
    "efficientnet_l0": (350, 2, 27),
    "efficientnet_l1": (350, 2, 27),
    "efficientnet_l2": (350, 2, 27),
}
OTHER_RECIPE = (350, 2, 9)  # any torchvision model: RandAugment's own setting for ResNet-50 (1909.13719)
# How the images of published TensorFlow weights must look: a pattern of "arch path/file", the first that fits counts;
# resolution in pixels (None: the model's own), mean, std. The crop is size / (size + 32), bicubic (official
# preprocessing.py:104-134). What must be known of torchvision's own weights torchvision records itself.
PUBLISHED = (
    (r"^tf_efficientnet_l2 .*ns(_jft_in1k)?_475", 475, IMAGENET_MEAN, IMAGENET_STD),  # timm's ns_jft_in1k_475
    (r"^tf_efficientnet_l2 ", 800, IMAGENET_MEAN, IMAGENET_STD),  # timm's ns_jft_in1k: trained at 475, tuned for 800
    (r"^tf_.*[._]ap[-._]", None, (0.5,) * 3, (0.5,) * 3),  # AdvProp, timm's ap_in1k
    (r"^tf_|^efficientnet_l", None, IMAGENET_MEAN, IMAGENET_STD),  # Noisy Student (timm's ns_jft_in1k), aa_in1k, in1k
)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="data directory with train/<class>/, maybe val/<class>/")
    add("--out", type=Path, default=Path("runs/teacher"), help="folder of the results; run again on it to go on")
    add("--init", type=Path, help="weights to start from (.pt, .pth, .safetensors); other classes: a new classifier")
    add("--arch", help="efficientnet_b0..b7, _l0.._l2, also behind tf_, or torchvision's; None: that of --init, or B0")
    add(
        "--small-images",
        action=argparse.BooleanOptionalAction,
        help="model and noise for 32 px; None: as --init, or not",
    )
    add("--dropout", type=at_least(0), help="rate before the classifier; None: the model's own (B0 0.2 ... B7 0.5)")
    add("--drop-path", type=at_least(0), help="stochastic depth of the last block; None: the model's own (paper: 0.2)")
    add("--bn-momentum", type=at_least(0), default=0.01, help="of running statistics (official); 0.1 in short runs")
    add("--zero-init-residual", action="store_true", help="blocks start as the identity: short runs learn sooner")
    add(
        "--image-size", type=at_least(1, int), help="training resolution in pixels; None: as --init, or the model's own"
    )
    add("--batch-size", type=at_least(1, int), default=256, help="images a step over all processes (paper: 2048)")
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


def read_initial(path: Path, arch: str | None) -> dict:
    """The checkpoint --init, or for a foreign file a dict like one: its weights and how their images must look.

    torchvision's weights are known by the file's name; another file is taken for the first it published of that model,
    which is right for the semi-supervised ResNets (1905.00546: 224 pixels of 256, bilinear).
    """
    source = read_file(path)
    if isinstance(source, dict) and source.get("format") == CHECKPOINT_FORMAT:
        return source
    if not arch:
        fail(f"--init {path} is not of this toolkit: --arch must say of which model its weights are")
    name = f"{arch} {'/'.join(path.absolute().parts[-4:])}"  # the Hugging Face cache has the name three folders up
    if found := next((row for pattern, *row in PUBLISHED if re.search(pattern, name)), None):
        size, mean, std = found
        size = size or EFFICIENTNETS.get(arch.removeprefix("tf_"), (0, 0, 224))[2]
        crop_fraction, interpolation = default_crop_fraction(size), "bicubic"
    else:
        from torchvision import models

        if arch not in models.list_models(module=models):
            fail(f"--arch {arch}: neither an EfficientNet nor one of torchvision's classification models")
        published = list(models.get_model_weights(arch))
        record = next((one for one in published if Path(one.url).name == path.name), published[0]).transforms()
        size, mean, std = record.crop_size[0], tuple(record.mean), tuple(record.std)
        crop_fraction, interpolation = size / record.resize_size[0], record.interpolation.value
    view = {"image_size": size, "crop_fraction": crop_fraction, "interpolation": interpolation}
    return {"arch": arch, "model": source} | view | {"mean": mean, "std": std}


def load_initial_weights(model: torch.nn.Module, source: dict, args: argparse.Namespace, classes: list[str]) -> bool:
    """Start from --init; whether its classifier came along: only where it has the same classes in the same order."""
    try:
        weights = own_names(source)
        known = source.get("classes")  # of a foreign file only the number is known, from the last layer
        number = len(known or weights.get(list(model.state_dict())[-1], classes))
        same = known == classes if known else number == len(classes)
        if not same and args.epochs == 0:
            fail(f"--init {args.init} has {number} other classes than --data ({len(classes)}): --epochs 0 trains none")
        load_weights(model, weights, new_head=not same)
    except ValueError as error:
        fail(f"--init {args.init} does not fit --arch {args.arch or source['arch']}: {error}")
    return same


def main() -> None:
    args = parse_args()
    processes = init_processes(args.device)
    begun = previous_run(args.out, args, may_differ=("save_every", "checkpoint_activations"))
    num_parts = processes.world_size * args.accumulate
    if args.batch_size % num_parts:
        fail(f"--batch-size {args.batch_size} cannot be split in {num_parts} parts (processes x --accumulate)")
    source = read_initial(args.init, args.arch) if args.init else {}

    # data
    rows, labels, classes = labeled_images(args.data, "train")
    val_rows, val_labels, _ = labeled_images(args.data, "val", classes)
    arch = args.arch or source.get("arch", "efficientnet_b0")
    small_images = args.small_images
    if small_images is None and source:
        small_images = source.get("arch_options", {}).get("small_images")
    own_size = source.get("image_size") or EFFICIENTNETS.get(arch.removeprefix("tf_"), (0, 0, 224))[2]
    image_size = args.image_size or own_size
    preprocessing = {"image_size": image_size, "crop_fraction": default_crop_fraction(image_size)}
    preprocessing |= {"interpolation": "bicubic", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if source:  # the crop belongs to the size
        kept = preprocessing.keys() if image_size == own_size else {"interpolation", "mean", "std"}
        preprocessing |= {name: source[name] for name in kept & source.keys()}
    noised = {"image_size": image_size, "min_area": None if small_images else args.min_crop_area, "hflip": args.hflip}
    if args.epochs != 0:  # otherwise train/ gives nothing but the names of the classes
        good = check_images(ImageDataset(rows, clean=view_of(preprocessing)), args.max_bad, processes, args.workers)
        rows, labels = rows[good], labels[good]
    targets = torch.from_numpy(labels)

    # what follows from the flags
    num_images = [len(rows)]
    epochs, num_ops, magnitude = (
        given if given is not None else default
        for given, default in zip(
            (args.epochs, args.num_ops, args.magnitude),
            RECIPES.get(arch.removeprefix("tf_"), OTHER_RECIPE),
            strict=True,
        )
    )
    peak = args.lr if args.lr is not None else 0.016 * args.batch_size / 256
    steps_per_epoch = len(rows) / args.batch_size
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
    same_classes = not source or load_initial_weights(model, source, args, classes)
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
        "stage": "teacher",
        "arch": arch,
        "arch_options": arch_options,
        "classes": classes,
        **preprocessing,
        "args": flags_of(args),
        "data": os.path.abspath(args.data),  # the student's default
    }
    if processes.is_main:
        cut_metrics(args.out, start)
        print(
            f"{arch} at {image_size} px, {sum(p.numel() for p in model.parameters()):,} parameters; "
            f"{len(rows)} labelled images of {len(classes)} classes, {len(val_rows)} val; "
            f"{args.batch_size} a step, {total_steps} steps, {steps_per_epoch:.1f} an epoch, from step {start}; "
            f"peak lr {peak:g}; RandAugment {num_ops} ops of magnitude {magnitude:g}; "
            f"{processes.world_size} x {processes.device.type}",
            flush=True,
        )
        if source:
            new = "" if same_classes else " with a new classifier, for it had other classes"
            print(f"from {args.init}{new}; the clean view: {view_of(preprocessing)}, mean {preprocessing['mean']}")

    # train
    ddp_model = parallel(model, processes, args.compile, args.checkpoint_activations)
    dataset = ImageDataset(rows, noised=noised, seed=args.seed)
    keys = train_keys(len(rows), args.batch_size, args.seed, 0, range(start, total_steps), processes)
    batches = load_batches(dataset, keys, processes, args.workers)
    stop = StopSignal(processes)
    loss_sum = torch.zeros(1, device=processes.device)
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

    for step, batch in enumerate(progress(batches, total_steps, args.out.name, processes, start), start):
        lr = learning_rate(step, total_steps, steps_per_epoch, peak, args.schedule, args.warmup_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = step_generator(args.seed, step, processes.rank)
        images = batch.views[0].to(processes.device, non_blocking=True)
        if num_ops:
            images = rand_augment(images, num_ops, magnitude, generator)
        if small_images:
            images = small_image_noise(images, args.hflip, generator)
        target = targets[batch.rows].to(processes.device, non_blocking=True)
        optimizer.zero_grad()
        for part_target, part_images in micro_batches(ddp_model, args.accumulate, target, images):
            with amp:
                logits = ddp_model(normalize(part_images, header["mean"], header["std"]))
            loss = F.cross_entropy(logits.float(), part_target, label_smoothing=args.label_smoothing)
            scaler.scale(loss / args.accumulate).backward()
            loss_sum += loss.detach() / args.accumulate
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
            mean_loss = reduce_sum(loss_sum, processes).item() / processes.world_size / (done - logged)
            if not math.isfinite(mean_loss):
                diverged(args.out)
            line = {"step": done, "epoch": epoch, "lr": lr, "loss": mean_loss}
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
    if stop():
        raise SystemExit(143)


if __name__ == "__main__":
    main()
