"""What stage 06 makes of robustness.json, with intervals by hand and by simulation; and tests/results.py."""

import importlib
import json

import numpy as np
import pytest
from conftest import load_stage
from hypothesis import given
from hypothesis import strategies as st

stage = load_stage("06_eval_robustness")
results = importlib.import_module("results")


def entry_of(right: np.ndarray, **summary) -> dict:
    """An entry of robustness.json by which images are right; label 0 is right."""
    labels = np.zeros(len(right), np.int64)
    clean = stage.details_of(labels, 1 - np.int64(right), ["a", "b"])
    return {"clean": clean | {"top1": 100 * float(np.mean(right)), "num": len(right)}, "summary": summary}


def test_paths_that_differ_in_a_folder_of_a_seed_are_one_row():
    places = [("control", 0), ("control", 1), ("control", 2), ("student1", 0), ("student1", 1)]
    names = [f"/data/seed7/run/seed{seed}/{model}/model.pt" for model, seed in places]
    shown = {name: entry_of(np.arange(50) < 30 + number) for number, name in enumerate(names)}
    control, student = stage.rows_of(shown)
    assert (control.name, control.model) == ("control (3 seeds)", "control")
    assert list(control.columns) == ["seed0", "seed1", "seed2"] and list(student.columns) == ["seed0", "seed1"]
    assert control.text("clean") == "62.00 ± 2.00" and control.text("pgd/2") == "-"
    assert stage.difference(student, control, "clean")[2] == 2  # seeds that both have
    paths = ["runs/a/s/model.pt", "runs/b/s/model.pt", "t/model.pt"]
    assert [row.name for row in stage.rows_of(dict.fromkeys(paths, shown[names[0]]))] == [*paths[:2], "t"]


def test_a_share_of_few_images_has_wilsons_interval():
    (row,) = stage.rows_of({"a/m.pt": entry_of(np.ones(100))})
    low = 100 / (100 + 1.959964**2)  # of 100 right of 100: from n / (n + z^2) to 1
    assert row.text("clean") == f"100.00 ± {50 * (1 - low):.2f}"


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (1.5, 6.0167), (4, 2.7764), (20, 2.0860), (9999, 1.9602)])
def test_students_t(freedom, t):
    assert stage.t_95(freedom) == pytest.approx(t, rel=1e-4)


def test_the_interval_of_one_seed_by_hand():
    """b = 4 and c = 1 of 10 images are right in one model alone: 5 and 2 of 12 (Bonett and Price, 2012)."""
    d = np.array([[1, 1, 1, 1, -1, 0, 0, 0, 0, 0]])
    variance = ((5 + 2) / 12 - ((5 - 2) / 12) ** 2) / (12 - 1)
    assert stage.half_interval(d) == pytest.approx(100 * 2.2010 * variance**0.5, rel=1e-4)
    assert stage.half_interval(np.zeros((1, 50))) > 0  # equal answers are no proof of equality


@given(st.integers(2, 6), st.integers(5, 40), st.integers(0, 1000))
def test_the_interval_of_several_seeds_by_hand(seeds, images, number):
    d = np.random.default_rng(number).integers(-1, 2, (seeds, images))
    padded = np.hstack([d, np.ones((seeds, 1)), -np.ones((seeds, 1))])
    a = np.var(padded.mean(1), ddof=1) / seeds
    b = np.var(padded.mean(0), ddof=1) / (images + 2)
    rest = padded - padded.mean(1, keepdims=True) - padded.mean(0, keepdims=True) + padded.mean()
    e = (rest**2).sum() / ((seeds - 1) * (images + 1)) / (seeds * (images + 2))
    variance = max(a + b - e, a, b)
    freedom = variance**2 / (a**2 / (seeds - 1) + b**2 / (images + 1))
    assert stage.half_interval(d) == pytest.approx(100 * stage.t_95(freedom) * variance**0.5)


def test_equal_models_are_told_apart_in_5_percent_of_the_cases():
    """Both are right on an image with a chance that depends on the image, its seed and the model's taste."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        difficulty, tastes = rng.normal(size=200), rng.normal(0, 0.7, (2, 200))
        seeds = rng.normal(0, 0.1, (2, 10, 1)) + rng.normal(0, 0.5, (2, 10, 200))
        right = difficulty + tastes[:, None] + seeds > 0
        d = np.int64(right[0]) - np.int64(right[1])
        wrong += abs(100 * d.mean()) > stage.half_interval(d)
    assert wrong <= 24  # of 300; an interval over the seeds alone is wrong in about 70


def test_the_verdict_in_numbers():
    """Corrupted: differences 3 and 1, mean 2, deviation sqrt(2), t of one degree of freedom."""
    top1 = {"teacher": (50, 50), "control": (60, 62), "student1": (10, 10), "student2": (66, 64)}
    shown = {}
    for model, values in top1.items():
        for seed, value in enumerate(values):
            shown[f"seed{seed}/{model}/m.pt"] = entry_of(np.arange(100) < value, corrupted=value / 2)
    rows = {row.model: row for row in stage.rows_of(shown)}
    points, half, _ = stage.difference(rows["student2"], rows["control"], "clean")
    assert points == pytest.approx(4)
    text = stage.verdict(list(rows.values()))
    assert "student2" in text and "student1" not in text
    for center, width in ((points, half), (2, 12.7062)):
        assert f"{center:+.2f} points" in text
        assert f"{center - width:+.2f} to {center + width:+.2f}; seeds: 2" in text
    assert not stage.verdict([rows["teacher"], rows["student2"]])
    assert not stage.verdict([rows["control"]])
    alone = stage.rows_of({path: entry for path, entry in shown.items() if "seed0" in path})
    assert stage.difference(alone[3], alone[1], "corrupted") == (3, None, 1) and stage.verdict(alone)


# tests/results.py

TOP1 = {"hard-labels": (74, 76, 78), "control": (70, 71, 72), "ratio-3": (70, 73, 72), "student1": (74, 77, 77)}


def test_the_tables_of_the_evidence(tmp_path, monkeypatch):
    """docs/results.md of made-up runs: means, deviations and paired differences by hand, and what a claim shows."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    measured = tmp_path / "robustness.json"
    for seed in range(3):
        entries = {}
        for model, values in TOP1.items():
            clean, summary = {"top1": values[seed], "num": 1000}, {"corrupted": values[seed] / 2}
            entries[f"seed{seed}/{model}/model.pt"] = {"clean": clean, "summary": summary}
        measured.write_text(json.dumps(entries))
        results.collect("claims", f"seed{seed}", measured)
        results.collect("demo", f"seed{seed}", measured)
    lines = results.tables().splitlines()
    # Differences 4, 6, 5: 5 +- 4.3027 * 1 / sqrt(3). Corrupted ones are half as large.
    assert "| student1 | 74.00, 77.00, 77.00 | 76.00 ± 1.73 | 38.00 ± 0.87 | +5.00 ± 2.48 | +2.50 ± 1.24 |" in lines
    shown = {tuple(line.split("`")[1:4:2]): line.split(" | ")[-1] for line in lines if "` - `" in line}
    assert shown["student1", "control"] == "the other way |"  # more is gained on corrupted images: the last of these
    assert shown["student1", "hard-labels"] == "not shown |" and shown["ratio-3", "student1"] == "the other way |"
    order = [line.split(" | ")[0] for line in lines if line.startswith("| ") and "`" not in line]
    assert order[:6] == ["| model", "| ---", "| control", "| student1", "| hard-labels", "| ratio-3"]
    assert results.folded("a" * 110 + " from-its-teacher")[1] == "from-its-teacher", "a name stays whole"

    # An arm that is run later joins those of its seed; a seed that another commit measured is named.
    monkeypatch.setenv("COMMIT", "later")
    later = {"unbalanced/model.pt": {"clean": {"top1": 75, "num": 1000, "right": "AA=="}}}
    measured.write_text(json.dumps(later))
    results.collect("claims", "seed0", measured)
    kept = json.loads((tmp_path / "docs" / "results" / "claims" / "seed0.json").read_text())
    assert list(kept["models"]) == [*TOP1, "unbalanced"] and kept["commit"].endswith("; later")
    assert kept["models"]["unbalanced"]["right"] == "AA=="
    assert "| unbalanced | 75.00, -, - | 75.00 | - | - | - |" in results.tables().splitlines()
    assert "seed 1 2: commit" in " ".join(results.tables().split())

    # The demo's are the README's first table too, with the verdict; the picture is beside the numbers.
    picture = tmp_path / "docs" / "results" / "demo" / "dots.png"
    results.draw(results.rows_of(results.runs_of("demo")), picture)
    before, after = "# Title\n<!-- demo table -->\n", "<!-- end -->\nmore\n"
    text = results.readme(f"{before}of earlier runs\n{after}")
    assert picture.exists() and text.startswith(before) and text.endswith(after) and "earlier" not in text
    assert "| student1 | 76.00 ± 1.73 | 38.00 ± 0.87 |" in text and 'SEEDS="0 1 2" ./run.sh' in text
    assert results.readme(text) == text


def test_the_runs_that_were_kept_can_be_read():
    """docs/results.md can be made again of what stands in the repository."""
    text = results.tables()
    for folder in (results.ROOT / "docs" / "results").iterdir():
        assert f"## {folder.name}\n" in text
