"""Stage 02: the teacher's labels, rows that never shift, killed runs, copies of val, relabelling."""

import csv
import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHEAP, CLASSES, ROOT, assert_mistake, checkpoint_of, encoded, load_stage, logits_on
from conftest import make_tar, noise_image, save_model, watch, write_files
from label_files import COLUMNS, change, read_labels as read
from PIL import Image

import common

stage = load_stage("02_pseudo_label")
STAGE = "02_pseudo_label.py"


def pictures(num: int, side: int = 40) -> dict[str, bytes]:
    return {f"{i:03}.png": encoded(noise_image(side, side + 8, i), "PNG") for i in range(num)}


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("teacher") / "model.pt", crop_fraction=0.9)


@pytest.fixture(scope="module")
def own_teacher(tiny_data, tmp_path_factory) -> Path:
    """A teacher of tiny_data, whose unlabelled images are those that it labels if nothing is said."""
    return save_model(tmp_path_factory.mktemp("teacher") / "model.pt", data=str(tiny_data), class_counts=[8, 8, 8])


@pytest.fixture
def label(call_main):
    """label(teacher, unlabeled, out, flag, value, ...) -> Done: stage 02 in this process."""
    start = ["02_pseudo_label", "--teacher"]
    return lambda teacher, images, out, *more: call_main(*start, teacher, "--unlabeled", images, "--out", out, *more)


def assert_same_labels(a: Path | dict, b: Path | dict, names=COLUMNS) -> None:
    a, b = (read(labels) if isinstance(labels, Path) else labels for labels in (a, b))
    for name in names:
        assert a[name].tobytes() == b[name].tobytes(), name


def logits_by_hand(teacher: Path, names) -> np.ndarray:
    """The teacher's logits on the clean view of image files; each row's largest is 0."""
    view = common.View.of(checkpoint_of(teacher))
    views = [common.eval_view(common.load_image(name), view) for name in names]
    logits = logits_on(views, *common.load_model(teacher))
    return logits - logits.max(1, keepdims=True)


def test_labels_are_the_teachers_on_the_clean_view(own_teacher, tiny_data, run_stage, tmp_path):
    """As a user runs it, with a plain Python. With them the logits of the half of val on which one may choose."""
    run_stage(ROOT / STAGE, "--teacher", own_teacher, "--out", tmp_path / "l.h5", launcher="python")
    got = read(tmp_path / "l.h5")
    paths = [path.decode() for path in got["path"]]
    assert paths == sorted(f"part{i % 2}/{i:03}.png" for i in range(20)) and (got["status"] == 1).all()
    logits = logits_by_hand(own_teacher, [tiny_data / "unlabeled" / path for path in paths])
    assert np.ptp(logits, axis=0).min() > 0.1  # the images differ
    np.testing.assert_allclose(got["logits"], logits, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(got["confidence"], torch.tensor(logits).softmax(1).amax(1), rtol=1e-4)
    assert (got["label"] == logits.argmax(1)).all() and not got["offset"].any() and not got["size"].any()
    images, labels, _ = common.labeled_images(tiny_data, "val", CLASSES)
    chosen = np.flatnonzero(~common.judged_half(images))
    assert 0 < len(chosen) < len(images) and (got["val_label"] == labels[chosen]).all()
    logits = logits_by_hand(own_teacher, [images.name(row) for row in chosen])
    np.testing.assert_allclose(got["val_logits"], logits, rtol=1e-3, atol=2e-3)
    assert got["class_counts"].tolist() == [8, 8, 8]
    file = common.open_label_file(tmp_path / "l.h5")
    expected = {"arch": CHEAP, "image_size": 32, "crop_mode": "center", "precision": "fp32"}
    expected |= {"data": str(tiny_data), "root": str(tiny_data / "unlabeled")}
    expected |= {"teacher": str(own_teacher), "teacher_sha256": common.fingerprint(own_teacher)}
    expected |= {"arch_options": json.dumps(checkpoint_of(own_teacher)["arch_options"])}
    assert expected.items() <= file.attrs.items() and file.classes == CLASSES
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", file.attrs["created"])


def test_labels_do_not_depend_on_the_number_of_processes(random_teacher, run_stage, tmp_path):
    folder = write_files(tmp_path / "many", pictures(600, side=8) | {"007.png": b"not an image"})  # two batches
    flags = ["--unlabeled", folder, "--teacher", random_teacher, "--out"]
    run_stage(STAGE, *flags, tmp_path / "1.h5")
    run_stage(ROOT / STAGE, *flags, tmp_path / "2.h5", nproc=2, launcher="torchrun")
    assert_same_labels(tmp_path / "1.h5", tmp_path / "2.h5")
    assert np.flatnonzero(read(tmp_path / "1.h5")["status"] != 1).tolist() == [7]


def test_bad_files_never_shift_a_row(random_teacher, label, tmp_path):
    photo, grey = noise_image(40, 48, 1), np.random.default_rng(0).integers(0, 65536, (48, 40), dtype=np.uint16)
    jpeg, png = encoded(photo), encoded(photo, "PNG")
    good = {
        "16bit.png": encoded(Image.fromarray(grey), "PNG"),
        "broken_exif.jpg": encoded(photo, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + b"\xff" * 20),
        os.fsdecode(b"latin1-\xe9.png"): png,
    }
    good["grey.ppm"] = encoded(Image.fromarray(np.uint8(grey >> 8)), "PPM")
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "header.png": b"\x89PNG\r\n\x1a\n",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "float.tif": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "bomb.png": encoded(Image.new("1", (19000, 19000)), "PNG"),  # Pillow refuses
    }
    good |= {f"{'abc'[i % 3]}/{name}": data for i, (name, data) in enumerate(pictures(60).items())}
    folder, out = write_files(tmp_path / "u", good | bad), tmp_path / "l.h5"
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # thousands of lines in a crawl
        for _ in range(2):
            assert_mistake(label(random_teacher, folder, out), "--max-bad", "bomb.png")
    done = label(random_teacher, folder, out, "--max-bad", 20)
    assert done.returncode == 0 and str(folder / "bomb.png") in done.stdout
    got = read(out)
    paths = [os.fsdecode(path) for path in got["path"]]
    assert paths == sorted([*good, *bad, "dangling.jpg"], key=os.fsencode)
    is_bad = np.array([path not in good for path in paths])
    assert (got["status"] == np.where(is_bad, 2, 1)).all() and (got["label"][is_bad] == -1).all()
    assert np.isnan(got["logits"][is_bad]).all() and (np.isnan(got["confidence"]) == is_bad).all()
    logits = logits_by_hand(random_teacher, [folder / path for path in paths if path in good])
    np.testing.assert_allclose(got["logits"][~is_bad], logits, rtol=1e-2, atol=1e-2)
    assert len({row.tobytes() for row in logits}) > 60  # a shifted row would be seen


def test_shards_and_folders_get_the_same_labels(random_teacher, label, tmp_path):
    files = pictures(30)
    write_files(tmp_path / "folder" / "s.tar", files)  # so that the paths are equal too
    make_tar(tmp_path / "shards" / "s.tar", dict(sorted(files.items(), reverse=True)))
    for name, unlabeled in (("folder", "folder"), ("shards", "shards"), ("shard", "shards/s.tar")):
        assert label(random_teacher, tmp_path / unlabeled, tmp_path / f"{name}.h5").returncode == 0
    assert_same_labels(tmp_path / "folder.h5", tmp_path / "shards.h5", ("path", *COLUMNS[3:]))
    assert_same_labels(tmp_path / "shard.h5", tmp_path / "shards.h5")
    assert read(tmp_path / "shards.h5")["size"].tolist() == list(map(len, files.values()))


def test_rows_that_are_done_are_not_written_again(random_teacher, label, tmp_path, monkeypatch):
    folder, out = write_files(tmp_path / "u", pictures(10)), tmp_path / "l.h5"
    assert label(random_teacher, folder, out).returncode == 0
    whole = read(out)
    change(out, confidence={4: 0, 6: 0})
    rows, file = np.array([4, 6]), os.open(out, os.O_WRONLY)
    stage.put(file, common.open_label_file(out), "confidence", rows, whole["confidence"][rows])
    assert_same_labels(out, whole)  # 5 stays
    change(out, confidence={3: 0.125}, status=dict.fromkeys((2, 4, 5), common.TODO), logits={4: 0, 5: 0})  # 3: a sign
    (folder / "003.png").unlink()
    monkeypatch.setattr(stage, "rows_per_batch", lambda size, device: 4)
    assert label(random_teacher, folder, out).returncode == 0
    got = read(out)
    assert got["confidence"][3] == 0.125 and (got["status"] == 1).all()
    np.testing.assert_allclose(got["logits"], whole["logits"], atol=2e-3)


def test_the_status_of_rows_is_written_after_a_sync_of_their_data(random_teacher, label, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("sync"))
    watch(monkeypatch, stage, "put", lambda *args: calls.append(args[2]))
    assert label(random_teacher, write_files(tmp_path / "u", pictures(3)), tmp_path / "l.h5").returncode == 0
    assert calls[-5:] == ["logits", "label", "confidence", "sync", "status"] and calls.count("status") == 1


def test_a_lost_mount_is_not_a_million_unreadable_images(random_teacher, label, tmp_path):
    folder, out = write_files(tmp_path / "u", pictures(5)), tmp_path / "l.h5"
    assert label(random_teacher, folder, out).returncode == 0
    whole = read(out)
    change(out, status={...: common.TODO})
    folder.rename(tmp_path / "away")
    assert_mistake(label(random_teacher, folder, out), folder)
    folder.mkdir()  # an empty mount point
    assert_mistake(label(random_teacher, folder, out), folder)
    assert not read(out)["status"].any()
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    assert label(random_teacher, folder, out).returncode == 0
    assert_same_labels(out, whole)


def test_a_finished_file_needs_no_model(own_teacher, random_teacher, tiny_data, label, tmp_path, monkeypatch):
    """And other settings need another file, finished or not."""
    folder, out = tiny_data / "unlabeled", tmp_path / "l.h5"
    assert label(own_teacher, folder, out).returncode == 0
    content = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(stage, "load_model")
        assert "finished" in label(own_teacher, folder, out).stdout
    for status in (common.DONE, common.TODO):  # of one row
        change(out, status={1: status})
        assert_mistake(label(random_teacher, folder, out), out, "--teacher")
        assert_mistake(label(own_teacher, folder / "part0", out), out, "--unlabeled")
        assert_mistake(label(own_teacher, folder, out, "--precision", "bf16"), out, "--precision")
    assert label(own_teacher, folder, out).returncode == 0 and out.read_bytes() == content


def test_logits_that_are_not_finite_are_not_written(random_teacher, tiny_data, label, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "normalize", lambda pixels, view: common.normalize(pixels, view) * torch.nan)
    assert_mistake(label(random_teacher, tiny_data / "unlabeled", tmp_path / "l.h5"), "--teacher")
    assert not read(tmp_path / "l.h5")["status"].any()


# Stage 02 with batches and pauses (seconds a batch) as a test wants them, and later processes that begin later.
WATCHED = """
import importlib, os, time
stage = importlib.import_module("02_pseudo_label")
stage.rows_per_batch = lambda size, device: {rows}
normalize = stage.normalize
stage.normalize = lambda *args: time.sleep(float(os.environ.get("PAUSE", 0))) or normalize(*args)
time.sleep({wait} * int(os.environ.get("RANK", 0)))
stage.main()
"""


@pytest.mark.parametrize(("column", "num_bytes", "num_done"), [("logits", 37, 0), ("status", 18, 18)])
def test_a_full_disk_is_one_line_and_costs_nothing(column, num_bytes, num_done, own_teacher, run_stage, tmp_path):
    """A limit on the size of files stands in for the disk: what was done before stays, and a later run continues."""
    (tmp_path / "stage.py").write_text(WATCHED.format(rows=4, wait=0))
    flags = [tmp_path / "stage.py", "--teacher", own_teacher, "--out", tmp_path / "l.h5"]
    run_stage(*flags, PYTHONPATH=ROOT)
    whole = read(tmp_path / "l.h5")
    change(tmp_path / "l.h5", status={...: common.TODO})
    limit = common.open_label_file(tmp_path / "l.h5").places[column][1] + num_bytes  # within a batch of 4 rows
    assert_mistake(run_stage(*flags, file_size=limit, check=False, PYTHONPATH=ROOT), tmp_path / "l.h5")
    assert read(tmp_path / "l.h5")["status"].sum() == num_done
    run_stage(*flags, PYTHONPATH=ROOT)
    assert_same_labels(tmp_path / "l.h5", whole)


NUM = 400  # images of slow_run


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory, run_stage):
    """(flags of a run of some seconds, what it gives uninterrupted)"""
    root = tmp_path_factory.mktemp("slow")
    write_files(root / "u", pictures(NUM) | {"000.png": b"bad", "301.png": b"bad"})
    flags = ["--teacher", save_model(root / "model.pt", image_size=160), "--unlabeled", root / "u", "--out"]
    run_stage(STAGE, *flags, root / "whole.h5")
    return flags, read(root / "whole.h5")


def check_rows(path: Path, whole: dict) -> int:
    """What is done is right; returns how much that is."""
    got = read(path)
    done = got["status"] != common.TODO
    assert_same_labels(got, whole, COLUMNS[:3])
    assert_same_labels({name: got[name][done] for name in COLUMNS}, {name: whole[name][done] for name in COLUMNS})
    return int(done.sum())


@pytest.mark.xdist_group("kill 02")
def test_killed_at_any_time_it_ends_as_if_nothing_had_been(slow_run, start_stage, tmp_path):
    """Runs of 1, 2 and 3 processes are killed after some progress each: slow ones, so that none ends before."""
    (flags, whole), out, watched = slow_run, tmp_path / "l.h5", tmp_path / "stage.py"
    watched.write_text(WATCHED.format(rows=16, wait=0))  # the rows as without
    process = start_stage(watched, *flags, out, PYTHONPATH=ROOT, PAUSE=0.2)
    process.wait_until(out.exists)
    process.kill()
    before = check_rows(out, whole)  # the file is complete from the first moment
    for nproc in (1, 2, 3, 1, 2):
        process = start_stage(watched, *flags, out, nproc=nproc, PYTHONPATH=ROOT, PAUSE=0.2 * nproc)
        goal = before + NUM // 16
        process.wait_until(lambda goal=goal: np.count_nonzero(read(out)["status"]) >= goal)
        process.kill()
        done = check_rows(out, whole)
        assert before < done < NUM, "the kill came too late to test anything"
        before = done
    assert start_stage(STAGE, *flags, out, nproc=2).wait() == 0 and check_rows(out, whole) == NUM


@pytest.mark.xdist_group("kill 02")
@pytest.mark.parametrize(("nproc", "launcher"), [(1, None), (2, "torchrun")])
def test_sigterm_keeps_all_that_was_done(nproc, launcher, slow_run, start_stage, tmp_path):
    (flags, whole), out, watched = slow_run, tmp_path / "l.h5", tmp_path / "watched.py"
    watched.write_text(WATCHED.format(rows=16, wait=0))
    process = start_stage(watched, *flags, out, nproc=nproc, launcher=launcher, PYTHONPATH=ROOT, PAUSE=0.1)
    process.wait_until(lambda: out.exists() and np.count_nonzero(read(out)["confidence"]) > 30)
    os.kill(process.pids[0], signal.SIGTERM)  # torchrun hands it on
    assert process.wait(60) == (143 if nproc == 1 else 1), process
    assert watched.name not in process.stderr, process  # torchrun's own traceback is torchrun's
    assert 30 < check_rows(out, whole) < NUM


@pytest.fixture
def select(own_teacher, tiny_data, label, call_main, tmp_path, monkeypatch):
    """select(flag, value, ...) -> balanced.h5: stage 03 on what own_teacher says of tiny_data."""
    monkeypatch.setattr(load_stage("03_balance"), "draw", lambda *args: None)

    def call(*flags) -> Path:
        labels, out = tmp_path / "l.h5", tmp_path / "balanced.h5"
        assert label(own_teacher, tiny_data / "unlabeled", labels).returncode == 0
        assert call_main("03_balance", labels, "--out", out, *flags).returncode == 0
        return out

    return call


def test_a_selection_is_labelled_again(own_teacher, tiny_data, label, select, tmp_path):
    """By the same teacher: the same rows, copies and labels. By another: what that one says."""
    selection = select("--threshold", 0.25, "--per-class", 9)
    old, attrs = read(selection), common.open_label_file(selection).attrs
    better = save_model(tmp_path / "better.pt", data=str(tiny_data), seed=1)
    kept = ("method", "threshold", "per_class", "seed", "files")
    for teacher in (own_teacher, better):
        out = tmp_path / f"{teacher.stem}.h5"
        for _ in range(2):
            assert label(teacher, selection, out).returncode == 0
        got, new_attrs = read(out), common.open_label_file(out).attrs
        assert all(new_attrs[name] == attrs[name] for name in kept)
        assert new_attrs["teacher_sha256"] == common.fingerprint(teacher)
        assert_same_labels(got, old, ("path", "copies", "status"))
        names = [tiny_data / "unlabeled" / os.fsdecode(path) for path in got["path"]]
        logits = logits_by_hand(teacher, names)
        np.testing.assert_allclose(got["logits"], logits, rtol=1e-3, atol=2e-3)
        assert (got["label"] == logits.argmax(1)).all() and len(got["val_label"]) > 0
        assert (got["label"] == old["label"]).all() == (teacher == own_teacher)
    select("--threshold", 0.25, "--per-class", 10)  # another one under the same name
    assert_mistake(label(better, selection, out), "--unlabeled", out)


def test_a_top_p_selection_keeps_its_labels(own_teacher, label, select, tmp_path):
    """An image may stand in it under several classes; `confidence` is that of the class that is kept."""
    selection = select("--method", "top-p", "--top-p", 2, "--per-class", 9)
    assert label(own_teacher, selection, tmp_path / "n.h5").returncode == 0
    got, old = read(tmp_path / "n.h5"), read(selection)
    assert len(np.unique(got["path"])) < len(got["path"])
    assert_same_labels(got, old, ("path", "label", "copies"))
    probs = torch.tensor(got["logits"]).float().softmax(1).numpy()
    np.testing.assert_allclose(got["confidence"], probs[np.arange(len(probs)), got["label"]], atol=2e-3)
    np.testing.assert_allclose(got["confidence"], old["confidence"], atol=2e-3)
    others = save_model(tmp_path / "others.pt", classes=["x", "y"])
    assert_mistake(label(others, selection, tmp_path / "o.h5"), "--teacher", selection)


@pytest.fixture
def with_copies(tiny_data, tmp_path):
    """(data directory with two byte copies of images of val in unlabeled/, its teacher)"""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copy(data / "val/disc/0.png", data / "unlabeled/copy.png")
    shutil.copy(data / "val/triangle/3.png", data / "unlabeled/part1/copy.png")
    return data, save_model(tmp_path / "teacher.pt", data=str(data))


def test_copies_of_val_images_are_left_out(with_copies, label, tmp_path):
    data, teacher = with_copies
    images, labels, _ = common.labeled_images(data, "val")
    _, bad, *_ = chosen = np.flatnonzero(~common.judged_half(images))
    Path(images.name(bad)).write_bytes(b"<html>")  # nothing is chosen on it
    for _ in range(2):  # again: nothing to do, the same answer
        done = label(teacher, data / "unlabeled", tmp_path / "l.h5", "--max-bad", 0)
        assert done.returncode == 0 and str(data / "unlabeled/part1/copy.png") in done.stdout
    rows = read(tmp_path / "l.h5")
    is_copy = np.array([path.endswith(b"copy.png") for path in rows["path"]])
    assert is_copy.sum() == 2 and (rows["status"] == np.where(is_copy, 3, 1)).all()
    assert ((rows["label"] == -1) == is_copy).all() and (np.isnan(rows["confidence"]) == is_copy).all()
    assert (np.isnan(rows["logits"]).all(1) == is_copy).all()
    val_label = labels[chosen[chosen != bad]].tolist()
    assert rows["val_label"].tolist() == val_label and len(rows["val_logits"]) == len(val_label)
    moved = data.rename(tmp_path / "moved")
    done = label(teacher, moved / "unlabeled", tmp_path / "m.h5")  # nothing is compared, nor is val labelled
    assert done.returncode == 0 and "--data" in done.stdout
    assert (read(tmp_path / "m.h5")["status"] == 1).all() and "val_logits" not in read(tmp_path / "m.h5")
    assert label(teacher, moved / "unlabeled", tmp_path / "n.h5", "--data", moved).returncode == 0
    assert_same_labels(rows, tmp_path / "n.h5", (*COLUMNS, "val_logits", "val_label"))


@pytest.mark.parametrize(("folder", "num"), [("val", 12), ("val/disc", 4), ("val/disc/0.png", 1)])
def test_val_itself_is_labelled_when_it_is_asked_for(folder, num, with_copies, label, tmp_path):
    """Also when the file of its labels is labelled again."""
    data, teacher = with_copies
    labels, again = tmp_path / "l.h5", tmp_path / "again.h5"
    for unlabeled, out in ((data / folder, labels), (labels, again)):
        assert label(teacher, unlabeled, out).returncode == 0
        assert read(out)["status"].tolist() == [common.DONE] * num
    assert ("val_logits" in read(labels)) == (num > 1) and "val_logits" in read(again)


def test_without_val_the_held_out_tenth_takes_its_place(with_copies, label, tmp_path):
    data, teacher = with_copies
    shutil.rmtree(data / "val")
    write_files(data / "train" / "disc", pictures(60))
    tenth = common.labeled_images(data, "val")[0]
    shutil.copy(tenth.name(0), data / "unlabeled" / "copy.png")
    assert label(teacher, data / "unlabeled", tmp_path / "l.h5").returncode == 0
    got = read(tmp_path / "l.h5")
    assert got["path"][got["status"] == 3].tolist() == [b"copy.png"]
    assert len(got["val_label"]) == (~common.judged_half(tenth)).sum() > 0
    assert label(teacher, data / "val", tmp_path / "v.h5").returncode == 0
    got = read(tmp_path / "v.h5")
    assert got["path"].tolist() == tenth.path.tolist() and (got["status"] == 1).all()


def test_the_labels_as_csv(run_stage, tmp_path):
    """Names byte for byte, whatever they hold; again with the finished file, and with several processes."""
    names = ["a,b.png", 'say "x".png', "two\nlines.png", "ü/é.png", os.fsdecode(b"latin1-\xe9.png")]
    files = dict(zip(names, pictures(5).values(), strict=True))
    folder = write_files(tmp_path / "u", files | {"no.png": b"no"})
    classes = ["a,b", 'c"d', "ü"]
    teacher = save_model(tmp_path / "t.pt", CHEAP, classes, seed=1)
    table = tmp_path / "new" / "labels.csv"
    (tmp_path / "stage.py").write_text(WATCHED.format(rows=2, wait=1))
    flags = ["--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5", "--max-bad", 50, "--csv", table]
    for nproc in (3, 1):
        run_stage(tmp_path / "stage.py", *flags, nproc=nproc, PYTHONPATH=ROOT)
        with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *lines = csv.reader(file)
        table.unlink()
        got = read(tmp_path / "l.h5")
        rows = zip(got["path"], got["label"], got["confidence"], got["status"], strict=True)
        expected = [[os.fsdecode(path), classes[c], str(p)] for path, c, p, status in rows if status == 1]
        assert header == ["path", "class", "confidence"] and lines == expected and len(lines) == 5


def test_of_a_single_image_the_five_best_classes_are_printed(tiny_data, label, tmp_path):
    classes = [f"class {c}" for c in range(7)]
    teacher = save_model(tmp_path / "t.pt", CHEAP, classes, data=str(tiny_data), seed=3)
    picture = Path(shutil.copy(tiny_data / "val" / "disc" / "0.png", tmp_path / "a photo,1"))  # with no ending
    probs = torch.tensor(logits_by_hand(teacher, [picture])[0]).softmax(0)
    for _ in range(2):  # again with the finished file
        lines = re.findall(r"^ *([\d.]+)%  (.+)$", label(teacher, picture, tmp_path / "l.h5").stdout, re.M)
        assert [name for _, name in lines] == [classes[c] for c in probs.argsort(descending=True)[:5]]
        best = probs.sort(descending=True).values[:5].mul(100)
        assert [float(share) for share, _ in lines] == pytest.approx(best.tolist(), abs=0.03)
    assert_mistake(label(teacher, tmp_path, tmp_path / "l.h5"), "--unlabeled")  # it is not all of its folder
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("text.jpg", "nowhere.jpg"):
        assert_mistake(label(teacher, tmp_path / name, tmp_path / "n.h5"), name)
    assert not (tmp_path / "n.h5").exists()
