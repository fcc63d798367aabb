"""Stage 02: the teacher labels the unlabelled images, and every logit is kept.

The teacher gets no noise: it sees the clean centre view of each image, and its averaged weights run without dropout and
without stochastic depth. The student must find the same answer under noise (1911.04252, algorithm 1).

    y~_i = softmax(f(x~_i, theta_teacher))        stored as logits, so that the student can apply any temperature

reads   --teacher model.pt, and a folder of images in any nesting, with .tar shards in place; or --only balanced.h5 and
        the logits file that it names: a better teacher labels the selected images alone (the official "reassign")
writes  logits.h5: one row an image, in path order. The same command continues it, with any number of processes
        --csv FILE: the labels as text. Of a single image the five best classes are printed

    python 02_pseudo_label.py --teacher runs/teacher/model.pt --unlabeled DATA/unlabeled --out runs/logits.h5
    torchrun --nproc-per-node 8 02_pseudo_label.py --teacher runs/teacher/model.pt --out runs/logits.h5
    python 02_pseudo_label.py --teacher runs/student/model.pt --only runs/balanced.h5 --out runs/newer.h5
    python 02_pseudo_label.py --teacher runs/student/model.pt --unlabeled photo.jpg --out runs/photo.h5
"""

import argparse
import json
import math
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import add_device_flags, argument_parser, at_least, fail, file_sha256, nearest_folder  # program
from common import on_several_nodes, print0  # program
from common import StopSignal, init_processes, progress, wait_until  # processes
from common import recipe_of, resolution_of  # models
from common import rand_augment  # noise
from common import View, normalize  # views
from common import digests_of_val, images_at, is_lost, root_of  # listing
from common import ImageDataset, load_batches, report_bad, rows_per_batch  # batches
from common import DONE, HELD_OUT, LOGITS_FORMAT, TODO, UNREADABLE, status_of, write_csv  # label files
from common import create_logits, image_list, map_dataset, open_label_file, read_classes, read_held_out
from common import same_paths, selected_images  # label files, selections
from common import load_model  # checkpoints
from common import autocast, noise_model, precision_of, step_generator  # training

SYNC_SECONDS = 5  # a row counts as done after a sync, so a `kill -9` costs about as much work as this


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="checkpoint whose averaged weights label")
    unlabeled = "images and .tar shards, or one image: its best classes are printed; None: unlabeled/ of teacher's data"
    add("--unlabeled", type=os.path.abspath, metavar="DIR|IMAGE", help=unlabeled)
    add("--only", type=Path, help="balanced.h5: label its images alone, at their old rows; for 04 --logits")
    add("--out", type=Path, required=True, help="the logits file; one that exists is continued")
    add("--csv", type=Path, help="the labels as text too: path,class,confidence, a line a labelled image")
    noised = {"nargs": "?", "metavar": "M", "type": at_least(0), "const": math.nan}
    add("--noised", **noised, help="a noised teacher: dropout, 2 ops of magnitude M; without M the recipe's, else 9")
    add("--max-bad", type=at_least(0), default=1.0, help="percent of unreadable images up to which the status is 0")
    add_device_flags(parser)
    args = parser.parse_args()
    others = [path for path in (args.teacher, args.out, args.only, args.unlabeled) if path]
    if args.csv and os.path.realpath(args.csv) in map(os.path.realpath, others):
        fail(f"--csv {args.csv} would replace another file of this command")
    if args.only and os.path.isfile(args.unlabeled or ""):
        fail(f"--unlabeled {args.unlabeled} is one image: with --only it is the folder of the selected images")
    return args


def open_output(path: Path, folder: str, teacher_sha256: str, how: dict):
    """(images, status, digests of val) of a logits file of this folder and teacher. how: what it was begun with."""
    with open_label_file(path, LOGITS_FORMAT) as file:
        if file.attrs["teacher_sha256"] != teacher_sha256:
            fail(f"{path} was made by another teacher ({file.attrs['teacher']}): choose another --out")
        if file.attrs["root"] != folder:
            fail(f"{path} is of --unlabeled {file.attrs['root']}, not {folder}: choose another --out")
        for name, now in how.items():  # older files do not say; none of them is noised
            older = {"noised": "no", "crop_mode": "center"}.get(name, now)
            if (then := file.attrs.get(name, older)) != now:
                fail(f"{path} was begun with --{name.replace('_', '-')} {then}, not {now}: choose another --out")
        return image_list(file), map_dataset(file, "status"), read_held_out(file)


class RowWriter:
    """Fills rows of a logits file in place, at known offsets: nothing in the structure of the HDF5 file changes.

    The status of a row is written after a sync of its data. So a row that says `done` is right, whatever happens.
    """

    def __init__(self, path: Path):
        with open_label_file(path, LOGITS_FORMAT) as file:
            self.offsets = {name: file[name].id.get_offset() for name in ("logits", "label", "confidence", "status")}
        # A write to NFS is of a whole page, with what other nodes wrote there since it was read, unless O_DSYNC is set.
        flags = os.O_WRONLY | (os.O_DSYNC if on_several_nodes() else 0)
        try:
            self.path, self.file = path, os.open(path, flags)
        except OSError as error:
            fail(f"{path} cannot be written: {error.strerror}")
        self.queue, self.thread, self.pending = deque(), ThreadPoolExecutor(1), []
        self.synced, self.stopped = time.monotonic(), False

    def stop(self, reason: str) -> None:
        if self.stopped:  # the next rows in the queue meet the same full disk: one line is enough
            raise SystemExit(2)
        self.stopped = True
        fail(f"{self.path}: {reason}; the rows that have a status are kept: run again", from_any=True)

    def put(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Write one value of `values` a row. The rows ascend."""
        begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # of the runs of neighbours, each written at once
        for first, part in zip(rows[begins], np.split(values, begins[1:]), strict=True):
            data, offset = part.tobytes(), self.offsets[name] + int(first) * part[0].nbytes
            while data:  # a write may be short, for one on a disk that is filling up
                try:
                    written = os.pwrite(self.file, data, offset)
                except OSError as error:
                    self.stop(f"{error.strerror}: make room")
                data, offset = data[written:], offset + written

    def write(self, rows: np.ndarray, logits: torch.Tensor, status: np.ndarray, wanted=slice(None)) -> None:
        """Write the logits (n, C) of n rows, with the status of each. `wanted`: which of the n rows to write."""
        rows, logits, status = rows[wanted], logits.float().cpu().numpy()[wanted], status[wanted].astype(np.uint8)
        good = status == DONE
        if not len(rows):  # the same command runs twice, and the other one has done this batch
            return
        if not np.isfinite(logits[good]).all():
            self.stop("the teacher gives logits that are not finite, try --precision fp32 or another teacher")
        shifted = logits - logits.max(1, keepdims=True)  # float16 is fine near 0, where the probable classes are
        confidence = (1 / np.exp(shifted).sum(1)).astype(np.float32)  # softmax of the largest logit, which is now 0
        self.put("logits", rows, np.where(good[:, None], shifted, np.nan).astype(np.float16))
        self.put("label", rows, np.where(good, logits.argmax(1), -1).astype(np.int32))
        self.put("confidence", rows, np.where(good, confidence, np.float32("nan")).astype(np.float32))
        self.pending.append((rows, status))
        if time.monotonic() - self.synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        if not os.path.exists(self.path) or not os.path.samestat(os.stat(self.path), os.fstat(self.file)):
            self.stop("it was removed or replaced while it was being filled")
        try:
            getattr(os, "fdatasync", os.fsync)(self.file)  # macOS has the latter alone
        except OSError as error:
            self.stop(f"{error.strerror}: make room")
        for rows, status in self.pending:
            self.put("status", rows, status)
        self.pending, self.synced = [], time.monotonic()

    def submit(self, *batch) -> None:
        """Call `write` in a thread, beside the next batches. An error in it ends this process."""
        self.queue.append(self.thread.submit(self.write, *batch))
        if len(self.queue) > 4:  # batches: on GPUs they hold memory
            self.queue.popleft().result()

    def finish(self) -> None:
        for write in self.queue:
            write.result()
        self.sync()


def print_best(labels: Path) -> None:
    """Print the five most probable classes of a file's one image."""
    with open_label_file(labels, LOGITS_FORMAT) as file:
        classes, status, confidence = read_classes(file), file["status"][0], file["confidence"][0]
        logits = file["logits"][0].astype(np.float32)  # the largest is 0, and its probability the confidence
    for c in np.argsort(-logits, kind="stable")[:5] if status == DONE else ():
        print0(f"{confidence * np.exp(logits[c]):7.2%}  {classes[c]}")


def report(args: argparse.Namespace, num_classes: int, wanted: np.ndarray | range, dataset: ImageDataset) -> None:
    """Print what the teacher said of the images, and which of them are unreadable."""
    with open_label_file(args.out, LOGITS_FORMAT) as file:
        status, label, confidence = (map_dataset(file, name) for name in ("status", "label", "confidence"))
    counts, sum_confidence, num_above = np.zeros(num_classes, np.int64), 0.0, 0
    for begin in range(0, len(wanted), 1 << 20):  # the columns of 300 million rows are gigabytes
        rows = np.asarray(wanted[begin : begin + (1 << 20)])
        done = rows[status[rows] == DONE]
        counts += np.bincount(label[done], minlength=num_classes)
        sum_confidence += confidence[done].sum(dtype=np.float64)
        num_above += (confidence[done] > 0.3).sum()  # stage 03's default threshold, the paper's
    if num_done := counts.sum():
        share = f"mean confidence {sum_confidence / num_done:.3f}, {num_above / num_done:.1%} above 0.3"
        print0(f"{args.out}: {num_done} images labelled, of {(counts > 0).sum()} of {num_classes} classes, {share}")
    of_val = np.flatnonzero(status_of(args.out, wanted) == HELD_OUT)
    if len(of_val):
        first = "; ".join(dataset.images.name(int(wanted[i])) for i in of_val[:3])
        print0(f"{len(of_val)} images are byte for byte images of val, and left out (status 3); the first: {first}")
    bad = np.flatnonzero(status_of(args.out, wanted) == UNREADABLE)
    first = [(row, dataset[row][2]) for row in (int(wanted[i]) for i in bad[:3])]
    first = [error or f"{dataset.images.name(row)}: readable now, but not when it was labelled" for row, error in first]
    report_bad(len(bad), first, len(wanted), args.max_bad)


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    processes = init_processes(args.device, args.workers, args.out, connect=False)  # so no time limits
    model, checkpoint = load_model(args.teacher, processes.device, fuse=True)
    view, sha256, precision = View.of(checkpoint), file_sha256(args.teacher), precision_of(args.precision, processes)
    data, arch, magnitude = checkpoint.get("data"), checkpoint["arch"], args.noised
    if args.noised is not None:
        noise_model(model)
        magnitude = recipe_of(arch, args).magnitude or 9.0 if math.isnan(args.noised) else args.noised
    how = {"precision": precision, "noised": "no" if magnitude is None else f"{magnitude:g}"}
    how |= {"crop_mode": view.crop_mode}

    # List the images. This can take hours and has nothing to save, so until `stop` is there a signal ends the process.
    creates = processes.is_main and not args.out.exists()
    if not args.only and not args.unlabeled and not data:
        fail(f"--unlabeled: say where the images are, for {args.teacher} has no data directory")
    if args.only:
        listed, wanted = selected_images(args.only, args.unlabeled)
        folder = listed.root
    else:
        folder = args.unlabeled or os.path.abspath(os.path.join(data, "unlabeled"))
        listed = images_at(folder, data, nearest_folder(args.out)) if creates else []  # it lies on that disk
        wanted = range(len(listed))
    stop = StopSignal(processes)

    # Process 0 creates the output. All processes, and all later runs, take the list of the images from it.
    if creates and not args.out.exists():
        facts = {"arch": arch, "arch_options": json.dumps(checkpoint["arch_options"])}
        facts |= {"image_size": view.image_size, **how}
        facts |= {"teacher": os.path.abspath(args.teacher), "teacher_sha256": sha256}
        create_logits(args.out, listed, checkpoint["classes"], len(wanted), digests_of_val(data, folder), **facts)
    wait_until(args.out.exists, f"process {processes.rank} waits for {args.out}, which process 0 makes", stop)
    images, status, held_out = open_output(args.out, root_of(folder), sha256, how)
    if not args.only:
        wanted = range(len(images))
        # Without val/ both of these names stand for a part of train/. One image is not all of its folder.
        is_part = os.path.basename(folder) in ("train", "val") or os.path.isfile(folder) or len(images) == 1
        listed = images_at(folder) if is_part else images
        if not same_paths(images, listed):
            fail(f"{args.out} has other images than {folder}: choose another --out")
    elif not same_paths(images, listed, wanted):
        fail(f"{args.out} has other images in the rows of {args.only}: choose another --out")

    # Batch k is a fixed list of rows and belongs to process k % world_size. It is labelled whole, if only in part done.
    size = rows_per_batch(view.image_size, processes.device)
    is_todo = status_of(args.out, wanted) == TODO
    print0(f"{args.out}: {len(wanted)} images, {len(wanted) - is_todo.sum()} of them done before; {size} a batch")
    todo = np.flatnonzero(np.logical_or.reduceat(is_todo, np.arange(0, len(wanted), size)))
    todo = todo[todo % processes.world_size == processes.rank]

    def rows_of(k: int) -> np.ndarray:
        return np.asarray(wanted[k * size : (k + 1) * size])

    if args.compile:
        model.compile()
    amp, _ = autocast(precision, processes.device)
    dataset = ImageDataset(images, clean=view, held_out=held_out)
    batches = load_batches(dataset, (rows_of(k).tolist() for k in todo), processes)
    writer = RowWriter(args.out)
    began, num_seen, num_bad, lost = time.monotonic(), 0, 0, False

    def note() -> str:
        rate = processes.world_size * num_seen / (time.monotonic() - began)
        return f"{rate:.0f} images/s, {processes.world_size * num_bad} unreadable"

    for k, batch in zip(todo, progress(batches, len(todo), "batches", processes, note=note), strict=True):
        # Unreadable images are zeros in their place: a batch's shape, and so its numbers, do not depend on them. For a
        # compiled model all batches have one shape, the last one too.
        rows = rows_of(k)
        good, of_val = np.isin(rows, batch.rows.numpy()), np.isin(rows, batch.held_out)
        pixels = torch.zeros(size if args.compile else len(rows), *batch.views[0].shape[1:], dtype=torch.uint8)
        pixels[: len(rows)][torch.from_numpy(good)] = batch.views[0]
        pixels = pixels.to(processes.device, non_blocking=True)
        if magnitude is not None:  # drawn by the number of the batch: kills and processes change nothing
            generator = step_generator(0, "noised labels", int(k), 0)
            pixels = rand_augment(pixels, 2, magnitude, generator, resolution=resolution_of(arch))
        with amp:
            logits = model(normalize(pixels, view))  # (n, C)
        lost = bool(batch.errors) and is_lost(images.root)  # an unmounted disk is not millions of bad images
        if not lost:  # rows that are done stay as they are
            now = np.where(good, DONE, np.where(of_val, HELD_OUT, UNREADABLE))
            writer.submit(rows, logits[: len(rows)], now, status[rows] == TODO)
        num_seen, num_bad = num_seen + len(rows), num_bad + len(batch.errors)
        if stop.received or lost:
            break
    writer.finish()
    if lost:
        fail(f"{images.root} is gone; the rows that are done are kept: run again when it is back", from_any=True)
    if stop.received:
        raise SystemExit(143)
    if processes.is_main:
        if processes.world_size > 1:
            todo = status_of(args.out, wanted) == TODO
            words = f"{args.out}: {todo.sum()} images are left to the other processes"
            wait_until(lambda: (status_of(args.out, wanted) != TODO).all(), words, stop)
        if os.path.isfile(folder):
            print_best(args.out)
        if args.csv:
            write_csv(args.csv, args.out, wanted)
        report(args, len(checkpoint["classes"]), wanted, dataset)


if __name__ == "__main__":
    main()
