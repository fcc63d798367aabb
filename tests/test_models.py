"""The models against torchvision's and timm's, stochastic depth, the 32-pixel variant, what load_weights refuses."""

import pytest
import timm
import torch
import torchvision

from common import EFFICIENTNETS, build_model, load_weights

SMALL = [f"efficientnet_b{i}" for i in range(8)]
PARAMETERS = {
    "efficientnet_b0": 5_288_548,
    "efficientnet_b7": 66_347_960,
    "efficientnet_l0": 140_764_664,
    "efficientnet_l1": 272_630_564,
    "efficientnet_l2": 480_309_308,
}


def on_meta(arch, **options):
    with torch.device("meta"):
        return build_model(arch, **options)


def randomise_batch_norms(model):
    """Running statistics and affine terms away from 0 and 1, so that a wrong eps or a swapped layer shows."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.05, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high, generator=generator)


def assert_same_logits(model, oracle, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected, got = oracle.eval()(images), model.eval()(images)
    assert expected.std() > 1e-3
    assert (expected - got).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_count(arch):
    assert sum(p.numel() for p in on_meta(arch).parameters()) == PARAMETERS[arch]


def test_table_has_every_model_and_its_resolution():
    assert list(EFFICIENTNETS) == [*SMALL, "efficientnet_l0", "efficientnet_l1", "efficientnet_l2"]
    assert [EFFICIENTNETS[arch][2] for arch in SMALL] == [224, 240, 260, 300, 380, 456, 528, 600]
    assert [EFFICIENTNETS[arch][3] for arch in SMALL] == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert EFFICIENTNETS["efficientnet_l2"] == (4.3, 5.3, 475, 0.5)


@pytest.mark.parametrize("arch", SMALL)
def test_state_dict_is_torchvisions(arch):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch, weights=None).state_dict()
    ours = on_meta(arch).state_dict()
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [(name, t.shape) for name, t in theirs.items()]


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b5"])
def test_logits_equal_torchvisions(arch):
    torch.manual_seed(0)
    oracle = torchvision.models.get_model(arch, weights=None)
    randomise_batch_norms(oracle)
    model = build_model(arch)
    load_weights(model, oracle.state_dict())
    assert_same_logits(model, oracle, (64, 64))


@pytest.mark.parametrize("size", [(64, 64), (65, 65), (50, 67)])
def test_tf_logits_equal_timms(size):
    torch.manual_seed(0)
    oracle = timm.create_model("tf_efficientnet_b0", pretrained=False)
    randomise_batch_norms(oracle)
    model = build_model("tf_efficientnet_b0")
    load_weights(model, oracle.state_dict())  # by timm's names
    for ours, theirs in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)  # timm has the same order
    assert_same_logits(model, oracle, size)


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


@pytest.mark.parametrize("kind", ["missing", "extra", "shape"])
def test_load_weights_names_the_key(kind):
    model = build_model("efficientnet_b0", 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    name = "classifier.1.weight"
    if kind == "missing":
        del weights[name]
    elif kind == "extra":
        name = "some.other.weight"
        weights[name] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(11, 1280)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        load_weights(model, weights)
    if kind == "shape":
        assert "(11, 1280)" in str(error.value) and "(10, 1280)" in str(error.value)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items()), "half loaded"


def test_load_weights_takes_what_ddp_and_compile_prefix():
    torch.manual_seed(0)
    source, model = build_model("efficientnet_b0", 3), build_model("efficientnet_b0", 3)
    load_weights(model, {f"module.{name}": tensor for name, tensor in source.state_dict().items()})
    assert torch.equal(model.classifier[1].weight, source.classifier[1].weight)


def test_other_names_are_torchvisions():
    model = build_model("resnet18", 7)
    assert isinstance(model, torchvision.models.ResNet) and model.fc.out_features == 7
    model = build_model("resnet18", 7, small_images=None, dropout=None, drop_path=None)
    assert model.fc.out_features == 7


@pytest.mark.parametrize(
    ("arch", "options"),
    [("efficientnet_b9", {}), ("tf_resnet18", {}), ("", {}), ("resnet18", {"small_images": True, "drop_path": 0.1})],
)
def test_unknown_names_and_options_are_value_errors(arch, options):
    with pytest.raises(ValueError, match="cannot build"):
        build_model(arch, 3, **options)
