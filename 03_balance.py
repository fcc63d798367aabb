"""Stage 03: keep the images that the teacher is sure of, and the same number of each class.

noisy-student (1911.04252, section 3): of the images whose confidence max_c p_c is above the
threshold, keep the K most confident of each class; repeat those of a smaller class evenly to K.
Most images of low confidence are of no class, and unequal numbers teach that some are rare.

top-p (Yalniz et al., 1905.00546): each image counts for its P most probable classes, and each
class keeps its K highest-scoring images, with that class as the hard label.

reads   label files of different images by one teacher, or of the same images by several: their mean
writes  balanced.h5 (a label file of the kept images), balanced.json (counts), balanced.png

    python 03_balance.py logits.h5 --out balanced.h5
    python 03_balance.py logits.h5 --out balanced.h5 --threshold 0.3 --per-class 130000
    python 03_balance.py logits.h5 --out balanced.h5 --method top-p --top-p 10 --per-class 16000

10 million images x 100 classes: 9 to 10 CPU seconds, top-p 16; 1 GB of memory.
"""

import argparse
import contextlib
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common import RATE, argument_parser, at_least, fail, is_rank0, print0, write_atomically  # program
from common import nfc  # listing
from common import DONE, TODO, LabelFile, check_label_rows, new_label_file, open_label_file  # label files
from common import wilson  # training
from common import pyplot, save_figure  # pictures


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("labels", type=Path, nargs="+", help="label files of stage 02")
    add("--out", type=Path, required=True, help="NAME.h5; .json and .png stand beside it")
    methods = ["noisy-student", "top-p"]
    add("--method", choices=methods, default=methods[0], help="top-p: the billion-scale selection")
    threshold = at_least(0, high=1, words=("auto",))
    add("--threshold", type=threshold, default="auto", help="keep confidence above it (paper: 0.3)")
    add("--min-precision", type=RATE, default=0.9, help="for --threshold auto, on val")
    add("--min-share", type=RATE, default=0.67, help="for --threshold auto: of val kept")
    per_class = at_least(1, int, 2**31 - 1, words=("auto", "all"))
    add("--per-class", type=per_class, default="auto", help="K; auto: median, <= 130,000; all: any")
    add("--top-p", type=at_least(1, int), default=10, help="classes that an image counts for")
    add("--truth", type=Path, help="CSV `name,class`, only to measure the labels with")
    add("--seed", type=at_least(0, int), default=0, help="of the draw of images that get one copy more")
    return parser.parse_args()


class Table:
    """The rows of label files, one file after the other, or those of the mean of several teachers."""

    def __init__(self, files: list[LabelFile], is_mean: bool = False):
        self.files, self.is_mean = files, is_mean
        self.classes = files[0].classes
        # Files of the same rows: all of them, a file a teacher, or each file alone.
        self.groups = [files] if is_mean else [[file] for file in files]
        self.starts = np.cumsum([0, *(len(group[0]) for group in self.groups)])  # their first rows
        self.chunk_rows = max(1, (1 << 21) // len(self.classes))  # 8 MB of float32 logits: a cache
        # Paths are stored below a file's root; here all are below a common one.
        self.root = os.path.commonpath([os.path.abspath(file.attrs["root"]) for file in files])
        below = [os.path.relpath(file.attrs["root"], self.root) for file in files]
        self.prefixes = [b"" if path == "." else os.fsencode(path) + b"/" for path in below]

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows that every teacher has labelled."""
        num = self.starts[-1]
        for begin in range(0, num, self.chunk_rows):
            rows = np.arange(begin, min(begin + self.chunk_rows, num))
            rows = rows[np.all(np.equal(self.columns("status", rows), DONE), axis=0)]
            if len(rows):  # a chunk may have no finished row
                yield rows

    def columns(self, name: str, rows: np.ndarray) -> list[np.ndarray]:
        """An array for each teacher: the values in these rows, which ascend. No file stays mapped."""
        parts = []  # of each group: an array for each teacher
        for k, of_group in enumerate(np.split(rows, np.searchsorted(rows, self.starts[1:-1]))):
            if len(of_group):
                values = [file.column(name)[of_group - self.starts[k]] for file in self.groups[k]]
                if name == "path":  # relative to the common root
                    values = [np.strings.add(self.prefixes[k], paths) for paths in values]
                parts.append(values)
        return [np.concatenate(of_teacher) for of_teacher in zip(*parts, strict=True)]

    def probs(self, logits: list[np.ndarray]) -> torch.Tensor:
        """float32 (n, C): the mean of the teachers' softmax. Classes are matched by name."""
        probs = [torch.from_numpy(values).float().softmax(1) for values in logits]
        if not self.is_mean:
            return probs[0]
        for k, file in enumerate(self.files):  # teachers may number the classes differently
            number = {name: c for c, name in enumerate(file.classes)}
            probs[k] = probs[k][:, [number[name] for name in self.classes]]
        return sum(probs) / len(probs)

    def logits_to_store(self, logits: list[np.ndarray]) -> np.ndarray:
        """float16 (n, C), as 02 stores them, the largest of a row 0; of a mean its logarithm."""
        if not self.is_mean:
            return logits[0]
        log_mean = self.probs(logits).log()
        return (log_mean - log_mean.amax(1, keepdim=True)).clamp(min=-65_000).half().numpy()  # fp16 ends there

    def predictions(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(label, confidence): as stored, or of the mean."""
        if not self.is_mean:
            return self.columns("label", rows)[0], self.columns("confidence", rows)[0]
        confidence, label = self.probs(self.columns("logits", rows)).max(1)
        return label.int().numpy(), confidence.numpy()

    def val(self) -> tuple[list[np.ndarray], np.ndarray]:
        """(val_logits of each teacher, val_label), if all files have those of the same images."""
        with_val = [file for file in self.files if "val_logits" in file.places]
        true = [np.array(file.classes)[file.column("val_label")].tolist() for file in with_val]
        if len(true) < len(self.files) or any(names != true[0] for names in true):
            return [], np.zeros(0, np.int32)
        logits = [np.array(file.column("val_logits")) for file in self.groups[0]]  # the same in all groups
        return logits, self.files[0].column("val_label")


def open_table(paths: list[Path]) -> Table:
    """Check the files and put them together: of the same images, or of one teacher."""
    # Sorted, so that ties do not depend on the order of the arguments.
    files = [open_label_file(path) for path in sorted(map(os.path.abspath, paths))]
    first = files[0]
    is_mean = len(files) > 1  # several teachers, if all files are of the same images
    for file in files:
        if file.attrs.get("method") == "top-p":
            fail(f"{file.path} is a top-p selection: select from what it was made from")
        if (file.column("status") == TODO).any():
            fail(f"{file.path} is unfinished: run 02 again on it")
        check_label_rows(file)  # in a hand-made file the logits may be probabilities
        is_mean = is_mean and file.attrs["root"] == first.attrs["root"]
        for name in ("path", "offset"):
            is_mean = is_mean and np.array_equal(file.column(name), first.column(name))
    settings = ("teacher_sha256", "precision", "crop_mode")
    for file in files[1:]:
        both = f"{first.path} and {file.path}"
        if is_mean and {*file.classes} != {*first.classes}:
            fail(f"{both}: the same images, but other classes")
        same = [file.attrs.get(name) == first.attrs.get(name) for name in settings]
        if not is_mean and (file.classes != first.classes or not all(same)):
            fail(f"{both}: neither the same images nor the same teacher, view and classes")
    table = Table(files, is_mean)
    if is_mean:
        if len({file.attrs.get("teacher_sha256", file.path) for file in files}) < len(files):
            fail(f"{', '.join(map(str, paths))}: two are of the same images and teacher")
        print0(f"mean of {len(files)} teachers")
    elif len(files) > 1:
        check_disjoint(table)
    return table


def check_disjoint(table: Table) -> None:
    """No image is in two files. Paths below the common root are compared by hashes of 64 bits."""
    hashes = []  # of each file
    for file, prefix in zip(table.files, table.prefixes, strict=True):
        paths = np.strings.add(prefix, file.column("path"))
        hashes.append(np.unique(np.fromiter(map(hash, paths), np.int64)))
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    twice = values[counts > 1]
    if len(twice):
        owners = [k for k, of_file in enumerate(hashes) if twice[0] in of_file]
        names = " and ".join(str(table.files[k].path) for k in owners)
        fail(f"{names} share some images: expected all of them, or none")


def calibrate(confidence: np.ndarray, right: np.ndarray, args: argparse.Namespace) -> dict:
    """The lowest threshold that reaches --min-precision and leaves --min-share, or the most precise."""
    curve = []
    for step in range(100):  # thresholds 0.00 to 0.99
        above = confidence > np.float32(step / 100)  # in float32, as the selection compares
        num, num_right = int(above.sum()), int(right[above].sum())
        point = {"threshold": step / 100, "kept": num, "right": num_right}
        point |= {"share": num / len(right), "share_interval": wilson(num, len(right))}
        point |= {"precision": num_right / max(num, 1), "precision_interval": wilson(num_right, num)}
        curve.append(point)
    # Of a small share all may be right by luck.
    points = [point for point in curve if point["kept"] and point["share"] >= args.min_share]
    precise = [point for point in points if point["precision"] >= args.min_precision]
    at = precise[0] if precise else max(points, key=lambda point: point["precision"])
    return {"images": len(right), "reached": bool(precise), "at": at, "curve": curve}


def auto_threshold(table: Table, args: argparse.Namespace) -> tuple[float, dict]:
    """(threshold, what balanced.json says of val), after a line that says where it comes from."""
    logits, true = table.val()
    if len(true) < 20:  # a share of fewer means nothing
        threshold = 0.3 if len(table.classes) >= 100 else 0.5
        print0(f"threshold {threshold}: not measured, fewer than 20 images of val to choose on are labelled")
        return threshold, {}
    confidence, label = (tensor.numpy() for tensor in table.probs(logits).max(1))
    report = calibrate(confidence, label == true, args)
    at = report["at"]
    percent = "{:.1%} ({:.1%} to {:.1%})".format
    share = percent(at["share"], *at["share_interval"])
    precision = percent(at["precision"], *at["precision_interval"])
    reason = "the lowest that reaches" if report["reached"] else "the most precise, none reaches"
    reason += f" --min-precision {args.min_precision}"
    kept = f"{share} of {len(true)} images of val are above it, {precision} of them right"
    print0(f"threshold {at['threshold']}, {reason}: {kept}")
    return at["threshold"], report


def by_class(label: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The positions of each class's entries, ascending."""
    ends = np.bincount(label, minlength=num_classes).cumsum()  # of each class in the sorted order
    return np.split(np.argsort(label, kind="stable"), ends[:-1])


class BestOfClasses:
    """The `per_class` highest scores of each class, of equal ones the first: O(classes x per_class)."""

    def __init__(self, num_classes: int, per_class: int):
        self.per_class = per_class
        self.cutoff = np.full(num_classes, -np.inf, np.float32)  # only higher ones get in
        self.chunks = [(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))]
        self.num_new = 0  # entries behind the first chunk, which is the best so far

    def add(self, row: np.ndarray, label: np.ndarray, score: np.ndarray) -> None:
        fits = score > self.cutoff[label]  # what cannot be among the best is dropped at once
        self.chunks.append((row[fits], label[fits], score[fits]))
        self.num_new += np.count_nonzero(fits)
        if self.num_new > max(1 << 18, len(self.chunks[0][0])):  # so sorting costs O(1) an entry
            self.best()

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, label, score) of what is kept, in the order in which it came."""
        row, label, score = (np.concatenate(column) for column in zip(*self.chunks, strict=True))
        kept = np.ones(len(label), bool)  # all, but for what is too many of a class
        for c, positions in enumerate(by_class(label, len(self.cutoff))):
            if len(positions) >= self.per_class:
                best_first = positions[np.argsort(-score[positions], kind="stable")]
                kept[best_first[self.per_class :]] = False
                self.cutoff[c] = score[best_first[self.per_class - 1]]
        self.chunks = [(row[kept], label[kept], score[kept])]  # the rest is forgotten
        self.num_new = 0
        return self.chunks[0]


def select_noisy_student(table: Table, threshold: float, per_class: int | str, seed: int) -> tuple:
    """Noisy Student's rule: (row, label, confidence, copies), sorted by row.

    Of the images above the threshold the K = `per_class` most confident of each class; those of a
    smaller class are repeated to K. "all": each image above the threshold once.
    """
    best = BestOfClasses(len(table.classes), np.inf if per_class == "all" else per_class)
    for rows in table.chunks():
        label, confidence = table.predictions(rows)
        above = confidence > np.float32(threshold)
        best.add(rows[above], label[above], confidence[above])
    row, label, confidence = best.best()
    copies = np.ones(len(row), np.uint32)
    if per_class == "all":
        return row, label, confidence, copies
    for c, positions in enumerate(by_class(label, len(table.classes))):
        if len(positions):
            copies[positions] = per_class // len(positions)  # each image so often
            shuffled = np.random.default_rng([seed, c]).permutation(positions)
            copies[shuffled[: per_class % len(positions)]] += 1  # some once more, to exactly K
    return row, label, confidence, copies


def select_top_p(table: Table, top_p: int, per_class: int) -> tuple:
    """Yalniz et al.'s rule: (row, label, probability, copies), sorted by row and label."""
    best = BestOfClasses(len(table.classes), per_class)
    place = max(0, len(table.classes) - top_p)  # of the P-th highest, in ascending order
    last_to_first = np.arange(len(table.classes), dtype=np.uint64)[::-1]
    for rows in table.chunks():
        probs = table.probs(table.columns("logits", rows))  # (n, C)
        reaches = (probs - torch.from_numpy(best.cutoff)).amax(1) > 0  # soon only few
        rows, probs = rows[reaches.numpy()], probs[reaches].numpy()  # images that can enter
        # Unique integers in the order of the probabilities; of equal ones the first class is highest.
        keys = probs.view(np.uint32).astype(np.uint64) << 32 | last_to_first
        is_top = keys >= np.partition(keys, place, axis=1)[:, place, None]
        is_top &= probs > best.cutoff  # of the others `add` would drop each
        image, label = np.divmod(np.flatnonzero(is_top).astype(np.int32), len(table.classes))
        best.add(rows[image], label, probs[image, label])
    row, label, score = best.best()
    return row, label, score, np.ones(len(row), np.uint32)


def header_of(table: Table, last: Path) -> dict:
    """What the selection keeps of its input, a student's defaults; of a mean the last file's."""
    attrs = open_label_file(last).attrs if table.is_mean else table.files[-1].attrs
    header = attrs | {"root": table.root, "files": json.dumps([str(file.path) for file in table.files])}
    if table.is_mean:
        for name in ("teacher", "teacher_sha256"):
            header[name] = json.dumps([file.attrs.get(name) for file in table.files])
    logits, true = table.val()
    if logits:
        header |= {"val_logits": table.logits_to_store(logits), "val_label": true}
    if "class_counts" in table.files[0].places:
        header["class_counts"] = table.files[0].column("class_counts")
    return header


def write_selection(path: Path, table: Table, chosen: tuple, header: dict) -> None:
    """Write a label file of the chosen (row, label, confidence, copies)."""
    row, label, confidence, copies = chosen
    copied = ["path", "offset", "size"]  # from the files that were selected from
    if header["method"] != "top-p":  # its labels are hard, and need not be the most probable
        copied.append("logits")
    columns = ["label", "confidence", "copies", "status", *copied]
    width = max(map(len, table.prefixes)) + max(file.places["path"][0].itemsize for file in table.files)
    with new_label_file(path, len(row), width, table.classes, columns, **header) as file:
        file["label"][:] = label
        file["confidence"][:] = confidence
        file["copies"][:] = copies
        file["status"][:] = DONE
        for begin in range(0, len(row), table.chunk_rows):  # the logits may not fit into memory
            chunk = slice(begin, begin + table.chunk_rows)
            for name in copied:
                values = table.columns(name, row[chunk])
                values = table.logits_to_store(values) if name == "logits" else values[0]
                file[name][chunk] = values.astype(file[name].dtype)


def read_truth(path: Path, classes: list[str]) -> dict[bytes, int]:
    """{path: number of the true class} of the images that belong to a class."""
    number = {name: c for c, name in enumerate(classes)}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel writes a mark
            lines = [(line["name"], nfc(line["class"])) for line in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        fail(f"--truth {path}: expected a CSV with the columns name,class ({error!r})")
    return {os.fsencode(name): number[true] for name, true in lines if true in number}


def count(table: Table, threshold: float, truth: dict[bytes, int]) -> dict:
    """Arrays (classes,): how many images there are; a histogram of all, and their accuracy."""
    names = ("images", "above_threshold", "with_truth", "right")
    counts = {name: np.zeros(len(table.classes), int) for name in names}
    histogram = np.zeros(50, int)  # of the confidences, for the picture
    for rows in table.chunks():
        label, confidence = table.predictions(rows)
        true = np.full(len(rows), -1)  # of no class, or not known
        if truth:
            paths = table.columns("path", rows)[0].tolist()  # bytes, as in the CSV
            true = np.array([truth.get(path, -1) for path in paths])
        masks = (label >= 0, confidence > np.float32(threshold), true >= 0, true == label)
        for name, mask in zip(names, masks, strict=True):
            counts[name] += np.bincount(label[mask], minlength=len(table.classes))
        histogram += np.histogram(confidence, 50, (0, 1))[0]
    accuracy = 100 * counts["right"].sum() / max(counts["with_truth"].sum(), 1)
    return counts | {"histogram": histogram, "accuracy": round(accuracy, 2)}


def draw(path: Path, selection: LabelFile, sizes: dict, before: np.ndarray, after: np.ndarray) -> None:
    """The sizes of the classes, histograms of the confidence, and images of a few classes."""
    plt = pyplot()
    if plt is None:
        return
    order = np.argsort(-sizes["candidates"], kind="stable")  # the most frequent class first
    present = order[sizes["examples"][order] > 0]  # classes that kept something
    shown = present[np.unique(np.linspace(0, len(present) - 1, 8).astype(int))]  # 8 classes
    names = np.array([name[:24] for name in selection.classes])  # longer ones take the room
    size = {"figsize": (10, 3 + 0.7 * len(shown)), "height_ratios": (3, 0.7 * len(shown))}
    _, axes = plt.subplot_mosaic("AB;CC", layout="constrained", **size)
    axes["A"].stairs(sizes["candidates"][order], label="labelled", fill=True)
    axes["A"].stairs(sizes["examples"][order], label="selected, with copies")
    axes["A"].set_ylabel("images")
    if len(order) <= 20:
        axes["A"].set_xticks(np.arange(len(order)) + 0.5, names[order], rotation=90)
    else:  # a few large classes would hide the others
        axes["A"].set(xlabel="classes", yscale="symlog")
        axes["A"].yaxis.set_major_formatter("{x:,.0f}")  # 1,000 and not 10^3
    axes["B"].stairs(before, np.linspace(0, 1, 51), label="all", fill=True)
    axes["B"].stairs(after, np.linspace(0, 1, 51), label="kept", fill=True)
    axes["B"].set_xlabel("confidence")
    axes["A"].legend()
    axes["B"].legend()

    sheet = Image.new("RGB", (12 * 66, 66 * len(shown)), "white")
    for line, c in enumerate(shown):
        rows = np.flatnonzero(selection.column("label") == c)
        rows = rows[np.argsort(-selection.column("confidence")[rows], kind="stable")]
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, 12).astype(int))]  # 12 of its images
        for i, row in enumerate(rows.tolist()):
            with contextlib.suppress(Exception):  # moved or unreadable: its place stays empty
                image = selection.images.load(row, enough=64)
                sheet.paste(ImageOps.fit(image, (64, 64)), (66 * i, 66 * line))
    axes["C"].imshow(sheet)
    axes["C"].set(xticks=[], xlabel="from the most to the least confident")
    axes["C"].set_yticks(66 * np.arange(len(shown)) + 33, names[shown])
    save_figure(plt, path)


def main() -> None:
    args = parse_args()
    if not is_rank0():  # under torchrun one process does it
        return
    is_top_p = args.method == "top-p"  # billion-scale
    if args.out.suffix != ".h5" or args.out.resolve() in [path.resolve() for path in args.labels]:
        fail(f"--out {args.out}: expected the name of a new file, NAME.h5")
    if is_top_p and args.per_class in ("auto", "all"):
        fail("--method top-p needs a number --per-class (paper: 16,000 of 100 million images)")
    table = open_table(args.labels)
    truth = read_truth(args.truth, table.classes) if args.truth else {}
    threshold = args.threshold
    calibration = {}
    if is_top_p:
        threshold = 0.0  # top-p does not look at the confidence
    elif threshold == "auto":
        threshold, calibration = auto_threshold(table, args)

    before = count(table, threshold, truth)
    if args.truth and not before["with_truth"].any():  # a file of other images, or other names
        fail(f"--truth {args.truth}: none of its names and classes are those of the label files")
    if not before["above_threshold"].any():
        num = before["images"].sum()
        fail(f"--threshold {threshold:g} leaves none of the {num} labelled images of {args.labels[0]}: lower it")
    per_class = args.per_class
    if per_class == "auto":  # the lower median of what is not empty, at most the paper's 130,000
        sizes = before["above_threshold"]
        per_class = min(int(np.quantile(sizes[sizes > 0], 0.5, method="lower")), 130_000)
    if is_top_p:
        chosen = select_top_p(table, args.top_p, per_class)
    else:
        chosen = select_noisy_student(table, threshold, per_class, args.seed)
    flags = {"method": args.method, "threshold": threshold, "per_class": per_class}
    flags |= {"top_p": args.top_p, "seed": args.seed}
    write_selection(args.out, table, chosen, header_of(table, args.labels[-1]) | flags)

    selection = open_label_file(args.out)  # what was written, read as stage 04 will
    after = count(Table([selection]), threshold, truth)  # the same counts of what was kept
    examples = np.bincount(selection.column("label"), selection.column("copies"), len(table.classes))
    sizes = {"candidates": before["images"], "above_threshold": before["above_threshold"]}
    sizes |= {"kept": after["images"], "examples": examples.astype(int)}
    report = flags | {what: int(values.sum()) for what, values in sizes.items()}
    report |= {"calibration": calibration, "classes": {}}
    for c, name in enumerate(table.classes):
        report["classes"][name] = {what: int(values[c]) for what, values in sizes.items()}
    if truth:
        report["truth"] = {"accuracy_before": before["accuracy"], "accuracy_after": after["accuracy"]}
    with write_atomically(args.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    draw(args.out.with_suffix(".png"), selection, sizes, before["histogram"], after["histogram"])
    above = f"{report['candidates']} images, {report['above_threshold']} above {threshold:g}"
    kept = f"{report['kept']} kept as {report['examples']} examples (K = {per_class})"
    print0(f"{args.out}: {above}, {kept}")
    empty = [name for name, num in zip(table.classes, examples, strict=True) if not num]
    if empty:
        print0(f"no image is left of {', '.join(empty)}: lower --threshold, or label more images")
    if truth:
        print0(f"{before['accuracy']}% of the labels are right, of those kept {after['accuracy']}%")


if __name__ == "__main__":
    main()
