"""Draw an image under each op of RandAugment at magnitudes 5, 15 and 27: what a student learns from.

    python tests/draw_noise.py IMAGE --out noise.png --image-size 224

Magnitude 27 is the paper's for B7 and L2. All ops turn, shift or shear to the same side.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import RAND_AUGMENT_OPS  # noise
from common import View, eval_view, load_image  # views

MAGNITUDES = (5, 15, 27)
GAP = 16  # pixels, for the titles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("noise.png"))
    parser.add_argument("--image-size", type=int, default=224, help="what the noise sees, in pixels")
    args = parser.parse_args()
    view = eval_view(load_image(args.image), View(args.image_size, crop_fraction=1.0))
    batch = torch.from_numpy(view.copy()).permute(2, 0, 1)[None]  # uint8 (1, 3, H, W)
    sign = torch.ones(1, dtype=torch.int64)
    side = args.image_size
    sheet = Image.new("RGB", (len(MAGNITUDES) * (side + GAP), len(RAND_AUGMENT_OPS) * (side + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, op) in enumerate(RAND_AUGMENT_OPS.items()):
        for column, magnitude in enumerate(MAGNITUDES):
            noised = op(batch, magnitude, sign, torch.Generator().manual_seed(0))
            x, y = column * (side + GAP), row * (side + GAP)
            draw.text((x, y + 2), f"{name} {magnitude}", "black")
            sheet.paste(Image.fromarray(noised[0].permute(1, 2, 0).numpy()), (x, y + GAP))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
