"""Label files made by hand, for the tests of 02, 03, 04 and of the files themselves."""

from pathlib import Path

import h5py
import numpy as np

from common import DONE, LABEL_COLUMNS, LABELS_FORMAT, UNREADABLE, new_label_file, open_label_file

CLASSES = ["ant", "bee", "cat"]  # of these files
COLUMNS = ("path", "offset", "size", "status", "label", "confidence", "logits")


def logits_of(*rows) -> np.ndarray:
    """Logits of (label, confidence) rows of three classes, the rest shared evenly."""
    probs = [[confidence if c == label else (1 - confidence) / 2 for c in range(3)] for label, confidence in rows]
    return np.log(probs)


def write_labels(path, logits, root="/data/unlabeled", names=None, classes=CLASSES, unreadable=(), val=None, **attrs):
    """A finished label file of these fp32 logits (N, C), as stage 02 fills it. `val`: (logits, labels).

    `attrs`: its attributes, and columns such as copies. The teacher is "a" * 64 unless `teacher_sha256` says otherwise.
    """
    logits = np.asarray(logits, np.float32)
    names = names or [f"{path.stem}/{i:03}.png" for i in range(len(logits))]
    names = np.array([str(name).encode() for name in names], "S")
    attrs = {"arch": "efficientnet_b0", "image_size": 32, "teacher": "/t.pt", "teacher_sha256": "a" * 64} | attrs
    if val:
        val_logits = np.asarray(val[0], np.float32)
        attrs["val_logits"] = (val_logits - val_logits.max(1, keepdims=True)).astype(np.float16)
        attrs["val_label"] = np.asarray(val[1], np.int32)
    good = ~np.isin(np.arange(len(logits)), unreadable)
    shifted = logits - logits.max(1, keepdims=True)
    with new_label_file(path, len(names), names.itemsize, classes, COLUMNS, root=str(root), **attrs) as file:
        file["path"][:] = names.astype(file["path"].dtype)
        file["offset"][:], file["size"][:] = 0, 0
        file["status"][:] = np.where(good, DONE, UNREADABLE)
        file["label"][:] = np.where(good, logits.argmax(1), -1)
        file["confidence"][:] = np.where(good, 1 / np.exp(shifted).sum(1), np.nan)
        file["logits"][:] = np.where(good[:, None], shifted, np.nan)
    return path


def made_elsewhere(path, images, labels, classes=CLASSES, **attrs):
    """A label file with nothing that it does not need. All labels have a probability of 0.6."""
    labels = np.asarray(labels, np.int32)
    logits = np.log(np.where(np.eye(3)[labels] == 1, 1, 1 / 3))
    with h5py.File(path, "w") as file:
        file["path"], file["label"], file["logits"] = images.path, labels, logits.astype(np.float16)
        file["status"] = np.ones(len(labels), np.uint8)
        file["confidence"] = np.full(len(labels), 0.6, np.float32)
        file.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        file.attrs.update(format=LABELS_FORMAT, root=images.root, **attrs)
    return path


def read_labels(path) -> dict[str, np.ndarray]:
    """The columns of a label file, and class_counts, val_logits and val_label where it has them."""
    file = open_label_file(path)
    return {name: np.array(file.column(name)) for name in LABEL_COLUMNS if name in file.places}


def change(path: Path, **columns) -> Path:
    """Put other values of some rows into a file: name={row: value}."""
    with h5py.File(path, "r+") as file:
        for name, values in columns.items():
            for row, value in values.items():
                file[name][row] = value
    return path
