"""How long a run is, its learning rate, TensorFlow's RMSprop, the averaged weights, and what weight decay spares."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import RATES, Plan, RMSpropTF, build_model, learning_rate, make_optimizer, plan_of, plateau_factor
from common import update_ema, update_swa

STEPS_PER_EPOCH = 100


def rate(epoch, epochs=350, schedule="staircase", warmup_epochs=5, peak=1.0):
    total, warmup = epochs * STEPS_PER_EPOCH, warmup_epochs * STEPS_PER_EPOCH
    return learning_rate(round(epoch * STEPS_PER_EPOCH), Plan(total, STEPS_PER_EPOCH, peak, schedule, warmup))


@pytest.mark.parametrize("schedule", ["staircase", "cosine", "constant"])
def test_warmup_is_linear_from_zero(schedule):
    rates = [rate(epoch, schedule=schedule, peak=0.128) for epoch in (0, 1, 2.5, 4.99)]
    assert rates == pytest.approx([0, 0.0256, 0.064, 0.127744])
    assert rate(0, schedule=schedule, warmup_epochs=0) == 1


def test_staircase():
    """Of 2.4 epochs a step in 350, 4.8 in 700; the clock started at step 0, not after the warm-up."""
    for epoch, num in {5: 2, 7.19: 2, 7.21: 3, 349.99: 145}.items():
        assert rate(epoch, 350) == pytest.approx(0.97**num) == rate(2 * epoch, 700)


def test_cosine_falls_to_zero_at_the_end_and_constant_never():
    rates = [rate(epoch, schedule="cosine") for epoch in (5, 91.25, 177.5, 349.99)]
    assert rates == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0], abs=1e-6)
    assert {rate(epoch, schedule="constant") for epoch in (5, 100, 349)} == {1.0}


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_rmsprop_is_tensorflows(weight_decay):
    """ms = .9 ms + .1 g^2 from 1; mom = .9 mom + lr g / sqrt(ms + eps); w -= mom. Without a gradient w stays."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=17)
    params = [torch.tensor(part, requires_grad=True) for part in np.split(weights, [12])]
    frozen = torch.ones(3, requires_grad=True)
    optimizer = RMSpropTF([frozen, *params], lr=0.0, weight_decay=weight_decay)
    mean_square, momentum = np.ones(17), np.zeros(17)
    for step in range(20):
        lr = 0.1 / (1 + step)  # it changes: a rate inside the momentum is not one outside of it
        grad = rng.normal(size=17) * 10.0 ** rng.integers(-4, 2, size=17)
        optimizer.param_groups[0]["lr"] = lr
        for param, part in zip(params, np.split(grad, [12]), strict=True):
            param.grad = torch.tensor(part)
        optimizer.step()
        grad += weight_decay * weights
        mean_square = 0.9 * mean_square + 0.1 * grad**2
        momentum = 0.9 * momentum + lr * grad / np.sqrt(mean_square + 1e-3)
        weights = weights - momentum
    np.testing.assert_allclose(torch.cat(params).detach().numpy(), weights, rtol=1e-9)
    assert (frozen == 1).all()


@pytest.mark.parametrize("arch", ["efficientnet_b0", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adamw"])
def test_weight_decay_spares_the_norms_and_nothing_else(arch, name):
    model = build_model(arch, 4)
    frozen = next(p for p in model.parameters() if p.dim() == 4)  # the first convolution, or the patches
    frozen.requires_grad_(False)
    optimizer = make_optimizer(name, model, 1e-2)
    decays = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    expected = dict.fromkeys(map(id, model.parameters()), 1e-2)
    del expected[id(frozen)]
    norms = [m for m in model.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.LayerNorm))]
    expected |= {id(p): 0 for norm in norms for p in norm.parameters()}
    assert sorted(decays) == sorted(expected.items())


@pytest.mark.parametrize("arch", ["efficientnet_b0", "squeezenet1_0", "timm/vit_tiny_patch16_224"])
def test_the_share_of_the_rate_is_the_classifiers_alone(arch):
    model = build_model(arch, 7)
    groups = make_optimizer("adamw", model, 0.1, classifier_lr=0.25).param_groups
    assert [(group.get("share", 1), group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0), (0.25, 0.1)]
    assert {p.shape[0] for p in groups[2]["params"]} == {7} and len(groups[2]["params"]) == 2
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(map(id, model.parameters()))


def fill(model, value):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.0])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ema_is_its_closed_form(steps, decay):
    """ema_t = prod_k d_k ema_0 + sum_k (1 - d_k) prod_{j > k} d_j w_k with d_t = min(decay, (1 + t) / (10 + t))."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).double()
    ema_model = copy.deepcopy(model)
    fill(ema_model, 7.0)
    weights = np.random.default_rng(0).normal(size=steps)
    for step, weight in enumerate(weights, 1):
        fill(model, weight)
        update_ema(ema_model, model, step, decay)
    d = np.array([min(decay, (1 + t) / (10 + t)) for t in range(1, steps + 1)])
    later = np.append(np.cumprod(d[::-1])[::-1], 1)  # later[k] = d_k ... d_last
    expected = 7 * later[0] + ((1 - d) * later[1:] * weights).sum()
    for tensor in (*ema_model.parameters(), ema_model[1].running_mean, ema_model[1].running_var):
        assert tensor.detach().numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for tensor in (*model.parameters(), model[1].running_var):
        assert (tensor == weights[-1]).all(), "the model itself was changed"


def test_swa_is_the_mean_of_every_10th_step_of_the_second_half():
    model, swa_model = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()
    weights = np.random.default_rng(0).normal(size=101)
    for step in range(1, 101):
        fill(model, weights[step])
        update_swa(swa_model, model, step, 100)
        second_half = weights[60 : step + 1 : 10]
        expected = second_half.mean() if len(second_half) else weights[step]
        assert swa_model.weight.item() == swa_model.bias.item() == pytest.approx(expected), step


def plan(recipe_epochs=50, num_images=2560, peak=None, **flags):
    args = {"optimizer": "rmsprop", "lr": None, "batch_size": 256, "schedule": "cosine", "warmup_epochs": 5.0}
    args |= {"epochs": None, "steps": None, "init": None}
    return plan_of(SimpleNamespace(**args | flags), recipe_epochs, num_images, peak)


def test_how_long_a_run_is(capsys):
    assert plan(50).total_steps == 500  # what the model's recipe says
    assert plan(50, epochs=0.25).total_steps == 2 and plan(50, steps=7).total_steps == 7
    assert plan(epochs=0).total_steps == 0 and plan(2.2, 60).total_steps == 1
    # auto: 100 passes from scratch, 30 from weights, and at least 1,000 steps, with the arithmetic
    assert plan(steps="auto", num_images=5120).total_steps == 2000
    printed = capsys.readouterr().out
    assert all(number in printed for number in ("5120", "100", "2000"))
    assert plan(steps="auto", num_images=300).total_steps == 1000
    assert plan(steps="auto", num_images=25600, init="weights.pt").total_steps == 3000


def test_a_run_without_a_step_is_the_users_mistake(mistake):
    """60 images, 256 a step: the 1.5 epochs of a fine-tuning would save the model as it was."""
    mistake(lambda: plan(1.5, 60), "--epochs 1.5", "--batch-size")


def test_the_warmup_is_at_most_a_fifth_of_the_run():
    assert plan(25).warmup_steps == 50 and plan(3).warmup_steps == 6


@pytest.mark.parametrize(
    ("name", "scratch_rate", "weights_rate", "weight_decay"),
    [("rmsprop", 0.016, 0.0016, 1e-5), ("sgd", 0.1, 0.01, 1e-4), ("adamw", 0.00025, 1e-4, 0.05)],
)
def test_each_optimizer_has_a_rate_and_a_weight_decay_of_its_own(name, scratch_rate, weights_rate, weight_decay):
    """From scratch the rate goes by the batch, from weights it does not, and a given one is as it is."""
    assert RATES[name] == (scratch_rate, weights_rate, weight_decay)
    assert plan(optimizer=name).peak == pytest.approx(scratch_rate)
    assert plan(optimizer=name, batch_size=2048).peak == pytest.approx(8 * scratch_rate)
    for batch_size in (32, 256, 2048):
        assert plan(optimizer=name, init="weights.pt", batch_size=batch_size).peak == weights_rate
        assert plan(optimizer=name, lr=0.7, peak=0.3, batch_size=batch_size).peak == 0.7
        assert plan(optimizer=name, peak=0.3, batch_size=batch_size).peak == 0.3
    model = build_model("resnet18", 3)
    decays = [[group["weight_decay"] for group in make_optimizer(name, model, x).param_groups] for x in (None, 0.0)]
    assert decays == [[weight_decay, 0, weight_decay], [0, 0, 0]]


def test_from_weights_the_schedule_is_cosine():
    assert plan(schedule=None, init="weights.pt").schedule == "cosine"
    assert plan(schedule=None).schedule == "staircase"
    assert plan(schedule="constant", init="weights.pt").schedule == "constant"


@pytest.mark.parametrize(("num", "factor"), [(13, 0.5), (3, 0.1), (1, 0.2)])
def test_decays_divide_the_run_evenly(num, factor):
    """1905.00546: halved 13 times at regular intervals; its fine-tuning three times a tenth."""
    chosen = plan(56, schedule=f"{num}:{factor}", warmup_epochs=0.0)
    rates = [learning_rate(step, chosen) for step in range(chosen.total_steps)]
    lengths = [len(list(same)) for _, same in itertools.groupby(rates)]
    assert sorted(set(rates), reverse=True) == pytest.approx([0.016 * factor**k for k in range(num + 1)])
    assert len(lengths) == num + 1 and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [0.1, 0.5])
def test_a_plateau_is_torchs(seed, factor):
    """Of a series with ties and steps near the least improvement. (Keras' patience 3 is torch's 2.)"""
    rng = np.random.default_rng(seed)
    steps = rng.choice([0, 5e-5, 1.5e-4, -5e-5, -1.5e-4, -0.02, 0.02], size=60, p=[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2])
    values = (1 + np.cumsum(steps)).tolist()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    how = {"factor": factor, "patience": 2, "threshold": 1e-4, "threshold_mode": "abs", "eps": 0}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **how)
    factors = set()
    for num, value in enumerate(values, 1):
        scheduler.step(value)
        factors.add(plateau_factor(values[:num], factor))
        assert plateau_factor(values[:num], factor) == pytest.approx(optimizer.param_groups[0]["lr"]), num
    assert len(factors) > 3
