"""Stage 03: keep the images that the teacher is sure of, the same number of every class.

noisy-student (1911.04252, section 3): of the images whose confidence max_c p_c is above the threshold, the K most
confident of each class; the images of a class with fewer are repeated evenly to exactly K. Most images of low
confidence belong to none of the classes. From unequal numbers the student would learn that some classes are rare.

top-p (Yalniz et al., 1905.00546): each image counts for its P most probable classes, and each class keeps its K
highest-scoring images, with that class as the hard label. So an image may stand under several classes.

--calibration: of the images of val so many are right above each threshold. --min-precision P takes the lowest at which
a share P is, of those that leave --min-share of val. It holds for images like val's, without outsiders and long tail.

reads   one or more logits.h5 of one teacher; --calibration: that of DATA/val; --truth: a CSV `name,class` to measure
        the labels with, never to choose
writes  balanced.h5 (one row a training example), balanced.json (counts, calibration), balanced.png

    python 03_balance.py runs/logits.h5 --out runs/balanced.h5 --threshold 0.3
    python 03_balance.py runs/logits.h5 --out runs/balanced.h5 --calibration runs/val.h5 --min-precision 0.9
    python 03_balance.py runs/logits.h5 --out runs/balanced.h5 --method top-p --per-class 16000

10 million images x 100 classes on 2 CPU cores, pictures included: 8.3 s, 2.3 of them Python's start (median of 5).
"""

import argparse
import json
import os
from pathlib import Path

import h5py
import numpy as np
import torch

from common import RATE, argument_parser, at_least, beside, fail, is_rank0, print0, write_atomically  # the program
from common import judged_half  # listing
from common import DONE, NO_CLASS, UNKNOWN, classes_of_folders, draw_fraction, image_list, in_chunks  # label files
from common import open_finished, read_classes, read_truth, slices
from common import BestOfClasses, Examples, examples_of, ranks, write_selection  # selections
from common import draw_selection  # pictures


def word_or_number(text: str) -> str | int:
    return text if text in ("auto", "all") else at_least(1, int, 2**31 - 1)(text)


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
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--threshold", type=RATE, default=0.3, help="keep confidence above it; 0.3: paper, 1,000 classes")
    one_of("--min-precision", type=share, help="the lowest threshold above which this share of --calibration is right")
    add("--min-share", type=share, help="for --min-precision: only thresholds above which this share of val is left")
    add("--calibration", type=Path, help="what 02 gives for DATA/val: how many are right above thresholds 0 to 0.99")
    add("--val-half", choices=["all", "choose"], default="all", help="of --calibration: all, or the half to choose on")
    add("--per-class", type=word_or_number, default="auto", help="K; auto: lower median, <= 130,000; all: no balance")
    add("--max-confidence", type=share, default=1.0, help="keep confidence up to it, for studies of unsure images")
    add("--fraction", type=share, default=1.0, help="share of the images, by the hash of path and seed: 0.1 is in 0.2")
    add("--top-p", type=at_least(1, int), default=10, help="classes an image may count for, with --method top-p")
    add("--truth", type=Path, help="CSV `name,class` of the unlabelled images; an empty class is none of the classes")
    add("--seed", type=at_least(0, int), default=0, help="of the extra copies and of --fraction")
    return parser.parse_args()


def open_inputs(args: argparse.Namespace) -> tuple[list[str], list[h5py.File]]:
    """(paths, files): finished logits files of one teacher, sorted by path; the last file is --calibration."""
    paths = sorted({os.path.realpath(path): os.path.abspath(path) for path in args.logits}.values())
    more = [str(args.calibration)] if args.calibration else []
    if not args.out.name or args.out.is_dir():
        fail(f"--out {args.out} is a folder, expected the name of a file")
    outs = map(os.path.realpath, (args.out, beside(args.out, ".json"), beside(args.out, ".png")))
    if args.out.suffix in (".json", ".png") or {os.path.realpath(path) for path in paths + more} & set(outs):
        fail(f"--out {args.out}: it, or the .json and .png beside it, would replace each other or the input")
    if {os.path.abspath(path) for path in more} & set(paths):
        fail(f"--calibration {args.calibration}: its images are held out, and it is to be selected from too")
    return paths, open_finished(paths + more)


def is_between(confidence: np.ndarray, low: float, high: float) -> np.ndarray:
    """Above `low` and up to `high`, in float32; the NaN of an unreadable image is not. 1 is no bound."""
    return (confidence > np.float32(low)) & (confidence <= np.float32(high if high < 1 else np.inf))


def count(paths: list, label: list, confidence: list, status: list, num_classes: int, limits: tuple[float, float]):
    """({what: number of each class}, histogram of the confidences); a damaged file ends the program."""
    candidates, above, histogram = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64), np.zeros(50, int)
    highest_of, starts = np.zeros(num_classes, np.float32), np.cumsum([0, *map(len, label)])
    for first, labels, scores, statuses in in_chunks(label, confidence, status, num_rows=1 << 20):
        done = statuses == DONE
        labels, readable = labels[done], scores[done]
        fits = (labels >= 0) & (labels < num_classes) & (readable >= 0) & (readable <= 1.001)  # not NaN, no percents
        if not (fits.all() and np.isnan(scores[~done]).all()):
            path, expected = paths[np.searchsorted(starts, first, side="right") - 1], "(0 to 1) and status do not fit"
            fail(f"{path} is damaged: labels, confidences {expected} together; run 02 again to a new file")
        candidates += np.bincount(labels, minlength=num_classes)
        above += np.bincount(labels[is_between(readable, *limits)], minlength=num_classes)
        histogram += np.histogram(readable, len(histogram), (0, 1))[0]
        np.maximum.at(highest_of, labels, readable)
    return {"candidates": candidates, "above_threshold": above, "highest_confidence": highest_of}, histogram


def wilson(num_right: int, num: int) -> list[float]:
    """Wilson's 95 percent interval of the share num_right / num: honest for few images, and near 0 and 1, too."""
    z2, share = 1.959964**2, num_right / num if num else 0.5
    middle, half = num_right + z2 / 2, (z2 * (share * (1 - share) * num + z2 / 4)) ** 0.5
    return [max((middle - half) / (num + z2), 0.0), min((middle + half) / (num + z2), 1.0)]


def answers_above(threshold: float, confidence: np.ndarray, right: np.ndarray) -> dict:
    """How many images of val are above a threshold, how many of those are right, the shares and their intervals."""
    kept = is_between(confidence, threshold, 1)
    num, num_right = int(kept.sum()), int(right[kept].sum())
    point = {"threshold": threshold, "kept": num, "share": num / len(kept), "share_interval": wilson(num, len(kept))}
    point |= {"right": num_right, "precision": num_right / num if num else None}
    return point | {"precision_interval": wilson(num_right, num)}


def choose_threshold(curve: list[dict], min_precision: float, min_share: float | None = None) -> tuple[dict, bool]:
    """The point with the lowest threshold at which so many are right, True; else with the largest share right, False.

    The share is largest where few are left, by luck: 20 images at least must be above it, if val has so many.
    """
    curve = [point for point in curve if point["share"] >= (min_share or 0)]
    reached = [point for point in curve if point["kept"] and point["precision"] >= min_precision]
    points = [point for point in curve if point["kept"] >= (20 if curve[0]["kept"] >= 20 else 1)]
    return (reached[0], True) if reached else (max(points, key=lambda point: point["precision"]), False)


def calibrate(args: argparse.Namespace, val: h5py.File, classes: list[str]) -> dict:
    """What balanced.json says of --calibration, after printing it; `at`: the point of the threshold that is used."""
    images, confidence = image_list(val), val["confidence"][:]
    true = classes_of_folders(images.path, classes)
    counts = (val["status"][:] == DONE) & (true != UNKNOWN) & is_between(confidence, 0, args.max_confidence)
    counts &= ~judged_half(images) if args.val_half == "choose" else True
    if not counts.any():
        words = f"{(true != UNKNOWN).sum()} of its {len(true)} images lie in folders of classes such as {classes[0]}/"
        fail(f"--calibration {args.calibration}: {words}, none of these counts; expected what 02 says of DATA/val")
    confidence, right = confidence[counts], (val["label"][:] == true)[counts]
    curve, wanted = [answers_above(step / 100, confidence, right) for step in range(100)], args.min_precision
    at, reached = answers_above(args.threshold, confidence, right), None
    if wanted:
        at, reached = choose_threshold(curve, wanted, args.min_share)

    def percent(point: dict, what: str) -> str:
        low, high = point[f"{what}_interval"]
        return f"{100 * point[what]:.1f} ({100 * low:.1f} to {100 * high:.1f})" if point["kept"] else "none"

    print0(f"{len(right)} images of val (--val-half {args.val_half}), percent with 95 percent intervals:")
    print0(f"above {'are so many':>21} {'of these right':>21}")
    for point, before in zip((*curve[::5], curve[-1]), (None, *curve[::5]), strict=True):
        if point["kept"] != (before and before["kept"]):  # otherwise all is as in the line before
            print0(f"{point['threshold']:5.2f} {percent(point, 'share'):>21} {percent(point, 'precision'):>21}")
    why = {True: f", the lowest that reaches --min-precision {wanted}", None: ""}
    why[False] = f", at which the largest share is right: --min-precision {wanted} is not reached"
    why[False] += f" with --min-share {args.min_share}" * bool(args.min_share)
    found = f"{at['right']} of {at['kept']} right, {percent(at, 'precision')} percent"
    found += ": so few images say little" if at["kept"] < 20 else ""
    print0(f"threshold {at['threshold']:g}{why[reached]}: {found}")
    report = {"file": os.path.abspath(args.calibration), "images": len(right), "val_half": args.val_half}
    return report | {"min_precision": wanted, "min_share": args.min_share, "reached": reached, "at": at, "curve": curve}


def repeat_evenly(num: int, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `num` images is used so that the sum is `per_class`: copies differ by at most one."""
    copies = np.full(num, per_class // num)
    copies[rng.permutation(num)[: per_class % num]] += 1
    return copies


def auto_per_class(sizes: np.ndarray) -> int:
    """The lower median of the sizes of the classes that are not empty, at most the paper's 130,000."""
    present = np.sort(sizes[sizes > 0])
    return int(min(present[(len(present) - 1) // 2], 130_000)) if len(present) else 0


def cutoffs(label: list, confidence: list, num_classes: int, limits: tuple[float, float], per_class: int):
    """Of each class: (the number of its confidences between the limits, the `per_class`-th highest, how many equal it).

    The last is the number that is kept of those that equal the cutoff. A class with fewer images has the cutoff 0.
    A float32 up to 1 is ordered as its 30 bits are. They are found ten at a time, the first ones first, by counting
    those whose earlier bits are the cutoff's. So the memory is a thousand counts a class, of any number of images.
    """
    bits, left, sizes = np.zeros(num_classes, np.uint32), np.full(num_classes, per_class), None
    for shift in (20, 10, 0):
        counts = np.zeros((num_classes, 1 << 10), np.int64)
        for _, labels, scores in in_chunks(label, confidence, num_rows=1 << 20):
            rows = np.flatnonzero(is_between(scores, *limits))
            labels, numbers = labels[rows], scores[rows].view(np.uint32) >> shift
            fits = numbers >> 10 == bits[labels]
            np.add.at(counts, (labels[fits], numbers[fits] & 1023), 1)
        so_high = counts[:, ::-1].cumsum(1)  # so many are in the last 1, 2, ... 1024 of the intervals
        if sizes is None:
            sizes = so_high[:, -1]
            is_full = sizes > per_class
        if not is_full.any():
            break
        higher = (so_high < left[:, None]).sum(1).clip(max=1023)  # so many intervals lie above the cutoff's
        left -= np.where(higher > 0, so_high[np.arange(num_classes), higher - 1], 0)
        bits = np.where(is_full, bits << 10 | (1023 - higher).astype(np.uint32), 0).astype(np.uint32)
    return sizes, bits.view(np.float32), left


def select_noisy_student(
    label: list, confidence: list, num_classes: int, threshold: float, per_class: int, seed: int, max_confidence=1.0
):
    """The paper's rule: (index, label, confidence) of each example, from the files' columns of these names.

    The columns are read five times, a chunk at a time, and the examples come in the order of the index. `per_class` 0:
    no balance, each image above the threshold once.
    """
    limits, columns = (threshold, max_confidence), (label, confidence)
    sizes, cutoff, num_equal = cutoffs(*columns, num_classes, limits, per_class or sum(map(len, label)))
    kept = np.minimum(sizes, per_class) if per_class else sizes
    begins, copies = np.cumsum(kept) - kept, np.ones(kept.sum() if per_class else 0, np.int32)
    for c in np.flatnonzero(kept) if per_class else ():
        rng = np.random.default_rng([seed, c])
        copies[begins[c] : begins[c] + kept[c]] = repeat_evenly(kept[c], per_class, rng)
    num = copies.sum() if per_class else kept.sum()
    examples = np.empty(num, np.int64), np.empty(num, np.int32), np.empty(num, np.float32)
    end, seen, seen_equal = 0, np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    for first, labels, scores in in_chunks(*columns, num_rows=1 << 20):
        rows = np.flatnonzero(is_between(scores, *limits))
        rows = rows[scores[rows] >= cutoff[labels[rows]]]
        equal = np.flatnonzero(scores[rows] == cutoff[labels[rows]])  # of these the first ones count
        of_equal = labels[rows[equal]]
        rows = np.delete(rows, equal[ranks(of_equal, seen_equal) >= num_equal[of_equal]])
        labels, scores = labels[rows], scores[rows]
        times = copies[begins[labels] + ranks(labels, seen)] if per_class else np.ones(len(rows), np.int32)
        begin, end = end, end + times.sum()
        for column, values in zip(examples, (first + rows, labels, scores), strict=True):
            column[begin:end] = np.repeat(values, times)
    return examples


def select_top_p(logits: list, status: list, num_classes: int, top_p: int, per_class: int):
    """Yalniz et al.'s rule: (index, label, probability) of each example in this order, from the files' logits."""
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
    order = np.lexsort((label, index))
    return index[order], label[order], score[order]


def describe(args, threshold: float, per_class: int, classes: list[str], sizes: dict, examples: Examples) -> dict:
    """What balanced.json says. `sizes`: those before the selection, {what: (C,)}."""
    label, num_classes = examples.label, len(classes)
    kept, used, lowest = *np.zeros((2, num_classes), np.int64), np.ones(num_classes, np.float32)
    for part in slices(len(label)):
        kept += np.bincount(label[part][examples.is_first[part]], minlength=num_classes)
        used += np.bincount(label[part], minlength=num_classes)
        np.minimum.at(lowest, label[part], examples.confidence[part])
    columns = sizes | {"kept": kept, "copies": used - kept, "examples": used}
    columns = {what: nums.tolist() for what, nums in columns.items()}
    columns["lowest_confidence"] = [float(low) if num else None for low, num in zip(lowest, kept, strict=True)]
    report = {"method": args.method, "threshold": threshold, "per_class": per_class or "all"}
    report |= {"max_confidence": args.max_confidence, "fraction": args.fraction}
    report |= {"images": int(sizes["candidates"].sum()), "above_threshold": int(sizes["above_threshold"].sum())}
    report |= {"examples": len(label), "unique_images": 1 + int((examples.index[1:] != examples.index[:-1]).sum())}
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
    label_before, label_after = label[before], examples.label[after]
    right_before, right_after = label_before == true[before], label_after == true_after[after]

    def percent(good: np.ndarray):
        return round(100 * float(np.mean(good)), 2) if len(good) else None

    def accuracies(of_before, of_after) -> dict:
        return {"accuracy_before": percent(right_before[of_before]), "accuracy_after": percent(right_after[of_after])}

    report = accuracies(slice(None), slice(None))
    report["accuracy_of_examples"] = percent((examples.label == true_after)[true_after != UNKNOWN])
    report["passed_in_class"] = percent(np.isin(before, examples.index))
    report["classes"] = {name: accuracies(label_before == c, label_after == c) for c, name in enumerate(classes)}
    if len(no_class):
        passed = np.isin(no_class, examples.index)
        report |= {"passed_no_class": percent(passed), "num_no_class_passed": int(passed.sum())}
    return report


def print_report(args: argparse.Namespace, report: dict, above: np.ndarray) -> None:
    """What was kept, where K comes from and what it costs, and what can be done for a class without any image."""
    classes, per_class = report["classes"], report["per_class"]
    used = [of_class["examples"] for of_class in classes.values() if of_class["kept"]]
    words = f"{args.out}: {report['images']} images, {report['above_threshold']} above {report['threshold']:g}, "
    words += f"{report['unique_images']} kept as {report['examples']} examples, {min(used)} to {max(used)} a class"
    print0(words)
    if args.method == "noisy-student" and per_class != "all":
        beyond, copies = np.maximum(above - per_class, 0).sum(), report["examples"] - report["unique_images"]
        why, order = "--per-class", np.argsort(above, kind="stable")[(above == 0).sum() :]  # without the empty classes
        if args.per_class == "auto":
            middle = order[(len(order) - 1) // 2]
            most = ", at most the paper's" if above[middle] > per_class else ""
            why = f"class {[*classes][middle]!r} is the lower median of {len(order)} with {above[order[0]]} to "
            why += f"{above[order[-1]]} images above the threshold{most}"
        words = f"{beyond} images beyond the K of their class are left out, {copies} copies fill smaller classes, "
        words += f"at most {-(-per_class // above[order[0]]) - 1} of one image"
        print0(f"K = {per_class}: {why}; {words} (--per-class says otherwise)")
    if empty := report["empty_classes"]:
        found = ((c, classes[c]["candidates"], classes[c]["highest_confidence"]) for c in empty)
        words = [f"{c} ({num} labelled so, the surest {best:.3f})" if num else f"{c} (0)" for c, num, best in found]
        below = "a threshold below the surest lets them in; " * (args.method != "top-p")
        print0(f"left out, without any image: {', '.join(words)}; {below}more labelled images make a surer teacher")
    if truth := report.get("truth"):
        no_class = f", {truth['passed_no_class']} of those of no class" if "passed_no_class" in truth else ""
        before, after, passed = (truth[name] for name in ("accuracy_before", "accuracy_after", "passed_in_class"))
        words = f"{passed} percent of the images of a class passed{no_class}"
        print0(f"pseudo-label accuracy {before} percent before the filter, {after} after; {words}")


def main() -> None:
    args = parse_args()
    if not is_rank0():  # under torchrun one process does it
        return
    if args.method == "top-p" and args.per_class in ("auto", "all"):
        fail("--method top-p needs a number --per-class (the paper's is 16,000 of 100 million images)")
    if args.method == "top-p" and (args.max_confidence < 1 or args.calibration):
        fail("--max-confidence and --calibration are for --method noisy-student: top-p does not look at the confidence")
    if args.min_share and not args.min_precision:
        fail("--min-share is for the threshold of --min-precision, which is not given")
    if not args.calibration and (args.min_precision or args.val_half != "all"):
        fail("--min-precision and --val-half need --calibration, what 02 gives for DATA/val with the same teacher")
    paths, files = open_inputs(args)
    classes, (files, val) = read_classes(files[0]), (files[: len(paths)], files[len(paths) :])
    if args.method == "top-p" and args.top_p >= len(classes):
        print0(f"--top-p {args.top_p}: each image counts for all {len(classes)} classes; below 100 take 1 or 2")
    calibration = {"calibration": calibrate(args, val[0], classes)} if val else {}
    threshold = calibration["calibration"]["at"]["threshold"] if val else args.threshold
    label, confidence, status = ([file[name] for file in files] for name in ("label", "confidence", "status"))
    if args.fraction < 1:
        confidence, status = draw_fraction(files, args.fraction, args.seed)
    sizes, histogram = count(paths, label, confidence, status, len(classes), (threshold, args.max_confidence))
    true = read_truth(args.truth, files, classes) if args.truth else None

    per_class = {"auto": auto_per_class(sizes["above_threshold"]), "all": 0}.get(args.per_class, args.per_class)
    if args.method == "noisy-student":
        if not sizes["above_threshold"].sum():
            name, best = "--min-precision: " if args.min_precision else "--", sizes["highest_confidence"].max()
            fail(f"{name}threshold {threshold:g} leaves no image: the highest confidence is {best:.3f}; lower it")
        columns = label, confidence, len(classes)
        chosen = select_noisy_student(*columns, threshold, per_class, args.seed, args.max_confidence)
    else:
        chosen = select_top_p([file["logits"] for file in files], status, len(classes), args.top_p, per_class)
    if not len(chosen[0]):
        fail(f"no image of {', '.join(paths)} is readable: there is nothing to select")
    examples = examples_of(*chosen, [len(part) for part in label])
    flags = {"method": args.method, "threshold": threshold, "per_class": per_class or "all"}
    flags |= {name: getattr(args, name) for name in ("top_p", "seed", "max_confidence", "fraction")}
    write_selection(args.out, examples, classes, files=json.dumps(paths), **flags)

    report = describe(args, threshold, per_class, classes, sizes, examples) | calibration
    if args.truth:
        labels, statuses = (np.concatenate([part[:] for part in column]) for column in (label, status))
        report["truth"] = accuracy_report(true, labels, statuses == DONE, examples, classes)
    with write_atomically(beside(args.out, ".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    draw_selection(beside(args.out, ".png"), [*map(image_list, files)], classes, examples, report, histogram)
    print_report(args, report, sizes["above_threshold"])


if __name__ == "__main__":
    main()
