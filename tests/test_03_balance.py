"""Stage 03: both rules against a brute force, the mean of several teachers, the threshold, what it writes."""

import json
import os
import resource
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_mistake, load_stage, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_files import CLASSES, logits_of, read_labels, write_labels
from PIL import Image

from common import DONE, UNREADABLE, LabelFile, open_label_file, wilson

balance = load_stage("03_balance")


class InMemory(LabelFile):
    """A label file of these columns, without a file."""

    def __init__(self, classes, **columns):
        places = {name: (values.dtype, 0, values.shape) for name, values in columns.items()}
        super().__init__("m.h5", {"root": "/r"}, classes, places)
        self.__dict__["values"] = columns  # the class is frozen

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
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, balance.BestOfClasses, "add", lambda self, *entries: self.best())
        yield


ABOVE = float(np.nextafter(np.float32(0.3), np.float32(1)))  # the next float32 above 0.3
# A few exact values, so that ties and the threshold itself come up.
CONFIDENCES = st.sampled_from([float(np.float32(v)) for v in (0.1, 0.29, 0.3, ABOVE, 0.5, 0.7, 0.7000001, 0.9, 1.0)])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.sampled_from([1, 2, 3, 7, 100]))
def test_noisy_student_is_the_contracts_rule(data, num_classes, threshold, per_class):
    row = st.tuples(st.integers(0, num_classes - 1), CONFIDENCES, st.sampled_from([DONE, DONE, UNREADABLE]))
    parts = data.draw(st.lists(st.lists(row, max_size=15), min_size=1, max_size=4))  # files
    everything = [*chain(*parts)]
    files = []
    for part in parts:
        label, confidence, status = np.array(part).reshape(-1, 3).T
        columns = {"label": label.astype("i4"), "confidence": confidence.astype("f4")}
        classes = [str(c) for c in range(num_classes)]
        files.append(InMemory(classes, status=status.astype("u1"), **columns))
    table = table_of(files, data.draw(st.integers(1, 9)))
    selected = balance.select_noisy_student(table, threshold, per_class, 0)
    index, label, confidence, copies = (column.tolist() for column in selected)
    assert index == sorted(index)
    assert [*zip(label, confidence, strict=True)] == [everything[i][:2] for i in index]
    above = [i for i, row in enumerate(everything) if row[1] > np.float32(threshold) and row[2] == DONE]
    for c in range(num_classes):
        rows = sorted((i for i in above if everything[i][0] == c), key=lambda i: (-everything[i][1], i))[:per_class]
        of_class = {i: num for i, k, num in zip(index, label, copies, strict=True) if k == c}
        assert sorted(of_class) == sorted(rows)
        if rows:
            assert sum(of_class.values()) == per_class and max(of_class.values()) - min(of_class.values()) <= 1
    assert balance.select_noisy_student(table, threshold, "all", 0)[0].tolist() == above


LEVELS = st.sampled_from([0.0, -0.5, -1.0, -3.0, -20.0, -65_000.0])


def draw_teachers(data, num_classes, num_rows, num_teachers):
    """(files, each with its own order of the classes; fp32 probabilities (n, C), NaN where a label is missing)."""
    classes, files, total = [f"c{c}" for c in range(num_classes)], [], 0
    level = st.lists(LEVELS, min_size=num_rows * num_classes, max_size=num_rows * num_classes)
    done = st.lists(st.sampled_from([DONE, DONE, UNREADABLE]), min_size=num_rows, max_size=num_rows)
    for k in range(num_teachers):
        logits = np.array(data.draw(level), np.float16).reshape(num_rows, num_classes)
        logits -= logits.max(1, keepdims=True, initial=-99)
        status = np.array(data.draw(done), np.uint8)
        order = data.draw(st.permutations(range(num_classes))) if k else [*range(num_classes)]
        files.append(InMemory([classes[c] for c in order], logits=logits[:, order], status=status))
        probs = torch.from_numpy(logits).softmax(1, dtype=torch.float32).numpy()
        total = total + np.where(status[:, None] == DONE, probs, np.nan)
    return files, total / np.float32(num_teachers)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from([1, 2, 3, 10]), st.sampled_from([1, 2, 5, 100]), st.integers(1, 3))
def test_top_p_is_yalniz_rule_for_one_teacher_and_for_several(data, num_classes, top_p, per_class, num_teachers):
    """The sum of a row in another order of the classes may round otherwise: there the order is the same."""
    files, probs = draw_teachers(data, num_classes, data.draw(st.integers(0, 20)), num_teachers)
    table = table_of(files, data.draw(st.integers(1, 9)), is_mean=num_teachers > 1)
    done = np.flatnonzero(~np.isnan(probs[:, 0]))
    if num_teachers > 1 and len(done):
        mean = table.probs(table.columns("logits", done)).numpy()
        np.testing.assert_allclose(mean, probs[done], rtol=1e-6)
        probs[done] = mean  # ties are those of these bits
    index, label, score, copies = balance.select_top_p(table, top_p, per_class)
    expected = []
    tops = {i: sorted(range(num_classes), key=lambda c: (-probs[i, c], c))[:top_p] for i in done.tolist()}
    for c in range(num_classes):
        rows = [i for i, classes in tops.items() if c in classes]
        expected += [(i, c) for i in sorted(rows, key=lambda i: (-probs[i, c], i))[:per_class]]
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
        label, confidence = table.predictions(chunk)
        np.testing.assert_allclose(confidence, probs[chunk].max(1), rtol=1e-6)
        np.testing.assert_allclose(probs[chunk][np.arange(len(chunk)), label], confidence, rtol=1e-6)
        logits = table.logits_to_store(table.columns("logits", chunk))
        assert logits.dtype == np.float16 and (logits[np.arange(len(chunk)), label] == 0).all() and (logits <= 0).all()
        with np.errstate(divide="ignore"):
            expected = np.log(probs[chunk] / probs[chunk].max(1, keepdims=True)).clip(-65_000)
        np.testing.assert_allclose(logits, expected, atol=1e-2, rtol=1e-3)


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
    assert {i for i in twice(label, 0) if i < 20} != {i - 20 for i in twice(label, 0) if i >= 20}, "they share draws"
    drawn = Counter(i for seed in range(200) for i in twice(label, seed))
    assert all(60 < drawn[i] < 140 for i in range(40)), "some images are favoured"


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
        intervals = wilson(len(above), num), wilson(above.sum(), len(above))
        assert (point["share_interval"], point["precision_interval"]) == intervals
        if len(above) and len(above) / num >= min_share:
            precisions[step / 100] = above.mean()
    precise = [threshold for threshold, precision in precisions.items() if precision >= min_precision]
    best = max(precisions.values())
    expected = precise or [threshold for threshold, precision in precisions.items() if precision == best]
    assert report["reached"] == bool(precise) and report["at"]["threshold"] == expected[0]


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

    def threshold(*flags):
        assert run(labels, "--out", out, "--per-class", "all", *flags).returncode == 0
        return open_label_file(out).attrs["threshold"]

    assert threshold("--min-share", 0.71) == 0  # at 0.55 too few are left, and all below are as precise
    assert threshold("--min-precision", 0.6) == 0
    assert threshold("--threshold", 0.4) == 0.4 and not report_of(out)["calibration"]
    assert threshold() == 0.55
    report = report_of(out)["calibration"]
    assert report["at"]["threshold"] == 0.55 and report["reached"] and len(report["curve"]) == 100
    columns, source = read_labels(out), read_labels(labels)
    assert columns["path"].tolist() == source["path"][:4].tolist()
    assert all((columns[name] == source[name]).all() for name in ("val_logits", "val_label"))


@pytest.mark.parametrize(("num_classes", "expected"), [(3, 0.5), (99, 0.5), (100, 0.3)])
def test_without_20_images_of_val_nothing_is_measured(num_classes, expected, tmp_path, run):
    logits = 9 * np.eye(num_classes)[:3]
    for val in (None, (logits[[0] * 19], [0] * 19)):
        classes = [f"{c:03}" for c in range(num_classes)]
        labels = write_labels(tmp_path / "l.h5", logits, classes=classes, val=val)
        assert run(labels, "--out", tmp_path / "o.h5").returncode == 0
        assert report_of(tmp_path / "o.h5")["threshold"] == expected


def test_files_of_different_folders_are_put_together(tmp_path, run):
    """Above 0.4: ant b0 .95, a0 .9, then .8 in a2 and b2, a tie that goes to the first path; bee: two become three."""
    rows = [(0, 0.95), (1, 0.9), (0, 0.8), (2, 0.38), (0, 0.5)]
    one = write_labels(tmp_path / "b.h5", logits_of(*rows), root="/d/x/b", unreadable=[4])
    rows = [(0, 0.9), (1, 0.6), (0, 0.8), (2, 0.36), (0, 0.45)]
    two = write_labels(tmp_path / "a.h5", logits_of(*rows), root="/d/x")
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
    logits = np.concatenate([read_labels(two)["logits"][:3], read_labels(one)["logits"][:2]])
    np.testing.assert_array_equal(columns["logits"], logits)
    expected = {"method": "noisy-student", "threshold": 0.4, "per_class": 3, "top_p": 10, "seed": 0}
    expected |= {"root": "/d/x", "files": json.dumps([str(two), str(one)])}
    expected |= {"arch": "efficientnet_b0", "teacher_sha256": "a" * 64}
    assert expected.items() <= attrs.items()
    report = report_of(outs[0])
    sizes = {"candidates": 9, "above_threshold": 7, "kept": 5, "examples": 6}
    assert sizes.items() <= report.items()
    of_bee = {"candidates": 2, "above_threshold": 2, "kept": 2, "examples": 3}
    assert report["classes"]["bee"] == of_bee and report["classes"]["cat"]["kept"] == 0
    done = run(outs[0], "--out", outs[1], *flags)
    assert done.returncode == 0 and "cat" in done.stdout, "a selection is an input"


def test_many_files_with_few_descriptors(tmp_path, run):
    val = logits_of(*VAL), VAL_LABEL
    files = [write_labels(tmp_path / f"{i:03}.h5", logits_of((i % 3, 0.9)), val=val) for i in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        assert run(*files, "--out", tmp_path / "o.h5").returncode == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read_labels(tmp_path / "o.h5")["path"].tolist() == [b"%03d/000.png" % i for i in range(60)]


def test_the_mean_of_two_teachers(tmp_path, run):
    """Of the same images, with other orders of the classes; of 3.png one has no label."""
    more = {"names": [f"{i}.png" for i in range(5)]}
    val = logits_of(*VAL), VAL_LABEL
    one = write_labels(tmp_path / "b.h5", logits_of(*ROWS), val=val, unreadable=[3], arch="one", **more)
    more |= {"classes": ["cat", "ant", "bee"], "teacher": "/u.pt", "teacher_sha256": "b" * 64}
    val = np.roll(val[0], 1, axis=1), (np.array(VAL_LABEL) + 1) % 3
    two = write_labels(tmp_path / "a.h5", np.roll(logits_of(*ROWS), 1, axis=1), val=val, **more)
    assert run(two, one, "--out", tmp_path / "o.h5", "--per-class", "all").returncode == 0
    file, columns = open_label_file(tmp_path / "o.h5"), read_labels(tmp_path / "o.h5")
    assert columns["path"].tolist() == [b"0.png", b"1.png", b"2.png"], "above 0.55 in both"
    assert [file.classes[c] for c in columns["label"]] == ["ant", "bee", "ant"]
    np.testing.assert_allclose(columns["confidence"], [0.95, 0.9, 0.8], atol=1e-3)
    expected = {"threshold": 0.55, "arch": "one"}  # arch: of the file that was named last
    expected |= {"teacher": '["/u.pt", "/t.pt"]', "teacher_sha256": json.dumps(["b" * 64, "a" * 64])}
    assert expected.items() <= file.attrs.items()
    assert [file.classes[c] for c in columns["val_label"]] == [CLASSES[c] for c in VAL_LABEL]
    np.testing.assert_allclose(np.exp(columns["val_logits"]).sum(1), [1 / p for _, p in VAL], rtol=1e-2)


def test_what_neither_fits_nor_differs_is_a_mistake(tmp_path, run):
    names, logits = ["0.png", "1.png"], logits_of((0, 0.9), (1, 0.8))
    first = write_labels(tmp_path / "first.h5", logits, names=names)
    dog = ["ant", "bee", "dog"]
    wrong = [
        {"names": names},
        {"names": names, "classes": dog, "teacher_sha256": "b" * 64},
        {"names": ["1.png", "2.png"]},
        {"names": ["a.png", "unlabeled/1.png"], "root": "/data"},
        {"teacher_sha256": "b" * 64},
        {"precision": "bf16"},
        {"crop_mode": "squash"},
        {"classes": CLASSES[::-1]},
    ]
    for how in wrong:
        second = write_labels(tmp_path / "second.h5", logits, **how)
        assert_mistake(run(first, second, "--out", tmp_path / "o.h5"), "first.h5", "second.h5")
    assert_mistake(run(first, first, "--out", tmp_path / "o.h5"), "first.h5")
    assert not (tmp_path / "o.h5").exists()


def test_what_top_p_writes(tmp_path, run):
    """It does not use --threshold, needs a number --per-class, and is no input."""
    labels, out = write_labels(tmp_path / "l.h5", logits_of(*ROWS)), tmp_path / "o.h5"
    flags = [labels, "--out", out, "--method", "top-p", "--top-p", 1, "--threshold", 0.99]
    assert run(*flags, "--per-class", 1).returncode == 0
    columns, attrs = read_labels(out), open_label_file(out).attrs
    assert columns["path"].tolist() == [b"l/000.png", b"l/001.png", b"l/003.png"]
    assert columns["label"].tolist() == [0, 1, 2] and "logits" not in columns
    assert attrs["method"] == "top-p" and attrs["top_p"] == 1
    assert_mistake(run(out, "--out", tmp_path / "again.h5"), "o.h5")
    for per_class in ([], ["--per-class", "all"]):
        assert_mistake(run(*flags, *per_class), "--per-class")


def test_auto_per_class_is_the_lower_median_of_what_is_not_empty(tmp_path, run):
    rows = [(0, 0.9)] * 7 + [(1, 0.9)] * 2
    labels, out = write_labels(tmp_path / "l.h5", logits_of(*rows)), tmp_path / "o.h5"

    def copies(source, *flags):
        assert run(source, "--out", out, *flags).returncode == 0
        return read_labels(out)["copies"].tolist()

    assert copies(labels) == [1] * 4 and open_label_file(out).attrs["per_class"] == 2
    assert copies(labels, "--per-class", "all") == [1] * 9
    assert open_label_file(out).attrs["per_class"] == "all"
    many = write_labels(tmp_path / "many.h5", np.zeros((130_500, 1)), classes=["a"])
    assert len(copies(many)) == 130_000, "the paper's"
    selection = write_labels(tmp_path / "s.h5", logits_of(*rows[:2]), copies=np.array([5, 2], np.uint32))
    assert copies(selection, "--per-class", "all") == [1, 1], "copies of an input are not used"


def test_a_mistake_replaces_nothing(tmp_path, run):
    labels, out = write_labels(tmp_path / "l.h5", logits_of(*ROWS)), tmp_path / "o.h5"
    assert run(labels, "--out", out).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in (labels, tmp_path / "x" / ".." / "l.h5", tmp_path / "o.json", tmp_path):
        assert_mistake(run(labels, "--out", name), "--out", name)
    wrong = ["--per-class 0", "--per-class many", "--threshold nan", "--threshold -1", "--top-p 0"]
    for flags in (*wrong, "--threshold 0.99", "--truth none.csv"):
        assert_mistake(run(labels, "--out", out, *flags.split()), flags.split()[0])
    truth = tmp_path / "t.csv"
    for text in ("file,class\nl/000.png,ant", "name,class\nx.png,ant", "name,class\nl/000.png,dog"):
        truth.write_text(text)
        assert_mistake(run(labels, "--out", out, "--truth", truth), "t.csv")
    truth.unlink()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_truth_measures_and_never_chooses(tmp_path, run):
    """Labels: ant bee ant cat bee; above 0.55 all but the last."""
    labels = write_labels(tmp_path / "l.h5", logits_of(*ROWS))
    truth = tmp_path / "t.csv"  # with the mark that Excel writes
    lines = "l/000.png,ant\nl/001.png,cat\nl/002.png,\nl/004.png,bee\nelsewhere.png,ant\n"
    truth.write_text(f"\ufeffname,class\n{lines}")
    flags = [labels, "--out", tmp_path / "o.h5", "--threshold", 0.55, "--per-class", "all"]
    assert run(*flags).returncode == 0
    before = (tmp_path / "o.h5").read_bytes()
    assert run(*flags, "--truth", truth).returncode == 0
    assert (tmp_path / "o.h5").read_bytes() == before
    assert report_of(tmp_path / "o.h5")["truth"] == {"accuracy_before": 66.67, "accuracy_after": 50}


@pytest.mark.parametrize("num_classes", [2, 10, 81, 1000])
def test_the_picture_shows_images_of_a_few_classes(num_classes, tmp_path, call_main, monkeypatch):
    for i in range(19):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"{i}.png")
    names = [*(f"{i}.png" for i in range(19)), "gone.png"]
    classes = [f"class {c}" for c in range(num_classes)]
    logits = 9 * np.eye(num_classes)[np.random.default_rng(0).integers(0, num_classes, 20)]
    labels = write_labels(tmp_path / "l.h5", logits, tmp_path, names, classes)
    figures = []
    monkeypatch.setattr(balance, "save_figure", lambda plt, path: figures.append(plt.gcf()))
    flags = [labels, "--out", tmp_path / "o.h5", "--per-class", "all"]
    assert call_main("03_balance", *flags).returncode == 0
    sheet = figures[0].axes[2]
    middles = sheet.images[0].get_array()[33::66, 33::66]
    assert 7 <= (middles == [255, 0, 0]).all(-1).sum() <= 19 and len(sheet.get_yticks()) <= 8


def test_as_a_user_runs_it(tmp_path, labels, run_stage):
    out = tmp_path / "out" / "balanced.h5"
    run_stage(ROOT / "03_balance.py", labels, "--out", out, launcher="python")
    written = sorted(path.name for path in out.parent.iterdir())
    assert written == ["balanced.h5", "balanced.json", "balanced.png"]
    Image.open(out.with_suffix(".png")).verify()
