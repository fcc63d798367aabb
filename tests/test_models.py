"""The models against torchvision's and timm's, the noise inside them, the 32-pixel variant, folded batch norms,
recomputed activations and micro-batches."""

import pytest
import timm
import torch
import torchvision
from conftest import ROOT
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from common import (
    EFFICIENTNETS,
    Processes,
    build_model,
    fuse_batch_norms,
    load_weights,
    micro_batches,
    own_names,
    parallel,
)

SMALL = [f"efficientnet_b{i}" for i in range(8)]
PARAMETERS = {
    "efficientnet_b0": 5_288_548,
    "efficientnet_b7": 66_347_960,
    "efficientnet_l0": 140_764_664,
    "efficientnet_l1": 272_630_564,
    "efficientnet_l2": 480_309_308,
}
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
ALONE = Processes(torch.device("cpu"), 0, 0, 1)


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


@pytest.mark.parametrize("arch", SMALL)
def test_torchvisions_weights_fit_as_they_are_and_ours_fit_torchvision(arch):
    torch.manual_seed(0)
    oracle = torchvision.models.get_model(arch, weights=None)
    randomise_batch_norms(oracle)
    model = build_model(arch)
    names = [(name, tensor.shape) for name, tensor in oracle.state_dict().items()]
    assert [(name, tensor.shape) for name, tensor in model.state_dict().items()] == names
    load_weights(model, oracle.state_dict())
    assert_same_logits(model, oracle, (64, 64), (65, 51))
    with torch.device("meta"):
        oracle = torchvision.models.get_model(arch, weights=None)
    oracle.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert_same_logits(model, oracle, (64, 64))


@pytest.mark.parametrize("arch", [f"tf_{arch}" for arch in (*SMALL, "efficientnet_l2")])
def test_timms_names_and_shapes_are_ours(arch):
    with torch.device("meta"):
        theirs = own_names(timm.create_model(arch, pretrained=False).state_dict())
    ours = on_meta(arch).state_dict()  # timm has the same order
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [(name, t.shape) for name, t in theirs.items()]


@pytest.mark.parametrize("arch", SMALL)
def test_tf_logits_equal_timms(arch):
    torch.manual_seed(0)
    oracle = timm.create_model(f"tf_{arch}", pretrained=False)
    randomise_batch_norms(oracle)
    model = build_model(f"tf_{arch}")
    load_weights(model, oracle.state_dict())  # by timm's names
    for ours, theirs in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert_same_logits(model, oracle, (64, 64), (65, 51), *([(65, 65), (50, 67)] if arch == "efficientnet_b0" else []))


def test_l2_with_all_its_parameters_equals_timms():
    with torch.device("meta"):
        oracle, model = timm.create_model("tf_efficientnet_l2", pretrained=False), build_model("tf_efficientnet_l2")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in oracle.state_dict().items()}
    for tensor in weights.values():
        if tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    oracle.load_state_dict(weights, assign=True)
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


@pytest.mark.parametrize("arch", [a for a in CLASSIFIERS if not a.startswith("regnet") or a == "regnet_y_400mf"])
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
    assert len([arch for arch in CLASSIFIERS if arch.startswith("regnet")]) == 15


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
    ("vgg11_bn", {}),
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


def two_steps(arch, recompute, frozen):
    torch.manual_seed(0)
    model = build_model(arch, 5, dropout=0.3, drop_path=0.5).train()
    model.features[:frozen].eval().requires_grad_(False)
    called = parallel(model, ALONE, False, recompute)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(called(torch.randn(6, 3, 32, 32)), torch.arange(6) % 5).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("arch", "frozen"), [("efficientnet_b0", 0), ("tf_efficientnet_b0", 0), ("efficientnet_b0", 5)]
)
def test_recomputed_activations_change_no_bit(arch, frozen):
    """Weights, gradients, running statistics and their counters after two steps with dropout and stochastic depth."""
    kept, recomputed = (two_steps(arch, recompute, frozen) for recompute in (False, True))
    for (name, a), b in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == name.startswith(tuple(f"features.{i}." for i in range(frozen)))
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, recomputed.state_dict()[name]), name
    counters = {int(t) for name, t in recomputed.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counters == ({0, 2} if frozen else {2})


def test_recomputing_keeps_less_and_computes_twice():
    saved, calls = [], []
    for recompute in (False, True):
        model = parallel(build_model("efficientnet_b0", 5).train(), ALONE, False, recompute)
        num_bytes, num_calls = [], []

        def pack(tensor, num_bytes=num_bytes):
            num_bytes.append(tensor.nbytes)
            return tensor

        model.features[3][1].block[1][0].register_forward_hook(lambda *_, seen=num_calls: seen.append(1))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.randn(2, 3, 64, 64)).sum()
        with torch.no_grad():
            model(torch.randn(2, 3, 64, 64))  # nothing to recompute
        loss.backward()
        saved.append(sum(num_bytes))
        calls.append(len(num_calls))
    assert calls == [2, 3] and saved[1] < 0.5 * saved[0], (calls, saved)


def test_recomputing_is_for_efficientnets(capsys):
    with pytest.raises(SystemExit) as stop:
        parallel(build_model("resnet18", 3), ALONE, False, recompute=True)
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and "--checkpoint-activations" in errors[0]


@pytest.mark.parametrize(("num", "number", "sizes"), [(10, 3, [4, 3, 3]), (4, 1, [4]), (6, 2, [3, 3]), (1, 2, [1, 0])])
def test_micro_batches_are_the_parts_in_order(num, number, sizes):
    images, targets = torch.arange(2 * num).view(num, 2), torch.arange(num)
    parts = list(micro_batches(nn.Identity(), number, images, targets))
    assert [len(part) for part, _ in parts] == sizes
    for i, whole in enumerate((images, targets)):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole)


MICRO_BATCHES = """
import sys
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from common import build_model, init_processes, micro_batches, parallel

processes, images, found = init_processes("cpu"), torch.load(sys.argv[1]), []
for number in (1, 2, 4):
    torch.manual_seed(0)
    model, exchanges = build_model("squeezenet1_1", 3, dropout=0.0).train(), []
    ddp_model = parallel(model, processes, False)

    def count(state, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(state, bucket)

    ddp_model.register_comm_hook(None, count)
    for (part,) in micro_batches(ddp_model, number, images[processes.rank :: processes.world_size]):
        (ddp_model(part).square().mean() / number).backward()
    found.append(([p.grad for p in model.parameters()], len(exchanges)))
torch.save(found, f"{sys.argv[1]}.{processes.rank}")
"""


def test_micro_batches_of_two_processes_give_the_gradients_of_one_batch(run_stage, tmp_path):
    """... and exchange them once a step, however many parts it has."""
    torch.manual_seed(1)
    images = torch.randn(16, 3, 33, 33)
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "script.py").write_text(MICRO_BATCHES)
    run_stage(tmp_path / "script.py", tmp_path / "images.pt", nproc=2, PYTHONPATH=ROOT)
    torch.manual_seed(0)
    model = build_model("squeezenet1_1", 3, dropout=0.0).train()
    model(images).square().mean().backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"images.pt.{rank}")
        assert len({exchanges for _, exchanges in found}) == 1 and found[0][1] >= 1
        for gradients, _ in found:
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item())


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
