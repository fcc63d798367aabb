"""Reading images, the clean view in both crop modes, the random view, large JPEGs decoded small, and squashed images
through every stage."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHEAP, checkpoint_of, encoded, load_stage, logits_on, noise_image, save_model, write_files
from PIL import Image, ImageDraw

import common
from common import CROP_MODES, Crop, ImageDataset, View
from common import eval_view, list_images, load_image, normalize, random_view


# reading


def image_of(values, mode: str | None = None) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.uint8), mode)


def paletted() -> Image.Image:
    image = image_of([0, 1, 2], "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


GREY = [128] * 3  # what a transparent pixel lies on
RED, BLUE = [255, 0, 0], [0, 0, 255]
ALPHA = [[200, 0, 50, 255], [200, 0, 50, 0], [200, 0, 50, 128]]
DEEP = Image.fromarray(np.array([[0, 255, 256, 1000, 32768, 65535]], dtype=np.uint16))
SCALED = [[level] * 3 for level in (0, 0, 1, 3, 128, 255)]
ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", (1, 1), "green")]}
SEEN = [  # file, image, how it is saved, the colours of its first row
    ("grey.png", image_of([0, 7, 255]), {}, [[0] * 3, [7] * 3, [255] * 3]),
    ("one_bit.png", image_of([0, 255]).convert("1"), {}, [[0] * 3, [255] * 3]),
    ("alpha.png", image_of(ALPHA), {}, [[200, 0, 50], GREY, [164, 64, 89]]),
    ("grey_and_alpha.png", image_of([[255, 0], [10, 255]], "LA"), {}, [GREY, [10] * 3]),
    ("transparent_colour.png", paletted(), {"transparency": 1}, [RED, GREY, BLUE]),
    ("transparent_colours.png", paletted(), {"transparency": bytes([255, 0, 255])}, [RED, GREY, BLUE]),
    ("16_bit.png", DEEP, {}, SCALED),
    ("16_bit.tif", DEEP, {}, SCALED),
    ("cmyk.jpg", Image.new("RGB", (1, 1), (220, 30, 30)).convert("CMYK"), {}, [[220, 30, 30]]),
    ("animation.gif", Image.new("RGB", (1, 1), "red"), ANIMATION, [RED]),
    ("png_named.jpeg", image_of([RED, BLUE]), {"format": "PNG"}, [RED, BLUE]),
]


def pixels(path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("name", "image", "options", "expected"), SEEN, ids=[case[0] for case in SEEN])
def test_images_are_seen_as_a_person_sees_them(name, image, options, expected, tmp_path):
    image.save(tmp_path / name, **options)
    assert np.abs(pixels(tmp_path / name)[0] - expected).max() <= (12 if name == "cmyk.jpg" else 1)


def orientation_tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_exif_rotation_is_applied(tmp_path):
    upright = Image.new("RGB", (24, 16), (10, 10, 10))
    upright.paste((250, 20, 20), (0, 0, 8, 8))  # the upper left corner as a person sees it
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "a.jpg", exif=orientation_tag(6), quality=98, subsampling=0)
    assert np.abs(pixels(tmp_path / "a.jpg") - np.asarray(upright)).max() < 30


# the clean view


def test_default_crop_fraction():
    assert [View.default(size).crop_fraction for size in (1, 32, 64)] == [1, 1, 1]
    assert View.default(65).crop_fraction == 65 / 97


LONG = [(60, 180), (180, 60), (61, 200), (200, 61), (3, 400), (64, 64), (1, 300), (1, 1)]


def by_pillow(image, size: int, mode="center", fraction=1.0, interpolation="bicubic") -> np.ndarray:
    """The clean view, written down once more. squash with a fraction is timm's: resized to more, the middle cut out."""
    resample = Image.Resampling[interpolation.upper()]
    if mode == "squash":
        side = int(size / fraction)
        margin = round((side - size) / 2)
        whole = np.asarray(image.resize((side, side), resample))
        return whole[margin:, margin:][:size, :size]
    side = max(1, int(fraction * min(image.size)))
    left, top = (image.width - side + 1) // 2, (image.height - side + 1) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), resample))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("image_size", [28, 100])
def test_the_clean_view_in_each_crop_mode(mode, image_size, interpolation):
    """Of the cropped pixels alone: what lies outside the crop must not shine in at the edges."""
    for width, height in LONG:
        image = noise_image(width, height)
        for fraction in (1.0, 0.875, 0.5):
            view = eval_view(image, View(image_size, fraction, interpolation, crop_mode=mode))
            expected = by_pillow(image, image_size, mode, fraction, interpolation)
            np.testing.assert_array_equal(view, expected)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(seed)
    for _ in range(60):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(5, width / 4)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.mark.parametrize(("width", "height", "scale"), [(1001, 770, 8), (333, 500, 4), (260, 255, 2), (250, 139, 1)])
def test_large_jpegs_are_decoded_small_and_look_the_same(width, height, scale, tmp_path):
    for name, orientation in (("upright", 1), ("rotated", 6)):
        photograph(width, height).save(tmp_path / f"{name}.jpg", quality=92, exif=orientation_tag(orientation))
    images = list_images(tmp_path)
    view = View(32, 0.9)
    dataset = ImageDataset(images, clean=view)
    for row, name in enumerate(("rotated", "upright")):
        whole = eval_view(load_image(tmp_path / f"{name}.jpg"), view).astype(int)
        small = dataset[row][1][0].astype(int)
        if scale == 1 or name == "rotated":
            np.testing.assert_array_equal(small, whole)
        else:
            assert (small != whole).any()
            assert np.abs(small - whole).mean() < 6  # up to half a pixel aside
            assert images.load(row, 72).size == (-(-width // scale), -(-height // scale))
    beside_a_crop = ImageDataset(images, view, Crop(32, 0.1, True))[1][1][0]
    np.testing.assert_array_equal(beside_a_crop, whole)


@pytest.mark.parametrize("size", [(400, 1200), (1200, 400)])
def test_long_jpegs_are_decoded_small_to_be_squashed(size, tmp_path):
    photograph(*size).save(tmp_path / "a.jpg", quality=92)
    view = View(32, 1.0, crop_mode="squash")
    dataset = ImageDataset(list_images(tmp_path), clean=view)
    assert dataset.images.load(0, view.enough).size < size
    whole = eval_view(load_image(tmp_path / "a.jpg"), view).astype(int)
    assert np.abs(dataset[0][1][0] - whole).mean() < 2.5


# the random view


def test_random_view_keeps_to_area_and_aspect_and_flips_half():
    """The crop is read off two gradients: red counts columns, green counts rows."""
    y, x = np.mgrid[:100, :120]
    image = Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8))
    rng = np.random.default_rng(0)
    areas, aspects, flips = [], [], []
    for _ in range(300):
        view = random_view(image, Crop(32, 0.3, True), rng).astype(float)
        width, height = (abs(np.ptp(view[8:24, 8:24, c].mean(c))) / 2 * 32 / 15 for c in (0, 1))
        areas.append(width * height / 12000)
        aspects.append(width / height)
        flips.append(view[0, 0, 0] > view[0, -1, 0])
    assert 0.27 < min(areas) < 0.4 and 0.85 < max(areas) < 1.05
    assert min(aspects) > 0.7 and max(aspects) < 1.4
    assert 0.4 < np.mean(flips) < 0.6
    views = [random_view(image, Crop(32, 0.3, False), rng) for _ in range(50)]
    assert not any(view[0, 0, 0] > view[0, -1, 0] for view in views), "flipped though it must not be"


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("image_size", [64, 100])
def test_small_images_come_as_the_clean_view(image_size, mode):
    """Nothing is drawn for it: the noise of small images does that later."""
    image, rng = photograph(180, 60), np.random.default_rng(0)
    view = random_view(image, Crop(image_size, None, True, mode), rng)
    fraction = 100 / 132 if image_size == 100 and mode == "center" else 1.0
    np.testing.assert_array_equal(view, by_pillow(image, image_size, mode, fraction))
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("mode", CROP_MODES)
def test_where_no_crop_fits_after_ten_tries_the_view_is_the_clean_one(mode):
    for size in LONG[:5]:
        image = noise_image(*size)
        view = random_view(image, Crop(32, 1.0, False, mode), np.random.default_rng(0))
        np.testing.assert_array_equal(view, by_pillow(image, 32, mode))


def test_random_crops_of_squashed_images_come_from_the_image_as_it_is():
    image = noise_image(180, 60)
    for seed in range(10):
        crop = Crop(32, 0.08, True, "squash")
        view = random_view(image, crop, np.random.default_rng(seed))
        as_it_is = random_view(image, crop._replace(crop_mode="center"), np.random.default_rng(seed))
        np.testing.assert_array_equal(view, as_it_is)


def test_a_normalized_batch_is_what_the_model_was_made_for():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalize(images, View(32, 1.0, "bicubic", mean, std)), expected, rtol=1e-5, atol=1e-6)


def test_a_view_at_another_size_has_the_crop_of_that_size():
    view = View(224, 0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
    assert view.at(224) == view
    assert view.at(320) == view._replace(image_size=320, crop_fraction=320 / 352)
    assert view.at(64).crop_fraction == 1.0
    assert view.at(320).at(224).crop_fraction == 224 / 256  # it is no longer known
    squashed = View(224, 0.9, crop_mode="squash")
    assert squashed.at(320) == squashed._replace(image_size=320), "the share that timm says holds at any size"
    assert squashed.at(224, "center").crop_fraction == 224 / 256
    assert View(32, 1.0).at(96, "squash").crop_fraction == 1.0


def test_an_unknown_crop_mode_is_a_mistake(mistake):
    mistake(lambda: View.of({"image_size": 32, "crop_fraction": 1.0, "crop_mode": "letterbox"}), "crop_mode")


# through the stages


def test_which_crop_mode_a_run_starts_with(tmp_path):
    """The flag's, then that of --init, then the teacher's; foreign weights say nothing, unless timm's record does."""
    center, squash = (save_model(tmp_path / f"{mode}.pt", crop_mode=mode) for mode in CROP_MODES)
    foreign = tmp_path / "weights.pth"
    torch.save(checkpoint_of(center)["model"], foreign)
    cases = [
        ({"init": foreign, "crop_mode": "squash"}, "squash"),
        ({"arch": "timm/coat_lite_medium_384"}, "squash"),
        ({"teacher": center, "init": squash}, "squash"),
        ({"teacher": squash, "init": foreign}, "squash"),
    ]
    flags = dict.fromkeys(("init", "crop_mode", "small_images", "num_ops", "magnitude", "ratio", "min_crop_area"))
    for given, expected in cases:
        args = argparse.Namespace(**{"arch": CHEAP, "epochs": None, "hflip": True, **flags, **given})
        initial = common.initial_weights(args.init, args.arch, None) if args.init else {}
        teacher = checkpoint_of(args.teacher) if "teacher" in given else {}
        setup = common.setup_of(args, teacher, initial, 32)
        assert setup.view.crop_mode == setup.crop.crop_mode == expected, given


@pytest.fixture
def squashing(tmp_path):
    """(a teacher that squashes, its data directory of lying images)"""
    files, names = {}, ["train/a", "train/b", "val/a", "val/b", "unlabeled"]
    for seed, name in enumerate(f"{name}/{i}.png" for name in names for i in range(4)):
        files[name] = encoded(photograph(96, 32, seed), "PNG")
    data = write_files(tmp_path / "data", files)
    return save_model(tmp_path / "t.pt", classes=["a", "b"], data=str(data), crop_mode="squash"), data


def logits_by_hand(checkpoint, paths, mode):
    """Of the images as Pillow alone makes their views."""
    model, saved = common.load_model(checkpoint)
    views = [by_pillow(Image.open(path).convert("RGB"), saved["image_size"], mode) for path in paths]
    return torch.from_numpy(logits_on(views, model, saved))


def test_squash_goes_through_every_stage(squashing, call_main, tmp_path, monkeypatch):
    """02 labels, and 05 and 06 measure, on the views as Pillow makes them."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (teacher, data), logits, selection = squashing, tmp_path / "l.h5", tmp_path / "b.h5"
    student, fixed = (tmp_path / name / "model.pt" for name in ("student", "fixres"))
    short = ["--batch-size", 4, "--steps", 1, "--out"]
    for command in (
        ["02_pseudo_label", "--teacher", teacher, "--out", logits],
        ["03_balance", logits, "--threshold", 0, "--per-class", "all", "--out", selection],
        ["04_train_student", "--pseudo-labels", selection, "--ratio", 1, *short, student.parent],
        ["05_fixres_finetune", "--checkpoint", teacher, *short, fixed.parent],
        ["06_eval_robustness", teacher, fixed, "--out", tmp_path],
    ):
        assert call_main(*command).returncode == 0
    expected = logits_by_hand(teacher, sorted((data / "unlabeled").glob("*.png")), "squash")
    expected -= expected.amax(1, True)
    assert np.ptp(expected.numpy(), axis=0).max() > 0.05
    got = common.open_label_file(logits).column("logits").astype(np.float32)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
    assert View.of(checkpoint_of(student)) == View.of(checkpoint_of(teacher))
    assert View.of(checkpoint_of(fixed)) == View.of(checkpoint_of(teacher)).at(40)
    report = json.loads((tmp_path / "robustness.json").read_text())
    val, truth = sorted((data / "val").rglob("*.png")), torch.tensor([0] * 4 + [1] * 4)
    for path in (teacher, fixed):
        loss = F.cross_entropy(logits_by_hand(path, val, "squash"), truth).item()
        assert report[str(path)]["clean"]["loss"] == pytest.approx(loss, rel=1e-3)


def test_on_the_fly_the_teacher_labels_its_own_view(squashing, call_main, tmp_path, monkeypatch):
    teacher, stage, seen = squashing[0], load_stage("04_train_student"), []

    class Watched(stage.TeachersLabels):
        def __call__(self, batch, *settings):
            seen.append((batch, self.images, super().__call__(batch, *settings)))
            return seen[-1][2]

    monkeypatch.setattr(stage, "TeachersLabels", Watched)
    flags = ["--crop-mode", "center", "--batch-size", 4, "--steps", 2, "--ratio", 1, "--out", tmp_path / "s"]
    assert call_main("04_train_student", "--teacher", teacher, *flags).returncode == 0 and seen
    for batch, images, probs in seen:
        paths = [images.name(row) for row in batch.rows.tolist()]
        views = np.stack([by_pillow(Image.open(path), 32, "squash") for path in paths])
        np.testing.assert_array_equal(batch.views[0].permute(0, 2, 3, 1).numpy(), views)
        torch.testing.assert_close(probs, logits_by_hand(teacher, paths, "squash").softmax(1), rtol=1e-4, atol=1e-5)
    assert checkpoint_of(tmp_path / "s" / "model.pt")["crop_mode"] == "center"
