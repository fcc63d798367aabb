"""Intervals, paired differences, and what stands beside the table of 06: against values by hand and by simulation; and
the tables of tests/benchmark.py."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
from conftest import ROOT, load_stage, save_model

import common


def test_models_of_one_folder_name_are_shown_by_path():
    assert common.short_names(["runs/a/s/model.pt", "runs/b/s/model.pt", "t/model.pt"])[0] == "runs/a/s/model.pt"
    assert common.short_names(["runs/a/s/model.pt", "t/model.pt"]) == ["s", "t"]


def test_the_paired_difference_by_hand_and_its_interval():
    """And in 1,000 drawn pairs of models the true difference lies in 95 percent of the intervals."""
    labels = np.zeros(10, np.int64)

    def right(rows):
        return common.details_of(labels, np.where(np.isin(np.arange(len(labels)), rows), 0, 1), ["a", "b"])

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


def test_the_last_folder_of_a_path_that_is_a_seed_counts():
    names = [f"/data/seed7/run/seed{seed}/{model}/model.pt" for model in ("control", "student1") for seed in (0, 1, 2)]
    results = {name: {"clean": {"top1": 70 + number}} for number, name in enumerate(names[:-1])}
    found = common.rows_of(results, [({"clean top-1": of["clean"]["top1"]}, {}) for of in results.values()])
    assert next((row.name, row.seeds) for row in found) == ("control (3 seeds)", ["seed0", "seed1", "seed2"])
    assert found[1].name == "student1 (2 seeds)" and "over 2 seeds" in common.compare(found)[0]


def test_the_worst_pairs_by_hand():
    clean = {"per_class": {name: {} for name in "abc"}, "confusion": [[5, 1, 0], [3, 2, 0], [0, 0, 7]]}
    row = common.Row("m", ["m/model.pt"], [{"clean": clean}], [""], {"clean top-1": [77.8]}, {})
    assert common.worst_pairs(row) == ["- m: b -> a 3 of 5, a -> b 1 of 6"]


def rows(**models) -> list:
    """Rows of the clean top-1 of each model, one value a seed."""
    found = []
    for model, top1 in models.items():
        seeds = [f"seed{seed}" for seed in range(len(top1))]
        paths = [f"{seed}/{model}/model.pt" for seed in seeds]
        labels = np.zeros(1000, np.int64)
        entries = [{"clean": common.details_of(labels, np.arange(1000) // 10 >= value, ["a", "b"])} for value in top1]
        found.append(common.Row(model, paths, entries, seeds, {"clean top-1": list(top1)}, {"clean top-1": 1000}))
    return found


KEPT = {"unique_images": 120, "images": 1000, "threshold": 0.5, "truth": {"accuracy_after": 71.0}}


@pytest.mark.parametrize(
    ("models", "selection", "rising", "expected", "absent"),
    [
        # Differences 4, 6, 5: mean 5, deviation 1, t 4.3027 of 2 degrees of freedom: +- 4.3027 / sqrt(3) = 2.48.
        (
            {"teacher": [70, 70, 70], "control": [70, 71, 72], "student1": [0, 0, 0], "student2": [74, 77, 77]},
            {},
            False,
            ["Over 3 seeds student2 is 5.0 points better than control", "+2.5 to +7.5", "helped", "Against teacher"],
            ["One seed", "To try next"],
        ),
        (
            {"control": [70, 71, 72], "student1": [60, 76, 71]},
            KEPT,
            True,
            [
                "student1 is 2.0 points worse",
                "The interval holds 0",
                "120 of 1000",
                "(12 percent",
                "71.0 percent of their",
                "more seeds",
                "a higher threshold",
                "a lower threshold",
                "longer runs",
            ],
            ["did harm", "One seed"],
        ),
        (
            {"control": [70, 71, 72], "student1": [60, 61, 62.5]},
            KEPT | {"truth": {"accuracy_after": 91.0, "num_no_class_passed": 12}},
            False,
            ["did harm", "of the last seed kept 120", "above 0.5), 12 of no class; of the others 91.0 percent of the"],
            ["holds 0"],
        ),
        (
            {"teacher": [50], "control": [70], "student1": [80]},
            {"unique_images": 900, "images": 1000, "threshold": 0.8, "calibration": {"at": {"precision": 0.91}}},
            False,
            [
                "With one seed student1 is 10.0 points better",
                "image by image",
                "One seed is no evidence",
                "91.0 percent",
                "several seeds",
                "the teacher is right on only 50 percent",
            ],
            ["helped", "a higher threshold", "last seed", "no class"],
        ),
        (
            {"control": [70, 71, 72], "student1": [74, 77, 77]},
            KEPT | {"truth": {"accuracy_after": None, "num_no_class_passed": 12}, "method": "top-p"},
            False,
            ["120 of 1000 unlabelled images (12 percent), 12 of no class."],
            ["confidence above", "None"],
        ),
    ],
)
def test_the_verdict(models, selection, rising, expected, absent):
    words = common.verdict(rows(**models), selection, rising)
    for part in expected:
        assert part in words, (part, words)
    for part in absent:
        assert part not in words, (part, words)


def test_a_teacher_of_other_classes_and_a_report_of_something_else_do_not_stop_the_verdict(tmp_path):
    found = rows(teacher=[50], control=[70], student1=[80])
    found[0] = found[0]._replace(values={}, nums={})
    few = common.verdict([row._replace(nums={"clean top-1": 5}) for row in found], {}, False)
    assert "more held-out images (val/), for 5 say little" in few
    assert "held-out" not in common.verdict(found, {}, False)
    (tmp_path / "mine.json").write_text('{"what": "no selection"}')
    (tmp_path / "mine.h5").write_text("the selection")
    inputs = {str(tmp_path / "mine.h5"): common.file_sha256(tmp_path / "mine.h5"), str(tmp_path / "gone.h5"): "0"}
    path = save_model(tmp_path / "student1" / "model.pt", inputs=inputs)
    found[2] = found[2]._replace(paths=[str(path)])
    assert common.history_of(found) == ({}, False)
    assert "10.0 points better" in (words := common.verdict(found, {}, False)) and "teacher" not in words
    (tmp_path / "mine.json").write_text(json.dumps(KEPT))
    assert common.history_of(found) == (KEPT, False)
    (tmp_path / "mine.h5").write_text("a later one, which the student has not seen")
    assert common.history_of(found) == ({}, False)


def test_the_picture_finds_each_corruption_by_its_name(monkeypatch, tmp_path):
    """A file that an older version began has them in another order, and one may lack an extra one."""
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda plt, file: figures.append(plt.gcf()))
    drawn = ({"fog": [10] * 5, "snow": [20] * 5, "spatter": [30] * 5}, {"snow": [60] * 5, "fog": [50] * 5})
    entries = [{"corrupt": {"per_corruption": of_model}} for of_model in drawn]
    values = {"corrupted top-1": [15.0]}
    pair = [common.Row(name, [name], [entry], [""], values, {}) for name, entry in zip("ab", entries, strict=True)]
    common.draw_rows(pair, ["corrupted top-1"], ("spatter",), tmp_path / "p.png")
    _, severities, corruptions = figures[0].axes
    names = [label.get_text() for label in corruptions.get_yticklabels()]
    for line, of_model in zip(corruptions.lines, drawn, strict=True):
        shown = dict(zip(names, line.get_xdata().tolist(), strict=True))
        assert {name: top1 for name, top1 in shown.items() if top1 == top1} == {n: v[0] for n, v in of_model.items()}
    assert [line.get_ydata().tolist() for line in severities.lines] == [[15.0] * 5, [55.0] * 5]


def test_no_verdict_without_control_or_student():
    assert common.verdict(rows(teacher=[1], student1=[2]), {}, False) == ""
    assert common.verdict(rows(teacher=[1], control=[2]), {}, False) == ""


def evidence_results():
    """tests/results.py as a module."""
    spec = importlib.util.spec_from_file_location("evidence_results", ROOT / "tests" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_evidence(tmp_path, monkeypatch):
    """docs/results.md of made-up runs: means, deviations and paired differences by hand, and what a claim shows."""
    results = evidence_results()
    monkeypatch.setattr(results, "ROOT", tmp_path)
    top1 = {"hard-labels": (74, 76, 78), "control": (70, 71, 72), "ratio-3": (70, 73, 72), "student1": (74, 77, 77)}
    selection = {"unique_images": 120, "images": 1000, "threshold": 0.5, "truth": {"accuracy_after": 71.0}, "more": 1}
    (tmp_path / "balanced.json").write_text(json.dumps(selection))
    (tmp_path / "balanced.h5").touch()
    inputs, sources = {str(tmp_path / "balanced.h5"): common.file_sha256(tmp_path / "balanced.h5")}, []
    for seed in range(3):
        runs = tmp_path / f"seed{seed}"
        save_model(runs / "student1" / "model.pt", inputs=inputs)
        entries = {
            str(runs / model / "model.pt"): {
                "clean": {"top1": values[seed], "num": 1000},
                "corrupt": {"top1": values[seed] / 2},
            }
            for model, values in top1.items()
        }
        sources.append(tmp_path / f"{seed}.json")
        sources[-1].write_text(json.dumps(entries))
        results.collect("claims", f"seed{seed}", sources[-1])
        assert "## claims" in results.tables(), "with any number of seeds"
    lines = results.tables().splitlines()
    # Differences 4, 6, 5: 5 +- 4.3027 * 1 / sqrt(3). Corrupted ones are half as large.
    assert "| student1 | 74.00, 77.00, 77.00 | 76.00 ± 1.73 | 38.00 ± 0.87 | +5.00 ± 2.48 | +2.50 ± 1.24 |" in lines
    rows = [line for line in lines[::-1] if "` - `" in line]
    shown = {line.split("`")[3] + " " + line.split("`")[1]: line.split(" | ")[-1] for line in rows}
    assert shown["control student1"] == "yes |" and shown["hard-labels student1"] == "not shown |"
    assert shown["student1 ratio-3"] == "the other way |"
    robustness = [line for line in lines if line.endswith("| +5.00 ± 2.48 | +2.50 ± 1.24 | 3 | the other way |")]
    assert len(robustness) == 1
    order = [line.split(" | ")[0] for line in lines if line.startswith("| ") and "`" not in line]
    assert order == ["| model", "| ---", "| control", "| student1", "| hard-labels", "| ratio-3", "| claim", "| ---"]
    assert not any("unbalanced" in line for line in lines)  # was not run
    assert results.folded("a" * 110 + " from-its-teacher")[1] == "from-its-teacher", "a name stays whole"

    # An arm that is run later joins those of its seed.
    monkeypatch.setenv("COMMIT", "later")
    later = {str(tmp_path / "unbalanced" / "model.pt"): {"clean": {"top1": 75, "num": 1000}}}
    (tmp_path / "later.json").write_text(json.dumps(later))
    save_model(tmp_path / "unbalanced" / "model.pt")
    results.collect("claims", "seed0", tmp_path / "later.json")
    kept = json.loads((tmp_path / "docs" / "results" / "claims" / "seed0.json").read_text())
    assert list(kept["models"]) == [*top1, "unbalanced"] and kept["commit"].endswith("; later")
    assert "| unbalanced | 75.00, -, - | 75.00 | - | - | - |" in results.tables().splitlines()
    monkeypatch.delenv("COMMIT")

    # The demo's are the README's first table too, with the verdict; the picture is beside the numbers. A seed that
    # another commit measured is named.
    for seed, source in enumerate(sources):
        results.collect("demo", f"seed{seed}", source)
    file = tmp_path / "docs" / "results" / "demo" / "seed2.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "abc"}))
    results.draw(results.models_of(results.runs_of("demo")), file.with_name("dots.png"))
    words = " ".join(results.tables().split())
    assert file.with_name("dots.png").exists() and "](results/demo/dots.png)" in words
    assert "seed 0 1: commit" in words and "seed 2: commit abc" in words
    before, after = "# Title\n<!-- demo table -->\n", "<!-- end -->\nmore\n"
    text = results.readme(f"{before}of earlier runs\n{after}")
    assert text.startswith(before) and text.endswith(after) and "earlier" not in text
    assert "(docs/results/demo/dots.png)" in text and "| student1 | 76.00 ± 1.73 | 38.00 ± 0.87 |" in text
    assert 'SEEDS="0 1 2" ./run.sh' in text and results.readme(text) == text
    results.collect("demo", "seed2", sources[2])
    assert json.loads(file.read_text())["commit"] != "abc", "measured again, it is of this commit alone"
    words = " ".join(text.split())
    assert "Over 3 seeds student1 is 5.0 points better than control" in words and "+2.5 to +7.5 points" in words
    assert "kept 120 of 1000 unlabelled images (12 percent; confidence above 0.5), 71.0 percent of their" in words
    assert "commit" not in words


def test_the_arms_of_the_claims_are_matched(tmp_path, monkeypatch):
    """tests/evidence.sh with a python3 that only notes its words: each arm is a command that its stage takes, of 64
    images a step and 1,012 steps, 50 or a few more of them warm-up; pre-training and fine-tuning are so together."""
    log, toolkit = tmp_path / "log", tmp_path / "toolkit"
    python = toolkit / ".venv" / "bin" / "python3"
    for folder in (python.parent, toolkit / "tests", toolkit / "data" / "demo" / "unlabeled"):
        folder.mkdir(parents=True)
    for name in ("unlabeled_truth.csv", "unlabeled/a.png"):
        (toolkit / "data" / "demo" / name).touch()
    python.write_text(f"""#!/bin/sh
case "$1 $*" in
-c*device_count*) echo "0 300 32 1000 1000"; exit ;;
-c*version_info*) exit ;;
-c*) exec {sys.executable} -IS "$@" ;;
03*) for last; do :; done; echo '{{"examples": 4000}}' >"${{last%.h5}}.json" ;;
esac
echo "$*" >>{log}
""")
    python.chmod(0o755)
    python.with_name("python").symlink_to(python)
    for name in ("run.sh", "tests/evidence.sh", "requirements.txt"):
        shutil.copy(ROOT / name, toolkit / name)
    shutil.copy(ROOT / "requirements.txt", toolkit / ".venv" / ".installed-requirements.txt")
    shutil.copytree(ROOT / "recipes", toolkit / "recipes")
    words = ["bash", toolkit / "tests" / "evidence.sh", "claims"]
    subprocess.run(words, env=os.environ | {"SEEDS": "0", "BATCH": "7"}, check=True, capture_output=True, timeout=60)

    commands = [line.split() for line in log.read_text().splitlines()]
    arms = {}
    for stage, *flags in commands:
        if stage[:2] in ("01", "04"):
            monkeypatch.setattr(sys, "argv", [stage, *flags])
            args = load_stage(stage.removesuffix(".py")).parse_args()
            images = args.batch_size * (1 + (getattr(args, "ratio", 0) or 0))
            images = args.batch_size if getattr(args, "unlabeled_only", False) else images
            an_epoch = (
                4000 if images == args.batch_size and stage[:2] == "04" and not args.consistency else 300
            ) / args.batch_size
            arms[Path(args.out).name] = args.epochs * an_epoch
            assert images == 64, args.out
            assert 50 <= args.warmup_epochs * an_epoch < 110 or args.out.name == "pretrained", args.out
    assert len(arms) == 14 + 3 and arms.pop("pretrained") + arms.pop("finetuned") == pytest.approx(1012)
    assert list(arms.values()) == pytest.approx([1012] * len(arms))
    named = {name for _, _, *pair in evidence_results().CLAIMS.values() for name in pair}
    assert named - {"student2"} == (arms.keys() | {"pretrained", "finetuned"}) - {"teacher"}
    assert commands[-1] == ["tests/results.py", "claims", "seed0", *commands[-1][3:]] and commands[-2][0][:2] == "06"

    words[2:] = ["cifar10", toolkit / "data" / "demo"]
    subprocess.run(words, env=os.environ | {"SEEDS": "0"}, check=True, capture_output=True, timeout=60)
    commands = [line.split() for line in log.read_text().splitlines()[len(commands) :]]
    outs = {Path(command[-1]).name: command[:-1] for command in commands if command[0][:2] in ("01", "04", "05")}
    flags = [word for word in outs["teacher"][:-1] if word not in ("--classifier-lr", "0.03")]
    assert outs["before"] == [*flags, "--weight-decay", "0.02", "--out"] and len(flags) == len(outs["teacher"]) - 3
    assert [Path(path).parent.name for path in commands[-2][1:8]] == list(outs)


# ----------------------------------------------------------------------------------------------------------------------
# tests/benchmark.py, whose tables stand in docs/speed.md
# ----------------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_benchmark_runs_and_is_pasted(capfd, monkeypatch):
    """In small, in one precision, without 01; a package that is not there is named and left out."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(benchmark, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(benchmark, "STAGES", ("04",))
    monkeypatch.setitem(benchmark.PEERS, "kornia", False)
    benchmark.main(["all", "--quick", "--threads", "1", "--device", "cpu", "--clock", "cpu"])
    output = capfd.readouterr().out
    assert re.search("left out: .*kornia", output)
    rows = re.findall(r"^\| ([^|]+: [^|]+) \| ([\d,.]+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \|", output, re.M)
    names = " ".join(name for name, _, _ in rows)
    assert all(float(ratio) > 0 for _, _, ratio in rows) and len({name for name, _, _ in rows}) == len(rows)
    for stage in ("ours, 02", "ours, 03", "ours, 03 --method top-p", "ours, 04", "ours, 06", "8 px: ours"):
        assert stage in names
    for peer in ("train.py", "inference.py", "validate.py", "torchvision v1", "torchvision v2", "h5py and numpy"):
        assert peer in names
    assert "kornia, ops" not in names

    page = (ROOT / "docs" / "speed.md").read_text()
    pasted = benchmark.paste(output, page)
    assert benchmark.paste(output, pasted) == pasted and all(f"| {name} |" in pasted for name, _, _ in rows)
    outside = r"(?ms)(^<!-- speed: \w+ -->\n).*?(?=^<!-- end -->)"
    assert re.sub(outside, r"\1", pasted) == re.sub(outside, r"\1", page)
    with pytest.raises(SystemExit):
        benchmark.paste(output, page.replace("<!-- speed: noise -->", ""))


def test_the_benchmarks_table_by_hand(capsys):
    """Ratios to the first of a group, round by round; the first turn does not count; what is behind is named."""
    turns = {
        "a: peer": [9, 1, 2, 4],
        "a: other": [9, 2, 2, 2],
        "a: ours": [9, 1, 4, 2],
        "a: (floor)": [9, 0.5, 0.5, 0.5],
    }
    calls = {name: (8, partial(next, map(float, seconds))) for name, seconds in turns.items()}
    args = SimpleNamespace(rounds=3, clock="wall")
    benchmark.race(calls | {"b: ours": (1, lambda: 0.25)}, args, "images/s", ("MB", {"a: ours": 7}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:6] == [
        "| a: peer | 4 | 1.00 | 1.00 | 1.00 |  |",
        "| a: other | 4 | 1.00 | 0.50 | 2.00 |  |",
        "| a: ours | 4 | 1.00 | 0.50 | 2.00 | 7 |",
        "| a: (floor) | 16 | 4.00 | 2.00 | 8.00 |  |",
    ]
    assert lines[8] == "Rows of ours with a peer: 1, 1 behind: a: ours (1.00 of peer)."
