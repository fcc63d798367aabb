"""RandAugment: each op against Pillow or a transcription of the official rule, and how the ops are drawn."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from common import RAND_AUGMENT_OPS, rand_augment

SIZES = [(32, 32), (33, 47), (96, 96)]  # height, width
MAGNITUDES = [0, 5, 10, 27]
OFFICIAL = [
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
]  # fmt: skip


def pictures(size, num=4) -> np.ndarray:
    """uint8 (num, H, W, 3): noise, low contrast, a smooth gradient, dark with a few bright pixels."""
    rng = np.random.default_rng(size[0])
    y, x = np.mgrid[: size[0], : size[1]]
    noise = rng.integers(0, 256, (*size, 3))
    flat = rng.integers(90, 131, (*size, 3))
    smooth = np.stack([x * 255 // size[1], y * 255 // size[0], (x + y) * 255 // sum(size)], axis=-1)
    dark = rng.integers(0, 30, (*size, 3)) + 200 * (rng.random((*size, 1)) < 0.02)
    return np.stack([noise, flat, smooth, dark][:num]).astype(np.uint8)


def run_op(name, images, magnitude, sign=1, tf_quirks=False, seed=0) -> np.ndarray:
    batch = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
    before = batch.clone()
    generator = torch.Generator().manual_seed(seed)
    out = RAND_AUGMENT_OPS[name](batch, magnitude, torch.full((len(batch),), sign), generator, tf_quirks=tf_quirks)
    assert out.dtype == torch.uint8 and out.shape == batch.shape
    assert torch.equal(batch, before), f"{name} changed its input"
    return out.permute(0, 2, 3, 1).numpy()


def enhance(kind):
    return lambda image, magnitude: kind(image).enhance(1.8 * magnitude / 10 + 0.1)


PILLOW = {
    "AutoContrast": lambda image, magnitude: ImageOps.autocontrast(image),
    "Equalize": lambda image, magnitude: ImageOps.equalize(image),
    "Invert": lambda image, magnitude: ImageOps.invert(image),
    "Color": enhance(ImageEnhance.Color),
    "Contrast": enhance(ImageEnhance.Contrast),
    "Brightness": enhance(ImageEnhance.Brightness),
    "Sharpness": enhance(ImageEnhance.Sharpness),
}


def test_all_16_official_ops_are_there():
    assert sorted(RAND_AUGMENT_OPS) == sorted(OFFICIAL)


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("size", SIZES)
def test_colour_op_equals_pillows(name, magnitude, size):
    images = pictures(size)
    expected = np.stack([np.asarray(PILLOW[name](Image.fromarray(image), magnitude)) for image in images])
    difference = np.abs(expected.astype(int) - run_op(name, images, magnitude))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002, "rounds another way than Pillow"


def test_autocontrast_equals_pillows_for_every_range():
    """All (low, high) at once: the brightest must become 255 and not 254."""
    ramp = np.arange(256)
    pairs = [(low, high) for low in range(0, 256, 15) for high in range(low, 256)]
    images = np.stack([np.clip(ramp, low, high) for low, high in pairs]).astype(np.uint8)
    images = np.repeat(images.reshape(len(pairs), 16, 16, 1), 3, axis=3)
    expected = np.stack([np.asarray(ImageOps.autocontrast(Image.fromarray(image))) for image in images])
    np.testing.assert_array_equal(run_op("AutoContrast", images, 10), expected)


def test_contrast_quirk_takes_the_pixel_count_for_the_mean():
    images = pictures((32, 32))
    expected = [Image.blend(Image.new("RGB", (32, 32), (4, 4, 4)), Image.fromarray(image), 1.9) for image in images]
    np.testing.assert_array_equal(run_op("Contrast", images, 10, tf_quirks=True), np.stack(expected))


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


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sign", [1, -1])
def test_geometric_op_equals_pillows(name, magnitude, size, sign):
    images = pictures(size)
    a, b, c, d, e, f = matrix_of(name, magnitude, sign, size)
    corners = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)  # Pillow counts from the corners of pixels
    expected = [
        Image.fromarray(image).transform(
            size[::-1], Image.Transform.AFFINE, corners, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)
        )
        for image in images
    ]
    y, x = np.mgrid[: size[0], : size[1]]
    # halfway between two pixels either is right: Pillow's fixed-point numbers fall to either side
    fractions = [(u + 0.5) % 1 for u in (a * x + b * y + c, d * x + e * y + f)]
    clear = np.all([(fraction > 2e-3) & (fraction < 1 - 2e-3) for fraction in fractions], axis=0)
    different = (np.stack(expected) != run_op(name, images, magnitude, sign)).any(-1)
    assert clear.mean() > 0.4
    assert different[:, clear].mean() <= 0.002
    if magnitude == 0:
        assert not different.any()


def test_geometric_signs_are_per_image():
    images = torch.from_numpy(pictures((33, 47))[[0, 0]]).permute(0, 3, 1, 2)
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        both = RAND_AUGMENT_OPS[name](images, 8, torch.tensor([1, -1]), None)
        for i, sign in enumerate((1, -1)):
            alone = RAND_AUGMENT_OPS[name](images[:1], 8, torch.tensor([sign]), None)
            assert torch.equal(both[i], alone[0]), name
        assert not torch.equal(both[0], both[1]), name


def test_translating_by_270_pixels_leaves_only_grey():
    assert (run_op("TranslateX", pictures((96, 96)), 27) == 128).all()


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
RULES = {0: (1, 0), 5: (2, 128), 9: (3, 230), 10: (4, 256), 12: (6, 153), 15: (6, 127.5), 24: (5, 51), 27: (4, 25.5),
         30: (4, 0)}  # fmt: skip


@pytest.mark.parametrize("magnitude", RULES)
def test_posterize_and_solarize_rule(magnitude):
    bits, threshold = RULES[magnitude]
    np.testing.assert_array_equal(run_op("Posterize", LEVELS, magnitude), LEVELS & (256 - 2 ** (8 - bits)))
    expected = np.where(threshold - 1e-9 > LEVELS, LEVELS, 255 - LEVELS)
    np.testing.assert_array_equal(run_op("Solarize", LEVELS, magnitude), expected)


@pytest.mark.parametrize(("magnitude", "added"), [(0, 0), (5, 55), (10, 110), (27, 297)])
def test_solarize_add_brightens_only_the_dark_half(magnitude, added):
    expected = np.where(LEVELS < 128, np.minimum(LEVELS.astype(int) + added, 255), LEVELS)
    np.testing.assert_array_equal(run_op("SolarizeAdd", LEVELS, magnitude), expected)


@pytest.mark.parametrize(
    ("size", "magnitude", "half"),
    [((32, 32), 0, 0), ((32, 32), 5, 2), ((32, 32), 10, 4), ((32, 32), 27, 10), ((33, 47), 10, 4), ((96, 96), 5, 20)],
)
def test_cutout_is_a_grey_square_cut_off_at_the_edge(size, magnitude, half):
    images = np.zeros((400 if size[0] > 64 else 4000, *size, 3), dtype=np.uint8)
    hole = run_op("Cutout", images, magnitude)
    assert set(np.unique(hole)) <= {0, 128}
    assert (hole == hole[..., :1]).all()
    hole = hole[..., 0] == 128
    heights, widths = hole.any(2).sum(1), hole.any(1).sum(1)
    assert (hole.sum((1, 2)) == heights * widths).all(), "not a rectangle"
    assert heights.max() == widths.max() == min(2 * half, *size)
    if half:
        assert heights.min() == widths.min() == half  # centred on the outermost pixel: half of it is outside
        assert hole.any(0).all(), "some pixels are never covered"


def test_same_generator_state_same_batch_and_input_is_not_changed():
    images = torch.from_numpy(pictures((32, 32))).permute(0, 3, 1, 2).repeat(16, 1, 1, 1)
    before = images.clone()
    one, two, other = (rand_augment(images, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(images, before)
    assert torch.equal(one, two) and not torch.equal(one, other)
    torch.manual_seed(0)
    default = rand_augment(images)
    torch.manual_seed(0)
    assert torch.equal(default, rand_augment(images))


def test_a_result_does_not_depend_on_what_the_neighbours_show():
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    others = images.clone()
    others[1::2] = 255 - others[1::2] // 3
    one, two = (rand_augment(batch, generator=torch.Generator().manual_seed(1)) for batch in (images, others))
    assert torch.equal(one[::2], two[::2])


def test_memory_format_changes_nothing():
    images = torch.randint(256, (64, 3, 33, 47), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    strided = images.contiguous(memory_format=torch.channels_last)
    one, two = (rand_augment(batch, generator=torch.Generator().manual_seed(1)) for batch in (images, strided))
    assert torch.equal(one, two)


def test_zero_ops_and_an_empty_batch():
    images = torch.from_numpy(pictures((32, 32))).permute(0, 3, 1, 2)
    assert torch.equal(rand_augment(images, num_ops=0), images)
    assert rand_augment(images[:0]).shape == (0, 3, 32, 32)


def record_draws(monkeypatch, num, num_ops):
    """(op, sign) of each draw: the ops are replaced by ones that note their number and sign in the image."""
    for number, name in enumerate(list(RAND_AUGMENT_OPS)):

        def note(images, magnitude, sign, generator, tf_quirks=False, number=number):
            code = 1 + 2 * number + (sign > 0).int()
            assert ((sign == 1) | (sign == -1)).all()
            return (images.roll(1, dims=3)).index_copy(
                3, torch.tensor([0]), code.byte().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
            )

        monkeypatch.setitem(RAND_AUGMENT_OPS, name, note)
    out = rand_augment(torch.zeros(num, 3, 1, 8, dtype=torch.uint8), num_ops, 10, torch.Generator().manual_seed(0))
    codes = out[:, 0, 0].int()
    assert (codes[:, :num_ops] > 0).all() and (codes[:, num_ops:] == 0).all(), "not num_ops ops for each image"
    return (codes[:, :num_ops] - 1) // 2, (codes[:, :num_ops] - 1) % 2


def test_ops_are_drawn_uniformly_with_replacement_and_signs_are_fair(monkeypatch):
    num = 6400
    ops, signs = record_draws(monkeypatch, num, 2)
    for layer in range(2):
        counts = torch.bincount(ops[:, layer], minlength=16).double()
        chi_square = ((counts - num / 16) ** 2 / (num / 16)).sum()
        assert chi_square < 37.7, f"{counts}"  # the 0.999 quantile with 15 degrees of freedom
    assert abs((ops[:, 0] == ops[:, 1]).double().mean() - 1 / 16) < 0.012
    assert abs(signs.double().mean() - 0.5) < 0.02
    positive = torch.bincount(ops.flatten(), weights=signs.flatten().double()) / torch.bincount(ops.flatten())
    assert (positive - 0.5).abs().max() < 0.08, "the sign depends on the op"
