"""The stages through their command line, small but real: what they learn, what survives kills, what they refuse."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_data, load_stage

TRAIN = ["--image-size", 32, "--batch-size", 8, "--optimizer", "adamw", "--lr", 4e-3, "--zero-init-residual"]
TRAIN += [
    "--warmup-epochs",
    1,
    "--schedule",
    "cosine",
    "--num-ops",
    1,
    "--magnitude",
    3,
    "--min-crop-area",
    0.7,
    "--ema-decay",
    0.9,
    "--bn-momentum",
    0.1,
]
STUDENT = [*TRAIN, "--ratio", 2, "--epochs", 4, "--save-every", 2, "--eval-every", 2]


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a: Path, b: Path) -> None:
    a, b = checkpoint(a)["model"], checkpoint(b)["model"]
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def start(*args, nproc: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *map(str, args)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """The process and all below it: torchrun gives each worker a process group of its own."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [below for child in task.read_text().split() for below in descendants(int(child))]
    return found


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    process.wait()


def kill_when(process: subprocess.Popen, condition, number: int) -> None:
    """Send a signal to all processes as soon as the condition holds."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.01)
    kill(process, number)


@pytest.fixture(scope="session")
def teacher(tiny_data, run_stage, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "t"
    args = [
        "01_train_teacher.py",
        "--data",
        tiny_data,
        "--out",
        out,
        *TRAIN,
        "--batch-size",
        12,
        "--epochs",
        60,
        "--eval-every",
        20,
    ]
    done = run_stage(*args)
    return out, args, done


@pytest.fixture(scope="session")
def labels(teacher, tiny_data, run_stage, tmp_path_factory):
    """(logits.h5, balanced.h5, what 03 printed)"""
    folder = tmp_path_factory.mktemp("labels")
    run_stage("02_pseudo_label.py", "--teacher", teacher[0] / "model.pt", "--out", folder / "logits.h5")
    args = [
        "03_balance.py",
        folder / "logits.h5",
        "--out",
        folder / "balanced.h5",
        "--threshold",
        0.3,
        "--per-class",
        9,
    ]
    done = run_stage(*args, "--truth", tiny_data / "unlabeled_truth.csv")
    return folder / "logits.h5", folder / "balanced.h5", done.stdout


def test_the_teacher_learns_and_its_checkpoint_says_how_it_was_made(teacher, tiny_data):
    out, _, done = teacher
    lines = metrics(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    assert lines[-1]["val_top1"] >= 75 and {"step", "epoch", "val_loss", "val_top5"} <= lines[-1].keys()
    assert all({"step", "epoch"} <= line.keys() for line in lines) and lines[-1]["step"] == 120
    saved = checkpoint(out / "model.pt")
    assert saved["format"] == "noisy-student-checkpoint-1" and saved["stage"] == "teacher"
    assert saved["classes"] == ["disc", "square", "triangle"] and saved["image_size"] == 32
    assert saved["crop_fraction"] == 1 and saved["args"]["data"] == str(tiny_data)
    assert saved["metrics"]["val_top1"] == lines[-1]["val_top1"]
    assert "training" in checkpoint(out / "last.pt") and "training" not in saved
    assert (out / "curves.png").stat().st_size > 5000
    assert f"val_top1 {lines[-1]['val_top1']:.2f} on 12 images" in done.stdout


def test_a_finished_run_says_so_and_touches_nothing(teacher, run_stage):
    out, args, _ = teacher
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    done = run_stage(*args)
    assert "finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_flags_on_the_same_folder_are_named_and_refused(teacher, run_stage):
    out, args, _ = teacher
    before = (out / "last.pt").read_bytes()
    done = run_stage(*args, "--label-smoothing", 0.2, check=False)
    assert done.returncode == 2 and "--label-smoothing 0.1 (now 0.2)" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and (out / "last.pt").read_bytes() == before
    assert run_stage(*args, "--workers", 1, "--save-every", 7).returncode == 0


def test_a_run_does_not_go_on_with_other_images(tiny_data, run_stage, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    args = ["01_train_teacher.py", "--data", data, "--out", tmp_path / "t", *TRAIN, "--epochs", 9, "--save-every", 2]
    kill_when(start(*args), (tmp_path / "t" / "last.pt").exists, signal.SIGKILL)
    shutil.copy(data / "val" / "disc" / "0.png", data / "train" / "disc" / "new.png")
    done = run_stage(*args, check=False)
    assert done.returncode == 2 and "begun with [24] images, not [25]" in done.stderr


def test_labels_are_the_teachers_on_the_clean_view(teacher, labels, tiny_data):
    import common

    model, saved = common.load_model(teacher[0] / "model.pt")
    with h5py.File(labels[0]) as file:
        paths = [path.decode() for path in file["path"][:]]
        assert paths == sorted(f"part{i % 2}/{i:03}.png" for i in range(20)) and (file["status"][:] == 1).all()
        images = [
            common.eval_view(common.load_image(tiny_data / "unlabeled" / path), common.View.of(saved)) for path in paths
        ]
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model(common.normalize(images, common.View.of(saved))).numpy()
        np.testing.assert_allclose(file["logits"][:], logits - logits.max(1, keepdims=True), rtol=1e-3, atol=2e-3)
        assert (file["label"][:] == logits.argmax(1)).all()
        probs = torch.from_numpy(logits).softmax(1).numpy()
        np.testing.assert_allclose(file["confidence"][:], probs.max(1), rtol=1e-4)
        assert file["logits"].chunks is None and file["logits"].id.get_offset() % 4096 == 0
        assert file["offset"][:].sum() == file["size"][:].sum() == 0
        assert file.attrs["teacher_sha256"] == common.file_sha256(teacher[0] / "model.pt")


@pytest.mark.parametrize("nproc", [2, 3])
def test_labels_do_not_depend_on_the_number_of_processes(nproc, teacher, run_stage, tmp_path):
    data = tmp_path / "many"  # more images than one batch of the grid
    rng = np.random.default_rng(1)
    from PIL import Image

    data.mkdir()
    for i in range(600):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(data / f"{i}.png")
    (data / "7.png").write_bytes(b"not an image")
    files = []
    for n in (1, nproc):
        args = ["--unlabeled", data, "--teacher", teacher[0] / "model.pt", "--out", tmp_path / f"{n}.h5"]
        run_stage("02_pseudo_label.py", *args, nproc=n)
        with h5py.File(tmp_path / f"{n}.h5") as file:
            files.append({name: file[name][:] for name in file if name != "classes"})
    for name in files[0]:
        assert files[0][name].tobytes() == files[1][name].tobytes(), name
    bad = list(files[0]["path"]).index(b"7.png")
    assert files[0]["status"][bad] == 2 and files[0]["label"][bad] == -1 and np.isnan(files[0]["confidence"][bad])
    assert (np.delete(files[0]["status"], bad) == 1).all()


def test_labelling_goes_on_where_it_was_killed(teacher, tiny_data, labels, run_stage, tmp_path):
    out = tmp_path / "logits.h5"
    args = ["02_pseudo_label.py", "--teacher", teacher[0] / "model.pt", "--out", out]
    kill_when(start(*args), out.exists, signal.SIGKILL)
    with h5py.File(out) as file:  # opens at any moment
        assert len(file["status"]) == 20
    run_stage(*args)
    with h5py.File(out) as a, h5py.File(labels[0]) as b:
        assert all(a[name][:].tobytes() == b[name][:].tobytes() for name in b if name != "classes")
    untouched = out.read_bytes()
    assert "20 of them done before" in run_stage(*args).stdout and out.read_bytes() == untouched


def test_a_disk_that_fills_up_is_one_line_and_costs_nothing(teacher, labels, tmp_path):
    """A limit on the size of files stands in for the disk: what was done before stays, and the run goes on later."""
    with h5py.File(labels[0]) as file:
        limit, complete = file["logits"].id.get_offset(), {name: file[name][:] for name in file}
    command = ["02_pseudo_label.py", "--teacher", teacher[0] / "model.pt", "--out", tmp_path / "l.h5"]
    command = [sys.executable, *map(str, command)]
    shutil.copy(labels[0], tmp_path / "l.h5")
    with h5py.File(tmp_path / "l.h5", "r+") as file:
        file["status"][:] = 0  # as if nothing was done
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    done = subprocess.run(command, cwd=ROOT, preexec_fn=full, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr and "run again" in done.stderr
    with h5py.File(tmp_path / "l.h5") as file:
        assert not file["status"][:].any()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with h5py.File(tmp_path / "l.h5") as file:
        for name, values in complete.items():
            np.testing.assert_array_equal(file[name][:], values)


def test_too_small_a_disk_is_said_before_the_start(teacher, monkeypatch, tmp_path, capsys):
    stage = load_stage("02_pseudo_label")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    command = ["02", "--teacher", teacher[0] / "model.pt", "--out", tmp_path / "l.h5"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as stop:
        stage.main()
    assert stop.value.code == 2 and "20 images need" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_too_many_unreadable_images_end_with_status_2_and_everything_kept(teacher, run_stage, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(Path(checkpoint(teacher[0] / "model.pt")["data"]) / "unlabeled", data)
    (data / "broken.jpg").write_text("<html>")
    args = ["02_pseudo_label.py", "--unlabeled", data, "--teacher", teacher[0] / "model.pt", "--out", tmp_path / "l.h5"]
    for _ in range(2):
        done = run_stage(*args, check=False)
        assert done.returncode == 2 and "broken.jpg" in done.stderr and "--max-bad" in done.stderr
    with h5py.File(tmp_path / "l.h5") as file:
        assert sorted(file["status"][:]) == [1] * 20 + [2]


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


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_killed_student_ends_as_an_uninterrupted_one(nproc, teacher, labels, run_stage, tmp_path):
    args = ["04_train_student.py", "--teacher", teacher[0] / "model.pt", "--pseudo-labels", labels[1], *STUDENT]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_stage(*args, "--out", whole, nproc=nproc)
    for step in (2, 6):
        process = start(*args, "--out", killed, nproc=nproc)

        def saved(step=step):
            lines = metrics(killed) if (killed / "last.pt").exists() else []
            return lines and lines[-1]["step"] > step

        kill_when(process, saved, signal.SIGKILL)
        assert not (killed / "model.pt").exists(), "the kill came too late to test anything"
    run_stage(*args, "--out", killed, nproc=nproc)
    assert_same_weights(whole / "model.pt", killed / "model.pt")
    assert (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()
    lines = metrics(whole)
    assert {"loss_labeled", "loss_unlabeled", "lr"} <= lines[0].keys() and lines[-1]["step"] == 12
    assert checkpoint(whole / "model.pt")["stage"] == "student"


def test_the_student_learns_from_soft_and_hard_labels(teacher, labels, run_stage, tmp_path):
    base = ["04_train_student.py", "--pseudo-labels", labels[1], *TRAIN, "--seed", 3, "--eval-every", 0]
    run_stage(*base, "--out", tmp_path / "soft", "--epochs", 40)
    lines = metrics(tmp_path / "soft")
    for name in ("loss", "loss_labeled", "loss_unlabeled"):
        assert np.mean([line[name] for line in lines[-11:-1]]) < 0.8 * np.mean([line[name] for line in lines[:10]]), (
            name
        )
    assert lines[-1]["val_top1"] >= 75
    run_stage(*base, "--out", tmp_path / "hard", "--epochs", 1, "--temperature", 0)
    run_stage(*base, "--out", tmp_path / "cold", "--epochs", 1, "--temperature", 0.5)
    first = [metrics(tmp_path / name)[0]["loss_unlabeled"] for name in ("hard", "cold", "soft")]
    assert len(set(first)) == 3  # the same images and weights, three kinds of targets


def test_the_student_pretrains_on_the_selection_alone(labels, run_stage, tmp_path):
    args = ["04_train_student.py", "--pseudo-labels", labels[1], *TRAIN, "--unlabeled-only", "--epochs", 2]
    done = run_stage(*args, "--out", tmp_path / "s", "--arch", "resnet18", "--batch-size", 9)
    assert "0 + 9 a step, 6 steps" in done.stdout  # an epoch is a pass over the 27 examples
    assert all(line["loss_labeled"] == 0 for line in metrics(tmp_path / "s")[:-1])
    tuned = ["01_train_teacher.py", "--data", checkpoint(tmp_path / "s" / "model.pt")["data"], "--arch", "resnet18"]
    run_stage(*tuned, *TRAIN, "--epochs", 0, "--init", tmp_path / "s" / "model.pt", "--out", tmp_path / "tuned")
    assert_same_weights(tmp_path / "s" / "model.pt", tmp_path / "tuned" / "model.pt")


def test_a_teacher_is_all_a_student_needs(teacher, tmp_path):
    """torchrun 04_train_student.py --teacher ckpt.pt, and a SIGTERM, since the paper's 700 epochs are long."""
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / "04_train_student.py", tmp_path)  # a copied stage and common.py are enough
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "04_train_student.py",
        "--teacher",
        teacher[0] / "model.pt",
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=tmp_path,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out = tmp_path / "runs" / "student"
    end = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and metrics(out)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's own status
    assert "on the fly" in stdout and "no confidence filter" in stdout
    saved = checkpoint(out / "last.pt")
    assert saved["arch"] == "efficientnet_b0" and saved["image_size"] == 32 and saved["training"]["step"] >= 1
    assert np.isfinite(metrics(out)[-1]["loss_unlabeled"])


def test_sigterm_saves_and_the_run_goes_on_from_there(tiny_data, run_stage, tmp_path):
    args = [
        "01_train_teacher.py",
        "--data",
        tiny_data,
        "--out",
        tmp_path / "t",
        *TRAIN,
        "--epochs",
        8,
        "--eval-every",
        0,
    ]
    process = start(*args)
    kill_when(
        process,
        lambda: (tmp_path / "t" / "metrics.jsonl").exists() and len(metrics(tmp_path / "t")) > 2,
        signal.SIGTERM,
    )
    assert process.returncode == 143
    step = checkpoint(tmp_path / "t" / "last.pt")["training"]["step"]
    assert 2 < step < 24 and metrics(tmp_path / "t")[-1]["step"] == step
    assert f"from step {step}" in run_stage(*args).stdout
    run_stage(*[str(arg).replace(str(tmp_path / "t"), str(tmp_path / "whole")) for arg in args])
    assert_same_weights(tmp_path / "t" / "model.pt", tmp_path / "whole" / "model.pt")


def test_a_diverged_run_ends_with_3_and_saves_nothing_of_it(tiny_data, run_stage, tmp_path):
    args = ["01_train_teacher.py", "--data", tiny_data, "--out", tmp_path / "t", *TRAIN, "--epochs", 4]
    done = run_stage(*args, "--optimizer", "sgd", "--lr", 1e30, "--warmup-epochs", 0, check=False)
    assert done.returncode == 3 and "diverged" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "t").glob("*.pt"))


def test_fixres_trains_the_head_alone_and_resumes_exactly(teacher, run_stage, tmp_path):
    base = ["05_fixres_finetune.py", "--checkpoint", teacher[0] / "model.pt", "--image-size", 40, "--batch-size", 8]
    base += ["--epochs", 4, "--save-every", 2, "--lr", 1e-2]
    done = run_stage(*base, "--out", tmp_path / "whole")
    before, after = checkpoint(teacher[0] / "model.pt"), checkpoint(tmp_path / "whole" / "model.pt")
    changed = {name.split(".")[0] + "." + name.split(".")[1] for name in before["model"]
               if not torch.equal(before["model"][name], after["model"][name])}  # fmt: skip
    assert changed == {"features.8", "classifier.1"}
    assert after["image_size"] == 40 and after["stage"] == "fixres" and after["classes"] == before["classes"]
    head = 1280 * 320 + 2 * 1280 + 3 * 1280 + 3
    assert f"{head:,} of" in done.stdout and (tmp_path / "whole" / "resolution.png").stat().st_size > 5000
    process = start(*base, "--out", tmp_path / "killed")
    kill_when(process, (tmp_path / "killed" / "last.pt").exists, signal.SIGKILL)
    run_stage(*base, "--out", tmp_path / "killed")
    assert_same_weights(tmp_path / "whole" / "model.pt", tmp_path / "killed" / "model.pt")
    deeper = ["--frozen-blocks", 15, "--epochs", 1]
    run_stage(*base, *deeper, "--out", tmp_path / "deeper")
    weights = checkpoint(tmp_path / "deeper" / "model.pt")["model"]
    assert not torch.equal(weights["features.7.0.block.0.0.weight"], before["model"]["features.7.0.block.0.0.weight"])
    assert torch.equal(weights["features.6.3.block.0.0.weight"], before["model"]["features.6.3.block.0.0.weight"])


def test_the_same_data_at_one_and_two_processes_learn_alike(tiny_data, run_stage, tmp_path):
    args = ["01_train_teacher.py", "--data", tiny_data, *TRAIN, "--epochs", 2, "--arch", "resnet18", "--lr", 0.0]
    for nproc in (1, 2):
        run_stage(*args, "--out", tmp_path / str(nproc), nproc=nproc)
    one, two = (metrics(tmp_path / str(nproc)) for nproc in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    # lr 0 leaves the weights alone; what differs is whose half of the batch the batch norms see
    assert np.allclose(
        [x["loss"] for x in one[:-1] if "loss" in x], [x["loss"] for x in two[:-1] if "loss" in x], rtol=0.35
    )


BAD_INPUT = {  # {}: the places below
    "no data directory": ("01_train_teacher.py --data {tmp}/nothing --out {tmp}/o", "train/"),
    "an empty class": ("01_train_teacher.py --data {empty} --out {tmp}/o", "'hollow' has no images"),
    "val with a class that train lacks": ("01_train_teacher.py --data {extra} --out {tmp}/o", "unicorn"),
    "batch size 0": ("01_train_teacher.py --data {data} --out {tmp}/o --batch-size 0", "--batch-size"),
    "a typo in a flag": ("01_train_teacher.py --data {data} --out {tmp}/o --epoch 1", "--epoch"),
    "an unknown model": ("01_train_teacher.py --data {data} --out {tmp}/o --arch b0", "--arch"),
    "a text file as teacher": ("02_pseudo_label.py --teacher {text} --out {tmp}/o.h5", "not a checkpoint"),
    "no such teacher": ("04_train_student.py --teacher {tmp}/none.pt --out {tmp}/o", "no such checkpoint"),
    "no labels at all": ("04_train_student.py --out {tmp}/o", "--teacher or --pseudo-labels"),
    "no images": ("02_pseudo_label.py --teacher {teacher} --unlabeled {tmp}/no --out {tmp}/l", "no such folder"),
    "a text file as logits": ("03_balance.py {text} --out {tmp}/b.h5", "not a readable HDF5"),
    "a checkpoint as logits": ("03_balance.py {teacher} --out {tmp}/b.h5", "not a readable HDF5"),
    "a text file to tune": (
        "05_fixres_finetune.py --checkpoint {text} --image-size 40 --out {tmp}/o",
        "not a checkpoint",
    ),
    "too many blocks": (
        "05_fixres_finetune.py --checkpoint {teacher} --image-size 40 --out {tmp}/o --frozen-blocks 17",
        "--frozen-blocks 17",
    ),
    "a text file to evaluate": ("06_eval_robustness.py {text} --data {data} --out {tmp}/o", "not a checkpoint"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_data, teacher):
    tmp = tmp_path_factory.mktemp("bad")
    empty, extra = draw_data(tmp / "empty"), draw_data(tmp / "extra")
    (empty / "train" / "hollow").mkdir()
    (extra / "val" / "unicorn").mkdir()
    shutil.copy(extra / "val" / "disc" / "0.png", extra / "val" / "unicorn" / "0.png")
    (tmp / "text.pt").write_text("I am not a checkpoint\n")
    return {"tmp": tmp, "empty": empty, "extra": extra, "text": tmp / "text.pt", "data": tiny_data,
            "teacher": teacher[0] / "model.pt"}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_a_mistake_is_one_line_and_status_2(mistake, places, run_stage):
    command, message = BAD_INPUT[mistake]
    listing = sorted(places["tmp"].rglob("*"))
    done = run_stage(*command.format(**places).split(), check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(places["tmp"].rglob("*")) == listing, "it left something behind"


def test_under_torchrun_a_mistake_is_said_once(places, run_stage):
    done = run_stage(
        "02_pseudo_label.py", "--teacher", places["text"], "--out", places["tmp"] / "l.h5", nproc=2, check=False
    )
    assert done.returncode == 1 and done.stderr.count("not a checkpoint") == 1


def test_a_pickle_with_code_in_it_is_refused_and_not_run(places, run_stage, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": "noisy-student-checkpoint-1", "model": Evil()}, tmp_path / "evil.pt")
    done = run_stage("02_pseudo_label.py", "--teacher", tmp_path / "evil.pt", "--out", tmp_path / "l.h5", check=False)
    assert done.returncode == 2 and "nothing in it was executed" in done.stderr and not (tmp_path / "ran").exists()


def test_the_whole_loop_twice(tiny_data, tmp_path):
    """run.sh on a user's folder ends with the table; again it says that all is done."""
    data = shutil.copytree(tiny_data, tmp_path / "mine")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {
        "OUT": str(tmp_path / "out"),
        "EPOCHS": "1",
        "ROUNDS": "1",
        "THRESHOLD": "0",
        "NPROC": "1",
        "FIXRES_STEPS": "4",
    }
    outputs = []
    for _ in range(2):
        done = subprocess.run(["bash", ROOT / "run.sh", data], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        outputs.append(done.stdout)
    for name in ("teacher", "control", "student1", "fixres"):
        assert (tmp_path / "out" / name / "model.pt").exists() and f"done: {name}" in outputs[1]
    table = [line for line in outputs[0].splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table[2:]] == ["teacher", "control", "student1", "fixres"]
    assert table == [line for line in outputs[1].splitlines() if line.startswith("|")]
    done = subprocess.run(["bash", ROOT / "run.sh", data], env=env | {"EPOCHS": "2"}, capture_output=True, text=True)
    assert done.returncode == 2 and "another command" in done.stderr

    # killed in the middle of four stages, and started again each time: the same table
    env["OUT"] = str(tmp_path / "killed")
    for sign in ("teacher/metrics.jsonl", "logits1.h5", "student1/metrics.jsonl", "robustness/robustness.json"):
        process = subprocess.Popen(
            ["bash", ROOT / "run.sh", data], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        kill_when(process, (tmp_path / "killed" / sign).exists, signal.SIGKILL)
    done = subprocess.run(["bash", ROOT / "run.sh", data], env=env, capture_output=True, text=True, timeout=600)
    assert table == [line for line in done.stdout.splitlines() if line.startswith("|")], done.stderr

    env |= {"OUT": str(tmp_path / "two"), "NPROC": "2", "CONTROL": "0"}
    done = subprocess.run(["bash", ROOT / "run.sh", data], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "2 x cpu" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table[2:]] == ["teacher", "student1", "fixres"]


def test_images_that_have_gone_since_are_reported_and_left_out(teacher, labels, run_stage, tmp_path):
    data = shutil.copytree(Path(checkpoint(teacher[0] / "model.pt")["data"]), tmp_path / "data")
    (data / "unlabeled" / "part0" / "000.png").unlink()
    args = [
        "04_train_student.py",
        "--pseudo-labels",
        labels[1],
        "--data",
        data,
        "--unlabeled",
        data / "unlabeled",
        *STUDENT,
    ]
    done = run_stage(*args, "--out", tmp_path / "s")
    assert "1 unlabelled images are unreadable and were left out" in done.stdout
    assert f"{data}/unlabeled/part0/000.png: FileNotFoundError" in done.stdout


def test_the_student_trains_on_newer_labels(teacher, labels, run_stage, tmp_path):
    """02 --only and 04 --logits as the README has them: the same teacher again changes nothing, another one does."""
    other = checkpoint(teacher[0] / "model.pt")
    for name in ("classifier.1.weight", "classifier.1.bias"):
        other["model"][name] = other["model"][name].roll(1, 0)  # one that calls every class by another's name
    torch.save(other, tmp_path / "other.pt")
    base = ["04_train_student.py", "--pseudo-labels", labels[1], "--data", other["data"], *STUDENT, "--epochs", 1]
    run_stage(*base, "--out", tmp_path / "old")
    for name, path in (("same", teacher[0] / "model.pt"), ("other", tmp_path / "other.pt")):
        newer = tmp_path / f"{name}.h5"
        run_stage("02_pseudo_label.py", "--teacher", path, "--only", labels[1], "--out", newer)
        run_stage(*base, "--logits", newer, "--out", tmp_path / name)
    assert_same_weights(tmp_path / "old" / "model.pt", tmp_path / "same" / "model.pt")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "old" / "model.pt", tmp_path / "other" / "model.pt")
