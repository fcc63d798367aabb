"""Reading images as a person sees them, the clean view, the random view, large JPEGs that are decoded small, and the
three crop modes, in the functions and through the stages."""

import json
import os
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import assert_mistake, assert_same_weights, checkpoint_of, load_stage, noise_image, save_model
from label_files import read_logits, undo
from PIL import Image, ImageDraw

import common
from common import (
    CROP_MODES,
    Crop,
    ImageDataset,
    View,
    default_crop_fraction,
    eval_view,
    list_images,
    load_image,
    normalize,
    random_view,
)


def clean_view(image, size, fraction, interpolation="bicubic"):
    return eval_view(image, View(size, fraction, interpolation))


def random_crop(image, size, rng, min_area, hflip):
    return random_view(image, Crop(size, min_area, hflip), rng)


def pixels(path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# reading


def test_grey_is_repeated(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, extension):
    deep = np.array([[0, 255, 256, 1000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a.{extension}")
    np.testing.assert_array_equal(pixels(tmp_path / f"a.{extension}")[0, :, 0], deep[0] >> 8)


def test_alpha_is_composited_on_grey_128(tmp_path):
    rgba = np.array([[[200, 0, 50, 255], [200, 0, 50, 0], [200, 0, 50, 128]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = pixels(tmp_path / "a.png")[0].astype(int)
    assert got[0].tolist() == [200, 0, 50]
    assert got[1].tolist() == [128, 128, 128], "the hidden colour shows"
    assert np.abs(got[2] - [164, 64, 89]).max() <= 1


def test_grey_with_alpha_is_composited(tmp_path):
    Image.fromarray(np.array([[[255, 0], [10, 255]]], dtype=np.uint8), "LA").save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [128, 10]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_transparency_is_composited(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert pixels(tmp_path / "a.png")[0].tolist() == [[255, 0, 0], [128, 128, 128], [0, 0, 255]]


def test_one_bit_images_become_black_and_white(tmp_path):
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1").save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0].tolist() == [[0] * 3, [255] * 3]


def test_cmyk_jpeg_is_converted(tmp_path):
    red = Image.new("RGB", (32, 32), (220, 30, 30))
    red.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - [220, 30, 30]).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (24, 16), (10, 10, 10))
    upright.paste((250, 20, 20), (0, 0, 8, 8))  # the upper left corner as a person sees it
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - np.asarray(upright)).max() < 30


def test_animated_gif_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.gif") == [255, 0, 0]).all()


def test_png_named_jpeg_is_read(tmp_path):
    noise_image(8, 8).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", tmp_path / "a.jpeg")
    np.testing.assert_array_equal(pixels(tmp_path / "a.jpeg"), np.asarray(noise_image(8, 8)))


# the clean view


def test_default_crop_fraction():
    assert default_crop_fraction(224) == 0.875
    assert [default_crop_fraction(size) for size in (1, 32, 64)] == [1, 1, 1]
    assert default_crop_fraction(65) == 65 / 97
    assert default_crop_fraction(600) == pytest.approx(0.949, abs=1e-3)


@pytest.mark.parametrize(("image_size", "fraction"), [(32, 1.0), (32, 0.875), (96, 0.75), (28, 0.875)])
def test_eval_view_is_a_centre_crop_then_a_bicubic_resize(image_size, fraction):
    """Of the cropped pixels alone: what lies outside the crop must not shine in at the edges."""
    for width, height in [(50, 60), (61, 47), (32, 32), (300, 200), (7, 500), (1, 1)]:
        image = noise_image(width, height)
        side = max(1, int(fraction * min(width, height)))
        left, top = (width - side + 1) // 2, (height - side + 1) // 2
        crop = image.crop((left, top, left + side, top + side))
        expected = np.asarray(crop.resize((image_size, image_size), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(clean_view(image, image_size, fraction), expected)


def test_eval_view_sees_only_the_centre():
    image = Image.new("RGB", (64, 96), (0, 0, 0))
    image.paste((255, 255, 255), (0, 16, 64, 80))
    assert clean_view(image, 64, 1.0).min() == 255
    assert (clean_view(image, 28, 0.875)[4:-4, 4:-4] == 255).all()


def test_eval_view_interpolates_as_it_is_told():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 51, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    square = image.crop((10, 4, 42, 36))
    for name in "bilinear", "bicubic":
        expected = np.asarray(square.resize((24, 24), Image.Resampling[name.upper()]))
        assert np.array_equal(clean_view(image, 24, 0.8, name), expected)
    assert not np.array_equal(clean_view(image, 24, 0.8, "bilinear"), clean_view(image, 24, 0.8))


def photograph(width: int, height: int) -> Image.Image:
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(0)
    for _ in range(60):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(5, width / 4)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.mark.parametrize(("width", "height", "scale"), [(1001, 770, 8), (333, 500, 4), (260, 255, 2), (250, 139, 1)])
def test_large_jpegs_are_decoded_small_and_look_the_same(width, height, scale, tmp_path):
    for name, exif in (("upright", 1), ("rotated", 6)):
        tags = Image.Exif()
        tags[0x0112] = exif
        photograph(width, height).save(tmp_path / f"{name}.jpg", quality=92, exif=tags)
    rows = list_images(tmp_path)
    view = View(32, 0.9)
    dataset = ImageDataset(rows, clean=view)
    for row, name in enumerate(("rotated", "upright")):
        expected = clean_view(load_image(tmp_path / f"{name}.jpg"), 32, 0.9).astype(int)
        got = dataset[row][1][0].astype(int)
        if scale == 1 or name == "rotated":
            np.testing.assert_array_equal(got, expected)
        else:
            assert (got != expected).any() and np.abs(got - expected).mean() < 1.5
            assert rows.load(row, 72).size == (-(-width // scale), -(-height // scale))
    noised = ImageDataset(rows, view, Crop(32, 0.1, True))
    np.testing.assert_array_equal(noised[1][1][0], clean_view(load_image(tmp_path / "upright.jpg"), 32, 0.9))


# the random view


def test_random_view_keeps_to_area_and_aspect_and_flips_half():
    """The crop is read off two gradients: red counts columns, green counts rows."""
    y, x = np.mgrid[:100, :120]
    image = Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8))
    rng = np.random.default_rng(0)
    areas, aspects, flips = [], [], []
    for _ in range(300):
        view = random_crop(image, 32, rng, 0.3, True).astype(float)
        width, height = (abs(np.ptp(view[8:24, 8:24, c].mean(c))) / 2 * 32 / 15 for c in (0, 1))
        areas.append(width * height / 12000)
        aspects.append(width / height)
        flips.append(view[0, 0, 0] > view[0, -1, 0])
    assert 0.27 < min(areas) < 0.4 and 0.85 < max(areas) < 1.05
    assert min(aspects) > 0.7 and max(aspects) < 1.4
    assert 0.4 < np.mean(flips) < 0.6
    views = [random_crop(image, 32, rng, 0.3, False) for _ in range(50)]
    assert not any(view[0, 0, 0] > view[0, -1, 0] for view in views), "flipped though it must not be"


def test_random_view_of_a_strip_falls_back_to_the_centre():
    image = noise_image(3, 400)
    view = random_crop(image, 32, np.random.default_rng(0), 0.9, False)
    np.testing.assert_array_equal(view, clean_view(image, 32, 1.0))


@pytest.mark.parametrize("image_size", [32, 64, 100])
def test_small_images_come_as_the_clean_view(image_size):
    """Nothing is drawn for it: the noise of small images does that later."""
    image, fraction = photograph(512, 600), 1.0 if image_size <= 64 else 100 / 132
    for hflip in True, False:
        rng = np.random.default_rng(0)
        view = random_crop(image, image_size, rng, None, hflip)
        np.testing.assert_array_equal(view, clean_view(image, image_size, fraction))
        assert rng.random() == np.random.default_rng(0).random()


def test_a_normalized_batch_is_what_the_model_was_made_for():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalize(images, View(32, 1.0, "bicubic", mean, std)), expected, rtol=1e-5, atol=1e-6)


def test_a_view_at_another_size_has_the_crop_of_that_size():
    view = View(224, 0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
    assert view.at(224) is view
    assert view.at(320) == view._replace(image_size=320, crop_fraction=320 / 352)
    assert view.at(64).crop_fraction == 1.0
    assert view.at(320).at(224).crop_fraction == 224 / 256  # it is no longer known


# crop modes: the papers' centre, the whole image squashed, the whole image in a grey square

LONG = [(60, 180), (180, 60), (61, 200), (200, 61), (64, 64), (1, 300), (300, 1)]  # 1:3, 3:1, odd borders, strips


def by_pillow(image: Image.Image, size: int, mode: str, fraction: float = 1.0) -> np.ndarray:
    """The clean view, written down once more."""
    if mode == "border":
        side = max(image.size)
        square = Image.new("RGB", (side, side), (128, 128, 128))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    elif mode == "center":
        side = max(1, int(fraction * min(image.size)))
        left, top = (image.width - side + 1) // 2, (image.height - side + 1) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("image_size", [32, 100])
def test_the_clean_view_in_each_crop_mode(mode, image_size):
    for width, height in LONG:
        image, views = noise_image(width, height), []
        for fraction in (1.0, 0.5):
            views.append(eval_view(image, View(image_size, fraction, crop_mode=mode)))
            np.testing.assert_array_equal(views[-1], by_pillow(image, image_size, mode, fraction))
        # the fraction is the centre square's alone (of one pixel a half is the same pixel)
        assert np.array_equal(*views) == (mode != "center" or min(width, height) == 1), (width, height)


def test_a_border_is_grey_on_both_sides_and_the_image_whole_between_them():
    white = Image.new("RGB", (40, 120), (255, 255, 255))
    view = eval_view(white, View(60, 0.9, crop_mode="border"))[..., 0].astype(int)
    assert (view[:, :18] == 128).all() and (view[:, 42:] == 128).all() and (view[:, 22:38] == 255).all()


@pytest.mark.parametrize("size", [(61, 200), (200, 61)])
def test_random_crops_with_a_border_are_those_of_the_padded_image(size):
    image, side = noise_image(*size), max(size)
    padded = Image.new("RGB", (side, side), (128, 128, 128))
    padded.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    greys = []
    for seed in range(40):
        crop = Crop(32, 0.08, True, "border")
        got = random_view(image, crop, np.random.default_rng(seed))
        expected = random_view(padded, crop._replace(crop_mode="center"), np.random.default_rng(seed))
        np.testing.assert_array_equal(got, expected)
        greys.append((got == 128).all(2).mean())
    assert 0.4 < np.mean(greys) < 0.8


def test_random_crops_of_squashed_images_come_from_the_image_as_it_is():
    image = noise_image(180, 60)
    for seed in range(10):
        crop = Crop(32, 0.08, True, "squash")
        got = random_view(image, crop, np.random.default_rng(seed))
        as_it_is = random_view(image, crop._replace(crop_mode="center"), np.random.default_rng(seed))
        np.testing.assert_array_equal(got, as_it_is)


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("min_area", [None, 1.0])
def test_where_nothing_is_cropped_the_random_view_is_the_clean_one(mode, min_area):
    """For the noise of small images, and where no crop of that area fits after ten tries."""
    for size in LONG[:4]:
        view = random_view(noise_image(*size), Crop(32, min_area, False, mode), np.random.default_rng(0))
        np.testing.assert_array_equal(view, by_pillow(noise_image(*size), 32, mode))


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize("size", [(400, 1200), (1200, 400)])
def test_long_jpegs_are_decoded_small_in_each_crop_mode(mode, size, tmp_path):
    photograph(*size).save(tmp_path / "a.jpg", quality=92)
    dataset, exact = ImageDataset(list_images(tmp_path), clean=View(32, 0.5, crop_mode=mode)), View(32, 1)
    assert dataset.images.load(0, dataset.clean.enough).size < size
    got = dataset[0][1][0].astype(int)
    whole = load_image(tmp_path / "a.jpg")
    assert np.abs(got - by_pillow(whole, 32, mode)).mean() < 2.5
    assert np.abs(got - eval_view(whole, exact)).mean() > 10


def test_a_square_around_a_long_strip_does_not_fill_the_memory(monkeypatch):
    assert max(common.cut(*common.square_around(Image.new("RGB", (2_000_000, 1)))).size) < 9460
    image = photograph(600, 200)
    exact = eval_view(image, View(32, 1, crop_mode="border")).astype(int)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200**2)
    assert common.cut(*common.square_around(image)).size == (200, 200)
    assert np.abs(eval_view(image, View(32, 1, crop_mode="border")) - exact).mean() < 2
    view = random_view(image, Crop(32, 0.5, False, "border"), np.random.default_rng(0))
    assert view.shape == (32, 32, 3)


def test_what_a_view_says_in_a_checkpoint(mistake):
    assert "crop_mode" not in View(32, 1.0).header and View.of(View(32, 1.0).header) == View(32, 1.0)
    view = View(224, 0.9, crop_mode="squash")
    assert view.header["crop_mode"] == "squash" and View.of(view.header) == view
    assert view.at(320).crop_mode == view.at(224).crop_mode == "squash"
    mistake(lambda: View.of({"image_size": 32, "crop_fraction": 1.0, "crop_mode": "letterbox"}), "letterbox", "squash")


SHORT = ["--image-size", 32, "--batch-size", 6, "--epochs", 1, "--optimizer", "sgd", "--lr", 0.01, "--warmup-epochs", 0]
SHORT += ["--average", 0.5, "--num-ops", 1, "--magnitude", 5]
CHEAP = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    """Two classes of upright and lying images of 1:3 and 3:1, which the centre square does not tell from each other."""
    data, rng = tmp_path_factory.mktemp("long") / "data", np.random.default_rng(0)
    for split, num in (("train", 6), ("val", 4), ("unlabeled", 5)):
        for label, name in enumerate(("ends_dark", "ends_light")):
            for i in range(num):
                pixels = rng.integers(0, 256, (32, 96, 3))
                pixels[:, :32] = pixels[:, 64:] = rng.integers(0, 60, (32, 32, 3)) + 190 * label
                pixels = pixels if i % 2 else pixels.transpose(1, 0, 2)
                path = data / split / ("" if split == "unlabeled" else name) / f"{label}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return data


def logits_by_hand(checkpoint, paths, mode):
    """Of the images as Pillow alone makes their views."""
    model, saved = common.load_model(checkpoint)
    size = saved["image_size"]
    views = np.stack([by_pillow(Image.open(path).convert("RGB"), size, mode) for path in paths])
    images = torch.from_numpy(views).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(saved[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return model((images - mean) / std)


@pytest.mark.parametrize("mode", CROP_MODES)
def test_a_crop_mode_goes_through_every_stage(mode, long_data, call_main, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--crop-mode", mode] if mode != "center" else []
    learns = ["--bn-momentum", 0.5, "--epochs", 6, "--optimizer", "adamw", "--lr", 4e-3]
    teach = ["01_train_teacher", "--data", long_data, "--arch", CHEAP, *SHORT, *learns]
    out = tmp_path / "teacher"
    assert call_main(*teach, *flags, "--out", out).returncode == 0
    teacher = out / "model.pt"
    saved = checkpoint_of(teacher)
    assert saved.get("crop_mode") == (mode if flags else None), "the papers' is not written"

    # stopped and resumed, it ends at the same weights; with another mode it does not continue
    resumed = [*teach, *flags, "--out", tmp_path / "resumed"]
    assert call_main(*resumed, stop_after=1).returncode == 143
    other = "squash" if mode == "border" else "border"
    then = f"--crop-mode {mode if flags else None} (now {other})"
    assert_mistake(call_main(*teach, "--crop-mode", other, "--out", tmp_path / "resumed"), then)
    assert call_main(*resumed).returncode == 0
    assert_same_weights(teacher, tmp_path / "resumed" / "model.pt")

    # 02: the labels are those of the views as Pillow makes them
    logits = tmp_path / "l.h5"
    label = ["02_pseudo_label", "--teacher", teacher, "--out", logits]
    assert call_main(*label).returncode == 0
    paths = sorted((long_data / "unlabeled").glob("*.png"))
    expected = logits_by_hand(teacher, paths, mode)
    expected -= expected.amax(1, True)
    assert np.ptp(expected.numpy(), axis=0).max() > 0.05
    torch.testing.assert_close(torch.from_numpy(read_logits(logits)["logits"]).float(), expected, rtol=2e-3, atol=2e-3)
    with h5py.File(logits, "r+") as file:
        assert file.attrs["crop_mode"] == mode
        file.attrs["crop_mode"] = other
    undo(logits, [0])
    assert_mistake(call_main(*label), logits, f"--crop-mode {other}, not {mode}")
    with h5py.File(logits, "r+") as file:
        del file.attrs["crop_mode"]  # an older file is the papers'
    if mode == "center":
        assert call_main(*label).returncode == 0
    else:
        assert_mistake(call_main(*label), logits, f"--crop-mode center, not {mode}")
    with h5py.File(logits, "r+") as file:
        file.attrs["crop_mode"] = mode
    assert call_main(*label).returncode == 0

    # 04 takes it from the logits file, from the teacher, or from the flag
    selection = tmp_path / "b.h5"
    words = [logits, "--out", selection, "--threshold", 0, "--per-class", "all"]
    assert call_main("03_balance", *words).returncode == 0
    learn = ["04_train_student", *SHORT, "--ratio", 1, "--epochs", 0.5]
    labels = ["--pseudo-labels", selection]
    sources = {"file": labels, "on-the-fly": ["--teacher", teacher], "flag": [*labels, "--crop-mode", other]}
    for name, words in sources.items():
        assert call_main(*learn, *words, "--out", tmp_path / name).returncode == 0
        student = common.View.of(checkpoint_of(tmp_path / name / "model.pt"))
        assert student.crop_mode == (other if name == "flag" else mode), name

    # 05 keeps it at another size, 06 measures with it
    words = ["--checkpoint", teacher, "--image-size", 40, "--batch-size", 6, "--epochs", 0.5]
    assert call_main("05_fixres_finetune", *words, "--out", tmp_path / "fixres").returncode == 0
    fixed = tmp_path / "fixres" / "model.pt"
    assert common.View.of(checkpoint_of(fixed)) == common.View.of(saved).at(40)
    words = [teacher, fixed, tmp_path / "flag" / "model.pt", "--out", tmp_path / "r"]
    assert call_main("06_eval_robustness", *words).returncode == 0
    report = json.loads((tmp_path / "r" / "robustness.json").read_text())
    val = sorted((long_data / "val").rglob("*.png"))
    truth = torch.tensor([("ends_dark", "ends_light").index(path.parent.name) for path in val])
    for path, of_view in ((teacher, mode), (fixed, mode), (tmp_path / "flag" / "model.pt", other)):
        found = logits_by_hand(path, val, of_view)
        clean = report[str(path)]["clean"]
        assert clean["loss"] == pytest.approx(torch.nn.functional.cross_entropy(found, truth).item(), rel=1e-3)
        assert clean["top1"] == pytest.approx(100 * (found.argmax(1) == truth).float().mean().item())


def test_on_the_fly_the_teacher_labels_its_own_view(long_data, call_main, tmp_path, monkeypatch):
    teacher = save_model(tmp_path / "t.pt", CHEAP, ("ends_dark", "ends_light"), data=str(long_data), crop_mode="squash")
    stage, seen = load_stage("04_train_student"), []

    class Watched(stage.TeachersLabels):
        def __call__(self, batch):
            seen.append((batch, self.images, super().__call__(batch)))
            return seen[-1][2]

    monkeypatch.setattr(stage, "TeachersLabels", Watched)
    flags = ["--crop-mode", "border", "--clean-unlabeled", *SHORT, "--ratio", 1, "--out", tmp_path / "s"]
    assert call_main("04_train_student", "--teacher", teacher, *flags).returncode == 0 and seen
    for batch, images, probs in seen:
        paths = [images.name(row) for row in batch.rows.tolist()]
        for view, mode in zip(batch.views, ("squash", "border"), strict=True):
            expected = [by_pillow(Image.open(path), 32, mode) for path in paths]
            np.testing.assert_array_equal(view.permute(0, 2, 3, 1).numpy(), np.stack(expected))
        torch.testing.assert_close(probs, logits_by_hand(teacher, paths, "squash").softmax(1), rtol=1e-4, atol=1e-5)
    assert checkpoint_of(tmp_path / "s" / "model.pt")["crop_mode"] == "border"


def test_which_crop_mode_a_run_starts_with(tiny_data, call_main, tmp_path):
    """The flag's, then that of --init, then the teacher's; foreign weights say nothing, unless timm's record does."""
    data = {"data": str(tiny_data)}
    squash, border = (save_model(tmp_path / f"{m}.pt", CHEAP, crop_mode=m, **data) for m in ("squash", "border"))
    center = save_model(tmp_path / "center.pt", CHEAP, **data)
    foreign = tmp_path / "weights.pth"
    torch.save(checkpoint_of(center)["model"], foreign)
    cases = [
        ("01", [], "center"),
        ("01", ["--init", squash], "squash"),
        ("01", ["--init", squash, "--crop-mode", "center"], "center"),
        ("01", ["--init", foreign, "--crop-mode", "border"], "border"),
        ("01", ["--arch", "timm/coat_lite_tiny", "--crop-mode", "squash"], "squash"),
        ("04", ["--teacher", squash], "squash"),
        ("04", ["--teacher", squash, "--init", border], "border"),
        ("04", ["--teacher", squash, "--init", center], "center"),
        ("04", ["--teacher", squash, "--init", foreign], "squash"),
        ("04", ["--teacher", squash, "--init", foreign, "--crop-mode", "center"], "center"),
    ]
    for number, words, expected in cases:
        args = {"init": None, "arch": CHEAP, "crop_mode": None, "teacher": None}
        given = dict(zip(words[::2], words[1::2], strict=True))
        args |= {name.strip("-").replace("-", "_"): value for name, value in given.items()}
        args |= dict.fromkeys(("image_size", "small_images", "epochs", "num_ops", "magnitude", "ratio"))
        args |= {"min_crop_area": 0.08, "hflip": True}
        teacher = checkpoint_of(args["teacher"]) if args["teacher"] else {}
        setup = common.setup_of(common.argparse.Namespace(**args), teacher)
        assert setup.view.crop_mode == setup.crop.crop_mode == expected, (number, words)
    assert common.view_of("timm/coat_lite_medium_384").crop_mode == "squash"
