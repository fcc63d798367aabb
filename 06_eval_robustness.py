"""Stage 06: measure how much of a model's accuracy is left on corrupted images and under attack.

A student that was trained with noise on many more images is more accurate than its teacher. It is also much more
robust, although no stage trains it for that (Noisy Student, section 4.3). This stage compares checkpoints on DATA/val.

    clean       top-1, top-5, cross-entropy, and the expected calibration error in percent, over 15 equal bins b of the
                confidence: sum_b n_b / n * |accuracy_b - confidence_b|
    --corrupt   10 corruptions of ImageNet-C (Hendrycks & Dietterich, 1903.12261) at severities 1 to 5, drawn on the fly
                on the image as the model sees it; top-1 is the plain mean over corruptions x severities
    --fgsm EPS  x' = clip(x + EPS * sign(grad_x loss(x, y)), 0, 255)                     x in pixel values, 0 to 255
    --pgd EPS   --pgd-steps K times x' = clip(x' + 2.5 * EPS / K * sign(grad), x - EPS, x + EPS), cut to 0..255 too.
                Both attacks are in fp32, whatever --precision is.

reads   checkpoints of any stage; DATA/val, whose classes are matched to a checkpoint's by name
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
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
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
from common import fuse_batch_norms  # models
from common import View, normalize  # views
from common import ImageList, labeled_images  # listing
from common import ImageDataset, grid_keys, load_batches, rows_per_batch  # batches
from common import load_model, read_checkpoint  # checkpoints
from common import autocast, in_halves, precision_of  # training
from common import pyplot, save_figure  # pictures

NUM_BINS = 15  # of the calibration error

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
    return {"top1": 100 * top1 / num, "top5": 100 * top5 / num, "loss": loss / num, "ece": 100 * ece}


class TestedModel(NamedTuple):
    """A model that is measured, and the images of val with their labels as it numbers the classes."""

    name: str  # in the table and in messages
    model: nn.Module  # in eval mode, its batch norms folded into its convolutions
    view: View
    images: ImageList  # all of val
    labels: np.ndarray  # int64 (N,), of `images`
    chosen: np.ndarray  # int64 (n,), sorted: the rows of `images` that are corrupted and attacked
    classes: list[str]


def measure(
    tested: TestedModel,
    dataset: ImageDataset,
    labels,
    what: str,
    args,
    processes: Processes,
    eps=0.0,
    steps=0,
    predicted: Tensor | None = None,
) -> list[dict[str, float]]:
    """metrics_of each view of a dataset, by all processes, each image exactly once; attacked where `steps` is not 0.

    `predicted`: zeros, int64 (N,), on the CPU; of each readable image it will have the number of its class plus 1.
    """
    device, description = processes.device, f"{tested.name} {what}"
    # Attacks are in float32: half of a float16 gradient would be 0, and its sign no attack.
    amp, _ = autocast("fp32" if steps else precision_of(args.precision, processes), device)
    labels = torch.from_numpy(labels)
    sums = torch.zeros(5, 4 + 3 * NUM_BINS, dtype=torch.float64, device=device)  # a view has at most 5 severities
    size, errors = args.batch_size or rows_per_batch(tested.view.image_size, device), set()
    batches = load_batches(dataset, grid_keys(len(dataset), size, processes), processes)

    def attacked(pixels: Tensor, target: Tensor) -> Tensor:
        return attack(tested.model, pixels, target, eps, steps, tested.view)

    def logits_of(pixels: Tensor) -> Tensor:
        with torch.inference_mode(), amp:
            return tested.model(normalize(pixels, tested.view)).float()

    for batch in progress(batches, -(-len(dataset) // (size * processes.world_size)), description, processes):
        errors.update(batch.errors)
        target = labels[batch.rows].to(device)
        for number, images in enumerate(batch.views):
            pixels = images.to(device, non_blocking=True).float()
            if steps:
                pixels = in_halves(attacked, pixels, target)
            logits = in_halves(logits_of, pixels)
            sums[number] += batch_sums(logits, target)
            if predicted is not None:
                predicted[batch.rows] = logits.argmax(1).cpu() + 1
    if errors := sorted(union_of(errors, processes)):
        print0(f"{description}: {len(errors)} images are unreadable and left out; the first: {errors[0][1]}")
    sums = reduce_sum(sums, processes).cpu()
    if predicted is not None:
        reduce_sum(predicted, processes)
    if not sums[0, 0]:
        fail("no val image is readable")
    return [metrics_of(view_sums) for view_sums in sums if view_sums[0]]


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
    column: str  # of the table: shows its "top1" or, with {}, each of its items
    items: list[str]  # what the command asks for; none: the part is not done
    settings: dict  # what its numbers depend on besides the weights; saved with them
    measure: Callable[[TestedModel, str, argparse.Namespace, Processes], dict]  # of one item: what to save
    inside: str = ""  # the key below which the items are saved, where there is a summary beside them
    summary: Callable[[dict], dict] = lambda items: {}  # all items: what to save beside them


def measure_clean(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    dataset, predicted = (
        ImageDataset(tested.images, clean=tested.view),
        torch.zeros(len(tested.labels), dtype=torch.int64),
    )
    (metrics,) = measure(tested, dataset, tested.labels, "clean top1", args, processes, predicted=predicted)
    return metrics | details_of(tested.labels, predicted.numpy() - 1, tested.classes)


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


def compare(names: list[str], entries: list[dict], columns: list[dict[str, float]]) -> list[str]:
    """A line with the intervals of the clean top-1, and one with the differences to `control`, or to the first."""
    known = {
        name: entry["clean"]
        for name, entry, column in zip(names, entries, columns, strict=True)
        if "clean top-1" in column and "right" in entry["clean"]
    }
    if not known:
        return []
    intervals = ", ".join(f"{name} {clean['interval95']:.2f}" for name, clean in known.items())
    lines = [f"95 percent intervals of the clean top-1, +- points: {intervals}"]
    base = "control" if "control" in known else next(iter(known))
    found = [(name, *paired_difference(clean, known[base])) for name, clean in known.items() if name != base]
    if found:
        differences = ", ".join(f"{name} {points:+.2f} +- {half:.2f}" for name, points, half in found)
        lines.append(f"clean top-1 against {base}, image by image: {differences}")
    return lines


def measure_corruption(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    dataset = CorruptedImages(tested.images[tested.chosen], tested.view, tested.chosen, item, args.seed)
    severities = measure(tested, dataset, tested.labels[tested.chosen], f"corrupt {item}", args, processes)
    return {item: [metrics["top1"] for metrics in severities]}


def mean_top1(items: dict[str, list[float]]) -> dict[str, float]:
    return {"top1": sum(map(sum, items.values())) / (5 * len(items))}  # corruptions x severities


def measure_attack(name: str, steps: int, tested: TestedModel, item: str, args, processes: Processes) -> dict:
    dataset, labels = ImageDataset(tested.images[tested.chosen], clean=tested.view), tested.labels[tested.chosen]
    (metrics,) = measure(tested, dataset, labels, f"{name} {item}", args, processes, eps=float(item), steps=steps)
    return {item: metrics["top1"]}


def parts_of(args, data: Path, num_images: int, num_chosen: int, processes: Processes) -> list[Part]:
    """The table of the parts, in the order in which they are measured and shown."""
    everything = {"data": str(data.absolute()), "num_images": num_images}
    chosen = everything | {"num_images": num_chosen, "seed": args.seed}
    precision = {"precision": precision_of(args.precision, processes)}  # that of attacks is always fp32
    fgsm_eps, pgd_eps = ([f"{eps:g}" for eps in flag] for flag in (args.fgsm, args.pgd))
    fgsm, pgd = partial(measure_attack, "fgsm", 1), partial(measure_attack, "pgd", args.pgd_steps)
    corruptions, drawn = list(CORRUPTIONS) if args.corrupt else [], chosen | precision
    return [
        Part("clean", "clean top-1", ["top1"], everything | precision, measure_clean),
        Part("corrupt", "corrupted top-1", corruptions, drawn, measure_corruption, "per_corruption", mean_top1),
        Part("fgsm", "FGSM {}", fgsm_eps, chosen, fgsm),
        Part("pgd", "PGD {}", pgd_eps, chosen | {"steps": args.pgd_steps}, pgd),
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


def save_results(file: Path, results: dict[str, dict], processes: Processes) -> None:
    if processes.is_main:
        with write_atomically(file) as temporary:
            temporary.write_text(json.dumps(results, indent=1))


def missing_items(entry: dict, parts: list[Part]) -> Iterator[tuple[Part, str, dict]]:
    """Go through what the command asks for and the entry does not have: (part, item, where to put what is measured).

    What was measured with other settings is dropped when its part begins: an entry never mixes two settings.
    """
    for part in parts:
        for item in part.items:
            if entry["settings"].get(part.name) != part.settings:
                entry["settings"][part.name] = part.settings
                entry[part.name] = {part.inside: {}} if part.inside else {}
            items = entry[part.name][part.inside] if part.inside else entry[part.name]
            if item not in items:
                yield part, item, items


def short_names(paths: list[str]) -> list[str]:
    """runs/demo/student1/model.pt -> student1; the whole path where two share that name."""
    folders = [Path(path).absolute().parent.name for path in paths]
    return [path if folders.count(folder) > 1 else folder for path, folder in zip(paths, folders, strict=True)]


def columns_of(entry: dict, parts: list[Part]) -> dict[str, float]:
    """{column of the table: top-1} of what was measured with these settings, by this command or an earlier one."""
    columns = {}
    for part in parts:
        found = entry[part.name] if entry["settings"].get(part.name) == part.settings else {}
        if "{}" in part.column:
            columns |= {part.column.format(item): top1 for item, top1 in found.items()}
        elif "top1" in found:  # a summary is there only when all items are measured
            columns[part.column] = found["top1"]
    return columns


def markdown_table(names: list[str], entries: list[dict], columns: list[dict[str, float]]) -> str:
    """A line a model, a column for what was measured of any, aligned for reading in a terminal too."""
    labels = list(dict.fromkeys(label for column in columns for label in column))
    table = [["model", "parameters", *labels]]
    for name, entry, column in zip(names, entries, columns, strict=True):
        cells = [f"{column[label]:.2f}" if label in column else "-" for label in labels]
        table.append([name, f"{entry['parameters'] / 1e6:.2f}M", *cells])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in table]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(names: list[str], entries: list[dict], columns: list[dict[str, float]], file: Path) -> None:
    """Bars for the columns of the table; with corruptions also top-1 against severity, and of each corruption."""
    if (plt := pyplot()) is None:
        return
    labels = list(dict.fromkeys(label for column in columns for label in column))
    corrupted = "corrupted top-1" in labels
    size = {"ncols": 3, "figsize": (15, 4.4)} if corrupted else {"ncols": 1, "figsize": (8, 4.4)}
    figure, ((bars, *curves),) = plt.subplots(**size, squeeze=False, layout="constrained")
    places, width = np.arange(len(labels)), 0.84 / len(entries)
    for number, (name, entry, column) in enumerate(zip(names, entries, columns, strict=True)):
        color, heights = f"C{number % 10}", [column.get(label, np.nan) for label in labels]
        group = bars.bar(places + width * number, heights, width, color=color, label=name)
        bars.bar_label(group, fmt="%.0f", fontsize=7, padding=1)
        if "corrupted top-1" in column:
            top1 = np.array([entry["corrupt"]["per_corruption"][name] for name in CORRUPTIONS])  # (corruptions, 5)
            curves[0].plot(range(1, 6), top1.mean(axis=0), "o-", color=color)
            curves[1].plot(top1.mean(axis=1), range(len(CORRUPTIONS)), "o", color=color, alpha=0.8)
    bars.set_xticks(places + width * (len(entries) - 1) / 2, [label.replace(" ", "\n") for label in labels])
    bars.set_ylabel("top-1 in percent")
    if corrupted:
        curves[0].set(xlabel="severity", ylabel="top-1 in percent, mean of the corruptions", xticks=range(1, 6))
        curves[1].set(xlabel="top-1 in percent, mean of the severities", yticks=range(len(CORRUPTIONS)))
        curves[1].set_yticklabels([name.replace("_", " ") for name in CORRUPTIONS])
        curves[1].invert_yaxis()
        curves[1].grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=min(5, len(entries)), frameon=False)
    save_figure(plt, file)


def main() -> None:
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # each item is saved when it is done: only one is lost
        signal.signal(number, lambda *_: sys.exit(143))
    processes = init_processes(args.device, args.workers)
    results_file = args.out / "robustness.json"
    earlier = read_results(results_file)

    # All checkpoints are read before the first is measured: a wrong path fails now, not after hours.
    data = args.data or Path(read_checkpoint(args.checkpoints[0])["data"])
    results, labels_of = {}, {}
    for path in args.checkpoints:
        images, labels_of[path], _ = labeled_images(data, "val", read_checkpoint(path)["classes"])
        fresh = {"sha256": file_sha256(path), "settings": {}}
        known = earlier.get(path, {})
        results[path] = known if known.get("sha256") == fresh["sha256"] else fresh
    to_save = results | {path: entry for path, entry in earlier.items() if path not in results}

    # The numbering of the classes does not change which images are chosen: any checkpoint's labels will do.
    chosen = choose_images(labels_of[path], args.num_images or len(images), args.seed)
    parts = parts_of(args, data, len(images), len(chosen), processes)

    names = short_names(list(results))
    for (path, entry), name in zip(results.items(), names, strict=True):
        tested = None
        for part, item, items in missing_items(entry, parts):
            if tested is None:  # a model of which nothing is missing is not loaded
                model, checkpoint = load_model(path, processes.device)
                entry["parameters"] = sum(parameter.numel() for parameter in model.parameters())  # before the fusion
                fuse_batch_norms(model)
                if args.compile:  # pays from some 20,000 images at 224 px on
                    model.compile()
                tested = TestedModel(
                    name, model, View.of(checkpoint), images, labels_of[path], chosen, checkpoint["classes"]
                )
            items.update(part.measure(tested, item, args, processes))
            if items.keys() >= set(part.items):
                entry[part.name].update(part.summary(items))
            save_results(results_file, to_save, processes)
            shown = " ".join(f"{top1:.2f}" for top1 in np.atleast_1d(items[item]))
            print0(f"{name} {part.name} {item}: {shown}")

    save_results(results_file, to_save, processes)
    if processes.is_main:
        entries, columns = list(results.values()), [columns_of(entry, parts) for entry in results.values()]
        table = markdown_table(names, entries, columns)
        more = compare(names, entries, columns)
        note = f"Percent of {len(images)} val images; corruptions and attacks: of {len(chosen)} (seed {args.seed})"
        with write_atomically(args.out / "robustness.md") as temporary:
            temporary.write_text("\n".join([note, *more, "", table]) + "\n")
        draw(names, entries, columns, args.out / "robustness.png")
        print0("\n".join([f"{results_file}: {note}", *more, "", table]))


if __name__ == "__main__":
    main()
