"""Make tests/corruptions.npz: what the generators of CIFAR-10-C and ImageNet-C make of three photographs.

    git clone https://github.com/hendrycks/robustness
    pip install scikit-image opencv-python-headless Wand       (apt-get install libmagickwand-6.q16-6)
    python tests/reference_corruptions.py robustness           (tests/corruptions.npz)
    python tests/reference_corruptions.py robustness --compare (and ours against theirs at 32, 64 and 224 pixels)

The generators' own functions run here, from their own files: `TODAY` has the names that their libraries use today, and
takes their random draws from a numpy generator, so that ours can have the same. The photographs are scikit-image's
astronaut (NASA, public domain), chelsea and coffee (both CC0). --compare needs torch and h5py beside it.
"""

import argparse
import ast
import importlib
import importlib.metadata
import json
import sys
import types
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GENERATORS = {32: "make_cifar_c.py", 64: "make_tinyimagenet_c.py", 224: "make_imagenet_c.py"}
TODAY = {
    "multichannel=True": "channel_axis=-1",
    "scipy.ndimage.interpolation": "scipy.ndimage",
    "np.float_": "np.float64",
    "np.fromstring": "np.frombuffer",
    "mode='s&p', amount=c": "mode='s&p', amount=c, rng=draws.rng",
    "np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])": "np.float32([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])",
    "np.random.": "draws.",
}
PHOTOS = {"astronaut": (100, 0, 256), "chelsea": (80, 20, 250), "coffee": (150, 20, 360)}  # left, top, side
SEED = 0


class Draws:
    """The functions of numpy.random that the generators call, from `rng`."""

    def seed(self, *key) -> None:
        self.rng = np.random.default_rng(key)
        self.normal, self.uniform, self.poisson = self.rng.normal, self.rng.uniform, self.rng.poisson
        self.randint = self.rng.integers


def generator(folder: Path, size: int) -> types.SimpleNamespace:
    """The functions of one file; `draws` and `parameters`, {function: what stands in its `c = [...][severity - 1]`}."""
    source = (folder / "ImageNet-C" / "create_c" / GENERATORS[size]).read_text()
    for old, today in TODAY.items():
        assert old in source, old
        source = source.replace(old, today)
    tree, names = ast.parse(source), {"draws": Draws()}
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    unused = ("torch", "DistortImageFolder", "trange")  # reading folders, and the model of an unused attack
    tree.body = [
        node
        for node in tree.body
        if (isinstance(node, kinds) and not any(word in ast.unparse(node) for word in unused))
        or "argtypes" in ast.unparse(node)
    ]
    exec(compile(tree, GENERATORS[size], "exec"), names)
    names["parameters"] = {
        node.name: eval(ast.unparse(line.value.value), {"np": np, "IMSIZE": size})
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for line in node.body
        if isinstance(line, ast.Assign) and ast.unparse(line).startswith("c = ")  # [one value a severity][severity - 1]
    }
    return types.SimpleNamespace(**names)


def photos(size: int) -> np.ndarray:
    """uint8 (3, size, size, 3)"""
    import skimage.data

    images = []
    for name, (left, top, side) in PHOTOS.items():
        image = Image.fromarray(getattr(skimage.data, name)()[..., :3])
        images.append(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
    return np.stack([np.asarray(image) for image in images])


def original(functions: types.SimpleNamespace, name: str, image: np.ndarray, severity: int, number: int) -> np.ndarray:
    functions.draws.seed(SEED, number, severity)
    return np.uint8(getattr(functions, name)(Image.fromarray(image), severity))


def versions() -> dict[str, str]:
    from wand.version import MAGICK_VERSION

    packages = ("numpy", "scipy", "scikit-image", "opencv-python-headless", "pillow", "Wand")
    return {name: importlib.metadata.version(name) for name in packages} | {"ImageMagick": MAGICK_VERSION.split()[1]}


def make(folder: Path) -> None:
    """corruptions.npz: images, of each corruption its 5 severities (each of the next image), versions, parameters."""
    images, functions = photos(32), {size: generator(folder, size) for size in GENERATORS}
    names = [name for name in functions[32].parameters if name != "frost"]
    arrays = {
        name: np.stack([original(functions[32], name, images[i % 3], i + 1, i % 3) for i in range(5)]) for name in names
    }
    parameters = {
        size: {name: [np.array(value).tolist() for value in of_size.parameters[name]] for name in names}
        for size, of_size in functions.items()
    }
    texts = {"versions": json.dumps(versions()), "parameters": json.dumps(parameters)}
    np.savez_compressed(ROOT / "tests" / "corruptions.npz", images=images, **texts, **arrays)


def compare(folder: Path) -> None:
    """A row a corruption: grey levels of difference over the photographs, mean and largest, at the worst severity."""
    sys.path.insert(0, str(ROOT))
    stage = importlib.import_module("06_eval_robustness")
    print(", ".join(" ".join(item) for item in versions().items()), "\n")
    print("| corruption |" + "".join(f" {size} px: mean, largest |" for size in GENERATORS))
    functions = {size: generator(folder, size) for size in GENERATORS}
    images = {size: photos(size) for size in GENERATORS}
    for name in stage.CORRUPTIONS:
        cells = []
        for size in GENERATORS:
            errors = []
            for severity in range(1, 6):
                for number, image in enumerate(images[size]):
                    theirs = original(functions[size], name, image, severity, number).astype(int)
                    ours = stage.corrupt(image, name, severity, np.random.default_rng((SEED, number, severity)))
                    errors.append(abs(ours - theirs))
            by_severity = np.reshape([error.mean() for error in errors], (5, -1)).mean(1)
            cells.append(f" {by_severity.max():.3f}, {max(error.max() for error in errors)} |")
        print(f"| {name} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("robustness", type=Path, help="a clone of github.com/hendrycks/robustness")
    parser.add_argument("--compare", action="store_true", help="print how far ours are from theirs, and write nothing")
    args = parser.parse_args()
    (compare if args.compare else make)(args.robustness)
