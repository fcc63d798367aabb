"""Stage 02: rows that never shift, runs that are killed, files that go away, a selection that is labelled again."""

import errno
import io
import os
import random
import signal
import tarfile
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import load_stage
from PIL import Image, ImageDraw
from test_pipeline import kill, start

import common

stage = load_stage("02_pseudo_label")
student = load_stage("04_train_student")
CLASSES = ["ant", "bee", "cat"]
COLUMNS = ("logits", "label", "confidence", "status", "path", "offset", "size")


def picture(i: int, width: int = 40, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_teacher(path: Path, seed: int = 0, image_size: int = 32, classes=CLASSES, **more) -> Path:
    """A model of random weights that tells images apart."""
    torch.manual_seed(seed)
    model = common.build_model("resnet18", len(classes)).eval()
    torch.nn.init.normal_(model.fc.weight, std=0.5)
    checkpoint = {"format": common.CHECKPOINT_FORMAT, "stage": "teacher", "arch": "resnet18", "arch_options": {}}
    checkpoint |= {"classes": classes, "image_size": image_size, "crop_fraction": 0.9, "interpolation": "bicubic"}
    checkpoint |= {"mean": common.IMAGENET_MEAN, "std": common.IMAGENET_STD, "model": model.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(path, checkpoint | {"metrics": {}, "args": {}, "data": str(path.parent)} | more)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model.pt")


@pytest.fixture
def label(monkeypatch, capsys):
    """label(flag, value, ...) runs stage 02 in this process: (exit status, stdout, stderr)."""

    def label(*words):
        monkeypatch.setattr(stage, "StopSignal", lambda processes: SimpleNamespace(received=False))
        monkeypatch.setattr("sys.argv", ["02_pseudo_label.py", *map(str, words)])
        capsys.readouterr()
        try:
            stage.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return label


def read(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][:] for name in COLUMNS}


def undo(path: Path, rows=slice(None)) -> None:
    with h5py.File(path, "r+") as file:
        file["status"][rows] = common.TODO


def one_line(result, *words) -> None:
    code, _, err = result
    assert code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), result


# rows


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


def test_bad_files_never_shift_a_row(teacher, label, tmp_path):
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
        code, out, err = label("--teacher", teacher, "--unlabeled", both, "--out", tmp_path / "both.h5")
    assert code == 2 and f"{len(bad_names)} of {len(good) + len(bad_names)} images are unreadable" in err
    assert str(both / "b/pipe.jpg") in out and str(both / "bomb.png") in out and str(both / "dangling.jpg") in out
    assert label("--teacher", teacher, "--unlabeled", alone, "--out", tmp_path / "alone.h5")[0] == 0

    got, expected = read(tmp_path / "both.h5"), read(tmp_path / "alone.h5")
    names = [os.fsdecode(path) for path in got["path"]]
    assert names == sorted([*good, *bad_names], key=os.fsencode)
    is_bad = np.array([name in bad_names for name in names])
    assert (got["status"] == np.where(is_bad, 2, 1)).all()
    assert np.isnan(got["logits"][is_bad]).all() and np.isnan(got["confidence"][is_bad]).all()
    assert (got["label"][is_bad] == -1).all()
    assert (got["path"][~is_bad] == expected["path"]).all() and (expected["status"] == 1).all()
    np.testing.assert_allclose(got["logits"][~is_bad], expected["logits"], rtol=1e-2, atol=1e-2)
    assert len({row.tobytes() for row in expected["logits"]}) > 100  # a shifted row would be seen


def make_tar(path: Path, files: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pictures(num: int) -> dict[str, bytes]:
    return {f"{i:03}.png": encoded(picture(i), "PNG") for i in range(num)}


def write_files(folder: Path, files: dict) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_shards_and_folders_get_the_same_labels(teacher, label, tmp_path):
    files = pictures(30)
    write_files(tmp_path / "folder" / "s.tar", files)  # so that the paths are equal too
    make_tar(tmp_path / "shards" / "s.tar", dict(sorted(files.items(), reverse=True)))
    for name in ("folder", "shards"):
        assert label("--teacher", teacher, "--unlabeled", tmp_path / name, "--out", tmp_path / f"{name}.h5")[0] == 0
    folder, shards = read(tmp_path / "folder.h5"), read(tmp_path / "shards.h5")
    for name in COLUMNS[:-2]:
        assert folder[name].tobytes() == shards[name].tobytes(), name
    assert not folder["size"].any() and shards["size"].tolist() == list(map(len, files.values()))


def test_of_a_cut_off_shard_the_members_before_the_end_are_labelled(teacher, label, tmp_path):
    make_tar(tmp_path / "s" / "0.tar", pictures(6))
    whole = (tmp_path / "s" / "0.tar").read_bytes()
    (tmp_path / "s" / "0.tar").write_bytes(whole[: 3 * (512 + -(-len(pictures(1)["000.png"]) // 512) * 512) + 700])
    words = ["--teacher", teacher, "--unlabeled", tmp_path / "s", "--out", tmp_path / "l.h5", "--max-bad", 30]
    code, out, _ = label(*words)
    assert code == 0 and "0.tar is damaged after" in out and "1 of 4 images are unreadable" in out
    got = read(tmp_path / "l.h5")
    assert got["status"].tolist() == [1, 1, 1, 2] and got["path"][3] == b"0.tar/003.png"


def test_a_second_run_uses_what_was_stored_and_names_what_has_changed(teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(3))
    make_tar(folder / "x.tar", pictures(4))
    make_tar(folder / "y.tar", pictures(2))
    make_tar(folder / "z.tar", pictures(2))
    words = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 100]
    assert label(*words)[0] == 0
    first = read(tmp_path / "l.h5")
    undo(tmp_path / "l.h5")
    (folder / "000.png").unlink()
    (folder / "new.png").write_bytes(pictures(1)["000.png"])
    shard = (folder / "x.tar").read_bytes()
    (folder / "x.tar").write_bytes(shard[: int(first["offset"][first["path"] == b"x.tar/002.png"][0]) + 100])
    data = pictures(1)["000.png"]
    make_tar(folder / "y.tar", {"000.png": data + b"more", "001.png": data + b"more"})
    common.open_shard.cache_clear()  # another process would have opened nothing yet
    (folder / "z.tar").unlink()
    code, out, _ = label(*words)
    second = read(tmp_path / "l.h5")
    assert code == 0 and (second["path"] == first["path"]).all()
    status = dict(zip(second["path"].tolist(), second["status"].tolist(), strict=True))
    assert status == {
        b"000.png": 2, b"001.png": 1, b"002.png": 1, b"x.tar/000.png": 1, b"x.tar/001.png": 1, b"x.tar/002.png": 2,
        b"x.tar/003.png": 2, b"y.tar/000.png": 2, b"y.tar/001.png": 2, b"z.tar/000.png": 2, b"z.tar/001.png": 2,
    }  # fmt: skip
    assert f"{folder}/000.png: FileNotFoundError" in out and "has changed or was cut off" in out
    undo(tmp_path / "l.h5", np.array([name.startswith(b"y.") for name in status]))
    assert "y.tar has changed since it was indexed" in error_of(tmp_path / "l.h5", b"y.tar/000.png")


def error_of(path: Path, name: bytes) -> str:
    with h5py.File(path) as file:
        rows = common.image_list(file)
    dataset = common.ImageDataset(rows, clean=common.View(8, 1.0))
    return dataset[rows.path.tolist().index(name)][2]


def test_a_lost_mount_is_not_a_million_unreadable_images(teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(5))
    words = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words)[0] == 0
    whole = read(tmp_path / "l.h5")
    undo(tmp_path / "l.h5")
    folder.rename(tmp_path / "away")
    one_line(label(*words), str(folder), "is gone")
    folder.mkdir()  # an empty mount point
    one_line(label(*words), str(folder), "is gone")
    folder.rmdir()
    assert not read(tmp_path / "l.h5")["status"].any()
    (tmp_path / "away").rename(folder)
    assert label(*words)[0] == 0
    assert all(values.tobytes() == whole[name].tobytes() for name, values in read(tmp_path / "l.h5").items())


# outputs


def new_file(path: Path, num: int = 4) -> Path:
    rows = common.ImageList("/r", np.array([f"{i:03}.png" for i in range(num)], "S"), *np.zeros((2, num), np.int64))
    stage.create_logits(path, rows, CLASSES, num, arch="a", image_size=32, teacher="t", teacher_sha256="s")
    return path


def test_rows_are_written_where_they_belong(tmp_path):
    writer = stage.RowWriter(new_file(tmp_path / "l.h5", 12))
    logits = torch.randn(6, 3)
    good = np.array([True, True, False, True, True, True])
    writer.write(np.array([1, 2, 4, 8, 9, 10]), logits, good)
    assert not read(tmp_path / "l.h5")["status"].any()  # not before the data is safe
    writer.write(np.array([5, 6]), logits[:2], good[:2], np.zeros(2, bool))  # none of them
    writer.sync()
    got = read(tmp_path / "l.h5")
    assert got["status"].tolist() == [0, 1, 1, 0, 2, 0, 0, 0, 1, 1, 1, 0]
    rows = [1, 2, 8, 9, 10]
    expected = logits[good].numpy()
    assert (got["label"][rows] == expected.argmax(1)).all() and got["label"][4] == -1
    shifted = expected - expected.max(1, keepdims=True)
    assert (got["logits"][rows] == shifted.astype(np.float16)).all() and np.isnan(got["logits"][4]).all()
    np.testing.assert_allclose(got["confidence"][rows], torch.from_numpy(expected).softmax(1).amax(1), rtol=1e-6)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_output_that_is_removed_or_replaced_is_said(how, tmp_path, capsys):
    writer = stage.RowWriter(new_file(tmp_path / "l.h5"))
    writer.write(np.arange(4), torch.randn(4, 3), np.ones(4, bool))
    (tmp_path / "l.h5").unlink()
    if how == "replaced":
        new_file(tmp_path / "l.h5")
    with pytest.raises(SystemExit) as stop:
        writer.sync()
    assert stop.value.code == 2 and "removed or replaced" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_never_written(tmp_path, capsys):
    writer = stage.RowWriter(new_file(tmp_path / "l.h5"))
    logits = torch.randn(4, 3)
    logits[2, 1] = torch.inf
    with pytest.raises(SystemExit) as stop:
        writer.write(np.arange(4), logits, np.ones(4, bool))
    writer.sync()
    assert stop.value.code == 2 and "not finite" in capsys.readouterr().err
    assert not read(tmp_path / "l.h5")["status"].any()


def test_a_disk_that_fills_up_in_the_middle_is_said_once(teacher, label, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "u", pictures(30))
    words = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words)[0] == 0
    whole, pwrite, calls = read(tmp_path / "l.h5"), os.pwrite, []
    undo(tmp_path / "l.h5")

    def full(file, data, offset):
        calls.append(offset)
        if len(calls) > 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[:5], offset)  # a write may be short

    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 2)
    monkeypatch.setattr(os, "pwrite", full)
    one_line(label(*words), "No space left on device", "run again")
    assert not read(tmp_path / "l.h5")["status"].any()
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:5], offset))
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 512)
    assert label(*words)[0] == 0
    assert all(values.tobytes() == whole[name].tobytes() for name, values in read(tmp_path / "l.h5").items())


@contextmanager
def as_nobody():
    """Permissions do not hold for root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_a_folder_or_a_file_without_permission_is_one_line(capsys):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        out, closed = new_file(Path(folder) / "l.h5"), Path(folder) / "closed"
        write_files(closed / "in", pictures(1))
        os.chmod(out, 0o444)
        os.chmod(folder, 0o555)
        os.chmod(closed, 0)
        for call in (stage.RowWriter, lambda path: new_file(path.with_name("other.h5"))):
            with as_nobody(), pytest.raises(SystemExit) as stop:
                call(out)
            err = capsys.readouterr().err
            assert stop.value.code == 2 and len(err.splitlines()) == 1 and "Permission denied" in err, err
            assert sorted(os.listdir(folder)) == ["closed", "l.h5"]
        with as_nobody():
            assert len(common.list_images(folder)) == 0
        assert "closed cannot be listed (Permission denied)" in capsys.readouterr().out
        os.chmod(closed, 0o755)
        os.chmod(folder, 0o755)


def test_an_output_below_a_file_is_one_line(teacher, label, tmp_path):
    folder = write_files(tmp_path / "u", pictures(2))
    (tmp_path / "file").write_text("x")
    words = ["--teacher", teacher, "--unlabeled", folder, "--out"]
    one_line(label(*words, tmp_path / "file" / "l.h5"), "cannot be written")
    one_line(label(*words, folder), str(folder), "not a readable HDF5 file")


# interruptions


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """(flags of a run of some seconds, what it gives uninterrupted)"""
    root = tmp_path_factory.mktemp("slow")
    files = {f"{i:04}.jpg": encoded(picture(i), quality=90) for i in range(900)}
    files |= {f"{i:04}.jpg": b"bad" for i in range(0, 900, 301)}
    folder = write_files(root / "u", files)
    teacher = make_teacher(root / "model.pt", image_size=160)
    flags = ["02_pseudo_label.py", "--teacher", teacher, "--unlabeled", folder]
    process = start(*flags, "--out", root / "whole.h5")
    _, err = process.communicate()
    assert process.returncode == 0, err
    return flags, read(root / "whole.h5")


def wait_until_it_labels(process) -> None:
    while "done before" not in (line := process.stdout.readline()):
        assert line, process.communicate()


def check_rows(path: Path, whole: dict) -> int:
    got = read(path)
    done = got["status"] != common.TODO
    for name in COLUMNS[4:]:
        assert got[name].tobytes() == whole[name].tobytes(), name
    for name in COLUMNS[:4]:
        assert got[name][done].tobytes() == whole[name][done].tobytes(), name
    return int(done.sum())


def test_killed_at_any_time_by_any_number_of_processes_it_ends_as_if_nothing_had_been(slow_run, tmp_path):
    flags, whole = slow_run
    rng, out, seen, before = random.Random(0), tmp_path / "l.h5", [], 0
    for nproc in (1, 2, 3, 1, 2, 3):
        process = start(*flags, "--out", out, nproc=nproc)
        wait_until_it_labels(process)
        time.sleep(rng.uniform(1, 4) if nproc == 1 and seen else rng.uniform(5.2, 7))  # status is written every 5 s
        kill(process)
        seen.append(check_rows(out, whole))
        assert seen[-1] >= before  # what was done stays done
        before = seen[-1]
        if before == 900:  # it was faster than the kill: from the beginning
            undo(out)
            before = 0
    assert any(0 < num < 900 for num in seen), f"the kills came too soon or too late to test anything: {seen}"
    process = start(*flags, "--out", out, nproc=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert check_rows(out, whole) == 900, seen


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_keeps_all_that_was_done(nproc, slow_run, tmp_path):
    flags, whole = slow_run
    out = tmp_path / "l.h5"
    process = start(*flags, "--out", out, nproc=nproc)
    wait_until_it_labels(process)
    time.sleep(2.5)  # less than the time between two syncs
    os.kill(process.pid, signal.SIGTERM)  # torchrun hands it on
    _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if nproc == 1 else 1), err
    assert "02_pseudo_label.py" not in err, err  # torchrun's own traceback is torchrun's
    assert 0 < check_rows(out, whole) < 900


def test_progress_says_speed_bad_images_and_time_left(teacher, label, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "u", pictures(5) | {"bad.png": b""})
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 2)
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    words = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 50]
    code, _, err = label(*words)
    assert (
        code == 0 and "batches: 2 of 3" in err and "s left" in err and "images/s, 1 unreadable" in err.splitlines()[-1]
    )


# relabelling a selection


def select(out: Path, files: dict[Path, list[int]]) -> Path:
    """A selection of these rows, each once, as stage 03 writes it."""
    label, confidence = ([read(path)[name][rows] for path, rows in files.items()] for name in ("label", "confidence"))
    with h5py.File(out, "w") as file:
        file["file"] = np.repeat(np.arange(len(files)), [len(rows) for rows in files.values()]).astype(np.uint16)
        file["row"] = np.concatenate([*files.values()]).astype(np.int64)
        file["label"], file["confidence"] = np.concatenate(label), np.concatenate(confidence)
        file.create_dataset("classes", data=CLASSES, dtype=h5py.string_dtype())
        names = "[" + ", ".join(f'"{path}"' for path in files) + "]"
        file.attrs.update(format=common.SELECTION_FORMAT, files=names, method="noisy-student", threshold=0.3)
    return out


@pytest.fixture
def selected(teacher, label, tmp_path):
    """Two labelled folders, a selection of both, a better teacher and its labels of everything."""
    better = make_teacher(tmp_path / "better.pt", seed=1)
    for name, num in (("a", 40), ("b", 30)):
        files = {f"{name}{i:03}.png": encoded(picture(i + num), "PNG") for i in range(num)}
        write_files(tmp_path / name, files)
        for who, path in (("old", teacher), ("all", better)):
            assert (
                label("--teacher", path, "--unlabeled", tmp_path / name, "--out", tmp_path / f"{who}-{name}.h5")[0] == 0
            )
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
        code, out, _ = label(*words)
        assert (
            code == 0 and f"{len(rows)} images, 0 of them done before" in out and f"{len(rows)} images labelled" in out
        )
        got, everything = read(tmp_path / f"new-{name}.h5"), read(tmp_path / f"all-{name}.h5")
        assert np.flatnonzero(got["status"]).tolist() == rows and (got["path"] == everything["path"]).all()
        np.testing.assert_allclose(got["logits"][rows], everything["logits"][rows], rtol=1e-2, atol=1e-2)
        assert (got["label"][rows] == everything["label"][rows]).all()
        assert f"{len(rows)} of them done before" in label(*words)[1]
    one_line(
        label("--teacher", better, "--only", selection, "--out", tmp_path / "x.h5"), "several folders", "--unlabeled"
    )
    words = ["--teacher", better, "--only", selection, "--unlabeled", tmp_path / "a", "--out", tmp_path / "new-b.h5"]
    one_line(label(*words), "new-b.h5", "choose another --out")


def test_relabelling_does_not_look_for_new_images(selected, label, tmp_path):
    _, better = selected
    selection = select(tmp_path / "one.h5", {tmp_path / "old-a.h5": [1, 2]})
    (tmp_path / "a" / "a000.png").rename(tmp_path / "a" / "0.png")
    assert label("--teacher", better, "--only", selection, "--out", tmp_path / "n.h5")[0] == 0
    got = read(tmp_path / "n.h5")
    assert got["path"][0] == b"a000.png" and np.flatnonzero(got["status"]).tolist() == [1, 2]
    (tmp_path / "a").rename(tmp_path / "moved")  # the folder of the images has another place now
    words = ["--teacher", better, "--only", selection, "--unlabeled", tmp_path / "moved", "--out", tmp_path / "m.h5"]
    assert label(*words)[0] == 0
    assert read(tmp_path / "m.h5")["logits"][1:3].tobytes() == got["logits"][1:3].tobytes()


def test_the_student_takes_the_newer_labels(selected, label, tmp_path):
    selection, better = selected
    newer = [tmp_path / "all-b.h5", tmp_path / "all-a.h5"]
    got, old = student.Selection(selection, newer, None), student.Selection(selection, [], None)
    everything = {name: read(tmp_path / f"all-{name}.h5") for name in "ab"}
    rows = {"a": [3, 4, 5, 9, 9, 30, 39], "b": [0, 7, 8, 29]}
    expected = np.concatenate([everything[name]["logits"][rows[name]] for name in "ab"])
    examples = np.arange(11)
    np.testing.assert_array_equal(got.read_logits(examples), expected.astype(np.float32))
    assert got.label.tolist() == np.concatenate([everything[name]["label"][rows[name]] for name in "ab"]).tolist()
    assert (got.images.path == old.images.path).all() and got.label.tolist() != old.label.tolist()
    assert got.source["teacher"] == str(better) and old.source["teacher"] != str(better)


def test_what_the_newer_teacher_could_not_read_is_left_out(selected, label, tmp_path):
    with h5py.File(tmp_path / "all-a.h5", "r+") as file:
        file["status"][9], file["label"][9] = common.UNREADABLE, -1
    got = student.Selection(selected[0], [tmp_path / "all-a.h5", tmp_path / "all-b.h5"], None)
    assert got.row.tolist() == [3, 4, 5, 30, 39, 0, 7, 8, 29] and len(got.label) == len(got.images) == 9
    assert got.images.name(3) == str(tmp_path / "a" / "a030.png") and got.number.tolist() == [0] * 5 + [1] * 4


def test_newer_labels_that_do_not_fit_are_refused(selected, label, tmp_path, capsys):
    selection, better = selected
    words = ["--teacher", better, "--only", selection, "--unlabeled", tmp_path / "a", "--out", tmp_path / "new-a.h5"]
    assert label(*words)[0] == 0
    undo(tmp_path / "new-a.h5", 4)
    cases = [
        ([tmp_path / "all-a.h5"], "--logits: none of them has the images of"),
        ([tmp_path / "new-a.h5"], "unfinished"),
    ]
    cases.append(([tmp_path / "all-a.h5", tmp_path / "old-b.h5"], "several teachers"))
    for newer, words in cases:
        with pytest.raises(SystemExit) as stop:
            student.Selection(selection, newer, None)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and len(err.splitlines()) == 1


def test_folders_with_the_same_names_are_told_apart(teacher, label, tmp_path, capsys):
    better, files = make_teacher(tmp_path / "better.pt", seed=1), {}
    for k, name in enumerate("abc"):
        write_files(tmp_path / name, {f"{i}.png": encoded(picture(100 * k + i), "PNG") for i in range(8)})
        for who, path in (("old", teacher), ("new", better)):
            words = ["--teacher", path, "--unlabeled", tmp_path / name, "--out", tmp_path / f"{who}-{name}.h5"]
            assert label(*words)[0] == 0
        files[tmp_path / f"old-{name}.h5"] = [2, 5] if name != "c" else []  # of c nothing was selected
    selection = select(tmp_path / "balanced.h5", files)
    newer = [tmp_path / "new-b.h5", tmp_path / "new-a.h5"]
    got = student.Selection(selection, newer, None)
    expected = np.concatenate([read(tmp_path / f"new-{name}.h5")["logits"][[2, 5]] for name in "ab"])
    np.testing.assert_array_equal(got.read_logits(np.arange(4)), expected.astype(np.float32))
    for example, (name, i) in enumerate([("a", 2), ("a", 5), ("b", 2), ("b", 5)]):
        original = common.load_image(tmp_path / name / f"{i}.png")
        np.testing.assert_array_equal(np.asarray(got.images.load(example)), np.asarray(original))
    for folder, words in (("a", "--unlabeled"), (None, "")):
        if folder:
            with pytest.raises(SystemExit) as stop:
                student.Selection(selection, [], tmp_path / folder)
            assert stop.value.code == 2 and words in capsys.readouterr().err
    words = ["--teacher", better, "--only", selection, "--unlabeled", tmp_path / "c", "--out", tmp_path / "x.h5"]
    one_line(label(*words), "several folders")


def test_a_logits_file_that_was_made_anew_is_noticed(teacher, label, tmp_path, capsys):
    folder = write_files(tmp_path / "u", pictures(9))
    assert label("--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5")[0] == 0
    selection = select(tmp_path / "b.h5", {tmp_path / "l.h5": list(range(9))})
    student.Selection(selection, [], None)
    assert "made anew" not in capsys.readouterr().out
    with h5py.File(tmp_path / "l.h5", "r+") as file:
        file["label"][:] = (file["label"][:] + 1) % 3
    student.Selection(selection, [], None)
    assert "if it was made anew, run 03 again" in capsys.readouterr().out
    with h5py.File(selection, "r+") as file:
        file.attrs["files"] = "not json"
    with pytest.raises(SystemExit) as stop:
        student.Selection(selection, [], None)
    assert stop.value.code == 2 and "expected a JSON list" in capsys.readouterr().err


def test_rows_that_are_done_are_not_written_again(teacher, label, tmp_path, monkeypatch):
    """Another grid of batches, as another device has: its batches hold rows that are done and rows that are not."""
    folder = write_files(tmp_path / "u", pictures(10))
    words = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5"]
    assert label(*words)[0] == 0
    with h5py.File(tmp_path / "l.h5", "r+") as file:
        file["confidence"][3] = 0.125  # a sign that nobody else would leave
    undo(tmp_path / "l.h5", [2, 4])
    (folder / "003.png").unlink()
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 4)
    assert label(*words)[0] == 0
    got = read(tmp_path / "l.h5")
    assert got["confidence"][3] == 0.125 and (got["status"] == 1).all()


def test_names_that_are_not_utf_8_can_be_printed_anywhere(teacher, run_stage, tmp_path):
    folder = write_files(tmp_path / "u", pictures(3))
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"bad")
    words = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 50]
    done = run_stage("02_pseudo_label.py", *words, PYTHONIOENCODING="utf-8:strict")
    assert "caf\\udce9.jpg" in done.stdout


def test_logits_without_a_selection_are_refused(teacher, run_stage, tmp_path):
    done = run_stage("04_train_student.py", "--teacher", teacher, "--logits", tmp_path / "l.h5", check=False)
    assert done.returncode == 2 and "--logits needs --pseudo-labels" in done.stderr


# reading fast


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
    rows = common.list_images(tmp_path)
    view = common.View(32, 0.9)
    dataset = common.ImageDataset(rows, clean=view)
    for row, name in enumerate(("rotated", "upright")):
        expected = common.eval_view(common.load_image(tmp_path / f"{name}.jpg"), view).astype(int)
        got = dataset[row][1][0].astype(int)
        if scale == 1 or name == "rotated":
            np.testing.assert_array_equal(got, expected)
        else:
            assert (got != expected).any() and np.abs(got - expected).mean() < 1.5
            assert rows.load(row, 72).size == (-(-width // scale), -(-height // scale))
    noised = common.ImageDataset(rows, view, common.Crop(32, 0.1, True))
    np.testing.assert_array_equal(noised[1][1][0], common.eval_view(common.load_image(tmp_path / "upright.jpg"), view))


def test_shards_are_read_without_a_shared_position(tmp_path):
    make_tar(tmp_path / "0.tar", pictures(8))
    rows = common.list_images(tmp_path)
    dataset = common.ImageDataset(rows, clean=common.View(16, 1.0))
    dataset[0]  # opens the shard before the loaders are forked
    keys = [[i] * 4 for i in range(8)] * 4
    alone = common.Processes(torch.device("cpu"), 0, 1, 2)
    for key, batch in zip(keys, common.load_batches(dataset, keys, alone), strict=True):
        assert batch.errors == [] and (batch.views[0][3].permute(1, 2, 0).numpy() == dataset[key[0]][1][0]).all()


def test_evil_places_of_members_are_errors_of_their_rows(tmp_path):
    make_tar(tmp_path / "0.tar", pictures(2))
    rows = common.list_images(tmp_path)
    for offset, size in ((0, 100), (-512, 100), (512, 2**60), (2**61, 2**61), (513, int(rows.size[0]))):
        evil = replace(rows, offset=np.array([offset, 0]), size=np.array([size, 0]))
        assert common.ImageDataset(evil, clean=common.View(8, 1.0))[0][2], (offset, size)
