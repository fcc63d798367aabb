"""What the stages cost beside timm's and torchvision's own loops, which take turns in one run.

    python tests/speed.py all > speed.md

A row is images in a CPU second of a process, its start included, or the ratio to the first row: the
median of --rounds and, in brackets, the least and the most. Memory is the most that a process held.
timm's loops are those of its train.py and inference.py with their default flags, written out. This
process stays small, without torch until the end: a child counts what its parent had as its memory.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ARCH, CLASSES, BATCH = "efficientnet_b0", 10, 64
IMAGES = {32: 2560, 128: 320}  # in a run: 10 to 40 seconds
STORED = {32: (32, 32), 128: (500, 375)}  # pixels of the files


def draw_images(folder: Path, num: int, size: tuple, seed: int) -> None:
    """JPEG files as large as photographs of that many pixels: smooth areas and fine grain."""
    rng = np.random.default_rng(seed)
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = np.asarray(coarse, np.int16) + rng.normal(0, 8, (size[1], size[0], 1)).astype(np.int16)
        path = folder / f"class{i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def timm_loader(folder: Path, size: int, is_training: bool):
    import timm.data
    import torch

    data = timm.data.create_dataset("", root=str(folder), split="")
    noise = {"auto_augment": "rand-m9-n2"} if is_training else {}
    return timm.data.create_loader(
        data, (3, size, size), BATCH, is_training, no_aug=False, num_workers=0, device=torch.device("cpu"),
        interpolation="bicubic", use_prefetcher=False, persistent_workers=False, **noise
    )  # fmt: skip


def timm_train(folder: Path, size: int) -> None:
    import timm
    import timm.utils
    import torch

    torch.set_num_threads(1)
    model = timm.create_model(ARCH, num_classes=CLASSES, drop_path_rate=0.2).train()
    average = timm.utils.ModelEmaV3(model, decay=0.9999)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=2e-5)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for step, (images, target) in enumerate(timm_loader(folder, size, True), 1):
        loss = loss_of(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)
        loss.item()


def timm_label(folder: Path, size: int) -> None:
    import timm
    import torch

    torch.set_num_threads(1)
    model = timm.create_model(ARCH, num_classes=CLASSES).eval()
    with torch.inference_mode():
        probs = [model(images).softmax(1) for images, _ in timm_loader(folder, size, False)]
    np.save(folder / "probs.npy", torch.cat(probs).numpy())


def make_rows(folder: Path, num: int) -> None:
    from label_files import write_labels

    logits = np.random.default_rng(0).standard_normal((num, 100), dtype=np.float32) * 3
    write_labels(folder / "rows.h5", logits, classes=[f"class{c}" for c in range(100)])


def measure(command: list) -> tuple[float, float]:
    """(CPU seconds, GB) of a process; it must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(output.read().decode())
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def take_turns(title: str, unit: str, num: int, variants: dict, rounds: int) -> list[str]:
    """A table. variants: {name: a function that returns CPU seconds for `num` of a unit, and GB}."""
    results = {name: [] for name in variants}
    for number in range(rounds):
        for name, run in variants.items():
            results[name].append(run(number))
    first = [seconds for seconds, _ in next(iter(results.values()))]
    lines = [f"| {title} | speed | memory |", "| --- | ---: | ---: |"]
    for name, runs in results.items():
        ratios = sorted(base / seconds for base, (seconds, _) in zip(first, runs, strict=True))
        speed = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        if len(lines) == 2:
            speed = f"{num / statistics.median(first):,.0f} {unit}"
        memory = statistics.median(gigabytes for _, gigabytes in runs)
        lines.append(f"| {name} | {speed} | {f'{memory:.2f} GB' if memory else ''} |")
    return [*lines, ""]


def train_and_label(work: Path, size: int, what: list[str], rounds: int) -> list[str]:
    """01 and 04 beside timm's training, 02 and 06 beside its inference: whole processes."""
    num, data = IMAGES[size], work / f"data{size}"
    draw_images(data / "train", num, STORED[size], 1)
    draw_images(data / "val", CLASSES, STORED[size], 2)
    draw_images(data / "unlabeled", num, STORED[size], 3)
    draw_images(data / "many" / "val", num, STORED[size], 4)
    os.symlink(data / "train", data / "many" / "train")
    flags = ["--data", data, "--image-size", size, "--num-ops", 2, "--magnitude", 9, "--eval-every", 0]
    teacher = data / "teacher" / "model.pt"
    measure(["01_train_teacher.py", *flags, "--batch-size", BATCH, "--steps", 1, "--out", teacher.parent])
    labels = data / "labels.h5"
    measure(["02_pseudo_label.py", "--teacher", teacher, "--out", labels])

    def stage(name, *more, out="--out"):
        return lambda number: measure([name, *more, out, data / f"{name}-{number}-{time.time_ns()}.h5"])

    def timm(name, folder):
        return lambda number: measure([__file__, name, "--folder", folder, "--size", size])

    tables, steps = [], ["--steps", num // BATCH]
    if "train" in what:
        variants = {"timm": timm("timm-train", data / "train")}
        variants["01"] = stage("01_train_teacher.py", *flags, *steps, "--batch-size", BATCH)
        halves = ["--batch-size", BATCH // 2, "--ratio", 1, "--pseudo-labels", labels]
        variants["04"] = stage("04_train_student.py", *flags, *steps, *halves)
        tables += take_turns(f"training, {size} px", "images", num, variants, rounds)
    if "label" in what:
        variants = {"timm": timm("timm-label", data / "unlabeled")}
        variants["02"] = stage("02_pseudo_label.py", "--teacher", teacher)
        variants["06"] = stage("06_eval_robustness.py", teacher, "--data", data / "many")
        tables += take_turns(f"labelling, {size} px", "images", num, variants, rounds)
    return tables


def noise(size: int, rounds: int) -> list[str]:
    """rand_augment on a batch beside torchvision's on the same images one by one."""
    import torch
    from torchvision import transforms
    from torchvision.transforms import v2

    from common import rand_augment

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC) for pixels in small]
    batch = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    repeats = max(1, 200_000 // size**2)

    def cpu_seconds(function):
        began = time.process_time()
        for _ in range(repeats):
            function()
        return time.process_time() - began, 0

    one_by_one = {"torchvision v1 on PIL": transforms.RandAugment(2, 9), "torchvision v2 on PIL": v2.RandAugment(2, 9)}
    variants = {
        name: lambda _, op=op: cpu_seconds(lambda: [np.asarray(op(picture)) for picture in pictures])
        for name, op in one_by_one.items()
    }
    variants["ours"] = lambda _: cpu_seconds(lambda: rand_augment(batch, 2, 9))
    return take_turns(f"RandAugment, {size} px", "images", repeats * BATCH, variants, rounds)


def select(work: Path, rounds: int) -> list[str]:
    """03 beside a process that reads the same columns and writes as many bytes as 03 wrote."""
    num, labels, out = 4_000_000, work / "rows.h5", work / "selected.h5"
    measure([__file__, "make-rows", "--folder", work, "--size", num])
    stage = ["03_balance.py", labels, "--out", out]
    measure(stage)
    copy = f"import h5py; f = h5py.File('{labels}'); [f[name][:] for name in f]; "
    copy += f"open('{work}/bare', 'wb').write(bytes({out.stat().st_size}))"
    commands = {"h5py reads, Python writes": ["-c", copy], "noisy-student": stage}
    commands["top-p"] = [*stage, "--method", "top-p", "--per-class", num // 500]
    variants = {name: lambda _, command=command: measure(command) for name, command in commands.items()}
    return take_turns(f"selecting of {num:,} x 100", "rows", num, variants, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"timm-train": timm_train, "timm-label": timm_label, "make-rows": make_rows}  # of a process each
    what = ["train", "label", "select", "noise"]
    parser.add_argument("what", nargs="+", choices=["all", *what, *parts])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128], choices=sorted(IMAGES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="of a part that a process of its own does")
    parser.add_argument("--size", type=int, help="of such a part: pixels or rows")
    args = parser.parse_args()
    if args.what[0] in parts:
        parts[args.what[0]](args.folder, args.size)
        return
    what = what if "all" in args.what else args.what
    os.chdir(ROOT)
    tables = []
    with tempfile.TemporaryDirectory() as work:
        for size in args.sizes if {"train", "label"} & {*what} else ():
            tables += train_and_label(Path(work), size, what, args.rounds)
        if "select" in what:
            tables += select(Path(work), args.rounds)
    if "noise" in what:
        for size in (32, 96, 224):
            tables += noise(size, args.rounds)
    print("\n".join(tables))


if __name__ == "__main__":
    main()
