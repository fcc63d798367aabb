"""Seconds and memory of the stages with as many images as the paper has: 300 million unlabelled ones, 1,000 classes.

listing    the members of .tar shards (links to one of 10,000 members of a byte), and 02's logits.h5 for them
labels     02 on a made-up logits.h5 in which only the last batch lacks its labels: the start up to the first new label,
           then the same command when nothing is left
balance    03 on a made-up logits.h5: a row a selection
training   04 with the selection of `balance`: its start up to the first step, and what it keeps

    taskset -c 0 python tests/scale.py listing --rows 30_000_000 --tmp /folder/with/10/GB
    taskset -c 0 python tests/scale.py labels balance training --rows 300_000_000 --tmp /folder/with/15/GB

In the made-up file paths, labels, confidences and status are real; logits, offsets and sizes are holes, which take no
disk. The first row of each table is a bare read of the bytes that the others need. Memory is that of the process, the
largest that was seen: its own, and with the pages of files that it has mapped, which the system takes back if it must.
"""

import argparse
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from conftest import CHEAP, ROOT, noise_image, save_model  # makes common importable

from common import DONE, LOGITS_FORMAT, SELECTION_FORMAT, TODO, allocate_columns, file_sha256, open_label_file, slices

PER_SHARD, NUM_CLASSES, NUM_NAMES = 10_000, 1000, 4096
READ_HEADERS = """
import os, sys
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        file = os.open(os.path.join(folder, name), os.O_RDONLY)
        for at in range(0, os.fstat(file).st_size - 10240, 1024):
            os.pread(file, 512, at)
        os.close(file)
"""
LIST = """
import sys, time
from pathlib import Path
import common
out, began = Path(sys.argv[2]), time.perf_counter()
images = common.list_images(sys.argv[1], out.parent)
print(f"listed {len(images):,} in {time.perf_counter() - began:.1f} s", end=", ")
began = time.perf_counter()
about = dict(arch="a", image_size=32, teacher="t", teacher_sha256="s")
common.create_logits(out, images, [str(c) for c in range(1000)], 0, **about)
print(f"created the file in {time.perf_counter() - began:.1f} s")
"""
READ_COLUMNS = """
import sys, h5py
with h5py.File(sys.argv[1], locking=False) as file:
    for name in sys.argv[2:]:
        for begin in range(0, len(file[name]), 1 << 20):
            file[name][begin : begin + (1 << 20)]
"""
ORDERS = """
import sys, common
num = int(sys.argv[1])
steps = range(num // 100 - 1, num // 100 + 2)
keys = common.train_keys(num, 100, 0, "orders", steps, common.init_processes("cpu", 0))
print(sum(map(len, keys)), "keys")
"""


def measured(what: str, *words, until=None) -> None:
    """Run a Python program and print its seconds, those of the CPU, its largest memory in GB, and its first line.

    until: a function; the seconds until it is first true are printed too.
    """
    began, own, mapped, usage, said = time.perf_counter(), 0, 0, None, ""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not usage:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        own = max(own, int(status.get("RssAnon", "0").split()[0]))
        mapped = max(mapped, int(status.get("VmHWM", "0").split()[0]))
        if until and not said and until():
            said = f"{time.perf_counter() - began:.0f} s up to it; "
        time.sleep(0.05)
        pid, code, found = os.wait4(process.pid, os.WNOHANG)  # with the CPU seconds of its children
        usage = found if pid else None
    seconds, printed = time.perf_counter() - began, process.stdout.read()
    if code:
        sys.exit(f"{what}: status {code}\n{printed}")
    said += printed.split("\n")[0].rpartition("/")[2][:90]  # without the folder
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"| {what} | {seconds:.0f} | {cpu:.0f} | {own * 1024 / 1e9:.2f} | {mapped * 1024 / 1e9:.2f} | {said} |",
        flush=True,
    )


def heading(what: str) -> None:
    print(
        f"\n| {what} | seconds | CPU seconds | memory GB | with mapped files | it says |\n|---|" + "---:|" * 4 + "---|"
    )


def write_shards(folder: Path, num_members: int) -> None:
    with tarfile.open(folder.parent / "one.tar", "w") as shard:
        for i in range(PER_SHARD):
            member = tarfile.TarInfo(f"{i:09}.jpg")
            member.size = 1
            shard.addfile(member, io.BytesIO(b"x"))
    for i in range(num_members // PER_SHARD):
        (folder / f"{i // 1000:03}").mkdir(parents=True, exist_ok=True)
        os.link(folder.parent / "one.tar", folder / f"{i // 1000:03}" / f"{i:05}.tar")


def listing(folder: Path, num_rows: int) -> None:
    write_shards(folder / "shards", num_rows)
    heading(f"{num_rows:,} members of shards")
    measured("a bare read of the headers", "-c", READ_HEADERS, folder / "shards")
    measured("listing, and creating logits.h5", "-c", LIST, folder / "shards", folder / "listed.h5")


def write_images(folder: Path) -> list[str]:
    """DATA with an image a class in train/ and val/, and 4,096 names of one image in unlabeled/; the classes."""
    classes = [f"{c:04}" for c in range(NUM_CLASSES)]
    noise_image(40, 40).save(folder / "0.png")
    names = [f"{split}/{name}/0.png" for split in ("train", "val") for name in classes]
    for name in names + [f"unlabeled/{i:04}.png" for i in range(NUM_NAMES)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "0.png", folder / name)
    return classes


def write_labels(path: Path, num_rows: int, classes: list[str], root: Path, teacher_sha256: str) -> None:
    """A finished logits.h5: a long tail of classes, 27 percent of the confidences above 0.3 as the paper had it."""
    text = h5py.string_dtype("utf-8", 8)
    rng, names = np.random.default_rng(0), np.array([f"{i:04}.png" for i in range(NUM_NAMES)], text)
    with h5py.File(path, "w", alignment_threshold=1, alignment_interval=4096) as file:
        allocate_columns(file, num_rows, len(classes), text)
        for part in slices(num_rows):
            uniform = rng.random((2, part.stop - part.start), np.float32)
            file["path"][part] = np.resize(names, uniform.shape[1]).astype(
                text
            )  # NUM_NAMES divides all slices but the last
            file["label"][part] = len(classes) * uniform[0] ** 2
            file["confidence"][part] = np.maximum(uniform[1] ** 3.83, 1 / len(classes))
            file["status"][part] = DONE
        file.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        facts = {"arch": CHEAP, "image_size": 32, "teacher": "t", "teacher_sha256": teacher_sha256}
        file.attrs.update(format=LOGITS_FORMAT, root=str(root), precision="fp32", noised="no", **facts)


def make_labels(folder: Path, num_rows: int) -> None:
    classes, teacher = write_images(folder), folder / "model.pt"
    save_model(teacher, classes=classes)
    write_labels(folder / "logits.h5", num_rows, classes, folder / "unlabeled", file_sha256(teacher))


def labels(folder: Path, num_rows: int) -> None:
    teacher, out = folder / "model.pt", folder / "logits.h5"
    last = slice((num_rows - 1) // 512 * 512, num_rows)  # 512 images of 32 pixels are a batch
    with h5py.File(out, "r+") as file:
        file["status"][last], file["confidence"][last] = TODO, 0
        place = file["confidence"].id.get_offset() + 4 * last.start

    def is_labelled() -> bool:
        with open(out, "rb") as file:
            file.seek(place)
            return any(file.read(4))

    heading(f"02 on {num_rows:,} rows")
    measured("a bare read of label, confidence, status", "-c", READ_COLUMNS, out, "label", "confidence", "status")
    words = ["02_pseudo_label.py", "--teacher", teacher, "--unlabeled", folder / "unlabeled", "--out", out]
    words += ["--device", "cpu", "--workers", 0]
    measured("the last batch is left", *words, until=is_labelled)
    measured("nothing is left", *words)


def balance(folder: Path, num_rows: int, per_class: int) -> None:
    heading(f"03 on {num_rows:,} rows x 1,000 classes")
    path, out = folder / "logits.h5", folder / "balanced.h5"
    measured("a bare read of label, confidence, status", "-c", READ_COLUMNS, path, "label", "confidence", "status")
    selections = ["--per-class all", "--per-class all --fraction 0.25", "--per-class all --max-confidence 0.6", ""]
    for flags in [*selections, f"--per-class {per_class}"]:  # the last one stays for 04
        measured(f"03 {flags or 'without flags'}", "03_balance.py", path, "--out", out, *flags.split())


def training(folder: Path) -> None:
    selection, out = folder / "balanced.h5", folder / "student"
    with open_label_file(selection, SELECTION_FORMAT) as file:
        num = len(file["row"])
    heading(f"04 on {num:,} examples")
    measured("a bare read of the selection", "-c", READ_COLUMNS, selection, "file", "row", "label", "confidence")
    measured("the orders of two epochs, one after the other", "-c", ORDERS, num)
    words = ["04_train_student.py", "--pseudo-labels", selection, "--data", folder, "--arch", CHEAP, "--out", out]
    words += ["--epochs", 20 / NUM_CLASSES, "--batch-size", 4, "--ratio", 3, "--image-size", 32]
    words += ["--device", "cpu", "--workers", 0]
    measured("04: from the start to the end of 5 steps", *words, until=(out / "metrics.jsonl").exists)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ["listing", "labels", "balance", "training"]
    parser.add_argument("what", nargs="+", choices=what, help="training needs balance before it")
    parser.add_argument("--rows", type=int, default=1_000_000, help="members of shards, rows of the made-up logits.h5")
    parser.add_argument("--per-class", type=int, default=130_000, help="K of 03: the paper's")
    parser.add_argument("--tmp", type=Path, help="where the files are made, and removed; None: the system's folder")
    args = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, commit {commit.strip()}")
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        folder = Path(folder)
        if "listing" in args.what:
            listing(folder, args.rows)
        if {*args.what} - {"listing"}:
            make_labels(folder, args.rows)
        if "labels" in args.what:
            labels(folder, args.rows)
        if "balance" in args.what:
            balance(folder, args.rows, args.per_class)
        if "training" in args.what:
            training(folder)


if __name__ == "__main__":
    main()
