"""Stage 02: the teacher labels the unlabelled images, and every logit is kept.

The teacher gets no noise: it sees the clean view of each image, without dropout and stochastic depth.
The student must find the same answer under noise (1911.04252, algorithm 1).

    y~_i = softmax(f(x~_i, theta_teacher))    kept as logits: the student can apply any temperature

reads   --teacher model.pt; a folder of images, one image, a .tar shard, or a label file to label again
        (the official "reassign"): its copies stay, and the labels of a top-p selection
writes  logits.h5: a row an image, in path order, and half of val/ for 03 --threshold auto

    python 02_pseudo_label.py --teacher runs/teacher/model.pt --out runs/logits.h5
    torchrun --nproc-per-node 8 02_pseudo_label.py --teacher runs/teacher/model.pt --out runs/logits.h5
    python 02_pseudo_label.py --teacher new/model.pt --unlabeled runs/balanced.h5 --out runs/balanced2.h5
"""

import argparse
import csv
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from common import add_device_flags, argument_parser, at_least, fail, print0, write_atomically  # program
from common import StopSignal, init_processes, progress  # processes
from common import View, normalize  # views
from common import ImageList, digests_of, judged_half, labeled_images, unlabeled_images  # listing
from common import ImageDataset, grid_keys, load_batches, rows_per_batch  # batches
from common import DONE, HELD_OUT, TODO, UNREADABLE, LabelFile, new_label_file, open_label_file  # label files
from common import fingerprint, load_model, read_checkpoint  # checkpoints
from common import autocast, precision_of  # training


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="checkpoint whose averaged weights label")
    add("--unlabeled", type=Path, help="folder, image, .tar or label file; None: DATA/unlabeled")
    add("--out", type=Path, required=True, help="the label file; one that exists is continued")
    add("--data", type=Path, help="where val/ is, whose copies are left out; None: the teacher's")
    add("--csv", type=Path, help="the labels as text too: path,class,confidence")
    add("--max-bad", type=at_least(0), default=1.0, help="percent of unreadable images that pass")
    add_device_flags(parser)
    args = parser.parse_args()
    if args.csv and args.csv.resolve() in (args.out.resolve(), args.teacher.resolve()):
        fail(f"--csv {args.csv}: expected the name of another file")
    return args


def label_batches(model, view: View, precision, processes, images: ImageList, batches, held_out=()):
    """Yield each batch's rows, logits (n, C) on the device, status, and errors (row, reason)."""
    amp, _ = autocast(precision, processes.device)
    dataset = ImageDataset(images, clean=view, held_out=held_out)
    pairs = zip(map(np.array, batches), load_batches(dataset, batches, processes), strict=True)
    for rows, batch in progress(pairs, "batches", len(batches), processes):
        is_readable = np.isin(rows, batch.rows.numpy())
        status = np.where(is_readable, DONE, HELD_OUT).astype(np.uint8)
        status[np.isin(rows, [row for row, _ in batch.errors])] = UNREADABLE
        # Unreadable images are zeros in their place: a batch's numbers do not depend on them.
        pixels = torch.zeros(len(rows), *batch.views[0].shape[1:], dtype=torch.uint8)
        pixels[torch.from_numpy(is_readable)] = batch.views[0]
        with amp:
            logits = model(normalize(pixels.to(processes.device, non_blocking=True), view))
        yield rows, logits, status, batch.errors


def shift(logits: torch.Tensor, is_good: np.ndarray) -> np.ndarray:
    """fp32 logits (n, C), the largest of each row 0: around it float16 is finest."""
    logits = logits.float().cpu().numpy()
    if not np.isfinite(logits[is_good]).all():
        fail("--teacher: its logits are not finite, try --precision fp32", from_any=True)
    return logits - logits.max(1, keepdims=True)


def label_val(label, images: ImageList, labels: np.ndarray, size: int) -> dict:
    """val_logits (V, C) and val_label (V,): the readable images of the half of val to choose on."""
    chosen = np.flatnonzero(~judged_half(images))
    images, labels = images[chosen], labels[chosen].astype(np.int32)
    num = len(images)
    batches = [range(first, min(first + size, num)) for first in range(0, num, size)]
    val = {"val_logits": [], "val_label": []}
    for rows, logits, status, _ in label(images, batches):
        is_good = status == DONE
        val["val_logits"].append(shift(logits, is_good)[is_good].astype(np.float16))
        val["val_label"].append(labels[rows[is_good]])
    return {name: np.concatenate(parts) for name, parts in val.items() if parts}


def create_output(path: Path, images: ImageList, source: LabelFile | None, checkpoint: dict, **attrs):
    """Write a label file in which no row is done. source: the label file that is labelled again."""
    columns = {"path": images.path, "offset": images.offset, "size": images.size}
    if source:
        attrs = source.attrs | attrs  # with how it was selected
        if "copies" in source.places:
            columns["copies"] = source.column("copies")
    if "class_counts" in checkpoint:
        attrs["class_counts"] = np.array(checkpoint["class_counts"], np.int64)
    view = View.of(checkpoint)
    attrs.update(root=images.root, image_size=view.image_size, crop_mode=view.crop_mode)
    attrs.update(arch=checkpoint["arch"], arch_options=json.dumps(checkpoint.get("arch_options", {})))
    attrs["created"] = time.strftime("%Y-%m-%d")
    names = ["logits", "label", "confidence", "status", *columns]
    width = images.path.itemsize
    with new_label_file(path, len(images), width, checkpoint["classes"], names, **attrs) as file:
        for name, values in columns.items():
            file[name][:] = values.view(file[name].dtype)  # HDF5's text has a dtype of its own


def follow_images(path: Path, folder: str, data: str | Path | None) -> None:
    """Tell of images that came or went after the listing, and store where they are if they were moved."""
    labels = open_label_file(path)
    if len(labels) > 1_000_000:  # listing takes long
        return
    images = unlabeled_images(folder, data)
    seen, listed = {*images.path.tolist()}, {*labels.column("path").tolist()}
    is_moved = labels.attrs.get("unlabeled") not in (folder, None)
    if seen != listed:
        changes = f"{len(seen - listed)} images came and have no labels, {len(listed - seen)} are gone"
        print0(f"since the listing of {path}, {labels.attrs.get('created')}, {changes}: choose another --out")
    elif is_moved:
        print0(f"{path}: the images have moved to {folder}")
        with h5py.File(path, "r+", locking=False) as file:
            file.attrs.update(root=images.root, unlabeled=folder)


def is_todo(path: Path, settings: dict[str, str]) -> np.ndarray:
    """Which rows are not done, in a file begun with this teacher, these images and this precision."""
    labels = open_label_file(path)
    for name, value in settings.items():
        if labels.attrs.get(name) != value:
            fail(f"{path} was begun with another --{name.split('_')[0]}: choose another --out")
    return labels.column("status") == TODO


def put(file: int, labels: LabelFile, name: str, rows: np.ndarray, values: np.ndarray) -> None:
    """Fill rows of a column in place: the structure of the HDF5 file never changes."""
    _, place, _ = labels.places[name]
    begins = np.flatnonzero(np.diff(rows, prepend=-2) > 1)  # neighbours are written at once
    for begin, run in zip(begins, np.split(values, begins[1:]), strict=False):
        offset = place + int(rows[begin]) * run[0].nbytes
        if os.pwrite(file, run.tobytes(), offset) < run.nbytes:
            raise OSError("a write was cut short, as on a full disk")


def write_rows(file: int, labels: LabelFile, kept_labels, rows, logits, status) -> None:
    """Write a batch. The status follows a sync of the data: a row that says `done` is right."""
    logits = shift(logits, status == DONE)
    is_todo = labels.column("status")[rows] == TODO  # what is done stays as it is
    rows, logits, status = rows[is_todo], logits[is_todo], status[is_todo]
    label = logits.argmax(1)
    if kept_labels is not None:
        kept = kept_labels[rows]
        label = np.where(kept < 0, label, kept)  # -1: it was unreadable
    probs = np.exp(logits)
    confidence = probs[np.arange(len(rows)), label] / probs.sum(1)
    for values, nothing in ((logits, np.nan), (label, -1), (confidence, np.nan)):
        values[status != DONE] = nothing
    put(file, labels, "logits", rows, logits.astype(np.float16))
    put(file, labels, "label", rows, label.astype(np.int32))
    put(file, labels, "confidence", rows, confidence)
    os.fsync(file)
    put(file, labels, "status", rows, status)


def fill(labels: LabelFile, kept_labels: np.ndarray | None, batches, stop: StopSignal) -> None:
    """Write each batch in a thread, beside the next one."""
    try:
        file = os.open(labels.path, os.O_WRONLY)
        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(os.fsync, file)
            for rows, logits, status, errors in batches:
                writing.result()  # raises what went wrong in it
                if errors:  # a lost disk is not a million bad images
                    with os.scandir(labels.images.root) as entries:
                        if next(entries, None) is None:
                            raise OSError(f"{labels.images.root} is empty")
                writing = thread.submit(write_rows, file, labels, kept_labels, rows, logits, status)
                if stop.received:
                    break
            writing.result()
    except OSError as error:
        fail(f"{labels.path}: {error}; what is done is kept: run again", from_any=True)


def write_csv(path: Path, labels: LabelFile) -> None:
    """Write path,class,confidence of each labelled image, names byte for byte as on the disk."""
    status, names, label, confidence = map(labels.column, ("status", "path", "label", "confidence"))
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with write_atomically(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "confidence"])
        for row in np.flatnonzero(status == DONE):
            writer.writerow([os.fsdecode(names[row]), labels.classes[label[row]], confidence[row]])


def report(labels: LabelFile, max_bad: float) -> None:
    """Print what became of the images. Too many unreadable ones end the program."""
    status, confidence = labels.column("status"), labels.column("confidence")
    num_done, num_sure = (status == DONE).sum(), (confidence > 0.3).sum()
    print0(f"{labels.path}: {num_done} images labelled, {num_sure} of them above 0.3")
    if len(status) == 1 and status[0] == DONE:
        logits = labels.column("logits")[0].astype(np.float32)  # of the most probable class 0
        for c in np.argsort(-logits, kind="stable")[:5]:
            print0(f"{confidence[0] * np.exp(logits[c]):7.2%}  {labels.classes[c]}")
    dataset = ImageDataset(labels.images, clean=View.default(32))  # says why one is unreadable
    for code, what in ((HELD_OUT, "copies of held-out ones"), (UNREADABLE, "unreadable")):
        rows = np.flatnonzero(status == code)
        names = "; ".join(dataset[row][2] or labels.images.name(row) for row in rows[:3].tolist())
        if len(rows):
            print0(f"{len(rows)} of {len(status)} images are {what} and left out: {names}")
    if len(rows) > len(status) * max_bad / 100:
        what = f"{len(rows)} of {len(status)} images are unreadable: {names}"
        fail(f"--max-bad {max_bad:g}: {what}; mend or remove them, remove {labels.path}, and run again")


def label_all(args, processes, checkpoint: dict, settings: dict, unlabeled: str, data) -> None:
    """Label the rows of --out that are not done; the first process makes the file if there is none."""
    view, classes = View.of(checkpoint), checkpoint["classes"]
    source = open_label_file(unlabeled) if unlabeled.endswith(".h5") else None
    kept_labels = None
    if source and source.attrs.get("method") == "top-p":
        kept_labels = source.column("label")
        if source.classes != classes:
            fail(f"--teacher {args.teacher} has other classes than {unlabeled}, whose labels stay")
    is_image = os.path.isfile(unlabeled) and not unlabeled.lower().endswith((".h5", ".tar"))
    images = None
    if processes.rank == 0 and not args.out.exists():
        images = unlabeled_images(unlabeled, data)
        if is_image and ImageDataset(images, clean=view)[0][2]:
            fail(f"--unlabeled {unlabeled} is no readable image")

    model, _ = load_model(args.teacher, processes.device, fuse=True)
    label = partial(label_batches, model, view, settings["precision"], processes)
    size = rows_per_batch(view.image_size, processes.device)
    val = labeled_images(data, "val", classes)[:2] if data and not is_image else None
    if images is not None:
        attrs = {"teacher": os.path.abspath(args.teacher), "data": data and os.path.abspath(data)}
        if val:
            attrs |= label_val(label, *val, size)
        if not args.out.exists():  # another run may have been faster
            create_output(args.out, images, source, checkpoint, **settings, **attrs)
    while not args.out.exists():  # the processes share the file alone, so there is no time limit
        time.sleep(0.2)

    labels = open_label_file(args.out)
    if os.path.isdir(unlabeled):  # where the images are now
        labels = replace(labels, attrs=labels.attrs | {"root": unlabeled})
    held_out = frozenset()
    folder = Path(labels.images.root if source else unlabeled).resolve()
    if not data:
        print0("--data: the teacher's is gone: no held-out image is compared and no val labelled")
    elif val and not folder.is_relative_to(Path(data, "val").resolve()):
        held_out = digests_of(val[0])
    stop = StopSignal()  # before, there was nothing to save, and a signal ended the process
    todo = is_todo(args.out, settings)
    print0(f"{args.out}: {todo.sum()} of {len(todo)} images, listed {labels.attrs['created']}, are still to label")
    batches = grid_keys(len(todo), size, processes)
    batches = [rows for rows in batches if todo[rows[0] : rows[-1] + 1].any()]
    fill(labels, kept_labels, label(labels.images, batches, held_out), stop)
    while processes.rank == 0 and not stop.received and is_todo(args.out, settings).any():
        time.sleep(0.2)  # until the other processes are done
    if stop.received:
        raise SystemExit(143)


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    processes = init_processes(args.workers, connect=False)
    checkpoint = read_checkpoint(args.teacher)
    data = args.data or checkpoint.get("data")
    if not args.data and not any(os.path.isdir(f"{data}/{split}") for split in ("train", "val")):
        data = ""
    if not args.unlabeled and not data:
        fail(f"--unlabeled: say where the images are, for {args.teacher} has no data directory")
    unlabeled = os.path.abspath(args.unlabeled or f"{data}/unlabeled")
    settings = {"teacher_sha256": fingerprint(args.teacher)}
    settings["unlabeled"] = fingerprint(Path(unlabeled)) if unlabeled.endswith(".h5") else unlabeled
    settings["precision"] = precision_of(args.precision, processes.device)
    if processes.rank > 0:
        del settings["unlabeled"]  # rank 0 compares it, and may store another
    elif args.out.exists() and os.path.isdir(unlabeled):
        follow_images(args.out, unlabeled, data)
    if args.out.exists() and not is_todo(args.out, settings).any():
        print0(f"{args.out} is finished")
    else:
        label_all(args, processes, checkpoint, settings, unlabeled, data)
    if processes.rank == 0:
        labels = open_label_file(args.out)
        if args.csv:
            write_csv(args.csv, labels)
        report(labels, args.max_bad)


if __name__ == "__main__":
    main()
