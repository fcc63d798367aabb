"""The noise: each op of RandAugment against Pillow's, torchvision's or the official arithmetic and how ops are drawn,
and the noise of small images."""

import math
from functools import lru_cache

import matplotlib.cbook
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as torchvision_functional
from PIL import Image, ImageEnhance, ImageOps
from torch.overrides import TorchFunctionMode

import common
import draw_noise
from common import RAND_AUGMENT_OPS, load_image, rand_augment, small_image_noise

SIZES = [(1, 2), (5, 3), (32, 32), (33, 47), (64, 80), (70, 65)]  # height, width
MAGNITUDES = [0, 5, 9, 10, 15, 27]
GREY = (128, 128, 128)
GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"]
PHOTO = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)


@lru_cache
def pictures(size) -> np.ndarray:
    """uint8 (N, H, W, 3): two photographs, noise, and what may go wrong at the ends of a range."""
    rng = np.random.default_rng(size[0])
    photo = load_image(PHOTO)
    photos = [np.asarray(ImageOps.fit(part, size[::-1])) for part in (photo, photo.crop((330, 400, 480, 600)))]
    noise = rng.integers(0, 256, (*size, 3))
    y, x = np.mgrid[: size[0], : size[1]]
    flat = rng.integers(90, 131, (*size, 3))
    smooth = np.stack([x * 255 // size[1], y * 255 // size[0], (x + y) * 255 // sum(size)], axis=-1)
    dark = rng.integers(0, 30, (*size, 3)) + 200 * (rng.random((*size, 1)) < 0.02)
    grey = np.broadcast_to(rng.integers(0, 256, (*size, 1)), (*size, 3))
    one_colour = np.broadcast_to([0, 77, 255], (*size, 3))
    halves = np.broadcast_to(100 + (x + y)[..., None] % 2, (*size, 3))  # the mean, 100.5, is rounded up
    return np.stack([*photos, noise, flat, smooth, dark, grey, one_colour, halves]).astype(np.uint8)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def random_batch(num, *size):
    return torch.randint(256, (num, 3, *size), dtype=torch.uint8, generator=generator_of(0))


def run_op(name, images, magnitude, sign=1, seed=0) -> np.ndarray:
    batch = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
    before = batch.clone()
    signs = torch.full((len(batch),), sign)
    out = RAND_AUGMENT_OPS[name](batch, magnitude, signs, generator_of(seed))
    assert out.dtype == torch.uint8 and out.shape == batch.shape
    assert torch.equal(batch, before), f"{name} changed its input"
    return out.permute(0, 2, 3, 1).numpy()


# the 16 ops


def enhance(kind):
    return lambda image, magnitude: kind(image).enhance(1.8 * magnitude / 10 + 0.1)


def posterized(image, magnitude):
    if magnitude > 10:
        return torchvision_functional.posterize(image, 8 - round(4 * magnitude / 30))
    return ImageOps.posterize(image, max(1, int(4 * magnitude / 10)))


def solarized(image, magnitude):
    if magnitude > 10:
        return torchvision_functional.solarize(image, 255 * (1 - magnitude / 30))
    return ImageOps.solarize(image, int(256 * magnitude / 10))


PILLOW = {
    "AutoContrast": lambda image, magnitude: ImageOps.autocontrast(image),
    "Equalize": lambda image, magnitude: ImageOps.equalize(image),
    "Invert": lambda image, magnitude: ImageOps.invert(image),
    "Posterize": posterized,
    "Solarize": solarized,
    "SolarizeAdd": lambda image, magnitude: image.point(lambda p: min(p + int(11 * magnitude), 255) if p < 128 else p),
    "Color": enhance(ImageEnhance.Color),
    "Contrast": enhance(ImageEnhance.Contrast),
    "Brightness": enhance(ImageEnhance.Brightness),
    "Sharpness": enhance(ImageEnhance.Sharpness),
}


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("size", SIZES)
def test_colour_op_equals_pillows_in_every_pixel(name, size):
    images = pictures(size)
    for magnitude in MAGNITUDES:
        expected = np.stack([np.asarray(PILLOW[name](Image.fromarray(image), magnitude)) for image in images])
        np.testing.assert_array_equal(run_op(name, images, magnitude), expected, f"magnitude {magnitude}")


def test_autocontrast_equals_pillows_for_every_range():
    """All (low, high) at once: the brightest must become 255 and not 254."""
    ramp = np.arange(256)
    pairs = [(low, high) for low in range(0, 256, 15) for high in range(low, 256)]
    images = np.stack([np.clip(ramp, low, high) for low, high in pairs]).astype(np.uint8)
    images = np.repeat(images.reshape(len(pairs), 16, 16, 1), 3, axis=3)
    expected = np.stack([np.asarray(ImageOps.autocontrast(Image.fromarray(image))) for image in images])
    np.testing.assert_array_equal(run_op("AutoContrast", images, 10), expected)


def matrix_of(name, magnitude, sign, size):
    """Output pixel -> input pixel, in pixel indices, of the official ops."""
    height, width = size
    by_level = sign * magnitude / 10
    pixels = 100 if min(size) > 64 else min(size) // 8  # official: 100, for ImageNet
    if name == "Rotate":
        angle = math.radians(30 * by_level)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = (width - 1) / 2, (height - 1) / 2
        return cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos
    return {
        "ShearX": (1, 0.3 * by_level, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * by_level, 1, 0),
        "TranslateX": (1, 0, pixels * by_level, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, pixels * by_level),
    }[name]


def warped(image, matrix, dx=0.0, dy=0.0):
    a, b, c, d, e, f = matrix
    corners = (a, b, c + dx + (1 - a - b) / 2, d, e, f + dy + (1 - d - e) / 2)  # Pillow counts from corners of pixels
    affine, nearest = Image.Transform.AFFINE, Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(image).transform(image.shape[1::-1], affine, corners, nearest, fillcolor=GREY))


NEARBY = [(dx, dy) for dx in (-4e-3, 4e-3) for dy in (-4e-3, 4e-3)]


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", SIZES)
def test_geometric_op_equals_pillows_in_every_pixel(name, size, sign):
    """Halfway between two pixels either is right: Pillow's fixed-point numbers fall to either side."""
    images = pictures(size)[:3]
    for magnitude in MAGNITUDES:
        out = run_op(name, images, magnitude, sign)
        matrix = matrix_of(name, magnitude, sign, size)
        for image, mine in zip(images, out, strict=True):
            same = [(warped(image, matrix, dx, dy) == mine).all(-1) for dx, dy in NEARBY]
            assert np.any(same, axis=0).all(), f"magnitude {magnitude}"
            if name == "Rotate" and min(size) >= 32:  # counter-clockwise for +1, says Pillow
                turned = Image.fromarray(image).rotate(3 * magnitude * sign, fillcolor=GREY)
                assert (np.asarray(turned) != mine).any(-1).mean() < 0.01, f"magnitude {magnitude}"
            if magnitude == 0:
                np.testing.assert_array_equal(mine, image)


def cut(image, center, half):
    """In place, as numpy cuts a slice at the far edge."""
    y, x = center
    image[max(0, y - half) : y + half, max(0, x - half) : x + half] = 128


HALVES = [  # size, magnitude, half of the hole's side
    ((32, 32), 0, 0), ((32, 32), 10, 4), ((32, 32), 27, 10), ((33, 47), 10, 4), ((64, 200), 10, 8), ((65, 65), 5, 20),
    ((224, 224), 27, 108), ((1, 1), 30, 0),
]  # fmt: skip


@pytest.mark.parametrize(("size", "magnitude", "half"), HALVES)
def test_cutout_is_a_grey_square_around_a_uniform_pixel(size, magnitude, half):
    images = np.tile(pictures(size)[:3], (4, 1, 1, 1))
    expected = images.copy()
    centers = (torch.rand(len(images), 2, generator=generator_of(0)) * torch.tensor(size)).long()
    for image, center in zip(expected, centers.tolist(), strict=True):
        cut(image, center, half)
    np.testing.assert_array_equal(run_op("Cutout", images, magnitude), expected)


# how they are drawn, and what a result must not depend on

NOISES = [rand_augment, lambda images, generator: small_image_noise(images, True, generator)]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("num", "size"), [(2000, (32, 32)), (20, (224, 224))])
def test_the_layout_changes_nothing_and_the_input_stays(num, size, noise):
    """Each op gets a part of its images at a time: so many that there are several parts."""
    images = random_batch(num, *size).contiguous(memory_format=torch.channels_last)
    before = images.contiguous()
    out = noise(images, generator=generator_of(1))
    assert torch.equal(images, before)
    assert torch.equal(out, noise(before, generator=generator_of(1)))
    assert not torch.equal(out, noise(before, generator=generator_of(2)))


class PretendedGpu(TorchFunctionMode):
    """For the code that only GPUs run, without one: tensors say that they are elsewhere, and stay."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "device"}
        if func == torch.Tensor.device.__get__:
            return torch.device("meta")
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            return args[0].to(*args[2:]) if args[2:] else args[0]
        assert func is not torch.Tensor.numpy, "a GPU's tensor has no numpy()"
        return func(*args, **kwargs)


@pytest.mark.parametrize("noise", NOISES)
def test_gpus_get_the_same(noise):
    images = torch.from_numpy(pictures((33, 47))).permute(0, 3, 1, 2).repeat(40, 1, 1, 1)
    expected = noise(images, generator=generator_of(0))
    if torch.cuda.is_available():
        got = noise(images.cuda(), generator=generator_of(0)).cpu()
    else:
        with PretendedGpu():
            got = noise(images, generator=generator_of(0))
    assert torch.equal(got, expected)


def test_no_ops_no_images_one_image():
    images = torch.from_numpy(pictures((32, 32))).permute(0, 3, 1, 2)
    assert torch.equal(rand_augment(images, num_ops=0), images)
    assert rand_augment(images[:0]).shape == small_image_noise(images[:0], True).shape == (0, 3, 32, 32)
    assert rand_augment(images[:1], 20, 27, generator_of(0)).shape == (1, 3, 32, 32)


def record_draws(monkeypatch, num):
    """(op, sign) of each draw of two: the ops note their number and sign in the image, and move it on."""
    for number, name in enumerate(list(RAND_AUGMENT_OPS)):

        def note(images, magnitude, sign, generator, number=number):
            assert magnitude == 13 and (sign.abs() == 1).all()
            noted = images.roll(1, dims=3)
            noted[..., 0] = (1 + 2 * number + (sign > 0)).byte().view(-1, 1, 1)
            return noted

        monkeypatch.setitem(RAND_AUGMENT_OPS, name, note)
    out = rand_augment(torch.zeros(num, 3, 1, 3, dtype=torch.uint8), 2, 13, generator_of(0))
    codes = out[:, 0, 0].int()
    assert (codes[:, :2] > 0).all() and (codes[:, 2] == 0).all(), "not two ops for each image"
    return (codes[:, :2] - 1) // 2, (codes[:, :2] - 1) % 2


def chi_square(values, num_values):
    expected = len(values) / num_values
    return ((torch.bincount(values, minlength=num_values) - expected) ** 2 / expected).sum()


def test_ops_are_drawn_uniformly_with_replacement_and_signs_are_fair(monkeypatch):
    """The bounds are 0.999 quantiles of chi-square with 31 and 255 degrees of freedom."""
    ops, signs = record_draws(monkeypatch, 12800)
    for layer in range(2):
        assert chi_square(2 * ops[:, layer] + signs[:, layer], 32) < 61.1, "the sign depends on the op, or is not fair"
    assert chi_square(16 * ops[:, 0] + ops[:, 1], 256) < 330.5, "the second op depends on the first"
    assert chi_square(16 * ops[:-1, 0] + ops[1:, 0], 256) < 330.5, "an op depends on the image before"


# small images: a hole, a shift, a flip


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (48, 32), (7, 7), (1, 1)])
@pytest.mark.parametrize("hflip", [True, False])
def test_small_image_noise_is_a_hole_a_reflected_shift_and_a_flip(size, hflip):
    images = np.tile(pictures(size), (8, 1, 1, 1))
    num, (height, width), side = len(images), size, min(size)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    before, generator = batch.clone(), generator_of(3)
    out = small_image_noise(batch, hflip, generator_of(3)).permute(0, 2, 3, 1).numpy()
    assert torch.equal(batch, before)
    centers = (torch.rand(num, 2, generator=generator) * torch.tensor(size)).long().tolist()
    shifts = torch.randint(-(side // 8), side // 8 + 1, (num, 2), generator=generator).tolist()
    mirrored = torch.rand(num, generator=generator) < 0.5
    for image, center, (dy, dx), mirror, mine in zip(images, centers, shifts, mirrored, out, strict=True):
        cut(image, center, side // 4)
        by = side // 8
        moved = np.pad(image, ((by, by), (by, by), (0, 0)), mode="reflect")[by + dy :, by + dx :][:height, :width]
        np.testing.assert_array_equal(mine, moved[:, ::-1] if hflip and mirror else moved)


@pytest.mark.parametrize("name", [*PILLOW, *GEOMETRIC, "Cutout"])
def test_below_a_models_resolution_translation_and_cutout_alone_shrink(name, monkeypatch):
    """In proportion: magnitude 6 at 150 of 600 pixels is as 1.5. B7's 270 pixels would empty the image."""
    monkeypatch.setattr(common, "RAND_AUGMENT_OPS", {name: RAND_AUGMENT_OPS[name]})
    images = random_batch(4, 150, 150)
    magnitude = 1.5 if name in ("TranslateX", "TranslateY", "Cutout") else 6
    expected = rand_augment(images, 1, magnitude, generator_of(0))
    assert torch.equal(rand_augment(images, 1, 6, generator_of(0), resolution=600), expected)


@pytest.mark.parametrize(("size", "resolution"), [(64, 600), (32, 224), (128, 128), (128, 96)])
def test_up_to_64_pixels_and_from_a_models_resolution_on_nothing_shrinks(size, resolution):
    images = random_batch(64, size, size)
    never, at_most = (rand_augment(images, 2, 27, generator_of(0), pixels) for pixels in (None, resolution))
    assert torch.equal(never, at_most)


def test_what_a_training_step_gets():
    images = random_batch(8, 32, 32)
    b0, b7 = common.RECIPES["efficientnet_b0"], common.RECIPES["efficientnet_b7"]
    assert torch.equal(common.add_noise(images, generator_of(0), b0, 224, False, True), images)
    expected = rand_augment(images, 2, 27, generator_of(0))
    assert torch.equal(common.add_noise(images, generator_of(0), b7, 600, False, True), expected)
    expected = small_image_noise(images, True, generator_of(0))
    assert torch.equal(common.add_noise(images, generator_of(0), b0, 224, True, True), expected)


def test_the_picture_of_the_ops(tmp_path):
    draw_noise.draw(PHOTO, tmp_path / "noise.png", 48)
    with Image.open(tmp_path / "noise.png") as image:
        assert image.size == (3 * (48 + 16), 16 * (48 + 16))
