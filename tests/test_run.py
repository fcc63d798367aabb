"""The training run, which 01, 04 and 05 share: it goes on where it was killed, stops when told, refuses other flags and
other inputs, keeps nothing of a run that diverged; one process = two, a step in parts = a whole one."""

import copy
import json
import shutil
import signal
import warnings
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import CHEAP, ROOT, SHORT_RUN, assert_mistake, assert_same_weights, checkpoint_of, clean_batch
from conftest import metrics_of, results_of, save_model, watch
from label_files import change
from torch import nn

import common

ALONE = common.Processes(torch.device("cpu"), 0, 1, 0)
TRAININGS = ["01_train_teacher", "04_train_student", "05_fixres_finetune"]


def short_run(stage, data, out, *more):
    """The command of a short run: 6 steps, saved at every second; 04 with a teacher on the fly."""
    flags = [stage, "--data", data, "--out", out, "--epochs", 2, "--save-every", 2]
    teacher = out.parent / "teacher.pt"
    if stage != "01_train_teacher" and not teacher.exists():
        save_model(teacher, data=str(data))
    if stage == "05_fixres_finetune":
        return [*flags, "--checkpoint", teacher, "--image-size", 40, "--batch-size", 8, "--lr", 1e-2, *more]
    if stage == "04_train_student":
        flags += ["--teacher", teacher, "--ratio", 1]
    return [*flags, *SHORT_RUN, "--arch", CHEAP, *more]


def assert_same_runs(a, b):
    assert_same_weights(a / "model.pt", b / "model.pt")
    assert results_of(a) == results_of(b)


# continuing

KILLED = """
import os, runpy, sys
import common
common.rows_per_batch = lambda *_: 4  # each process evaluates some
number, step, rank = map(int, os.environ["KILL"].split())
end_step = common.Run.end_step
def end_step_killed(run):
    if run.step == step and run.processes.rank >= rank:
        os.kill(os.getpid(), number)
    end_step(run)
common.Run.end_step = end_step_killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("stage", "nproc", "more"),
    [
        ("01_train_teacher", 1, ["--average", "swa", "--schedule", "plateau", "--patience", 20, "--eval-every", 1]),
        ("04_train_student", 1, ["--eval-every", 1, "--workers", 1]),
        ("04_train_student", 2, ["--eval-every", 1]),
        ("05_fixres_finetune", 1, ["--optimizer", "rmsprop"]),
    ],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(stage, nproc, more, tiny_data, run_stage, tmp_path, labels):
    """kill -9 in step 6, then a SIGTERM in step 8, of the last process alone: all end with 143 after step 9."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    flags = short_run(stage, tiny_data, out, "--steps", 11, *more)
    if stage == "04_train_student":
        flags += ["--pseudo-labels", labels, "--ratio", 2]
    flags[0] = ROOT / f"{stage}.py"
    how = {"nproc": nproc, "WITHOUT": "matplotlib", "PYTHONPATH": ROOT}
    run_stage("-c", KILLED, *flags, "--out", whole, KILL="9 99 0", **how)
    assert run_stage("-c", KILLED, *flags, KILL="9 5 0", check=False, **how).returncode not in (0, 143)
    assert checkpoint_of(out / "last.pt")["training"]["step"] == 4 and metrics_of(out)[-1]["step"] == 5
    done = run_stage("-c", KILLED, *flags, KILL=f"15 7 {nproc - 1}", check=False, **how)
    assert done.returncode == 143 and "from step 4" in done.stdout, done
    assert checkpoint_of(out / "last.pt")["training"]["step"] == metrics_of(out)[-1]["step"] == 9
    assert "from step 9" in run_stage("-c", KILLED, *flags, KILL="9 99 0", **how).stdout
    assert_same_runs(out, whole)
    assert metrics_of(out)[-1]["step"] == 11 and "val_top1" in checkpoint_of(out / "model.pt")["metrics"]


def test_a_signal_during_the_last_evaluation_ends_a_finished_run(tiny_data, call_main, tmp_path, monkeypatch):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t")
    with monkeypatch.context() as patch:  # receive: what the handler does
        watch(patch, common.Run, "evaluate_average", lambda run: run.stop.receive(signal.SIGTERM, None))
        assert call_main(*flags).returncode == 143
    assert "is finished" in call_main(*flags).stdout


def test_a_finished_run_says_so_as_long_as_its_inputs_are_what_they_were(tiny_data, call_main, tmp_path):
    """Or are gone: cleared away since."""
    data, init = shutil.copytree(tiny_data, tmp_path / "data"), save_model(tmp_path / "init.pt")
    out, same = tmp_path / "t", shutil.copy(init, tmp_path / "same.pt")
    flags = short_run("04_train_student", data, out, "--epochs", 0.3)
    out.mkdir()
    (out / "best.pt").write_text("not of this run")
    assert call_main(*flags, "--init", init).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}

    def assert_finished(*more):
        done = call_main(*flags, *more)
        assert done.returncode == 0 and "is finished" in done.stdout and not done.stderr, done

    assert_finished("--init", init, "--workers", 1, "--save-every", 7)
    assert_finished("--init", same)  # the same content
    assert_mistake(call_main(*flags), "--init")
    assert_mistake(call_main(*flags, "--init", init, "--label-smoothing", 0.2), "--label-smoothing 0.1", "0.2")
    save_model(init, seed=1)
    assert_mistake(call_main(*flags, "--init", init), "--init", out)
    init.unlink()
    assert_finished("--init", init)
    shutil.copy(same, init)
    for folder in ("unlabeled", "val", "train"):
        shutil.rmtree(data / folder)
        assert_finished("--init", init)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_run_does_not_go_on_with_other_flags_or_inputs(stage, tiny_data, call_main, tmp_path):
    data, out = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "t"
    flags = short_run(stage, data, out)
    assert call_main(*flags, stop_after=2).returncode == 143
    before = (out / "last.pt").read_bytes()
    assert_mistake(call_main(*flags, "--weight-decay", 0.2, "--seed", 7), "--seed 0", "--weight-decay None", "0.2", out)
    assert_mistake(call_main(*flags, "--steps", 6), "--epochs", out)
    roles = {"train": "train/disc/new.png", "val": "val/disc/new.png"}
    if stage == "04_train_student":
        roles["unlabeled"] = "unlabeled/new.png"
        assert_mistake(call_main(*flags, "--init", tmp_path / "teacher.pt"), "--init None", out)
    for role, name in roles.items():
        shutil.copy(data / "train" / "disc" / "0.png", data / name)
        assert_mistake(call_main(*flags), role, out)
        (data / name).unlink()
    if stage != "01_train_teacher":
        save_model(tmp_path / "teacher.pt", data=str(data), seed=1)
        assert_mistake(call_main(*flags), "--teacher" if stage == "04_train_student" else "--checkpoint", out)
        save_model(tmp_path / "teacher.pt", data=str(data))
    assert (out / "last.pt").read_bytes() == before
    assert "from step 2" in call_main(*flags).stdout


def test_of_a_label_file_everything_but_the_logits_counts(labels, tiny_data, call_main, tmp_path):
    out = tmp_path / "s"
    flags = ["04_train_student", "--pseudo-labels", labels, "--data", tiny_data, "--out", out, "--epochs", 0]
    assert call_main(*flags).returncode == 0
    with h5py.File(labels, "r+") as file:
        file["logits"][:] = file["logits"][:] * 1.001
    assert "is finished" in call_main(*flags).stdout
    change(labels, copies={4: 3})
    assert_mistake(call_main(*flags), "--pseudo-labels", out)


def test_what_another_program_left_is_one_line(tiny_data, call_main, tmp_path):
    for name, content in (("model.pt", {"conv.weight": torch.zeros(1)}), ("last.pt", {"epoch": 3}), ("last.pt", [1])):
        out = tmp_path / f"{name} {type(content).__name__}"
        out.mkdir()
        torch.save(content, out / name)
        assert_mistake(call_main(*short_run("01_train_teacher", tiny_data, out)), out / name)


def test_a_second_run_on_a_folder_stops_at_once(tiny_data, start_stage, call_main, tmp_path):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t", "--steps", 300)
    first = start_stage("01_train_teacher.py", *flags[1:])
    first.wait_until((tmp_path / "t" / "metrics.jsonl").exists)
    assert_mistake(call_main(*flags), tmp_path / "t")
    first.kill()


def test_a_diverged_run_ends_with_3_and_saves_nothing_of_it(tiny_data, call_main, tmp_path):
    """In its loss, in weights that swa does not average yet, and in the loss of an evaluation."""
    flags = ["--optimizer", "sgd", "--warmup-epochs", 0, "--schedule", "constant", "--save-every", 1]
    cases = {"loss": [1e30, "--eval-every", 0], "swa": [1e38, "--average", "swa", "--eval-every", 0]}
    cases["evaluation"] = [1e30, "--eval-every", 0.3]
    for name, more in cases.items():
        out = tmp_path / name
        done = call_main(*short_run("01_train_teacher", tiny_data, out, *flags, "--lr", *more))
        assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and str(out) in done.stderr, done
        assert not (out / "model.pt").exists()
        if (out / "last.pt").exists():
            weights = checkpoint_of(out / "last.pt")["training"]["model"].values()
            assert all(torch.isfinite(tensor).all() for tensor in weights)
        metrics = out / "metrics.jsonl"
        assert not metrics.exists() or not {"NaN", "Infinity"} & set(metrics.read_text().replace(",", " ").split())


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tiny_data, run_stage, call_main, tmp_path):
    """A limit on the size of files stands in for the disk."""
    out = tmp_path / "t"
    flags = short_run("01_train_teacher", tiny_data, out)
    assert call_main(*flags, stop_after=4).returncode == 143
    before = (out / "last.pt").read_bytes()
    done = run_stage("01_train_teacher.py", *flags[1:], check=False, file_size=len(before) // 2)
    assert_mistake(done, out / "last.pt")
    assert (out / "last.pt").read_bytes() == before
    assert not [path for path in out.iterdir() if path.name.startswith(".last")], "its own file is left"


# random numbers


def test_every_stage_and_every_stream_has_its_own_random_numbers(tiny_data, call_main, tmp_path, monkeypatch):
    """And all of them are others for another seed, and another name of a seed."""
    drawn, seed_words = {}, common.seed_words

    def note(seed, stream, *numbers):
        drawn.setdefault((seed, stream), set()).add(tuple(seed_words(seed, stream, *numbers)))

    watch(monkeypatch, common, "seed_words", note)
    both = {"weights", "noise", "labeled order", "labeled crop"}
    streams = {f"teacher {name}" for name in both}
    streams |= {f"student {name}" for name in both | {"unlabeled order", "unlabeled crop"}}
    for seed in ("0", "1", "0:student1"):
        for stage in TRAININGS[:2]:
            flags = short_run(stage, tiny_data, tmp_path / stage / seed, "--steps", 2, "--seed", seed)
            assert call_main(*flags).returncode == 0
        assert {stream for of_seed, stream in drawn if of_seed == seed} == streams
        assert {words[-2:] for words in drawn[seed, "student noise"]} == {(0, 0), (1, 0)}  # step, rank
    words = [word for words in drawn.values() for word in words]
    assert len(set(words)) == len(words)


# several processes, a step in parts

SQUEEZED = ["--arch", "squeezenet1_1", "--dropout", 0, "--image-size", 32, "--batch-size", 8, "--epochs", 2]
SQUEEZED += ["--warmup-epochs", 0, "--lr", 0.002, "--optimizer", "sgd", "--schedule", "constant", "--average", 0.5]
SQUEEZED += ["--num-ops", 0, "--no-hflip", "--seed", 2]  # 0 and 1 end at once: a ReLU is its last layer


@pytest.mark.parametrize("stage", TRAININGS[:2])
def test_two_processes_and_parts_of_a_step_learn_as_one(stage, tiny_data, run_stage, call_main, tmp_path):
    """With unreadable images, so that parts differ in size, each counted and said once; no batch norm, no noise.
    `two` is begun by one process."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for name in ("unlabeled/broken.png", "train/disc/0.png", "val/disc/0.png", "val/disc/1.png"):
        (data / name).write_text(f"<html>{name}")
    flags = ["--data", data, *SQUEEZED, "--eval-every", 1]
    if stage == "04_train_student":
        flags += ["--teacher", save_model(tmp_path / "teacher.pt", "squeezenet1_1"), "--ratio", 2]
    assert call_main(stage, *flags, "--out", tmp_path / "two", stop_after=3).returncode == 143
    runs = {"start": (1, ["--lr", 0]), "one": (1, []), "two": (2, []), "two in parts": (2, ["--accumulate", 2])}
    num_bad = 2 if stage == "04_train_student" else 1
    for name, (nproc, more) in runs.items():
        how = {"nproc": nproc, "WITHOUT": "matplotlib"}
        printed = run_stage(f"{stage}.py", *flags, *more, "--out", tmp_path / name, **how).stdout
        assert printed.count("2 val images are unreadable") == (1 if name == "two" else 2)  # evaluations
        assert printed.count("unreadable, left out") == (0 if name == "two" else num_bad)
    start, alone = (checkpoint_of(tmp_path / name / "model.pt")["model"] for name in ("start", "one"))
    lines = metrics_of(tmp_path / "one")
    assert lines[5]["unreadable"] == num_bad
    assert len({round(line["loss"], 3) for line in lines[:6]}) == 6, "it does not learn"
    for name in ("two", "two in parts"):
        weights = checkpoint_of(tmp_path / name / "model.pt")["model"]
        assert any(not torch.equal(alone[key], weights[key]) for key in alone), "they were the same steps"
        for key in start:
            assert (weights[key] - alone[key]).norm() < 0.05 * (alone[key] - start[key]).norm(), key
        for line, expected in zip(metrics_of(tmp_path / name), lines, strict=True):
            assert line.keys() == expected.keys() and line.get("unreadable") == expected.get("unreadable")
            for key in line.keys() & {"loss", "loss_labeled", "loss_unlabeled", "val_loss", "val_top1"}:
                assert line[key] == pytest.approx(expected[key], rel=1e-3), (name, key)


def test_what_cannot_be_split_evenly_is_named(tiny_data, call_main, tmp_path):
    for stage in TRAININGS:
        assert_mistake(call_main(*short_run(stage, tiny_data, tmp_path / "t", "--accumulate", 3)), "--batch-size 8")
    flags = short_run("04_train_student", tiny_data, tmp_path / "t", "--accumulate", 2)
    assert_mistake(call_main(*flags, "--ratio", 0.625), "--ratio")
    assert not list(tmp_path.glob("t/*.pt"))


# unreadable images


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_run_whose_labelled_images_are_gone_stops_and_keeps_what_it_has(
    stage, tiny_data, call_main, tmp_path, monkeypatch
):
    data, out, end_step = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "t", common.Run.end_step
    kept = []

    def end_step_and_lose_images(run):
        end_step(run)
        if run.step == 3:
            kept.append((out / "last.pt").read_bytes())
            (data / "train").rename(tmp_path / "elsewhere")

    flags = short_run(stage, data, out)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_step", end_step_and_lose_images)
        assert_mistake(call_main(*flags), "step 4", out)
    assert (out / "last.pt").read_bytes() == kept[0] and not (out / "model.pt").exists()
    (tmp_path / "elsewhere").rename(data / "train")
    assert "from step 2" in call_main(*flags).stdout


def test_one_image_alone_trains_where_the_last_maps_have_one_pixel(tiny_data, call_main, tmp_path):
    flags = ["--arch", "efficientnet_b0", "--image-size", 32, "--batch-size", 1, "--steps", 2]
    assert call_main("01_train_teacher", "--data", tiny_data, "--out", tmp_path, *flags).returncode == 0
    sizes = []
    run = SimpleNamespace(view=common.View.default(32), ddp_model=lambda images: sizes.append(len(images)) or images)
    assert len(common.Run.forward(run, torch.zeros(1, 3, 32, 32))) == 1 and sizes == [2]  # in a 2nd call DDP would wait


def test_an_unreadable_image_is_counted_by_the_run_that_goes_on_too(tiny_data, call_main, tmp_path):
    data, out = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "t"
    (data / "train" / "disc" / "3.png").write_bytes(b"<html>")
    flags = short_run("01_train_teacher", data, out, "--steps", 9)
    assert call_main(*flags, stop_after=8).returncode == 143
    shutil.copy(tiny_data / "train" / "disc" / "3.png", data / "train" / "disc")
    assert call_main(*flags).returncode == 0
    assert metrics_of(out)[8]["unreadable"] == 1


# averages, plateaus and patience


def test_swa_keeps_its_mean_with_batch_norms_of_its_own(tiny_data, call_main, tmp_path, monkeypatch):
    """Of 26 steps the weights after the 23rd. The norms are those of the clean labelled images, and bitwise the same
    where the run was stopped before its last evaluation, with stochastic depth too."""
    monkeypatch.setitem(common.EFFICIENTNETS, "efficientnet_b0", (0.2, 1.0, 224, 0.2))  # a toy of it
    after, end_step = {}, common.Run.end_step

    def end_step_watched(run):
        end_step(run)
        after[run.step] = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    monkeypatch.setattr(common.Run, "end_step", end_step_watched)
    out, cut = tmp_path / "t", tmp_path / "cut"
    flags = ["01_train_teacher", "--data", tiny_data, *SHORT_RUN, "--average", "swa", "--steps", 26, "--eval-every", 0]
    flags += ["--drop-path", 0.5, "--dropout", 0.5]
    assert call_main(*flags, "--out", out).returncode == 0
    saved = checkpoint_of(out / "model.pt")["model"]
    assert_same_weights(after[23], {name: saved[name] for name in after[23]})

    model, checkpoint = common.load_model(out / "model.pt")
    images, view = common.labeled_images(tiny_data, "train")[0], common.View.of(checkpoint)
    norm, inputs = model.features[0][1], []
    norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0]))
    with torch.no_grad():
        model(clean_batch(images, view))
    torch.testing.assert_close(norm.running_mean, inputs[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, inputs[0].var((0, 2, 3)), rtol=1e-3, atol=1e-4)

    for step in (13, 26):  # dropout goes on as it would have
        assert call_main(*flags, "--out", cut, stop_after=step).returncode == 143
    for _ in range(2):  # and where it was killed between the last line and model.pt
        assert not (cut / "model.pt").exists() and metrics_of(cut)[-1]["step"] == 26
        assert call_main(*flags, "--out", cut).returncode == 0
        assert_same_runs(out, cut)
        (cut / "model.pt").unlink()


def test_all_processes_take_swas_norms_from_the_same_batches_of_all_classes(tiny_data, monkeypatch):
    batches_seen = []

    def recompute_norms(model, batches):
        batches_seen.extend(batches)
        raise SystemExit  # before the evaluation, which needs the other process

    monkeypatch.setattr(common, "recompute_norms", recompute_norms)
    images = common.labeled_images(tiny_data, "train")[0][np.repeat(range(24), 6)]
    run = {"average": "swa", "step": 1, "train": images, "view": common.View.default(32), "averaged": None}
    for rank in range(2):
        with pytest.raises(SystemExit):
            common.Run.evaluate_average(SimpleNamespace(**run, processes=ALONE._replace(rank=rank, world_size=2)))
    assert list(map(len, batches_seen)) == 2 * [64, 64, 16]
    assert all(map(torch.equal, batches_seen[:3], batches_seen[3:]))
    assert len(batches_seen[0].flatten(1).unique(dim=0)) > 18  # 11 in the order of the listing, by class


def test_batch_norms_still_move_after_an_evaluation(tiny_data, call_main, tmp_path):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "often", "--average", 0)
    for name, every in (("often", 1 / 3), ("never", 0)):
        assert call_main(*flags, "--out", tmp_path / name, "--eval-every", every).returncode == 0
    assert_same_weights(tmp_path / "often" / "model.pt", tmp_path / "never" / "model.pt")


@pytest.mark.parametrize("stage", TRAININGS[:2])
def test_plateau_and_patience_of_a_run_that_is_stopped(stage, tiny_data, call_main, tmp_path, monkeypatch):
    """The rate falls after 3 evaluations without improvement, the run ends after 4, and model.pt is the best state:
    bitwise so where it was interrupted at any moment. 01 watches the loss, 04 the accuracy."""
    losses = [1.5, 1.2, 1.3, 1.3, 1.3, 1.1, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4]  # after each step
    evaluate_average, kept = common.Run.evaluate_average, {}

    def evaluate_as_told(run):
        loss = losses[run.step - 1]
        metrics = {"val_loss": loss, "val_top1": float(run.step), "val_top5": 100.0}
        if stage == "04_train_student":
            metrics |= {"val_loss": float(run.step), "val_top1": 100 * (2 - loss)}
        kept[run.step] = copy.deepcopy(run.averaged.state_dict())
        monkeypatch.setattr(common, "evaluate", lambda *args: metrics)
        return evaluate_average(run)

    monkeypatch.setattr(common.Run, "evaluate_average", evaluate_as_told)
    flags = short_run(stage, tiny_data, tmp_path / "whole", "--schedule", "plateau", "--patience", 4, "--lr", 0.001)
    flags += ["--eval-every", 1 / 3, "--epochs", 20, "--warmup-epochs", 0, "--save-every", 1000]
    assert call_main(*flags).returncode == 0
    lines = metrics_of(tmp_path / "whole")
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(1, 11))  # 6 is best, 10 the end
    factor = 0.1 if stage == "01_train_teacher" else 0.5
    rates = [line["lr"] / 0.001 for line in lines]
    assert rates == pytest.approx([1] * 5 + [factor] * 4 + [factor**2])
    saved = checkpoint_of(tmp_path / "whole" / "model.pt")
    assert saved["metrics"]["step"] == 6 and "training" not in saved
    assert_same_weights(saved["model"], kept[6])
    assert not (tmp_path / "whole" / "best.pt").exists()

    flags += ["--out", tmp_path / "cut"]
    for step in (7, 9):
        assert call_main(*flags, stop_after=step).returncode == 143
    assert call_main(*flags).returncode == 0
    assert_same_runs(tmp_path / "cut", tmp_path / "whole")
    assert "is finished" in call_main(*flags).stdout


# when it evaluates, and how


def test_it_evaluates_every_epoch_but_not_before_250_steps(tiny_data, call_main, tmp_path):
    flags = short_run("01_train_teacher", tiny_data, tmp_path / "t")
    for name, more, steps in (("t", [], [6]), ("e", ["--eval-every", 0.7], [3, 5, 6])):
        assert call_main(*flags, *more, "--out", tmp_path / name).returncode == 0
        assert [line["step"] for line in metrics_of(tmp_path / name) if "val_top1" in line] == steps


class MeanColour(nn.Module):
    """Three classes by the mean colour; no memory for more than `most` images at a time."""

    def __init__(self, most=10**9):
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5 * images.mean((2, 3))


def test_an_evaluation_is_of_each_readable_image_once(tiny_data, capsys, tmp_path, monkeypatch, mistake):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "val" / "square" / "0.png").write_bytes(b"<html>")
    images, labels, _ = common.labeled_images(data, "val")
    view = common.View.default(32)
    monkeypatch.setattr(common, "rows_per_batch", lambda size, device: 6)
    few = MeanColour(most=2)
    metrics = common.evaluate(few, images, labels, view, ALONE, "fp32")
    assert capsys.readouterr().out.startswith("1 val images are unreadable")
    assert few.sizes == [5, 3, 2, 1, 2, 6, 3, 2, 1, 3, 2, 1]
    good = [row for row in range(12) if images.name(row) != str(data / "val" / "square" / "0.png")]
    logits = MeanColour()(clean_batch(images[good], view))
    targets = torch.from_numpy(labels[good])
    right = 100 * (logits.argmax(1) == targets).float().mean().item()
    loss = nn.functional.cross_entropy(logits, targets).item()
    assert metrics == {"val_loss": pytest.approx(loss), "val_top1": pytest.approx(right), "val_top5": 100}
    with pytest.raises(torch.OutOfMemoryError):
        common.evaluate(MeanColour(most=0), images, labels, view, ALONE, "fp32")
    for path in data.glob("val/*/*.png"):
        path.write_bytes(b"<html>")
    mistake(lambda: common.evaluate(MeanColour(), images, labels, view, ALONE, "fp32"), "val")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_bf16_is_taken_where_the_gpu_has_it_and_does_not_emulate_it(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    gpu = torch.device("cuda", 0)
    assert common.precision_of("auto", gpu) == expected and common.precision_of("bf16", gpu) == "bf16"
    assert common.precision_of("auto", ALONE.device) == "fp32"


def test_the_curves_of_a_run_without_training_are_drawn_without_a_warning(tmp_path):
    line = {"step": 0, "epoch": 0.0, "val_loss": 1.1, "val_top1": 33.0, "val_top5": 100.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with warnings.catch_warnings(action="error"):
        common.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5000
