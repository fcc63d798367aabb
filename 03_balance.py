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

from common import (
    LOGITS_FORMAT,
    SELECTION_FORMAT,
    argument_parser,
    at_least,
    fail,
    image_rows,
    map_dataset,
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


def repeat_evenly(num: int, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `num` images is used so that the sum is `per_class`: copies differ by at most one."""
    copies = np.full(num, per_class // num)
    copies[rng.permutation(num)[: per_class % num]] += 1
    return copies


def most_confident(score: np.ndarray, order: np.ndarray, num: int) -> np.ndarray:
    """Indices of the `num` highest scores; ties go to the lower `order`."""
    return np.lexsort((order, -score))[:num]


def select_noisy_student(label, confidence, num_classes: int, threshold: float, per_class: int | None, seed: int):
    """The paper's rule: (index of each example, examples a class) from label and confidence in (file, row) order."""
    candidate = np.flatnonzero(confidence > np.float32(threshold))
    sizes = np.bincount(label[candidate], minlength=num_classes)
    if per_class is None:
        present = np.sort(sizes[sizes > 0])
        per_class = int(min(present[(len(present) - 1) // 2], PAPER_PER_CLASS)) if len(present) else 0
    chosen = [np.zeros(0, np.int64)]
    for c in np.flatnonzero(sizes):
        mine = candidate[label[candidate] == c]
        mine = mine[most_confident(confidence[mine], mine, per_class)]
        copies = repeat_evenly(len(mine), per_class, np.random.default_rng([seed, c]))
        chosen.append(np.repeat(mine, copies))
    return np.concatenate(chosen), per_class


def select_top_p(logits: list[np.ndarray], num_classes: int, top_p: int, per_class: int):
    """Yalniz et al.'s rule, reading the logits in chunks. (index, label, probability) of each example."""
    kept = [(np.zeros(0, np.float32), np.zeros(0, np.int64))] * num_classes
    first = 0
    for part in logits:
        for begin in range(0, len(part), 1 << 14):
            chunk = np.asarray(part[begin : begin + (1 << 14)], dtype=np.float32)
            probs = np.exp(chunk - chunk.max(1, keepdims=True))
            probs /= probs.sum(1, keepdims=True)
            best = np.argsort(-probs, axis=1, kind="stable")[:, :top_p]
            score = np.take_along_axis(probs, best, 1).ravel()
            rows = np.repeat(np.arange(first, first + len(chunk)), best.shape[1])
            best = best.ravel()
            readable = np.isfinite(score)
            for c in np.unique(best[readable]):
                mine = readable & (best == c)
                scores, indices = np.append(kept[c][0], score[mine]), np.append(kept[c][1], rows[mine])
                top = most_confident(scores, indices, per_class)
                kept[c] = scores[top], indices[top]
            first += len(chunk)
    index = np.concatenate([indices for _, indices in kept])
    label = np.repeat(np.arange(num_classes), [len(indices) for _, indices in kept])
    return index, label, np.concatenate([scores for scores, _ in kept])


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


def accuracy_report(true: np.ndarray, index: np.ndarray, label: np.ndarray, status: np.ndarray) -> dict:
    """Accuracy of the labels and the share of images of no class, before (all labelled) and after the selection."""
    before = np.flatnonzero((true != UNKNOWN) & (status == 1))
    after = index[true[index] != UNKNOWN]
    unique = np.unique(after)

    def share(good):
        return round(100 * float(np.mean(good)), 2) if len(good) else None

    in_class, no_class = before[true[before] >= 0], before[true[before] == NO_CLASS]
    kept = unique[true[unique] >= 0]
    report = {
        "accuracy_before": share(label[in_class] == true[in_class]),  # of images that are of a class
        "accuracy_after": share(label[kept] == true[kept]),
        "accuracy_of_examples": share(label[after] == true[after]),  # images of no class count as wrong, copies count
        "passed_in_class": share(np.isin(in_class, unique)),
    }
    if len(no_class):
        report["passed_no_class"] = share(np.isin(no_class, unique))
    return report


def draw(path: Path, files, file, row, label, confidence, classes, report, threshold) -> None:
    """Class sizes before and after, the confidences, and the most confident images of each class."""
    if (plt := pyplot()) is None:
        return
    shown = sorted(range(len(classes)), key=lambda c: -report["classes"][classes[c]]["candidates"])
    shown = shown if len(shown) <= 40 else shown[:20] + shown[-20:]  # the fattest and the thinnest
    figure = plt.figure(figsize=(12, 4 + 0.55 * len(shown)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3.5, 0.55 * len(shown)])
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
    everything = np.concatenate([f["confidence"][:] for f in files])
    axis.hist(everything[np.isfinite(everything)], bins=50, range=(0, 1), label="all")
    first_copy = np.unique(np.stack([file.astype(np.int64), row]), axis=1, return_index=True)[1]
    axis.hist(confidence[first_copy], bins=50, range=(0, 1), label="kept")
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle=":", label=f"threshold {threshold:g}")
    axis.set_xlabel("confidence")
    axis.set_ylabel("images")
    axis.legend(frameon=False)
    columns = 16
    sheet = grid[1].subgridspec(len(shown), columns)
    for line, c in enumerate(shown):
        mine = first_copy[label[first_copy] == c]
        mine = mine[np.argsort(-confidence[mine], kind="stable")][:columns]
        for column in range(columns):
            axis = figure.add_subplot(sheet[line, column])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(classes[c], rotation=0, ha="right", va="center")
            if column >= len(mine):
                continue
            i, r = int(file[mine[column]]), int(row[mine[column]])
            f = files[i]
            try:
                axis.imshow(image_rows(f).load(r).resize((64, 64)))
            except OSError:  # moved or removed since it was labelled: the cell stays empty
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
    files = [open_label_file(path, LOGITS_FORMAT) for path in paths]
    classes = read_classes(files[0])
    for path, file in zip(paths, files, strict=True):
        if read_classes(file) != classes:
            fail(f"{path} has other classes than {paths[0]}: label both with one teacher")
        if file.attrs["teacher_sha256"] != files[0].attrs["teacher_sha256"]:
            fail(f"{path} was made by another teacher than {paths[0]}: label both with one teacher")
        if todo := int((file["status"][:] == 0).sum()):
            fail(f"{path} is unfinished: {todo} of {len(file['status'])} images have no label yet; run 02 again on it")
    label, confidence, status = (np.concatenate([f[k][:] for f in files]) for k in ("label", "confidence", "status"))
    starts = np.cumsum([0, *(len(f["label"]) for f in files)])
    if args.truth:
        names = [os.fsdecode(path) for f in files for path in f["path"][:].tolist()]
        true = read_truth(args.truth, names, classes)

    # select
    if args.method == "noisy-student":
        index, per_class = select_noisy_student(label, confidence, len(classes), args.threshold, per_class, args.seed)
        index = np.sort(index)
        chosen_label, chosen_confidence = label[index], confidence[index]
    else:
        logits = [map_dataset(file, "logits") for file in files]
        index, chosen_label, chosen_confidence = select_top_p(logits, len(classes), args.top_p, per_class)
        order = np.lexsort((chosen_label, index))
        index, chosen_label, chosen_confidence = index[order], chosen_label[order], chosen_confidence[order]
    if not len(index):
        fail(f"--threshold {args.threshold:g} leaves no image: the highest confidence is {np.nanmax(confidence):.3f}")
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
    done = status == 1
    above = done & (confidence > np.float32(args.threshold))
    unique, copies = np.unique(np.stack([index, chosen_label]), axis=1, return_counts=True)
    report = {
        "method": args.method,
        "threshold": args.threshold,
        "per_class": per_class,
        "images": int(done.sum()),
        "above_threshold": int(above.sum()),
        "examples": len(index),
        "unique_images": len(np.unique(index)),
        "empty_classes": [name for c, name in enumerate(classes) if not (chosen_label == c).any()],
        "classes": {},
    }
    for c, name in enumerate(classes):
        mine = unique[1] == c
        report["classes"][name] = {
            "candidates": int((label[done] == c).sum()),
            "above_threshold": int((label[above] == c).sum()),
            "kept": int(mine.sum()),
            "examples": int((chosen_label == c).sum()),
            "most_copies": int(copies[mine].max(initial=0)),
            "lowest_confidence": float(chosen_confidence[chosen_label == c].min(initial=1)),
        }
    if args.truth:
        predicted = label.copy()
        if args.method == "top-p":
            predicted[index[::-1]] = chosen_label[::-1]
        report["truth"] = accuracy_report(true, index, predicted, status)
    with write_atomically(args.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    threshold = args.threshold if args.method == "noisy-student" else None
    draw(
        args.out.with_suffix(".png"),
        files,
        file_number,
        row,
        chosen_label,
        chosen_confidence,
        classes,
        report,
        threshold,
    )
    sizes = np.bincount(chosen_label, minlength=len(classes))
    print(
        f"{args.out}: {report['images']} images, {report['above_threshold']} above {args.threshold:g}, "
        f"{report['unique_images']} kept as {len(index)} examples, {sizes[sizes > 0].min()} to {sizes.max()} a class"
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
    if not text.isdigit() or int(text) < 1:
        fail(f"--per-class {text}: expected auto or a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
