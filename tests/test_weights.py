"""Weights of this toolkit, torchvision and timm: what fits, what is refused by name, files that are damaged or evil;
`01 --init`: the published weights' views, the classifier, what comes along; the flags that save memory."""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import load_stage
from PIL import Image
from timm.models.efficientnet import default_cfgs
from torch import nn

import common
from common import (
    CHECKPOINT_FORMAT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_model,
    default_crop_fraction,
    eval_view,
    labeled_images,
    load_model,
    load_weights,
    own_names,
    read_metrics,
    save_checkpoint,
)

CLASSES = ["disc", "square", "triangle"]  # those of tiny_data
VIEW = {"image_size": 32, "crop_fraction": 1.0, "interpolation": "bicubic", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
OPTIONS = dict.fromkeys(("small_images", "dropout", "drop_path", "zero_init_residual"))


def save_own(path, model, arch, options=OPTIONS, **header):
    """A checkpoint as stage 01 writes it."""
    header = {"classes": CLASSES, **VIEW, "args": {}, "data": str(path.parent), "metrics": {}} | header
    header |= {"format": CHECKPOINT_FORMAT, "stage": "teacher", "arch": arch, "arch_options": options}
    save_checkpoint(path, header | {"model": model.state_dict()})
    return path


def pictures(num, *size):
    """Noise on patches."""
    return F.interpolate(torch.randn(num, 3, 8, 8), size=size) + 0.3 * torch.randn(num, 3, *size)


@torch.no_grad()
def with_statistics(model, size):
    """In eval mode, batch norms with the statistics of a batch: the logits depend on the image and on every layer."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(pictures(16, size, size))
    return model.eval()


def small_model(seed=0, arch="efficientnet_b0", **options):
    torch.manual_seed(seed)
    return with_statistics(build_model(arch, 3, **options), 32)


def timms_b0(num_classes=3, seed=0):
    torch.manual_seed(seed)
    return with_statistics(timm.create_model("tf_efficientnet_b0", num_classes=num_classes), 64)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# there and back


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b5"])
def test_to_torchvision_and_back_is_bitwise(arch):
    ours, theirs, again = (
        small_model(arch=arch),
        torchvision.models.get_model(arch, num_classes=3),
        build_model(arch, 3),
    )
    load_weights(theirs, ours.state_dict())
    assert_same(theirs.state_dict(), ours.state_dict())
    load_weights(again, theirs.state_dict())
    assert_same(again.state_dict(), ours.state_dict())


def test_from_timm_through_a_checkpoint_is_bitwise(tmp_path):
    theirs, ours = timms_b0(), build_model("tf_efficientnet_b0", 3)
    load_weights(ours, theirs.state_dict())
    loaded, header = load_model(save_own(tmp_path / "model.pt", ours, "tf_efficientnet_b0"))
    assert_same(loaded.state_dict(), own_names(theirs.state_dict()))
    assert header["classes"] == CLASSES and not loaded.training
    assert {p.device.type for p in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    fused, _ = load_model(tmp_path / "model.pt", fuse=True)
    images = pictures(2, 65, 51)
    with torch.no_grad():
        expected = theirs(images)
        assert (expected[0] - expected[1]).abs().max() > 0.1 * expected.abs().max()
        for model in loaded, fused:
            assert (model(images) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


# names and containers


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("naming", ["own", "timm"])
def test_prefixes_of_wrappers_are_cut_off(prefix, naming):
    source = timms_b0() if naming == "timm" else small_model(arch="tf_efficientnet_b0")
    model = build_model("tf_efficientnet_b0", 3)
    load_weights(model, {prefix + name: tensor for name, tensor in source.state_dict().items()})
    assert_same(model.state_dict(), own_names(source.state_dict()))


def test_real_wrappers_are_cut_off():
    source = small_model()
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(source), use_buffers=True)
    assert {"n_averaged", "module._orig_mod.classifier.1.bias"} <= averaged.state_dict().keys()
    assert_same(own_names(averaged.state_dict()), source.state_dict())


CONTAINERS = {  # what training scripts save: `good` is to be taken and `last` not
    "plain": lambda good, last: good,
    "state_dict": lambda good, last: {"epoch": 3, "state_dict": good},
    "model": lambda good, last: {"epoch": 3, "model": good, "optimizer": {"state": {}}},
    "nested": lambda good, last: {"model": {"state_dict": good, "epoch": 3}},
    "torchvision": lambda good, last: {
        "epoch": 3,
        "model": last,
        "model_ema": {"n_averaged": torch.tensor(5)} | {f"module.{name}": tensor for name, tensor in good.items()},
    },
    "timm": lambda good, last: {"arch": "b0", "state_dict": last, "state_dict_ema": good, "version": 2},
}


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_are_found_in_their_container_and_the_averaged_ones_win(container, as_file, tmp_path):
    good, last, model = small_model(0), small_model(1), small_model(2)
    weights = CONTAINERS[container](good.state_dict(), last.state_dict())
    if as_file:
        torch.save(weights, tmp_path / "weights.pth")
        weights = tmp_path / "weights.pth"
    load_weights(model, weights)
    assert_same(model.state_dict(), good.state_dict())


@pytest.mark.parametrize("meta", [False, True])
def test_files_of_old_without_counters_and_half_precision(meta):
    source = small_model()
    with torch.device("meta" if meta else "cpu"):
        model = build_model("efficientnet_b0", 3)
    weights = {name: tensor.half() for name, tensor in source.state_dict().items() if tensor.ndim}
    assert not any(name.endswith("num_batches_tracked") for name in weights)
    load_weights(model, weights)
    for name, tensor in model.state_dict().items():
        if tensor.ndim:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].float()), name
        else:
            assert tensor.dtype == torch.int64 and tensor == 0 and tensor.device.type == "cpu"
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_of_every_kind(kind, tmp_path):
    source, model = timms_b0(), build_model("tf_efficientnet_b0", 3)
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    for given in path, str(path):
        model.classifier[1].weight.data.zero_()
        load_weights(model, given)
        assert_same(model.state_dict(), own_names(source.state_dict()))


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_the_second_classifiers_of_published_files_are_left_out(arch):
    """As torchvision's own builder does with weights: no second outputs, images normalised again for these models."""
    theirs = torchvision.models.get_model(
        arch, num_classes=3, aux_logits=True, init_weights=False, transform_input=True
    )
    model = build_model(arch, 3)
    load_weights(model, {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()})
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), theirs.eval()(images))


def test_densenets_names_of_old():
    source, model = build_model("densenet121", 3), build_model("densenet121", 3)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in source.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load_weights(model, old)
    assert_same(model.state_dict(), source.state_dict())


def test_the_arguments_of_a_training_script_do_not_stand_in_the_way(tmp_path):
    source, model = small_model(0), small_model(1)
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "reference.pth")
    load_weights(model, tmp_path / "reference.pth")
    assert_same(model.state_dict(), source.state_dict())


def test_the_name_is_found_in_the_cache_of_hugging_face(tmp_path):
    path = tmp_path / "models--timm--tf_efficientnet_b0.ap_in1k" / "snapshots" / "0123abcd" / "model.safetensors"
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    view = load_stage("01_train_teacher").read_initial(path, "tf_efficientnet_b0")
    assert view["mean"] == (0.5, 0.5, 0.5)


def test_safetensors_without_its_package_says_what_to_install(tmp_path, monkeypatch, capsys):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(lambda: load_weights(small_model(), tmp_path / "x.safetensors"), capsys, "pip install safetensors")


@pytest.mark.parametrize("meta", [False, True])
def test_a_model_shares_no_memory_with_what_it_was_given(meta):
    source = small_model()
    given = source.state_dict()
    with torch.device("meta" if meta else "cpu"):
        model = build_model("efficientnet_b0", 3)
    load_weights(model, given)
    assert_same(model.state_dict(), given)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in given.values())
    assert all(p.requires_grad for p in model.parameters())


# what does not fit


MISFITS = {  # changes the weights; words of the message
    "missing": (lambda w: w.pop("features.8.0.weight"), ["1 missing: features.8.0.weight"]),
    "extra": (lambda w: w.update({"some.other.weight": torch.zeros(1)}), ["1 extra: some.other.weight"]),
    "shape": (
        lambda w: w.update({"features.0.1.bias": torch.zeros(31)}),
        ["1 of another shape: features.0.1.bias (31,) instead of (32,)"],
    ),
    "all three": (
        lambda w: (w.pop("features.0.0.weight"), w.update({"x.y": w["features.0.1.bias"]})),
        ["1 missing: features.0.0.weight", "1 extra: x.y"],
    ),
    "many": (lambda w: [w.pop(name) for name in list(w)[:30] if "weight" in name], ["12 missing: features.0.0."]),
    "other classes": (
        lambda w: w.update({"classifier.1.weight": torch.zeros(11, 1280), "classifier.1.bias": torch.zeros(11)}),
        ["2 of another shape: ", "bias (11,) instead of (3,)", "classifier.1.weight (11, 1280) instead of (3, 1280)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(kind, meta):
    change, words = MISFITS[kind]
    weights = {name: torch.zeros_like(tensor) for name, tensor in small_model().state_dict().items()}
    change(weights)
    if kind == "all three":
        weights["classifier.1.bias"] = torch.zeros(4)
        words = [*words, "1 of another shape: classifier.1.bias (4,) instead of (3,)"]
    with torch.device("meta" if meta else "cpu"):
        model = build_model("efficientnet_b0", 3)
    before = copy_of(model)
    with pytest.raises(ValueError) as error:
        load_weights(model, weights)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value
    assert all(t.is_meta for t in model.state_dict().values()) if meta else not changed(model, before), "half loaded"


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        ("efficientnet_b0", "classifier.1."),
        ("resnet18", "fc."),
        ("mobilenet_v2", "classifier.1."),
        ("mobilenet_v3_small", "classifier.3."),
    ],
)
def test_new_head_loads_everything_but_the_last_layer(arch, head):
    torch.manual_seed(0)
    source, model = build_model(arch, 11), small_model(1, arch)
    before = copy_of(model)
    with pytest.raises(ValueError, match=head.replace(".", r"\.")):
        load_weights(model, source.state_dict())
    load_weights(model, source.state_dict(), new_head=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(head) else source.state_dict()[name]), name
    weights = source.state_dict() | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 extra: extra"):
        load_weights(model, weights, new_head=True)


NO_STATE_DICTS = [{"epoch": 3}, [torch.zeros(1)], {"model": {"epoch": 3}}, {"state_dict": [1]}, {0: torch.zeros(1)}, 3]


@pytest.mark.parametrize("given", NO_STATE_DICTS, ids=repr)
def test_what_is_no_state_dict_is_a_value_error(given, tmp_path):
    model = small_model()
    before = copy_of(model)
    with pytest.raises(ValueError, match="not a state_dict"):
        load_weights(model, given)
    torch.save(given, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a state_dict"):
        load_weights(model, tmp_path / "x.pth")
    assert not changed(model, before)


def test_the_same_weights_twice_are_a_value_error():
    weights = small_model().state_dict()
    weights["module.classifier.1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="twice"):
        load_weights(small_model(), weights)


# files that are damaged or evil


def refused(call, capsys, *words):
    """The call ends with status 2 and one line with these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    assert all(str(word) in errors[0] for word in words), (errors, words)


@pytest.fixture(scope="module")
def b0(tmp_path_factory):
    """A checkpoint of this toolkit: its path, its bytes."""
    path = save_own(tmp_path_factory.mktemp("b0") / "model.pt", small_model(), "efficientnet_b0")
    return path, path.read_bytes()


def test_what_is_no_checkpoint_is_one_line(b0, tmp_path, capsys):
    path, data = tmp_path / "model.pt", b0[1]
    for content in (
        b"I am not a checkpoint\n",
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        *(data[:length] for length in (1, 100, len(data) // 2, len(data) - 1000, len(data) - 22, len(data) - 1)),
    ):
        path.write_bytes(content)
        refused(lambda: load_model(path), capsys, path, "not a checkpoint")
        refused(lambda: load_weights(small_model(), path), capsys, path, "not a checkpoint")
    refused(lambda: load_model(tmp_path / "none.pt"), capsys, tmp_path / "none.pt", "no such checkpoint")
    (tmp_path / "x.safetensors").write_text("text")
    refused(
        lambda: load_weights(small_model(), tmp_path / "x.safetensors"), capsys, "x.safetensors", "not a checkpoint"
    )
    torch.save({"model": {}}, path)
    refused(lambda: load_model(path), capsys, path, "not a checkpoint of this toolkit")


def test_a_flipped_byte_in_a_tensor_is_noticed(b0, tmp_path, capsys):
    path, data = tmp_path / "model.pt", bytearray(b0[1])
    weight = torch.load(b0[0])["model"]["classifier.1.weight"]
    place = data.index(weight.numpy().tobytes()) + 4 * 1000 + 2
    data[place] ^= 1
    path.write_bytes(data)
    other = torch.load(path)["model"]["classifier.1.weight"]  # torch itself sees nothing
    assert (other != weight).sum() == 1 and (other - weight).abs().max() < 1e-3
    refused(lambda: load_model(path), capsys, path, "checksum")
    refused(lambda: load_weights(small_model(), path), capsys, path, "checksum")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(legacy, tiny_data, tmp_path, capsys, run_01):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    path = tmp_path / "evil.pth"
    evil = {"format": CHECKPOINT_FORMAT, "arch": "efficientnet_b0", "model": {"x": torch.zeros(1), "y": Evil()}}
    torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
    refused(lambda: load_model(path), capsys, path, "nothing in it was executed")
    refused(lambda: load_weights(small_model(), path), capsys, path, "nothing in it was executed")
    done = run_01(
        "--data", tiny_data, "--init", path, "--arch", "efficientnet_b0", "--epochs", 0, "--out", tmp_path / "o"
    )
    assert done[0] == 2 and "nothing in it was executed" in done[2] and not (tmp_path / "o").exists()
    assert not ran.exists()
    torch.load(path, weights_only=False)["model"]["y"].close()
    assert ran.exists(), "the pickle was harmless"


@pytest.mark.parametrize("arch", ["efficientnet_b0", "resnet18"])
def test_a_checkpoint_whose_weights_do_not_fit_is_one_line(arch, tmp_path, capsys):
    model = small_model(arch=arch)
    missing, wrong = next(iter(model.state_dict())), list(model.state_dict())[-1]
    path = save_own(tmp_path / "model.pt", model, arch)
    checkpoint = torch.load(path)
    torch.save(checkpoint | {"classes": ["a", "b"]}, path)
    refused(lambda: load_model(path), capsys, path, wrong, "instead of (2,)")
    del checkpoint["model"][missing]
    torch.save(checkpoint, path)
    refused(lambda: load_model(path), capsys, path, f"missing: {missing}")


# 01 --init, and the flags that save memory


def runner(name, monkeypatch, capsys):
    """run(*flags) -> (exit status, stdout, stderr) of a stage in this process: seconds saved a call."""
    stage = load_stage(name)
    monkeypatch.setattr(stage, "draw_curves", lambda out: None)

    def run(*flags, stop_after=-1):
        """`stop_after`: the step after which SIGTERM arrives."""
        steps = iter(range(1, 1000))
        monkeypatch.setattr(stage, "StopSignal", lambda processes: lambda: next(steps) == stop_after)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            stage.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_01(monkeypatch, capsys):
    return runner("01_train_teacher", monkeypatch, capsys)


@pytest.fixture
def run_04(monkeypatch, capsys):
    return runner("04_train_student", monkeypatch, capsys)


def save(path, weights):
    path.parent.mkdir(parents=True, exist_ok=True)
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    return path


def assert_refused(done, *words):
    status, _, errors = done
    assert status == 2 and len(errors.splitlines()) == 1, done
    assert all(str(word) in errors for word in words), (errors, words)


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
    assert_same(loaded.state_dict(), own_names(theirs.state_dict()))
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
    status, _, errors = run_01(*flags, "--out", tmp_path / "t")
    assert status == 0, errors
    loaded, saved = load_model(tmp_path / "t" / "model.pt")
    assert_same(loaded.state_dict(), own_names(theirs.state_dict()))
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
        view = load_stage("01_train_teacher").read_initial(path, arch)
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
    view = load_stage("01_train_teacher").read_initial(save(tmp_path / name, weights), arch)
    assert (view["image_size"], view["interpolation"], view["mean"][0]) == (size, interpolation, red)
    assert view["crop_fraction"] == pytest.approx(crop) and view["arch"] == arch and view["model"] == weights


def test_the_view_of_all_that_torchvision_publishes(tmp_path):
    read_initial = load_stage("01_train_teacher").read_initial
    for arch in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(arch):
            record = weights.transforms()
            view = read_initial(save(tmp_path / Path(weights.url).name, {"x": torch.zeros(1)}), arch)
            assert [view["image_size"]] == record.crop_size and view["interpolation"] == record.interpolation.value
            assert view["crop_fraction"] == pytest.approx(record.crop_size[0] / record.resize_size[0]), weights
            assert (view["mean"], view["std"]) == (tuple(record.mean), tuple(record.std))


SHORT = ["--image-size", 32, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0, "--bn-momentum", 0]


def test_other_classes_are_a_new_classifier_or_a_mistake(tiny_data, run_01, tmp_path):
    theirs = timms_b0(1000)
    path = save(tmp_path / "tf_efficientnet_b0_ns-c0e6a31c.pth", theirs.state_dict())
    flags = ["--init", path, "--arch", "tf_efficientnet_b0", "--data", tiny_data, "--out", tmp_path / "t"]
    assert_refused(run_01(*flags, "--epochs", 0), path, "1000", "--epochs 0")
    assert not (tmp_path / "t").exists()
    status, printed, errors = run_01(*flags, *SHORT)
    assert status == 0 and "new classifier" in printed, errors
    given, trained = own_names(theirs.state_dict()), torch.load(tmp_path / "t" / "model.pt")["model"]
    for name in given.keys() - {"classifier.1.weight", "classifier.1.bias"}:
        assert name.endswith("num_batches_tracked") or torch.equal(given[name], trained[name]), name
    assert trained["classifier.1.weight"].shape == (3, 1280) and trained["classifier.1.weight"].std() > 0


@pytest.mark.parametrize("classes", [["triangle", "square", "disc"], ["ant", "bee", "cat"], ["disc", "square"]])
def test_a_checkpoint_of_other_classes_in_name_or_order_gets_a_new_classifier(classes, tiny_data, run_01, tmp_path):
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", len(classes))
    path = save_own(tmp_path / "model.pt", model, "efficientnet_b0", classes=classes)
    flags = ["--init", path, "--data", tiny_data, "--out", tmp_path / "t"]
    assert_refused(run_01(*flags, "--epochs", 0), path, "classes", "--epochs 0")
    status, printed, errors = run_01(*flags, *SHORT, "--seed", 1)
    assert status == 0 and "new classifier" in printed, errors
    trained = torch.load(tmp_path / "t" / "model.pt")["model"]
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
    assert_refused(done, *words)
    assert not (tmp_path / "t").exists()


def test_a_checkpoint_of_this_toolkit_brings_its_arch_and_its_view(tiny_data, run_01, tmp_path):
    """The interpolation too: val is looked at as the weights want it."""
    model = small_model(small_images=True)
    view = {"image_size": 40, "crop_fraction": 0.75, "interpolation": "bilinear", "mean": (0.4,) * 3, "std": (0.3,) * 3}
    path = save_own(tmp_path / "model.pt", model, "efficientnet_b0", OPTIONS | {"small_images": True}, **view)
    status, printed, errors = run_01("--init", path, "--data", tiny_data, "--out", tmp_path / "t", "--epochs", 0)
    assert status == 0 and "efficientnet_b0 at 40 px" in printed, errors
    loaded, saved = load_model(tmp_path / "t" / "model.pt")
    assert_same(loaded.state_dict(), model.state_dict())
    assert saved["arch_options"]["small_images"] is True and {name: saved[name] for name in view} == view
    losses = {
        name: loss_by_hand(model, tiny_data, 24, 4, 40, Image.Resampling[name], (0.4,) * 3, (0.3,) * 3)
        for name in ("BILINEAR", "BICUBIC")
    }
    assert saved["metrics"]["val_loss"] == pytest.approx(losses["BILINEAR"], rel=1e-5)
    assert abs(losses["BILINEAR"] - losses["BICUBIC"]) > 1e-4 * losses["BILINEAR"]


def test_eval_view_interpolates_as_it_is_told():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 51, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    square = image.crop((10, 4, 42, 36))
    for name in "bilinear", "bicubic":
        expected = np.asarray(square.resize((24, 24), Image.Resampling[name.upper()]))
        assert np.array_equal(eval_view(image, 24, 0.8, name), expected)
    assert not np.array_equal(eval_view(image, 24, 0.8, "bilinear"), eval_view(image, 24, 0.8))


def weights_of(out):
    return torch.load(out / "model.pt")["model"]


def test_checkpointed_activations_change_no_bit_and_may_be_added_later(tiny_data, run_01, tmp_path, monkeypatch):
    calls, original = [], common.checkpoint_activations

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(common, "checkpoint_activations", counted)
    flags = ["--data", tiny_data, "--image-size", 32, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0]
    flags += ["--lr", 0.01, "--bn-momentum", 0.1, "--ema-decay", 0.5, "--drop-path", 0.5]
    assert run_01(*flags, "--out", tmp_path / "kept")[0] == 0 and not calls
    assert run_01(*flags, "--out", tmp_path / "computed", "--checkpoint-activations")[0] == 0
    assert len(calls) == 6 * 16  # steps x blocks
    assert_same(weights_of(tmp_path / "kept"), weights_of(tmp_path / "computed"))
    assert run_01(*flags, "--out", tmp_path / "added", stop_after=3)[0] == 143
    status, printed, errors = run_01(*flags, "--out", tmp_path / "added", "--checkpoint-activations")
    assert status == 0 and "from step 3" in printed and len(calls) == 9 * 16, errors
    assert_same(weights_of(tmp_path / "kept"), weights_of(tmp_path / "added"))


def assert_close_runs(start, one, two, names):
    """The weights moved alike, and the losses are equal, up to the order of additions."""
    start, a, b = (weights_of(out) for out in (start, one, two))
    assert any(not torch.equal(a[name], b[name]) for name in a), "they were the same steps"
    for name in start:
        assert (a[name] - b[name]).norm() < 0.05 * (a[name] - start[name]).norm(), name
    one, two = read_metrics(one), read_metrics(two)
    for name in names:
        losses = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert len(losses[0]) >= 6 and losses[0] == pytest.approx(losses[1], rel=1e-3), name


SQUEEZED = ["--arch", "squeezenet1_1", "--dropout", 0, "--image-size", 32, "--batch-size", 8, "--epochs", 2]
SQUEEZED += ["--warmup-epochs", 0, "--lr", 0.01, "--optimizer", "sgd", "--ema-decay", 0.5, "--num-ops", 1]
SQUEEZED += ["--magnitude", 5]
RUNS = {"start": ["--lr", 0], "whole": ["--accumulate", 1], "parts": ["--accumulate", 2]}


def test_a_step_in_parts_is_a_step_in_01(tiny_data, run_01, tmp_path):
    flags = ["--data", tiny_data, *SQUEEZED]
    for name, more in RUNS.items():
        done = run_01(*flags, *more, "--out", tmp_path / name)
        assert done[0] == 0, done
    assert_close_runs(*(tmp_path / name for name in RUNS), ["loss"])
    assert_refused(run_01(*flags, "--accumulate", 3, "--out", tmp_path / "3"), "--batch-size 8", "3 parts")
    assert not (tmp_path / "3").exists()


def test_a_step_in_parts_is_a_step_in_04(tiny_data, run_04, tmp_path):
    """With an unreadable unlabelled image, so that parts differ in size."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "unlabeled" / "broken.png").write_text("<html>")
    teacher = small_model(arch="squeezenet1_1")
    path = save_own(tmp_path / "teacher.pt", teacher, "squeezenet1_1", data=str(data))
    flags = ["--teacher", path, *SQUEEZED, "--ratio", 2]
    for name, more in RUNS.items():
        done = run_04(*flags, *more, "--out", tmp_path / name)
        assert done[0] == 0 and "1 unlabelled images are unreadable" in done[1], done
    assert_close_runs(*(tmp_path / name for name in RUNS), ["loss", "loss_labeled", "loss_unlabeled"])
    assert_refused(run_04(*flags, "--accumulate", 3, "--out", tmp_path / "3"), "--batch-size 8", "3 parts")
    assert_refused(run_04(*flags, "--ratio", 0.625, "--accumulate", 2, "--out", tmp_path / "3"), "--ratio", "2 parts")
    assert not (tmp_path / "3").exists()


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--compile"]], ids=" ".join)
def test_labels_in_bf16_and_compiled(flags, tiny_data, run_stage, tmp_path):
    """20 images, less than the 512 of a batch: nothing of the padded rows shows; bf16 rounds, compiling does not."""
    save_own(tmp_path / "model.pt", small_model(arch="squeezenet1_1"), "squeezenet1_1", data=str(tiny_data))
    base = ["02_pseudo_label.py", "--teacher", tmp_path / "model.pt"]
    found = []
    for name, more in (("plain", []), ("other", flags)):
        run_stage(*base, "--out", tmp_path / f"{name}.h5", *more)
        with h5py.File(tmp_path / f"{name}.h5") as file:
            found.append((file["logits"][:].astype(np.float32), file["confidence"][:]))
            assert (file["status"][:] == 1).all() and len(file["status"]) == 20
    (logits, confidence), (other_logits, other_confidence) = found
    assert np.ptp(confidence) > 1e-3
    tolerance = 0.05 if "bf16" in flags else 2e-3  # logits are stored as float16
    np.testing.assert_allclose(other_logits, logits, atol=tolerance * np.abs(logits).max())
    rounding = np.abs(other_confidence - confidence).max()
    assert rounding > 1e-5 if "bf16" in flags else rounding < 1e-5


def test_evaluation_in_bf16_and_compiled(tiny_data, run_stage, tmp_path):
    """Rounding shows in the loss of the clean part and not in an attack, which stays in float32."""
    save_own(tmp_path / "model.pt", small_model(arch="squeezenet1_1"), "squeezenet1_1", data=str(tiny_data))
    results = {}
    for name, flags in {"plain": [], "bf16": ["--precision", "bf16"], "compiled": ["--compile"]}.items():
        out = tmp_path / name
        run_stage("06_eval_robustness.py", tmp_path / "model.pt", "--out", out, "--fgsm", 2, *flags)
        results[name] = json.loads((out / "robustness.json").read_text())[str(tmp_path / "model.pt")]
    plain, bf16, compiled = (result["clean"]["loss"] for result in results.values())
    assert compiled == pytest.approx(plain, rel=1e-5) and bf16 == pytest.approx(plain, rel=0.05) and bf16 != plain
    assert results["plain"]["fgsm"] == results["bf16"]["fgsm"] == results["compiled"]["fgsm"]
    assert [result["settings"]["clean"]["precision"] for result in results.values()] == ["fp32", "bf16", "fp32"]
