"""tests/draw_noise.py: the picture that shows an image under each op of the noise."""

import sys

import draw_noise
import matplotlib.cbook
import numpy as np
import pytest
import torch
from conftest import ROOT, load_stage
from PIL import Image

from common import RAND_AUGMENT_OPS, View, eval_view, load_image

stage = load_stage("06_eval_robustness")
PHOTO = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)


@pytest.fixture
def panels(monkeypatch):
    """{title: image} of the picture that was drawn last."""
    panels = {}

    def look(plt, path):
        panels.update({axis.get_title(): axis.images[0].get_array() for axis in plt.gcf().axes if axis.images})
        plt.close("all")

    monkeypatch.setattr(draw_noise, "save_figure", look)
    return panels


def test_the_picture_shows_each_op(panels, tmp_path):
    draw_noise.draw_noise(load_image(PHOTO), tmp_path / "noise.png", 100)
    view = eval_view(load_image(PHOTO), View(100, 1.0))
    np.testing.assert_array_equal(panels.pop("as it is"), view)
    titles = [f"{name} {magnitude}" for name in RAND_AUGMENT_OPS for magnitude in (5, 15, 27)]
    assert sorted(panels) == sorted(titles) and len(titles) == 16 * 3
    for title, seen in panels.items():
        name, magnitude = title.split()
        batch = torch.from_numpy(view[None].copy()).permute(0, 3, 1, 2)
        noised = RAND_AUGMENT_OPS[name](batch, int(magnitude), torch.tensor([1]), torch.Generator().manual_seed(0))
        np.testing.assert_array_equal(seen, noised[0].permute(1, 2, 0).numpy(), title)


def test_another_picture_shows_each_corruption(panels, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_noise.py", PHOTO, "--image-size", "40", "--corruptions"])
    draw_noise.main()
    view = eval_view(load_image(PHOTO), View(40, 1.0))
    np.testing.assert_array_equal(panels.pop("as it is"), view)
    assert len(panels) == 18 * 3
    for name in stage.CORRUPTIONS:
        for severity in (1, 3, 5):
            expected = stage.corrupt(view, name, severity, np.random.default_rng(0))
            np.testing.assert_array_equal(panels[f"{name.replace('_', ' ')} {severity}"], expected, name)


def test_the_script_draws_a_picture(run_stage, tmp_path):
    out = tmp_path / "new" / "noise.png"
    run_stage(ROOT / "tests" / "draw_noise.py", PHOTO, "--out", out)
    assert [path.name for path in out.parent.iterdir()] == ["noise.png"]
    with Image.open(out, formats=["PNG"]) as image:
        width, height = image.size
        assert 800 < width < 1600 and 600 < height < 1200
        first = image.convert("RGB").crop((0, 0, width // 9, height // 6))  # "as it is"
    assert len(first.getcolors(2**24)) > 1000


@pytest.fixture
def run(monkeypatch, capsys):
    """run(word, ...) -> (exit status, stderr) of the script in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["draw_noise.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            draw_noise.main()
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("image", ["text.jpg", "half.jpg", "nothing.jpg", "folder.jpg"])
def test_what_is_no_image_is_one_line(image, tmp_path, run):
    (tmp_path / "text.jpg").write_text("hello\nthere\n")
    (tmp_path / "folder.jpg").mkdir()
    with open(PHOTO, "rb") as file:
        (tmp_path / "half.jpg").write_bytes(file.read(20000))
    code, errors = run(tmp_path / image, "--out", tmp_path / "noise.png")
    assert code == 2 and len(errors.splitlines()) == 1 and image in errors
    assert not (tmp_path / "noise.png").exists()


def test_what_cannot_be_written_or_asked_for_is_one_line(tmp_path, run):
    (tmp_path / "file").write_text("")
    for words, named in (
        (("--out", tmp_path), str(tmp_path)),
        (("--out", tmp_path / "file" / "noise.png"), "noise.png"),
        (("--image-size", 0), "--image-size"),
    ):
        code, errors = run(PHOTO, *words)
        assert code == 2 and len(errors.splitlines()) == 1 and named in errors, errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_picture_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_noise.draw_noise(load_image(PHOTO), tmp_path / "noise.png", 32)
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.iterdir())
