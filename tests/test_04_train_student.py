"""Stage 04: what it reads of a label file, its targets and its losses, labels on the fly, a student that learns."""

import math
import os
import shutil
import signal
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import CHEAP, CLASSES, ROOT, SHORT_RUN, assert_mistake, assert_same_weights, checkpoint_of, clean_batch
from conftest import load_stage, metrics_of, save_model, watch
from label_files import change, made_elsewhere, write_labels

import common

student = load_stage("04_train_student")
STAGE = "04_train_student"


def stored(path, unlabeled=None, temperature=None):
    flags = {"unlabeled": unlabeled, "consistency": None, "label_smoothing": 0.1, "temperature": temperature}
    flags |= {"teacher": None, "init": None, "arch": CHEAP, "image_size": 32}
    return student.StoredLabels(SimpleNamespace(pseudo_labels=path, **flags))


def batch_of(*rows):
    return common.Batch(torch.tensor(rows), [], [])


def test_a_row_stands_in_an_epoch_as_often_as_its_copies(tmp_path, capsys):
    """But for those without a label, whatever their copies."""
    logits = 3 * np.random.default_rng(0).normal(size=(7, 3))
    copies = np.array([2, 1, 5, 1, 3, 1, 1], np.uint32)
    path = write_labels(tmp_path / "l.h5", logits, root=tmp_path, names="abcdefg", classes=CLASSES, copies=copies)
    labels = stored(change(path, status={2: common.UNREADABLE, 4: common.HELD_OUT}))
    assert labels.rows.tolist() == [0, 0, 1, 3, 5, 6] and ": 2 " in capsys.readouterr().out
    assert labels.classes == CLASSES and labels.temperature == 1
    assert labels.images.name(labels.rows[3]) == str(tmp_path / "d")
    expected = torch.from_numpy(logits[[1, 0, 3]]).softmax(1)
    torch.testing.assert_close(labels(batch_of(2, 1, 3)).double(), expected, rtol=2e-3, atol=1e-3)
    assert stored(path, temperature=0)(batch_of(2, 1, 3)).argmax(1).tolist() == logits[[1, 0, 3]].argmax(1).tolist()
    (tmp_path / "moved").mkdir()
    assert stored(path, unlabeled=tmp_path / "moved").images.name(0) == str(tmp_path / "moved" / "a")


def test_a_top_p_selection_has_hard_labels_and_an_image_in_several_rows(tiny_data, call_main, tmp_path):
    images = common.list_images(tiny_data / "unlabeled")[[0, 0, 1, 2]]
    attrs = {"method": "top-p", "arch": CHEAP, "image_size": 32}
    path = made_elsewhere(tmp_path / "p.h5", images, [0, 2, 1, 1], CLASSES, **attrs)
    with h5py.File(path, "r+") as file:
        del file["logits"]
    labels = stored(path)
    assert labels.temperature == 0
    expected = torch.eye(3)[[2, 0, 1]] * 0.9 + 0.1 / 3
    torch.testing.assert_close(labels(batch_of(1, 0, 3)), expected)
    flags = [STAGE, "--pseudo-labels", path, "--data", tiny_data, *SHORT_RUN, "--ratio", 1, "--out", tmp_path / "s"]
    assert_mistake(call_main(*flags, "--temperature", 1), "--temperature 1", path, "02")
    change(path, classes={0: b"triangle", 2: b"disc"})  # the student counts them as the file does
    assert call_main(*flags, "--steps", 1).returncode == 0
    assert checkpoint_of(tmp_path / "s" / "model.pt")["classes"] == CLASSES[::-1]


def test_of_a_file_made_elsewhere_the_missing_flags_are_named(tiny_data, call_main, tmp_path):
    """Without copies, offset, size and all attributes but two; a teacher has what they would say."""
    images = common.list_images(tiny_data / "unlabeled")
    labels = made_elsewhere(tmp_path / "l.h5", images, [1] * 20, CLASSES)
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data))
    flags = [STAGE, "--pseudo-labels", labels, "--batch-size", 8, "--steps", 1, "--ratio", 1]
    needed = {"--data": tiny_data, "--arch": CHEAP, "--image-size": 32}
    for name in needed:
        others = [word for flag in needed.items() if flag[0] != name for word in flag]
        assert_mistake(call_main(*flags, *others, "--out", tmp_path / "x"), name)
    everything = [word for flag in needed.items() for word in flag]
    assert call_main(*flags, *everything, "--out", tmp_path / "flags").returncode == 0
    assert call_main(*flags, "--teacher", teacher, "--out", tmp_path / "teacher").returncode == 0
    assert_same_weights(tmp_path / "flags" / "model.pt", tmp_path / "teacher" / "model.pt")


@pytest.mark.parametrize(
    ("columns", "flags", "named"),
    [
        ({"copies": {3: 0}}, [], ["labels.h5", "copies"]),
        ({"status": dict.fromkeys(range(20), common.UNREADABLE)}, [], ["labels.h5"]),
        ({"classes": {2: b"circle"}}, [], ["circle", "triangle"]),
        ({}, ["--unlabeled", "/nowhere"], ["--unlabeled", "/nowhere"]),
        ({}, ["--batch-size", 8, "--ratio", 0.01], ["--ratio 0.01"]),
        ({}, ["--consistency", "kl", "--temperature", 0], ["--temperature 0"]),
        ({}, ["--consistency", "kl", "--unlabeled-weight", 1], ["--unlabeled-weight"]),
        ({}, ["--consistency", "kl", "--unlabeled-only"], ["--unlabeled-only"]),
        ({}, ["--consistency", "kl", "--ratio", 0], ["--pseudo-labels"]),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(columns, flags, named, labels, tiny_data, call_main, tmp_path):
    change(labels, **columns)
    done = call_main(STAGE, "--pseudo-labels", labels, "--data", tiny_data, *flags, "--out", tmp_path / "s")
    assert_mistake(done, *named)
    assert not list(tmp_path.glob("s/*.pt"))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.5])
def test_the_loss_by_hand(weight):
    """Smoothing 0.1 for what people labelled, none for what the teacher did; each mean over its own images."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(4, 5)) * 3, rng.integers(0, 5, 4)
    pseudo_logits, soft = rng.normal(size=(6, 5)) * 3, rng.dirichlet(np.ones(5), 6)
    smoothed = 0.9 * np.eye(5)[targets] + 0.1 / 5
    labeled = -(smoothed * log_softmax(logits)).sum(1).mean()
    unlabeled = -(soft * log_softmax(pseudo_logits)).sum(1).mean()
    tensors = [torch.from_numpy(a) for a in (logits, targets, pseudo_logits, soft)]
    losses = student.noisy_student_loss(*tensors, 4, 6, weight, 0.1)
    expected = [labeled + weight * unlabeled, labeled, unlabeled]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-6)


def test_the_loss_divides_by_the_readable_images_of_all_processes():
    logits, targets = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 3])
    probs = torch.full((3, 4), 0.25)
    labeled = student.noisy_student_loss(logits, targets, logits[:0], probs[:0], 4.5, 0.0, 2.0, 0.0)
    everything = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    assert [loss.item() for loss in labeled] == pytest.approx([everything / 4.5, everything / 4.5, 0])
    labeled[0].backward()
    assert torch.isfinite(logits.grad).all()
    alone = student.noisy_student_loss(logits[:0], targets[:0], torch.zeros(3, 4), probs, 0.0, 4.5, 2.0, 0.1)
    mean = 3 * math.log(4) / 4.5  # --unlabeled-only
    assert [loss.item() for loss in alone] == pytest.approx([2 * mean, 0, mean])


def test_the_consistency_loss_is_the_keras_examples():
    """(CE + KL(softmax(t / T) || softmax(s / T))) / 2, the KL as Keras' KLDivergence and torch's kl_div compute it."""
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y, T = torch.tensor([0, 1, 2, 3, 3, 0]), 10.0
    losses = student.consistency_loss(s, y, s, (t / T).softmax(1), 6, 6, 0.0, T)
    p, q = (t / T).softmax(1).numpy(), (s / T).softmax(1).numpy()
    divergence = (p * np.log(p / q)).sum(1).mean()
    ce = -np.log(s.softmax(1).numpy()[np.arange(6), y]).mean()
    expected = [(ce + divergence) / 2, ce, divergence]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(student.consistency_loss(s, y, s[:3].float(), torch.eye(4)[:3], 6, 3, 0.0, T)[2])


def test_the_student_learns(labels, tiny_data, call_main, tmp_path):
    flags = ["--pseudo-labels", labels, "--data", tiny_data, *SHORT_RUN, "--ratio", 1, "--eval-every", 0]
    assert call_main(STAGE, *flags, "--out", tmp_path / "s", "--steps", 80).returncode == 0
    lines = metrics_of(tmp_path / "s")
    for name in ("loss", "loss_labeled", "loss_unlabeled"):
        first, last = ([line[name] for line in part] for part in (lines[:10], lines[-11:-1]))
        assert np.mean(last) < 0.8 * np.mean(first), name
    assert lines[-1]["val_top1"] >= 75


def test_the_weight_is_the_ratio_and_one_for_the_selection_alone(labels, tiny_data, call_main, tmp_path):
    """And `01 --init` takes over what was pre-trained on the selection alone."""
    flags = [STAGE, "--pseudo-labels", labels, "--data", tiny_data, *SHORT_RUN, "--steps", 2]
    alone = ["--unlabeled-only", "--batch-size", 9, "--epochs", 1]
    runs = {
        "2": ["--ratio", 2],
        "5": ["--ratio", 2, "--unlabeled-weight", 5],
        "1": alone,
        "3": [*alone, "--unlabeled-weight", 3],
    }
    for weight, more in runs.items():
        done = call_main(*flags, *more, "--out", tmp_path / weight)
        assert done.returncode == 0
        line = metrics_of(tmp_path / weight)[0]
        assert line["loss"] == pytest.approx(line["loss_labeled"] + int(weight) * line["loss_unlabeled"])
        if "--unlabeled-only" in more:
            assert line["loss_labeled"] == 0 and "3 steps" in done.stdout  # of 27 rows, copies counted
        else:  # each a mean over its own images, of a model that knows nothing yet
            assert [line["loss_labeled"], line["loss_unlabeled"]] == pytest.approx([math.log(3)] * 2, rel=0.25)
    pretrained = tmp_path / "1" / "model.pt"
    flags = ["01_train_teacher", "--data", tiny_data, "--init", pretrained, "--epochs", 0, "--out", tmp_path / "tuned"]
    assert call_main(*flags).returncode == 0
    assert_same_weights(pretrained, tmp_path / "tuned" / "model.pt")


def test_a_teacher_is_all_a_student_needs(tiny_data, start_stage, tmp_path):
    """torchrun 04_train_student.py --teacher ckpt.pt, and a SIGTERM, since the paper's 700 epochs are long."""
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data))
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / f"{STAGE}.py", tmp_path)  # a copied stage and common.py are enough
    process = start_stage(f"{STAGE}.py", "--teacher", teacher, cwd=tmp_path, launcher="torchrun", nproc=2)
    out = tmp_path / "runs" / "student"
    process.wait_until(lambda: (out / "metrics.jsonl").exists() and metrics_of(out))
    os.kill(process.pids[0], signal.SIGTERM)
    assert process.wait(60) == 1, process  # torchrun's own status
    assert "on the fly" in process.stdout
    saved = checkpoint_of(out / "last.pt")
    assert saved["arch"] == CHEAP and saved["image_size"] == 32 and saved["training"]["step"] >= 1
    assert saved["inputs"].keys() == {"teacher", "train", "val", "unlabeled"} and saved["stage"] == "student"
    assert np.isfinite(metrics_of(out)[-1]["loss_unlabeled"])


def test_copies_of_val_are_left_out_and_unreadable_images_counted(tiny_data, call_main, tmp_path, monkeypatch):
    data, seen = shutil.copytree(tiny_data, tmp_path / "data"), set()
    shutil.copy(data / "val" / "disc" / "0.png", data / "unlabeled" / "copy.png")  # row 1, before part0
    (data / "unlabeled" / "broken.png").write_bytes(b"<html>")  # row 0
    for labels in (student.TeachersLabels, student.StoredLabels):
        watch(monkeypatch, labels, "__call__", lambda self, batch: seen.update(batch.rows.tolist()))
    flags = ["--teacher", save_model(tmp_path / "t.pt", data=str(data)), *SHORT_RUN, "--ratio", 3, "--epochs", 1]
    elsewhere = made_elsewhere(tmp_path / "l.h5", common.list_images(data / "unlabeled"), np.zeros(22), CLASSES)
    for name, more in {"on the fly": [], "a file by others": ["--pseudo-labels", elsewhere]}.items():
        seen.clear()
        assert call_main(STAGE, *flags, *more, "--out", tmp_path / name).returncode == 0
        assert seen == set(range(2, 22)) and metrics_of(tmp_path / name)[2]["unreadable"] == 1


def test_both_losses_of_consistency_are_of_one_noised_image(tiny_data, call_main, tmp_path, monkeypatch):
    """--ratio 0: the labelled images are seen once by the student and once, clean, by the teacher."""
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data), classes=CLASSES[::-1])
    calls = []
    watch(monkeypatch, student, "consistency_loss", lambda *args, **how: calls.append((args, how)))
    flags = ["--teacher", teacher, *SHORT_RUN, "--consistency", "kl", "--ratio", 0, "--epochs", 1]
    assert call_main(STAGE, *flags, "--out", tmp_path / "s").returncode == 0
    model, view = common.load_model(teacher)[0], common.View.default(32)
    images, labels, classes = common.labeled_images(tiny_data, "train", CLASSES[::-1])
    assert checkpoint_of(tmp_path / "s" / "model.pt")["classes"] == classes  # the teacher's order
    with torch.no_grad():
        logits = model(clean_batch(images, view))
    probs = (logits / 10).softmax(1)
    assert len(calls) == 3
    for (given, target, student_logits, targets, *nums), kwargs in calls:
        assert torch.equal(given, student_logits) and len(target) == 8 and nums == [8, 8]
        assert kwargs == {"label_smoothing": 0.0, "temperature": 10.0}
        distance = torch.cdist(targets, probs).min(1)
        assert distance.values.max() < 1e-5 and torch.equal(torch.from_numpy(labels)[distance.indices], target)
    line = metrics_of(tmp_path / "s")[0]
    assert line["loss"] == pytest.approx((line["loss_labeled"] + line["loss_unlabeled"]) / 2, rel=1e-5)


def test_a_flag_comes_before_the_weights_and_these_before_the_teacher(tiny_data, call_main, tmp_path):
    teacher = save_model(tmp_path / "t.pt", data=str(tiny_data), crop_mode="squash")
    init, foreign = save_model(tmp_path / "i.pt", "efficientnet_b0", image_size=48), tmp_path / "resnet18.pth"
    torch.save(common.build_model("resnet18", 3).state_dict(), foreign)
    flags = [STAGE, "--teacher", teacher, "--epochs", 0]
    runs = {
        "teacher": ([], (CHEAP, 32, "squash")),
        "init": (["--init", init], ("efficientnet_b0", 48, "center")),
        "foreign": (["--init", foreign, "--arch", "resnet18"], ("resnet18", 32, "squash")),
        "flags": (["--init", init, "--image-size", 40, "--crop-mode", "squash"], ("efficientnet_b0", 40, "squash")),
    }
    for name, (more, expected) in runs.items():
        done = call_main(*flags, *more, "--out", tmp_path / name)
        assert done.returncode == 0 and ("outputs taken for" in done.stdout) == (name == "foreign")
        saved = checkpoint_of(tmp_path / name / "model.pt")
        assert (saved["arch"], saved["image_size"], saved["crop_mode"]) == expected, name
    assert_mistake(call_main(*flags, "--init", init, "--arch", "resnet18", "--out", tmp_path / "x"), "--arch")
