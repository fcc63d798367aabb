"""Stage 02: the teacher labels the unlabelled images, and every logit is kept.

The teacher is not noised here: the clean centre view of each image, the averaged weights, no dropout, no dropped
layers. That asymmetry is the method: the student must find the same answer under noise (1911.04252, algorithm 1).

    y~_i = softmax(f(x~_i, theta_teacher))        stored as logits, so that any temperature can be had later

reads   --teacher model.pt, a folder of images in any nesting, .tar shards in place
writes  logits.h5: one row an image, in the order of the paths. The same command goes on where it was interrupted, with
        any number of processes: the batches are a fixed grid of rows, so the numbers do not depend on it.

    python 02_pseudo_label.py --teacher runs/teacher/model.pt --unlabeled DATA/unlabeled --out runs/logits.h5
    torchrun --nproc-per-node 8 02_pseudo_label.py --teacher runs/teacher/model.pt --out runs/logits.h5
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from common import (
    LOGITS_FORMAT,
    ImageDataset,
    ImageRows,
    StopSignal,
    argument_parser,
    at_least,
    autocast,
    barrier,
    create_logits,
    fail,
    file_sha256,
    init_processes,
    load_batches,
    load_model,
    normalize,
    open_label_file,
    progress,
    read_classes,
    report_bad,
    unlabeled_images,
    view_of,
)

TODO, DONE, UNREADABLE = 0, 1, 2  # status of a row


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="checkpoint whose averaged weights label")
    add("--unlabeled", type=Path, help="folder of images and .tar shards; None: unlabeled/ of the teacher's data")
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
        self.path, self.file = path, os.open(path, os.O_RDWR)
        self.pending, self.synced = [], time.monotonic()

    def put(self, name: str, first: int, values: np.ndarray) -> None:
        data, offset = values.tobytes(), self.offsets[name] + first * values.nbytes // len(values)
        while data:  # a write may be short, on a disk that is filling up for one
            try:
                written = os.pwrite(self.file, data, offset)
            except OSError as error:  # a full disk, a quota
                fail(
                    f"{self.path}: {error.strerror}; all rows whose status is 1 or 2 are kept: make room and run again"
                )
            data, offset = data[written:], offset + written

    def write(self, first: int, logits: np.ndarray, good: np.ndarray) -> None:
        """Rows `first` and following: fp32 logits (n, C), and which of the n images could be read."""
        shifted = logits - logits.max(1, keepdims=True)
        confidence = (1 / np.exp(shifted).sum(1)).astype(np.float32)
        self.put("logits", first, np.where(good[:, None], shifted, np.nan).astype(np.float16))
        self.put("label", first, np.where(good, logits.argmax(1), -1).astype(np.int32))
        self.put("confidence", first, np.where(good, confidence, np.float32("nan")).astype(np.float32))
        self.pending.append((first, np.where(good, DONE, UNREADABLE).astype(np.uint8)))
        if time.monotonic() - self.synced > 5:
            self.sync()

    def sync(self) -> None:
        os.fdatasync(self.file)
        for first, status in self.pending:
            self.put("status", first, status)
        self.pending, self.synced = [], time.monotonic()


def create_or_check(args: argparse.Namespace, checkpoint: dict, is_main: bool) -> None:
    """Create the file for a new run; of an earlier one, check that teacher and images are the same."""
    sha256 = file_sha256(args.teacher)
    folder = args.unlabeled or (Path(checkpoint["data"]) / "unlabeled")
    if args.out.exists():
        with open_label_file(args.out, LOGITS_FORMAT) as file:
            if file.attrs["teacher_sha256"] != sha256:
                fail(f"{args.out} was made by another teacher ({file.attrs['teacher']}): choose another --out")
            if file.attrs["root"] != os.path.abspath(folder):
                fail(f"{args.out} is of --unlabeled {file.attrs['root']}, not {folder}: choose another --out")
    elif is_main:
        create_logits(
            args.out,
            unlabeled_images(folder),
            checkpoint["classes"],
            arch=checkpoint["arch"],
            image_size=checkpoint["image_size"],
            teacher=os.path.abspath(args.teacher),
            teacher_sha256=sha256,
        )


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    processes = init_processes(args.device)
    model, checkpoint = load_model(args.teacher, processes.device, fuse=True)
    create_or_check(args, checkpoint, processes.is_main)
    barrier(processes)
    with open_label_file(args.out, LOGITS_FORMAT) as file:
        rows = ImageRows(file.attrs["root"], file["path"][:], file["offset"][:], file["size"][:])
        status, num_classes = file["status"][:], len(read_classes(file))
    barrier(processes)  # nobody writes before everybody has read what is to be done

    size = rows_per_batch(checkpoint["image_size"], processes.device)
    grid = [range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]
    todo = [
        batch for batch in grid if (status[batch.start : batch.stop] == TODO).any()
    ]  # a cut-off one is redone whole
    if processes.is_main:
        print(
            f"{args.out}: {len(rows)} images, {(status != TODO).sum()} of them done before; {size} a batch", flush=True
        )
    if args.compile:
        model.compile()
    amp, _ = autocast(args.precision, processes.device)
    dataset = ImageDataset(rows, clean=view_of(checkpoint))
    mine = todo[processes.rank :: processes.world_size]
    batches = load_batches(dataset, [list(batch) for batch in mine], processes, args.workers)
    stop, writer = StopSignal(processes), RowWriter(args.out)
    for rows_here, batch in zip(mine, progress(batches, len(mine), "labels", processes), strict=True):
        # Unreadable images are zeros in their place: a batch's shape, and so its numbers, do not depend on them. For a
        # compiled model all shapes are the same, the last one's too.
        side, num = checkpoint["image_size"], len(rows_here)
        images = torch.zeros(size if args.compile else num, 3, side, side, dtype=torch.uint8)
        good = np.zeros(num, dtype=bool)
        if len(batch.rows):
            good[batch.rows.numpy() - rows_here.start] = True
            images[:num][torch.from_numpy(good)] = batch.views[0]
        images = images.to(processes.device, non_blocking=True)
        with amp:
            logits = model(normalize(images, checkpoint["mean"], checkpoint["std"]))
        logits = logits[:num].float().cpu().numpy()
        if not np.isfinite(logits[good]).all():
            fail(f"--teacher {args.teacher} gives logits that are not finite")
        writer.write(rows_here.start, logits, good)
        if stop.received:  # each process for itself: nothing here waits for another
            writer.sync()
            raise SystemExit(143)
    writer.sync()
    barrier(processes)

    with open_label_file(args.out, LOGITS_FORMAT) as file:
        status, confidence, label = file["status"][:], file["confidence"][:], file["label"][:]
    done = status == DONE
    if processes.is_main and done.any():
        print(
            f"{args.out}: {done.sum()} images labelled, of {len(np.unique(label[done]))} of {num_classes} classes, "
            f"mean confidence {confidence[done].mean():.3f}, {(confidence[done] > 0.3).mean():.1%} above 0.3",
            flush=True,
        )
    bad = np.flatnonzero(status == UNREADABLE)
    report_bad([(int(row), rows.name(row)) for row in bad], len(rows), args.max_bad, processes)


if __name__ == "__main__":
    main()
