"""00: what is drawn, what is made of a downloaded set, and that nothing is overwritten. No network is used."""

import csv
import json
import types
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT, assert_mistake, load_stage
from PIL import Image

prepare = load_stage("00_prepare_data")


@pytest.fixture
def run(call_main, monkeypatch):
    """run("demo", "--out", ...) -> Done: stage 00 in this process, with a demo of 400 + 20 images."""
    monkeypatch.setitem(prepare.DEMO, "unlabeled", 400)
    monkeypatch.setitem(prepare.DEMO, "val_per_class", 2)
    return lambda *words: call_main("00_prepare_data", *words)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truth_of(folder):
    with open(folder / "unlabeled_truth.csv", newline="") as file:
        return {line["name"]: line["class"] for line in csv.DictReader(file)}


def test_the_demo_is_as_described_and_the_same_each_time(run, tmp_path):
    for name in ("a", "b"):
        assert run("demo", "--out", tmp_path / name, "--labels-per-class", 3).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    a = tmp_path / "a"
    assert {len(list(folder.iterdir())) for folder in (a / "train").iterdir()} == {3}
    assert {len(list(folder.iterdir())) for folder in (a / "val").iterdir()} == {2}
    truth = truth_of(a)
    assert sorted(truth) == sorted(path.name for path in (a / "unlabeled").iterdir()) and len(truth) == 400
    classes, sizes = np.unique(list(truth.values()), return_counts=True)
    assert len(classes) == 11 and sizes[0] == 80  # "" comes first: a fifth is of no class
    assert 9 <= sizes[1:].max() / sizes[1:].min() <= 12  # the long tail of 10:1, rounded
    labels = [truth[name] for name in sorted(truth)]
    assert sum(x == y for x, y in pairwise(labels)) < 100  # the names do not go by class
    assert Image.open(next((a / "train").rglob("*.jpg"))).size == (48, 48)
    assert run("demo", "--out", tmp_path / "other", "--labels-per-class", 3, "--seed", 1).returncode == 0
    assert contents(a)["train/disc/00002.jpg"] != contents(tmp_path / "other")["train/disc/00002.jpg"]


def test_a_class_is_not_told_by_its_colour():
    rng = np.random.default_rng(0)
    means = {name: [prepare.draw_image(name, rng).mean((0, 1)) for _ in range(60)] for name in ("disc", "star")}
    gap = np.abs(np.mean(means["disc"], axis=0) - np.mean(means["star"], axis=0))
    assert (gap < np.std(means["disc"], axis=0)).all()


def test_what_is_there_is_done_or_left_alone(run, tmp_path):
    out = tmp_path / "demo"
    args = ("demo", "--out", out, "--labels-per-class", 1)
    assert run(*args).returncode == 0
    before = contents(out)
    assert "already done" in run(*args).stdout
    for other in (("--seed", 1), ("--labels-per-class", 2)):
        assert_mistake(run(*args, *other))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert run("demo", "--out", tmp_path / "mine").returncode == 2
    assert run("demo", "--out", tmp_path / "new", "--labels-per-class", 0).returncode == 2
    assert contents(out) == before and contents(tmp_path / "mine") == {"thesis.txt": b"x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "mine"]


def test_what_a_killed_run_left_is_replaced(run, tmp_path):
    partial = tmp_path / ".demo.partial" / "train" / "disc"
    partial.mkdir(parents=True)
    (partial / "half.jpg").write_bytes(b"\xff\xd8")
    assert run("demo", "--out", tmp_path / "demo", "--labels-per-class", 1).returncode == 0
    assert not list(tmp_path.rglob("half.jpg")) and not partial.exists()


class Downloaded:
    """Stands for torchvision.datasets: STL-10 has unlabelled images of its own, whose classes nobody knows."""

    @staticmethod
    def cifar(root, train, download):
        num = 20 if train else 6
        images = np.random.default_rng(train).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
        return types.SimpleNamespace(classes=["cat", "dog"], data=images, targets=[i % 2 for i in range(num)])

    @staticmethod
    def stl(root, split, download):
        num = {"train": 10, "test": 4, "unlabeled": 7}[split]
        labels = np.full(num, -1) if split == "unlabeled" else np.arange(num) % 2
        images = np.random.default_rng(num).integers(0, 256, (num, 3, 96, 96), dtype=np.uint8)
        return types.SimpleNamespace(classes=["cat", "dog"], data=images, labels=labels)


@pytest.fixture
def fake_torchvision(monkeypatch):
    import torchvision

    datasets = types.SimpleNamespace(CIFAR10=Downloaded.cifar, STL10=Downloaded.stl)
    monkeypatch.setattr(torchvision, "datasets", datasets)
    return datasets


def test_labels_per_class_makes_the_rest_of_train_unlabeled(run, tmp_path, fake_torchvision):
    assert run("cifar10", "--out", tmp_path / "c", "--labels-per-class", 3).returncode == 0
    assert {len(list(folder.iterdir())) for folder in (tmp_path / "c" / "train").iterdir()} == {3}
    truth = truth_of(tmp_path / "c")
    assert len(truth) == 14 and sorted(truth.values()) == ["cat"] * 7 + ["dog"] * 7
    source = Downloaded.cifar("", True, True)
    for name, label in truth.items():  # pixels and classes still belong together
        pixels = np.asarray(Image.open(tmp_path / "c" / "unlabeled" / name))
        (index,) = [i for i, image in enumerate(source.data) if (image == pixels).all()]
        assert source.classes[source.targets[index]] == label
    assert run("cifar10", "--out", tmp_path / "many", "--labels-per-class", 11).returncode == 2
    assert not (tmp_path / "many").exists()


def test_unknown_truth_is_left_out(run, tmp_path, fake_torchvision):
    assert run("stl10", "--out", tmp_path / "s", "--labels-per-class", 4).returncode == 0
    assert len(list((tmp_path / "s" / "unlabeled").iterdir())) == 7 + 2
    assert len(truth_of(tmp_path / "s")) == 2


def test_a_failed_download_is_one_line(run, tmp_path, fake_torchvision):
    def no_network(*args, **kwargs):
        raise OSError("<urlopen error\n name resolution>")

    fake_torchvision.CIFAR10 = no_network
    assert_mistake(run("cifar10", "--out", tmp_path / "c"), "could not be downloaded")
    assert not (tmp_path / "c").exists()


def test_prepared_json_says_what_it_was_made_with(run, tmp_path):
    assert run("demo", "--out", tmp_path / "demo", "--labels-per-class", 1, "--seed", 5).returncode == 0
    arguments = json.loads((tmp_path / "demo" / "prepared.json").read_text())["arguments"]
    assert (arguments["name"], arguments["seed"], arguments["labels_per_class"]) == ("demo", 5, 1)


def test_a_mistake_is_one_line_and_status_2(run_stage, tmp_path):
    """With a plain Python: the exit status is that of the process."""
    flags = ["demo", "--out", tmp_path / "demo", "--labels-per-class", 0]
    done = run_stage(ROOT / "00_prepare_data.py", *flags, check=False, launcher="python")
    assert_mistake(done, "--labels-per-class")
    assert not (tmp_path / "demo").exists()
