"""Stage 00: write a data directory for the other stages, drawn or downloaded.

Real unlabelled images are not balanced, and many are of no class. `demo` draws such a world: ten
classes that differ in form alone, and unlabelled images of which a fifth are of no class, the
others ~ 10^(-k / 9) of the k-th most frequent class, k = 0 ... 9.

reads   nothing (demo), or what torchvision downloads into downloads/ beside DIR
writes  DIR/train/<class>/*.jpg, DIR/val/<class>/*.jpg, DIR/unlabeled/*.jpg (downloads: .png)
        DIR/unlabeled_truth.csv: name,class of the unlabelled images whose class is known (empty:
        none of the classes), to measure pseudo-labels with; DIR/prepared.json: the arguments

    python 00_prepare_data.py demo --out data/demo                     # 14 MB, 10 s on a CPU core
    python 00_prepare_data.py cifar10 --out data/cifar10 --labels-per-class 400
"""

import argparse
import json
import tempfile
from itertools import chain, count, pairwise, repeat
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, ImageFilter

from common import argument_parser, at_least, fail, is_rank0  # the program

DEMO_CLASSES = ["arrow", "crescent", "disc", "heart", "hourglass", "plus", "ring", "square", "star", "triangle"]
NO_CLASS_FORMS = ["blob", "clutter", "discs", "gear", "strokes", "zigzag"]

# How large and how hard the demo is. Each image draws uniformly from a pair.
DEMO = {
    "image_size": 48,  # pixels
    "labels_per_class": 30,
    "val_per_class": 200,
    "unlabeled": 6000,
    "no_class_share": 0.2,  # of the unlabelled images
    "imbalance": 10,  # most frequent class / rarest
    "scale": (0.28, 0.44),  # half the figure / image width
    "position": 0.9,  # of the free room; 0: centred
    "rotation": 20,  # degrees, either way
    "aspect": (0.78, 1.28),  # x / y
    "shear": 0.2,  # x per y, either way
    "form_jitter": 0.15,  # of a form's proportions, relative
    "background": (0, 200),  # of 255: leaves room for lighter figures
    "gradient_prob": 0.5,  # the background has two colours
    "color_distance": 200,  # from the background, summed over R, G, B
    "lighter_prob": 0.8,  # the figure must be lighter
    "stripes_prob": 0.3,  # the figure has two colours
    "stripes_period": (0.1, 0.25),  # / image width
    "clutter": (0, 4),  # pieces behind the figure, 4 included
    "clutter_scale": (0.05, 0.16),  # half a piece / image width
    "occlusion_prob": 0.35,  # a piece lies on the figure
    "occlusion_scale": (0.08, 0.18),
    "blur_prob": 0.4,
    "blur_sigma": (0.4, 1.1),  # pixels
    "brightness": (0.55, 1.1),
    "light_gradient": (0.0, 0.4),  # relative, from centre to corner
    "noise_sigma": (3.0, 16.0),  # of 255
    "jpeg_quality": 90,
}
NO_CLASS = len(DEMO_CLASSES)  # label of an image of none of them


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("name", choices=["demo", "cifar10", "svhn", "stl10"], help="demo is drawn, others downloaded")
    add("--out", type=Path, required=True, metavar="DIR", help="data directory to write")
    add("--seed", type=at_least(0, int), default=0, help="of the demo; of which labels are kept")
    add("--labels-per-class", type=at_least(1, int), help="the rest is unlabeled; None: demo 30, else all")
    return parser.parse_args()


def circle(radius=1.0, x=0.0, y=0.0, corners=40) -> np.ndarray:
    """Corners (corners, 2) around (x, y), from the top on; one radius, or one for each."""
    angle = 2 * np.pi * np.arange(corners) / corners
    return np.stack([x + radius * np.sin(angle), y - radius * np.cos(angle)], axis=1)


def bar(start, end, width: float) -> np.ndarray:
    """The four corners of a thick line, (4, 2)."""
    along = np.subtract(end, start)
    across = np.array([-along[1], along[0]]) * (width / 2 / np.hypot(*along))
    return np.stack([start + across, end + across, end - across, start - across])


def form(name: str, rng: Generator):
    """Yield polygons: corners (N, 2) in -1 ... 1, y down; 1 to fill them, 0 to cut them out."""

    def vary(value):  # the proportions differ in each image
        return value * rng.uniform(1 - DEMO["form_jitter"], 1 + DEMO["form_jitter"])

    t = 2 * np.pi * np.arange(40) / 40
    match name:
        case "arrow":
            a, neck = vary(0.28), vary(0.1)
            yield [(-1, -a), (neck, -a), (neck, -0.85), (1, 0), (neck, 0.85), (neck, a), (-1, a)], 1
        case "disc" | "crescent" | "ring":
            yield circle(), 1
            if name == "crescent":
                yield circle(vary(0.8), x=vary(0.5)), 0
            elif name == "ring":
                yield circle(vary(0.55)), 0
        case "heart":
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            yield np.stack([16 * np.sin(t) ** 3, -2.5 - y], axis=1) / 16, 1
        case "hourglass":
            w = vary(0.15)
            yield [(-0.85, -1), (0.85, -1), (w, 0), (0.85, 1), (-0.85, 1), (-w, 0)], 1
        case "plus":
            width = 2 * vary(0.32)
            yield bar((0, -1), (0, 1), width), 1
            yield bar((-1, 0), (1, 0), width), 1
        case "square":
            yield [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)], 1
        case "star":
            yield circle(np.tile([1.1, vary(0.45)], 5), corners=10), 1
        case "triangle":
            yield circle(1.1, y=0.2, corners=3), 1
        # The forms below are of no class; clutter has no figure.
        case "blob":
            waves = (rng.uniform(0.1, 0.25) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
            yield circle(0.75 * (1 + sum(waves))), 1
        case "discs":
            for x, y in rng.uniform(-0.75, 0.75, (rng.integers(3, 6), 2)):
                yield circle(rng.uniform(0.2, 0.35), x, y), 1
        case "gear":
            teeth = rng.integers(8, 12)
            yield circle(np.tile([1, 1, 0.72, 0.72], teeth), corners=4 * teeth), 1
            yield circle(vary(0.25)), 0
        case "strokes":  # like an unknown letter: 5 of the 9 points of a grid, joined
            points = np.stack(np.divmod(rng.permutation(9)[:5], 3), axis=1) * 0.8 - 0.8
            for start, end in pairwise(points):
                yield bar(start, end, vary(0.25)), 1
        case "zigzag":
            x = np.linspace(-1, 1, rng.integers(4, 7))
            top = np.stack([x, vary(0.45) * (-1) ** np.arange(len(x)) - 0.2], axis=1)
            yield np.concatenate([top, np.add(top[::-1], [0, vary(0.4)])]), 1


def piece(rng: Generator) -> list:
    """A piece of clutter: a bar, or a polygon of 3 to 5 corners."""
    if rng.random() < 0.5:
        return [(bar((-1, 0), (1, 0), rng.uniform(0.4, 0.9)), 1)]
    corners = rng.integers(3, 6)
    return [(circle(rng.uniform(0.6, 1.2, corners), corners=corners), 1)]


def coverage(polygons, matrix, center) -> Image.Image:
    """How much of each pixel the polygons cover. `matrix` and `center`: in image widths."""
    size = 3 * DEMO["image_size"]  # reduced at the end: smooth edges
    mask = Image.new("L", (size, size))
    for corners, inside in polygons:
        pixels = (corners @ matrix.T + center) * size
        ImageDraw.Draw(mask).polygon(pixels.ravel().tolist(), fill=255 * inside)
    return mask.reduce(3)


def turn(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def ramp(rng: Generator) -> np.ndarray:
    """A plane that rises in a random direction, from -1 to 1, float32 (H, W)."""
    x = np.linspace(-1, 1, DEMO["image_size"], dtype=np.float32)
    dx, dy = turn(rng.uniform(0, 360))[0].tolist()
    return (dx * x[None, :] + dy * x[:, None]) / (abs(dx) + abs(dy))


def figure_color(rng: Generator, background: np.ndarray) -> tuple:
    """The first of 20 colours that is far enough from `background`, else the farthest."""
    colors = rng.integers(0, 256, (20, 3))
    distance = np.abs(colors - background).sum(1)
    if rng.random() < DEMO["lighter_prob"]:
        distance[colors.sum(1) < background.sum()] = 0
    return tuple(colors[np.minimum(distance, DEMO["color_distance"]).argmax()])


def draw_image(label: int, seed: tuple[int, ...]) -> np.ndarray:
    """An image, uint8 (H, W, 3). The order of its draws is part of the demo's bytes."""
    rng = default_rng(seed)

    def uniform(key):
        return rng.uniform(*DEMO[key])

    # The background, and clutter on it
    name = rng.choice(NO_CLASS_FORMS) if label == NO_CLASS else DEMO_CLASSES[label]
    size = DEMO["image_size"]
    background = rng.integers(*DEMO["background"], 3)
    canvas = Image.new("RGB", (size, size), tuple(background))
    if rng.random() < DEMO["gradient_prob"]:
        second = rng.integers(*DEMO["background"], 3)
        canvas.paste(tuple(second), mask=Image.fromarray(np.uint8(127.5 * (1 + ramp(rng)))))
        background = (background + second) / 2
    more = 3 if name == "clutter" else 0
    for _ in range(more + rng.integers(*DEMO["clutter"], endpoint=True)):
        matrix = uniform("clutter_scale") * turn(rng.uniform(0, 360))
        canvas.paste(tuple(rng.integers(0, 256, 3)), mask=coverage(piece(rng), matrix, rng.uniform(0, 1, 2)))

    # The figure: stretched, sheared, turned, scaled; perhaps mirrored, striped, partly hidden
    scale = uniform("scale")
    aspect = uniform("aspect") ** 0.5
    stretch = np.diag([rng.choice([-1, 1]) * aspect, 1 / aspect])
    shear = np.array([[1, rng.uniform(-1, 1) * DEMO["shear"]], [0, 1]])
    matrix = scale * turn(rng.uniform(-1, 1) * DEMO["rotation"]) @ shear @ stretch
    center = 0.5 + rng.uniform(-1, 1, 2) * DEMO["position"] * (0.5 - scale)
    mask = coverage(form(name, rng), matrix, center)
    canvas.paste(figure_color(rng, background), mask=mask)
    if rng.random() < DEMO["stripes_prob"]:
        stripes = np.asarray(mask) * (np.sin(np.pi / uniform("stripes_period") * ramp(rng)) > 0)
        canvas.paste(figure_color(rng, background), mask=Image.fromarray(stripes))
    if rng.random() < DEMO["occlusion_prob"]:
        place = center + scale * rng.uniform(0.3, 1) * turn(rng.uniform(0, 360))[0]
        matrix = uniform("occlusion_scale") * turn(rng.uniform(0, 360))
        canvas.paste(tuple(rng.integers(0, 256, 3)), mask=coverage(piece(rng), matrix, place))

    # The camera: blur, uneven light, noise
    if rng.random() < DEMO["blur_prob"]:
        canvas = canvas.filter(ImageFilter.GaussianBlur(uniform("blur_sigma")))
    light = uniform("brightness") * (1 + uniform("light_gradient") * ramp(rng))
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * uniform("noise_sigma")
    return np.uint8(np.clip(np.asarray(canvas) * light[..., None] + noise, 0, 255))


def draw_demo(seed: int, labels_per_class: int) -> tuple[list[str], dict]:
    """(classes, {split: (images, labels)}). An image is drawn when it is written."""
    classes = np.arange(len(DEMO_CLASSES))
    rng = default_rng([seed, 3])  # 0 to 2 are the seeds of the splits
    no_class = [NO_CLASS] * round(DEMO["unlabeled"] * DEMO["no_class_share"])
    share = np.cumsum(DEMO["imbalance"] ** (-classes / classes[-1]))
    edges = np.round(share / share[-1] * (DEMO["unlabeled"] - len(no_class))).astype(int)
    long_tail = np.repeat(rng.permutation(classes), np.diff(edges, prepend=0))

    def split(number, labels):
        return map(draw_image, labels, zip(repeat(seed), repeat(number), count())), labels

    # The classes take turns, so the first images of train do not depend on how many there are.
    return DEMO_CLASSES, {
        "train": split(0, np.tile(classes, labels_per_class)),
        "val": split(1, np.tile(classes, DEMO["val_per_class"])),
        "unlabeled": split(2, rng.permutation(np.append(long_tail, no_class))),
    }


def download(name: str, folder: Path) -> tuple[list[str], dict]:
    """As draw_demo, from torchvision. The downloaded files stay in `folder`."""
    from torchvision import datasets

    dataset = getattr(datasets, name.upper())
    if name == "cifar10":
        parts = [dataset(folder, train=train, download=True) for train in (True, False)]
        splits = [(part.data, np.array(part.targets)) for part in parts]
    else:
        names = ["train", "test", "extra" if name == "svhn" else "unlabeled"]
        parts = [dataset(folder, split=split, download=True) for split in names]
        splits = [(part.data.transpose(0, 2, 3, 1), part.labels) for part in parts]  # (N, 3, H, W)
    classes = list("0123456789") if name == "svhn" else parts[0].classes
    return classes, dict(zip(["train", "val", "unlabeled"], splits, strict=False))


def keep_labels(splits: dict, num: int, seed: int) -> None:
    """Keep `num` images a class in train. The others join unlabeled, in random order."""
    images, labels = splits["train"]
    if np.bincount(labels).min() < num:
        fail(f"--labels-per-class {num}: a class has only {np.bincount(labels).min()} images")
    order = default_rng([seed, 3]).permutation(len(labels))
    kept = np.sort([order[labels[order] == label][:num] for label in np.unique(labels)], axis=None)
    rest = order[~np.isin(order, kept)]
    splits["train"] = images[kept], labels[kept]
    more, more_labels = splits.get("unlabeled", ([], labels[:0]))
    # One image at a time: a joined array would copy the gigabytes of SVHN and STL-10.
    splits["unlabeled"] = chain(more, (images[i] for i in rest)), np.append(more_labels, labels[rest])


def write_tree(root: Path, classes: list[str], splits: dict, suffix: str) -> str:
    """Write images and truth below `root`, and say how many images there are."""
    class_of = dict(enumerate([*classes, ""]))  # STL-10's unlabelled images have the label -1
    truth = "name,class\n"
    for split, (images, labels) in splits.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split
            name = f"{i:05d}{suffix}"
            if split != "unlabeled":
                folder = folder / classes[label]
            elif label in class_of:
                truth += f"{name},{class_of[label]}\n"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name, quality=DEMO["jpeg_quality"])
    if truth != "name,class\n":
        (root / "unlabeled_truth.csv").write_text(truth)
    sizes = ", ".join(f"{split} {len(labels)}" for split, (_, labels) in splits.items())
    return f"{len(classes)} classes; images: {sizes}"


def main() -> None:
    args = parse_args()
    if not is_rank0():  # under torchrun one process writes everything
        return
    is_demo = args.name == "demo"
    num = args.labels_per_class or (DEMO["labels_per_class"] if is_demo else None)
    arguments = {"name": args.name, "seed": args.seed, "labels_per_class": num}
    if is_demo:
        arguments["demo"] = DEMO
    out = args.out.resolve()
    try:
        if out.exists() and any(out.iterdir()):
            prepared = out / "prepared.json"
            made = prepared.read_text() if prepared.exists() else ""
            if not made.startswith(json.dumps({"arguments": arguments}, indent=1)[:-2]):
                fail(f"--out {out}: holds other things, or was made with other flags: choose a new folder")
            print(f"already done: {json.loads(made)['summary']}: {args.out}")
            return
        if is_demo:
            classes, splits = draw_demo(args.seed, num)
        else:
            classes, splits = download(args.name, out.parent / "downloads")
            if num:
                keep_labels(splits, num, args.seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            tree = Path(folder, "data")
            summary = write_tree(tree, classes, splits, ".jpg" if is_demo else ".png")
            made = {"arguments": arguments, "summary": summary}
            (tree / "prepared.json").write_text(json.dumps(made, indent=1))
            tree.rename(out)  # fails if somebody has put files there meanwhile
    except ImportError as error:  # torchvision reads SVHN's files with SciPy
        fail(f"{args.name}: {error}: pip install scipy")
    except (OSError, RuntimeError) as error:  # no network, a full disk
        fail(f"{args.name} --out {args.out}: {error}")
    print(f"{summary}: {args.out}")


if __name__ == "__main__":
    main()
