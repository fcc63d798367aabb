"""Label files made by hand, for the tests of 02, 03, 04 and of the files themselves."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np

import common
from common import create_logits

CLASSES = ["ant", "bee", "cat"]  # of these files
COLUMNS = ("logits", "label", "confidence", "status", "path", "offset", "size")


def write_logits(path, logits, root="/data/unlabeled", names=None, classes=CLASSES, teacher="a" * 64, unreadable=()):
    """A finished logits file of these fp32 logits (N, C), as stage 02 fills it."""
    logits = np.asarray(logits, dtype=np.float32)
    names = names or [f"{path.stem}/{i:03}.png" for i in range(len(logits))]
    nothing = np.zeros(len(names), np.int64)
    rows = common.ImageList(str(root), np.array([name.encode() for name in names], dtype="S"), nothing, nothing)
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


def new_file(path: Path, num: int = 4) -> Path:
    """A logits file none of whose rows is done."""
    rows = common.ImageList("/r", np.array([f"{i:03}.png" for i in range(num)], "S"), *np.zeros((2, num), np.int64))
    create_logits(path, rows, CLASSES, num, arch="a", image_size=32, teacher="t", teacher_sha256="s")
    return path


def logits_of(*rows):
    """Logits of (label, confidence) rows of three classes, the rest shared evenly."""
    probs = [[confidence if c == label else (1 - confidence) / 2 for c in range(3)] for label, confidence in rows]
    return np.log(probs)


def read_logits(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, locking=False) as file:
        return {name: file[name][:] for name in COLUMNS}


def undo(path: Path, rows=slice(None)) -> None:
    with h5py.File(path, "r+") as file:
        file["status"][rows] = common.TODO


def select(out: Path, files: dict[Path, list[int]]) -> Path:
    """A selection of these rows, each once, as stage 03 writes it."""
    label, confidence = (
        [read_logits(path)[name][rows] for path, rows in files.items()] for name in ("label", "confidence")
    )
    with h5py.File(out, "w") as file:
        file["file"] = np.repeat(np.arange(len(files)), [len(rows) for rows in files.values()]).astype(np.uint16)
        file["row"] = np.concatenate([*files.values()]).astype(np.int64)
        file["label"], file["confidence"] = np.concatenate(label), np.concatenate(confidence)
        file.create_dataset("classes", data=CLASSES, dtype=h5py.string_dtype())
        names = json.dumps([str(path) for path in files])
        file.attrs.update(format=common.SELECTION_FORMAT, files=names, method="noisy-student", threshold=0.3)
    return out


def read_selection(path):
    """The columns, the attributes and the classes of a balanced.h5."""
    with common.open_label_file(path, common.SELECTION_FORMAT) as file:
        columns = {name: file[name][:] for name in ("file", "row", "label", "confidence")}
        return columns, dict(file.attrs), common.read_classes(file)


def write_truth(path, lines, header=("name", "class")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return path
