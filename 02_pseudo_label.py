"""Stage 02: the teacher labels the unlabelled images, and every logit is kept.

The teacher is not noised here: the clean centre view of each image, the averaged weights, no dropout, no dropped
layers. That asymmetry is the method: the student must find the same answer under noise (1911.04252, algorithm 1).

    y~_i = softmax(f(x~_i, theta_teacher))        stored as logits, so that any temperature can be had later

reads   --teacher model.pt, a folder of images in any nesting, .tar shards in place; or --only balanced.h5 and the
        logits file that it names: a better teacher labels just the images that were selected (the official "reassign")
writes  logits.h5: one row an image, in the order of the paths. The same command goes on where it was interrupted, with
        any number of processes: the batches are a fixed grid of rows, so the numbers do not depend on it.

    python 02_pseudo_label.py --teacher runs/teacher/model.pt --unlabeled DATA/unlabeled --out runs/logits.h5
    torchrun --nproc-per-node 8 02_pseudo_label.py --teacher runs/teacher/model.pt --out runs/logits.h5
    python 02_pseudo_label.py --teacher runs/student/model.pt --only runs/balanced.h5 --out runs/newer.h5
"""

import argparse
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import (
    DONE,
    LOGITS_FORMAT,
    TODO,
    UNREADABLE,
    ImageDataset,
    ImageList,
    View,
    write_atomically,
    StopSignal,
    argument_parser,
    at_least,
    autocast,
    fail,
    file_sha256,
    image_list,
    init_processes,
    load_batches,
    load_model,
    map_dataset,
    normalize,
    open_label_file,
    progress,
    read_selection,
    report_bad,
    unlabeled_images,
)


import shutil
import h5py


def create_logits(path: Path, rows: ImageList, classes: list[str], num_wanted: int, **attributes) -> None:
    """Create a whole logits.h5, every row `not done`, under a temporary name, and rename it.

    Contiguous and allocated at once (sparse on disk): processes then fill it in place with os.pwrite, nothing in the
    HDF5 structure changes any more, and the file opens at any moment, after a kill -9 too. `num_wanted`: how many rows
    will be filled, for which there must be room on the disk.
    """
    needed = len(rows) * (rows.path.dtype.itemsize + 17) + num_wanted * (2 * len(classes) + 8)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        fail(f"{path}: {num_wanted} images need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on that disk")
    with (
        write_atomically(path) as temporary,
        h5py.File(temporary, "w", alignment_threshold=1, alignment_interval=4096) as file,
    ):

        def allocate(name: str, dtype, *shape: int) -> h5py.Dataset:
            creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            creation.set_layout(h5py.h5d.CONTIGUOUS)
            creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            kind, space = h5py.h5t.py_create(np.dtype(dtype), logical=True), h5py.h5s.create_simple(shape)
            return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, creation))

        num = len(rows)
        allocate("logits", "f2", num, len(classes))
        allocate("label", "i4", num)
        allocate("confidence", "f4", num)
        allocate("status", "u1", num)
        text = h5py.string_dtype("utf-8", rows.path.dtype.itemsize)
        allocate("path", text, num)[:] = rows.path.astype(text)
        allocate("offset", "i8", num)[:] = rows.offset
        allocate("size", "i8", num)[:] = rows.size
        file.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        file.attrs.update(format=LOGITS_FORMAT, root=rows.root, **attributes)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="checkpoint whose averaged weights label")
    add("--unlabeled", type=Path, help="folder of images and .tar shards; None: unlabeled/ of the teacher's data")
    add("--only", type=Path, help="balanced.h5: label its images alone, at their old rows; for 04 --logits")
    add("--out", type=Path, required=True, help="the logits file; run again on it to go on after an interruption")
    add("--max-bad", type=at_least(0), default=1.0, help="percent of unreadable images up to which the status is 0")
    add("--workers", type=at_least(0, int), help="loaders a process; None: 0 on CPUs, its share of the cores on GPUs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs where there are any")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on GPUs, else fp32")
    add("--compile", action="store_true", help="torch.compile the teacher; pays from some 20,000 images at 224 px on")
    return parser.parse_args()


def rows_per_batch(image_size: int, device: torch.device) -> int:
    """A function of image size and device alone, for the grid must be the same after a restart.

    CPUs are fastest while a batch's activations fit the cache (512 images of 32 px, 8 of 224); GPUs take 64 times that.
    """
    fits = 512 * 32**2 / image_size**2 * (64 if device.type == "cuda" else 1)
    return int(min(max(2 ** int(np.log2(max(fits, 1))), 1), 1024))


class RowWriter:
    """Fills rows of a logits file in place, at known offsets: nothing in the structure of the HDF5 file changes.

    A row's status follows its data by a sync, so that a row that says `done` is right whatever happened since.
    """

    def __init__(self, path: Path):
        with open_label_file(path, LOGITS_FORMAT) as file:
            self.offsets = {name: file[name].id.get_offset() for name in ("logits", "label", "confidence", "status")}
        try:
            self.path, self.file = path, os.open(path, os.O_RDWR)
        except OSError as error:
            fail(f"{path} cannot be written: {error.strerror}")
        self.pending, self.synced, self.stopped = [], time.monotonic(), False

    def stop(self, reason: str) -> None:
        if self.stopped:  # what was waiting to be written meets the same full disk: that was said
            raise SystemExit(2)
        self.stopped = True
        fail(f"{self.path}: {reason}; the rows whose status is 1 or 2 are kept: run again", from_any=True)

    def put(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """One value of `values` a row; the rows ascend."""
        begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # of the runs of neighbours, each written at once
        for first, part in zip(rows[begins], np.split(values, begins[1:]), strict=True):
            data, offset = part.tobytes(), self.offsets[name] + int(first) * part[0].nbytes
            while data:  # a write may be short, on a disk that is filling up for one
                try:
                    written = os.pwrite(self.file, data, offset)
                except OSError as error:
                    self.stop(f"{error.strerror}: make room")
                data, offset = data[written:], offset + written

    def write(self, rows: np.ndarray, logits: torch.Tensor, good: np.ndarray, wanted=slice(None)) -> None:
        """Logits (n, C) of n rows, on any device and of any precision, and which of the images could be read.

        `wanted`: which of the n rows to write.
        """
        rows, logits, good = rows[wanted], logits.float().cpu().numpy()[wanted], good[wanted]
        if not len(rows):  # the same command runs twice, and the other one was here before
            return
        if not np.isfinite(logits[good]).all():
            self.stop("the teacher gives logits that are not finite, try --precision fp32 or another teacher")
        shifted = logits - logits.max(1, keepdims=True)
        confidence = (1 / np.exp(shifted).sum(1)).astype(np.float32)
        self.put("logits", rows, np.where(good[:, None], shifted, np.nan).astype(np.float16))
        self.put("label", rows, np.where(good, logits.argmax(1), -1).astype(np.int32))
        self.put("confidence", rows, np.where(good, confidence, np.float32("nan")).astype(np.float32))
        self.pending.append((rows, np.where(good, DONE, UNREADABLE).astype(np.uint8)))
        if time.monotonic() - self.synced > 5:
            self.sync()

    def sync(self) -> None:
        if not os.path.exists(self.path) or not os.path.samestat(os.stat(self.path), os.fstat(self.file)):
            self.stop("it was removed or replaced while it was being filled")
        try:
            os.fdatasync(self.file)
        except OSError as error:
            self.stop(f"{error.strerror}: make room")
        for rows, status in self.pending:
            self.put("status", rows, status)
        self.pending, self.synced = [], time.monotonic()


def images_to_label(args: argparse.Namespace, checkpoint: dict) -> tuple[ImageList, np.ndarray | range]:
    """The images of --unlabeled, all of them wanted; or those of the logits file that --only names, and its rows."""
    if not args.only:
        rows = unlabeled_images(args.unlabeled or (Path(checkpoint["data"]) / "unlabeled"))
        return rows, range(len(rows))
    files, selection, _ = read_selection(args.only)
    roots = {i: file.attrs["root"] for i, file in files.items()}
    folder = os.path.abspath(args.unlabeled) if args.unlabeled else None
    these = [i for i, root in roots.items() if len(roots) == 1 or root == folder]
    if len(these) != 1:
        fail(f"{args.only} is of several folders: label one by one, --unlabeled {' or '.join(roots.values())}")
    wanted = np.unique(selection["row"][selection["file"] == these[0]])
    return image_list(files[these[0]], folder), wanted


def is_empty(folder: str) -> bool:
    """Whether there is no such folder or nothing in it, as where a disk was mounted that is gone."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    processes = init_processes(args.device, args.workers, connect=False)  # no collectives, so no time limits
    model, checkpoint = load_model(args.teacher, processes.device, fuse=True)
    sha256 = file_sha256(args.teacher)
    if args.only or (processes.is_main and not args.out.exists()):
        rows, wanted = images_to_label(args, checkpoint)  # can take hours, and has nothing to save
    stop = StopSignal(processes)
    if processes.is_main and not args.out.exists():
        attributes = {"arch": checkpoint["arch"], "image_size": checkpoint["image_size"]}
        attributes |= {"teacher": os.path.abspath(args.teacher), "teacher_sha256": sha256}
        create_logits(args.out, rows, checkpoint["classes"], len(wanted), **attributes)
    if not args.out.exists():
        print(
            f"process {processes.rank} waits for {args.out}, which process 0 makes when it has listed all images",
            flush=True,
        )
    while not args.out.exists():
        time.sleep(0.1)
        if stop.received:
            raise SystemExit(143)
    with open_label_file(args.out, LOGITS_FORMAT) as file:
        folder = rows.root if args.only else os.path.abspath(args.unlabeled or Path(checkpoint["data"]) / "unlabeled")
        if file.attrs["teacher_sha256"] != sha256:
            fail(f"{args.out} was made by another teacher ({file.attrs['teacher']}): choose another --out")
        if file.attrs["root"] != folder:
            fail(f"{args.out} is of --unlabeled {file.attrs['root']}, not {folder}: choose another --out")
        here = image_list(file)
        if args.only and not (len(here) == len(rows) and np.array_equal(here.path[wanted], rows.path[wanted])):
            fail(f"{args.out} has other images in the rows of {args.only}: choose another --out")
        rows, status = here, map_dataset(file, "status")
    if not args.only:
        wanted = range(len(rows))
    chosen = wanted if args.only else slice(None)

    # Batch k is a fixed list of rows and belongs to process k % world_size, whatever was done before.
    size = rows_per_batch(checkpoint["image_size"], processes.device)
    todo = np.zeros(-(-len(wanted) // size) * size, dtype=bool)
    todo[: len(wanted)] = status[chosen] == TODO
    if processes.is_main:
        print(
            f"{args.out}: {len(wanted)} images, {len(wanted) - todo.sum()} of them done before; {size} a batch",
            flush=True,
        )
    todo = np.flatnonzero(todo.reshape(-1, size).any(1))  # a batch that was cut off is redone whole
    mine = todo[todo % processes.world_size == processes.rank]

    def rows_of(k: int) -> np.ndarray:
        return np.asarray(wanted[k * size : (k + 1) * size])

    if args.compile:
        model.compile()
    amp, _ = autocast(args.precision, processes.device)
    dataset = ImageDataset(rows, clean=View.of(checkpoint))
    batches = load_batches(dataset, (rows_of(k).tolist() for k in mine), processes)
    writer = RowWriter(args.out)
    writing, pool = deque(), ThreadPoolExecutor(1)  # writing goes on beside the next batches
    began, num_seen, num_bad, gone = time.monotonic(), 0, 0, False

    def note() -> str:
        rate = processes.world_size * num_seen / (time.monotonic() - began)
        return f"{rate:.0f} images/s, {processes.world_size * num_bad} unreadable"

    for k, batch in zip(mine, progress(batches, len(mine), "batches", processes, note=note), strict=True):
        # Unreadable images are zeros in their place: a batch's shape, and so its numbers, do not depend on them. For a
        # compiled model all shapes are the same, the last one's too.
        here, side = rows_of(k), checkpoint["image_size"]
        images = torch.zeros(size if args.compile else len(here), 3, side, side, dtype=torch.uint8)
        good = np.isin(here, batch.rows.numpy())
        if good.any():
            images[: len(here)][torch.from_numpy(good)] = batch.views[0]
        images = images.to(processes.device, non_blocking=True)
        with amp:
            logits = model(normalize(images, View.of(checkpoint)))
        gone = bool(batch.errors) and is_empty(rows.root)  # a lost mount is not millions of bad images
        if not gone:
            # what is done stays as it is
            writing.append(pool.submit(writer.write, here, logits[: len(here)], good, status[here] == TODO))
        if len(writing) > 4:
            writing.popleft().result()  # what ends the writing ends this process
        num_seen, num_bad = num_seen + len(here), num_bad + len(batch.errors)
        if stop.received or gone:
            break
    for write in writing:
        write.result()
    writer.sync()
    if gone:
        fail(f"{rows.root} is gone; the rows that are done are kept: run again when it is back", from_any=True)
    if stop.received:
        raise SystemExit(143)
    if not processes.is_main:
        return
    waits = False
    while True:  # until the other processes are done as well
        with open_label_file(args.out, LOGITS_FORMAT) as file:  # anew, for network file systems look when one opens
            columns = [map_dataset(file, name) for name in ("status", "label", "confidence")]
        num_left = (columns[0][chosen] == TODO).sum()
        if not num_left or processes.world_size == 1:
            break
        if not waits:
            print(f"{args.out}: {num_left} images are left to the other processes", flush=True)
        waits = True
        time.sleep(0.5)
        if stop.received:
            raise SystemExit(143)

    counts, bad = np.zeros(len(checkpoint["classes"]), np.int64), [np.zeros(0, np.int64)]
    sum_confidence, num_above = 0.0, 0
    for begin in range(0, len(wanted), 1 << 20):  # the columns of 300 million rows are gigabytes
        part = slice(begin, begin + (1 << 20))
        status, label, confidence = (column[wanted[part] if args.only else part] for column in columns)
        done = status == DONE
        counts += np.bincount(label[done], minlength=len(counts))
        sum_confidence += confidence[done].sum(dtype=np.float64)
        num_above += (confidence[done] > 0.3).sum()
        bad.append(np.asarray(wanted[part])[status == UNREADABLE])
    bad = np.concatenate(bad)
    if num_done := counts.sum():
        print(
            f"{args.out}: {num_done} images labelled, of {(counts > 0).sum()} of {len(counts)} classes, "
            f"mean confidence {sum_confidence / num_done:.3f}, {num_above / num_done:.1%} above 0.3",
            flush=True,
        )
    first = [dataset[int(row)][2] or f"{rows.name(row)}: readable now, not when it was its turn" for row in bad[:3]]
    report_bad(len(bad), first, len(wanted), args.max_bad)


if __name__ == "__main__":
    main()
