"""Stage 05: its defaults, what is frozen, what trains, what the new checkpoint says."""

import numpy as np
import pytest
import torch
from conftest import assert_mistake, checkpoint_of, load_stage, save_model

import common

stage = load_stage("05_fixres_finetune")
STAGE = "05_fixres_finetune"


def tune(source, *more):
    return [STAGE, "--checkpoint", source, "--batch-size", 8, *more]


RATES = [(0.004, "adamw", 0.001), (0.02, "rmsprop", 0.001), (None, "adamw", 0.00025 * 8 / 256)]  # None: format 1


@pytest.mark.parametrize(("lr", "optimizer", "peak"), RATES)
def test_its_defaults_are_for_small_sets(lr, optimizer, peak, tiny_data, planned, monkeypatch, tmp_path):
    """5/4 of the size, a quarter of the rate, 200 steps or 1.5 epochs, whichever is more."""
    header = {"args": {"optimizer": optimizer}, "image_size": 36} | ({"lr": lr} if lr else {})
    flags = tune(save_model(tmp_path / "t.pt", data=str(tiny_data), **header))
    run = planned(*flags, "--out", tmp_path / "few")
    assert run.view.image_size == 45 and run.plan.peak == pytest.approx(peak)
    assert run.plan.total_steps == 200 and run.plan.schedule == "cosine" and run.plan.warmup_steps == 0
    labeled_images = stage.labeled_images

    def many_images(*args):
        images, labels, classes = labeled_images(*args)
        rows = np.tile(np.arange(len(images)), 60)
        return images[rows], labels[rows], classes

    monkeypatch.setattr(stage, "labeled_images", many_images)
    monkeypatch.setattr(stage, "resolution_curve", lambda *args: {36: 0.0, 45: 0.0})
    assert planned(*flags, "--out", tmp_path / "many").plan.total_steps == 1.5 * 24 * 60 / 8


def test_blocks_behind_the_frozen_ones_train_and_the_checkpoint_says_so(tiny_data, call_main, tmp_path):
    header = {"class_counts": [1, 8, 8], "hflip": False, "lr": 0.1, "crop_mode": "squash"}
    path = save_model(tmp_path / "b0.pt", "efficientnet_b0", data=str(tiny_data), **header)
    out = tmp_path / "t"
    flags = tune(path, "--image-size", 40, "--steps", 2, "--lr", 1e-2, "--frozen-blocks", 15, "--out", out)
    done = call_main(*flags, pictures=True)
    assert done.returncode == 0, done
    before, after = checkpoint_of(path), checkpoint_of(out / "model.pt")
    weights = after["model"]
    changed = {name for name in weights if not torch.equal(weights[name], before["model"][name])}
    assert {name.split(".")[1] for name in changed if name.startswith("features")} == {"7", "8"}
    assert {"features.7.0.block.0.0.weight", "features.8.1.running_mean", "classifier.1.weight"} <= changed
    expected = header | {"lr": 0.01, "stage": "fixres", "image_size": 40, "classes": before["classes"]}
    expected["class_counts"] = [8, 8, 8]  # those of train/
    assert {name: after[name] for name in expected} == expected
    assert after["inputs"].keys() == {"checkpoint", "train", "val"}
    assert after["inputs"]["checkpoint"] == common.fingerprint(path)
    assert (out / "resolution.png").stat().st_size > 5000 and (out / "curves.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arch", "frozen", "first", "num"),
    [
        ("efficientnet_b0", 0, "features.1.0", 16),
        ("efficientnet_b0", 3, "features.3.0", 13),
        ("efficientnet_b0", "all", None, 0),
        ("resnet18", 0, None, 0),
    ],
)
def test_what_is_frozen_stays_in_inference_mode(arch, frozen, first, num):
    """all, and other models: the last linear layer trains, and the batch norm before it takes on the statistics."""
    model = common.build_model(arch, 3)
    stage.freeze(model, frozen)
    blocks = [name for name, module in model.named_modules() if isinstance(module, common.MBConv) and module.training]
    assert len(blocks) == num and (blocks or [None])[0] == first
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms[-1].training and norms[0].training is False
    head = {"fc.weight", "fc.bias"} if arch == "resnet18" else {"classifier.1.weight", "classifier.1.bias"}
    assert trained == head if not num else {*head, "features.8.0.weight", f"{first}.block.0.0.weight"} < trained
    assert "features.0.0.weight" not in trained


def test_what_cannot_be_tuned_is_one_line(tiny_data, call_main, tmp_path, mistake):
    mistake(lambda: stage.freeze(common.build_model("efficientnet_b0", 3), 17), "--frozen-blocks 17")
    path = save_model(tmp_path / "s.pt", data=str(tiny_data))
    assert_mistake(call_main(*tune(path, "--out", tmp_path / "t", "--frozen-blocks", "some")), "--frozen-blocks")
    path = save_model(tmp_path / "g.pt", data="/nowhere")
    assert_mistake(call_main(*tune(path, "--out", tmp_path / "t")), "--data")
    assert not list(tmp_path.glob("t/*.pt"))


@pytest.mark.parametrize("size", [48, 24])
def test_sizes_that_the_model_does_not_take_are_left_out_but_for_the_new_one(
    size, tiny_data, call_main, tmp_path, monkeypatch
):
    """As a transformer of timm, which has one size, or some."""
    path = save_model(tmp_path / "s.pt", data=str(tiny_data))
    loaded = model, _ = common.load_model(path)

    def choose(model, args):
        assert args[0].shape[-1] in (32, size), "Input height should be divisible by 8"

    model.register_forward_pre_hook(choose)
    monkeypatch.setattr(stage, "load_model", lambda *args: loaded)
    flags = tune(path, "--epochs", 0, "--out", tmp_path / "t")
    assert_mistake(call_main(*flags, "--image-size", 40), "--image-size 40")
    assert call_main(*flags, "--image-size", size).returncode == 0


def test_of_the_sizes_the_old_one_has_the_checkpoints_own_crop(monkeypatch):
    """torchvision's weights are tested at another crop than the official EfficientNets. Of 7 images 3 count."""
    fractions = {}

    def evaluate(model, images, labels, view, *_):
        if images == labels == [0, 3, 6]:
            fractions[view.image_size] = view.crop_fraction
        return {"val_top1": 50.0}

    monkeypatch.setattr(stage, "evaluate", evaluate)
    monkeypatch.setattr(stage, "RESOLUTION_IMAGES", 2)
    stage.resolution_curve(None, common.View(72, 0.9), ([*range(7)], [*range(7)]), [72, 80], None, "fp32")
    assert fractions == {72: 0.9, 80: pytest.approx(80 / 112)}
