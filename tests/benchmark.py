"""Speed and memory of this toolkit's own code, beside what one would use instead.

train       training EfficientNet-B0: the bare step, and whole steps with reading, noise, average and log, of timm's
            train.py and of stages 01 and 04 on the same images
inference   EfficientNet-B0 alone: timm's as `create_model` gives it against ours with the same weights as stages 02 and
            06 run it (batch norms folded, channels_last, their batch), once both agree on the logits
label       stage 02 over a folder of JPEGs against timm's inference.py, stage 06 on it against timm's validate.py
balance     stage 03 over made-up logits against pandas, polars and plain h5py with numpy or torch, with the peak memory
noise       RandAugment with 2 ops of magnitude 9, each applied always: torchvision's and timm's image by image,
            kornia's and ours on a batch of the same images
all         these, one after the other, with what they were measured on: the tables of docs/speed.md
paste       put the tables that `all` printed into docs/speed.md
memory      peak of training steps of stage 01, with and without --accumulate and --checkpoint-activations
robustness  what drawing stage 06's corruptions adds to the time of EfficientNet-B0, and the time of each corruption

    python tests/benchmark.py all --compile | tee speed.txt && python tests/benchmark.py paste speed.txt
    python tests/benchmark.py all --quick
    python tests/benchmark.py balance --tmp /folder/with/1/GB
    python tests/benchmark.py memory --models efficientnet_b7:224:8
    python tests/benchmark.py robustness --threads 1

The loops of timm's train.py, validate.py and inference.py are transcribed, with the defaults of their flags. Variants
take turns, and the median of the rounds counts. A package that is not installed is left out, and the head of `all`
says so. On a machine that others use too, absolute numbers mean little, also from one run to the next: quote ratios
within one table.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import torch
from conftest import ROOT, SERVER, draw_data, load_stage  # makes common importable
from PIL import Image
from torch import Tensor, nn

import common
import label_files
from common import CHECKPOINT_FORMAT, DONE, IMAGENET_MEAN, IMAGENET_STD, LOGITS_FORMAT, ImageList, argument_parser
from common import at_least, autocast, build_model, create_logits, fuse_batch_norms, init_processes, load_weights
from common import make_optimizer, map_dataset, open_label_file, rand_augment, save_checkpoint, write_atomically

PEERS = {name: bool(importlib.util.find_spec(name)) for name in ("timm", "torchvision", "kornia", "pandas", "polars")}
CLOCKS = {"wall": "elapsed", "cpu": "computed by the process and its ended children: for one thread beside other work"}
PRECISIONS, STAGES = ("fp32", "bf16"), ("01", "04")  # of training
ROOMS = {  # of `all`: what --quick makes of each
    "train": "--arch timm/test_efficientnet --size 32 --batch 4 --steps 1",
    "inference": "--arch timm/test_efficientnet --sizes 32 --images 2",
    "label": "--arch timm/test_efficientnet --number 2 --size 32",
    "balance": "--sizes 2000:10:20",
    "noise": "--sizes 8 --images 4",
}


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    commands = parser.add_subparsers(required=True)

    shared = {"arch": {"default": "efficientnet_b0", "help": "of both; timm/NAME: timm's model in our stages too"}}
    shared["compile"] = {"action": "store_true", "help": "ours compiled as well: a minute or two for each such row"}
    shared["tmp"] = {"help": "folder for what is made up, 1 GB, for L2 10; removed again; None: the system's"}
    shared["rounds"] = {"type": at_least(1, int), "default": 5, "help": "medians are taken over them"}
    clocks = "; ".join(f"{name}: {words}" for name, words in CLOCKS.items())
    shared["clock"] = {"choices": CLOCKS, "default": "wall", "help": f"seconds {clocks}"}

    def command(function, text: str, *names: str):
        name, device = function.__name__.removeprefix("run_"), "cuda" if torch.cuda.is_available() else "cpu"
        options = commands.add_parser(name, help=text, formatter_class=parser.formatter_class)
        options.set_defaults(function=function)
        options.add_argument("--threads", type=at_least(1, int), default=2, help="of torch and polars on CPUs")
        options.add_argument("--device", choices=["cpu", "cuda"], default=device, help="where it is measured")
        for name in names:
            options.add_argument(f"--{name}", **shared[name])
        return options.add_argument

    add = command(run_all, "all tables of docs/speed.md", "rounds", "clock", "compile", "tmp")
    add("--quick", action="store_true", help="one round of everything in small: does it run?")
    add("--rooms", nargs="+", choices=ROOMS, default=[*ROOMS], help="only these tables")
    add = commands.add_parser("paste", help="put the tables of `all` into docs/speed.md").add_argument
    add("file", type=Path, help="what `all` printed")
    add = command(train, "training", "rounds", "clock", "arch", "compile")
    add("--size", type=at_least(32, int), default=32, help="pixels")
    add("--batch", type=at_least(4, int), default=64, help="images a step; 04: a quarter of them labelled")
    add("--steps", type=at_least(1, int), help="of each variant in each round; None: 2, on GPUs 20")
    add = command(inference, "a model alone", "rounds", "clock", "arch", "compile")
    add("--sizes", type=at_least(32, int), nargs="+", default=[224, 32], help="pixels")
    add("--images", type=at_least(1, int), help="a round; None: as many as the larger batch")
    add = command(label, "labelling and evaluating a folder", "rounds", "clock", "arch")
    add("--number", type=at_least(1, int), default=32, help="of drawn images, 500 x 375, 110 kB")
    add("--size", type=at_least(32, int), default=224, help="pixels of the model")
    add = command(balance, "selecting from made-up logits", "rounds", "clock", "tmp")
    sizes = [rows_classes_kept(text) for text in ("2000000:100:2000", "200000:1000:200")]
    add("--sizes", type=rows_classes_kept, nargs="+", default=sizes, help="ROWS:CLASSES:PER_CLASS ...")
    add = command(noise, "RandAugment", "rounds", "clock")
    add("--sizes", type=at_least(8, int), nargs="+", default=[32, 96, 224], help="pixels")
    add("--images", type=at_least(1, int), help="a batch; None: 256, or what has 12 MB (on GPUs 48 MB)")
    add = command(memory, "peak memory of a training step", "tmp")
    models = [model_pixels_batch(text) for text in ("efficientnet_b7:224:8", "efficientnet_l2:128:4")]
    add("--models", type=model_pixels_batch, nargs="+", default=models, help="ARCH:PIXELS:BATCH ...")
    add = command(robustness, "cost of what stage 06 evaluates on, against its model", "rounds", "clock")
    add("--number", type=at_least(1, int), default=64, help="of images")
    add("--workers", type=at_least(0, int), help="loaders; None: stage 06's own choice")
    return parser.parse_args(words)


def model_pixels_batch(text: str) -> tuple[str, int, int]:
    arch, pixels, batch = text.split(":")
    return arch, int(pixels), int(batch)


def rows_classes_kept(text: str) -> tuple[int, ...]:
    rows, classes, per_class = map(int, text.split(":"))
    return rows, classes, per_class


def print_rows(*rows) -> None:
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def seconds_of(clock: str) -> float:
    if clock == "wall":
        return time.perf_counter()
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


def race(
    variants: dict, args: argparse.Namespace, unit: str, more: tuple[str, dict] | None = None, warm_up: int = 1
) -> None:
    """Let all variants take turns, and print a table of what each reaches.

    variants: {"group: name": (number of things, call)}; a call may return the seconds that count, else its own time
    does. The first turn of each warms up. The ratio of a row, in each round, is to the first of its group. Rows of ours
    are named "ours ..."; those in parentheses are no contestants. more: one more column, (its name, {variant: cell}).
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = {name: [] for name in variants}
    for _ in range(warm_up + args.rounds):
        for name, (_, call) in variants.items():
            began = seconds_of(args.clock)
            own = call()
            wait()
            seconds[name].append(own if isinstance(own, float) else seconds_of(args.clock) - began)
    group_of = {name: name.partition(": ")[0] for name in variants}
    speeds = {name: [variants[name][0] / time_of for time_of in times[warm_up:]] for name, times in seconds.items()}
    column, cells_of = more or ("", {})
    print_rows(("", unit, "ratio", "least", "most", *([column] if more else [])))
    print_rows(("---", *["---:"] * (5 if more else 4)))
    behind, num_ours = [], 0
    for name, found in speeds.items():
        group = [other for other in variants if group_of[other] == group_of[name]]
        ratios = sorted(one / other for one, other in zip(found, speeds[group[0]], strict=True))
        cells = [f"{value:.2f}" for value in (median(ratios), ratios[0], ratios[-1])]
        reached = f"{median(found):,.0f}" if median(found) >= 10 else f"{median(found):.2g}"
        print_rows((name, reached, *cells, *([cells_of.get(name, "")] if more else [])))
        peers = [other for other in group if not other.partition(": ")[2].startswith(("ours", "("))]
        if peers and name.partition(": ")[2].startswith("ours"):
            num_ours += 1
            best = max(peers, key=lambda peer: median(speeds[peer]))
            ratio = median(one / other for one, other in zip(found, speeds[best], strict=True))
            behind += [f"{name} ({ratio:.2f} of {best.partition(': ')[2]})"] if ratio <= 1 else []
    words = f", {len(behind)} behind: {'; '.join(behind)}." if behind else ", all ahead of every peer of their group."
    print(f"\nRows of ours with a peer: {num_ours}{words}")
    first = [times[0] - median(times[1:]) for name, times in seconds.items() if "compiled" in name]
    if first:
        print(f"The first call of a compiled row took {min(first):.0f} to {max(first):.0f} s more.")
    print(flush=True)


def machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", about.read_text() if about.exists() else "", re.M)
    name = found[1] if found else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, threads={args.threads}"


def head(args: argparse.Namespace) -> None:
    packages = ["torch", *(name for name, there in PEERS.items() if there), "numpy", "h5py", "pillow"]
    print(f"- Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}.")
    if missing := [name for name, there in PEERS.items() if not there]:
        print(f"- Not installed, and so left out: {', '.join(missing)}.")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[2]
    words = f"{cores} of its {os.cpu_count()} cores, whose load in the quarter of an hour before was {load:.1f}"
    print(f"- {machine(args)}, on {words}{': other work ran beside it' if load > 0.3 else ''}.")
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(f"- Commit {commit or 'unknown'}. The variants take turns. Medians of {args.rounds} rounds.")
    print(f"- Seconds of the {args.clock} ({CLOCKS[args.clock]}).")
    print("- Ratios are to the first row of the group, with the least and the most of the rounds: look at these.")
    print("  Absolute numbers mean little on a machine that does other work too, and less on another one.\n")


def run_all(args: argparse.Namespace) -> None:
    began = time.monotonic()
    print("<!-- speed: head -->")
    head(args)
    for room in args.rooms:
        print(f"<!-- speed: {room} -->", flush=True)
        words = [room, "--threads", args.threads, "--device", args.device, "--clock", args.clock]
        words += ["--rounds", 1, *ROOMS[room].split()] if args.quick else ["--rounds", args.rounds]
        words += ["--compile"] if args.compile and room in ("train", "inference") else []
        words += ["--tmp", args.tmp] if args.tmp and room == "balance" else []
        main([*map(str, words)])
    print(f"<!-- end -->\n{(time.monotonic() - began) / 60:.0f} minutes in all")


def paste(output: str, text: str) -> str:
    """`text` with what `output` of `all` has in each of its parts between the markers of the same names."""
    for name, part in re.findall(r"^<!-- speed: (\w+) -->\n(.*?)(?=^<!-- )", output, re.M | re.S):
        marker = rf"(?ms)(^<!-- speed: {name} -->\n).*?(^<!-- end -->)"
        text, num = re.subn(marker, lambda found, p=part: f"{found[1]}{p.rstrip()}\n{found[2]}", text)
        if num != 1:
            common.fail(f"docs/speed.md has {num} parts <!-- speed: {name} --> ... <!-- end -->, expected one")
    return text


def timms_model(arch: str, **options) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(arch.removeprefix("timm/"), **options)


def last(x):
    """channels_last, of a tensor or (a copy of) a model"""
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last)


def plain_autocast(precision: str, device: torch.device):
    """torch's own, as with timm's flags `--amp --amp-dtype bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Batch norms that do something: random scales and shifts, and the statistics of these images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            module.momentum = None  # the statistics become the batch's
    with torch.no_grad():
        model.train()(images)
    model.eval()


def both_models(arch: str, size: int) -> tuple[nn.Module | None, nn.Module]:
    """timm's model, if timm is installed, and ours with the same weights."""
    torch.manual_seed(0)
    theirs, ours = timms_model(arch) if PEERS["timm"] else None, build_model(arch)
    calibrate(theirs or ours, torch.randn(max(8, 2**20 // size**2), 3, size, size))
    if theirs:
        load_weights(ours, theirs.state_dict())
    return theirs, ours.eval()


@torch.inference_mode()
def run(model: nn.Module, images: Tensor, batch: int, amp) -> Tensor:
    """fp32 logits"""
    logits = []
    for part in images.split(batch):
        with amp:
            logits.append(model(part).float())
    return torch.cat(logits)


def save_model(path: Path, arch: str, num_classes: int, size: int, model: nn.Module | None = None, **more) -> None:
    """A checkpoint as a stage writes it."""
    header = {"format": CHECKPOINT_FORMAT, "stage": "teacher", "arch": arch, "arch_options": {}, "image_size": size}
    header |= {"classes": [f"{c:03}" for c in range(num_classes)], "crop_fraction": 0.875}
    header |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "metrics": {}, "args": {}}
    header["model"] = (model or build_model(arch, num_classes)).state_dict()
    save_checkpoint(path, header | more)


def run_stage(stage: str, *words) -> None:
    """A stage's main() in this process, silent."""
    sys.argv = [stage, *map(str, words)]
    with contextlib.redirect_stdout(io.StringIO()):
        load_stage(stage).main()


def bare_step(model: nn.Module, optimizer, images: Tensor, labels: Tensor, amp):
    """A function that takes training steps: forward, backward, optimizer; nothing else."""

    def steps(num: int) -> None:
        for _ in range(num):
            optimizer.zero_grad()
            with amp:
                logits = model(images).float()
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()

    return steps


def timms_steps(folder: Path, args: argparse.Namespace, precision: str, channels_last: bool):
    """A generator that takes a step of timm's train.py at each `next`: its loader, crop, RandAugment, SGD and average.

    Its defaults but for what 01 has as well (RandAugment, label smoothing, an average); no workers on CPUs, as ours.
    """
    import timm
    import timm.loss
    import timm.optim
    import timm.utils

    device = torch.device(args.device)
    model = timms_model(args.arch, num_classes=10, drop_rate=0.2, drop_path_rate=0.2).train().to(device)
    model = last(model) if channels_last else model
    dataset = timm.data.create_dataset("", str(folder))
    config = {"is_training": True, "auto_augment": "rand-m9-n2", "interpolation": "random", "device": device}
    config["num_workers"] = 4 if device.type == "cuda" else 0
    loader = timm.data.create_loader(dataset, (3, args.size, args.size), args.batch, **config)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=2e-5, momentum=0.9)
    average, loss_of = timm.utils.ModelEmaV3(model), timm.loss.LabelSmoothingCrossEntropy(0.1)
    losses, amp = timm.utils.AverageMeter(), plain_autocast(precision, device)
    while True:
        for images, labels in loader:
            with amp:
                loss = loss_of(model(last(images) if channels_last else images), labels)
            losses.update(loss.item(), len(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            yield


def stop_at_steps(connection, threads: int, clock: str, stage: str, words: list) -> None:
    """In a process of its own: a stage as it is, which waits after its first step, and then takes as many as are asked
    for."""
    torch.set_num_threads(threads)
    end_step, left, began = common.Run.end_step, 1, 0.0

    def end_step_and_wait(run) -> None:
        nonlocal left, began
        end_step(run)
        left -= 1
        if not left:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            connection.send(seconds_of(clock) - began)
            left, began = connection.recv(), seconds_of(clock)

    common.Run.end_step = end_step_and_wait
    run_stage(stage, *words)


def train(args: argparse.Namespace) -> None:
    device = init_processes(args.device).device
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, args.size, args.size, device=device), torch.arange(args.batch) % 10
    labels = labels.to(device)
    steps = {}  # {name: function that takes a number of steps}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        at_once = args.steps or (20 if device.type == "cuda" else 2)
        num = (args.rounds + 1) * at_once + 2  # steps of each, and no image is seen twice
        draw_folder(folder / "data", args.size, num * args.batch)
        rows = labels_of_all(folder / "data", folder)
        save_model(folder / "teacher.pt", args.arch, 10, args.size, data=str(folder / "data"), crop_fraction=1.0)
        flags = ["--image-size", args.size, "--optimizer", "sgd", "--num-ops", 2, "--magnitude", 9, "--eval-every", 0]
        flags += ["--device", args.device, "--warmup-epochs", 0, "--epochs", 100, "--data", folder / "data"]
        of_04 = ["--teacher", folder / "teacher.pt", "--pseudo-labels", rows, "--ratio", 3]
        of_04 += ["--batch-size", args.batch // 4]
        ours = {"01": ("01_train_teacher", ["--batch-size", args.batch, "--arch", args.arch])}
        ours["04"] = "04_train_student", of_04
        for precision in PRECISIONS:
            amp, amps = plain_autocast(precision, device), autocast(precision, device)[0]
            for layout in ("timm", "timm, channels_last") if PEERS["timm"] else ():
                model, given = timms_model(args.arch, num_classes=10).to(device).train(), images
                if layout != "timm":
                    model, given = last(model), last(images)
                sgd = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=2e-5, momentum=0.9, nesterov=True)
                steps[f"bare step, {precision}: {layout}"] = bare_step(model, sgd, given, labels, amp)
            for way in ("ours", "ours, compiled")[: 1 + (args.compile and precision == "bf16")]:
                model = last(build_model(args.arch, 10).to(device).train())
                if way != "ours":
                    model.compile()
                sgd = make_optimizer("sgd", model, None)
                steps[f"bare step, {precision}: {way}"] = bare_step(model, sgd, last(images), labels, amps)
        for precision in PRECISIONS:
            for flag in ("", " --channels-last") if PEERS["timm"] else ():
                theirs = timms_steps(folder / "data" / "train", args, precision, bool(flag))
                name = f"whole step, {precision}: timm's train.py{flag}{' --amp' if precision == 'bf16' else ''}"
                steps[name] = lambda num, t=theirs: [next(t) for _ in range(num)]
            for flag in ("", " --compile")[: 1 + (args.compile and precision == "bf16")]:
                for name in STAGES:
                    here, there = SERVER.Pipe()
                    stage, words = ours[name]
                    words = [*words, *flags, "--precision", precision, *flag.split()]
                    words += ["--out", folder / f"{name}-{precision}{flag}"]
                    process = SERVER.Process(target=stop_at_steps, args=(there, args.threads, args.clock, stage, words))
                    process.start()
                    there.close()
                    stack.callback(process.join)
                    stack.callback(process.kill)
                    here.recv()  # it has compiled, and taken its first step
                    steps[f"whole step, {precision}: ours, {name}{flag}"] = partial(ask, here)
        variants = {name: (at_once * args.batch, partial(call, at_once)) for name, call in steps.items()}
        race(variants, args, "images/s")


def ask(connection, num: int) -> float:
    connection.send(num)
    return connection.recv()


def draw_folder(data: Path, size: int, num: int) -> None:
    """`num` labelled images of 10 classes, 10 of val and as many unlabelled ones, drawn, JPEG."""
    rng = np.random.default_rng(0)
    for i in range(10 + 2 * num):
        folder = f"val/{i:03}" if i < 10 else f"train/{i % 10:03}" if i < num + 10 else "unlabeled"
        (data / folder).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        image.save(data / folder / f"{i:05}.jpg", quality=90)


def labels_of_all(data: Path, folder: Path) -> Path:
    """A selection of all unlabelled images of `draw_folder`, with made-up labels."""
    images = common.unlabeled_images(data / "unlabeled")
    rng, num = np.random.default_rng(0), len(images)
    logits = rng.normal(size=(num, 10)).astype(np.float16) * 3
    label_files.write_logits(folder / "logits.h5", logits - logits.max(1, keepdims=True), root=data / "unlabeled",
                 names=[os.fsdecode(path) for path in images.path], classes=[f"{c:03}" for c in range(10)])  # fmt: skip
    out = folder / "balanced.h5"
    run_stage("03_balance", folder / "logits.h5", "--out", out, "--threshold", 0, "--per-class", "all")
    return out


def inference(args: argparse.Namespace) -> None:
    device = init_processes(args.device).device
    torch.set_num_threads(args.threads)
    variants = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.compile:  # from nothing
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for size in args.sizes:
            own_batch = common.rows_per_batch(size, device)
            usual_batch = own_batch if device.type == "cuda" else 32 if size > 64 else 256
            nchw = torch.randn(args.images or max(own_batch, usual_batch), 3, size, size)  # powers of 2
            theirs, ours = both_models(args.arch, size)
            fuse_batch_norms(ours)
            ours = last(ours)
            if theirs:  # on the CPU in any case: a GPU's fp32 convolutions round to TF32
                expected, got = (run(model, nchw[:32], 32, contextlib.nullcontext()) for model in (theirs, ours))
                error = (got - expected).abs().max() / expected.abs().max()
                assert error < 1e-4, f"folded fp32 logits differ from timm's by {error:.1e} of the largest"
                theirs = theirs.to(device)
                theirs_last = last(theirs)
            ours, nchw = ours.to(device), nchw.to(device)
            nhwc = last(nchw)
            for precision in PRECISIONS:
                group, amp = f"{size} px, {precision}", plain_autocast(precision, device)
                own_amp = autocast(precision, device)[0]
                if theirs:
                    variants[f"{group}: timm, batch {usual_batch}"] = theirs, nchw, usual_batch, amp
                    variants[f"{group}: timm, channels_last"] = theirs_last, nhwc, usual_batch, amp
                    variants[f"{group}: timm, channels_last, batch {own_batch}"] = theirs_last, nhwc, own_batch, amp
                variants[f"{group}: ours, batch {own_batch}"] = ours, nhwc, own_batch, own_amp
                if args.compile:
                    compiled = copy.deepcopy(ours)
                    compiled.compile(dynamic=False)  # else the second size would be compiled for any size
                    variants[f"{group}: ours, compiled"] = compiled, nhwc, own_batch, own_amp
        calls = {name: (len(words[1]), partial(run, *words)) for name, words in variants.items()}
        race(calls, args, "images/s")


def timms_loader(folder: Path, size: int, device: torch.device, workers: int, model: nn.Module):
    import timm

    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: its default
    config = timm.data.resolve_data_config({"input_size": (3, size, size)}, model=model)
    dataset = timm.data.create_dataset("", str(folder))
    return timm.data.create_loader(dataset, batch_size=256, num_workers=workers, device=device, **config)


def timms_inference(model: nn.Module, folder: Path, size: int, device: torch.device, amp) -> None:
    """The loop of timm's inference.py with its defaults: batches of 256, 2 workers, its loader, NCHW, top-1."""
    names, outputs = [], []
    loader = timms_loader(folder, size, device, 2, model)
    for images, _ in loader:
        with amp:
            output = model(images)
        output, indices = output.softmax(-1).topk(1)
        names.append(indices.cpu().numpy())
        outputs.append(output.float().cpu().numpy())
    lines = zip(loader.dataset.filenames(basename=True), np.concatenate(names), np.concatenate(outputs), strict=True)
    "\n".join(f"{file},{name[0]},{prob[0]}" for file, name, prob in lines)


def timms_validate(model: nn.Module, folder: Path, size: int, device: torch.device, amp) -> None:
    """The loop of timm's validate.py with its defaults: batches of 256, 4 workers; without its first, random batch."""
    import timm.utils

    losses, top1, top5 = (timm.utils.AverageMeter() for _ in range(3))
    for images, labels in timms_loader(folder, size, device, 4, model):
        with amp:
            output = model(images)
            loss = nn.functional.cross_entropy(output, labels)
        right = timm.utils.accuracy(output.detach(), labels, topk=(1, 5))
        for meter, value in zip((losses, top1, top5), (loss, *right), strict=True):
            meter.update(value.item(), len(images))


def draw_photographs(folder: Path, num: int) -> None:
    """JPEGs of 500 x 375 pixels of 10 classes: noise of several scales, as many bytes as photographs."""
    rng = np.random.default_rng(0)
    for i in range(num):
        layers = [Image.fromarray(rng.integers(0, 256, (3 * n, 4 * n, 3), dtype=np.uint8)) for n in (3, 30, 125)]
        image = layers[0].resize((500, 375), Image.Resampling.BICUBIC)
        for layer, share in zip(layers[1:], (0.4, 0.25), strict=True):
            image = Image.blend(image, layer.resize((500, 375), Image.Resampling.BICUBIC), share)
        (folder / f"{i % 10:03}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i % 10:03}" / f"{i:05}.jpg", quality=90)


@torch.inference_mode()
def label(args: argparse.Namespace) -> None:
    device = init_processes(args.device).device
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_photographs(folder / "val", args.number)
        theirs, ours = both_models(args.arch, args.size)
        save_model(folder / "model.pt", args.arch, 1000, args.size, ours)
        fuse_batch_norms(ours)
        ours, theirs = last(ours).to(device), theirs and theirs.to(device)
        tensors = last(torch.randn(args.number, 3, args.size, args.size)).to(device)
        flags = ["--device", args.device]

        def of_ours(stage: str, *words) -> None:  # into a folder of its own: it is not a resumed one
            with tempfile.TemporaryDirectory(dir=folder) as out:
                run_stage(stage, *words, "--out", f"{out}/out", *flags)

        variants = {}
        for precision in PRECISIONS:
            amp, own_amp = plain_autocast(precision, device), autocast(precision, device)[0]
            given = theirs, folder / "val", args.size, device, amp
            batch, amps = common.rows_per_batch(args.size, device), ["--precision", precision]
            group = f"labelling, {precision}"
            if theirs:
                variants[f"{group}: timm's inference.py"] = partial(timms_inference, *given)
            words = "02_pseudo_label", "--teacher", folder / "model.pt", "--unlabeled", folder / "val", *amps
            variants[f"{group}: ours, 02"] = partial(of_ours, *words)
            variants[f"{group}: (the model of 02 alone)"] = partial(run, ours, tensors, batch, own_amp)
            if theirs:
                variants[f"evaluating, {precision}: timm's validate.py"] = partial(timms_validate, *given)
            words = "06_eval_robustness", folder / "model.pt", "--data", folder, *amps
            variants[f"evaluating, {precision}: ours, 06"] = partial(of_ours, *words)
        race({name: (args.number, call) for name, call in variants.items()}, args, "images/s")


def write_logits(path: Path, num_rows: int, num_classes: int) -> None:
    """A finished logits.h5 of a long tail of classes, as stage 02 leaves it."""
    names = np.char.mod(b"part/%09d.jpg", np.arange(num_rows))
    rows = ImageList("/made/up", names, *np.zeros((2, num_rows), np.int64))
    classes = [f"{c:04}" for c in range(num_classes)]
    create_logits(path, rows, classes, num_rows, arch="a", image_size=224, teacher="t", teacher_sha256="s")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((100_000, num_classes), dtype=np.float32)  # drawn once: it takes most of the time
    with h5py.File(path, "r+") as file:
        for first in range(0, num_rows, len(noise)):
            part = slice(first, min(first + len(noise), num_rows))
            logits = np.roll(noise, first // len(noise), 1)[: part.stop - first]
            peak = (num_classes * rng.random(len(logits)) ** 2).astype(int)  # the first classes have the most images
            logits[np.arange(len(logits)), peak] += 12 * rng.random(len(logits), dtype=np.float32)
            logits -= logits.max(1, keepdims=True)
            file["logits"][part] = logits
            file["label"][part], file["confidence"][part] = logits.argmax(1), 1 / np.exp(logits).sum(1)
            file["status"][part] = DONE


def with_pandas(file: h5py.File, per_class: int) -> tuple:
    import pandas

    frame = pandas.DataFrame({"label": file["label"][:], "confidence": file["confidence"][:]})
    frame = frame[frame["confidence"] > np.float32(0.3)]
    frame = frame.sort_values("confidence", ascending=False, kind="stable").groupby("label").head(per_class)
    return frame.index.to_numpy(), frame["label"].to_numpy(), frame["confidence"].to_numpy()


def with_polars(file: h5py.File, per_class: int) -> tuple:
    import polars

    frame = polars.DataFrame({"label": file["label"][:], "confidence": file["confidence"][:]}).with_row_index()
    frame = frame.filter(polars.col("confidence") > np.float32(0.3))
    frame = frame.group_by("label").agg(polars.all().top_k_by("confidence", per_class)).explode("index", "confidence")
    return tuple(frame[name].to_numpy() for name in ("index", "label", "confidence"))


def with_numpy(file: h5py.File, per_class: int) -> tuple:
    label, confidence = file["label"][:], file["confidence"][:]
    rows = np.flatnonzero(confidence > np.float32(0.3))
    rows = rows[np.lexsort((-confidence[rows], label[rows]))]  # class after class, the surest first
    starts = np.searchsorted(label[rows], np.arange(label.max() + 2))
    rows = np.concatenate([rows[a : min(a + per_class, b)] for a, b in itertools.pairwise(starts)])
    return rows, label[rows], confidence[rows]


def top_p_with_torch(file: h5py.File, per_class: int) -> tuple:
    """Chunk by chunk: of each row the 10 most probable classes, of each class the best so far."""
    scores = torch.full((per_class, file["logits"].shape[1]), -1.0)
    rows = torch.zeros(scores.shape, dtype=torch.int64)
    for first in range(0, len(file["label"]), 10_000):
        probs, classes = torch.from_numpy(file["logits"][first : first + 10_000]).float().softmax(1).topk(10)
        new = torch.full((len(probs), scores.shape[1]), -1.0).scatter_(1, classes, probs)
        scores, chosen = torch.cat([scores, new]).topk(per_class, dim=0)
        number = torch.arange(first, first + len(new))[:, None].expand(new.shape)
        rows = torch.cat([rows, number]).gather(0, chosen)
    row, label = (scores >= 0).nonzero().T
    return rows[row, label].numpy(), label.numpy(), scores[row, label].numpy()


def by_hand(function, path: Path, per_class: int) -> int:
    """A selection with other means, without copies, and its three columns in a file."""
    with h5py.File(path) as file, h5py.File(path.with_name("by-hand.h5"), "w") as out:
        columns = function(file, per_class)
        for name, column in zip(("row", "label", "confidence"), columns, strict=True):
            out[name] = column
    return len(columns[0])


def read_and_softmax(path: Path, num_classes: int) -> int:
    logits, num = open_label_file(path, LOGITS_FORMAT)["logits"], (1 << 19) // num_classes
    chunks = (torch.from_numpy(logits[i : i + num]) for i in range(0, len(logits), num))
    return sum(len(chunk.softmax(1, dtype=torch.float32)) for chunk in chunks)


def stage_03(path: Path, per_class: int, *flags) -> int:
    stage, out = load_stage("03_balance"), path.with_name("balanced.h5")
    stage.draw_selection = lambda *args: None
    run_stage("03_balance", path, "--out", out, "--per-class", per_class, *flags)
    return sum(of["kept"] for of in json.loads(out.with_suffix(".json").read_text())["classes"].values())


def random_rows(path: Path, mapped: bool) -> int:
    """128 times the logits of 256 rows, as for a step of 04: through h5py's indexing, or as 04 does."""
    file, rng = open_label_file(path, LOGITS_FORMAT), np.random.default_rng(0)
    num = len(file["label"])
    logits = map_dataset(file, "logits") if mapped else file["logits"]
    for _ in range(128):
        rows = np.unique(rng.integers(num, size=256))  # h5py wants them sorted
        np.array(logits[rows])
    return 128 * 256


def measured(threads: int, clock: str, import_first: str, function, *args) -> tuple[int, float, float]:
    """In a process of its own: (result, seconds, MB resident at most above what the process had at its start)."""

    def peak() -> float:  # not getrusage's, which begins with that of the parent process
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 1024

    torch.set_num_threads(threads)
    os.environ["POLARS_MAX_THREADS"] = str(threads)
    if import_first:
        importlib.import_module(import_first)
    before, began = peak(), seconds_of(clock)
    result = function(*args)
    return result, seconds_of(clock) - began, peak() - before


def balance(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        variants, peaks, results = {}, {}, {}

        def alone(name: str, *words) -> float:
            with SERVER.Pool(1) as pool:  # a process of its own, for the memory
                results[name], seconds, peak = pool.apply(measured, (args.threads, args.clock, *words))
            peaks[name] = max(round(peak), peaks.get(name, 0))
            return seconds

        for num_rows, num_classes, per_class in args.sizes:
            path = Path(folder) / str(num_rows) / "logits.h5"
            path.parent.mkdir(parents=True)
            write_logits(path, num_rows, num_classes)
            size = f"{num_rows:,} x {num_classes:,}"
            calls = {name: (name, by_hand, globals()[f"with_{name}"], path, per_class) for name in ("pandas", "polars")}
            calls = {f"{size}: {name}": words for name, words in calls.items() if PEERS[name]}
            calls[f"{size}: h5py and numpy"] = "", by_hand, with_numpy, path, per_class
            calls[f"{size}: ours, 03"] = "", stage_03, path, per_class
            top_p = f"{size}, top-p"
            calls[f"{top_p}: h5py and torch"] = "", by_hand, top_p_with_torch, path, per_class
            calls[f"{top_p}: ours, 03 --method top-p"] = "", stage_03, path, per_class, "--method", "top-p"
            calls[f"{top_p}: (reading the logits and their softmax)"] = "", read_and_softmax, path, num_classes
            variants |= {name: (num_rows, partial(alone, name, *words)) for name, words in calls.items()}
            gather = {"h5py's indexing": False, "ours, mapped": True}
            for name, mapped in gather.items():
                words = f"{size}, 256 rows drawn: {name}", "", random_rows, path, mapped
                variants[words[0]] = 128 * 256, partial(alone, *words)
        race(variants, args, "rows/s", ("peak MB", peaks), warm_up=0)  # in new processes
        for name, num in results.items():  # all have selected as many
            group = name.partition(": ")[0]
            assert "(" in name or num == next(results[other] for other in results if other.startswith(f"{group}: ")), (
                name
            )


def memory(args: argparse.Namespace) -> None:
    floor = measure_steps("efficientnet_b0", 32, 2, [], args)[0]
    kind = "of the GPU" if args.device == "cuda" else "resident"
    print(f"torch {torch.__version__}, {machine(args)}; peak {kind} memory of two steps")
    print(f"of which what a run needs that trains next to nothing (efficientnet_b0:32:2): {floor} GiB;")
    print("weights etc.: weights, gradients, two of RMSprop, running average, 4 bytes each, by arithmetic;")
    print("seconds: of the whole process, with the start of Python and writing the checkpoints\n")
    names = ("model", "pixels", "batch", "flags", "weights etc. GiB", "peak GiB", "seconds", "CPU seconds")
    print_rows(names, ["---"] + ["---:"] * 2 + ["---"] + ["---:"] * 4)
    for arch, pixels, batch in args.models:
        with torch.device("meta"):
            weights = sum(p.numel() for p in build_model(arch, 3).parameters())
        # One image a part; but at 32 px the last feature map is a single pixel, and batch norm needs two.
        accumulate = ["--accumulate", batch if pixels > 32 else batch // 2]
        for flags in [], accumulate, ["--checkpoint-activations"], [*accumulate, "--checkpoint-activations"]:
            cells = measure_steps(arch, pixels, batch, flags, args)
            flags = " ".join(map(str, flags)) or "none"
            print_rows((arch, pixels, batch, flags, f"{5 * 4 * weights / 2**30:.2f}", *cells))


ON_GPU = (  # stage 01, and then what it took
    "import runpy, sys, torch; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    "print(torch.cuda.max_memory_allocated())"
)


def measure_steps(arch: str, pixels: int, batch: int, flags: list, args: argparse.Namespace) -> tuple[str, ...]:
    """(peak GiB, seconds, CPU seconds) of stage 01 for two steps: RMSprop's tensors come to be after the first."""
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        data = draw_data(Path(folder) / "data")
        for image in sorted(data.glob("val/*/*"))[1:]:  # one is left: evaluating takes less than training
            image.unlink()
        epochs = 2 * batch / len(list(data.glob("train/*/*")))
        command = [sys.executable, *(["-c", ON_GPU] if args.device == "cuda" else []), ROOT / "01_train_teacher.py"]
        command += ["--data", data, "--out", f"{folder}/out", "--device", args.device, "--workers", 0, "--arch", arch]
        command += ["--image-size", pixels, "--batch-size", batch, "--epochs", epochs, "--warmup-epochs", 0]
        command += ["--eval-every", 0, *flags]
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        began = time.monotonic()
        with subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=subprocess.PIPE) as process:
            output = process.stdout.read()
            # Linux counts this process, which it is forked from, too; but stage 01 takes more from its imports on.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
    if process.returncode:  # the table goes on, for it may be the memory that was too small
        peak = f"failed with status {process.returncode}"
    else:
        peak = f"{(int(output.split()[-1]) if args.device == 'cuda' else usage.ru_maxrss * 1024) / 2**30:.2f}"
    return peak, f"{seconds:.0f}", f"{usage.ru_utime + usage.ru_stime:.0f}"


def noise(args: argparse.Namespace) -> None:
    device = init_processes(args.device).device
    torch.set_num_threads(args.threads)
    variants = {}
    for size in args.sizes:
        num = args.images or (min(256, 2**22 // size**2) if device.type == "cpu" else 2**24 // size**2)
        rng = np.random.default_rng(0)  # blurred noise: photographs in little
        grids = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
        images = [Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC) for grid in grids]
        batch = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).to(device)
        calls, few = {}, images[:256]  # one by one: more of them would not be faster
        if PEERS["torchvision"]:
            from torchvision.transforms import RandAugment, v2

            calls |= {"torchvision v1 on PIL": RandAugment(2, 9), "torchvision v2 on PIL": v2.RandAugment(2, 9)}
        if PEERS["timm"]:
            from timm.data.auto_augment import rand_augment_transform

            calls["timm p = 1 on PIL"] = rand_augment_transform("rand-m9-n2-p1", {"img_mean": (128, 128, 128)})
        for name, call in calls.items():
            variants[f"{size} px: {name}"] = len(few), lambda f=call, few=few: [f(image) for image in few]
        if PEERS["kornia"]:
            from kornia.augmentation.auto import RandAugment as Kornias

            call = Kornias(2, 9)
            variants[f"{size} px: kornia, ops per batch"] = num, lambda f=call, b=batch: f(b / 255).mul(255).byte()
        variants[f"{size} px: ours"] = num, lambda b=batch: rand_augment(b, 2, 9)
    race(variants, args, "images/s")


def drawing_at_32(folder: Path, args: argparse.Namespace):
    """(stage 06's loaders draw all corruptions of images of 32 pixels, its model takes as many images)"""
    stage, processes = load_stage("06_eval_robustness"), init_processes(args.device, args.workers)
    rng, view = np.random.default_rng(0), common.View(32, 1.0)
    for i in range(args.number):  # blurred noise: photographs in little
        grid = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        grid.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:05}.png")
    images, batch = common.unlabeled_images(folder), common.rows_per_batch(32, processes.device)
    model = build_model("efficientnet_b0").eval()
    fuse_batch_norms(model)
    model.to(processes.device, memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (90 * args.number, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def draw() -> None:
        for name in stage.CORRUPTIONS:
            dataset = stage.CorruptedImages(images, view, np.arange(args.number), name, seed=0)
            for _ in common.load_batches(dataset, common.grid_keys(args.number, batch, processes), processes):
                pass

    def evaluate() -> None:
        normalized = (common.normalize(part.to(processes.device).float(), view) for part in pixels.split(batch))
        with torch.inference_mode():
            sum(model(part).sum() for part in normalized).item()

    return draw, evaluate


def robustness(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {machine(args)}, median of {args.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        draw, evaluate = drawing_at_32(Path(folder), args)
        num, group = 90 * args.number, "18 corruptions at 32 px"
        race({f"{group}: the model": (num, evaluate), f"{group}: (drawing)": (num, draw)}, args, "images/s")
    print("Microseconds of CPU time a view, mean of the severities, least of the rounds\n")
    stage, rng = load_stage("06_eval_robustness"), np.random.default_rng(0)
    grid = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    images = [np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) for size in (32, 224)]
    print_rows(("corruption", "32 px", "224 px"), ("---", "---:", "---:"))
    for name in stage.CORRUPTIONS:
        cells = []
        for image in images:
            times = []
            for _ in range(args.rounds):
                began = time.process_time()
                for severity in range(1, 6):
                    stage.corrupt(image, name, severity, rng)
                times.append((time.process_time() - began) / 5)
            cells.append(f"{1e6 * min(times):.0f}")
        print_rows((name, *cells))


def main(words: list[str]) -> None:
    args = parse_args(words)
    if hasattr(args, "file"):
        page = ROOT / "docs" / "speed.md"
        text = paste(args.file.read_text(), page.read_text())
        with write_atomically(page) as temporary:
            temporary.write_text(text)
    else:
        args.function(args)


if __name__ == "__main__":
    main(sys.argv[1:])
