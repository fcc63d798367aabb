"""The models against torchvision's and timm's, the noise inside them, the 32-pixel variant, folded batch norms; and
weights of this toolkit, torchvision and timm: what fits, what is refused by name."""

import argparse
import re
import sys

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import assert_same_weights, save_model
from torch import nn
from torch.nn import functional as F

import common
from common import EFFICIENTNETS, build_model, fuse_batch_norms, load_model, load_weights, own_names, timm_names


SMALL = [f"efficientnet_b{i}" for i in range(8)]


PARAMETERS = {
    "efficientnet_b0": 5_288_548,
    "efficientnet_b7": 66_347_960,
    "efficientnet_l0": 140_764_664,
    "efficientnet_l1": 272_630_564,
    "efficientnet_l2": 480_309_308,
}


CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)


def on_meta(arch, **options):
    with torch.device("meta"):
        return build_model(arch, **options)


@torch.no_grad()
def randomise_batch_norms(model, size=64):
    """Affine terms away from 0 and 1 and the statistics of a batch: then every layer, eps and padding shows in the
    logits. Statistics drawn at random make the activations of deep models explode or not depend on the image."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.uniform_(-0.3, 0.3, generator=generator)
            module.train().momentum = 1.0
    model(torch.randn(4, 3, size, size, generator=generator))
    model.eval()


def assert_same_logits(model, oracle, *sizes):
    for size in sizes:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            expected, got = oracle.eval()(images), model.eval()(images)
        scale = expected.abs().max()
        assert (expected[0] - expected[1]).abs().max() > 0.1 * scale, "these logits say nothing about the image"
        assert (expected - got).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_count(arch):
    assert sum(p.numel() for p in on_meta(arch).parameters()) == PARAMETERS[arch]


def test_table_has_every_model_and_its_resolution():
    assert list(EFFICIENTNETS) == [*SMALL, "efficientnet_l0", "efficientnet_l1", "efficientnet_l2"]
    assert [EFFICIENTNETS[arch][2] for arch in SMALL] == [224, 240, 260, 300, 380, 456, 528, 600]
    assert [EFFICIENTNETS[arch][3] for arch in SMALL] == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert EFFICIENTNETS["efficientnet_l2"] == (4.3, 5.3, 475, 0.5)


def layers_of(model):
    """What makes each layer with weights what it is, in order."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            bias = module.bias is not None
            found.append((*module.weight.shape, module.stride, module.padding, module.dilation, module.groups, bias))
        elif isinstance(module, nn.BatchNorm2d):
            found.append((module.num_features, module.eps))
        elif isinstance(module, nn.Linear):
            found.append(tuple(module.weight.shape))
        elif isinstance(module, nn.Dropout):
            found.append(module.p)
    return found


@pytest.mark.parametrize("arch", SMALL)
def test_every_layer_is_torchvisions(arch):
    with torch.device("meta"):
        oracle = torchvision.models.get_model(arch, weights=None)
    model = on_meta(arch)
    names = [(name, tensor.shape) for name, tensor in oracle.state_dict().items()]
    assert [(name, tensor.shape) for name, tensor in model.state_dict().items()] == names
    assert layers_of(model) == layers_of(oracle)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b4", "efficientnet_b5"])  # from B5 on another eps
def test_torchvisions_weights_fit_as_they_are_and_ours_fit_torchvision(arch):
    torch.manual_seed(0)
    oracle = torchvision.models.get_model(arch, weights=None)
    randomise_batch_norms(oracle)
    model = build_model(arch)
    load_weights(model, oracle.state_dict())
    assert_same_logits(model, oracle, (64, 64), (65, 51))
    with torch.device("meta"):
        oracle = torchvision.models.get_model(arch, weights=None)
    oracle.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert_same_logits(model, oracle, (64, 64))


@pytest.mark.parametrize("arch", ["resnet18", "timm/efficientnet_b0", "convnext_tiny"])
def test_of_other_models_there_is_nothing_to_rename_for_timm(arch):
    with pytest.raises(ValueError, match="is not of an EfficientNet"):
        timm_names(on_meta(arch).state_dict())


@pytest.mark.parametrize("arch", [f"tf_{arch}" for arch in (*SMALL, "efficientnet_l2")])
def test_timms_names_and_shapes_are_ours(arch):
    with torch.device("meta"):
        oracle = timm.create_model(arch, pretrained=False)
    model, theirs = on_meta(arch), own_names(oracle.state_dict())
    ours = model.state_dict()  # timm has the same order
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [(name, t.shape) for name, t in theirs.items()]
    assert list(timm_names(ours)) == list(oracle.state_dict())  # and the other way around
    strides, eps = (
        [[getattr(module, name) for module in net.modules() if isinstance(module, kind)] for net in (model, oracle)]
        for kind, name in ((nn.Conv2d, "stride"), (nn.BatchNorm2d, "eps"))
    )
    assert strides[0] == strides[1] and eps[0] == eps[1] and set(eps[0]) == {1e-3}


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b2", "efficientnet_b5"])
def test_tf_logits_equal_timms(arch):
    torch.manual_seed(0)
    oracle = timm.create_model(f"tf_{arch}", pretrained=False)
    randomise_batch_norms(oracle)
    model = build_model(f"tf_{arch}")
    load_weights(model, oracle.state_dict())  # by timm's names
    for ours, theirs in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert_same_logits(model, oracle, (64, 64), (65, 51), *([(65, 65), (50, 67)] if arch == "efficientnet_b0" else []))


def test_l2s_depth_at_a_fifth_of_b0s_width_equals_timms(monkeypatch):
    """All its 480 million parameters would take 10 seconds and 4 GB; their names and shapes are compared above."""
    torch.manual_seed(0)
    build = timm.models.efficientnet._gen_efficientnet
    oracle = build("tf_efficientnet_l2", 0.2, 5.3, pad_type="same", bn_eps=1e-3)
    monkeypatch.setitem(EFFICIENTNETS, "efficientnet_l2", (0.2, *EFFICIENTNETS["efficientnet_l2"][1:]))
    model = build_model("tf_efficientnet_l2")
    randomise_batch_norms(oracle)
    load_weights(model, oracle.state_dict())
    assert_same_logits(model, oracle, (64, 64))


def test_a_training_pass_and_its_gradients_are_torchvisions():
    """1 x 1 convolutions are matrix products in training on CPUs."""
    torch.manual_seed(0)
    oracle = torchvision.models.efficientnet_b0(stochastic_depth_prob=0.0, dropout=0.0, num_classes=5)
    model = build_model("efficientnet_b0", 5, drop_path=0.0, dropout=0.0)
    load_weights(model, oracle.state_dict())
    images = torch.randn(8, 3, 64, 64)
    for module in oracle, model:
        module.train()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.3
        F.cross_entropy(module(images), torch.arange(8) % 5).backward()
    largest = max(p.grad.abs().max() for p in oracle.parameters())
    for (name, mine), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-3 * theirs.grad.abs().max() + 1e-6 * largest, name
    for mine, theirs in zip(model.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


# the noise inside


@pytest.mark.parametrize(("arch", "num"), [("efficientnet_b0", 16), ("efficientnet_b7", 55), ("efficientnet_l2", 88)])
def test_drop_path_grows_linearly_over_the_blocks(arch, num):
    rates = [module.drop_path for module in on_meta(arch).modules() if hasattr(module, "drop_path")]
    assert rates == pytest.approx([0.2 * i / num for i in range(num)])
    rates = [module.drop_path for module in on_meta(arch, drop_path=0.5).modules() if hasattr(module, "drop_path")]
    assert rates[-1] == pytest.approx(0.5 * (num - 1) / num)


def skipping_block():
    """A block with a skip that drops half of the images, its batch norms frozen, so that only the drop is random."""
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", drop_path=0.5)
    block = [m for m in model.modules() if getattr(m, "has_skip", False)][-1]
    block.eval()
    block.training = True
    return block, torch.randn(1, block.block[-1][0].out_channels, 3, 3)


def test_stochastic_depth_keeps_the_mean_and_drops_whole_images():
    block, x = skipping_block()
    passes = 2000
    with torch.no_grad():
        out = block(x.expand(passes, -1, -1, -1))
        full = block.eval()(x)
    residual = (out - x).flatten(1)
    dropped = (residual == 0).all(1)
    assert ((residual != 0).any(1) | dropped).all()
    assert dropped.float().mean().item() == pytest.approx(block.drop_path, abs=0.04)
    kept = residual[~dropped] * (1 - block.drop_path)
    torch.testing.assert_close(kept, (full - x).flatten(1).expand_as(kept), rtol=1e-3, atol=1e-5)
    scale = (full - x).abs().max()
    assert (out.mean(0) - full[0]).abs().max() < 0.09 * scale  # 4 sigma of the mean of 2000 drops


def test_nothing_is_random_in_eval_and_something_in_training():
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", 5)
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images))
        for module in model.modules():  # batch norm on its running statistics: what is left is dropout and drop_path
            module.training = not isinstance(module, torch.nn.BatchNorm2d)
        assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_before_the_classifier_keeps_the_mean(rate):
    torch.manual_seed(0)
    classifier = build_model("efficientnet_b0", 5, dropout=rate).classifier.train()
    x, passes = torch.rand(1280), 4000
    with torch.no_grad():
        dropped = classifier[0](torch.ones(passes, 1280))
        zeros, expected_error = (dropped == 0).double().mean().item(), (rate * (1 - rate) / dropped.numel()) ** 0.5
        assert abs(zeros - rate) < 4 * expected_error
        assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        mean = classifier(x.repeat(passes, 1)).mean(0)
        sigma = ((classifier[1].weight * x).square().sum(1) * rate / (1 - rate) / passes).sqrt()
        full = classifier.eval()(x)
    assert (sigma > 0).all() and ((mean - full).abs() < 4 * sigma).all()
    assert torch.equal(full, classifier[1](x)), "dropout in eval"


def test_dropout_is_the_official_one():
    archs = [*SMALL, "efficientnet_l2"]
    rates = [EFFICIENTNETS[arch][3] for arch in archs]
    assert rates == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5]  # efficientnet_builder.py:33-45


# options


@pytest.mark.parametrize(
    ("small", "sizes"), [(False, [16, 16, 8, 4, 2, 2, 1, 1, 1]), (True, [16, 16, 16, 16, 8, 8, 4, 4, 4])]
)
def test_small_images_keeps_the_resolution_of_stages_2_and_3(small, sizes):
    model = build_model("efficientnet_b0", small_images=small).eval()
    x, found = torch.zeros(1, 3, 32, 32), []
    with torch.no_grad():
        for stage in model.features:
            x = stage(x)
            found.append(x.shape[-1])
    assert found == sizes


def test_small_images_has_the_same_weights():
    shapes = [
        [(n, t.shape) for n, t in on_meta("efficientnet_b0", small_images=s).state_dict().items()] for s in (0, 1)
    ]
    assert shapes[0] == shapes[1]


def test_options_none_mean_the_models_own():
    model = on_meta("efficientnet_b7", num_classes=7, small_images=None, dropout=None, drop_path=None)
    assert model.classifier[0].p == 0.5
    assert on_meta("efficientnet_b7", dropout=0.1).classifier[0].p == 0.1
    assert model.classifier[1].out_features == 7


def test_initial_confidence_is_low_with_few_classes():
    """A fresh 10-class model that is sure of itself would let every image through the confidence filter."""
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", 10).train()
    with torch.no_grad():
        probs = model(torch.randn(16, 3, 32, 32)).softmax(1)
    assert probs.amax(1).mean() < 0.25


FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"]
FAMILIES += [
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
]
FAMILIES += ["resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn"]
FAMILIES += ["vit_b_16", "wide_resnet50_2"]


def family_of(arch):
    return torchvision.models.get_model_builder(arch).__module__


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_classifier_of_torchvision_can_be_trained(arch):
    """One plain tensor of logits in training too, and the last weights are the classifier's, as `new_head` says."""
    device = "cpu" if arch.startswith("regnet") else "meta"  # torchvision computes a RegNet's widths on the device
    with torch.device(device):
        model, images = build_model(arch, 7), torch.zeros(2, 3, 224, 224)
    logits = model.train()(images)
    assert type(logits) is torch.Tensor and logits.shape == (2, 7)
    assert list(model.state_dict().values())[-1].shape[0] == 7


def test_the_classifiers_are_those_that_one_expects():
    assert {"resnet18", "vit_b_16", "googlenet", "convnext_tiny", "efficientnet_v2_s"} <= set(CLASSIFIERS)
    assert {family_of(arch) for arch in CLASSIFIERS} == {family_of(arch) for arch in FAMILIES}
    assert len([arch for arch in CLASSIFIERS if arch.startswith("regnet")]) == 15


def test_other_names_are_torchvisions():
    model = build_model("resnet18", 7)
    assert isinstance(model, torchvision.models.ResNet) and model.fc.out_features == 7
    model = build_model("resnet18", 7, small_images=None, dropout=None, drop_path=None)
    assert model.fc.out_features == 7


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("efficientnet_b9", {}),
        ("tf_resnet18", {}),
        ("", {}),
        ("resnet18", {"small_images": True, "drop_path": 0.1}),
        ("fcn_resnet50", {}),
        ("quantized_resnet18", {}),
        ("fasterrcnn_resnet50_fpn", {}),
        ("r3d_18", {}),
        ("raft_small", {}),
    ],
)
def test_unknown_names_and_options_are_value_errors(arch, options):
    with pytest.raises(ValueError, match="cannot build"):
        build_model(arch, 3, **options)


# folded batch norms


FOLDED = [
    ("efficientnet_b0", {}),
    ("tf_efficientnet_b0", {}),
    ("efficientnet_b0", {"small_images": True}),
    ("resnet18", {}),
    ("resnext50_32x4d", {}),
    ("densenet121", {}),
    ("mobilenet_v2", {}),
    ("mobilenet_v3_small", {}),
    ("shufflenet_v2_x0_5", {}),
    ("mnasnet0_5", {}),
    ("regnet_y_400mf", {}),
    ("googlenet", {}),
    ("inception_v3", {}),
    ("efficientnet_v2_s", {}),
    ("squeezenet1_0", {}),
    ("convnext_tiny", {}),
]


def norms_of_convolutions(model, images):
    """Of each batch norm of a forward pass: whether what it reads is what a convolution has given out."""
    made, found = {}, []

    def record(module, inputs, output):
        if isinstance(module, nn.BatchNorm2d):
            found.append(isinstance(made.get(id(inputs[0]), [None])[0], nn.Conv2d))
        made[id(output)] = module, output  # kept alive, so that no id comes twice

    hooks = [m.register_forward_hook(record) for m in model.modules() if not list(m.children())]
    with torch.inference_mode():
        logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, found


@pytest.mark.parametrize(("arch", "options"), FOLDED)
def test_folded_batch_norms_are_gone_and_the_logits_the_same(arch, options):
    torch.manual_seed(0)
    model, images = build_model(arch, 5, **options), torch.randn(2, 3, 80, 80)
    randomise_batch_norms(model, 80)
    expected, before = norms_of_convolutions(model, images)
    fuse_batch_norms(model.train())
    logits, after = norms_of_convolutions(model, images)
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(before) == sum(isinstance(m, nn.BatchNorm2d) for m in build_model(arch, 5, **options).modules())
    assert not any(after) and len(after) == len(before) - sum(before)
    assert sum(before) > 0 or arch in ("squeezenet1_0", "convnext_tiny")
    if "efficientnet" in arch:
        assert all(before) and not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


# weights: there and back


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


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b5"])
def test_to_torchvision_and_back_is_bitwise(arch):
    ours, theirs, again = (
        small_model(arch=arch),
        torchvision.models.get_model(arch, num_classes=3),
        build_model(arch, 3),
    )
    load_weights(theirs, ours.state_dict())
    assert_same_weights(theirs.state_dict(), ours.state_dict())
    load_weights(again, theirs.state_dict())
    assert_same_weights(again.state_dict(), ours.state_dict())


def test_from_timm_through_a_checkpoint_is_bitwise(tmp_path):
    theirs, ours = timms_b0(), build_model("tf_efficientnet_b0", 3)
    load_weights(ours, theirs.state_dict())
    loaded, header = load_model(save_model(tmp_path / "model.pt", "tf_efficientnet_b0", model=ours))
    assert_same_weights(loaded.state_dict(), own_names(theirs.state_dict()))
    assert header["classes"] == ["disc", "square", "triangle"] and not loaded.training
    assert {p.device.type for p in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    fused, _ = load_model(tmp_path / "model.pt", fuse=True)
    images = pictures(2, 65, 51)
    with torch.no_grad():
        expected = theirs(images)
        assert (expected[0] - expected[1]).abs().max() > 0.1 * expected.abs().max()
        for model in loaded, fused:
            assert (model(images) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


# weights: names and containers


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("naming", ["own", "timm"])
def test_prefixes_of_wrappers_are_cut_off(prefix, naming):
    source = timms_b0() if naming == "timm" else small_model(arch="tf_efficientnet_b0")
    model = build_model("tf_efficientnet_b0", 3)
    load_weights(model, {prefix + name: tensor for name, tensor in source.state_dict().items()})
    assert_same_weights(model.state_dict(), own_names(source.state_dict()))


def test_real_wrappers_are_cut_off():
    source = small_model()
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(source), use_buffers=True)
    assert {"n_averaged", "module._orig_mod.classifier.1.bias"} <= averaged.state_dict().keys()
    assert_same_weights(own_names(averaged.state_dict()), source.state_dict())


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
    good, last, model = (build_model("shufflenet_v2_x0_5", 3) for _ in range(3))
    weights = CONTAINERS[container](good.state_dict(), last.state_dict())
    if as_file:
        torch.save(weights, tmp_path / "weights.pth")
        weights = tmp_path / "weights.pth"
    load_weights(model, weights)
    assert_same_weights(model.state_dict(), good.state_dict())


@pytest.mark.parametrize("meta", [False, True])
def test_older_files_without_counters_and_half_precision(meta):
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
        assert_same_weights(model.state_dict(), own_names(source.state_dict()))


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


def test_older_names_of_densenets():
    source, model = build_model("densenet121", 3), build_model("densenet121", 3)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in source.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load_weights(model, old)
    assert_same_weights(model.state_dict(), source.state_dict())


def test_the_arguments_of_a_training_script_do_not_stand_in_the_way(tmp_path):
    source, model = small_model(0), small_model(1)
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "reference.pth")
    load_weights(model, tmp_path / "reference.pth")
    assert_same_weights(model.state_dict(), source.state_dict())


def test_safetensors_without_its_package_says_what_to_install(tmp_path, monkeypatch, mistake):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    mistake(lambda: load_weights(small_model(), tmp_path / "x.safetensors"), "pip install safetensors")


@pytest.mark.parametrize("meta", [False, True])
def test_a_model_shares_no_memory_with_what_it_was_given(meta):
    source = small_model()
    given = source.state_dict()
    with torch.device("meta" if meta else "cpu"):
        model = build_model("efficientnet_b0", 3)
    load_weights(model, given)
    assert_same_weights(model.state_dict(), given)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in given.values())
    assert all(p.requires_grad for p in model.parameters())


# weights: what does not fit


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


# training in bf16 on CPUs


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(1, 5, 1), (1, 3, 1), (2, 5, 1), (2, 3, 1), (2, 5, 2), (2, 3, 2)]
)
@pytest.mark.parametrize("same", [False, True])
def test_depthwise_convolutions_of_tiny_maps_are_torchs(size, kernel, stride, same):
    """Value and gradients, in float64, with torch's and with TensorFlow's padding."""
    torch.manual_seed(0)
    if same:
        layer = common.SamePadConv2d(6, 6, kernel, stride, groups=6, bias=False).double()
    else:
        layer = common.DepthwiseConv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=False).double()
    x = torch.randn(3, 6, size, size, dtype=torch.float64, requires_grad=True)
    found = []
    for tiny in (False, True):
        y = layer.convolve(x, tiny)
        grads = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), (x, layer.weight))
        found.append((y, *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "tf_efficientnet_b0"])
def test_training_in_bf16_on_a_cpu_is_that_in_fp32_up_to_rounding(arch):
    """And in evaluation mode, and in fp32, nothing of it is used."""
    torch.manual_seed(0)
    model = build_model(arch, 5, dropout=0, drop_path=0).to(memory_format=torch.channels_last).train()
    images, used = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last), []
    original = common.small_depthwise
    gradients = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "small_depthwise", lambda *args: used.append(1) or original(*args))
        for name, precision in (("fp32", "fp32"), ("ours", "bf16"), ("torch's", "bf16")):
            if name == "torch's":
                patch.setattr(common, "is_bf16_training", lambda *_: False)
            used.clear()
            model.zero_grad()
            with common.autocast(precision, images.device)[0]:
                loss = F.cross_entropy(model(images).float(), torch.arange(16) % 5)
            loss.backward()
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert len(used) == (10 if name == "ours" else 0)
    with torch.no_grad(), common.autocast("bf16", images.device)[0]:
        model.eval()(images)
    assert not used
    ours, torchs = ((gradients[name] - gradients["fp32"]).norm() for name in ("ours", "torch's"))
    assert 0 < ours < 1.2 * torchs < 0.5 * gradients["fp32"].norm()
