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
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from common import add_device_flags, add_optimization_flags, add_run_flags, argument_parser, at_least
from common import Processes, fail, init_processes, print0  # the program
from common import EfficientNet, MBConv  # models
from common import View, normalize  # views
from common import ImageList, labeled_images  # listing
from common import ImageDataset, load_batches, readable_images  # batches
from common import Plan, peak_rate  # optimization
from common import load_model, previous_run  # checkpoints
from common import Run, check_parts, evaluate  # the training run
from common import pyplot, save_figure  # pictures

# The official code continues at the end of its schedule (main.py:226-229, 582), after 145 decays of 0.97.
PEAK_PER_256 = 0.016 * 0.97**145
RESOLUTION_IMAGES = 2000  # val images, evenly spaced, behind each point of resolution.png


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="model.pt to fine-tune")
    add("--image-size", type=at_least(1, int), required=True, help="the new resolution in pixels (paper: 800 for L2)")
    add("--out", type=Path, required=True, help="folder of the results; the same command resumes it")
    add("--data", type=Path, help="data directory with train/<class>/, maybe val/<class>/; None: the checkpoint's own")
    add("--frozen-blocks", type=at_least(0, int), help="the stem and the first N blocks stay; None: all of the blocks")
    add_optimization_flags(parser, from_scratch=False)
    add_run_flags(parser, evaluates=False)
    add_device_flags(parser)
    parser.set_defaults(epochs=1.5, schedule="constant")  # the paper's
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
    assert any(parameter.requires_grad for parameter in model.parameters())
    return frozen


def resolution_curve(
    model: torch.nn.Module, images: ImageList, labels, view: View, sizes: set[int], processes: Processes
) -> dict[int, float]:
    """{test resolution in pixels: top-1 in percent} on some of the images, evenly spaced."""
    every = max(1, len(images) // RESOLUTION_IMAGES)
    some = images[::every], labels[::every]
    return {size: evaluate(model, *some, view.at(size), processes)["val_top1"] for size in sorted(sizes)}


def draw_resolutions(path: Path, curves: dict[str, dict[int, float]], sizes: tuple[int, int]) -> None:
    if (plt := pyplot()) is None:
        return
    plt.figure(figsize=(5, 3.4), layout="constrained")
    for name, curve in curves.items():
        plt.plot(list(curve), list(curve.values()), marker=".", label=name)
    for size, style, name in zip(sizes, (":", "--"), ("trained at", "fine-tuned at"), strict=True):
        plt.axvline(size, color="grey", linestyle=style, linewidth=1, label=f"{name} {size} px")
    plt.xlabel("test resolution in pixels")
    plt.ylabel("val top-1, percent")
    plt.legend(frameon=False)
    save_figure(plt, path)


def main() -> None:
    args = parse_args()
    processes = init_processes(args.device, args.workers)
    begun = previous_run(args)
    check_parts(args.batch_size, "--batch-size", args, processes)
    model, source = load_model(args.checkpoint, processes.device)

    # Training images look exactly as test images do: the clean view at the new size, without noise.
    view, old_size = View.of(source).at(args.image_size), source["image_size"]
    data = args.data or Path(source["data"])
    train_images, labels, classes = labeled_images(data, "train", source["classes"])
    val_images, val_labels, _ = labeled_images(data, "val", classes)
    train_images, labels = readable_images(train_images, labels, view, args.max_bad, processes)
    targets = torch.from_numpy(labels)  # int64 (images,)

    # How the checkpoint does at the old size, at the new one, between and beyond, before it is trained.
    sizes = {round(old_size + share * (args.image_size - old_size)) for share in (0, 0.5, 1, 1.5)}
    curve_of = val_images, val_labels, view, {size for size in sizes if size >= 1}, processes
    before = resolution_curve(model, *curve_of)

    # Only what is not frozen trains. There is no running average: over so few steps it would stay where it began.
    frozen = freeze(model, args.frozen_blocks)
    plan = Plan(args.epochs, len(train_images) / args.batch_size, peak_rate(args, PEAK_PER_256), args.schedule)
    header = {key: value for key, value in source.items() if key not in ("training", "metrics", "model")}
    header |= {"stage": "fixres", "data": os.path.abspath(data), **view._asdict()}
    run = Run(args, processes, model, header, plan, (val_images, val_labels), [len(train_images)], begun)
    run.announce(f"fine-tuned from {old_size} px", f"{len(train_images)} labelled images, {args.batch_size} a step")

    # Train.
    model.train()
    for module in frozen:  # their batch norms keep the statistics that they have
        module.eval()
    dataset = ImageDataset(train_images, clean=view)
    batches = load_batches(dataset, run.keys(len(train_images), args.batch_size, stream=0), processes)
    for batch in run.steps(batches):
        images = batch.views[0].to(processes.device, non_blocking=True)  # uint8 (n, 3, H, W)
        target = targets[batch.rows].to(processes.device, non_blocking=True)
        for part_target, part_images in run.parts(target, images):
            with run.amp:
                logits = run.ddp_model(normalize(part_images, view))
            run.backward(F.cross_entropy(logits.float(), part_target, label_smoothing=args.label_smoothing))
        run.end_step()

    after = resolution_curve(model, *curve_of)
    if processes.is_main:
        curves = {"before": before, "after fine-tuning": after}
        draw_resolutions(args.out / "resolution.png", curves, (old_size, args.image_size))
    run.finish()
    print0(
        f"before the fine-tuning it was {before[old_size]:.2f} at {old_size} px and {before[args.image_size]:.2f} at "
        f"{args.image_size} px (on at most {RESOLUTION_IMAGES} images)"
    )


if __name__ == "__main__":
    main()
