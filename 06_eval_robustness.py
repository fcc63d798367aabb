"""Stage 06: measure how much of a model's accuracy is left on corrupted images and under attack.

A student that was trained with noise on many more images is more accurate than its teacher. It is also much more
robust, although no stage trains it for that (Noisy Student, section 4.3). This stage compares checkpoints on DATA/val.

    clean       top-1 with its 95 percent interval, top-5, cross-entropy, the expected calibration error in percent over
                15 equal bins b of the confidence (sum_b n_b / n * |accuracy_b - confidence_b|), per class recall and
                precision, the confusion matrix, and the difference to `control` (or the first model), image by image
    --corrupt   14 of the 15 corruptions of ImageNet-C (Hendrycks & Dietterich, 1903.12261; frost needs photographs)
                and its 4 extra ones at severities 1 to 5, drawn on the fly on the image as the model sees it; top-1 is
                the plain mean over the 14 x 5, top1_extra that over the 4 x 5
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
        OUT/robustness.png; OUT/verdict.md, if there are a `control` and a student. The same command again measures only
        what is missing or had other settings or weights.

    python 06_eval_robustness.py runs/demo/teacher/model.pt runs/demo/student1/model.pt --data data/demo \\
        --out runs/demo/robustness --corrupt --fgsm 2 4 --num-images 500
    torchrun --nproc-per-node 8 06_eval_robustness.py ...      (the same numbers, faster)
"""

import argparse
import io
import json
import os
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

from common import add_device_flags, argument_parser, at_least, fail, file_sha256, name_and_folder  # program
from common import print0, write_atomically
from common import Processes, init_processes, progress, reduce_sum, union_of  # processes
from common import fuse_batch_norms, has_names, hint_of, names_in  # models and weights
from common import View, normalize  # views
from common import canny, defocus_taps, distances, filtered, gaussian_taps  # filters
from common import motion_taps, read_at, smoothed, weighted_shifts, zoomed
from common import ImageList, images_by_class, judged_half, labeled_images, list_images  # listing
from common import ImageDataset, StoredViews, Videos, grid_keys, import_av, load_batches, rows_per_batch  # batches
from common import digest_of, load_model, read_checkpoint  # checkpoints
from common import autocast, in_halves, precision_of  # training
from common import compare, details_of, draw_rows, markdown_table  # results
from common import history_of, rows_of, short_names, verdict, worst_pairs

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
DRAWN = [name for name in CORRUPTIONS if name not in EXTRA]  # 14: frost needs photographs of ice


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="model.pt of any stage: one line of the table each")
    add("--data", type=Path, help="data directory, whose val/ is measured; None: the first checkpoint's own")
    add("--out", type=Path, required=True, help="folder of robustness.json, .md, .png and verdict.md")
    add("--val-half", choices=("choose", "judge"), help="half of val/, by the hash of the path; None: all of it")
    add("--classes", type=names_in, metavar="FILE", help="one class a line: the outputs' names if they have none")
    add("--folder", nargs="+", type=name_and_folder, default=[], metavar="NAME=DIR", help="images by class: more sets")
    add("--imagenet-a", type=Path, metavar="DIR", help="DIR/<class>/*: only the classes of the set compete")
    add("--imagenet-r", type=Path, metavar="DIR", help="DIR/<class>/*: only the classes of the set compete")
    add("--imagenet-c", type=Path, metavar="DIR", help="DIR/[noise/ ...]<corruption>/<severity>/<class>/*")
    add("--imagenet-p", type=Path, metavar="DIR", help="DIR/<perturbation>/<class>/*.mp4; needs PyAV")
    add("--cifar10-c", type=Path, metavar="DIR", help="DIR/<corruption>.npy and DIR/labels.npy")
    add("--baseline", type=Path, metavar="JSON", help="robustness.json of one model, for AlexNet in mCE and mFR")
    add("--corrupt", action=argparse.BooleanOptionalAction, default=False, help="ImageNet-C's 14 + 4, without frost")
    add("--fgsm", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 2 4 8 16, in pixel values")
    add("--pgd", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 16, in pixel values")
    add("--pgd-steps", type=at_least(1, int), default=10, help="steps of 2.5 * EPS / steps; paper: 10, size not given")
    add("--num-images", type=at_least(1, int), help="val images for corruptions and attacks; None: all of them")
    add("--batch-size", type=at_least(1, int), help="images at a time a process; None: what fits a cache or a GPU")
    add("--seed", type=at_least(0, int), default=0, help="draws the --num-images images and the corruptions' noise")
    add_device_flags(parser)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# corruptions. What the generator takes from scikit-image, SciPy, OpenCV and ImageMagick is in common's room of filters.
# The benchmark's frost needs photographs of ice, and is left out.
# ---------------------------------------------------------------------------------------------------------------------


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
    x, factors = np.float32(image / 255), np.arange(1, *end_step)
    return (x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(image, values, rng):
    mean, deviation, zoom, least, radius, sigma, kept = values
    flakes = zoomed(rng.normal(mean, deviation, (*image.shape[:2], 1)), zoom)
    flakes = np.uint8(np.where(flakes < least, 0, flakes.clip(0, 1)) * 255)
    flakes = motion_blur(flakes, (radius, sigma), rng, -135, -45) / 255
    x = np.float32(image / 255)
    grey = (x * np.float32([0.299, 0.587, 0.114])).sum(axis=2, keepdims=True)
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
    return v * (1 - share * np.clip(s, 0, 1))


def spatter(image, values, rng):
    mean, deviation, sigma, least, amount, is_mud = values
    x, liquid = image / 255, smoothed(rng.normal(mean, deviation, image.shape[:2]), sigma)
    if is_mud:
        mask = np.float32(smoothed((liquid > least).astype(float), amount))[..., None]
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


def measure_attack(name: str, steps: int, tested: TestedModel, item: str, args, processes: Processes) -> dict:
    dataset, labels = ImageDataset(tested.images[tested.chosen], clean=tested.view), tested.labels[tested.chosen]
    (metrics,) = measure(tested, dataset, labels, f"{name} {item}", args, processes, eps=float(item), steps=steps)
    return {item: metrics["top1"]}


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
        raise OtherClasses(f"{error}{hint_of(classes)}") from error
    if not len(images):
        raise Gap(f"{folder}: no images in its class folders")
    return images, labels


def measure_folder(folder: Path | None, tested: TestedModel, item: str, args, processes: Processes) -> dict:
    """Photographs by class: --folder `item`, or ImageNet-A or -R, of whose 200 classes alone the model can choose."""
    subset, folder = bool(folder), folder or dict(args.folder)[item]
    images, labels = images_of(folder, tested.classes)
    columns = np.unique(labels) if subset else np.arange(len(tested.classes))
    labels = np.searchsorted(columns, labels)
    dataset = ImageDataset(images, clean=tested.view)
    (metrics,) = measure(tested, dataset, labels, folder.name, args, processes, columns=columns)
    found = {name: metrics[name] for name in ("top1", "top5", "num")}
    return found if subset else {item: found}


def measure_imagenet_c(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    """ROOT/<corruption>/<severity>/<class>/, flat or in the archives' folders blur/, digital/, extra/ ..."""
    root, top1 = args.imagenet_c, []
    folders = root / item, *sorted(root.glob(f"*/{item}"))
    if not (folder := next((folder for folder in folders if folder.is_dir()), None)):
        raise Gap(f"{root} has neither {item}/ nor a folder with {item}/ in it")
    for severity in range(1, 6):
        images, labels = images_of(folder / str(severity), tested.classes)
        dataset = ImageDataset(images, clean=tested.view.of_stored)
        (metrics,) = measure(tested, dataset, labels, f"ImageNet-C {item} {severity}", args, processes)
        top1.append(metrics["top1"])
    return {item: {"top1": top1, "num": metrics["num"]}}


def mean_corruption_error(top1: dict[str, list[float]], errors: dict[str, float], clean=(0.0, 0.0)) -> tuple:
    """(mCE or None where one of the 15 is missing, {corruption: CE}), percent (1903.12261, section 4).

    CE: the sum of the errors at the five severities over that of AlexNet. top1 {corruption: [5]}, errors {corruption:
    AlexNet's mean error} in percent. `clean`: the clean errors of both, taken off both sums: the relative CE.
    """
    own, alexnet = clean
    over = {name: errors[name] - alexnet for name in top1 if name in errors}  # 0: nothing to be compared with
    ce = {name: 100 * (100 - sum(top1[name]) / 5 - own) / over[name] for name in over if abs(over[name]) > 1e-9}
    return mean_of({name: [value] for name, value in ce.items()}, BENCHMARK), ce


def summarize_imagenet_c(baseline: dict, items: dict[str, dict], entry: dict) -> dict[str, float]:
    top1 = {name: found["top1"] for name, found in items.items()}
    theirs = {name: found["top1"] for name, found in baseline.get("imagenet_c", {}).get(INSIDE, {}).items()}
    errors = {name: 100 - sum(of_name) / 5 for name, of_name in theirs.items()} or ALEXNET_ERRORS
    mce, ce = mean_corruption_error(top1, errors)
    for name in items:
        items[name]["ce"] = ce.get(name)
    summary = {"top1": mean_of(top1, BENCHMARK), "top1_extra": mean_of(top1, EXTRA), "mce": mce}
    clean = [of["clean"]["top1"] for of in (entry, baseline if theirs else ALEXNET) if "clean" in of]
    if len(clean) == 2:
        summary["relative_mce"], _ = mean_corruption_error(top1, errors, [100 - of_model for of_model in clean])
    summary["num"] = min((found["num"] for found in items.values()), default=None)
    return summary


def mean_of(values: dict[str, list[float]], names: Iterable[str]) -> float | None:
    """The mean over corruptions and severities; None if one of the names is missing."""
    return float(np.mean([values[name] for name in names])) if set(names) <= set(values) else None


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
    dataset = Videos(ImageList(str(folder), paths, zeros, zeros), clean=tested.view.of_stored)
    sums, errors = torch.zeros(3, len(found), dtype=torch.float64), set()  # of each video: read, flips, right
    amp, _ = autocast(precision_of(args.precision, processes), processes.device)
    size = args.batch_size or rows_per_batch(tested.view.image_size, processes.device)
    batches = load_batches(dataset, grid_keys(len(found), 1, processes), processes)
    description = f"{tested.name} ImageNet-P {item}"
    for batch in progress(batches, -(-len(found) // processes.world_size), description, processes):
        errors.update(batch.errors)
        for row in batch.rows.tolist():
            frames = torch.cat(batch.views).split(size)
            logits = [in_halves(partial(tested.logits, amp=amp), part.to(processes.device).float()) for part in frames]
            said = torch.cat(logits).argmax(1).cpu()
            before = said[:1] if "noise" in item else said[:-1]
            means = [(said[1:] != before).double().mean(), (said == labels[row]).double().mean()]
            sums[:, row] = torch.stack([torch.ones(()).double(), *means])
    report_unreadable(description, errors, processes, "videos")
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
    ratios = [flip / normalizers[name] for name, flip in flips.items() if normalizers[name]]
    mfr = 100 * float(np.mean(ratios)) if len(ratios) == len(flips) else None
    mean = {key: float(np.mean([items[name][of] for name in flips])) for key, of in (("mfp", "flip"), ("top1", "top1"))}
    return {"mfr": mfr, **mean, "mfr_normalizers": "the baseline's" if theirs else "AlexNet's, unconfirmed"}


def measure_cifar10_c(tested: TestedModel, item: str, args, processes: Processes) -> dict:
    """ROOT/<corruption>.npy, severity by severity, and ROOT/labels.npy, numbers of CIFAR-10's classes."""
    arrays = []
    for file in (args.cifar10_c / f"{item}.npy", args.cifar10_c / "labels.npy"):
        try:
            arrays.append(np.lib.format.open_memmap(file, mode="r"))
        except (OSError, ValueError) as error:
            raise Gap(f"{file}: cannot be read ({error})") from error
    images, numbers = arrays
    found = f"{images.dtype} {images.shape}, {numbers.dtype} {numbers.shape}"
    expected = f"expected uint8 (5 N, H, W, 3) and as many whole numbers: found {found}"
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) % 5 or not images.size:
        raise Gap(f"{args.cifar10_c / item}.npy: {expected}")
    is_fit = numbers.shape == images.shape[:1] and numbers.dtype.kind in "iu"
    numbers = np.asarray(numbers).reshape(5, -1) if is_fit else np.full((5, 1), -1)
    if (numbers != numbers[0]).any() or numbers.min() < 0 or numbers.max() > 9:
        raise Gap(f"{args.cifar10_c / 'labels.npy'}: not the same labels 0 to 9 for each severity; {expected}")
    if unknown := sorted(set(CIFAR10) - set(tested.classes)):
        raise OtherClasses(f"the model does not have CIFAR-10's classes: {', '.join(unknown[:5])}")
    labels = np.array([tested.classes.index(name) for name in CIFAR10])[numbers[0]]
    dataset = StoredViews(images, tested.view.of_stored)
    severities = measure(tested, dataset, labels, f"CIFAR-10-C {item}", args, processes)
    return {item: [metrics["top1"] for metrics in severities]}


def summarize_cifar10_c(items: dict[str, list[float]], entry: dict) -> dict[str, float]:
    """top1, severity5 of the 15 of the benchmark; _19 with the 4 extra ones (the consistency example's)."""
    values = {"top1": items, "severity5": {name: top1[4:] for name, top1 in items.items()}}
    sets = {"": BENCHMARK, "_19": (*BENCHMARK, *EXTRA)}
    return {f"{key}{end}": mean_of(of_key, names) for end, names in sets.items() for key, of_key in values.items()}


def parts_of(args, data: Path | None, val: tuple | None, num_chosen: int, baseline: dict, processes) -> list[Part]:
    """The table of the parts, in the order in which they are measured and shown."""
    precision = {"precision": precision_of(args.precision, processes)}  # that of attacks is always fp32
    named = {"classes": zlib.crc32("\n".join(args.classes).encode())} if args.classes else {}
    everything = {"data": str(data and data.absolute()), **named}
    everything |= {"num_images": len(val[1]), "images": digest_of(val[0])} if val else {"num_images": 0}
    everything |= {"val_half": args.val_half} if args.val_half else {}
    chosen = everything | {"num_images": num_chosen, "seed": args.seed}
    fgsm_eps, pgd_eps = ([f"{eps:g}" for eps in flag] for flag in (args.fgsm, args.pgd))
    means = lambda items, entry: {"top1": mean_of(items, DRAWN), "top1_extra": mean_of(items, EXTRA)}  # noqa: E731
    fgsm, pgd = partial(measure_attack, "fgsm", 1), partial(measure_attack, "pgd", args.pgd_steps)
    corruptions, drawn = list(CORRUPTIONS) if args.corrupt else [], chosen | precision
    parts = [
        Part("clean", {"clean top-1": "top1"}, ["right"] if data else [], everything | precision, measure_clean),
        Part("corrupt", {"corrupted top-1": "top1"}, corruptions, drawn, measure_corruption, INSIDE, means),
        Part("fgsm", {"FGSM {}": ""}, fgsm_eps, chosen, fgsm),
        Part("pgd", {"PGD {}": ""}, pgd_eps, chosen | {"steps": args.pgd_steps}, pgd),
    ]

    def released(name: str, folder: Path | None, columns: dict, items, measure, *more) -> Part:
        settings = {"folder": str(folder and folder.absolute())} | precision | named
        return Part(name, columns, list(items) if folder else [], settings, measure, *more, of_val=False)

    a, r, c, p = args.imagenet_a, args.imagenet_r, args.imagenet_c, args.imagenet_p
    all_19, folders = (*BENCHMARK, *EXTRA), {name: str(folder.absolute()) for name, folder in args.folder}
    folders |= {
        name: f"{folders[name]}: {digest_of(list_images(folder))}" for name, folder in args.folder if folder.is_dir()
    }
    photographs = partial(measure_folder, None)
    columns_c = {"ImageNet-C top-1": "top1", "mCE": "mce", "relative mCE (unconfirmed)": "relative_mce"}
    columns_p = {f"ImageNet-P mFR{'' if baseline.get('imagenet_p') else ' (unconfirmed)'}": "mfr", "mFP": "mfp"}
    columns_10 = {"CIFAR-10-C top-1": "top1", "severity 5 of 19": "severity5_19"}
    summary_c, summary_p = partial(summarize_imagenet_c, baseline), partial(summarize_imagenet_p, baseline)
    return [
        *parts,
        released("imagenet_a", a, {"ImageNet-A": "top1"}, ["top1"], partial(measure_folder, a)),
        released("imagenet_r", r, {"ImageNet-R": "top1"}, ["top1"], partial(measure_folder, r)),
        released("imagenet_c", c, columns_c, all_19, measure_imagenet_c, INSIDE, summary_c),
        released("imagenet_p", p, columns_p, ALEXNET_FLIPS, measure_imagenet_p, FLIPPED, summary_p),
        released("cifar10_c", args.cifar10_c, columns_10, all_19, measure_cifar10_c, INSIDE, summarize_cifar10_c),
        Part("folders", {"{}": "top1"}, [*folders], folders | precision | named, photographs, of_val=False),
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
    entry = next(iter(results.values()), None)
    if len(results) != 1 or not isinstance(entry, dict):
        fail(f"--baseline {file}: expected the robustness.json of one model, found {len(results)} entries")
    for part, inside, needed in (("imagenet_c", INSIDE, BENCHMARK), ("imagenet_p", FLIPPED, ALEXNET_FLIPS)):
        if lacking := [name for name in needed if part in entry and name not in entry[part].get(inside, {})]:
            fail(f"--baseline {file}: its {part} lacks {', '.join(lacking)}")
    return entry


def save_results(file: Path, results: dict[str, dict], processes: Processes) -> None:
    if processes.is_main:  # another run may have saved other checkpoints there meanwhile
        others = {path: entry for path, entry in read_results(file).items() if path not in results}
        with write_atomically(file) as temporary:
            temporary.write_text(json.dumps(results | others, indent=1))


def items_of(entry: dict, part: Part) -> dict:
    """What the entry has of a part, measured with these settings: {item: result}."""
    then, now = entry["settings"].get(part.name, {}), part.settings
    if part.name == "folders" and part.items:  # others of an earlier command stay
        then, now = now | then, then | now
    found = entry.get(part.name, {}) if then == now else {}
    return found.get(part.inside, {}) if part.inside else found


def store(entry: dict, part: Part, measured: dict) -> None:
    """Add to the entry what was measured. It never mixes two settings: what had others is dropped."""
    items = (kept := items_of(entry, part)) | measured
    entry["settings"][part.name] = (entry["settings"][part.name] if kept else {}) | part.settings
    summary = {name: value for name, value in part.summary(items, entry).items() if value is not None}
    entry[part.name] = {part.inside: items, **summary} if part.inside else items


def headings_of(entry: dict, parts: list[Part]) -> tuple[dict[str, float], dict[str, int]]:
    """({heading: value}, {heading: images}) of what was measured with these settings, now or by an earlier command."""
    values, nums = {}, {}
    for part in parts:
        found = entry[part.name] if items_of(entry, part) else {}
        for heading, key in part.columns.items():
            for item, of_item in found.items() if "{}" in heading else [("", found)]:
                of_item = of_item if isinstance(of_item, dict) else {key: of_item}
                if key in of_item:
                    values[heading.format(item)] = of_item[key]
                    if key in ("", "top1") and (num := of_item.get("num") or part.settings.get("num_images")):
                        nums[heading.format(item)] = num
    return values, nums


def report(results: dict[str, dict], parts: list[Part], val, num_chosen: int, args) -> None:
    """Write robustness.md and .png, and print the table with what must be said of it."""
    rows = rows_of(results, [headings_of(entry, parts) for entry in results.values()])
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
    if "corrupted top-1" in found:
        words.append("Corrupted: 14 of ImageNet-C's 15; frost, which needs photographs of ice, is left out.")
    words.append("± is half of the 95 percent interval, more than that of a mean over corruptions; of several")
    words[-1] += " seeds the standard deviation."
    words += compare(rows)
    words += [f"Gap: {path} {item}: {gap}" for path, entry in results.items() for item, gap in entry["gaps"].items()]
    table = markdown_table(rows, headings)
    pairs = [line for row in rows for line in worst_pairs(row)]
    pairs = ["", "Most confused classes of val, true -> said (of the first seed):", "", *pairs] if pairs else []
    with write_atomically(args.out / "robustness.md") as temporary:
        temporary.write_text("\n".join([*words, *pairs, "", table]) + "\n")
    draw_rows(rows, headings, EXTRA, args.out / "robustness.png")
    last_words = verdict(rows, *history_of(rows))
    (args.out / "verdict.md").unlink(missing_ok=True)  # of an earlier command
    if last_words:
        with write_atomically(args.out / "verdict.md") as temporary:
            temporary.write_text("\n\n".join([*words, table, last_words]) + "\n")
    print0(
        "\n".join([f"{args.out / 'robustness.json'}:", *words, "", table, *(["", last_words] if last_words else [])])
    )


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
    names = args.classes or (val[2] if val else [])
    if args.classes and len(names) != len(classes):
        fail(f"--classes: {len(names)} names, but the model has {len(classes)} outputs")
    return names if len(names) == len(classes) else classes


def labels_in(classes: list[str], val: tuple | None) -> np.ndarray | None:
    """The labels of val as a model numbers its classes; a Gap where val has classes that it does not know."""
    if not val:
        return None
    if unknown := sorted(set(val[2]) - set(classes)):
        raise OtherClasses(
            f"val/ has classes that are unknown to the model: {', '.join(unknown[:5])}{hint_of(classes)}"
        )
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
        what = "clean" if part.name == "clean" else f"{part.name} {item}"
        print0(f"{name} {what}: {' '.join(f'{value:.2f}' for value in np.atleast_1d(top1))}")


def main() -> None:
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # each item is saved when it is done: only one is lost
        signal.signal(number, lambda *_: sys.exit(143))
    processes = init_processes(args.device, args.workers, args.out)
    results_file = args.out / "robustness.json"
    earlier, baseline = read_results(results_file), read_baseline(args.baseline)
    if args.imagenet_p:
        import_av()  # a loader that finds it missing would be a crash

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
    del headers

    chosen = choose_images(val[1], args.num_images or len(val[1]), args.seed) if val else np.zeros(0)
    parts = parts_of(args, val and data, val, len(chosen), baseline, processes)
    if not any(part.items and not (part.of_val and len(gaps) == len(results)) for part in parts):
        fail(gaps[0] if gaps else "nothing to measure: --data, or one of the released sets, says what")
    save = partial(save_results, results_file, results, processes)
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
