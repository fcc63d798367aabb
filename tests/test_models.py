"""Models against torchvision's and timm's, the noise inside them, folded batch norms; which weights fit; recipes."""

import re
from argparse import Namespace

import pytest
import timm
import torch
import torchvision
from conftest import assert_same_weights, save_model
from torch import nn
from torch.nn import functional as F

from common import EFFICIENTNETS, Recipe, build_model, fuse_batch_norms, head_names, load_model
from common import img_size_option, load_weights, own_names, recipe_of, view_of

SMALL = [f"efficientnet_b{i}" for i in range(8)]


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


def test_parameters_of_l0_and_l1_which_others_lack():
    numbers = [sum(p.numel() for p in on_meta(f"efficientnet_{arch}").parameters()) for arch in ("l0", "l1")]
    assert numbers == [140_764_664, 272_630_564]


def shapes_of(weights):
    return [(name, tensor.shape) for name, tensor in weights.items()]


def layers_of(model):
    """Each layer with weights, and each dropout, as it prints itself: shape, stride, padding, eps."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Dropout)
    printed = [module.extra_repr() for module in model.modules() if isinstance(module, kinds)]
    return [re.sub("momentum=[^,]+", "", layer) for layer in printed]


@pytest.mark.parametrize("arch", SMALL)
def test_every_layer_is_torchvisions(arch):
    with torch.device("meta"):
        oracle = torchvision.models.get_model(arch, weights=None)
    model = on_meta(arch)
    assert shapes_of(model.state_dict()) == shapes_of(oracle.state_dict())
    assert layers_of(model) == layers_of(oracle)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b5", "googlenet"])  # from B5 on another eps
def test_logits_equal_torchvisions(arch):
    torch.manual_seed(0)
    options = {"init_weights": False, "transform_input": True} if arch == "googlenet" else {}
    oracle = torchvision.models.get_model(arch, weights=None, **options)
    randomise_batch_norms(oracle)
    model = build_model(arch)
    load_weights(model, oracle.state_dict())
    assert_same_logits(model, oracle, (64, 64), (65, 51))


@pytest.mark.parametrize("arch", [f"tf_{arch}" for arch in (*SMALL, "efficientnet_l2")])
def test_timms_names_and_shapes_are_ours(arch):
    with torch.device("meta"):
        oracle = timm.create_model(arch, pretrained=False)
    model = on_meta(arch)
    assert shapes_of(model.state_dict()) == shapes_of(own_names(oracle.state_dict()))  # in order
    for kind, name in ((nn.Conv2d, "stride"), (nn.BatchNorm2d, "eps")):
        ours = [getattr(module, name) for module in model.modules() if isinstance(module, kind)]
        theirs = [getattr(module, name) for module in oracle.modules() if isinstance(module, kind)]
        assert ours == theirs, name


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b2", "efficientnet_b5"])
def test_tf_logits_equal_timms(arch):
    torch.manual_seed(0)
    oracle = timm.create_model(f"tf_{arch}", pretrained=False)
    randomise_batch_norms(oracle)
    model = build_model(f"tf_{arch}")
    load_weights(model, oracle.state_dict())  # by timm's names
    assert_same_logits(model, oracle, (64, 64), (65, 51), (50, 67))


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


# the noise inside


@pytest.mark.parametrize(("arch", "num"), [("efficientnet_b0", 16), ("efficientnet_b7", 55), ("efficientnet_l2", 88)])
def test_drop_path_grows_linearly_over_the_blocks(arch, num):
    for rate in (None, 0.5):  # 0.2 by itself
        model = on_meta(arch, drop_path=rate)
        rates = [module.drop_path for module in model.modules() if hasattr(module, "drop_path")]
        assert rates == pytest.approx([(rate or 0.2) * i / num for i in range(num)])


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    """Of a block with a skip, whose batch norms are frozen: only the drop is random."""
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", drop_path=0.5)
    block = [module for module in model.modules() if getattr(module, "has_skip", False)][-1].eval()
    x = torch.randn(1, block.block[-1][0].out_channels, 3, 3)
    with torch.no_grad():
        full = (block(x) - x).flatten(1)
        block.training = True
        residual = (block(x.expand(2000, -1, -1, -1)) - x).flatten(1)
    dropped = (residual == 0).all(1)
    assert dropped.float().mean().item() == pytest.approx(block.drop_path, abs=0.04)
    kept = residual[~dropped] * (1 - block.drop_path)
    torch.testing.assert_close(kept, full.expand_as(kept), rtol=1e-3, atol=1e-5)


# options


def test_small_images_keeps_the_resolution_of_stages_2_and_3_and_the_weights():
    model = on_meta("efficientnet_b0", small_images=True).eval()
    x = torch.zeros(1, 3, 32, 32, device="meta")
    sizes = []
    for stage in model.features:
        x = stage(x)
        sizes.append(x.shape[-1])
    assert sizes == [16, 16, 16, 16, 8, 8, 4, 4, 4]
    assert shapes_of(model.state_dict()) == shapes_of(on_meta("efficientnet_b0").state_dict())


def test_initial_confidence_is_low_with_few_classes():
    """A fresh 10-class model that is sure of itself would let every image through the confidence filter."""
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", 10).train()
    with torch.no_grad():
        probs = model(torch.randn(16, 3, 32, 32)).softmax(1)
    assert probs.amax(1).mean() < 0.25


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "squeezenet1_0", "swin_t", "vit_b_16"])
def test_other_names_are_torchvisions_and_the_last_layer_is_the_classifier(arch):
    with torch.device("meta"):
        model = build_model(arch, 7, small_images=None, dropout=None, **img_size_option(arch, 64))
    assert type(model) is type(torchvision.models.get_model(arch)) and getattr(model, "image_size", 64) == 64
    (head,) = head_names(model)
    assert len(model.get_submodule(head).weight) == 7 and list(model.state_dict())[-1] == f"{head}.bias"


@pytest.mark.parametrize("arch", ["tf_resnet18", "", "timm/no_such_model", "resnet18", "timm/resnet18", "fcn_resnet50"])
def test_unknown_names_and_options_are_value_errors(arch):
    options = {"small_images": True} if arch.endswith("/resnet18") or arch == "resnet18" else {}
    with pytest.raises(ValueError, match="cannot build"):
        build_model(arch, 3, **options)


# folded batch norms

NORMS_LEFT = {
    "tf_efficientnet_b0": 0,
    "resnet18": 0,
    "densenet121": 62,  # most of its norms come before the convolutions
    "convnext_tiny": 0,  # it has none
    "timm/resnet50": 0,
    # A BatchNormAct2d has an activation inside: folding it away once moved logits by 1,400.
    "timm/efficientnet_b0": 49,
    "timm/resnetv2_50": 49,
    "timm/lambda_resnet26t": 37,  # its convolution qkv is followed by two norms, of q and of v
}


@pytest.mark.parametrize("arch", NORMS_LEFT)
def test_folded_batch_norms_are_gone_and_the_logits_the_same(arch):
    torch.manual_seed(0)
    model = build_model(arch, 5, img_size=64 if "lambda" in arch else None)
    randomise_batch_norms(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
        fuse_batch_norms(model.train())
        logits = model(images)
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert num_norms == NORMS_LEFT[arch]


# weights: there and back, names and containers


def small_model():
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", 3)
    randomise_batch_norms(model, 32)
    return model


def test_a_checkpoint_there_and_back_is_bitwise_and_may_be_fused(tmp_path):
    model = small_model()
    path = save_model(tmp_path / "model.pt", "efficientnet_b0", model=model)
    assert_same_weights(load_model(path)[0].state_dict(), model.state_dict())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in load_model(path, fuse=True)[0].modules())


def averaged_and_compiled(model):
    return torch.optim.swa_utils.AveragedModel(torch.compile(model), use_buffers=True)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, averaged_and_compiled])
def test_prefixes_of_wrappers_are_cut_off(wrap):
    model = timm.create_model("tf_efficientnet_b0", num_classes=3)
    wrapped = wrap(model).state_dict()
    assert not wrapped.keys() & model.state_dict().keys()
    assert_same_weights(own_names(wrapped), own_names(model.state_dict()))


CONTAINERS = {  # what training scripts save: `good` is to be taken and `last` not
    "state_dict": lambda good, last: {"epoch": 3, "state_dict": good},
    "model": lambda good, last: {"epoch": 3, "model": good, "optimizer": {"state": {}}},
    "torchvision": lambda good, last: {"model": last, "model_ema": {"n_averaged": torch.tensor(5)} | good},
    "timm": lambda good, last: {"arch": "b0", "state_dict": last, "state_dict_ema": good, "version": 2},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_are_found_in_their_container_and_the_averaged_ones_win(container):
    good, last, model = (build_model("shufflenet_v2_x0_5", 3) for _ in range(3))
    saved = CONTAINERS[container](good.state_dict(), last.state_dict())
    load_weights(model, saved)
    assert_same_weights(model.state_dict(), good.state_dict())
    assert_same_weights(own_names({"arch": "", "model": saved}), good.state_dict())  # as --init has it


@pytest.mark.parametrize("is_old", [False, True])
def test_weights_are_copied(is_old):
    """Also those of an older file: in half precision, without the counters of batch norms."""
    given = small_model().state_dict()
    if is_old:
        given = {name: tensor.half() for name, tensor in given.items() if tensor.ndim}
    model = build_model("efficientnet_b0", 3)
    load_weights(model, given)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if tensor.ndim else torch.int64)
        assert torch.equal(tensor, given.get(name, torch.tensor(0)).to(tensor.dtype)), name
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in given.values())
    assert all(p.requires_grad for p in model.parameters())


# weights: what does not fit, other classes


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("features.8.0.weight", None), ("other.weight", torch.zeros(1)), ("features.0.1.bias", torch.zeros(31))],
)
def test_what_is_missing_extra_or_of_another_shape_is_named(name, tensor):
    weights = {**small_model().state_dict(), name: tensor}
    if tensor is None:
        del weights[name]
    model = build_model("efficientnet_b0", 3)
    with pytest.raises(ValueError) as error:
        load_weights(model, weights)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"epoch": 3}, [torch.zeros(1)], {"model": {"epoch": 3}}, 3], ids=repr)
def test_what_is_no_state_dict_is_a_value_error(given):
    with pytest.raises(ValueError, match="state_dict"):
        load_weights(small_model(), given)


# LeViT: two heads, each with a batch norm. ConvFormer: an MLP. At zero all along they would never learn anything.
HEADS = [("efficientnet_b0", "classifier.1"), ("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3")]
HEADS += [("timm/levit_128s", "head.linear head_dist.linear"), ("timm/convformer_s18", "head.fc.fc2")]


@pytest.mark.parametrize(("arch", "heads"), HEADS)
def test_a_new_head_starts_at_zero_and_learns_and_all_else_is_loaded(arch, heads):
    torch.manual_seed(0)
    model = build_model(arch, 3)
    given = build_model(arch, 11).state_dict()
    before = {name: tensor.clone() for name, tensor in given.items()}
    heads = tuple(heads.split())
    assert tuple(head_names(model)) == heads
    with pytest.raises(ValueError, match=heads[0]):
        load_weights(model, given)
    load_weights(model, state_dict=given, new_head=True)
    for name, tensor in model.state_dict().items():
        expected = torch.zeros_like(tensor) if name.rpartition(".")[0] in heads else given[name]
        assert torch.equal(tensor, expected), name
    assert_same_weights(given, before)
    size = 224 if "levit" in arch else 64
    logits = model.eval()(torch.randn(2, 3, size, size))
    assert not logits.any()
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for head in heads:
        assert model.get_submodule(head).weight.grad.any()


# recipes


@pytest.mark.parametrize(
    ("arch", "flags", "expected"),
    [
        ("efficientnet_b7", {"magnitude": 5, "ratio": 1.5}, (350, 2, 5, 1.5)),
        ("efficientnet_b7", {"init": "weights.pt"}, (30, 2, 27, 3)),
        ("efficientnet_b7", {"init": "weights.pt", "epochs": 7}, (7, 2, 27, 3)),
        ("timm/resnet50", {}, (350, 2, 9, 3)),
        # B0 and B1 have no RandAugment unless a flag asks for it; magnitude 0 would be violent.
        ("tf_efficientnet_b1", {}, (700, 0, 0, 3)),
        ("tf_efficientnet_b1", {"num_ops": 1}, (700, 1, 9, 3)),
        ("tf_efficientnet_b1", {"magnitude": 5}, (700, 2, 5, 3)),
    ],
)
def test_flags_replace_a_recipes_values(arch, flags, expected):
    args = Namespace(**dict.fromkeys(("init", *Recipe._fields)) | flags)
    assert recipe_of(arch, args) == expected


def test_resolutions():
    assert [view_of(arch).image_size for arch in SMALL] == [224, 240, 260, 300, 380, 456, 528, 600]
    others = ("efficientnet_l2", "resnet50", "timm/tf_efficientnet_b3")
    assert [view_of(arch).image_size for arch in others] == [475, 224, 300]
