"""Stage 05: fine-tune the network for a larger test resolution, on clean labelled images (FixRes).

Random crops make objects look larger in training than the centre crop does in testing. So: train at a low
resolution, which is cheap, then adapt the network for an epoch or two to the statistics of a higher one, with the
images exactly as they are tested (Touvron et al., 1906.06423; 1911.04252, section 3: L2 from 475 to 800 pixels).

    minimize (1/n) sum_i CE(y_i, f(clean view of x_i at the new size)) over the layers that are not frozen

reads   --checkpoint model.pt; DATA/train, DATA/val
writes  OUT/model.pt, OUT/last.pt, OUT/metrics.jsonl, OUT/curves.png, OUT/resolution.png (top-1 against test resolution)

    python 05_fixres_finetune.py --checkpoint runs/student/model.pt --image-size 320 --out runs/fixres
    torchrun --nproc-per-node 8 05_fixres_finetune.py --checkpoint student.pt --image-size 800 --out runs/fixres
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import add_bn_momentum_flag, add_device_flags, add_optimization_flags, add_run_flags
from common import argument_parser, at_least, fail, print0  # the program
from common import init_processes  # processes
from common import EfficientNet, MBConv  # models
from common import View, normalize  # views
from common import ImageList, labeled_images  # listing
from common import unreadable_images  # batches
from common import plan_of  # optimization
from common import data_inputs, data_of, input_digests, load_model, previous_run, resume_or_exit  # checkpoints
from common import check_parts, evaluate, precision_of, refusal, set_bn_momentum  # training
from common import Run  # the training run
from common import pyplot, save_figure  # pictures

DECAYED = 0.97**145  # the official code continues at the end of its schedule (main.py:226-229, 582)
RESOLUTION_IMAGES = 2000  # val images, evenly spaced, behind each point of resolution.png


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="model.pt to fine-tune")
    add("--image-size", type=at_least(1, int), required=True, help="the new resolution in pixels (paper: 800 for L2)")
    add("--out", type=Path, required=True, help="folder of the results; the same command resumes it")
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; None: the checkpoint's own")
    train = "classifier: FixRes' own; head: all behind the blocks; blocks: these too (ResNets: always the classifier)"
    add("--train", choices=["classifier", "head", "blocks"], default="blocks", help=train)
    add("--frozen-blocks", type=at_least(0, int), help="with --train blocks: the stem and the first N stay; None: 0")
    add_bn_momentum_flag(add)
    add_optimization_flags(parser, from_scratch=False)
    add_run_flags(parser, evaluates=False)
    add_device_flags(parser)
    parser.set_defaults(epochs=1.5, schedule="constant")  # the paper's
    args = parser.parse_args()
    if args.train != "blocks" and args.frozen_blocks is not None:
        fail(f"--train {args.train} freezes all blocks: without --frozen-blocks")
    return args


def freeze(model: torch.nn.Module, frozen_blocks: int | None, train: str = "blocks") -> None:
    """Freeze the shallow layers, which then stay in inference mode while the others are in training mode.

    `classifier`, FixRes (imnet_finetune/train.py): the last linear layer trains, and the last batch norm takes on the
    statistics of the new size, with its weights frozen: half of the gain. `head`, of an EfficientNet: the convolution,
    the batch norm and the classifier behind the blocks. `blocks`: the blocks after the first N too, batch norms
    included (official efficientnet_model.py:382-418; the paper's N is not published). On small images more is better:
    docs/fixres.md.
    """
    model.requires_grad_(False).eval()
    if not isinstance(model, EfficientNet) or train == "classifier":
        if frozen_blocks is not None:
            fail("--frozen-blocks is for EfficientNets; of other models the last linear layer trains")
        trained = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1:]
        trained = [model.classifier] if isinstance(model, EfficientNet) else trained  # with its dropout
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms[-1:]:
            norm.train()
    else:
        blocks = [module for module in model.modules() if isinstance(module, MBConv)]
        number = len(blocks) if train == "head" else frozen_blocks or 0
        if number > len(blocks):
            fail(f"--frozen-blocks {number}: the model has {len(blocks)} blocks")
        trained = [*blocks[number:], model.features[-1], model.classifier]
    if not trained:
        fail("--checkpoint: the model has no linear layer that could be fine-tuned")
    for module in trained:
        module.train()
        for parameter in module.parameters():
            parameter.requires_grad_()
    assert any(parameter.requires_grad for parameter in model.parameters())


def resolution_curve(evaluate_at, view: View, images: ImageList, labels, sizes: list[int]) -> dict[int, float]:
    """{test resolution in pixels: top-1 in percent} on some of the images, evenly spaced."""
    every = max(1, len(images) // RESOLUTION_IMAGES)
    return {size: evaluate_at(view.at(size), images[::every], labels[::every])["val_top1"] for size in sizes}


def draw_resolutions(path: Path, before: dict, after: dict, old_size: int, new_size: int) -> None:
    if (plt := pyplot()) is None:
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
    processes = init_processes(args.device, args.workers, args.out)
    begun = previous_run(args)
    check_parts(args.batch_size, f"--batch-size {args.batch_size}", args, processes)
    model, source = load_model(args.checkpoint, processes.device)
    set_bn_momentum(model, args.bn_momentum)

    # Training images look exactly as test images do: the clean view at the new size, without noise.
    old_view = View.of(source)
    view, old_size, new_size = old_view.at(args.image_size), old_view.image_size, args.image_size
    data = data_of(args, source)
    train_images, labels, classes = labeled_images(data, "train", source["classes"])
    val_images, val_labels, _ = labeled_images(data, "val", classes)
    inputs = {args.checkpoint: args.checkpoint, **data_inputs(data, train_images, val_images)}
    inputs = input_digests(inputs, processes)
    resume_or_exit(args, begun, inputs)
    bad = unreadable_images(train_images, view, args, processes, begun)
    train_images, labels = train_images.without(bad), np.delete(labels, bad)
    targets = torch.from_numpy(labels)  # int64 (images,)

    # How the checkpoint does at the old size, at the new one, between and beyond, before it is trained.
    sizes = sorted({max(1, round(old_size + share * (new_size - old_size))) for share in (0, 0.5, 1, 1.5)})
    if words := refusal(model, new_size):
        fail(words)
    sizes = [size for size in sizes if not refusal(model, size)]  # a transformer may have one size alone
    precision = precision_of(args.precision, processes)

    def evaluate_before(view: View, images: ImageList, labels) -> dict:
        return evaluate(model, images, labels, view, processes, precision)

    before = resolution_curve(evaluate_before, old_view, val_images, val_labels, sizes)

    # Only what is not frozen trains. There is no running average: over so few steps it would stay where it began.
    freeze(model, args.frozen_blocks, args.train)
    plan = plan_of(args, args.epochs, len(train_images) / args.batch_size, DECAYED)
    header = {key: value for key, value in source.items() if key not in ("training", "metrics", "model")}
    header |= {"stage": "fixres", "data": os.path.abspath(data), "inputs": inputs, **view.header}
    run = Run(args, processes, model, header, plan, (val_images, val_labels), args.batch_size, bad, begun)
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

    after = resolution_curve(run.evaluate, old_view, val_images, val_labels, sizes)
    if processes.is_main:
        draw_resolutions(args.out / "resolution.png", before, after, old_size, new_size)
    run.finish()
    num = len(val_images[:: max(1, len(val_images) // RESOLUTION_IMAGES)])
    print0(
        f"on {num} val images: {after[new_size]:.2f} at {new_size} px; before the fine-tuning {before[new_size]:.2f} "
        f"at {new_size} px and {before[old_size]:.2f} at {old_size} px"
    )


if __name__ == "__main__":
    main()
