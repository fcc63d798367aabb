"""tests/draw_noise.py: the picture that shows an image under each op of the noise."""

import os
import subprocess
import sys

import matplotlib.cbook
from conftest import ROOT
from PIL import Image

PHOTO = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)


def test_the_script_draws_a_picture(tmp_path):
    words = [ROOT / "tests" / "draw_noise.py", PHOTO, "--out", tmp_path / "noise.png", "--image-size", 64]
    subprocess.run([sys.executable, *map(str, words)], check=True, env=os.environ | {"MPLBACKEND": "agg"})
    with Image.open(tmp_path / "noise.png") as image:
        assert image.height > image.width > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 1000
