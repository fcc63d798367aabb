"""Stage 06: measure how much of a model's accuracy is left on corrupted images and under attack.

A student that was trained with noise on many more images is more accurate than its teacher. It is also much more
robust, although no stage trains it for that (Noisy Student, section 4.3).

    clean         top-1, top-5, loss and details on DATA/val; ece: the expected calibration error over 15 equal bins b
                  of the confidence, sum_b n_b / n * |accuracy_b - confidence_b|
    --corrupt     14 of the 15 corruptions of ImageNet-C (Hendrycks & Dietterich, 1903.12261; frost needs photographs)
                  and its 4 extra ones, each image drawn once for all models; `corrupted` is the mean over 14 x 5
    --fgsm EPS    x' = clip(x + EPS * sign(grad_x loss(x, y)), 0, 255)                   x in pixel values, 0 to 255
    --pgd EPS     --pgd-steps K times x' = clip(x' + 2.5 * EPS / K * sign(grad), x - EPS, x + EPS), cut to 0..255 too
    --imagenet-a, --imagenet-r    top-1 among the classes of the set; --folder NAME=DIR: among all classes of the model
    --imagenet-c  mCE: the mean over 15 corruptions c of sum_s error_{s,c} / sum_s error_{s,c}(AlexNet)
    --imagenet-p  mFR: the mean over 10 perturbations of the probability that the prediction flips from frame to frame
                  (of noise: from the first frame), over AlexNet's
    --cifar10-c   top-1 over the 15 corruptions and over all 19

reads   checkpoints of any stage; DATA/val and released sets as they come, whose classes are matched by name
writes  OUT/robustness.json (every number, saved when it is measured), robustness.md and .png (the table, a picture),
        verdict.md, if there are a `control` and a student. The same command again measures what is missing or had
        other settings or weights.

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
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import SWITCH, add_device_flags, argument_parser, at_least, fail, file_sha256  # program
from common import optional, print0, write_atomically
from common import Processes, init_processes, progress, reduce_sum, seed_words  # processes
from common import View, eval_view, normalize  # views
from common import ImageList, images_by_class, judged_half, labeled_images  # listing
from common import Batch, ImageDataset, grid_keys, load_batches, rows_per_batch  # batches
from common import identity, load_model, read_checkpoint  # checkpoints
from common import autocast, in_halves, precision_of, wilson  # training
from common import pyplot, save_figure  # pictures

NUM_BINS = 15  # of the calibration error
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# fmt: off
# Mean error of AlexNet over the severities, in percent: the 15 corruptions of the benchmark (google-research/augmix,
# imagenet.py), then the 4 extra ones (hendrycks/robustness, issue 10).
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500, "speckle_noise": 84.5, "gaussian_blur": 78.7, "spatter": 71.8, "saturate": 65.8,
}
ALEXNET_CLEAN_ERROR = 43.478  # torchvision's record
# Flip probabilities of AlexNet on ImageNet-P in percent: from memory, no source could confirm them.
ALEXNET_FLIPS = {
    "gaussian_noise": 23.65, "shot_noise": 30.06, "motion_blur": 9.30, "zoom_blur": 5.94, "snow": 11.93,
    "brightness": 4.89, "translate": 11.01, "rotate": 13.10, "tilt": 7.05, "scale": 23.53,
}
BENCHMARK = tuple(ALEXNET_ERRORS)[:15]
EXTRA = tuple(ALEXNET_ERRORS)[15:]

# {corruption: {image size the values were chosen for: one value a severity}}: those of the generators of CIFAR-10-C,
# Tiny-ImageNet-C and ImageNet-C (github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py,
# make_tinyimagenet_c.py, make_imagenet_c.py), in pixels of the image. The released ImageNet-C is drawn at 224 and then
# resized, so a larger model sees more blur.
CORRUPTIONS = {
    "gaussian_noise": {  # standard deviation, of values in 0..1
        32: [0.04, 0.06, 0.08, 0.09, 0.10], 64: [0.04, 0.08, 0.12, 0.15, 0.18], 224: [0.08, 0.12, 0.18, 0.26, 0.38]},
    "shot_noise": {  # photons at full brightness
        32: [500, 250, 100, 75, 50], 64: [250, 100, 50, 30, 15], 224: [60, 25, 12, 5, 3]},
    "impulse_noise": {  # share of the values that turn 0 or 255
        32: [0.01, 0.02, 0.03, 0.05, 0.07], 64: [0.01, 0.02, 0.05, 0.08, 0.14], 224: [0.03, 0.06, 0.09, 0.17, 0.27]},
    "defocus_blur": {  # radius of the disk, standard deviation that smooths its edge, in pixels
        32: [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        64: [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
        224: [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)]},
    "glass_blur": {  # standard deviation of a blur before and after; a pixel's farthest move; rounds of moves
        32: [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        64: [(0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)],
        224: [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)]},
    "motion_blur": {  # radius, standard deviation along the path, in pixels
        32: [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)], 64: [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        224: [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]},
    "zoom_blur": {  # end and step of the zoom factors, which begin at 1
        32: [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        64: [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        224: [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)]},
    "snow": {  # mean and deviation of the flakes' brightness, their zoom, the least brightness that is kept, radius and
        # deviation of their fall, share of the image that is not whitened
        32: [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
             (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
        64: [(0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
             (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6)],
        224: [(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
              (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)]},
    "fog": {  # thickness, factor by which its detail fades from one scale to the next finer one
        32: [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        64: [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
        224: [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]},
    "brightness": {  # added to the V of HSV
        32: [0.05, 0.1, 0.15, 0.2, 0.3], 64: [0.1, 0.2, 0.3, 0.4, 0.5], 224: [0.1, 0.2, 0.3, 0.4, 0.5]},
    "contrast": {  # factor of the distance to the image's mean
        32: [0.75, 0.5, 0.4, 0.3, 0.15], 64: [0.4, 0.3, 0.2, 0.1, 0.05], 224: [0.4, 0.3, 0.2, 0.1, 0.05]},
    "elastic_transform": {  # strength and standard deviation of the local shifts; largest shift of a corner; in pixels
        32: [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)],
        64: [(0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)],
        224: [(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)]},
    "pixelate": {  # factor of the side
        32: [0.95, 0.9, 0.85, 0.75, 0.65], 64: [0.9, 0.8, 0.7, 0.6, 0.5], 224: [0.6, 0.5, 0.4, 0.3, 0.25]},
    "jpeg_compression": {  # quality
        32: [80, 65, 58, 50, 40], 64: [65, 58, 50, 40, 25], 224: [25, 18, 15, 10, 7]},
    "speckle_noise": {  # standard deviation, as a share of the value
        32: [0.06, 0.1, 0.12, 0.16, 0.2], 64: [0.15, 0.2, 0.25, 0.3, 0.35], 224: [0.15, 0.2, 0.35, 0.45, 0.6]},
    "gaussian_blur": {  # standard deviation in pixels
        32: [0.4, 0.6, 0.7, 0.8, 1], 64: [0.5, 0.75, 1, 1.25, 1.5], 224: [1, 2, 3, 4, 6]},
    "spatter": {  # mean and deviation of the liquid, deviation of the blur that makes drops of it, the least that is
        # kept, strength of the water or deviation of the mud's blur, 1 for mud
        32: [(0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
             (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)],
        64: [(0.62, 0.1, 0.7, 0.7, 0.6, 0), (0.65, 0.1, 0.8, 0.7, 0.6, 0), (0.65, 0.3, 1, 0.69, 0.6, 0),
             (0.65, 0.1, 0.7, 0.68, 0.6, 1), (0.65, 0.1, 0.5, 0.67, 0.6, 1)],
        224: [(0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
              (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1)]},
    "saturate": {  # factor of the S of HSV, what is then added to it
        32: [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)], 64: [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)],
        224: [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)]},
}
# fmt: on

LARGEST = {32: 48, 64: 128, 224: math.inf}  # {such a size: the largest image whose values these are}
DRAWN = tuple(name for name in CORRUPTIONS if name not in EXTRA)  # 14: frost needs photographs of ice


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="model.pt of any stage: a line of the table each")
    add("--data", type=Path, help="data directory with val/; None: the first checkpoint's own")
    add("--out", type=Path, required=True, help="folder of robustness.json, .md, .png and verdict.md")
    add("--val-half", choices=("all", "choose", "judge"), default="all", help="by the hash of the path")
    add("--folder", nargs="+", type=name_and_folder, default=[], metavar="NAME=DIR", help="DIR/<class>/*")
    add("--imagenet-a", type=existing, metavar="DIR", help="DIR/<class>/*: the classes of the set compete")
    add("--imagenet-r", type=existing, metavar="DIR", help="DIR/<class>/*: the classes of the set compete")
    add("--imagenet-c", type=existing, metavar="DIR", help="DIR/[noise/ ...]<corruption>/<severity>/<class>/*")
    add("--imagenet-p", type=existing, metavar="DIR", help="DIR/<perturbation>/<class>/*.mp4; needs PyAV")
    add("--cifar10-c", type=existing, metavar="DIR", help="DIR/<corruption>.npy and DIR/labels.npy")
    add("--corrupt", action=SWITCH, default=False, help="needs scipy and OpenCV")
    add("--fgsm", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 2 4 8 16")
    add("--pgd", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 16")
    add("--pgd-steps", type=at_least(1, int), default=10, help="paper: 10, their size is not given")
    add("--num-images", type=at_least(1, int), help="val images to corrupt and attack; None: all")
    add("--batch-size", type=at_least(1, int), help="of a process; None: what fits a cache or a GPU")
    add("--seed", type=at_least(0, int), default=0, help="of --num-images and the corruptions' noise")
    add_device_flags(parser)
    return parser.parse_args()


def existing(folder: str) -> Path:
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    return Path(folder)


def name_and_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, existing(folder)


# ======================================================================================================================
# FIRST HALF: measure, and write robustness.json
# ======================================================================================================================

# -- corruptions, as the generators of the benchmark draw them, by the libraries that they use -----


@cache
def libraries():
    """(cv2, scipy.ndimage), which --corrupt alone needs."""
    cv2 = optional("cv2", "scipy opencv-python-headless", "--corrupt")
    cv2.setNumThreads(0)  # its threads do not survive the fork of a loader
    return cv2, optional("scipy.ndimage", "scipy", "--corrupt")


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Apply one of CORRUPTIONS at severity 1 to 5: uint8 (size, size, 3) -> a new one."""
    size = len(image)
    chosen_for = next(pixels for pixels, largest in LARGEST.items() if size <= largest)
    c = CORRUPTIONS[name][chosen_for][severity - 1]
    x = image / 255
    if name == "gaussian_noise":
        x = x + rng.normal(scale=c, size=x.shape)
    elif name == "shot_noise":
        x = rng.poisson(x * c) / c
    elif name == "impulse_noise":  # each of the three values of a pixel on its own: half salt, half pepper
        hit = rng.random(x.shape) < c
        x = np.where(hit, rng.random(x.shape) < 0.5, x)
    elif name == "speckle_noise":
        x = x + x * rng.normal(scale=c, size=x.shape)
    elif name == "gaussian_blur":
        x = smoothed(x, c)
    elif name == "contrast":
        mean = x.mean(axis=(0, 1))
        x = (x - mean) * c + mean
    elif name == "pixelate":
        small = Image.fromarray(image).resize((int(size * c), int(size * c)), Image.Resampling.BOX)
        return np.asarray(small.resize((size, size), Image.Resampling.BOX))
    elif name == "jpeg_compression":
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=c)
        return np.asarray(Image.open(file))
    else:
        x = globals()[name](x, c, rng)  # the function of that name, below
    return np.uint8(np.clip(x, 0, 1) * 255)  # cut, not rounded, as in the generators


def smoothed(x, sigma, mode="nearest", truncate=4):
    """scikit-image's `gaussian` of x (size, size) or (size, size, 3)."""
    _, ndimage = libraries()
    return ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode=mode, truncate=truncate)


def defocus_blur(x, radius_sigma, rng):
    cv2, _ = libraries()
    radius, sigma = radius_sigma
    side = max(8, int(radius))
    rows, columns = np.mgrid[-side : side + 1, -side : side + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float32)
    disk = cv2.GaussianBlur(disk / disk.sum(), (3, 3) if radius <= 8 else (5, 5), sigma)
    return cv2.filter2D(x, -1, disk)


def glass_blur(x, values, rng):
    sigma, reach, rounds = values
    size = len(x)
    pixels = np.uint8(smoothed(x, sigma) * 255).reshape(-1, 3)
    line = np.arange(size - reach, reach, -1)
    places = np.add.outer(line * size, line).ravel()
    # From the last pixel to the first, the generator swaps each with a near one, but by views: the first gets the value
    # of the second, then the second gets back its own. So a pixel becomes a copy, maybe of a copy.
    for _ in range(rounds):
        dx, dy = rng.integers(-reach, reach, (len(places), 2)).T
        source = list(range(size * size))
        for place, near in zip(places.tolist(), (places + dy * size + dx).tolist(), strict=True):
            source[place] = source[near]
        pixels = pixels[source]
    return smoothed(pixels.reshape(x.shape) / 255, sigma)


def motion_blur(x, radius_sigma, rng, low=-45, high=45):
    """ImageMagick's: a one-sided Gaussian along a line; x (size, size) or (size, size, 3)."""
    cv2, _ = libraries()
    radius, sigma = radius_sigma
    angle = np.deg2rad(rng.uniform(low, high))
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    dx = np.ceil(steps * np.cos(angle) - 0.5).astype(int)
    dy = np.ceil(steps * np.sin(angle) - 0.5).astype(int)
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel, (2 * radius + dy, 2 * radius + dx), weights / weights.sum())
    x = cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return np.rint(x * 65535) // 257 / 255  # it computes in 16 bits, and writes the upper 8


def zoomed(x, factor):
    """The middle of x (size, size), zoomed to that size."""
    _, ndimage = libraries()
    size = len(x)
    side = int(np.ceil(size / factor))
    top = (size - side) // 2
    x = ndimage.zoom(x[top : top + side, top : top + side], factor, order=1)
    top = (len(x) - size) // 2
    return x[top : top + size, top : top + size]


def zoom_blur(x, end_step, rng):
    x = np.float32(x)
    factors = np.arange(1, *end_step)
    planes = np.moveaxis(x, -1, 0)  # twice as fast as all of them at once
    total = sum(np.dstack([zoomed(plane, factor) for plane in planes]) for factor in factors)
    return (x + total) / (len(factors) + 1)


def snow(x, values, rng):
    cv2, _ = libraries()
    mean, deviation, zoom, least, radius, sigma, kept = values
    flakes = zoomed(rng.normal(mean, deviation, x.shape[:2]), zoom)
    flakes[flakes < least] = 0
    flakes = np.uint8(flakes.clip(0, 1) * 255) / 255
    flakes = motion_blur(flakes, (radius, sigma), rng, -135, -45)[..., None]
    x = np.float32(x)
    grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None]
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5) + flakes + np.rot90(flakes, 2)


def fog(x, values, rng):
    thickness, decay = values
    size = 2 ** max(1, (len(x) - 1).bit_length())
    layer = np.zeros((size, size))  # heights of a land, by diamond-square; it wraps around
    wobble = 100.0

    def mean(total):
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while size >= 2:
        half = size // 2
        corners = layer[::size, ::size]
        centres = layer[half::size, half::size]
        below = corners + np.roll(corners, -1, axis=0)
        beside = corners + np.roll(corners, -1, axis=1)
        centres[:] = mean(below + np.roll(below, -1, axis=1))
        layer[::size, half::size] = mean(centres + np.roll(centres, 1, axis=0) + beside)
        layer[half::size, ::size] = mean(centres + np.roll(centres, 1, axis=1) + below)
        size = half
        wobble /= decay
    layer = (layer - layer.min()) / (layer.max() - layer.min())
    return (x + thickness * layer[: len(x), : len(x), None]) * x.max() / (x.max() + thickness)


def brightness(x, amount, rng):
    # V of HSV is the largest of R, G, B. At equal hue and saturation all three scale with it; black becomes grey.
    v = x.max(axis=2, keepdims=True)
    brighter = np.minimum(v + amount, 1)
    return np.where(v > 0, x / np.where(v > 0, v, 1) * brighter, brighter)


def saturate(x, values, rng):
    # At equal hue and V, the distance of each value to the largest, V, is in proportion to S. Grey has the hue of red.
    factor, plus = values
    v = x.max(axis=2, keepdims=True)
    low = x.min(axis=2, keepdims=True)
    share = np.where(v > low, (v - x) / np.where(v > low, v - low, 1), [0, 1, 1])  # of the largest distance
    s = (v - low) / np.where(v > 0, v, 1) * factor + plus
    return v * (1 - share * np.clip(s, 0, 1))


def elastic_transform(x, values, rng):
    cv2, ndimage = libraries()
    strength, sigma, jitter = values
    size = len(x)
    low, high = size // 2 - size // 3, size // 2 + size // 3
    here = np.float32([[high, high], [high, low], [low, low]])
    there = here + np.float32(rng.uniform(-jitter, jitter, here.shape))
    affine = cv2.getAffineTransform(here, there)
    x = cv2.warpAffine(np.float32(x), affine, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    shifts = [smoothed(plane, sigma, "reflect", 3) for plane in rng.uniform(-1, 1, (2, size, size))]
    dx, dy = np.float32(strength * np.stack(shifts))
    rows, columns = np.mgrid[:size, :size]
    places = (rows + dy, columns + dx)
    return np.dstack([ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)])


def spatter(x, values, rng):
    cv2, _ = libraries()
    mean, deviation, sigma, least, amount, is_mud = values
    x = np.float32(x)
    liquid = smoothed(rng.normal(mean, deviation, x.shape[:2]), sigma)
    if is_mud:
        mud = smoothed(np.float32(liquid > least), amount)[..., None]
        mud[mud < 0.8] = 0
        return x * (1 - mud) + mud * np.array([63, 42, 20]) / 255
    # Water is brightest at some distance from the edges of its drops, and lit from one side.
    liquid[liquid < least] = 0
    liquid = np.uint8(liquid * 255)
    depth = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    depth = cv2.equalizeHist(np.uint8(cv2.blur(np.minimum(depth, 20), (3, 3))))
    lit = cv2.filter2D(depth, cv2.CV_8U, np.float32([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    water = liquid * np.float32(cv2.blur(lit, (3, 3)))
    # Without a drop the generator divides 0 by 0; here the image stays as it is.
    return x + (amount * water / max(water.max(), 1))[..., None] * np.array([175, 238, 238]) / 255


# -- what is shown to the models. A set that is not whole is a ValueError with its reason ----------


class Shown(NamedTuple):
    """Images by class, listed once for all models."""

    images: ImageList
    labels: np.ndarray  # int64 (N,), numbers of `classes`
    classes: list[str]
    settings: dict | None = None  # what they depend on besides their names
    read: Callable | None = None  # row -> several images: five severities of one, or the frames of a video

    def at(self, rows: np.ndarray) -> "Shown":
        return self._replace(images=self.images[rows], labels=self.labels[rows])


class Several(ImageDataset):
    """What `read` makes of an image, resized to each of `sizes`."""

    def __init__(self, shown: Shown, view: View, sizes: list[int]):
        super().__init__(shown.images, clean=view)
        self.read = shown.read
        self.views = [view._replace(image_size=size).of_stored for size in sizes]

    def __getitem__(self, row: int):
        try:
            pictures = self.read(row)
        except Exception as error:  # decoders raise anything
            return row, None, f"{self.images.name(row)}: {type(error).__name__}: {error}"
        return row, [eval_view(picture, view) for view in self.views for picture in pictures], None


def list_folder(folder: Path) -> Shown:
    shown = Shown(*images_by_class(folder))
    if not len(shown.images):
        raise ValueError(f"{folder}: no images in its class folders")
    return shown


def list_val(args: argparse.Namespace, data: str | Path | None) -> Shown | None:
    """DATA/val or a half of it; None, with a line, where the first checkpoint's data directory is gone."""
    if not data or not any(os.path.isdir(f"{data}/{split}") for split in ("train", "val")):
        if args.data or args.corrupt or args.fgsm or args.pgd:
            fail(f"--data: there is no train/ or val/ in {data}")
        print0(f"no data directory ({data}): clean images are left out")
        return None
    val = Shown(*labeled_images(data, "val"))
    if args.val_half == "all":
        return val
    return val.at(np.flatnonzero(judged_half(val.images) == (args.val_half == "judge")))


def draw_five(images: ImageList, view: View, name: str, seed: int, row: int) -> list[Image.Image]:
    """The noise is a function of (seed, corruption, path, severity): the same for all models and processes."""
    clean = eval_view(images.load(row, view.enough), view)
    words = seed_words(seed, name, zlib.crc32(images.path[row]))
    rngs = [np.random.default_rng([*words, severity]) for severity in range(1, 6)]
    return [Image.fromarray(corrupt(clean, name, severity, rng)) for severity, rng in enumerate(rngs, 1)]


def read_five(five: list[ImageList | np.ndarray], row: int) -> list[Image.Image]:
    return [Image.fromarray(of[row]) if isinstance(of, np.ndarray) else of.load(row) for of in five]


def list_severities(folder: Path) -> Shown:
    """A corruption of ImageNet-C: FOLDER/1 to 5, of the same photographs."""
    five = [list_folder(folder / str(severity)) for severity in range(1, 6)]
    classes = [[shown.classes[label] for label in shown.labels] for shown in five]
    if any(of_severity != classes[0] for of_severity in classes):
        nums = ", ".join(f"{len(of_severity)} of {len(set(of_severity))}" for of_severity in classes)
        raise ValueError(f"{folder} is not whole: images of classes at its severities: {nums}")
    images = [shown.images for shown in five]
    settings = {"images": [identity(of_severity) for of_severity in images]}
    return five[0]._replace(settings=settings, read=partial(read_five, images))


def list_array(file: Path) -> Shown:
    """A corruption of CIFAR-10-C: uint8 (5 N, H, W, 3), severity by severity, and labels.npy."""
    array = np.lib.format.open_memmap(file, mode="r")
    labels = np.lib.format.open_memmap(file.with_name("labels.npy"), mode="r")
    if array.dtype != np.uint8 or array.shape != (len(labels), *array.shape[1:3], 3):
        raise ValueError(f"{file}: expected uint8 ({len(labels)}, H, W, 3), found {array.dtype} {array.shape}")
    labels = labels.reshape(5, -1)
    if (labels != labels[0]).any() or not set(labels[0].tolist()) <= set(range(10)):
        raise ValueError(f"{file.with_name('labels.npy')}: not the same labels 0 to 9 at each severity")
    unnamed = ImageList.of(str(file.absolute()), [])
    five = partial(read_five, np.split(array, 5))
    return Shown(unnamed, labels[0].astype(np.int64), CIFAR10, {"sha256": identity(file)}, five)


def list_videos(folder: Path) -> Shown:
    """ImageNet-P: FOLDER/<class>/<video>"""
    paths = [os.fsencode(path.relative_to(folder)) for path in folder.glob("*/*") if path.suffix in (".mp4", ".avi")]
    if not paths:
        raise ValueError(f"{folder}: no videos <class>/<name>.mp4 in it")
    videos = ImageList.of(str(folder.absolute()), [(path, 0, 0) for path in paths])
    names = [os.fsdecode(path.split(b"/")[0]) for path in videos.path.tolist()]
    classes, labels = np.unique(names, return_inverse=True)
    return Shown(videos, labels, classes.tolist(), read=partial(read_frames, videos))


def read_frames(videos: ImageList, row: int) -> list[Image.Image]:
    av = optional("av", "av", "--imagenet-p")
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a broken video is said once, by us
    with av.open(videos.name(row)) as file:
        frames = [frame.to_image() for frame in file.decode(video=0)]
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} frames")
    return frames


# -- measures --------------------------------------------------------------------------------------


class Tested:
    """A checkpoint that is measured. Its weights are read when the first measurement needs them."""

    def __init__(self, path: str, checkpoint: dict, entry: dict, device: torch.device):
        self.path = path
        self.device = device
        self.entry = entry  # of robustness.json
        self.view = View.of(checkpoint)
        self.classes = checkpoint["classes"]
        self.data = checkpoint.get("data")

    @cached_property
    def model(self) -> nn.Module:
        return load_model(self.path, self.device, fuse=True)[0]

    def logits(self, pixels: Tensor, amp) -> Tensor:
        """Float32 (N, classes) of pixels (N, 3, H, W) in 0..255."""
        with torch.no_grad(), amp:
            return self.model(normalize(pixels, self.view)).float()

    def labels(self, shown: Shown) -> Tensor:
        """int64 (N,), as the model numbers the classes."""
        return torch.tensor([self.classes.index(name) for name in shown.classes])[shown.labels]


def attack(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, steps: int, view: View) -> Tensor:
    """Projected gradient ascent on the cross-entropy with the true labels; pixels float (N, 3, H, W), eps in 0 to 255.

    With one step this is FGSM: the step, 2.5 eps (Madry et al.'s rule, 1706.06083; the paper does not say its own), is
    cut to the eps ball, so that each value moves by eps. There is no random start, so eps 0 is the clean image.
    """
    low = (pixels - eps).clamp(min=0)
    high = (pixels + eps).clamp(max=255)
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
    ece = (right - confidence).abs().sum().item() / num  # |b| / n * |accuracy - confidence|, written out
    return {"top1": 100 * top1 / num, "top5": 100 * top5 / num, "loss": loss / num, "ece": 100 * ece, "num": int(num)}


def details_of(labels: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict:
    """What is behind a top-1: how sure it is, and which classes it comes from. `predicted`: -1 of unreadable images.

    interval95: Wilson's, of top1, in percent. balanced_top1: the mean recall of the classes that there are. right: a
    bit an image, in their order, base64. confusion: images, true class by row.
    """
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    seen = predicted >= 0
    np.add.at(confusion, (labels[seen], predicted[seen]), 1)
    num, named, right = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    per_class = {}
    for name, n, m, k in zip(classes, num.tolist(), named.tolist(), right.tolist(), strict=True):
        per_class[name] = {"num": n, "recall": 100 * k / n if n else None, "precision": 100 * k / m if m else None}
    details = {
        "balanced_top1": 100 * float((right[num > 0] / num[num > 0]).mean()),
        "interval95": [100 * share for share in wilson(int(right.sum()), int(num.sum()))],
        "per_class": per_class,
        "right": base64.b64encode(np.packbits(predicted == labels).tobytes()).decode(),
    }
    if len(classes) <= 100:
        details["confusion"] = confusion.tolist()
    return details


@cache  # once, though the same images are shown again and again; from each process, for it alone knows the path
def report_unreadable(num: int, first: str) -> None:
    print(f"{num} unreadable, left out; the first: {first}", flush=True)


# -- what is measured, and kept in robustness.json -------------------------------------------------


class Evaluation:
    """The models of a table, and what robustness.json has of them: {checkpoint: {"sha256", key: {..., "settings"}}}."""

    def __init__(self, args: argparse.Namespace, processes: Processes):
        self.file = args.out / "robustness.json"
        self.processes = processes
        self.precision = precision_of(args.precision, processes.device)
        self.batch_size = args.batch_size
        self.asked = []  # the keys of this command, whether it measured them or an earlier one did
        self.entries = {}
        self.models = []
        earlier = self.read()
        for path in dict.fromkeys(args.checkpoints):  # all, before the first is measured: a wrong path fails now
            checkpoint = read_checkpoint(path)
            entry = {"sha256": file_sha256(path)}
            if earlier.get(path, {}).get("sha256") == entry["sha256"]:
                entry = earlier[path]
            self.entries[path] = entry
            self.models.append(Tested(path, checkpoint, entry, processes.device))
        self.sizes = sorted({tested.view.image_size for tested in self.models})
        self.smallest = min((tested.view for tested in self.models), key=lambda view: view.image_size)

    def read(self) -> dict[str, dict]:
        try:
            return dict(json.loads(self.file.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, TypeError, ValueError) as error:
            fail(f"{self.file}: not the results of an earlier run ({error}); move it away")

    def save(self) -> None:
        """Other checkpoints, which another run may save there meanwhile, stay."""
        if self.processes.is_main:
            others = {path: entry for path, entry in self.read().items() if path not in self.entries}
            with write_atomically(self.file) as temporary:
                temporary.write_text(json.dumps(self.entries | others, indent=1))

    def once(self, key: str, list_images: Callable[[], Shown], **how) -> None:
        """Measure and save what `key` stands for, of each model that lacks it with these settings; how: of `measure`.

        What cannot be measured is a gap with its reason, and tried again the next time. What is drawn, or resized for
        all models, is shown to all of them at a time.
        """
        self.asked.append(key)
        try:
            shown = list_images()
        except (OSError, ValueError) as error:
            for tested in self.models:
                tested.entry[key] = {"gap": str(error)}
            return
        precision = "fp32" if "eps" in how else self.precision
        settings = {"folder": shown.images.root, "images": identity(shown.images), "precision": precision}
        settings = json.loads(json.dumps(settings | (shown.settings or {}) | how))  # as they are read again
        num_classes = len(np.unique(shown.labels))
        missing = []
        for tested in self.models:
            kept = tested.entry.get(key, {})
            lacking = [name for name in shown.classes if name not in tested.classes]
            if lacking:
                tested.entry[key] = {"gap": f"the model has no class {', '.join(lacking[:5])}"}
            elif "gap" in kept or kept.get("settings") != settings:
                missing.append(tested)
        groups = [[tested] for tested in missing]
        if shown.read and missing:
            groups = [missing]
        measure = self.measure_flips if key.startswith("imagenet_p") else self.measure
        for models in groups:
            for tested, result in zip(models, measure(models, shown, key, **how), strict=True):
                tested.entry[key] = result | {"classes": num_classes, "settings": settings}
            self.save()

    def batches(self, dataset: ImageDataset, num: int, size: int, title: str) -> Iterator[Batch]:
        """This process's batches of `size`. All processes together show each of `num` images once."""
        batches = load_batches(dataset, grid_keys(num, size, self.processes), self.processes)
        unreadable = []
        for batch in progress(batches, title, math.ceil(num / size / self.processes.world_size), self.processes):
            unreadable += [dataset.images.name(row) for row, _ in batch.errors]
            if len(batch.rows):
                yield batch
        if unreadable:
            report_unreadable(len(unreadable), unreadable[0])

    def measure(self, models, shown: Shown, key: str, eps=0.0, steps=0, subset=False) -> list[dict]:
        """`metrics_of` each model; of several views, lists. One model where there is one view, the clean one.

        Attacked where `steps` is not 0. `subset`: only the classes of `shown` compete.
        """
        device = self.processes.device
        dataset = ImageDataset(shown.images, clean=models[0].view)
        if shown.read:
            dataset = Several(shown, self.smallest, self.sizes)
        # Attacks are in float32: half of a float16 gradient would be 0, and its sign no attack.
        amp, _ = autocast("fp32" if steps else self.precision, device)
        num = len(shown.labels)
        size = self.batch_size or rows_per_batch(dataset.clean.image_size, device)
        labels = [tested.labels(shown) for tested in models]
        sums = torch.zeros(len(models), 5, 4 + 3 * NUM_BINS, dtype=torch.float64, device=device)
        predicted = torch.zeros(num, dtype=torch.int64)  # label + 1
        for batch in self.batches(dataset, num, size, key):
            for number, tested in enumerate(models):
                target = labels[number][batch.rows].to(device)
                views = [images for images in batch.views if images.shape[-1] == tested.view.image_size]
                for view, images in enumerate(views):
                    pixels = images.to(device, non_blocking=True).float()
                    if steps:
                        fool = partial(attack, tested.model, eps=eps, steps=steps, view=tested.view)
                        pixels = in_halves(fool, pixels, target)
                    logits = in_halves(partial(tested.logits, amp=amp), pixels)
                    if subset:
                        is_other = torch.ones(len(tested.classes), dtype=torch.bool)
                        is_other[labels[number]] = False
                        logits = logits.masked_fill(is_other.to(device), -torch.inf)
                    sums[number, view] += batch_sums(logits, target)
                    predicted[batch.rows] = logits.argmax(1).cpu() + 1
        sums = reduce_sum(sums, self.processes).cpu()
        if not sums[0, 0, 0]:
            return [{"gap": "no image is readable"} for _ in models]
        if key == "clean":
            predicted = reduce_sum(predicted, self.processes) - 1
            return [metrics_of(sums[0, 0]) | details_of(labels[0].numpy(), predicted.numpy(), models[0].classes)]
        results = []
        for of_model in sums:
            views = [metrics_of(view) for view in of_model if view[0]]
            lists = {name: [metrics[name] for metrics in views] for name in ("top1", "top5", "num")}
            results.append(lists if shown.read else {name: value for name, (value,) in lists.items()})
        return results

    def measure_flips(self, models: list[Tested], videos: Shown, title: str) -> list[dict]:
        """flip: the share of frames whose class is not that of the frame before it; top1: of all frames, ours. Percent.

        Noise has no order in time: its frames are compared with the first one (official ImageNet-P/test.py). The mean
        over the videos of the mean over the comparisons.
        """
        device = self.processes.device
        size = self.batch_size or rows_per_batch(max(self.sizes), device)
        amp, _ = autocast(self.precision, device)
        num = len(videos.labels)
        labels = [tested.labels(videos) for tested in models]
        sums = torch.zeros(len(models), 3, num, dtype=torch.float64)  # of each video: read, flips, right
        for batch in self.batches(Several(videos, self.smallest, self.sizes), num, 1, title):
            row = batch.rows.item()
            for number, tested in enumerate(models):
                frames = torch.cat([view for view in batch.views if view.shape[-1] == tested.view.image_size])
                logits = partial(tested.logits, amp=amp)
                parts = frames.to(device).float().split(size)
                said = torch.cat([in_halves(logits, part) for part in parts]).argmax(1).cpu()
                before = said[:1] if "noise" in title else said[:-1]
                sums[number, 0, row] = 1
                sums[number, 1, row] = (said[1:] != before).double().mean()
                sums[number, 2, row] = (said == labels[number][row]).double().mean()
        sums = reduce_sum(sums, self.processes).sum(dim=2).tolist()
        if not sums[0][0]:
            return [{"gap": "no video is readable"} for _ in models]
        return [{"flip": 100 * flips / n, "top1": 100 * right / n, "num": int(n)} for n, flips, right in sums]


def measure_all(args: argparse.Namespace, evaluation: Evaluation, val: Shown | None) -> None:
    """Everything that the command asks for, in this order."""
    once = evaluation.once
    if val:
        once("clean", lambda: val)
        order = np.random.default_rng(args.seed).permutation(len(val.labels))
        chosen = val.at(np.sort(order[: args.num_images]))
        for eps in args.fgsm:
            once(f"fgsm/{eps:g}", lambda: chosen, eps=eps, steps=1)
        for eps in args.pgd:
            once(f"pgd/{eps:g}", lambda: chosen, eps=eps, steps=args.pgd_steps)
    if args.corrupt:
        # All models see the same corrupted pixels: those that the smallest one sees, before they are corrupted.
        view = evaluation.smallest
        settings = view._asdict() | {"seed": args.seed}
        for name in CORRUPTIONS:
            draw = partial(draw_five, chosen.images, view, name, args.seed)
            once(f"corrupt/{name}", partial(chosen._replace, settings=settings, read=draw))
    if args.imagenet_a:
        once("imagenet_a", partial(list_folder, args.imagenet_a), subset=True)
    if args.imagenet_r:
        once("imagenet_r", partial(list_folder, args.imagenet_r), subset=True)
    if args.imagenet_c:  # flat, or in the archives' folders blur/, digital/, extra/ ...
        folders = {path.name: path for path in [*args.imagenet_c.glob("*/*"), *args.imagenet_c.glob("*")]}
        for name in ALEXNET_ERRORS:
            if name in BENCHMARK or name in folders:  # the extra ones are an archive of their own
                folder = folders.get(name, args.imagenet_c / name)
                once(f"imagenet_c/{name}", partial(list_severities, folder))
    if args.imagenet_p:
        for name in ALEXNET_FLIPS:
            once(f"imagenet_p/{name}", partial(list_videos, args.imagenet_p / name))
    if args.cifar10_c:
        for name in ALEXNET_ERRORS:
            once(f"cifar10_c/{name}", partial(list_array, args.cifar10_c / f"{name}.npy"))
    for name, folder in args.folder:
        once(f"folder/{name}", partial(list_folder, folder))


# ======================================================================================================================
# SECOND HALF: entries of robustness.json -> summary, table, verdict, picture
# ======================================================================================================================


def values_of(entry: dict, part: str, names: tuple, value: str = "top1") -> np.ndarray | None:
    """(names, ...) of a part that is whole: all of it was measured, and on as many images."""
    items = [entry.get(f"{part}/{name}", {}) for name in names]
    if not all(value in item for item in items) or len(np.unique([item["num"] for item in items])) > 1:
        return None
    return np.array([item[value] for item in items])


def mean_corruption_error(top1: np.ndarray, clean_error: float | None = None) -> float:
    """mCE in percent (1903.12261, section 4) of top1 (15, severities), in the order of BENCHMARK.

    The mean over the corruptions of the sum of the errors over that of AlexNet. `clean_error`: the model's on clean
    images; it and AlexNet's are taken off first, which is the relative mCE (from memory of the paper).
    """
    errors = 100 - top1.mean(axis=1)
    of_alexnet = np.array([ALEXNET_ERRORS[name] for name in BENCHMARK])
    if clean_error is not None:
        errors = errors - clean_error
        of_alexnet = of_alexnet - ALEXNET_CLEAN_ERROR
    return float(100 * (errors / of_alexnet).mean())


def summarize(entry: dict) -> dict[str, float]:
    """The means of an entry, in percent; where something is missing there is none, for it would mislead."""
    top1 = {
        "corrupted": values_of(entry, "corrupt", DRAWN),
        "corrupted_extra": values_of(entry, "corrupt", EXTRA),
        "imagenet_c": values_of(entry, "imagenet_c", BENCHMARK),
        "cifar10_c": values_of(entry, "cifar10_c", BENCHMARK),
        "cifar10_c_19": values_of(entry, "cifar10_c", BENCHMARK + EXTRA),
    }
    summary = {name: float(values.mean()) for name, values in top1.items() if values is not None}
    if "imagenet_c" in summary:
        summary["mce"] = mean_corruption_error(top1["imagenet_c"])
        if "top1" in entry.get("clean", {}):
            summary["relative_mce"] = mean_corruption_error(top1["imagenet_c"], 100 - entry["clean"]["top1"])
    flips = values_of(entry, "imagenet_p", tuple(ALEXNET_FLIPS), "flip")
    if flips is not None:
        summary["mfp"] = float(flips.mean())
        summary["mfr"] = float(100 * (flips / list(ALEXNET_FLIPS.values())).mean())
    if "cifar10_c_19" in summary:
        summary["cifar10_c_19_severity5"] = float(top1["cifar10_c_19"][:, 4].mean())
    return summary


class Cell(NamedTuple):
    value: float
    num: int = 0  # of images, where the value is a share of them
    right: str = ""  # which of them, as in robustness.json


class Row(NamedTuple):
    """A row of the table: a model, or the same model with several seeds."""

    name: str
    model: str  # the folder of its checkpoints: teacher, control, student1 ...
    columns: dict[str, dict[str, Cell]]  # {seed, a folder's name or "": {name in robustness.json: cell}}

    def text(self, heading: str) -> str:
        """Of several seeds mean and standard deviation, of one the value and half of Wilson's 95 percent interval."""
        cells = [columns[heading] for columns in self.columns.values() if heading in columns]
        if len(cells) < len(self.columns):
            return "-"
        if len(cells) > 1:
            values = [cell.value for cell in cells]
            return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        value, num, _ = cells[0]
        if not num:
            return f"{value:.2f}"
        low, high = wilson(round(value / 100 * num), num)
        return f"{value:.2f} ± {50 * (high - low):.2f}"


def columns_of(entry: dict) -> dict[str, Cell]:
    means = {name: Cell(value) for name, value in entry["summary"].items() if name != "corrupted_extra"}
    shares = {}
    for key, result in entry.items():
        if isinstance(result.get("top1"), float) and "flip" not in result:
            classes = f" ({result['classes']} classes)" if key.startswith(("imagenet", "folder")) else ""
            shares[key + classes] = Cell(result["top1"], result["num"], result.get("right", ""))
    clean = {"clean": shares.pop("clean")} if "clean" in shares else {}
    return clean | means | shares


def rows_of(shown: dict[str, dict]) -> list[Row]:
    """The rows of the table. Paths that differ in one folder seedN alone are one model."""
    models = {}
    for path, entry in shown.items():
        match = re.fullmatch(r"(.*/)?(seed\d+)(/.*)", path)
        model = f"{match[1] or ''}seed*{match[3]}" if match else path
        models.setdefault(model, {})[match[2] if match else ""] = columns_of(entry)
    folders = [Path(path).absolute().parent.name for path in models]
    rows = []
    for (path, columns), folder in zip(models.items(), folders, strict=True):
        name = folder if folders.count(folder) == 1 else path
        rows.append(Row(f"{name} ({len(columns)} seeds)" if len(columns) > 1 else name, folder, columns))
    return rows


def t_95(freedom: float) -> float:
    """Student's t at 97.5 percent. With x = sqrt(freedom) * tan(angle) its density is cos(angle)^(freedom - 1)."""
    step = min(np.pi / 2, 40 / freedom**0.5) / 20_000
    edges = step * np.arange(1, 20_001)
    mass = np.cumsum(np.cos(edges - step / 2) ** (freedom - 1))
    return float(freedom**0.5 * np.tan(np.interp(0.95 * mass[-1], mass, edges)))


def half_interval(d: np.ndarray) -> float:
    """Half of the 95 percent interval, in points, of the mean of d (seeds, images) of -1, 0 and 1.

    For other seeds and other images: the variances of the mean over both are added, without what they share; of one
    seed for other images alone. As if each model was right alone on one image more, so that no interval has the width 0
    (Bonett & Price, 2012).
    """
    d = np.hstack([d, np.tile([1, -1], (len(d), 1))])
    seeds, images = d.shape
    of_images = d.mean(axis=0)
    by_images = of_images.var(ddof=1) / images
    by_seeds = shared = 0.0
    if seeds > 1:
        of_seeds = d.mean(axis=1, keepdims=True)
        by_seeds = of_seeds.var(ddof=1) / seeds
        interaction = d - of_seeds - of_images + d.mean()
        shared = (interaction**2).sum() / ((seeds - 1) * (images - 1) * seeds * images)
    variance = max(by_seeds + by_images - shared, by_seeds, by_images)
    # Satterthwaite's degrees of freedom
    freedom = variance**2 / (by_seeds**2 / max(seeds - 1, 1) + by_images**2 / (images - 1))
    return 100 * t_95(freedom) * variance**0.5


def difference(row: Row, base: Row, heading: str) -> tuple[float, float | None, int] | None:
    """(points by which `row` is better, half of the 95 percent interval, seeds), of the seeds of both; None of none.

    Where it is not known which images are right, the interval is for other seeds on these images; None of one seed.
    """
    both = [seed for seed in row.columns if heading in row.columns[seed] and heading in base.columns.get(seed, {})]
    pairs = [(row.columns[seed][heading], base.columns[seed][heading]) for seed in both]
    if not pairs:
        return None
    points = np.array([cell.value - of_base.value for cell, of_base in pairs])
    right, right_of_base = (np.array([bits_of(cell) for cell in cells]) for cells in zip(*pairs, strict=True))
    half = None
    if right.size and right.shape == right_of_base.shape:
        half = half_interval(right - right_of_base)
    elif len(pairs) > 1:
        half = t_95(len(pairs) - 1) * float(points.std(ddof=1)) / len(pairs) ** 0.5
    return float(points.mean()), half, len(pairs)


def bits_of(cell: Cell) -> np.ndarray:  # int (N,), and up to 7 zeros of no image
    return np.unpackbits(np.frombuffer(base64.b64decode(cell.right), np.uint8)).astype(int)


def markdown_table(rows: list[Row], headings: list[str]) -> str:
    """A line a model; the last column is the difference of clean to `control` or the first row."""
    base = next((row for row in rows if row.model == "control"), rows[0])
    table = [["model", *headings, f"clean - {base.model}"]]
    for row in rows:
        gained = difference(row, base, "clean") if row is not base else None
        last = f"{gained[0]:+.2f} ± {gained[1]:.2f}" if gained else "-"
        table.append([row.name, *(row.text(heading) for heading in headings), last])
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(rows: list[Row]) -> str:
    """What the last student gained over `control` and `probe`, in numbers; "" without a student or a control."""
    students = [row for row in rows if row.model.startswith("student")]
    bases = {row.model: row for row in rows if row.model in ("control", "probe")}
    sentences = []
    if not students or "control" not in bases:
        return ""
    for base, heading in (("control", "clean"), ("control", "corrupted"), ("probe", "clean")):
        gained = difference(students[-1], bases[base], heading) if base in bases else None
        if gained:
            points, half, seeds = gained
            interval = "no interval"
            if half is not None:
                interval = f"95 percent interval {points - half:+.2f} to {points + half:+.2f}"
            cell = next(iter(students[-1].columns.values()))[heading]
            images = f"images: {cell.num:,}" if cell.right else "for these images alone"
            gain = f"{students[-1].model} gains {points:+.2f} points over {base} on {heading} images"
            sentences.append(f"{gain} ({interval}; seeds: {seeds}, {images}).")
    means = {}
    for row in rows:
        means[row.name] = np.mean([cells["clean"].value if "clean" in cells else 0 for cells in row.columns.values()])
    return " ".join([*sentences, f"The highest clean top-1 is that of {max(means, key=means.get)}."])


def gaps_of(shown: dict[str, dict]) -> str:
    """A line for each reason why something could not be measured, or has no mean."""
    gaps = {}  # {reason: {key: None}}
    nums = {}  # {part: {number of images: None}}
    for entry in shown.values():
        for key, result in entry.items():
            if "gap" in result:
                gaps.setdefault(result["gap"], {})[key] = None
            for num in np.ravel(result.get("num", [])).tolist():
                nums.setdefault(key.split("/")[0], {})[num] = None
    lines = [f"Not measured: {', '.join(keys)}: {reason}" for reason, keys in gaps.items()]
    for part in ("imagenet_c", "imagenet_p", "cifar10_c"):
        if len(nums.get(part, {})) > 1:
            lines.append(f"No mean of {part}: it is of {min(nums[part])} to {max(nums[part])} images")
    return "\n".join(lines)


def draw(rows: list[Row], headings: list[str], file: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    shares = [heading for heading in headings if heading not in ("mce", "relative_mce", "mfp", "mfr")]
    figure, axis = plt.subplots(figsize=(3 + 2 * len(shares), 4), layout="constrained")
    for number, row in enumerate(rows):
        places = np.arange(len(shares)) + 0.84 / len(rows) * number
        seeds = [[columns.get(name, Cell(np.nan)).value for name in shares] for columns in row.columns.values()]
        axis.bar(places, np.mean(seeds, axis=0), 0.84 / len(rows), label=row.name)
        axis.plot(places, np.transpose(seeds), "k.", markersize=3)
    axis.set_xticks(np.arange(len(shares)) + 0.42, shares)
    axis.set_ylabel("top-1 in percent")
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    save_figure(plt, file)


def report(shown: dict[str, dict], out: Path) -> None:
    """Write the table, the verdict and the picture; print the first two."""
    rows = rows_of(shown)
    headings = list(dict.fromkeys(name for row in rows for columns in row.columns.values() for name in columns))
    gaps = gaps_of(shown)
    if not any("top1" in result for entry in shown.values() for result in entry.values()):
        fail(f"nothing could be measured: {gaps}")
    note = "In percent; ± is half of the 95 percent interval, of several seeds the standard deviation."
    parts = [markdown_table(rows, headings), note, verdict(rows), gaps]
    text = "\n\n".join(part for part in parts if part) + "\n"
    with write_atomically(out / "robustness.md") as temporary:
        temporary.write_text(text)
    (out / "verdict.md").unlink(missing_ok=True)  # of an earlier command
    if verdict(rows):
        shutil.copyfile(out / "robustness.md", out / "verdict.md")
    draw(rows, headings, out / "robustness.png")
    print(text, end="")


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    if args.corrupt:
        libraries()
    if args.imagenet_p:
        optional("av", "av", "--imagenet-p")

    evaluation = Evaluation(args, processes)
    val = list_val(args, args.data or evaluation.models[0].data)
    if val and not any(set(val.classes) <= set(tested.classes) for tested in evaluation.models):
        unknown = sorted(set(val.classes) - set(evaluation.models[0].classes))
        fail(f"--data: the models do not have all classes of val/; unknown: {', '.join(unknown[:5])}")
    measure_all(args, evaluation, val)
    if not evaluation.asked:
        fail("nothing to measure: name --data or a released set")
    shown = {path: {key: entry[key] for key in evaluation.asked} for path, entry in evaluation.entries.items()}
    for path, entry in shown.items():
        entry["summary"] = summarize(entry)
        evaluation.entries[path]["summary"] = entry["summary"]
    evaluation.save()
    if processes.is_main:
        report(shown, args.out)


if __name__ == "__main__":
    main()
