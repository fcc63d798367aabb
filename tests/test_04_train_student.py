"""Stage 04: what it reads of a selection and of newer labels, its targets and its loss, and a student that learns."""

import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import CLASSES as SHAPES
from conftest import (
    CHEAP,
    ROOT,
    SHORT_RUN,
    assert_mistake,
    assert_same_weights,
    checkpoint_of,
    encoded,
    load_stage,
    metrics_of,
)
from conftest import noise_image, save_model, write_files
from label_files import CLASSES, logits_of, read_logits, read_selection, select, undo, write_logits

import common

student = load_stage("04_train_student")
STAGE = "04_train_student.py"
NUM = {"a": 40, "b": 30}  # images of two labelled folders
ROWS = {"a": [3, 4, 5, 9, 9, 30, 39], "b": [0, 7, 8, 29]}  # those that are selected


def read(path, newer=(), folder=None):
    """The training examples of a selection."""
    flags = SimpleNamespace(pseudo_labels=path, unlabeled=folder, logits=list(newer), teacher=None)
    flags.temperature, flags.label_smoothing = None, 0.1
    return student.StoredLabels(flags)


def logits_of_examples(selection, examples):
    return selection.look_up(selection.logits, np.asarray(examples)).astype(np.float32)


def labels_of_examples(selection):
    examples = np.arange(len(selection.images))
    if selection.newer_label:
        return selection.look_up(selection.newer_label, examples).tolist()
    return selection.label[examples].tolist()


def names_of(selection):
    return [selection.images.name(example) for example in range(len(selection.images))]


def random_labels(path, folder, num, seed):
    """Logits of `num` images below `folder`, as a teacher of that seed gives them."""
    logits = np.random.default_rng([seed, num]).normal(size=(num, 3)) * 3
    names = [f"{path.stem[-1]}{i:03}.png" for i in range(num)]
    return write_logits(path, logits, root=folder, names=names, teacher=f"{seed}" * 64)


def fill_folder(folder, num, seed=0):

    return write_files(
        folder, {f"{folder.name}{i:03}.png": encoded(noise_image(8, 8, 100 * seed + i), "PNG") for i in range(num)}
    )


# the examples of a selection


@pytest.fixture
def two_files(tmp_path):
    """Two label files and a selection of them."""
    one = logits_of((0, 0.95), (1, 0.9), (0, 0.8), (2, 0.38), (0, 0.5))
    two = logits_of((0, 0.9), (1, 0.6), (0, 0.8), (2, 0.36), (0, 0.45))
    return [write_logits(tmp_path / "a.h5", two), write_logits(tmp_path / "b.h5", one, unreadable=[4])]


def test_the_student_reads_the_rows_that_were_selected(two_files, tmp_path):
    out = select(tmp_path / "balanced.h5", {two_files[0]: [0, 1, 2, 2], two_files[1]: [0, 1, 1, 2]})
    selection = read(out)
    columns, _, _ = read_selection(out)
    examples = np.array([5, 0, 0, len(columns["row"]) - 1])
    got = logits_of_examples(selection, examples)
    files = [h5py.File(path, locking=False) for path in two_files]
    for logits, example in zip(got, examples, strict=True):
        number, row = columns["file"][example], columns["row"][example]
        np.testing.assert_array_equal(logits, files[number]["logits"][row].astype(np.float32))
        assert selection.images.name(int(example)) == "/data/unlabeled/" + files[number]["path"][row].decode()
    assert labels_of_examples(selection) == columns["label"].tolist() and selection.classes == CLASSES
    probs = selection(common.Batch(torch.from_numpy(examples), [], [], []))
    np.testing.assert_allclose(probs, torch.from_numpy(got).softmax(1), rtol=1e-6)


def test_the_selection_moves_with_its_folder(two_files, tmp_path):
    select(tmp_path / "balanced.h5", {path: [0, 1] for path in two_files})
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.h5", "b.h5", "balanced.h5"):
        (tmp_path / name).rename(moved / name)
    assert logits_of_examples(read(moved / "balanced.h5"), [0]).shape == (1, 3)


@pytest.fixture
def selected(tmp_path):
    """A selection of old-a.h5 and old-b.h5, the labels of two folders; new-a.h5 and new-b.h5 are of another teacher."""
    for name, num in NUM.items():
        fill_folder(tmp_path / name, num)
        for seed, who in enumerate(("old", "new")):
            random_labels(tmp_path / f"{who}-{name}.h5", tmp_path / name, num, seed)
    return select(tmp_path / "balanced.h5", {tmp_path / f"old-{name}.h5": rows for name, rows in ROWS.items()})


def test_the_student_takes_the_newer_labels(selected, tmp_path):
    got, old = read(selected, [tmp_path / "new-b.h5", tmp_path / "new-a.h5"]), read(selected)
    everything = {name: read_logits(tmp_path / f"new-{name}.h5") for name in "ab"}
    expected = np.concatenate([everything[name]["logits"][ROWS[name]] for name in "ab"])
    np.testing.assert_array_equal(logits_of_examples(got, np.arange(11)), expected.astype(np.float32))
    assert labels_of_examples(got) == np.concatenate([everything[name]["label"][ROWS[name]] for name in "ab"]).tolist()
    assert names_of(got) == names_of(old) and labels_of_examples(got) != labels_of_examples(old)


def test_what_the_newer_teacher_could_not_read_is_left_out(selected, tmp_path):
    with h5py.File(tmp_path / "new-a.h5", "r+") as file:
        file["status"][9], file["label"][9] = common.UNREADABLE, -1
    got = read(selected, [tmp_path / "new-a.h5", tmp_path / "new-b.h5"])
    assert got.images.row.tolist() == [3, 4, 5, 30, 39, 0, 7, 8, 29] and len(got.label) == len(got.images) == 9
    assert got.images.name(3) == str(tmp_path / "a" / "a030.png")
    assert got.images.file_number.tolist() == [0] * 5 + [1] * 4


def test_newer_labels_that_do_not_fit_are_refused(selected, tmp_path, mistake):
    mistake(lambda: read(selected, [tmp_path / "new-a.h5"]), "--logits: none of them has the images of")
    mistake(lambda: read(selected, [tmp_path / "new-a.h5", tmp_path / "old-b.h5"]), "several teachers")
    undo(shutil.copy(tmp_path / "new-b.h5", tmp_path / "part-b.h5"), 7)
    mistake(lambda: read(selected, [tmp_path / "new-a.h5", tmp_path / "part-b.h5"]), "unfinished")


def test_folders_with_the_same_names_are_told_apart(tmp_path, mistake, call_main):
    files = {}
    for k, name in enumerate("abc"):
        images = {f"{i}.png": encoded(noise_image(8, 8, 100 * k + i), "PNG") for i in range(8)}
        write_files(tmp_path / name, images)
        for seed, who in enumerate(("old", "new")):
            logits = np.random.default_rng([seed, k]).normal(size=(8, 3)) * 3
            path = tmp_path / f"{who}-{name}.h5"
            write_logits(path, logits, root=tmp_path / name, names=list(images), teacher=f"{seed}" * 64)
        files[tmp_path / f"old-{name}.h5"] = [2, 5] if name != "c" else []  # of c nothing was selected
    selection = select(tmp_path / "balanced.h5", files)
    got = read(selection, [tmp_path / "new-b.h5", tmp_path / "new-a.h5"])
    expected = np.concatenate([read_logits(tmp_path / f"new-{name}.h5")["logits"][[2, 5]] for name in "ab"])
    np.testing.assert_array_equal(logits_of_examples(got, np.arange(4)), expected.astype(np.float32))
    for example, (name, i) in enumerate([("a", 2), ("a", 5), ("b", 2), ("b", 5)]):
        original = common.load_image(tmp_path / name / f"{i}.png")
        np.testing.assert_array_equal(np.asarray(got.images.load(example)), np.asarray(original))
    mistake(lambda: read(selection, folder=tmp_path / "a"), "--unlabeled")

    words = ["--teacher", save_model(tmp_path / "t.pt", classes=CLASSES), "--only", selection]
    done = call_main("02_pseudo_label", *words, "--unlabeled", tmp_path / "c", "--out", tmp_path / "x.h5")
    assert_mistake(done, "several folders")


def test_a_logits_file_that_was_made_anew_is_noticed(tmp_path, mistake, capsys):
    selection = select(tmp_path / "b.h5", {random_labels(tmp_path / "l.h5", tmp_path / "u", 9, 0): list(range(9))})
    read(selection)
    assert "made anew" not in capsys.readouterr().out
    with h5py.File(tmp_path / "l.h5", "r+") as file:
        file["label"][:] = (file["label"][:] + 1) % 3
    read(selection)
    assert "if it was made anew, run 03 again" in capsys.readouterr().out
    with h5py.File(selection, "r+") as file:
        file.attrs["files"] = "not json"
    mistake(lambda: read(selection), "expected a JSON list")


# targets and loss


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.5])
def test_loss_by_hand(weight):
    """Smoothing 0.1 for what people labelled, none for what the teacher did; each mean over its own images."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(4, 5)) * 3, rng.integers(0, 5, 4)
    pseudo_logits, soft = rng.normal(size=(6, 5)) * 3, rng.dirichlet(np.ones(5), 6)
    smoothed = 0.9 * np.eye(5)[targets] + 0.1 / 5
    labeled = -(smoothed * log_softmax(logits)).sum(1).mean()
    unlabeled = -(soft * log_softmax(pseudo_logits)).sum(1).mean()
    tensors = [torch.from_numpy(a) for a in (logits, targets, pseudo_logits, soft)]
    got = student.noisy_student_loss(*tensors, 4, 6, weight, 0.1)
    assert [value.item() for value in got] == pytest.approx(
        [labeled + weight * unlabeled, labeled, unlabeled], rel=1e-6
    )


def test_loss_divides_by_the_readable_images_of_all_processes():
    logits, targets = torch.randn(3, 4), torch.tensor([0, 1, 3])
    some = student.noisy_student_loss(logits, targets, logits[:0], logits[:0], 4.5, 0.0, 1.0, 0.0)
    everything = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert some[1].item() == pytest.approx(everything.item() / 4.5)
    pseudo_logits, soft = torch.zeros(3, 4), torch.full((3, 4), 0.25)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    loss, labeled, unlabeled = student.noisy_student_loss(*none, pseudo_logits, soft, 0.0, 4.5, 2.0, 0.1)
    assert labeled.item() == 0  # no labelled image: --unlabeled-only
    assert unlabeled.item() == pytest.approx(3 * math.log(4) / 4.5)
    assert loss.item() == pytest.approx(2 * unlabeled.item())
    logits = torch.randn(2, 4, requires_grad=True)
    loss, _, unlabeled = student.noisy_student_loss(logits, torch.tensor([1, 2]), none[0], none[0], 2.0, 0.0, 2.0, 0.1)
    loss.backward()
    assert unlabeled.item() == 0 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_soft_targets_are_tempered_and_never_smoothed(temperature):
    logits = torch.tensor([[0.0, -1.0, -5.0], [-2.0, 0.0, 0.0]])
    expected = np.exp(log_softmax(logits.double().numpy() / temperature))
    got = student.pseudo_targets(logits, torch.tensor([0, 1]), temperature, 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_hard_targets_are_smoothed_like_those_of_people():
    got = student.pseudo_targets(torch.randn(2, 4), torch.tensor([3, 0]), 0, 0.1)
    expected = np.full((2, 4), 0.025)
    expected[0, 3] = expected[1, 0] = 0.925
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# whole runs


@pytest.mark.xdist_group("teacher")
def test_the_selection_is_exactly_balanced_and_measured(labels):
    logits, balanced, printed = labels
    with h5py.File(balanced) as file, h5py.File(logits) as source:
        assert np.bincount(file["label"][:], minlength=3).tolist() == [9, 9, 9]
        assert (source["label"][:][file["row"][:]] == file["label"][:]).all()
        assert (file["confidence"][:] > 0.3).all()
    report = json.loads(balanced.with_suffix(".json").read_text())
    assert [report["classes"][name]["examples"] for name in ("disc", "square", "triangle")] == [9, 9, 9]
    assert balanced.with_suffix(".png").stat().st_size > 5000
    truth = report["truth"]
    assert f"pseudo-label accuracy {truth['accuracy_before']} percent before the filter" in printed
    assert truth["accuracy_before"] > 60


@pytest.mark.xdist_group("teacher")
def test_the_student_learns_from_soft_and_hard_labels(labels, run_stage, tmp_path):
    base = [STAGE, "--pseudo-labels", labels[1], *SHORT_RUN, "--ratio", 1, "--seed", 3, "--eval-every", 0]
    run_stage(*base, "--out", tmp_path / "soft", "--epochs", 40)
    lines = metrics_of(tmp_path / "soft")
    for name in ("loss", "loss_labeled", "loss_unlabeled"):
        first, last = ([line[name] for line in part] for part in (lines[:10], lines[-11:-1]))
        assert np.mean(last) < 0.8 * np.mean(first), name
    assert lines[-1]["val_top1"] >= 75
    run_stage(*base, "--out", tmp_path / "hard", "--epochs", 1, "--temperature", 0, WITHOUT="matplotlib")
    run_stage(*base, "--out", tmp_path / "cold", "--epochs", 1, "--temperature", 0.5, WITHOUT="matplotlib")
    first = [metrics_of(tmp_path / name)[0]["loss_unlabeled"] for name in ("hard", "cold", "soft")]
    assert len(set(first)) == 3  # the same images and weights, three kinds of targets


@pytest.mark.xdist_group("teacher")
def test_the_student_pretrains_on_the_selection_alone(labels, run_stage, tmp_path):
    args = [STAGE, "--pseudo-labels", labels[1], *SHORT_RUN, "--unlabeled-only", "--epochs", 2]
    done = run_stage(*args, "--out", tmp_path / "s", "--batch-size", 9)
    assert "0 + 9 a step;" in done.stdout and "; 6 steps," in done.stdout  # an epoch is a pass over the 27 examples
    assert all(line["loss_labeled"] == 0 for line in metrics_of(tmp_path / "s")[:-1])
    saved = checkpoint_of(tmp_path / "s" / "model.pt")
    tuned = ["01_train_teacher.py", "--data", saved["data"], "--arch", saved["arch"], *SHORT_RUN, "--epochs", 0]
    run_stage(*tuned, "--init", tmp_path / "s" / "model.pt", "--out", tmp_path / "tuned", WITHOUT="matplotlib")
    assert_same_weights(tmp_path / "s" / "model.pt", tmp_path / "tuned" / "model.pt")


@pytest.mark.xdist_group("teacher")
def test_a_teacher_is_all_a_student_needs(teacher, start_stage, tmp_path):
    """torchrun 04_train_student.py --teacher ckpt.pt, and a SIGTERM, since the paper's 700 epochs are long."""
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / STAGE, tmp_path)  # a copied stage and common.py are enough
    process = start_stage(STAGE, "--teacher", teacher[0] / "model.pt", cwd=tmp_path, launcher="torchrun")
    out = tmp_path / "runs" / "student"
    process.wait_until(lambda: (out / "metrics.jsonl").exists() and metrics_of(out))
    os.kill(process.pids[0], signal.SIGTERM)
    assert process.wait(60) == 1, process  # torchrun's own status
    assert "on the fly" in process.stdout and "no confidence filter" in process.stdout
    saved = checkpoint_of(out / "last.pt")
    assert saved["arch"] == "shufflenet_v2_x0_5" and saved["image_size"] == 32 and saved["training"]["step"] >= 1
    assert np.isfinite(metrics_of(out)[-1]["loss_unlabeled"])


@pytest.mark.xdist_group("teacher")
def test_images_that_have_gone_since_are_reported_and_left_out(labels, tiny_data, run_stage, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "unlabeled" / "part0" / "000.png").unlink()
    base = [STAGE, "--pseudo-labels", labels[1], "--data", data, "--unlabeled", data / "unlabeled", *SHORT_RUN]
    done = run_stage(*base, "--ratio", 2, "--epochs", 2, "--out", tmp_path / "s", WITHOUT="matplotlib")
    assert f"unreadable, left out: {data}/unlabeled/part0/000.png: FileNotFoundError" in done.stdout
    assert "1 images were unreadable and left out" in done.stdout
    assert [line.get("unreadable") for line in metrics_of(tmp_path / "s") if "loss" in line][-1] == 1


def test_a_student_without_a_usable_unlabelled_image_is_a_mistake(small_selection, call_main, tmp_path):
    """They lie elsewhere, or all are images of val; and a ratio of which no image is left is none."""
    flags, _, _ = small_selection
    words = [*flags, "--ratio", 1, "--epochs", 20, "--out", tmp_path / "s"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").touch()
    done = call_main(*words, "--unlabeled", tmp_path / "elsewhere")
    assert_mistake(done, "no unlabeled image of the first steps", "unreadable")
    assert not (tmp_path / "s" / "model.pt").exists()
    assert_mistake(call_main(*words, "--ratio", 0.01), "--ratio 0.01", "--ratio 0")


@pytest.mark.xdist_group("teacher")
def test_the_student_trains_on_newer_labels(teacher, labels, call_main, tmp_path):
    """02 --only and 04 --logits as the README has them: the same teacher again changes nothing, another one does."""
    other = checkpoint_of(teacher[0] / "model.pt")
    for name in ("fc.weight", "fc.bias"):
        other["model"][name] = other["model"][name].roll(1, 0)  # one that calls every class by another's name
    torch.save(other, tmp_path / "other.pt")
    base = ["--pseudo-labels", labels[1], "--data", other["data"], *SHORT_RUN, "--ratio", 1, "--epochs", 0.67]
    assert call_main("04_train_student", *base, "--out", tmp_path / "old").returncode == 0
    for name, path in (("same", teacher[0] / "model.pt"), ("other", tmp_path / "other.pt")):
        flags = ["--teacher", path, "--only", labels[1], "--out", tmp_path / f"{name}.h5"]
        assert call_main("02_pseudo_label", *flags).returncode == 0
        flags = [*base, "--logits", tmp_path / f"{name}.h5", "--out", tmp_path / name]
        assert call_main("04_train_student", *flags).returncode == 0
    assert_same_weights(tmp_path / "old" / "model.pt", tmp_path / "same" / "model.pt")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "old" / "model.pt", tmp_path / "other" / "model.pt")


def test_logits_without_a_selection_are_refused(run_stage, tmp_path):
    """With a plain Python: the exit status is that of the process."""
    flags = ["--teacher", tmp_path / "t.pt", "--logits", tmp_path / "l.h5"]
    assert_mistake(run_stage(ROOT / STAGE, *flags, check=False, launcher="python"), "--logits needs --pseudo-labels")


# what a teacher on the fly leaves out


def test_a_teacher_on_the_fly_does_not_see_copies_of_val_images(tiny_data, call_main, tmp_path, monkeypatch):
    data, seen, sizes = shutil.copytree(tiny_data, tmp_path / "data"), set(), set()
    shutil.copy(data / "val" / "disc" / "0.png", data / "unlabeled" / "copy.png")  # row 0: before part0
    label = student.TeachersLabels.__call__

    def label_watched(self, batch):
        seen.update(batch.rows.tolist())
        sizes.add(len(batch.rows))
        return label(self, batch)

    monkeypatch.setattr(student.TeachersLabels, "__call__", label_watched)
    flags = ["--teacher", save_model(tmp_path / "t.pt", data=str(data)), *SHORT_RUN, "--ratio", 3, "--epochs", 1]
    done = call_main("04_train_student", *flags, "--out", tmp_path / "s")
    assert done.returncode == 0 and f"left out: {data / 'unlabeled' / 'copy.png'}" in done.stdout, done
    assert seen == set(range(1, 21)) and max(sizes) <= 24 and min(sizes) < 24
    assert "unreadable" not in metrics_of(tmp_path / "s")[0]


# weights of the two losses, targets of a selection, defaults


@pytest.fixture
def small_selection(tiny_data, tmp_path):
    """(flags of 04, balanced.h5, logits.h5) on a data directory whose classes are those of label_files."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for split in ("train", "val"):
        for old, new in zip(SHAPES, CLASSES, strict=True):
            (data / split / old).rename(data / split / new)
    names = sorted(str(path.relative_to(data / "unlabeled")) for path in (data / "unlabeled").rglob("*.png"))
    logits = np.random.default_rng(0).normal(size=(20, 3)) * 3
    file = write_logits(tmp_path / "logits.h5", logits, root=data / "unlabeled", names=names)
    selection = select(tmp_path / "balanced.h5", {file: list(range(8))})
    flags = ["04_train_student", "--pseudo-labels", selection, "--data", data, *SHORT_RUN]
    return flags, selection, file


def test_the_selection_alone_has_the_weight_one(small_selection, call_main, tmp_path):
    flags = [*small_selection[0], "--arch", CHEAP, "--unlabeled-only", "--epochs", 2]
    for name, more in {"default": [], "one": ["--unlabeled-weight", 1], "three": ["--unlabeled-weight", 3]}.items():
        assert call_main(*flags, *more, "--out", tmp_path / name).returncode == 0
    lines = [line for line in metrics_of(tmp_path / "default") if "loss" in line]
    assert len(lines) == 2 and all(line["loss"] == line["loss_unlabeled"] > 0 for line in lines)
    assert_same_weights(tmp_path / "default" / "model.pt", tmp_path / "one" / "model.pt")
    first = metrics_of(tmp_path / "three")[0]
    assert first["loss"] == pytest.approx(3 * first["loss_unlabeled"]) != lines[0]["loss"]


def test_both_kinds_together_have_the_weight_of_the_ratio(small_selection, call_main, tmp_path):
    flags = [*small_selection[0], "--arch", CHEAP, "--epochs", 0.34, "--ratio", 2, "--out", tmp_path / "s"]
    assert call_main(*flags).returncode == 0
    line = metrics_of(tmp_path / "s")[0]
    assert line["loss"] == pytest.approx(line["loss_labeled"] + 2 * line["loss_unlabeled"])


@pytest.mark.parametrize(("method", "keeps"), [("top-p", True), ("noisy-student", False)])
def test_newer_labels_of_a_top_p_selection_keep_its_classes(method, keeps, selected, tmp_path):
    """There an image was chosen for a class that need not be its most probable one; its logits are the newer ones."""
    with h5py.File(selected, "r+") as file:
        file.attrs["method"] = method
        file["label"][:] = chosen = np.arange(len(file["label"])) % 3
    got = read(selected, [tmp_path / "new-a.h5", tmp_path / "new-b.h5"])
    newer = np.concatenate([read_logits(tmp_path / f"new-{name}.h5")["label"][ROWS[name]] for name in "ab"])
    assert (newer != chosen).any()
    expected = chosen if keeps else newer
    assert labels_of_examples(got) == expected.tolist()
    got.temperature, got.label_smoothing = 0, 0.0
    targets = got(common.Batch(torch.arange(len(expected)), [], [], []))
    assert targets.argmax(1).tolist() == expected.tolist()
    logits = [read_logits(tmp_path / f"new-{name}.h5")["logits"][ROWS[name]] for name in "ab"]
    np.testing.assert_array_equal(logits_of_examples(got, np.arange(11)), np.concatenate(logits).astype(np.float32))


def test_without_a_teacher_the_label_file_says_what_network_it_was(small_selection, call_main, tmp_path):
    flags, _, file = small_selection
    with h5py.File(file, "r+") as opened:  # as 02 writes it
        opened.attrs["arch_options"] = json.dumps({"small_images": True, "dropout": 0.4})
    assert call_main(*flags, "--epochs", 0, "--out", tmp_path / "s").returncode == 0
    options = checkpoint_of(tmp_path / "s" / "model.pt")["arch_options"]
    assert options["small_images"] is True and options["dropout"] is None  # the noise is the student's own
    done = call_main(*flags, "--epochs", 0, "--no-small-images", "--out", tmp_path / "large")
    assert done.returncode == 0
    assert not checkpoint_of(tmp_path / "large" / "model.pt")["arch_options"]["small_images"]
    with h5py.File(file, "r+") as opened:
        opened.attrs["arch_options"] = "no json"
    assert_mistake(call_main(*flags, "--epochs", 0, "--out", tmp_path / "x"), file, "arch_options")


def test_stage_02_records_the_options_of_the_network(tiny_data, call_main, tmp_path):
    options = {"small_images": True}
    path = save_model(tmp_path / "t.pt", "efficientnet_b0", arch_options=options, data=str(tiny_data))
    assert call_main("02_pseudo_label", "--teacher", path, "--out", tmp_path / "l.h5").returncode == 0
    with h5py.File(tmp_path / "l.h5") as file:
        assert student.options_of(file) == options


def test_a_teacher_without_options_is_enough(tiny_data, call_main, tmp_path):
    """The contract names no key of arch_options."""
    path = save_model(tmp_path / "t.pt", arch_options={}, data=str(tiny_data))
    flags = ["--batch-size", 8, "--ratio", 1, "--epochs", 0, "--out", tmp_path / "s"]
    assert call_main("04_train_student", "--teacher", path, *flags).returncode == 0
    assert call_main("02_pseudo_label", "--teacher", path, "--out", tmp_path / "l.h5").returncode == 0
    flags = ["--image-size", 40, "--batch-size", 8, "--epochs", 0, "--out", tmp_path / "f"]
    assert call_main("05_fixres_finetune", "--checkpoint", path, *flags).returncode == 0
    flags = ["--data", tiny_data, "--init", path, "--epochs", 0, "--out", tmp_path / "i"]
    assert call_main("01_train_teacher", *flags).returncode == 0


@pytest.mark.parametrize("temperature", [0.5, 10.0])
def test_the_student_is_tempered_as_its_teacher(temperature):
    """So a student that says what its teacher says is right at any temperature: the loss has no gradient there."""
    logits = (3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    targets = student.pseudo_targets(logits.detach(), None, temperature, 0.1)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    loss, _, unlabeled = student.noisy_student_loss(*nothing, logits, targets, 0, 5, 1.0, 0.1, temperature)
    entropy = -(targets * targets.log()).sum(1).mean()
    assert loss.item() == pytest.approx(unlabeled.item()) == pytest.approx(entropy.item(), rel=1e-5)
    loss.backward()
    assert logits.grad.abs().max() < 1e-6
    plain = student.noisy_student_loss(*nothing, logits, targets, 0, 5, 1.0, 0.1)[0]
    plain.backward()
    assert logits.grad.abs().max() > 1e-3


def test_the_temperature_reaches_the_loss(tiny_data, call_main, tmp_path, monkeypatch):
    found, loss = [], student.noisy_student_loss

    def loss_watched(*args, **kwargs):
        found.append(kwargs["temperature"])
        return loss(*args, **kwargs)

    monkeypatch.setattr(student, "noisy_student_loss", loss_watched)
    flags = ["--teacher", save_model(tmp_path / "t.pt", data=str(tiny_data)), *SHORT_RUN, "--ratio", 1]
    for temperature in (2.5, 0):
        words = ["--epochs", 0.34, "--temperature", temperature, "--out", tmp_path / str(temperature)]
        assert call_main("04_train_student", *flags, *words).returncode == 0
    assert found == [2.5, 1.0]  # hard labels have no temperature


# weights to start from, and unlabelled images without noise


def start_from(init, teacher, data, call_main, out, *more):
    flags = ["--teacher", teacher, "--init", init, "--data", data, "--epochs", 0, "--out", out, *more]
    done = call_main("04_train_student", *flags)
    return done, (checkpoint_of(out / "model.pt") if done.returncode == 0 else None)


def test_a_student_that_starts_from_its_teacher_is_its_teacher(tiny_data, call_main, tmp_path):
    """With the teacher's own view, which is not the usual one; the same labels in another order: a new classifier."""
    view = {"crop_fraction": 0.8, "interpolation": "bilinear", "mean": (0.5,) * 3, "image_size": 40}
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data), classes=SHAPES, **view)
    done, started = start_from(teacher, teacher, tiny_data, call_main, tmp_path / "s")
    assert done.returncode == 0 and f"from {teacher}" in done.stdout, done
    assert {name: started[name] for name in view} == view and started["arch"] == CHEAP
    images = torch.randn(4, 3, 40, 40)
    models = [common.load_model(path)[0] for path in (teacher, tmp_path / "s" / "model.pt")]
    assert torch.equal(*(model(images) for model in models)) and models[0](images).std() > 0.1
    assert started["inputs"][str(teacher)] == common.file_sha256(teacher)

    other = save_model(tmp_path / "o.pt", data=str(tiny_data), classes=SHAPES[::-1])
    done, _ = start_from(other, teacher, tiny_data, call_main, tmp_path / "o")
    assert_mistake(done, "--init", other)
    done, started = start_from(
        other, teacher, tiny_data, call_main, tmp_path / "o", "--epochs", 0.3, "--batch-size", 4, "--lr", 0
    )
    assert done.returncode == 0 and "a new classifier" in done.stdout, done
    weights = checkpoint_of(other)["model"]
    same = {name for name in weights if torch.equal(weights[name], started["model"][name])}
    assert {name for name, _ in common.build_model(CHEAP, 3).named_parameters()} - same == {"fc.weight", "fc.bias"}


def test_what_the_weights_bring_along_comes_before_what_the_teacher_has(tiny_data, call_main, tmp_path):
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data), classes=SHAPES)
    small = {"small_images": True, "dropout": None, "drop_path": None, "zero_init_residual": None}
    init = save_model(tmp_path / "i.pt", "efficientnet_b0", classes=SHAPES, arch_options=small, image_size=48)
    _, started = start_from(init, teacher, tiny_data, call_main, tmp_path / "s")
    facts = started["arch"], started["image_size"], started["arch_options"]["small_images"]
    assert facts == ("efficientnet_b0", 48, True)
    assert_mistake(start_from(init, teacher, tiny_data, call_main, tmp_path / "x", "--arch", "resnet18")[0], "--arch")


def test_unlabelled_images_may_be_clean(tiny_data, call_main, tmp_path, monkeypatch):
    """As they are labelled: no crop, no mirroring, no RandAugment; the labelled ones keep theirs."""
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data), classes=SHAPES)
    seen = []
    monkeypatch.setattr(
        student, "normalize", lambda images, view: seen.append(images) or common.normalize(images, view)
    )
    flags = ["--teacher", teacher, *SHORT_RUN, "--ratio", 1, "--epochs", 0.34]
    for more in ([], ["--clean-unlabeled"]):
        seen.clear()
        words = ["--out", tmp_path / str(len(more)), *more]
        assert call_main("04_train_student", *flags, *words).returncode == 0
        images = common.unlabeled_images(tiny_data / "unlabeled", tiny_data)
        labeled = common.labeled_images(tiny_data, "train")[0]
        clean = [{view.tobytes() for view in views_of(rows)} for rows in (labeled, images)]
        given = [image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in seen[-1]]
        are_clean = [
            sum(image in of_kind for image in part) for of_kind, part in zip(clean, (given[:8], given[8:]), strict=True)
        ]
        assert len(given) == 16 and are_clean == [0, 8 if more else 0]


def views_of(images):
    return [common.eval_view(images.load(row), common.View.default(32)) for row in range(len(images))]


# consistency training with supervision


def test_the_consistency_loss_is_the_keras_examples():
    """(CE + KL(softmax(t / T) || softmax(s / T))) / 2, the KL as Keras' KLDivergence and torch's kl_div compute it."""
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y, T = torch.tensor([0, 1, 2, 3, 3, 0]), 10.0
    loss, labeled, divergence = student.consistency_loss(s, y, s, (t / T).softmax(1), 6, 6, 0.0, T)
    p, q = (t / T).softmax(1).numpy(), (s / T).softmax(1).numpy()
    expected = (p * np.log(p / q)).sum(1).mean()
    ce = -np.log(s.softmax(1).numpy()[np.arange(6), y]).mean()
    assert float(divergence) == pytest.approx(expected, rel=1e-6) and float(labeled) == pytest.approx(ce, rel=1e-6)
    assert float(loss) == pytest.approx((ce + expected) / 2, rel=1e-6)
    one_hot = torch.eye(4)[:3]
    assert torch.isfinite(student.consistency_loss(s, y, s[:3].float(), one_hot, 6, 3, 0.0, T)[2])


def test_both_losses_of_consistency_are_of_one_noised_image(tiny_data, call_main, tmp_path, monkeypatch):
    """--ratio 0: the labelled images are seen once by the student and once, clean, by the teacher."""
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data), classes=SHAPES[::-1])
    found, loss = [], student.consistency_loss

    def watched(*args, **kwargs):
        found.append((args, kwargs))
        return loss(*args, **kwargs)

    monkeypatch.setattr(student, "consistency_loss", watched)
    out = tmp_path / "s"
    flags = ["--teacher", teacher, "--data", tiny_data, *SHORT_RUN, "--consistency", "kl"]
    done = call_main("04_train_student", *flags, "--ratio", 0, "--epochs", 2, "--out", out)
    assert done.returncode == 0 and "deviation" not in done.stdout, done
    assert len(found) == 6
    model = common.load_model(teacher)[0]
    images, labels, _ = common.labeled_images(tiny_data, "train")
    views = torch.from_numpy(np.stack(views_of(images))).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(common.normalize(views, common.View.default(32))).flip(1)  # the classes in the data's order
    probs = (logits / 10).softmax(1)
    for args, kwargs in found:
        given, target, student_logits, targets = args[:4]
        assert given is not None and torch.equal(given, student_logits) and len(target) == 8 and args[4:] == (8, 8)
        assert kwargs == {"label_smoothing": 0.0, "temperature": 10.0}
        distance = torch.cdist(targets, probs).min(1)
        assert distance.values.max() < 1e-5 and torch.equal(torch.from_numpy(labels)[distance.indices], target)
    for line in metrics_of(out):
        if "loss" in line:
            assert line["loss"] == pytest.approx((line["loss_labeled"] + line["loss_unlabeled"]) / 2, rel=1e-5)
    done = call_main("04_train_student", *flags, "--ratio", 1, "--epochs", 0.34, "--out", tmp_path / "other")
    assert done.returncode == 0 and "a deviation" in done.stdout, done


def test_consistency_needs_probabilities_and_the_teacher(small_selection, call_main, tmp_path):
    flags, _, _ = small_selection
    words = ["--consistency", "kl", "--out", tmp_path / "s"]
    assert_mistake(call_main(*flags, *words, "--temperature", 0), "--temperature 0")
    assert_mistake(call_main(*flags, *words, "--unlabeled-weight", 1), "--unlabeled-weight")
    assert_mistake(call_main(*flags, *words, "--ratio", 0), "--ratio 0", "--pseudo-labels")
