"""Stage 00: write a data directory, with train/<class>/, val/<class>/ and unlabeled/, which the other stages read.

Self-training wants few labelled and many unlabelled images. Real unlabelled images are not balanced, and many are of
no known class. `demo` draws such a world: ten classes that differ in form alone (colour, place, size, light and clutter
say nothing), and unlabelled images of which a fifth are of no class. Image i of a split is a function of (seed, split,
i): its bytes are the same each time. Of the unlabelled images that are of a class,

    images of the k-th most frequent class ~ 10^(-k / 9),  k = 0 ... 9

reads   nothing (demo), or what torchvision downloads into the folder downloads/ beside DIR
writes  DIR/train/<class>/NNNNN.jpg, DIR/val/<class>/NNNNN.jpg, DIR/unlabeled/NNNNN.jpg (.png for downloaded sets)
        DIR/unlabeled_truth.csv: name,class of unlabelled images, for measuring pseudo-labels and not for training;
        the class is empty where an image is of none, and an image whose class is not known has no line
        DIR/prepared.json: what the directory was made with. DIR gets its name only when it is complete.

    python 00_prepare_data.py demo --out data/demo
    python 00_prepare_data.py cifar10 --out data/cifar10 --labels-per-class 400   # downloads into data/downloads

demo: 300 labelled, 6,000 unlabelled (1,200 of no class) and 2,000 val images of 48 x 48 pixels, 14 MB (33 MB of disk
blocks), in 8 to 13 s on one CPU core (n = 8; creating the files is what varies).
"""

import argparse
import contextlib
import csv
import fcntl
import http.client
import json
import os
import shutil
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common import argument_parser, at_least, fail  # the program

DEMO_CLASSES = ["arrow", "crescent", "disc", "heart", "hourglass", "plus", "ring", "square", "star", "triangle"]
NO_CLASS_FORMS = ["blob", "clutter", "discs", "gear", "strokes", "zigzag"]

# How large and how hard the demo is. A pair is the range from which each image draws uniformly; width: of the image.
DEMO = {
    "image_size": 48,  # pixels
    "labels_per_class": 30,  # images in train/, unless --labels-per-class says otherwise
    "val_per_class": 200,  # images
    "unlabeled": 6000,  # images in all
    "no_class_share": 0.2,  # of the unlabelled images
    "imbalance": 10,  # size of the most frequent class / size of the rarest, among the unlabelled images
    "scale": (0.28, 0.44),  # half the figure's size / width
    "position": 0.9,  # of the room that the figure leaves; 0 is always the centre
    "rotation": 20,  # degrees, to either side
    "aspect": (0.78, 1.28),  # x / y
    "shear": 0.2,  # x per y, to either side
    "form_jitter": 0.15,  # relative change of a form's own proportions (hole, arm, waist ...), to either side
    "background": (0, 200),  # of 255; below it so that a figure can be lighter
    "gradient_prob": 0.5,  # the background runs from one colour to another
    "color_distance": 200,  # least |figure - mean background|, summed over R, G, B (0 to 765)
    "lighter_prob": 0.8,  # the figure must be lighter than its background; else it may be either
    "stripes_prob": 0.3,  # the figure has stripes of a second colour
    "stripes_period": (0.1, 0.25),  # / width
    "clutter": (0, 4),  # pieces behind the figure, both ends included
    "clutter_scale": (0.05, 0.16),  # half a piece's size / width
    "occlusion_prob": 0.35,  # a piece lies on the figure
    "occlusion_scale": (0.08, 0.18),  # half its size / width
    "blur_prob": 0.4,
    "blur_sigma": (0.4, 1.1),  # pixels
    "brightness": (0.55, 1.1),  # factor on all pixels
    "light_gradient": (0.0, 0.4),  # relative fall and rise of that factor from the centre to the corners
    "noise_sigma": (3.0, 16.0),  # grey levels of 255
    "jpeg_quality": 90,  # Pillow's scale
}
TRAIN, VAL, UNLABELED, ORDER = range(4)  # second word of the seed of each random stream
NO_CLASS, UNKNOWN = -1, -2  # in place of a class number: the image is of no class; its class is not known
TREE = {"train", "val", "unlabeled", "unlabeled_truth.csv", "prepared.json"}  # all that this script ever writes
Polygons = list[tuple[np.ndarray, int]]  # in drawing order: corners (N, 2) in -1 ... 1 (y down), 1 to fill, 0 to cut
Splits = dict[str, tuple]  # {"train", "val", maybe "unlabeled": (images uint8 (H, W, 3), as many class numbers)}


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("name", choices=["demo", *LOADERS], help="demo is drawn, the others are downloaded")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="data directory to write: a new one")
    parser.add_argument("--seed", type=at_least(0, int), default=0, help="draws the demo, or the images with a label")
    text = f"labelled images a class, the rest becomes unlabeled/; None: {DEMO['labels_per_class']} in demo, else all"
    parser.add_argument("--labels-per-class", type=at_least(1, int), metavar="N", help=text)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# images: drawn (a form in a random place, size, colour and light, with clutter around it and on it) or downloaded
# ----------------------------------------------------------------------------------------------------------------------


def circle(radius=1.0, x: float = 0.0, y: float = 0.0, corners: int = 40) -> np.ndarray:
    """A polygon around (x, y) that starts at the top, (corners, 2). `radius` is one number, or one for each corner."""
    angle = 2 * np.pi * np.arange(corners) / corners
    return np.stack([x + radius * np.sin(angle), y - radius * np.cos(angle)], axis=1)


def bar(start, end, width: float) -> np.ndarray:
    """The four corners of a thick line, (4, 2)."""
    along = np.subtract(end, start)
    across = np.array([-along[1], along[0]]) * (width / 2 / np.hypot(*along))
    return np.stack([start + across, end + across, end - across, start - across])


def form(name: str, rng: np.random.Generator) -> Polygons:
    """A form of DEMO_CLASSES or NO_CLASS_FORMS; its proportions differ a little in each image."""

    def vary(value: float) -> float:
        return value * rng.uniform(1 - DEMO["form_jitter"], 1 + DEMO["form_jitter"])

    t = 2 * np.pi * np.arange(40) / 40
    match name:
        case "arrow":
            a, neck = vary(0.28), vary(0.1)
            return [(np.array([(-1, -a), (neck, -a), (neck, -0.85), (1, 0), (neck, 0.85), (neck, a), (-1, a)]), 1)]
        case "crescent":
            return [(circle(), 1), (circle(vary(0.8), x=vary(0.5)), 0)]
        case "disc":
            return [(circle(), 1)]
        case "heart":
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            return [(np.stack([16 * np.sin(t) ** 3, -2.5 - y], axis=1) / 16, 1)]
        case "hourglass":
            waist = vary(0.15)
            return [(np.array([(-0.85, -1), (0.85, -1), (waist, 0), (0.85, 1), (-0.85, 1), (-waist, 0)]), 1)]
        case "plus":
            arm = vary(0.32)
            return [(bar((0, -1), (0, 1), 2 * arm), 1), (bar((-1, 0), (1, 0), 2 * arm), 1)]
        case "ring":
            return [(circle(), 1), (circle(vary(0.55)), 0)]
        case "square":
            return [(0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), 1)]
        case "star":
            return [(circle(np.tile([1.1, vary(0.45)], 5), corners=10), 1)]
        case "triangle":
            return [(circle(1.1, y=0.2, corners=3), 1)]
        # The forms below are of no class.
        case "blob":
            waves = sum(rng.uniform(0.1, 0.25) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
            return [(circle(0.75 * (1 + waves)), 1)]
        case "discs":
            places = rng.uniform(-0.75, 0.75, (rng.integers(3, 6), 2))
            return [(circle(rng.uniform(0.2, 0.35), x, y), 1) for x, y in places]
        case "gear":
            teeth = rng.integers(8, 12)
            return [(circle(np.tile([1, 1, 0.72, 0.72], teeth), corners=4 * teeth), 1), (circle(vary(0.25)), 0)]
        case "strokes":  # like an unknown letter: 5 of the 9 points of a grid, joined
            points = np.stack(np.divmod(rng.permutation(9)[:5], 3), axis=1) * 0.8 - 0.8
            return [(bar(start, end, vary(0.25)), 1) for start, end in pairwise(points)]
        case "zigzag":
            x = np.linspace(-1, 1, rng.integers(4, 7))
            top = np.stack([x, vary(0.45) * (-1) ** np.arange(len(x)) - 0.2], axis=1)
            return [(np.concatenate([top, np.add(top[::-1], [0, vary(0.4)])]), 1)]
    return []  # "clutter" has no figure


def piece(rng: np.random.Generator) -> Polygons:
    """A piece of clutter: a bar, or a polygon of 3 to 5 corners."""
    if rng.random() < 0.5:
        return [(bar((-1, 0), (1, 0), rng.uniform(0.4, 0.9)), 1)]
    corners = rng.integers(3, 6)
    return [(circle(rng.uniform(0.6, 1.2, corners), corners=corners), 1)]


def coverage(polygons: Polygons, matrix: np.ndarray, center: np.ndarray) -> Image.Image:
    """How much of each pixel the polygons cover, as a grey image. `matrix` and `center` are in widths."""
    size = 3 * DEMO["image_size"]  # drawn three times as large and then averaged, for smooth edges
    mask = Image.new("L", (size, size))
    for corners, inside in polygons:
        ImageDraw.Draw(mask).polygon(((corners @ matrix.T + center) * size).ravel().tolist(), fill=255 * inside)
    return mask.reduce(3)


def turn(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def ramp(rng: np.random.Generator) -> np.ndarray:
    """A plane that rises in a random direction, from -1 in one corner to 1 in another, float32 (H, W)."""
    x, (dx, dy) = np.linspace(-1, 1, DEMO["image_size"], dtype=np.float32), turn(rng.uniform(0, 360))[0].tolist()
    return (dx * x[None, :] + dy * x[:, None]) / (abs(dx) + abs(dy))


def figure_color(rng: np.random.Generator, background: np.ndarray) -> tuple[int, int, int]:
    """The first of 20 random colours that is far enough from `background`; if none is, the farthest."""
    colors = rng.integers(0, 256, (20, 3))
    distance = np.abs(colors - background).sum(1)
    if rng.random() < DEMO["lighter_prob"]:
        distance[colors.sum(1) < background.sum()] = 0
    return tuple(colors[np.minimum(distance, DEMO["color_distance"]).argmax()].tolist())


def draw_image(name: str, rng: np.random.Generator) -> np.ndarray:
    """An image of the form `name`, uint8 (H, W, 3). The order of the draws from `rng` is part of the demo's bytes."""
    # The background, and clutter on it
    size, background = DEMO["image_size"], rng.integers(*DEMO["background"], 3)
    canvas = Image.new("RGB", (size, size), tuple(background.tolist()))
    if rng.random() < DEMO["gradient_prob"]:
        other = rng.integers(*DEMO["background"], 3)
        canvas.paste(tuple(other.tolist()), mask=Image.fromarray((127.5 * (1 + ramp(rng))).astype(np.uint8)))
        background = (background + other) / 2
    for _ in range(rng.integers(*DEMO["clutter"], endpoint=True) + 3 * (name == "clutter")):
        matrix = rng.uniform(*DEMO["clutter_scale"]) * turn(rng.uniform(0, 360))
        canvas.paste(tuple(rng.integers(0, 256, 3).tolist()), mask=coverage(piece(rng), matrix, rng.uniform(0, 1, 2)))

    # The figure: mirrored and stretched, sheared, turned, scaled; perhaps with stripes, and with a piece on top of it
    scale, aspect = rng.uniform(*DEMO["scale"]), rng.uniform(*DEMO["aspect"]) ** 0.5
    stretch = np.diag([rng.choice([-1, 1]) * aspect, 1 / aspect])
    shear = np.array([[1, rng.uniform(-1, 1) * DEMO["shear"]], [0, 1]])
    matrix = scale * turn(rng.uniform(-1, 1) * DEMO["rotation"]) @ shear @ stretch
    center = 0.5 + rng.uniform(-1, 1, 2) * DEMO["position"] * (0.5 - scale)
    mask = coverage(form(name, rng), matrix, center)
    canvas.paste(figure_color(rng, background), mask=mask)
    if rng.random() < DEMO["stripes_prob"]:
        stripes = np.sin(np.pi / rng.uniform(*DEMO["stripes_period"]) * ramp(rng)) > 0
        canvas.paste(figure_color(rng, background), mask=Image.fromarray(np.asarray(mask) * stripes))
    if rng.random() < DEMO["occlusion_prob"]:
        place = center + scale * rng.uniform(0.3, 1) * turn(rng.uniform(0, 360))[0]
        matrix = rng.uniform(*DEMO["occlusion_scale"]) * turn(rng.uniform(0, 360))
        canvas.paste(tuple(rng.integers(0, 256, 3).tolist()), mask=coverage(piece(rng), matrix, place))

    # What a camera adds: the lens's blur, uneven light, the sensor's noise
    if rng.random() < DEMO["blur_prob"]:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(*DEMO["blur_sigma"])))
    light = rng.uniform(*DEMO["brightness"]) * (1 + rng.uniform(*DEMO["light_gradient"]) * ramp(rng))
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * rng.uniform(*DEMO["noise_sigma"])
    return np.clip(np.asarray(canvas) * light[..., None] + noise, 0, 255).astype(np.uint8)


def draw_demo(seed: int, labels_per_class: int) -> tuple[list[str], Splits]:
    """(classes, splits). Each image is drawn only when it is written."""
    num_classes, rng = len(DEMO_CLASSES), np.random.default_rng([seed, ORDER])
    num_no_class = round(DEMO["unlabeled"] * DEMO["no_class_share"])
    share = np.cumsum(DEMO["imbalance"] ** (-np.arange(num_classes) / (num_classes - 1)))
    edges = np.round(share / share[-1] * (DEMO["unlabeled"] - num_no_class)).astype(int)
    long_tail = np.repeat(rng.permutation(num_classes), np.diff(edges, prepend=0))
    unlabeled = rng.permutation(np.append(long_tail, np.full(num_no_class, NO_CLASS)))

    def draw(split: int, labels: np.ndarray) -> Iterator[np.ndarray]:
        for i, label in enumerate(labels):
            image_rng = np.random.default_rng([seed, split, i])
            yield draw_image(DEMO_CLASSES[label] if label >= 0 else image_rng.choice(NO_CLASS_FORMS), image_rng)

    # In train and val the classes take turns, so that with more labels a class the first images stay the same.
    train, val = (np.tile(np.arange(num_classes), num) for num in (labels_per_class, DEMO["val_per_class"]))
    splits = {"train": (TRAIN, train), "val": (VAL, val), "unlabeled": (UNLABELED, unlabeled)}
    return DEMO_CLASSES, {name: (draw(split, labels), labels) for name, (split, labels) in splits.items()}


def load_cifar10(datasets, downloads: Path) -> tuple[list[str], Splits]:
    train, test = (datasets.CIFAR10(downloads, train=train, download=True) for train in (True, False))
    return train.classes, {"train": (train.data, train.targets), "val": (test.data, test.targets)}


def load_svhn(datasets, downloads: Path) -> tuple[list[str], Splits]:
    parts = {"train": "train", "val": "test", "unlabeled": "extra"}
    sets = {split: datasets.SVHN(downloads, split=part, download=True) for split, part in parts.items()}
    return list("0123456789"), {split: (s.data.transpose(0, 2, 3, 1), s.labels) for split, s in sets.items()}


def load_stl10(datasets, downloads: Path) -> tuple[list[str], Splits]:
    parts = {"train": "train", "val": "test", "unlabeled": "unlabeled"}
    sets = {split: datasets.STL10(downloads, split=part, download=True) for split, part in parts.items()}
    splits = {split: (s.data.transpose(0, 2, 3, 1), s.labels) for split, s in sets.items()}
    images, labels = splits["unlabeled"]
    return sets["train"].classes, splits | {"unlabeled": (images, np.full(len(labels), UNKNOWN))}


LOADERS = {"cifar10": load_cifar10, "svhn": load_svhn, "stl10": load_stl10}  # the last two store (N, 3, H, W)


def download(name: str, downloads: Path) -> tuple[list[str], Splits]:
    """(classes, splits) of one of torchvision's data sets. Its files stay in `downloads` for the next time."""
    try:
        from torchvision import datasets

        return LOADERS[name](datasets, downloads)
    except ImportError as error:  # torchvision needs SciPy for SVHN: its files are MATLAB's
        fail(f"{name} needs a package that is not installed ({error}): pip install torchvision scipy")
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        fail(f"{name} could not be downloaded into {downloads} ({reason}): check the network and run this again")


def keep_labels(classes: list[str], splits: Splits, labels_per_class: int, seed: int) -> Splits:
    """Keep `labels_per_class` images of each class in train, and append the others to unlabeled in random order."""
    images, labels = splits["train"][0], np.asarray(splits["train"][1])
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < labels_per_class:
        found = f"class {classes[counts.argmin()]} has {counts.min()} images"
        fail(f"--labels-per-class {labels_per_class}: {found}, ask for that many or fewer")
    order = np.random.default_rng([seed, ORDER]).permutation(len(labels))
    kept = np.sort(np.concatenate([order[labels[order] == c][:labels_per_class] for c in range(len(classes))]))
    rest = order[~np.isin(order, kept)]
    own_images, own_labels = splits.get("unlabeled", (images[:0], labels[:0]))
    # One image at a time: the unlabelled images of SVHN and STL-10 are gigabytes, and a joined array would copy them.
    unlabeled = chain(own_images, (images[i] for i in rest)), np.append(own_labels, labels[rest])
    return splits | {"train": (images[kept], labels[kept]), "unlabeled": unlabeled}


# ----------------------------------------------------------------------------------------------------------------------
# writing the data directory, all of it or nothing
# ----------------------------------------------------------------------------------------------------------------------


def write_tree(root: Path, classes: list[str], splits: Splits, suffix: str) -> str:
    """Write the folders and the truth below `root`, and return in words how many images there are."""
    truth = []
    for split, (images, labels) in splits.items():
        folders = [root / split] if split == "unlabeled" else [root / split / name for name in classes]
        for folder in folders:
            folder.mkdir(parents=True)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folders[0 if split == "unlabeled" else label] / f"{i:05d}{suffix}"
            Image.fromarray(image).save(path, quality=DEMO["jpeg_quality"])  # PNG ignores it
            if split == "unlabeled" and label != UNKNOWN:
                truth.append((path.name, classes[label] if label >= 0 else ""))
    if truth:
        with open(root / "unlabeled_truth.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("name", "class"), *truth])
    per_class = np.bincount(splits["train"][1], minlength=len(classes))
    each = " to ".join(str(num) for num in sorted({per_class.min(), per_class.max()}))
    unlabeled, val = (np.asarray(splits.get(split, ([], []))[1]) for split in ("unlabeled", "val"))
    no_class = f"unlabeled {len(unlabeled)} ({(unlabeled == NO_CLASS).sum()} of no class)"
    return f"train {per_class.sum()} ({len(classes)} classes x {each}), {no_class}, val {len(val)}"


@contextlib.contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """Give a folder beside `out`. At the end of the block it takes the name `out`; after an error it is removed."""
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:  # A lock ends with its process, so a folder without one is what a killed run left.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {out}: another run is writing it, in {partial}: wait for that one, or choose another folder")
    if foreign := {path.name for path in partial.iterdir()} - TREE:
        fail(f"--out {out}: {partial} holds {min(foreign)}, which is none of this script's: move it away")
    try:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield partial
        os.rename(partial, out)  # if somebody has put files in `out` meanwhile, an error, and they stay
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def already_made(out: Path, arguments: dict) -> str | None:
    """The summary of the data set in `out`, None where there is none yet. Anything else in `out` ends the program."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        prepared = json.loads((out / "prepared.json").read_text())
        made_with, summary = prepared["arguments"], prepared["summary"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--out {out}: exists, and was not made by this script: choose a new folder")
    for name, value in json.loads(json.dumps(arguments)).items():  # tuples come back from JSON as lists
        if made_with.get(name) != value:
            difference = "another DEMO table" if name == "demo" else f"{name} {made_with.get(name)}, not {value}"
            fail(f"--out {out}: was made with {difference}: choose a new folder, or delete this one first")
    return summary


def main() -> None:
    args = parse_args()
    if int(os.environ.get("RANK", "0")) > 0:
        return  # under torchrun one process writes everything
    is_demo, out = args.name == "demo", args.out.resolve()
    labels_per_class = args.labels_per_class or (DEMO["labels_per_class"] if is_demo else None)
    arguments = {"name": args.name, "seed": args.seed, "labels_per_class": labels_per_class}
    arguments |= {"demo": DEMO} if is_demo else {}
    try:
        if summary := already_made(out, arguments):
            print(f"already done: {summary}: {args.out}")
            return
        if is_demo:
            classes, splits = draw_demo(args.seed, labels_per_class)
        else:
            classes, splits = download(args.name, out.parent / "downloads")
            if labels_per_class is not None:
                splits = keep_labels(classes, splits, labels_per_class, args.seed)
        with made_whole(out) as partial:
            summary = write_tree(partial, classes, splits, ".jpg" if is_demo else ".png")
            (partial / "prepared.json").write_text(json.dumps({"arguments": arguments, "summary": summary}, indent=1))
    except OSError as error:
        fail(f"--out {args.out}: {error}")
    print(f"{summary}: {args.out}")


if __name__ == "__main__":
    main()
