"""Draw an image under each op of RandAugment at magnitudes 5, 15 and 27: what a student learns from.
Or under each corruption of stage 06 at severities 1, 3 and 5: what it is tested on.

    python tests/draw_noise.py IMAGE --out noise.png --image-size 224
    python tests/draw_noise.py IMAGE --out corruptions.png --image-size 224 --corruptions

Magnitude 27 is the paper's for B7 and L2. Each op turns, shifts or shears to the same side.
"""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import argument_parser, at_least, fail  # the program
from common import RAND_AUGMENT_OPS  # noise
from common import View, eval_view, load_image  # views
from common import pyplot, save_figure  # pictures

MAGNITUDES, SEVERITIES = (5, 15, 27), (1, 3, 5)


def draw_noise(image: Image.Image, out: Path, image_size: int, corruptions: bool = False) -> None:
    """The image as it is and each op lie in two bands of places; a band has a row for each magnitude or severity."""
    if (plt := pyplot()) is None:
        return
    seen = eval_view(image, View(image_size, crop_fraction=1.0))
    if corruptions:
        stage, levels = importlib.import_module("06_eval_robustness"), SEVERITIES
        names = list(stage.CORRUPTIONS)
    else:
        names, levels = list(RAND_AUGMENT_OPS), MAGNITUDES
    batch = torch.from_numpy(seen.copy()).permute(2, 0, 1)[None]  # uint8 (1, 3, H, W)
    plus = torch.ones(1, dtype=torch.int64)  # the sign of the direction

    def noised(name: str, level: int) -> np.ndarray:
        if corruptions:
            return stage.corrupt(seen, name, level, np.random.default_rng(0))
        op = RAND_AUGMENT_OPS[name]
        return op(batch, level, plus, torch.Generator().manual_seed(0))[0].permute(1, 2, 0).numpy()

    columns = len(names) // 2 + 1
    _, axes = plt.subplots(6, columns, figsize=(columns * 1.1, 6 * 1.25), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(seen)
    axes[0, 0].set_title("as it is", fontsize=7)
    for place, name in enumerate(names, 1):
        for row, level in enumerate(levels, len(levels) * (place // columns)):
            axes[row, place % columns].imshow(noised(name, level))
            axes[row, place % columns].set_title(f"{name} {level}".replace("_", " "), fontsize=7)
    save_figure(plt, out)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("image", type=Path, help="any image")
    parser.add_argument("--out", type=Path, default=Path("noise.png"), help="the picture, a PNG")
    parser.add_argument("--image-size", type=at_least(1, int), default=224, help="what the noise sees, in pixels")
    parser.add_argument("--corruptions", action="store_true", help="those of stage 06, at severities 1, 3 and 5")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        image = load_image(args.image)
    except Exception as error:  # decoders raise anything
        fail(f"{args.image}: {type(error).__name__}: {error}")
    draw_noise(image, args.out, args.image_size, args.corruptions)


if __name__ == "__main__":
    main()
