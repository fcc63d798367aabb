"""tests/draw_noise.py: the picture that shows an image under each op of the noise."""

import subprocess
import sys

from conftest import ROOT, noise_image
from PIL import Image


def test_the_script_draws_a_picture(tmp_path):
    noise_image(80, 60).save(tmp_path / "image.png")
    words = [tmp_path / "image.png", "--out", tmp_path / "noise.png", "--image-size", 48]
    subprocess.run([sys.executable, ROOT / "tests" / "draw_noise.py", *map(str, words)], check=True)
    with Image.open(tmp_path / "noise.png") as image:
        assert image.size == (3 * (48 + 16), 16 * (48 + 16))
        assert len(image.convert("RGB").getcolors(2**24)) > 1000
