"""Intervals, paired differences, and what stands beside the table of 06: against values by hand and by simulation."""

import numpy as np
import pytest

from conftest import load_stage

import common

stage = load_stage("06_eval_robustness")


def test_models_of_one_folder_name_are_shown_by_path():
    assert common.short_names(["runs/a/s/model.pt", "runs/b/s/model.pt", "t/model.pt"])[0] == "runs/a/s/model.pt"
    assert common.short_names(["runs/a/s/model.pt", "t/model.pt"]) == ["s", "t"]


def test_the_paired_difference_by_hand_and_its_interval():
    """And in 1,000 drawn pairs of models the true difference lies in 95 percent of the intervals."""
    labels = np.zeros(10, np.int64)

    def right(rows):
        return stage.details_of(labels, np.where(np.isin(np.arange(len(labels)), rows), 0, 1), ["a", "b"])

    points, half = common.paired_difference(right([0, 1, 2, 3, 4]), right([4, 5]))  # b = 4, c = 1 of 10
    assert points == pytest.approx(30) and half == pytest.approx(196 * (5 - 9 / 10) ** 0.5 / 10)
    rng, inside = np.random.default_rng(0), 0
    labels = np.zeros(400, np.int64)
    for _ in range(1000):
        common_part, noise = rng.random(400), rng.random((2, 400))
        one, other = (np.flatnonzero(common_part + noise[i] < limit) for i, limit in enumerate((1.2, 1.1)))
        points, half = common.paired_difference(right(one), right(other))
        truth = 100 * ((1 - 0.8**2 / 2) - (1 - 0.9**2 / 2))
        inside += abs(points - truth) <= half
    assert 930 <= inside <= 970


@pytest.mark.parametrize(
    ("num", "t"), [(2, 12.7062), (5, 2.7764), (11, 2.2281), (12, 2.2010), (21, 2.0860), (61, 2.0003)]
)
def test_the_t_interval(num, t):
    values = np.random.default_rng(num).normal(size=num)
    mean, half = common.interval_over_seeds(values)
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx(t * values.std(ddof=1) / num**0.5, rel=1e-3)


def test_the_worst_pairs_by_hand():
    clean = {"per_class": {name: {} for name in "abc"}, "confusion": [[5, 1, 0], [3, 2, 0], [0, 0, 7]]}
    row = common.Row("m", [{"clean": clean}], [""], {"clean top-1": [77.8]}, {})
    assert common.worst_pairs(row) == ["- m: b -> a 3 of 5, a -> b 1 of 6"]
