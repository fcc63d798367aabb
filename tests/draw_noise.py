"""Draw an image under each op of RandAugment at magnitudes 5, 15 and 27: what a student learns from.

    python tests/draw_noise.py IMAGE --out noise.png --image-size 224

Magnitude 27 is the paper's for B7 and L2. All ops turn, shift or shear to the same side.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import RAND_AUGMENT_OPS  # noise
from common import View, eval_view, load_image  # views

MAGNITUDES = (5, 15, 27)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("noise.png"))
    parser.add_argument("--image-size", type=int, default=224, help="what the noise sees, in pixels")
    args = parser.parse_args()
    view = eval_view(load_image(args.image), View(args.image_size, crop_fraction=1.0))
    batch = torch.from_numpy(view.copy()).permute(2, 0, 1)[None]  # uint8 (1, 3, H, W)
    sign = torch.ones(1, dtype=torch.int64)
    num_rows, num_columns = len(RAND_AUGMENT_OPS), len(MAGNITUDES)
    _, axes = plt.subplots(num_rows, num_columns, figsize=(num_columns * 1.2, num_rows * 1.3))
    for row, (name, op) in zip(axes, RAND_AUGMENT_OPS.items(), strict=True):
        for axis, magnitude in zip(row, MAGNITUDES, strict=True):
            noised = op(batch, magnitude, sign, torch.Generator().manual_seed(0))
            axis.imshow(noised[0].permute(1, 2, 0))
            axis.set_title(f"{name} {magnitude}", fontsize=7)
            axis.set_axis_off()
    plt.subplots_adjust(0.02, 0.01, 0.98, 0.98, hspace=0.3)
    plt.savefig(args.out)


if __name__ == "__main__":
    main()
