"""Stage 06: measure how much of a model's accuracy is left on corrupted images and under attack.

A student that was trained with noise on many more images is more accurate than its teacher. It is also much more
robust, although no stage trains it for that (Noisy Student, section 4.3). This stage compares checkpoints on DATA/val.

    clean       top-1 with its 95 percent interval, top-5, cross-entropy, the expected calibration error in percent over
                15 equal bins b of the confidence (sum_b n_b / n * |accuracy_b - confidence_b|), per class recall and
                precision, the confusion matrix, and the difference to `control` (or the first model), image by image
    --corrupt   10 corruptions of ImageNet-C (Hendrycks & Dietterich, 1903.12261) at severities 1 to 5, drawn on the fly
                on the image as the model sees it; top-1 is the plain mean over corruptions x severities
    --fgsm EPS  x' = clip(x + EPS * sign(grad_x loss(x, y)), 0, 255)                     x in pixel values, 0 to 255
    --pgd EPS   --pgd-steps K times x' = clip(x' + 2.5 * EPS / K * sign(grad), x - EPS, x + EPS), cut to 0..255 too.
                Both attacks are in fp32, whatever --precision is.

and on released sets, unpacked as they come:

    --imagenet-a, --imagenet-r  top-1 among the classes of the set, by folder name; --folder NAME=DIR: among all classes
    --imagenet-c  mCE: the mean over 15 corruptions c of sum_s error_{s,c} / sum_s error_{s,c}(AlexNet)
    --imagenet-p  mFR: the mean over 10 perturbations of the probability that the prediction flips from frame to frame
                  (of noise: from the first frame), over AlexNet's
    --cifar10-c   top-1 over the 15 corruptions and over all 19

reads   checkpoints of any stage; DATA/val, whose classes are matched to a checkpoint's by name; the released sets
writes  OUT/robustness.json (every number), saved after each corruption and each EPS; OUT/robustness.md (the table);
        OUT/robustness.png. The same command again measures only what is missing or had other settings or weights.

    python 06_eval_robustness.py runs/demo/teacher/model.pt runs/demo/student1/model.pt --data data/demo \\
        --out runs/demo/robustness --corrupt --fgsm 2 4 --num-images 500
    torchrun --nproc-per-node 8 06_eval_robustness.py ...      (the same numbers, faster)
"""

import argparse
import base64
import io
import json
import math
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import add_device_flags, argument_parser, at_least, fail, file_sha256, print0, write_atomically  # program
from common import Processes, init_processes, progress, reduce_sum, union_of  # processes
from common import fuse_batch_norms, has_names  # models and weights
from common import View, eval_view, normalize  # views
from common import ImageList, images_by_class, judged_half, labeled_images  # listing
from common import ImageDataset, grid_keys, load_batches, rows_per_batch  # batches
from common import load_model, read_checkpoint  # checkpoints
from common import autocast, in_halves, precision_of  # training
from common import pyplot, save_figure  # pictures

NUM_BINS = 15  # of the calibration error

# Mean error of AlexNet over the severities, in percent: the 15 corruptions of the benchmark (google-research/augmix,
# imagenet.py), then the 4 extra ones (hendrycks/robustness, issue 10).
ALEXNET_ERRORS = {"gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880}
ALEXNET_ERRORS |= {"glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816}
ALEXNET_ERRORS |= {"frost": 82.6572, "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204}
ALEXNET_ERRORS |= {"elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500}
BENCHMARK, EXTRA = tuple(ALEXNET_ERRORS), ("speckle_noise", "gaussian_blur", "spatter", "saturate")
ALEXNET_ERRORS |= {"speckle_noise": 84.5, "gaussian_blur": 78.7, "spatter": 71.8, "saturate": 65.8}
ALEXNET = {"clean": {"top1": 56.522}}  # torchvision's record
# Flip probabilities of AlexNet on ImageNet-P in percent: from memory, no source could confirm them.
ALEXNET_FLIPS = {"gaussian_noise": 23.65, "shot_noise": 30.06, "motion_blur": 9.30, "zoom_blur": 5.94, "snow": 11.93}
ALEXNET_FLIPS |= {"brightness": 4.89, "translate": 11.01, "rotate": 13.10, "tilt": 7.05, "scale": 23.53}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INSIDE, FLIPPED = "per_corruption", "per_perturbation"  # where robustness.json has what a summary is made of
# Student's t at 97.5 percent, 1 to 10 degrees of freedom.
T_95 = [12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139]

# {corruption: {image size the values were chosen for: one value a severity}}: those of the generators of CIFAR-10-C,
# Tiny-ImageNet-C and ImageNet-C (github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py,
# make_tinyimagenet_c.py, make_imagenet_c.py). Images of up to 48 pixels use the first, of up to 128 the second, larger
# ones the third, unscaled: the released ImageNet-C is drawn at 224 and then resized, so a larger model sees more blur.
CORRUPTIONS = {
    "gaussian_noise": {  # standard deviation, of values in 0..1
        32: [0.04, 0.06, 0.08, 0.09, 0.10],
        64: [0.04, 0.08, 0.12, 0.15, 0.18],
        224: [0.08, 0.12, 0.18, 0.26, 0.38],
    },
    "shot_noise": {  # photons at full brightness
        32: [500, 250, 100, 75, 50],
        64: [250, 100, 50, 30, 15],
        224: [60, 25, 12, 5, 3],
    },
    "impulse_noise": {  # share of the values that turn 0 or 255
        32: [0.01, 0.02, 0.03, 0.05, 0.07],
        64: [0.01, 0.02, 0.05, 0.08, 0.14],
        224: [0.03, 0.06, 0.09, 0.17, 0.27],
    },
    "gaussian_blur": {  # standard deviation in pixels
        32: [0.4, 0.6, 0.7, 0.8, 1],
        64: [0.5, 0.75, 1, 1.25, 1.5],
        224: [1, 2, 3, 4, 6],
    },
    "defocus_blur": {  # radius of the disk, standard deviation that smooths its edge, in pixels
        32: [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        64: [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
        224: [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    },
    "motion_blur": {  # radius, standard deviation along the path, in pixels
        32: [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        64: [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        224: [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    },
    "brightness": {  # added to the V of HSV
        32: [0.05, 0.1, 0.15, 0.2, 0.3],
        64: [0.1, 0.2, 0.3, 0.4, 0.5],
        224: [0.1, 0.2, 0.3, 0.4, 0.5],
    },
    "contrast": {  # factor of the distance to the image's mean
        32: [0.75, 0.5, 0.4, 0.3, 0.15],
        64: [0.4, 0.3, 0.2, 0.1, 0.05],
        224: [0.4, 0.3, 0.2, 0.1, 0.05],
    },
    "pixelate": {  # factor of the side
        32: [0.95, 0.9, 0.85, 0.75, 0.65],
        64: [0.9, 0.8, 0.7, 0.6, 0.5],
        224: [0.6, 0.5, 0.4, 0.3, 0.25],
    },
    "jpeg_compression": {  # quality
        32: [80, 65, 58, 50, 40],
        64: [65, 58, 50, 40, 25],
        224: [25, 18, 15, 10, 7],
    },
}


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="model.pt of any stage: one line of the table each")
    add("--data", type=Path, help="data directory, whose val/ is measured; None: the first checkpoint's own")
    add("--out", type=Path, required=True, help="folder of robustness.json, .md and .png")
    add("--val-half", choices=("choose", "judge"), help="half of val/, by the hash of the path; None: all of it")
    add("--classes", type=Path, metavar="FILE", help="one class a line: names of the outputs, if a checkpoint has none")
    add("--folder", nargs="+", type=name_and_folder, default=[], metavar="NAME=DIR", help="images by class: more sets")
    add("--imagenet-a", type=Path, metavar="DIR", help="DIR/<class>/*: only the classes of the set compete")
    add("--imagenet-r", type=Path, metavar="DIR", help="DIR/<class>/*: only the classes of the set compete")
    add("--imagenet-c", type=Path, metavar="DIR", help="DIR/[noise/ ...]<corruption>/<severity>/<class>/*")
    add("--imagenet-p", type=Path, metavar="DIR", help="DIR/<perturbation>/<class>/*.mp4; needs PyAV")
    add("--cifar10-c", type=Path, metavar="DIR", help="DIR/<corruption>.npy and DIR/labels.npy")
    add("--baseline", type=Path, metavar="JSON", help="robustness.json of one model, for AlexNet in mCE and mFR")
    add("--corrupt", action=argparse.BooleanOptionalAction, default=False, help="10 corruptions at severities 1 to 5")
    add("--fgsm", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 2 4 8 16, in pixel values")
    add("--pgd", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 16, in pixel values")
    add("--pgd-steps", type=at_least(1, int), default=10, help="steps of 2.5 * EPS / steps; paper: 10, size not given")
    add("--num-images", type=at_least(1, int), help="val images for corruptions and attacks; None: all of them")
    add(
        "--batch-size", type=at_least(1, int), help="images at a time in each process; None: what fits a cache or a GPU"
    )
    add("--seed", type=at_least(0, int), default=0, help="draws the --num-images images and the corruptions' noise")
    add_device_flags(parser)
    return parser.parse_args()


def name_and_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(folder)


# ---------------------------------------------------------------------------------------------------------------------
# corruptions. The generator uses scikit-image, OpenCV and ImageMagick. The three blurs are written out below as sums of
# shifted images: scikit-image's gaussian (up to 4 standard deviations, edge pixels repeated), OpenCV's GaussianBlur of
# a disk and filter2D (both mirrored at the border), ImageMagick's motion blur (a one-sided Gaussian along a line of
# whole pixels, edge pixels repeated). Against scikit-image 0.26, OpenCV 5.0 and ImageMagick 6.9.11, on an image of each
# size at all severities: gaussian and motion blur equal, defocus blur 1 level off in up to 0.004 % of the values.
# ---------------------------------------------------------------------------------------------------------------------


def gaussian_taps(sigma: float, radius: int) -> np.ndarray:
    """Weights of a normalized Gaussian at -radius .. radius."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def weighted_shifts(x: np.ndarray, taps: list[tuple[int, int, float]], border: str) -> np.ndarray:
    """Sum over taps (dy, dx, weight) of weight * x[y + dy, x + dx], x (H, W, channels); border: a mode of numpy.pad."""
    height, width = x.shape[:2]
    reach = max(max(abs(dy), abs(dx)) for dy, dx, _ in taps)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode=border)
    out = np.zeros_like(x)
    for dy, dx, weight in taps:
        out += weight * padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
    return out


def defocus_taps(radius: float, alias_sigma: float) -> list[tuple[int, int, float]]:
    """A disk whose edge is smoothed by a 3x3 (radius <= 8) or 5x5 Gaussian."""
    side = max(8, int(radius))
    y, x = np.mgrid[-side : side + 1, -side : side + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    edge = gaussian_taps(alias_sigma, 1 if radius <= 8 else 2)
    reach = len(edge) // 2
    offsets = range(-reach, reach + 1)
    smooth = [(dy, dx, edge[dy + reach] * edge[dx + reach]) for dy in offsets for dx in offsets]
    kernel = weighted_shifts((disk / disk.sum())[..., None], smooth, "reflect")[..., 0]
    return [(int(dy) - side, int(dx) - side, kernel[dy, dx]) for dy, dx in np.argwhere(kernel > 0)]


def motion_taps(radius: float, sigma: float, angle: float) -> list[tuple[int, int, float]]:
    """One-sided Gaussian of 2 * radius + 1 pixels along a line at `angle` degrees (down from the right)."""
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    dx = np.ceil(steps * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    dy = np.ceil(steps * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    return list(zip(dy.tolist(), dx.tolist(), (weights / weights.sum()).tolist(), strict=True))


def gaussian_noise(image, sigma, rng):
    return image / 255 + rng.normal(scale=sigma, size=image.shape)


def shot_noise(image, photons, rng):
    return rng.poisson(image / 255 * photons) / photons


def impulse_noise(image, share, rng):
    # Each of the three values of a pixel is hit on its own. Half of the hits are salt (255), the others pepper (0).
    hit, salt = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return np.where(hit, salt.astype(float), image / 255)


def gaussian_blur(image, sigma, rng):
    radius = int(4 * sigma + 0.5)
    taps = list(enumerate(gaussian_taps(sigma, radius).tolist(), -radius))
    x = weighted_shifts(image / 255, [(dy, 0, weight) for dy, weight in taps], "edge")
    return weighted_shifts(x, [(0, dx, weight) for dx, weight in taps], "edge")


def defocus_blur(image, radius_sigma, rng):
    return weighted_shifts(image / 255, defocus_taps(*radius_sigma), "reflect")


def motion_blur(image, radius_sigma, rng):
    x = weighted_shifts(image / 255, motion_taps(*radius_sigma, angle=rng.uniform(-45, 45)), "edge")
    return np.uint8(np.rint(x * 65535) // 257)  # ImageMagick computes in 16 bits, and writes the upper 8 of them


def brightness(image, amount, rng):
    # V of HSV is the largest of R, G, B. At equal hue and saturation all three scale with it; black becomes grey.
    x, v = image / 255, image.max(axis=2, keepdims=True) / 255
    brighter = np.minimum(v + amount, 1)
    return np.where(v > 0, x / np.where(v > 0, v, 1) * brighter, brighter)


def contrast(image, factor, rng):
    x = image / 255
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def pixelate(image, factor, rng):
    size = image.shape[1::-1]  # width, height
    small = Image.fromarray(image).resize([int(side * factor) for side in size], Image.Resampling.BOX)
    return np.array(small.resize(size, Image.Resampling.BOX))


def jpeg_compression(image, quality, rng):
    Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.array(Image.open(file))


# Each maps uint8 (H, W, 3) and its value in CORRUPTIONS to uint8, or to values in 0..1, and draws only from `rng`.
NOISES, BLURS = (gaussian_noise, shot_noise, impulse_noise), (gaussian_blur, defocus_blur, motion_blur)
CORRUPTION_OPS = {op.__name__: op for op in (*NOISES, *BLURS, brightness, contrast, pixelate, jpeg_compression)}


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Apply one of CORRUPTIONS at severity 1 to 5: image uint8 (H, W, 3) -> a new one."""
    size = max(image.shape[:2])
    values = CORRUPTIONS[name][32 if size <= 48 else 64 if size <= 128 else 224]
    x = CORRUPTION_OPS[name](image, values[severity - 1], rng)
    return x if x.dtype == np.uint8 else np.uint8(np.clip(x, 0, 1) * 255)  # cut, not rounded, as in the generator


class CorruptedImages(ImageDataset):
    """Images with five views: a corruption at severities 1 to 5. Its noise is a function of (seed, corruption, index in
    val, severity) alone, so all models of one image size see the same images, in any number of processes."""

    def __init__(self, images: ImageList, view: View, indexes: np.ndarray, corruption: str, seed: int):
        super().__init__(images, clean=view, seed=seed)
        self.indexes, self.corruption = indexes, corruption  # int64 (N,): where in val these images are

    def __getitem__(self, row: int):
        row, views, error = super().__getitem__(row)
        if error is None:
            key = [self.seed, zlib.crc32(self.corruption.encode()), int(self.indexes[row])]
            rngs = [np.random.default_rng([*key, severity]) for severity in range(1, 6)]
            views = [corrupt(views[0], self.corruption, severity, rng) for severity, rng in enumerate(rngs, 1)]
        return row, views, error


# ---------------------------------------------------------------------------------------------------------------------
# measures, and the parts of the evaluation: one function for each, and one row of the table in `parts_of`
# ---------------------------------------------------------------------------------------------------------------------


def attack(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, steps: int, view: View) -> Tensor:
    """Projected gradient ascent on the cross-entropy with the true labels; pixels float (N, 3, H, W), eps in 0 to 255.

    With one step this is FGSM: the step, 2.5 eps (Madry et al.'s rule, 1706.06083; the paper does not say its own), is
    cut to the eps ball, so that each value moves by eps. There is no random start, so eps 0 is the clean image.
    """
    low, high = (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=255)
    attacked = pixels
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        # A sum, not a mean: the gradient of an image is then the same in a batch of any size.
        loss = F.cross_entropy(model(normalize(attacked, view)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = (attacked + 2.5 * eps / steps * gradient.sign()).clamp(low, high)
    return attacked.detach()


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 sums of a batch: images, right at top-1, right in top-5, loss; then per bin images, right, confidence."""
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    confidence = logits.softmax(dim=1).amax(dim=1)
    columns = torch.stack([torch.ones_like(confidence), right[:, 0].float(), confidence]).double()
    bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1  # bin b holds (b / 15, (b + 1) / 15]
    per_bin = columns.new_zeros(3, NUM_BINS).index_add_(1, bins, columns)
    loss = F.cross_entropy(logits, labels, reduction="sum").double()
    return torch.cat([columns[0:2].sum(dim=1), torch.stack([right.sum().double(), loss]), per_bin.flatten()])


def metrics_of(sums: Tensor) -> dict[str, float]:
    """top1, top5 and ece in percent, and the mean loss, from the sum of `batch_sums`."""
    num, top1, top5, loss = sums[:4].tolist()
    _, right, confidence = sums[4:].view(3, NUM_BINS)
    ece = (right - confidence).abs().sum().item() / num  # |b| / n * |accuracy - confidence|, with the means written out
    return {"top1": 100 * top1 / num, "top5": 100 * top5 / num, "loss": loss / num, "ece": 100 * ece, "num": int(num)}


class TestedModel(NamedTuple):
    """A model that is measured, and the images of val with their labels as it numbers the classes."""

    name: str  # in the table and in messages
    model: nn.Module  # in eval mode, its batch norms folded into its convolutions
    view: View
    classes: list[str]
    images: ImageList | None  # all of val, if there is one
    chosen: np.ndarray  # int64 (n,), sorted: the rows of `images` that are corrupted and attacked
    labels: np.ndarray | None = None  # int64 (N,), of `images`

    def logits(self, pixels: Tensor, amp) -> Tensor:
        """Float32 (N, classes) of pixels (N, 3, H, W) in 0..255."""
        with torch.inference_mode(), amp:
            return self.model(normalize(pixels, self.view)).float()


class Gap(Exception):
    """A set, or a part of it, that is not there or does not fit the model: a line, and a gap in the table."""


class OtherClasses(Gap):
    """A set with classes that the model does not have: none of its parts fits."""


def measure(
    tested: TestedModel,
    dataset: ImageDataset,
    labels: np.ndarray,
    what: str,
    args,
    processes: Processes,
    eps: float = 0,
    steps: int = 0,
    columns: np.ndarray | None = None,
    predicted: Tensor | None = None,
) -> list[dict[str, float]]:
    """metrics_of each view of a dataset, by all processes, each image exactly once; attacked where `steps` is not 0.

    `columns`: only these logits compete, int64 sorted; `labels` then are positions in it. `predicted`: zeros, int64
    (N,), on the CPU; of each readable image it will have the number of its class plus 1.
    """
    device, description = processes.device, f"{tested.name} {what}"
    # Attacks are in float32: half of a float16 gradient would be 0, and its sign no attack.
    amp, _ = autocast("fp32" if steps else precision_of(args.precision, processes), device)
    labels = torch.from_numpy(labels)
    competing = slice(None) if columns is None else torch.from_numpy(columns).to(device)
    sums = torch.zeros(5, 4 + 3 * NUM_BINS, dtype=torch.float64, device=device)  # a view has at most 5 severities
    size, errors = args.batch_size or rows_per_batch(tested.view.image_size, device), set()
    batches = load_batches(dataset, grid_keys(len(dataset), size, processes), processes)

    def attacked(pixels: Tensor, target: Tensor) -> Tensor:
        return attack(tested.model, pixels, target, eps, steps, tested.view)

    for batch in progress(batches, -(-len(dataset) // (size * processes.world_size)), description, processes):
        errors.update(batch.errors)
        target = labels[batch.rows].to(device)
        for number, images in enumerate(batch.views):
            pixels = images.to(device, non_blocking=True).float()
            if steps:
                pixels = in_halves(attacked, pixels, target)
            logits = in_halves(partial(tested.logits, amp=amp), pixels)[:, competing]
            sums[number] += batch_sums(logits, target)
            if predicted is not None:
                predicted[batch.rows] = logits.argmax(1).cpu() + 1
    report_unreadable(description, errors, processes)
    sums = reduce_sum(sums, processes).cpu()
    if predicted is not None:
        reduce_sum(predicted, processes)
    if not sums[0, 0]:
        raise Gap("no image is readable")
    return [metrics_of(view_sums) for view_sums in sums if view_sums[0]]


def report_unreadable(description: str, errors: set, processes: Processes, what: str = "images") -> None:
    if errors := sorted(union_of(errors, processes)):
        print0(f"{description}: {len(errors)} {what} are unreadable and left out; the first: {errors[0][1]}")


def choose_images(labels: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """Sorted rows of `num_images` random images spread evenly over the classes, however the classes are numbered."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank_in_class[members] = np.arange(len(members))
    # The first image of each class comes first, then the second of each: any beginning of this list is balanced.
    return np.sort(order[np.argsort(rank_in_class[order], kind="stable")][:num_images])


class Part(NamedTuple):
    """A part of the evaluation. Its items are measured and saved one by one, so a killed run loses only one of them."""

    name: str  # the key of its results in robustness.json
    columns: dict[str, str]  # of the table: what to show of the results; with {} in the heading each item
    items: list[str]  # what the command asks for; none: the part is not done
    settings: dict  # what its numbers depend on besides the weights; saved with them
    measure: Callable[[TestedModel, str, argparse.Namespace, Processes], dict]  # of one item: what to save
    inside: str = ""  # the key below which the items are saved, where there is a summary beside them
    summary: Callable[[dict, dict], dict] = lambda items, entry: {}  # of all items: what to save beside them
    of_val: bool = True  # measured on the images of val


def measure_clean(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    dataset = ImageDataset(tested.images, clean=tested.view)
    predicted = torch.zeros(len(tested.labels), dtype=torch.int64)
    (metrics,) = measure(tested, dataset, tested.labels, "clean top1", args, processes, predicted=predicted)
    return metrics | details_of(tested.labels, predicted.numpy() - 1, tested.classes)


def measure_corruption(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    dataset = CorruptedImages(tested.images[tested.chosen], tested.view, tested.chosen, item, args.seed)
    severities = measure(tested, dataset, tested.labels[tested.chosen], f"corrupt {item}", args, processes)
    return {item: [metrics["top1"] for metrics in severities]}


def mean_top1(items: dict[str, list[float]], entry: dict) -> dict[str, float | None]:
    return {"top1": mean_of(items, CORRUPTIONS)}  # corruptions x severities


def measure_attack(name: str, steps: int, tested: TestedModel, item: str, args, processes: Processes) -> dict:
    dataset, labels = ImageDataset(tested.images[tested.chosen], clean=tested.view), tested.labels[tested.chosen]
    (metrics,) = measure(tested, dataset, labels, f"{name} {item}", args, processes, eps=float(item), steps=steps)
    return {item: metrics["top1"]}


def details_of(labels: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict:
    """What is behind a top-1: how sure it is, and which classes it comes from. `predicted`: -1 of unreadable images.

    interval95: half the width of the 95 percent interval of top1, in points. balanced_top1: the mean recall of the
    classes that val has. `right`: a bit an image, in the order of val, base64. confusion: images, true class by row.
    """
    seen, num_classes = predicted >= 0, len(classes)
    true, said = labels[seen], predicted[seen]
    num, named = (np.bincount(column, minlength=num_classes) for column in (true, said))
    right = np.bincount(true[true == said], minlength=num_classes)
    share = right.sum() / num.sum()
    details = {"balanced_top1": 100 * float((right[num > 0] / num[num > 0]).mean())}
    details["interval95"] = 196 * math.sqrt(share * (1 - share) / num.sum())
    counts = zip(classes, num.tolist(), named.tolist(), right.tolist(), strict=True)
    details["per_class"] = {
        name: {"num": n, "recall": 100 * k / n if n else None, "precision": 100 * k / m if m else None}
        for name, n, m, k in counts
    }
    if num_classes <= 100:
        confusion = np.bincount(true * num_classes + said, minlength=num_classes**2)
        details["confusion"] = confusion.reshape(num_classes, num_classes).tolist()
    return details | {"right": base64.b64encode(np.packbits(predicted == labels).tobytes()).decode()}


def paired_difference(one: dict, other: dict) -> tuple[float, float]:
    """How much better `one` is than `other`, both `details_of` the same images: (points, half the 95 percent interval).

    b and c images are right in one alone: (b - c) / n +- 1.96 sqrt(b + c - (b - c)^2 / n) / n.
    """
    bits = (np.frombuffer(base64.b64decode(entry["right"]), np.uint8) for entry in (one, other))
    first, second = (np.unpackbits(packed).astype(bool) for packed in bits)
    num = sum(of_class["num"] for of_class in one["per_class"].values())
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    return 100 * (b - c) / num, 196 * math.sqrt(b + c - (b - c) ** 2 / num) / num


# ---------------------------------------------------------------------------------------------------------------------
# the released sets, in the layouts in which they are released
# ---------------------------------------------------------------------------------------------------------------------


def images_of(folder: Path, classes: list[str]) -> tuple[ImageList, np.ndarray]:
    """(images, their labels int64 (N,)) of folder/<class>/**, or a Gap."""
    try:
        images, labels, _ = images_by_class(folder, classes)
    except ValueError as error:
        raise Gap(str(error)) from error
    except LookupError as error:
        names = "" if has_names(classes) else "; --classes FILE says what the model's outputs are called"
        raise OtherClasses(f"{error}{names}") from error
    if not len(images):
        raise Gap(f"{folder}: no images in its class folders")
    return images, labels


def stored(view: View) -> View:
    """The view of an image that was cropped before it was stored: all of it, resized if it has another size."""
    return view._replace(crop_mode="squash", interpolation="bicubic")


def measure_folder(folder: Path, subset: bool, tested: TestedModel, item: str, args, processes: Processes) -> dict:
    """Photographs by class. `subset`: only the classes of the set compete, as for ImageNet-A and -R (200 of 1,000)."""
    images, labels = images_of(folder, tested.classes)
    columns = np.unique(labels) if subset else np.arange(len(tested.classes))
    labels = np.searchsorted(columns, labels)
    dataset = ImageDataset(images, clean=tested.view)
    (metrics,) = measure(tested, dataset, labels, folder.name, args, processes, columns=columns)
    return {name: metrics[name] for name in ("top1", "top5", "num")}


def measure_named_folder(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    return {item: measure_folder(dict(args.folder)[item], False, tested, item, args, processes)}


def measure_imagenet_c(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    """ROOT/<corruption>/<severity>/<class>/, flat or in the archives' folders blur/, digital/, extra/ ..."""
    root, top1 = args.imagenet_c, []
    folders = [root / item, *sorted(root.glob(f"*/{item}"))]
    if not (folder := next((folder for folder in folders if folder.is_dir()), None)):
        raise Gap(f"{root} has neither {item}/ nor a folder with {item}/ in it")
    for severity in range(1, 6):
        images, labels = images_of(folder / str(severity), tested.classes)
        dataset = ImageDataset(images, clean=stored(tested.view))
        (metrics,) = measure(tested, dataset, labels, f"ImageNet-C {item} {severity}", args, processes)
        top1.append(metrics["top1"])
    return {item: {"top1": top1, "num": metrics["num"]}}


def mean_corruption_error(top1: dict[str, list[float]], errors: dict[str, float], clean=(0.0, 0.0)) -> tuple:
    """(mCE or None where one of the 15 is missing, {corruption: CE}), percent (1903.12261, section 4).

    CE: the sum of the errors at the five severities over that of AlexNet. top1 {corruption: [5]}, errors {corruption:
    AlexNet's mean error} in percent. `clean`: the clean errors of both, taken off both sums: the relative CE.
    """
    own, alexnet = clean
    ce = {name: 100 * (100 - sum(top1[name]) / 5 - own) / (errors[name] - alexnet) for name in top1 if name in errors}
    return mean_of({name: [value] for name, value in ce.items()}, BENCHMARK), ce


def summarize_imagenet_c(baseline: dict, items: dict[str, dict], entry: dict) -> dict[str, float]:
    top1 = {name: found["top1"] for name, found in items.items()}
    theirs = {name: found["top1"] for name, found in baseline.get("imagenet_c", {}).get(INSIDE, {}).items()}
    errors = {name: 100 - sum(of_name) / 5 for name, of_name in theirs.items()} or ALEXNET_ERRORS
    mce, ce = mean_corruption_error(top1, errors)
    for name in ce:
        items[name]["ce"] = ce[name]
    summary = {"top1": mean_of(top1, BENCHMARK), "top1_extra": mean_of(top1, EXTRA), "mce": mce}
    clean = [of["clean"]["top1"] for of in (entry, baseline if theirs else ALEXNET) if "clean" in of]
    if len(clean) == 2:
        summary["relative_mce"], _ = mean_corruption_error(top1, errors, [100 - of_model for of_model in clean])
    summary["num"] = min((found["num"] for found in items.values()), default=None)
    return summary


def mean_of(values: dict[str, list[float]], names: Iterable[str]) -> float | None:
    """The mean over corruptions and severities; None if one of the names is missing."""
    return float(np.mean([values[name] for name in names])) if set(names) <= set(values) else None


class Videos(ImageDataset):
    """Videos of ImageNet-P: a key is a video, its views are its frames."""

    def __getitem__(self, row: int):
        try:
            with import_av().open(self.images.name(row)) as file:
                frames = [frame.to_image() for frame in file.decode(video=0)]
            if len(frames) < 2:
                raise ValueError(f"{len(frames)} frames")
            return row, [eval_view(frame, self.clean) for frame in frames], None
        except Exception as error:  # decoders raise anything
            return row, None, f"{self.images.name(row)}: {type(error).__name__}: {error}"


def import_av():
    try:
        import av
    except ImportError:
        fail("--imagenet-p: its videos need a package: pip install av")
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a broken video is said once, by us
    return av


def measure_imagenet_p(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    """ROOT/<perturbation>/<class>/<video>: the share of frames whose class is not that of the frame before it.

    Noise has no order in time: its frames are compared with the first one (official ImageNet-P/test.py). Percent; the
    mean over the videos of the mean over the comparisons. top1: of all frames, ours.
    """
    folder, number = args.imagenet_p / item, {name: label for label, name in enumerate(tested.classes)}
    found = sorted(path for path in folder.glob("*/*") if path.suffix in (".mp4", ".avi"))
    if not found:
        raise Gap(f"{folder}: no videos <class>/<name>.mp4 in it")
    if unknown := sorted({path.parent.name for path in found} - set(number)):
        raise OtherClasses(f"{folder} has classes that are unknown to the model: {', '.join(unknown[:5])}")
    paths, zeros = np.array([os.fsencode(path.relative_to(folder)) for path in found]), np.zeros(len(found), np.int64)
    labels = [number[path.parent.name] for path in found]
    dataset = Videos(ImageList(str(folder), paths, zeros, zeros), clean=stored(tested.view))
    sums, errors = torch.zeros(3, len(found), dtype=torch.float64), set()  # of each video: read, flips, right
    amp, _ = autocast(precision_of(args.precision, processes), processes.device)
    size = args.batch_size or rows_per_batch(tested.view.image_size, processes.device)
    batches, description = load_batches(dataset, grid_keys(len(found), 1, processes), processes), f"ImageNet-P {item}"
    for batch in progress(batches, -(-len(found) // processes.world_size), f"{tested.name} {description}", processes):
        errors.update(batch.errors)
        for row in batch.rows.tolist():
            frames = torch.cat(batch.views).split(size)
            logits = [in_halves(partial(tested.logits, amp=amp), part.to(processes.device).float()) for part in frames]
            said = torch.cat(logits).argmax(1).cpu()
            before = said[:1] if "noise" in item else said[:-1]
            means = [(said[1:] != before).double().mean(), (said == labels[row]).double().mean()]
            sums[:, row] = torch.stack([torch.ones(()).double(), *means])
    report_unreadable(f"{tested.name} {description}", errors, processes, "videos")
    num, flips, right = reduce_sum(sums, processes).sum(dim=1).tolist()
    if not num:
        raise Gap(f"{folder}: no video is readable")
    return {item: {"flip": 100 * flips / num, "top1": 100 * right / num, "num": int(num)}}


def summarize_imagenet_p(baseline: dict, items: dict[str, dict], entry: dict) -> dict:
    """mfr: the mean over the ten perturbations of the flip probability over AlexNet's, mfp: of the plain one."""
    if not set(ALEXNET_FLIPS) <= set(items):
        return {}
    theirs = {name: found["flip"] for name, found in baseline.get("imagenet_p", {}).get(FLIPPED, {}).items()}
    normalizers = theirs or ALEXNET_FLIPS
    flips = {name: items[name]["flip"] for name in ALEXNET_FLIPS}
    mfr = 100 * float(np.mean([flip / normalizers[name] for name, flip in flips.items()]))
    mean = {key: float(np.mean([items[name][of] for name in flips])) for key, of in (("mfp", "flip"), ("top1", "top1"))}
    return {"mfr": mfr, **mean, "mfr_normalizers": "the baseline's" if theirs else "AlexNet's, unconfirmed"}


class StoredViews(ImageDataset):
    """The images of a .npy file of CIFAR-10-C, uint8 (5 N, H, W, 3): the five severities of an image are its views."""

    def __init__(self, array: np.ndarray, view: View):
        super().__init__(range(len(array) // 5), clean=view)
        self.array = array

    def __getitem__(self, row: int):
        rows = range(row, len(self.array), len(self))
        return row, [eval_view(Image.fromarray(self.array[r]), self.clean) for r in rows], None


def measure_cifar10_c(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    """ROOT/<corruption>.npy, severity by severity, and ROOT/labels.npy, numbers of CIFAR-10's classes."""
    arrays = []
    for file in (args.cifar10_c / f"{item}.npy", args.cifar10_c / "labels.npy"):
        try:
            arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise Gap(f"{file}: cannot be read ({error})") from error
    images, numbers = arrays
    expected = f"expected uint8 (5 N, H, W, 3) and as many labels: found {images.dtype} {images.shape}, {numbers.shape}"
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) % 5 or not len(images):
        raise Gap(f"{args.cifar10_c / item}.npy: {expected}")
    numbers = np.asarray(numbers).reshape(5, -1) if numbers.shape == images.shape[:1] else numbers
    if numbers.ndim != 2 or (numbers != numbers[0]).any() or numbers.min() < 0 or numbers.max() > 9:
        raise Gap(f"{args.cifar10_c / 'labels.npy'}: not the same labels 0 to 9 for each severity; {expected}")
    if unknown := sorted(set(CIFAR10) - set(tested.classes)):
        raise OtherClasses(f"the model does not have CIFAR-10's classes: {', '.join(unknown[:5])}")
    labels = np.array([tested.classes.index(name) for name in CIFAR10])[numbers[0]]
    dataset = StoredViews(images, stored(tested.view))
    severities = measure(tested, dataset, labels, f"CIFAR-10-C {item}", args, processes)
    return {item: [metrics["top1"] for metrics in severities]}


def summarize_cifar10_c(items: dict[str, list[float]], entry: dict) -> dict[str, float]:
    """top1, severity5 of the 15 of the benchmark; _19 with the 4 extra ones (the consistency example's)."""
    all_19, fifth = (*BENCHMARK, *EXTRA), {name: top1[4:] for name, top1 in items.items()}
    return {"top1": mean_of(items, BENCHMARK), "top1_19": mean_of(items, all_19)} | {
        "severity5": mean_of(fifth, BENCHMARK),
        "severity5_19": mean_of(fifth, all_19),
    }


def parts_of(args, data: Path | None, num_images: int, num_chosen: int, baseline: dict, processes) -> list[Part]:
    """The table of the parts, in the order in which they are measured and shown."""
    precision = {"precision": precision_of(args.precision, processes)}  # that of attacks is always fp32
    everything = {"data": str(data and data.absolute()), "num_images": num_images}
    everything |= {"val_half": args.val_half} if args.val_half else {}
    chosen = everything | {"num_images": num_chosen, "seed": args.seed}
    fgsm_eps, pgd_eps = ([f"{eps:g}" for eps in flag] for flag in (args.fgsm, args.pgd))
    fgsm, pgd = partial(measure_attack, "fgsm", 1), partial(measure_attack, "pgd", args.pgd_steps)
    corruptions, drawn = list(CORRUPTIONS) if args.corrupt else [], chosen | precision
    parts = [
        Part("clean", {"clean top-1": "top1"}, ["right"] if data else [], everything | precision, measure_clean),
        Part("corrupt", {"corrupted top-1": "top1"}, corruptions, drawn, measure_corruption, INSIDE, mean_top1),
        Part("fgsm", {"FGSM {}": ""}, fgsm_eps, chosen, fgsm),
        Part("pgd", {"PGD {}": ""}, pgd_eps, chosen | {"steps": args.pgd_steps}, pgd),
    ]

    def released(name: str, folder: Path | list | None, columns: dict, items, measure, *more) -> Part:
        settings = {"folder": str(folder)} | precision
        return Part(name, columns, list(items) if folder else [], settings, measure, *more, of_val=False)

    a, r, c, p = args.imagenet_a, args.imagenet_r, args.imagenet_c, args.imagenet_p
    all_19 = (*BENCHMARK, *EXTRA)
    columns_c = {"ImageNet-C top-1": "top1", "mCE": "mce", "relative mCE (unconfirmed)": "relative_mce"}
    columns_p = {f"ImageNet-P mFR{'' if baseline.get('imagenet_p') else ' (unconfirmed)'}": "mfr", "mFP": "mfp"}
    columns_10 = {"CIFAR-10-C top-1": "top1", "severity 5 of 19": "severity5_19"}
    summary_c, summary_p = partial(summarize_imagenet_c, baseline), partial(summarize_imagenet_p, baseline)
    return [
        *parts,
        released("imagenet_a", a, {"ImageNet-A": "top1"}, ["top1"], partial(measure_folder, a, True)),
        released("imagenet_r", r, {"ImageNet-R": "top1"}, ["top1"], partial(measure_folder, r, True)),
        released("imagenet_c", c, columns_c, all_19, measure_imagenet_c, INSIDE, summary_c),
        released("imagenet_p", p, columns_p, ALEXNET_FLIPS, measure_imagenet_p, FLIPPED, summary_p),
        released("cifar10_c", args.cifar10_c, columns_10, all_19, measure_cifar10_c, INSIDE, summarize_cifar10_c),
        released("folders", args.folder, {"{}": "top1"}, dict(args.folder), measure_named_folder),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# results: robustness.json, the table, the picture. An `entry` is what the file holds of one checkpoint:
# {"sha256": of the checkpoint, "settings": {part: its settings}, "parameters": their number, part: its results ...}
# ---------------------------------------------------------------------------------------------------------------------


def read_results(file: Path) -> dict[str, dict]:
    """What robustness.json holds, {path of a checkpoint: entry}; {} where there is none yet."""
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        fail(f"{file}: not the results of an earlier run ({error}); move it away or choose another --out")


def read_baseline(file: Path | None) -> dict:
    """The entry of the one model in --baseline, which takes AlexNet's place in mCE and mFR; {} without one."""
    results = read_results(file) if file else {"": {}}
    if len(results) != 1:
        fail(f"--baseline {file}: expected the robustness.json of one model, found {len(results)}")
    (entry,) = results.values()
    for part, inside, needed in (("imagenet_c", INSIDE, BENCHMARK), ("imagenet_p", FLIPPED, ALEXNET_FLIPS)):
        if lacking := [name for name in needed if part in entry and name not in entry[part][inside]]:
            fail(f"--baseline {file}: its {part} lacks {', '.join(lacking)}")
    return entry


def save_results(file: Path, results: dict[str, dict], processes: Processes) -> None:
    if processes.is_main:
        with write_atomically(file) as temporary:
            temporary.write_text(json.dumps(results, indent=1))


def items_of(entry: dict, part: Part) -> dict:
    """What the entry has of a part, measured with these settings: {item: result}."""
    found = entry.get(part.name, {}) if entry["settings"].get(part.name) == part.settings else {}
    return found.get(part.inside, {}) if part.inside else found


def store(entry: dict, part: Part, measured: dict) -> None:
    """Add to the entry what was measured. It never mixes two settings: what had others is dropped."""
    items = items_of(entry, part) | measured
    entry["settings"][part.name] = part.settings
    summary = part.summary(items, entry) if part.inside else {}
    summary = {name: value for name, value in summary.items() if value is not None}
    entry[part.name] = {part.inside: items, **summary} if part.inside else items


class Row(NamedTuple):
    """A row of the table: a model, or the same model with several seeds."""

    name: str
    entries: list[dict]  # one a seed
    seeds: list[str]
    values: dict[str, list[float]]  # {heading: a value a seed}, of what all of them have
    nums: dict[str, int]  # {heading: images behind the value}, where it is a share of images

    def cell(self, heading: str) -> str:
        """Of several seeds mean +- standard deviation, of one the value +- half of its 95 percent interval."""
        values = self.values.get(heading, [])
        if len(values) == 1 and heading in self.nums:
            return f"{values[0]:.2f} ± {half_interval(values[0] / 100, self.nums[heading]):.2f}"
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}" if values else "-"


def half_interval(share: float, num: int) -> float:
    """Half the width, in points, of the 95 percent interval of a share of `num` images."""
    return 196 * math.sqrt(share * (1 - share) / num)


def headings_of(entry: dict, parts: list[Part]) -> tuple[dict[str, float], dict[str, int]]:
    """({heading: value}, {heading: images}) of what was measured with these settings, now or by an earlier command."""
    values, nums = {}, {}
    for part in parts:
        found = entry[part.name] if items_of(entry, part) else {}
        for heading, key in part.columns.items():
            for item, of_item in found.items() if "{}" in heading else [("", found)]:
                value = of_item.get(key) if isinstance(of_item, dict) else of_item
                num = of_item.get("num") if isinstance(of_item, dict) else None
                if value is not None:
                    values[heading.format(item)] = value
                    if key in ("", "top1") and (num := num or part.settings.get("num_images")):
                        nums[heading.format(item)] = num
    return values, nums


def rows_of(results: dict[str, dict], parts: list[Part]) -> list[Row]:
    """The rows of the table. Paths that differ in one folder seedN alone are one model."""
    groups = {}
    for path, entry in results.items():
        seed = re.search(r"(?<![^/])seed\d+(?=/)", path)
        model = path[: seed.start()] + "seed*" + path[seed.end() :] if seed else path
        groups.setdefault(model, []).append((path, seed and seed.group(), entry))
    paths = [model if len(entries) > 1 else entries[0][0] for model, entries in groups.items()]
    rows = []
    for found, name in zip(groups.values(), short_names(paths), strict=True):
        _, seeds, entries = zip(*found, strict=True)
        values, nums = zip(*(headings_of(entry, parts) for entry in entries), strict=True)
        shared = [heading for heading in values[0] if all(heading in of_seed for of_seed in values)]
        name += f" ({len(entries)} seeds)" if len(entries) > 1 else ""
        values = {heading: [of_seed[heading] for of_seed in values] for heading in shared}
        rows.append(Row(name, list(entries), list(seeds), values, nums[0]))
    return rows


def short_names(paths: list[str]) -> list[str]:
    """runs/demo/student1/model.pt -> student1; the whole path where two share that name."""
    folders = [Path(path).absolute().parent.name for path in paths]
    return [path if folders.count(folder) > 1 else folder for path, folder in zip(paths, folders, strict=True)]


def compare(rows: list[Row]) -> list[str]:
    """A line with the differences of the clean top-1 to `control`, or to the first row: image by image, or by seed."""
    rows = [row for row in rows if "clean top-1" in row.values]
    base = next((row for row in rows if row.name.split()[0] == "control"), rows[0] if rows else None)
    found, kind = [], "image by image"
    for row in rows:
        seeds = [seed for seed in row.seeds if seed in base.seeds] if row is not base else []
        if len(seeds) > 1:
            kind = f"over {len(seeds)} seeds"
            one, other = (np.array([r.values["clean top-1"][r.seeds.index(s)] for s in seeds]) for r in (row, base))
            found.append((row.name, *interval_over_seeds(one - other)))
        elif row is not base and len(row.entries) == len(base.entries) == 1:
            found.append((row.name, *paired_difference(row.entries[0]["clean"], base.entries[0]["clean"])))
    if not found:
        return []
    differences = ", ".join(f"{name} {points:+.2f} ± {half:.2f}" for name, points, half in found)
    return [f"Clean top-1 against {base.name}, {kind}, with 95 percent intervals: {differences}."]


def interval_over_seeds(differences: np.ndarray) -> tuple[float, float]:
    """(mean, half of the 95 percent t interval) of one difference a seed, n >= 2."""
    freedom, z = len(differences) - 1, 1.959964
    # Above 10 degrees of freedom Cornish and Fisher's series is right to 0.002.
    series = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t = T_95[freedom - 1] if freedom <= len(T_95) else series
    return float(differences.mean()), float(t * differences.std(ddof=1) / math.sqrt(len(differences)))


def worst_pairs(row: Row, num: int = 10) -> list[str]:
    """A line with the pairs of classes that the model confuses most: true -> said, how many of the true one."""
    clean = row.entries[0].get("clean", {})
    if "confusion" not in clean or "clean top-1" not in row.values:
        return []
    images, names = np.array(clean["confusion"]), list(clean["per_class"])
    wrong = images - np.diag(images.diagonal())
    pairs = zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:num], wrong.shape), strict=True)
    words = [f"{names[t]} -> {names[s]} {wrong[t, s]} of {images[t].sum()}" for t, s in pairs if wrong[t, s]]
    return [f"- {row.name}: {', '.join(words)}"] if words else []


def markdown_table(rows: list[Row], headings: list[str]) -> str:
    """A line a model, a column for what was measured of any, aligned for reading in a terminal too."""
    table = [["model", "parameters", *headings]]
    for row in rows:
        parameters = f"{row.entries[0]['parameters'] / 1e6:.2f}M" if "parameters" in row.entries[0] else "-"
        table.append([row.name, parameters, *map(row.cell, headings)])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in table]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: list[Row], headings: list[str], file: Path) -> None:
    """Bars for the top-1 columns; with corruptions top-1 against severity, and of each; the last row's confusion."""
    if (plt := pyplot()) is None:
        return
    headings = [heading for heading in headings if not re.search("mCE|mFR|mFP", heading)]
    corrupted = "corrupted top-1" in headings
    confused = next((row for row in reversed(rows) if "confusion" in row.entries[0].get("clean", {})), None)
    confused = confused and (confused if len(confused.entries[0]["clean"]["per_class"]) <= 40 else None)
    num_panels = 1 + 2 * corrupted + bool(confused)
    figure, ((bars, *panels),) = plt.subplots(
        ncols=num_panels, figsize=(3 + 4 * num_panels, 4.4), squeeze=False, layout="constrained"
    )
    places, width = np.arange(len(headings)), 0.84 / len(rows)
    for number, row in enumerate(rows):
        color, found = f"C{number % 10}", [row.values.get(heading, [np.nan]) for heading in headings]
        spread = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in found]
        heights = [np.mean(values) for values in found]
        group = bars.bar(places + width * number, heights, width, yerr=spread, color=color, label=row.name)
        bars.bar_label(group, fmt="%.0f", fontsize=7, padding=1)
        if "corrupted top-1" in row.values:
            of_seeds = [[entry["corrupt"][INSIDE][name] for name in CORRUPTIONS] for entry in row.entries]
            top1 = np.mean(of_seeds, axis=0)  # (corruptions, 5)
            panels[0].plot(range(1, 6), top1.mean(axis=0), "o-", color=color)
            panels[1].plot(top1.mean(axis=1), range(len(CORRUPTIONS)), "o", color=color, alpha=0.8)
    bars.set_xticks(places + width * (len(rows) - 1) / 2, [heading.replace(" ", "\n") for heading in headings])
    bars.set_ylabel("top-1 in percent")
    if corrupted:
        panels[0].set(xlabel="severity", ylabel="top-1 in percent, mean of the corruptions", xticks=range(1, 6))
        panels[1].set(xlabel="top-1 in percent, mean of the severities", yticks=range(len(CORRUPTIONS)))
        panels[1].set_yticklabels([name.replace("_", " ") for name in CORRUPTIONS])
        panels[1].invert_yaxis()
        panels[1].grid(alpha=0.3)
    if confused:
        images, names = (
            np.array(confused.entries[0]["clean"]["confusion"]),
            list(confused.entries[0]["clean"]["per_class"]),
        )
        panels[-1].imshow(images / images.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        panels[-1].set(xlabel="said", ylabel="true class", title=f"{confused.name}, share of the class")
        panels[-1].set_xticks(range(len(names)), names, rotation=90)
        panels[-1].set_yticks(range(len(names)), names)
    figure.legend(loc="outside upper center", ncols=min(5, len(rows)), frameon=False)
    save_figure(plt, file)


def report(results: dict[str, dict], parts: list[Part], val, num_chosen: int, args) -> None:
    """Write robustness.md and .png, and print the table with what must be said of it."""
    rows = rows_of(results, parts)
    found = dict.fromkeys(heading for row in rows for heading in row.values)
    asked = dict.fromkeys(next(iter(part.columns)).format(item) for part in parts for item in part.items)
    headings = list(found | asked)  # what is asked for and not there is a gap
    if not any(items_of(entry, part) for entry in results.values() for part in parts):
        gaps = [gap for entry in results.values() for gap in entry["gaps"].values()]
        fail(f"nothing could be measured: {gaps[0]}")
    words = []
    if val:
        half = f" (the half to {args.val_half} with)" if args.val_half else ""
        words.append(f"Percent of {len(val[1])} val images{half}; drawn and attacked: {num_chosen} (seed {args.seed}).")
    words.append("± is half of the 95 percent interval, at most where a value is a mean over corruptions; of several")
    words[-1] += " seeds the standard deviation."
    words += compare(rows)
    words += [f"Gap: {path} {item}: {gap}" for path, entry in results.items() for item, gap in entry["gaps"].items()]
    table = markdown_table(rows, headings)
    pairs = [line for row in rows for line in worst_pairs(row)]
    pairs = ["", "Most confused classes of val, true -> said (of the first seed):", "", *pairs] if pairs else []
    with write_atomically(args.out / "robustness.md") as temporary:
        temporary.write_text("\n".join([*words, *pairs, "", table]) + "\n")
    draw(rows, headings, args.out / "robustness.png")
    print0("\n".join([f"{args.out / 'robustness.json'}:", *words, "", table]))


def val_of(args, data: Path | None) -> tuple[ImageList, np.ndarray, list[str]] | None:
    """`images_by_class` of DATA/val, or of the --val-half of it; None, with a line, where there is no such folder."""
    if not data or not any((data / split).is_dir() for split in ("train", "val")):
        if args.data or args.corrupt or args.fgsm or args.pgd:
            fail(f"--data: no data directory with train/ or val/ there ({data})")
        print0(f"no data directory ({data}): the clean part is left out")
        return None
    images, labels, classes = labeled_images(data, "val")
    if args.val_half:
        wanted = judged_half(images) == (args.val_half == "judge")
        images, labels = images[wanted], labels[wanted]
    return images, labels, classes


def output_names(checkpoint: dict, args, val: tuple | None) -> list[str]:
    """What the outputs of a model are called: as the checkpoint says, else --classes, else the folders of val/."""
    classes = checkpoint["classes"]
    if has_names(classes):
        return classes
    try:
        names = args.classes.read_text().splitlines() if args.classes else val[2] if val else []
    except OSError as error:
        fail(f"--classes: {error}")
    if args.classes and len(names) != len(classes):
        fail(f"--classes {args.classes}: {len(names)} names, but the model has {len(classes)} outputs")
    return names if len(names) == len(classes) else classes


def labels_in(classes: list[str], val: tuple | None) -> np.ndarray | None:
    """The labels of val as a model numbers its classes; a Gap where val has classes that it does not know."""
    if not val:
        return None
    if unknown := sorted(set(val[2]) - set(classes)):
        raise OtherClasses(f"val/ has classes that are unknown to the model: {', '.join(unknown[:5])}")
    return np.array([classes.index(name) for name in val[2]])[val[1]]


def evaluate_model(path: str, name: str, entry: dict, parts: list[Part], val, chosen, args, processes, save) -> None:
    """Measure and save what the entry of a checkpoint lacks. Gaps are printed, and kept for the table."""
    entry["gaps"] = {}
    missing = [(part, item) for part in parts for item in part.items if item not in items_of(entry, part)]
    if not missing:  # then the model is not loaded
        return
    model, checkpoint = load_model(path, processes.device)
    entry["parameters"] = sum(parameter.numel() for parameter in model.parameters())  # before the fusion
    fuse_batch_norms(model)
    if args.compile:  # pays from some 20,000 images at 224 px on
        model.compile()
    tested = TestedModel(name, model, View.of(checkpoint), output_names(checkpoint, args, val), val and val[0], chosen)
    unfit = set()  # sets of other classes: one line says it of all their parts
    for part, item in missing:
        if part.name in unfit:
            continue
        try:
            if part.of_val:
                tested = tested._replace(labels=labels_in(tested.classes, val))
            measured = part.measure(tested, item, args, processes)
        except Gap as gap:
            entry["gaps"][f"{part.name} {item}"] = str(gap)
            print0(f"{name} {part.name} {item}: not measured: {gap}")
            unfit |= {part.name} if isinstance(gap, OtherClasses) else set()
            continue
        store(entry, part, measured)
        save()
        top1 = measured.get("top1", measured.get(item))
        top1 = top1["top1"] if isinstance(top1, dict) else top1
        print0(f"{name} {part.name} {item}: {' '.join(f'{value:.2f}' for value in np.atleast_1d(top1))}")


def main() -> None:
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # each item is saved when it is done: only one is lost
        signal.signal(number, lambda *_: sys.exit(143))
    processes = init_processes(args.device, args.workers)
    results_file = args.out / "robustness.json"
    earlier, baseline = read_results(results_file), read_baseline(args.baseline)

    # All checkpoints are read before the first is measured: a wrong path fails now, not after hours.
    headers = {path: read_checkpoint(path) for path in args.checkpoints}
    data = args.data or (Path(found) if (found := headers[args.checkpoints[0]].get("data")) else None)
    val, results = val_of(args, data), {}
    gaps = []  # of models that do not know the classes of val
    for path, header in headers.items():
        try:
            labels_in(output_names(header, args, val), val)
        except Gap as gap:
            gaps.append(f"{path}: {gap}")
        fresh = {"sha256": file_sha256(path), "settings": {}}
        known = earlier.get(path, {})
        results[path] = known if known.get("sha256") == fresh["sha256"] else fresh
    to_save = results | {path: entry for path, entry in earlier.items() if path not in results}
    del headers

    chosen = choose_images(val[1], args.num_images or len(val[1]), args.seed) if val else np.zeros(0)
    parts = parts_of(args, val and data, len(val[1]) if val else 0, len(chosen), baseline, processes)
    if not any(part.items and not (part.of_val and len(gaps) == len(results)) for part in parts):
        fail(gaps[0] if gaps else "nothing to measure: --data, or one of the released sets, says what")
    save = partial(save_results, results_file, to_save, processes)
    for (path, entry), name in zip(results.items(), short_names(list(results)), strict=True):
        evaluate_model(path, name, entry, parts, val, chosen, args, processes, save)
        for part in parts:  # a summary may have another --baseline now
            if items := items_of(entry, part):
                store(entry, part, items)
    save()
    if processes.is_main:
        report(results, parts, val, len(chosen), args)


if __name__ == "__main__":
    main()
