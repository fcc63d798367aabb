"""Draw an image under each op of RandAugment at magnitudes 5, 15 and 27, all to the same side.

python tests/draw_noise.py IMAGE OUT.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import RAND_AUGMENT_OPS  # noise
from common import View, eval_view, load_image  # views

MAGNITUDES = (5, 15, 27)
TITLE = 16  # pixels


def draw(image: str | Path, out: str | Path, size: int = 224) -> None:
    view = eval_view(load_image(image), View(size, crop_fraction=1.0))
    batch = torch.from_numpy(view.copy()).permute(2, 0, 1)[None]  # uint8 (1, 3, H, W)
    side = size + TITLE
    sheet = Image.new("RGB", (len(MAGNITUDES) * side, len(RAND_AUGMENT_OPS) * side), "white")
    for row, (name, op) in enumerate(RAND_AUGMENT_OPS.items()):
        for column, magnitude in enumerate(MAGNITUDES):
            noised = op(batch, magnitude, torch.ones(1, dtype=torch.int64), torch.Generator().manual_seed(0))
            ImageDraw.Draw(sheet).text((column * side, row * side + 2), f"{name} {magnitude}", "black")
            tile = Image.fromarray(noised[0].permute(1, 2, 0).numpy())
            sheet.paste(tile, (column * side, row * side + TITLE))
    sheet.save(out)


if __name__ == "__main__":
    draw(*sys.argv[1:])
