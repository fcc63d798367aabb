"""Stage 01: train the teacher, an ordinary supervised classifier, with the noise that its student will get.

The teacher minimizes, over the labelled images x_i and the parameters of f,

    (1/n) sum_i CE(y_i, f_noised(x_i))

RandAugment noises the input, dropout and stochastic depth noise the model (Xie et al., 1911.04252, algorithm 1, step
1). What is kept is the running average of the weights. `diff 01_train_teacher.py 04_train_student.py` shows what the
paper adds.

reads   DATA/train, DATA/val; --init: weights to start from, of this toolkit, torchvision or timm
writes  OUT/model.pt (hand-off), OUT/last.pt (resume), OUT/metrics.jsonl, OUT/curves.png

    python 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b0
    torchrun --nproc-per-node 8 01_train_teacher.py --data DATA --out runs/teacher --arch efficientnet_b7
    python 01_train_teacher.py --data DATA --init tf_efficientnet_b7_ns.pth --arch tf_efficientnet_b7 --epochs 0
"""

import argparse
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import add_device_flags, add_model_flags, add_noise_flags, add_optimization_flags, add_run_flags
from common import argument_parser, fail, print0  # the program
from common import init_processes  # processes
from common import recipe_of, resolution_of  # models
from common import load_weights, own_names  # weights
from common import add_noise  # noise
from common import IMAGENET_MEAN, IMAGENET_STD, Crop, View, default_crop_fraction, normalize  # views
from common import labeled_images  # listing
from common import unreadable_images  # batches
from common import plan_of  # optimization
from common import CHECKPOINT_FORMAT, data_inputs, input_digests, previous_run, read_file, resume_or_exit  # checkpoints
from common import check_parts, model_noise, model_of  # training
from common import Run  # the training run

# How images must look for published TensorFlow weights: a pattern of "arch path/file", of which the first that fits
# counts; resolution in pixels (None: the model's own), mean, std. The crop is size / (size + 32), bicubic (official
# preprocessing.py:104-134). For torchvision's own weights torchvision has a record.
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
    add("--out", type=Path, default=Path("runs/teacher"), help="folder of the results; the same command resumes it")
    add("--init", type=Path, help="weights to start from (.pt, .pth, .safetensors); other classes: a new classifier")
    add_model_flags(parser)
    add_noise_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    add_device_flags(parser)
    return parser.parse_args()


def read_initial(path: Path, arch: str | None) -> dict:
    """The checkpoint --init, or for a foreign file a dict like one: its weights and how their images must look.

    torchvision's weights are known by the file's name. Another file is taken for the first that torchvision published
    of that model, which is right for the semi-supervised ResNets (1905.00546: 224 pixels of 256, bilinear).
    """
    source = read_file(path)
    if isinstance(source, dict) and source.get("format") == CHECKPOINT_FORMAT:
        return source
    if not arch:
        fail(f"--init {path} is not of this toolkit: --arch must say of which model its weights are")
    name = f"{arch} {'/'.join(path.absolute().parts[-4:])}"  # the Hugging Face cache has the name three folders up
    if found := next((row for pattern, *row in PUBLISHED if re.search(pattern, name)), None):
        size, mean, std = found
        size = size or resolution_of(arch)
        view = View(size, default_crop_fraction(size), "bicubic", mean, std)
    else:
        from torchvision import models

        if arch not in models.list_models(module=models):
            fail(f"--arch {arch}: neither an EfficientNet nor one of torchvision's classification models")
        published = list(models.get_model_weights(arch))
        record = next((one for one in published if Path(one.url).name == path.name), published[0]).transforms()
        size, fraction = record.crop_size[0], record.crop_size[0] / record.resize_size[0]
        view = View(size, fraction, record.interpolation.value, tuple(record.mean), tuple(record.std))
    return {"arch": arch, "model": source, **view._asdict()}


def load_initial_weights(model: torch.nn.Module, source: dict, args: argparse.Namespace, classes: list[str]) -> str:
    """Start from --init. Returns what to say of it: its classifier comes along only with the same classes in order."""
    try:
        weights = own_names(source)
        known = source.get("classes")  # of a foreign file only the number is known, from the last layer
        number = len(known or weights.get(list(model.state_dict())[-1], classes))
        same_classes = known == classes if known else number == len(classes)
        if not same_classes and args.epochs == 0:
            fail(f"--init {args.init} has {number} other classes than --data ({len(classes)}): --epochs 0 trains none")
        load_weights(model, weights, new_head=not same_classes)
    except ValueError as error:
        fail(f"--init {args.init} does not fit --arch {args.arch or source['arch']}: {error}")
    return f"from {args.init}" + ("" if same_classes else " with a new classifier, for it had other classes")


def main() -> None:
    args = parse_args()
    processes = init_processes(args.device, args.workers)
    begun = previous_run(args)

    # What the weights to start from bring along, unless a flag says otherwise: model, size, and how images look to it.
    source = read_initial(args.init, args.arch) if args.init else {}
    arch = args.arch or source.get("arch", "efficientnet_b0")
    small_images = args.small_images
    if small_images is None:
        small_images = source.get("arch_options", {}).get("small_images")
    view = View.of(source) if source else View.default(resolution_of(arch))
    view = view.at(args.image_size or view.image_size)
    crop = Crop(view.image_size, None if small_images else args.min_crop_area, args.hflip)
    recipe, resolution = recipe_of(arch, args), resolution_of(arch)

    # A step takes n labelled images.
    num_labeled = args.batch_size
    check_parts(args.batch_size, f"--batch-size {args.batch_size}", args, processes)

    # Images and labels. With --epochs 0 train/ gives nothing but the names of the classes.
    data = args.data
    train_images, labels, classes = labeled_images(data, "train")
    val_images, val_labels, _ = labeled_images(data, "val", classes)
    inputs = {args.init: args.init, **data_inputs(data, train_images, val_images)}
    inputs = input_digests(inputs, processes)
    resume_or_exit(args, begun, inputs)
    bad = unreadable_images(train_images, view, args, processes, begun)
    train_images, labels = train_images.without(bad), np.delete(labels, bad)
    targets = torch.from_numpy(labels)  # int64 (images,)

    # The model, and the books of its training.
    stage = "teacher"
    model, arch_options = model_of(stage, arch, len(classes), args, small_images)
    origin = load_initial_weights(model, source, args, classes) if source else "from scratch"
    plan = plan_of(args, recipe.epochs, len(train_images) / num_labeled)
    header = {"stage": stage, "arch": arch, "arch_options": arch_options, "classes": classes, **view._asdict()}
    header |= {"data": os.path.abspath(data), "inputs": inputs}  # data: the next student's default
    run = Run(args, processes, model, header, plan, (val_images, val_labels), num_labeled, bad, begun)
    run.announce(
        f"{len(train_images)} labelled images of {len(classes)} classes, {len(val_images)} val",
        f"{num_labeled} a step",
        f"RandAugment {recipe.num_ops} ops of magnitude {recipe.magnitude:g}, {model_noise(model)}",
    )
    print0(f"{origin}; the clean view: {view}")

    # Train.
    labeled_batches = run.batches(train_images, num_labeled, "labeled", noised=crop)
    for batch in run.steps(labeled_batches):
        # The noise is drawn on the whole batch, as uint8 (n, 3, H, W), on the device.
        images = batch.views[-1].to(processes.device, non_blocking=True)
        images = add_noise(images, run.generator, recipe, resolution, small_images, args.hflip)
        # y of the readable images, int64 (n,); an unreadable image has no place in the batch.
        target = targets[batch.rows].to(processes.device, non_blocking=True)
        for part_target, part_images in run.parts(target, images):
            with run.amp:  # 16-bit products where --precision says so; the loss is in float32
                logits = run.ddp_model(normalize(part_images, view)).float()
            loss = F.cross_entropy(logits, part_target, label_smoothing=args.label_smoothing, reduction="sum")
            run.backward(loss / run.counts[0])  # the mean over the readable images of all processes
        run.end_step()  # the optimizer's step and the average of the weights; logs, evaluates, saves where it is time
    run.finish()  # evaluates, draws curves.png, writes model.pt


if __name__ == "__main__":
    main()
