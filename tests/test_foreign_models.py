"""Other people's models and weights: timm's through every stage, and what `--init published` gets."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CHEAP, SHORT_RUN, assert_mistake, checkpoint_of, clean_batch, noise_image, save_model
from safetensors.torch import save_file
from torchvision import models

import common


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_b0"])
def test_a_model_of_timm_goes_through_every_stage(name, tiny_data, call_main, tmp_path, monkeypatch):
    """And the logits that 02 writes are those of timm's own model."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    teacher, arch = tmp_path / "teacher" / "model.pt", f"timm/{name}"
    flags = ["--arch", arch, "--data", tiny_data, *SHORT_RUN, "--epochs", 0.67, "--drop-path", 0.3, "--dropout", 0.25]
    assert call_main("01_train_teacher", *flags, "--out", teacher.parent).returncode == 0
    saved = checkpoint_of(teacher)
    config = timm.get_pretrained_cfg(name)
    assert saved["mean"] == config.mean and saved["std"] == config.std and saved["image_size"] == 32
    options = {"img_size": 32} if name.startswith("vit") else {}
    assert saved["arch_options"].get("img_size") == options.get("img_size")
    theirs = timm.create_model(name, num_classes=3, **options)
    theirs.load_state_dict(saved["model"])

    labels, selection = tmp_path / "labels.h5", tmp_path / "balanced.h5"
    assert call_main("02_pseudo_label", "--teacher", teacher, "--out", labels).returncode == 0
    view, images = common.View.of(saved), common.unlabeled_images(tiny_data / "unlabeled", tiny_data)
    with torch.no_grad():
        expected = theirs.eval()(clean_batch(images, view))
    logits = common.open_label_file(labels).column("logits")
    np.testing.assert_allclose(logits, expected - expected.amax(1, True), rtol=2e-3, atol=2e-3)
    flags = [labels, "--out", selection, "--threshold", 0, "--per-class", "all"]
    assert call_main("03_balance", *flags).returncode == 0

    student = tmp_path / "student"
    flags = ["--pseudo-labels", selection, *SHORT_RUN, "--epochs", 0.67, "--ratio", 1, "--out", student]
    assert call_main("04_train_student", "--teacher", teacher, "--init", teacher, *flags).returncode == 0
    trained = checkpoint_of(student / "model.pt")
    assert trained["arch"] == arch and common.View.of(trained) == view

    flags = ["--checkpoint", teacher, "--batch-size", 8, "--steps", 1, "--out", tmp_path / "fixres"]
    assert call_main("05_fixres_finetune", *flags).returncode == 0
    flags = ["--data", tiny_data, "--out", tmp_path / "r"]
    assert call_main("06_eval_robustness", teacher, *flags).returncode == 0
    report = json.loads((tmp_path / "r" / "robustness.json").read_text())
    assert report[str(teacher)]["clean"]["top1"] == pytest.approx(saved["metrics"]["val_top1"])


def test_models_that_are_not_there_are_a_line(tiny_data, call_main, tmp_path, monkeypatch):
    flags = ["--data", tiny_data, "--out", tmp_path / "t", "--arch"]
    assert_mistake(call_main("01_train_teacher", *flags, "timm/no_such_model"), "--arch", "timm/no_such_model")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert_mistake(call_main("01_train_teacher", *flags, "timm/resnet50"), "pip install timm")


def test_a_resnext_of_any_width():
    with torch.device("meta"):
        mine, theirs = common.build_model("resnext101_32x8d"), models.get_model("resnext101_32x8d")
        wide = common.build_model("resnext101_32x48d", 7)
    assert str(mine) == str(theirs)
    assert wide.layer1[0].conv2.weight.shape == (32 * 48, 48, 3, 3) and wide.fc.out_features == 7


def test_a_model_that_asks_for_the_version_of_its_weights_is_loaded(tmp_path):
    common.load_model(save_model(tmp_path / "m.pt", "mnasnet0_5", ["a", "b"]))


def test_a_squashed_view_is_timms():
    """timm resizes the whole image to size / crop_pct, here 192 / 0.9, and cuts the middle."""
    config = timm.get_pretrained_cfg("dm_nfnet_f0")
    assert config.crop_mode == "squash" and config.crop_pct < 1
    image = noise_image(300, 200)
    settings = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    expected = timm.data.create_transform(**settings)(image)
    view = common.view_of("timm/dm_nfnet_f0")
    mine = torch.from_numpy(common.eval_view(image, view).copy()).permute(2, 0, 1)[None]
    torch.testing.assert_close(common.normalize(mine, view)[0], expected)


FILES = [  # file, arch, (crop mode, pixels, crop fraction, interpolation), mean
    ("tf_efficientnet_l2_ns_475-bebbd00a.pth", "tf_efficientnet_l2", ("center", 475, 475 / 507, "bicubic"), 0.485),
    ("tf_efficientnet_l2_ns-df73bb44.pth", "tf_efficientnet_l2", ("center", 800, 800 / 832, "bicubic"), 0.485),
    ("tf_efficientnet_b5_ap-9e82fae8.pth", "tf_efficientnet_b5", ("center", 456, 456 / 488, "bicubic"), 0.5),
    ("tf_efficientnet_b5.ap_in1k/snapshots/abc/x", "tf_efficientnet_b5", ("center", 456, 456 / 488, "bicubic"), 0.5),
    ("mine.pth", "tf_efficientnet_b0", ("center", 224, 224 / 256, "bicubic"), 0.485),
    ("resnet50-11ad3fa6.pth", "resnet50", ("center", 224, 224 / 232, "bilinear"), 0.485),
    ("semi_supervised_resnet50-08389792.pth", "resnet50", ("center", 224, 224 / 256, "bilinear"), 0.485),
    ("semi_supervised_x-3fffdb61.pth", "resnext101_32x16d", ("center", 224, 224 / 256, "bilinear"), 0.485),
    ("mine.pth", "timm/vit_tiny_patch16_224", ("center", 224, 0.9, "bicubic"), 0.5),
]


@pytest.mark.parametrize(("file", "arch", "expected", "mean"), FILES)
def test_the_view_of_a_foreign_file(file, arch, expected, mean):
    view = common.view_of_file(Path(file), arch)
    assert (view.crop_mode, view.image_size, view.crop_fraction, view.interpolation) == expected
    assert view.mean[0] == mean


def load(source, classes, num_classes=3):
    """What `load_initial_weights` says, and the model."""
    model, args = common.build_model(CHEAP, num_classes), argparse.Namespace(init="x.pt", arch=None)
    return common.load_initial_weights(model, source | {"arch": CHEAP}, args, classes), model


def test_a_classifier_comes_along_only_with_the_same_classes_in_order(mistake):
    weights = common.build_model(CHEAP, 3).state_dict()
    own = {"classes": ["a", "b", "c"], "model": weights}
    for source, classes in ((own, ["a", "b", "c"]), ({"model": weights}, ["x", "y", "z"])):
        _, model = load(source, classes)
        assert torch.equal(model.fc.weight, weights["fc.weight"])
    for classes in (["a", "c", "b"], ["a", "b"]):
        fits, model = load(own, classes, len(classes))
        assert not fits and not model.fc.weight.any()
    mistake(lambda: load({"model": {"conv1.weight": torch.zeros(1)}}, ["a"]), "--init", CHEAP)


# --init published


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name of timm, state_dict): put it where a download from the hub would lie."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name, weights):
        folder = tmp_path / "hub" / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, folder / "snapshots" / "abc" / "model.safetensors")

    return put


def test_published_weights_of_torchvision(tiny_data, call_main, tmp_path, monkeypatch):
    """With another classifier, and torchvision's own record of how images must look."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    record = models.get_model_weights(CHEAP).DEFAULT
    theirs = models.get_model(CHEAP)
    file = tmp_path / "cache" / "hub" / "checkpoints" / Path(record.url).name
    file.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), file)
    source = common.initial_weights("published", CHEAP, None)
    assert (source["image_size"], source["crop_fraction"]) == (224, 224 / 256)
    flags = ["--arch", CHEAP, "--data", tiny_data, "--out", tmp_path / "t", "--lr", 0]
    flags += ["--epochs", 0.3, "--batch-size", 8]
    assert call_main("01_train_teacher", *flags, "--init", "published").returncode == 0
    saved = checkpoint_of(tmp_path / "t" / "model.pt")
    assert saved["interpolation"] == "bilinear"
    for name, tensor in theirs.named_parameters():
        assert name.startswith("fc.") or torch.equal(tensor, saved["model"][name]), name
    assert_mistake(call_main("01_train_teacher", *flags), "--init", "published")


@pytest.mark.parametrize(("arch", "size"), [("tf_efficientnet_b0", 224), ("timm/vit_tiny_patch16_224", 64)])
def test_published_weights_of_timm(arch, size, hub):
    name = arch.removeprefix("timm/")
    theirs = timm.create_model(name)
    hub(name, theirs.state_dict())
    config = timm.get_pretrained_cfg(name)
    source = common.initial_weights("published", arch, None if size == 224 else size)
    assert source["arch"] == arch and source["image_size"] == size and source["mean"] == config.mean
    if size == 224:
        assert source["crop_fraction"] == config.crop_pct and source["interpolation"] == config.interpolation
    for key, tensor in theirs.state_dict().items():
        assert key == "pos_embed" or torch.equal(source["model"][key], tensor), key
    if "pos_embed" in source["model"]:  # 4 x 4 places instead of 14 x 14
        assert source["model"]["pos_embed"].shape == (1, 17, 192)


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet50", "timm/no_such_model", "efficientnet_l0", None])
def test_published_weights_that_cannot_be_had_are_a_line(arch, mistake, tmp_path, monkeypatch, hub):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    mistake(lambda: common.initial_weights("published", arch, None), "--init published", arch or "--arch")
