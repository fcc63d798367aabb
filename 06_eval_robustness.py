"""Stage 06: measure how much of a model's accuracy is left on corrupted images and under attack.

A student that was trained with noise on many more images is more accurate than its teacher. It is also much more
robust, although no stage trains it for that (Noisy Student, section 4.3). This stage compares checkpoints on DATA/val.

    clean       top-1, top-5, cross-entropy, and the expected calibration error in percent, over 15 equal bins b of the
                confidence: sum_b n_b / n * |accuracy_b - confidence_b|
    --corrupt   14 of the 15 corruptions of ImageNet-C (Hendrycks & Dietterich, 1903.12261; frost needs photographs)
                and its 4 extra ones at severities 1 to 5, drawn on the fly on the image as the model sees it; top-1 is
                the plain mean over the 14 x 5, top1_extra that over the 4 x 5
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
from functools import lru_cache, partial
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
# fmt: off
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
EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]  # the benchmark keeps them for choosing settings
BENCHMARK = [name for name in CORRUPTIONS if name not in EXTRA]


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="model.pt of any stage: one line of the table each")
    add("--data", type=Path, help="data directory, whose val/ is measured; None: the first checkpoint's own")
    add("--out", type=Path, required=True, help="folder of robustness.json, .md and .png")
    add("--corrupt", action=argparse.BooleanOptionalAction, default=False, help="ImageNet-C's 14 + 4, without frost")
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
# corruptions. What the generator takes from scikit-image, scipy, OpenCV and ImageMagick is written out here, and equals
# them (docs/robustness.md): scikit-image's gaussian (up to 4 standard deviations, edge pixels repeated), OpenCV's
# GaussianBlur of a disk and filter2D (both mirrored at the border), ImageMagick's motion blur (a one-sided Gaussian
# along a line of whole pixels, edge pixels repeated). The benchmark's frost needs photographs of ice, and is left out.
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
    for top in range(0, height, 32):  # a strip that stays in the cache
        strip = out[top : top + 32]
        for dy, dx, weight in taps:
            strip += weight * padded[reach + dy + top :, reach + dx :][: len(strip), :width]
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


def filtered(x: np.ndarray, kernel, border: str) -> np.ndarray:
    """x (H, W) under a 3x3 kernel."""
    taps = [(dy - 1, dx - 1, weight) for (dy, dx), weight in np.ndenumerate(kernel) if weight]
    return weighted_shifts(x[..., None], taps, border)[..., 0]


@lru_cache(64)
def smoothing(size: int, sigma: float, border: str, truncate: int) -> np.ndarray:
    """(size, size): times a column of `size` pixels it is scikit-image's gaussian; for wide ones faster than shifts."""
    radius = int(truncate * sigma + 0.5)
    taps = enumerate(gaussian_taps(sigma, radius).tolist(), -radius)
    return weighted_shifts(np.eye(size)[..., None], [(dy, 0, weight) for dy, weight in taps], border)[..., 0]


def smoothed(planes: np.ndarray, sigma: float, border: str = "edge", truncate: int = 4) -> np.ndarray:
    """Each of the planes (..., H, W) under a Gaussian."""
    down, across = (smoothing(size, sigma, border, truncate) for size in planes.shape[-2:])
    return down @ planes @ across.T


def zoomed(planes: Tensor, factor: float) -> Tensor:
    """The middle of planes (1, C, H, W), at their size: scipy's zoom of order 1, in which the corners stay corners."""
    sides = np.array(planes.shape[2:])
    cut = np.ceil(sides / factor).astype(int)
    larger = np.rint(cut * factor).astype(int)
    (top, left), (above, before) = (sides - cut) // 2, (larger - sides) // 2
    middle = planes[..., top : top + cut[0], left : left + cut[1]]
    out = F.interpolate(middle, size=larger.tolist(), mode="bilinear", align_corners=True)
    return out[..., above : above + sides[0], before : before + sides[1]]


def read_at(image: np.ndarray, x_y: np.ndarray, corners: bool) -> np.ndarray:
    """float32 (H, W, 3) at the places (H, W, 2), interpolated. The border mirrors: at its pixels' centres if `corners`
    (OpenCV's REFLECT_101), else at their outer edges (scipy's "reflect")."""
    sides = np.array(image.shape[1::-1])
    grid = 2 * x_y / np.maximum(sides - 1, 1) - 1 if corners else (2 * x_y + 1) / sides - 1  # torch's: -1 to 1
    planes, grid = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(np.float32(grid))[None]
    out = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=corners)
    return out[0].permute(1, 2, 0).numpy()


def canny(layer: np.ndarray) -> np.ndarray:
    """OpenCV's Canny of uint8 (H, W) with the thresholds 50 and 150 -> bool."""
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    x, y = (filtered(layer.astype(int), kernel, "edge") for kernel in (sobel, sobel.T))
    strength = abs(x) + abs(y)
    padded = np.pad(strength, 1)

    def is_peak(dy, dx):  # in this direction; OpenCV's rule for ties
        after, before = (padded[1 + s * dy :, 1 + s * dx :][: len(x), : x.shape[1]] for s in (1, -1))
        return (strength > before) & (strength >= after + abs(dy * dx))

    flat = abs(y) << 15 < 13573 * abs(x)  # to 22.5 degrees
    steep = abs(y) << 15 > (13573 + (2 << 15)) * abs(x)  # from 67.5 degrees
    peak = np.select([flat, steep, x ^ y >= 0], [is_peak(0, 1), is_peak(1, 0), is_peak(1, 1)], is_peak(1, -1))
    weak, edges, num = peak & (strength > 50), peak & (strength > 150), -1
    while num != (num := edges.sum()):  # weak edges count where they touch others
        edges = weak & filtered(edges, np.ones((3, 3), bool), "constant")
    return edges


def distances(edges: np.ndarray) -> np.ndarray:
    """To the nearest edge pixel of bool (H, W), at most 20, in the steps of OpenCV's 5x5 mask: 1, 1.4 and 2.1969."""
    rows, width = np.arange(len(edges))[:, None], edges.shape[1]
    above = rows - np.maximum.accumulate(np.where(edges, rows, -20))
    below = np.minimum.accumulate(np.where(edges, rows, len(edges) + 20)[::-1])[::-1] - rows
    in_column = np.pad(np.minimum(above, below).clip(max=20), ((0, 0), (20, 20)), constant_values=20)
    far, near = (op(np.arange(21)[:, None], np.arange(21)) for op in (np.maximum, np.minimum))
    steps = np.maximum(65536 * far + 12904 * near, 52226 * far + 39524 * near).clip(max=20 << 16) / 65536
    return np.min([steps[abs(dx)][in_column[:, 20 + dx :][:, :width]] for dx in range(-20, 21)], axis=0)


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


def motion_blur(image, radius_sigma, rng, low=-45, high=45):
    x = weighted_shifts(image / 255, motion_taps(*radius_sigma, angle=rng.uniform(low, high)), "edge")
    return np.uint8(np.rint(x * 65535) // 257)  # ImageMagick computes in 16 bits, and writes the upper 8 of them


def speckle_noise(image, sigma, rng):
    return image / 255 + image / 255 * rng.normal(scale=sigma, size=image.shape)


def glass_blur(image, values, rng):
    sigma, reach, rounds = values
    x = np.uint8(gaussian_blur(image, sigma, rng) * 255)
    places, inside = np.arange(x[..., 0].size), np.zeros(x.shape[:2], bool)
    inside[reach + 1 : max(0, len(x) - reach + 1), reach + 1 : max(0, x.shape[1] - reach + 1)] = True
    movers, inside = np.flatnonzero(inside)[::-1], inside.ravel()
    # From the last pixel to the first, the generator swaps each with a near one, but by views: the first gets the value
    # of the second, then the second gets back its own. So pixels become copies, also of copies that were made before.
    for _ in range(rounds):
        dx, dy = rng.integers(-reach, reach, (len(movers), 2)).T
        source = places.copy()
        source[movers] += dy * x.shape[1] + dx
        is_copy = inside[source] & (source > places)
        while is_copy.any():  # what the copy was made of
            source, is_copy = np.where(is_copy, source[source], source), is_copy & is_copy[source]
        x = x.reshape(-1, 3)[source].reshape(x.shape)
    return gaussian_blur(x, sigma, rng)


def zoom_blur(image, end_step, rng):
    x, factors = torch.from_numpy(np.float32(image / 255)).permute(2, 0, 1)[None], np.arange(1, *end_step)
    return ((x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1))[0].permute(1, 2, 0).numpy()


def snow(image, values, rng):
    mean, deviation, zoom, least, radius, sigma, kept = values
    flakes = torch.from_numpy(rng.normal(mean, deviation, image.shape[:2]))
    flakes = zoomed(flakes[None, None], zoom)[0, 0, :, :, None].numpy()
    flakes = np.uint8(np.where(flakes < least, 0, flakes.clip(0, 1)) * 255)
    flakes = motion_blur(flakes, (radius, sigma), rng, -135, -45) / 255
    x = np.float32(image / 255)
    grey = (x @ np.float32([0.299, 0.587, 0.114]))[..., None]
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5) + flakes + flakes[::-1, ::-1]


def fog(image, values, rng):
    thickness, decay = values
    (height, width), x = image.shape[:2], image / 255
    size, wobble = 2 ** max(1, (max(height, width) - 1).bit_length()), 100.0
    layer = np.zeros((size, size))  # heights of a land, by diamond-square; it wraps around

    def mean(total):
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while (half := size // 2) >= 1:
        corners, centres = layer[::size, ::size], layer[half::size, half::size]
        below, beside = (corners + np.roll(corners, -1, axis) for axis in (0, 1))
        centres[:] = mean(below + np.roll(below, -1, axis=1))
        layer[::size, half::size] = mean(centres + np.roll(centres, 1, axis=0) + beside)
        layer[half::size, ::size] = mean(centres + np.roll(centres, 1, axis=1) + below)
        size, wobble = half, wobble / decay
    layer = (layer - layer.min()) / (layer.max() - layer.min())
    return (x + thickness * layer[:height, :width, None]) * x.max() / (x.max() + thickness)


def brightness(image, amount, rng):
    # V of HSV is the largest of R, G, B. At equal hue and saturation all three scale with it; black becomes grey.
    x, v = image / 255, image.max(axis=2, keepdims=True) / 255
    brighter = np.minimum(v + amount, 1)
    return np.where(v > 0, x / np.where(v > 0, v, 1) * brighter, brighter)


def contrast(image, factor, rng):
    x = image / 255
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(image, values, rng):
    strength, sigma, jitter = values
    (height, width), side = image.shape[:2], min(image.shape[:2]) // 3
    x_y = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
    # Three points go to others: an affine map. Each pixel of the result is read where its inverse leads.
    here = np.float32([width // 2, height // 2]) + np.float32([[side, side], [side, -side], [-side, -side]])
    there = here + np.float32(rng.uniform(-jitter, jitter, here.shape))
    inverse = np.linalg.solve(np.column_stack([there, np.ones(3)]), here)  # (3, 2)
    out = read_at(np.float32(image / 255), x_y @ inverse[:2] + inverse[2], corners=True)
    if strength:
        shifts = strength * smoothed(rng.uniform(-1, 1, (2, height, width)), sigma, "symmetric", 3)
        out = read_at(out, x_y + np.moveaxis(shifts, 0, -1), corners=False)
    return out


def pixelate(image, factor, rng):
    size = image.shape[1::-1]  # width, height
    small = Image.fromarray(image).resize([int(side * factor) for side in size], Image.Resampling.BOX)
    return np.array(small.resize(size, Image.Resampling.BOX))


def jpeg_compression(image, quality, rng):
    Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.array(Image.open(file))


def saturate(image, factor_plus, rng):
    # At equal hue and V, the distance of each value to the largest, V, is in proportion to S. Grey has the hue of red.
    x = image / 255
    v, low = x.max(axis=2, keepdims=True), x.min(axis=2, keepdims=True)
    share = np.where(v > low, (v - x) / np.where(v > low, v - low, 1), [0, 1, 1])  # of the largest distance
    s = (v - low) / np.where(v > 0, v, 1) * factor_plus[0] + factor_plus[1]
    return v - v * np.clip(s, 0, 1) * share


def spatter(image, values, rng):
    mean, deviation, sigma, least, amount, is_mud = values
    x, liquid = image / 255, smoothed(rng.normal(mean, deviation, image.shape[:2]), sigma)
    if is_mud:
        mask = smoothed((liquid > least).astype(float), amount)[..., None]
        mask[mask < 0.8] = 0
        return x * (1 - mask) + mask * np.array([63, 42, 20]) / 255
    # Water is brightest at some distance from the edges of its drops, and lit from one side.
    liquid, box = np.uint8(np.int64(np.where(liquid < least, 0, liquid) * 255)), np.ones((3, 3), int)
    depth = np.uint8(np.float32(filtered(distances(canny(liquid)), box, "reflect") / 9))
    counts = np.bincount(depth.ravel(), minlength=256)
    if others := depth.size - counts[depth.min()]:  # OpenCV's equalizeHist
        depth = np.rint((counts.cumsum() - counts[depth.min()]) * np.float32(255 / others))[depth]
    lit = filtered(depth.astype(int), [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], "reflect").clip(0, 255)
    water = liquid * np.rint(filtered(lit, box, "reflect") / 9)
    return x + (amount * water / max(water.max(), 1))[..., None] * np.array([175, 238, 238]) / 255


# Each maps uint8 (H, W, 3) and its value in CORRUPTIONS to uint8, or to values in 0..1, and draws only from `rng`.
CORRUPTION_OPS = {name: globals()[name] for name in CORRUPTIONS}


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
    means = {"top1": BENCHMARK, "top1_extra": EXTRA}  # each over corruptions x severities
    return {mean: np.mean([items[name] for name in names]).item() for mean, names in means.items()}


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
    corruptions, drawn = (
        list(CORRUPTIONS) if args.corrupt else [],
        chosen | precision | {"corruptions": len(CORRUPTIONS)},
    )
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
            curves[0].plot(range(1, 6), top1[: len(BENCHMARK)].mean(axis=0), "o-", color=color)
            curves[1].plot(top1.mean(axis=1), range(len(CORRUPTIONS)), "o", color=color, alpha=0.8)
    bars.set_xticks(places + width * (len(entries) - 1) / 2, [label.replace(" ", "\n") for label in labels])
    bars.set_ylabel("top-1 in percent")
    if corrupted:
        curves[0].set(xlabel="severity", ylabel="top-1 in percent, mean of the first 14", xticks=range(1, 6))
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
        note = f"Percent of {len(images)} val images; corruptions (all but frost) and attacks: of {len(chosen)}"
        note += f" (seed {args.seed})"
        with write_atomically(args.out / "robustness.md") as temporary:
            temporary.write_text("\n".join([note, *more, "", table]) + "\n")
        draw(names, entries, columns, args.out / "robustness.png")
        print0("\n".join([f"{results_file}: {note}", *more, "", table]))


if __name__ == "__main__":
    main()
