"""Reading images as a person sees them, the clean view, the random view, large JPEGs that are decoded small."""

import os

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image, ImageDraw

from common import (
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
