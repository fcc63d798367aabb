"""The learning rate, TensorFlow's RMSprop, the averaged weights and what weight decay spares, against other sources."""

import copy
import itertools
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import timm.optim
import torch

import common
from common import RATES, RECIPES, Plan, RMSpropTF, build_model, learning_rate, make_optimizer, plan_of
from common import recipe_of, soft_cross_entropy, update_ema

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras

STEPS_PER_EPOCH = 100


def rate(epoch, epochs=350, schedule="staircase", warmup_epochs=5.0, peak=1.0):
    return learning_rate(round(epoch * STEPS_PER_EPOCH), Plan(epochs, STEPS_PER_EPOCH, peak, schedule, warmup_epochs))


@pytest.mark.parametrize("schedule", ["staircase", "cosine", "constant"])
def test_warmup_is_linear_from_zero(schedule):
    assert [rate(epoch, schedule=schedule, peak=0.128) for epoch in (0, 1, 2.5, 4.99)] == pytest.approx(
        [0, 0.0256, 0.064, 0.127744]
    )


@pytest.mark.parametrize(
    ("epoch", "epochs", "steps_down"),
    [
        (5, 350, 2),  # the clock started at step 0, not after the warm-up
        (7.19, 350, 2),
        (7.21, 350, 3),
        (349.99, 350, 145),
        (5, 700, 1),  # 4.8 epochs a step
        (9.59, 700, 1),
        (9.61, 700, 2),
        (699.99, 700, 145),
        (20, 35, 83),  # 0.24 epochs
    ],
)
def test_staircase(epoch, epochs, steps_down):
    assert rate(epoch, epochs) == pytest.approx(0.97**steps_down)
    assert rate(epoch, epochs, peak=0.128) == pytest.approx(0.128 * 0.97**steps_down)


def test_cosine_falls_to_zero_at_the_end():
    assert rate(5, schedule="cosine") == pytest.approx(1)
    assert rate(177.5, schedule="cosine") == pytest.approx(0.5)
    assert rate(91.25, schedule="cosine") == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert 0 <= rate(349.99, schedule="cosine") < 1e-6


def test_constant_and_no_warmup():
    assert {rate(epoch, schedule="constant") for epoch in (5, 100, 349)} == {1.0}
    assert rate(0, schedule="constant", warmup_epochs=0) == 1
    assert rate(0, schedule="staircase", warmup_epochs=0) == 1
    assert rate(0, schedule="cosine", warmup_epochs=0) == 1


def test_a_run_shorter_than_its_warmup_never_passes_the_peak():
    for schedule in ("staircase", "cosine", "constant"):
        assert all(0 <= rate(step / STEPS_PER_EPOCH, 2, schedule) <= 0.4 for step in range(200))


def gradients(steps):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(4, 3)) * 10.0 ** rng.integers(-4, 2), rng.normal(size=5)) for _ in range(steps)]


def run_optimizer(optimizer, params, steps):
    for step, grads in enumerate(gradients(steps)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)  # it changes: lr inside the momentum is not lr outside of it
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(grad).to(param.dtype)
        optimizer.step()
    return [param.detach().numpy().astype(np.float64) for param in params]


def start_params(dtype=torch.float64):
    rng = np.random.default_rng(1)
    return [torch.tensor(rng.normal(size=shape), dtype=dtype, requires_grad=True) for shape in ((4, 3), (5,))]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_rmsprop_is_tensorflows(weight_decay):
    """ms = .9 ms + .1 g^2 from 1; mom = .9 mom + lr g / sqrt(ms + eps); w -= mom, transcribed for numpy."""
    params = start_params()
    expected = [param.detach().numpy().copy() for param in params]
    mean_square, momentum = [np.ones_like(w) for w in expected], [np.zeros_like(w) for w in expected]
    for step, grads in enumerate(gradients(20)):
        for i, grad in enumerate(grads):
            grad = grad + weight_decay * expected[i]
            mean_square[i] = 0.9 * mean_square[i] + 0.1 * grad**2
            momentum[i] = 0.9 * momentum[i] + 0.1 / (1 + step) * grad / np.sqrt(mean_square[i] + 1e-3)
            expected[i] = expected[i] - momentum[i]
    got = run_optimizer(RMSpropTF(params, lr=0.0, weight_decay=weight_decay), params, 20)
    for one, two in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_rmsprop_is_timms(weight_decay):
    ours, theirs = start_params(torch.float32), start_params(torch.float32)
    oracle = timm.optim.RMSpropTF(
        theirs, lr=0.1, alpha=0.9, momentum=0.9, eps=1e-3, weight_decay=weight_decay, lr_in_momentum=True
    )
    got = run_optimizer(RMSpropTF(ours, lr=0.1, weight_decay=weight_decay), ours, 20)
    for one, two in zip(got, run_optimizer(oracle, theirs, 20), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=1e-6)


def test_rmsprop_resumes_from_its_state():
    through, params = start_params(), start_params()
    expected = run_optimizer(RMSpropTF(through, lr=0.0), through, 6)
    optimizer = RMSpropTF(params, lr=0.0)
    for step, grads in enumerate(gradients(6)):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = RMSpropTF(params, lr=0.0)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(grad)
        optimizer.step()
    for one, two in zip(params, expected, strict=True):
        np.testing.assert_array_equal(one.detach().numpy(), two)


def test_rmsprop_leaves_parameters_without_a_gradient():
    params = start_params()
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    RMSpropTF(params, lr=0.1, weight_decay=0.1).step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "resnet18"])
@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adamw"])
def test_weight_decay_spares_the_batch_norms_and_nothing_else(arch, name):
    model = build_model(arch, 4)
    frozen = next(p for p in model.parameters() if p.dim() == 4)
    frozen.requires_grad_(False)
    optimizer = make_optimizer(name, model, 1e-2)
    decayed, spared = (
        {id(p) for group in optimizer.param_groups if group["weight_decay"] == decay for p in group["params"]}
        for decay in (1e-2, 0)
    )
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter is frozen:
                assert id(parameter) not in decayed | spared
            elif isinstance(module, torch.nn.BatchNorm2d):
                assert id(parameter) in spared - decayed
            else:
                assert id(parameter) in decayed - spared, f"{type(module).__name__} is spared"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("arch", ["efficientnet_b0", "resnet18", "squeezenet1_0", "timm/vit_tiny_patch16_224"])
def test_the_share_of_the_rate_is_the_classifiers_alone(arch):
    model = build_model(arch, 7)
    groups = make_optimizer("adamw", model, 0.1, classifier_lr=0.25).param_groups
    assert [group.get("share", 1) for group in groups] == [1, 1, 0.25]
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0.1]
    assert {p.shape[0] for p in groups[2]["params"]} == {7} and len(groups[2]["params"]) == 2
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(map(id, model.parameters()))
    assert len(make_optimizer("adamw", model, 0.1).param_groups) == 2  # as runs that began without the flag have it


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 3).double()
        self.norm = torch.nn.BatchNorm1d(3).double()


def fill(model, value):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.0])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ema_is_its_closed_form(steps, decay):
    """ema_t = prod_k d_k ema_0 + sum_k (1 - d_k) prod_{j > k} d_j w_k with d_t = min(decay, (1 + t) / (10 + t))."""
    model, ema_model = Tiny(), Tiny()
    fill(ema_model, 7.0)
    weights = np.random.default_rng(0).normal(size=steps)
    for step, weight in enumerate(weights, 1):
        fill(model, weight)
        update_ema(ema_model, model, step, decay)
    d = np.array([min(decay, (1 + t) / (10 + t)) for t in range(1, steps + 1)])
    later = np.append(np.cumprod(d[::-1])[::-1], 1)  # later[k] = d_k ... d_last
    expected = 7 * later[0] + ((1 - d) * later[1:] * weights).sum()
    for name, tensor in ema_model.state_dict().items():
        if name != "norm.num_batches_tracked":
            assert tensor.double().numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9), name
    assert {"norm.running_mean", "norm.running_var"} <= ema_model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert (tensor == torch.tensor(weights[-1]).to(tensor.dtype)).all(), f"{name} of the model itself was changed"


def test_soft_cross_entropy():
    rng = np.random.default_rng(0)
    logits, probs = rng.normal(size=(6, 4)) * 5, rng.dirichlet(np.ones(4), 6)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    got = soft_cross_entropy(torch.from_numpy(logits).float(), torch.from_numpy(probs).float())
    np.testing.assert_allclose(got, -(probs * log_softmax).sum(1), rtol=1e-5)


# what the flags leave open


def plan(epochs=50, steps_per_epoch=10.0, decayed=1.0, **flags):
    given = {"optimizer": "rmsprop", "lr": None, "batch_size": 256, "schedule": "cosine", "warmup_epochs": 5.0}
    given |= {"decays": (145, 0.97)} | flags
    return plan_of(SimpleNamespace(**given), epochs, steps_per_epoch, decayed)


def test_the_warmup_is_at_most_a_fifth_of_the_run(capsys):
    assert plan(epochs=25).warmup_epochs == 5 and not capsys.readouterr().out
    short = plan(epochs=3)
    assert short.warmup_epochs == pytest.approx(0.6)
    assert capsys.readouterr().out == "--warmup-epochs 5 is cut to 0.6, a fifth of the run\n"
    rates = [learning_rate(step, short) for step in range(short.total_steps)]
    assert max(rates) == rates[6] == short.peak and rates[-1] < 0.05 * short.peak  # it has decayed at the end
    assert plan(epochs=0).warmup_epochs == 0
    fine_tuning = SimpleNamespace(optimizer="sgd", lr=None, batch_size=8, schedule="constant", decays=(145, 0.97))
    assert plan_of(fine_tuning, 1, 3).warmup_epochs == 0


def test_a_run_without_a_step_is_an_error_but_of_no_epoch(capsys):
    """60 images, 256 a step: the 1.5 epochs of a fine-tuning would save the model as it was."""
    with pytest.raises(SystemExit) as stopped:
        plan(epochs=1.5, steps_per_epoch=60 / 256)
    assert stopped.value.code == 2 and "--epochs 1.5 with --batch-size 256 is not one step" in capsys.readouterr().err
    assert plan(epochs=2.2, steps_per_epoch=60 / 256).total_steps == 1 and plan(epochs=0).total_steps == 0


@pytest.mark.parametrize(
    ("name", "peak", "weight_decay"),
    [("rmsprop", (0.016, 0.0016), 1e-5), ("sgd", (0.1, 0.01), 1e-4), ("adamw", (0.00025, 1e-4), 0.05)],
)
def test_each_optimizer_has_a_rate_and_a_weight_decay_of_its_own(name, peak, weight_decay):
    assert RATES[name] == (*peak, weight_decay)
    assert plan(optimizer=name, init="weights.pt").peak == pytest.approx(peak[1])
    peak = peak[0]
    assert plan(optimizer=name).peak == pytest.approx(peak)
    assert plan(optimizer=name, batch_size=2048).peak == pytest.approx(8 * peak)
    assert plan(optimizer=name, decayed=0.25).peak == pytest.approx(peak / 4)
    assert plan(optimizer=name, lr=0.7, decayed=0.25, batch_size=2048).peak == 0.7  # a given one is as it is
    assert plan(optimizer=name, lr=0.0).peak == 0
    model = build_model("resnet18", 3)
    assert [group["weight_decay"] for group in make_optimizer(name, model, None).param_groups] == [weight_decay, 0]
    assert [group["weight_decay"] for group in make_optimizer(name, model, 0.0).param_groups] == [0, 0]


def test_from_weights_a_run_is_short_and_its_schedule_is_cosine():
    flags = SimpleNamespace(init="weights.pt", epochs=None, num_ops=None, magnitude=None)
    assert recipe_of("efficientnet_b7", flags) == RECIPES["efficientnet_b7"]._replace(epochs=30)
    flags.epochs = 7
    assert recipe_of("efficientnet_b7", flags).epochs == 7
    assert plan(schedule=None, init="weights.pt").schedule == "cosine"
    assert plan(schedule=None).schedule == plan(schedule=None, init=None).schedule == "staircase"
    assert plan(schedule="constant", init="weights.pt").schedule == "constant"


@pytest.mark.parametrize(("num", "factor"), [(13, 0.5), (3, 0.1), (1, 0.2), (0, 0.5)])
def test_decays_divide_the_run_evenly(num, factor):
    """1905.00546: halved 13 times at regular intervals; its fine-tuning three times a tenth."""
    chosen = plan(epochs=56, schedule="staircase", warmup_epochs=0.0, decays=(num, factor))
    rates = [learning_rate(step, chosen) for step in range(chosen.total_steps)]
    lengths = [len(list(same)) for _, same in itertools.groupby(rates)]
    assert sorted(set(rates), reverse=True) == pytest.approx([0.016 * factor**k for k in range(num + 1)])
    assert len(lengths) == num + 1 and max(lengths) - min(lengths) <= 1


def test_the_papers_decays_are_every_2_4_of_350_epochs():
    chosen = plan(epochs=350, schedule="staircase", warmup_epochs=0.0)
    for epoch in (0, 2.3, 2.4, 100.9, 349.9):
        expected = 0.016 * 0.97 ** math.floor(epoch / 2.4 + 1e-9)
        assert learning_rate(round(10 * epoch), chosen) == pytest.approx(expected, rel=1e-9), epoch


def values_of_val(seed):
    """A made-up series of evaluations that rises and falls, with ties and steps near Keras' least improvement."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([0, 5e-5, 1.5e-4, -5e-5, -1.5e-4, -0.02, 0.02], size=60, p=[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2])
    return (1 + np.cumsum(steps)).tolist()


class Optimizer:
    learning_rate = 1.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("factor", "monitor", "mode"), [(0.1, "val_loss", "min"), (0.5, "val_accuracy", "max")])
def test_a_plateau_is_keras(seed, factor, monitor, mode):
    values = values_of_val(seed)
    callback = keras.callbacks.ReduceLROnPlateau(patience=3, factor=factor, monitor=monitor, mode=mode)
    callback.set_model(SimpleNamespace(optimizer=Optimizer()))
    callback.on_train_begin()
    signed = values if mode == "min" else [-value for value in values]
    seen = set()
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {monitor: value})
        mine = common.plateau_factor(signed[: epoch + 1], factor)
        assert mine == pytest.approx(callback.model.optimizer.learning_rate), epoch
        seen.add(mine)
    assert len(seen) > 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("patience", [1, 4, 10])
def test_patience_is_keras(seed, patience):
    values = values_of_val(seed)
    callback = keras.callbacks.EarlyStopping(patience=patience, restore_best_weights=True, monitor="loss", mode="min")
    weights = []
    callback.set_model(SimpleNamespace(stop_training=False, get_weights=lambda: weights[-1], set_weights=lambda _: 0))
    callback.on_train_begin()
    mine, model = common.Evaluations(patience), torch.nn.Linear(1, 1)
    for epoch, value in enumerate(values):
        weights.append(epoch)
        with torch.no_grad():
            model.weight.fill_(epoch)
        mine.add(value, model, {"epoch": epoch})
        callback.on_epoch_end(epoch, {"loss": value})
        assert mine.ended_early == callback.model.stop_training, epoch
        assert mine.best["metrics"]["epoch"] == mine.best["model"]["weight"].item() == callback.best_epoch
        if callback.model.stop_training:
            break
    else:
        assert patience == 10


def test_swa_is_torchs_average_and_its_batch_norms_are_torchs():
    torch.manual_seed(0)
    model = build_model("shufflenet_v2_x0_5", 3).double()
    mine, theirs = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    for num in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        common.update_swa(mine, model, num)
        theirs.update_parameters(model)
    for one, other in zip(mine.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    batches = [torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(3)]
    common.recompute_norms(mine, batches)
    torch.optim.swa_utils.update_bn(batches, theirs.module)
    for (name, one), other in zip(mine.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    momenta = {m.momentum for m in mine.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
