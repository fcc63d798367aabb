"""Stage 06: how much of a model's accuracy is left on corrupted images and under attack.

A student that was trained with noise on many more images is not only more accurate but much more robust than its
teacher, without being trained for it (Noisy Student, section 4.3). This stage puts checkpoints side by side on D/val.

    clean       top-1, top-5, cross-entropy, and the expected calibration error in percent, over 15 equal bins b of the
                confidence: sum_b n_b / n * |accuracy_b - confidence_b|
    --corrupt   10 corruptions of ImageNet-C (Hendrycks & Dietterich, 1903.12261) at severities 1 to 5, drawn on the fly
                on the image as the model sees it; top-1 is the plain mean over corruptions x severities
    --fgsm EPS  x' = clip(x + EPS * sign(grad_x loss(x, y)), 0, 255)                     x in pixel values, 0 to 255
    --pgd EPS   --pgd-steps K times x' = clip(x' + 2.5 * EPS / K * sign(grad), x - EPS, x + EPS), cut to 0..255 too

In:  checkpoints of any stage, D/val (matched to each checkpoint's classes by name).
Out: O/robustness.json (every number), O/robustness.md (the table), O/robustness.png. Saved after each finished part;
     the same command again does only what is missing, what other settings need, and what other weights made stale.

    python 06_eval_robustness.py runs/demo/teacher/model.pt runs/demo/student1/model.pt --data data/demo \\
        --out runs/demo/robustness --corrupt --fgsm 2 4 --num-images 500
    torchrun --nproc-per-node 8 06_eval_robustness.py ...      (the same numbers, faster)
"""

import argparse
import io
import json
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import (
    ImageDataset,
    ImageList,
    argument_parser,
    at_least,
    autocast,
    fail,
    file_sha256,
    fuse_batch_norms,
    grid_keys,
    init_processes,
    labeled_images,
    load_batches,
    load_model,
    normalize,
    precision_of,
    progress,
    pyplot,
    read_checkpoint,
    reduce_sum,
    save_figure,
    View,
    write_atomically,
)

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


# ---------------------------------------------------------------------------------------------------------------------
# corruptions. The generator uses scikit-image, OpenCV and ImageMagick; here the three blurs are written out as sums of
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
    """Sum over taps (dy, dx, weight) of weight * x[row + dy, column + dx], x (H, W, channels); border is numpy.pad's"""
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


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """One of CORRUPTIONS at severity 1 to 5: image uint8 (H, W, 3) -> a new one. Values are cut to whole numbers, not
    rounded, as in the generator."""
    height, width = image.shape[:2]
    size = max(height, width)
    value = CORRUPTIONS[name][32 if size <= 48 else 64 if size <= 128 else 224][severity - 1]
    if name == "jpeg_compression":
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=value)
        return np.array(Image.open(file))
    if name == "pixelate":
        small = Image.fromarray(image).resize((int(width * value), int(height * value)), Image.Resampling.BOX)
        return np.array(small.resize((width, height), Image.Resampling.BOX))

    x = image / 255.0
    if name == "gaussian_noise":
        x = x + rng.normal(scale=value, size=x.shape)
    elif name == "shot_noise":
        x = rng.poisson(x * value) / value
    elif name == "impulse_noise":  # each of the three values of a pixel on its own, half of them salt
        hit, salt = rng.random(x.shape) < value, rng.random(x.shape) < 0.5
        x = np.where(hit, salt.astype(x.dtype), x)
    elif name == "gaussian_blur":
        radius = int(4 * value + 0.5)
        taps = gaussian_taps(value, radius)
        x = weighted_shifts(x, [(offset - radius, 0, weight) for offset, weight in enumerate(taps)], "edge")
        x = weighted_shifts(x, [(0, offset - radius, weight) for offset, weight in enumerate(taps)], "edge")
    elif name == "defocus_blur":
        x = weighted_shifts(x, defocus_taps(*value), "reflect")
    elif name == "motion_blur":
        x = weighted_shifts(x, motion_taps(*value, angle=rng.uniform(-45, 45)), "edge")
        return np.uint8(np.rint(x * 65535) // 257)  # ImageMagick computes in 16 bits, and writes the upper 8 of them
    elif name == "brightness":  # V is the largest of R, G, B; at equal hue and saturation all three scale with it
        v = x.max(axis=2, keepdims=True)
        brighter = np.minimum(v + value, 1)
        x = np.where(v > 0, x / np.where(v > 0, v, 1) * brighter, brighter)
    elif name == "contrast":
        mean = x.mean(axis=(0, 1), keepdims=True)
        x = (x - mean) * value + mean
    return np.uint8(np.clip(x, 0, 1) * 255)


class CorruptedImages(ImageDataset):
    """Images with five views: a corruption at severity 1 to 5. Its noise is a function of (seed, corruption, severity,
    index in val) alone, so all models of one image size see the same images, in any number of processes."""

    def __init__(self, rows: ImageList, clean: View, indexes: np.ndarray, corruption: str, seed: int):
        super().__init__(rows, clean, seed=seed)
        self.indexes, self.corruption = indexes, corruption

    def __getitem__(self, row: int):
        row, views, error = super().__getitem__(row)
        if error is None:
            key = [self.seed, zlib.crc32(self.corruption.encode()), int(self.indexes[row])]
            rngs = [np.random.default_rng([*key, severity]) for severity in range(1, 6)]
            views = [corrupt(views[0], self.corruption, severity, rng) for severity, rng in enumerate(rngs, 1)]
        return row, views, error


# ---------------------------------------------------------------------------------------------------------------------
# attacks and measures
# ---------------------------------------------------------------------------------------------------------------------


def attack(model, pixels: Tensor, labels: Tensor, eps: float, steps: int, view) -> Tensor:
    """Projected gradient ascent on the cross-entropy with the true labels; pixels float (N, 3, H, W), eps in 0 to 255.

    With one step this is FGSM: the step, 2.5 eps (Madry et al.'s rule, 1706.06083; the paper does not say its own), is
    cut to the eps ball, so that each value moves by eps. There is no random start, so eps 0 is the clean image.
    """
    low, high = (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=255)
    attacked = pixels
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
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


def measure(model, checkpoint, dataset, labels, processes, args, description, eps=0.0, steps=0) -> list[dict]:
    """metrics_of each view of the images, attacked where `steps` is not 0; all processes, each image exactly once.

    Attacks are in float32 whatever --precision: half of a float16 gradient would be 0, and its sign no attack.
    """
    mean_std = (View.of(checkpoint),)
    amp, _ = autocast("fp32" if steps else args.precision, processes.device)
    labels = torch.from_numpy(labels)
    sums = torch.zeros(5, 4 + 3 * NUM_BINS, dtype=torch.float64, device=processes.device)
    batches = load_batches(dataset, grid_keys(len(dataset), args.batch_size, processes), processes)
    num_batches, errors = -(-len(dataset) // (args.batch_size * processes.world_size)), []
    for batch in progress(batches, num_batches, description, processes):
        errors += batch.errors
        target = labels[batch.rows].to(processes.device)
        for view, images in enumerate(batch.views):
            pixels = images.to(processes.device, non_blocking=True).float()
            if steps:
                pixels = attack(model, pixels, target, eps, steps, *mean_std)
            with torch.inference_mode():
                with amp:
                    logits = model(normalize(pixels, *mean_std))
                sums[view] += batch_sums(logits.float(), target)
    if errors:
        print(f"{description}: {len(errors)} images are unreadable and left out; the first: {errors[0][1]}")
    sums = reduce_sum(sums, processes).cpu()
    if not sums[0, 0]:
        fail("no val image is readable")
    return [metrics_of(view) for view in sums if view[0]]


def choose_images(labels: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """Sorted indexes of `num_images` random images spread evenly over the classes, however the classes are numbered."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank_in_class[members] = np.arange(len(members))
    return np.sort(order[np.argsort(rank_in_class[order], kind="stable")][:num_images])


# ---------------------------------------------------------------------------------------------------------------------
# results: robustness.json, the table, the picture
# ---------------------------------------------------------------------------------------------------------------------


def read_results(file: Path) -> dict:
    """What robustness.json holds, {} where there is none yet."""
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        fail(f"{file}: not the results of an earlier run ({error}); move it away or choose another --out")


def short_names(paths) -> list[str]:
    """runs/demo/student1/model.pt -> student1; the whole path where two share that name."""
    folders = [Path(path).absolute().parent.name for path in paths]
    return [path if folders.count(folder) > 1 else folder for path, folder in zip(paths, folders, strict=True)]


def columns_of(entry: dict, settings: dict) -> dict[str, float]:
    """{column of the table: top-1} of what was evaluated with these settings."""
    parts = {part: entry[part] for part in settings if entry["settings"].get(part) == settings[part]}
    columns = {"clean top-1": parts["clean"]["top1"]}
    if "top1" in parts.get("corrupt", {}):  # there when all corruptions are done
        columns["corrupted top-1"] = parts["corrupt"]["top1"]
    for part in ("fgsm", "pgd"):
        columns |= {f"{part.upper()} {eps}": top1 for eps, top1 in parts.get(part, {}).items()}
    return columns


def markdown_table(results: dict, settings: dict) -> str:
    """A row a model, a column for what was evaluated of any, aligned for reading in a terminal too."""
    columns = [columns_of(entry, settings) for entry in results.values()]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    table = [["model", "parameters", *labels]]
    for name, entry, column in zip(short_names(list(results)), results.values(), columns, strict=True):
        cells = [f"{column[label]:.2f}" if label in column else "-" for label in labels]
        table.append([name, f"{entry['parameters'] / 1e6:.2f}M", *cells])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in table]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict, settings: dict, file: Path) -> None:
    """Bars for the columns of the table; with corruptions also top-1 against severity, and of each corruption."""
    if (plt := pyplot()) is None:
        return
    columns = [columns_of(entry, settings) for entry in results.values()]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    corrupted = any("corrupted top-1" in column for column in columns)
    width = 0.84 / len(results)
    figure, axes = plt.subplots(1, 3 if corrupted else 1, figsize=(15 if corrupted else 8, 4.4), layout="constrained")
    axes = np.atleast_1d(axes)
    for model, (name, entry) in enumerate(zip(short_names(list(results)), results.values(), strict=True)):
        color, column = f"C{model % 10}", columns[model]
        heights = [column.get(label, np.nan) for label in labels]
        bars = axes[0].bar(np.arange(len(labels)) + width * model, heights, width, color=color, label=name)
        axes[0].bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
        if "corrupted top-1" in column:
            top1 = np.array([entry["corrupt"]["per_corruption"][corruption] for corruption in CORRUPTIONS])
            axes[1].plot(range(1, 6), top1.mean(axis=0), "o-", color=color)
            axes[2].plot(top1.mean(axis=1), range(len(CORRUPTIONS)), "o", color=color, alpha=0.8)
    axes[0].set_xticks(np.arange(len(labels)) + width * (len(results) - 1) / 2, [s.replace(" ", "\n") for s in labels])
    axes[0].set_ylabel("top-1 in percent")
    if corrupted:
        axes[1].set(xlabel="severity", ylabel="top-1 in percent, mean of the corruptions", xticks=range(1, 6))
        axes[2].set(xlabel="top-1 in percent, mean of the severities", yticks=range(len(CORRUPTIONS)))
        axes[2].set_yticklabels([corruption.replace("_", " ") for corruption in CORRUPTIONS])
        axes[2].invert_yaxis()
        axes[2].grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=min(5, len(results)), frameon=False)
    save_figure(plt, file)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="model.pt of any stage: one row of the table each")
    add(
        "--data",
        type=Path,
        help="data directory, all of whose val/ is the clean part; None: the first checkpoint's own",
    )
    add("--out", type=Path, required=True, help="folder of robustness.json, .md and .png")
    add("--corrupt", action=argparse.BooleanOptionalAction, default=False, help="10 corruptions at severities 1 to 5")
    add("--fgsm", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 2 4 8 16, in pixel values")
    add("--pgd", nargs="+", type=at_least(0), default=[], metavar="EPS", help="paper: 16, in pixel values")
    add("--pgd-steps", type=at_least(1, int), default=10, help="steps of 2.5 * EPS / steps; paper: 10, size not given")
    add("--num-images", type=at_least(1, int), help="val images for corruptions and attacks; None: all of them")
    add("--batch-size", type=at_least(1, int), default=256, help="images at a time in each process")
    add("--seed", type=at_least(0, int), default=0, help="draws the --num-images images and the corruptions' noise")
    add("--workers", type=at_least(0, int), help="loaders a process; None: 0 on CPUs, its share of the cores on GPUs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs where there are any")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="but of attacks: fp32")
    add("--compile", action="store_true", help="torch.compile the models; pays from some 20,000 images at 224 px on")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # each finished part is saved: only the one in the works is lost
        signal.signal(number, lambda *_: sys.exit(143))
    processes = init_processes(args.device, args.workers)
    results_file = args.out / "robustness.json"
    earlier = read_results(results_file)

    # All checkpoints are looked at before the first is evaluated: a wrong path fails now, not after hours.
    data = args.data or Path(read_checkpoint(args.checkpoints[0])["data"])
    results, labels_of = {}, {}
    for path in args.checkpoints:
        rows, labels_of[path], _ = labeled_images(data, "val", read_checkpoint(path)["classes"])
        fresh = {"sha256": file_sha256(path), "settings": {}}
        results[path] = earlier[path] if earlier.get(path, {}).get("sha256") == fresh["sha256"] else fresh

    # The settings of a part are saved beside it: a part of other settings is done again.
    indexes = choose_images(labels_of[path], args.num_images or len(rows), args.seed)
    chosen_rows = rows[indexes]
    everything = {"data": str(data.absolute()), "num_images": len(rows)}
    chosen = {**everything, "num_images": len(indexes), "seed": args.seed}
    precision = {"precision": precision_of(args.precision, processes.device)}
    settings = {"clean": everything | precision, "corrupt": chosen | precision}
    settings |= {"fgsm": chosen, "pgd": {**chosen, "steps": args.pgd_steps}}
    items_of = {
        "clean": ["top1"],
        "corrupt": list(CORRUPTIONS) if args.corrupt else [],
        "fgsm": [f"{eps:g}" for eps in args.fgsm],
        "pgd": [f"{eps:g}" for eps in args.pgd],
    }

    def save() -> None:
        if processes.is_main:
            others = {path: entry for path, entry in earlier.items() if path not in results}
            with write_atomically(results_file) as temporary:
                temporary.write_text(json.dumps(results | others, indent=1))

    for (path, entry), name in zip(results.items(), short_names(list(results)), strict=True):
        labels, model = labels_of[path], None
        for part, item in [(part, item) for part, items in items_of.items() for item in items]:
            if entry["settings"].get(part) != settings[part]:
                entry["settings"][part] = settings[part]
                entry[part] = {"per_corruption": {}} if part == "corrupt" else {}
            found = entry[part]["per_corruption"] if part == "corrupt" else entry[part]
            if item in found:
                continue
            if model is None:
                model, checkpoint = load_model(path, processes.device)
                entry["parameters"] = sum(parameter.numel() for parameter in model.parameters())
                fuse_batch_norms(model)
                if args.compile:
                    model.compile()
                view = View.of(checkpoint)
            common_args = (processes, args, f"{name} {part} {item}")
            if part == "clean":
                found |= measure(model, checkpoint, ImageDataset(rows, view), labels, *common_args)[0]
            elif part == "corrupt":
                dataset = CorruptedImages(chosen_rows, view, indexes, item, args.seed)
                severities = measure(model, checkpoint, dataset, labels[indexes], *common_args)
                found[item] = [metrics["top1"] for metrics in severities]
                if len(found) == len(CORRUPTIONS):
                    entry[part]["top1"] = sum(map(sum, found.values())) / (5 * len(CORRUPTIONS))
            else:
                steps, dataset = 1 if part == "fgsm" else args.pgd_steps, ImageDataset(chosen_rows, view)
                (metrics,) = measure(
                    model, checkpoint, dataset, labels[indexes], *common_args, eps=float(item), steps=steps
                )
                found[item] = metrics["top1"]
            save()
            if processes.is_main:
                value = found[item]
                shown = " ".join(f"{top1:.2f}" for top1 in (value if isinstance(value, list) else [value]))
                print(f"{name} {part} {item}: {shown}", flush=True)

    save()
    if processes.is_main:
        table = markdown_table(results, settings)
        note = f"Percent of {len(rows)} val images; corruptions and attacks: of {len(indexes)} (seed {args.seed})"
        with write_atomically(args.out / "robustness.md") as temporary:
            temporary.write_text(f"{note}\n\n{table}\n")
        draw(results, settings, args.out / "robustness.png")
        print(f"{results_file}: {note}\n\n{table}")


if __name__ == "__main__":
    main()
