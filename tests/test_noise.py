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

from common import RAND_AUGMENT_OPS, load_image, rand_augment, small_image_noise

TINY = [(1, 1), (1, 2), (2, 1), (2, 2), (5, 3)]  # height, width
SIZES = [(32, 32), (33, 47), (96, 96), (101, 70), (224, 224)]
MAGNITUDES = [0, 5, 7.5, 10, 15, 27, 30]
OFFICIAL = [
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
]  # fmt: skip
GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"]
PHOTO = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)


@lru_cache
def pictures(size) -> np.ndarray:
    """uint8 (N, H, W, 3), two photographs and noise; up to 101 pixels also what may go wrong at the ends of a range."""
    rng = np.random.default_rng(size[0])
    photo = load_image(PHOTO)
    photos = [np.asarray(ImageOps.fit(part, size[::-1])) for part in (photo, photo.crop((330, 400, 480, 600)))]
    noise = rng.integers(0, 256, (*size, 3))
    if min(size) > 101:
        return np.stack([*photos, noise]).astype(np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    flat = rng.integers(90, 131, (*size, 3))
    smooth = np.stack([x * 255 // size[1], y * 255 // size[0], (x + y) * 255 // sum(size)], axis=-1)
    dark = rng.integers(0, 30, (*size, 3)) + 200 * (rng.random((*size, 1)) < 0.02)
    grey = np.broadcast_to(rng.integers(0, 256, (*size, 1)), (*size, 3))
    one_colour = np.broadcast_to([0, 77, 255], (*size, 3))
    halves = np.broadcast_to(100 + (x + y)[..., None] % 2, (*size, 3))  # the mean, 100.5, is rounded up
    return np.stack([*photos, noise, flat, smooth, dark, grey, one_colour, halves]).astype(np.uint8)


def random_batch(num, *size, seed=0):
    return torch.randint(256, (num, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def run_op(name, images, magnitude, sign=1, tf_quirks=False, seed=0) -> np.ndarray:
    batch = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
    before = batch.clone()
    signs = torch.full((len(batch),), sign)
    out = RAND_AUGMENT_OPS[name](batch, magnitude, signs, generator_of(seed), tf_quirks=tf_quirks)
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


def solarize_added(image, magnitude):
    pixels = np.asarray(image).astype(int)
    return np.where(pixels < 128, np.minimum(pixels + int(11 * magnitude), 255), pixels)


PILLOW = {
    "AutoContrast": lambda image, magnitude: ImageOps.autocontrast(image),
    "Equalize": lambda image, magnitude: ImageOps.equalize(image),
    "Invert": lambda image, magnitude: ImageOps.invert(image),
    "Posterize": posterized,
    "Solarize": solarized,
    "SolarizeAdd": solarize_added,
    "Color": enhance(ImageEnhance.Color),
    "Contrast": enhance(ImageEnhance.Contrast),
    "Brightness": enhance(ImageEnhance.Brightness),
    "Sharpness": enhance(ImageEnhance.Sharpness),
}


def test_all_16_official_ops_are_there():
    assert sorted(RAND_AUGMENT_OPS) == sorted(OFFICIAL) == sorted([*PILLOW, *GEOMETRIC, "Cutout"])


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("size", TINY + SIZES)
def test_colour_op_equals_pillows_in_every_pixel(name, size):
    images = pictures(size)
    for magnitude in MAGNITUDES:
        expected = np.stack([np.asarray(PILLOW[name](Image.fromarray(image), magnitude)) for image in images])
        for sign in (1, -1):  # none of these has one
            np.testing.assert_array_equal(run_op(name, images, magnitude, sign), expected, f"magnitude {magnitude}")


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
    pixels = 100 if min(size) > 64 else min(size) // 8
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


GREY = (128, 128, 128)
NEARBY = [(dx, dy) for dx in (-4e-3, 4e-3) for dy in (-4e-3, 4e-3)]


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", TINY + SIZES)
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


def test_geometric_signs_are_per_image():
    images = torch.from_numpy(pictures((33, 47))[[0, 0]]).permute(0, 3, 1, 2)
    for name in GEOMETRIC:
        both = RAND_AUGMENT_OPS[name](images, 8, torch.tensor([1, -1]), None)
        for i, sign in enumerate((1, -1)):
            alone = RAND_AUGMENT_OPS[name](images[:1], 8, torch.tensor([sign]), None)
            assert torch.equal(both[i], alone[0]), name
        assert not torch.equal(both[0], both[1]), name


# smaller side 64 and below: an eighth of it at level 10, above: 100 pixels (official, for ImageNet)
@pytest.mark.parametrize(
    ("size", "shift"),
    [((8, 8), 1), ((7, 90), 0), ((32, 32), 4), ((64, 64), 8), ((64, 200), 8), ((65, 200), 100), ((224, 224), 100)],
)
def test_translation_in_pixels(size, shift):
    """For sign +1 the image moves to the left, or up."""
    image = pictures(size)[0]
    for magnitude in (5, 10, 27) if shift % 10 == 0 else (10, 20):
        by = shift * magnitude // 10
        left = np.full_like(image, 128)
        left[:, : max(0, size[1] - by)] = image[:, by:]
        np.testing.assert_array_equal(run_op("TranslateX", image[None], magnitude)[0], left)
        up = np.full_like(image, 128)
        up[: max(0, size[0] - by)] = image[by:]
        np.testing.assert_array_equal(run_op("TranslateY", image[None], magnitude)[0], up)
        down = run_op("TranslateY", image[None, ::-1], magnitude, sign=-1)[0]
        np.testing.assert_array_equal(down, up[::-1])


def cut(image, center, half):
    """In place, as numpy cuts a slice at the far edge."""
    y, x = center
    image[max(0, y - half) : y + half, max(0, x - half) : x + half] = 128


HALVES = [  # size, magnitude, half of the hole's side
    ((32, 32), 0, 0), ((32, 32), 5, 2), ((32, 32), 10, 4), ((32, 32), 27, 10), ((33, 47), 10, 4), ((64, 64), 10, 8),
    ((64, 200), 10, 8), ((65, 200), 10, 40), ((65, 65), 5, 20), ((224, 224), 10, 40), ((224, 224), 27, 108),
    ((7, 90), 30, 0), ((1, 1), 30, 0), ((8, 8), 30, 3),
]  # fmt: skip


@pytest.mark.parametrize(("size", "magnitude", "half"), HALVES)
def test_cutout_is_a_grey_square_around_a_uniform_pixel(size, magnitude, half):
    images = np.tile(pictures(size)[:3], (4, 1, 1, 1))
    expected = images.copy()
    centers = (torch.rand(len(images), 2, generator=generator_of(0)) * torch.tensor(size)).long()
    for image, center in zip(expected, centers.tolist(), strict=True):
        cut(image, center, half)
    np.testing.assert_array_equal(run_op("Cutout", images, magnitude), expected)


@pytest.mark.parametrize(("size", "magnitude", "half"), [((32, 32), 10, 4), ((33, 47), 10, 4), ((96, 96), 5, 20)])
def test_cutout_holes_are_cut_off_at_the_edge_and_anywhere(size, magnitude, half):
    hole = run_op("Cutout", np.zeros((4000, *size, 3), dtype=np.uint8), magnitude)
    assert set(np.unique(hole)) == {0, 128} and (hole == hole[..., :1]).all()
    hole = hole[..., 0] == 128
    heights, widths = hole.any(2).sum(1), hole.any(1).sum(1)
    assert (hole.sum((1, 2)) == heights * widths).all(), "not a rectangle"
    assert heights.max() == widths.max() == 2 * half
    assert heights.min() == widths.min() == half  # centred on the outermost pixel: half of it is outside
    for axis, length in ((2, size[0]), (1, size[1])):
        first = hole.any(axis).argmax(1)  # at 0 for the first half + 1 centers
        counts = np.bincount(first, minlength=length - half)[1:]
        assert len(counts) == length - half - 1
        assert ((counts - 4000 / length) ** 2 / (4000 / length)).sum() < 2 * len(counts), "centres are not uniform"


LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
# Reference notes, section 1.10: magnitude -> (bits that the official code keeps, its solarize threshold), after the
# overflows of uint8.
QUIRKS = {5: (2, 128), 6: (2, 153), 9: (3, 230), 10: (4, 0), 12: (4, 51), 15: (6, 128), 18: (7, 204), 24: (1, 102),
          27: (1, 179), 30: (1, 0)}  # fmt: skip


@pytest.mark.parametrize("magnitude", QUIRKS)
def test_posterize_and_solarize_quirks(magnitude):
    bits, threshold = QUIRKS[magnitude]
    keep = 256 - 2 ** (8 - bits)
    np.testing.assert_array_equal(run_op("Posterize", LEVELS, magnitude, tf_quirks=True), LEVELS & keep)
    expected = np.where(threshold > LEVELS, LEVELS, 255 - LEVELS)
    np.testing.assert_array_equal(run_op("Solarize", LEVELS, magnitude, tf_quirks=True), expected)


# magnitude -> (bits kept, threshold): int(4 M/10), but 1 at least, and int(256 M/10) up to 10; above it torchvision's
# 8 - round(4 M/30) and 255 (1 - M/30).
RULES = {0: (1, 0), 5: (2, 128), 9: (3, 230), 10: (4, 256), 12: (6, 153), 15: (6, 127.5), 20: (5, 85), 22: (5, 68),
         24: (5, 51), 27: (4, 25.5), 30: (4, 0)}  # fmt: skip


@pytest.mark.parametrize("magnitude", RULES)
def test_posterize_and_solarize_rule(magnitude):
    bits, threshold = RULES[magnitude]
    np.testing.assert_array_equal(run_op("Posterize", LEVELS, magnitude), LEVELS & (256 - 2 ** (8 - bits)))
    expected = np.where(threshold > LEVELS, LEVELS, 255 - LEVELS)
    np.testing.assert_array_equal(run_op("Solarize", LEVELS, magnitude), expected)


def officially(name, image, magnitude):
    """The official arithmetic (randaugment.py:37-182) in numpy, whose casts to uint8 wrap as TensorFlow's do."""
    level = magnitude / 10
    if name == "Posterize":
        shift = min(np.array(8 - int(level * 4)).astype(np.uint8), np.uint8(7))  # TensorFlow's CPU kernel clamps it
        return image >> shift << shift
    if name == "Solarize":
        return np.where(image < np.array(int(level * 256)).astype(np.uint8), image, 255 - image)
    if name == "SolarizeAdd":
        added = np.clip(image.astype(np.int64) + int(level * 110), 0, 255).astype(np.uint8)
        return np.where(image < 128, added, image)
    histogram = np.asarray(Image.fromarray(image).convert("L").histogram(), np.float32)
    mean = np.float32(np.uint8(np.clip(histogram.sum() / 256, 0, 255)))  # the sum is the number of pixels
    pixels = image.astype(np.float32)
    return np.clip(mean + np.float32(level * 1.8 + 0.1) * (pixels - mean), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224), (300, 220)])
def test_quirks_are_the_official_arithmetic_and_in_4_ops_only(size):
    images = pictures(size)
    for magnitude in (0, 2, 5, 6, 9, 10, 12, 15, 18, 24, 27, 30):
        for name in "Posterize", "Solarize", "SolarizeAdd", "Contrast":
            expected = np.stack([officially(name, image, magnitude) for image in images])
            out = run_op(name, images, magnitude, tf_quirks=True)
            np.testing.assert_array_equal(out, expected, f"{name}, magnitude {magnitude}")
    for name in set(OFFICIAL) - {"Posterize", "Solarize", "Contrast"}:
        for magnitude in (5, 27):
            plain, quirky = (run_op(name, images, magnitude, tf_quirks=quirks) for quirks in (False, True))
            np.testing.assert_array_equal(plain, quirky, name)


def test_quirks_are_passed_on():
    images = random_batch(64, 32, 32)
    one, two = (rand_augment(images, 2, 27, generator_of(0), tf_quirks=quirks) for quirks in (False, True))
    assert 4 <= (one != two).flatten(1).any(1).sum() <= 40  # 3 ops of 16, two draws


# how they are drawn, and what a result must not depend on


def test_same_generator_state_same_batch():
    images = torch.from_numpy(pictures((32, 32))).permute(0, 3, 1, 2).repeat(16, 1, 1, 1)
    one, two, other = (rand_augment(images, generator=generator_of(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    torch.manual_seed(0)
    default = rand_augment(images)
    torch.manual_seed(0)
    assert torch.equal(default, rand_augment(images))


@pytest.mark.parametrize("noise", [rand_augment, lambda images, **kwargs: small_image_noise(images, True, **kwargs)])
def test_number_of_threads_changes_nothing(noise):
    images = random_batch(1000, 32, 32)
    one = noise(images, generator=generator_of(1))
    try:
        torch.set_num_threads(2)
        assert torch.equal(one, noise(images, generator=generator_of(1)))
    finally:
        torch.set_num_threads(1)


def test_a_result_does_not_depend_on_what_the_neighbours_show():
    images = random_batch(256, 32, 32)
    others = images.clone()
    others[1::2] = 255 - others[1::2] // 3
    for noise in rand_augment, lambda images, generator: small_image_noise(images, True, generator):
        one, two = (noise(batch, generator=generator_of(1)) for batch in (images, others))
        assert torch.equal(one[::2], two[::2])


LAYOUTS = {
    "a part": lambda num, h, w: random_batch(2 * num, h + 2, 2 * w)[::2, :, 1:-1, ::2],
    "channels last": lambda num, h, w: random_batch(num, h, w).contiguous(memory_format=torch.channels_last),
    "transposed": lambda num, h, w: random_batch(num, w, h).transpose(2, 3),
    "one image often": lambda num, h, w: random_batch(1, h, w).expand(num, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num", "size"), [(64, (33, 47)), (2000, (32, 32)), (20, (224, 224))])
def test_the_layout_changes_nothing_and_the_input_stays(layout, num, size):
    images = LAYOUTS[layout](num, *size)
    assert not images.is_contiguous()
    before = images.contiguous()
    for noise in rand_augment, lambda images, generator: small_image_noise(images, True, generator):
        out = noise(images, generator=generator_of(1))
        assert torch.equal(images, before)
        expected = noise(before, generator=generator_of(1))
        assert torch.equal(images, before), "a contiguous batch was changed"
        assert torch.equal(out, expected) and not torch.equal(out, before)


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize(("num", "at_once", "size"), [(200, 85, (32, 32)), (5, 1, (224, 224))])
def test_an_op_may_be_applied_slice_by_slice(name, num, at_once, size):
    """As on CPUs; a GPU takes all images of an op at once. So they agree, if the centres of Cutout do."""
    images, signs = random_batch(num, *size), torch.arange(num) % 3 % 2 * 2 - 1
    op, generator = RAND_AUGMENT_OPS[name], generator_of(5)
    whole = op(images, 9, signs, generator_of(5))
    slices = zip(images.split(at_once), signs.split(at_once), strict=True)
    parts = [op(part, 9, sign, generator) for part, sign in slices]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("num", "size"), [(3000, (32, 32)), (40, (224, 224))])
def test_slices_change_nothing(num, size, monkeypatch):
    """The same result where each op gets one image at a time."""
    images, calls = random_batch(num, *size), []
    expected = rand_augment(images, 2, 9, generator_of(0))

    def one_by_one(op):
        def apply(images, magnitude, sign, *args):
            calls.append(len(images))
            return torch.cat([op(images[i : i + 1], magnitude, sign[i : i + 1], *args) for i in range(len(images))])

        return apply

    for name, op in list(RAND_AUGMENT_OPS.items()):
        monkeypatch.setitem(RAND_AUGMENT_OPS, name, one_by_one(op))
    assert torch.equal(expected, rand_augment(images, 2, 9, generator_of(0)))
    assert sum(calls) == 2 * num and len(calls) > 32, "there were no slices"


class PretendedGpu(TorchFunctionMode):
    """For the code that only GPUs run, without one: tensors say that they are elsewhere, and stay."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "device"}
        if func == torch.Tensor.device.__get__:
            return torch.device("meta")
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            return args[0]
        assert func is not torch.Tensor.numpy, "a GPU's tensor has no numpy()"
        return func(*args, **kwargs)


def on_gpu(noise, images, *args):
    if torch.cuda.is_available():
        return noise(images.cuda(), *args).cpu()
    with PretendedGpu():
        return noise(images, *args)


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_gpus_get_the_same(size):
    """So many images that each op gets several slices on a CPU."""
    pictured = torch.from_numpy(pictures(size)).permute(0, 3, 1, 2)
    images = torch.cat([pictured.repeat(20, 1, 1, 1), random_batch(1800, *size)])
    for magnitude, quirks in ((9, False), (27, False), (27, True)):
        one = rand_augment(images, 2, magnitude, generator_of(0), quirks)
        assert torch.equal(one, on_gpu(rand_augment, images, 2, magnitude, generator_of(0), quirks))
    one = small_image_noise(images, True, generator_of(0))
    assert torch.equal(one, on_gpu(small_image_noise, images, True, generator_of(0)))


def test_no_ops_no_images_one_image():
    images = torch.from_numpy(pictures((32, 32))).permute(0, 3, 1, 2)
    assert torch.equal(rand_augment(images, num_ops=0), images)
    assert rand_augment(images[:0]).shape == small_image_noise(images[:0], True).shape == (0, 3, 32, 32)
    for seed in range(20):
        assert rand_augment(images[:1], 2, 27, generator_of(seed)).shape == (1, 3, 32, 32)
        assert rand_augment(images[:1, :, :1, :2], 2, 27, generator_of(seed)).shape == (1, 3, 1, 2)


def record_draws(monkeypatch, num, num_ops):
    """(op, sign) of each draw: the ops are replaced by ones that note their number and sign in the image."""
    for number, name in enumerate(list(RAND_AUGMENT_OPS)):

        def note(images, magnitude, sign, generator, tf_quirks=False, number=number):
            code = 1 + 2 * number + (sign > 0).int()
            assert ((sign == 1) | (sign == -1)).all() and magnitude == 13
            return (images.roll(1, dims=3)).index_copy(
                3, torch.tensor([0]), code.byte().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
            )

        monkeypatch.setitem(RAND_AUGMENT_OPS, name, note)
    out = rand_augment(torch.zeros(num, 3, 1, 8, dtype=torch.uint8), num_ops, 13, generator_of(0))
    codes = out[:, 0, 0].int()
    assert (codes[:, :num_ops] > 0).all() and (codes[:, num_ops:] == 0).all(), "not num_ops ops for each image"
    return (codes[:, :num_ops] - 1) // 2, (codes[:, :num_ops] - 1) % 2


def chi_square(values, num_values):
    counts = torch.bincount(values, minlength=num_values).double()
    expected = len(values) / num_values
    return ((counts - expected) ** 2 / expected).sum()


def test_ops_are_drawn_uniformly_with_replacement_and_signs_are_fair(monkeypatch):
    """The bounds are 0.999 quantiles of chi-square with 15, 31, 255 and 3 degrees of freedom."""
    ops, signs = record_draws(monkeypatch, 12800, 2)
    for layer in range(2):
        assert chi_square(ops[:, layer], 16) < 37.7
        assert chi_square(2 * ops[:, layer] + signs[:, layer], 32) < 61.1, "the sign depends on the op, or is not fair"
    assert chi_square(16 * ops[:, 0] + ops[:, 1], 256) < 330.5, "the second op depends on the first"
    assert chi_square(16 * ops[:-1, 0] + ops[1:, 0], 256) < 330.5, "an op depends on the image before"
    assert chi_square(2 * signs[:, 0] + signs[:, 1], 4) < 16.3, "the second sign depends on the first"


# small images: a hole, a shift, a flip


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (33, 47), (48, 32), (64, 64), (8, 9), (7, 7), (2, 3), (1, 1)])
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


@pytest.mark.parametrize(("hflip", "share"), [(True, 0.5), (False, 0)])
def test_small_image_noise_shifts_uniformly_and_mirrors_half(hflip, share):
    """Read off the pixels, for images whose red counts columns and green rows; the hole is 128."""
    ramp, columns = torch.arange(32).byte(), torch.arange(4, 28)  # in these nothing is reflected
    image = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32).byte()])
    out = small_image_noise(image.expand(4000, 3, 32, 32), hflip, generator_of(0)).int()
    hole = (out == 128).all(1)
    assert (hole == (out == 128).any(1)).all() and hole.flatten(1).sum(1).amin() >= 8 * 8 / 4
    red, green = (out[:, i].masked_fill(hole, -999)[:, 4:28, 4:28] for i in (0, 1))
    y, x, x_mirrored = (
        part.flatten(1).amax(1) for part in (green - columns[:, None], red - columns, red + columns - 31)
    )
    mirrored = ((red + columns - 31 == x_mirrored[:, None, None]) | (red < 0)).flatten(1).all(1)
    x = torch.where(mirrored, x_mirrored, x)
    assert [y.amin(), y.amax(), x.amin(), x.amax()] == [-4, 4, -4, 4]
    assert abs(mirrored.float().mean() - share) < 0.03
    assert chi_square(9 * (y + 4) + x + 4, 81) < 124.8  # the 0.999 quantile with 80 degrees of freedom
    for part in (x[mirrored], x[~mirrored]) if hflip else ():
        assert chi_square(part + 4, 9) < 26.1, "the shift depends on the flip"


def share_of_empty(size, magnitude, resolution, num=400):
    """The share of one-coloured images that are more than 95 percent grey 128 after two ops."""
    images = torch.tensor([200, 30, 90], dtype=torch.uint8).view(1, 3, 1, 1).expand(num, 3, size, size).contiguous()
    noised = rand_augment(images, 2, magnitude, torch.Generator().manual_seed(0), resolution=resolution)
    return ((noised == 128).all(1).float().mean((1, 2)) > 0.95).float().mean().item()


@pytest.mark.parametrize(("size", "magnitude", "resolution"), [(224, 27, 600), (128, 15, 380), (96, 12, 300)])
def test_below_a_models_resolution_translation_and_cutout_shrink(size, magnitude, resolution):
    """B7's 270 pixels are meant for 600: at 224 they would empty a quarter of the images."""
    num = 400 if size < 200 else 150
    assert share_of_empty(size, magnitude, None, num) > 0.15
    assert share_of_empty(size, magnitude, resolution, num) < 0.03


@pytest.mark.parametrize(("size", "resolution"), [(64, 600), (32, 224), (128, 128), (128, 96)])
def test_up_to_64_pixels_and_from_a_models_resolution_on_nothing_shrinks(size, resolution):
    images = torch.randint(256, (64, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    one, two = (
        rand_augment(images, 2, 27, torch.Generator().manual_seed(0), resolution=pixels)
        for pixels in (None, resolution)
    )
    assert torch.equal(one, two)


def test_in_proportion_a_translation_is_the_same_share_of_the_image(monkeypatch):
    """Magnitude 6 at 300 of 600 pixels: 30 pixels instead of 60."""
    op = RAND_AUGMENT_OPS["TranslateX"]
    for name in RAND_AUGMENT_OPS:
        monkeypatch.setitem(RAND_AUGMENT_OPS, name, op)
    monkeypatch.setattr("common.SIZED_IN_PIXELS", tuple(RAND_AUGMENT_OPS))
    images = torch.full((4, 3, 300, 300), 255, dtype=torch.uint8)
    noised = rand_augment(images, 1, 6, torch.Generator().manual_seed(0), resolution=600)
    assert ((noised == 128).all(1).any(1).sum(1) == 30).all()
