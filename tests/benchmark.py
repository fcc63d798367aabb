"""Speed and memory, measured through the toolkit's own code.

inference  images a second of EfficientNet-B0: timm's as `create_model` gives it against ours with the same weights as
           stage 02 runs it (batch norms folded, channels_last, autocast, its batch), once both agree on the logits
train      images a second of training EfficientNet-B0: the bare step of timm (as `create_model` gives it, and channels
           last) and of ours, in fp32 and bf16; and whole steps, with reading, noise, average and log: timm's train.py
           loop with its defaults, transcribed, against stages 01 and 04 on the same images
label      images a second of stage 02, all of it, over a folder of JPEGs, against timm's inference script on the same
balance    seconds and memory of stage 03's two selections over made-up logits, against reading them and their softmax
           alone, and pandas and polars (if they are installed) choosing from the same columns
memory     peak of training steps of stage 01, with and without --accumulate and --checkpoint-activations
noise      RandAugment with 2 ops of magnitude 9, each applied always: torchvision's and timm's image by image, kornia's
           (if it is installed) and ours on a batch of the same images
robustness what stage 06 adds to the time of its model, EfficientNet-B0: a row for each kind of images, and the time of
           each corruption

    python tests/benchmark.py inference --compile
    python tests/benchmark.py train --threads 1
    python tests/benchmark.py label
    python tests/benchmark.py balance --tmp /folder/with/5/GB
    python tests/benchmark.py memory --models efficientnet_b7:224:8
    python tests/benchmark.py noise --threads 1
    python tests/benchmark.py robustness

Variants take turns in one process, and the median of the rounds counts. On a machine that others use
too, absolute numbers mean little, also from one run to the next: quote ratios within one table.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import torch
from conftest import ROOT, draw_data, load_stage  # makes common importable
from PIL import Image
from torch import Tensor, nn

import common
import label_files
from common import (
    CHECKPOINT_FORMAT,
    DONE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LOGITS_FORMAT,
    SELECTION_FORMAT,
    ImageList,
    argument_parser,
    at_least,
    autocast,
    build_model,
    create_logits,
    fuse_batch_norms,
    init_processes,
    load_weights,
    make_optimizer,
    open_label_file,
    rand_augment,
    save_checkpoint,
)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    commands = parser.add_subparsers(required=True)

    def command(function, text: str):
        options = commands.add_parser(function.__name__, help=text, formatter_class=parser.formatter_class)
        options.set_defaults(function=function)
        options.add_argument("--threads", type=at_least(1, int), default=2, help="of torch on CPUs")
        options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it is measured")
        return options.add_argument

    add = command(inference, "speed of EfficientNet-B0, timm's and ours")
    add("--rounds", type=at_least(1, int), default=7, help="over which the median is taken")
    add("--sizes", type=at_least(32, int), nargs="+", default=[224, 32], help="pixels, a table each")
    add("--compile", action="store_true", help="ours compiled as well: a minute or two a size more")
    add = command(train, "speed of training EfficientNet-B0, timm's and ours")
    add("--rounds", type=at_least(1, int), default=5, help="over which the median is taken")
    add("--size", type=at_least(32, int), default=32, help="pixels")
    add("--batch", type=at_least(2, int), default=64, help="images a step; 04: a quarter of them labelled")
    add("--steps", type=at_least(4, int), default=12, help="of each variant in each round; the first two do not count")
    add("--compile", action="store_true", help="ours in bf16 compiled as well: a minute or two more a round")
    add = command(label, "speed of labelling a folder, timm's inference script and stage 02")
    add("--rounds", type=at_least(1, int), default=5, help="over which the median is taken")
    add("--images", type=Path, help="folder of JPEGs in one folder or more; None: drawn, 500 x 375, 110 kB")
    add("--number", type=at_least(1, int), default=256, help="of drawn images")
    add("--size", type=at_least(32, int), default=224, help="pixels of the model")
    add(
        "--workers", type=at_least(0, int), help="of stage 02; None: its own choice; timm's always has its default of 2"
    )
    add = command(balance, "speed and memory of stage 03 over made-up logits")
    sizes = [rows_classes_kept(text) for text in ("10000000:100:10000", "1000000:1000:1000")]
    add("--sizes", type=rows_classes_kept, nargs="+", default=sizes, help="ROWS:CLASSES:PER_CLASS ...")
    add("--tmp", help="folder for the logits, 5 GB, removed again; None: the system's")
    add = command(memory, "peak memory of a training step")
    models = [model_pixels_batch(text) for text in ("efficientnet_b7:224:8", "efficientnet_l2:128:4")]
    add("--models", type=model_pixels_batch, nargs="+", default=models, help="ARCH:PIXELS:BATCH ...")
    add("--tmp", help="folder for data and checkpoints, 10 GB for L2, removed again; None: the system's")
    add = command(noise, "speed of RandAugment, others' and ours")
    add("--rounds", type=at_least(1, int), default=7, help="over which the median is taken")
    add("--sizes", type=at_least(8, int), nargs="+", default=[32, 96, 224], help="pixels, a row each")
    add = command(robustness, "cost of what stage 06 evaluates on, against its model")
    add("--rounds", type=at_least(1, int), default=5, help="over which the median is taken")
    add("--number", type=at_least(1, int), default=64, help="of images")
    add("--workers", type=at_least(0, int), help="loaders; None: stage 06's own choice")
    return parser.parse_args()


def model_pixels_batch(text: str) -> tuple[str, int, int]:
    arch, pixels, batch = text.split(":")
    return arch, int(pixels), int(batch)


def rows_classes_kept(text: str) -> tuple[int, ...]:
    rows, classes, per_class = map(int, text.split(":"))
    return rows, classes, per_class


def print_rows(*rows) -> None:
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    processor = platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {processor} {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads"


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


@torch.inference_mode()
def run(model: nn.Module, images: Tensor, batch: int, amp) -> tuple[Tensor, float]:
    """(fp32 logits, seconds)"""
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    logits = []
    wait()
    began = time.perf_counter()
    for part in images.split(batch):
        with amp:
            logits.append(model(part).float())
    wait()
    return torch.cat(logits), time.perf_counter() - began


def inference(args: argparse.Namespace) -> None:
    import timm

    device = init_processes(args.device).device
    torch.set_num_threads(args.threads)
    print(f"timm {timm.__version__}, {machine(args)}, median of {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # compiling starts from nothing
        for size in args.sizes:
            torch.manual_seed(0)
            torch.compiler.reset()  # else the second size would be compiled for any size
            compare_with_timm(timm.create_model("efficientnet_b0"), size, device, args)


def compare_with_timm(theirs: nn.Module, size: int, device: torch.device, args: argparse.Namespace) -> None:
    own_batch = load_stage("02_pseudo_label").rows_per_batch(size, device)
    usual_batch = own_batch if device.type == "cuda" else 32 if size > 64 else 256
    nchw = torch.randn(max(own_batch, usual_batch), 3, size, size)  # powers of 2
    calibrate(theirs, nchw[: 2**22 // size**2])
    ours = build_model("efficientnet_b0")
    load_weights(ours, theirs.state_dict())
    fuse_batch_norms(ours)
    ours.to(memory_format=torch.channels_last)
    fp32, bf16 = contextlib.nullcontext(), autocast("bf16", device)[0]
    few = nchw[:32]  # on the CPU in any case: a GPU's fp32 convolutions round to TF32
    expected = run(theirs, few, 32, fp32)[0]
    got = run(ours, few.contiguous(memory_format=torch.channels_last), 32, fp32)[0]
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"folded fp32 logits differ from timm's by {error:.1e} of the largest"

    ours, theirs, nchw = ours.to(device), theirs.to(device), nchw.to(device)
    theirs_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    variants = []  # (name, model, images, batch, autocast)
    for batch in dict.fromkeys((usual_batch, own_batch)):
        variants.append(("timm eager fp32 NCHW", theirs, nchw, batch, fp32))
        variants.append(("timm eager fp32 channels_last", theirs_last, nhwc, batch, fp32))
    variants.append(("timm eager bf16 channels_last", theirs_last, nhwc, own_batch, bf16))
    variants.append(("ours eager fp32 folded", ours, nhwc, own_batch, fp32))
    variants.append(("ours eager bf16 folded", ours, nhwc, own_batch, bf16))
    for precision, amp in {"fp32": fp32, "bf16": bf16}.items() if args.compile else ():
        compiled = copy.deepcopy(ours)
        compiled.compile()
        variants.append((f"ours compiled {precision} folded", compiled, nhwc, own_batch, amp))
    warm_up = [run(*variant[1:])[1] for variant in variants]
    seconds = [[] for _ in variants]
    for i in range(args.rounds):
        for j in range(len(variants)):
            k = (i + j) % len(variants)  # each round begins with another one
            seconds[k].append(run(*variants[k][1:])[1])

    print(f"\n{size} px, {len(nchw)} images a round\n")
    print_rows(("variant", "batch", "images/s", "ratio", "compile s"), ("---", *["---:"] * 4))
    medians = [median(times) for times in seconds]
    for (name, _, _, batch, _), first, time_of in zip(variants, warm_up, medians, strict=True):
        compile_seconds = f"{first - time_of:.0f}" if "compiled" in name else ""
        print_rows((name, batch, f"{len(nchw) / time_of:.0f}", f"{medians[0] / time_of:.2f}", compile_seconds))
    full, half = (run(ours, nhwc, own_batch, amp)[0] for amp in (fp32, bf16))
    agree = (full.argmax(1) == half.argmax(1)).float().mean()
    full, half = full.softmax(1), half.softmax(1)
    print(f"\nfolded fp32 logits differ from timm's by {error:.1e} of the largest; bf16 against fp32: {agree:.1%} of")
    print(f"{len(full)} argmax agree, softmax differs by at most {(full - half).abs().max():.4f} (random weights: near")
    print(f"ties, mean confidence {full.amax(1).mean():.4f})", flush=True)


def bare_step(model: nn.Module, optimizer, images: Tensor, labels: Tensor, amp):
    """A function that takes a training step: forward, backward, optimizer; nothing else."""

    def step() -> None:
        optimizer.zero_grad()
        with amp:
            logits = model(images).float()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def timms_steps(folder: Path, size: int, batch: int):
    """A generator that takes a step of timm's train.py at each `next`: its loader, crop, RandAugment, SGD and average.

    Its defaults but for what 01 has as well (RandAugment, label smoothing, an average); 0 workers, as ours on CPUs.
    """
    import timm
    import timm.loss
    import timm.optim
    import timm.utils

    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0", num_classes=10, drop_rate=0.2, drop_path_rate=0.2).train()
    dataset = timm.data.create_dataset("", str(folder))
    config = {"is_training": True, "auto_augment": "rand-m9-n2", "num_workers": 0, "use_prefetcher": False}
    loader = timm.data.create_loader(dataset, (3, size, size), batch, **config)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=2e-5, momentum=0.9)
    average, loss_of = timm.utils.ModelEmaV3(model), timm.loss.LabelSmoothingCrossEntropy(0.1)
    losses = timm.utils.AverageMeter()
    while True:
        for images, labels in loader:
            loss = loss_of(model(images), labels)
            losses.update(loss.item(), len(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            yield


def stage_speed(stage: str, flags: list) -> float:
    """Images a second of the training steps of 01 or 04 on its whole way, without the first two."""
    begun, end_step = [], common.Run.end_step

    def end_step_timed(run) -> None:
        end_step(run)
        begun.append(time.perf_counter())

    common.Run.end_step = end_step_timed
    try:
        with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere:
            sys.argv = [stage, *map(str, flags), "--out", f"{out}/run"]
            with contextlib.redirect_stdout(nowhere):
                load_stage(stage).main()
    finally:
        common.Run.end_step = end_step
    return (len(begun) - 2) / (begun[-1] - begun[1])


def train(args: argparse.Namespace) -> None:
    try:
        import timm
        import timm.optim

        peer = f"timm {timm.__version__}"
    except ImportError:
        timm, peer = None, "timm is not installed"
    device = init_processes(args.device).device
    torch.set_num_threads(args.threads)
    rounds = f"median of {args.rounds} rounds of {args.steps} steps"
    print(f"{peer}, {machine(args)}, {args.size} px, batch {args.batch}, {rounds}")
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, args.size, args.size, device=device), torch.arange(args.batch) % 10
    labels, last = labels.to(device), images.contiguous(memory_format=torch.channels_last)
    fp32, bf16 = contextlib.nullcontext(), autocast("bf16", device)[0]
    steps = {}
    for name, given in {"bare step: timm": images, "bare step: timm, channels_last": last}.items():
        if timm is None:
            break
        model = timm.create_model("efficientnet_b0", num_classes=10).to(device)
        model = model.to(memory_format=torch.channels_last) if given is last else model
        optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=2e-5, momentum=0.9)
        steps[name] = bare_step(model.train(), optimizer, given, labels, fp32)
    variants = {"fp32": (fp32, False), "bf16": (bf16, False)} | (
        {"bf16 compiled": (bf16, True)} if args.compile else {}
    )
    for name, (amp, compiled) in variants.items():
        model = build_model("efficientnet_b0", 10).to(device, memory_format=torch.channels_last).train()
        if compiled:
            model.compile()
        steps[f"bare step: ours, {name}"] = bare_step(model, make_optimizer("sgd", model, None), last, labels, amp)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        draw_folder(data, args.size)
        teacher = Path(folder) / "teacher.pt"
        header = {"format": CHECKPOINT_FORMAT, "stage": "teacher", "arch": "efficientnet_b0", "arch_options": {}}
        header |= {"classes": [f"{c}" for c in range(10)], "image_size": args.size, "crop_fraction": 1.0}
        header |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "data": str(data), "metrics": {}, "args": {}}
        save_checkpoint(teacher, header | {"model": build_model("efficientnet_b0", 10).state_dict()})
        if timm:
            theirs = timms_steps(data / "train", args.size, args.batch)
            steps["whole step: timm's train.py"] = lambda: next(theirs)
        rows = labels_of_all(data, Path(folder))
        flags = ["--image-size", args.size, "--optimizer", "sgd", "--num-ops", 2, "--magnitude", 9, "--eval-every", 0]
        flags += ["--device", args.device, "--warmup-epochs", 0]
        whole = {}
        for name, (_, compiled) in variants.items():
            num = args.steps * args.batch / 640  # images of train/
            own = ["--data", data, "--batch-size", args.batch, "--epochs", num, "--precision", name.split()[0]]
            own += ["--compile"] if compiled else []
            whole[f"whole step: 01, {name}"] = ("01_train_teacher", [*own, *flags])
            own[3] = args.batch // 4
            own[5] = num / 4
            own += ["--teacher", teacher, "--pseudo-labels", rows, "--ratio", 3]
            whole[f"whole step: 04, {name}"] = ("04_train_student", [*own, *flags])

        speeds = {name: [] for name in (*steps, *whole)}
        for step in steps.values():  # allocating, choosing algorithms, compiling
            step()
        for _ in range(args.rounds):
            for name, step in steps.items():
                step()
                began = time.perf_counter()
                for _ in range(args.steps - 2):
                    step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                speeds[name].append((args.steps - 2) / (time.perf_counter() - began))
            for name, (stage, words) in whole.items():
                speeds[name].append(stage_speed(stage, words))
    print_rows(("variant", "images/s", "ratio", "least", "most"), ("---", *["---:"] * 4))
    for name, found in speeds.items():
        kind = name.partition(":")[0]
        base = next(other for key, other in speeds.items() if key.startswith(kind))
        ratios = sorted(one / other for one, other in zip(found, base, strict=True))
        cells = [f"{value:.2f}" for value in (median(ratios), ratios[0], ratios[-1])]
        print_rows((name, f"{args.batch * median(found):.0f}", *cells))


def draw_folder(data: Path, size: int) -> None:
    """640 labelled images of 10 classes, 10 of val and 1,920 unlabelled ones, drawn, JPEG."""
    rng = np.random.default_rng(0)
    for i in range(640 + 10 + 1920):
        folder = f"train/{i % 10}" if i < 640 else f"val/{i % 10}" if i < 650 else "unlabeled"
        (data / folder).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        image.save(data / folder / f"{i:05}.jpg", quality=90)


def labels_of_all(data: Path, folder: Path) -> Path:
    """A selection of all unlabelled images of `draw_folder`, with made-up labels."""
    images = common.unlabeled_images(data / "unlabeled")
    rng, num = np.random.default_rng(0), len(images)
    logits = rng.normal(size=(num, 10)).astype(np.float16) * 3
    label_files.write_logits(folder / "logits.h5", logits - logits.max(1, keepdims=True), root=data / "unlabeled",
                 names=[os.fsdecode(path) for path in images.path], classes=[f"{c}" for c in range(10)])  # fmt: skip
    sys.argv = ["03", f"{folder}/logits.h5", "--out", f"{folder}/balanced.h5", "--threshold", "0", "--per-class", "all"]
    with contextlib.redirect_stdout(io.StringIO()):
        load_stage("03_balance").main()
    return folder / "balanced.h5"


def timms_inference(model: nn.Module, folder: Path, size: int, device: torch.device, amp) -> int:
    """The loop of timm's inference.py with its defaults: batches of 256, 2 workers, its loader, NCHW, top-1."""
    import timm

    config = timm.data.resolve_data_config({"input_size": (3, size, size)}, model=model)
    dataset = timm.data.create_dataset("", str(folder))
    loader = timm.data.create_loader(
        dataset, batch_size=256, use_prefetcher=True, num_workers=2, device=device, **config
    )
    top = []
    for images, _ in loader:
        with amp:
            output = model(images)
        top.append([values.float().cpu().numpy() for values in output.softmax(-1).topk(1)])
    return sum(len(index) for _, index in top)


@torch.inference_mode()
def label(args: argparse.Namespace) -> None:
    import timm

    device, stage = init_processes(args.device).device, load_stage("02_pseudo_label")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.images or Path(temporary) / "images"
        if not args.images:
            (folder / "all").mkdir(parents=True)
            rng = np.random.default_rng(0)
            for i in range(args.number):  # noise of several scales: as many bytes as a photograph
                layers = [
                    Image.fromarray(rng.integers(0, 256, (3 * n, 4 * n, 3), dtype=np.uint8)) for n in (3, 30, 125)
                ]
                image = layers[0].resize((500, 375), Image.Resampling.BICUBIC)
                for layer, share in zip(layers[1:], (0.4, 0.25), strict=True):
                    image = Image.blend(image, layer.resize((500, 375), Image.Resampling.BICUBIC), share)
                image.save(folder / "all" / f"{i:05}.jpg", quality=90)
        files = [path for path in folder.rglob("*") if path.is_file()]
        torch.manual_seed(0)
        theirs = timm.create_model("efficientnet_b0")
        calibrate(theirs, torch.randn(2**22 // args.size**2, 3, args.size, args.size))
        ours = build_model("efficientnet_b0")
        load_weights(ours, theirs.state_dict())
        checkpoint = {"format": CHECKPOINT_FORMAT, "stage": "teacher", "arch": "efficientnet_b0", "arch_options": {}}
        checkpoint |= {"classes": [f"{i:03}" for i in range(1000)], "image_size": args.size, "crop_fraction": 0.875}
        checkpoint |= {
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "model": ours.state_dict(),
            "metrics": {},
            "args": {},
        }
        save_checkpoint(Path(temporary) / "model.pt", checkpoint)
        theirs.to(device)
        fuse_batch_norms(ours)
        ours.to(device, memory_format=torch.channels_last)
        batch = stage.rows_per_batch(args.size, device)
        tensors = torch.randn(max(batch, 64), 3, args.size, args.size, device=device)
        tensors = tensors.contiguous(memory_format=torch.channels_last)

        def stage_02(precision: str) -> int:
            out = Path(temporary) / "logits.h5"
            words = ["--teacher", f"{temporary}/model.pt", "--unlabeled", folder, "--out", out, "--device", args.device]
            words += ["--precision", precision, *([] if args.workers is None else ["--workers", args.workers])]
            sys.argv = ["02_pseudo_label.py", *map(str, words)]
            with contextlib.redirect_stdout(None):
                stage.main()
            out.unlink()
            return len(files)

        variants = {}
        for precision in ("fp32", "bf16"):
            amp = autocast(precision, device)[0]
            variants[f"timm's inference.py, {precision}"] = partial(
                timms_inference, theirs, folder, args.size, device, amp
            )
            variants[f"stage 02, {precision}"] = partial(stage_02, precision)
            variants[f"stage 02's model alone, {precision}"] = lambda a=amp: len(run(ours, tensors, batch, a)[0])
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000
        print(f"timm {timm.__version__}, {machine(args)}, median of {args.rounds} rounds; {args.size} px, ", end="")
        print(f"{len(files)} images of {kilobytes:.0f} kB on average\n", flush=True)
        seconds = {name: [] for name in variants}
        for turn in range(args.rounds + 1):
            for name, call in variants.items():
                began = time.perf_counter()
                number = call()
                if turn:  # the first warms up
                    seconds[name].append((time.perf_counter() - began) / number)
    print_rows(("EfficientNet-B0", "images/s", "ratio"), ("---", "---:", "---:"))
    medians = {name: median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    for name, time_of in medians.items():
        print_rows((name, f"{1 / time_of:.0f}", f"{first / time_of:.2f}"))


def write_logits(path: Path, num_rows: int, num_classes: int) -> None:
    """A finished logits.h5 of a long tail of classes, as stage 02 leaves it."""
    names = np.char.mod(b"part/%09d.jpg", np.arange(num_rows))
    rows = ImageList("/made/up", names, *np.zeros((2, num_rows), np.int64))
    classes = [f"{c:04}" for c in range(num_classes)]
    create_logits(path, rows, classes, num_rows, arch="a", image_size=224, teacher="t", teacher_sha256="s")
    rng = np.random.default_rng(0)
    with h5py.File(path, "r+") as file:
        for first in range(0, num_rows, 100_000):
            part = slice(first, min(first + 100_000, num_rows))
            logits = rng.standard_normal((part.stop - first, num_classes), dtype=np.float32)
            peak = (num_classes * rng.random(len(logits)) ** 2).astype(int)  # the first classes have the most images
            logits[np.arange(len(logits)), peak] += 12 * rng.random(len(logits), dtype=np.float32)
            logits -= logits.max(1, keepdims=True)
            file["logits"][part] = logits
            file["label"][part], file["confidence"][part] = logits.argmax(1), 1 / np.exp(logits).sum(1)
            file["status"][part] = DONE


def with_pandas(label: np.ndarray, confidence: np.ndarray, per_class: int) -> int:
    import pandas

    frame = pandas.DataFrame({"label": label, "confidence": confidence})
    frame = frame[frame["confidence"] > np.float32(0.3)]
    return len(frame.sort_values("confidence", ascending=False, kind="stable").groupby("label").head(per_class))


def with_polars(label: np.ndarray, confidence: np.ndarray, per_class: int) -> int:
    import polars

    frame = polars.DataFrame({"label": label, "confidence": confidence}).with_row_index()
    frame = frame.filter(polars.col("confidence") > np.float32(0.3))
    best = polars.all().top_k_by("confidence", per_class)
    return len(frame.group_by("label").agg(best).explode("index", "confidence"))


def of_file(function, path: Path, per_class: int) -> int:
    file = open_label_file(path, LOGITS_FORMAT)
    return function(file["label"][:], file["confidence"][:], per_class)


def read_and_softmax(path: Path, num_classes: int) -> int:
    logits, num = open_label_file(path, LOGITS_FORMAT)["logits"], (1 << 19) // num_classes
    chunks = (torch.from_numpy(logits[i : i + num]) for i in range(0, len(logits), num))
    return sum(len(chunk.softmax(1, dtype=torch.float32)) for chunk in chunks)


def stage_03(path: Path, *flags) -> int:
    stage, out = load_stage("03_balance"), path.with_name("balanced.h5")
    sys.argv = ["03_balance.py", str(path), "--out", str(out), *map(str, flags)]
    stage.draw_selection = lambda *args: None
    with contextlib.redirect_stdout(None):
        stage.main()
    with open_label_file(out, SELECTION_FORMAT) as file:
        return len(file["row"])


def measured(threads: int, function, *args) -> tuple[int, float, float]:
    """(result, seconds, MB resident at most above what the process had at its start)"""

    def peak() -> float:  # not getrusage's, which begins with that of the parent process
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 1024

    torch.set_num_threads(threads)
    before, began = peak(), time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - began, peak() - before


def balance(args: argparse.Namespace) -> None:
    print(machine(args))
    for num_rows, num_classes, per_class in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
            path = Path(folder) / "logits.h5"
            write_logits(path, num_rows, num_classes)
            print(f"\n{num_rows:,} rows x {num_classes:,} classes, {per_class:,} a class\n")
            print_rows(("what", "examples or rows", "seconds", "peak MB"), ("---", *["---:"] * 3))
            flags = ["--per-class", per_class]
            calls = {"reading the logits and softmax alone": (read_and_softmax, path, num_classes)}
            calls["03 --method noisy-student, pictures apart"] = stage_03, path, *flags
            calls["03 --method top-p, pictures apart"] = stage_03, path, "--method", "top-p", *flags
            for name, function in {"pandas": with_pandas, "polars": with_polars}.items():
                if importlib.util.find_spec(name):
                    calls[f"{name}, the noisy-student rule without copies"] = of_file, function, path, per_class
            results = {name: [] for name in calls}
            for _ in range(3):
                for name, call in calls.items():  # each in a process of its own, for the memory
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        results[name].append(pool.apply(measured, (args.threads, *call)))
            for name, turns in results.items():
                seconds, peak = median(turn[1] for turn in turns), max(turn[2] for turn in turns)
                print_rows((name, f"{turns[0][0]:,}", f"{seconds:.1f}", f"{peak:.0f}"))


def memory(args: argparse.Namespace) -> None:
    floor = measure_steps("efficientnet_b0", 32, 2, [], args)[0]
    print(f"{machine(args)}; peak {'of the GPU' if args.device == 'cuda' else 'resident'} memory of two steps")
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
    import timm.data.auto_augment
    import torchvision
    from torchvision.transforms import v2

    device = init_processes(args.device).device
    torch.set_num_threads(args.threads)
    print(
        f"torchvision {torchvision.__version__}, timm {timm.__version__}, {machine(args)}, {args.rounds} rounds, median"
    )
    print("images/s, and the ratio to torchvision's v1\n")
    for size in args.sizes:
        num = min(256, 2**22 // size**2) if device.type == "cpu" else 2**24 // size**2
        rng = np.random.default_rng(0)  # blurred noise: photographs in little
        grids = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
        images = [Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC) for grid in grids]
        batch = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).to(device)
        v1s, v2s = torchvision.transforms.RandAugment(2, 9), v2.RandAugment(2, 9)
        timms = timm.data.auto_augment.rand_augment_transform("rand-m9-n2-p1", {"img_mean": (128, 128, 128)})
        few = images[:256]  # one by one: more of them would not be faster
        variants = {"torchvision v1 on PIL": (len(few), lambda f=v1s, few=few: [f(image) for image in few])}
        variants["torchvision v2 on PIL"] = len(few), lambda f=v2s, few=few: [f(image) for image in few]
        variants["timm p = 1 on PIL"] = len(few), lambda f=timms, few=few: [f(image) for image in few]
        with contextlib.suppress(ImportError):
            from kornia.augmentation.auto import RandAugment

            kornias = RandAugment(2, 9)
            variants["kornia, ops per batch"] = num, lambda f=kornias, b=batch: f(b.float() / 255).mul(255).byte()
        variants["ours"] = num, lambda b=batch: rand_augment(b, 2, 9)
        seconds = {name: [] for name in variants}
        for turn in range(args.rounds + 1):
            for name, (_, call) in variants.items():
                wait = torch.cuda.synchronize if batch.is_cuda else lambda: None
                wait()
                began = time.perf_counter()
                call()
                wait()
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
        speed = {name: number / median(seconds[name]) for name, (number, _) in variants.items()}
        if size == args.sizes[0]:
            print_rows(("pixels", *speed), ["---:"] * (1 + len(speed)))
        print_rows((size, *(f"{s:.0f} ({s / speed['torchvision v1 on PIL']:.2f})" for s in speed.values())))


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


def imagenet_c_against_02(folder: Path, args: argparse.Namespace):
    """(06 evaluates stored images of 224 pixels in ImageNet-C's layout, 02 labels the same files)"""
    rng, num_classes = np.random.default_rng(0), 10
    for i in range(args.number):
        layers = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((224, 224)) for n in (5, 60)]
        file = folder / "fog" / f"{1 + i % 5}" / f"{i // 5 % num_classes}" / f"{i:05}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.blend(*layers, 0.3).save(file, quality=85)
    torch.manual_seed(0)
    model = build_model("efficientnet_b0", num_classes)
    header = {"format": CHECKPOINT_FORMAT, "stage": "teacher", "arch": "efficientnet_b0", "arch_options": {}}
    header |= {"classes": [f"{c}" for c in range(num_classes)], "image_size": 224, "crop_fraction": 1.0}
    header |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "metrics": {}, "args": {}, "model": model.state_dict()}
    save_checkpoint(folder / "model.pt", header)
    more = ["--device", args.device, *([] if args.workers is None else ["--workers", args.workers])]

    def call(stage: str, *words) -> None:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            sys.argv = [stage, *map(str, (*words, *more, "--out", f"{out}/out"))]
            load_stage(stage).main()

    of_06 = partial(call, "06_eval_robustness", folder / "model.pt", "--imagenet-c", folder)
    return of_06, partial(call, "02_pseudo_label", "--teacher", folder / "model.pt", "--unlabeled", folder / "fog")


def robustness(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        rows = {"drawing all 18 at 32 px against the model's own time": drawing_at_32(Path(folder), args)}
        rows["06 on images of ImageNet-C against 02 on the same files"] = imagenet_c_against_02(Path(other), args)
        seconds = {name: ([], []) for name in rows}
        for turn in range(args.rounds + 1):
            for name, pair in rows.items():
                for call, times in zip(pair, seconds[name], strict=True):
                    began = time.perf_counter()
                    call()
                    if turn:  # the first warms up
                        times.append(time.perf_counter() - began)
    print(f"{machine(args)}, median of {args.rounds} rounds, {args.number} images\n")
    print_rows(("what", "seconds", "against", "ratio", "least", "most"), ("---", *["---:"] * 5))
    for name, (ours, theirs) in seconds.items():
        ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
        cells = [f"{number:.2f}" for number in (median(ours), median(theirs), median(ratios), min(ratios), max(ratios))]
        print_rows((name, *cells))
    print("\nMicroseconds of CPU time a view, mean of the severities, least of the rounds\n")
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


if __name__ == "__main__":
    args = parse_args()
    args.function(args)
