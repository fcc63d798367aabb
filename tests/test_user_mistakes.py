"""What people met with tools like this one: flawed data, leftovers of a launcher, signals, dead loaders."""

import os
import re
import shutil
import signal
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHEAP, assert_mistake, encoded, folders, make_tar, noise_image, save_model, write_files

import common

TRAIN = ["--arch", CHEAP, "--image-size", 32, "--batch-size", 8, "--steps", 2]


def test_one_class_is_one_folder_too_many(tmp_path, mistake):
    data = folders(tmp_path, train={"images/cat": 2, "images/dog": 2})
    mistake(lambda: common.labeled_images(data, "train"), data / "train", "images", "cat, dog")
    assert common.labeled_images(folders(tmp_path, val={"cat": 2}), "val")[2] == ["cat"]  # which may lack classes


@pytest.mark.parametrize("names", [("Cat", "cat"), ("é", unicodedata.normalize("NFD", "é"))])
def test_two_spellings_of_a_class_are_a_mistake(tmp_path, mistake, names):
    data = folders(tmp_path, train=dict.fromkeys((*names, "dog"), 2))
    mistake(lambda: common.labeled_images(data, "train"), data / "train", names[0])


def test_a_name_is_the_same_in_both_spellings_of_unicode(tmp_path):
    composed, decomposed = "café", unicodedata.normalize("NFD", "café")
    data = folders(tmp_path, train={decomposed: 2, "dog": 2}, val={composed: 2, "dog": 2})
    _, labels, classes = common.labeled_images(data, "train")
    assert classes == [composed, "dog"] and sorted(labels.tolist()) == [0, 0, 1, 1]
    assert common.labeled_images(data, "val", classes)[1].tolist() == [0, 0, 1, 1]


def test_what_file_managers_leave_behind_is_left_out(tmp_path, capsys):
    picture = encoded(noise_image(8, 8), "PNG")
    junk = ["@eaDir/b.png/THUMB.jpg", "__MACOSX/._b.png", "#recycle/c.jpg", "lost+found/d.jpg", ".cache/e.jpg"]
    folder = write_files(tmp_path / "unlabeled", dict.fromkeys(["a.png", "b.HEIC", "Thumbs.db", *junk], picture))
    make_tar(folder / "s.tar", dict.fromkeys(["./f.png", "x/@eaDir/h.png", "x/.cache/i.png"], picture))
    assert common.list_images(folder).path.tolist() == [b"a.png", b"s.tar/./f.png"]
    assert "5 are left out" in (line := capsys.readouterr().out) and "@eaDir" in line and "HEIC" in line
    folders(tmp_path, train={"cat": 1, "dog": 1, "@eaDir": 1})
    assert common.labeled_images(tmp_path, "train")[2] == ["cat", "dog"]


def test_copies_of_val_in_train(tmp_path, capsys, mistake):
    data = folders(tmp_path, train={"cat": 30, "dog": 30}, val={"cat": 30, "dog": 30})  # 2 percent of 60: 1.2
    for name in ("train/cat/a.png", "train/cat/b.png", "val/dog/c.png", "val/dog/d.png"):
        (data / name).touch()  # of no bytes: unreadable, and no copies

    def check(number):
        for name in ("again", "copy"):  # two copies of one image of val are one
            shutil.copy(data / f"val/cat/00{number}.png", data / f"train/cat/{name}{number}.png")
        train, labels, classes = common.labeled_images(data, "train")
        common.check_copies(train, labels, common.labeled_images(data, "val", classes)[0])

    check(0)
    assert "copy0.png" in capsys.readouterr().out
    mistake(lambda: check(1), "val/cat/000.png = ", "copy1.png")


def test_one_image_under_two_classes_is_told(tiny_data, tmp_path, call_main):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copy(data / "train/disc/1.png", data / "train/square/also.png")
    done = call_main("01_train_teacher", "--data", data, "--out", tmp_path / "t", *TRAIN)
    lines = [line for line in done.stdout.splitlines() if "also.png" in line]
    assert done.returncode == 0 and len(lines) == 1 and "1 images are under two classes" in lines[0]


@pytest.fixture
def labelled(tiny_data, tmp_path, call_main):
    """(label, folder): label() runs 02 on a copy of the unlabelled images."""
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data))
    folder = shutil.copytree(tiny_data / "unlabeled", tmp_path / "unlabeled")

    def label(folder):
        return call_main("02_pseudo_label", "--teacher", teacher, "--unlabeled", folder, "--out", tmp_path / "l.h5")

    assert label(folder).returncode == 0
    return label, folder


def test_images_that_came_or_went_later_are_told(labelled):
    label, folder = labelled
    for name in ("new.png", "newer.png"):
        shutil.copy(folder / "part0/000.png", folder / name)
    (folder / "part0/000.png").unlink()
    assert re.search(r"l.h5, \d{4}-\d\d-\d\d, 2 images came .* 1 are gone", label(folder).stdout)


def test_moved_images_are_followed(labelled, tmp_path):
    label, folder = labelled
    with common.h5py.File(tmp_path / "l.h5", "r+") as file:
        file["status"][3] = common.TODO  # something is left to do
    moved = folder.rename(tmp_path / "moved")
    assert "have moved" in label(moved).stdout
    labels = common.open_label_file(tmp_path / "l.h5")
    assert (labels.column("status") == common.DONE).all() and labels.images.root == str(moved)
    other = shutil.copytree(moved / "part0", tmp_path / "other")  # not the same paths
    assert_mistake(label(other), "--unlabeled")


BEYOND = {"RANK": 2, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}, BEYOND])
@pytest.mark.parametrize("stage", ["00_prepare_data.py", "02_pseudo_label.py"])
def test_torchruns_variables_that_do_not_fit_are_a_mistake(run_stage, stage, environment):
    assert_mistake(run_stage(stage, check=False, **environment), "unset RANK")


def test_ctrl_c_before_the_first_step_is_quiet(start_stage, tmp_path):
    os.mkfifo(tmp_path / "teacher.pt")  # reading it waits
    stage = start_stage("04_train_student.py", "--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "s")
    stage.wait_until((tmp_path / "s" / ".lock").exists)
    os.kill(stage.pids[0], signal.SIGINT)
    assert stage.wait() == 143 and stage.stderr == ""


def test_a_second_signal_ends_a_stage_at_once(monkeypatch):
    """One within milliseconds is the first once more: torchrun passes it on."""
    ended = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = common.StopSignal()
    for moment, expected in ((10, []), (10.01, []), (11, [143])):
        monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda now=moment: now))
        stop.receive(signal.SIGTERM, None)
        assert stop.received and ended == expected


class Dead(common.ImageDataset):
    def __getitem__(self, key):
        os._exit(1)


def test_dead_loaders_are_one_line(tiny_data, mistake):
    images = common.list_images(tiny_data / "unlabeled")
    dataset = Dead(images, clean=common.View.default(32))
    processes = common.Processes(torch.device("cpu"), 0, 1, workers=1)
    mistake(lambda: list(common.load_batches(dataset, [[0, 1]], processes)), "--workers", "--shm-size")


def test_a_damaged_download_is_named(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = tmp_path / "checkpoints" / "mobilenet_v3_small-047dcff4.pth"
    write_files(tmp_path, {f"checkpoints/{file.name}": b"half of it"})
    mistake(lambda: common.published_weights("mobilenet_v3_small", None), "--init published", file, "delete")


def test_a_run_that_chooses_does_so_on_half_of_val(tiny_data, tmp_path, planned):
    """06 --val-half judge, run.sh's table, measures on the other half."""
    flags = ["--data", tiny_data, "--out", tmp_path, *TRAIN]
    run = planned("01_train_teacher", *flags, "--patience", 3)
    run.evaluate_average()
    images, labels = run.val
    half = ~common.judged_half(images)
    assert 0 < half.sum() < len(half)
    expected = common.evaluate(run.averaged, images[half], labels[half], run.view, run.processes, run.precision)
    assert run.judged == [expected["val_loss"]]
    assert not np.isclose(run.metrics["val_loss"], expected["val_loss"])  # what is reported is of all
