"""Stage 06: measure how much of a model's accuracy is left on corrupted images and under attack.

A student that was trained with noise on many more images is more accurate than its teacher. It is
also much more robust, although no stage trains it for that (Noisy Student, section 4.3).

    clean         top-1, top-5, loss and details on DATA/val; ece: the expected calibration error over
                  15 bins b of the confidence, sum_b n_b / n * |accuracy_b - confidence_b|
    --corrupt     14 of ImageNet-C's 15 corruptions (Hendrycks & Dietterich, 1903.12261; frost needs
                  photographs) and its 4 extra ones; `corrupted` is the mean over 14 x 5
    --fgsm EPS    x' = clip(x + EPS * sign(grad_x loss(x, y)), 0, 255)   x in pixel values, 0 to 255
    --pgd EPS     K times x' = clip(x' + 2.5 * EPS / K * sign(grad), x - EPS, x + EPS), in 0..255 too
    --imagenet-a, --imagenet-r, --folder   top-1; of the first two among the classes of the set
    --imagenet-c  mCE: the mean over 15 corruptions c of sum_s error_{s,c} / sum_s error_{s,c}(AlexNet)
    --imagenet-p  mFR: the mean over 10 perturbations of the probability that the prediction flips
                  from frame to frame (of noise: from the first frame), over AlexNet's
    --cifar10-c   top-1 over the 15 corruptions and over all 19

reads   checkpoints of any stage; DATA/val and released sets, whose classes are matched by name
writes  OUT/robustness.json (every number, saved when it is measured), robustness.md and .png (the
        table, a picture). The same command again measures what is missing or has changed.

    python 06_eval_robustness.py runs/demo/teacher/model.pt runs/demo/student1/model.pt \\
        --data data/demo --out runs/demo/robustness --corrupt --fgsm 2 4 --num-images 500
    torchrun --nproc-per-node 8 06_eval_robustness.py ...      (the same numbers, faster)
"""

import argparse
import base64
import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import SWITCH, add_device_flags, argument_parser, at_least, fail, optional  # program
from common import print0, write_atomically
from common import Processes, init_processes, progress, reduce_sum, seed_words  # processes
from common import View, eval_view, normalize  # views
from common import ImageList, images_by_class, judged_half, labeled_images  # listing
from common import ImageDataset, grid_keys, load_batches, rows_per_batch  # batches
from common import fingerprint, load_model  # checkpoints
from common import autocast, in_halves, precision_of, wilson  # training
from common import pyplot, save_figure  # pictures

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# fmt: off
# Mean error of AlexNet over the severities, in percent: the 15 corruptions of the benchmark
# (google-research/augmix, imagenet.py), then the 4 extra ones (hendrycks/robustness, issue 10).
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640,
    "defocus_blur": 81.9880, "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360,
    "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204,
    "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
    "speckle_noise": 84.5, "gaussian_blur": 78.7, "spatter": 71.8, "saturate": 65.8,
}
ALEXNET_CLEAN_ERROR = 43.478  # torchvision's record
# Flip probabilities of AlexNet on ImageNet-P in percent: from memory, no source could confirm them.
ALEXNET_FLIPS = {
    "gaussian_noise": 23.65, "shot_noise": 30.06, "motion_blur": 9.30, "zoom_blur": 5.94,
    "snow": 11.93, "brightness": 4.89, "translate": 11.01, "rotate": 13.10, "tilt": 7.05, "scale": 23.53,
}
BENCHMARK = tuple(ALEXNET_ERRORS)[:15]
EXTRA = tuple(ALEXNET_ERRORS)[15:]

# {corruption: {image size the values were chosen for: one value a severity}}: those of the
# generators of CIFAR-10-C, Tiny-ImageNet-C and ImageNet-C (github.com/hendrycks/robustness,
# ImageNet-C/create_c/make_cifar_c.py, make_tinyimagenet_c.py, make_imagenet_c.py), in pixels of the
# image. The released ImageNet-C is drawn at 224 and then resized: a larger model sees more blur.
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
    "glass_blur": {  # deviation of a blur before and after; farthest move of a pixel; rounds
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
    "snow": {  # flakes: mean, deviation, zoom, least kept; their fall: radius, deviation; unwhitened
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
    "elastic_transform": {  # strength and deviation of the local shifts; largest shift of a corner
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
    "spatter": {  # liquid: mean, deviation, blur, least kept; strength of water or blur of mud; mud
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

LARGEST = {32: 48, 64: 128, 224: math.inf}  # {such a size: the largest image that it is used for}
DRAWN = tuple(name for name in CORRUPTIONS if name not in EXTRA)  # 14: frost needs photographs


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="model.pt of any stage, each a table's row")
    add("--data", type=Path, help="data directory with val/; None: the first checkpoint's own")
    add("--out", type=Path, required=True, help="folder of robustness.json, .md and .png")
    add("--val-half", choices=["all", "choose", "judge"], default="all", help="by the hash of the path")
    add("--folder", nargs="+", type=name_and_folder, default=[], metavar="NAME=DIR", help="<class>/*")
    add("--imagenet-a", type=existing, metavar="DIR", help="<class>/*: only its classes compete")
    add("--imagenet-r", type=existing, metavar="DIR", help="<class>/*: only its classes compete")
    add("--imagenet-c", type=existing, metavar="DIR", help="[noise/]<corruption>/<severity>/<class>/*")
    add("--imagenet-p", type=existing, metavar="DIR", help="<perturbation>/<class>/*.mp4; needs PyAV")
    add("--cifar10-c", type=existing, metavar="DIR", help="<corruption>.npy and labels.npy")
    add("--corrupt", action=SWITCH, default=False, help="needs scipy and OpenCV")
    add("--fgsm", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 2 4 8 16")
    add("--pgd", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 16")
    add("--pgd-steps", type=at_least(1, int), default=10, help="paper: 10, their size is not given")
    add("--num-images", type=at_least(1, int), help="val images to corrupt and attack; None: all")
    add("--batch-size", type=at_least(1, int), help="of a process; None: what fits a cache or GPU")
    add("--seed", type=at_least(0, int), default=0, help="of --num-images and the corruptions")
    add_device_flags(parser)
    return parser.parse_args()


def existing(folder: str) -> Path:
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    return Path(folder)


def name_and_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=DIR")
    return name, existing(folder)


# ========================= FIRST HALF: measure, and write robustness.json =========================

# -- corruptions, as the generators of the benchmark draw them, by the libraries that they use -----


@cache
def import_libraries() -> None:
    """Import what --corrupt alone needs."""
    global cv2, ndimage
    cv2 = optional("cv2", "scipy opencv-python-headless", "--corrupt")
    cv2.setNumThreads(0)  # its threads do not survive the fork of a loader
    ndimage = optional("scipy.ndimage", "scipy", "--corrupt")


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Apply one of CORRUPTIONS at severity 1 to 5: uint8 (size, size, 3) -> a new one."""
    import_libraries()
    size = len(image)
    chosen_for = next(pixels for pixels, largest in LARGEST.items() if size <= largest)
    c = CORRUPTIONS[name][chosen_for][severity - 1]
    x = image / 255
    if name == "gaussian_noise":
        x = x + rng.normal(scale=c, size=x.shape)
    elif name == "shot_noise":
        x = rng.poisson(x * c) / c
    elif name == "impulse_noise":  # each value of a pixel on its own: half salt, half pepper
        hit = rng.random(x.shape) < c
        x = np.where(hit, rng.random(x.shape) < 0.5, x)
    elif name == "speckle_noise":
        x = x + x * rng.normal(scale=c, size=x.shape)
    elif name == "gaussian_blur":
        x = smoothed(x, c)
    elif name == "contrast":
        mean = x.mean(axis=(0, 1))
        x = (x - mean) * c + mean
    elif name == "brightness":
        # V of HSV, the largest of R, G, B, grows; at equal hue and saturation all scale with it.
        v = x.max(axis=2, keepdims=True)
        x = np.minimum(v + c, 1) * np.where(v > 0, x / np.where(v > 0, v, 1), 1)  # black: grey
    elif name == "pixelate":
        small = Image.fromarray(image).resize((int(size * c), int(size * c)), Image.Resampling.BOX)
        return np.asarray(small.resize((size, size), Image.Resampling.BOX))
    elif name == "jpeg_compression":
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=c)
        return np.asarray(Image.open(file))
    else:
        x = globals()[name](x, rng, *c)  # the function of that name, below
    return np.uint8(np.clip(x, 0, 1) * 255)  # cut, not rounded, as in the generators


def smoothed(x, sigma, mode="nearest", truncate=4):
    """scikit-image's `gaussian` of x (size, size) or (size, size, 3)."""
    return ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode=mode, truncate=truncate)


def defocus_blur(x, rng, radius, sigma):
    side = max(8, int(radius))
    rows, columns = np.mgrid[-side : side + 1, -side : side + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float32)
    disk = cv2.GaussianBlur(disk / disk.sum(), (3, 3) if radius <= 8 else (5, 5), sigma)
    return cv2.filter2D(x, -1, disk)


def glass_blur(x, rng, sigma, reach, rounds):
    size = len(x)
    pixels = np.uint8(smoothed(x, sigma) * 255).reshape(-1, 3)
    line = np.arange(size - reach, reach, -1)
    places = np.add.outer(line * size, line).ravel()
    # The generator swaps each pixel, from the last to the first, with a near one, but by views: the
    # second gets back its own value. So a pixel becomes a copy, maybe of a copy.
    for _ in range(rounds):
        dx, dy = rng.integers(-reach, reach, (len(places), 2)).T
        source = list(range(size * size))
        for place, near in zip(places.tolist(), (places + dy * size + dx).tolist(), strict=True):
            source[place] = source[near]
        pixels = pixels[source]
    return smoothed(pixels.reshape(x.shape) / 255, sigma)


def motion_blur(x, rng, radius, sigma, low=-45, high=45):
    """ImageMagick's: a one-sided Gaussian along a line; x (size, size) or (size, size, 3)."""
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
    size = len(x)
    side = int(np.ceil(size / factor))
    top = (size - side) // 2
    x = ndimage.zoom(x[top : top + side, top : top + side], factor, order=1)
    top = (len(x) - size) // 2
    return x[top : top + size, top : top + size]


def zoom_blur(x, rng, end, step):
    x = np.float32(x)
    factors = np.arange(1, end, step)
    planes = np.moveaxis(x, -1, 0)  # twice as fast as all of them at once
    total = sum(np.dstack([zoomed(plane, factor) for plane in planes]) for factor in factors)
    return (x + total) / (len(factors) + 1)


def snow(x, rng, mean, deviation, zoom, least, radius, sigma, kept):
    flakes = zoomed(rng.normal(mean, deviation, x.shape[:2]), zoom)
    flakes[flakes < least] = 0
    flakes = np.uint8(flakes.clip(0, 1) * 255) / 255
    flakes = motion_blur(flakes, rng, radius, sigma, -135, -45)[..., None]
    x = np.float32(x)
    grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None]
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5) + flakes + np.rot90(flakes, 2)


def fog(x, rng, thickness, decay):
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


def saturate(x, rng, factor, plus):
    # At equal hue and V, the largest, each value's distance to V grows with S. Grey is as red.
    v = x.max(axis=2, keepdims=True)
    low = x.min(axis=2, keepdims=True)
    distance = np.where(v > low, (v - x) / np.where(v > low, v - low, 1), [0, 1, 1])  # 0 to 1
    s = (v - low) / np.where(v > 0, v, 1) * factor + plus
    return v * (1 - distance * np.clip(s, 0, 1))


def elastic_transform(x, rng, strength, sigma, jitter):
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
    planes = np.moveaxis(x, -1, 0)
    return np.dstack([ndimage.map_coordinates(p, places, order=1, mode="reflect") for p in planes])


def spatter(x, rng, mean, deviation, sigma, least, amount, is_mud):
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


class Shown(NamedTuple):  # to all models
    images: ImageList
    labels: np.ndarray  # int64 (N,), numbers of `classes`
    classes: list[str]
    settings: dict | None = None  # what they depend on besides their names
    read: Callable | None = None  # row -> pictures: five severities of an image, frames of a video

    def at(self, rows: np.ndarray) -> "Shown":
        return self._replace(images=self.images[rows], labels=self.labels[rows])


class Pictures(ImageDataset):
    """An image, or the pictures that `read` makes of it, each in all of `views`."""

    def __init__(self, shown: Shown, views: list[View]):
        super().__init__(shown.images, clean=views[0])
        self.read = shown.read
        self.views = views

    def __getitem__(self, row: int):
        try:
            if self.read:
                pictures = self.read(row)
                views = [eval_view(picture, view) for picture in pictures for view in self.views]
            else:
                views = [eval_view(self.images.load(row, view.enough), view) for view in self.views]
        except Exception:  # decoders raise anything
            return row, None, self.images.name(row)
        return row, views, None


def list_folder(folder: Path) -> Shown:
    return Shown(*images_by_class(folder))


def list_val(args: argparse.Namespace, data: str | Path | None) -> Shown | None:
    """DATA/val or a half of it; None, with a line, where the first checkpoint's DATA is gone."""
    if not data or not any(os.path.isdir(f"{data}/{split}") for split in ("train", "val")):
        if args.data or args.corrupt or args.fgsm or args.pgd:
            fail(f"--data: there is no train/ or val/ in {data}")
        print0(f"no data directory ({data}): clean images are left out")
        return None
    val = Shown(*labeled_images(data, "val"))
    if args.val_half == "all":
        return val
    return val.at(judged_half(val.images) == (args.val_half == "judge"))


def draw_five(images: ImageList, view: View, name: str, seed: int, row: int) -> list[Image.Image]:
    """The noise depends on (seed, corruption, path, severity) alone: all models see the same."""
    clean = eval_view(images.load(row, view.enough), view)
    words = seed_words(seed, name, zlib.crc32(images.path[row]))
    five = []
    for severity in range(1, 6):
        rng = np.random.default_rng([*words, severity])
        five.append(Image.fromarray(corrupt(clean, name, severity, rng)))
    return five


def read_five(five: list[ImageList | np.ndarray], row: int) -> list[Image.Image]:
    if isinstance(five[0], ImageList):
        return [images.load(row) for images in five]
    return [Image.fromarray(array[row]) for array in five]


def list_severities(folder: Path) -> Shown:
    """A corruption of ImageNet-C: FOLDER/1 to 5, of the same photographs."""
    five = [list_folder(folder / str(severity)) for severity in range(1, 6)]
    classes = [np.take(shown.classes, shown.labels).tolist() for shown in five]
    if any(of_severity != classes[0] for of_severity in classes):
        raise ValueError(f"{folder} is not whole: its severities have other images or classes")
    images = [shown.images for shown in five]
    settings = {"images": [fingerprint(of_severity) for of_severity in images]}
    return five[0]._replace(settings=settings, read=partial(read_five, images))


def list_array(file: Path) -> Shown:
    """A corruption of CIFAR-10-C: uint8 (5 N, H, W, 3), severity by severity, and labels.npy."""
    array = np.lib.format.open_memmap(file, mode="r")
    labels = np.lib.format.open_memmap(file.with_name("labels.npy"), mode="r")
    if array.dtype != np.uint8 or array.shape != (len(labels), *array.shape[1:3], 3):
        raise ValueError(f"{file}: {array.dtype} {array.shape}, not uint8 ({len(labels)}, H, W, 3)")
    labels = labels.reshape(5, -1)
    if (labels != labels[0]).any() or not set(labels[0].tolist()) <= set(range(10)):
        raise ValueError(f"{file.with_name('labels.npy')}: not the same 0 to 9 at each severity")
    unnamed = ImageList.of(str(file.absolute()), [])
    settings = {"sha256": [fingerprint(file), fingerprint(file.with_name("labels.npy"))]}
    read = partial(read_five, np.split(array, 5))
    return Shown(unnamed, labels[0].astype(np.int64), CIFAR10, settings, read)


def list_videos(folder: Path) -> Shown:
    """ImageNet-P: FOLDER/<class>/<video>"""
    files = [path for path in folder.glob("*/*") if path.suffix in (".mp4", ".avi")]
    if not files:
        raise ValueError(f"{folder}: no videos <class>/<name>.mp4 in it")
    members = [(os.fsencode(path.relative_to(folder)), 0, 0) for path in files]
    videos = ImageList.of(str(folder.absolute()), members)
    names = [os.fsdecode(path.split(b"/")[0]) for path in videos.path.tolist()]
    classes, labels = np.unique(names, return_inverse=True)
    return Shown(videos, labels, classes.tolist(), read=partial(read_frames, videos))


def read_frames(videos: ImageList, row: int) -> list[Image.Image]:
    av = optional("av", "av", "--imagenet-p")
    av.logging.set_level(av.logging.PANIC)  # a broken video is counted by us
    with av.open(videos.name(row)) as file:
        frames = [frame.to_image() for frame in file.decode(video=0)]
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} frames")
    return frames


# -- measures --------------------------------------------------------------------------------------


class Tested:
    """A checkpoint, and its entry of robustness.json: `earlier`, if the file is the same."""

    def __init__(self, path: str, device: torch.device, earlier: dict):
        self.model, checkpoint = load_model(path, device, fuse=True)
        self.view = View.of(checkpoint)
        self.classes = checkpoint["classes"]
        self.data = checkpoint.get("data")
        self.entry = {"sha256": fingerprint(Path(path))}
        if earlier.get("sha256") == self.entry["sha256"]:
            self.entry = earlier

    def logits(self, amp, eps: float, steps: int, pixels: Tensor, labels: Tensor) -> Tensor:
        """Float32 (N, classes) of pixels (N, 3, H, W) in 0..255, attacked where `steps` is not 0."""
        pixels = pixels.float()
        if steps:
            pixels = attack(self.model, pixels, labels, eps, steps, self.view)
        with torch.no_grad(), amp:
            return self.model(normalize(pixels, self.view)).float()

    def labels(self, shown: Shown) -> np.ndarray:
        """int64 (N,), as the model numbers the classes."""
        return np.array([self.classes.index(name) for name in shown.classes])[shown.labels]


def attack(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, steps: int, view: View):
    """Projected gradient ascent on the cross-entropy: pixels (N, 3, H, W) in 0..255, as eps is.

    With one step this is FGSM: the step, 2.5 eps (the rule of 1706.06083; the paper's is not said),
    is cut to the eps ball. There is no random start, so eps 0 is the clean image.
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


def facts_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 (N, 6): 1 (was read), class, right at top-1, right in top-5, loss, confidence."""
    top5 = logits.topk(min(5, logits.shape[1])).indices
    right = top5 == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    confidence = logits.softmax(dim=1).amax(dim=1)
    columns = [torch.ones_like(loss), top5[:, 0], right[:, 0], right.any(dim=1), loss, confidence]
    return torch.stack([column.double() for column in columns], dim=1)


def metrics_of(facts: np.ndarray) -> dict[str, float]:
    """Of the `facts_of` images that were read: top1, top5, ece in percent, the mean loss."""
    _, _, right, top5, loss, confidence = facts[facts[:, 0] > 0].T
    num = len(right)
    bins = np.ceil(np.float32(confidence) * 15).astype(int).clip(1, 15)  # b: ((b - 1) / 15, b / 15]
    gaps = np.bincount(bins, right - confidence)  # n_b * (accuracy_b - confidence_b)
    sums = {"top1": 100 * right.sum(), "top5": 100 * top5.sum(), "loss": loss.sum()}
    sums["ece"] = 100 * np.abs(gaps).sum()
    return {name: float(value / num) for name, value in sums.items()} | {"num": num}


def details_of(labels: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict:
    """What is behind a top-1. `predicted`: -1 of images that are unreadable.

    interval95: Wilson's, of top1, in percent. balanced_top1: the mean recall of the classes that
    there are. right: a bit an image, in their order, base64. confusion: images, true class by row.
    """
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    seen = predicted >= 0
    np.add.at(confusion, (labels[seen], predicted[seen]), 1)
    num, named, right = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    per_class = {}
    for name, n, m, k in zip(classes, num.tolist(), named.tolist(), right.tolist(), strict=True):
        recall = 100 * k / n if n else None
        precision = 100 * k / m if m else None
        per_class[name] = {"num": n, "recall": recall, "precision": precision}
    details = {
        "balanced_top1": 100 * float((right[num > 0] / num[num > 0]).mean()),
        "interval95": [100 * share for share in wilson(int(right.sum()), int(num.sum()))],
        "per_class": per_class,
        "right": base64.b64encode(np.packbits(predicted == labels).tobytes()).decode(),
    }
    if len(classes) <= 100:
        details["confusion"] = confusion.tolist()
    return details


# -- what is measured, and kept in robustness.json -------------------------------------------------


class Evaluation:
    """The models, and what robustness.json has of them: {checkpoint: {"sha256", key: {...}}}."""

    def __init__(self, args: argparse.Namespace, processes: Processes):
        self.file = args.out / "robustness.json"
        self.processes = processes
        self.precision = precision_of(args.precision, processes.device)
        self.batch_size = args.batch_size
        self.asked = []  # the keys of this command, whether it measured them or an earlier one did
        self.entries = {}
        self.models = []
        self.unreadable = set()  # names
        earlier = self.read()
        for path in dict.fromkeys(args.checkpoints):
            tested = Tested(path, processes.device, earlier.get(path, {}))
            self.models.append(tested)
            self.entries[path] = tested.entry

    def read(self) -> dict[str, dict]:
        try:
            return dict(json.loads(self.file.read_text())) if self.file.exists() else {}
        except (OSError, TypeError, ValueError) as error:
            fail(f"{self.file}: not the results of an earlier run ({error}); move it away")

    def save(self) -> None:
        """Other checkpoints, which another run may save there meanwhile, stay."""
        if self.processes.rank == 0:
            others = {k: entry for k, entry in self.read().items() if k not in self.entries}
            with write_atomically(self.file) as temporary:
                temporary.write_text(json.dumps(self.entries | others, indent=1))

    def once(self, key: str, list_images: Callable[..., Shown], *place: Path, **how) -> None:
        """Measure and save `key` of the models that lack it with these settings; `how`: of `answers`."""
        self.asked.append(key)
        try:
            shown = list_images(*place)
        except (OSError, ValueError) as error:  # a gap, with its reason; the next time tried again
            for tested in self.models:
                tested.entry[key] = {"gap": str(error)}
            return
        settings = {"folder": shown.images.root, "images": fingerprint(shown.images)}
        settings["precision"] = "fp32" if "eps" in how else self.precision
        settings = settings | (shown.settings or {}) | how
        settings = json.loads(json.dumps(settings))  # as they are read again
        missing = []
        for tested in self.models:
            kept = tested.entry.get(key, {})
            lacking = [name for name in shown.classes if name not in tested.classes]
            if lacking:
                tested.entry[key] = {"gap": f"the model has no class {', '.join(lacking[:5])}"}
            elif "gap" in kept or kept.get("settings") != settings:
                missing.append(tested)
        if missing:
            measure = self.measure_flips if key.startswith("imagenet_p") else self.measure
            of_all = {"classes": len(np.unique(shown.labels)), "settings": settings}
            for tested, result in zip(missing, measure(missing, shown, key, **how), strict=True):
                tested.entry[key] = result | of_all
            self.save()

    def answers(self, models: list[Tested], shown: Shown, key: str, eps=0.0, steps=0, subset=False):
        """Yield (number of the model, rows (B,), logits (pictures * B, classes), labels of these).

        All processes together show each image once to each model. Attacked where `steps` is not 0.
        `subset`: only the classes of `shown` compete.
        """
        device = self.processes.device
        # Attacks are in float32: half of a float16 gradient would be 0, and its sign no attack.
        amp, _ = autocast("fp32" if steps else self.precision, device)
        views = [tested.view for tested in models]
        if shown.read:  # all models see the same pictures, resized
            views = [View.default(view.image_size, "squash") for view in views]
        distinct = [view for number, view in enumerate(views) if view not in views[:number]]
        labels = [torch.from_numpy(tested.labels(shown)) for tested in models]
        num = len(shown.labels)
        size = self.batch_size or rows_per_batch(max(view.image_size for view in views), device)
        num_rows = 1 if key.startswith("imagenet_p") else size  # a video has many frames
        keys = list(grid_keys(num, num_rows, self.processes))
        batches = load_batches(Pictures(shown, distinct), keys, self.processes)
        for batch in progress(batches, key, len(keys), self.processes):
            self.unreadable.update(name for _, name in batch.errors)
            if not len(batch.rows):
                continue
            for number, tested in enumerate(models):
                pictures = batch.views[distinct.index(views[number]) :: len(distinct)]
                pixels = torch.cat([images.to(device, non_blocking=True) for images in pictures])
                target = labels[number][batch.rows].to(device).repeat(len(pictures))
                logits_of = partial(tested.logits, amp, eps, steps)
                parts = zip(pixels.split(size), target.split(size), strict=True)
                logits = torch.cat([in_halves(logits_of, *part) for part in parts])
                if subset:
                    others = np.setdiff1d(np.arange(len(tested.classes)), labels[number])
                    logits[:, others] = -torch.inf
                yield number, batch.rows, logits, target

    def measure(self, models: list[Tested], shown: Shown, key: str, **how) -> list[dict]:
        """`metrics_of` each model; of the five severities of an image, lists."""
        num_pictures = 5 if shown.read else 1
        facts = torch.zeros(len(models), num_pictures, len(shown.labels), 6, dtype=torch.float64)
        for number, rows, logits, target in self.answers(models, shown, key, **how):
            of_batch = facts_of(logits, target).cpu()
            facts[number][:, rows] = of_batch.unflatten(0, (num_pictures, -1))
        facts = reduce_sum(facts, self.processes).numpy()
        if not facts[..., 0].any():
            return [{"gap": "no image is readable"} for _ in models]
        results = []
        for tested, of_model in zip(models, facts, strict=True):
            metrics = [metrics_of(of_picture) for of_picture in of_model]
            lists = {name: [of[name] for of in metrics] for name in ("top1", "top5", "num")}
            result = lists if shown.read else {name: value for name, (value,) in lists.items()}
            if key == "clean":
                was_read, predicted = of_model[0, :, :2].T.astype(np.int64)
                predicted[was_read == 0] = -1
                result = metrics[0] | details_of(tested.labels(shown), predicted, tested.classes)
            results.append(result)
        return results

    def measure_flips(self, models: list[Tested], videos: Shown, key: str) -> list[dict]:
        """flip: the share of frames with another class than the frame before; top1: of all frames.

        Percent: the mean over the videos of the mean over a video. Noise has no order in time: its
        frames are compared with the first one (official ImageNet-P/test.py).
        """
        sums = torch.zeros(len(models), 3, dtype=torch.float64)  # videos read, flips, right
        for number, _, logits, target in self.answers(models, videos, key):
            said = logits.argmax(dim=1)
            before = said[:1] if "noise" in key else said[:-1]
            flips = (said[1:] != before).double().mean()
            right = (said == target).double().mean()
            sums[number] += torch.stack([torch.ones_like(flips), flips, right]).cpu()
        sums = reduce_sum(sums, self.processes)
        num = int(sums[0, 0])
        if not num:
            return [{"gap": "no video is readable"} for _ in models]
        shares = (100 * sums[:, 1:] / num).tolist()
        return [{"flip": flip, "top1": top1, "num": num} for flip, top1 in shares]


def measure_all(args: argparse.Namespace, evaluation: Evaluation, val: Shown | None) -> None:
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
        # All models see the same corrupted pixels: those that the smallest one sees, corrupted.
        view = min((tested.view for tested in evaluation.models), key=lambda view: view.image_size)
        settings = view._asdict() | {"seed": args.seed}
        for name in CORRUPTIONS:
            draw = partial(draw_five, chosen.images, view, name, args.seed)
            once(f"corrupt/{name}", partial(chosen._replace, settings=settings, read=draw))
    for key, folder in (("imagenet_a", args.imagenet_a), ("imagenet_r", args.imagenet_r)):
        if folder:
            once(key, list_folder, folder, subset=True)
    if args.imagenet_c:  # flat, or in the archives' folders blur/, digital/, extra/ ...
        paths = [*args.imagenet_c.glob("*/*"), *args.imagenet_c.glob("*")]
        folders = {path.name: path for path in paths}
        for name in ALEXNET_ERRORS:
            if name in BENCHMARK or name in folders:  # the extra ones are an archive of their own
                once(f"imagenet_c/{name}", list_severities, folders.get(name, args.imagenet_c / name))
    if args.imagenet_p:
        for name in ALEXNET_FLIPS:
            once(f"imagenet_p/{name}", list_videos, args.imagenet_p / name)
    if args.cifar10_c:
        for name in ALEXNET_ERRORS:
            once(f"cifar10_c/{name}", list_array, args.cifar10_c / f"{name}.npy")
    for name, folder in args.folder:
        once(f"folder/{name}", list_folder, folder)


# ============ SECOND HALF: entries of robustness.json -> summary, table, verdict, picture =========


def values_of(entry: dict, part: str, names: tuple, value: str = "top1") -> np.ndarray | None:
    """(names, ...) of a part that is whole: all of it was measured, and on the same images."""
    items = [entry.get(f"{part}/{name}", {}) for name in names]
    if all(value in item for item in items) and are_of_the_same_images(items):
        return np.array([item[value] for item in items])
    return None


def are_of_the_same_images(items: list[dict]) -> bool:
    """By their number and names; of videos by their number alone."""
    names = [str(item.get("settings", {}).get("images")) for item in items if "flip" not in item]
    return len(np.unique([item["num"] for item in items])) == 1 and len(set(names)) <= 1


def mean_corruption_error(top1: np.ndarray, clean_error: float | None = None) -> float:
    """mCE in percent (1903.12261, section 4) of top1 (15, severities), in the order of BENCHMARK.

    With `clean_error`, the model's, the relative mCE: without the clean errors (from memory).
    """
    errors = 100 - top1.mean(axis=1)
    of_alexnet = np.array([ALEXNET_ERRORS[name] for name in BENCHMARK])
    if clean_error is not None:
        errors = errors - clean_error
        of_alexnet = of_alexnet - ALEXNET_CLEAN_ERROR
    return float(100 * (errors / of_alexnet).mean())


def summarize(entry: dict) -> dict[str, float]:
    """The means of an entry, in percent. Of a part that is not whole there is none."""
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
            clean_error = 100 - entry["clean"]["top1"]
            summary["relative_mce"] = mean_corruption_error(top1["imagenet_c"], clean_error)
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
    right: np.ndarray | None = None  # which of them, where that is kept: int (N + up to 7 zeros,)


class Row(NamedTuple):
    """A row of the table: a model, or the same model with several seeds."""

    name: str
    model: str  # the folder of its checkpoints: teacher, control, student1 ...
    columns: dict[str, dict[str, Cell]]  # {"seed0" ... or "": {heading: cell}}

    def cells(self, heading: str) -> dict[str, Cell]:
        """Of the seeds that have it."""
        return {seed: cells[heading] for seed, cells in self.columns.items() if heading in cells}

    def values(self, heading: str) -> list[float]:
        return [cell.value for cell in self.cells(heading).values()]

    def text(self, heading: str) -> str:
        """Of several seeds mean and standard deviation, of one the value and half an interval."""
        values = self.values(heading)
        if len(values) < len(self.columns):
            return "-"
        if len(values) > 1:
            return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        ((value, num, _),) = self.cells(heading).values()
        if not num:
            return f"{value:.2f}"
        low, high = wilson(round(value / 100 * num), num)
        return f"{value:.2f} ± {50 * (high - low):.2f}"


def columns_of(entry: dict) -> dict[str, Cell]:
    """Clean top-1, the means, then whatever else is one share of images."""
    shares = {}
    for key, result in entry.items():
        if isinstance(result.get("top1"), float) and "flip" not in result:
            of_set = key.startswith(("imagenet", "folder"))
            heading = f"{key} ({result['classes']} classes)" if of_set else key
            right = np.frombuffer(base64.b64decode(result.get("right", "")), np.uint8)
            shares[heading] = Cell(result["top1"], result["num"], np.unpackbits(right).astype(int))
    means = {k: Cell(value) for k, value in entry["summary"].items() if k != "corrupted_extra"}
    clean = {"clean": shares["clean"]} if "clean" in shares else {}
    return clean | means | shares


def rows_of(shown: dict[str, dict]) -> list[Row]:
    """Paths that differ in one folder seedN alone are one model."""
    models = {}  # {path with a * for the seed: its columns}
    for path, entry in shown.items():
        match = re.fullmatch(r"(.*/|)(seed\d+)(/.*)", path)
        before, seed, after = match.groups() if match else (path, "", "")
        model = f"{before}seed*{after}" if seed else path
        models.setdefault(model, {})[seed] = columns_of(entry)
    folders = [Path(model).absolute().parent.name for model in models]
    rows = []
    for (model, columns), folder in zip(models.items(), folders, strict=True):
        name = folder if folders.count(folder) == 1 else model
        seeds = f" ({len(columns)} seeds)" if len(columns) > 1 else ""
        rows.append(Row(name + seeds, folder, columns))
    return rows


def t_95(freedom: float) -> float:
    """Student's t at 97.5 percent: at x = sqrt(freedom) tan(a) its density is cos(a)^(freedom - 1)."""
    step = min(np.pi / 2, 40 / freedom**0.5) / 20_000
    edges = step * np.arange(1, 20_001)
    mass = np.cumsum(np.cos(edges - step / 2) ** (freedom - 1))
    return float(freedom**0.5 * np.tan(np.interp(0.95 * mass[-1], mass, edges)))


def half_interval(d: np.ndarray) -> float:
    """Half of the 95 percent interval, in points, of the mean of d (seeds, images) of -1, 0 and 1.

    For other seeds and other images: the variances of the mean over both are added, without what
    they share; of one seed for other images alone. As if each model was right alone on one image
    more, so that no interval has the width 0 (Bonett & Price, 2012).
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
    """(points by which `row` is better, half of the 95 percent interval, seeds that both have).

    None without such a seed. Where it is not known which images are right, the interval is for
    other seeds on these images; None of one seed.
    """
    ours, theirs = row.cells(heading), base.cells(heading)
    pairs = [(cell, theirs[seed]) for seed, cell in ours.items() if seed in theirs]
    if not pairs:
        return None
    points = np.array([cell.value - of_base.value for cell, of_base in pairs])
    half = None
    if heading == "clean":
        num = pairs[0][0].num  # without the zeros that fill the last byte
        bits = [cell.right[:num] - of_base.right[:num] for cell, of_base in pairs]
        half = half_interval(np.array(bits))
    elif len(pairs) > 1:
        half = t_95(len(pairs) - 1) * float(points.std(ddof=1)) / len(pairs) ** 0.5
    return float(points.mean()), half, len(pairs)


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
    lines = [[name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for name, *cells in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(rows: list[Row]) -> str:
    """What the last student gained over `control` and `probe`, in numbers; "" without both."""
    students = [row for row in rows if row.model.startswith("student")]
    bases = {row.model: row for row in rows if row.model in ("control", "probe")}
    if not students or "control" not in bases:
        return ""
    student = students[-1]
    sentences = []
    for base, heading in (("control", "clean"), ("control", "corrupted"), ("probe", "clean")):
        gained = difference(student, bases[base], heading) if base in bases else None
        if gained is None:
            continue
        points, half, seeds = gained
        interval = "no interval"
        if half is not None:
            interval = f"95 percent interval {points - half:+.2f} to {points + half:+.2f}"
        cell = next(iter(student.cells(heading).values()))
        images = f"images: {cell.num:,}" if heading == "clean" else "for these images alone"
        gain = f"{student.model} gains {points:+.2f} points over {base} on {heading} images"
        sentences.append(f"{gain} ({interval}; seeds: {seeds}, {images}).")
    best = max(rows, key=lambda row: np.mean(row.values("clean") or 0))
    return " ".join([*sentences, f"The highest clean top-1 is that of {best.name}."])


def gaps_of(shown: dict[str, dict]) -> str:
    """A line for each reason why something could not be measured, or has no mean."""
    gaps = {}  # {reason: {key: None}}
    for entry in shown.values():
        for key, result in entry.items():
            if "gap" in result:
                gaps.setdefault(result["gap"], {})[key] = None
        for part, names in {"imagenet_c": BENCHMARK, "imagenet_p": ALEXNET_FLIPS, "cifar10_c": BENCHMARK}.items():
            items = [entry.get(f"{part}/{name}", {}) for name in names]
            if all("num" in item for item in items) and not are_of_the_same_images(items):
                gaps.setdefault("not all of it is of the same images", {})[f"the mean of {part}"] = None
    lines = [f"Not measured: {', '.join(keys)}: {reason}" for reason, keys in gaps.items()]
    return "\n".join(lines)


def draw(rows: list[Row], headings: list[str], file: Path) -> None:
    """A panel for each heading that is a share of images, in it a bar a model and a dot a seed."""
    shares = [name for name in headings if name not in ("mce", "relative_mce", "mfp", "mfr")]
    plt = pyplot()
    if plt is None or not shares:
        return
    down, across = math.ceil(len(shares) / 4), min(4, len(shares))
    width = 2.6 * across + 0.07 * max(len(row.name) for row in rows)  # inches
    size = (width, (0.25 * len(rows) + 0.8) * down)
    figure, axes = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(shares) :]:
        axis.remove()
    for axis, heading in zip(axes.flat, shares, strict=False):
        for row in reversed(rows):  # upwards
            values = row.values(heading)
            axis.barh(row.name, np.mean(values or np.nan), color="lightsteelblue")
            axis.plot(values, [row.name] * len(values), "k.", markersize=4)
        axis.set_title(heading.replace(" (", "\n("), fontsize="medium")
        axis.grid(axis="x", alpha=0.4)
    figure.supxlabel("top-1 in percent", fontsize="medium")
    save_figure(plt, file)


def report(shown: dict[str, dict], out: Path) -> None:
    rows = rows_of(shown)
    headings = list(dict.fromkeys(k for row in rows for cells in row.columns.values() for k in cells))
    note = "In percent; ± is half of the 95 percent interval. With several seeds it is the standard deviation, "
    note += "except in the last column."
    parts = [markdown_table(rows, headings), note, verdict(rows), gaps_of(shown)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    with write_atomically(out / "robustness.md") as temporary:
        temporary.write_text(text)
    draw(rows, headings, out / "robustness.png")
    print(text, end="")


def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers)
    if args.corrupt:
        import_libraries()
    if args.imagenet_p:
        optional("av", "av", "--imagenet-p")

    evaluation = Evaluation(args, processes)
    val = list_val(args, args.data or evaluation.models[0].data)
    measure_all(args, evaluation, val)
    if evaluation.unreadable:  # from each process, for it alone has seen them
        names = sorted(evaluation.unreadable)
        print(f"{len(names)} unreadable, left out; the first: {names[0]}", flush=True)
    shown = {}
    for path, entry in evaluation.entries.items():
        shown[path] = {key: entry[key] for key in evaluation.asked}
        shown[path]["summary"] = entry["summary"] = summarize(shown[path])
    if not any("top1" in result for entry in shown.values() for result in entry.values()):
        fail(f"nothing to measure: name --data or a released set with the model's classes. {gaps_of(shown)}")
    evaluation.save()
    if processes.rank == 0:
        report(shown, args.out)


if __name__ == "__main__":
    main()
