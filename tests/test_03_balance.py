"""Stage 03: both rules against a brute force, the mean of several teachers, the threshold, what it writes and says."""

import json
import math
import os
import resource
from collections import Counter
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_mistake, load_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from label_files import CLASSES, change, logits_of, read_labels, select, undo, write_labels, write_truth
from PIL import Image

from common import DONE, UNREADABLE, LabelFile, open_label_file

balance = load_stage("03_balance")


# the rules


class InMemory(LabelFile):
    """A label file of these columns, without a file."""

    def __init__(self, classes, **columns):
        num = len(columns["status"])
        super_columns = {"path": np.array([b"%05d" % i for i in range(num)])} | columns
        places = {name: (values.dtype, 0, values.shape) for name, values in super_columns.items()}
        for name, value in {"path": "m.h5", "attrs": {"root": "/r"}, "classes": classes, "places": places}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "values", super_columns)

    def column(self, name):
        return self.values[name]


def table_of(files, chunk_rows, is_mean=False):
    """Read in chunks of so many rows."""
    table = balance.Table(files, is_mean)
    table.chunk_rows = chunk_rows
    return table


@pytest.fixture(scope="module", autouse=True)
def ranked_after_each_chunk():
    """The best of the classes are found anew after each chunk, as they are every 262,144 entries."""
    add = balance.BestOfClasses.add

    def add_and_rank(self, *entries):
        add(self, *entries)
        self.best()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance.BestOfClasses, "add", add_and_rank)
        yield


ABOVE = float(np.nextafter(np.float32(0.3), np.float32(1)))  # the next float32 above 0.3
# A few exact values, so that ties and the threshold itself come up.
CONFIDENCES = st.sampled_from([float(np.float32(v)) for v in (0.1, 0.29, 0.3, ABOVE, 0.5, 0.7, 0.7000001, 0.9, 1.0)])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.sampled_from([1, 2, 3, 7, 100]))
def test_noisy_student_is_the_contracts_rule(data, num_classes, threshold, per_class):
    row = st.tuples(st.integers(0, num_classes - 1), CONFIDENCES, st.sampled_from([DONE, DONE, DONE, UNREADABLE]))
    rows = data.draw(st.lists(st.lists(row, max_size=15), min_size=1, max_size=4))  # of one to four files
    files = []
    for of_file in rows:
        columns = [np.array(c, t) for c, t in zip(zip(*of_file), ("i4", "f4", "u1"))] or [np.zeros(0, "i4")] * 3  # noqa: B905
        files.append(
            InMemory(
                [str(c) for c in range(num_classes)],
                **dict(zip(("label", "confidence", "status"), columns, strict=True)),
            )
        )
    table = table_of(files, data.draw(st.integers(1, 9)))
    index, label, confidence, copies = balance.select_noisy_student(table, threshold, per_class, 0)
    everything = [row for of_file in rows for row in of_file]
    assert index.tolist() == sorted(index.tolist())
    assert [*zip(label.tolist(), confidence.tolist(), strict=True)] == [everything[i][:2] for i in index]
    for c in range(num_classes):
        above = [
            i for i, row in enumerate(everything) if row[0] == c and row[1] > np.float32(threshold) and row[2] == DONE
        ]
        expected = sorted(above, key=lambda i: (-everything[i][1], i))[:per_class]
        of_class = {i: n for i, k, n in zip(index.tolist(), label.tolist(), copies.tolist(), strict=True) if k == c}
        assert sorted(of_class) == sorted(expected)
        if expected:
            assert sum(of_class.values()) == per_class and max(of_class.values()) - min(of_class.values()) <= 1
    streamed = [row for chunk in balance.above_threshold(table, threshold) for row in chunk[0].tolist()]
    wanted = [i for i, row in enumerate(everything) if row[1] > np.float32(threshold) and row[2] == DONE]
    assert streamed == wanted


LEVELS = st.sampled_from([0.0, -0.5, -1.0, -3.0, -20.0])


def draw_teachers(data, num_classes, num_rows, num_teachers):
    """(files, each with its own order of the classes; fp32 probabilities (n, C), NaN where a label is missing)."""
    classes, files, total = [f"c{c}" for c in range(num_classes)], [], 0
    for k in range(num_teachers):
        rows = st.lists(LEVELS, min_size=num_classes, max_size=num_classes)
        logits = np.array(data.draw(st.lists(rows, min_size=num_rows, max_size=num_rows)), np.float16)
        logits = logits.reshape(num_rows, num_classes)
        logits -= logits.max(1, keepdims=True, initial=-99)
        order = data.draw(st.permutations(range(num_classes))) if k else range(num_classes)
        status = np.array(
            data.draw(st.lists(st.sampled_from([DONE, DONE, UNREADABLE]), min_size=num_rows, max_size=num_rows)),
            np.uint8,
        )
        probs = torch.from_numpy(logits).softmax(1, dtype=torch.float32).numpy()
        columns = {"label": probs.argmax(1).astype(np.int32), "confidence": probs.max(1, initial=0), "status": status}
        files.append(InMemory([classes[c] for c in order], logits=logits[:, list(order)], **columns))
        total = total + np.where(status[:, None] == DONE, probs, np.nan)
    return files, total / np.float32(num_teachers)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from([1, 2, 3, 10]), st.sampled_from([1, 2, 5, 100]), st.integers(1, 3))
def test_top_p_is_yalniz_rule_for_one_teacher_and_for_several(data, num_classes, top_p, per_class, num_teachers):
    """The sum of a row in another order of the classes may round otherwise: there the order is the same."""
    files, probs = draw_teachers(data, num_classes, data.draw(st.integers(0, 20)), num_teachers)
    table = table_of(files, data.draw(st.integers(1, 9)), is_mean=num_teachers > 1)
    if num_teachers > 1 and len(probs):
        done = np.flatnonzero(~np.isnan(probs[:, 0]))
        if len(done):
            ours = table.probs(table.columns("logits", done)).numpy()
            np.testing.assert_allclose(ours, probs[done], rtol=1e-6)
            probs[done] = ours  # ties are those of these bits
    index, label, score, copies = balance.select_top_p(table, top_p, per_class)
    candidates = {c: [] for c in range(num_classes)}
    for i, row in enumerate(probs):
        if not np.isnan(row[0]):
            for c in sorted(range(num_classes), key=lambda c: (-row[c], c))[:top_p]:
                candidates[c].append(i)
    expected = [
        (i, c) for c, rows in candidates.items() for i in sorted(rows, key=lambda i: (-probs[i, c], i))[:per_class]
    ]
    assert [*zip(index.tolist(), label.tolist(), strict=True)] == sorted(expected)
    assert score.tolist() == [probs[i, c] for i, c in sorted(expected)] and (copies == 1).all()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 5), st.integers(2, 3))
def test_a_mean_of_teachers_is_that_of_their_probabilities(data, num_classes, num_teachers):
    files, probs = draw_teachers(data, num_classes, 8, num_teachers)
    table = table_of(files, 3, is_mean=True)
    chunks = [*table.chunks()]
    rows = np.concatenate(chunks) if chunks else np.zeros(0, int)
    assert rows.tolist() == np.flatnonzero(~np.isnan(probs[:, 0])).tolist(), "a row is done only if it is in all"
    for chunk in chunks:
        label, confidence = table.answers(chunk)
        np.testing.assert_allclose(confidence, probs[chunk].max(1), rtol=1e-6)
        np.testing.assert_allclose(probs[chunk][np.arange(len(chunk)), label], confidence, rtol=1e-6)
        logits = table.merge(table.columns("logits", chunk))
        assert (
            logits.dtype == np.float16
            and (logits.max(1) == 0).all()
            and (logits[np.arange(len(chunk)), label] == 0).all()
        )
        expected = np.log(probs[chunk] / probs[chunk].max(1, keepdims=True)).clip(-65_000)
        np.testing.assert_allclose(logits, expected, atol=1e-2, rtol=1e-3)


def test_logits_of_a_mean_are_not_below_minus_65000():
    files = [InMemory(CLASSES, logits=np.array([[0, -300, -300]], np.float16), status=np.ones(1, np.uint8))] * 2
    table = table_of(files, 1, is_mean=True)
    assert table.merge(table.columns("logits", np.arange(1))).tolist() == [[0, -64992, -64992]]  # -65000 in float16


def test_the_seed_alone_decides_which_images_get_the_extra_copy():
    label = np.repeat([0, 1], 20).astype(np.int32)

    def twice(label, seed):
        columns = {"confidence": np.full(len(label), 0.9, np.float32), "status": np.ones(len(label), np.uint8)}
        table = table_of([InMemory(["a", "b"], label=label, **columns)], 7)
        index, _, _, copies = balance.select_noisy_student(table, 0.3, 30, seed)
        return {*index[copies == 2].tolist()}

    assert twice(label, 0) == twice(label, 0)
    assert len({frozenset(twice(label, seed)) for seed in range(5)}) == 5
    assert {i for i in twice(label, 0) if i < 20} == {i for i in twice(label[:30], 0) if i < 20}, "classes are apart"
    drawn = Counter(i for seed in range(200) for i in twice(label, seed))
    assert all(60 < drawn[i] < 140 for i in range(40)), "some images are favoured"


# the threshold


@settings(max_examples=200, deadline=None)
@given(st.integers(20, 90), st.integers(0, 2**32), st.sampled_from([0.5, 0.8, 0.9, 1.0]), st.sampled_from([0, 0.67, 1]))
def test_the_threshold_is_the_contracts(num, seed, min_precision, min_share):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.1, 1, num).astype(np.float32)
    right = rng.random(num) < confidence ** rng.choice([0.2, 1, 3])
    args = SimpleNamespace(min_precision=min_precision, min_share=min_share)
    report = balance.calibrate(confidence, right, args)
    precisions = {}
    for step, point in enumerate(report["curve"]):
        above = right[confidence > np.float32(step / 100)]
        assert (point["threshold"], point["kept"], point["right"]) == (step / 100, len(above), above.sum())
        if len(above) and len(above) / num >= min_share:
            precisions[step / 100] = above.mean()
    precise = [threshold for threshold, precision in precisions.items() if precision >= min_precision]
    best = max(precisions.values())
    expected = precise or [threshold for threshold, precision in precisions.items() if precision == best]
    assert report["reached"] == bool(precise) and report["at"]["threshold"] == expected[0]
    z, kept, hits = NormalDist().inv_cdf(0.975), report["at"]["kept"], report["at"]["right"]
    share = hits / kept  # Wilson's interval in the textbook's form
    middle, half = share + z * z / (2 * kept), z * math.sqrt(share * (1 - share) / kept + z * z / (4 * kept * kept))
    interval = [(middle - half) / (1 + z * z / kept), (middle + half) / (1 + z * z / kept)]
    assert report["at"]["precision_interval"] == pytest.approx(interval, abs=1e-6)


@pytest.fixture
def run(call_main, monkeypatch):
    """run(*flags) -> Done: stage 03 in this process, without its picture, which takes a second."""
    monkeypatch.setattr(balance, "draw", lambda *args: None)
    return lambda *flags: call_main("03_balance", *flags)


def report_of(out):
    return json.loads(out.with_suffix(".json").read_text())


ROWS = [(0, 0.95), (1, 0.9), (0, 0.8), (2, 0.58), (1, 0.52)]
VAL = [(0, 0.545)] * 12 + [(1, 0.75)] * 28  # the first 12 are wrong: above 0.55 all are right, and 70 percent are left
VAL_LABEL = [2] * 12 + [1] * 28


def test_auto_is_measured_on_val_and_kept(tmp_path, run):
    val = logits_of(*VAL), VAL_LABEL
    labels, out = write_labels(tmp_path / "l.h5", logits_of(*ROWS), val=val), tmp_path / "o.h5"
    done = run(labels, "--out", out, "--per-class", "all")
    assert done.returncode == 0 and "threshold 0.55" in done.stdout, done
    report = report_of(out)["calibration"]
    assert report["at"]["threshold"] == 0.55 and report["reached"] and len(report["curve"]) == 100
    assert open_label_file(out).attrs["threshold"] == 0.55
    columns, source = read_labels(out), read_labels(labels)
    assert columns["path"].tolist() == source["path"][:4].tolist()
    assert all((columns[name] == source[name]).all() for name in ("val_logits", "val_label"))
    # With --min-share 0.71 no threshold of 0.55 counts, and 0.00 has as large a share right as the others.
    assert "threshold 0.0" in run(labels, "--out", out, "--min-share", 0.71).stdout
    assert "threshold 0.0" in run(labels, "--out", out, "--min-precision", 0.6).stdout
    assert "threshold 0.4" not in run(labels, "--out", out, "--threshold", 0.4).stdout


@pytest.mark.parametrize(("num_classes", "expected"), [(3, 0.5), (99, 0.5), (100, 0.3)])
def test_without_20_images_of_val_nothing_is_measured(num_classes, expected, tmp_path, run):
    logits = 9 * np.eye(num_classes)[:3]
    for val in (None, (logits[[0] * 19], [0] * 19)):
        labels = write_labels(tmp_path / "l.h5", logits, classes=[f"{c:03}" for c in range(num_classes)], val=val)
        done = run(labels, "--out", tmp_path / "o.h5")
        assert "nothing was measured" in done.stdout and report_of(tmp_path / "o.h5")["threshold"] == expected


# several files


def test_files_of_different_folders_are_put_together(tmp_path, run):
    """Above 0.4: ant b0 .95, a0 .9, then .8 in a2 and b2, a tie that goes to the first path; bee: two become three."""
    one = write_labels(
        tmp_path / "b.h5", logits_of((0, 0.95), (1, 0.9), (0, 0.8), (2, 0.38), (0, 0.5)), root="/d/x/b", unreadable=[4]
    )
    two = write_labels(tmp_path / "a.h5", logits_of((0, 0.9), (1, 0.6), (0, 0.8), (2, 0.36), (0, 0.45)), root="/d/x")
    outs = [tmp_path / "out" / "0.h5", tmp_path / "out" / "1.h5"]
    flags = ["--threshold", 0.4, "--per-class", 3]
    for out, files in zip(outs, ([one, two], [two, one]), strict=True):
        assert run(*files, "--out", out, *flags).returncode == 0
    assert outs[0].read_bytes() == outs[1].read_bytes(), "the order of the arguments changes nothing"
    columns, attrs = read_labels(outs[0]), open_label_file(outs[0]).attrs
    assert columns["path"].tolist() == [b"a/000.png", b"a/001.png", b"a/002.png", b"b/b/000.png", b"b/b/001.png"]
    assert columns["label"].tolist() == [0, 1, 0, 0, 1] and columns["status"].tolist() == [DONE] * 5
    copies = columns["copies"].tolist()
    assert copies[0] == copies[2] == copies[3] == 1 and sorted([copies[1], copies[4]]) == [1, 2]
    sources = read_labels(two), read_labels(one)
    for name in ("logits", "confidence"):
        np.testing.assert_array_equal(columns[name], np.concatenate([sources[0][name][:3], sources[1][name][:2]]))
    assert attrs["root"] == "/d/x" and json.loads(attrs["files"]) == [str(two), str(one)]
    expected = {"method": "noisy-student", "threshold": 0.4, "per_class": 3, "top_p": 10, "seed": 0}
    expected |= {"format": "noisy-student-labels-2", "arch": "efficientnet_b0", "teacher_sha256": "a" * 64}
    assert {name: attrs[name] for name in expected} == expected
    report = report_of(outs[0])
    assert [report[name] for name in ("candidates", "above_threshold", "kept", "examples")] == [9, 7, 5, 6]
    of_class = {"candidates": 2, "above_threshold": 2, "kept": 2, "examples": 3}
    assert report["classes"]["bee"] == of_class and report["classes"]["cat"]["kept"] == 0
    chosen = run(one, "--out", outs[1], *flags).stdout
    assert "cat" in chosen, "a class without any image is named"
    again = outs[1].read_bytes()
    assert run(outs[1], "--out", tmp_path / "again.h5", *flags).returncode == 0, "a selection is a label file"
    assert run(one, "--out", outs[1], *flags).returncode == 0 and outs[1].read_bytes() == again


def test_many_files_with_few_descriptors(tmp_path, run):
    files = [
        write_labels(tmp_path / f"{i:03}.h5", logits_of((i % 3, 0.9)), val=(logits_of(*VAL), VAL_LABEL))
        for i in range(60)
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        assert run(*files, "--out", tmp_path / "o.h5").returncode == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read_labels(tmp_path / "o.h5")["path"].tolist() == [b"%03d/000.png" % i for i in range(60)]


def two_teachers(folder):
    """Two teachers of the same images, with other orders of the classes; of a3 only one has a label."""
    names = [f"{i}.png" for i in range(5)]
    val = logits_of(*VAL), np.array(VAL_LABEL)
    one = write_labels(folder / "b.h5", logits_of(*ROWS), names=names, val=val, unreadable=[3], arch="one")
    turned = logits_of(*[((c + 1) % 3, p) for c, p in ROWS])
    val = logits_of(*[((c + 1) % 3, p) for c, p in VAL]), (val[1] + 1) % 3
    more = {"teacher_sha256": "b" * 64, "teacher": "/u.pt", "arch": "two"}
    return one, write_labels(folder / "a.h5", turned, names=names, val=val, classes=["cat", "ant", "bee"], **more)


def test_the_mean_of_two_teachers(tmp_path, run):
    one, two = two_teachers(tmp_path)
    done = run(two, one, "--out", tmp_path / "o.h5", "--per-class", "all")
    assert done.returncode == 0 and "mean of 2 teachers" in done.stdout and "threshold 0.55" in done.stdout, done
    file, columns = open_label_file(tmp_path / "o.h5"), read_labels(tmp_path / "o.h5")
    assert columns["path"].tolist() == [b"0.png", b"1.png", b"2.png"], "above 0.55 in both"
    assert [file.classes[c] for c in columns["label"]] == ["ant", "bee", "ant"]
    np.testing.assert_allclose(columns["confidence"], [0.95, 0.9, 0.8], atol=1e-3)
    assert file.attrs["arch"] == "one", "of the file that was named last"
    assert json.loads(file.attrs["teacher_sha256"]) == ["b" * 64, "a" * 64]
    assert json.loads(file.attrs["teacher"]) == ["/u.pt", "/t.pt"]
    assert [file.classes[c] for c in columns["val_label"]] == [CLASSES[c] for c in VAL_LABEL]
    np.testing.assert_allclose(np.exp(columns["val_logits"]).sum(1), [1 / p for _, p in VAL], rtol=1e-2)


def test_what_neither_fits_nor_differs_is_a_mistake(tmp_path, run):
    names, logits = ["0.png", "1.png"], logits_of((0, 0.9), (1, 0.8))
    first = write_labels(tmp_path / "first.h5", logits, names=names)
    wrong = {
        "same-teacher": write_labels(tmp_path / "same-teacher.h5", logits, names=names),
        "overlap": write_labels(tmp_path / "overlap.h5", logits, names=["1.png", "2.png"]),
        "nested": write_labels(tmp_path / "nested.h5", logits, root="/data", names=["a.png", "unlabeled/1.png"]),
        "teacher": write_labels(tmp_path / "teacher.h5", logits, teacher_sha256="b" * 64),
        "precision": write_labels(tmp_path / "precision.h5", logits, precision="bf16"),
        "crop": write_labels(tmp_path / "crop.h5", logits, crop_mode="squash"),
        "order": write_labels(tmp_path / "order.h5", logits, classes=["bee", "ant", "cat"]),
        "classes": write_labels(
            tmp_path / "classes.h5", logits, names=names, classes=["ant", "bee", "dog"], teacher_sha256="b" * 64
        ),
    }
    for path in wrong.values():
        assert_mistake(run(first, path, "--out", tmp_path / "o.h5"), "first.h5", path.name)
    assert_mistake(run(first, first, "--out", tmp_path / "o.h5"), "first.h5")
    assert not (tmp_path / "o.h5").exists()


# the command line


def test_top_p_by_hand(tmp_path, run):
    labels, out = write_labels(tmp_path / "l.h5", logits_of(*ROWS)), tmp_path / "o.h5"
    flags = [labels, "--out", out, "--method", "top-p", "--top-p", 1, "--threshold", 0.99]
    assert run(*flags, "--per-class", 1).returncode == 0, "--threshold is not used by top-p"
    columns, file = read_labels(out), open_label_file(out)
    assert columns["path"].tolist() == [b"l/000.png", b"l/001.png", b"l/003.png"] and "logits" not in columns
    assert columns["label"].tolist() == [0, 1, 2] and columns["copies"].tolist() == [1] * 3
    assert columns["confidence"] == pytest.approx([0.95, 0.9, 0.58], rel=2e-3)  # of float16 logits
    assert file.attrs["method"] == "top-p" and file.attrs["top_p"] == 1
    assert_mistake(run(out, "--out", tmp_path / "again.h5"), "o.h5", "top-p")
    for per_class in ([], ["--per-class", "all"]):
        assert_mistake(run(*flags, *per_class), "--per-class")
    assert run(*flags, "--per-class", 1, "--top-p", 9).returncode == 0
    pairs = [*zip(read_labels(out)["path"].tolist(), read_labels(out)["label"].tolist(), strict=True)]
    assert pairs == sorted(pairs)


def test_auto_per_class_is_the_lower_median_of_what_is_not_empty(tmp_path, run):
    rows = [(0, 0.9)] * 7 + [(1, 0.9)] * 2
    labels, out = write_labels(tmp_path / "l.h5", logits_of(*rows)), tmp_path / "o.h5"
    done = run(labels, "--out", out)
    assert open_label_file(out).attrs["per_class"] == 2 and done.returncode == 0 and "cat" in done.stdout
    assert run(labels, "--out", out, "--per-class", "all").returncode == 0
    assert open_label_file(out).attrs["per_class"] == "all" and read_labels(out)["copies"].tolist() == [1] * 9
    assert run(select(tmp_path / "s.h5", labels, {0: 5, 1: 2}), "--out", out, "--per-class", "all").returncode == 0
    assert read_labels(out)["copies"].tolist() == [1, 1], "copies of an input are not used"


@pytest.mark.parametrize(
    "flag", ["--per-class 0", "--per-class many", "--threshold nan", "--threshold -1", "--top-p 0"]
)
def test_wrong_flags_are_refused(flag, tmp_path, run):
    labels = write_labels(tmp_path / "l.h5", logits_of(*ROWS))
    assert_mistake(run(labels, "--out", tmp_path / "o.h5", *flag.split()), flag.split()[0])


def test_a_mistake_replaces_nothing(tmp_path, run):
    labels, out = write_labels(tmp_path / "l.h5", logits_of(*ROWS)), tmp_path / "o.h5"
    assert run(labels, "--out", out).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert_mistake(run(labels, "--out", out, "--threshold", 0.99), "--threshold")
    for name in (labels, tmp_path / "x" / ".." / "l.h5", tmp_path / "o.json", tmp_path):
        assert_mistake(run(labels, "--out", name), "--out", name)
    assert_mistake(run(labels, "--out", out, "--truth", tmp_path / "none.csv"), "none.csv")
    truth = tmp_path / "t.csv"
    for header, lines in ((("file", "label"), [("l/000.png", "ant")]), (("name", "class"), [("x.png", "ant")]),
                          (("name", "class"), [("l/000.png", "class_0")])):  # fmt: skip
        assert_mistake(run(labels, "--out", out, "--truth", write_truth(truth, lines, header)), "t.csv")
    truth.unlink()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert_mistake(run(undo(labels, [3]), "--out", out), "l.h5", "02")


def test_truth_measures_and_never_chooses(tmp_path, run):
    """Labels: ant bee ant cat bee; above 0.55 all but the last."""
    labels = write_labels(tmp_path / "l.h5", logits_of(*ROWS))
    lines = [
        ("l/000.png", "ant"),
        ("l/001.png", "cat"),
        ("l/002.png", ""),
        ("l/004.png", "bee"),
        ("elsewhere.png", "ant"),
    ]
    truth = write_truth(tmp_path / "t.csv", lines)
    truth.write_bytes(b"\xef\xbb\xbf" + truth.read_bytes())  # as Excel writes it
    flags = [labels, "--out", tmp_path / "o.h5", "--threshold", 0.55, "--per-class", "all"]
    assert run(*flags).returncode == 0
    before = (tmp_path / "o.h5").read_bytes()
    assert "66.67" in run(*flags, "--truth", truth).stdout and (tmp_path / "o.h5").read_bytes() == before
    expected = {"accuracy_before": 66.67, "accuracy_after": 50}
    assert report_of(tmp_path / "o.h5")["truth"] == expected


def test_what_is_damaged_is_named(tmp_path, run):
    for columns in ({"confidence": {0: 97.2}}, {"label": {0: 7}}, {"logits": {0: [0.9, 0.1, 0]}}):
        labels = change(write_labels(tmp_path / "l.h5", logits_of(*ROWS)), **columns)
        assert_mistake(run(labels, "--out", tmp_path / "o.h5"), "l.h5")


@pytest.mark.parametrize("num_classes", [2, 10, 81, 1000])
def test_the_picture_shows_images_of_a_few_classes(num_classes, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.new("RGB", (40, 30), (255, 12 * i, 0)).save(tmp_path / f"{i}.png")
    logits = 9 * np.eye(num_classes)[rng.integers(0, num_classes, 20)]
    names = [f"{i}.png" for i in range(19)] + ["gone.png"]
    labels = write_labels(tmp_path / "l.h5", logits, tmp_path, names, [f"class {c}" for c in range(num_classes)])
    figures = []
    monkeypatch.setattr(balance, "save_figure", lambda plt, path: figures.append(plt.gcf()))
    monkeypatch.setattr("sys.argv", ["03", str(labels), "--out", str(tmp_path / "o.h5"), "--per-class", "all"])
    balance.main()
    images = figures[0].axes[2]
    sheet = images.images[0].get_array()
    reds = [
        sheet[top + 32, left + 32].tolist() for top in range(0, len(sheet), 66) for left in range(0, sheet.shape[1], 66)
    ]
    shown = sum(red[0] > 250 and red[2] < 5 for red in reds)
    assert 7 <= shown <= 19 and len(images.get_yticks()) <= 8


def test_as_a_user_runs_it(tmp_path, tiny_data, run_stage):
    names = sorted(p.relative_to(tiny_data / "unlabeled").as_posix() for p in (tiny_data / "unlabeled").rglob("*.png"))
    labels = write_labels(
        tmp_path / "l.h5", logits_of(*[(i % 3, 0.9) for i in range(20)]), tiny_data / "unlabeled", names
    )
    out = tmp_path / "out" / "balanced.h5"
    run_stage(ROOT / "03_balance.py", labels, "--out", out, launcher="python")
    assert sorted(path.name for path in out.parent.iterdir()) == ["balanced.h5", "balanced.json", "balanced.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
