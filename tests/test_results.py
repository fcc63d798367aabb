"""What stage 06 makes of robustness.json, with intervals by hand and by simulation; and tests/results.py."""

import importlib
import json

import numpy as np
import pytest
from conftest import load_stage, save_model, write_files
from hypothesis import given
from hypothesis import strategies as st
from simulate_intervals import draw_difference

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
    assert row.text("clean") == f"100.00 ± {50 * (1 - 100 / (100 + 1.959964**2)):.2f}"  # n / (n + z^2) to 1


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
    rng = np.random.default_rng(0)
    differences = (draw_difference(rng, (3.5, 2.4, 0.34), seeds=10, images=200) for _ in range(300))
    wrong = sum(abs(100 * d.mean()) > stage.half_interval(d) for d in differences)
    assert wrong <= 24  # of 300; an interval over the seeds alone is wrong in 79, over the images alone in 31


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
    right = {value: np.arange(100) < value for value in (60, 62, 64, 66)}  # no zeros of the last byte
    by_hand = np.array([right[66] ^ right[60], right[64] ^ right[62]]).astype(int)
    assert half == pytest.approx(stage.half_interval(by_hand))
    text = stage.verdict(list(rows.values()))
    assert "student2" in text and "student1" not in text and text.endswith("is that of student2 (2 seeds).")
    for center, width in ((points, half), (2, 12.7062)):
        assert f"{center:+.2f} points" in text
        assert f"{center - width:+.2f} to {center + width:+.2f}; seeds: 2" in text
    assert not stage.verdict([rows["teacher"], rows["student2"]])
    assert not stage.verdict([rows["control"]])
    alone = stage.rows_of({path: entry for path, entry in shown.items() if "seed0" in path})
    assert stage.difference(alone[3], alone[1], "corrupted") == (3, None, 1) and stage.verdict(alone)


def test_a_run_that_is_taken_in_becomes_a_table(tmp_path, monkeypatch):
    """tests/results.py on two folders of made-up runs: what is kept of them, and the table and verdict of stage 06."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    page = tmp_path / "docs" / "results.md"
    by_hand = json.dumps({"text": ["Why."], "rows": [["a", "b"], ["1", "2"]]}).encode()
    write_files(tmp_path, {"docs/results/by-hand.json": by_hand})
    page.write_text("# Results\n<!-- tables -->\nof before\n<!-- end -->\nmore\n")
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    selection = {"candidates": 60, "threshold": 0.5, "kept": 40, "examples": 44, "classes": {}}
    for seed, run in enumerate(runs):
        folder = run / f"seed{seed}"
        save_model(folder / "teacher" / "model.pt", class_counts=[20, 10])
        truth = {"accuracy_before": 70.0 + seed, "accuracy_after": 90.0 + seed}
        (folder / "selected1.json").write_text(json.dumps(selection | {"truth": truth}))
        entries = {}
        for model, value in {"teacher": 50, "control": 60 + seed, "student1": 70 + 3 * seed}.items():
            entry = entry_of(np.arange(100) < value, corrupted=value / 2) | {"sha256": "0" * 64}
            entries[f"{folder}/{model}/model.pt"] = entry
        write_files(run, {"robustness/robustness.json": json.dumps(entries).encode()})
    for commit, run in zip(("abc1234", "def5678"), runs, strict=True):  # on two days
        monkeypatch.setenv("COMMIT", commit)
        results.main(["add", "demo", str(run)])
    text, kept = page.read_text(), (tmp_path / "docs" / "results" / "demo.json").read_text()
    table = "## by-hand\n\nWhy.\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n"
    assert text.startswith(f"# Results\n<!-- tables -->\n{table}## demo\n") and text.endswith("<!-- end -->\nmore\n")
    assert str(tmp_path) not in kept and "confusion" not in kept and "of before" not in text
    for fact in ("commit abc1234 def5678", "30 labeled images, 60 unlabeled images, 100 val images", "seeds 0 1."):
        assert fact in text
    # Differences 10 and 12; corrupted ones are half as large, their interval that of t with one degree of freedom.
    (student,) = (line.split("|") for line in text.splitlines() if line.startswith("| student1 (2 seeds)"))
    assert [cell.strip() for cell in student[2:4]] == ["71.50 ± 2.12", "35.75 ± 1.06"] and "+11.00 ± " in student[4]
    assert "student1 gains +11.00 points over control" in text and "-0.85 to +11.85" in text
    assert "seed0/selected1 70.0 to 90.0, seed1/selected1 71.0 to 91.0." in text
    results.main([])
    assert page.read_text() == text
