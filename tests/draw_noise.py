"""Draw an image under each op of RandAugment at magnitudes 5, 15 and 27: what a student learns from.

    python tests/draw_noise.py IMAGE --out noise.png --image-size 224

Magnitude 27 is the paper's for B7 and L2. Each op turns, shifts or shears to the same side.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import argument_parser, at_least, fail  # the program
from common import RAND_AUGMENT_OPS  # noise
from common import View, eval_view, load_image  # views
from common import pyplot, save_figure  # pictures

MAGNITUDES = (5, 15, 27)
COLUMNS = 9  # the image as it is and the 16 ops lie in two bands of 9 places; a band has a row for each magnitude


def draw_noise(image: Image.Image, out: Path, image_size: int) -> None:
    if (plt := pyplot()) is None:
        return
    seen = eval_view(image, View(image_size, crop_fraction=1.0))
    batch = torch.from_numpy(seen.copy()).permute(2, 0, 1)[None]  # uint8 (1, 3, H, W)
    plus = torch.ones(1, dtype=torch.int64)  # the sign of the direction
    _, axes = plt.subplots(6, COLUMNS, figsize=(COLUMNS * 1.1, 6 * 1.25), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(seen)
    axes[0, 0].set_title("as it is", fontsize=7)
    for place, (name, op) in enumerate(RAND_AUGMENT_OPS.items(), 1):
        for row, magnitude in enumerate(MAGNITUDES, len(MAGNITUDES) * (place // COLUMNS)):
            noised = op(batch, magnitude, plus, torch.Generator().manual_seed(0))
            axes[row, place % COLUMNS].imshow(noised[0].permute(1, 2, 0).numpy())
            axes[row, place % COLUMNS].set_title(f"{name} {magnitude}", fontsize=7)
    save_figure(plt, out)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("image", type=Path, help="any image")
    parser.add_argument("--out", type=Path, default=Path("noise.png"), help="the picture, a PNG")
    parser.add_argument("--image-size", type=at_least(1, int), default=224, help="what the noise sees, in pixels")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        image = load_image(args.image)
    except Exception as error:  # decoders raise anything
        fail(f"{args.image}: {type(error).__name__}: {error}")
    draw_noise(image, args.out, args.image_size)


if __name__ == "__main__":
    main()
