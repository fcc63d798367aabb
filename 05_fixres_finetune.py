"""Stage 05: fine-tune the network for a larger test resolution, on clean labelled images (FixRes).

Random crops make objects look larger in training than the centre crop does in testing. So: train at a low
resolution, which is cheap, then adapt the network for an epoch or two to the statistics of a higher one, with the
images exactly as they are tested (Touvron et al., 1906.06423; 1911.04252, section 3: L2 from 475 to 800 pixels).

    minimize (1/n) sum_i CE(y_i, f(clean view of x_i at the new size)) over the layers that are not frozen

The defaults are for small sets, found on the demo; @recipes/fixres-l2.txt has the paper's.

reads   --checkpoint model.pt; DATA/train, DATA/val
writes  OUT/model.pt, OUT/last.pt, OUT/metrics.jsonl, OUT/curves.png, OUT/resolution.png (top-1 against test resolution)

    python 05_fixres_finetune.py --checkpoint runs/student/model.pt --out runs/fixres
    torchrun --nproc-per-node 8 05_fixres_finetune.py @recipes/fixres-l2.txt --checkpoint student.pt --out runs/fixres
"""

import argparse
import contextlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (
    COUNT,
    RATE,
    add_optimization_flags,
    add_run_flags,
    argument_parser,
    at_least,
    fail,
    print0,
)  # program
from common import init_processes  # processes
from common import EfficientNet, MBConv  # models
from common import View, normalize  # views
from common import check_copies, labeled_images  # listing
from common import plan_of  # optimization
from common import compare_inputs, data_of, load_model, previous_run  # checkpoints
from common import check_parts, evaluate, precision_of, set_bn_momentum  # training
from common import Run  # the training run
from common import pyplot, save_figure  # pictures

RESOLUTION_IMAGES = 2000  # val images, evenly spaced, behind each point of resolution.png


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="model.pt to fine-tune")
    add("--image-size", type=COUNT, help="the new resolution in pixels (paper: 800 for L2); None: 5/4 of the old one")
    add("--out", type=Path, required=True, help="folder of the results; the same command resumes it")
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; None: the checkpoint's own")
    blocks = (
        "the stem and the first N blocks stay; all: the last linear layer alone trains, as in FixRes and for ResNets"
    )
    add("--frozen-blocks", type=at_least(0, int, words=("all",)), default=0, help=blocks)
    momentum_help = "of running statistics (official 0.01); 0: frozen; None: 0.1, or 0 if the checkpoint's were frozen"
    add("--bn-momentum", type=RATE, help=momentum_help)
    add_optimization_flags(parser, from_scratch=False)
    add_run_flags(parser, evaluates=False)
    parser.set_defaults(optimizer="adamw", schedule="cosine")
    return parser.parse_args()


def freeze(model: torch.nn.Module, frozen_blocks: int | str) -> None:
    """Freeze the shallow layers, which then stay in inference mode while the others are in training mode.

    N: the blocks after the first N train, and all behind them, batch norms included (official
    efficientnet_model.py:382-418; the paper's N is not published). all, and models that are no EfficientNet: the last
    linear layer trains, and the last batch norm takes on the statistics of the new size with its weights frozen
    (FixRes' imnet_finetune/train.py). On small images more is better: docs/fixres.md.
    """
    model.requires_grad_(False).eval()
    if isinstance(model, EfficientNet) and frozen_blocks != "all":
        blocks = [module for module in model.modules() if isinstance(module, MBConv)]
        if frozen_blocks > len(blocks):
            fail(f"--frozen-blocks {frozen_blocks}: the model has {len(blocks)} blocks")
        trained = [*blocks[frozen_blocks:], model.features[-1], model.classifier]
    else:
        modules = list(model.modules())
        trained = [module for module in modules if isinstance(module, torch.nn.Linear)][-1:]
        norms = [module for module in modules if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        dropouts = [module for module in modules if isinstance(module, torch.nn.Dropout)]
        for module in norms[-1:] + dropouts:
            module.train()
    if not trained:
        fail("--checkpoint: the model has no linear layer that could be fine-tuned")
    for module in trained:
        module.train().requires_grad_()


def resolution_curve(model, view: View, val, sizes: list[int], processes, precision: str) -> dict[int, float]:
    """{test resolution in pixels: top-1 in percent} on some of the val images, evenly spaced."""
    images, labels = val
    every = max(1, len(images) // RESOLUTION_IMAGES)
    curve = {}
    for size in sizes:
        with contextlib.suppress(AssertionError, RuntimeError, ValueError):  # a transformer may take one size alone
            metrics = evaluate(model, images[::every], labels[::every], view.at(size), processes, precision)
            curve[size] = metrics["val_top1"]
    return curve


def draw_resolutions(path: Path, before: dict, after: dict, old_size: int, new_size: int) -> None:
    plt = pyplot()
    if plt is None:
        return
    plt.figure(figsize=(5, 3.4), layout="constrained")
    for name, curve in (("before", before), ("after fine-tuning", after)):
        plt.plot(list(curve), list(curve.values()), marker=".", label=name)
    for size, style, name in ((old_size, ":", "trained at"), (new_size, "--", "fine-tuned at")):
        plt.axvline(size, color="grey", linestyle=style, linewidth=1, label=f"{name} {size} px")
    plt.xlabel("test resolution in pixels")
    plt.ylabel("val top-1, percent")
    plt.legend(frameon=False)
    save_figure(plt, path)


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    resumed = previous_run(args)
    check_parts(args.batch_size, f"--batch-size {args.batch_size}", args, processes)
    model, source = load_model(args.checkpoint, processes.device)

    # Images and labels. Training images look exactly as test images do: the clean view at the new size, without noise.
    data = data_of(args, source)
    train_images, labels, classes = labeled_images(data, "train", source["classes"])
    val = labeled_images(data, "val", classes)[:2]
    inputs = compare_inputs(args, resumed, train=train_images, val=val[0])
    check_copies(train_images, labels, val[0])
    targets = torch.from_numpy(labels)  # int64 (images,)
    old_view = View.of(source)
    old_size = old_view.image_size
    new_size = args.image_size or round(old_size * 5 / 4)
    view = old_view.at(new_size)

    # How the checkpoint does at the old size, at the new one, between and beyond, before it is trained.
    sizes = sorted({max(1, round(old_size + share * (new_size - old_size))) for share in (0, 0.5, 1, 1.5)})
    precision = precision_of(args.precision, processes.device)
    before = resolution_curve(model, old_view, val, sizes, processes, precision)
    if new_size not in before:
        fail(f"--image-size {new_size}: the model takes no images of this size")

    # Only what is not frozen trains, at a quarter of the rate that the weights were trained with. There is no running
    # average: over so few steps it would stay where it began.
    freeze(model, args.frozen_blocks)
    bn_momentum = args.bn_momentum
    if bn_momentum is None:
        of_checkpoint = source["args"].get("bn_momentum", 0.01)
        was_frozen = of_checkpoint == 0 or (of_checkpoint is None and source["args"].get("init"))
        bn_momentum = 0.0 if was_frozen else 0.1
    set_bn_momentum(model, bn_momentum)
    steps_per_epoch = len(train_images) / args.batch_size
    peak = source["lr"] / 4 if source.get("lr") and source["args"].get("optimizer") == args.optimizer else None
    plan = plan_of(args, max(1.5, 200 / steps_per_epoch), len(train_images), peak)
    header = {key: value for key, value in source.items() if key not in ("training", "metrics", "model", "format")}
    header |= {"stage": "fixres", "data": os.path.abspath(data), "inputs": inputs, **view._asdict()}
    run = Run(args, processes, model, header, plan, train_images, val, resumed)
    run.announce(f"fine-tuned from {old_size} px", f"{len(train_images)} labelled images, {args.batch_size} a step")

    # Train.
    batches = run.batches(train_images, args.batch_size, "labeled", clean=view)
    for batch in run.steps(batches):
        images = batch.views[0].to(processes.device, non_blocking=True)  # uint8 (n, 3, H, W)
        target = targets[batch.rows].to(processes.device, non_blocking=True)
        for part_target, part_images in run.parts(target, images):
            with run.amp:
                logits = run.ddp_model(normalize(part_images, view)).float()
            loss = F.cross_entropy(logits, part_target, label_smoothing=args.label_smoothing, reduction="sum")
            run.backward(loss / run.counts[0])  # the mean over the readable images of all processes
        run.end_step()

    after = resolution_curve(run.averaged, old_view, val, sizes, processes, precision)
    if processes.is_main:
        draw_resolutions(args.out / "resolution.png", before, after, old_size, new_size)
    run.finish()
    print0(f"before the fine-tuning {before[new_size]:.2f} there and {before.get(old_size, 0):.2f} at {old_size} px")


if __name__ == "__main__":
    main()
