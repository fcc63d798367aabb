"""Stage 03: keep the images that the teacher is sure of, the same number of every class.

noisy-student (1911.04252, section 3): of the images whose confidence max_c p_c is above the threshold, the K most
confident of each class; the images of a class with fewer are repeated evenly to exactly K. Most images of low
confidence belong to none of the classes. From unequal numbers the student would learn that some classes are rare.

top-p (Yalniz et al., 1905.00546): each image counts for its P most probable classes, and each class keeps its K
highest-scoring images, with that class as the hard label. So an image may stand under several classes.

reads   one or more logits.h5 of one teacher; --truth: a CSV `name,class` to measure the labels with, never to choose
writes  balanced.h5 (one row a training example), balanced.json (counts), balanced.png

    python 03_balance.py runs/logits.h5 --out runs/balanced.h5 --threshold 0.3
    python 03_balance.py runs/logits.h5 --out runs/balanced.h5 --method top-p --per-class 16000

10 million images x 100 classes on 2 CPU cores, pictures included: 8.3 s, 2.3 of them Python's start (median of 5).
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch

from common import argument_parser, at_least, fail, is_rank0, print0, write_atomically  # the program
from common import DONE, LOGITS_FORMAT, SELECTION_FORMAT, TODO  # label files
from common import NO_CLASS, UNKNOWN, draw_fraction, image_list, open_label_file, read_classes, read_truth
from common import CAPTION, SHEET, SHEET_LEFT, SIDE, draw_sheet, pyplot, save_figure  # pictures


def word_or_number(text: str) -> str | int:
    return text if text in ("auto", "all") else at_least(1, int)(text)


def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0, and at most 1")
    return float(text)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("logits", type=Path, nargs="+", help="logits files of one teacher; their order changes nothing")
    add("--out", type=Path, required=True, help="the selection, balanced.h5; .json and .png are written beside it")
    add("--method", choices=["noisy-student", "top-p"], default="noisy-student", help="top-p: the billion-scale one")
    add("--threshold", type=at_least(0), default=0.3, help="keep confidence above it; the paper's, for 1,000 classes")
    add("--per-class", type=word_or_number, default="auto", help="K; auto: lower median, <= 130,000; all: no balance")
    add("--max-confidence", type=share, default=1.0, help="keep confidence up to it, for studies of unsure images")
    add("--fraction", type=share, default=1.0, help="share of the images, by the hash of path and seed: 0.1 is in 0.2")
    add("--top-p", type=at_least(1, int), default=10, help="classes an image may count for, with --method top-p")
    add("--truth", type=Path, help="CSV `name,class` of the unlabelled images; an empty class is none of the classes")
    add("--seed", type=at_least(0, int), default=0, help="of the extra copies and of --fraction")
    return parser.parse_args()


def in_chunks(*columns: list, num_rows: int):
    """(number of the first row, a slice of each column), file after file; a column is a list of the files' datasets."""
    first = 0
    for parts in zip(*columns, strict=True):
        for begin in range(0, len(parts[0]), num_rows):
            yield first + begin, *(part[begin : begin + num_rows] for part in parts)
        first += len(parts[0])


class Examples(NamedTuple):
    """The selection: one entry a training example, sorted by (file, row, label)."""

    file: np.ndarray  # uint16: number of the logits file
    row: np.ndarray  # int64: row of that file
    label: np.ndarray  # int32
    confidence: np.ndarray  # float32
    index: np.ndarray  # int64: the row, if all files were one
    is_first: np.ndarray  # bool: not a copy of the example before it


def open_inputs(args: argparse.Namespace) -> tuple[list[str], list[h5py.File], list[str]]:
    """(paths, files, classes): finished logits files of one teacher, sorted by path."""
    paths = sorted({os.path.abspath(path) for path in args.logits})  # the order of the arguments changes nothing
    if not args.out.name or args.out.is_dir():
        fail(f"--out {args.out} is a folder, expected the name of a file")
    outs = [os.path.realpath(args.out.with_suffix(suffix)) for suffix in (args.out.suffix, ".json", ".png")]
    if args.out.suffix in (".json", ".png") or {os.path.realpath(path) for path in paths} & set(outs):
        fail(f"--out {args.out}: it, or the .json and .png beside it, would replace each other or the input")
    files = [open_label_file(path, LOGITS_FORMAT) for path in paths]
    classes = read_classes(files[0])
    for path, file in zip(paths, files, strict=True):
        if read_classes(file) != classes:
            fail(f"{path} has other classes than {paths[0]}: label both with one teacher")
        if file.attrs["teacher_sha256"] != files[0].attrs["teacher_sha256"]:
            fail(f"{path} was made by another teacher than {paths[0]}: label both with one teacher")
        if todo := (file["status"][:] == TODO).sum():
            fail(f"{path} is unfinished: {todo} of {len(file['status'])} images have no label yet; run 02 again on it")
    return paths, files, classes


def is_between(confidence: np.ndarray, low: float, high: float) -> np.ndarray:
    """Above `low` and up to `high`, in float32; the NaN of an unreadable image is not."""
    return (confidence > np.float32(low)) & (confidence <= np.float32(high))


def count(paths: list, label: list, confidence: list, status: list, num_classes: int, limits: tuple[float, float]):
    """({what: images of each class}, histogram of the confidences, the highest); a damaged file ends the program."""
    candidates, above, histogram = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64), np.zeros(50, int)
    best, starts = 0.0, np.cumsum([0, *map(len, label)])
    for first, labels, scores, statuses in in_chunks(label, confidence, status, num_rows=1 << 20):
        done = statuses == DONE
        labels, readable = labels[done], scores[done]
        fits = ((labels >= 0) & (labels < num_classes) & ~np.isnan(readable)).all() and np.isnan(scores[~done]).all()
        if not fits:
            path = paths[np.searchsorted(starts, first, side="right") - 1]
            fail(f"{path} is damaged: labels, confidences and status do not fit together; run 02 again to a new file")
        candidates += np.bincount(labels, minlength=num_classes)
        above += np.bincount(labels[is_between(readable, *limits)], minlength=num_classes)
        histogram += np.histogram(readable, len(histogram), (0, 1))[0]
        best = max(best, readable.max(initial=0))
    return {"candidates": candidates, "above_threshold": above}, histogram, best


def highest(score: np.ndarray, num: int) -> np.ndarray:
    """The positions, ascending, of the `num` highest scores. Of equal scores the first ones count."""
    if len(score) <= num:
        return np.arange(len(score))
    least = np.partition(score, len(score) - num)[len(score) - num]
    chosen = score > least
    chosen[np.flatnonzero(score == least)[: num - chosen.sum()]] = True
    return np.flatnonzero(chosen)


class BestOfClasses:
    """The `per_class` highest scores of each class, of entries that come in chunks: memory O(classes x per_class).

    The index of the entries must ascend, within a chunk and from chunk to chunk: ties go to the lower index.
    """

    def __init__(self, num_classes: int, per_class: int):
        self.num_classes, self.per_class = num_classes, per_class
        self.cutoff = np.full(num_classes, -np.inf, np.float32)  # of a full class: only higher scores get in
        self.chunks = [(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64))]  # [0]: the best so far
        self.num_new = 0

    def add(self, label: np.ndarray, score: np.ndarray, index: np.ndarray) -> None:
        self.chunks.append((label, score, index))
        self.num_new += len(label)
        if self.num_new > max(1 << 18, len(self.chunks[0][0])):
            self.best()

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(label, score, index) of all that is kept, class after class, the index ascending in each."""
        label, score, index = (np.concatenate(parts) for parts in zip(*self.chunks, strict=True))
        # numpy sorts 16 bits by radix, 5 times as fast
        order = np.argsort(label.astype(np.int16) if self.num_classes < 1 << 15 else label, kind="stable")
        ends = np.cumsum(np.bincount(label, minlength=self.num_classes))
        kept = []
        for c, of_class in enumerate(np.split(order, ends[:-1])):
            of_class = of_class[highest(score[of_class], self.per_class)]
            if len(of_class) == self.per_class:
                self.cutoff[c] = score[of_class].min()
            kept.append(of_class)
        kept = np.concatenate(kept)
        self.chunks, self.num_new = [(label[kept], score[kept], index[kept])], 0
        return self.chunks[0]


def repeat_evenly(num: int, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `num` images is used so that the sum is `per_class`: copies differ by at most one."""
    copies = np.full(num, per_class // num)
    copies[rng.permutation(num)[: per_class % num]] += 1
    return copies


def auto_per_class(sizes: np.ndarray) -> int:
    """The lower median of the sizes of the classes that are not empty, at most the paper's 130,000."""
    present = np.sort(sizes[sizes > 0])
    return int(min(present[(len(present) - 1) // 2], 130_000)) if len(present) else 0


def select_noisy_student(
    label: list, confidence: list, num_classes: int, threshold: float, per_class: int, seed: int, max_confidence=1.0
):
    """The paper's rule: (index, label, confidence) of each example, from the files' columns of these names.

    `per_class` 0: no balance, each image above the threshold once.
    """
    best = BestOfClasses(num_classes, per_class or sum(map(len, label)))
    for first, labels, scores in in_chunks(label, confidence, num_rows=1 << 20):
        rows = np.flatnonzero(is_between(scores, threshold, max_confidence))
        rows = rows[scores[rows] > best.cutoff[labels[rows]]]
        best.add(labels[rows], scores[rows], first + rows)
    labels, scores, index = best.best()
    if not per_class:
        return index, labels, scores
    sizes = np.bincount(labels, minlength=num_classes)
    copies = [repeat_evenly(sizes[c], per_class, np.random.default_rng([seed, c])) for c in np.flatnonzero(sizes)]
    copies = np.concatenate([np.zeros(0, np.int64), *copies])
    return np.repeat(index, copies), np.repeat(labels, copies), np.repeat(scores, copies)


def select_top_p(logits: list, status: list, num_classes: int, top_p: int, per_class: int):
    """Yalniz et al.'s rule: (index, label, probability) of each example, from the files' logits."""
    best, top_p = BestOfClasses(num_classes, per_class), min(top_p, num_classes)
    num_rows = max(1, (1 << 19) // num_classes)  # 2 MB in float32: a cache's size
    for first, chunk, statuses in in_chunks(logits, status, num_rows=num_rows):
        probs = torch.from_numpy(chunk).softmax(1, dtype=torch.float32)
        # Soon few rows still reach the cutoff of a class.
        reaches = (probs - torch.from_numpy(best.cutoff)).amax(1) > 0
        rows = (reaches & torch.from_numpy(statuses == DONE)).nonzero()[:, 0]
        probs = probs[rows]
        if num_classes < 64 * top_p:  # above that, torch is faster
            least = np.partition(probs.numpy(), num_classes - top_p, 1)[:, num_classes - top_p]
        else:
            least = probs.topk(top_p, sorted=False).values.amin(1).numpy()
        probs = probs.numpy()
        row, label = np.divmod(np.flatnonzero((probs >= least[:, None]) & (probs > best.cutoff)), num_classes)
        score = probs[row, label]
        edge = np.flatnonzero(score == least[row])  # the P-th most probable: of several with this score the first count
        tied, place = np.unique(row[edge], return_inverse=True)
        more, equal = (probs[tied] > least[tied, None]), (probs[tied] == least[tied, None])
        is_top = equal.cumsum(1) <= top_p - more.sum(1, keepdims=True)
        counts = np.ones(len(row), dtype=bool)
        counts[edge] = is_top[place, label[edge]]
        best.add(label[counts].astype(np.int32), score[counts], first + rows.numpy()[row[counts]])
    label, score, index = best.best()
    return index, label, score


def sorted_examples(index: np.ndarray, label: np.ndarray, confidence: np.ndarray, file_sizes: list[int]) -> Examples:
    order = np.lexsort((label, index))
    index, label, confidence = index[order], label[order], confidence[order]
    starts = np.cumsum([0, *file_sizes])
    file = np.searchsorted(starts, index, side="right") - 1
    is_first = np.append(True, (np.diff(index) != 0) | (np.diff(label) != 0))
    return Examples(file.astype(np.uint16), index - starts[file], label, confidence, index, is_first)


def describe(args: argparse.Namespace, per_class: int, classes: list[str], sizes: dict, examples: Examples) -> dict:
    """What balanced.json says. `sizes`: those before the selection, {what: (C,)}."""
    label, num_classes = examples.label, len(classes)
    kept, used = (np.bincount(labels, minlength=num_classes) for labels in (label[examples.is_first], label))
    lowest = np.ones(num_classes, np.float32)
    np.minimum.at(lowest, label, examples.confidence)
    columns = sizes | {"kept": kept, "copies": used - kept, "examples": used}
    columns = {what: nums.tolist() for what, nums in columns.items()}
    columns["lowest_confidence"] = [float(low) if num else None for low, num in zip(lowest, kept, strict=True)]
    report = {"method": args.method, "threshold": args.threshold, "per_class": per_class or "all"}
    report |= {"max_confidence": args.max_confidence, "fraction": args.fraction}
    report |= {"images": int(sizes["candidates"].sum()), "above_threshold": int(sizes["above_threshold"].sum())}
    report |= {"examples": len(label), "unique_images": 1 + int((np.diff(examples.index) != 0).sum())}
    report["empty_classes"] = [name for name, num in zip(classes, kept, strict=True) if not num]
    report["classes"] = {name: {what: values[c] for what, values in columns.items()} for c, name in enumerate(classes)}
    return report


def accuracy_report(true: np.ndarray, label: np.ndarray, done: np.ndarray, examples: Examples, classes: list) -> dict:
    """Accuracy of the labels in percent, of all labelled images and of the selection, and what passed it.

    An image of no class is counted apart: the teacher knows no such class. In `accuracy_of_examples` it is wrong.
    """
    known = done & (true != UNKNOWN)
    before, no_class = np.flatnonzero(known & (true >= 0)), np.flatnonzero(known & (true == NO_CLASS))
    true_after = true[examples.index]
    after = examples.is_first & (true_after >= 0)
    right_before, right_after = label[before] == true[before], (examples.label == true_after)[after]

    def share(good: np.ndarray):
        return round(100 * float(np.mean(good)), 2) if len(good) else None

    report = {
        "accuracy_before": share(right_before),
        "accuracy_after": share(right_after),
        "accuracy_of_examples": share((examples.label == true_after)[true_after != UNKNOWN]),
        "passed_in_class": share(np.isin(before, examples.index)),
        "classes": {},
    }
    label_before, label_after = label[before], examples.label[after]
    for c, name in enumerate(classes):
        parts = {"accuracy_before": right_before[label_before == c], "accuracy_after": right_after[label_after == c]}
        report["classes"][name] = {what: share(good) for what, good in parts.items()}
    if len(no_class):
        passed = np.isin(no_class, examples.index)
        report |= {"passed_no_class": share(passed), "num_no_class_passed": int(passed.sum())}
    return report


def draw(args: argparse.Namespace, files: list, classes: list, examples: Examples, report: dict, histogram) -> None:
    """Draw class sizes before and after, the confidences, and some images of each class; copies count once."""
    if (plt := pyplot()) is None:
        return
    sizes, examples = report["classes"], Examples(*(column[examples.is_first] for column in examples))
    shown = sorted(range(len(classes)), key=lambda c: -sizes[classes[c]]["candidates"])
    shown = shown if len(shown) <= 40 else shown[:20] + shown[-20:]  # those with the most images and the fewest
    names = [name if len(name) <= 32 else name[:31] + "…" for name in (classes[c] for c in shown)]
    sheet = draw_sheet([image_list(file) for file in files], examples, shown)

    # Every place is fixed, from the bottom left, in inches and then in shares: a layout engine would draw twice.
    dpi, angle = plt.rcParams["savefig.dpi"], 90 if len(names) > 12 else 30  # of the names of the classes
    names_height = 0.6 + 0.08 * max(map(len, names)) * np.sin(np.radians(angle))
    heights = np.array([sheet.height / dpi, names_height, 3])
    figure = plt.figure(figsize=(sheet.width / dpi, heights.sum()))
    sheet_height, _, height = heights / heights.sum()

    axis = figure.add_axes((0, 1 - height, 0.54, height))
    places = np.arange(len(shown))
    for shift, what in ((-0.3, "candidates"), (0, "above_threshold"), (0.3, "examples")):
        axis.bar(places + shift, [sizes[classes[c]][what] for c in shown], 0.3, label=what.replace("_", " "))
    axis.set_xticks(places, names, rotation=angle, ha="right", va="center", rotation_mode="anchor")

    axis = figure.add_axes((0.62, 1 - height, 0.38, height))
    edges = np.linspace(0, 1, len(histogram) + 1)
    axis.stairs(histogram, edges, fill=True, label="all")
    axis.stairs(np.histogram(examples.confidence, len(histogram), (0, 1))[0], edges, fill=True, label="kept")
    if args.method == "noisy-student":
        axis.axvline(args.threshold, color="black", linestyle=":", label=f"threshold {args.threshold:g}")
    axis.set_xlabel("confidence")
    for axis in figure.axes:
        axis.set_ylabel("images")
        axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))

    axis = figure.add_axes((0, 0, 1, sheet_height))
    axis.imshow(sheet, aspect="auto", interpolation="none")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_xticks([SHEET_LEFT[column] for column in np.cumsum([0, *SHEET.values()])[:-1]], SHEET, ha="left")
    axis.set_yticks(places * (SIDE + CAPTION) + SIDE / 2, names)
    save_figure(plt, args.out.with_suffix(".png"))


def main() -> None:
    args = parse_args()
    if not is_rank0():  # under torchrun one process does it
        return
    if args.method == "top-p" and args.per_class in ("auto", "all"):
        fail("--method top-p needs a number --per-class (the paper's is 16,000 of 100 million images)")
    if args.method == "top-p" and args.max_confidence < 1:
        fail("--max-confidence is for --method noisy-student: top-p does not look at the confidence")
    paths, files, classes = open_inputs(args)
    if args.method == "top-p" and args.top_p >= len(classes):
        print0(f"--top-p {args.top_p}: each image counts for all {len(classes)} classes; below 100 take 1 or 2")
    label, confidence, status = ([file[name] for file in files] for name in ("label", "confidence", "status"))
    if args.fraction < 1:
        confidence, status = draw_fraction(files, args.fraction, args.seed)
    limits = args.threshold, args.max_confidence
    sizes, histogram, highest_confidence = count(paths, label, confidence, status, len(classes), limits)
    true = read_truth(args.truth, files, classes) if args.truth else None

    words = {"auto": auto_per_class(sizes["above_threshold"]), "all": 0}
    per_class = words.get(args.per_class, args.per_class)
    if args.method == "noisy-student":
        if not sizes["above_threshold"].sum():
            fail(f"--threshold {args.threshold:g} leaves no image: the highest confidence is {highest_confidence:.3f}")
        columns = label, confidence, len(classes)
        chosen = select_noisy_student(*columns, args.threshold, per_class, args.seed, args.max_confidence)
    else:
        chosen = select_top_p([file["logits"] for file in files], status, len(classes), args.top_p, per_class)
    if not len(chosen[0]):
        fail(f"no image of {', '.join(paths)} is readable: there is nothing to select")
    examples = sorted_examples(*chosen, [len(part) for part in label])
    with write_atomically(args.out) as temporary, h5py.File(temporary, "w") as out:
        out["file"], out["row"] = examples.file, examples.row
        out["label"], out["confidence"] = examples.label, examples.confidence
        out.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        out.attrs.update(format=SELECTION_FORMAT, files=json.dumps(paths), method=args.method, threshold=args.threshold)
        flags = {name: getattr(args, name) for name in ("top_p", "seed", "max_confidence", "fraction")}
        out.attrs.update(per_class=per_class or "all", **flags)

    report = describe(args, per_class, classes, sizes, examples)
    if args.truth:
        labels, statuses = (np.concatenate([part[:] for part in column]) for column in (label, status))
        report["truth"] = accuracy_report(true, labels, statuses == DONE, examples, classes)
    with write_atomically(args.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    draw(args, files, classes, examples, report, histogram)

    used = [of_class["examples"] for of_class in report["classes"].values() if of_class["kept"]]
    print0(
        f"{args.out}: {report['images']} images, {report['above_threshold']} above {args.threshold:g}, "
        f"{report['unique_images']} kept as {report['examples']} examples, {min(used)} to {max(used)} a class"
    )
    if args.per_class == "auto":
        unused = np.maximum(sizes["above_threshold"] - per_class, 0).sum()
        why = f"K = {per_class} is the lower median of the classes that have images above the threshold"
        print0(f"{why}; {unused} images are more than their class's K, and are left out: --per-class says otherwise")
    if empty := report["empty_classes"]:
        words = "a lower --threshold, a better teacher or more images of them may help"
        print0(f"without any image above the threshold, and left out: {', '.join(empty[:10])}; {words}")
    if args.truth:
        truth = report["truth"]
        print0(
            f"pseudo-label accuracy {truth['accuracy_before']} percent before the filter, {truth['accuracy_after']} "
            f"after; {truth['passed_in_class']} percent of the images of a class passed"
            + (f", {truth['passed_no_class']} of those of no class" if "passed_no_class" in truth else "")
        )


if __name__ == "__main__":
    main()
