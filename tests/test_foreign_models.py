"""Other people's models and weights: timm's through every stage, and what `--init published` downloads."""

import json
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
from conftest import assert_mistake, checkpoint_of, tell_images_apart
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d

import common

OF_EACH_KIND = ["convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0", "resnet10t", "resnetv2_18"]
SHORT = ["--image-size", 32, "--batch-size", 8, "--epochs", 0.67, "--optimizer", "adamw", "--lr", 1e-3]
SHORT += ["--warmup-epochs", 0, "--average", 0.5, "--num-ops", 1, "--magnitude", 5]


def clean_views(images, view):
    views = np.stack([common.eval_view(images.load(row), view) for row in range(len(images))])
    return common.normalize(torch.from_numpy(views).permute(0, 3, 1, 2), view)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_model_of_timm_goes_through_every_stage(name, tiny_data, call_main, tmp_path, monkeypatch):
    """And the logits that 02 writes and the accuracy that 06 measures are those of timm's own model."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, arch = tmp_path / "teacher", f"timm/{name}"
    flags = ["--arch", arch, "--data", tiny_data, *SHORT, "--drop-path", 0.3, "--dropout", 0.25]
    done = call_main("01_train_teacher", *flags, "--out", out)
    assert done.returncode == 0 and re.search(r"dropout 0.25, stochastic depth 0.(28|3);", done.stdout), done
    saved = checkpoint_of(out / "model.pt")
    config = timm.get_pretrained_cfg(name)
    assert saved["mean"] == config.mean and saved["std"] == config.std and saved["image_size"] == 32
    assert saved["versions"]["timm"] == timm.__version__
    is_vit = name.startswith("vit")
    assert saved["arch_options"].get("img_size") == (32 if is_vit else None)
    theirs = timm.create_model(name, num_classes=3, **({"img_size": 32} if is_vit else {}))
    theirs.load_state_dict(saved["model"])

    logits_file, selection = tmp_path / "l.h5", tmp_path / "b.h5"
    assert call_main("02_pseudo_label", "--teacher", out / "model.pt", "--out", logits_file).returncode == 0
    view, images = common.View.of(saved), common.unlabeled_images(tiny_data / "unlabeled", tiny_data)
    with torch.no_grad():
        expected = theirs.eval()(clean_views(images, view))
    with h5py.File(logits_file) as file:
        got = torch.from_numpy(file["logits"][:]).float()
    torch.testing.assert_close(got, expected - expected.amax(1, True), rtol=2e-3, atol=2e-3)
    words = [logits_file, "--out", selection, "--threshold", 0, "--per-class", "all"]
    assert call_main("03_balance", *words).returncode == 0

    student = tmp_path / "student"
    words = ["--pseudo-labels", selection, *SHORT, "--ratio", 1, "--out", student]
    done = call_main("04_train_student", "--teacher", out / "model.pt", "--init", out / "model.pt", *words)
    assert done.returncode == 0 and "no model noise" in done.stdout, done
    trained = checkpoint_of(student / "model.pt")
    assert trained["arch"] == arch and common.View.of(trained) == view

    words = ["--data", tiny_data, "--out", tmp_path / "r"]
    assert call_main("06_eval_robustness", out / "model.pt", *words).returncode == 0
    val, labels, _ = common.labeled_images(tiny_data, "val")
    with torch.no_grad():
        right = (theirs(clean_views(val, view)).argmax(1).numpy() == labels).mean()
    report = json.loads((tmp_path / "r" / "robustness.json").read_text())
    assert report[str(out / "model.pt")]["clean"]["top1"] == pytest.approx(100 * right)


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet50", "resnetv2_50", "resnetv2_50x1_bit", "densenet121"])
def test_what_is_folded_and_synchronized_stays_the_same_function(name):
    """The activation of a BatchNormAct2d is inside it: folding it away once moved logits by 1,400."""
    torch.manual_seed(0)
    model = tell_images_apart(timm.create_model(name, num_classes=5))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        kinds = [type(module) for module in model.modules()]
        common.fuse_batch_norms(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)
        left = [type(module) for module in model.modules()]
        assert left.count(BatchNormAct2d) == kinds.count(BatchNormAct2d)
        if name == "resnet50":
            assert torch.nn.BatchNorm2d not in left and torch.nn.BatchNorm2d in kinds
        torch.manual_seed(0)
        model = tell_images_apart(timm.create_model(name, num_classes=5))
        common.synchronize_norms(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)


def test_two_processes_train_and_evaluate_timms_own_function(tiny_data, run_stage, tmp_path):
    flags = ["--arch", "timm/efficientnet_b0", "--data", tiny_data, *SHORT, "--out", tmp_path / "t"]
    run_stage("01_train_teacher.py", *flags, nproc=2, WITHOUT="matplotlib")
    saved = checkpoint_of(tmp_path / "t" / "model.pt")
    theirs = timm.create_model("efficientnet_b0", num_classes=3)
    theirs.load_state_dict(saved["model"])
    images, labels, _ = common.labeled_images(tiny_data, "val")
    with torch.no_grad():
        logits = theirs.eval()(clean_views(images, common.View.of(saved)))
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    assert saved["metrics"]["val_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_without_timm_one_line_says_what_to_install(tiny_data, call_main, tmp_path, monkeypatch):
    flags = ["--arch", "timm/resnet50", "--data", tiny_data, "--out", tmp_path / "t"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        assert_mistake(call_main("01_train_teacher", *flags), "pip install timm")
    assert_mistake(call_main("01_train_teacher", *flags, "--arch", "timm/no_such_model"), "--arch", "no_such_model")
    assert_mistake(call_main("01_train_teacher", *flags, "--arch", "no_such_model"), "--arch", "timm/NAME")


def test_a_resnext_of_any_width(tmp_path):
    from torchvision import models

    for width, theirs in ((8, "resnext101_32x8d"), (4, None)):
        with torch.device("meta"):
            mine = common.build_model(f"resnext101_32x{width}d", 7)
            shapes = {name: tensor.shape for name, tensor in mine.state_dict().items()}
            if theirs:
                expected = models.get_model(theirs, num_classes=7).state_dict()
                assert shapes == {name: tensor.shape for name, tensor in expected.items()}
    assert shapes["layer1.0.conv2.weight"] == (32 * 4, 4, 3, 3)  # 1905.00546's students are 32x4d too


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
        save_file({name: tensor.contiguous() for name, tensor in weights.items()},
                  folder / "snapshots" / "abc" / "model.safetensors")  # fmt: skip

    return put


def test_published_weights_of_torchvision(tiny_data, call_main, tmp_path, monkeypatch):
    """With another classifier, and torchvision's own record of how images must look."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    record = models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    theirs = models.get_model("shufflenet_v2_x0_5").state_dict()
    file = tmp_path / "cache" / "hub" / "checkpoints" / Path(record.url).name
    file.parent.mkdir(parents=True)
    torch.save(theirs, file)
    flags = ["--arch", "shufflenet_v2_x0_5", "--init", "published", "--data", tiny_data, "--lr", 0, "--epochs", 0.3]
    done = call_main("01_train_teacher", *flags, "--out", tmp_path / "t", "--batch-size", 8)
    assert done.returncode == 0 and "from published with a new classifier" in done.stdout, done
    saved = checkpoint_of(tmp_path / "t" / "model.pt")
    assert (saved["image_size"], saved["interpolation"]) == (224, "bilinear")
    assert saved["crop_fraction"] == pytest.approx(224 / 256)
    now = saved["model"]
    same = {name for name, p in theirs.items() if p.shape == now[name].shape and torch.equal(p, now[name])}
    changed = {name for name, _ in models.get_model("shufflenet_v2_x0_5").named_parameters()} - same
    assert changed == {"fc.weight", "fc.bias"}
    words = [word for word in flags if word not in ("--init", "published")]
    done = call_main("01_train_teacher", *words, "--out", tmp_path / "t", "--batch-size", 8)
    assert_mistake(done, "--init", "published")


OF_TIMM = [("tf_efficientnet_b0", 224), ("timm/convnext_atto", 64), ("timm/vit_tiny_patch16_224", 64)]


@pytest.mark.parametrize(("arch", "size"), OF_TIMM)
def test_published_weights_of_timm(arch, size, hub, tiny_data, call_main, tmp_path):
    torch.manual_seed(0)
    name = arch.removeprefix("timm/")
    theirs = timm.create_model(name)
    hub(name, theirs.state_dict())
    flags = ["--arch", arch, "--init", "published", "--data", tiny_data, "--lr", 0, "--epochs", 0.3, "--batch-size", 8]
    flags += [] if size == 224 else ["--image-size", size]
    done = call_main("01_train_teacher", *flags, "--out", tmp_path / "t")
    assert done.returncode == 0, done
    saved, config = checkpoint_of(tmp_path / "t" / "model.pt"), timm.get_pretrained_cfg(name)
    assert saved["image_size"] == size and saved["mean"] == config.mean
    if size == config.input_size[-1]:
        assert saved["crop_fraction"] == config.crop_pct and saved["interpolation"] == config.interpolation
    expected = common.own_names(theirs.state_dict(), saved["model"])
    head = tuple(f"{layer}." for layer in common.head_names(common.load_model(tmp_path / "t" / "model.pt")[0]))
    for key, tensor in expected.items():
        if not key.startswith(head) and key != "pos_embed" and "running_" not in key and "num_batches" not in key:
            assert torch.equal(saved["model"][key], tensor), key
    if "pos_embed" in expected:  # 4 x 4 places in place of 14 x 14
        assert saved["model"]["pos_embed"].shape == (1, 17, 192) and expected["pos_embed"].shape == (1, 197, 192)


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet50", "efficientnet_l0", None])
def test_published_weights_that_cannot_be_had_are_a_line(arch, tiny_data, call_main, tmp_path, monkeypatch, hub):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    words = ["--arch", arch] if arch else []
    done = call_main("01_train_teacher", *words, "--init", "published", "--data", tiny_data, "--out", tmp_path / "t")
    assert_mistake(done, "--init published", arch or "--arch")


def no_network(*args, **kwargs):
    raise OSError("no network")
