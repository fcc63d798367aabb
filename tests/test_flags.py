"""Every flag of the training stages does something: a run of two steps with it ends elsewhere than one without it, or,
for what must not matter, at the same bits."""

import json
import shutil
import sys

import pytest
import torch
from conftest import load_stage

BASE = {"--image-size": 32, "--batch-size": 8, "--epochs": 2 / 3, "--lr": 0.01, "--warmup-epochs": 0, "--num-ops": 1}
BASE |= {"--magnitude": 5, "--ema-decay": 0.5, "--bn-momentum": 0.1, "--eval-every": 0, "--optimizer": "sgd"}
TRAINING = {  # flag: a value that must change the result; None: the flag alone
    "--small-images": None, "--dropout": 0.9, "--drop-path": 0.9, "--bn-momentum": 0.5, "--zero-init-residual": None,
    "--image-size": 40, "--batch-size": 12, "--accumulate": 2, "--epochs": 1, "--optimizer": "adamw", "--lr": 0.02,
    "--schedule": "cosine", "--warmup-epochs": 1, "--weight-decay": 0.5, "--label-smoothing": 0.5, "--ema-decay": 0.1,
    "--num-ops": 2, "--magnitude": 9, "--min-crop-area": 0.9, "--no-hflip": None, "--seed": 1, "--precision": "bf16",
    "--arch": "resnet18",
}  # fmt: skip
STUDENT = TRAINING | {"--ratio": 2, "--unlabeled-weight": 3, "--temperature": 3}
FIXRES = {
    "--image-size": 48, "--frozen-blocks": 15, "--batch-size": 12, "--accumulate": 2, "--epochs": 1, "--lr": 0.02,
    "--optimizer": "adamw", "--schedule": "cosine", "--weight-decay": 0.5, "--label-smoothing": 0.5, "--seed": 1,
    "--precision": "bf16",
}  # fmt: skip
SAME = {"--workers": 1, "--save-every": 1, "--device": "cpu", "--max-bad": 5, "--checkpoint-activations": None}


@pytest.fixture(scope="module")
def weights_of(tiny_data, tmp_path_factory):
    """weights_of(stage, flag, value) -> the checkpoint's weights after two steps; each run is made once."""
    root = tmp_path_factory.mktemp("flags")
    done, patch = {}, pytest.MonkeyPatch()

    def weights_of(name, flag=None, value=None):
        if (name, flag) not in done:
            out = root / name / (flag or "base").strip("-")
            given = {"01_train_teacher": {"--data": tiny_data}, "04_train_student": {}, "05_fixres_finetune": {}}[name]
            if name != "01_train_teacher":
                teacher = weights_of("01_train_teacher") and root / "01_train_teacher" / "base" / "model.pt"
                given["--teacher" if name == "04_train_student" else "--checkpoint"] = teacher
            kept = {"--image-size", "--batch-size", "--epochs", "--lr", "--optimizer"}
            given |= {k: v for k, v in BASE.items() if name != "05_fixres_finetune" or k in kept}
            given |= {"--image-size": 40} if name == "05_fixres_finetune" else {}
            if flag:
                given[flag] = value
            words = [str(word) for item in given.items() for word in item if word is not None]
            stage = load_stage(name)
            patch.setattr(stage, "draw_curves", lambda out: None)
            patch.setattr(stage, "StopSignal", lambda processes: lambda: False)
            patch.setattr(sys, "argv", [f"{name}.py", "--out", str(out), *words])
            stage.main()
            done[name, flag] = torch.load(out / "model.pt")["model"]
            shutil.copy(out / "metrics.jsonl", root / f"{name}{flag}.jsonl")
            if flag:
                shutil.rmtree(out)
        return done[name, flag]

    weights_of.root = root
    yield weights_of
    patch.undo()


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


CASES = [(name, *item) for name, flags in (("01_train_teacher", TRAINING), ("04_train_student", STUDENT),
         ("05_fixres_finetune", FIXRES)) for item in flags.items()]  # fmt: skip


@pytest.mark.parametrize(("name", "flag", "value"), CASES, ids=lambda part: str(part))
def test_a_flag_changes_the_result(name, flag, value, weights_of):
    assert not equal(weights_of(name), weights_of(name, flag, value))


@pytest.mark.parametrize("flag", SAME)
@pytest.mark.parametrize("name", ["01_train_teacher", "04_train_student", "05_fixres_finetune"])
def test_a_flag_changes_no_bit_of_the_result(name, flag, weights_of):
    assert equal(weights_of(name), weights_of(name, flag, SAME[flag]))


def test_the_loss_is_the_weighted_sum(weights_of):
    for flag, weight in ((None, 1), ("--unlabeled-weight", 3)):
        weights_of("04_train_student", flag, weight)
        lines = map(json.loads, (weights_of.root / f"04_train_student{flag}.jsonl").read_text().splitlines())
        lines = [line for line in lines if "loss" in line]
        assert len(lines) == 2
        for line in lines:
            expected = line["loss_labeled"] + weight * line["loss_unlabeled"]
            assert line["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["01_train_teacher", "04_train_student", "05_fixres_finetune"])
def test_no_flag_is_forgotten_here(name, capsys, monkeypatch):
    """What --help lists is either in the tables above or tested where it belongs."""
    elsewhere = {"--help", "--data", "--out", "--init", "--teacher", "--checkpoint", "--pseudo-labels", "--logits",
                 "--unlabeled", "--unlabeled-only", "--eval-every", "--compile", "--hflip"}  # fmt: skip
    elsewhere |= {"--no-small-images"}
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        load_stage(name).parse_args()
    usage = capsys.readouterr().out.split("\n\n")[0]
    listed = {word.strip("[],|") for word in usage.split() if word.strip("[|").startswith("--")}
    flags = {"01_train_teacher": TRAINING, "04_train_student": STUDENT, "05_fixres_finetune": FIXRES}[name]
    assert listed - elsewhere == (flags.keys() | SAME.keys()), listed ^ (flags.keys() | SAME.keys() | elsewhere)
