"""Reading images as a person sees them, the two views, listing folders and shards, labels, and the order of batches."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import (
    ImageDataset,
    Processes,
    default_crop_fraction,
    eval_view,
    grid_keys,
    labeled_images,
    list_images,
    load_batches,
    load_image,
    random_view,
    train_keys,
    unlabeled_images,
)

CPU = torch.device("cpu")


def ranks(world_size):
    return [Processes(CPU, rank, rank, world_size) for rank in range(world_size)]


def noise_image(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def fails_with(capsys, call, *args):
    """The one line of a user's mistake."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


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


def test_unreadable_images_are_named_errors_and_nothing_takes_their_place(tmp_path):
    noise_image(40, 40).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "half.jpg": whole[: len(whole) // 2],
        "header.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "script.ppm")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    names = {*bad, "float.tif", "script.png", "gone.jpg"}

    rows = list_images(tmp_path)
    dataset = ImageDataset(rows, clean={"image_size": 16, "crop_fraction": 1.0})
    for row in range(len(rows)):
        name = rows.path[row].decode()
        item = dataset[row]
        assert item[0] == row
        if name in names:
            assert item[1] is None and str(tmp_path / name) in item[2], item
        else:
            assert item[2] is None and item[1][0].shape == (16, 16, 3)
    assert names < {path.decode() for path in rows.path}

    batch = next(iter(load_batches(dataset, [list(range(len(rows)))], ranks(1)[0], 0)))
    good = [row for row in range(len(rows)) if rows.path[row].decode() not in names]
    assert batch.rows.tolist() == good
    assert {row for row, _ in batch.errors} == set(range(len(rows))) - set(good)
    for view, row in zip(batch.views[0], good, strict=True):
        np.testing.assert_array_equal(view.permute(1, 2, 0), dataset[row][1][0])


def test_a_batch_without_any_readable_image_is_empty(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    dataset = ImageDataset(list_images(tmp_path), clean={"image_size": 16, "crop_fraction": 1.0})
    batch = next(iter(load_batches(dataset, [[0, 0]], ranks(1)[0], 0)))
    assert len(batch.rows) == 0 and [row for row, _ in batch.errors] == [0, 0]


# views


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
        np.testing.assert_array_equal(eval_view(image, image_size, fraction), expected)


def test_eval_view_sees_only_the_centre():
    image = Image.new("RGB", (64, 96), (0, 0, 0))
    image.paste((255, 255, 255), (0, 16, 64, 80))
    assert eval_view(image, 64, 1.0).min() == 255
    assert (eval_view(image, 28, 0.875)[4:-4, 4:-4] == 255).all()


def test_random_view_depends_on_seed_epoch_and_row_alone(tiny_data):
    rows = list_images(tiny_data / "unlabeled")
    noised = {"image_size": 24, "min_area": 0.08, "hflip": True}
    keys = [(epoch, row) for epoch in range(3) for row in range(len(rows))]

    def views(seed, order, **kwargs):
        dataset = ImageDataset(rows, noised=noised, seed=seed, **kwargs)
        torch.manual_seed(len(order))  # what ran before must not matter
        return {key: dataset[key][1][-1].tobytes() for key in order}

    first = views(0, keys)
    assert views(0, keys[::-1]) == first
    assert views(0, keys[7:9]) == {key: first[key] for key in keys[7:9]}
    assert views(0, keys, clean={"image_size": 8, "crop_fraction": 1.0}) == first, "a clean view shifts the random one"
    assert len(set(first.values())) == len(keys), "two of them are the same"
    assert not set(views(1, keys).values()) & set(first.values())


def test_random_view_same_with_workers(tiny_data):
    dataset = ImageDataset(list_images(tiny_data / "val"), noised={"image_size": 16, "min_area": 0.2, "hflip": True})
    keys = [[(0, 1), (0, 2)], [(0, 3), (1, 1)], [(4, 0)]]
    alone, parallel = (list(load_batches(dataset, keys, ranks(1)[0], workers)) for workers in (0, 2))
    for one, two in zip(alone, parallel, strict=True):
        assert torch.equal(one.rows, two.rows) and torch.equal(one.views[0], two.views[0])


def test_random_view_keeps_to_area_and_aspect_and_flips_half():
    """The crop is read off two gradients: red counts columns, green counts rows."""
    y, x = np.mgrid[:100, :120]
    image = Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8))
    rng = np.random.default_rng(0)
    areas, aspects, flips = [], [], []
    for _ in range(300):
        view = random_view(image, 32, rng, min_area=0.3, hflip=True).astype(float)
        width, height = (abs(np.ptp(view[8:24, 8:24, c].mean(c))) / 2 * 32 / 15 for c in (0, 1))
        areas.append(width * height / 12000)
        aspects.append(width / height)
        flips.append(view[0, 0, 0] > view[0, -1, 0])
    assert 0.27 < min(areas) < 0.4 and 0.85 < max(areas) < 1.05
    assert min(aspects) > 0.7 and max(aspects) < 1.4
    assert 0.4 < np.mean(flips) < 0.6
    views = [random_view(image, 32, rng, min_area=0.3, hflip=False) for _ in range(50)]
    assert not any(view[0, 0, 0] > view[0, -1, 0] for view in views), "flipped though it must not be"


def test_random_view_of_a_strip_falls_back_to_the_centre():
    image = noise_image(3, 400)
    view = random_view(image, 32, np.random.default_rng(0), min_area=0.9, hflip=False)
    np.testing.assert_array_equal(view, eval_view(image, 32, 1.0))


# listing


def names_of(rows):
    return [path.decode() for path in rows.path.tolist()]


def test_list_images_is_sorted_nested_and_takes_images_only(tmp_path):
    names = ["b.png", "a/z.JPG", "a/deep/er/x.webp", "a/b.bmp", "B.png", "ü.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(4, 4).save(tmp_path / name)
    for name in ("notes.txt", "a/labels.csv", ".hidden.png", "a/._b.bmp"):
        (tmp_path / name).write_text("no image")
    rows = list_images(tmp_path)
    assert names_of(rows) == sorted(names, key=os.fsencode)
    assert not rows.offset.any() and not rows.size.any()
    assert len(list_images(tmp_path / "a" / "deep")) == 1
    (tmp_path / "empty").mkdir()
    assert len(list_images(tmp_path / "empty")) == 0


def make_tar(path, files: dict, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_shards_are_read_in_place_like_folders(tmp_path, tiny_data):
    source = list_images(tiny_data / "unlabeled")
    shards = tmp_path / "shards" / "x.tar" / "deep"  # a folder may end in .tar
    shards.mkdir(parents=True)
    files = {name: (tiny_data / "unlabeled" / name).read_bytes() for name in names_of(source)}
    long = "long" * 40 + "/"  # over the 100 characters of a plain header
    make_tar(shards / "0.tar", {**{name: files[name] for name in names_of(source)[:12]}, "0.json": b"{}"})
    make_tar(shards / "1.tar", {long + name: files[name] for name in names_of(source)[12:]})
    rows = list_images(tmp_path / "shards" / "x.tar")
    prefixes = ["deep/0.tar/"] * 12 + ["deep/1.tar/" + long] * 8
    assert names_of(rows) == [prefix + name for prefix, name in zip(prefixes, names_of(source), strict=True)]
    assert rows.size.tolist() == [len(files[name]) for name in names_of(source)]
    for row in range(len(rows)):
        np.testing.assert_array_equal(np.asarray(rows.load(row)), np.asarray(source.load(row)))
    part = rows[np.array([3, 15])]
    np.testing.assert_array_equal(np.asarray(part.load(1)), np.asarray(source.load(15)))


def test_shards_that_cannot_be_read_are_said_and_the_others_seen(tmp_path, capsys):
    make_tar(tmp_path / "0.tar", {"a.png": b"1"})
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.tar")
    assert names_of(list_images(tmp_path)) == ["0.tar/a.png"]
    out = capsys.readouterr().out
    assert "gone.tar cannot be read (No such file or directory)" in out
    assert "pipe.tar cannot be read (not a regular file)" in out


@pytest.mark.parametrize("cores", [1, 3])
def test_many_shards_are_indexed_by_several_processes(cores, tmp_path, tiny_data, monkeypatch, capfd):
    source = list_images(tiny_data / "unlabeled")
    data = Path(source.name(0)).read_bytes()
    for i in range(30):  # names that sort otherwise than their shards
        names = [f"{j}.png" for j in range(i % 4)] + ["notes.txt"]
        make_tar(tmp_path / f"{i % 3}{i}.{'TAR' if i % 2 else 'tar'}", {name: data for name in names})
    data_of_7 = (tmp_path / "17.TAR").read_bytes()
    (tmp_path / "17.TAR").write_bytes(data_of_7[: -10240 + 512] + b"x" * 512)
    (tmp_path / "0.png").write_bytes(data)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    rows = list_images(tmp_path)
    assert capfd.readouterr().out.count("17.TAR is damaged after") == 1
    # what waits in a buffer must not be printed by each process
    code = f"import os, common; os.cpu_count = lambda: {cores}; print('waiting'); common.list_images({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("waiting") == 1 and done.stdout.count("17.TAR is damaged after") == 1
    expected = [f"{i % 3}{i}.{'TAR' if i % 2 else 'tar'}/{j}.png" for i in range(30) for j in range(i % 4)]
    assert names_of(rows) == sorted([*expected, "0.png"])
    for row in range(len(rows)):
        np.testing.assert_array_equal(np.asarray(rows.load(row)), np.asarray(source.load(0)))
    for i in range(40):
        make_tar(tmp_path / f"9{i}.tar", {"a.png": data}, "w:gz")
    with pytest.raises(SystemExit) as stop:
        list_images(tmp_path)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and ".tar is not a plain .tar file" in err


def test_a_shard_below_a_folder_named_like_one(tmp_path, tiny_data):
    source = list_images(tiny_data / "unlabeled")
    (tmp_path / "x.tar").mkdir()
    make_tar(tmp_path / "x.tar" / "0.tar", {"a.png": Path(source.name(0)).read_bytes()})
    rows = list_images(tmp_path)
    assert names_of(rows) == ["x.tar/0.tar/a.png"]
    np.testing.assert_array_equal(np.asarray(rows.load(0)), np.asarray(source.load(0)))


def test_an_empty_member_of_a_shard_is_an_error_of_its_row_alone(tmp_path):
    data = io.BytesIO()
    noise_image(8, 8).save(data, "PNG")
    make_tar(tmp_path / "0.tar", {"a.png": data.getvalue(), "b.png": b"", "c.png": data.getvalue()})
    dataset = ImageDataset(list_images(tmp_path), clean={"image_size": 8, "crop_fraction": 1.0})
    assert [dataset[row][2] is None for row in range(3)] == [True, False, True]
    assert "0.tar/b.png" in dataset[1][2]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz"), ("a.tar", "w:gz")]
)
def test_a_compressed_shard_is_refused_by_name(tmp_path, capsys, name, mode):
    make_tar(tmp_path / name, {"a.png": b"1"}, mode)
    assert name in fails_with(capsys, list_images, tmp_path)


# labels


def folders(root, **splits):
    """folders(root, train={"cat": 3}) draws three images in root/train/cat."""
    for split, classes in splits.items():
        for name, num in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                noise_image(4, 4, i).save(root / split / name / f"{i:03}.png")
    return root


def test_classes_are_matched_by_name(tmp_path):
    data = folders(tmp_path, train={"cat": 2, "ant": 3, "bee": 1}, val={"cat": 2, "bee": 1})
    rows, labels, classes = labeled_images(data, "train")
    assert classes == ["ant", "bee", "cat"]
    assert [names_of(rows)[i].split("/")[0] for i in range(6)] == [classes[label] for label in labels]
    rows, labels, same = labeled_images(data, "val", classes)  # val lacks the first class
    assert same == classes and labels.dtype == np.int64
    assert labels.tolist() == [1, 2, 2]
    order = ["cat", "ant", "bee"]  # a checkpoint's own order
    rows, labels, same = labeled_images(data, "train", order)
    assert same == order and labels.tolist() == [1, 1, 1, 2, 0, 0]


def test_images_beside_the_class_folders_have_no_label(tmp_path):
    data = folders(tmp_path, train={"cat": 2}, val={"cat": 1})
    noise_image(4, 4).save(data / "train" / "cover.png")
    assert len(labeled_images(data, "train")[0]) == 2


def test_nested_folders_belong_to_their_class(tmp_path):
    data = folders(tmp_path, train={"cat/indoor": 2, "cat/out/door": 1, "dog": 1}, val={"cat": 1})
    _, labels, classes = labeled_images(data, "train")
    assert classes == ["cat", "dog"] and labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("splits", "split", "words"),
    [
        ({}, "train", ["train/"]),
        ({"val": {"cat": 1}}, "train", ["train/"]),
        ({"train": {"cat": 1, "dog": 0}, "val": {"cat": 1}}, "train", ["dog"]),
        ({"train": {"cat": 1}, "val": {"cat": 1, "wolf": 1}}, "val", ["wolf", "cat"]),
        ({"train": {"cat": 1}, "val": {}}, "val", ["val"]),
    ],
)
def test_wrong_folders_are_one_line_and_status_2(tmp_path, capsys, splits, split, words):
    data = folders(tmp_path, **splits)
    for name in splits:
        (data / name).mkdir(exist_ok=True)
    line = fails_with(capsys, labeled_images, data, split, ["cat"] if split == "val" else None)
    assert all(word in line for word in words), line


def held_out(data):
    train, _, classes = labeled_images(data, "train")
    val, labels, _ = labeled_images(data, "val", classes)
    return names_of(train), names_of(val), labels


def test_without_val_a_tenth_is_held_out(tmp_path):
    data = folders(tmp_path / "one", train={"cat": 150, "dog": 150, "single": 1})
    train, val, labels = held_out(data)
    everything = names_of(list_images(data / "train"))
    assert sorted(train + val, key=os.fsencode) == everything, "not disjoint, or some are in neither"
    assert 15 <= len(val) <= 48
    assert {name.split("/")[0] for name in train} == {"cat", "dog", "single"}
    assert [("cat", "dog", "single")[label] for label in labels] == [name.split("/")[0] for name in val]
    assert names_of(unlabeled_images(data / "train")) == train, "labelling train/ would leak val"

    # a function of the paths alone: other pixels, another place, and other images beside them change nothing
    data = folders(tmp_path / "two" / "elsewhere", train={"cat": 75, "dog": 150, "single": 1, "zebra": 20})
    noise_image(9, 9).save(data / "train" / "cat" / "000.png")
    other = set(held_out(data)[1])
    shared = {name for name in everything if name in names_of(list_images(data / "train"))}
    assert set(val) & shared == other & shared


def test_never_a_classs_last_image_is_held_out(tmp_path):
    data = folders(tmp_path, train={f"class{i:02}": 1 + i % 2 for i in range(60)})
    train, val, _ = held_out(data)
    assert val, "none is held out"
    assert len({name.split("/")[0] for name in train}) == 60


def test_with_val_nothing_is_held_out(tmp_path):
    data = folders(tmp_path, train={"cat": 40}, val={"cat": 1})
    assert len(labeled_images(data, "train")[0]) == 40
    assert len(unlabeled_images(data / "train")) == 40


def test_unlabeled_folder_missing_or_empty(tmp_path, capsys):
    assert "nowhere" in fails_with(capsys, unlabeled_images, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in fails_with(capsys, unlabeled_images, tmp_path / "empty")


# the order of batches


def stream(num, batch_size, seed, which, steps, world_size=1):
    """The keys of each step, the processes' shares together."""
    shares = [list(train_keys(num, batch_size, seed, which, steps, rank)) for rank in ranks(world_size)]
    assert {len(share) for step in shares for share in step} == {batch_size // world_size}, "batches must be constant"
    return [sorted(key for share in step for key in share) for step in zip(*shares, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 3), st.integers(0, 1))
def test_train_keys_use_each_row_once_an_epoch(num, batch_size, seed, which):
    keys = [key for step in train_keys(num, batch_size, seed, which, range(30), ranks(1)[0]) for key in step]
    assert [epoch for epoch, _ in keys] == [position // num for position in range(30 * batch_size)]
    for epoch in range(len(keys) // num):
        assert sorted(row for _, row in keys[epoch * num : (epoch + 1) * num]) == list(range(num))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.integers(0, 20))
def test_train_keys_are_the_same_for_any_processes_and_any_start(num, sixths, seed, start):
    batch_size = 6 * sixths
    alone = stream(num, batch_size, seed, 0, range(25))
    assert stream(num, batch_size, seed, 0, range(25), 2) == alone
    assert stream(num, batch_size, seed, 0, range(25), 3) == alone
    assert stream(num, batch_size, seed, 0, range(start, 25)) == alone[start:]


def test_train_keys_orders_differ():
    def order(seed, which, epoch):
        steps = range(epoch * 10, (epoch + 1) * 10)
        return [row for step in train_keys(50, 5, seed, which, steps, ranks(1)[0]) for _, row in step]

    orders = [order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1)]
    assert all(sorted(rows) == list(range(50)) for rows in orders)
    assert len({tuple(rows) for rows in orders}) == 4, "the same for another seed, stream or epoch"
    assert order(0, 0, 0) != list(range(50))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 25), st.integers(1, 5))
def test_grid_keys_are_each_row_once_in_the_same_batches(num, batch_size, world_size):
    alone = list(grid_keys(num, batch_size, ranks(1)[0]))
    assert [row for batch in alone for row in batch] == list(range(num))
    assert all(len(batch) == batch_size for batch in alone[:-1])
    shares = [batch for rank in ranks(world_size) for batch in grid_keys(num, batch_size, rank)]
    assert sorted(shares) == alone


def test_links_are_followed_and_a_loop_of_them_counts_once(tmp_path):
    real = tmp_path / "real" / "inside"
    real.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(real / name)
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "real")
    (real / "up").symlink_to(root)
    assert list_images(root).path.tolist() == [b"linked/inside/a.png", b"linked/inside/b.png"]


def test_of_a_shard_that_is_cut_off_the_members_before_the_end_are_read(tmp_path, capsys):
    data = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(data, "PNG")
    make_tar(tmp_path / "0.tar", {f"{i}.png": data.getvalue() for i in range(5)})
    whole = (tmp_path / "0.tar").read_bytes()
    fourth = 3 * (512 + -(-len(data.getvalue()) // 512) * 512)  # members are padded to blocks of 512 bytes
    for end, number in ((fourth + 600, 4), (fourth + 300, 3)):  # in the data, in the header
        (tmp_path / "0.tar").write_bytes(whole[:end])
        rows = list_images(tmp_path)
        assert "is damaged after" in capsys.readouterr().out and len(rows) == number
        errors = [ImageDataset(rows, clean={"image_size": 32, "crop_fraction": 1.0})[row][2] for row in range(number)]
        assert errors[:3] == [None] * 3 and all(errors[3:])
    (tmp_path / "0.tar").write_bytes(whole[:fourth])  # without the two empty blocks at the end: that is no damage
    assert len(list_images(tmp_path)) == 3 and not capsys.readouterr().out
    (tmp_path / "0.tar").write_bytes(whole[:fourth] + b"x" * 512 + whole[fourth + 512 :])  # no header
    assert len(list_images(tmp_path)) == 3 and "is damaged after 2.png" in capsys.readouterr().out
