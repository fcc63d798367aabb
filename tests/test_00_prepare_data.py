"""00: what is drawn, what is made of a downloaded set, and that nothing is overwritten. No network is used."""

import csv
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from conftest import assert_mistake, load_stage
from PIL import Image

prepare = load_stage("00_prepare_data")


@pytest.fixture
def run(call_main, monkeypatch):
    """run("demo", "--out", ...): stage 00 in this process, with a demo of 40 + 20 images."""
    monkeypatch.setitem(prepare.DEMO, "unlabeled", 40)
    monkeypatch.setitem(prepare.DEMO, "val_per_class", 2)
    return lambda *flags: call_main("00_prepare_data", *flags)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truth_of(folder):
    with open(folder / "unlabeled_truth.csv", newline="") as file:
        return {line["name"]: line["class"] for line in csv.DictReader(file)}


def test_the_demo_is_as_described_and_the_same_each_time(run, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.DEMO, "unlabeled", 400)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ["--labels-per-class", 3, "--seed", seed]
        assert run("demo", "--out", tmp_path / name, *flags).returncode == 0
    a = tmp_path / "a"
    assert contents(a) == contents(tmp_path / "b")
    assert contents(a)["train/disc/00002.jpg"] != contents(tmp_path / "c")["train/disc/00002.jpg"]
    assert Image.open(a / "train/disc/00002.jpg").size == (48, 48)
    assert {len(list(folder.iterdir())) for folder in (a / "train").iterdir()} == {3}
    assert {len(list(folder.iterdir())) for folder in (a / "val").iterdir()} == {2}
    images = [path.read_bytes() for path in a.rglob("*.jpg")]
    assert len(set(images)) == len(images), "val has images of train"
    truth = truth_of(a)
    assert sorted(truth) == sorted(path.name for path in (a / "unlabeled").iterdir()) and len(truth) == 400
    classes, sizes = np.unique(list(truth.values()), return_counts=True)
    assert len(classes) == 11 and sizes[0] == 80  # "" comes first: a fifth is of no class
    assert 9 <= sizes[1:].max() / sizes[1:].min() <= 12  # the long tail of 10:1, rounded
    labels = [truth[name] for name in sorted(truth)]
    assert sum(x == y for x, y in pairwise(labels)) < 100  # the order of the names says nothing


def test_a_class_is_not_told_by_its_colour():
    means = {label: [prepare.draw_image(label, (label, i)).mean((0, 1)) for i in range(60)] for label in (2, 8)}
    gap = np.abs(np.mean(means[2], axis=0) - np.mean(means[8], axis=0))
    assert (gap < np.std(means[2], axis=0)).all()


def test_figures_are_mostly_lighter_than_their_background():
    rng, background = np.random.default_rng(0), np.array([120, 120, 120])
    lighter = [sum(prepare.figure_color(rng, background)) > 360 for _ in range(400)]
    assert 0.84 < np.mean(lighter) < 0.96  # 0.8 must be, of the others half are


def test_what_is_there_is_done_or_left_alone(run, tmp_path):
    out, mine = tmp_path / "demo", tmp_path / "mine"
    flags = ("demo", "--out", out, "--labels-per-class", 1)
    assert run(*flags).returncode == 0
    before = contents(out)
    assert "already done" in run(*flags).stdout
    for more in (("--seed", 1), ("--labels-per-class", 2)):
        assert_mistake(run(*flags, *more), "--out")
    mine.mkdir()
    for name, content in (("thesis.txt", b"x"), ("prepared.json", b"{}")):
        (mine / name).write_bytes(content)
        assert_mistake(run("demo", "--out", mine), "--out")
        assert_mistake(run("demo", "--out", mine / name), "--out")
    assert_mistake(run("demo", "--out", tmp_path / "new", "--labels-per-class", 0), "--labels-per-class")
    assert contents(out) == before and contents(mine) == {"thesis.txt": b"x", "prepared.json": b"{}"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "mine"]


def test_a_killed_run_leaves_nothing_and_the_next_one_starts_anew(start_stage, run, tmp_path):
    out = tmp_path / "data" / "demo"
    stage = start_stage("00_prepare_data.py", "demo", "--out", out)
    stage.wait_until(lambda: any(tmp_path.rglob("*.jpg")))
    stage.kill()
    assert not out.exists()
    assert run("demo", "--out", out, "--labels-per-class", 1).returncode == 0
    assert len(list((out / "unlabeled").iterdir())) == 40


def cifar(root, train, download):
    num = 20 if train else 6
    images = np.random.default_rng(train).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    return SimpleNamespace(classes=["cat", "dog"], data=images, targets=[i % 2 for i in range(num)])


def stl(root, split, download):
    """STL-10 has unlabelled images of its own, whose classes nobody knows."""
    num = {"train": 10, "test": 4, "unlabeled": 7, "extra": 7}[split]
    labels = np.full(num, -1) if split == "unlabeled" else np.arange(num) % 2
    images = np.random.default_rng(num).integers(0, 256, (num, 3, 96, 96), dtype=np.uint8)
    return SimpleNamespace(classes=["cat", "dog"], data=images, labels=labels)


@pytest.fixture
def datasets(monkeypatch):
    """Stands for torchvision.datasets."""
    monkeypatch.setattr(torchvision, "datasets", SimpleNamespace(CIFAR10=cifar, STL10=stl, SVHN=stl))
    return torchvision.datasets


def test_labels_per_class_makes_the_rest_of_train_unlabeled(run, tmp_path, datasets):
    assert run("cifar10", "--out", tmp_path / "c", "--labels-per-class", 3).returncode == 0
    assert {len(list(folder.iterdir())) for folder in (tmp_path / "c" / "train").iterdir()} == {3}
    truth = truth_of(tmp_path / "c")
    assert len(truth) == 14 and sorted(truth.values()) == ["cat"] * 7 + ["dog"] * 7
    source = cifar("", True, True)
    for name, label in truth.items():  # pixels and classes still belong together
        pixels = np.asarray(Image.open(tmp_path / "c" / "unlabeled" / name))
        index = (source.data == pixels).all((1, 2, 3)).argmax()
        assert source.classes[source.targets[index]] == label
    assert_mistake(run("cifar10", "--out", tmp_path / "many", "--labels-per-class", 11), "--labels-per-class")
    assert not (tmp_path / "many").exists()


@pytest.mark.parametrize("name, flags, known", [("stl10", ("--labels-per-class", 4), 2), ("svhn", (), 7)])
def test_the_truth_is_that_of_the_known_classes(run, tmp_path, datasets, name, flags, known):
    assert run(name, "--out", tmp_path / "s", *flags).returncode == 0
    assert len(list((tmp_path / "s" / "unlabeled").iterdir())) == (9 if flags else 7)
    assert len(truth_of(tmp_path / "s")) == known
    written = [np.asarray(Image.open(path)) for path in (tmp_path / "s" / "val").rglob("*.png")]
    for pixels in stl("", "test", True).data:  # upright: torchvision has (3, H, W)
        assert any((pixels.transpose(1, 2, 0) == image).all() for image in written)


@pytest.mark.parametrize(
    ("owner", "function", "name"), [(Image.Image, "save", "demo"), (torchvision.datasets, "CIFAR10", "cifar10")]
)
def test_a_full_disk_and_a_failed_download_are_one_line(owner, function, name, run, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("<urlopen error\n no network, no space left>")

    monkeypatch.setattr(owner, function, fail)
    assert_mistake(run(name, "--out", tmp_path / "o"), name, "--out")
    assert not any(tmp_path.iterdir())
