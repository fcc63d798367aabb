"""The training run, which 01, 04 and 05 share: it continues where it was killed, stops when told, refuses other flags
and other images, leaves nothing of a run that diverged; a step in parts, activations computed again, processes."""

import shutil
import signal

import pytest
import torch
from conftest import CHEAP, ROOT, SHORT_RUN, assert_mistake, assert_same_weights, checkpoint_of, metrics_of, save_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import common
from common import Processes, build_model, micro_batches, parallel, step_generator

ALONE = Processes(torch.device("cpu"), 0, 0, 1)


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
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    lines = metrics_of(out)
    assert {"step", "epoch", "lr", "loss"} <= lines[0].keys() and lines[-1]["step"] == 12
    assert checkpoint_of(out / "model.pt")["stage"] == ("student" if "04" in stage else "fixres")
    assert {"loss_labeled", "loss_unlabeled"} <= lines[0].keys() or "05" in stage


def test_sigterm_saves_and_the_run_goes_on_from_there(tiny_data, run_stage, start_stage, tmp_path):
    """With a plain Python: the exit status is that of the process."""
    flags = flags_of_a_run("01_train_teacher.py", tmp_path / "t", tiny_data)
    flags += ["--epochs", 8, "--eval-every", 0, "--save-every", 1000]
    process = start_stage(ROOT / flags[0], *flags[1:], launcher="python")
    process.wait_until(lambda: (tmp_path / "t" / "metrics.jsonl").exists() and len(metrics_of(tmp_path / "t")) > 2)
    process.kill(signal.SIGTERM)
    assert process.returncode == 143
    step = checkpoint_of(tmp_path / "t" / "last.pt")["training"]["step"]
    assert 2 < step < 24 and metrics_of(tmp_path / "t")[-1]["step"] == step
    assert f"from step {step}" in run_stage(*flags, WITHOUT="matplotlib").stdout
    run_stage(*flags, "--out", tmp_path / "whole", WITHOUT="matplotlib")
    assert_same_weights(tmp_path / "t" / "model.pt", tmp_path / "whole" / "model.pt")


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
    assert_mistake(call_main("01_train_teacher", *flags), "begun with [24] images, not [25]")


def test_a_diverged_run_ends_with_3_and_saves_nothing_of_it(tiny_data, call_main, tmp_path):
    flags = ["--data", tiny_data, "--out", tmp_path / "t", *SHORT_RUN, "--arch", CHEAP, "--epochs", 4]
    done = call_main("01_train_teacher", *flags, "--optimizer", "sgd", "--lr", 1e30, "--warmup-epochs", 0)
    assert done.returncode == 3 and "diverged" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "t").glob("*.pt"))


# random numbers


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    """Of torch's own generator, for the dropout, and of that of the augmentation; what ran before does not matter."""

    def drawn(*key):
        torch.rand(7)
        generator = step_generator(*key)
        return tuple(torch.rand(3).tolist()), tuple(torch.rand(3, generator=generator).tolist())

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first = [part for key in keys for part in drawn(*key)]
    assert [part for key in keys for part in drawn(*key)] == first and len(set(first)) == 8


# several processes


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
SQUEEZED += ["--warmup-epochs", 0, "--lr", 0.01, "--optimizer", "sgd", "--ema-decay", 0.5, "--num-ops", 1]
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
        assert done.returncode == 0 and "1 unlabelled images are unreadable" in done.stdout, done
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
    flags += ["--lr", 0.01, "--bn-momentum", 0.1, "--ema-decay", 0.5, "--drop-path", 0.5]
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
