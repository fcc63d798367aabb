"""Stage 01: a teacher that learns; `--init`: how the images of published weights must look, the classifier, what comes
along."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import NO_OPTIONS, ROOT, assert_mistake, assert_same_weights, checkpoint_of, metrics_of, save_model
from conftest import tell_images_apart
from PIL import Image
from timm.models.efficientnet import default_cfgs

from common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_model,
    default_crop_fraction,
    initial_weights,
    labeled_images,
    load_model,
    own_names,
)


def read_initial(path, arch):
    return initial_weights(path, arch, None)


def timms_b0(num_classes=3):
    torch.manual_seed(0)
    return tell_images_apart(timm.create_model("tf_efficientnet_b0", num_classes=num_classes), 64)


@pytest.fixture
def run_01(call_main):
    return lambda *flags: call_main("01_train_teacher", *flags)


@pytest.mark.xdist_group("teacher")
def test_the_teacher_learns_and_its_checkpoint_says_how_it_was_made(teacher, tiny_data):
    out, _, done = teacher
    lines = metrics_of(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    assert lines[-1]["val_top1"] >= 75 and {"step", "epoch", "val_loss", "val_top5"} <= lines[-1].keys()
    assert all({"step", "epoch"} <= line.keys() for line in lines) and lines[-1]["step"] == 80
    saved = checkpoint_of(out / "model.pt")
    assert saved["format"] == "noisy-student-checkpoint-1" and saved["stage"] == "teacher"
    assert saved["classes"] == ["disc", "square", "triangle"] and saved["image_size"] == 32
    assert saved["crop_fraction"] == 1 and saved["args"]["data"] == str(tiny_data)
    assert saved["metrics"]["val_top1"] == lines[-1]["val_top1"]
    assert "training" in checkpoint_of(out / "last.pt") and "training" not in saved
    assert (out / "curves.png").stat().st_size > 5000
    assert f"val_top1 {lines[-1]['val_top1']:.2f} on 12 images" in done.stdout


def test_a_typo_is_a_mistake(run_stage, tmp_path):
    """With a plain Python: the exit status is that of the process."""
    flags = ["--data", tmp_path, "--out", tmp_path / "o", "--epoch", 1]
    assert_mistake(run_stage(ROOT / "01_train_teacher.py", *flags, check=False, launcher="python"), "--epoch")


# --init: how the images must look


def save(path, weights):
    path.parent.mkdir(parents=True, exist_ok=True)
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    return path


def loss_by_hand(model, data, side, left, size, resampling, mean, std):
    """Of the val images, all of them squares, whose centre begins at `left` and is `side` wide."""
    rows, labels, _ = labeled_images(data, "val")
    views = [rows.load(i).crop((left, left, left + side, left + side)) for i in range(len(rows))]
    images = np.stack([np.asarray(view.resize((size, size), resampling)) for view in views])
    images = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    with torch.no_grad():
        return F.cross_entropy(model(images), torch.from_numpy(labels)).item()


def test_init_makes_a_teacher_of_timms_weights(tiny_data, run_stage, tmp_path):
    theirs = timms_b0()
    path = save(tmp_path / "tf_efficientnet_b0_ns-c0e6a31c.pth", theirs.state_dict())
    flags = [
        "--init",
        path,
        "--arch",
        "tf_efficientnet_b0",
        "--epochs",
        0,
        "--data",
        tiny_data,
        "--out",
        tmp_path / "t",
    ]
    done = run_stage("01_train_teacher.py", *flags)
    loaded, saved = load_model(tmp_path / "t" / "model.pt")
    assert_same_weights(loaded.state_dict(), own_names(theirs.state_dict()))
    assert f"val_top1 {saved['metrics']['val_top1']:.2f} on 12 images" in done.stdout
    assert [saved[name] for name in ("arch", "image_size", "crop_fraction", "interpolation", "mean", "std")] == [
        "tf_efficientnet_b0", 224, 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD
    ]  # fmt: skip
    expected = loss_by_hand(theirs, tiny_data, 28, 2, 224, Image.Resampling.BICUBIC, IMAGENET_MEAN, IMAGENET_STD)
    assert saved["metrics"]["val_loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("flags", "size", "crop"), [([], 224, 0.875), (["--image-size", 64], 64, 1.0)])
def test_another_image_size_takes_its_own_crop_and_the_weights_mean(flags, size, crop, tiny_data, run_01, tmp_path):
    theirs = timms_b0()
    path = save(tmp_path / "tf_efficientnet_b0.ap_in1k" / "model.safetensors", theirs.state_dict())
    flags = ["--init", path, "--arch", "tf_efficientnet_b0", "--epochs", 0, "--data", tiny_data, *flags]
    done = run_01(*flags, "--out", tmp_path / "t")
    assert done.returncode == 0, done
    loaded, saved = load_model(tmp_path / "t" / "model.pt")
    assert_same_weights(loaded.state_dict(), own_names(theirs.state_dict()))
    assert (saved["image_size"], saved["crop_fraction"], saved["mean"], saved["std"]) == (
        size,
        crop,
        (0.5,) * 3,
        (0.5,) * 3,
    )


TF_ARCHS = [f"tf_efficientnet_{size}" for size in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l2")]


TIMMS = [(arch, tag, cfg) for arch in TF_ARCHS for tag, cfg in default_cfgs[arch].cfgs.items()]


@pytest.mark.parametrize(("arch", "tag", "cfg"), TIMMS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_view_of_tensorflows_weights_is_timms(arch, tag, cfg, tmp_path):
    """By the file's own name and by the folder of a download from the hub; timm writes a shorter crop: L2's is 0.96."""
    for name in Path(cfg.url).name, f"{arch}.{tag}/model.safetensors":
        path = save(tmp_path / name, {"x": torch.zeros(1)})
        view = read_initial(path, arch)
        assert view["image_size"] == cfg.input_size[1] and view["interpolation"] == cfg.interpolation
        assert view["crop_fraction"] == pytest.approx(cfg.crop_pct, abs=2e-3 if cfg.input_size[1] == 800 else 1e-3)
        assert view["crop_fraction"] == default_crop_fraction(view["image_size"])
        assert view["mean"] == pytest.approx(cfg.mean) and view["std"] == pytest.approx(cfg.std)


VIEWS = [  # arch, file, resolution, crop, interpolation, mean of red
    ("tf_efficientnet_b0", "mine.pth", 224, 0.875, "bicubic", 0.485),
    ("tf_efficientnet_b0", "tf_efficientnet_b0_ap-f262efe1.pth", 224, 0.875, "bicubic", 0.5),
    ("tf_efficientnet_b7", "tf_efficientnet_b7_ns-1dbc32de.pth", 600, 600 / 632, "bicubic", 0.485),
    ("tf_efficientnet_l2", "tf_efficientnet_l2_ns-df73bb44.pth", 800, 800 / 832, "bicubic", 0.485),
    ("tf_efficientnet_l2", "tf_efficientnet_l2_ns_475-bebbd00a.pth", 475, 475 / 507, "bicubic", 0.485),
    ("tf_efficientnet_l2", "tf_efficientnet_l2.ns_jft_in1k_475/model.safetensors", 475, 475 / 507, "bicubic", 0.485),
    ("efficientnet_l0", "mine.pth", 380, 380 / 412, "bicubic", 0.485),
    ("efficientnet_b1", "efficientnet_b1_rwightman-bac287d4.pth", 240, 240 / 256, "bicubic", 0.485),
    ("efficientnet_b1", "efficientnet_b1-c27df63c.pth", 240, 240 / 255, "bilinear", 0.485),
    ("efficientnet_b7", "mine.pth", 600, 1.0, "bicubic", 0.485),
    ("resnet50", "semi_supervised_resnet50-08389792.pth", 224, 0.875, "bilinear", 0.485),
    ("resnet50", "resnet50-11ad3fa6.pth", 224, 224 / 232, "bilinear", 0.485),
    ("convnext_tiny", "convnext_tiny-983f1562.pth", 224, 224 / 236, "bilinear", 0.485),
]


@pytest.mark.parametrize(("arch", "name", "size", "crop", "interpolation", "red"), VIEWS)
def test_the_view_of_a_published_file(arch, name, size, crop, interpolation, red, tmp_path):
    weights = {"x": torch.zeros(1)}
    view = read_initial(save(tmp_path / name, weights), arch)
    assert (view["image_size"], view["interpolation"], view["mean"][0]) == (size, interpolation, red)
    assert view["crop_fraction"] == pytest.approx(crop) and view["arch"] == arch and view["model"] == weights


def test_the_view_of_all_that_torchvision_publishes(tmp_path):
    for arch in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(arch):
            record = weights.transforms()
            view = read_initial(save(tmp_path / Path(weights.url).name, {"x": torch.zeros(1)}), arch)
            assert [view["image_size"]] == record.crop_size and view["interpolation"] == record.interpolation.value
            assert view["crop_fraction"] == pytest.approx(record.crop_size[0] / record.resize_size[0]), weights
            assert (view["mean"], view["std"]) == (tuple(record.mean), tuple(record.std))


def test_the_name_is_found_in_the_cache_of_hugging_face(tmp_path):
    path = tmp_path / "models--timm--tf_efficientnet_b0.ap_in1k" / "snapshots" / "0123abcd" / "model.safetensors"
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    view = read_initial(path, "tf_efficientnet_b0")
    assert view["mean"] == (0.5, 0.5, 0.5)


def test_a_checkpoint_of_this_toolkit_brings_its_arch_and_its_view(tiny_data, run_01, tmp_path):
    """The interpolation too: val is looked at as the weights want it."""
    torch.manual_seed(0)
    model = tell_images_apart(build_model("efficientnet_b0", 3, small_images=True))
    view = {"image_size": 40, "crop_fraction": 0.75, "interpolation": "bilinear", "mean": (0.4,) * 3, "std": (0.3,) * 3}
    options = NO_OPTIONS | {"small_images": True}
    path = save_model(tmp_path / "model.pt", "efficientnet_b0", model=model, arch_options=options, **view)
    done = run_01("--init", path, "--data", tiny_data, "--out", tmp_path / "t", "--epochs", 0)
    assert done.returncode == 0 and "efficientnet_b0 at 40 px" in done.stdout, done
    loaded, saved = load_model(tmp_path / "t" / "model.pt")
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert saved["arch_options"]["small_images"] is True and {name: saved[name] for name in view} == view
    losses = {
        name: loss_by_hand(model, tiny_data, 24, 4, 40, Image.Resampling[name], (0.4,) * 3, (0.3,) * 3)
        for name in ("BILINEAR", "BICUBIC")
    }
    assert saved["metrics"]["val_loss"] == pytest.approx(losses["BILINEAR"], rel=1e-5)
    assert abs(losses["BILINEAR"] - losses["BICUBIC"]) > 1e-4 * losses["BILINEAR"]


# --init: the classifier, and mistakes


SHORT = ["--image-size", 32, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0, "--bn-momentum", 0]


def test_other_classes_are_a_new_classifier_or_a_mistake(tiny_data, run_01, tmp_path):
    theirs = timms_b0(1000)
    path = save(tmp_path / "tf_efficientnet_b0_ns-c0e6a31c.pth", theirs.state_dict())
    flags = ["--init", path, "--arch", "tf_efficientnet_b0", "--data", tiny_data, "--out", tmp_path / "t"]
    assert_mistake(run_01(*flags, "--epochs", 0), path, "1000", "--epochs 0")
    assert not (tmp_path / "t").exists()
    done = run_01(*flags, *SHORT)
    assert done.returncode == 0 and "new classifier" in done.stdout, done
    given, trained = own_names(theirs.state_dict()), checkpoint_of(tmp_path / "t" / "model.pt")["model"]
    for name in given.keys() - {"classifier.1.weight", "classifier.1.bias"}:
        assert name.endswith("num_batches_tracked") or torch.equal(given[name], trained[name]), name
    assert trained["classifier.1.weight"].shape == (3, 1280) and trained["classifier.1.weight"].std() > 0


@pytest.mark.parametrize("classes", [["triangle", "square", "disc"], ["ant", "bee", "cat"], ["disc", "square"]])
def test_a_checkpoint_of_other_classes_in_name_or_order_gets_a_new_classifier(classes, tiny_data, run_01, tmp_path):
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", len(classes))
    path = save_model(tmp_path / "model.pt", "efficientnet_b0", classes, model)
    flags = ["--init", path, "--data", tiny_data, "--out", tmp_path / "t"]
    assert_mistake(run_01(*flags, "--epochs", 0), path, "classes", "--epochs 0")
    done = run_01(*flags, *SHORT, "--seed", 1)
    assert done.returncode == 0 and "new classifier" in done.stdout, done
    trained = checkpoint_of(tmp_path / "t" / "model.pt")["model"]
    assert torch.equal(trained["features.8.0.weight"], model.features[8][0].weight)
    assert not torch.equal(trained["classifier.1.weight"][:2], model.classifier[1].weight[:2])


def timms_state():
    return timms_b0().state_dict()


MISTAKES = {  # what is saved, flags, words
    "no --arch": (timms_state, [], ["--arch"]),
    "another arch": (timms_state, ["--arch", "resnet18"], ["--arch resnet18", "missing: ", "extra: "]),
    "an unknown arch": (timms_state, ["--arch", "tf_efficientnet_b8"], ["--arch", "tf_efficientnet_b8"]),
    "no classifier": (timms_state, ["--arch", "fcn_resnet50"], ["--arch", "fcn_resnet50"]),
    "a list": (lambda: [torch.zeros(1)], ["--arch", "resnet18"], ["not a state_dict"]),
    "numbers as names": (lambda: {0: torch.zeros(1)}, ["--arch", "resnet18"], ["not a state_dict"]),
    "half a file": (
        lambda: {name: t for name, t in timms_state().items() if not name.startswith("blocks.3")},
        ["--arch", "tf_efficientnet_b0"],
        ["missing: features.4.0.block.0.0.weight, "],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_init_is_one_line_and_status_2(mistake, tiny_data, run_01, tmp_path):
    make, flags, words = MISTAKES[mistake]
    path = save(tmp_path / "weights.pth", make())
    done = run_01("--init", path, "--data", tiny_data, "--out", tmp_path / "t", "--epochs", 0, *flags)
    assert_mistake(done, *words)
    assert not (tmp_path / "t").exists()
