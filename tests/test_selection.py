"""Stage 03's rules against brute-force transcriptions of the contract, its command line on hand-made logits files, and
what stage 04 makes of a selection: its logits, targets and loss."""

import csv
import json
import math
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import load_stage
from hypothesis import given, settings
from hypothesis import strategies as st

from common import LOGITS_FORMAT, SELECTION_FORMAT, ImageList, open_label_file, read_classes

balance, student = load_stage("03_balance"), load_stage("04_train_student")
create_logits = load_stage("02_pseudo_label").create_logits

CLASSES = ["ant", "bee", "cat"]
ABOVE = float(np.nextafter(np.float32(0.3), np.float32(1)))  # the next float32 above 0.3
# A few exact values, so that ties and the threshold itself come up.
CONFIDENCES = st.sampled_from([float(np.float32(v)) for v in (0.1, 0.29, 0.3, ABOVE, 0.5, 0.7, 0.7000001, 0.9, 1.0)])


@st.composite
def labelled_rows(draw):
    num_classes = draw(st.integers(1, 5))
    rows = draw(st.lists(st.tuples(st.integers(0, num_classes - 1), CONFIDENCES), max_size=40))
    label = np.array([row[0] for row in rows], dtype=np.int32)
    return label, np.array([row[1] for row in rows], dtype=np.float32), num_classes


def kept_by_the_rule(label, confidence, c, threshold, per_class):
    """The indices of a class's images that may be used: above the threshold, the most confident, ties by index."""
    above = [i for i in range(len(label)) if label[i] == c and confidence[i] > np.float32(threshold)]
    return sorted(above, key=lambda i: (-confidence[i], i))[:per_class]


@contextmanager
def pieces(num_rows: int):
    """Everything in chunks of so many rows, and the best of the classes found anew after each."""
    whole, add = balance.in_chunks, balance.BestOfClasses.add

    def add_and_rank(self, *entries):
        add(self, *entries)
        self.best()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "in_chunks", lambda *columns, **_: whole(*columns, num_rows=num_rows))
        patch.setattr(balance.BestOfClasses, "add", add_and_rank)
        yield


@settings(max_examples=300, deadline=None)
@given(
    labelled_rows(),
    st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    st.sampled_from([None, 1, 2, 3, 7, 100]),
    st.integers(0, 3),
    st.lists(st.integers(0, 40), max_size=3),
    st.integers(1, 9),
)
def test_noisy_student_is_the_contracts_rule(rows, threshold, per_class, seed, cuts, chunk):
    label, confidence, num_classes = rows
    above = np.bincount(label[confidence > np.float32(threshold)], minlength=num_classes)
    used = per_class or balance.auto_per_class(above)
    cut = sorted(cuts)  # in one to four files
    parts = [list(np.split(column, [c for c in cut if c <= len(label)])) for column in (label, confidence)]
    with pieces(chunk):
        index, chosen, score = balance.select_noisy_student(*parts, num_classes, threshold, used or 1, seed)
    assert (chosen == label[index]).all() and (score == confidence[index]).all()
    sizes = [len(kept_by_the_rule(label, confidence, c, threshold, None)) for c in range(num_classes)]
    full = sorted(size for size in sizes if size)
    if per_class is None:
        per_class = full[(len(full) - 1) // 2] if full else 0  # the lower median of the classes that are not empty
    assert used == per_class
    copies = Counter(index.tolist())
    for c in range(num_classes):
        expected = kept_by_the_rule(label, confidence, c, threshold, per_class)
        mine = {i: copies[i] for i in copies if label[i] == c}
        assert sorted(mine) == sorted(expected)
        if expected:
            assert sum(mine.values()) == per_class, "not balanced"
            assert max(mine.values()) - min(mine.values()) <= 1
    assert set(copies) <= {i for i in range(len(label)) if confidence[i] > np.float32(threshold)}


def test_threshold_is_exclusive_and_in_float32():
    label, confidence = np.zeros(3, np.int32), np.array([0.3, ABOVE, 0.29], dtype=np.float32)
    assert balance.select_noisy_student([label], [confidence], 1, 0.3, 1, 0)[0].tolist() == [1]
    assert balance.select_noisy_student([label[:1]], [confidence[:1]], 1, 0.3, 1, 0)[0].tolist() == []


def test_auto_is_the_lower_median_of_what_is_not_empty():
    assert balance.auto_per_class(np.array([0, 5, 0, 2, 9, 3])) == 3  # 2 3 5 9: the lower of the two in the middle
    assert balance.auto_per_class(np.array([0, 5, 0, 2, 9])) == 5


def test_auto_is_at_most_the_papers_130000():
    assert balance.auto_per_class(np.array([130_500])) == 130_000
    num = 130_500
    label, confidence = np.zeros(num, np.int32), np.linspace(0.5, 1, num).astype(np.float32)
    index, _, _ = balance.select_noisy_student([label], [confidence], 1, 0.3, 130_000, 0)
    assert len(index) == 130_000 and index.min() == 500


def test_the_seed_alone_decides_which_images_get_the_extra_copy():
    label, confidence = np.repeat([0, 1], 20).astype(np.int32), np.full(40, 0.9, np.float32)

    def twice(label, seed):
        index, _, _ = balance.select_noisy_student([label], [confidence[: len(label)]], 2, 0.3, 30, seed)
        return {i for i, copies in Counter(index.tolist()).items() if copies == 2}

    assert twice(label, 0) == twice(label, 0)
    assert len({frozenset(twice(label, seed)) for seed in range(5)}) == 5
    # what another class has changes nothing for this one
    assert {i for i in twice(label, 0) if i < 20} == {i for i in twice(label[:30], 0) if i < 20}
    drawn = Counter(i for seed in range(200) for i in twice(label, seed))
    assert all(60 < drawn[i] < 140 for i in range(40)), "some images are favoured"


@pytest.mark.parametrize("per_class", [1, 7, 5000])
def test_a_thousand_classes_in_four_files(per_class):
    """Many ties, several rankings on the way, classes without any image; both methods."""
    rng = np.random.default_rng(per_class)
    label = (rng.zipf(1.3, 400_000) % 1100).astype(np.int32)
    label = label[label < 990]
    confidence = rng.choice(np.linspace(0, 1, 200, dtype=np.float32), len(label))
    parts = [np.array_split(column, 4) for column in (label, confidence)]
    index, chosen, score = balance.select_noisy_student(*parts, 1000, 0.3, per_class, 0)
    assert (chosen == label[index]).all() and (score == confidence[index]).all()
    order = np.lexsort((-confidence, label))  # stable, so ties go by row
    order = order[confidence[order] > np.float32(0.3)]
    rank = np.arange(len(order)) - np.searchsorted(label[order], label[order])
    assert np.unique(index).tolist() == sorted(order[rank < per_class].tolist())
    sizes = np.bincount(chosen, minlength=1000)
    assert set(sizes.tolist()) == {0, per_class} and (sizes[990:] == 0).all()


@st.composite
def logit_files(draw):
    num_classes = draw(st.integers(1, 5))
    level = st.sampled_from([0.0, -0.5, -1.0, -3.0, -20.0])
    row = st.lists(level, min_size=num_classes, max_size=num_classes)
    return num_classes, [np.array(rows, np.float16).reshape(-1, num_classes) for rows in draw(
        st.lists(st.lists(row, max_size=12), min_size=1, max_size=4))]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(logit_files(), st.sampled_from([1, 2, 3, 10]), st.sampled_from([1, 2, 5, 100]), st.integers(1, 9))
def test_top_p_is_yalniz_rule(files, top_p, per_class, chunk):
    num_classes, parts = files
    logits = np.concatenate(parts).astype(np.float32)
    if len(logits) > 2:
        parts = [part.copy() for part in parts]
        unreadable = 1
        position = 0
        for part in parts:
            if position <= unreadable < position + len(part):
                part[unreadable - position] = np.nan
            position += len(part)
        logits[unreadable] = np.nan
    with pieces(chunk):
        index, label, score = balance.select_top_p(parts, num_classes, top_p, per_class)
    got = {(int(i), int(c)) for i, c in zip(index, label, strict=True)}
    assert len(got) == len(index), "an example is repeated"
    probs = np.exp(logits - logits.max(1, keepdims=True)) if len(logits) else logits
    probs = probs / probs.sum(1, keepdims=True)
    np.testing.assert_allclose(score, [probs[i, c] for i, c in zip(index, label, strict=True)], rtol=1e-6)

    candidates = {c: [] for c in range(num_classes)}
    for i, row in enumerate(probs):
        if np.isfinite(row).all():
            for c in sorted(range(num_classes), key=lambda c: (-row[c], c))[:top_p]:
                candidates[c].append(i)
    expected = {
        (i, c) for c, mine in candidates.items() for i in sorted(mine, key=lambda i: (-probs[i, c], i))[:per_class]
    }
    assert got == expected


# the command line


def write_logits(path, logits, root="/data/unlabeled", names=None, classes=CLASSES, teacher="a" * 64, unreadable=()):
    """A finished logits file of these fp32 logits (N, C), as stage 02 fills it."""
    logits = np.asarray(logits, dtype=np.float32)
    names = names or [f"{path.stem}/{i:03}.png" for i in range(len(logits))]
    nothing = np.zeros(len(names), np.int64)
    rows = ImageList(str(root), np.array([name.encode() for name in names], dtype="S"), nothing, nothing)
    create_logits(
        path,
        rows,
        classes,
        len(rows),
        arch="efficientnet_b0",
        image_size=32,
        teacher="/t/model.pt",
        teacher_sha256=teacher,
    )
    shifted = logits - logits.max(1, keepdims=True)
    good = ~np.isin(np.arange(len(logits)), unreadable)
    with h5py.File(path, "r+") as file:
        file["logits"][:] = np.where(good[:, None], shifted, np.nan).astype(np.float16)
        file["label"][:] = np.where(good, logits.argmax(1), -1)
        file["confidence"][:] = np.where(good, 1 / np.exp(shifted).sum(1), np.nan)
        file["status"][:] = np.where(good, 1, 2)
    return path


def logits_of(*rows):
    """Logits of (label, confidence) rows of three classes, the rest shared evenly."""
    probs = [[confidence if c == label else (1 - confidence) / 2 for c in range(3)] for label, confidence in rows]
    return np.log(probs)


@pytest.fixture
def two_files(tmp_path):
    """Above .4: ant .95 .9 .8 .8 .45, bee .9 .6, no cat; one row is unreadable, and a tie spans the files."""
    one = logits_of((0, 0.95), (1, 0.9), (0, 0.8), (2, 0.38), (0, 0.5))
    two = logits_of((0, 0.9), (1, 0.6), (0, 0.8), (2, 0.36), (0, 0.45))
    return [write_logits(tmp_path / "b.h5", one, unreadable=[4]), write_logits(tmp_path / "a.h5", two)]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags) -> (exit status, stdout, stderr) of stage 03, in this process: a second saved a call."""
    monkeypatch.setattr(balance, "draw", lambda *args: None)

    def run_balance(*flags):
        monkeypatch.setattr(sys, "argv", ["03_balance.py", *map(str, flags)])
        try:
            balance.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run_balance


def refused(result, *words):
    status, _, errors = result
    assert status == 2, result
    lines = errors.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), errors


def read_selection(path):
    with open_label_file(path, SELECTION_FORMAT) as file:
        return (
            {name: file[name][:] for name in ("file", "row", "label", "confidence")},
            dict(file.attrs),
            read_classes(file),
        )


def test_selection_by_hand(two_files, tmp_path, run):
    out = tmp_path / "out" / "balanced.h5"
    status, printed, _ = run(*two_files, "--out", out, "--threshold", 0.4, "--per-class", 3)
    assert status == 0
    columns, attrs, classes = read_selection(out)
    # a.h5 is file 0. ant: b0 .95, a0 .9, then .8 in a2 and b2: a tie, that goes to the earlier file. bee: 2 become 3.
    rows = list(zip(columns["file"].tolist(), columns["row"].tolist(), columns["label"].tolist(), strict=True))
    ants, bees = [r for r in rows if r[2] == 0], [r for r in rows if r[2] == 1]
    assert ants == [(0, 0, 0), (0, 2, 0), (1, 0, 0)]
    assert len(bees) == 3 and set(bees) == {(0, 1, 1), (1, 1, 1)}
    assert rows == sorted(rows), "not sorted by (file, row, label)"
    confidence = {row: c for row, c in zip(rows, columns["confidence"].tolist(), strict=True)}
    assert confidence[(0, 2, 0)] == pytest.approx(0.8) and confidence[(1, 1, 1)] == pytest.approx(0.9)
    dtypes = {"file": np.uint16, "row": np.int64, "label": np.int32, "confidence": np.float32}
    assert {name: column.dtype for name, column in columns.items()} == dtypes
    assert classes == CLASSES
    assert json.loads(attrs["files"]) == [str(tmp_path / "a.h5"), str(tmp_path / "b.h5")]
    expected = {
        "format": "noisy-student-selection-1",
        "method": "noisy-student",
        "threshold": 0.4,
        "per_class": 3,
        "seed": 0,
    }
    assert {name: attrs[name] for name in expected} == expected
    assert "cat" in printed, "a class without any image must be reported"

    report = json.loads(out.with_suffix(".json").read_text())
    assert report["empty_classes"] == ["cat"]
    assert [report[k] for k in ("images", "above_threshold", "examples", "unique_images", "per_class")] == [
        9,
        7,
        6,
        5,
        3,
    ]
    ant, bee, cat = (report["classes"][name] for name in CLASSES)
    counts = ("candidates", "above_threshold", "kept", "examples", "copies")
    assert [ant[k] for k in counts] == [5, 5, 3, 3, 0]
    assert [bee[k] for k in counts] == [2, 2, 2, 3, 1] and cat["lowest_confidence"] is None
    assert [cat[k] for k in counts] == [2, 0, 0, 0, 0]
    assert ant["lowest_confidence"] == pytest.approx(0.8)


def test_top_p_by_hand(two_files, tmp_path, run):
    out = tmp_path / "balanced.h5"
    flags = [*two_files, "--out", out, "--method", "top-p", "--per-class", 2, "--top-p", 1, "--threshold", 0.99]
    assert run(*flags)[0] == 0, "--threshold is not used by top-p"
    columns, attrs, _ = read_selection(out)
    rows = list(zip(columns["file"].tolist(), columns["row"].tolist(), columns["label"].tolist(), strict=True))
    assert rows == [(0, 0, 0), (0, 1, 1), (0, 3, 2), (1, 0, 0), (1, 1, 1), (1, 3, 2)]
    assert attrs["method"] == "top-p" and attrs["top_p"] == 1
    assert columns["confidence"] == pytest.approx([0.9, 0.6, 0.36, 0.95, 0.9, 0.38], rel=2e-3)  # of float16 logits
    assert run(*flags[:-4], "--top-p", 3)[0] == 0
    columns, _, _ = read_selection(out)
    rows = list(zip(columns["file"].tolist(), columns["row"].tolist(), columns["label"].tolist(), strict=True))
    assert Counter(columns["label"].tolist()) == {0: 2, 1: 2, 2: 2} and rows == sorted(rows)


def test_an_output_over_the_input_is_refused(two_files, tmp_path, run):
    before = two_files[0].read_bytes()
    over = two_files[0], tmp_path / "x" / ".." / two_files[0].name
    for out in (*over, tmp_path / "o.json", tmp_path / "o.png", tmp_path, Path(".")):
        refused(run(*two_files, "--out", out, "--threshold", 0.4), str(out))
    assert two_files[0].read_bytes() == before and not list(tmp_path.glob("o.*"))


def test_a_uniform_teacher_takes_no_more_memory_than_another(tmp_path):
    """Every class ties with every other: the first ones of a row count, the first rows of a class."""
    import tracemalloc

    logits = np.zeros((600, 1000), np.float16)
    tracemalloc.start()
    index, label, _ = balance.select_top_p([logits], 1000, 10, 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(zip(label.tolist(), index.tolist(), strict=True)) == [(c, i) for c in range(10) for i in range(50)]
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"


def test_top_p_needs_per_class(two_files, tmp_path, run):
    refused(run(*two_files, "--out", tmp_path / "o.h5", "--method", "top-p"), "--per-class")


def data_of(path):
    """The bytes of every dataset, and the attributes."""
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in file if name != "classes"}, dict(file.attrs)


def test_order_of_the_arguments_changes_nothing(two_files, tmp_path, run):
    outs = [tmp_path / f"{i}.h5" for i in range(3)]
    orders = (two_files, two_files[::-1], [*two_files, two_files[0]])
    for out, order in zip(outs, orders, strict=True):
        assert run(*order, "--out", out, "--threshold", 0.4, "--per-class", 5)[0] == 0
    assert data_of(outs[0]) == data_of(outs[1]) == data_of(outs[2])
    seeds = []
    for seed in range(5):
        assert run(*two_files, "--out", outs[1], "--threshold", 0.4, "--per-class", 5, "--seed", seed)[0] == 0
        columns, _ = data_of(outs[1])
        seeds.append((columns["file"], columns["row"]))
    assert len(set(seeds)) > 1, "--seed changes nothing"


def test_one_file_under_two_spellings_counts_once(two_files, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("a.h5", tmp_path / "a.h5", "--out", "o.h5", "--threshold", 0.4, "--per-class", 5)[0] == 0
    columns, attrs, _ = read_selection(tmp_path / "o.h5")
    assert json.loads(attrs["files"]) == [str(tmp_path / "a.h5")]
    assert set(columns["file"].tolist()) == {0}


def test_nothing_is_lost_when_nothing_is_left(two_files, tmp_path, run):
    out = tmp_path / "balanced.h5"
    assert run(*two_files, "--out", out)[0] == 0
    before = out.read_bytes(), out.with_suffix(".json").read_bytes(), sorted(tmp_path.iterdir())
    refused(run(*two_files, "--out", out, "--threshold", 0.99), "0.95", "0.99")
    assert (out.read_bytes(), out.with_suffix(".json").read_bytes(), sorted(tmp_path.iterdir())) == before


def test_unfinished_file_is_refused(two_files, tmp_path, run):
    with h5py.File(two_files[1], "r+") as file:
        file["status"][3] = 0
    refused(run(*two_files, "--out", tmp_path / "o.h5"), "a.h5", "1 of 5", "02")
    assert not (tmp_path / "o.h5").exists()


def test_two_teachers_are_refused(tmp_path, run):
    one = write_logits(tmp_path / "a.h5", logits_of((0, 0.9)))
    two = write_logits(tmp_path / "b.h5", logits_of((0, 0.9)), teacher="b" * 64)
    refused(run(one, two, "--out", tmp_path / "o.h5"), "b.h5", "teacher")


@pytest.mark.parametrize("classes", [["ant", "bee", "dog"], ["bee", "ant", "cat"]])
def test_other_classes_are_refused(tmp_path, run, classes):
    one = write_logits(tmp_path / "a.h5", logits_of((0, 0.9)))
    two = write_logits(tmp_path / "b.h5", logits_of((0, 0.9)), classes=classes)
    refused(run(one, two, "--out", tmp_path / "o.h5"), "b.h5", "classes")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--per-class", "0"], ["--per-class", "0"]),
        (["--per-class", "many"], ["--per-class", "many"]),
        (["--threshold", "nan"], ["--threshold", "nan"]),
        (["--threshold", "-1"], ["--threshold"]),
        (["--top-p", "0"], ["--top-p"]),
        (["--per", "3"], ["--per"]),
    ],
)
def test_wrong_flags_are_refused(two_files, tmp_path, run, flags, words):
    refused(run(*two_files, "--out", tmp_path / "o.h5", *flags), *words)


def write_truth(path, lines, header=("name", "class")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return path


def test_truth_by_hand(two_files, tmp_path, run):
    """Labels: b ant bee ant cat -, a ant bee ant cat ant; above 0.4 all but the cats."""
    truth = write_truth(
        tmp_path / "truth.csv",
        [
            ("b/000.png", "ant"), ("b/001.png", "bee"), ("b/002.png", "cat"), ("b/003.png", "cat"),
            ("a/000.png", "ant"), ("a/001.png", "bee"), ("a/002.png", ""), ("a/003.png", ""), ("a/004.png", "bee"),
            ("b/004.png", "ant"), ("elsewhere.png", "ant"),
        ],
    )  # fmt: skip
    out = tmp_path / "balanced.h5"
    flags = ["--out", out, "--threshold", 0.4, "--per-class", 3, "--truth", truth]
    status, printed, _ = run(*two_files, *flags)
    assert status == 0
    got = json.loads(out.with_suffix(".json").read_text())["truth"]
    # Of a class and readable: b0 b1 b2 b3 a0 a1 a4, of which b2 and a4 are wrong. Kept: a0 a2 b0 (ant), a1 b1 (bee).
    assert got["accuracy_before"] == pytest.approx(100 * 5 / 7, abs=0.01)
    assert got["accuracy_after"] == 100
    assert got["accuracy_of_examples"] == pytest.approx(100 * 5 / 6, abs=0.01)  # a2 is of no class
    assert got["passed_in_class"] == pytest.approx(100 * 4 / 7, abs=0.01)
    assert got["passed_no_class"] == 50 and got["num_no_class_passed"] == 1
    assert got["classes"]["ant"] == {"accuracy_before": pytest.approx(50, abs=0.01), "accuracy_after": 100}
    assert got["classes"]["bee"] == {"accuracy_before": 100, "accuracy_after": 100}
    assert got["classes"]["cat"] == {"accuracy_before": 100, "accuracy_after": None}
    assert "71.43" in printed and "50.0" in printed
    # the truth measures and never chooses
    other = tmp_path / "other.h5"
    assert run(*two_files, "--out", other, *flags[2:-2])[0] == 0
    assert data_of(out) == data_of(other)


@pytest.mark.parametrize(
    ("header", "lines"),
    [(None, None), (("file", "label"), [("a/000.png", "ant")]), (("name", "class"), [("x.png", "ant")])],
)
def test_wrong_truth_is_refused_and_nothing_is_lost(two_files, tmp_path, run, header, lines):
    out, truth = tmp_path / "balanced.h5", tmp_path / "truth.csv"
    assert run(*two_files, "--out", out)[0] == 0
    before = out.read_bytes()
    if lines:
        write_truth(truth, lines, header)
    refused(run(*two_files, "--out", out, "--threshold", 0.4, "--truth", truth), "truth.csv")
    assert out.read_bytes() == before, "a run that fails replaced the selection"


def test_with_its_picture_as_a_user_runs_it(tmp_path, tiny_data, run_stage):
    names = sorted(p.relative_to(tiny_data / "unlabeled").as_posix() for p in (tiny_data / "unlabeled").rglob("*.png"))
    classes = ["disc", "square", "triangle"]
    with open(tiny_data / "unlabeled_truth.csv") as file:
        truth = {line["name"]: classes.index(line["class"]) for line in csv.DictReader(file)}
    logits = logits_of(*[(truth[name], 0.4 + 0.02 * i) for i, name in enumerate(names)])
    write_logits(tmp_path / "logits.h5", logits, root=tiny_data / "unlabeled", names=names, classes=classes)
    out = tmp_path / "out" / "balanced.h5"
    done = run_stage(
        "03_balance.py", tmp_path / "logits.h5", "--out", out, "--truth", tiny_data / "unlabeled_truth.csv"
    )
    assert "7 to 7 a class" in done.stdout and "100.0 percent before" in done.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["balanced.h5", "balanced.json", "balanced.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# files made to read others, or to fill the memory


def low_level(file: h5py.File, name: str, dtype, shape: tuple, *, external=None) -> None:
    """A dataset whose data need not be in the file."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if external:
        creation.set_external(*external)
    h5py.h5d.create(
        file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape), creation
    )


def make_evil(path: Path, name: str, how: str, folder: Path) -> None:
    """Replace a dataset or an attribute by something that a careless reader would follow or fill the memory with."""
    secret = folder / "secret.h5"
    with h5py.File(path, "r+") as file:
        dtype, shape = file[name].dtype, file[name].shape
        with h5py.File(secret, "w") as other:
            other["x"] = np.zeros(shape, "S3" if dtype.kind in "OS" else dtype)
        (folder / "secret.txt").write_bytes(b"password" * 100)
        if "attribute" not in how:
            del file[name]
        huge = (2**40, *shape[1:])
        if how == "external link":
            file[name] = h5py.ExternalLink(str(secret), "x")
        elif how == "soft link":
            file[name] = h5py.SoftLink("/classes" if name != "classes" else "/label")
        elif how == "external storage":
            low_level(
                file,
                name,
                "S3" if dtype.kind in "OS" else dtype,
                shape,
                external=(str(folder / "secret.txt").encode(), 0, 800),
            )
        elif how == "virtual dataset":
            layout = h5py.VirtualLayout(shape, other_dtype := "S3" if dtype.kind in "OS" else dtype)
            layout[...] = h5py.VirtualSource(str(secret), "x", shape, other_dtype)
            file.create_virtual_dataset(name, layout)
        elif how == "group":
            file.create_group(name)
        elif how == "2 TB":
            low_level(file, name, "S3" if dtype.kind in "OS" else dtype, huge)
        elif how == "2 TB in all":  # every column, so that the lengths agree
            for other in [key for key in file if key != "classes" and key != name]:
                kind = file[other].dtype
                more = file[other].shape[1:]
                del file[other]
                low_level(file, other, kind, (2**40, *more))
            low_level(file, name, dtype, huge)
        elif how == "2 TB in chunks":
            file.create_dataset(name, huge, "S3" if dtype.kind in "OS" else dtype, chunks=True, compression="gzip")
        elif how == "strings of any length":
            kind = h5py.string_dtype()
            file.create_dataset(name, shape, kind)[...] = "x" * 10_000
        elif how == "one long string many times":
            kind = h5py.string_dtype()
            dataset = file.create_dataset(name, (3000,), kind)
            dataset[0] = "x" * 10**6
            file.flush()
            where, end = dataset.id.get_offset(), dataset.id.get_storage_size() // 3000
        elif how == "another type":
            file.create_dataset(name, data=np.zeros(shape, "f8" if dtype != "f8" else "i4"))
        elif how == "another shape":
            file.create_dataset(name, data=np.zeros((shape[0] + 1, *shape[1:]), "S3" if dtype.kind in "OS" else dtype))
        elif how == "an attribute of another kind":
            file.attrs["root" if "logits" in file else "files"] = 3
        elif how == "names that are no text":
            file.create_dataset(name, data=[b"\xff\xfe"] * shape[0], dtype=h5py.string_dtype())
        elif how == "an attribute of many values":
            file.attrs["format"] = [file.attrs["format"]] * 100
    if how == "one long string many times":
        data = bytearray(path.read_bytes())
        data[where : where + 3000 * end] = data[where : where + end] * 3000
        path.write_bytes(data)


EVIL = ["external link", "soft link", "external storage", "virtual dataset", "group", "2 TB", "2 TB in chunks"]
EVIL += ["another type", "another shape"]
CASES = [("logits.h5", name, how) for name in ("logits", "confidence", "status", "path") for how in EVIL]
CASES += [("balanced.h5", name, how) for name in ("file", "row", "label", "confidence") for how in EVIL]
CASES += [(name, "classes", how) for name in ("logits.h5", "balanced.h5") for how in EVIL[:7]]
CASES += [(name, "classes", "one long string many times") for name in ("logits.h5", "balanced.h5")]
CASES += [("logits.h5", name, "strings of any length") for name in ("path", "label")]
CASES += [("logits.h5", "label", "2 TB in all"), ("balanced.h5", "row", "2 TB in all")]
CASES += [(name, "label", "an attribute of many values") for name in ("logits.h5", "balanced.h5")]
CASES += [(name, "label", "an attribute of another kind") for name in ("logits.h5", "balanced.h5")]


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_logits(folder / "logits.h5", logits_of((0, 0.9), (1, 0.8)))
    rows = {"file": np.zeros(2, np.uint16), "row": np.arange(2), "label": np.array([0, 1], np.int32)}
    with h5py.File(folder / "balanced.h5", "w") as file:
        for name, values in (rows | {"confidence": np.array([0.9, 0.8], np.float32)}).items():
            file[name] = values
        file.create_dataset("classes", data=CLASSES, dtype=h5py.string_dtype())
        file.attrs.update(format=SELECTION_FORMAT, files='["logits.h5"]', method="noisy-student")
    return folder


@pytest.mark.parametrize("name", ["logits.h5", "balanced.h5"])
def test_class_names_that_are_no_text_are_refused(name, whole_files, tmp_path, capsys):
    for whole in whole_files.iterdir():
        shutil.copy(whole, tmp_path)
    make_evil(tmp_path / name, "classes", "names that are no text", tmp_path)
    with pytest.raises(SystemExit) as stop:
        student.Selection(tmp_path / "balanced.h5", [], None)
    assert stop.value.code == 2 and name in capsys.readouterr().err


@pytest.mark.parametrize(("file", "name", "how"), CASES)
def test_evil_files_are_refused_by_03_and_04(file, name, how, whole_files, tmp_path, run, capsys):
    for whole in whole_files.iterdir():
        shutil.copy(whole, tmp_path)
    make_evil(tmp_path / file, name, how, tmp_path)
    if file == "logits.h5":
        refused(run(tmp_path / file, "--out", tmp_path / "o.h5"), "logits.h5")
    with pytest.raises(SystemExit) as stop:
        student.Selection(tmp_path / "balanced.h5", [], None)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and file in err, err
    words = {"strings of any length": "type", "another type": "type", "another shape": "shape", "group": "plain"}
    words |= {"one long string many times": "longer than the file", "2 TB in all": "inside the file"}
    assert words.get(how, "") in err, err
    assert "not a readable HDF5 file" not in err, err  # it is readable, and the line says what is wrong with it


def test_whole_files_are_read(whole_files, tmp_path, run):
    assert student.Selection(whole_files / "balanced.h5", [], None).label.tolist() == [0, 1]
    assert run(whole_files / "logits.h5", "--out", tmp_path / "o.h5")[0] == 0


@pytest.mark.parametrize("how", ["text", "empty", "missing", "selection", "no dataset"])
def test_what_is_no_logits_file_is_refused(two_files, tmp_path, run, how):
    path = tmp_path / "x.h5"
    if how == "text":
        path.write_text("name,label\n")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "selection":
        assert run(*two_files, "--out", path)[0] == 0
    elif how == "no dataset":
        write_logits(path, logits_of((0, 0.9)))
        with h5py.File(path, "r+") as file:
            del file["confidence"]
    refused(run(path, "--out", tmp_path / "o.h5"), "x.h5")


def test_logits_that_are_not_contiguous_are_refused_by_top_p(tmp_path, run):
    path = write_logits(tmp_path / "x.h5", logits_of((0, 0.9), (1, 0.8)))
    with h5py.File(path, "r+") as file:
        logits = file["logits"][:]
        del file["logits"]
        file.create_dataset("logits", data=logits, chunks=(1, 3), compression="gzip")
    refused(run(path, "--out", tmp_path / "o.h5", "--method", "top-p", "--per-class", 1), "x.h5", "logits")


def test_a_fresh_logits_file_is_contiguous_and_all_undone(tmp_path):
    nothing = np.zeros(3, np.int64)
    paths = np.array([name.encode() for name in ("a.png", "c.tar/d.png", "ü/b.png")])
    rows = ImageList("/root", paths, nothing + 7, nothing + 9)
    create_logits(tmp_path / "x.h5", rows, CLASSES, 3, arch="a", image_size=32, teacher="t", teacher_sha256="s")
    with open_label_file(tmp_path / "x.h5", LOGITS_FORMAT) as file:
        assert file["status"][:].tolist() == [0, 0, 0]
        assert file["path"][:].tolist() == rows.path.tolist()
        assert file["offset"][:].tolist() == [7] * 3 and file["size"][:].tolist() == [9] * 3
        dtypes = {"logits": "f2", "label": "i4", "confidence": "f4", "status": "u1", "offset": "i8", "size": "i8"}
        assert {name: file[name].dtype for name in dtypes} == {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        assert file["logits"].shape == (3, 3)
        for name in (*dtypes, "path"):
            assert file[name].chunks is None and file[name].id.get_offset() is not None, f"{name} is not in place"
        assert h5py.check_string_dtype(file["path"].dtype).length == 11
        assert read_classes(file) == CLASSES
        assert file.attrs["root"] == "/root" and file.attrs["format"] == LOGITS_FORMAT


# what stage 04 makes of it


def test_the_student_reads_the_rows_that_were_selected(two_files, tmp_path, run):
    out = tmp_path / "balanced.h5"
    assert run(*two_files, "--out", out, "--threshold", 0.4, "--per-class", 4)[0] == 0
    selection = student.Selection(out, [], None)
    columns, _, _ = read_selection(out)
    examples = np.array([5, 0, 0, len(columns["row"]) - 1])
    got = selection.read_logits(examples)
    assert got.dtype == torch.float32
    files = [h5py.File(path) for path in sorted(two_files)]
    for logits, example in zip(got, examples, strict=True):
        number, row = columns["file"][example], columns["row"][example]
        np.testing.assert_array_equal(logits, files[number]["logits"][row].astype(np.float32))
        assert selection.images.path[example] == files[number]["path"][row]
    assert selection.label.tolist() == columns["label"].tolist()
    assert selection.classes == CLASSES and selection.images.root == "/data/unlabeled"


def test_the_selection_moves_with_its_folder(two_files, tmp_path, run):
    assert run(*two_files, "--out", tmp_path / "balanced.h5", "--threshold", 0.4)[0] == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.h5", "b.h5", "balanced.h5"):
        (tmp_path / name).rename(moved / name)
    assert student.Selection(moved / "balanced.h5", [], None).read_logits(np.array([0])).shape == (1, 3)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.5])
def test_loss_by_hand(weight):
    """Smoothing 0.1 for what people labelled, none for what the teacher did; each mean over its own images."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(4, 5)) * 3, rng.integers(0, 5, 4)
    pseudo_logits, soft = rng.normal(size=(6, 5)) * 3, rng.dirichlet(np.ones(5), 6)
    smoothed = 0.9 * np.eye(5)[targets] + 0.1 / 5
    labeled = -(smoothed * log_softmax(logits)).sum(1).mean()
    unlabeled = -(soft * log_softmax(pseudo_logits)).sum(1).mean()
    tensors = [torch.from_numpy(a) for a in (logits, targets, pseudo_logits, soft)]
    got = student.noisy_student_loss(*tensors, 6, weight, 0.1)
    assert [value.item() for value in got] == pytest.approx(
        [labeled + weight * unlabeled, labeled, unlabeled], rel=1e-6
    )


def test_loss_divides_by_the_readable_images_of_all_processes():
    pseudo_logits, soft = torch.zeros(3, 4), torch.full((3, 4), 0.25)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    loss, labeled, unlabeled = student.noisy_student_loss(*none, pseudo_logits, soft, 4.5, 2.0, 0.1)
    assert labeled.item() == 0  # no labelled image: --unlabeled-only
    assert unlabeled.item() == pytest.approx(3 * math.log(4) / 4.5)
    assert loss.item() == pytest.approx(2 * unlabeled.item())
    logits = torch.randn(2, 4, requires_grad=True)
    loss, _, unlabeled = student.noisy_student_loss(logits, torch.tensor([1, 2]), none[0], none[0], 0.0, 2.0, 0.1)
    loss.backward()
    assert unlabeled.item() == 0 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_soft_targets_are_tempered_and_never_smoothed(temperature):
    logits = torch.tensor([[0.0, -1.0, -5.0], [-2.0, 0.0, 0.0]])
    expected = np.exp(log_softmax(logits.double().numpy() / temperature))
    got = student.pseudo_targets(logits, torch.tensor([0, 1]), temperature, 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_hard_targets_are_smoothed_like_those_of_people():
    got = student.pseudo_targets(torch.randn(2, 4), torch.tensor([3, 0]), 0, 0.1)
    expected = np.full((2, 4), 0.025)
    expected[0, 3] = expected[1, 0] = 0.925
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# the picture


def test_the_sheet_has_the_most_the_middle_and_the_least_confident():
    assert balance.of_sheet(3).tolist() == [0, 1, 2]
    assert balance.of_sheet(16).tolist() == list(range(16))
    assert balance.of_sheet(17).tolist() == [*range(6), *range(6, 11), *range(12, 17)]
    assert balance.of_sheet(1001).tolist() == [*range(6), *range(498, 503), *range(996, 1001)]


def test_of_many_classes_the_fattest_and_the_thinnest_are_drawn(tmp_path, monkeypatch, tiny_data):
    """60 classes, c + 1 images of class c; all images but one are gone, and their cells stay empty."""
    num_classes, sizes = 60, np.arange(1, 61)
    label = np.repeat(np.arange(num_classes), sizes)
    logits = np.where(label[:, None] == np.arange(num_classes), 5.0, 0.0)
    names = [f"part0/{i:03}.png" for i in range(len(label))]
    classes = [f"c{c:02}" for c in range(num_classes)]
    path = write_logits(tmp_path / "l.h5", logits, root=tiny_data / "unlabeled", names=names, classes=classes)
    figures = []
    monkeypatch.setattr(balance, "save_figure", lambda plt, path: figures.append(plt.gcf()))
    monkeypatch.setattr(sys, "argv", ["03", str(path), "--out", str(tmp_path / "b.h5"), "--per-class", "30"])
    balance.main()
    axes = figures[0].axes
    rows = [label.get_text() for label in axes[2].get_yticklabels()]
    assert rows == classes[:39:-1] + classes[19::-1]
    sheet = axes[2].images[0].get_array()
    cells = [
        sheet[top : top + balance.SIDE, left : left + balance.SIDE]
        for top in range(0, len(sheet), balance.SIDE + balance.CAPTION)
        for left in balance.SHEET_LEFT
    ]
    there = {name for name in names if (tiny_data / "unlabeled" / name).exists()}
    num_drawn = sum(bool((cell < 255).any()) for cell in cells)
    assert num_drawn == len(there & {names[i] for i in range(len(names))} & drawn(label)) > 0
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axes[0].containers}
    assert heights["candidates"] == [*range(60, 40, -1), *range(20, 0, -1)] and set(heights["examples"]) == {30}


def drawn(label: np.ndarray) -> set[str]:
    """Names of the images in the sheet of the test above: of equal confidence, so the first, middle and last rows."""
    shown = [c for c in range(60) if c < 20 or c >= 40]
    rows = [np.flatnonzero(label == c)[:30] for c in shown]
    return {f"part0/{i:03}.png" for mine in rows for i in mine[balance.of_sheet(len(mine))]}
