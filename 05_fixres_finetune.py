"""Stage 05: fine-tune the end of the network for a larger test resolution, on clean labelled images (FixRes).

Random crops make objects look larger in training than the centre crop does in testing. So: train at a low
resolution, which is cheap, then adapt the last layers for an epoch or two to the statistics of a higher one, with the
images exactly as they are tested (Touvron et al., 1906.06423; 1911.04252, section 3: L2 from 475 to 800 pixels).

    minimize (1/n) sum_i CE(y_i, f(clean view of x_i at the new size)) over the layers that are not frozen

reads   --checkpoint model.pt; DATA/train, DATA/val
writes  OUT/model.pt, OUT/last.pt, OUT/metrics.jsonl, OUT/curves.png, OUT/resolution.png (top-1 against test resolution)

    python 05_fixres_finetune.py --checkpoint runs/student/model.pt --image-size 320 --out runs/fixres
    torchrun --nproc-per-node 8 05_fixres_finetune.py --checkpoint student.pt --image-size 800 --out runs/fixres
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (
    EfficientNet,
    ImageDataset,
    MBConv,
    StopSignal,
    append_metrics,
    argument_parser,
    at_least,
    autocast,
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
    load_model,
    make_optimizer,
    micro_batches,
    normalize,
    parallel,
    previous_run,
    progress,
    pyplot,
    reduce_sum,
    save_checkpoint,
    save_figure,
    step_generator,
    train_keys,
    view_of,
)

# The official code goes on at the end of its schedule (main.py:226-229, 582): after 145 decays of 0.97.
END_OF_SCHEDULE = 0.97**145
RESOLUTION_IMAGES = 2000  # val images, evenly spaced, behind each point of resolution.png


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="model.pt to fine-tune")
    add("--image-size", type=at_least(1, int), required=True, help="the new resolution in pixels (paper: 800 for L2)")
    add("--out", type=Path, required=True, help="folder of the results; run again on it to go on after an interruption")
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; None: the checkpoint's own")
    add("--frozen-blocks", type=at_least(0, int), help="the stem and the first N blocks stay; None: all of the blocks")
    add("--batch-size", type=at_least(1, int), default=256, help="images a step over all processes")
    add("--accumulate", type=at_least(1, int), default=1, help="parts a step: less memory; batch norm sees one part")
    add("--checkpoint-activations", action="store_true", help="EfficientNets: less memory, slower, same results")
    add("--epochs", type=at_least(0), default=1.5, help="passes over the labelled images (paper: 1.5)")
    add("--optimizer", choices=["rmsprop", "sgd", "adamw"], default="rmsprop", help="rmsprop: TensorFlow's (paper)")
    add("--lr", type=at_least(0), help="learning rate; None: 0.016 x 0.97^145 x batch size / 256, the schedule's end")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="over the run; there is no warm-up")
    add("--weight-decay", type=at_least(0), default=1e-5, help="of everything but batch norms; decoupled in adamw")
    add("--label-smoothing", type=at_least(0), default=0.1, help="of the hard labels")
    add("--save-every", type=at_least(1, int), default=1000, help="steps between saving last.pt: what a crash can cost")
    add("--max-bad", type=at_least(0), default=1.0, help="percent of unreadable labelled images up to which it goes on")
    add("--seed", type=at_least(0, int), default=0, help="of the order and the dropout")
    add("--workers", type=at_least(0, int), help="loaders a process; None: 0 on CPUs, its share of the cores on GPUs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs where there are any")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on GPUs, else fp32")
    add("--compile", action="store_true", help="torch.compile the model: a minute at the start, faster steps")
    return parser.parse_args()


def freeze(model: torch.nn.Module, frozen_blocks: int | None) -> list[torch.nn.Module]:
    """Freeze the shallow layers; returns the modules that stay in inference mode while the others train.

    EfficientNet: the stem and the first blocks, their batch norms included (official efficientnet_model.py:382-418);
    with all blocks frozen the head convolution, its batch norm and the classifier train. Any other model: all but its
    last linear layer, as FixRes does for ResNets.
    """
    model.requires_grad_(False)
    if isinstance(model, EfficientNet):
        blocks = [module for module in model.modules() if isinstance(module, MBConv)]
        number = len(blocks) if frozen_blocks is None else frozen_blocks
        if number > len(blocks):
            fail(f"--frozen-blocks {number}: the model has {len(blocks)} blocks")
        frozen = [model.features[0], *blocks[:number]]
        trained = [*blocks[number:], model.features[-1], model.classifier]
    else:
        if frozen_blocks is not None:
            fail("--frozen-blocks is for EfficientNets; of other models the last linear layer trains")
        trained = [[module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]]
        frozen = [model]
    for module in trained:
        for parameter in module.parameters():
            parameter.requires_grad_()
    return frozen


def draw_resolutions(path: Path, curves: dict[str, list[tuple[int, float]]], sizes: tuple[int, int]) -> None:
    if (plt := pyplot()) is None:
        return
    plt.figure(figsize=(5, 3.4), layout="constrained")
    for name, points in curves.items():
        plt.plot(*zip(*points, strict=True), marker=".", label=name)
    for size, style, name in zip(sizes, (":", "--"), ("trained at", "fine-tuned at"), strict=True):
        plt.axvline(size, color="grey", linestyle=style, linewidth=1, label=f"{name} {size} px")
    plt.xlabel("test resolution in pixels")
    plt.ylabel("val top-1, percent")
    plt.legend(frameon=False)
    save_figure(plt, path)


def main() -> None:
    args = parse_args()
    processes = init_processes(args.device)
    begun = previous_run(args.out, args, may_differ=("save_every", "checkpoint_activations"))
    num_parts = processes.world_size * args.accumulate
    if args.batch_size % num_parts:
        fail(f"--batch-size {args.batch_size} cannot be split in {num_parts} parts (processes x --accumulate)")
    model, source = load_model(args.checkpoint, processes.device)

    # data: the clean view, in training as in testing
    data = args.data or Path(source["data"])
    rows, labels, classes = labeled_images(data, "train", source["classes"])
    val_rows, val_labels, _ = labeled_images(data, "val", classes)
    view = view_of(source) | {"image_size": args.image_size, "crop_fraction": default_crop_fraction(args.image_size)}
    dataset = ImageDataset(rows, clean=view)
    good = check_images(dataset, args.max_bad, processes, args.workers)
    rows, labels = rows[good], labels[good]
    targets = torch.from_numpy(labels)
    dataset = ImageDataset(rows, clean=view)

    num_images = [len(rows)]
    peak = args.lr if args.lr is not None else 0.016 * END_OF_SCHEDULE * args.batch_size / 256
    steps_per_epoch = len(rows) / args.batch_size
    total_steps = round(args.epochs * steps_per_epoch)
    log_every = max(1, min(100, total_steps // 100))
    header = {key: value for key, value in source.items() if key not in ("training", "metrics", "model")}
    header |= view | {"stage": "fixres", "args": flags_of(args), "data": os.path.abspath(data)}

    # before: how the checkpoint does at each resolution
    change = args.image_size - source["image_size"]
    sizes = {round(source["image_size"] + share * change) for share in (0, 0.5, 1, 1.5)}
    every = max(1, len(val_rows) // RESOLUTION_IMAGES)

    def resolution_curve() -> list[tuple[int, float]]:
        points = []
        for size in sorted(size for size in sizes if size >= 1):
            at_size = header | {"image_size": size, "crop_fraction": default_crop_fraction(size)}
            subset = val_rows[::every], val_labels[::every]
            points.append((size, evaluate(model, *subset, at_size, processes, args.workers)["val_top1"]))
        return points

    before = resolution_curve()

    frozen = freeze(model, args.frozen_blocks)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_trained > 0
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    amp, scaler = autocast(args.precision, processes.device)
    start = 0
    if begun:
        start = begun["training"]["step"]
        if begun["training"]["images"] != num_images:
            fail(
                f"{args.out} was begun with {begun['training']['images']} images, not {num_images}: take another --out"
            )
        model.load_state_dict(begun["model"])
        optimizer.load_state_dict(begun["training"]["optimizer"])
        scaler.load_state_dict(begun["training"]["scaler"])
    if processes.is_main:
        cut_metrics(args.out, start)
        print(
            f"{source['arch']} from {source['image_size']} to {args.image_size} px, {num_trained:,} of "
            f"{sum(p.numel() for p in model.parameters()):,} parameters train; {len(rows)} labelled images, "
            f"{args.batch_size} a step, {total_steps} steps, from {start}; lr {peak:g}",
            flush=True,
        )

    # train; no running average: over so few steps it would stay where it began
    ddp_model = parallel(model, processes, args.compile, args.checkpoint_activations)
    keys = train_keys(len(rows), args.batch_size, args.seed, 0, range(start, total_steps), processes)
    batches = load_batches(dataset, keys, processes, args.workers)
    stop = StopSignal(processes)
    loss_sum = torch.zeros(1, device=processes.device)
    logged = start

    def save(name: str, step: int, metrics: dict) -> None:
        training = {
            "step": step,
            "images": num_images,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        extra = {"training": training} if name == "last.pt" else {}
        save_checkpoint(args.out / name, header | {"model": model.state_dict(), "metrics": metrics} | extra)

    model.train()
    for module in frozen:
        module.eval()
    for step, batch in enumerate(progress(batches, total_steps, args.out.name, processes, start), start):
        lr = learning_rate(step, total_steps, steps_per_epoch, peak, args.schedule, 0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_generator(args.seed, step, processes.rank)  # for the dropout
        images = batch.views[0].to(processes.device, non_blocking=True)
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

        done = step + 1
        stopped = stop()
        saves = stopped or done % args.save_every == 0
        if saves or done % log_every == 0 or done == total_steps:
            # the only host synchronisation of the loop
            mean_loss = reduce_sum(loss_sum, processes).item() / processes.world_size / (done - logged)
            if not math.isfinite(mean_loss):
                diverged(args.out)
            line = {"step": done, "epoch": done / steps_per_epoch, "lr": lr, "loss": mean_loss}
            if processes.is_main:
                append_metrics(args.out, **line)
                if saves:
                    save("last.pt", done, line)
            loss_sum.zero_()
            logged = done
        if stopped:
            raise SystemExit(143)

    # evaluate and save
    metrics = evaluate(model, val_rows, val_labels, header, processes, args.workers)
    after = resolution_curve()
    if processes.is_main:
        append_metrics(args.out, step=total_steps, epoch=args.epochs, **metrics)
        draw_curves(args.out)
        curves = {"before": before, "after fine-tuning": after}
        draw_resolutions(args.out / "resolution.png", curves, (source["image_size"], args.image_size))
        save("model.pt", total_steps, metrics)
        save("last.pt", total_steps, metrics)
        old, new = dict(before)[source["image_size"]], dict(before)[args.image_size]
        print(
            f"{args.out / 'model.pt'}: val_top1 {metrics['val_top1']:.2f} at {args.image_size} px; it was {old:.2f} at "
            f"{source['image_size']} px and {new:.2f} at {args.image_size} px (on {len(val_rows[::every])} images)",
            flush=True,
        )
    if stop():
        raise SystemExit(143)


if __name__ == "__main__":
    main()
