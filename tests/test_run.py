"""The training run, which 01, 04 and 05 share: it continues where it was killed, stops when told, refuses other flags
and other images, leaves nothing of a run that diverged; a step in parts, activations computed again, processes."""

import copy
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import h5py
import label_files
import numpy as np
import pytest
import torch
from conftest import (
    CHEAP,
    CLASSES,
    ROOT,
    SHORT_RUN,
    assert_mistake,
    assert_same_weights,
    descendants,
    checkpoint_of,
    metrics_of,
    results_of,
    save_model,
)
from PIL import Image
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import common
from common import Processes, build_model, micro_batches, parallel, step_generator

ALONE = Processes(torch.device("cpu"), 0, 1, 0)


# continuing


def flags_of_a_run(stage, out, tiny_data, teacher=None, labels=None):
    """The command of a short run of 01, 04 or 05: 12 steps, saved at every second."""
    if stage == "01_train_teacher.py":
        own = ["--data", tiny_data, "--arch", CHEAP, *SHORT_RUN, "--eval-every", 2]
    elif stage == "04_train_student.py":
        own = ["--pseudo-labels", labels[1], *SHORT_RUN, "--ratio", 2, "--eval-every", 2]
    else:
        own = ["--checkpoint", teacher[0] / "model.pt", "--image-size", 40, "--batch-size", 8, "--lr", 1e-2]
    return [stage, *own, "--out", out, "--epochs", 4, "--save-every", 2]


@pytest.mark.xdist_group("teacher")
@pytest.mark.parametrize(
    ("stage", "nproc"), [("04_train_student.py", 1), ("04_train_student.py", 2), ("05_fixres_finetune.py", 1)]
)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    stage, nproc, tiny_data, teacher, labels, run_stage, start_stage, tmp_path
):
    whole, killed = (flags_of_a_run(stage, tmp_path / name, tiny_data, teacher, labels) for name in ("whole", "killed"))
    run_stage(*whole, nproc=nproc, WITHOUT="matplotlib")
    out = tmp_path / "killed"
    for step in (2, 6):
        process = start_stage(*killed, nproc=nproc)
        process.wait_until(
            lambda step=step: (out / "last.pt").exists() and (metrics_of(out) or [{"step": 0}])[-1]["step"] > step
        )
        process.kill()
        assert not (out / "model.pt").exists(), "the kill came too late to test anything"
    run_stage(*killed, nproc=nproc, WITHOUT="matplotlib")
    assert_same_weights(tmp_path / "whole" / "model.pt", out / "model.pt")
    assert results_of(tmp_path / "whole") == results_of(out)
    lines = metrics_of(out)
    assert {"step", "epoch", "lr", "loss"} <= lines[0].keys() and lines[-1]["step"] == 12
    assert checkpoint_of(out / "model.pt")["stage"] == ("student" if "04" in stage else "fixres")
    assert {"loss_labeled", "loss_unlabeled"} <= lines[0].keys() or "05" in stage
    if nproc == 1:
        (out / "model.pt").unlink()  # killed between the last line and the save: the line stands once
        run_stage(*killed, WITHOUT="matplotlib")
        assert metrics_of(out) == lines


def test_sigterm_saves_and_the_run_goes_on_from_there(tiny_data, run_stage, start_stage, tmp_path):
    """With a plain Python: the exit status is that of the process."""
    flags = flags_of_a_run("01_train_teacher.py", tmp_path / "t", tiny_data)
    flags += ["--epochs", 8, "--eval-every", 0, "--save-every", 1000]
    process = start_stage(ROOT / flags[0], *flags[1:], launcher="python")
    process.wait_until(lambda: (tmp_path / "t" / "metrics.jsonl").exists() and len(metrics_of(tmp_path / "t")) > 2)
    process.kill(signal.SIGTERM)
    assert process.returncode == 143
    step = checkpoint_of(tmp_path / "t" / "last.pt")["training"]["step"]
    assert 2 < step < 24 and metrics_of(tmp_path / "t")[-1]["step"] <= step
    assert f"from step {step}" in run_stage(*flags, WITHOUT="matplotlib").stdout
    run_stage(*flags, "--out", tmp_path / "whole", WITHOUT="matplotlib")
    assert_same_weights(tmp_path / "t" / "model.pt", tmp_path / "whole" / "model.pt")
    assert results_of(tmp_path / "t") == results_of(tmp_path / "whole")


def test_sigterm_during_an_evaluation_is_heard_at_once(tiny_data, run_stage, start_stage, tmp_path):
    """The evaluation at the end of a run, on val images that take seconds to read; it is done again, whole."""
    data, out = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "t"
    Image.new("RGB", (2400, 2400), (10, 40, 200)).save(tmp_path / "large.png")
    for i in range(80):
        (data / "val" / "disc" / f"large{i}.png").symlink_to(tmp_path / "large.png")
    flags = ["01_train_teacher.py", "--data", data, "--arch", CHEAP, *SHORT_RUN, "--image-size", 224, "--epochs", 1]
    process = start_stage(*flags, "--out", out, "--eval-every", 0)
    process.wait_until(lambda: (out / "metrics.jsonl").exists() and any(line["step"] == 3 for line in metrics_of(out)))
    time.sleep(0.5)
    began = time.monotonic()
    process.kill(signal.SIGTERM)
    heard = time.monotonic() - began
    assert process.returncode == 143 and not (out / "model.pt").exists(), process
    saved = checkpoint_of(out / "last.pt")
    assert saved["training"]["step"] == 3 and [line["step"] for line in metrics_of(out)] == [1, 2, 3]
    began = time.monotonic()
    assert "from step 3" in run_stage(*flags, "--out", out, "--eval-every", 0, WITHOUT="matplotlib").stdout
    assert heard < 0.4 * (time.monotonic() - began), "it waited for the end of the evaluation"
    assert_same_weights(checkpoint_of(out / "model.pt")["model"], saved["model"])
    assert checkpoint_of(out / "model.pt")["metrics"]["val_top1"] >= 0 and len(metrics_of(out)) == 4


def test_a_signal_during_a_save_ends_the_run_after_it(tiny_data, call_main, tmp_path, monkeypatch):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t")
    save, runs, init = common.save_checkpoint, [], common.Run.__init__

    def save_and_hear(path, checkpoint):
        if path.name == "last.pt" and len(saved) == 1:
            runs[-1].stop.receive(signal.SIGTERM, None)  # what the handler does
        saved.append(path.name)
        save(path, checkpoint)

    saved = []
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save_and_hear)
        patch.setattr(common.Run, "__init__", lambda run, *args: runs.append(run) or init(run, *args))
        assert call_main(*flags).returncode == 143
    step = checkpoint_of(tmp_path / "t" / "last.pt")["training"]["step"]
    assert saved == ["last.pt"] * 3 and step == 4, "it was saved once more, at the step it had reached"
    assert call_main(*flags).returncode == 0
    assert call_main(*short_run("01_train_teacher", tiny_data, tmp_path / "whole")).returncode == 0
    assert_same_weights(tmp_path / "t" / "model.pt", tmp_path / "whole" / "model.pt")
    assert results_of(tmp_path / "t") == results_of(tmp_path / "whole")


@pytest.mark.xdist_group("teacher")
@pytest.mark.parametrize("stage", ["05_fixres_finetune.py", "06_eval_robustness.py"])
def test_killed_at_ten_random_moments_it_ends_as_if_nothing_had_been(
    stage, tiny_data, teacher, run_stage, start_stage, tmp_path
):
    """Early enough that it needs several starts; what it had done counts, so it ends before or after the tenth."""

    def words(out):
        if stage[1] == "5":
            return [*flags_of_a_run(stage, out, tiny_data, teacher), "--epochs", 30]
        return [stage, teacher[0] / "model.pt", "--data", tiny_data, "--out", out, "--corrupt", "--pgd", 4]

    whole, out = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    run_stage(*words(whole), WITHOUT="matplotlib")
    seconds, rng = time.monotonic() - began, np.random.default_rng(0)
    killed = 0
    for _ in range(10):
        process = start_stage(*words(out), WITHOUT="matplotlib")
        end = time.monotonic() + rng.uniform(0.2, 0.5) * seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
            killed += 1
        if process.returncode == 0:
            break
    run_stage(*words(out), WITHOUT="matplotlib")
    assert killed >= 1  # on a crowded machine few
    if stage[1] == "5":
        assert_same_weights(out / "model.pt", whole / "model.pt")
        assert results_of(out) == results_of(whole)
    else:
        both = [json.loads((folder / "robustness.json").read_text()) for folder in (out, whole)]
        assert both[0] == both[1]


@pytest.mark.xdist_group("teacher")
@pytest.mark.parametrize("stage", ["04_train_student", "05_fixres_finetune"])
def test_told_to_stop_it_saves_at_once(stage, tiny_data, teacher, labels, call_main, tmp_path):
    flags = flags_of_a_run(f"{stage}.py", tmp_path / "t", tiny_data, teacher, labels)[1:]
    flags += ["--save-every", 1000, *(["--eval-every", 0] if stage.startswith("04") else [])]
    assert call_main(stage, *flags, stop_after=3).returncode == 143
    assert checkpoint_of(tmp_path / "t" / "last.pt")["training"]["step"] == 3
    assert metrics_of(tmp_path / "t")[-1]["step"] == 3 and not (tmp_path / "t" / "model.pt").exists()


@pytest.mark.xdist_group("teacher")
def test_a_finished_run_says_so_and_touches_nothing(teacher, call_main):
    out, args, _ = teacher
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    done = call_main("01_train_teacher", *args[1:])
    assert done.returncode == 0 and "finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.xdist_group("teacher")
def test_other_flags_on_the_same_folder_are_named_and_refused(teacher, call_main):
    out, args, _ = teacher
    before = (out / "last.pt").read_bytes()
    done = call_main("01_train_teacher", *args[1:], "--label-smoothing", 0.2)
    assert_mistake(done, "--label-smoothing 0.1 (now 0.2)")
    assert (out / "last.pt").read_bytes() == before
    assert call_main("01_train_teacher", *args[1:], "--workers", 1, "--save-every", 7).returncode == 0


def test_a_run_does_not_go_on_with_other_images(tiny_data, call_main, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    flags = ["--data", data, "--out", tmp_path / "t", *SHORT_RUN, "--arch", CHEAP, "--epochs", 2, "--save-every", 2]
    assert call_main("01_train_teacher", *flags, stop_after=2).returncode == 143
    shutil.copy(data / "val" / "disc" / "0.png", data / "train" / "disc" / "new.png")
    assert_mistake(call_main("01_train_teacher", *flags), data / "train", "is not what", "put it back", "another --out")


def test_a_diverged_run_ends_with_3_and_saves_nothing_of_it(tiny_data, call_main, tmp_path):
    flags = ["--data", tiny_data, "--out", tmp_path / "t", *SHORT_RUN, "--arch", CHEAP, "--epochs", 4]
    done = call_main("01_train_teacher", *flags, "--optimizer", "sgd", "--lr", 1e30, "--warmup-epochs", 0)
    assert done.returncode == 3 and "diverged" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "t").glob("*.pt"))

    # the weights that swa does not average yet; the loss of an evaluation
    flags = [*flags, "--optimizer", "sgd", "--warmup-epochs", 0, "--schedule", "constant", "--save-every", 1]
    for out, words in (("swa", ["--lr", 1e38, "--average", "swa", "--eval-every", 0]), ("eval", ["--lr", 1e30])):
        words = [*words, *([] if "--eval-every" in words else ["--eval-every", 0.3])]
        assert call_main("01_train_teacher", *flags, *words, "--out", tmp_path / out).returncode == 3
        for path in (tmp_path / out).glob("last*.pt"):
            training = checkpoint_of(path)["training"]
            assert all(torch.isfinite(tensor).all() for tensor in training["model"].values()), path
        metrics = tmp_path / out / "metrics.jsonl"
        assert not metrics.exists() or not {"NaN", "Infinity"} & set(re.findall("NaN|Infinity", metrics.read_text()))


def test_what_another_program_left_is_one_line(tiny_data, call_main, tmp_path):
    for name, content in (("model.pt", {"conv.weight": torch.zeros(1)}), ("last.pt", {"epoch": 3}), ("last.pt", [1])):
        out = tmp_path / f"{name} {len(content)} {type(content).__name__}"
        out.mkdir()
        torch.save(content, out / name)
        done = call_main("01_train_teacher", "--data", tiny_data, "--out", out, *SHORT_RUN, "--arch", CHEAP)
        assert_mistake(done, out / name, "another program")


def test_a_run_does_not_go_on_with_or_without_init(tiny_data, call_main, tmp_path):
    """The same file as --teacher and as --init is one of the inputs, with either alone too."""
    teacher = save_model(tmp_path / "teacher.pt")
    flags = ["04_train_student", "--teacher", teacher, "--data", tiny_data, *SHORT_RUN, "--ratio", 1, "--epochs", 2]
    for name, begun, now in (("with", ["--init", teacher], []), ("without", [], ["--init", teacher])):
        out = ["--out", tmp_path / name]
        assert call_main(*flags, *begun, *out, stop_after=1).returncode == 143
        assert_mistake(call_main(*flags, *now, *out), "--init", "None")


# random numbers


def test_random_numbers_are_a_function_of_seed_stage_step_and_rank():
    """Of torch's own generator, for the dropout, and of that of the augmentation. What ran before does not matter."""

    def drawn(*key):
        torch.rand(7)
        generator = step_generator(*key)
        return tuple(torch.rand(3).tolist()), tuple(torch.rand(3, generator=generator).tolist())

    keys = [
        (0, "teacher", 0, 0),
        (1, "teacher", 0, 0),
        (0, "student", 0, 0),
        (0, "teacher", 1, 0),
        (0, "teacher", 0, 1),
    ]
    first = [part for key in keys for part in drawn(*key)]
    assert [part for key in keys for part in drawn(*key)] == first and len(set(first)) == 10


# several processes


def test_a_log_line_that_another_number_of_processes_continues(tiny_data, call_main, start_stage, tmp_path):
    """The rate is 0, so that the mean loss of steps 3 and 4, before and after the change, is that of one process."""
    flags = ["--data", tiny_data, "--arch", "squeezenet1_1", "--dropout", 0, "--image-size", 32, "--batch-size", 4]
    flags += ["--num-ops", 0, "--lr", 0, "--epochs", 34, "--eval-every", 0, "--workers", 0]  # 204 steps, 2 a line
    for name, step in (("one", 5), ("more", 3)):
        done = call_main("01_train_teacher", *flags, "--out", tmp_path / name, stop_after=step)
        assert done.returncode == 143, done
    process = start_stage("01_train_teacher.py", *flags, "--out", tmp_path / "more", nproc=2)
    process.wait_until(lambda: len(metrics_of(tmp_path / "more")) > 1)
    process.kill()
    one, more = (metrics_of(tmp_path / name)[1] for name in ("one", "more"))
    assert one["step"] == more["step"] == 4 and more["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize(("arch", "tolerance"), [("squeezenet1_1", 1e-3), (CHEAP, 0.35)])
def test_the_same_data_at_one_and_two_processes_learn_alike(arch, tolerance, tiny_data, run_stage, tmp_path):
    """Without batch norms and random noise to the last digits; with them each process has its part of a batch."""
    flags = ["01_train_teacher.py", "--data", tiny_data, *SHORT_RUN, "--epochs", 2, "--arch", arch, "--eval-every", 1]
    flags += ["--lr", 0] if arch == CHEAP else ["--dropout", 0, "--num-ops", 0, "--optimizer", "sgd", "--lr", 0.02]
    for nproc in (1, 2):
        run_stage(*flags, "--out", tmp_path / str(nproc), nproc=nproc, WITHOUT="matplotlib")
    one, two = (metrics_of(tmp_path / str(nproc)) for nproc in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "val_loss"):
        losses = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert len(losses[0]) > 1 and losses[1] == pytest.approx(losses[0], rel=tolerance), name
    assert [line.get("val_top1") for line in one] == [line.get("val_top1") for line in two] or arch == CHEAP


MICRO_BATCHES = """
import sys
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from common import build_model, init_processes, micro_batches, parallel

processes, images, found = init_processes("cpu"), torch.load(sys.argv[1]), []
for number in (1, 2, 4):
    torch.manual_seed(0)
    model, exchanges = build_model("squeezenet1_1", 3, dropout=0.0).train(), []
    ddp_model = parallel(model, processes, False)

    def count(state, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(state, bucket)

    ddp_model.register_comm_hook(None, count)
    for (part,) in micro_batches(ddp_model, number, images[processes.rank :: processes.world_size]):
        (ddp_model(part).square().mean() / number).backward()
    found.append(([p.grad for p in model.parameters()], len(exchanges)))
torch.save(found, f"{sys.argv[1]}.{processes.rank}")
"""


def test_micro_batches_of_two_processes_give_the_gradients_of_one_batch(run_stage, tmp_path):
    """... and exchange them once a step, however many parts it has."""
    torch.manual_seed(1)
    images = torch.randn(16, 3, 33, 33)
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "script.py").write_text(MICRO_BATCHES)
    run_stage(tmp_path / "script.py", tmp_path / "images.pt", nproc=2, PYTHONPATH=ROOT)
    torch.manual_seed(0)
    model = build_model("squeezenet1_1", 3, dropout=0.0).train()
    model(images).square().mean().backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"images.pt.{rank}")
        assert len({exchanges for _, exchanges in found}) == 1 and found[0][1] >= 1
        for gradients, _ in found:
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item())


# a step in parts


@pytest.mark.parametrize(("num", "number", "sizes"), [(10, 3, [4, 3, 3]), (4, 1, [4]), (6, 2, [3, 3]), (1, 2, [1, 0])])
def test_micro_batches_are_the_parts_in_order(num, number, sizes):
    images, targets = torch.arange(2 * num).view(num, 2), torch.arange(num)
    parts = list(micro_batches(nn.Identity(), number, images, targets))
    assert [len(part) for part, _ in parts] == sizes
    for i, whole in enumerate((images, targets)):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole)


def assert_close_runs(start, one, two, names):
    """The weights moved alike, and the losses are equal, up to the order of additions."""
    start, a, b = (checkpoint_of(out / "model.pt")["model"] for out in (start, one, two))
    assert any(not torch.equal(a[name], b[name]) for name in a), "they were the same steps"
    for name in start:
        assert (a[name] - b[name]).norm() < 0.05 * (a[name] - start[name]).norm(), name
    one, two = metrics_of(one), metrics_of(two)
    for name in names:
        losses = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert len(losses[0]) >= 6 and losses[0] == pytest.approx(losses[1], rel=1e-3), name


SQUEEZED = ["--arch", "squeezenet1_1", "--dropout", 0, "--image-size", 32, "--batch-size", 8, "--epochs", 2]
SQUEEZED += ["--warmup-epochs", 0, "--lr", 0.01, "--optimizer", "sgd", "--average", 0.5, "--num-ops", 1]
SQUEEZED += ["--magnitude", 5]


RUNS = {"start": ["--lr", 0], "whole": ["--accumulate", 1], "parts": ["--accumulate", 2]}


def test_a_step_in_parts_is_a_step_in_01(tiny_data, call_main, tmp_path):
    flags = ["--data", tiny_data, *SQUEEZED]
    for name, more in RUNS.items():
        done = call_main("01_train_teacher", *flags, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done
    assert_close_runs(*(tmp_path / name for name in RUNS), ["loss"])
    assert_mistake(
        call_main("01_train_teacher", *flags, "--accumulate", 3, "--out", tmp_path / "3"), "--batch-size 8", "3 parts"
    )
    assert not (tmp_path / "3").exists()


def test_a_step_in_parts_is_a_step_in_04(tiny_data, call_main, tmp_path):
    """With an unreadable unlabelled image, so that parts differ in size."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "unlabeled" / "broken.png").write_text("<html>")
    path = save_model(tmp_path / "teacher.pt", "squeezenet1_1", data=str(data))
    flags = ["--teacher", path, *SQUEEZED, "--ratio", 2]
    for name, more in RUNS.items():
        done = call_main("04_train_student", *flags, *more, "--out", tmp_path / name)
        assert done.returncode == 0 and "1 images were unreadable" in done.stdout, done
    assert_close_runs(*(tmp_path / name for name in RUNS), ["loss", "loss_labeled", "loss_unlabeled"])
    assert_mistake(
        call_main("04_train_student", *flags, "--accumulate", 3, "--out", tmp_path / "3"), "--batch-size 8", "3 parts"
    )
    assert_mistake(
        call_main("04_train_student", *flags, "--ratio", 0.625, "--accumulate", 2, "--out", tmp_path / "3"),
        "--ratio",
        "2 parts",
    )
    assert not (tmp_path / "3").exists()


def test_two_processes_with_unreadable_images_take_the_steps_of_one(tiny_data, run_stage, tmp_path):
    """The losses divide by the readable images of all processes, and each bad image is counted and said once."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for path in (data / "unlabeled" / "broken.png", data / "val" / "disc" / "0.png", data / "val" / "disc" / "1.png"):
        path.write_text(f"<html>{path.parent.name}")  # not the same bytes, or it would be an image of val
    path = save_model(tmp_path / "teacher.pt", "squeezenet1_1", data=str(data))
    flags = ["04_train_student.py", "--teacher", path, *SQUEEZED, "--ratio", 2, "--num-ops", 0, "--no-hflip"]
    for name, nproc, more in (("start", 1, ["--lr", 0]), ("one", 1, []), ("two", 2, [])):
        done = run_stage(*flags, *more, "--out", tmp_path / name, nproc=nproc, WITHOUT="matplotlib")
        assert done.stdout.count("2 val images are unreadable") == done.stdout.count("val images are unreadable") >= 1
        assert "1 images were unreadable" in done.stdout and metrics_of(tmp_path / name)[-2]["unreadable"] == 1, done
    outs = [tmp_path / name for name in ("start", "one", "two")]
    assert_close_runs(*outs, ["loss", "loss_labeled", "loss_unlabeled"])


@pytest.mark.parametrize(("lacking", "expected"), [([0.0, 0.0], "bf16"), ([1.0, 0.0], "fp16"), ([0.0, 1.0], "fp16")])
def test_the_precision_is_what_all_processes_can_do(lacking, expected, monkeypatch):
    """Only the GPU of one process need be too old; asked without emulation, which T4 and V100 have."""
    processes = Processes(torch.device("cuda"), 0, 2, 0)
    asked = {"including_emulation": False}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: how == asked and not lacking[0])
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common, "sum_of", lambda _, mine: [mine + lacking[1]])
    assert common.precision_of("auto", processes) == expected
    assert common.precision_of("fp32", processes) == "fp32"


# activations computed again


def two_steps(arch, recompute, frozen):
    torch.manual_seed(0)
    model = build_model(arch, 5, dropout=0.3, drop_path=0.5).train()
    model.features[:frozen].eval().requires_grad_(False)
    called = parallel(model, ALONE, False, recompute)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(called(torch.randn(6, 3, 32, 32)), torch.arange(6) % 5).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("arch", "frozen"), [("efficientnet_b0", 0), ("tf_efficientnet_b0", 0), ("efficientnet_b0", 5)]
)
def test_recomputed_activations_change_no_bit(arch, frozen):
    """Weights, gradients, running statistics and their counters after two steps with dropout and stochastic depth."""
    kept, recomputed = (two_steps(arch, recompute, frozen) for recompute in (False, True))
    for (name, a), b in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == name.startswith(tuple(f"features.{i}." for i in range(frozen)))
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, recomputed.state_dict()[name]), name
    counters = {int(t) for name, t in recomputed.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counters == ({0, 2} if frozen else {2})


def test_recomputing_keeps_less_and_computes_twice():
    saved, calls = [], []
    for recompute in (False, True):
        model = parallel(build_model("efficientnet_b0", 5).train(), ALONE, False, recompute)
        num_bytes, num_calls = [], []

        def pack(tensor, num_bytes=num_bytes):
            num_bytes.append(tensor.nbytes)
            return tensor

        model.features[3][1].block[1][0].register_forward_hook(lambda *_, seen=num_calls: seen.append(1))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.randn(2, 3, 64, 64)).sum()
        with torch.no_grad():
            model(torch.randn(2, 3, 64, 64))  # nothing to recompute
        loss.backward()
        saved.append(sum(num_bytes))
        calls.append(len(num_calls))
    assert calls == [2, 3] and saved[1] < 0.5 * saved[0], (calls, saved)


def test_recomputing_is_for_efficientnets(mistake):
    mistake(lambda: parallel(build_model("resnet18", 3), ALONE, False, recompute=True), "--checkpoint-activations")


def test_checkpointed_activations_change_no_bit_and_may_be_added_later(tiny_data, call_main, tmp_path, monkeypatch):
    calls, original = [], common.checkpoint_activations

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(common, "checkpoint_activations", counted)
    flags = ["--data", tiny_data, "--image-size", 32, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0]
    flags += ["--lr", 0.01, "--bn-momentum", 0.1, "--average", 0.5, "--drop-path", 0.5]
    assert call_main("01_train_teacher", *flags, "--out", tmp_path / "kept").returncode == 0 and not calls
    assert (
        call_main("01_train_teacher", *flags, "--out", tmp_path / "computed", "--checkpoint-activations").returncode
        == 0
    )
    assert len(calls) == 6 * 16  # steps x blocks
    assert_same_weights(
        checkpoint_of(tmp_path / "kept" / "model.pt")["model"],
        checkpoint_of(tmp_path / "computed" / "model.pt")["model"],
    )
    assert call_main("01_train_teacher", *flags, "--out", tmp_path / "added", stop_after=3).returncode == 143
    done = call_main("01_train_teacher", *flags, "--out", tmp_path / "added", "--checkpoint-activations")
    assert done.returncode == 0 and "from step 3" in done.stdout and len(calls) == 9 * 16, done
    assert_same_weights(
        checkpoint_of(tmp_path / "kept" / "model.pt")["model"], checkpoint_of(tmp_path / "added" / "model.pt")["model"]
    )


# images that go while it trains


def short_run(stage, data, out, *more):
    """A short run of 01 or 04 in this process: 6 steps, saved at every second; 04 with a teacher on the fly."""
    flags = ["--data", data, "--out", out, *SHORT_RUN, "--arch", CHEAP, "--epochs", 2, "--save-every", 2]
    if stage == "04_train_student":
        flags += ["--teacher", save_model(data.parent / "teacher.pt", data=str(data)), "--ratio", 1]
    return [stage, *flags, *more]


def after_step(monkeypatch, step, act):
    """Call act() when this step of a run is done and before the images of the next are read."""
    end_step = common.Run.end_step

    def end_step_and_act(run):
        end_step(run)
        if run.step == step:
            act()

    monkeypatch.setattr(common.Run, "end_step", end_step_and_act)


@pytest.mark.parametrize("stage", ["01_train_teacher", "04_train_student"])
def test_a_run_whose_labelled_images_are_gone_stops_and_keeps_what_it_has(
    stage, tiny_data, call_main, tmp_path, monkeypatch
):
    data, out, kept = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "t", []

    def lose():
        kept.append((out / "last.pt").read_bytes())
        (data / "train").rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        after_step(patch, 3, lose)
        done = call_main(*short_run(stage, data, out, "--max-bad", 100))
    assert_mistake(done, "none of the images of step 4 is readable", out, data / "train")
    assert (out / "last.pt").read_bytes() == kept[0] and not (out / "model.pt").exists()
    (tmp_path / "elsewhere").rename(data / "train")
    assert "from step 2" in call_main(*short_run(stage, data, out, "--max-bad", 100)).stdout
    assert call_main(*short_run(stage, data, tmp_path / "whole", "--max-bad", 100)).returncode == 0
    assert_same_weights(out / "model.pt", tmp_path / "whole" / "model.pt")
    assert results_of(out) == results_of(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["01_train_teacher", "04_train_student"])
def test_labelled_images_that_go_are_named_and_counted_and_not_forgotten(
    stage, tiny_data, call_main, tmp_path, monkeypatch
):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    image = data / "train" / "disc" / "3.png"
    content = image.read_bytes()

    def lose_one(out, *more, **how):
        image.write_bytes(content)
        with monkeypatch.context() as patch:
            after_step(patch, 3, lambda: image.write_bytes(b"<html>"))
            return call_main(*short_run(stage, data, out, *more), **how)

    done = lose_one(tmp_path / "t", "--max-bad", 5)  # one of 24 is 4.2 percent
    assert done.returncode == 0 and f"unreadable, left out: {image}" in done.stdout, done
    assert "1 images were unreadable" in done.stdout
    counts = [line.get("unreadable", 0) for line in metrics_of(tmp_path / "t") if "loss" in line]
    assert counts[:3] == [0, 0, 0] and counts[-1] == 1 and counts == sorted(counts)

    assert lose_one(tmp_path / "resumed", "--max-bad", 5, stop_after=5).returncode == 143
    assert call_main(*short_run(stage, data, tmp_path / "resumed", "--max-bad", 5)).returncode == 0
    assert results_of(tmp_path / "resumed") == results_of(tmp_path / "t")
    assert checkpoint_of(tmp_path / "resumed" / "last.pt")["training"]["unreadable"]

    done = lose_one(tmp_path / "strict", "--max-bad", 1)
    assert_mistake(done, "1 of 24 labelled images", "--max-bad 1", tmp_path / "strict" / "last.pt")
    assert checkpoint_of(tmp_path / "strict" / "last.pt")["training"]["step"] <= 4


def test_a_resumed_run_does_not_read_all_images_again(tiny_data, call_main, tmp_path, monkeypatch):
    """... and leaves out what was found unreadable at the start, as an uninterrupted one."""
    data, calls, original = shutil.copytree(tiny_data, tmp_path / "data"), [], common.report_bad
    (data / "train" / "disc" / "0.png").write_bytes(b"<html>")

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(common, "report_bad", counted)  # at the end of reading all of them
    flags = short_run("01_train_teacher", data, tmp_path / "t", "--max-bad", 5)
    assert call_main(*flags, stop_after=4).returncode == 143
    assert calls == [1] and checkpoint_of(tmp_path / "t" / "last.pt")["training"]["bad"] == [0]
    assert call_main(*flags).returncode == 0 and calls == [1]
    assert call_main(*flags, "--out", tmp_path / "whole").returncode == 0 and calls == [1, 1]
    assert_same_weights(tmp_path / "t" / "model.pt", tmp_path / "whole" / "model.pt")
    assert results_of(tmp_path / "t") == results_of(tmp_path / "whole")


# a last.pt that is damaged


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_last_checkpoint_is_passed_over_for_the_one_before_it(tiny_data, call_main, tmp_path):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t")
    assert call_main(*flags, "--out", tmp_path / "whole").returncode == 0
    assert call_main(*flags, stop_after=5).returncode == 143
    for damage in (flip_a_byte, cut_off):
        out = shutil.copytree(tmp_path / "t", tmp_path / damage.__name__)
        damage(out / "last.pt")
        done = call_main(*flags, "--out", out)
        assert done.returncode == 0 and f"{out / 'last.pt'} is damaged" in done.stdout, done
        assert f"continuing from {out / 'last.prev.pt'}, step 4" in done.stdout and "from step 4" in done.stdout
        assert_same_weights(out / "model.pt", tmp_path / "whole" / "model.pt")
        assert results_of(out) == results_of(tmp_path / "whole")
    for name in ("last.pt", "last.prev.pt"):
        flip_a_byte(tmp_path / "t" / name)
    before = {path: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    assert_mistake(call_main(*flags), tmp_path / "t", "remove it", "another --out")
    assert {path: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before


# what a run was made from


def test_a_run_is_finished_as_long_as_its_inputs_are_what_they_were(tiny_data, call_main, tmp_path):
    data, init = shutil.copytree(tiny_data, tmp_path / "data"), save_model(tmp_path / "init.pt")
    flags = ["01_train_teacher", "--data", data, "--out", tmp_path / "t", "--epochs", 0]
    assert call_main(*flags, "--init", init).returncode == 0
    before = (tmp_path / "t" / "model.pt").read_bytes()
    other = shutil.copy(init, tmp_path / "other.pt")

    def assert_finished(*words):
        done = call_main(*flags, *words)
        assert done.returncode == 0 and "finished" in done.stdout and not done.stderr, done

    assert_finished("--init", init)
    assert_finished("--init", other)
    save_model(init, seed=1)
    assert_mistake(call_main(*flags, "--init", init), init, "is not what", tmp_path / "t")
    assert_mistake(call_main(*flags), f"--init {init} (now None)")
    init.unlink()
    assert_finished("--init", init)  # cleared away since
    shutil.copy(other, init)
    shutil.copy(data / "val" / "disc" / "0.png", data / "train" / "disc" / "new.png")
    assert_mistake(call_main(*flags, "--init", init), data / "train", "is not what")
    (data / "train" / "disc" / "new.png").unlink()
    assert_finished("--init", init)
    assert (tmp_path / "t" / "model.pt").read_bytes() == before


def test_a_student_is_finished_as_long_as_its_labels_are_what_they_were(tiny_data, call_main, tmp_path):
    """Of a logits file the rows in use count, and no others."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for split in ("train", "val"):
        for old, new in zip(CLASSES, label_files.CLASSES, strict=True):
            (data / split / old).rename(data / split / new)
    names = sorted(str(path.relative_to(data / "unlabeled")) for path in (data / "unlabeled").rglob("*.png"))
    logits = np.random.default_rng(0).normal(size=(20, 3)) * 3
    file = label_files.write_logits(tmp_path / "logits.h5", logits, root=data / "unlabeled", names=names)
    selection = label_files.select(tmp_path / "balanced.h5", {file: [1, 4, 4, 9]})
    flags = ["--pseudo-labels", selection, "--data", data, "--out", tmp_path / "s", "--arch", CHEAP]
    flags = ["04_train_student", *flags, "--image-size", 32, "--batch-size", 8, "--epochs", 0]
    assert call_main(*flags).returncode == 0
    inputs = checkpoint_of(tmp_path / "s" / "model.pt")["inputs"]
    assert set(inputs) == {str(path) for path in (selection, file, data / "train", data / "val")}

    def change(row):
        with h5py.File(file, "r+") as opened:
            opened["confidence"][row] = opened["confidence"][row] / 2

    change(2)
    done = call_main(*flags)
    assert done.returncode == 0 and "finished" in done.stdout, done
    kept = file.read_bytes()
    change(4)
    assert_mistake(call_main(*flags), file, "is not what", tmp_path / "s")
    file.write_bytes(kept)
    assert "finished" in call_main(*flags).stdout
    selection.unlink()
    label_files.select(selection, {file: [1, 4, 9, 9]})
    assert_mistake(call_main(*flags), selection, "is not what", tmp_path / "s")


# two runs on one folder, and signals during an evaluation

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(120)
"""


def test_a_second_run_on_a_folder_waits_and_stops(tiny_data, call_main, tmp_path, monkeypatch):
    out, waits = tmp_path / "t", []
    flags = short_run("01_train_teacher", tiny_data, out)
    assert call_main(*flags, stop_after=2).returncode == 143
    before = {path: path.read_bytes() for path in out.iterdir()}
    with subprocess.Popen([sys.executable, "-c", HOLD, out / ".lock"], stdout=subprocess.PIPE) as holder:
        try:
            monkeypatch.setattr(common, "LOCKS", [])
            monkeypatch.setattr(common.time, "sleep", waits.append)
            assert holder.stdout.readline() == b"locked\n"
            assert_mistake(call_main(*flags), f"another run is writing to {out}", "--out")
            assert 20 < sum(waits) < 120  # seconds
            assert {path: path.read_bytes() for path in before} == before
            monkeypatch.setattr(common, "LOCKS", [])
            monkeypatch.setattr(common.time, "sleep", lambda _: (holder.kill(), holder.wait()))
            assert call_main(*flags).returncode == 0  # the first one has ended meanwhile
        finally:
            holder.kill()


@pytest.mark.parametrize("stage", ["01_train_teacher", "04_train_student", "05_fixres_finetune"])
def test_a_signal_during_an_evaluation_costs_nothing(stage, tiny_data, call_main, tmp_path, monkeypatch):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    flags = short_run(stage, data, tmp_path / "t", "--eval-every", 1)
    if stage == "05_fixres_finetune":
        path = save_model(tmp_path / "teacher.pt", data=str(data))
        flags = [stage, "--checkpoint", path, "--image-size", 40, "--out", tmp_path / "t", "--batch-size", 8]
    whole = tmp_path / "whole"
    assert call_main(*flags, "--out", whole).returncode == 0
    evaluate, in_halves, live = common.Run.evaluate, common.in_halves, []

    def evaluate_watched(run, *args, **kwargs):
        live.append(run)
        return evaluate(run, *args, **kwargs)

    def in_halves_and_signal(*args):
        if live:
            live[-1].stop.received = True
        return in_halves(*args)

    for _ in range(3 if stage != "05_fixres_finetune" else 1):  # the first at step 3, again at its repetition, ...
        live.clear()
        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "evaluate", evaluate_watched)
            patch.setattr(common, "in_halves", in_halves_and_signal)
            assert call_main(*flags).returncode == 143
        assert len(live) == 1 and not (tmp_path / "t" / "model.pt").exists()
    assert call_main(*flags).returncode == 0
    assert_same_weights(tmp_path / "t" / "model.pt", whole / "model.pt")
    assert results_of(tmp_path / "t") == results_of(whole)


# random numbers: every stage and every stream has its own


def test_teacher_and_students_of_one_seed_start_from_different_weights(tiny_data, call_main, tmp_path):
    path = save_model(tmp_path / "label.pt", data=str(tiny_data))
    flags = ["--image-size", 32, "--batch-size", 8, "--epochs", 0, "--arch", CHEAP]
    runs = {"t": ["01_train_teacher", "--data", tiny_data], "s": ["04_train_student", "--teacher", path]}
    runs |= {"again": runs["t"], "t1": [*runs["t"], "--seed", 1], "s1": [*runs["s"], "--seed", 1]}
    weights = {}
    for name, words in runs.items():
        assert call_main(*words, *flags, "--out", tmp_path / name).returncode == 0
        weights[name] = checkpoint_of(tmp_path / name / "model.pt")["model"]
    assert_same_weights(weights["t"], weights.pop("again"))
    layer = next(name for name in weights["t"] if name.endswith(".0.weight") and weights["t"][name].dim() == 4)
    for one, two in itertools.combinations(weights, 2):
        for name in (layer, list(weights["t"])[-2]):
            assert not torch.equal(weights[one][name], weights[two][name]), (one, two, name)


def test_streams_have_orders_crops_and_noise_of_their_own(tiny_data):
    images, crop = common.labeled_images(tiny_data, "train")[0], common.Crop(32, 0.2, True)
    streams = ["teacher labeled", "student labeled", "student unlabeled", "fixres labeled"]
    orders = [common.permutation(24, 0, stream, 0).tolist() for stream in streams]
    views = [common.ImageDataset(images, noised=crop, stream=stream)[1, 5][1][0].tobytes() for stream in streams]
    noise = [torch.randint(2**40, (), generator=common.step_generator(0, name, 3, 0)).item() for name in streams]
    for found in (orders, views, noise):
        assert all(one != two for one, two in itertools.combinations(found, 2))
    # the row of an epoch, the step of a rank: what has a number is not what has the same number elsewhere
    assert common.seed_words(0, "a", 1, 2) != common.seed_words(0, "b", 1, 2)


def test_a_stage_draws_from_its_own_streams(tiny_data, call_main, tmp_path, monkeypatch):
    found, make = {}, common.step_generator
    keys = common.train_keys

    def keys_watched(num, batch_size, seed, stream, *args):
        found[stream] = next(keys(num, batch_size, seed, stream, *args))
        return keys(num, batch_size, seed, stream, *args)

    def make_watched(seed, stream, *args):
        found[f"{stream} noise"] = True
        return make(seed, stream, *args)

    monkeypatch.setattr(common, "train_keys", keys_watched)
    monkeypatch.setattr(common, "step_generator", make_watched)
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for stage in ("01_train_teacher", "04_train_student"):
        assert call_main(*short_run(stage, data, tmp_path / stage, "--epochs", 0.34)).returncode == 0
    streams = ["teacher labeled", "student labeled", "student unlabeled"]
    assert set(found) == {*streams, "teacher noise", "student noise"}
    assert found[streams[0]] != found[streams[1]]


# when it evaluates


def steps_of_evaluations(num_steps, steps_per_epoch, every):
    plan = common.Plan(num_steps / steps_per_epoch, steps_per_epoch, 0.1, "constant")
    return [step for step in range(1, num_steps + 1) if plan.ends_a_period(step, every)]


def test_by_default_it_evaluates_every_epoch_but_not_before_250_steps():
    assert steps_of_evaluations(1000, 0.75, None) == [250, 500, 750, 1000]
    assert steps_of_evaluations(1000, 300, None) == [300, 600, 900]
    assert steps_of_evaluations(9, 3, 1) == [3, 6, 9]
    assert steps_of_evaluations(9, 0.75, 1) == list(range(1, 10))  # as it was asked for
    assert steps_of_evaluations(9, 3, 0) == []


def test_a_small_set_is_evaluated_at_the_end_alone(tiny_data, call_main, tmp_path):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t", "--save-every", 1000)
    assert call_main(*flags).returncode == 0
    assert [line["step"] for line in metrics_of(tmp_path / "t") if "val_top1" in line] == [6]
    assert call_main(*flags, "--eval-every", 0.7, "--out", tmp_path / "e").returncode == 0
    assert [line["step"] for line in metrics_of(tmp_path / "e") if "val_top1" in line] == [3, 5, 6]


# evaluation


class MeanColour(nn.Module):
    """Three classes by the mean colour; no memory for more than `most` images at a time."""

    def __init__(self, most=10**9):
        super().__init__()
        self.most, self.sizes = most, []
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5 * images.mean((2, 3)) * self.scale


def test_too_small_a_memory_changes_no_number_of_an_evaluation(tiny_data):
    images, labels, _ = common.labeled_images(tiny_data, "val")
    view = common.View.default(32)
    expected = common.evaluate(MeanColour(), images, labels, view, ALONE)
    model = MeanColour(most=2)
    assert common.evaluate(model, images, labels, view, ALONE) == pytest.approx(expected)
    assert model.sizes == [12, 6, 3, 2, 1, 3, 2, 1, 6, 3, 2, 1, 3, 2, 1] and expected["val_top1"] > 80
    with pytest.raises(torch.OutOfMemoryError):
        common.evaluate(MeanColour(most=0), images, labels, view, ALONE)


def test_an_evaluation_takes_the_batches_of_stage_02(tiny_data, monkeypatch):
    images, labels, _ = common.labeled_images(tiny_data, "val")
    monkeypatch.setattr(common, "rows_per_batch", lambda size, device: {32: 5, 16: 12}[size])
    for size, sizes in ((32, [5, 5, 2]), (16, [12])):
        model = MeanColour()
        common.evaluate(model, images, labels, common.View.default(size), ALONE)
        assert model.sizes == sizes
    monkeypatch.undo()
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    sizes = (32, 224, 600, 800, 962)
    assert [common.rows_per_batch(size, cpu) for size in sizes] == [512, 8, 1, 1, 1]
    numbers = [common.rows_per_batch(size, gpu) for size in sizes]
    assert numbers == sorted(numbers, reverse=True) and numbers[0] == 1024 and 0 < numbers[-1] <= 32


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_bf16_is_taken_where_the_gpu_has_it_and_does_not_emulate_it(native, expected, monkeypatch):
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    gpu = Processes(torch.device("cuda", 0), 0, 1, 0)
    assert common.precision_of("auto", gpu) == expected and asked == [False]
    assert common.precision_of("bf16", gpu) == "bf16" and common.precision_of("auto", ALONE) == "fp32"


def test_a_run_goes_on_in_the_precision_it_was_begun_with(tiny_data, call_main, tmp_path, monkeypatch):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t")
    assert call_main(*flags, stop_after=3).returncode == 143
    assert checkpoint_of(tmp_path / "t" / "last.pt")["training"]["precision"] == "fp32"
    monkeypatch.setattr(common, "precision_of", lambda *_: "bf16")  # as if on another machine
    assert "fp32 on 1 x cpu" in call_main(*flags).stdout


# what a model cannot do, and what it has not


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arch", "vit_b_16", "--image-size", 32, "--batch-size", 8], ["--image-size 32"]),
        (["--arch", "resnet18", "--image-size", 32, "--batch-size", 1], ["--batch-size", "32 px"]),
        (["--arch", "efficientnet_b0", "--image-size", 32, "--batch-size", 4, "--accumulate", 4], ["--batch-size"]),
    ],
)
def test_what_a_model_cannot_take_is_one_line(flags, words, tiny_data, call_main, tmp_path):
    flags = ["--data", tiny_data, "--out", tmp_path / "t", *flags, "--epochs", 1]
    assert_mistake(call_main("01_train_teacher", *flags), *words)
    assert not list(tmp_path.glob("t/*.pt"))


def test_one_image_at_64_pixels_is_enough_for_a_batch_norm(tiny_data, call_main, tmp_path):
    flags = ["--data", tiny_data, "--out", tmp_path / "t", "--arch", "resnet18", "--image-size", 64, "--batch-size", 1]
    assert call_main("01_train_teacher", *flags, "--epochs", 0.05).returncode == 0
    flags = ["--data", tiny_data, "--out", tmp_path / "s", "--arch", "squeezenet1_1", "--image-size", 32]
    assert call_main("01_train_teacher", *flags, "--batch-size", 1, "--epochs", 0.05).returncode == 0  # has none


def test_dropout_that_a_model_lacks_is_left_out_and_said(tiny_data, call_main, tmp_path):
    flags = ["01_train_teacher", "--data", tiny_data, "--image-size", 32, "--batch-size", 8, "--epochs", 0]
    done = call_main(*flags, "--arch", "shufflenet_v2_x0_5", "--zero-init-residual", "--out", tmp_path / "z")
    assert "shufflenet_v2_x0_5 has no --zero-init-residual: it is left out" in done.stdout, "run.sh's recipe has it"
    done = call_main(*flags, "--arch", "resnet18", "--dropout", 0.3, "--drop-path", 0.1, "--out", tmp_path / "r")
    assert done.returncode == 0 and "no model noise" in done.stdout, done
    assert "resnet18 has no --dropout: it is left out" in done.stdout
    assert "resnet18 has no --drop-path: it is left out" in done.stdout
    options = checkpoint_of(tmp_path / "r" / "model.pt")["arch_options"]
    assert options["dropout"] is None and options["drop_path"] is None
    done = call_main(*flags, "--arch", "squeezenet1_1", "--dropout", 0.3, "--out", tmp_path / "s")
    assert done.returncode == 0 and "dropout 0.3" in done.stdout and "left out" not in done.stdout, done
    done = call_main(*flags, "--dropout", 0.4, "--drop-path", 0.2, "--out", tmp_path / "e")
    assert "dropout 0.4, stochastic depth 0." in done.stdout and "left out" not in done.stdout


def test_the_curves_of_a_run_without_training_are_drawn_without_a_warning(tmp_path):
    lines = [{"step": 0, "epoch": 0.0, "val_loss": 1.1, "val_top1": 33.0, "val_top5": 100.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings(action="error"):
        common.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_bad_val_image_is_left_out_and_named(tiny_data, capsys, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "val" / "disc" / "0.png").write_bytes(b"<html>")
    images, labels, _ = common.labeled_images(data, "val")
    common.evaluate(MeanColour(), images, labels, common.View.default(32), ALONE)
    printed = capsys.readouterr().out
    assert printed.startswith("1 val images are unreadable") and str(data / "val" / "disc" / "0.png") in printed


# a disk that fills up, and a process that is lost


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tiny_data, run_stage, call_main, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk."""
    monkeypatch.setattr(common, "LOCKS", [])
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t", "--save-every", 2)
    assert call_main(*flags, stop_after=4).returncode == 143
    common.LOCKS.pop().close()  # as when the process has ended
    before = (tmp_path / "t" / "last.pt").read_bytes()
    done = run_stage("01_train_teacher.py", *flags[1:], check=False, file_size=len(before) // 2)
    assert_mistake(done, tmp_path / "t" / "last.pt", "cannot be written")
    assert (tmp_path / "t" / "last.pt").read_bytes() == before
    assert not [path for path in (tmp_path / "t").iterdir() if path.name.startswith(".last")], "its own file is left"
    assert call_main(*flags).returncode == 0
    assert call_main(*flags, "--out", tmp_path / "whole").returncode == 0
    assert_same_weights(tmp_path / "t" / "model.pt", tmp_path / "whole" / "model.pt")


# averages, plateaus and patience


def test_swa_keeps_the_mean_of_the_second_half_with_its_own_batch_norms(tiny_data, call_main, tmp_path, monkeypatch):
    """Every 10 steps of the second half of 63: those after 41, 51 and 61. Until then the model itself is evaluated."""
    after, models = {}, []
    end_step = common.Run.end_step

    def end_step_watched(run):
        end_step(run)
        after[run.step] = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    evaluate = common.evaluate
    monkeypatch.setattr(
        common, "evaluate", lambda model, *rest: models.append(copy.deepcopy(model)) or evaluate(model, *rest)
    )
    monkeypatch.setattr(common.Run, "end_step", end_step_watched)
    flags = ["--data", tiny_data, *SHORT_RUN, "--arch", CHEAP, "--average", "swa", "--epochs", 21, "--eval-every", 8]
    assert call_main("01_train_teacher", *flags, "--out", tmp_path / "t").returncode == 0
    saved = checkpoint_of(tmp_path / "t" / "model.pt")["model"]
    for name in after[61]:
        expected = torch.stack([after[step][name] for step in (41, 51, 61)]).mean(0)
        torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-6)
    assert len(models) == 3 and all(torch.equal(p, after[24][name]) for name, p in models[0].named_parameters())
    counters = [int(tensor) for name, tensor in saved.items() if name.endswith("num_batches_tracked")]
    assert set(counters) == {63}, "batch norms of one batch for each planned step, at most 100"
    first, last = (dict(model.named_buffers()) for model in models[::2])
    name = next(name for name in first if name.endswith("running_var"))
    assert torch.equal(last[name], saved[name])
    # the same weights seen through the model's own running statistics are another function
    assert not torch.allclose(first[name], last[name], rtol=1e-3)


PLATEAU = ["--schedule", "plateau", "--patience", 4, "--average", "swa", "--eval-every", 1, "--epochs", 20]
PLATEAU += ["--save-every", 1000]


@pytest.mark.parametrize("stage", ["01_train_teacher", "04_train_student"])
def test_plateau_and_patience_of_a_run_that_is_stopped(stage, tiny_data, call_main, tmp_path, monkeypatch):
    """The rate falls after 3 evaluations without improvement, the run ends after 4, and model.pt is the best state:
    bitwise so where it was interrupted at any moment. 01 watches the loss, 04 the accuracy."""
    losses = [1.5, 1.2, 1.3, 1.3, 1.3, 1.1, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4]
    evaluate = common.evaluate

    def evaluate_as_told(model, images, labels, view, processes, precision="fp32", stop=None):
        if (metrics := evaluate(model, images, labels, view, processes, precision, stop)) is None:
            return None
        step = runs[-1].step
        loss = losses[step // 3 - 1]
        return metrics | {"val_loss": loss, "val_top1": 100 * (2 - loss)} | {"val_top5": float(step)}

    runs, init = [], common.Run.__init__
    monkeypatch.setattr(common, "evaluate", evaluate_as_told)
    monkeypatch.setattr(common.Run, "__init__", lambda run, *args: runs.append(run) or init(run, *args))
    kept = {}
    judge = common.Run.judge

    def judge_watched(run, metrics):
        judge(run, metrics)
        kept[run.step] = {name: tensor.clone() for name, tensor in run.averaged.state_dict().items()}

    monkeypatch.setattr(common.Run, "judge", judge_watched)
    whole = short_run(stage, tiny_data, tmp_path / "whole", *PLATEAU, "--lr", 0.001, "--warmup-epochs", 0)
    done = call_main(*whole)
    assert done.returncode == 0 and "of step 18" in done.stdout, done
    lines = metrics_of(tmp_path / "whole")
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(3, 31, 3))  # 6 is best, 10 the end
    factor = 0.1 if stage == "01_train_teacher" else 0.5
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert rates[15] == pytest.approx(0.001) and rates[18] == pytest.approx(0.001 * factor)
    assert rates[30] == pytest.approx(0.001 * factor**2)
    saved = checkpoint_of(tmp_path / "whole" / "model.pt")
    assert saved["metrics"]["step"] == 18 and saved["metrics"]["val_loss"] == 1.1
    assert_same_weights(saved["model"], kept[18])

    words = short_run(stage, tiny_data, tmp_path / "cut", *PLATEAU, "--lr", 0.001, "--warmup-epochs", 0)
    for step in (14, 16, 29):
        assert call_main(*words, stop_after=step).returncode == 143
    done = call_main(*words)
    assert done.returncode == 0 and "from step 29" in done.stdout, done
    assert_same_weights(tmp_path / "cut" / "model.pt", tmp_path / "whole" / "model.pt")
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
    assert "is finished" in call_main(*words).stdout


def test_a_lost_process_is_restarted_by_torchrun(tiny_data, run_stage, start_stage, tmp_path):
    """`torchrun --max-restarts 2`: all processes start again from last.pt, and the end is as if nothing had been."""
    flags = [*flags_of_a_run("01_train_teacher.py", tmp_path / "t", tiny_data), "--epochs", 10]
    run_stage(*flags, "--out", tmp_path / "whole", nproc=2)
    process = start_stage(ROOT / flags[0], *flags[1:], nproc=2, launcher="torchrun", TORCHRUN="--max-restarts=2")
    out = tmp_path / "t"
    process.wait_until(lambda: (out / "last.pt").exists() and metrics_of(out)[-1]["step"] > 2)
    workers = [pid for pid in descendants(process.pids[0]) if pid != process.pids[0]]
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait(120) == 0, process
    assert "from step 0" in process.stdout and process.stdout.count("from step") == 2, process
    assert_same_weights(out / "model.pt", tmp_path / "whole" / "model.pt")
    assert results_of(out) == results_of(tmp_path / "whole")
