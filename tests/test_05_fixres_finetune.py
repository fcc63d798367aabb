"""Stage 05: what is frozen, what trains, what the new checkpoint says."""

import pytest
import torch
from conftest import assert_mistake, checkpoint_of, load_stage, patch_name, save_model

import common
from common import build_model


@pytest.fixture(scope="module")
def b0(tiny_data, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("b0") / "model.pt", "efficientnet_b0", data=str(tiny_data))


def changed(a, b):
    """The names of the weights that differ."""
    a, b = (checkpoint_of(path)["model"] for path in (a, b))
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_the_head_alone_trains(b0, run_stage, tmp_path):
    flags = ["--checkpoint", b0, "--image-size", 40, "--batch-size", 8, "--epochs", 1, "--lr", 1e-2]
    done = run_stage("05_fixres_finetune.py", *flags, "--train", "head", "--out", tmp_path / "t")
    assert {".".join(name.split(".")[:2]) for name in changed(b0, tmp_path / "t" / "model.pt")} == {
        "features.8",
        "classifier.1",
    }
    before, after = checkpoint_of(b0), checkpoint_of(tmp_path / "t" / "model.pt")
    assert after["image_size"] == 40 and after["stage"] == "fixres" and after["classes"] == before["classes"]
    head = 1280 * 320 + 2 * 1280 + 3 * 1280 + 3
    assert f"{head:,} of" in done.stdout and (tmp_path / "t" / "resolution.png").stat().st_size > 5000
    assert (tmp_path / "t" / "curves.png").stat().st_size > 5000


def test_the_classifier_alone_trains_and_the_last_batch_norm_adapts(b0, call_main, tmp_path):
    """FixRes' own recipe: head-only, the batch norm before it in training mode with its weights frozen."""
    flags = ["--checkpoint", b0, "--image-size", 40, "--batch-size", 8, "--epochs", 1, "--lr", 1e-2]
    flags += ["--train", "classifier", "--bn-momentum", 0.1, "--out", tmp_path / "t"]
    done = call_main("05_fixres_finetune", *flags)
    assert done.returncode == 0 and f"{3 * 1280 + 3:,} of" in done.stdout, done
    statistics = {f"features.8.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed(b0, tmp_path / "t" / "model.pt") == statistics | {"classifier.1.weight", "classifier.1.bias"}
    assert_mistake(call_main("05_fixres_finetune", *flags, "--frozen-blocks", 3), "--train classifier")


def test_by_default_all_but_the_stem_trains(b0, call_main, tmp_path):
    flags = ["--checkpoint", b0, "--image-size", 40, "--batch-size", 8, "--epochs", 0.34, "--lr", 1e-2]
    assert call_main("05_fixres_finetune", *flags, "--out", tmp_path / "t").returncode == 0
    weights = {name for name, _ in build_model("efficientnet_b0", 3).named_parameters()}
    assert weights - changed(b0, tmp_path / "t" / "model.pt") == {
        f"features.0.{i}" for i in ("0.weight", "1.weight", "1.bias")
    }
    model = build_model("efficientnet_b0", 3)
    load_stage("05_fixres_finetune").freeze(model, 3)
    assert not model.features[2].training and model.features[3][1].training


def test_fewer_frozen_blocks_train_more(b0, call_main, tmp_path):
    flags = ["--checkpoint", b0, "--image-size", 40, "--batch-size", 8, "--epochs", 0.34, "--lr", 1e-2]
    assert call_main("05_fixres_finetune", *flags, "--frozen-blocks", 15, "--out", tmp_path / "t").returncode == 0
    names = changed(b0, tmp_path / "t" / "model.pt")
    assert "features.7.0.block.0.0.weight" in names and "features.6.3.block.0.0.weight" not in names
    assert {name.split(".")[1] for name in names if name.startswith("features")} == {"7", "8"}


def test_of_another_model_the_last_linear_layer_trains(capsys):
    freeze = load_stage("05_fixres_finetune").freeze
    model = build_model("resnet18", 3)
    freeze(model, None)
    assert [name for name, module in model.named_modules() if module.training] == ["layer4.1.bn2", "fc"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    with pytest.raises(SystemExit):
        freeze(model, 3)
    assert "--frozen-blocks" in capsys.readouterr().err


def test_too_many_blocks_are_a_mistake(b0, run_stage, tmp_path):
    flags = ["--checkpoint", b0, "--image-size", 40, "--out", tmp_path / "o", "--frozen-blocks", 17]
    done = run_stage("05_fixres_finetune.py", *flags, check=False)
    assert_mistake(done, "--frozen-blocks 17")
    assert not (tmp_path / "o").exists()


def test_the_last_batch_norm_of_another_model_takes_on_the_new_statistics(tiny_data, call_main, tmp_path):
    path = save_model(tmp_path / "r.pt", "resnet18", data=str(tiny_data))
    flags = ["--checkpoint", path, "--image-size", 40, "--batch-size", 8, "--epochs", 1, "--lr", 1e-2]
    means = []
    for momentum in (0.01, 0.5):
        out = tmp_path / str(momentum)
        done = call_main("05_fixres_finetune", *flags, "--bn-momentum", momentum, "--out", out)
        assert done.returncode == 0 and f"{512 * 3 + 3:,} of" in done.stdout, done
        statistics = {f"layer4.1.bn2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        assert changed(path, out / "model.pt") == statistics | {"fc.weight", "fc.bias"}
        means.append(checkpoint_of(out / "model.pt")["model"]["layer4.1.bn2.running_mean"])
    before = checkpoint_of(path)["model"]["layer4.1.bn2.running_mean"]
    assert (means[1] - before).norm() > 10 * (means[0] - before).norm() > 0


def test_a_model_without_a_linear_layer_is_one_line(tiny_data, call_main, tmp_path):
    path = save_model(tmp_path / "s.pt", "squeezenet1_1", data=str(tiny_data))
    flags = ["--checkpoint", path, "--image-size", 40, "--batch-size", 8, "--epochs", 1, "--out", tmp_path / "t"]
    assert_mistake(call_main("05_fixres_finetune", *flags), "--checkpoint", "no linear layer")
    assert not (tmp_path / "t").exists()


def test_a_size_that_the_model_does_not_take_is_one_line(tiny_data, call_main, tmp_path, monkeypatch):
    """As a transformer of timm, which has one size, or some: those of the curve that it does not take are left out."""

    class Choosy(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            assert images.shape[-1] in (32, 48), "Input height should be divisible by 16"
            return self.model(images)

    load = common.load_model
    patch_name(
        monkeypatch,
        "load_model",
        lambda *args: (Choosy(load(*args)[0]), load(*args)[1]),
        load_stage("05_fixres_finetune"),
    )
    path = save_model(tmp_path / "s.pt", data=str(tiny_data))
    flags = ["--checkpoint", path, "--batch-size", 8, "--epochs", 0, "--out", tmp_path / "t", "--image-size"]
    assert_mistake(call_main("05_fixres_finetune", *flags, 40), "--image-size 40", "divisible by 16")
    done = call_main("05_fixres_finetune", *flags, 48)
    assert done.returncode == 0 and "at 48 px" in done.stdout, done


def test_at_its_own_size_a_checkpoint_keeps_its_own_crop(tiny_data, call_main, tmp_path, monkeypatch):
    """torchvision's weights are tested at another crop than the official EfficientNets."""
    stage, views = load_stage("05_fixres_finetune"), []
    evaluate = common.evaluate

    def evaluate_watched(model, images, labels, view, *args):
        views.append(view)
        return evaluate(model, images, labels, view, *args)

    patch_name(monkeypatch, "evaluate", evaluate_watched, stage)
    path = save_model(tmp_path / "c.pt", data=str(tiny_data), image_size=72, crop_fraction=0.9)
    flags = ["--checkpoint", path, "--batch-size", 8, "--epochs", 0]
    for size, fraction in ((72, 0.9), (80, 80 / 112)):
        views.clear()
        done = call_main("05_fixres_finetune", *flags, "--image-size", size, "--out", tmp_path / str(size))
        assert done.returncode == 0, done
        saved = checkpoint_of(tmp_path / str(size) / "model.pt")
        assert saved["image_size"] == size and saved["crop_fraction"] == pytest.approx(fraction)
        assert {72: 0.9, size: fraction}.items() <= {view.image_size: view.crop_fraction for view in views}.items()
        assert all(view.crop_fraction == 0.9 for view in views if view.image_size == 72)
