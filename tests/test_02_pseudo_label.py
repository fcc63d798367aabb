"""Stage 02: labels that are the teacher's, rows that never shift, runs that are killed, files that go away, a selection
that is labelled again."""

import csv
import errno
import fcntl
import hashlib
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import CHEAP, ROOT, assert_mistake, assert_same_weights, encoded, load_stage, make_tar, noise_image
from conftest import save_model, write_files
from label_files import CLASSES, COLUMNS, new_file, read_logits, select, undo
from PIL import Image

import common

stage = load_stage("02_pseudo_label")
STAGE = "02_pseudo_label.py"


def picture(i: int, width: int = 40, height: int = 48) -> Image.Image:
    return noise_image(width, height, i)


def pictures(num: int) -> dict[str, bytes]:
    return {f"{i:03}.png": encoded(picture(i), "PNG") for i in range(num)}


def make_teacher(path: Path, seed: int = 0, **header) -> Path:
    return save_model(path, CHEAP, CLASSES, seed=seed, crop_fraction=0.9, **header)


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model.pt")


@pytest.fixture(scope="module")
def own_teacher(tiny_data, tmp_path_factory) -> Path:
    """A teacher of tiny_data, whose unlabelled images are those that it labels if nothing is said."""
    return save_model(tmp_path_factory.mktemp("teacher") / "model.pt", CHEAP, data=str(tiny_data))


@pytest.fixture
def label(call_main):
    """label(flag, value, ...) -> Done: stage 02 in this process."""
    return lambda *words: call_main("02_pseudo_label", *words)


def assert_same_labels(a, b, names=COLUMNS) -> None:
    a, b = (read_logits(labels) if isinstance(labels, Path) else labels for labels in (a, b))
    for name in names:
        assert a[name].tobytes() == b[name].tobytes(), name


# labels


def test_labels_are_the_teachers_on_the_clean_view(own_teacher, tiny_data, run_stage, tmp_path):
    """As a user runs it, with a plain Python."""
    run_stage(ROOT / STAGE, "--teacher", own_teacher, "--out", tmp_path / "l.h5", launcher="python")
    model, saved = common.load_model(own_teacher)
    with h5py.File(tmp_path / "l.h5") as file:
        paths = [path.decode() for path in file["path"][:]]
        assert paths == sorted(f"part{i % 2}/{i:03}.png" for i in range(20)) and (file["status"][:] == 1).all()
        images = [
            common.load_image(tiny_data / "unlabeled" / path).resize((32, 32)) for path in paths
        ]  # have 32 pixels
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(saved[name]).view(3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            logits = model((images - mean) / std).numpy()
        shifted = logits - logits.max(1, keepdims=True)
        assert np.ptp(shifted, axis=0).min() > 0.1  # the images differ
        np.testing.assert_allclose(file["logits"][:], shifted, rtol=1e-3, atol=2e-3)
        assert (file["label"][:] == logits.argmax(1)).all()
        probs = torch.from_numpy(logits).softmax(1).numpy()
        np.testing.assert_allclose(file["confidence"][:], probs.max(1), rtol=1e-4)
        assert file["logits"].chunks is None and file["logits"].id.get_offset() % 4096 == 0
        assert file["offset"][:].sum() == file["size"][:].sum() == 0
        assert file.attrs["teacher_sha256"] == common.file_sha256(own_teacher)


@pytest.mark.parametrize(("nproc", "launcher"), [(2, "torchrun"), (3, None)])
def test_labels_do_not_depend_on_the_number_of_processes(nproc, launcher, random_teacher, run_stage, tmp_path):
    files = {f"{i}.png": encoded(noise_image(8, 8, i), "PNG") for i in range(600)}  # more than one batch of the grid
    data = write_files(tmp_path / "many", files | {"7.png": b"not an image"})
    flags = ["--unlabeled", data, "--teacher", random_teacher, "--out"]
    run_stage(STAGE, *flags, tmp_path / "1.h5")
    run_stage(ROOT / STAGE, *flags, tmp_path / "n.h5", nproc=nproc, launcher=launcher)
    assert_same_labels(tmp_path / "1.h5", tmp_path / "n.h5")
    got = read_logits(tmp_path / "1.h5")
    bad = list(got["path"]).index(b"7.png")
    assert got["status"][bad] == 2 and got["label"][bad] == -1 and np.isnan(got["confidence"][bad])
    assert (np.delete(got["status"], bad) == 1).all()


def test_on_several_nodes_a_write_is_of_its_own_bytes(tmp_path, monkeypatch):
    """NFS clients write whole pages, unless O_DSYNC is set. On one node it would only make the writes slow."""
    new_file(tmp_path / "l.h5")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    for local_world_size, expected in (("2", 0), ("1", os.O_DSYNC)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
        flags = fcntl.fcntl(stage.RowWriter(tmp_path / "l.h5").file, fcntl.F_GETFL)
        assert flags & os.O_DSYNC == expected and flags & os.O_ACCMODE == os.O_WRONLY


def dirty_files() -> tuple[dict, dict]:
    """Files that can be read, and files that cannot."""
    photo, rng = picture(1), np.random.default_rng(0)
    jpeg, png = encoded(photo, quality=95), encoded(photo, "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    palette, see_through = photo.quantize(16), picture(2).convert("RGBA")
    see_through.putalpha(Image.fromarray(rng.integers(0, 256, (48, 40), dtype=np.uint8)))
    grey16 = Image.fromarray(rng.integers(0, 65536, (48, 40), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [picture(3)]}
    good = {
        "16bit.png": encoded(grey16, "PNG"),
        "16bit.tif": encoded(grey16, "TIFF"),
        "cmyk.jpg": encoded(photo.convert("CMYK")),
        "grey.jpg": encoded(photo.convert("L")),
        "one_bit.png": encoded(photo.convert("1"), "PNG"),
        "grey_alpha.png": encoded(see_through.convert("LA"), "PNG"),
        "palette.gif": encoded(palette, "GIF"),
        "palette_alpha.png": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "alpha.png": encoded(see_through, "PNG"),
        "rotated.jpg": encoded(photo, exif=exif),
        "broken_exif.jpg": encoded(photo, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + b"\xff" * 20),
        "dot.png": encoded(picture(4, 1, 1), "PNG"),
        "strip.png": encoded(picture(5, 1, 5000), "PNG"),
        "animated.gif": encoded(palette, "GIF", **frames),
        "animated.webp": encoded(photo, "WEBP", **frames),
        "png.JPEG": png,
        os.fsdecode(b"latin1-\xe9.png"): png,
    }
    bad = {
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "header.jpg": jpeg[:20],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "no_end.jpg": jpeg[:-200],
        "half.png": png[: len(png) // 2],
        "flipped.png": bytes(flipped),
        "float.tif": encoded(Image.fromarray(rng.random((48, 40), dtype=np.float32)), "TIFF"),
        "large.png": encoded(Image.new("1", (9500, 9500)), "PNG"),  # Pillow warns
        "bomb.png": encoded(Image.new("1", (19000, 19000)), "PNG"),  # Pillow refuses
        "vector.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    return good, bad


def test_bad_files_never_shift_a_row(random_teacher, label, tmp_path):
    good, bad = dirty_files()
    for i in range(100):
        name = f"{'abc'[i % 3]}/{i:03}.{'jpg' if i % 2 else 'png'}"
        good[name] = encoded(picture(100 + i), "JPEG" if i % 2 else "PNG")
    both, alone = tmp_path / "both", tmp_path / "alone"
    for folder, files in ((both, good | bad), (alone, good)):
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    (both / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(both / "b" / "pipe.jpg")
    (both / "folder.jpg").mkdir()
    (both / "folder.jpg" / "notes.txt").write_text("no image")
    bad_names = {*bad, "dangling.jpg", "b/pipe.jpg"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # thousands of lines in a crawl
        done = label("--teacher", random_teacher, "--unlabeled", both, "--out", tmp_path / "both.h5")
    assert (
        done.returncode == 2
        and f"{len(bad_names)} of {len(good) + len(bad_names)} images are unreadable" in done.stderr
    )
    assert (
        str(both / "b/pipe.jpg") in done.stdout
        and str(both / "bomb.png") in done.stdout
        and str(both / "dangling.jpg") in done.stdout
    )
    assert label("--teacher", random_teacher, "--unlabeled", alone, "--out", tmp_path / "alone.h5").returncode == 0

    got, expected = read_logits(tmp_path / "both.h5"), read_logits(tmp_path / "alone.h5")
    names = [os.fsdecode(path) for path in got["path"]]
    assert names == sorted([*good, *bad_names], key=os.fsencode)
    is_bad = np.array([name in bad_names for name in names])
    assert (got["status"] == np.where(is_bad, 2, 1)).all()
    assert np.isnan(got["logits"][is_bad]).all() and np.isnan(got["confidence"][is_bad]).all()
    assert (got["label"][is_bad] == -1).all()
    assert (got["path"][~is_bad] == expected["path"]).all() and (expected["status"] == 1).all()
    np.testing.assert_allclose(got["logits"][~is_bad], expected["logits"], rtol=1e-2, atol=1e-2)
    assert len({row.tobytes() for row in expected["logits"]}) > 100  # a shifted row would be seen


def test_shards_and_folders_get_the_same_labels(random_teacher, label, tmp_path):
    files = pictures(30)
    write_files(tmp_path / "folder" / "s.tar", files)  # so that the paths are equal too
    make_tar(tmp_path / "shards" / "s.tar", dict(sorted(files.items(), reverse=True)))
    for name in ("folder", "shards"):
        assert (
            label(
                "--teacher", random_teacher, "--unlabeled", tmp_path / name, "--out", tmp_path / f"{name}.h5"
            ).returncode
            == 0
        )
    folder, shards = read_logits(tmp_path / "folder.h5"), read_logits(tmp_path / "shards.h5")
    for name in COLUMNS[:-2]:
        assert folder[name].tobytes() == shards[name].tobytes(), name
    assert not folder["size"].any() and shards["size"].tolist() == list(map(len, files.values()))


def test_of_a_cut_off_shard_the_members_before_the_end_are_labelled(random_teacher, label, tmp_path):
    make_tar(tmp_path / "s" / "0.tar", pictures(6))
    whole = (tmp_path / "s" / "0.tar").read_bytes()
    (tmp_path / "s" / "0.tar").write_bytes(whole[: 3 * (512 + -(-len(pictures(1)["000.png"]) // 512) * 512) + 700])
    words = ["--teacher", random_teacher, "--unlabeled", tmp_path / "s", "--out", tmp_path / "l.h5", "--max-bad", 30]
    done = label(*words)
    assert (
        done.returncode == 0
        and "0.tar is damaged after" in done.stdout
        and "1 of 4 images are unreadable" in done.stdout
    )
    got = read_logits(tmp_path / "l.h5")
    assert got["status"].tolist() == [1, 1, 1, 2] and got["path"][3] == b"0.tar/003.png"


def test_a_second_run_uses_what_was_stored_and_names_what_has_changed(random_teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(3))
    make_tar(folder / "x.tar", pictures(4))
    make_tar(folder / "y.tar", pictures(2))
    make_tar(folder / "z.tar", pictures(2))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 100]
    assert label(*words).returncode == 0
    first = read_logits(tmp_path / "l.h5")
    undo(tmp_path / "l.h5")
    (folder / "000.png").unlink()
    (folder / "new.png").write_bytes(pictures(1)["000.png"])
    shard = (folder / "x.tar").read_bytes()
    (folder / "x.tar").write_bytes(shard[: int(first["offset"][first["path"] == b"x.tar/002.png"][0]) + 100])
    data = pictures(1)["000.png"]
    make_tar(folder / "y.tar", {"000.png": data + b"more", "001.png": data + b"more"})
    common.open_shard.cache_clear()  # another process would have opened nothing yet
    (folder / "z.tar").unlink()
    done = label(*words)
    second = read_logits(tmp_path / "l.h5")
    assert done.returncode == 0 and (second["path"] == first["path"]).all()
    status = dict(zip(second["path"].tolist(), second["status"].tolist(), strict=True))
    assert status == {
        b"000.png": 2, b"001.png": 1, b"002.png": 1, b"x.tar/000.png": 1, b"x.tar/001.png": 1, b"x.tar/002.png": 2,
        b"x.tar/003.png": 2, b"y.tar/000.png": 2, b"y.tar/001.png": 2, b"z.tar/000.png": 2, b"z.tar/001.png": 2,
    }  # fmt: skip
    assert f"{folder}/000.png: FileNotFoundError" in done.stdout and "has changed or was cut off" in done.stdout
    undo(tmp_path / "l.h5", np.array([name.startswith(b"y.") for name in status]))
    assert "y.tar has changed since it was indexed" in error_of(tmp_path / "l.h5", b"y.tar/000.png")


def error_of(path: Path, name: bytes) -> str:
    with h5py.File(path) as file:
        rows = common.image_list(file)
    dataset = common.ImageDataset(rows, clean=common.View(8, 1.0))
    return dataset[rows.path.tolist().index(name)][2]


def test_rows_that_are_done_are_not_written_again(random_teacher, label, tmp_path, monkeypatch):
    """Another grid of batches, as another device has: its batches hold rows that are done and rows that are not."""
    folder = write_files(tmp_path / "u", pictures(10))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words).returncode == 0
    with h5py.File(tmp_path / "l.h5", "r+") as file:
        file["confidence"][3] = 0.125  # a sign that nobody else would leave
    undo(tmp_path / "l.h5", [2, 4])
    (folder / "003.png").unlink()
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 4)
    assert label(*words).returncode == 0
    got = read_logits(tmp_path / "l.h5")
    assert got["confidence"][3] == 0.125 and (got["status"] == 1).all()


def test_a_lost_mount_is_not_a_million_unreadable_images(random_teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(5))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words).returncode == 0
    whole = read_logits(tmp_path / "l.h5")
    undo(tmp_path / "l.h5")
    folder.rename(tmp_path / "away")
    assert_mistake(label(*words), str(folder), "is gone")
    folder.mkdir()  # an empty mount point
    assert_mistake(label(*words), str(folder), "is gone")
    folder.rmdir()
    assert not read_logits(tmp_path / "l.h5")["status"].any()
    (tmp_path / "away").rename(folder)
    assert label(*words).returncode == 0
    assert all(values.tobytes() == whole[name].tobytes() for name, values in read_logits(tmp_path / "l.h5").items())


def test_too_many_unreadable_images_end_with_status_2_and_everything_kept(random_teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(20) | {"broken.jpg": b"<html>"})
    for _ in range(2):
        done = label("--unlabeled", folder, "--teacher", random_teacher, "--out", tmp_path / "l.h5")
        assert_mistake(done, "broken.jpg", "--max-bad")
    assert sorted(read_logits(tmp_path / "l.h5")["status"]) == [1] * 20 + [2]


def test_names_that_are_not_utf_8_can_be_printed_anywhere(random_teacher, run_stage, tmp_path):
    folder = write_files(tmp_path / "u", pictures(3) | {os.fsdecode(b"caf\xe9.jpg"): b"bad"})
    flags = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 50]
    assert "caf\\udce9.jpg" in run_stage(STAGE, *flags).stdout  # its stdout takes UTF-8 and nothing else


def test_progress_says_speed_bad_images_and_time_left(random_teacher, label, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "u", pictures(5) | {"bad.png": b""})
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 2)
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 50]
    done = label(*words)
    assert (
        done.returncode == 0
        and "batches: 2 of 3" in done.stderr
        and "s left" in done.stderr
        and "images/s, 1 unreadable" in done.stderr.splitlines()[-1]
    )


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--compile"]], ids=" ".join)
def test_labels_in_bf16_and_compiled(flags, tiny_data, label, compiled, tmp_path):
    """20 images, less than the 512 of a batch: nothing of the padded rows shows; bf16 rounds, compiling does not."""
    teacher, found = save_model(tmp_path / "model.pt", "squeezenet1_1", data=str(tiny_data)), []
    for name, more in (("plain", []), ("other", flags)):
        assert label("--teacher", teacher, "--out", tmp_path / f"{name}.h5", *more).returncode == 0
        got = read_logits(tmp_path / f"{name}.h5")
        found.append((got["logits"].astype(np.float32), got["confidence"]))
        assert (got["status"] == 1).all() and len(got["status"]) == 20
    assert len(compiled) == ("--compile" in flags)
    (logits, confidence), (other_logits, other_confidence) = found
    assert np.ptp(confidence) > 1e-3
    tolerance = 0.05 if "bf16" in flags else 2e-3  # logits are stored as float16
    np.testing.assert_allclose(other_logits, logits, atol=tolerance * np.abs(logits).max())
    rounding = np.abs(other_confidence - confidence).max()
    assert rounding > 1e-5 if "bf16" in flags else rounding < 1e-5


# outputs


def test_rows_are_written_where_they_belong(tmp_path):
    writer = stage.RowWriter(new_file(tmp_path / "l.h5", 12))
    logits = torch.randn(6, 3)
    status = np.array([common.DONE, common.DONE, common.UNREADABLE, common.DONE, common.DONE, common.HELD_OUT])
    good = status == common.DONE
    writer.write(np.array([1, 2, 4, 8, 9, 10]), logits, status)
    assert not read_logits(tmp_path / "l.h5")["status"].any()  # not before the data is safe
    writer.write(np.array([5, 6]), logits[:2], status[:2], np.zeros(2, bool))  # none of them
    writer.sync()
    got = read_logits(tmp_path / "l.h5")
    assert got["status"].tolist() == [0, 1, 1, 0, 2, 0, 0, 0, 1, 1, 3, 0]
    rows = [1, 2, 8, 9]
    expected = logits[good].numpy()
    assert (got["label"][rows] == expected.argmax(1)).all() and (got["label"][[4, 10]] == -1).all()
    shifted = expected - expected.max(1, keepdims=True)
    assert (got["logits"][rows] == shifted.astype(np.float16)).all() and np.isnan(got["logits"][[4, 10]]).all()
    np.testing.assert_allclose(got["confidence"][rows], torch.from_numpy(expected).softmax(1).amax(1), rtol=1e-6)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_output_that_is_removed_or_replaced_is_said(how, tmp_path, mistake):
    writer = stage.RowWriter(new_file(tmp_path / "l.h5"))
    writer.write(np.arange(4), torch.randn(4, 3), np.ones(4, bool))
    (tmp_path / "l.h5").unlink()
    if how == "replaced":
        new_file(tmp_path / "l.h5")
    mistake(writer.sync, "removed or replaced")


def test_logits_that_are_not_finite_are_never_written(tmp_path, mistake):
    writer = stage.RowWriter(new_file(tmp_path / "l.h5"))
    logits = torch.randn(4, 3)
    logits[2, 1] = torch.inf
    mistake(lambda: writer.write(np.arange(4), logits, np.ones(4, bool)), "not finite")
    writer.sync()
    assert not read_logits(tmp_path / "l.h5")["status"].any()


def test_a_disk_that_fills_up_is_one_line_and_costs_nothing(own_teacher, run_stage, tmp_path):
    """A limit on the size of files stands in for the disk: what was done before stays, and a later run continues."""
    flags = ["--teacher", own_teacher, "--out", tmp_path / "l.h5"]
    run_stage(STAGE, *flags)
    complete = read_logits(tmp_path / "l.h5")
    with h5py.File(tmp_path / "l.h5") as file:
        limit = file["logits"].id.get_offset()
    undo(tmp_path / "l.h5")
    assert_mistake(run_stage(STAGE, *flags, file_size=limit, check=False), "File too large", "run again")
    assert not read_logits(tmp_path / "l.h5")["status"].any()
    run_stage(STAGE, *flags)
    assert_same_labels(tmp_path / "l.h5", complete)


def test_a_disk_that_fills_up_in_the_middle_is_said_once(random_teacher, label, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "u", pictures(30))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words).returncode == 0
    whole, pwrite, calls = read_logits(tmp_path / "l.h5"), os.pwrite, []
    undo(tmp_path / "l.h5")

    def full(file, data, offset):
        calls.append(offset)
        if len(calls) > 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[:5], offset)  # a write may be short

    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 2)
    monkeypatch.setattr(os, "pwrite", full)
    assert_mistake(label(*words), "No space left on device", "run again")
    assert not read_logits(tmp_path / "l.h5")["status"].any()
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:5], offset))
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 512)
    assert label(*words).returncode == 0
    assert all(values.tobytes() == whole[name].tobytes() for name, values in read_logits(tmp_path / "l.h5").items())


def test_too_small_a_disk_is_said_before_the_start(own_teacher, label, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert_mistake(label("--teacher", own_teacher, "--out", tmp_path / "l.h5"), "20 images need")
    assert not list(tmp_path.iterdir())


def test_an_output_below_a_file_is_one_line(random_teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(2))
    (tmp_path / "file").write_text("x")
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out"]
    assert_mistake(label(*words, tmp_path / "file" / "l.h5"), "cannot be written")
    assert_mistake(label(*words, folder), str(folder), "not a readable HDF5 file")


# interruptions


# Stage 02 which notes what is done often enough for a test, not every 5 seconds.
OFTEN = """
import importlib, time, types
stage = importlib.import_module("02_pseudo_label")
if hasattr(stage, "SYNC_SECONDS"):
    stage.SYNC_SECONDS = 0.05
else:
    stage.time = types.SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), sleep=time.sleep)
stage.main()
"""
NUM = 400  # images of slow_run


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory, run_stage):
    """(flags of a run of some seconds, what it gives uninterrupted)"""
    root = tmp_path_factory.mktemp("slow")
    files = {f"{i:04}.jpg": b"bad" if i % 301 == 0 else encoded(picture(i), quality=90) for i in range(NUM)}
    write_files(root / "u", files)
    flags = ["--teacher", make_teacher(root / "model.pt", image_size=160), "--unlabeled", root / "u", "--out"]
    run_stage(STAGE, *flags, root / "whole.h5")
    return flags, read_logits(root / "whole.h5")


def num_done(path: Path) -> int:
    with h5py.File(path, locking=False) as file:
        return int((file["status"][:] != common.TODO).sum())


def check_rows(path: Path, whole: dict) -> int:
    """What is done is right; returns how much that is."""
    got = read_logits(path)
    done = got["status"] != common.TODO
    for name in COLUMNS[4:]:
        assert got[name].tobytes() == whole[name].tobytes(), name
    for name in COLUMNS[:4]:
        assert got[name][done].tobytes() == whole[name][done].tobytes(), name
    return int(done.sum())


@pytest.mark.xdist_group("kill 02")
def test_killed_at_any_time_by_any_number_of_processes_it_ends_as_if_nothing_had_been(
    slow_run, start_stage, run_stage, tmp_path
):
    flags, whole = slow_run
    out, before = tmp_path / "l.h5", 0
    (tmp_path / "often.py").write_text(OFTEN)
    process = start_stage(STAGE, *flags, out)
    process.wait_until(out.exists)
    process.kill()
    assert check_rows(out, whole) < NUM  # the file is complete from the first moment
    for nproc in (1, 2, 3, 1, 2):
        process = start_stage(tmp_path / "often.py", *flags, out, nproc=nproc, PYTHONPATH=ROOT)
        process.wait_until(lambda goal=before + 33: num_done(out) >= goal)
        process.kill()
        done = check_rows(out, whole)
        assert before < done < NUM, "the kill came too late to test anything"  # and what was done stays done
        before = done
    run_stage(STAGE, *flags, out, nproc=2)
    assert check_rows(out, whole) == NUM
    untouched = out.read_bytes()
    again = run_stage(STAGE, *flags, out)
    assert f"{NUM} of them done before" in again.stdout and out.read_bytes() == untouched


@pytest.mark.xdist_group("kill 02")
@pytest.mark.parametrize(("nproc", "launcher"), [(1, None), (2, "torchrun")])
def test_sigterm_keeps_all_that_was_done(nproc, launcher, slow_run, start_stage, tmp_path):
    flags, whole = slow_run
    out = tmp_path / "l.h5"
    process = start_stage(ROOT / STAGE, *flags, out, nproc=nproc, launcher=launcher)

    def labelled() -> int:  # what a row says follows its data by up to 5 seconds
        return int(np.count_nonzero(read_logits(out)["confidence"])) if out.exists() else 0

    process.wait_until(lambda: labelled() > 30)
    os.kill(process.pids[0], signal.SIGTERM)  # torchrun hands it on
    assert process.wait(60) == (143 if nproc == 1 else 1), process
    assert "02_pseudo_label.py" not in process.stderr, process  # torchrun's own traceback is torchrun's
    assert 30 < check_rows(out, whole) < NUM


# relabelling a selection


@pytest.fixture
def selected(random_teacher, label, tmp_path):
    """Two labelled folders, a selection of both, a better teacher and its labels of everything."""
    better = make_teacher(tmp_path / "better.pt", seed=1)
    for name, num in (("a", 40), ("b", 30)):
        write_files(tmp_path / name, {f"{name}{i:03}.png": encoded(picture(i + num), "PNG") for i in range(num)})
        for who, path in (("old", random_teacher), ("all", better)):
            flags = ["--teacher", path, "--unlabeled", tmp_path / name, "--out", tmp_path / f"{who}-{name}.h5"]
            assert label(*flags).returncode == 0
    rows = {tmp_path / "old-a.h5": [3, 4, 5, 9, 9, 30, 39], tmp_path / "old-b.h5": [0, 7, 8, 29]}
    return select(tmp_path / "balanced.h5", rows), better


def test_only_the_selected_images_are_labelled_again(selected, label, tmp_path, monkeypatch):
    selection, better = selected
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 4)
    for name, rows in (("a", [3, 4, 5, 9, 30, 39]), ("b", [0, 7, 8, 29])):
        words = [
            "--teacher",
            better,
            "--only",
            selection,
            "--unlabeled",
            tmp_path / name,
            "--out",
            tmp_path / f"new-{name}.h5",
        ]
        done = label(*words)
        assert (
            done.returncode == 0
            and f"{len(rows)} images, 0 of them done before" in done.stdout
            and f"{len(rows)} images labelled" in done.stdout
        )
        got, everything = read_logits(tmp_path / f"new-{name}.h5"), read_logits(tmp_path / f"all-{name}.h5")
        assert np.flatnonzero(got["status"]).tolist() == rows and (got["path"] == everything["path"]).all()
        np.testing.assert_allclose(got["logits"][rows], everything["logits"][rows], rtol=1e-2, atol=1e-2)
        assert (got["label"][rows] == everything["label"][rows]).all()
        assert f"{len(rows)} of them done before" in label(*words).stdout
    assert_mistake(
        label("--teacher", better, "--only", selection, "--out", tmp_path / "x.h5"), "several folders", "--unlabeled"
    )
    words = ["--teacher", better, "--only", selection, "--unlabeled", tmp_path / "a", "--out", tmp_path / "new-b.h5"]
    assert_mistake(label(*words), "new-b.h5", "choose another --out")


def test_relabelling_does_not_look_for_new_images(selected, label, tmp_path):
    _, better = selected
    selection = select(tmp_path / "one.h5", {tmp_path / "old-a.h5": [1, 2]})
    (tmp_path / "a" / "a000.png").rename(tmp_path / "a" / "0.png")
    assert label("--teacher", better, "--only", selection, "--out", tmp_path / "n.h5").returncode == 0
    got = read_logits(tmp_path / "n.h5")
    assert got["path"][0] == b"a000.png" and np.flatnonzero(got["status"]).tolist() == [1, 2]
    (tmp_path / "a").rename(tmp_path / "moved")  # the folder of the images has another place now
    words = ["--teacher", better, "--only", selection, "--unlabeled", tmp_path / "moved", "--out", tmp_path / "m.h5"]
    assert label(*words).returncode == 0
    assert read_logits(tmp_path / "m.h5")["logits"][1:3].tobytes() == got["logits"][1:3].tobytes()


# images of val among the unlabelled ones


@pytest.fixture
def with_copies(tiny_data, tmp_path):
    """(data directory, its teacher, the names below unlabeled/ of two byte copies of images of val)"""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    copies = {"copy.png": "disc/0.png", "part1/copy.png": "triangle/3.png"}
    for name, original in copies.items():
        shutil.copy(data / "val" / original, data / "unlabeled" / name)
    return data, save_model(tmp_path / "teacher.pt", data=str(data)), list(copies)


def test_copies_of_val_images_are_left_out(with_copies, label, call_main, tmp_path, monkeypatch):
    data, teacher, copies = with_copies
    out, balanced = tmp_path / "logits.h5", tmp_path / "balanced.h5"
    words = ["--teacher", teacher, "--out", out, "--max-bad", 0]
    done = label(*words)
    assert done.returncode == 0 and "20 images labelled" in done.stdout and "unreadable" not in done.stdout, done
    assert "2 images are byte for byte images of val" in done.stdout
    assert all(str(data / "unlabeled" / name) in done.stdout for name in copies)
    rows = read_logits(out)
    is_copy = np.isin(rows["path"], [name.encode() for name in copies])
    assert is_copy.sum() == 2 and (rows["status"] == np.where(is_copy, 3, 1)).all()
    assert (rows["label"][is_copy] == -1).all() and (rows["label"][~is_copy] >= 0).all()
    assert (np.isnan(rows["logits"]).all(1) == is_copy).all() and (np.isnan(rows["confidence"]) == is_copy).all()
    val = {hashlib.blake2b(path.read_bytes(), digest_size=16).digest() for path in (data / "val").rglob("*.png")}
    with h5py.File(out) as file:
        assert file["held_out"].dtype == np.uint8 and file["held_out"].shape == (12, 16)
        assert {row.tobytes() for row in file["held_out"][:]} == val
    done = label(*words)  # again: nothing to do, the same answer
    assert done.returncode == 0 and "2 images are byte for byte images of val" in done.stdout

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call_main("03_balance", out, "--out", balanced, "--threshold", 0, "--per-class", 20)
    assert done.returncode == 0, done
    with h5py.File(balanced) as file:
        assert set(file["row"][:]) == set(np.flatnonzero(~is_copy))


def test_a_file_without_digests_of_val_is_filled_as_before(with_copies, label, tmp_path):
    """One that an older version began, and a teacher whose data directory is gone: which is said."""
    data, _, _ = with_copies
    path = save_model(tmp_path / "other.pt", data=str(tmp_path / "gone"))
    done = label("--teacher", path, "--unlabeled", data / "unlabeled", "--out", tmp_path / "l.h5")
    assert done.returncode == 0 and str(tmp_path / "gone") in done.stdout and "cannot be told" in done.stdout
    assert (read_logits(tmp_path / "l.h5")["status"] == common.DONE).all()
    with h5py.File(tmp_path / "l.h5") as file:
        assert "held_out" not in file


@pytest.mark.parametrize("folder", ["val", "val/disc", "val/disc/0.png"])
def test_val_itself_is_labelled_when_it_is_asked_for(folder, with_copies, label, tmp_path):
    data, teacher, _ = with_copies
    assert label("--teacher", teacher, "--unlabeled", data / folder, "--out", tmp_path / "l.h5").returncode == 0
    status = read_logits(tmp_path / "l.h5")["status"]
    num = 1 if folder.endswith(".png") else len(list((data / folder).rglob("*.png")))
    assert len(status) == num and (status == common.DONE).all()


def test_the_held_out_tenth_is_labelled_as_val(with_copies, label, tmp_path):
    data, teacher, _ = with_copies
    shutil.rmtree(data / "val")
    for i in range(8):
        shutil.copy(data / "train" / "disc" / f"{i}.png", data / "train" / "disc" / f"again{i}.png")
    words = ["--teacher", teacher, "--unlabeled", data / "val", "--out", tmp_path / "l.h5"]
    for _ in range(2):
        done = label(*words)
        assert done.returncode == 0, done
    rows, expected = read_logits(tmp_path / "l.h5"), common.labeled_images(data, "val")[0]
    assert rows["path"].tolist() == expected.path.tolist() and (rows["status"] == common.DONE).all()
    words[3] = data / "train"  # the other nine tenths: their root is the same
    assert_mistake(label(*words), tmp_path / "l.h5", data / "train", "--out")


def test_labelled_images_among_the_unlabelled_are_refused(with_copies, label, call_main, tmp_path):
    data, teacher, _ = with_copies
    for folder in (data, data.parent):
        done = label("--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5")
        assert_mistake(done, "--unlabeled", folder, data / "train")
    assert not (tmp_path / "l.h5").exists()
    done = call_main("04_train_student", "--teacher", teacher, "--unlabeled", data, "--out", tmp_path / "s")
    assert_mistake(done, "--unlabeled", data / "train")


# the labels as text, and a single image

ODD_NAMES = ["a,b.png", 'say "x".png', "two\nlines.png", "back\rto.png", " spaces .png", "=1+1.png", "ü/é.png", "'.png"]


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def expected_csv(logits: Path) -> list[list[str]]:
    got, lines = read_logits(logits), [["path", "class", "confidence"]]
    with h5py.File(logits) as file:
        classes = [name.decode() for name in file["classes"][:]]
    columns = (got[name][got["status"] == 1] for name in ("path", "label", "confidence"))
    return lines + [[os.fsdecode(path), classes[c], str(p)] for path, c, p in zip(*columns, strict=True)]


@pytest.mark.parametrize("nproc", [1, 3])
def test_the_labels_as_csv(nproc, run_stage, tmp_path):
    """Names byte for byte, whatever they hold; again with the finished file, and with several processes."""
    names = [*ODD_NAMES, os.fsdecode(b"latin1-\xe9.png"), "no image.png"]
    files = dict(zip(names, pictures(len(names)).values(), strict=True))
    folder = write_files(tmp_path / "u", files | {"no image.png": b"no"})
    make_tar(folder / "z.tar", {"in a,shard.png": pictures(1)["000.png"]})
    teacher = save_model(tmp_path / "t.pt", CHEAP, ["a,b", 'c"d', "ü"], seed=1)
    words = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 50]
    table = tmp_path / "new" / "labels.csv"
    run_stage(STAGE, *words, "--csv", table, nproc=nproc)
    lines = read_csv(table)
    assert lines == expected_csv(tmp_path / "l.h5")
    assert {line[0] for line in lines[1:]} == {*names, "z.tar/in a,shard.png"} - {"no image.png"}
    assert len({line[1] for line in lines[1:]}) > 1 and table.read_bytes().startswith(b"path,class,confidence\r\n")
    assert np.float32(lines[1][2]) == read_logits(tmp_path / "l.h5")["confidence"][0]
    whole, labels = table.read_bytes(), (tmp_path / "l.h5").read_bytes()
    table.unlink()
    done = run_stage(STAGE, *words, "--csv", table, nproc=nproc)
    assert f"{table}: the labels of {len(lines) - 1} images" in done.stdout
    assert table.read_bytes() == whole and (tmp_path / "l.h5").read_bytes() == labels
    assert [path.name for path in table.parent.iterdir()] == ["labels.csv"]


def test_a_csv_of_a_selection_has_the_selected_images_alone(selected, label, tmp_path):
    _, better = selected
    selection = select(tmp_path / "one.h5", {tmp_path / "old-a.h5": [1, 2, 7]})
    words = ["--teacher", better, "--only", selection, "--out", tmp_path / "n.h5", "--csv", tmp_path / "n.csv"]
    assert label(*words).returncode == 0
    assert [line[0] for line in read_csv(tmp_path / "n.csv")] == ["path", "a001.png", "a002.png", "a007.png"]
    assert read_csv(tmp_path / "n.csv") == expected_csv(tmp_path / "n.h5")


def test_a_csv_never_costs_another_file(random_teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(3))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--csv"]
    for path in (tmp_path / "l.h5", random_teacher):
        assert_mistake(label(*words, path), "--csv", path)
    image = next(folder.iterdir())
    before = image.read_bytes()
    assert_mistake(label(*words[:2], "--unlabeled", image, *words[4:], image), "--csv", image)
    assert image.read_bytes() == before
    assert not (tmp_path / "l.h5").exists()
    assert_mistake(label(*words, tmp_path), "expected the name of a file")  # the labels are there all the same
    assert (read_logits(tmp_path / "l.h5")["status"] == 1).all()
    assert label(*words, tmp_path / "l.csv").returncode == 0
    (folder / "bad.png").write_bytes(b"bad")
    done = label(*words[:-2], tmp_path / "m.h5", "--csv", tmp_path / "m.csv")
    assert_mistake(done, "bad.png", "--max-bad")
    assert len(read_csv(tmp_path / "m.csv")) == 4


def test_of_a_single_image_the_five_best_classes_are_printed(tiny_data, label, tmp_path):
    """Even if it is one of val, whose copies among the unlabelled images are left out."""
    classes = [f"class {c}" for c in range(7)]
    teacher = save_model(tmp_path / "t.pt", CHEAP, classes, data=str(tiny_data), seed=3)
    picture = shutil.copy(tiny_data / "val" / "disc" / "0.png", tmp_path / "a photo,1")  # with no ending
    words = ["--teacher", teacher, "--unlabeled", picture, "--out", tmp_path / "l.h5", "--csv", tmp_path / "l.csv"]
    for _ in range(2):
        done = label(*words)
        assert done.returncode == 0, done
        model, saved = common.load_model(teacher)
        view = common.View.of(saved)
        pixels = torch.from_numpy(common.eval_view(common.load_image(picture), view).copy())
        with torch.no_grad():
            probs = model(common.normalize(pixels.permute(2, 0, 1)[None], view)).softmax(1)[0]
        lines = re.findall(r"^ *([\d.]+)%  (.+)$", done.stdout, re.M)
        assert [name for _, name in lines] == [classes[c] for c in probs.argsort(descending=True)[:5]]
        assert [float(share) for share, _ in lines] == pytest.approx(
            probs.sort(descending=True).values[:5].mul(100).tolist(), abs=0.03
        )
    assert read_csv(tmp_path / "l.csv") == expected_csv(tmp_path / "l.h5") and len(read_csv(tmp_path / "l.csv")) == 2
    with h5py.File(tmp_path / "l.h5") as file:
        assert file.attrs["root"] == str(tmp_path) and file["path"][:].tolist() == [b"a photo,1"]
        assert file["status"][:].tolist() == [1] and "held_out" not in file
    # neither another image nor the whole folder is what this file is of
    shutil.copy(tiny_data / "val" / "disc" / "1.png", tmp_path / "other.png")
    for path in (tmp_path / "other.png", tmp_path):
        words[3] = path
        assert_mistake(label(*words), tmp_path / "l.h5", path, "--out")


def test_a_single_image_that_cannot_be_read_or_is_not_there(random_teacher, label, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    words = ["--teacher", random_teacher, "--unlabeled", tmp_path / "bad.jpg", "--out", tmp_path / "l.h5"]
    done = label(*words)
    assert_mistake(done, "1 of 1 images are unreadable", "bad.jpg")
    assert "%  " not in done.stdout and read_logits(tmp_path / "l.h5")["status"].tolist() == [2]
    words[3] = tmp_path / "nowhere.jpg"
    assert_mistake(label(*words[:-1], tmp_path / "n.h5"), "nowhere.jpg", "no such folder")


def test_a_single_image_with_fewer_classes_and_several_processes(own_teacher, tiny_data, run_stage, label, tmp_path):
    picture = tiny_data / "val" / "disc" / "0.png"
    words = ["--teacher", own_teacher, "--unlabeled", picture, "--out", tmp_path / "l.h5"]
    done = run_stage(STAGE, *words, nproc=2)
    assert len(re.findall(r"^ *[\d.]+%  (?:disc|square|triangle)$", done.stdout, re.M)) == 3
    selection = select(tmp_path / "s.h5", {tmp_path / "l.h5": [0]})
    done = label(*words[:-1], tmp_path / "n.h5", "--only", selection)
    assert_mistake(done, "--unlabeled", "one image", "--only")


# what a resumed file was begun with, and other systems


def test_a_file_is_continued_with_the_precision_it_was_begun_with(random_teacher, label, tmp_path):
    folder = write_files(tmp_path / "images", pictures(3))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words).returncode == 0
    undo(tmp_path / "l.h5", [1])
    before = (tmp_path / "l.h5").read_bytes()
    assert_mistake(label(*words, "--precision", "bf16"), tmp_path / "l.h5", "--precision fp32, not bf16")
    assert (tmp_path / "l.h5").read_bytes() == before
    with h5py.File(tmp_path / "l.h5", "r+") as file:
        assert file.attrs["precision"] == "fp32"
        del file.attrs["precision"]  # older files do not say
    assert label(*words, "--precision", "bf16").returncode == 0


LINUX_ALONE = "copy_file_range eventfd fdatasync getrandom memfd_create posix_fadvise posix_fallocate sched_getaffinity"
LINUX_ALONE += " sched_setaffinity splice O_DIRECT O_TMPFILE"  # of os; macOS has none of them


def test_a_system_without_what_linux_alone_has(tiny_data, call_main, tmp_path, monkeypatch):
    for name in LINUX_ALONE.split():
        monkeypatch.delattr(os, name)
    monkeypatch.setattr("tempfile._O_TMPFILE_WORKS", False)  # as it finds on its import
    flags = ["--data", tiny_data, "--arch", CHEAP, "--image-size", 32, "--batch-size", 8, "--epochs", 0.4]
    flags += ["--num-ops", 1, "--magnitude", 5, "--out", tmp_path / "t"]
    assert call_main("01_train_teacher", *flags).returncode == 0
    words = ["--teacher", tmp_path / "t" / "model.pt", "--out", tmp_path / "l.h5", "--csv", tmp_path / "l.csv"]
    assert call_main("02_pseudo_label", *words).returncode == 0
    assert (read_logits(tmp_path / "l.h5")["status"] == common.DONE).all()


def test_where_processes_are_spawned_and_not_forked(tiny_data, run_stage, tmp_path):
    """As on macOS: loaders get what they need by pickle, and everything stays the same."""
    text, fork = (ROOT / "common.py").read_text(), 'START_METHOD = "fork" if sys.platform == "linux" else "spawn"'
    assert text.count(fork) == 1
    for name in ("01_train_teacher.py", STAGE):
        shutil.copy(ROOT / name, tmp_path)
    spawns = "import os\nos.fork = None\n"  # who forks all the same crashes
    (tmp_path / "common.py").write_text(spawns + text.replace(fork, 'START_METHOD = "spawn"'))
    for name, folder, workers in (("plain", ROOT, 0), ("spawned", tmp_path, 1)):
        out, more = tmp_path / name, ["--workers", workers]
        flags = ["--data", tiny_data, "--arch", CHEAP, "--image-size", 32, "--batch-size", 8, "--epochs", 0.4]
        flags += ["--num-ops", 1, "--magnitude", 5, "--out", out]
        run_stage(folder / "01_train_teacher.py", *flags, *more, WITHOUT="matplotlib")
        run_stage(folder / STAGE, "--teacher", tmp_path / "plain" / "model.pt", "--out", out / "l.h5", *more)
    assert_same_weights(tmp_path / "plain" / "model.pt", tmp_path / "spawned" / "model.pt")
    assert_same_labels(tmp_path / "plain" / "l.h5", tmp_path / "spawned" / "l.h5")


def test_what_a_spawned_process_gets(tiny_data, own_teacher, label, tmp_path, monkeypatch):
    """Mapped lists and selections by pickle, and the index of shards from a pool of such processes."""
    assert label("--teacher", own_teacher, "--out", tmp_path / "l.h5").returncode == 0
    with h5py.File(tmp_path / "l.h5") as file:
        images = common.image_list(file)
    chosen = common.SelectedImages({3: images}, np.full(2, 3, np.uint16), np.array([4, 7]))
    for source, row in ((images, 7), (chosen, 1)):
        dataset = common.ImageDataset(source, noised=common.Crop(32, 0.3, True, "border"), stream="s")
        (expected,), (got,) = (one[0, row][1] for one in (dataset, pickle.loads(pickle.dumps(dataset))))
        np.testing.assert_array_equal(got, expected)

    class Pool:  # a process for each task would import torch, for seconds
        def __init__(self, num, context):
            assert num == 2 and context.get_start_method() == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, tasks):
            return map(pickle.loads(pickle.dumps(function)), tasks)

    for i in range(16):
        make_tar(tmp_path / "u" / f"{i:02}.tar", {"a.png": b"1"})
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.setattr(common, "START_METHOD", "spawn")
    monkeypatch.setattr(common, "ProcessPoolExecutor", Pool)
    assert len(common.list_images(tmp_path / "u")) == 16


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_unit_of_memory_is_the_systems(platform, unit, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    assert common.peak_memory(torch.device("cpu")) == 5000 * unit


# a noised teacher


def test_a_noised_teacher_is_noised_by_the_batch_of_the_grid(tiny_data, run_stage, tmp_path):
    """RandAugment on the clean views, dropout and stochastic depth on; batch norms as they are. By hand, and the same
    for two processes and for a file whose rows are in part done."""
    options = {"small_images": None, "dropout": 0.5, "drop_path": 0.5, "zero_init_residual": None}
    teacher = save_model(tmp_path / "t.pt", "efficientnet_b0", CLASSES, arch_options=options)
    files = {f"{i:03}.png": encoded(noise_image(8, 8, i), "PNG") for i in range(600)}
    folder = write_files(tmp_path / "many", files)
    words = ["--teacher", teacher, "--unlabeled", folder, "--noised", 7, "--out"]
    run_stage(STAGE, *words, tmp_path / "1.h5")
    run_stage(STAGE, *words, tmp_path / "2.h5", nproc=2)
    assert_same_labels(tmp_path / "1.h5", tmp_path / "2.h5")
    undo(tmp_path / "2.h5", slice(3, 590))
    run_stage(STAGE, *words, tmp_path / "2.h5")
    assert_same_labels(tmp_path / "1.h5", tmp_path / "2.h5")

    model, _ = common.load_model(teacher, fuse=True)
    model.train()
    images, size = common.unlabeled_images(folder), common.rows_per_batch(32, torch.device("cpu"))
    expected = []
    for k, begin in enumerate(range(0, 600, size)):
        rows = range(begin, min(begin + size, 600))
        views = np.stack([common.eval_view(images.load(row), common.View.default(32)) for row in rows])
        generator = common.step_generator(0, "noised labels", k, 0)
        views = common.rand_augment(torch.from_numpy(views).permute(0, 3, 1, 2), 2, 7, generator, resolution=224)
        with torch.no_grad():
            expected.append(model(common.normalize(views, common.View.default(32))))
    expected = torch.cat(expected)
    got = torch.from_numpy(read_logits(tmp_path / "1.h5")["logits"]).float()
    torch.testing.assert_close(got, expected - expected.amax(1, True), rtol=2e-3, atol=5e-3)
    with h5py.File(tmp_path / "1.h5") as file:
        assert file.attrs["noised"] == "7"


def test_a_noised_teacher_keeps_its_running_statistics_and_its_file(random_teacher, label, tmp_path):
    folder = write_files(tmp_path / "images", pictures(3))
    words = ["--teacher", random_teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words).returncode == 0
    clean = read_logits(tmp_path / "l.h5")["logits"]
    assert_mistake(label(*words, "--noised"), tmp_path / "l.h5", "--noised no, not 9")
    with h5py.File(tmp_path / "l.h5", "r+") as file:
        assert file.attrs["noised"] == "no"
        del file.attrs["noised"]  # older files do not say: no teacher was noised
    assert_mistake(label(*words, "--noised"), tmp_path / "l.h5", "--noised no, not 9")
    words[-1] = tmp_path / "n.h5"
    assert label(*words, "--noised").returncode == 0, "without M the recipe's, and of other models 9"
    assert not np.array_equal(read_logits(words[-1])["logits"], clean)
    model = common.load_model(random_teacher)[0]
    stage.noise_model(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert model.training and norms and not any(norm.training for norm in norms)
