"""Stage 03: keep the images that the teacher is sure of, the same number of every class.

noisy-student (1911.04252, section 3): of the images whose confidence max_c p_c is above the threshold, the K most
confident of each class; a class with fewer has its images repeated evenly to exactly K. Low confidence mostly means
"none of the classes", and a long tail would be learned as a prior.

top-p (Yalniz et al., 1905.00546): each image counts for its P most probable classes, each class keeps its K
highest-scoring images, with that class as the hard label; an image may then stand under several classes.

reads   one or more logits.h5 of one teacher; --truth: a CSV `name,class` to measure the labels with, never to choose
writes  balanced.h5 (one row a training example), balanced.json (counts), balanced.png

    python 03_balance.py runs/logits.h5 --out runs/balanced.h5 --threshold 0.3
    python 03_balance.py runs/logits.h5 --out runs/balanced.h5 --method top-p --per-class 16000
"""

import argparse
import csv
import json
import os
from pathlib import Path

import h5py
import numpy as np
import torch

from common import (
    DONE,
    LOGITS_FORMAT,
    SELECTION_FORMAT,
    TODO,
    argument_parser,
    at_least,
    eval_view,
    fail,
    image_list,
    View,
    open_label_file,
    pyplot,
    read_classes,
    save_figure,
    write_atomically,
)

PAPER_PER_CLASS = 130_000


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("logits", type=Path, nargs="+", help="logits files of one teacher; their order changes nothing")
    add("--out", type=Path, required=True, help="the selection, balanced.h5; .json and .png are written beside it")
    add("--method", choices=["noisy-student", "top-p"], default="noisy-student", help="top-p is the billion-scale one")
    add("--threshold", type=at_least(0), default=0.3, help="keep confidence above it; chosen for 1,000 classes")
    add(
        "--per-class", default="auto", help="examples a class (paper: 130,000); auto: the lower median of what there is"
    )
    add("--top-p", type=at_least(1, int), default=10, help="classes an image may count for, with --method top-p")
    add("--truth", type=Path, help="CSV `name,class` of the unlabelled images; an empty class is none of the classes")
    add("--seed", type=at_least(0, int), default=0, help="of which images get the extra copy")
    return parser.parse_args()


def in_chunks(*columns: list, num_rows: int):
    """(number of the first row, a slice of each column), file after file; a column is a list of the files' datasets."""
    first = 0
    for parts in zip(*columns, strict=True):
        for begin in range(0, len(parts[0]), num_rows):
            yield first + begin, *(part[begin : begin + num_rows] for part in parts)
        first += len(parts[0])


def highest(score: np.ndarray, num: int) -> np.ndarray:
    """The positions, ascending, of the `num` highest scores; of equal scores those that come first."""
    if len(score) <= num:
        return np.arange(len(score))
    least = np.partition(score, len(score) - num)[len(score) - num]
    chosen = score > least
    chosen[np.flatnonzero(score == least)[: num - chosen.sum()]] = True
    return np.flatnonzero(chosen)


class BestOfClasses:
    """The `per_class` highest scores of each class, of entries that come in chunks: memory O(classes x per_class).

    The index of the entries must ascend, within a chunk and from one to the next: ties go to the lower one.
    """

    def __init__(self, num_classes: int, per_class: int):
        self.num_classes, self.per_class = num_classes, per_class
        self.cutoff = np.full(num_classes, -np.inf, np.float32)  # of a class that is full: only higher scores count
        self.chunks = [(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64))]  # the first: the best
        self.num_new = 0

    def add(self, label: np.ndarray, score: np.ndarray, index: np.ndarray) -> None:
        self.chunks.append((label, score, index))
        self.num_new += len(label)
        if self.num_new > max(1 << 18, len(self.chunks[0][0])):
            self.best()

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(label, score, index) of all that is kept, class after class, the index ascending in each."""
        label, score, index = (np.concatenate(parts) for parts in zip(*self.chunks, strict=True))
        # numpy sorts 16 bits by radix: 5 times as fast
        order = np.argsort(label.astype(np.int16) if self.num_classes < 1 << 15 else label, kind="stable")
        ends = np.cumsum(np.bincount(label, minlength=self.num_classes))
        kept = []
        for c, mine in enumerate(np.split(order, ends[:-1])):
            mine = mine[highest(score[mine], self.per_class)]
            if len(mine) == self.per_class:
                self.cutoff[c] = score[mine].min()
            kept.append(mine)
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
    return int(min(present[(len(present) - 1) // 2], PAPER_PER_CLASS)) if len(present) else 0


def select_noisy_student(label: list, confidence: list, num_classes: int, threshold: float, per_class: int, seed: int):
    """The paper's rule: (index, label, confidence) of each example, from the files' columns of these names."""
    best = BestOfClasses(num_classes, per_class)
    for first, labels, scores in in_chunks(label, confidence, num_rows=1 << 20):
        rows = np.flatnonzero(scores > np.float32(threshold))  # the NaN of unreadable images is not
        rows = rows[scores[rows] > best.cutoff[labels[rows]]]
        best.add(labels[rows], scores[rows], first + rows)
    labels, scores, index = best.best()
    sizes = np.bincount(labels, minlength=num_classes)
    copies = [repeat_evenly(sizes[c], per_class, np.random.default_rng([seed, c])) for c in np.flatnonzero(sizes)]
    copies = np.concatenate([np.zeros(0, np.int64), *copies])
    return np.repeat(index, copies), np.repeat(labels, copies), np.repeat(scores, copies)


def select_top_p(logits: list, num_classes: int, top_p: int, per_class: int):
    """Yalniz et al.'s rule: (index, label, probability) of each example, from the files' logits."""
    best, top_p = BestOfClasses(num_classes, per_class), min(top_p, num_classes)
    for first, chunk in in_chunks(logits, num_rows=max(1, (1 << 19) // num_classes)):  # 2 MB in float32: a cache's size
        probs = torch.from_numpy(chunk).softmax(1, dtype=torch.float32)
        # Soon few rows have a class in which they could still get in; those of unreadable images, NaN, have none.
        rows = ((probs - torch.from_numpy(best.cutoff)).amax(1) > 0).nonzero()[:, 0]
        probs = probs[rows]
        if num_classes < 64 * top_p:  # from there on torch's way is the faster one
            least = np.partition(probs.numpy(), num_classes - top_p, 1)[:, num_classes - top_p]
        else:
            least = probs.topk(top_p, sorted=False).values.amin(1).numpy()
        probs = probs.numpy()
        row, label = np.divmod(np.flatnonzero((probs >= least[:, None]) & (probs > best.cutoff)), num_classes)
        score = probs[row, label]
        edge = np.flatnonzero(score == least[row])  # the least probable ones that count; of equal ones, the first
        tied, place = np.unique(row[edge], return_inverse=True)
        more, equal = (probs[tied] > least[tied, None]), (probs[tied] == least[tied, None])
        is_top = equal.cumsum(1) <= top_p - more.sum(1, keepdims=True)
        counts = np.ones(len(row), dtype=bool)
        counts[edge] = is_top[place, label[edge]]
        best.add(label[counts].astype(np.int32), score[counts], first + rows.numpy()[row[counts]])
    label, score, index = best.best()
    return index, label, score


NO_CLASS, UNKNOWN = -1, -2  # in place of the number of the true class


def read_truth(path: Path, names: list[str], classes: list[str]) -> np.ndarray:
    """The number of each image's true class, NO_CLASS or UNKNOWN, from a CSV with the columns name and class."""
    try:
        with open(path, newline="") as file:
            truth = {line["name"]: line["class"] for line in csv.DictReader(file)}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        fail(f"--truth {path}: expected a CSV with the columns name,class ({type(error).__name__}: {error})")
    number = {name: c for c, name in enumerate(classes)}
    true = np.array([number.get(truth[name], NO_CLASS) if name in truth else UNKNOWN for name in names])
    if (true == UNKNOWN).all():
        fail(f"--truth {path}: none of its names is in the logits files")
    return true


def accuracy_report(true: np.ndarray, label: np.ndarray, done: np.ndarray, index, chosen_label, classes: list) -> dict:
    """Accuracy of the labels in percent, of all labelled images and of the selection, and what passed it.

    An image of no class is no error of the teacher, who knows none: it is counted apart, but in `accuracy_of_examples`.
    """
    known = done & (true != UNKNOWN)
    pairs = first_of_each(index, chosen_label)
    pairs &= true[index] != UNKNOWN

    def share(good, of=None):
        good = good if of is None else good[of]
        return round(100 * float(np.mean(good)), 2) if len(good) else None

    before = np.flatnonzero(known & (true >= 0))
    after, after_label = index[pairs & (true[index] >= 0)], chosen_label[pairs & (true[index] >= 0)]
    right_before, right_after = label[before] == true[before], after_label == true[after]
    examples = true[index] != UNKNOWN
    report = {
        "accuracy_before": share(right_before),
        "accuracy_after": share(right_after),
        "accuracy_of_examples": share((chosen_label == true[index])[examples]),
        "passed_in_class": share(np.isin(before, index)),
        "classes": {
            name: {
                "accuracy_before": share(right_before, label[before] == c),
                "accuracy_after": share(right_after, after_label == c),
            }
            for c, name in enumerate(classes)
        },
    }
    no_class = np.flatnonzero(known & (true == NO_CLASS))
    if len(no_class):
        passed = np.isin(no_class, index)
        report |= {"passed_no_class": share(passed), "num_no_class_passed": int(passed.sum())}
    return report


def first_of_each(index: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which examples, in the order of (index, label), are not a copy of the one before."""
    return np.append(True, (np.diff(index) != 0) | (np.diff(label) != 0))[: len(index)]


SHEET = {"most confident": 6, "median": 5, "least confident": 5}  # images of a class in the picture


def of_sheet(num: int) -> np.ndarray:
    """Which of `num` images, in the order of their confidence, are drawn: the first, those in the middle, the last."""
    first, middle, last = SHEET.values()
    if num <= first + middle + last:
        return np.arange(num)
    begin = (num - middle) // 2
    return np.unique(np.r_[:first, begin : begin + middle, num - last : num])


def draw(path: Path, files, file, row, label, confidence, classes, report, histogram, threshold) -> None:
    """Class sizes before and after, the confidences, and some images of each class; copies are drawn once."""
    if (plt := pyplot()) is None:
        return
    shown = sorted(range(len(classes)), key=lambda c: -report["classes"][classes[c]]["candidates"])
    shown = shown if len(shown) <= 40 else shown[:20] + shown[-20:]  # the fattest and the thinnest
    figure = plt.figure(figsize=(12, 4 + 0.6 * len(shown)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3.5, 0.6 * len(shown)])
    top = grid[0].subgridspec(1, 2)
    axis = figure.add_subplot(top[0])
    names = [classes[c] for c in shown]
    places = np.arange(len(shown))
    for shift, key in ((-0.3, "candidates"), (0, "above_threshold"), (0.3, "examples")):
        axis.bar(places + shift, [report["classes"][name][key] for name in names], 0.3, label=key.replace("_", " "))
    axis.set_xticks(places, names, rotation=90 if len(names) > 12 else 30)
    axis.set_ylabel("images")
    axis.legend(frameon=False)
    axis = figure.add_subplot(top[1])
    axis.stairs(histogram, np.linspace(0, 1, len(histogram) + 1), fill=True, label="all")
    axis.hist(confidence, bins=len(histogram), range=(0, 1), label="kept")
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle=":", label=f"threshold {threshold:g}")
    axis.set_xlabel("confidence")
    axis.set_ylabel("images")
    axis.legend(frameon=False)
    columns = sum(SHEET.values())
    sheet = grid[1].subgridspec(len(shown), columns)
    images = [image_list(file) for file in files]
    begins = dict(zip(np.cumsum([0, *SHEET.values()]).tolist(), SHEET, strict=False))
    for line, c in enumerate(shown):
        mine = np.flatnonzero(label == c)
        mine = mine[np.argsort(-confidence[mine], kind="stable")]
        mine = mine[of_sheet(len(mine))]
        for column in range(columns):
            axis = figure.add_subplot(sheet[line, column])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if line == 0 and column in begins:
                axis.set_title(begins[column], loc="left", fontsize="small")
            if column == 0:
                axis.set_ylabel(classes[c], rotation=0, ha="right", va="center")
            if column < len(mine):
                axis.set_xlabel(f"{confidence[mine[column]]:.2f}", fontsize="x-small", labelpad=1)
                try:
                    axis.imshow(eval_view(images[file[mine[column]]].load(int(row[mine[column]])), View(64, 1.0)))
                except Exception:  # moved, removed or damaged since it was labelled: the cell stays empty
                    continue
    save_figure(plt, path)


def main() -> None:
    args = parse_args()
    if int(os.environ.get("RANK", 0)) > 0:
        return  # under torchrun one process does it
    per_class = None if args.per_class == "auto" else at_least_one(args.per_class)
    if args.method == "top-p" and per_class is None:
        fail("--method top-p needs --per-class (the paper's is 16,000 of 100 million images)")

    # read; sorted by path first, so that the order of the arguments changes nothing
    paths = sorted({os.path.abspath(path) for path in args.logits})
    if not args.out.name or args.out.is_dir():
        fail(f"--out {args.out} is a folder, expected the name of a file")
    outs = [os.path.realpath(args.out.with_suffix(suffix)) for suffix in (args.out.suffix, ".json", ".png")]
    if args.out.suffix in (".json", ".png") or {os.path.realpath(path) for path in paths} & set(outs):
        fail(
            f"--out {args.out}: it, or the .json and .png beside it, would be written over each other or over the input"
        )
    files = [open_label_file(path, LOGITS_FORMAT) for path in paths]
    classes = read_classes(files[0])
    for path, file in zip(paths, files, strict=True):
        if read_classes(file) != classes:
            fail(f"{path} has other classes than {paths[0]}: label both with one teacher")
        if file.attrs["teacher_sha256"] != files[0].attrs["teacher_sha256"]:
            fail(f"{path} was made by another teacher than {paths[0]}: label both with one teacher")
        if todo := sum((part == TODO).sum() for _, part in in_chunks([file["status"]], num_rows=1 << 20)):
            fail(f"{path} is unfinished: {todo} of {len(file['status'])} images have no label yet; run 02 again on it")
    label, confidence, status = ([file[name] for file in files] for name in ("label", "confidence", "status"))
    starts = np.cumsum([0, *map(len, label)])

    # count
    candidates, above, histogram = np.zeros(len(classes), np.int64), np.zeros(len(classes), np.int64), np.zeros(50, int)
    highest_confidence = 0.0
    for first, labels, scores, statuses in in_chunks(label, confidence, status, num_rows=1 << 20):
        done = statuses == DONE
        labels, readable = labels[done], scores[done]
        fits = ((labels >= 0) & (labels < len(classes)) & ~np.isnan(readable)).all() and np.isnan(scores[~done]).all()
        if not fits:
            here = paths[np.searchsorted(starts, first, side="right") - 1]
            fail(f"{here} is damaged: labels, confidences and status do not fit together; run 02 again to a new file")
        candidates += np.bincount(labels, minlength=len(classes))
        above += np.bincount(labels[readable > np.float32(args.threshold)], minlength=len(classes))
        histogram += np.histogram(readable, len(histogram), (0, 1))[0]
        highest_confidence = max(highest_confidence, readable.max(initial=0))

    if args.truth:
        names = [os.fsdecode(path) for file in files for path in image_list(file).path.tolist()]
        true = read_truth(args.truth, names, classes)

    # select
    if args.method == "noisy-student":
        per_class = per_class or auto_per_class(above)
        if not per_class:
            fail(f"--threshold {args.threshold:g} leaves no image: the highest confidence is {highest_confidence:.3f}")
        chosen = select_noisy_student(label, confidence, len(classes), args.threshold, per_class, args.seed)
    else:
        chosen = select_top_p([file["logits"] for file in files], len(classes), args.top_p, per_class)
    order = np.lexsort((chosen[1], chosen[0]))
    index, chosen_label, chosen_confidence = (column[order] for column in chosen)
    if not len(index):
        fail(f"no image of {', '.join(paths)} is readable: there is nothing to select")
    file_number = (np.searchsorted(starts, index, side="right") - 1).astype(np.uint16)
    row = index - starts[file_number]

    # write
    with write_atomically(args.out) as temporary, h5py.File(temporary, "w") as out:
        out["file"], out["row"] = file_number, row.astype(np.int64)
        out["label"], out["confidence"] = chosen_label.astype(np.int32), chosen_confidence.astype(np.float32)
        out.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        out.attrs.update(
            format=SELECTION_FORMAT,
            files=json.dumps(paths),
            method=args.method,
            threshold=args.threshold,
            per_class=per_class,
            top_p=args.top_p,
            seed=args.seed,
        )

    # report
    is_first = first_of_each(index, chosen_label)
    kept, examples = (np.bincount(labels, minlength=len(classes)) for labels in (chosen_label[is_first], chosen_label))
    lowest = np.ones(len(classes), np.float32)
    np.minimum.at(lowest, chosen_label, chosen_confidence)
    report = {
        "method": args.method,
        "threshold": args.threshold,
        "per_class": per_class,
        "images": int(candidates.sum()),
        "above_threshold": int(above.sum()),
        "examples": len(index),
        "unique_images": 1 + int((np.diff(index) != 0).sum()),
        "empty_classes": [name for name, num in zip(classes, kept, strict=True) if not num],
        "classes": {
            name: {
                "candidates": int(candidates[c]),
                "above_threshold": int(above[c]),
                "kept": int(kept[c]),
                "copies": int(examples[c] - kept[c]),  # examples beyond the first of an image
                "examples": int(examples[c]),
                "lowest_confidence": float(lowest[c]) if kept[c] else None,
            }
            for c, name in enumerate(classes)
        },
    }
    if args.truth:
        labels, statuses = (np.concatenate([part[:] for part in column]) for column in (label, status))
        report["truth"] = accuracy_report(true, labels, statuses == DONE, index, chosen_label, classes)
    with write_atomically(args.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    threshold = args.threshold if args.method == "noisy-student" else None
    unique = (column[is_first] for column in (file_number, row, chosen_label, chosen_confidence))
    draw(args.out.with_suffix(".png"), files, *unique, classes, report, histogram, threshold)
    print(
        f"{args.out}: {report['images']} images, {report['above_threshold']} above {args.threshold:g}, "
        f"{report['unique_images']} kept as {len(index)} examples, "
        f"{examples[kept > 0].min()} to {examples.max()} a class"
    )
    if report["empty_classes"]:
        print(f"without any image, and left out: {', '.join(report['empty_classes'][:10])}")
    if args.truth:
        truth = report["truth"]
        print(
            f"pseudo-label accuracy {truth['accuracy_before']} percent before the filter, {truth['accuracy_after']} "
            f"after; {truth['passed_in_class']} percent of the images of a class passed"
            + (f", {truth['passed_no_class']} of those of no class" if "passed_no_class" in truth else "")
        )


def at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        fail(f"--per-class {text}: expected auto or a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
