"""Stage 03's rules against brute-force transcriptions of the contract, its command line on hand-made logits files, and
its picture."""

import csv
import hashlib
import json
import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_mistake, load_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from label_files import CLASSES, logits_of, read_logits, read_selection, write_logits, write_truth

import common

balance = load_stage("03_balance")


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


@pytest.mark.parametrize("per_class", [0, 1000])
def test_a_selection_takes_little_more_memory_than_its_examples(per_class):
    """The index, the label and the confidence of an example are 16 bytes: 2.1 GB for 130 million."""
    import tracemalloc

    rng = np.random.default_rng(0)
    label = (1000 * rng.random(2_000_000) ** 2).astype(np.int32)
    confidence = rng.random(len(label), dtype=np.float32)
    tracemalloc.start()
    index, *_ = balance.select_noisy_student([label], [confidence], 1000, 0.3, per_class, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == (1000 * per_class or (confidence > np.float32(0.3)).sum())
    assert peak < 16 * len(index) + 4 * len(label) + 50e6, f"{peak / 1e6:.0f} MB"


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
        done = [np.full(len(part), common.DONE) for part in parts]
        index, label, score = balance.select_top_p(parts, done, num_classes, top_p, per_class)
    got = {(int(i), int(c)) for i, c in zip(index, label, strict=True)}
    assert len(got) == len(index), "an example is repeated"
    probs = np.exp(logits - logits.max(1, keepdims=True)) if len(logits) else logits
    probs = probs / probs.sum(1, keepdims=True)
    np.testing.assert_allclose(score, [probs[i, c] for i, c in zip(index, label, strict=True)], rtol=1e-6)
    # What is a tie is up to the rounding: the sum of a row in another order may end in another digit.
    probs = torch.from_numpy(logits).softmax(1, dtype=torch.float32).numpy()

    candidates = {c: [] for c in range(num_classes)}
    for i, row in enumerate(probs):
        if np.isfinite(row).all():
            for c in sorted(range(num_classes), key=lambda c: (-row[c], c))[:top_p]:
                candidates[c].append(i)
    expected = {
        (i, c) for c, mine in candidates.items() for i in sorted(mine, key=lambda i: (-probs[i, c], i))[:per_class]
    }
    assert got == expected


def test_a_uniform_teacher_takes_no_more_memory_than_another(tmp_path):
    """Every class ties with every other: the first ones of a row count, the first rows of a class."""
    import tracemalloc

    logits = np.zeros((600, 1000), np.float16)
    tracemalloc.start()
    index, label, _ = balance.select_top_p([logits], [np.full(600, common.DONE)], 1000, 10, 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(zip(label.tolist(), index.tolist(), strict=True)) == [(c, i) for c in range(10) for i in range(50)]
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"


# the command line


@pytest.fixture
def two_files(tmp_path):
    """Above .4: ant .95 .9 .8 .8 .45, bee .9 .6, no cat; one row is unreadable, and a tie spans the files."""
    one = logits_of((0, 0.95), (1, 0.9), (0, 0.8), (2, 0.38), (0, 0.5))
    two = logits_of((0, 0.9), (1, 0.6), (0, 0.8), (2, 0.36), (0, 0.45))
    return [write_logits(tmp_path / "b.h5", one, unreadable=[4]), write_logits(tmp_path / "a.h5", two)]


@pytest.fixture
def run(call_main, monkeypatch):
    """run(*flags) -> Done: stage 03 in this process, without its picture, which takes a second."""
    monkeypatch.setattr(balance, "draw_selection", lambda *args: None)
    return lambda *flags: call_main("03_balance", *flags)


def test_selection_by_hand(two_files, tmp_path, run):
    out = tmp_path / "out" / "balanced.h5"
    done = run(*two_files, "--out", out, "--threshold", 0.4, "--per-class", 3)
    assert done.returncode == 0
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
    assert "cat" in done.stdout, "a class without any image must be reported"

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
    assert run(*flags).returncode == 0, "--threshold is not used by top-p"
    columns, attrs, _ = read_selection(out)
    rows = list(zip(columns["file"].tolist(), columns["row"].tolist(), columns["label"].tolist(), strict=True))
    assert rows == [(0, 0, 0), (0, 1, 1), (0, 3, 2), (1, 0, 0), (1, 1, 1), (1, 3, 2)]
    assert attrs["method"] == "top-p" and attrs["top_p"] == 1
    assert columns["confidence"] == pytest.approx([0.9, 0.6, 0.36, 0.95, 0.9, 0.38], rel=2e-3)  # of float16 logits
    done = run(*flags[:-4], "--top-p", 3)
    assert done.returncode == 0 and "all 3 classes" in done.stdout, done
    columns, _, _ = read_selection(out)
    rows = list(zip(columns["file"].tolist(), columns["row"].tolist(), columns["label"].tolist(), strict=True))
    assert Counter(columns["label"].tolist()) == {0: 2, 1: 2, 2: 2} and rows == sorted(rows)


def test_an_output_over_the_input_is_refused(two_files, tmp_path, run):
    before = two_files[0].read_bytes()
    over = two_files[0], tmp_path / "x" / ".." / two_files[0].name
    for out in (*over, tmp_path / "o.json", tmp_path / "o.png", tmp_path, Path(".")):
        assert_mistake(run(*two_files, "--out", out, "--threshold", 0.4), str(out))
    assert two_files[0].read_bytes() == before and not list(tmp_path.glob("o.*"))


def test_images_that_two_files_have_are_said_and_a_file_counts_once(two_files, tmp_path, run):
    one, two = two_files
    (tmp_path / "link.h5").symlink_to(one)
    flags = ["--out", tmp_path / "o.h5", "--threshold", 0.4]
    assert "4 images, " in run(one, one, tmp_path / "link.h5", *flags).stdout
    for root, others, words in (("x", "x", True), ("x", "x/y", True), ("x/y", "x", True), ("x", "xy", False)):
        for file, folder in ((one, root), (two, others)):
            with h5py.File(file, "r+") as opened:
                opened.attrs["root"] = str(tmp_path / folder)
        said = run(*two_files, *flags).stdout
        assert ("that both have count twice" in said) == words and said.count("count twice") == words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--threshold", 1e300], "--threshold"),
        (["--seed", 2**63], "--seed"),
        (["--per-class", 10**14], "--per-class"),
        (["--fraction", 1e-9], "--fraction 1e-09 leaves none"),
    ],
)
def test_numbers_out_of_their_range_are_named(flags, words, two_files, tmp_path, run):
    assert_mistake(run(*two_files, "--out", tmp_path / "o.h5", *flags), words)


def test_a_point_in_the_name_of_the_output(two_files, tmp_path, run):
    for threshold in (0.4, 0.5):
        assert run(*two_files, "--out", tmp_path / f"o-{threshold}", "--threshold", threshold).returncode == 0
    for threshold in (0.4, 0.5):
        assert json.loads((tmp_path / f"o-{threshold}.json").read_text())["threshold"] == threshold


def test_top_p_needs_per_class(two_files, tmp_path, run):
    assert_mistake(run(*two_files, "--out", tmp_path / "o.h5", "--method", "top-p"), "--per-class")


def test_without_balance_each_image_above_the_threshold_counts_once(two_files, tmp_path, run):
    out = tmp_path / "balanced.h5"
    done = run(*two_files, "--out", out, "--threshold", 0.4, "--per-class", "all")
    columns, attrs, _ = read_selection(out)
    rows = list(zip(columns["file"].tolist(), columns["row"].tolist(), columns["label"].tolist(), strict=True))
    assert rows == [(0, 0, 0), (0, 1, 1), (0, 2, 0), (0, 4, 0), (1, 0, 0), (1, 1, 1), (1, 2, 0)]
    assert attrs["per_class"] == "all" == json.loads(out.with_suffix(".json").read_text())["per_class"]
    assert "2 to 5 a class" in done.stdout
    words = [*two_files, "--out", out, "--method", "top-p", "--per-class", "all"]
    assert_mistake(run(*words), "--per-class")


def test_max_confidence_is_inclusive(two_files, tmp_path, run):
    out = tmp_path / "balanced.h5"
    flags = [*two_files, "--out", out, "--threshold", 0.4, "--per-class", "all", "--max-confidence"]
    assert run(*flags, 0.8).returncode == 0
    columns, attrs, _ = read_selection(out)
    above = read_logits(two_files[0])["confidence"], read_logits(two_files[1])["confidence"]
    confidence = np.concatenate(above)
    assert len(columns["row"]) == ((confidence > np.float32(0.4)) & (confidence <= np.float32(0.8))).sum() == 4
    assert attrs["max_confidence"] == 0.8
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["above_threshold"] == 4 and report["classes"]["ant"]["above_threshold"] == 3
    assert_mistake(run(*flags, 1.5), "--max-confidence")
    top_p = ["--out", out, "--method", "top-p", "--per-class", 2, "--max-confidence", 0.8]
    assert_mistake(run(*two_files, *top_p), "--max-confidence")


@pytest.mark.parametrize("method", [(), ("--method", "top-p", "--top-p", 1)])
def test_a_fraction_of_the_images_is_drawn_by_their_paths(method, tmp_path, run):
    logits = logits_of(*[(i % 3, 0.9) for i in range(300)])
    files = [write_logits(tmp_path / "a.h5", logits), write_logits(tmp_path / "b.h5", logits)]
    flags = ["--threshold", 0.4, "--per-class", 1000 if method else "all", *method]

    def drawn(fraction, seed=0, files=files):
        out = tmp_path / "o.h5"
        assert run(*files, "--out", out, *flags, "--fraction", fraction, "--seed", seed).returncode == 0
        columns, attrs, _ = read_selection(out)
        assert attrs["fraction"] == fraction
        return set(zip(columns["file"].tolist(), columns["row"].tolist(), strict=True))

    assert len(drawn(1.0)) == 600
    half, quarter = drawn(0.5), drawn(0.25)
    assert quarter < half and abs(len(half) - 300) < 60 and abs(len(quarter) - 150) < 50
    assert drawn(0.5) == half
    draws = [drawn(0.5, seed) for seed in range(5)]
    shared = [len(one & other) for i, one in enumerate(draws) for other in draws[:i]]
    assert all(100 < num < 200 for num in shared), "seeds are independent: of two a quarter of 600 is in both"
    first = {row for number, row in half if number == 0}
    assert first == {row for _, row in drawn(0.5, files=files[:1])}
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["images"] == len(first), "the images that are not drawn are not counted"


# --calibration


def interval_of(num_right, num):
    """The textbook's form of Wilson's interval."""
    if not num:
        return [0, 1]
    z, p = NormalDist().inv_cdf(0.975), num_right / num
    middle, half = p + z * z / (2 * num), z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    return [(middle - half) / (1 + z * z / num), (middle + half) / (1 + z * z / num)]


def write_val(path, answers, **how):
    """A logits file of val: (class, label, confidence) an image, the class by its folder; None is a folder of none."""
    names = [f"{'other' if c is None else CLASSES[c]}/{i:04}.png" for i, (c, _, _) in enumerate(answers)]
    return write_logits(path, logits_of(*[answer[1:] for answer in answers]), root="/data/val", names=names, **how)


def drawn_answers(num, seed=0, no_class=0):
    """The teacher is right as often as it believes."""
    rng = np.random.default_rng(seed)
    label, confidence = rng.integers(0, 3, num), rng.uniform(0.34, 0.999, num)
    true = np.where(rng.random(num) < confidence, label, (label + 1) % 3).tolist()
    return [(c if i >= no_class else None, k, p) for i, (c, k, p) in
            enumerate(zip(true, label.tolist(), confidence.tolist(), strict=True))]  # fmt: skip


@pytest.mark.parametrize("half", ["all", "choose"])
@pytest.mark.parametrize("most", [1.0, 0.9])
def test_calibration_is_a_count(two_files, tmp_path, run, half, most):
    answers = drawn_answers(400, no_class=30)
    val, out = write_val(tmp_path / "val.h5", answers, unreadable=range(50, 70)), tmp_path / "o.h5"
    flags = ["--calibration", val, "--val-half", half, "--max-confidence", most, "--threshold", 0.4]
    done = run(*two_files, "--out", out, *flags)
    assert done.returncode == 0, done
    report = json.loads(out.with_suffix(".json").read_text())["calibration"]
    columns = read_logits(val)
    judged = [hashlib.blake2b(path, digest_size=16).digest()[0] % 2 == 1 for path in columns["path"].tolist()]
    counts = [i for i in range(400) if answers[i][0] is not None and not 50 <= i < 70]
    counts = [
        i for i in counts if columns["confidence"][i] <= np.float32(most) and not (half == "choose" and judged[i])
    ]
    assert report["images"] == len(counts) and (half == "all" or 120 < len(counts) < 230)
    assert [point["threshold"] for point in report["curve"]] == [i / 100 for i in range(100)]
    for point in [*report["curve"], report["at"]]:
        kept = [i for i in counts if columns["confidence"][i] > np.float32(point["threshold"])]
        right = sum(columns["label"][i] == answers[i][0] for i in kept)
        assert (point["kept"], point["right"]) == (len(kept), right)
        assert point["share"] == len(kept) / len(counts)
        assert point["precision"] == (right / len(kept) if kept else None)
        assert point["share_interval"] == pytest.approx(interval_of(len(kept), len(counts)), abs=1e-6)
        assert point["precision_interval"] == pytest.approx(interval_of(right, len(kept)), abs=1e-6)
    assert report["at"]["threshold"] == 0.4 and report["min_precision"] is None
    at = report["curve"][40]
    assert f"threshold 0.4: {at['right']} of {at['kept']} right, {100 * at['precision']:.1f} (" in done.stdout
    without = tmp_path / "without.h5"
    assert run(*two_files, "--out", without, "--max-confidence", most, "--threshold", 0.4).returncode == 0
    assert data_of(out) == data_of(without), "the curve alone chooses nothing"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(0, 2**32), st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]))
def test_the_threshold_is_the_lowest_at_which_so_many_are_right(num, seed, wanted):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.1, 1, num).astype(np.float32)
    right = rng.random(num) < confidence ** rng.choice([0.2, 1, 3])
    curve = [balance.answers_above(step / 100, confidence, right) for step in range(100)]
    at, reached = balance.choose_threshold(curve, wanted)
    shares = {}  # {threshold: (images above it, share that is right)}
    for step in range(100):
        above = right[confidence > np.float32(step / 100)]
        if len(above):
            shares[step / 100] = len(above), above.mean()
    good = [threshold for threshold, (_, share) in shares.items() if share >= wanted]
    many = {t: share for t, (kept, share) in shares.items() if kept >= (20 if num >= 20 else 1)}
    assert reached == bool(good)
    assert at["threshold"] == (min(good) if good else min(t for t in many if many[t] == max(many.values())))

    # With a share that must be left the same of the thresholds that leave it.
    enough = {t: share for t, (kept, share) in shares.items() if kept >= 2 / 3 * num}
    at, reached = balance.choose_threshold(curve, wanted, 2 / 3)
    good, many = [t for t in enough if enough[t] >= wanted], {t: of for t, of in many.items() if t in enough} or enough
    assert reached == bool(good)
    assert at["threshold"] == (min(good) if good else min(t for t in many if many[t] == max(many.values())))


def test_what_is_printed_holds_on_fresh_images():
    """Of the intervals at a given threshold 95 percent hold; that it is chosen on the same images costs little."""
    num_inside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.1, 1, 300).astype(np.float32)
        right = rng.random(300) < 0.2 + 0.75 * confidence
        curve = [balance.answers_above(step / 100, confidence, right) for step in range(100)]
        at, _ = balance.choose_threshold(curve, 0.85)
        low, high = at["precision_interval"]
        of_fresh = 0.2 + 0.75 * (1 + max(at["threshold"], 0.1)) / 2  # of any number: the mean of a uniform confidence
        num_inside += low <= of_fresh <= high
    assert 180 <= num_inside < 200


def test_min_precision_sets_the_threshold_of_the_selection(two_files, tmp_path, run):
    """Above 0.5, 40 of 50 are right, above 0.6 38 of 40, and above 0.7 4 of 5."""
    answers = [(0, 0, 0.55)] * 2 + [(1, 0, 0.55)] * 8 + [(0, 0, 0.65)] * 34 + [(1, 0, 0.65)] + [(0, 0, 0.75)] * 4
    answers += [(1, 0, 0.75)]
    val, out = write_val(tmp_path / "val.h5", answers), tmp_path / "o.h5"

    def chosen(wanted, *more):
        done = run(*two_files, "--out", out, "--calibration", val, "--min-precision", wanted, *more)
        assert done.returncode == 0, done
        _, attrs, _ = read_selection(out)
        report = json.loads(out.with_suffix(".json").read_text())
        assert attrs["threshold"] == report["threshold"] == report["calibration"]["at"]["threshold"]
        assert report["above_threshold"] == {0.0: 9, 0.55: 6}[attrs["threshold"]]
        return attrs["threshold"], report["calibration"]["reached"], done.stdout

    assert chosen(0.8)[:2] == (0.0, True)
    assert chosen(0.95)[:2] == (0.55, True)
    threshold, reached, printed = chosen(0.96)
    assert (threshold, reached) == (0.55, False)
    assert "--min-precision 0.96 is not reached" in printed and "38 of 40 right, 95.0 (83.5 to 98.6) percent" in printed
    assert chosen(0.95, "--min-share", 0.8)[:2] == (0.55, True)
    threshold, reached, printed = chosen(0.95, "--min-share", 0.81)  # above 0.55 are 40 of 50
    assert json.loads(out.with_suffix(".json").read_text())["calibration"]["min_share"] == 0.81
    assert (threshold, reached) == (0.0, False) and "is not reached with --min-share 0.81: 40 of 50 right" in printed


def test_what_cannot_calibrate_is_a_mistake(two_files, tmp_path, run):
    answers, out = drawn_answers(40), tmp_path / "o.h5"
    val = write_val(tmp_path / "val.h5", answers)
    base = [*two_files, "--out", out, "--calibration"]
    assert_mistake(run(*base, val, "--min-precision", 0.9, "--threshold", 0.3), "--min-precision", "--threshold")
    assert_mistake(run(*two_files, "--out", out, "--min-precision", 0.9), "--min-precision", "--calibration")
    assert_mistake(run(*two_files, "--out", out, "--val-half", "choose"), "--val-half", "--calibration")
    assert_mistake(run(*base, val, "--min-precision", 1.5), "--min-precision", "1.5")
    assert_mistake(run(*base, val, "--min-share", 0.5), "--min-share", "--min-precision")
    top_p = ["--method", "top-p", "--per-class", 2]
    assert_mistake(run(*base, val, *top_p), "--calibration", "top-p")
    assert_mistake(run(*two_files, "--out", val, "--calibration", val), "--out", "val.h5")
    assert_mistake(run(*two_files, val, "--out", out, "--calibration", val), "--calibration", "held out")
    assert_mistake(run(*base, tmp_path / "none.h5"), "none.h5")
    wrong = {
        "teacher": write_val(tmp_path / "a-teacher.h5", answers, teacher="b" * 64),
        "classes": write_val(tmp_path / "b-classes.h5", answers, classes=["ant", "bee", "dog"]),
        "0 of its 40": write_val(tmp_path / "c-no-class.h5", drawn_answers(40, no_class=40)),
        "none of these": write_val(tmp_path / "d-unreadable.h5", answers, unreadable=range(40)),
        "unfinished": write_val(tmp_path / "e-unfinished.h5", answers),
    }
    with h5py.File(wrong["unfinished"], "r+") as file:
        file["status"][3] = common.TODO
    for word, path in wrong.items():
        assert_mistake(run(*base, path, "--min-precision", 0.9), path.name, word)
    assert not out.exists()
    sure = write_val(tmp_path / "sure.h5", [(0, 0, 0.99)] * 30 + [(1, 0, 0.97)] * 30)
    assert_mistake(run(*base, sure, "--min-precision", 0.9), "--min-precision", "0.97", "0.95")


# what it says of itself


def test_k_and_what_it_costs_are_explained(tmp_path, run):
    sizes = {0: 7, 1: 2, 2: 4}
    rows = [(c, 0.9) for c, num in sizes.items() for _ in range(num)]
    one, out = write_logits(tmp_path / "a.h5", logits_of(*rows)), tmp_path / "o.h5"
    said = run(one, "--out", out, "--threshold", 0.4).stdout
    assert "K = 4: class 'cat' is the lower median of 3 with 2 to 7 images above the threshold; 3 images beyond" in said
    assert "2 copies" in said
    said = run(one, "--out", out, "--threshold", 0.4, "--per-class", 5).stdout
    assert "K = 5: --per-class; 2 images beyond" in said and "4 copies" in said and "at most 2 of one image" in said
    assert "K = " not in run(one, "--out", out, "--threshold", 0.4, "--per-class", "all").stdout


def test_an_empty_class_is_named_with_what_to_do(two_files, tmp_path, run):
    done = run(*two_files, "--out", tmp_path / "o.h5", "--threshold", 0.4)
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if "without any image" in line]
    assert "cat (2 labelled so, the surest 0.380)" in line and "below the surest" in line and "bee" not in line
    assert "K = 2: class 'bee' is the lower median of 2 with 2 to 5" in done.stdout, "the empty class counts not"
    many = write_logits(tmp_path / "many.h5", np.eye(13)[[4]] * 9, classes=[f"class{i:02}" for i in range(13)])
    for words, of_threshold in (
        (("--threshold", 0.4), True),
        (("--method", "top-p", "--top-p", 1, "--per-class", 2), False),
    ):
        said = run(many, "--out", tmp_path / "o.h5", *words).stdout
        assert all(f"class{i:02} (0)" in said for i in range(13) if i != 4)
        assert ("below the surest" in said) == of_threshold


def data_of(path):
    """The bytes of every dataset, and the attributes."""
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in file if name != "classes"}, dict(file.attrs)


def test_order_of_the_arguments_changes_nothing(two_files, tmp_path, run):
    outs = [tmp_path / f"{i}.h5" for i in range(3)]
    orders = (two_files, two_files[::-1], [*two_files, two_files[0]])
    for out, order in zip(outs, orders, strict=True):
        assert run(*order, "--out", out, "--threshold", 0.4, "--per-class", 5).returncode == 0
    assert data_of(outs[0]) == data_of(outs[1]) == data_of(outs[2])
    seeds = []
    for seed in range(5):
        assert run(*two_files, "--out", outs[1], "--threshold", 0.4, "--per-class", 5, "--seed", seed).returncode == 0
        columns, _ = data_of(outs[1])
        seeds.append((columns["file"], columns["row"]))
    assert len(set(seeds)) > 1, "--seed changes nothing"


def test_one_file_under_two_spellings_counts_once(two_files, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("a.h5", tmp_path / "a.h5", "--out", "o.h5", "--threshold", 0.4, "--per-class", 5).returncode == 0
    columns, attrs, _ = read_selection(tmp_path / "o.h5")
    assert json.loads(attrs["files"]) == [str(tmp_path / "a.h5")]
    assert set(columns["file"].tolist()) == {0}


def test_nothing_is_lost_when_nothing_is_left(two_files, tmp_path, run):
    out = tmp_path / "balanced.h5"
    assert run(*two_files, "--out", out).returncode == 0
    before = out.read_bytes(), out.with_suffix(".json").read_bytes(), sorted(tmp_path.iterdir())
    assert_mistake(run(*two_files, "--out", out, "--threshold", 0.99), "0.95", "0.99")
    assert (out.read_bytes(), out.with_suffix(".json").read_bytes(), sorted(tmp_path.iterdir())) == before


def test_unfinished_file_is_refused(two_files, tmp_path, run):
    with h5py.File(two_files[1], "r+") as file:
        file["status"][3] = 0
    assert_mistake(run(*two_files, "--out", tmp_path / "o.h5"), "a.h5", "1 of 5", "02")
    assert not (tmp_path / "o.h5").exists()


def test_two_teachers_are_refused(tmp_path, run):
    one = write_logits(tmp_path / "a.h5", logits_of((0, 0.9)))
    two = write_logits(tmp_path / "b.h5", logits_of((0, 0.9)), teacher="b" * 64)
    assert_mistake(run(one, two, "--out", tmp_path / "o.h5"), "b.h5", "teacher")


@pytest.mark.parametrize("classes", [["ant", "bee", "dog"], ["bee", "ant", "cat"]])
def test_other_classes_are_refused(tmp_path, run, classes):
    one = write_logits(tmp_path / "a.h5", logits_of((0, 0.9)))
    two = write_logits(tmp_path / "b.h5", logits_of((0, 0.9)), classes=classes)
    assert_mistake(run(one, two, "--out", tmp_path / "o.h5"), "b.h5", "classes")


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
    assert_mistake(run(*two_files, "--out", tmp_path / "o.h5", *flags), *words)


@pytest.mark.parametrize("how", ["text", "empty", "missing", "selection", "no dataset"])
def test_what_is_no_logits_file_is_refused(two_files, tmp_path, run, how):
    path = tmp_path / "x.h5"
    if how == "text":
        path.write_text("name,label\n")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "selection":
        assert run(*two_files, "--out", path).returncode == 0
    elif how == "no dataset":
        write_logits(path, logits_of((0, 0.9)))
        with h5py.File(path, "r+") as file:
            del file["confidence"]
    assert_mistake(run(path, "--out", tmp_path / "o.h5"), "x.h5")


def test_logits_that_are_not_contiguous_are_refused_by_top_p(tmp_path, run):
    path = write_logits(tmp_path / "x.h5", logits_of((0, 0.9), (1, 0.8)))
    with h5py.File(path, "r+") as file:
        logits = file["logits"][:]
        del file["logits"]
        file.create_dataset("logits", data=logits, chunks=(1, 3), compression="gzip")
    assert_mistake(run(path, "--out", tmp_path / "o.h5", "--method", "top-p", "--per-class", 1), "x.h5", "logits")


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
    done = run(*two_files, *flags)
    assert done.returncode == 0
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
    assert "71.43" in done.stdout and "50.0" in done.stdout
    # the truth measures and never chooses
    other = tmp_path / "other.h5"
    assert run(*two_files, "--out", other, *flags[2:-2]).returncode == 0
    assert data_of(out) == data_of(other)


@pytest.mark.parametrize(
    ("header", "lines"),
    [
        (None, None),
        (("file", "label"), [("a/000.png", "ant")]),
        (("name", "class"), [("x.png", "ant")]),
        (("name", "class"), [("a/000.png", "class_0"), ("a/001.png", "")]),  # the classes of another list
        (("name", "class"), [("a/000.png", "a" * 200_000)]),
    ],
)
def test_wrong_truth_is_refused_and_nothing_is_lost(two_files, tmp_path, run, header, lines):
    out, truth = tmp_path / "balanced.h5", tmp_path / "truth.csv"
    assert run(*two_files, "--out", out).returncode == 0
    before = out.read_bytes()
    if lines:
        write_truth(truth, lines, header)
    assert_mistake(run(*two_files, "--out", out, "--threshold", 0.4, "--truth", truth), "truth.csv")
    assert out.read_bytes() == before, "a run that fails replaced the selection"


def test_a_truth_that_excel_wrote_is_read(two_files, tmp_path, run):
    truth = write_truth(tmp_path / "truth.csv", [("a/000.png", "ant")], ("name", "class"))
    truth.write_bytes(b"\xef\xbb\xbf" + truth.read_bytes())
    done = run(*two_files, "--out", tmp_path / "o.h5", "--truth", truth)
    assert done.returncode == 0 and "pseudo-label accuracy" in done.stdout, done


def test_confidences_are_probabilities(tmp_path, run):
    """Of a model of one's own: a mean of softmaxes may be a little above 1, percent are a mistake."""
    file = write_logits(tmp_path / "mine.h5", logits_of((0, 0.9), (1, 0.8)))
    with h5py.File(file, "r+") as columns:
        columns["confidence"][:] = np.float32([1.0000001, 0.8])
    assert "2 images, 2 above" in run(file, "--out", tmp_path / "o.h5", "--per-class", "all").stdout
    with h5py.File(file, "r+") as columns:
        columns["confidence"][:] = [97.2, 80]
    assert_mistake(run(file, "--out", tmp_path / "o.h5"), "mine.h5", "(0 to 1)")


def test_with_its_picture_as_a_user_runs_it(tmp_path, tiny_data, run_stage):
    names = sorted(p.relative_to(tiny_data / "unlabeled").as_posix() for p in (tiny_data / "unlabeled").rglob("*.png"))
    classes = ["disc", "square", "triangle"]
    with open(tiny_data / "unlabeled_truth.csv") as file:
        truth = {line["name"]: classes.index(line["class"]) for line in csv.DictReader(file)}
    logits = logits_of(*[(truth[name], 0.4 + 0.02 * i) for i, name in enumerate(names)])
    write_logits(tmp_path / "logits.h5", logits, root=tiny_data / "unlabeled", names=names, classes=classes)
    out = tmp_path / "out" / "balanced.h5"
    flags = [tmp_path / "logits.h5", "--out", out, "--truth", tiny_data / "unlabeled_truth.csv"]
    done = run_stage(ROOT / "03_balance.py", *flags, launcher="python")
    assert "7 to 7 a class" in done.stdout and "100.0 percent before" in done.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["balanced.h5", "balanced.json", "balanced.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# the picture


def test_the_sheet_has_the_most_the_middle_and_the_least_confident():
    assert common.of_sheet(3).tolist() == [0, 1, 2]
    assert common.of_sheet(16).tolist() == list(range(16))
    assert common.of_sheet(17).tolist() == [*range(6), *range(6, 11), *range(12, 17)]
    assert common.of_sheet(1001).tolist() == [*range(6), *range(498, 503), *range(996, 1001)]


def test_of_many_classes_the_fattest_and_the_thinnest_are_drawn(tmp_path, monkeypatch, tiny_data):
    """60 classes, c + 1 images of class c; all images but one are gone, and their cells stay empty."""
    num_classes, sizes = 60, np.arange(1, 61)
    label = np.repeat(np.arange(num_classes), sizes)
    logits = np.where(label[:, None] == np.arange(num_classes), 5.0, 0.0)
    names = [f"part0/{i:03}.png" for i in range(len(label))]
    classes = [f"c{c:02}" for c in range(num_classes)]
    path = write_logits(tmp_path / "l.h5", logits, root=tiny_data / "unlabeled", names=names, classes=classes)
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda plt, path: figures.append(plt.gcf()))
    monkeypatch.setattr(sys, "argv", ["03", str(path), "--out", str(tmp_path / "b.h5"), "--per-class", "30"])
    balance.main()
    axes = figures[0].axes
    rows = [label.get_text() for label in axes[2].get_yticklabels()]
    assert rows == classes[:39:-1] + classes[19::-1]
    sheet = axes[2].images[0].get_array()
    cells = [
        sheet[top : top + common.SIDE, left : left + common.SIDE]
        for top in range(0, len(sheet), common.SIDE + common.CAPTION)
        for left in common.SHEET_LEFT
    ]
    there = {name for name in names if (tiny_data / "unlabeled" / name).exists()}
    num_drawn = sum(bool((cell < 255).any()) for cell in cells)
    assert num_drawn == len(there & {names[i] for i in range(len(names))} & drawn(label)) > 0
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axes[0].containers}
    assert heights["candidates"] == [*range(60, 40, -1), *range(20, 0, -1)] and set(heights["examples"]) == {30}


def test_the_picture_shows_the_calibration(two_files, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda plt, path: figures.append(plt.gcf()))
    val = write_val(tmp_path / "val.h5", drawn_answers(100))
    flags = ["--out", tmp_path / "o.h5", "--calibration", val, "--min-precision", "0.8"]
    monkeypatch.setattr(sys, "argv", ["03", *map(str, two_files), *map(str, flags)])
    balance.main()
    report = json.loads((tmp_path / "o.json").read_text())
    axis, curve = figures[0].axes[3], [point for point in report["calibration"]["curve"] if point["kept"]]
    precision, share, chosen = axis.get_lines()
    for line, what in ((precision, "precision"), (share, "share")):
        assert line.get_xdata().tolist() == [point["threshold"] for point in curve]
        assert line.get_ydata().tolist() == [point[what] for point in curve]
    assert chosen.get_xdata() == [report["threshold"]] * 2 and len(axis.collections) == 2, "the intervals"
    boxes = [axis.get_position() for axis in figures[0].axes]
    assert boxes[3].y0 > max(box.y1 for box in boxes[:3]), "it lies over another"


def drawn(label: np.ndarray) -> set[str]:
    """Names of the images in the sheet of the test above: of equal confidence, so the first, middle and last rows."""
    shown = [c for c in range(60) if c < 20 or c >= 40]
    rows = [np.flatnonzero(label == c)[:30] for c in shown]
    return {f"part0/{i:03}.png" for mine in rows for i in mine[common.of_sheet(len(mine))]}
