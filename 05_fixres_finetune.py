"""Stage 05: fine-tune the network for a larger test resolution, on clean labelled images (FixRes).

Random crops make objects look larger in training than the centre crop does in testing. So: train at
a low resolution, which is cheap, then adapt the network for an epoch or two to the statistics of a
higher one, with the images exactly as they are tested (Touvron et al., 1906.06423; 1911.04252,
section 3: L2 from 475 to 800 pixels).

    minimize (1/n) sum_i CE(y_i, f(clean view of x_i at the new size)) over what is not frozen

The defaults are for small sets, found on the demo; @recipes/fixres-l2.txt has the paper's.

reads   --checkpoint model.pt; DATA/train, DATA/val
writes  OUT/model.pt, OUT/last.pt, OUT/metrics.jsonl, OUT/curves.png, OUT/resolution.png

    python 05_fixres_finetune.py --checkpoint runs/student/model.pt --out runs/fixres
    torchrun --nproc-per-node 8 05_fixres_finetune.py @recipes/fixres-l2.txt --checkpoint C --out O
"""

import argparse
import contextlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import COUNT, RATE, add_optimization_flags, add_run_flags, argument_parser  # program
from common import at_least, fail, print0
from common import init_processes  # processes
from common import EfficientNet, MBConv, set_bn_momentum  # models
from common import head_names, img_size_option  # weights
from common import View, normalize  # views
from common import check_copies, data_of, labeled_images  # listing
from common import check_parts  # batches
from common import plan_of  # optimization
from common import compare_inputs, load_model, previous_run  # checkpoints
from common import evaluate, precision_of  # training
from common import Run  # the training run
from common import pyplot, save_figure  # pictures

RESOLUTION_IMAGES = 2000  # val images, evenly spaced, behind each point of resolution.png


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="model.pt to fine-tune")
    add("--image-size", type=COUNT, help="the new size in pixels (L2: 800); None: 5/4 of the old")
    add("--out", type=Path, required=True, help="results; run again to resume")
    add("--data", type=Path, help="directory with train/<class>/, maybe val/; None: the checkpoint's")
    frozen = "the stem and N blocks stay; all: all but the last linear layer (FixRes; other models)"
    add("--frozen-blocks", type=at_least(0, int, words=("all",)), default=0, help=frozen)
    momentum = "of running statistics (official 0.01); 0: frozen; None: 0.1, or 0 if they were frozen"
    add("--bn-momentum", type=RATE, help=momentum)
    add_optimization_flags(parser, from_scratch=False)
    add_run_flags(parser, evaluates=False)
    parser.set_defaults(optimizer="adamw", schedule="cosine")
    return parser.parse_args()


def freeze(model: nn.Module, frozen_blocks: int | str) -> None:
    """Freeze the shallow layers, which stay in inference mode while the others train.

    N: the blocks after the first N train, and all behind them, batch norms included (official
    efficientnet_model.py:382-418; the paper's N is not published). all, and models that are no
    EfficientNet: the classifier trains, and the last batch norm takes on the statistics of
    the new size with its weights frozen (FixRes' imnet_finetune/train.py). On small images more is
    better: docs/fixres.md.
    """
    model.requires_grad_(False).eval()
    modules = list(model.modules())
    if isinstance(model, EfficientNet) and frozen_blocks != "all":
        blocks = [m for m in modules if isinstance(m, MBConv)]
        if frozen_blocks > len(blocks):
            fail(f"--frozen-blocks {frozen_blocks}: the model has {len(blocks)} blocks")
        trained = [*blocks[frozen_blocks:], model.features[-1], model.classifier]
    else:
        trained = [model.get_submodule(name) for name in head_names(model)]
        norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        dropouts = [m for m in modules if isinstance(m, nn.Dropout)]
        for module in norms[-1:] + dropouts:
            module.train()
    for module in trained:
        module.train().requires_grad_()


def resolution_curve(model, view: View, val, sizes: list[int], processes, precision: str) -> dict:
    """{test resolution in pixels: top-1 in percent} on some of the val images, evenly spaced."""
    every = max(1, len(val[0]) // RESOLUTION_IMAGES)
    images, labels = val[0][::every], val[1][::every]
    curve = {}  # without what the model does not take: a transformer may have one size alone
    for size in sizes:
        with contextlib.suppress(AssertionError, RuntimeError, ValueError):
            metrics = evaluate(model, images, labels, view.at(size), processes, precision)
            curve[size] = metrics["val_top1"]
    return curve


def draw_resolutions(path: Path, before: dict, after: dict, old_size: int, new_size: int) -> None:
    plt = pyplot()
    if plt is None:
        return
    plt.figure(figsize=(5, 3.4), layout="constrained")
    plt.plot(list(before), list(before.values()), marker=".", label="before")
    plt.plot(list(after), list(after.values()), marker=".", label="after fine-tuning")
    plt.axvline(old_size, color="grey", linestyle=":", label=f"trained at {old_size} px")
    plt.axvline(new_size, color="grey", linestyle="--", label=f"fine-tuned at {new_size} px")
    plt.xlabel("test resolution in pixels")
    plt.ylabel("val top-1, percent")
    plt.legend()
    save_figure(plt, path)


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    resumed = previous_run(args)
    check_parts(args.batch_size, f"--batch-size {args.batch_size}", args, processes)
    model, source = load_model(args.checkpoint, processes.device)

    # Images and labels. Training images look as test images do: the clean view at the new size.
    data = data_of(args, source)
    train_images, labels, classes = labeled_images(data, "train", source["classes"])
    val = labeled_images(data, "val", classes)[:2]
    inputs = compare_inputs(args, resumed, train=train_images, val=val[0])
    check_copies(train_images, labels, val[0])
    old_view = View.of(source)
    old_size = old_view.image_size
    usual = old_size if img_size_option(source["arch"], 1) else round(old_size * 5 / 4)  # a ViT has one size
    new_size = args.image_size or usual
    view = old_view.at(new_size)

    # How the checkpoint does before it is trained: at the old size, the new one, between, beyond.
    between = (round(old_size + share * (new_size - old_size)) for share in (0, 0.5, 1, 1.5))
    sizes = sorted({max(1, size) for size in between})
    precision = precision_of(args.precision, processes.device)
    before = resolution_curve(model, old_view, val, sizes, processes, precision)
    if new_size not in before:
        fail(f"--image-size {new_size}: the model takes no images of this size")

    # Only what is not frozen trains, at a quarter of the rate that the weights were trained with;
    # that of another optimizer may be too high for AdamW: at most 1e-3 (ours).
    # There is no running average: over so few steps it would stay where it began.
    freeze(model, args.frozen_blocks)
    flags = source.get("args", {})
    bn_momentum = args.bn_momentum
    if bn_momentum is None:
        of_checkpoint = flags.get("bn_momentum", 0.01)
        was_frozen = of_checkpoint == 0 or (of_checkpoint is None and flags.get("init"))
        bn_momentum = 0.0 if was_frozen else 0.1
    set_bn_momentum(model, bn_momentum)
    epochs = max(1.5, 200 * args.batch_size / len(train_images))
    peak = source["lr"] / 4 if source.get("lr") else None
    if peak and flags.get("optimizer") != args.optimizer:
        peak = min(peak, 1e-3)
    plan = plan_of(args, epochs, len(train_images), peak)
    of_run = ("training", "metrics", "model", "format")
    header = {name: value for name, value in source.items() if name not in of_run}
    header |= {"stage": "fixres", "data": os.path.abspath(data), "inputs": inputs, **view._asdict()}
    header["class_counts"] = torch.from_numpy(labels).bincount(minlength=len(classes)).tolist()
    run = Run(args, processes, model, header, plan, train_images, val, resumed)
    run.announce(f"from {old_size} px", f"{len(train_images)} labelled images, {args.batch_size} a step")

    # Train.
    batches = run.batches(train_images, args.batch_size, "labeled", clean=view)
    for labeled in run.steps(batches):  # sets rate, seed, counts
        images = labeled.views[0].to(processes.device, non_blocking=True)  # uint8 (n, 3, H, W)
        target = torch.from_numpy(labels)[labeled.rows].to(processes.device, non_blocking=True)
        for part_target, part_images in run.parts(target, images):
            with run.amp:  # 16-bit products where --precision says so; the loss is in float32
                logits = run.forward(normalize(part_images, view)).float()
            loss = F.cross_entropy(logits, part_target, label_smoothing=args.label_smoothing, reduction="sum")
            run.backward(loss / run.counts[0])  # the mean over the readable images of all processes
        run.end_step()  # updates the weights; logs, saves

    after = resolution_curve(run.averaged, old_view, val, sizes, processes, precision)
    if processes.rank == 0:
        draw_resolutions(args.out / "resolution.png", before, after, old_size, new_size)
    run.finish()  # evaluates, draws curves.png, writes model.pt
    print0(f"before: {before[new_size]:.2f} at {new_size} px, {before.get(old_size, 0):.2f} at {old_size} px")


if __name__ == "__main__":
    main()
