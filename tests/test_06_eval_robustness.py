"""Stage 06: the corruptions against hand-made values and the original libraries', the attacks against autograd by hand,
the calibration error, and the command line: resuming, stale results, processes, wrong input."""

import colorsys
import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_mistake, load_stage, save_model, tell_images_apart
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common

stage = load_stage("06_eval_robustness")


SIZES = {32: 32, 48: 32, 49: 64, 64: 64, 128: 64, 129: 224}  # image side: the set of parameters that it gets


def smooth_image(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(2 * np.pi * (2 * x + y)), np.cos(2 * np.pi * (x - 3 * y)), np.sin(2 * np.pi * 4 * x * y)]
    return (np.stack(waves, axis=-1) * 75 + 110).astype(np.uint8)


def grey(value: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), value, dtype=np.uint8)


def corrupt(image, name, severity, seed=0):
    return stage.corrupt(image, name, severity, np.random.default_rng(seed))


# ---------------------------------------------------------------------------------------------------------------------
# corruptions


def test_the_table_is_complete():
    assert len(stage.DRAWN) == 14 and len(stage.EXTRA) == 4 and list(stage.CORRUPTION_OPS) == list(stage.CORRUPTIONS)
    assert list(stage.CORRUPTIONS) == [*stage.DRAWN, *stage.EXTRA] and len(stage.CORRUPTIONS) == 18
    for sets in stage.CORRUPTIONS.values():
        assert list(sets) == [32, 64, 224] and all(len(values) == 5 for values in sets.values())


ORIGINAL = np.load(ROOT / "tests" / "corruptions.npz")  # by reference_corruptions.py, from the generators themselves


@pytest.mark.parametrize("size", [32, 64, 224])
def test_the_parameters_are_those_of_the_generators(size):
    originals = json.loads(str(ORIGINAL["parameters"]))[str(size)]
    assert set(originals) == set(stage.CORRUPTIONS)
    for name, values in originals.items():
        ours = stage.CORRUPTIONS[name][size]
        if name == "zoom_blur":
            ours = [np.arange(1, *end_step) for end_step in ours]
        for our, theirs in zip(ours, values, strict=True):
            np.testing.assert_allclose(our, theirs, rtol=1e-12, err_msg=name)


# Grey levels of difference that are left, mean over an image: values are cut to whole numbers, so the last bit of a
# float shows where the original comes out as 30.000000000000004. docs/robustness.md has the measured ones.
LEFT = {"saturate": 0.02, "defocus_blur": 0.02, "brightness": 0.01}


@pytest.mark.parametrize("name", stage.CORRUPTIONS)
def test_each_corruption_equals_the_generators(name):
    """The same photographs and the same draws."""
    for i in range(5):
        image, theirs = ORIGINAL["images"][i % 3], ORIGINAL[name][i].astype(float)
        ours = stage.corrupt(image, name, i + 1, np.random.default_rng((0, i % 3, i + 1)))
        difference = np.abs(ours - theirs)
        assert difference.max() <= 1 and difference.mean() <= LEFT.get(name, 0.002), (i, difference.mean())
        if name.endswith("noise"):
            assert (ours - theirs).mean() == pytest.approx(0, abs=0.03 * (theirs - image).std())
            assert (ours - image.astype(float)).var() == pytest.approx((theirs - image).var(), rel=0.03)
        assert np.abs(image - theirs).mean() > 0.2  # and is not the image as it was


def test_speckle_noise_is_in_proportion_to_the_value():
    for severity, sigma in enumerate([0.06, 0.1, 0.12, 0.16, 0.2], 1):
        for value in (50, 120):
            noise = np.concatenate(
                [corrupt(grey(value), "speckle_noise", severity, seed) for seed in range(10)]
            ) - float(value)
            assert (noise + 0.5).mean() == pytest.approx(0, abs=0.6)  # values are cut to whole numbers
            assert noise.std() == pytest.approx(value * sigma, rel=0.03)


def copy_by_copy(image, reach, rounds, rng):
    """The loop of the generator's glass blur: a swap of two views of one array."""
    x = image.copy()
    for _ in range(rounds):
        for h in range(x.shape[0] - reach, reach, -1):
            for w in range(x.shape[1] - reach, reach, -1):
                dx, dy = rng.integers(-reach, reach, 2)
                x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
    return x


@pytest.mark.parametrize("shape", [(24, 24), (13, 30), (9, 6), (2, 2)])
@pytest.mark.parametrize(("reach", "rounds"), [(1, 1), (1, 2), (2, 3), (3, 2), (4, 2)])
def test_glass_blur_copies_pixels_in_the_order_of_the_generator(shape, reach, rounds):
    """Without blur: 0.1 is a radius of no pixel. From 2 pixels on copies are copied."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = copy_by_copy(image, reach, rounds, np.random.default_rng(7))
    out = stage.glass_blur(image, (0.1, reach, rounds), np.random.default_rng(7))
    assert np.array_equal(np.rint(out * 255), expected)
    if min(shape) > 9:
        assert not np.array_equal(expected, image)


UNEVEN = ["glass_blur", "snow", "elastic_transform", "spatter", "saturate"]  # their severities change in kind, too


@pytest.mark.xdist_group("06")
@pytest.mark.parametrize("name", stage.CORRUPTIONS)
@pytest.mark.parametrize("size", [32, 64, 144])
def test_shape_determinism_and_growing_severity(name, size):
    image = smooth_image(size)
    before, distances = image.copy(), []
    for severity in range(1, 6):
        out = corrupt(image, name, severity)
        assert out.shape == image.shape and out.dtype == np.uint8
        assert np.array_equal(out, corrupt(image, name, severity))
        distances.append(np.abs(out.astype(float) - image).mean())
    assert np.array_equal(image, before)
    assert min(distances) > 0 and (name in UNEVEN or distances == sorted(distances)), distances


DRAWN = ["glass_blur", "motion_blur", "snow", "fog", "elastic_transform", "spatter"]


@pytest.mark.parametrize("name", [*DRAWN, "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"])
def test_another_seed_gives_another_image(name):
    assert not np.array_equal(corrupt(smooth_image(32), name, 3, seed=1), corrupt(smooth_image(32), name, 3, seed=2))


@pytest.mark.parametrize("shape", [(20, 31, 3), (1, 1, 3), (5, 2, 3)])
@pytest.mark.parametrize("name", stage.CORRUPTIONS)
def test_any_shape(name, shape):
    if name == "pixelate" and min(shape) < 2:
        pytest.skip("0.95 x 1 pixel is no pixel")
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert corrupt(image, name, 5).shape == shape


@pytest.mark.parametrize(("size", "used"), SIZES.items())
def test_the_parameters_follow_the_image_size(size, used):
    for severity in range(1, 6):
        file = io.BytesIO()
        quality = stage.CORRUPTIONS["jpeg_compression"][used][severity - 1]
        Image.fromarray(smooth_image(size)).save(file, "JPEG", quality=quality)
        assert np.array_equal(corrupt(smooth_image(size), "jpeg_compression", severity), np.array(Image.open(file)))


@pytest.mark.parametrize(("severity", "small"), [(1, 30), (2, 28), (3, 27), (4, 24), (5, 20)])
def test_pixelate_is_box_down_and_up(severity, small):
    image = Image.fromarray(smooth_image(32))
    expected = image.resize((small, small), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    assert np.array_equal(corrupt(smooth_image(32), "pixelate", severity), np.array(expected))


@pytest.mark.parametrize("pixel", [(200, 100, 50), (0, 0, 0), (255, 255, 255), (250, 3, 128), (7, 7, 7), (0, 90, 91)])
def test_brightness_adds_to_v_of_hsv(pixel):
    image = np.broadcast_to(np.uint8(pixel), (8, 8, 3)).copy()
    for severity, amount in enumerate([0.05, 0.1, 0.15, 0.2, 0.3], 1):
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
        expected = np.array(colorsys.hsv_to_rgb(h, s, min(v + amount, 1))) * 255
        out = corrupt(image, "brightness", severity)
        assert (out[0, 0] <= expected + 1e-6).all() and (out[0, 0] > expected - 1 - 1e-6).all()  # cut, not rounded
        assert (out == out[0, 0]).all()


def test_contrast_by_hand():
    image = grey(100)
    image[:, 16:] = 200  # mean 150; 0.75 x 50 = 37.5, 0.15 x 50 = 7.5; cut, not rounded
    assert np.unique(corrupt(image, "contrast", 1)).tolist() == [112, 187]
    assert np.unique(corrupt(image, "contrast", 5)).tolist() == [142, 157]


def test_gaussian_noise_has_the_stated_deviation():
    for severity, sigma in enumerate([0.04, 0.06, 0.08, 0.09, 0.10], 1):
        noise = np.concatenate([corrupt(grey(128), "gaussian_noise", severity, seed) for seed in range(10)]) - 128.0
        assert noise.std() == pytest.approx(255 * sigma, rel=0.03)
        assert noise.mean() == pytest.approx(-0.5, abs=0.5)  # values are cut to whole numbers


def test_shot_noise_is_poisson():
    for severity, photons in enumerate([500, 250, 100, 75, 50], 1):
        values = np.concatenate([corrupt(grey(102), "shot_noise", severity, seed) for seed in range(10)])  # 102 = 0.4
        assert values.mean() == pytest.approx(102, abs=1)
        assert values.std() == pytest.approx(255 * np.sqrt(0.4 / photons), rel=0.03)
        assert set(np.unique(values)) <= set(np.uint8(np.clip(np.arange(1000) / photons, 0, 1) * 255))


def test_impulse_noise_changes_the_stated_share():
    for severity, share in enumerate([0.01, 0.02, 0.03, 0.05, 0.07], 1):
        values = np.concatenate([corrupt(grey(128), "impulse_noise", severity, seed) for seed in range(20)])
        assert set(np.unique(values)) == {0, 128, 255}
        assert (values != 128).mean() == pytest.approx(share, rel=0.1)
        assert (values == 255).mean() == pytest.approx(share / 2, rel=0.15)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "contrast"])
def test_a_grey_image_stays_grey(name):
    for size in (32, 64, 144):
        for severity in range(1, 6):
            assert np.abs(corrupt(grey(99, size), name, severity) - 99.0).max() <= 1


FORMULA = np.uint8([[(37 * x + 91 * y + 13 * x * y) % 256 for x in range(8)] for y in range(8)])
ORIGINALS = {  # what the libraries that the generator uses make of FORMULA, at the severity of the 32-pixel set
    ("gaussian_blur", 3): [  # scikit-image 0.26 gaussian, sigma 0.7
        [29, 60, 97, 126, 136, 163, 159, 75],
        [100, 128, 146, 155, 120, 128, 135, 130],
        [139, 158, 135, 146, 146, 155, 122, 110],
        [87, 124, 137, 160, 138, 140, 142, 106],
        [115, 124, 114, 148, 145, 116, 130, 156],
        [134, 109, 117, 163, 155, 136, 118, 135],
        [100, 119, 105, 154, 174, 158, 149, 133],
        [132, 176, 153, 184, 178, 189, 173, 199],
    ],
    ("defocus_blur", 4): [  # OpenCV 5.0 filter2D, disk of radius 1 after GaussianBlur 3x3 of sigma 0.2
        [51, 78, 120, 162, 102, 144, 136, 163],
        [111, 140, 139, 138, 137, 136, 134, 113],
        [155, 142, 154, 166, 126, 138, 150, 85],
        [98, 144, 117, 142, 167, 141, 114, 160],
        [143, 94, 132, 170, 105, 143, 130, 132],
        [86, 147, 95, 146, 197, 94, 145, 104],
        [131, 97, 110, 174, 135, 199, 109, 178],
        [139, 160, 129, 149, 221, 139, 210, 129],
    ],
    ("motion_blur", 3): [  # ImageMagick 6.9.11 -motion-blur 6x2+30
        [83, 98, 85, 116, 157, 190, 138, 65],
        [106, 151, 206, 155, 61, 105, 136, 153],
        [202, 163, 83, 152, 191, 119, 73, 94],
        [64, 135, 184, 127, 121, 187, 159, 99],
        [160, 147, 93, 156, 110, 102, 157, 187],
        [108, 118, 194, 163, 156, 116, 95, 129],
        [121, 126, 105, 185, 176, 189, 185, 139],
        [182, 195, 182, 195, 184, 215, 210, 253],
    ],
}


@pytest.mark.parametrize(("name", "severity"), ORIGINALS)
def test_the_blurs_equal_the_original_libraries(name, severity):
    class At30Degrees:
        def uniform(self, low, high):
            assert (low, high) == (-45, 45)
            return 30.0

    out = stage.corrupt(np.stack([FORMULA] * 3, axis=-1), name, severity, At30Degrees())
    assert (out == out[..., :1]).all()
    assert out[..., 0].tolist() == ORIGINALS[name, severity]


@pytest.mark.parametrize("name", stage.CORRUPTIONS)
def test_a_view_does_not_depend_on_the_number_of_threads(name):
    """Flat areas show it: a value that should be 99 is cut to 98 where it comes out as 98.99999."""
    image = (smooth_image(144) // 40 * 40 + 19).astype(np.uint8)
    for severity in (1, 3, 5):
        views = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            views.append(corrupt(image, name, severity))
        torch.set_num_threads(1)
        assert np.array_equal(*views)


def test_a_view_does_not_depend_on_the_other_images(tmp_path):
    for index in range(6):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / "a").mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            Image.fromarray(np.roll(smooth_image(32), index, 0)).save(tmp_path / split / "a" / f"{index}.png")
    images, _, _ = common.labeled_images(tmp_path, "val")
    view = common.View(32, 1.0)
    everything = stage.CorruptedImages(images, view, np.arange(6), "shot_noise", seed=0)
    some = np.array([1, 4])
    subset = stage.CorruptedImages(images[some], view, some, "shot_noise", seed=0)
    other_seed = stage.CorruptedImages(images[some], view, some, "shot_noise", seed=1)
    _, views, error = subset[1]
    assert error is None and len(views) == 5
    assert np.array_equal(views, everything[4][1])
    assert not np.array_equal(views, other_seed[1][1])


# ---------------------------------------------------------------------------------------------------------------------
# attacks

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VIEW = common.View(8, 1.0, mean=MEAN, std=STD)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)) / 50)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float()


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("eps", [1, 2, 8, 0.5, 300])
def test_fgsm_is_the_sign_of_the_gradient_by_hand(pixels, eps):
    model = Linear()
    attacked = stage.attack(model, pixels, LABELS, eps, 1, VIEW)
    # d loss / d input = W^T (softmax(logits) - one_hot(label)); the standardization divides by a positive number
    standardized = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    probs = (standardized.flatten(1) @ model.weight.T).softmax(1)
    gradient = (probs - torch.nn.functional.one_hot(LABELS, 4)) @ model.weight
    expected = (pixels + eps * gradient.view_as(pixels).sign()).clamp(0, 255)
    assert torch.equal(attacked, expected)
    moved = (attacked - pixels).abs()
    assert ((moved == eps) | (attacked == 0) | (attacked == 255)).all()
    assert model.weight.grad is None and not attacked.requires_grad


@pytest.mark.parametrize("steps", [1, 10])
def test_eps_0_is_the_clean_image(pixels, steps):
    assert torch.equal(stage.attack(Linear(), pixels, LABELS, 0.0, steps, VIEW), pixels)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_pgd_stays_in_the_ball_and_reaches_its_border(pixels, steps):
    attacked = stage.attack(Linear(), pixels, LABELS, 4, steps, VIEW)
    assert (attacked - pixels).abs().max() == 4
    assert attacked.min() >= 0 and attacked.max() <= 255


@pytest.mark.parametrize(("eps", "steps"), [(2, 1), (16, 1), (16, 10), (0.5, 3)])
def test_the_attacks_in_float64_pixel_by_pixel(monkeypatch, eps, steps):
    """In float32 the signs of gradients near 0 depend on the rounding. A network with batch norms, in eval mode."""
    torch.manual_seed(0)
    model = tell_images_apart(common.build_model(ARCH, 4)).double()
    x = torch.randint(0, 256, (6, 3, 32, 32)).double()
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    monkeypatch.setattr(stage, "normalize", lambda images, view: (images / 255 - mean) / std)  # ours is in float32

    transcribed = x.clone()
    for _ in range(steps):
        transcribed.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model((transcribed / 255 - mean) / std), LABELS)
        (gradient,) = torch.autograd.grad(loss, transcribed)
        step = eps if steps == 1 else 2.5 * eps / steps
        transcribed = transcribed.detach() + step * gradient.sign()
        transcribed = torch.minimum(torch.maximum(transcribed, x - eps), x + eps).clamp(0, 255)
    attacked = stage.attack(model, x, LABELS, eps, steps, VIEW)
    assert attacked.dtype == torch.float64 and torch.equal(attacked, transcribed)
    assert ((attacked - x).abs() > 0).double().mean() > 0.5


def test_pgd_of_one_step_is_fgsm_and_more_steps_hurt_more():
    """A small network trained for a second: accuracy clean > FGSM >= PGD, loss the other way round."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 4
    images = torch.randint(60, 196, (256, 3, 8, 8), generator=generator).float()
    for label in range(4):
        images[labels == label, :, 2 * label : 2 * label + 2] += 40
    torch.manual_seed(0)
    conv = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(16, 16, 3), torch.nn.GELU()]
    model = torch.nn.Sequential(*conv, torch.nn.Flatten(), torch.nn.Linear(16 * 36, 4))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(common.normalize(images, VIEW)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def accuracy_and_loss(eps, steps):
        attacked = stage.attack(model, images, labels, eps, steps, VIEW)
        with torch.no_grad():
            metrics = stage.metrics_of(stage.batch_sums(model(common.normalize(attacked, VIEW)), labels))
        return metrics["top1"], metrics["loss"]

    clean, fgsm, pgd = accuracy_and_loss(0, 1), accuracy_and_loss(16, 1), accuracy_and_loss(16, 10)
    assert clean[0] > 95 and clean[0] - 20 > fgsm[0] >= pgd[0]
    assert clean[1] < fgsm[1] < pgd[1]


# ---------------------------------------------------------------------------------------------------------------------
# measures


def test_calibration_error_by_hand():
    # Four images at confidence 0.9, three of them right; two at 0.55, none right: 4/6 * 0.15 + 2/6 * 0.55
    confidences = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.55, 0.55])
    logits = torch.stack([confidences, 1 - confidences], dim=1).log()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    metrics = stage.metrics_of(stage.batch_sums(logits, labels))
    assert metrics["ece"] == pytest.approx(100 * (4 / 6 * 0.15 + 2 / 6 * 0.55), abs=1e-4)
    assert metrics["top1"] == pytest.approx(50) and metrics["top5"] == pytest.approx(100)
    assert metrics["loss"] == pytest.approx(-np.log([0.9, 0.9, 0.9, 0.1, 0.45, 0.45]).mean(), abs=1e-6)


def test_over_and_under_confidence_of_one_bin_cancel_and_of_two_do_not():
    def ece(confidences, right):
        confidences = torch.tensor(confidences)
        logits = torch.stack([confidences, 1 - confidences], dim=1).log()
        return stage.metrics_of(stage.batch_sums(logits, 1 - torch.tensor(right)))["ece"]

    assert ece([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0]) == pytest.approx(0, abs=1e-4)
    assert ece([0.75, 0.55], [0, 1]) == pytest.approx(100 * (0.75 + 0.45) / 2, abs=1e-4)
    assert ece([1.0], [1]) == pytest.approx(0, abs=1e-4)  # the last bin includes 1


def test_sums_of_batches_are_those_of_the_whole():
    logits, labels = torch.randn(40, 7), torch.arange(40) % 7
    whole = stage.batch_sums(logits, labels)
    parts = stage.batch_sums(logits[:13], labels[:13]) + stage.batch_sums(logits[13:], labels[13:])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-5)
    top5 = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1).float().mean().item()
    assert stage.metrics_of(whole)["top5"] == pytest.approx(100 * top5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 3))
def test_chosen_images_are_spread_over_the_classes(labels, num, seed):
    labels = np.array(labels)
    chosen = stage.choose_images(labels, num, seed)
    assert len(chosen) == min(num, len(labels)) and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, stage.choose_images(labels, num, seed))
    assert np.array_equal(chosen, stage.choose_images((labels * 5 + 1) % 7, num, seed))  # classes in another order
    taken, available = np.bincount(labels[chosen], minlength=6), np.bincount(labels, minlength=6)
    for label in range(6):  # a class with fewer than another has nothing left to give
        assert taken[label] >= taken.max() - 1 or taken[label] == available[label]


# ---------------------------------------------------------------------------------------------------------------------
# the command line

ARCH = "shufflenet_v2_x0_5"  # small, with batch norms


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Data of 3 classes (5 images each in val) and two checkpoints whose classes are in different orders."""
    folder = tmp_path_factory.mktemp("robustness")
    rng = np.random.default_rng(0)
    for split, num in (("train", 1), ("val", 5)):
        for label, name in enumerate("abc"):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(num):
                image = rng.integers(0, 90, (36, 40, 3), dtype=np.uint8)
                image[..., label] += 120
                Image.fromarray(image).save(folder / "data" / split / name / f"{index}.png")
    save_model(folder / "teacher" / "model.pt", ARCH, "abc", seed=1)
    save_model(folder / "student1" / "model.pt", ARCH, "cab", seed=6, image_size=40)
    return folder


BOTH = ("teacher/model.pt", "student1/model.pt", "--data", "data")
ALL = (*BOTH, "--corrupt", "--fgsm", "0", "8", "--pgd", "8", "--pgd-steps", "3")


@pytest.fixture(scope="module")
def finished(work, run_stage):
    return run_stage("06_eval_robustness.py", *ALL, "--out", "out", cwd=work)


def read(work, out="out"):
    return json.loads((work / out / "robustness.json").read_text())


def test_results_have_the_form_of_the_contract(work, finished):
    results = read(work)
    assert list(results) == ["teacher/model.pt", "student1/model.pt"]
    for path, entry in results.items():
        assert entry["sha256"] == common.file_sha256(work / path)
        details = {"balanced_top1", "interval95", "per_class", "confusion", "right"}
        assert set(entry["clean"]) == {"top1", "top5", "loss", "ece", "num"} | details
        assert entry["clean"]["top5"] == 100
        per_corruption = entry["corrupt"]["per_corruption"]
        assert list(per_corruption) == list(stage.CORRUPTIONS)
        assert all(len(top1) == 5 and 0 <= min(top1) <= max(top1) <= 100 for top1 in per_corruption.values())
        assert entry["corrupt"]["top1"] == pytest.approx(np.mean([per_corruption[name] for name in stage.DRAWN]))
        assert entry["corrupt"]["top1_extra"] == pytest.approx(np.mean([per_corruption[name] for name in stage.EXTRA]))
        assert list(entry["fgsm"]) == ["0", "8"] and list(entry["pgd"]) == ["8"]
        assert entry["fgsm"]["0"] == entry["clean"]["top1"]
        settings = {"data": str(work / "data"), "num_images": 15, "seed": 0, "steps": 3}
        assert entry["settings"]["pgd"].pop("images").startswith("15 images, names ")
        assert entry["settings"]["pgd"] == settings
    clean, attacked = (
        [entry[part][key] for entry in results.values()] for part, key in (("clean", "top1"), ("pgd", "8"))
    )
    assert clean != attacked


def test_clean_numbers_equal_those_of_training(work, finished):
    for path, entry in read(work).items():
        model, checkpoint = common.load_model(work / path)
        images, labels, _ = common.labeled_images(work / "data", "val", checkpoint["classes"])
        expected = common.evaluate(model, images, labels, common.View.of(checkpoint), common.init_processes("cpu"))
        assert entry["clean"]["top1"] == pytest.approx(expected["val_top1"])
        assert entry["clean"]["loss"] == pytest.approx(expected["val_loss"], rel=1e-4)


def test_the_table_and_the_picture(work, finished):
    table = finished.stdout.strip().splitlines()[-4:]
    assert table == (work / "out" / "robustness.md").read_text().strip().splitlines()[-4:]
    assert len({len(line) for line in table}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["model", "parameters", "clean top-1", "corrupted top-1", "FGSM 0", "FGSM 8", "PGD 8"]
    assert [row[0] for row in cells[2:]] == ["teacher", "student1"]
    entry = read(work)["student1/model.pt"]
    parameters = sum(p.numel() for p in common.build_model(ARCH, 3).parameters())
    assert entry["parameters"] == parameters and cells[3][1] == f"{parameters / 1e6:.2f}M"
    half = 196 * np.sqrt(0.01 * entry["clean"]["top1"] * (1 - 0.01 * entry["clean"]["top1"]) / 15)
    assert cells[3][2] == f"{entry['clean']['top1']:.2f} ± {half:.2f}"
    assert cells[3][3].startswith(f"{entry['corrupt']['top1']:.2f} ± ")
    assert "frost, which needs photographs" in (work / "out" / "robustness.md").read_text()
    with Image.open(work / "out" / "robustness.png") as picture:
        assert picture.width > 1000 and np.array(picture.convert("L")).std() > 10


def test_the_same_command_again_does_nothing_and_prints_the_table(work, finished, run_stage):
    before = read(work)
    again = run_stage("06_eval_robustness.py", *ALL, "--out", "out", cwd=work)
    assert read(work) == before
    assert again.stdout.strip().splitlines()[-4:] == finished.stdout.strip().splitlines()[-4:]
    assert "corrupt gaussian_noise:" in finished.stdout and "corrupt gaussian_noise:" not in again.stdout


def test_a_killed_run_goes_on(work, finished, run_stage):
    """The file of a run that was killed in the middle of the first model's corruptions, and then run again."""
    partial = {"teacher/model.pt": read(work)["teacher/model.pt"]}
    entry = partial["teacher/model.pt"]
    entry["corrupt"] = {"per_corruption": dict(list(entry["corrupt"]["per_corruption"].items())[:7])}
    del entry["fgsm"], entry["pgd"], entry["settings"]["fgsm"], entry["settings"]["pgd"]
    (work / "killed").mkdir()
    (work / "killed" / "robustness.json").write_text(json.dumps(partial))
    again = run_stage("06_eval_robustness.py", *ALL, "--out", "killed", cwd=work)
    assert read(work, "killed") == read(work)
    assert "teacher clean" not in again.stdout and "teacher corrupt gaussian_noise" not in again.stdout
    assert "teacher corrupt jpeg_compression" in again.stdout and "student1 clean" in again.stdout


def test_parts_of_other_weights_and_of_other_settings_are_done_again(work, finished, run_stage):
    shutil.copytree(work / "out", work / "stale")
    shutil.copytree(work / "student1", work / "kept")
    before = read(work)
    save_model(work / "student1" / "model.pt", ARCH, "cab", seed=3, image_size=40)
    again = run_stage("06_eval_robustness.py", *BOTH, "--out", "stale", "--fgsm", "8", cwd=work)
    shutil.copyfile(work / "kept" / "model.pt", work / "student1" / "model.pt")
    after = read(work, "stale")
    assert after["teacher/model.pt"] == before["teacher/model.pt"]
    assert "teacher clean" not in again.stdout and "teacher fgsm" not in again.stdout
    student = after["student1/model.pt"]
    assert student["sha256"] != before["student1/model.pt"]["sha256"]
    assert student["clean"] != before["student1/model.pt"]["clean"]
    assert list(student["fgsm"]) == ["8"] and "corrupt" not in student

    again = run_stage("06_eval_robustness.py", *BOTH, "--out", "stale", "--fgsm", "8", "--num-images", "6", cwd=work)
    assert "teacher fgsm 8" in again.stdout and "teacher clean" not in again.stdout
    teacher = read(work, "stale")["teacher/model.pt"]
    assert teacher["settings"]["fgsm"]["num_images"] == 6 and list(teacher["fgsm"]) == ["8"]
    assert teacher["corrupt"] == before["teacher/model.pt"]["corrupt"]  # kept in the file, not shown beside the others
    assert "corrupted" not in again.stdout

    # an image that belongs to another class, put there: as many images, another val
    one, two, *_ = sorted((work / "data" / "val").iterdir())
    image = next(one.iterdir())
    other = image.rename(two / f"other{image.suffix}")
    again = run_stage("06_eval_robustness.py", *BOTH, "--out", "stale", "--fgsm", "8", cwd=work)
    other.rename(image)
    assert "teacher clean" in again.stdout and "teacher fgsm 8" in again.stdout and "student1 clean" in again.stdout


def test_two_runs_at_a_time_keep_what_the_other_one_saves(work, call_main, monkeypatch, tmp_path):
    """While the teacher is measured, another run saves its student, which this one has not seen at its start."""
    load_model, other = common.load_model, {"student1/model.pt": {"sha256": "of the other run", "settings": {}}}

    def load_and_be_overtaken(*args):
        tmp_path.joinpath("robustness.json").write_text(json.dumps(other))
        return load_model(*args)

    monkeypatch.setattr(stage, "load_model", load_and_be_overtaken)
    monkeypatch.chdir(work)
    words = ("teacher/model.pt", "--data", "data", "--out", tmp_path, "--device", "cpu")
    assert call_main("06_eval_robustness", *words).returncode == 0
    saved = json.loads((tmp_path / "robustness.json").read_text())
    assert list(saved) == ["teacher/model.pt", *other] and saved["student1/model.pt"] == other["student1/model.pt"]


def test_processes_and_batches_do_not_change_the_numbers(work, finished, run_stage):
    run_stage("06_eval_robustness.py", *ALL, "--out", "two", "--batch-size", "4", nproc=2, cwd=work)
    one, two = read(work), read(work, "two")
    assert list(one) == list(two)
    for path in one:
        for part in ("corrupt", "fgsm", "pgd", "settings"):
            assert one[path][part] == two[path][part], part
        for name, value in one[path]["clean"].items():
            is_number = isinstance(value, float)
            assert two[path]["clean"][name] == (pytest.approx(value, rel=1e-4) if is_number else value), name


def test_an_unreadable_image_is_left_out(work, finished, run_stage, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "b" / "2.png").write_bytes(b"not an image")
    done = run_stage(
        "06_eval_robustness.py",
        "teacher/model.pt",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        "--fgsm",
        "0",
        cwd=work,
    )
    assert "1 images are unreadable" in done.stdout and "2.png" in done.stdout
    entry = read(tmp_path)["teacher/model.pt"]
    assert (entry["clean"]["top1"] * 14 / 100) % 1 == pytest.approx(0, abs=1e-6)  # a share of 14, not of 15
    assert sum(of_class["num"] for of_class in entry["clean"]["per_class"].values()) == 14
    assert entry["fgsm"]["0"] == entry["clean"]["top1"]


def test_evaluation_in_bf16_and_compiled(tiny_data, call_main, compiled, tmp_path):
    """Rounding shows in the loss of the clean part and not in an attack, which stays in float32."""
    path, results = save_model(tmp_path / "model.pt", "squeezenet1_1", data=str(tiny_data)), {}
    for name, flags in {"plain": [], "bf16": ["--precision", "bf16"], "compiled": ["--compile"]}.items():
        out = tmp_path / name
        assert call_main("06_eval_robustness", path, "--out", out, "--fgsm", 2, *flags).returncode == 0
        results[name] = json.loads((out / "robustness.json").read_text())[str(path)]
    assert len(compiled) == 1
    plain, bf16, traced = (result["clean"]["loss"] for result in results.values())
    assert traced == pytest.approx(plain, rel=1e-5) and bf16 == pytest.approx(plain, rel=0.05) and bf16 != plain
    assert results["plain"]["fgsm"] == results["bf16"]["fgsm"] == results["compiled"]["fgsm"]
    assert [result["settings"]["clean"]["precision"] for result in results.values()] == ["fp32", "bf16", "fp32"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("missing.pt", "--data", "data"), "missing.pt"),
        (("text.pt", "--data", "data"), "text.pt"),
        (("teacher/model.pt", "text.pt", "--data", "data"), "text.pt"),
        (("teacher/model.pt", "--data", "nowhere"), "nowhere"),
        (("teacher/model.pt", "--data", "unknown"), "zebra"),
        (("teacher/model.pt", "--data", "data", "--num-images", "0"), "--num-images"),
        (("teacher/model.pt", "--data", "data", "--num-images", "-3"), "--num-images"),
        (("teacher/model.pt", "--data", "data", "--fgsm", "-1"), "--fgsm"),
        (("teacher/model.pt", "--data", "data", "--pgd-steps", "0"), "--pgd-steps"),
        (("teacher/model.pt", "--data", "data", "--batch-size", "0"), "--batch-size"),
        (("teacher/model.pt", "--data", "data", "--corr"), "--corr"),
    ],
)
def test_wrong_input_gives_one_line_and_status_2(work, finished, call_main, flags, named, monkeypatch):
    (work / "text.pt").write_text("these are not weights\n")
    if not (work / "unknown").exists():
        shutil.copytree(work / "data", work / "unknown")
        (work / "unknown" / "val" / "zebra").mkdir()
    before = (work / "out" / "robustness.json").read_bytes()
    monkeypatch.chdir(work)
    assert_mistake(call_main("06_eval_robustness", *flags, "--out", "out", "--device", "cpu"), named)
    assert (work / "out" / "robustness.json").read_bytes() == before


@pytest.mark.xdist_group("06")
def test_a_results_file_of_something_else_is_not_overwritten(work, run_stage):
    (work / "foreign").mkdir()
    (work / "foreign" / "robustness.json").write_text("mine, not JSON")
    flags = ["teacher/model.pt", "--data", "data", "--out", "foreign"]
    done = run_stage(ROOT / "06_eval_robustness.py", *flags, cwd=work, check=False, launcher="python")
    assert_mistake(done, "foreign/robustness.json")
    assert (work / "foreign" / "robustness.json").read_text() == "mine, not JSON"


# what is behind a top-1


def test_the_details_are_a_brute_force_count():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(-1, 5, 200)  # no image of class 4, some unreadable
    predicted = np.where(rng.random(200) < 0.5, labels, predicted)
    details = common.details_of(labels, predicted, list("abcde"))
    pairs = [(t, p) for t, p in zip(labels.tolist(), predicted.tolist(), strict=True) if p >= 0]
    recalls = []
    for c, name in enumerate("abcde"):
        of_class, named = [p for t, p in pairs if t == c], [t for t, p in pairs if p == c]
        entry = details["per_class"][name]
        assert entry["num"] == len(of_class)
        recall = 100 * of_class.count(c) / len(of_class) if of_class else None
        assert entry["recall"] == pytest.approx(recall)
        assert entry["precision"] == pytest.approx(100 * named.count(c) / len(named))
        recalls += [] if recall is None else [recall]
        assert details["confusion"][c] == [of_class.count(p) for p in range(5)]
    assert details["balanced_top1"] == pytest.approx(sum(recalls) / 4)
    share = sum(t == p for t, p in pairs) / len(pairs)
    assert details["interval95"] == pytest.approx(196 * (share * (1 - share) / len(pairs)) ** 0.5)
    many = common.details_of(labels, predicted, [str(c) for c in range(101)])
    assert "confusion" not in many and many["right"] == details["right"]


def test_the_differences_stand_beside_the_table(work, finished):
    results = read(work)
    clean = [results[f"{name}/model.pt"]["clean"] for name in ("teacher", "student1")]
    points, half = common.paired_difference(clean[1], clean[0])
    line = "Clean top-1 against teacher, image by image, with 95 percent intervals: "
    line += f"student1 {points:+.2f} ± {half:.2f}."
    assert line in finished.stdout and line in (work / "out" / "robustness.md").read_text()
    assert points == pytest.approx(clean[1]["top1"] - clean[0]["top1"])
