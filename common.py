"""What the stages share: everything that would be a silent bug if two of them did it differently.

The rooms, in the order of the file. Each can be lifted out alone, and a stage's imports say what it takes from which.

the program       the command line, all flags that stages share, mistakes of the user (status 2), files written whole
processes         this process's place among those of torchrun, sums over all of them, signals, random seeds, progress
layers            convolutions, squeeze-excitation; how CPUs train them in bf16
models            EfficientNet, the tables of sizes and of official recipes, torchvision's models, folded batch norms
weights           loading weights by name, of this toolkit, torchvision and timm; weights to start from, published ones
models of timm    built by timm's names, and what it says of how images must look
noise             RandAugment on whole uint8 batches, by tables and by moving pixels; the noise for small images
views             decoding an image file, the clean (evaluation) view, the random training crop, normalizing
filters           Gaussians, disks, motion, zoom, edges and distances, as four image libraries compute them
shards            the members of .tar files, from their headers; an image read in place
listing           lists of images in folders and .tar shards, lost folders, labels from folder names, held-out images
batches           views as a dataset, keys (which images a step gets, in what order), loaders, the unreadable images
label files       creating logits.h5; opening it and balanced.h5, a stranger's too; mapping their columns; as CSV
selections        writing and reading balanced.h5, the images of a selection
optimization      the plan of a run and its learning rate, plateaus, RMSprop, averaged weights, soft cross-entropy
checkpoints       model.pt and last.pt: read safely, loaded as a model, saved, resumed, their inputs compared; metrics
training          a model as the flags want it, precision, DDP, random numbers of a step, parts of a batch, evaluation
the training run  Run, which keeps the books of a run: rate, logs, evaluation, saving, stopping, too many bad images
results           robustness.json of several models and seeds: intervals, paired differences, a table, a picture
pictures          matplotlib, sheets of thumbnails, curves.png
"""

import argparse
import atexit
import base64
import contextlib
import copy
import csv
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
import time
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageOps, features
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint as checkpoint_activations

# ----------------------------------------------------------------------------------------------------------------------
# the program: command line, shared flags, mistakes, files written whole
# ----------------------------------------------------------------------------------------------------------------------


def is_rank0() -> bool:
    """Whether this is the one process of those that torchrun started that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def is_first_of_node() -> bool:
    """Whether this is the one process of its machine that says what is wrong there."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0


def on_several_nodes() -> bool:
    """Whether torchrun started processes on other machines too."""
    return "MASTER_ADDR" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")


def print0(*words, sep: str = " ") -> None:
    """Print from rank 0 alone, at once: the output may be a file that somebody watches."""
    if is_rank0():
        print(*words, sep=sep, flush=True)


def fail(message: str, from_any: bool = False) -> NoReturn:
    """End with the user's mistake: one line on stderr, exit status 2.

    All processes of a machine meet the same mistake, and the first prints it: another machine may have another disk.
    `from_any`: this process may be the only one to meet it.
    """
    if from_any or is_first_of_node():
        print("error:", message.replace("\n", " "), file=sys.stderr, flush=True)
    raise SystemExit(2)


class OneLineParser(argparse.ArgumentParser):
    """A mistake is one line; `@FILE` stands for the flags in a file, one or more a line, `#` begins a comment."""

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message} (see --help)")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def parse_args(self, *args, **kwargs):
        try:
            return super().parse_args(*args, **kwargs)
        except ValueError as error:  # an open quotation mark in @FILE, or bytes that are not text
            self.error(f"@FILE: {error}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def argument_parser(description: str) -> OneLineParser:
    """A parser that shows defaults, reads @FILE, takes no abbreviated flags (a typo fails), and fails with one line."""
    with contextlib.suppress(AttributeError):  # file names need not be UTF-8, and are printed all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    return OneLineParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False, fromfile_prefix_chars="@"
    )


def at_least(low: float, kind: type = float, high: float = math.inf) -> Callable:
    """An argparse type: a finite number of this kind, not below `low` and not above `high`; an int of 64 bits."""
    largest = 2**63 - 1 if kind is int else sys.float_info.max

    def parse(text: str):
        value = kind(text)
        if not low <= value <= min(high, largest):
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}{most}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


RATE = at_least(0, high=1)


SWITCH = argparse.BooleanOptionalAction  # --flag and --no-flag


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--arch", help="efficientnet_b0..b7, _l0.._l2, also after tf_, or torchvision's; None: --init's, teacher's, B0")
    add("--image-size", type=at_least(1, int), help="training resolution, pixels; None: --init's, teacher's, model's")
    crop_mode = "the view of images that are no squares: middle, all, all in a grey square; None: --init's, teacher's"
    add("--crop-mode", choices=CROP_MODES, help=crop_mode)
    add("--small-images", action=SWITCH, help="model and noise for 32 pixels; None: as --init or the teacher has it")
    add("--dropout", type=RATE, help="rate before the classifier; None: the model's own (B0 0.2 ... B7 0.5)")
    add("--drop-path", type=RATE, help="stochastic depth of the last block; None: the model's own (paper: 0.2)")
    add_bn_momentum_flag(add)
    add("--zero-init-residual", action="store_true", help="blocks start as the identity: short runs learn sooner")


def add_bn_momentum_flag(add: Callable) -> None:
    add("--bn-momentum", type=RATE, default=0.01, help="of running statistics (official); 0.1 in short runs")


def add_noise_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("noise of the input").add_argument
    add("--num-ops", type=at_least(0, int), help="RandAugment ops an image; None: 2; B0, B1: 0 without --magnitude")
    add(
        "--magnitude",
        type=at_least(0),
        help="of RandAugment on a scale of 10, no cap; None: B2 6 ... B7, L* 27, else 9",
    )
    add("--min-crop-area", type=RATE, default=0.08, help="smallest crop, share of the area; not if small images")
    add("--hflip", action=SWITCH, default=True, help="mirror half of the images; --no-hflip for digits")


def add_optimization_flags(parser: argparse.ArgumentParser, from_scratch: bool = True) -> None:
    """`from_scratch`: with a warm-up and a running average, which the few steps of a fine-tuning leave no time for."""
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=at_least(1, int), default=256, help="labelled images a step, all processes (paper: 2048)")
    add("--accumulate", type=at_least(1, int), default=1, help="parts a step: less memory; batch norm sees one part")
    words = "None: 700 to B4, 350 above (official), --init 30" if from_scratch else "the paper's are of ImageNet"
    add("--epochs", type=at_least(0), help=f"passes over the labels; {words}")
    add("--optimizer", choices=["rmsprop", "sgd", "adamw"], default="rmsprop", help="rmsprop: TensorFlow's (paper)")
    add("--lr", type=at_least(0), help="peak rate; None: as the start line says, for each 256 of the batch")
    schedules = ["staircase", "cosine", "constant", *(["plateau"] if from_scratch else [])]
    words = "; None: staircase (paper); with --init: cosine" if from_scratch else ""
    add("--schedule", choices=schedules, help=f"of the rate{words}")
    decays = {"nargs": 2, "type": at_least(0), "metavar": ("N", "FACTOR"), "default": (145, 0.97)}
    add("--decays", **decays, help="of the staircase; billion-scale: 13 0.5 to pre-train, 3 0.1 to fine-tune")
    if from_scratch:
        add("--warmup-epochs", type=at_least(0), default=5.0, help="linear warm-up from 0; at most a fifth of the run")
        add("--average", type=decay_or_swa, default=0.9999, help="decay of the averaged weights, or swa: equal mean")
        help_line = "the classifier's share of the rate; AdamW from scratch: 0.03, or it follows the last batch"
        add("--classifier-lr", type=at_least(0), default=1.0, help=help_line)
    add("--weight-decay", type=at_least(0), help="not of norms; None: rmsprop 1e-5 (paper), sgd 1e-4, adamw 0.05")
    add("--label-smoothing", type=RATE, default=0.1, help="of hard labels; None: 0.1, 04 --consistency 0")


def add_init_flag(add: Callable) -> None:
    help_line = "weights to start from: a file, or `published` ones of --arch; other classes: a new classifier"
    add("--init", type=path_or_published, help=help_line)


def path_or_published(text: str) -> str | Path:
    return text if text == "published" else Path(text)


def name_and_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(folder)


def decay_or_swa(text: str) -> str | float:
    return text if text == "swa" else RATE(text)


def add_run_flags(parser: argparse.ArgumentParser, evaluates: bool = True) -> None:
    """`evaluates`: on val during the training too, not only at its end."""
    add = parser.add_argument_group("run").add_argument
    if evaluates:
        add("--eval-every", type=at_least(0), help="epochs between evaluations, which also save; None: 1, or 250 steps")
        add("--patience", type=at_least(1, int), help="end after so many evaluations that are no better; None: never")
    add("--save-every", type=at_least(1, int), default=1000, help="steps between saving last.pt: what a crash can cost")
    add("--max-bad", type=at_least(0), default=1.0, help="percent of labelled images that may be unreadable")
    add("--seed", type=at_least(0, int), default=0, help="of weights, order, crops and noise")
    add("--checkpoint-activations", action="store_true", help="EfficientNets: less memory, slower, same results")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("device").add_argument
    add("--workers", type=at_least(0, int), help="loaders a process; None: 0 on CPUs, its share of the cores on GPUs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs where there are any")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on GPUs, else fp32")
    add("--compile", action="store_true", help="torch.compile the model: a minute at the start, faster steps")


def flags_of(args: argparse.Namespace) -> dict:
    """The flags as plain values, with absolute paths: what a checkpoint may hold."""

    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        return os.path.abspath(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


def nearest_folder(path: Path) -> Path:
    """The folder in which `path` lies or, where that is not there yet, the nearest one above it."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def beside(path: Path, ending: str) -> Path:
    """The file that belongs to a .h5 file: balanced-0.5.h5 -> balanced-0.5.json."""
    return path.with_name(path.name.removesuffix(".h5") + ending)


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder. At the end it is synced and renamed, after an error removed."""
    path = Path(path)
    if not path.name or path.is_dir():
        fail(f"{path} is a folder, expected the name of a file")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # in containers process ids are often equal
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # no permission, a full disk, a folder of that name
        fail(f"{path} cannot be written: {error.strerror or error}; the file that was there before is kept")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# processes: this process's place among those of torchrun, sums over all of them, signals, random seeds, progress
# ----------------------------------------------------------------------------------------------------------------------


def seed_words(seed: int, stream: str, *numbers: int) -> list[int]:
    """The seed of a random generator. Each stream has a word of its own: streams never share numbers.

    All randomness is a function of these words, never of what ran before: that is what makes a resumed run equal an
    uninterrupted one.
    """
    return [seed, zlib.crc32(stream.encode()), *numbers]


# Of loaders. A fork shares millions of paths, where spawn copies them; but libraries of macOS do not survive a fork.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Processes(NamedTuple):
    """This process's place among those that torchrun started."""

    device: torch.device
    rank: int
    world_size: int
    workers: int  # loaders of each process

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_processes(
    device: str = "auto", workers: int | None = None, out: Path | None = None, connect: bool = True
) -> Processes:
    """Find this process's device and place; without torchrun it is alone.

    `workers` None: no loaders on CPUs, else this process's share of the cores. `out`: what all nodes must see.
    `connect`: the processes will exchange tensors or wait for each other.
    """
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    rank, local_rank, world_size, local_world_size = (int(os.environ.get(k, d)) for k, d in names.items())
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and local_rank >= (num := torch.cuda.device_count()):
        fail(f"--device {device}: process {local_rank} has no GPU, there are {num} here", from_any=local_rank == num)
    if on_gpu:
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True
    if workers is None:
        workers = min(16, os.cpu_count() // local_world_size) if on_gpu else 0
    if world_size > 1 and (connect or on_several_nodes()):
        timeout = timedelta(hours=2)  # a rank may list files for a long time
        store = store_of_this_attempt(rank, world_size, timeout)
        if on_several_nodes() and out:
            check_nodes(store, rank, world_size, out, "GPUs" if on_gpu else "CPUs")
    if world_size > 1 and connect:
        # gloo beside nccl carries the stop flag without waiting for the GPU.
        place = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, **place)
        atexit.register(dist.destroy_process_group)
    return Processes(torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"), rank, world_size, workers)


def store_of_this_attempt(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store through which the processes find each other, without what those of an earlier attempt left in it.

    torchrun keeps one store over its restarts (pytorch issue 135712), where a process may find the address of one that
    was killed. So rank 0 names the attempt with a new word, the others answer with theirs, and each goes on when the
    list of the answers has its own.
    """
    store = next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
    word = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", word)
        answers = [store.get(f"{word} {other}").decode() for other in range(1, world_size)]  # waits for each
        store.set(f"{word} answers", " ".join(answers))
        return dist.PrefixStore(word, store)
    while True:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt} {rank}", word)
        if store.check([f"{attempt} answers"]) and word in store.get(f"{attempt} answers").decode():
            return dist.PrefixStore(attempt, store)
        time.sleep(0.02)


LOOK_SECONDS = 45  # NFS may take 30 to 60 s where it is mounted with nocto, else it shows a new file at once


def check_nodes(store: dist.Store, rank: int, world_size: int, out: Path, devices: str) -> None:
    """End the program on all nodes where one does not see what process 0 writes beside `out`, or has other devices.

    Process 0 leaves .NAME.begun there at its start, with a new word in it. Without it a node could not tell a disk that
    is not shared from a listing that takes hours; and a disk of its own may hold the files of an earlier run.
    """
    out = Path(os.path.abspath(out))
    begun, place = out.with_name(f".{out.name}.begun"), f"process {rank} on {platform.node()}"
    if rank == 0:
        word = uuid.uuid4().hex
        try:
            with write_atomically(begun) as temporary:
                temporary.write_text(word)
            atexit.register(begun.unlink, missing_ok=True)
        finally:  # where it cannot be written the others must not wait for it
            store.set("begun", f"{word} {devices}")
        answers = [store.get(f"answer {other}").decode() for other in range(1, world_size)]  # waits for each
        store.set("verdict", next(filter(None, answers), ""))
        for other in range(1, world_size):  # the store may end with this process
            store.get(f"heard {other}")
    else:
        word, devices0 = store.get("begun").decode().split()
        end, answer = time.monotonic() + LOOK_SECONDS, ""
        while not (seen := holds(begun, word)) and time.monotonic() < end:
            time.sleep(0.2)
        if not seen:
            answer = f"--out: {place} does not see {begun}, which process 0 wrote: all nodes need one disk, at one path"
        elif devices != devices0:
            answer = f"--device: {place} runs on {devices}, process 0 on {devices0}: all nodes must have the same"
        store.set(f"answer {rank}", answer)
    verdict = store.get("verdict").decode()
    store.set(f"heard {rank}", "")
    if verdict:
        fail(verdict)


def holds(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        os.listdir(path.parent)  # at the opening of a folder NFS asks its server; a name it may know from a minute ago
        return path.read_text() == text
    return False


def reduce_sum(tensor: Tensor, processes: Processes) -> Tensor:
    """The sum over all processes, in place."""
    if processes.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


BUFFER = torch.zeros(8, dtype=torch.float64)  # kept: gloo's thread may let go of it last, and aborts after Python's end


def sum_of(processes: Processes, *numbers: float) -> list[float]:
    """The sums over all processes of a few numbers on the CPU. It waits for the other processes, not for a GPU."""
    if processes.world_size == 1:
        return list(numbers)
    BUFFER.zero_()[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(BUFFER)
    return BUFFER[: len(numbers)].tolist()


def from_rank0(value, processes: Processes):
    """The value that rank 0 has, a plain Python object, on all processes."""
    values = [value]
    if processes.world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def first_of_node_first() -> Iterator[None]:
    """The first process of each machine goes ahead of its others: what it downloads, they find in the cache."""
    waits = dist.is_initialized() and not is_first_of_node()
    if waits:
        dist.all_reduce(BUFFER.zero_())
    yield
    if dist.is_initialized() and not waits:
        dist.all_reduce(BUFFER.zero_())


def union_of(items: set, processes: Processes) -> set:
    """The union of the sets of all processes."""
    if processes.world_size == 1:
        return items
    sets = [None] * processes.world_size
    dist.all_gather_object(sets, items)
    return set().union(*sets)


class StopSignal:
    """SIGTERM and SIGINT only set `received`; calling the object gives the same answer on all processes."""

    def __init__(self, processes: Processes):
        self.processes, self.received = processes, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        self.received = True

    def __call__(self) -> bool:
        return sum_of(self.processes, int(self.received))[0] > 0


def wait_until(done, words: str, stop: StopSignal) -> None:
    """Wait for other processes, of this machine or others: files are all that they share."""
    if not done():
        print(words, flush=True)
    while not done():
        time.sleep(0.2)
        if stop.received:
            raise SystemExit(143)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds <= 120 else str(timedelta(seconds=round(seconds)))


def progress(
    iterable: Iterable, total: int, name: str, processes: Processes, start: int = 0, note: Callable[[], str] = str
) -> Iterator:
    """Iterate with a tqdm bar on a terminal, elsewhere with a plain line every half minute, from rank 0.

    `note`: gives what is to be said beside how much is done and how long the rest will take.
    """
    if not processes.is_main:
        yield from iterable
        return
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            with tqdm(iterable, name, total, initial=start, dynamic_ncols=True) as bar:
                for item in bar:
                    yield item
                    bar.set_postfix_str(note(), refresh=False)
            return
    began = printed = time.monotonic()
    for done, item in enumerate(iterable, start + 1):
        yield item
        if (now := time.monotonic()) - printed >= 30:
            left = (now - began) / (done - start) * (total - done)
            words = [f"{name}: {done} of {total}", f"{duration(left)} left", note()]
            print(", ".join(filter(None, words)), file=sys.stderr, flush=True)
            printed = now


# ----------------------------------------------------------------------------------------------------------------------
# layers: of an EfficientNet; in fp32 torch's own; for training in bf16 on CPUs written out where that is faster
# ----------------------------------------------------------------------------------------------------------------------


def is_bf16_training(module: nn.Module, x: Tensor) -> bool:
    """Whether a CPU trains in bf16, which may round otherwise than fp32 and has ways of its own to be fast."""
    return module.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def small_depthwise(x: Tensor, weight: Tensor, stride: int, before: int, after: int) -> Tensor:
    """A depthwise convolution (N, C, H, W) with a kernel (C, 1, k, k) as a sum over the few pixels of a tiny map.

    `before` and `after`: pixels of padding. On such maps torch's backward pass takes up to ten times as long.
    """
    (height, width), kernel = x.shape[2:], weight.shape[-1]
    sizes = [(size + before + after - kernel) // stride + 1 for size in (height, width)]
    # For each pixel and each output pixel the row and the column of the kernel that lie between them.
    row = (torch.arange(height)[:, None] - torch.arange(sizes[0]) * stride + before)[:, None, :, None]
    column = (torch.arange(width)[:, None] - torch.arange(sizes[1]) * stride + before)[None, :, None, :]
    inside = (row >= 0) & (row < kernel) & (column >= 0) & (column < kernel)
    taps = F.pad(weight.flatten(1).T, (0, 0, 0, 1))  # (k * k + 1, C): the last is 0, for what the kernel does not reach
    taps = taps[torch.where(inside, row * kernel + column, kernel**2).flatten()].view(
        height * width, -1, weight.shape[0]
    )
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H * W, C), as it lies in memory
    out = sum(pixels[:, i, None] * taps[i] for i in range(height * width))  # (N, output pixels, C)
    return out.unflatten(1, sizes).permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """A convolution that stays in fp32 where a CPU trains in bf16 and it is depthwise: in bf16 its backward pass takes
    seven times as long (1,152 channels, 5 x 5)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1 and is_bf16_training(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.convolve(x.float(), x.shape[2] * x.shape[3] <= 4)
        return self.convolve(x)

    def convolve(self, x: Tensor, tiny: bool = False) -> Tensor:
        if tiny:
            return small_depthwise(x, self.weight, self.stride[0], self.padding[0], self.padding[0])
        return super().forward(x)


class SamePadConv2d(DepthwiseConv2d):
    """TensorFlow's SAME padding: output ceil(size / stride), the odd pixel of padding at the bottom and the right."""

    def convolve(self, x: Tensor, tiny: bool = False) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if tiny and pads[:2] == pads[2:]:
            return small_depthwise(x, self.weight, self.stride[0], *pads[:2])
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution; on CPUs as the matrix product it is, in training (1.35 times as fast, B0 at 32 px, 1 thread)
    and where it has a bias, that of a folded batch norm; otherwise to the last digit as torchvision's and timm's."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and (self.training or self.bias is not None):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(x)


def conv_norm(channels_in, channels_out, kernel, stride=1, groups=1, eps=1e-3, tf=False, activation=True):
    """Convolution, batch norm (official momentum 0.99, which torch counts as 0.01) and SiLU."""
    if tf and stride > 1:  # at stride 1 the padding is symmetric, and both are the same
        conv = SamePadConv2d(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
    elif kernel == 1:
        conv = PointwiseConv2d(channels_in, channels_out, 1, bias=False)
    else:
        conv = DepthwiseConv2d(channels_in, channels_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(channels_out, eps=eps, momentum=0.01)]
    return nn.Sequential(*layers, nn.SiLU(inplace=True)) if activation else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        if is_bf16_training(self, x):  # 3.5 times as fast
            fc1, fc2 = ((layer.weight.flatten(1), layer.bias) for layer in (self.fc1, self.fc2))
            return x * torch.sigmoid(F.linear(F.silu(F.linear(mean.flatten(1), *fc1)), *fc2))[:, :, None, None]
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(mean))))


@contextlib.contextmanager
def frozen_statistics(block: nn.Module):
    """Batch norms use their batch, but leave the running statistics alone: a first pass has moved them already."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, num_batches_tracked in kept:
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


# ----------------------------------------------------------------------------------------------------------------------
# models: EfficientNet-B0 to B7 and L0 to L2 (Noisy Student, table 7 of v1), with torchvision's parameter names
# ----------------------------------------------------------------------------------------------------------------------

EFFICIENTNETS = {  # name: (width, depth, training resolution in pixels, rate of the final dropout)
    "efficientnet_b0": (1.0, 1.0, 224, 0.2),
    "efficientnet_b1": (1.0, 1.1, 240, 0.2),
    "efficientnet_b2": (1.1, 1.2, 260, 0.3),
    "efficientnet_b3": (1.2, 1.4, 300, 0.3),
    "efficientnet_b4": (1.4, 1.8, 380, 0.4),
    "efficientnet_b5": (1.6, 2.2, 456, 0.4),
    "efficientnet_b6": (1.8, 2.6, 528, 0.5),
    "efficientnet_b7": (2.0, 3.1, 600, 0.5),
    "efficientnet_l0": (2.8, 3.7, 380, 0.5),  # the dropout of L0 and L1 is B7's: published for L2 only
    "efficientnet_l1": (3.9, 3.7, 380, 0.5),
    "efficientnet_l2": (4.3, 5.3, 475, 0.5),
}


class Recipe(NamedTuple):
    """How the official script trains a model (local_scripts/imagenet/train.sh:37-76)."""

    epochs: float
    num_ops: int  # of RandAugment
    magnitude: float  # of RandAugment
    ratio: float  # unlabelled images a labelled one


RECIPES = {
    "efficientnet_b0": Recipe(700, 0, 0, 1),
    "efficientnet_b1": Recipe(700, 0, 0, 3),
    "efficientnet_b2": Recipe(700, 2, 6, 3),
    "efficientnet_b3": Recipe(700, 2, 12, 3),
    "efficientnet_b4": Recipe(700, 2, 15, 3),
    "efficientnet_b5": Recipe(350, 2, 18, 3),
    "efficientnet_b6": Recipe(350, 2, 24, 3),
    "efficientnet_b7": Recipe(350, 2, 27, 3),
    "efficientnet_l0": Recipe(350, 2, 27, 3),  # L0 and L1: B7's
    "efficientnet_l1": Recipe(350, 2, 27, 3),
    "efficientnet_l2": Recipe(350, 2, 27, 14),  # the ratio is the paper's; in its last round 28
}
OTHER_RECIPE = Recipe(350, 2, 9, 3)  # any other model: RandAugment's own setting for ResNet-50 (1909.13719)
EPOCHS_FROM_WEIGHTS = 30  # ours


def recipe_of(arch: str, args: argparse.Namespace) -> Recipe:
    """The recipe of a model, with the flags that were given in place of its values."""
    given = {name: getattr(args, name, None) for name in Recipe._fields}
    recipe = RECIPES.get(arch.removeprefix("tf_"), OTHER_RECIPE)
    if getattr(args, "init", None):
        recipe = recipe._replace(epochs=EPOCHS_FROM_WEIGHTS)
    if not recipe.num_ops and not given["num_ops"] is given["magnitude"] is None:
        # B0 and B1 have no RandAugment. One flag takes the other's value from those that have it: magnitude 0 would be
        # violent (5 is what does nothing), and with 0 ops a magnitude would change nothing.
        recipe = recipe._replace(num_ops=OTHER_RECIPE.num_ops, magnitude=OTHER_RECIPE.magnitude)
    return recipe._replace(**{name: value for name, value in given.items() if value is not None})


def resolution_of(arch: str) -> int:
    """The training resolution in pixels that a model is meant for."""
    if arch.startswith("timm/"):
        return view_of(arch).image_size
    return EFFICIENTNETS.get(arch.removeprefix("tf_"), (0, 0, 224))[2]


# B0's stages: repeats, kernel, stride, expansion, output channels (official efficientnet_builder.py:123-131).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def round_channels(channels: float) -> int:
    """Round to a multiple of 8, but never down by more than 10 percent (official efficientnet_model.py:119-134)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class MBConv(nn.Module):
    """Inverted residual block with stochastic depth: `drop_path` is the probability that an image skips the block."""

    recomputes = False  # the activations, in the backward pass, instead of keeping them: see `parallel`

    def __init__(self, channels_in, channels_out, kernel, stride, expand, drop_path, conv_norm):
        super().__init__()
        expanded = channels_in * expand
        self.block = nn.Sequential(
            *([conv_norm(channels_in, expanded, 1)] if expand > 1 else []),
            conv_norm(expanded, expanded, kernel, stride, groups=expanded),
            SqueezeExcitation(expanded, max(1, channels_in // 4)),  # a quarter of the block's *input*
            conv_norm(expanded, channels_out, 1, activation=False),
        )
        self.has_skip = stride == 1 and channels_in == channels_out
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            # A compiled graph recomputes without the side effect that the second context suppresses.
            contexts = {} if torch.compiler.is_compiling() else {"context_fn": self.recompute_contexts}
            y = checkpoint_activations(self.block, x, use_reentrant=False, preserve_rng_state=False, **contexts)
        else:
            y = self.block(x)
        if not self.has_skip:
            return y
        if self.training and self.drop_path > 0:
            keep = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop_path
            y = y * (keep / (1 - self.drop_path)).to(y.dtype)
        return x + y

    def recompute_contexts(self):
        return contextlib.nullcontext(), frozen_statistics(self.block)


class EfficientNet(nn.Module):
    """EfficientNet (Tan & Le 2019) as the official Noisy Student code builds it. (N, 3, H, W) -> logits (N, classes).

    `small_images` is the official variant for 32 pixels: stages 2 and 3 keep their resolution. `drop_path` is the rate
    of stochastic depth: block i of n is dropped with probability drop_path * i / n (the paper's survival 0.8 is 0.2).
    `zero_init_residual` starts the blocks with a skip as the identity (1706.02677): not the paper's, for short runs.
    """

    def __init__(
        self, width, depth, dropout, num_classes, eps, tf, small_images=False, drop_path=0.2, zero_init_residual=False
    ):
        super().__init__()
        layer = partial(conv_norm, eps=eps, tf=tf)
        channels = round_channels(32 * width)
        stages = [layer(3, channels, 3, 2)]
        repeats = [math.ceil(depth * stage[0]) for stage in STAGES]
        index = 0
        for stage, (_, kernel, stride, expand, out) in enumerate(STAGES):
            stride = 1 if small_images and stage in (1, 2) else stride
            out = round_channels(out * width)
            blocks = []
            for i in range(repeats[stage]):
                rate = drop_path * index / sum(repeats)  # official efficientnet_model.py:469-483
                blocks.append(MBConv(channels, out, kernel, 1 if i else stride, expand, rate, layer))
                channels, index = out, index + 1
            stages.append(nn.Sequential(*blocks))
        head = round_channels(1280 * width)
        self.features = nn.Sequential(*stages, layer(channels, head, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(head, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Of a depthwise convolution TensorFlow counts the fan-out of one group (official
                # efficientnet_model.py:74-98), torchvision that of all: smaller weights, which AdamW moves sooner.
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                fan_out = fan_out // module.groups if tf else fan_out
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if zero_init_residual and isinstance(module, MBConv) and module.has_skip:
                nn.init.zeros_(module.block[-1][1].weight)  # the last batch norm's
        # Official: U(+-1/sqrt(classes)), 0.03 for ImageNet. For 10 classes that would be 0.3, and nearly every image
        # would pass the confidence threshold from the first step on; so never more than ImageNet's. (Deviation.)
        bound = 1 / math.sqrt(max(num_classes, 1000))
        nn.init.uniform_(self.classifier[1].weight, -bound, bound)
        nn.init.zeros_(self.classifier[1].bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def build_model(arch: str, num_classes: int = 1000, **arch_options) -> nn.Module:
    """Build a model by name, with fresh weights.

    `efficientnet_b0` ... `_b7`, `_l0` ... `_l2`: torchvision's numbers; the same names behind `tf_`: TensorFlow's SAME
    padding and batch-norm eps; `timm/NAME`: timm's model; `resnext101_32xNd`: for any N; any other name is
    torchvision's `get_model`. arch_options: `small_images`, `dropout`, `drop_path`, `zero_init_residual`, for timm's
    `img_size`; None means the model's own. Raises ValueError for an unknown name or option.
    """
    options = {name: value for name, value in arch_options.items() if value is not None}
    if arch.startswith("timm/"):
        return build_timm_model(arch, num_classes, options)
    if arch.removeprefix("tf_") in EFFICIENTNETS:
        width, depth, _, dropout = EFFICIENTNETS[arch.removeprefix("tf_")]
        # torchvision's B0 to B4 have torch's own eps; TensorFlow's, and torchvision's B5 to B7, 1e-3.
        eps = 1e-5 if arch in list(EFFICIENTNETS)[:5] else 1e-3
        options.setdefault("dropout", dropout)
        return EfficientNet(width, depth, num_classes=num_classes, eps=eps, tf=arch.startswith("tf_"), **options)
    from torchvision import models

    if width := re.fullmatch(r"resnext101_32x([1-9]\d*)d", arch):  # the teacher of 1905.00546 is 32x48d
        options |= {"groups": 32, "width_per_group": int(width[1])}
    elif arch not in models.list_models(module=models):
        names = f"it is none of {', '.join(EFFICIENTNETS)}, nor of torchvision's models"
        raise ValueError(f"cannot build {arch!r}: {names}; timm's are called timm/NAME")
    if "drop_path" in options:
        options["stochastic_depth_prob"] = options.pop("drop_path")
    if arch in ("googlenet", "inception_v3"):  # without the second classifiers; images as their published weights want
        options |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    try:
        if width:
            bottleneck = models.resnet.Bottleneck
            return models.ResNet(bottleneck, [3, 4, 23, 3], num_classes=num_classes, **options)
        return models.get_model(arch, weights=None, num_classes=num_classes, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot build {arch!r} with {arch_options}: {error}") from error


def fuse_batch_norms(model: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place: the same function in eval mode, and faster.

    In timm's models the one before it need not be its own, unless the names say so (conv1, bn1); and a BatchNormAct2d,
    which has its activation inside, stays.
    """
    model.eval()
    of_timm = is_of_timm(model)
    for module in list(model.modules()):
        for (name, conv), (next_name, norm) in pairwise(list(module.named_children())):
            is_own = not of_timm or isinstance(module, nn.Sequential) or next_name == name.replace("conv", "bn")
            if is_own and isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())


# ----------------------------------------------------------------------------------------------------------------------
# weights: loading by name, of this toolkit, torchvision and timm
# ----------------------------------------------------------------------------------------------------------------------

# timm's layers of an EfficientNet by our (torchvision's) names; the blocks of the first stage do not expand.
TIMM_TOP = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.8.0",
    "bn2": "features.8.1",
    "classifier": "classifier.1",
}
TIMM_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "3.0", "bn3": "3.1"}
TIMM_BLOCK |= {"se.conv_reduce": "2.fc1", "se.conv_expand": "2.fc2"}
TIMM_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "2.0", "bn2": "2.1"}
TIMM_FIRST |= {"se.conv_reduce": "1.fc1", "se.conv_expand": "1.fc2"}


def timm_to_own(name: str) -> str:
    layer, _, tensor = name.rpartition(".")
    if found := re.fullmatch(r"blocks\.(\d)\.(\d+)\.(.+)", layer):
        stage, block, part = found.groups()
        part = (TIMM_BLOCK if int(stage) else TIMM_FIRST).get(part, part)
        return f"features.{int(stage) + 1}.{block}.block.{part}.{tensor}"
    return f"{TIMM_TOP.get(layer, layer)}.{tensor}"


def timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of an EfficientNet, `tf_` or not, by the names of timm's model of the same name: see docs/use.md.

    ValueError for another model: those of `timm/NAME` have timm's names, all others torchvision's.
    """
    top = {own: theirs for theirs, own in TIMM_TOP.items()}
    first, later = ({own: theirs for theirs, own in table.items()} for table in (TIMM_FIRST, TIMM_BLOCK))
    renamed = {}
    for name, tensor in weights.items():
        layer, _, last = name.rpartition(".")
        theirs = top.get(layer)
        if found := re.fullmatch(r"features\.(\d)\.(\d+)\.block\.(.+)", layer):
            stage, block, part = found.groups()
            if part := (first if stage == "1" else later).get(part):
                theirs = f"blocks.{int(stage) - 1}.{block}.{part}"
        if theirs is None:
            raise ValueError(f"{name!r} is not of an EfficientNet of this toolkit or torchvision")
        renamed[f"{theirs}.{last}"] = tensor
    return renamed


def own_names(weights: dict, like: Iterable[str] = ()) -> dict[str, Tensor]:
    """A state_dict by our names: out of its containers, without the prefixes of wrappers, timm's names translated.

    Where there are both the last and the averaged weights, they are the averaged ones. `like`: the names that the model
    has; timm's own model keeps timm's.
    """
    containers = ("model_ema", "state_dict_ema", "state_dict", "model")
    while isinstance(weights, dict) and (inside := [key for key in containers if isinstance(weights.get(key), dict)]):
        weights = weights[inside[0]]
    items = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
        raise ValueError(f"not a state_dict, with or without one of {', '.join(containers)} around it")
    # Without the counter of torch's AveragedModel and the second classifiers of GoogLeNet and Inception.
    weights = {k: v for k, v in items if not re.match(r"n_averaged$|((module|_orig_mod)\.)*(aux[12]|AuxLogits)\.", k)}
    own = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in weights.items()}
    own = {
        re.sub(r"(denselayer\d+\.(norm|conv))\.", r"\1", name): tensor for name, tensor in own.items()
    }  # older files
    if "conv_stem.weight" in own and "conv_stem.weight" not in like:
        own = {timm_to_own(name): tensor for name, tensor in own.items()}
    if len(own) < len(weights):
        raise ValueError("the same weights are there twice, with and without a prefix")
    return own


def head_names(model: nn.Module) -> list[str]:
    """The names of the layers that give the logits: timm's models say, elsewhere it is the last one."""
    if not hasattr(model, "get_classifier"):
        return [list(model.state_dict())[-1].rpartition(".")[0]]
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def load_weights(model: nn.Module, weights: dict | str | Path, new_head: bool = False) -> None:
    """Load a state_dict or a file of one, of this toolkit, torchvision or timm (see `own_names`).

    ValueError names what is missing, extra or of another shape, and then nothing was loaded. `new_head`: the last layer
    keeps the weights it has. A model on the meta device gets its memory here.
    """
    own = model.state_dict()
    given = own_names(read_file(weights) if isinstance(weights, (str, Path)) else weights, own)
    if new_head:
        head = tuple(f"{name}." for name in head_names(model))
        given = {name: t for name, t in given.items() if not name.startswith(head)}
        given |= {name: t for name, t in own.items() if name.startswith(head)}
    for name in own.keys() - given.keys():
        if name.endswith(".num_batches_tracked"):  # older files lack it, and it is not used
            given[name] = torch.tensor(0)
    wrong = {
        "missing": own.keys() - given.keys(),
        "extra": given.keys() - own.keys(),
        "of another shape": {
            f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & given.keys()
            if own[name].shape != given[name].shape
        },
    }
    if any(wrong.values()):
        said = (f"{len(names)} {what}: {', '.join(sorted(names)[:4])}" for what, names in wrong.items() if names)
        raise ValueError(f"wrong weights, {'; '.join(said)}")
    on_meta = any(tensor.is_meta for tensor in own.values())
    if on_meta:  # copied, for a mapped file may change
        given = {name: tensor.to(own[name].dtype, copy=True) for name, tensor in given.items()}
    model.load_state_dict(given, strict=True, assign=on_meta)


# How images must look for published TensorFlow weights: a pattern of "arch path/file", of which the first that fits
# counts; resolution in pixels (None: the model's own), mean, std. The crop is size / (size + 32), bicubic (official
# preprocessing.py:104-134). For torchvision's and timm's own weights these have a record.
PUBLISHED = (
    (r"^tf_efficientnet_l2 .*ns(_jft_in1k)?_475", 475, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    (r"^tf_efficientnet_l2 ", 800, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # trained at 475, tuned for 800
    (r"^tf_.*[._]ap[-._]", None, (0.5,) * 3, (0.5,) * 3),  # AdvProp, timm's ap_in1k
    (r"^tf_|^efficientnet_l", None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # Noisy Student (ns_jft_in1k), in1k
)


def published_weights(arch: str, num_pixels: int | None) -> dict:
    """The published weights of a model, by torchvision's or timm's own download, as `initial_weights` gives them."""
    from torchvision import models

    try:
        if arch.startswith(("timm/", "tf_")):
            config = timm_config(arch)
            view = timm_view(config) if config else fail(f"--arch {arch}: timm has no such model")
            view = view.at(num_pixels or view.image_size)
            size = img_size_option(arch, view.image_size)  # the positions of a ViT are resized
            model = import_timm().create_model(arch.removeprefix("timm/"), pretrained=True, **size)
            return {"arch": arch, "model": model.state_dict(), **view.header}
        if arch not in models.list_models(module=models):
            fail(f"--init published: --arch {arch} has no published weights that torchvision or timm can download")
        weights = models.get_model_weights(arch).DEFAULT
        return {"arch": arch, "model": weights.get_state_dict(), **torchvision_view(weights).header}
    except (OSError, RuntimeError, ValueError) as error:  # no network, and what each makes of it
        fail(f"--init published: the weights of {arch} cannot be downloaded ({str(error)[:150]})")


def torchvision_view(weights) -> "View":
    record = weights.transforms()
    size, fraction = record.crop_size[0], record.crop_size[0] / record.resize_size[0]
    return View(size, fraction, record.interpolation.value, tuple(record.mean), tuple(record.std))


def initial_weights(init: str | Path, arch: str | None, num_pixels: int | None) -> dict:
    """--init, as a checkpoint or a dict like one: arch, model (the weights), and how images must look to it.

    A file of torchvision is known by its name. Another is taken for the first that torchvision published of that model,
    which is right for the semi-supervised ResNets (1905.00546: 224 pixels of 256, bilinear).
    """
    if init == "published":
        if not arch:
            fail("--init published: --arch must say of which model")
        with first_of_node_first():
            return published_weights(arch, num_pixels)
    source = read_file(init)
    if isinstance(source, dict) and source.get("format") == CHECKPOINT_FORMAT:
        return source
    if not arch:
        fail(f"--init {init} is not of this toolkit: --arch must say of which model its weights are")
    # The Hugging Face cache has the name three folders up.
    name = f"{arch} {'/'.join(Path(init).absolute().parts[-4:])}"
    if found := next((row for pattern, *row in PUBLISHED if re.search(pattern, name)), None):
        size, mean, std = found
        size = size or resolution_of(arch)
        view = View(size, default_crop_fraction(size), "bicubic", mean, std)
    elif arch.startswith("timm/"):
        view = view_of(arch)
    else:
        from torchvision import models

        if arch not in models.list_models(module=models):
            fail(f"--arch {arch}: neither an EfficientNet nor one of torchvision's classification models")
        published = list(models.get_model_weights(arch))
        view = torchvision_view(next((one for one in published if Path(one.url).name == Path(init).name), published[0]))
    return {"arch": arch, "model": source, **view.header}


def has_names(classes: list[str]) -> bool:
    """Whether these are names: a checkpoint made without a data directory has the outputs' numbers, "0", "1" ..."""
    return classes != [str(output) for output in range(len(classes))]


def hint_of(classes: list[str]) -> str:
    """What to do about classes that a model does not know, where the reason may be that its outputs have no names."""
    return "" if has_names(classes) else "; --classes FILE says what the model's outputs are called"


def names_in(file: str) -> list[str]:
    """The lines of --classes, a text file: names of classes in the order of a model's outputs. A BOM is left out."""
    try:
        names = [line.strip() for line in Path(file).read_text("utf-8-sig").strip().splitlines()]
    except (OSError, ValueError) as error:
        fail(f"--classes {file}: cannot be read ({error}); expected one class a line, in UTF-8")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        fail(f"--classes {file}: {doubled[0]!r} is there more than once; expected the names of folders, one an output")
    return names


def classes_of_weights(source: dict, arch: str, val_classes: list[str]) -> list[str]:
    """The classes of a checkpoint; of a foreign file those of val/ if there are as many as outputs, else numbers."""
    if "classes" in source:
        return source["classes"]
    model = build_model(arch)
    try:
        number = len(own_names(source, model.state_dict())[f"{head_names(model)[0]}.weight"])
    except (KeyError, ValueError) as error:
        fail(f"--init does not fit --arch {arch}: {error}")
    return val_classes if len(val_classes) == number else [str(output) for output in range(number)]


def load_initial_weights(model: nn.Module, source: dict, args: argparse.Namespace, classes: list[str]) -> str:
    """Start from --init. Returns what to say of it: its classifier comes along only with the same classes in order."""
    try:
        weights = own_names(source, model.state_dict())
        # Of a foreign file, and of a checkpoint without names, only the number is known.
        known = source["classes"] if has_names(source.get("classes", [])) else None
        number = len(known or weights.get(f"{head_names(model)[0]}.weight", classes))
        same_classes = known == classes if known else number == len(classes)
        if not same_classes and args.epochs == 0:
            fail(f"--init {args.init} has {number} other classes than --data ({len(classes)}): --epochs 0 trains none")
        load_weights(model, weights, new_head=not same_classes)
    except ValueError as error:
        fail(f"--init {args.init} does not fit --arch {args.arch or source['arch']}: {error}")
    return f"from {args.init}" + ("" if same_classes else " with a new classifier, for it had other classes")


# ----------------------------------------------------------------------------------------------------------------------
# models of timm, built by its names, and what it says of how images must look
# ----------------------------------------------------------------------------------------------------------------------


def import_timm():
    try:
        import timm
    except ImportError:
        fail("--arch timm/... and timm's published weights need a package: pip install timm")
    return timm


def build_timm_model(arch: str, num_classes: int, options: dict) -> nn.Module:
    """timm's model of the name behind `timm/`, with our options by its names. ValueError as `build_model`."""
    names = {"dropout": "drop_rate", "drop_path": "drop_path_rate", "zero_init_residual": "zero_init_last"}
    options = {names.get(name, name): value for name, value in options.items()}
    try:
        return import_timm().create_model(arch.removeprefix("timm/"), num_classes=num_classes, **options)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # each model checks in its own way
        raise ValueError(f"cannot build {arch!r} with {options}: {error}") from error


def is_of_timm(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("timm.") for module in model.modules())


def timm_config(arch: str):
    """timm's record of a model's published weights, None where it has none or no such model."""
    return import_timm().get_pretrained_cfg(arch.removeprefix("timm/"))


def img_size_option(arch: str, image_size: int) -> dict[str, int]:
    """The option of a model of timm that is made for one size of images, as a ViT is; of others none."""
    config = timm_config(arch) if arch.startswith("timm/") else None
    return {"img_size": image_size} if config and config.fixed_input_size else {}


def timm_view(config) -> "View":
    """How images must look for a model of timm."""
    look = config.interpolation, tuple(config.mean), tuple(config.std), config.crop_mode
    return View(config.input_size[-1], config.crop_pct, *look)


# ----------------------------------------------------------------------------------------------------------------------
# noise: RandAugment (Cubuk et al., 1909.13719) as the official Noisy Student code runs it, on whole batches
# ----------------------------------------------------------------------------------------------------------------------
# Magnitudes are on a scale of 10 without a cap: the paper's 27 is 2.7 times each op's range (rotate by 81 degrees).
# torchvision's 27 is on a scale of 30 (27 degrees), timm clamps it to 10. Every op is applied always.
# An op maps uint8 (N, 3, H, W) to the same and draws only from `generator`, a CPU generator, so that the same state
# gives the same batch on every device. `sign` (N,) is +1 or -1. Sources: official randaugment.py; Pillow for rounding.


def pick(images: Tensor, rows: Tensor) -> Tensor:
    return images.index_select(0, rows.to(images.device, non_blocking=True))


def put(images: Tensor, rows: Tensor, values: Tensor) -> None:
    if images.device.type == "cpu":
        images.numpy()[rows.numpy()] = values.numpy()  # 7 times as fast as torch's
    else:
        images.index_copy_(0, rows.to(images.device, non_blocking=True), values)


def table_lookup(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each pixel by its entry in uint8 tables (N, 3, 256), or (N, 1, 256), or (1, 1, 256) for all images."""
    if images.device.type != "cpu":
        tables = tables.expand(len(images), 3, 256)
        return tables.gather(2, images.flatten(2).long()).view(images.shape)
    planes = images.numpy().reshape(tables.shape[0] * tables.shape[1], -1)
    tables = tables.numpy().reshape(-1, 256)  # translate() is twice as fast as any indexing of numpy or torch
    out = bytearray().join(bytearray(p).translate(t) for p, t in zip(planes, tables, strict=True))
    return torch.frombuffer(out, dtype=torch.uint8).view(images.shape)


def one_table(images: Tensor, values: Tensor) -> Tensor:
    """The same table (256,) of any dtype, clipped to 0..255 and truncated, for all images and channels."""
    return table_lookup(images, values.clamp(0, 255).to(torch.uint8).view(1, 1, 256).to(images.device))


def blend(degenerate: Tensor, images: Tensor, magnitude: float) -> Tensor:
    """degenerate + factor * (image - degenerate), truncated as in Pillow; factor 1.8 M/10 + 0.1: M = 5 is nothing."""
    factor = 1.8 * magnitude / 10 + 0.1
    degenerate = degenerate.float()
    return (images - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def grayscale(images: Tensor) -> Tensor:
    """ITU-R 601 luma as Pillow rounds it, int32 (N, 1, H, W)."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768) >> 16


@lru_cache(maxsize=64)
def source_index(height: int, width: int, matrix: tuple[float, ...], device: torch.device) -> Tensor:
    """Where in the flattened image each output pixel comes from, int64 (H * W,); H * W for outside: see `warp`."""
    a, b, c, d, e, f = matrix
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    source_x, source_y = (a * x + b * y + c + 0.5).floor().long(), (d * x + e * y + f + 0.5).floor().long()
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    return torch.where(inside, source_y * width + source_x, height * width).flatten().to(device)


def warp(images: Tensor, sign: Tensor, matrix) -> Tensor:
    """Output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f), nearest neighbour, grey 128 outside.

    matrix(s) gives (a, ..., f) for the images of sign s, in pixel indices, as TensorFlow counts (Pillow: from corners).
    """
    flat = F.pad(images.flatten(2), (0, 1), value=128)  # one more pixel stands for all that is outside
    moved = torch.empty_like(images.flatten(2))
    for s in (1, -1):
        rows = (sign == s).nonzero().squeeze(1)
        if not len(rows):
            continue
        index = source_index(*images.shape[2:], matrix(s), images.device)
        chosen = flat if len(rows) == len(flat) else pick(flat, rows)
        if images.device.type == "cpu":
            taken = torch.from_numpy(chosen.numpy().take(index.numpy(), axis=2, mode="clip"))
        else:
            taken = chosen.index_select(2, index)
        put(moved, rows, taken)
    return moved.view(images.shape)


def pixels_at_10(images: Tensor, official: int) -> int:
    """Translation and cutout sizes at level 10: official pixels for large images, size // 8 for small ones."""
    size = min(images.shape[2:])
    return official if size > 64 else size // 8  # official preprocessing.py:189-224


def auto_contrast(images, magnitude, sign, generator, tf_quirks=False):
    low, high = images.flatten(2).amin(2, True).double(), images.flatten(2).amax(2, True).double()  # aminmax is slow
    # As Pillow's int(ix * scale + offset); torch computes number / tensor as number * (1 / tensor), not the same.
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    stretched = (levels * scale - low * scale).clamp(0, 255)
    return table_lookup(images, torch.where(high > low, stretched, levels).to(torch.uint8))


def equalize(images, magnitude, sign, generator, tf_quirks=False):
    flat = images.flatten(2)
    if images.device.type == "cpu" and flat.shape[2] > 64**2:  # 14 times as fast at 224 pixels; slower at 32
        planes = flat.flatten(0, 1).unbind()
        histogram = torch.stack([p.bincount(minlength=256) for p in planes]).view(*flat.shape[:2], 256)
    else:
        index = flat.long()
        histogram = index.new_zeros(*flat.shape[:2], 256).scatter_add_(2, index, torch.ones_like(index))
    last = histogram.gather(2, flat.amax(2, keepdim=True).long())  # the count of the brightest level in use
    step = (flat.shape[2] - last) // 255
    below = histogram.cumsum(2) - histogram
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    return table_lookup(images, torch.where(step > 0, equalized, torch.arange(256, device=images.device)).byte())


def invert(images, magnitude, sign, generator, tf_quirks=False):
    return 255 - images


def rotate(images, magnitude, sign, generator, tf_quirks=False):
    y, x = (images.shape[2] - 1) / 2, (images.shape[3] - 1) / 2
    cos, sin = math.cos(math.radians(3 * magnitude)), math.sin(math.radians(3 * magnitude))
    return warp(
        images, sign, lambda s: (cos, -s * sin, x - x * cos + y * s * sin, s * sin, cos, y - x * s * sin - y * cos)
    )


def posterize(images, magnitude, sign, generator, tf_quirks=False):
    """Keep int(4 M/10) bits up to M = 10; above, where the official shift wraps, torchvision's 8 - round(4 M/30)."""
    if tf_quirks:  # a negative shift wraps around in uint8, and TensorFlow's CPU kernel clamps it to 7
        shift = min((8 - int(4 * magnitude / 10)) % 256, 7)
    elif magnitude <= 10:
        shift = 8 - max(1, int(4 * magnitude / 10))
    else:
        shift = min(round(4 * magnitude / 30), 7)
    return images & ((255 << shift) & 255)


def solarize(images, magnitude, sign, generator, tf_quirks=False):
    """Invert from int(256 M/10) up; above M = 10, where that wraps, from torchvision's 255 (1 - M/30) up."""
    if tf_quirks:
        threshold = int(256 * magnitude / 10) % 256
    else:
        threshold = int(256 * magnitude / 10) if magnitude <= 10 else 255 * (1 - magnitude / 30)
    levels = torch.arange(256)
    return one_table(images, torch.where(levels < threshold, levels, 255 - levels))


def solarize_add(images, magnitude, sign, generator, tf_quirks=False):
    levels = torch.arange(256)
    return one_table(images, torch.where(levels < 128, levels + int(magnitude / 10 * 110), levels))


def color(images, magnitude, sign, generator, tf_quirks=False):
    return blend(grayscale(images), images, magnitude)


def contrast(images, magnitude, sign, generator, tf_quirks=False):
    """Blend with the mean grey; the official code takes the pixel count over 256 for it (tensorflow/tpu#825)."""
    if tf_quirks:
        mean = torch.full((len(images), 1, 1), min(images.shape[2] * images.shape[3] // 256, 255), device=images.device)
    else:
        mean = (grayscale(images).flatten(2).sum(2, keepdim=True).double() / images[0, 0].numel() + 0.5).floor()
    return table_lookup(images, blend(mean, torch.arange(256, device=images.device), magnitude))


def brightness(images, magnitude, sign, generator, tf_quirks=False):
    return one_table(images, torch.arange(256.0) * (1.8 * magnitude / 10 + 0.1))


def sharpness(images, magnitude, sign, generator, tf_quirks=False):
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the outermost pixels stay as they are."""
    wide = images.short()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(wide[..., 1:-1, 1:-1], alpha=4)
    smooth = total.float().div_(13).add_(0.5).floor_()
    out = images.clone()
    out[..., 1:-1, 1:-1] = blend(smooth, images[..., 1:-1, 1:-1], magnitude)
    return out


def geometric(matrix: Callable) -> Callable:
    """The op that moves pixels by `matrix(sign, magnitude, images)`: see `warp`."""

    def op(images, magnitude, sign, generator, tf_quirks=False):
        return warp(images, sign, lambda s: matrix(s, magnitude, images))

    return op


def cutout(images, magnitude, sign, generator, tf_quirks=False):
    """A grey square of side 2 int(40 M/10) pixels around a uniformly drawn pixel, cut off at the image's edge."""
    return cut_squares(images, int(pixels_at_10(images, 40) * magnitude / 10), generator)


def cut_squares(images: Tensor, half: int, generator: torch.Generator | None) -> Tensor:
    centers = (torch.rand(len(images), 2, generator=generator) * torch.tensor(images.shape[2:])).long()
    inside = []
    for center, size in zip(centers.unbind(1), images.shape[2:], strict=True):
        distance = torch.arange(size) - center[:, None]
        inside.append((distance >= -half) & (distance < half))
    hole = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images.device, non_blocking=True)
    return (images * ~hole).add_(hole.byte() * 128)  # 4 times as fast as masked_fill


RAND_AUGMENT_OPS = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "Posterize": posterize,
    "Solarize": solarize,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": geometric(lambda s, m, images: (1, s * 0.3 * m / 10, 0, 0, 1, 0)),
    "ShearY": geometric(lambda s, m, images: (1, 0, 0, s * 0.3 * m / 10, 1, 0)),
    "TranslateX": geometric(lambda s, m, images: (1, 0, s * pixels_at_10(images, 100) * m / 10, 0, 1, 0)),
    "TranslateY": geometric(lambda s, m, images: (1, 0, 0, 0, 1, s * pixels_at_10(images, 100) * m / 10)),
    "SolarizeAdd": solarize_add,
    "Cutout": cutout,
}
SIZED_IN_PIXELS = ("TranslateX", "TranslateY", "Cutout")  # the other ops are in degrees, shares and grey levels


def rand_augment(
    images: Tensor,
    num_ops: int = 2,
    magnitude: float = 27,
    generator: torch.Generator | None = None,
    tf_quirks: bool = False,
    resolution: int | None = None,
) -> Tensor:
    """Apply `num_ops` ops, drawn for each image on its own with replacement, to uint8 (N, 3, H, W) on any device.

    Not in place. `generator`: a CPU generator (None: torch's own). `tf_quirks`: do what the official code does when it
    is run, where it overflows. Source: official randaugment.py:530-554 (the op's probability there is never used).

    `resolution`: the side in pixels for which the official sizes of translation and cutout are meant, a model's own
    (B0 224 ... B7 600). Images between 64 pixels and it get them in proportion: B7's 270 pixels would empty most images
    of 224. None: never in proportion.

    op                       at magnitude M                                          with tf_quirks
    AutoContrast, Equalize,  in full
    Invert
    Rotate                   by +-3 M degrees
    ShearX, ShearY           by +-0.03 M
    TranslateX, TranslateY   by +-10 M pixels; images up to 64 px by size // 8 x M / 10
    Cutout                   2 int(4 M) pixels a side; up to 64 px 2 int(size // 8 x M / 10)
    Posterize                int(4 M / 10) bits stay, at least 1; above M = 10       int(4 M / 10); from 22.5 on 1 bit
                             8 - round(4 M / 30)                                     (a negative shift wraps)
    Solarize                 inverted from int(256 M / 10) up; above M = 10          the threshold modulo 256
                             from 255 (1 - M / 30) up
    SolarizeAdd              int(M / 10 x 110) is added below 128
    Color, Contrast,         away from grey, mean grey, black, blurred by            mean grey: pixel count / 256
    Brightness, Sharpness    the factor 1.8 M / 10 + 0.1; M = 5 does nothing
    """
    images = images.clone(memory_format=torch.contiguous_format)
    ops = torch.randint(len(RAND_AUGMENT_OPS), (num_ops, len(images)), generator=generator)
    signs = torch.randint(2, (num_ops, len(images)), generator=generator) * 2 - 1
    fits = max(1, 2**18 // math.prod(images.shape[1:])) if images.device.type == "cpu" else len(images)  # in the cache
    side = min(images.shape[2:])
    shrunk = magnitude * side / resolution if resolution and 64 < side < resolution else magnitude
    for chosen, sign in zip(ops, signs, strict=True):
        for number, (name, op) in enumerate(RAND_AUGMENT_OPS.items()):
            level = shrunk if name in SIZED_IN_PIXELS else magnitude
            for rows in (chosen == number).nonzero().squeeze(1).split(fits):  # on the CPU: no host synchronisation
                if len(rows):
                    put(images, rows, op(pick(images, rows), level, sign[rows], generator, tf_quirks))
    return images


def small_image_noise(images: Tensor, hflip: bool, generator: torch.Generator | None = None) -> Tensor:
    """What the official code does to images of 32 pixels after RandAugment, where it crops larger ones before it.

    uint8 (N, 3, H, W) -> the same. A grey square of half the side; a shift by up to an eighth of the side, with what
    comes in reflected at the edge; half of the images mirrored, if `hflip` (preprocessing.py:189-224).
    """
    num, _, height, width = images.shape
    size = min(height, width)
    images = cut_squares(images, size // 4, generator)
    shifts = torch.randint(-(size // 8), size // 8 + 1, (num, 2), generator=generator)
    mirrored = torch.rand(num, generator=generator) < (0.5 if hflip else 0)
    y, x = (torch.arange(length) + shift[:, None] for length, shift in zip((height, width), shifts.T, strict=True))
    y, x = (last - (last - i.abs()).abs() for i, last in ((y, height - 1), (x, width - 1)))
    x = torch.where(mirrored[:, None], x.flip(1), x)
    index = (y[:, :, None] * width + x[:, None, :]).flatten(1).to(images.device, non_blocking=True)
    return images.flatten(2).gather(2, index[:, None].expand(-1, 3, -1)).view(images.shape)


def add_noise(
    images: Tensor, generator: torch.Generator, recipe: Recipe, resolution: int, small_images: bool | None, hflip: bool
) -> Tensor:
    """What the input of a training step gets after cropping: uint8 (N, 3, H, W) on any device -> the same."""
    if recipe.num_ops:
        images = rand_augment(images, recipe.num_ops, recipe.magnitude, generator, resolution=resolution)
    return small_image_noise(images, hflip, generator) if small_images else images


# ----------------------------------------------------------------------------------------------------------------------
# views: decoding an image file, the clean (evaluation) view, the random training crop, normalizing
# ----------------------------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # the other decoders are where most CVEs are
FORMATS += ("AVIF",) if features.check("avif") else ()


def load_image(file: str | Path | BinaryIO, enough: int = 0) -> Image.Image:
    """Read an image as RGB, as a person would see it: EXIF rotation applied, 16-bit grey scaled, alpha over grey 128.

    `enough`: an upright JPEG may be decoded at 1/2, 1/4 or 1/8, which is faster, while its short side keeps that many
    pixels; `full_size` then says what it was. Raises whatever the decoder raises, and above 89 million pixels.
    """
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:  # EXIF data is often bad
        full_size = image.size
        if full_size[0] * full_size[1] > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{full_size[0]} x {full_size[1]} pixels")
        if enough and image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            image.draft(None, (enough, enough))
        drafted = image.size != full_size
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range")
    if image.mode.startswith("I"):  # Pillow's own convert() clips 16 bits at 255: a white image
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
    image = image.convert("RGB")
    if drafted:
        image.full_size = full_size
    return image


def default_crop_fraction(image_size: int) -> float:
    """The share of the short side that the clean view shows: the official code's, all of it for small images."""
    return image_size / (image_size + 32) if image_size > 64 else 1.0


CROP_MODES = ("center", "squash", "border")


def crop_mode_of(source: Mapping) -> str:
    """The crop mode of a checkpoint or of the attributes of a logits file; where none is said it is the papers'."""
    mode = source.get("crop_mode", "center")
    return mode if mode in CROP_MODES else fail(f"crop_mode is {mode!r}, expected one of {', '.join(CROP_MODES)}")


class View(NamedTuple):
    """How a model sees an image when it labels or is tested. It travels in every checkpoint under these names."""

    image_size: int  # pixels
    crop_fraction: float  # side of the centre square / short side of the image
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of values in 0..1
    std: tuple[float, float, float] = IMAGENET_STD
    # center: the centre square. squash: the whole image, whatever its shape. border: the whole image in a grey square.
    crop_mode: str = "center"

    @classmethod
    def of(cls, checkpoint: dict) -> "View":
        known = {name: checkpoint[name] for name in cls._fields if name in checkpoint}
        return cls(**known | {"crop_mode": crop_mode_of(checkpoint)})

    @classmethod
    def default(cls, image_size: int, crop_mode: str = "center") -> "View":
        return cls(image_size, default_crop_fraction(image_size), crop_mode=crop_mode)

    @property
    def header(self) -> dict:
        """The view as a checkpoint has it: the papers' crop mode is not written."""
        return {name: value for name, value in self._asdict().items() if (name, value) != ("crop_mode", "center")}

    @property
    def of_stored(self) -> "View":
        """The view of an image that was cropped before it was stored: all of it, resized if it has another size."""
        return self._replace(crop_mode="squash", interpolation="bicubic")

    @property
    def enough(self) -> int:
        """Pixels of the short side of an image that leave the resize enough to average: twice what it needs."""
        return math.ceil(2 * self.image_size / (self.crop_fraction if self.crop_mode == "center" else 1))

    def at(self, image_size: int) -> "View":
        """The same view at another size. The crop belongs to the size: at its own size a view keeps the one it has."""
        if image_size == self.image_size:
            return self
        return self._replace(image_size=image_size, crop_fraction=default_crop_fraction(image_size))


def view_of(arch: str) -> View:
    """The clean view of a model that starts from scratch. timm's models have a record of their own."""
    if not arch.startswith("timm/"):
        return View.default(resolution_of(arch))
    config = timm_config(arch)
    return timm_view(config) if config else View.default(224)


class Crop(NamedTuple):
    """How a model sees an image in training: a random part of it, perhaps mirrored."""

    image_size: int  # pixels
    min_area: float | None  # smallest share of the area; None: the clean view, which `small_image_noise` shifts
    hflip: bool
    crop_mode: str = "center"  # border: a part of the padded image; otherwise of the image as it is


def square_around(image: Image.Image) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """(image, the box of the smallest square around it, in pixels of the image: it begins left of it or above it).

    A square of more pixels than an image may have, around a long strip, would fill the memory: that image is shrunk.
    """
    if (side := max(image.size)) ** 2 > Image.MAX_IMAGE_PIXELS:
        scale = math.isqrt(Image.MAX_IMAGE_PIXELS) / side
        image = image.resize([max(1, int(scale * length)) for length in image.size])
        side = max(image.size)
    left, top = -((side - image.width) // 2), -((side - image.height) // 2)
    return image, (left, top, left + side, top + side)


def cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The part of an RGB image in a box, in whole pixels: grey 128 where the box is outside (Pillow's crop: black)."""
    left, top, right, bottom = box
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop(box)
    part = Image.new("RGB", (right - left, bottom - top), (128, 128, 128))
    part.paste(image, (-left, -top))
    return part


def eval_view(image: Image.Image, view: View) -> np.ndarray:
    """The clean view, what a teacher labels: see `View.crop_mode`. Antialiased, uint8 (size, size, 3)."""
    if view.crop_mode == "border":
        image = cut(*square_around(image))
    width, height = getattr(image, "full_size", image.size)
    box = (0, 0, width, height)
    if view.crop_mode == "center":
        side = max(1, int(view.crop_fraction * min(width, height)))
        left, top = (width - side + 1) // 2, (height - side + 1) // 2  # official preprocessing.py:104-134
        box = (left, top, left + side, top + side)
    if (scale := round(width / image.width)) > 1:
        box = tuple(edge / scale for edge in box)
    else:  # resize(box=...) alone would look at pixels around the box
        image, box = image.crop(box), None
    return np.asarray(image.resize((view.image_size,) * 2, Image.Resampling[view.interpolation.upper()], box))


def random_view(image: Image.Image, crop: Crop, rng: np.random.Generator) -> np.ndarray:
    """Inception crop: `min_area` to all of the area, aspect 3/4 to 4/3, bicubic, half of them mirrored.

    Official preprocessing.py:81-102 tries 10 times and then takes the clean view. Areas and log-aspects are uniform, as
    in torchvision; TensorFlow's sampler draws heights uniformly (deviation).
    """
    size, clean = crop.image_size, View.default(crop.image_size, crop.crop_mode)
    if crop.min_area is None:
        return eval_view(image, clean)
    image, (x, y, right, bottom) = square_around(image) if crop.crop_mode == "border" else (image, (0, 0, *image.size))
    width, height = right - x, bottom - y
    for _ in range(10):
        area = width * height * rng.uniform(crop.min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
            box = (x + left, y + top, x + left + crop_width, y + top + crop_height)
            view = np.asarray(cut(image, box).resize((size, size), Image.Resampling.BICUBIC))
            break
    else:
        view = eval_view(image, clean)
    return view[:, ::-1] if crop.hflip and rng.random() < 0.5 else view


def normalize(images: Tensor, view: View) -> Tensor:
    """uint8 (N, 3, H, W) -> float32, standardized, channels_last (2 to 5 times as fast on CPU, and for free)."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) * 255 for values in (view.mean, view.std))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------------
# filters: what the generators of ImageNet-C take from scikit-image, SciPy, OpenCV and ImageMagick, equal to them
# (docs/robustness.md), on images (H, W, channels). Borders: "edge" repeats the last pixel, "reflect" mirrors at it
# ----------------------------------------------------------------------------------------------------------------------


def gaussian_taps(sigma: float, radius: int) -> np.ndarray:
    """Weights of a normalized Gaussian at -radius .. radius."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def weighted_shifts(x: np.ndarray, taps: list[tuple[int, int, float]], border: str) -> np.ndarray:
    """Sum over taps (dy, dx, weight) of weight * x[y + dy, x + dx], x (H, W, channels); border: a mode of numpy.pad."""
    height, width = x.shape[:2]
    reach = max(max(abs(dy), abs(dx)) for dy, dx, _ in taps)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode=border)
    out = np.zeros_like(x)
    for top in range(0, height, 32):  # a strip that stays in the cache
        strip = out[top : top + 32]
        for dy, dx, weight in taps:
            strip += weight * padded[reach + dy + top :, reach + dx :][: len(strip), :width]
    return out


def defocus_taps(radius: float, alias_sigma: float) -> list[tuple[int, int, float]]:
    """A disk whose edge is smoothed by a 3x3 (radius <= 8) or 5x5 Gaussian."""
    side = max(8, int(radius))
    y, x = np.mgrid[-side : side + 1, -side : side + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    edge = gaussian_taps(alias_sigma, 1 if radius <= 8 else 2)
    reach = len(edge) // 2
    offsets = range(-reach, reach + 1)
    smooth = [(dy, dx, edge[dy + reach] * edge[dx + reach]) for dy in offsets for dx in offsets]
    kernel = weighted_shifts((disk / disk.sum())[..., None], smooth, "reflect")[..., 0]
    return [(int(dy) - side, int(dx) - side, kernel[dy, dx]) for dy, dx in np.argwhere(kernel > 0)]


def motion_taps(radius: float, sigma: float, angle: float) -> list[tuple[int, int, float]]:
    """One-sided Gaussian of 2 * radius + 1 pixels along a line at `angle` degrees (down from the right)."""
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    dx = np.ceil(steps * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    dy = np.ceil(steps * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    return list(zip(dy.tolist(), dx.tolist(), (weights / weights.sum()).tolist(), strict=True))


def filtered(x: np.ndarray, kernel, border: str) -> np.ndarray:
    """x (H, W) under a 3x3 kernel."""
    taps = [(dy - 1, dx - 1, weight) for (dy, dx), weight in np.ndenumerate(kernel) if weight]
    return weighted_shifts(x[..., None], taps, border)[..., 0]


@lru_cache(64)
def smoothing(size: int, sigma: float, border: str, truncate: int) -> np.ndarray:
    """(size, size): times a column of `size` pixels it is scikit-image's gaussian; for wide ones faster than shifts."""
    radius = int(truncate * sigma + 0.5)
    taps = enumerate(gaussian_taps(sigma, radius).tolist(), -radius)
    return weighted_shifts(np.eye(size)[..., None], [(dy, 0, weight) for dy, weight in taps], border)[..., 0]


def smoothed(planes: np.ndarray, sigma: float, border: str = "edge", truncate: int = 4) -> np.ndarray:
    """Each of the planes (..., H, W) under a Gaussian."""
    down, across = (smoothing(size, sigma, border, truncate) for size in planes.shape[-2:])
    return down @ planes @ across.T


def zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of x (H, W, channels) at its size: scipy's zoom of order 1, in which the corners stay corners."""
    for axis, side in enumerate(x.shape[:2]):  # by numpy: torch's rounding depends on the number of threads
        cut = int(np.ceil(side / factor))
        larger = round(cut * factor)
        places = (np.arange(side) + (larger - side) // 2) * (cut - 1) / max(larger - 1, 1) + (side - cut) // 2
        low = places.astype(int)
        share = (places - low).astype(x.dtype).reshape(np.roll([-1, 1, 1], axis))
        x = x.take(low, axis) * (1 - share) + x.take(np.minimum(low + 1, side - 1), axis) * share
    return x


def read_at(image: np.ndarray, x_y: np.ndarray, corners: bool) -> np.ndarray:
    """float32 (H, W, 3) at the places (H, W, 2), interpolated. The border mirrors: at its pixels' centres if `corners`
    (OpenCV's REFLECT_101), else at their outer edges (scipy's "reflect")."""
    sides = np.array(image.shape[1::-1])
    grid = 2 * x_y / np.maximum(sides - 1, 1) - 1 if corners else (2 * x_y + 1) / sides - 1  # torch's: -1 to 1
    planes, grid = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(np.float32(grid))[None]
    out = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=corners)
    return out[0].permute(1, 2, 0).numpy()


def canny(layer: np.ndarray) -> np.ndarray:
    """OpenCV's Canny of uint8 (H, W) with the thresholds 50 and 150 -> bool."""
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    x, y = (filtered(layer.astype(int), kernel, "edge") for kernel in (sobel, sobel.T))
    strength = abs(x) + abs(y)
    padded = np.pad(strength, 1)

    def is_peak(dy, dx):  # in this direction; OpenCV's rule for ties
        after, before = (padded[1 + s * dy :, 1 + s * dx :][: len(x), : x.shape[1]] for s in (1, -1))
        return (strength > before) & (strength >= after + abs(dy * dx))

    flat = abs(y) << 15 < 13573 * abs(x)  # to 22.5 degrees
    steep = abs(y) << 15 > (13573 + (2 << 15)) * abs(x)  # from 67.5 degrees
    peak = np.select([flat, steep, x ^ y >= 0], [is_peak(0, 1), is_peak(1, 0), is_peak(1, 1)], is_peak(1, -1))
    weak, edges, num = peak & (strength > 50), peak & (strength > 150), -1
    while num != (num := edges.sum()):  # weak edges count where they touch others
        edges = weak & filtered(edges, np.ones((3, 3), bool), "constant")
    return edges


def distances(edges: np.ndarray) -> np.ndarray:
    """To the nearest edge pixel of bool (H, W), at most 20, in the steps of OpenCV's 5x5 mask: 1, 1.4 and 2.1969."""
    rows, width = np.arange(len(edges))[:, None], edges.shape[1]
    above = rows - np.maximum.accumulate(np.where(edges, rows, -20))
    below = np.minimum.accumulate(np.where(edges, rows, len(edges) + 20)[::-1])[::-1] - rows
    in_column = np.pad(np.minimum(above, below).clip(max=20), ((0, 0), (20, 20)), constant_values=20)
    far, near = (op(np.arange(21)[:, None], np.arange(21)) for op in (np.maximum, np.minimum))
    steps = np.maximum(65536 * far + 12904 * near, 52226 * far + 39524 * near).clip(max=20 << 16) / 65536
    return np.min([steps[abs(dx)][in_column[:, 20 + dx :][:, :width]] for dx in range(-20, 21)], axis=0)


# ----------------------------------------------------------------------------------------------------------------------
# shards: the members of .tar files, found from their headers and read in place
# ----------------------------------------------------------------------------------------------------------------------

EXTENSIONS = (b".jpg", b".jpeg", b".jfif", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff", b".ppm")
EXTENSIONS += (b".avif",) if "AVIF" in FORMATS else ()


@lru_cache(maxsize=16)
def open_shard(path: bytes) -> BinaryIO:
    return open(path, "rb", buffering=0)


def read_member(path: bytes, offset: int, size: int) -> io.BytesIO:
    """A member of a .tar shard; an error if no member of this size begins there any more."""
    shard, name = open_shard(path), os.fsdecode(path)
    if offset < 512 or offset + size > os.fstat(shard.fileno()).st_size:
        raise OSError(f"{name} ends before the image: it has changed or was cut off")
    data = os.pread(shard.fileno(), 512 + size, offset - 512)  # with the header, and without a shared position
    if tarfile.TarInfo.frombuf(data[:512], "utf-8", "surrogateescape").size != size:
        raise OSError(f"{name} has changed since it was indexed")
    return io.BytesIO(data[512:])


# The header, from byte 100 on, of a regular file ("0") without prefix and link, or of the records before one ("x"), as
# GNU tar, Python and WebDataset write it. Its sum is below 65521. WebDataset's records are a time with a fraction.
PLAIN_HEADER = rb"(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 ([0x])\0{100}ustar(?:\x0000|  \0)"
PLAIN_HEADER = re.compile(PLAIN_HEADER + rb".{64}(?:\0{16}|0000000\x000000000\0)\0{167}", re.DOTALL)
TIME_RECORD = re.compile(rb"(\d\d [acm]time=\d{1,12}(?:\.\d{1,20})?\n)\0*")


def plain_header(file: int, at: int) -> tuple[bytes, int, bytes] | None:
    """(name, size, kind) of the plain header at `at`, else None. The kind is "0" or "x"."""
    header = os.pread(file, 512, at)
    plain = PLAIN_HEADER.fullmatch(header, 100)
    # The low half of Adler-32 is 1 + the sum of the bytes. For the sum that is stored, its own bytes count as spaces.
    if not plain or (zlib.adler32(header) & 0xFFFF) - 1 != int(plain[2], 8) - 256 + sum(header[148:156]):
        return None
    return header[:100].partition(b"\0")[0], int(plain[1], 8), plain[3]


def plain_members(file: int, at: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of the files in an open .tar, from the header at `at` up to one that is not plain.

    Several times as fast as tarfile, to which the caller leaves that one: an extension, damage or the end.
    """
    while member := plain_header(file, at):
        name, size, kind = member
        if kind == b"x":
            record = TIME_RECORD.fullmatch(os.pread(file, 512, at + 512))
            member = plain_header(file, at + 1024)
            if not record or not size == len(record[1]) == int(record[1][:2]) or not member or member[2] != b"0":
                return
            at, (name, size, _) = at + 1024, member
        yield name, at + 512, size
        at += 512 + -(-size // 512) * 512


def tar_members(path: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of the files in a plain .tar. Of one that is cut off, those before the end, with a line."""
    last = None
    try:
        with tarfile.open(path, "r:") as shard:
            while (member := shard.next()) is not None:
                last = member.name
                shard.members.clear()  # a shard may have millions
                if member.isfile() and not member.issparse():
                    yield os.fsencode(last), member.offset_data, member.size
                if not shard.pax_headers:  # which hold for all members that follow
                    for plain in plain_members(shard.fileobj.fileno(), shard.offset):
                        last, shard.offset = os.fsdecode(plain[0]), plain[1] + -(-plain[2] // 512) * 512
                        yield plain
            shard.fileobj.seek(shard.offset)  # tarfile takes what is no header for the end
            if shard.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError("no header of a member, and not the end")
    except tarfile.TarError as error:
        if last is None:
            raise tarfile.ReadError(f"{path} is not a plain .tar file ({error})") from None
        print0(f"{path} is damaged after {last} ({error}): what follows is not seen")


def image_columns(found: list[tuple[bytes, int, int]]) -> tuple[np.ndarray, ...]:
    paths, offsets, sizes = zip(*found, strict=True) if found else ((), (), ())
    return np.array(paths, "S"), np.array(offsets, np.int64), np.array(sizes, np.int64)


def index_shard(root: bytes, path: bytes) -> tuple[np.ndarray, ...]:
    """The columns of ImageList for the images in one shard, sorted by path."""
    found, shard = [], os.fsdecode(os.path.join(root, path))
    try:
        if not stat.S_ISREG(os.stat(shard).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        for name, offset, size in tar_members(shard):
            base = name.rpartition(b"/")[2].lower()
            if base.endswith(EXTENSIONS) and not base.startswith(b"."):
                found.append((path + b"/" + name, offset, size))
    except OSError as error:
        print0(f"{shard} cannot be read ({error.strerror}): its images are not seen")
    columns = image_columns(found)
    order = np.argsort(columns[0], kind="stable")
    return tuple(column[order] for column in columns)


# ----------------------------------------------------------------------------------------------------------------------
# listing: finding images in folders and .tar shards, labels from folder names, the held-out tenth of train/
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageList:
    """Where images are: in the file `path` below `root`, or in a shard, `size` > 0 bytes at `offset`."""

    root: str
    path: np.ndarray  # fixed-length bytes (N,), sorted; in a shard `name.tar/member`
    offset: np.ndarray  # int64 (N,)
    size: np.ndarray  # int64 (N,)

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows) -> "ImageList":
        return ImageList(self.root, self.path[rows], self.offset[rows], self.size[rows])

    def without(self, rows: list[int]) -> "ImageList":
        return self[np.setdiff1d(np.arange(len(self)), rows)]

    @property
    def is_lost(self) -> bool:
        return is_lost(self.root)

    def name(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.path[row]))

    def open(self, row: int) -> BinaryIO:
        name = os.fsencode(self.name(row))
        if self.size[row]:
            end = name.lower().index(b".tar/", len(os.fsencode(self.root))) + 4
            while os.path.isdir(name[:end]):  # a folder may have the name of a shard
                end = name.lower().index(b".tar/", end) + 4
            return read_member(name[:end], int(self.offset[row]), int(self.size[row]))
        # A pipe with the name of an image gives nothing, where a plain open() would wait for ever.
        return open(name, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))

    def load(self, row: int, enough: int = 0) -> Image.Image:
        with self.open(row) as file:
            return load_image(file, enough)


def find_files(root: bytes) -> Iterator[bytes]:
    """The paths below `root` of the images and .tar shards, in no order. Other names are counted by their endings."""
    others = Counter()

    def not_listed(error: OSError) -> None:
        print0(f"{os.fsdecode(error.filename)} cannot be listed ({error.strerror}): its images are not seen")

    seen = set()
    for folder, folders, names in os.walk(root, onerror=not_listed, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(b"."))
        below = os.path.relpath(folder, root)
        prefix = b"" if below == b"." else below + b"/"
        for name in names:
            lower = name.lower()
            if lower.endswith((*EXTENSIONS, b".tar")) and not lower.startswith(b"."):
                yield prefix + name
            elif lower.endswith((b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz", b".tar.zst")):
                name = os.fsdecode(prefix + name)
                fail(
                    f"{name} in {os.fsdecode(root)} is compressed: images are read in place from plain .tar files only"
                )
            elif not name.startswith(b"."):
                others[os.fsdecode(os.path.splitext(lower)[1]) or "no ending"] += 1
    if others:
        counts = ", ".join(f"{num} of {ending}" for ending, num in others.most_common(5))
        print0(f"{os.fsdecode(root)}: {others.total()} files are left out for their names: {counts}")


def is_lost(folder: str) -> bool:
    """Whether there is no such folder or nothing in it, as where a disk was mounted that is no longer there."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def joined(blocks: Iterable, scratch: Path | None) -> tuple[np.ndarray, ...]:
    """The columns (path, offset, size) of all blocks, one after the other: in memory, or mapped from `scratch`."""
    if not scratch:
        return tuple(np.concatenate(parts) for parts in zip(*blocks, strict=True))
    shapes = []
    with contextlib.ExitStack() as stack:  # a file that is mapped stays until it is mapped no more
        try:
            *files, paths = (stack.enter_context(tempfile.TemporaryFile(dir=scratch)) for _ in range(4))
            for block in blocks:
                shapes.append((block[0].dtype, len(block[0])))
                for column, file in zip(block, files, strict=True):
                    column.tofile(file)
            width, num = np.dtype(f"S{max(kind.itemsize for kind, _ in shapes)}"), sum(num for _, num in shapes)
            files[0].seek(0)
            for kind, num_paths in shapes:  # the paths again, now that the longest is known
                np.fromfile(files[0], kind, num_paths).astype(width).tofile(paths)
        except OSError as error:
            fail(f"{scratch}: the list of the images cannot be kept there ({error.strerror})")
        columns = zip((paths, *files[1:]), (width, np.int64, np.int64), strict=True)
        return tuple(np.memmap(file, kind, "r", shape=num) if num else np.zeros(0, kind) for file, kind in columns)


def list_images(root: str | Path, scratch: Path | None = None) -> ImageList:
    """All images below `root`, in the sorted order of their paths; .tar shards are indexed and read in place.

    Symbolic links are followed. A folder that is reached twice, for example by a loop of links, counts once.
    `scratch`: a folder in which the columns lie, in files without a name, so that they take no memory.
    """
    root = os.path.abspath(root)
    found, shards, plain = find_files(os.fsencode(root)), [], [np.zeros(0, "S")]
    while part := list(islice(found, 1 << 16)):  # never a Python list of all names: they may be hundreds of millions
        shards += [path for path in part if path.lower().endswith(b".tar")]
        plain.append(np.array([path for path in part if not path.lower().endswith(b".tar")], "S"))
    plain = np.sort(np.concatenate(plain))
    # No other path begins with a shard's and a slash. So the members of a shard follow each other in the sorted list.
    shards.sort(key=lambda path: path + b"/")
    places = np.searchsorted(plain, np.array([path + b"/" for path in shards], "S")).tolist()
    index = partial(index_shard, os.fsencode(root))
    processes = min(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(shards) // 8)

    def blocks(members: Iterable) -> Iterator[tuple[np.ndarray, ...]]:
        for begin, end, of_shard in zip([0, *places], [*places, len(plain)], chain(members, [()]), strict=True):
            yield plain[begin:end], *np.zeros((2, end - begin), np.int64)
            if of_shard:
                yield of_shard

    try:
        if processes > 1:
            with ProcessPoolExecutor(processes, multiprocessing.get_context(START_METHOD)) as pool:
                return ImageList(root, *joined(blocks(pool.map(index, shards)), scratch))
        return ImageList(root, *joined(blocks(map(index, shards)), scratch))
    except tarfile.TarError as error:
        fail(str(error))


def is_held_out(paths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A tenth, by the hash of the path below train/: the val set of data that has none. Never a class's last image."""
    hashes = np.array([zlib.crc32(path) for path in paths.tolist()], dtype=np.int64)
    held = hashes < 2**32 // 10
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if held[of_class].all():
            held[of_class[hashes[of_class].argmax()]] = False
    return held


def judged_half(images: ImageList) -> np.ndarray:
    """Which images of val are kept for judging, bool (N,), by the hash of the path below it. One chooses on the others.

    Another hash than that of `is_held_out`: the held-out tenth is halved too. What a run chooses on an image (a
    threshold, the next teacher) is no measurement of it any more.
    """
    return np.array([digest_of_bytes(path)[0] % 2 == 1 for path in images.path.tolist()], dtype=bool)


def images_by_class(folder: str | Path, classes: list[str] | None = None) -> tuple[ImageList, np.ndarray, list[str]]:
    """(ImageList, labels int64 (N,), classes) of the images below `folder`/<class>/. A class is matched by its name.

    `classes`: the known names in the order of their labels; None: the sorted names of the folders. ValueError where
    there are no class folders, LookupError where one has an unknown name. Images beside the folders are left out.
    """
    entries = list(os.scandir(folder)) if os.path.isdir(folder) else []
    found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if broken := [name for name in found if name != name.encode(errors="replace").decode()]:
        raise ValueError(f"{folder}: {broken[0]!r}, the name of a class, is not UTF-8")
    classes = classes or found
    if not found:
        words = f"{folder}: no class folders in it; expected {folder}/<class>/<image>"
        flat = next((entry.name for entry in entries if entry.name.lower().endswith((".jpg", ".jpeg"))), None)
        if flat:  # as ImageNet's archive of val: its labels come in a file of their own
            sort = (
                f"while read name class; do mkdir -p {folder}/$class; mv {folder}/$name {folder}/$class/; done < LABELS"
            )
            words += f". Its images, such as {flat}, lie side by side: with a file LABELS of lines `name class`, {sort}"
        raise ValueError(words)
    if unknown := sorted(set(found) - set(classes)):
        known = ", ".join(classes[:5])
        raise LookupError(f"{folder} has classes that are unknown: {', '.join(unknown[:5])}; known are {known} ...")
    images = list_images(folder)
    names = np.array([path.split(b"/")[0] for path in images.path.tolist()])
    in_class = np.isin(names, [os.fsencode(name) for name in found])
    number = {os.fsencode(name): label for label, name in enumerate(classes)}
    labels = np.array([number[name] for name in names[in_class].tolist()], dtype=np.int64)
    return images[in_class], labels, classes


def labeled_images(data: str | Path, split: str, classes: list[str] | None = None):
    """`images_by_class` of DATA/train or DATA/val; without val/ a tenth of train/ is held out.

    `classes` (for val, or for a checkpoint's order): the known names. Mistakes end the program.
    """
    train, folder = Path(data) / "train", Path(data) / split
    held_out = not (Path(data) / "val").is_dir()
    if not train.is_dir() and (held_out or split == "train"):
        fail(f"{data}: no folder train/ with one folder of images a class in it")
    folder = train if held_out else folder
    try:
        images, labels, classes = images_by_class(folder, classes)
    except (LookupError, ValueError) as error:
        fail(str(error))
    if split == "train":
        if lacking := sorted(name for name in classes if not (folder / name).is_dir()):
            fail(f"{folder} lacks the classes {', '.join(lacking[:5])}")
        if len(empty := np.setdiff1d(np.arange(len(classes)), labels)):
            fail(f"{folder}: class {classes[empty[0]]!r} has no images (looked for {b' '.join(EXTENSIONS).decode()})")
    if held_out:
        wanted = is_held_out(images.path, labels) == (split == "val")
        images, labels = images[wanted], labels[wanted]
        if split == "val":
            print0(f"{data} has no val/: a tenth of train/, {len(images)} images, is held out and not trained on")
    if not len(images):
        fail(f"{folder}: no images for {split}")
    return images, labels, classes


def unlabeled_images(folder: str | Path, data: str | Path | None = None, scratch: Path | None = None) -> ImageList:
    """All images below a folder, its labels ignored; of a train/ whose val set is held out, only those that train.

    DATA/val where there is none: the held-out tenth of train/. `data`: the data directory, whose train/ and val/ must
    not lie among the unlabelled images. `scratch`: see `list_images`.
    """
    folder = Path(os.path.abspath(folder))
    if folder.name in ("train", "val") and not (folder.parent / "val").is_dir() and (folder.parent / "train").is_dir():
        return labeled_images(folder.parent, folder.name)[0]
    if not folder.is_dir():
        fail(f"{folder}: no such folder of unlabelled images")
    for split in ("train", "val"):
        inside = Path(os.path.realpath(data or "", strict=False), split)
        if data and inside.is_dir() and Path(os.path.realpath(folder)) in Path(os.path.realpath(inside)).parents:
            fail(f"--unlabeled {folder} holds the labelled images of {inside}: name a folder of unlabelled ones alone")
    images = list_images(folder, scratch)
    if not len(images):
        fail(f"{folder}: no images in it (looked for {b' '.join(EXTENSIONS).decode()} and .tar)")
    return images


def images_at(path: str, data: str | Path | None = None, scratch: Path | None = None) -> ImageList:
    """What stage 02 labels: a single image file, whatever its name, or `unlabeled_images` of a folder."""
    if not os.path.isfile(path):
        return unlabeled_images(path, data, scratch)
    return ImageList(os.path.dirname(path), *image_columns([(os.fsencode(os.path.basename(path)), 0, 0)]))


def root_of(path: str) -> str:
    """Where the images of `images_at(path)` lie: a held-out tenth is in train/, a file in its folder."""
    parent, name = os.path.split(path)
    if os.path.isfile(path):
        return parent
    train = os.path.join(parent, "train")
    return train if name == "val" and not os.path.isdir(path) and os.path.isdir(train) else path


# ----------------------------------------------------------------------------------------------------------------------
# batches: views as a dataset, the order of the images, loaders, counting the unreadable images
# ----------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    rows: Tensor  # int64 (n,): which of the images could be read
    views: list[Tensor]  # uint8 (n, 3, H, W) each, channels_last in memory; n may be 0
    errors: list[tuple[int, str]]  # (row, reason) of those that could not
    held_out: list[int]  # rows of images of val, which no stage trains on


class DecodedImages:
    """Image files that stay decoded while there is room, half a gigabyte a machine and stream of images: to open and to
    decode a small one takes longer than to crop it. One that has changed is decoded again; one that is gone is gone."""

    def __init__(self):
        self.room, self.known = None, {}  # bytes; {file: (its time and size, pixels)}

    def load(self, images: ImageList, row: int) -> Image.Image:
        name = images.name(row)
        try:
            status = os.stat(name)
        except OSError:  # a member of a shard, or it is gone and `load` says so
            return images.load(row)
        stamp = status.st_mtime_ns, status.st_size
        if self.known.get(name, (None,))[0] == stamp:
            return Image.fromarray(self.known[name][1])
        image = images.load(row)
        if self.room is None:
            worker = torch.utils.data.get_worker_info()
            num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (worker.num_workers if worker else 1)
            self.room = 5e8 / num_sharing
        pixels = np.asarray(image)
        if pixels.nbytes <= self.room:
            self.room -= pixels.nbytes
            self.known[name] = stamp, pixels
        return image


def digest_of_bytes(data: bytes) -> bytes:
    """What tells the bytes of an image file from those of another: blake2b, 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def digests_of(images: ImageList) -> frozenset[bytes]:
    """What tells these images from others, wherever they are found again."""
    digests = set()
    for row in range(len(images)):
        with contextlib.suppress(OSError), images.open(row) as file:  # unreadable: the evaluation counts it
            digests.add(digest_of_bytes(file.read()))
    return frozenset(digests)


def digests_of_val(data: str | None, path: str) -> frozenset[bytes]:
    """The digests of DATA/val, whose images must not become training images; none where `path` is val/, in it, or one
    image: nobody trains on that."""
    if os.path.isfile(path):
        return frozenset()
    if not data or not any(os.path.isdir(os.path.join(data, split)) for split in ("train", "val")):
        print0(f"the teacher's data directory is not there ({data}): images of its val/ cannot be told from others")
        return frozenset()
    val, folder = Path(os.path.realpath(data), "val"), Path(os.path.realpath(path))
    return frozenset() if val in (folder, *folder.parents) else digests_of(labeled_images(data, "val")[0])


class ImageDataset(torch.utils.data.Dataset):
    """Views of images as uint8. An item is (row, views, error): a list of (H, W, 3) arrays, or why there are none.

    `clean` and `noised`: each that is given makes one view, in this order; `noised` may be a View, without noise. The
    key of an item is `row`, or `(epoch, row)`: the random view is a function of (seed, stream, epoch, row) alone, so
    workers, processes and interruptions do not change it. A bad image is an error of its own row: it never stops a run,
    and no other takes its place. `held_out`: the digests of val, whose images are left out.
    """

    def __init__(
        self,
        images: ImageList,
        clean: View | None = None,
        noised: Crop | View | None = None,
        seed: int = 0,
        stream: str = "",
        held_out: frozenset[bytes] = frozenset(),
    ):
        self.images, self.clean, self.noised = images, clean, noised
        self.seed, self.stream, self.held_out, self.decoded = seed, stream, held_out, DecodedImages()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key):
        epoch, row = key if isinstance(key, tuple) else (0, key)
        try:
            enough = 0 if self.noised else self.clean.enough  # a random crop may need every pixel
            if self.held_out:
                with self.images.open(row) as file:
                    data = file.read()  # once, for the comparison and for the decoder
                if digest_of_bytes(data) in self.held_out:
                    return row, None, None
                image = load_image(io.BytesIO(data), enough)
            elif self.noised:
                image = self.decoded.load(self.images, row)
            else:
                image = self.images.load(row, enough)
            views = [eval_view(image, self.clean)] if self.clean else []
            if self.noised:
                rng = np.random.default_rng(seed_words(self.seed, f"{self.stream} crop", epoch, row))
                is_crop = isinstance(self.noised, Crop)
                views.append(random_view(image, self.noised, rng) if is_crop else eval_view(image, self.noised))
        except Exception as error:  # decoders raise anything
            return row, None, f"{self.images.name(row)}: {type(error).__name__}: {error}"
        return row, views, None

    def collate(self, items: list) -> Batch:
        good = [(row, views) for row, views, _ in items if views is not None]
        if good:
            stacks = [np.stack(stack) for stack in zip(*(views for _, views in good), strict=True)]
        else:
            sizes = [view.image_size for view in (self.clean, self.noised) if view]
            stacks = [np.zeros((0, size, size, 3), np.uint8) for size in sizes]
        rows = torch.tensor([row for row, _ in good], dtype=torch.int64)
        errors = [(row, error) for row, _, error in items if error is not None]
        held_out = [row for row, views, error in items if views is None and error is None]
        return Batch(rows, [torch.from_numpy(stack).permute(0, 3, 1, 2) for stack in stacks], errors, held_out)


class Videos(ImageDataset):
    """Videos, such as those of ImageNet-P: a key is a video, its views are its frames. Needs PyAV."""

    def __getitem__(self, row: int):
        try:
            with import_av().open(self.images.name(row)) as file:
                frames = [frame.to_image() for frame in file.decode(video=0)]
            if len(frames) < 2:
                raise ValueError(f"{len(frames)} frames")
            return row, [eval_view(frame, self.clean) for frame in frames], None
        except Exception as error:  # decoders raise anything
            return row, None, f"{self.images.name(row)}: {type(error).__name__}: {error}"


def import_av():
    try:
        import av
    except ImportError:
        fail("--imagenet-p: its videos need a package: pip install av")
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a broken video is said once, by us
    return av


class StoredViews(ImageDataset):
    """The images of a .npy file of CIFAR-10-C, uint8 (5 N, H, W, 3): the five severities of an image are its views."""

    def __init__(self, array: np.ndarray, view: View):
        super().__init__(range(len(array) // 5), clean=view)
        self.array = array

    def __getitem__(self, row: int):
        rows = range(row, len(self.array), len(self))
        return row, [eval_view(Image.fromarray(self.array[r]), self.clean) for r in rows], None


def permutation(num: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    """The order of `num` rows in an epoch: that of numpy's `permutation`, in half of its memory."""
    order = np.arange(num, dtype=np.int32 if num < 2**31 else np.int64)
    np.random.default_rng(seed_words(seed, f"{stream} order", epoch)).shuffle(order)
    return order


def train_keys(num: int, batch_size: int, seed: int, stream: str, steps: range, processes: Processes) -> Iterator[list]:
    """This process's keys (epoch, row) of each step: an endless stream of permutations, cut into constant batches."""
    epoch, order = -1, None
    for step in steps:
        keys = []
        for p in range(step * batch_size + processes.rank, (step + 1) * batch_size, processes.world_size):
            if p // num != epoch:  # the positions ascend: one order at a time, for it may be half a gigabyte
                epoch, order = p // num, None
                order = permutation(num, seed, stream, epoch)
            keys.append((epoch, int(order[p % num])))
        yield keys


def grid_keys(num: int, batch_size: int, processes: Processes) -> Iterator[list]:
    """This process's rows of each batch of a fixed grid: the batches, and so the numbers, are those of one process."""
    for first in range(processes.rank * batch_size, num, processes.world_size * batch_size):
        yield list(range(first, min(first + batch_size, num)))


def rows_per_batch(image_size: int, device: torch.device) -> int:
    """How many images of a size a model takes at a time without gradients: a function of size and device alone.

    CPUs are fastest while a batch's activations fit the cache (512 images of 32 px, 8 of 224). GPUs take 64 times that.
    """
    fits = 512 * 32**2 / image_size**2 * (64 if device.type == "cuda" else 1)
    return int(min(max(2 ** int(np.log2(max(fits, 1))), 1), 1024))


def ignore_signals(worker: int) -> None:
    """A worker outlives the signal: its process decides when to stop, after saving."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_batches(dataset: ImageDataset, keys: Iterable[list], processes: Processes) -> torch.utils.data.DataLoader:
    """Iterate over a Batch for each list of keys."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=processes.workers,
        collate_fn=dataset.collate,
        pin_memory=processes.device.type == "cuda",
        multiprocessing_context=START_METHOD if processes.workers else None,
        worker_init_fn=ignore_signals,
    )


def unreadable_images(
    images: ImageList, view: View, args: argparse.Namespace, processes: Processes, begun: dict | None
) -> list[int]:
    """The rows of the images that cannot be read: all of them are read once, before the training begins.

    More than --max-bad percent of unreadable images end the program. What `begun` knows is not looked for again, and
    with --epochs 0 no image is trained on.
    """
    if begun or args.epochs == 0:
        return begun["training"]["bad"] if begun else []
    errors = set()
    for batch in load_batches(ImageDataset(images, clean=view), grid_keys(len(images), 64, processes), processes):
        errors.update(batch.errors)
    errors = sorted(union_of(errors, processes))
    report_bad(len(errors), [error for _, error in errors[:3]], len(images), args.max_bad)
    return [row for row, _ in errors]


def report_bad(num_bad: int, first: list[str], num: int, max_bad: float) -> None:
    """Print how many images are unreadable and the first of them. More than `max_bad` percent end the program."""
    if num_bad:
        print0(f"{num_bad} of {num} images are unreadable and left out; the first: {'; '.join(first)}")
    if num_bad > num * max_bad / 100:
        fail(f"{num_bad} of {num} images are unreadable, more than --max-bad {max_bad:g} percent: {first[0]}")


# ----------------------------------------------------------------------------------------------------------------------
# label files: creating and reading logits.h5 (one row an image); opening balanced.h5, which may be a stranger's too
# ----------------------------------------------------------------------------------------------------------------------

LOGITS_FORMAT, SELECTION_FORMAT = "noisy-student-logits-1", "noisy-student-selection-1"
LABEL_FILE_COLUMNS = {  # of one row an image or example, beside `classes`; path: bytes of any length
    LOGITS_FORMAT: {"logits": "f2", "label": "i4", "confidence": "f4", "status": "u1", "path": "S"}
    | {"offset": "i8", "size": "i8"},
    SELECTION_FORMAT: {"file": "u2", "row": "i8", "label": "i4", "confidence": "f4"},
}
LABEL_FILE_TEXTS = {LOGITS_FORMAT: ("root", "teacher", "teacher_sha256"), SELECTION_FORMAT: ("files", "method")}
TODO, DONE, UNREADABLE, HELD_OUT = 0, 1, 2, 3  # status of a row of logits.h5; HELD_OUT: an image of val


def create_logits(path: Path, images: ImageList, classes: list, num_wanted: int, held_out=(), **attributes) -> None:
    """Write a logits.h5 in which no row is done; `num_wanted` rows will be filled.

    Every dataset is contiguous and has its place from the start (sparse on disk). So any number of processes can fill
    it with os.pwrite: the HDF5 structure does not change, and the file opens at any moment, after a `kill -9` too.
    """
    num, text = len(images), h5py.string_dtype("utf-8", images.path.dtype.itemsize)
    needed = num * (text.itemsize + 17) + num_wanted * (2 * len(classes) + 8)  # bytes of all columns
    if (free := shutil.disk_usage(nearest_folder(path)).free) < needed:
        fail(f"{path}: {num_wanted} images need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on that disk")
    aligned = {"alignment_threshold": 1, "alignment_interval": 4096}
    with write_atomically(path) as temporary, h5py.File(temporary, "w", locking=False, **aligned) as file:
        allocate_columns(file, num, len(classes), text, len(held_out))
        for part in slices(num):
            file["path"][part] = images.path[part].astype(text)
            file["offset"][part], file["size"][part] = images.offset[part], images.size[part]
        file.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        if held_out:
            file["held_out"][:] = np.frombuffer(b"".join(sorted(held_out)), np.uint8).reshape(-1, 16)
        file.attrs.update(format=LOGITS_FORMAT, root=images.root, **attributes)


def allocate_columns(file: h5py.File, num: int, num_classes: int, text: np.dtype, num_held_out: int = 0) -> None:
    """Give the columns of `num` rows their places in a logits.h5. They are holes in it until they are written."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)  # h5py's own calls cannot ask for these three
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    columns = {name: (np.dtype(dtype), (num,)) for name, dtype in LABEL_FILE_COLUMNS[LOGITS_FORMAT].items()}
    columns |= {"path": (text, (num,)), "logits": (np.dtype("f2"), (num, num_classes))}
    columns |= {"held_out": (np.dtype("u1"), (num_held_out, 16))} if num_held_out else {}
    for name, (dtype, shape) in columns.items():
        kind, space = h5py.h5t.py_create(dtype, logical=True), h5py.h5s.create_simple(shape)
        h5py.h5d.create(file.id, name.encode(), kind, space, creation)


def open_label_file(path: str | Path, kind: str) -> h5py.File:
    """Open logits.h5 or balanced.h5 for reading; anything else ends the program with a line that says what it is.

    The file may be a stranger's. Links and external storage would be followed silently into any file of this machine;
    a shape or a string that is larger than the file would fill the memory.
    """
    try:
        file = h5py.File(path, "r", locking=False)
        end = os.path.getsize(path)
        for name in file.attrs:
            if file.attrs.get_id(name).shape != ():
                fail(f"{path}: attribute {name!r} is not a single value")
        for name in LABEL_FILE_TEXTS.get(file.attrs.get("format"), ()):
            if not isinstance(file.attrs.get(name), str):
                fail(f"{path}: attribute {name!r} is {file.attrs.get(name)!r}, expected a text")
        if file.attrs.get("format") != kind:
            fail(f"{path}: format is {file.attrs.get('format')!r}, expected {kind!r}")
        for name in file:
            dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
            if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
                fail(f"{path}: {name!r} is not a plain dataset of this file")
        columns = LABEL_FILE_COLUMNS[kind]
        if missing := sorted({*columns, "classes"} - file.keys()):
            fail(f"{path}: lacks {', '.join(missing)}")
        names = file["classes"]
        if names.ndim != 1 or not h5py.check_string_dtype(names.dtype) or names.nbytes > end:
            fail(f"{path}: classes is not a plain list of names")
        length = 0
        for c in range(len(names)):  # one by one: many may refer to one long string
            length += len(names[c].decode())
            if length > end:
                fail(f"{path}: the names of its classes are longer than the file")
        num_rows, num_classes = file["label"].size, len(names)
        for name, dtype in columns.items():
            dataset = file[name]
            if dataset.dtype.kind != "S" if dtype == "S" else dataset.dtype != dtype:
                fail(f"{path}: {name} is of type {dataset.dtype}, expected {np.dtype(dtype)}")
            shape = (num_rows, num_classes) if name == "logits" else (num_rows,)
            if dataset.shape != shape:
                fail(f"{path}: {name} has the shape {dataset.shape}, expected {shape}")
            if dataset.size and (dataset.id.get_offset() is None or dataset.id.get_offset() + dataset.nbytes > end):
                fail(f"{path}: {name} is not stored in one piece inside the file, so it cannot be mapped")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # h5py, of damaged files
        number = getattr(error, "errno", None)
        fail(f"{path}: not a readable HDF5 file ({os.strerror(number) if number else error})")
    return file


def open_finished(paths: list) -> list[h5py.File]:
    """Logits files of one teacher, every image of which has a status."""
    files = [open_label_file(path, LOGITS_FORMAT) for path in paths]
    roots = [os.path.join(os.path.realpath(file.attrs["root"]), "") for file in files]
    for (one, root), (other, within) in itertools.permutations(zip(paths, roots, strict=True), 2):
        if within.startswith(root) and (within != root or one < other):
            print0(f"{one} and {other}: images of {within} that both have count twice")
    for path, file in zip(paths, files, strict=True):
        if read_classes(file) != read_classes(files[0]):
            fail(f"{path} has other classes than {paths[0]}: label both with one teacher")
        if file.attrs["teacher_sha256"] != files[0].attrs["teacher_sha256"]:
            fail(f"{path} was made by another teacher than {paths[0]}: label both with one teacher")
        if todo := (file["status"][:] == TODO).sum():
            fail(f"{path} is unfinished: {todo} of {len(file['status'])} images have no label yet; run 02 again on it")
    return files


def map_dataset(file: h5py.File, name: str) -> np.ndarray:
    """A contiguous dataset as np.memmap: 30 times as fast as h5py's indexing for random rows."""
    dataset = file[name]
    if not dataset.size:
        return dataset[:]
    return np.memmap(file.filename, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)


def image_list(file: h5py.File, root: str | Path | None = None) -> ImageList:
    """The images of a logits.h5, mapped: the processes and loaders of a machine share one copy of the paths."""
    columns = (map_dataset(file, name) for name in ("path", "offset", "size"))
    return ImageList(os.path.abspath(root or file.attrs["root"]), *columns)


def slices(num: int) -> Iterator[slice]:
    """All of `num` rows, a million at a time: hundreds of millions must not be copied as a whole."""
    return (slice(begin, min(begin + (1 << 20), num)) for begin in range(0, num, 1 << 20))


def same_paths(images: ImageList, others: ImageList, rows: np.ndarray | range | None = None) -> bool:
    """Whether two lists are equally long and have the same paths, in these rows or (None) in all."""
    if images is others or len(images) != len(others):
        return images is others
    rows = range(len(images)) if rows is None else rows
    parts = (np.asarray(rows[part]) for part in slices(len(rows)))
    return all(np.array_equal(images.path[part], others.path[part]) for part in parts)


def in_chunks(*columns: list, num_rows: int):
    """(number of the first row, a slice of each column), file after file; a column is a list of the files' datasets."""
    first = 0
    for parts in zip(*columns, strict=True):
        for begin in range(0, len(parts[0]), num_rows):
            yield first + begin, *(part[begin : begin + num_rows] for part in parts)
        first += len(parts[0])


def read_classes(file: h5py.File) -> list[str]:
    return [name.decode() for name in file["classes"][:]]


def options_of(file: h5py.File) -> dict:
    """The teacher's arch_options, which older files do not have."""
    try:
        return dict(json.loads(file.attrs.get("arch_options", "{}")))
    except (TypeError, ValueError):
        fail(f"{file.filename}: attribute 'arch_options' is {str(file.attrs['arch_options'])[:100]!r}, expected JSON")


def read_held_out(file: h5py.File) -> frozenset[bytes]:
    """The digests of the images of val that stage 02 compared with; older files have none."""
    if "held_out" not in file:
        return frozenset()
    digests = file["held_out"]
    if digests.dtype != np.uint8 or digests.shape[1:] != (16,) or digests.nbytes > os.path.getsize(file.filename):
        fail(f"{file.filename}: held_out has the shape {digests.shape} of {digests.dtype}, expected (V, 16) of uint8")
    return frozenset(row.tobytes() for row in digests[:])


def write_csv(path: Path, labels: Path, wanted: np.ndarray | range) -> None:
    """Write `path,class,confidence`, a line an image that has a label, in the order of the rows.

    Names stand in it byte for byte as on the disk, in quotation marks where they hold a comma, a quote or a new line.
    """
    with open_label_file(labels, LOGITS_FORMAT) as file:
        images, classes = image_list(file), read_classes(file)
        status, label, confidence = (map_dataset(file, name) for name in ("status", "label", "confidence"))
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with write_atomically(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "confidence"])
        num = 0
        for begin in range(0, len(wanted), 1 << 20):
            rows = np.asarray(wanted[begin : begin + (1 << 20)])
            rows = rows[status[rows] == DONE]
            names = map(os.fsdecode, images.path[rows].tolist())
            writer.writerows(zip(names, (classes[c] for c in label[rows]), confidence[rows], strict=True))
            num += len(rows)
    print0(f"{path}: the labels of {num} images")


def columns_of(classes: list[str], known: list[str], data: Path) -> list[int]:
    """Where the classes of the data stand among those of the pseudo-labels."""
    if sorted(known) != sorted(classes):
        few = " ".join(known[:5])
        fail(f"{data}/train has the classes {' '.join(classes[:5])} ..., the pseudo-labels {few}")
    return [known.index(name) for name in classes]


NO_CLASS, UNKNOWN = -1, -2  # in place of the number of the true class


def classes_of_folders(paths: np.ndarray, classes: list[str]) -> np.ndarray:
    """The number of the class that an image's first folder names, int64 (N,), or UNKNOWN: the truth of val."""
    number = {os.fsencode(name): c for c, name in enumerate(classes)}
    return np.array([number.get(path.split(b"/")[0], UNKNOWN) for path in paths.tolist()], dtype=np.int64)


def draw_fraction(files: list[h5py.File], fraction: float, seed: int) -> tuple[list, list]:
    """(confidence, status) of each file as if the images that are not drawn could not be read."""
    confidence, status = ([file[name][:] for file in files] for name in ("confidence", "status"))
    start, *factors = np.random.default_rng(seed).integers(0, 2**64, 3, np.uint64) | np.uint64(1)
    for file, confidences, statuses in zip(files, confidence, status, strict=True):
        for part in slices(len(statuses)):
            hashes = np.fromiter((zlib.crc32(path) for path in file["path"][part].tolist()), np.uint64) ^ start
            for factor in factors:  # CRCs alone, from another start, would differ by a constant: the same draw again
                hashes = (hashes ^ hashes >> np.uint64(32)) * factor
            left_out = (hashes >> np.uint64(32)) >= fraction * 2**32
            confidences[part][left_out], statuses[part][left_out] = np.nan, UNREADABLE
    if not any((of_file == DONE).any() for of_file in status):
        fail(f"--fraction {fraction:g} leaves none of the readable images")
    return confidence, status


def read_truth(path: Path, files: list[h5py.File], classes: list[str]) -> np.ndarray:
    """The number of each image's true class, NO_CLASS or UNKNOWN, from a CSV with the columns name and class."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel's "CSV UTF-8" begins with a mark
            truth = {line["name"]: line["class"] for line in csv.DictReader(file)}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        fail(f"--truth {path}: expected a CSV with the columns name,class ({type(error).__name__}: {error})")
    number, named = {name: c for c, name in enumerate(classes)}, {found for found in truth.values() if found}
    if named and not named & number.keys():
        fail(f"--truth {path}: its classes, such as {min(named)}, are none of the teacher's, such as {classes[0]}")
    classes_of = {name: number.get(found, NO_CLASS) for name, found in truth.items()}
    true = np.full(sum(len(file["status"]) for file in files), UNKNOWN)
    for first, names in in_chunks([image_list(file).path for file in files], num_rows=1 << 20):
        true[first : first + len(names)] = [classes_of.get(os.fsdecode(name), UNKNOWN) for name in names.tolist()]
    if (true == UNKNOWN).all():
        fail(f"--truth {path}: none of its names is in the logits files")
    return true


def status_of(path: Path, wanted: np.ndarray | range) -> np.ndarray:
    if on_several_nodes():  # NFS drops what it has read of a file when a lock is taken
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with open_label_file(path, LOGITS_FORMAT) as file:  # network file systems look for changes when a file is opened
        status = map_dataset(file, "status")
    return status if isinstance(wanted, range) else status[wanted]


# ----------------------------------------------------------------------------------------------------------------------
# selections: writing and reading balanced.h5 (one row a training example), and the images that it names
# ----------------------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """The selection: one entry a training example, sorted by (file, row, label)."""

    file: np.ndarray  # uint16: number of the logits file
    row: np.ndarray  # int64: row of that file
    label: np.ndarray  # int32
    confidence: np.ndarray  # float32
    index: np.ndarray  # int64: the row, if all files were one
    is_first: np.ndarray  # bool: not a copy of the example before it


def by_class(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The positions of the entries, class after class, ascending in each."""
    # numpy sorts 16 bits by radix, 5 times as fast
    return np.argsort(labels.astype(np.int16) if num_classes < 1 << 15 else labels, kind="stable")


def ranks(labels: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The how-manieth entry of its class each one is, from 0. `seen` (C,): those of earlier chunks, updated."""
    sizes = np.bincount(labels, minlength=len(seen))
    rank = np.empty(len(labels), np.int64)
    rank[by_class(labels, len(seen))] = np.arange(len(labels)) + np.repeat(seen - np.cumsum(sizes) + sizes, sizes)
    seen += sizes
    return rank


def highest(score: np.ndarray, num: int) -> np.ndarray:
    """The positions, ascending, of the `num` highest scores. Of equal scores the first ones count."""
    if len(score) <= num:
        return np.arange(len(score))
    least = np.partition(score, len(score) - num)[len(score) - num]
    chosen = score > least
    chosen[np.flatnonzero(score == least)[: num - chosen.sum()]] = True
    return np.flatnonzero(chosen)


class BestOfClasses:
    """The `per_class` highest scores of each class, of entries that come in chunks: memory O(classes x per_class).

    The index of the entries must ascend, within a chunk and from chunk to chunk: ties go to the lower index.
    """

    def __init__(self, num_classes: int, per_class: int):
        self.num_classes, self.per_class = num_classes, per_class
        self.cutoff = np.full(num_classes, -np.inf, np.float32)  # of a full class: only higher scores get in
        self.chunks = [(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64))]  # [0]: the best so far
        self.num_new = 0

    def add(self, label: np.ndarray, score: np.ndarray, index: np.ndarray) -> None:
        self.chunks.append((label, score, index))
        self.num_new += len(label)
        if self.num_new > max(1 << 18, len(self.chunks[0][0])):
            self.best()

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(label, score, index) of all that is kept, class after class, the index ascending in each."""
        label, score, index = (np.concatenate(parts) for parts in zip(*self.chunks, strict=True))
        ends = np.cumsum(np.bincount(label, minlength=self.num_classes))
        kept = []
        for c, of_class in enumerate(np.split(by_class(label, self.num_classes), ends[:-1])):
            of_class = of_class[highest(score[of_class], self.per_class)]
            if len(of_class) == self.per_class:
                self.cutoff[c] = score[of_class].min()
            kept.append(of_class)
        kept = np.concatenate(kept)
        self.chunks, self.num_new = [(label[kept], score[kept], index[kept])], 0
        return self.chunks[0]


def examples_of(index: np.ndarray, label: np.ndarray, confidence: np.ndarray, file_sizes: list[int]) -> Examples:
    """The entries, sorted by (index, label), as a selection."""
    starts = np.cumsum([0, *file_sizes])
    places = np.searchsorted(index, starts)
    file = np.repeat(np.arange(len(file_sizes), dtype=np.uint16), np.diff(places))
    row = index if len(file_sizes) == 1 else index.copy()  # a hundred million examples: no copy that is not needed
    for start, begin, end in zip(starts[1:-1], places[1:-1], places[2:], strict=True):
        row[begin:end] -= start
    is_first = np.ones(len(index), dtype=bool)
    is_first[1:] = (index[1:] != index[:-1]) | (label[1:] != label[:-1])
    return Examples(file, row, label, confidence, index, is_first)


def write_selection(path: Path, examples: Examples, classes: list[str], **attributes) -> None:
    with write_atomically(path) as temporary, h5py.File(temporary, "w", locking=False) as out:
        for name in LABEL_FILE_COLUMNS[SELECTION_FORMAT]:
            out[name] = getattr(examples, name)
        out.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        out.attrs.update(format=SELECTION_FORMAT, **attributes)


def read_selection(path: str | Path) -> tuple[dict[int, h5py.File], dict[str, np.ndarray], str]:
    """({number: logits file} of those that have examples, the columns `file`, `row` and `label` (mapped), the method).

    The logits files are where they were or, if the folder of a run was moved as a whole, beside the selection.
    """
    with open_label_file(path, SELECTION_FORMAT) as file:
        number, row, label = (map_dataset(file, name) for name in ("file", "row", "label"))
        classes, method, text = read_classes(file), file.attrs["method"], file.attrs["files"]
    try:
        names = [os.fspath(name) for name in json.loads(text)]
    except (ValueError, TypeError):
        fail(f"{path}: attribute 'files' is {text[:100]!r}, expected a JSON list of paths")
    if len(row) == 0 or number.max() >= len(names) or not 0 <= label.min() <= label.max() < len(classes):
        fail(f"{path}: no examples, or of unknown files or classes: run 03 again")
    files = {}
    for i in np.unique(number).tolist():
        name = names[i] if os.path.exists(names[i]) else os.path.join(os.path.dirname(path), os.path.basename(names[i]))
        files[i], (rows, labels) = open_label_file(name, LOGITS_FORMAT), of_file(i, number, row, label)
        if read_classes(files[i]) != classes or not 0 <= rows.min() <= rows.max() < len(files[i]["status"]):
            fail(f"{path}: its rows or classes are not those of {name}: run 03 again")
        # In a top-p selection an image may stand under a class that is not its most probable one.
        now = map_dataset(files[i], "label")
        if method != "top-p" and any((now[rows[part]] != labels[part]).any() for part in slices(len(rows))):
            print0(f"{path}: the labels in {name} are others: if it was made anew, run 03 again")
    return files, {"file": number, "row": row, "label": label}, method


def of_file(i: int, number: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    """The entries of file `i` in the columns of a selection: no copies where that file is the only one."""
    is_of = number == i
    return list(columns) if is_of.all() else [column[is_of] for column in columns]


def distinct(rows: np.ndarray) -> np.ndarray:
    """What np.unique gives, without a sort where the rows are in order, as those of a selection are."""
    if (rows[1:] < rows[:-1]).any():
        return np.unique(rows)
    return rows[np.append(True, rows[1:] != rows[:-1])]


def selected_images(path: Path, folder: str | None) -> tuple[ImageList, np.ndarray]:
    """All images of the logits file that a selection names, and its rows. Of several files, that of `folder`."""
    files, selection, _ = read_selection(path)
    roots = {number: file.attrs["root"] for number, file in files.items()}
    numbers = [number for number, root in roots.items() if len(roots) == 1 or root == folder]
    if len(numbers) != 1:
        fail(f"{path} is of several folders: label one by one, --unlabeled {' or '.join(roots.values())}")
    return image_list(files[numbers[0]], folder), distinct(*of_file(numbers[0], selection["file"], selection["row"]))


class SelectedImages:
    """The images of a selection: a file number and a row each (mapped), looked up in the label files when needed."""

    def __init__(self, lists: dict[int, ImageList], file_number: np.ndarray, row: np.ndarray):
        self.lists, self.file_number, self.row = lists, file_number, row

    @property
    def is_lost(self) -> bool:
        return any(is_lost(images.root) for images in self.lists.values())

    def __len__(self) -> int:
        return len(self.row)

    def name(self, example: int) -> str:
        return self.lists[int(self.file_number[example])].name(int(self.row[example]))

    def load(self, example: int, enough: int = 0) -> Image.Image:
        return self.lists[int(self.file_number[example])].load(int(self.row[example]), enough)


def newer_file(newer: list, file, images: ImageList, rows: np.ndarray, ignore_root: bool):
    """The one of the newer logits files that has the images of `file` in these rows."""
    for one in newer:
        if (ignore_root or one.attrs["root"] == file.attrs["root"]) and same_paths(image_list(one), images, rows):
            return one
    fail(f"--logits: none of them has the images of {file.filename} in its rows")


# ----------------------------------------------------------------------------------------------------------------------
# optimization: learning rate, TensorFlow's RMSprop, the running average of the weights, soft cross-entropy
# ----------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How long a run is, and its learning rate."""

    epochs: float  # passes over the labelled images; with --unlabeled-only over the selected ones
    steps_per_epoch: float
    peak: float  # learning rate
    schedule: str
    warmup_epochs: float = 0
    decays: tuple[float, float] = (145, 0.97)  # of the staircase: how many, and by what factor

    @property
    def total_steps(self) -> int:
        return round(self.epochs * self.steps_per_epoch)

    def ends_a_period(self, step: int, every: float | None) -> bool:
        """Whether so many epochs end with this step. None: one, or 250 steps, for an epoch may be a few steps."""
        every = max(1, 250 / self.steps_per_epoch) if every is None else every
        return bool(every) and step / self.steps_per_epoch // every > (step - 1) / self.steps_per_epoch // every


# --schedule plateau: the factor of the rate in the Keras example, by stage. Its teacher watches the loss on val, its
# student the accuracy.
PLATEAU = {"teacher": 0.1, "student": 0.5}

# optimizer: (peak rate for each 256 labelled images of a batch from scratch, the same from weights, weight decay)
RATES = {
    "rmsprop": (0.016, 0.0016, 1e-5),  # the paper's: 0.128 at 2048; official main.py:173-182
    "sgd": (0.1, 0.01, 1e-4),  # ResNets: Goyal et al., 1706.02677
    "adamw": (0.00025, 1e-4, 0.05),  # DeiT: 0.0005 at 512; Touvron et al., 2012.12877
}  # from weights: ours, a tenth where the weights must stay near to what they were


def plan_of(args: argparse.Namespace, epochs: float, steps_per_epoch: float, decayed: float = 1) -> Plan:
    """The plan of a run. The default of --lr is RATES' times `decayed`; the warm-up is at most a fifth of the run."""
    if epochs and not round(epochs * steps_per_epoch):
        fail(f"--epochs {epochs:g} with --batch-size {args.batch_size} is not one step: a smaller batch or more epochs")
    init = getattr(args, "init", None)
    peak = args.lr if args.lr is not None else RATES[args.optimizer][bool(init)] * decayed * args.batch_size / 256
    warmup_epochs = getattr(args, "warmup_epochs", 0)
    if warmup_epochs > epochs / 5:
        print0(f"--warmup-epochs {warmup_epochs:g} is cut to {epochs / 5:g}, a fifth of the run")
    schedule = args.schedule or ("cosine" if init else "staircase")
    return Plan(epochs, steps_per_epoch, peak, schedule, min(warmup_epochs, epochs / 5), args.decays)


def learning_rate(step: int, plan: Plan) -> float:
    """The learning rate of a step: linear warm-up from 0, then `staircase`, `cosine` or `constant`.

    staircase: x 0.97 every 2.4 epochs of 350, every 4.8 of 700: one rule, 2.4 / 350 of the run. Its clock starts at
    step 0, not after the warm-up (official utils.py:39-74, main.py:569-584). Other numbers of decays divide the run
    evenly. `plateau` is constant here: what it takes off depends on the evaluations (`plateau_factor`).
    """
    total_steps, warmup_steps = plan.total_steps, plan.warmup_epochs * plan.steps_per_epoch
    if step < warmup_steps:
        return plan.peak * step / warmup_steps
    if plan.schedule == "staircase":
        num, factor = plan.decays
        every = total_steps * (2.4 / 350 if num == 145 else 1 / (num + 1))
        return plan.peak * factor ** math.floor(step / every)
    if plan.schedule == "cosine":
        return plan.peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    return plan.peak


@dataclass
class Evaluations:
    """What --patience and --schedule plateau go by: the loss of each evaluation of a teacher, and of a student the
    accuracy with a minus sign, so that low values are good."""

    patience: int | None = None  # None: no best state is kept
    values: list[float] = field(default_factory=list)
    best: dict | None = None  # model and metrics of the best one

    def add(self, value: float, model: nn.Module, metrics: dict) -> None:
        if self.patience and value < min(self.values, default=math.inf):
            weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
            self.best = {"model": weights, "metrics": metrics}
        self.values.append(value)

    @property
    def ended_early(self) -> bool:
        """Whether the last `patience` ones were no better than the best before them (Keras' EarlyStopping)."""
        if not self.patience or not self.values:
            return False
        return len(self.values) - 1 - self.values.index(min(self.values)) >= self.patience


def plateau_factor(values: list[float], factor: float, patience: int = 3, min_delta: float = 1e-4) -> float:
    """What Keras' ReduceLROnPlateau makes of the rate after evaluations with these values, of which low ones are good.

    After `patience` evaluations in a row that are not better by more than `min_delta` it is multiplied by `factor`.
    """
    best, waited, product = math.inf, 0, 1.0
    for value in values:
        best, waited = (value, 0) if value < best - min_delta else (best, waited + 1)
        if waited == patience:
            product, waited = product * factor, 0
    return product


class RMSpropTF(torch.optim.Optimizer):
    """TensorFlow's RMSProp, the paper's: epsilon inside the root, mean square from 1, the rate inside the momentum.

    torch.optim.RMSprop differs in all three and "goes unstable much easier". Official utils.py:77-97: decay 0.9,
    momentum 0.9, epsilon 0.001. Weight decay is coupled: it is part of the gradient.
    """

    def __init__(self, params, lr: float, decay=0.9, momentum=0.9, eps=1e-3, weight_decay=0.0):
        super().__init__(
            params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            all_params = [p for p in group["params"] if p.grad is not None]
            for p in all_params:
                if not self.state[p]:
                    self.state[p]["mean_square"] = torch.ones_like(p)
                    self.state[p]["momentum"] = torch.zeros_like(p)
            # A few at a time: the temporary tensors of all of them are as large as two models.
            for first in range(0, len(all_params), 50):
                params = all_params[first : first + 50]
                grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
                mean_square = [self.state[p]["mean_square"] for p in params]
                momentum = [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(mean_square, group["decay"])
                torch._foreach_addcmul_(mean_square, grads, grads, 1 - group["decay"])
                root = torch._foreach_add(mean_square, group["eps"])
                torch._foreach_sqrt_(root)
                torch._foreach_mul_(momentum, group["momentum"])
                torch._foreach_addcdiv_(momentum, grads, root, group["lr"])
                torch._foreach_sub_(params, momentum)


def make_optimizer(
    name: str, model: nn.Module, weight_decay: float | None, classifier_lr: float = 1.0
) -> torch.optim.Optimizer:
    """`rmsprop` (the paper's), `sgd` (Nesterov 0.9) or `adamw`; the loop sets the rate of every step.

    Weight decay (None: that of RATES) spares the norms and nothing else, as the official code (main.py:552-555);
    AdamW's is decoupled. `classifier_lr`: the classifier's share of the rate, kept in its group as `share`.

    Why a share: AdamW moves every weight by about the rate, however small its gradient, so a classifier of n inputs can
    move its logits by n times that. With B0's 1,280 and 4e-3 they follow the last batch, and the layers below learn
    from noise. A share that falls with 1/n keeps the logits' steps what they are (muP, 2203.03466, table 3). Below, a
    batch norm behind each layer does that: to it the size of weights is nothing.
    """
    weight_decay = RATES[name][2] if weight_decay is None else weight_decay
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    spared = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    heads = [model.get_submodule(head) for head in head_names(model)] if classifier_lr != 1 else []
    classifier = {id(p) for head in heads for p in head.parameters()}
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if id(p) not in spared | classifier], "weight_decay": weight_decay},
        {"params": [p for p in params if id(p) in spared], "weight_decay": 0.0},
    ]
    if classifier:
        params = [p for p in params if id(p) in classifier - spared]
        groups.append({"params": params, "weight_decay": weight_decay, "share": classifier_lr})
    if name == "rmsprop":
        return RMSpropTF(groups, lr=0.0)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema += (1 - d) (model - ema) with d = min(decay, (1 + step) / (10 + step)), step counting from 1.

    Of the parameters and of the batch-norm running statistics (official main.py:472-476, utils.py:292-306).
    """
    rate = 1 - min(decay, (1 + step) / (10 + step))
    ema = [t for t in (*ema_model.parameters(), *ema_model.buffers()) if t.is_floating_point()]
    now = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    torch._foreach_lerp_(ema, now, rate)


@torch.no_grad()
def update_swa(swa_model: nn.Module, model: nn.Module, num: int) -> None:
    """Make the mean of `num` - 1 weights that of `num`: parameters alone, for batch norms are recomputed."""
    torch._foreach_lerp_(list(swa_model.parameters()), list(model.parameters()), 1 / num)


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """-sum_c p_c log softmax(logits)_c of each image, (N,); no temperature on the student (official main.py:300-304)"""
    return -(probs * F.log_softmax(logits.float(), dim=1)).sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: model.pt (hand-off) and last.pt (resume), whole or not there at all; metrics.jsonl
# ----------------------------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = "noisy-student-checkpoint-1"
# Flags that change no number, and paths: what is there is compared by content, see `resume_or_exit`.
MAY_DIFFER = ("out", "workers", "save_every", "checkpoint_activations")
MAY_DIFFER += ("data", "init", "teacher", "pseudo_labels", "logits", "unlabeled", "checkpoint")
ROLES = ("init", "teacher", "pseudo_labels", "logits")  # of the same file: with and without it is not the same


def load_file(path: str | Path) -> dict:
    """What a .pt, .pth or .safetensors file holds, mapped. Code in it is never run; damage raises anything."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    mapped = zipfile.is_zipfile(path)  # torch's format since 1.6
    if mapped:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums of what it maps
                raise OSError(f"wrong checksum of {damaged}")
    # Namespace: plain data, in the files of many training scripts
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def read_file(path: str | Path) -> dict:
    """What a .pt, .pth or .safetensors file holds; anything else ends the program."""
    try:
        return load_file(path)
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except ImportError:
        fail(f"{path}: reading it needs a package: pip install safetensors")
    except Exception as error:  # a text file, a truncated one, a pickle with code in it: each raises something else
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0][:120]
        fail(f"{path}: not a checkpoint, or damaged; nothing in it was executed ({reason or type(error).__name__})")


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this toolkit onto the CPU; anything else ends the program and is never executed."""
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        keys = list(checkpoint)[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        fail(f"{path}: not a checkpoint of this toolkit (no format {CHECKPOINT_FORMAT!r}; found {keys})")
    return checkpoint


def load_model(path: str | Path, device: str | torch.device = "cpu", fuse: bool = False) -> tuple[nn.Module, dict]:
    """(model in eval mode with the averaged weights, checkpoint) of a model.pt or last.pt.

    `fuse`: with the batch norms folded into the convolutions, for inference: 1.4 times as fast, equal but for rounding.
    """
    checkpoint = read_checkpoint(path)
    # Without memory and time for weights that are replaced at once; torchvision's RegNets cannot be built like that.
    on_meta = checkpoint["arch"].removeprefix("tf_") in EFFICIENTNETS
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        model = build_model(checkpoint["arch"], len(checkpoint["classes"]), **checkpoint["arch_options"])
    try:
        load_weights(model, checkpoint["model"])
    except ValueError as error:
        fail(f"{path}: {error}")
    if fuse:
        fuse_batch_norms(model)
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def data_of(args: argparse.Namespace, source: dict) -> Path:
    """The data directory: --data, or that of the checkpoint or label file which is the source."""
    if not args.data and not (source.get("data") and os.path.isdir(source["data"])):
        fail(f"--data: say where it is, for the data directory it came from is not there ({source.get('data')})")
    return args.data or Path(source["data"])


def digest_of(thing) -> str:
    """What identifies an input: of a file its sha256; of a list of images their number and names; of a logits file and
    rows in use, given as a pair, the attributes, the shapes, and label, confidence and status of these rows."""
    if isinstance(thing, (str, Path)):
        return file_sha256(thing)
    if isinstance(thing, ImageList):
        return f"{len(thing)} images, names {hashlib.sha256(np.ascontiguousarray(thing.path)).hexdigest()}"
    file, rows = thing
    facts = {name: str(value) for name, value in file.attrs.items()} | {name: str(file[name].shape) for name in file}
    sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    rows = distinct(rows)
    for name in ("label", "confidence", "status"):
        column = map_dataset(file, name)
        for part in slices(len(rows)):
            sha256.update(column[rows[part]].tobytes())
    return sha256.hexdigest()


def labeled_data(args: argparse.Namespace, initial: dict, arch: str) -> tuple:
    """((images, labels) of train/, (images, labels) of val/, classes), each (ImageList, int64 (N,)).

    --init with --epochs 0 needs neither folder: the images of what is not there, or of other classes, are none. What it
    starts from is `initial`, as `initial_weights` gives it.
    """
    data, empty = args.data, (ImageList("", *image_columns([])), np.zeros(0, np.int64))
    if not data and (args.epochs != 0 or not args.init):
        fail("--data: a data directory with train/<class>/ is needed, but for --init with --epochs 0")
    if args.epochs != 0 or not args.init or (data and (data / "train").is_dir()):
        *train, classes = labeled_images(data, "train")
        return train, labeled_images(data, "val", classes)[:2], classes
    val_classes = labeled_images(data, "val")[2] if data else []
    classes = classes_of_weights(initial, arch, val_classes)
    if unknown := set(val_classes) - set(classes):
        print0(f"{data / 'val'} has classes that {args.init} has not, such as {min(unknown)}: it is not evaluated")
        return empty, empty, classes
    return empty, labeled_images(data, "val", classes)[:2] if data else empty, classes


HELD_OUT_TENTH = " (the held-out tenth)"


def data_inputs(data: Path, train: ImageList, val: ImageList) -> dict:
    """{path: images} of the labelled images, for `input_digests`."""
    held_out = not (data / "val").is_dir()
    return {data / "train": train, f"{data / 'train'}{HELD_OUT_TENTH}" if held_out else data / "val": val}


def input_digests(inputs: dict, processes: Processes) -> dict[str, str]:
    """{path: digest} of everything that shapes a run, as checkpoints keep it: computed by rank 0.

    The images lie on each machine's own disk, perhaps: the first process of each compares its list with rank 0's.
    """
    things = {os.path.abspath(path): thing for path, thing in inputs.items() if path}
    found = from_rank0({path: digest_of(things[path]) for path in things if processes.is_main}, processes)
    for path, images in things.items() if is_first_of_node() and not processes.is_main else ():
        if isinstance(images, ImageList) and (digest := digest_of(images)) != found[path]:
            there, where = f"{platform.node()} has {digest[:30]}", f"process 0's node {found[path][:30]}"
            fail(f"{path}: {there}, {where}: all nodes need the same images")
    return found


LOCKS = []  # open files: a lock ends with its process


def lock(out: Path) -> None:
    """Let no second run write to `out`. A run that was restarted waits until the one before it has ended."""
    if not is_rank0() or LOCKS:
        return
    LOCKS.append(open(out / ".lock", "a"))  # noqa: SIM115
    for _ in range(300):
        try:  # not flock, which forked loaders inherit: they may outlive a killed run
            return fcntl.lockf(LOCKS[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return print0(f"{out} cannot be locked ({error.strerror}): start no second run on it")
        time.sleep(0.1)
    fail(f"another run is writing to {out}: wait for its end, or choose another --out", from_any=True)


def previous_run(args: argparse.Namespace) -> dict | None:
    """The checkpoint of the run that --out holds, finished or not; None for a new run.

    A last.pt that is damaged is passed over for the one before it. Other flags than the run began with (those of
    MAY_DIFFER apart) end the program.
    """
    with contextlib.suppress(OSError):  # no folder yet; no permission: writing will say so
        lock(args.out)
    if dist.is_initialized():  # rank 0 has the lock: a process of a killed run, on another node, writes no more
        dist.all_reduce(BUFFER.zero_())
    if not args.out.is_dir():
        return None
    there = os.listdir(args.out)  # opens the folder: without that NFS may give the last.pt of a minute ago
    names = ["model.pt"] if "model.pt" in there else ["last.pt", "last.prev.pt"]
    checkpoint = None
    for path in (args.out / name for name in names if name in there):
        try:
            checkpoint = load_file(path)
            break
        except Exception as error:
            print0(f"{path} is damaged ({type(error).__name__}: {str(error)[:100]})")
    else:
        if any(name in there for name in names):
            fail(f"{args.out} holds no checkpoint that can be read: remove it to begin anew, or choose another --out")
        return None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path} is of another program: move it away, or choose another --out")
    if path.name == "last.prev.pt":
        print0(f"continuing from {path}, step {checkpoint['training']['step']}")
    then, now = checkpoint["args"], flags_of(args)
    differ = [
        f"--{name.replace('_', '-')} {then.get(name)} (now {now.get(name)})"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
        and (
            name not in MAY_DIFFER
            or "published" in (then.get(name), now.get(name))  # --init has no file then
            or (name in ROLES and bool(then.get(name)) != bool(now.get(name)))
        )
    ]
    if differ:
        fail(f"{args.out} was begun with {', '.join(differ)}: use the same flags to continue, or another --out")
    is_finished = names == ["model.pt"]
    if is_finished and not all(
        os.path.exists(path.partition(HELD_OUT_TENTH)[0]) for path in checkpoint.get("inputs", {})
    ):
        exit_finished(args.out, checkpoint)  # what it was made from has been cleared away since
    return checkpoint


def resume_or_exit(args: argparse.Namespace, begun: dict | None, inputs: dict[str, str]) -> None:
    """End the program where --out is finished (exit status 0), or where an input is not what the run began with."""
    if not begun:
        return
    then = begun.get("inputs", inputs)  # older runs do not say
    if sorted(then.values()) != sorted(inputs.values()):
        changed = [path for path, digest in inputs.items() if digest not in then.values()]
        changed += [path for path, digest in then.items() if digest not in inputs.values()]
        first = (changed or [*inputs])[0]
        fail(f"{first} is not what {args.out} was begun with: put it back as it was, or choose another --out")
    if (args.out / "model.pt").exists():
        exit_finished(args.out, begun)


def exit_finished(out: Path, checkpoint: dict) -> NoReturn:
    print0(f"{out / 'model.pt'} is finished: val_top1 {checkpoint['metrics'].get('val_top1', math.nan):.2f}")
    raise SystemExit(0)


def versions(arch: str) -> dict[str, str]:
    packages = ("torch", "torchvision", "pillow", *(["timm"] if arch.startswith("timm/") else []))
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint whole or not at all; a diverged one is not written: exit status 3.

    Of a last.pt the one before it stays, as last.prev.pt: a disk may lose what it said it had written.
    """
    for weights in (checkpoint["model"], checkpoint.get("training", {}).get("model", {})):  # averaged; as trained
        if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
            diverged(path.parent)
    with write_atomically(path) as temporary:
        with open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # the end of torch's writer hides what stopped it: a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        if path.name == "last.pt" and path.exists():
            previous, link = path.with_name("last.prev.pt"), temporary.with_name(f"{temporary.name}.prev")
            try:
                os.link(path, link)
                os.replace(link, previous)
            except OSError:  # a file system without links: for a moment there is last.prev.pt alone
                os.replace(path, previous)


def diverged(out: Path) -> NoReturn:
    if is_rank0():
        print(f"error: the training diverged; {out} keeps the last good state: try a lower --lr", file=sys.stderr)
    raise SystemExit(3)


def append_metrics(out: Path, **values) -> None:
    try:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        fail(f"{out / 'metrics.jsonl'} cannot be written: {error.strerror}; {out / 'last.pt'} is kept")


def cut_metrics(out: Path, step: int) -> None:
    """Drop the lines after `step`, the one that is resumed."""
    with write_atomically(out / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in read_metrics(out) if line["step"] <= step))


def read_metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line


# ----------------------------------------------------------------------------------------------------------------------
# training: a model as the flags want it, precision, DDP, the parts of a batch, evaluation
# ----------------------------------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What the flags, the weights to start from and the teacher say about a model and its images."""

    arch: str
    small_images: bool | None
    view: View
    crop: Crop
    recipe: Recipe
    noise: Callable[[Tensor, torch.Generator], Tensor]  # of a whole batch, uint8 (n, 3, H, W), on the device
    initial: dict  # --init, as `initial_weights` gives it


def setup_of(args: argparse.Namespace, teacher: dict) -> Setup:
    """A flag comes first, then --init, then the teacher (of a teacher itself {}), then what is usual for the model."""
    initial = initial_weights(args.init, args.arch or teacher.get("arch"), args.image_size) if args.init else {}
    source = initial or teacher
    arch = args.arch or source.get("arch", "efficientnet_b0")
    small_images = args.small_images
    if small_images is None:
        small_images = source.get("arch_options", {}).get("small_images")
    view = View.of(initial) if initial else view_of(arch)
    view = view.at(args.image_size or source.get("image_size", view.image_size))
    # Foreign weights say nothing of a crop mode, unless it is another one than the papers'.
    say = (crop_mode_of(one) for one in (initial, teacher) if {"format", "crop_mode"} & one.keys())
    view = view._replace(crop_mode=args.crop_mode or next(say, view.crop_mode))
    crop = Crop(view.image_size, None if small_images else args.min_crop_area, args.hflip, view.crop_mode)
    recipe = recipe_of(arch, args)
    words = {"recipe": recipe, "resolution": resolution_of(arch), "small_images": small_images, "hflip": args.hflip}
    return Setup(arch, small_images, view, crop, recipe, partial(add_noise, **words), initial)


def model_of(stage: str, setup: Setup, classes: list[str], args: argparse.Namespace) -> tuple[nn.Module, dict, str]:
    """(a model as the flags want it, its arch_options, where its weights come from in words)."""
    arch, num_classes = setup.arch, len(classes)
    options = {"small_images": setup.small_images, "dropout": args.dropout, "drop_path": args.drop_path}
    options |= {"zero_init_residual": args.zero_init_residual or None}
    may_lack = ("dropout", "drop_path", "zero_init_residual")
    for name in may_lack if arch.removeprefix("tf_") not in EFFICIENTNETS else ():
        if options[name] is not None:  # ResNets, for example, have neither of the first two
            try:
                build_model(arch, num_classes, **{name: options[name]})
            except ValueError:
                print0(f"{arch} has no --{name.replace('_', '-')}: it is left out")
                options[name] = None
    options |= img_size_option(arch, setup.view.image_size)
    # Teacher, student and the rounds of one --seed must not start from the same weights.
    words = np.random.SeedSequence(seed_words(args.seed, f"{stage} weights"))
    torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
    try:
        model = build_model(arch, num_classes, **options)
    except ValueError as error:
        fail(f"--arch: {error}")
    set_bn_momentum(model, args.bn_momentum)
    origin = load_initial_weights(model, setup.initial, args, classes) if setup.initial else "from scratch"
    return model, options, origin


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def model_noise(model: nn.Module) -> str:
    """The noise of a model in words: the largest rates of its dropout and of its stochastic depth."""
    dropout, drop_path = [0.0], [0.0]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            dropout.append(module.p)
        elif type(module).__name__ == "StochasticDepth":  # torchvision's
            drop_path.append(module.p)
        elif isinstance(module, MBConv):
            drop_path.append(module.drop_path)
        elif type(module).__name__ == "DropPath":  # timm's
            drop_path.append(module.drop_prob or 0.0)
        elif isinstance(rate := getattr(module, "drop_rate", None), float):  # timm's, of F.dropout
            dropout.append(rate)
    rates = {"dropout": max(dropout), "stochastic depth": max(drop_path)}
    return ", ".join(f"{name} {rate:.2g}" for name, rate in rates.items() if rate) or "no model noise"


def precision_of(precision: str, processes: Processes) -> str:
    """What --precision auto means: the best that all processes can do.

    On CPUs bf16's depthwise convolutions make training slower. GPUs before Ampere (T4, V100, RTX 20xx) only emulate it.
    """
    if precision != "auto":
        return precision
    if processes.device.type == "cpu":
        return "fp32"
    lacks_bf16 = float(not torch.cuda.is_bf16_supported(including_emulation=False))
    if dist.is_initialized():
        lacks_bf16 = sum_of(processes, lacks_bf16)[0]
    return "fp16" if lacks_bf16 else "bf16"


def autocast(precision: str, device: torch.device):
    """(autocast context, GradScaler) of fp32, bf16 or fp16."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    context = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    return context, torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def parallel(model: nn.Module, processes: Processes, compile_it: bool, recompute: bool = False) -> nn.Module:
    """What the training forward calls: compiled in place if asked for, DDP around it with several processes.

    Batch norm is synchronised over the processes on GPUs; torch has no such thing for CPUs. `recompute`: keep only what
    enters a block, and compute the rest of its activations again in the backward pass; the results stay the same.
    """
    if recompute:
        blocks = [module for module in model.modules() if isinstance(module, MBConv)]
        if not blocks:
            fail("--checkpoint-activations is for EfficientNets; --accumulate saves memory with any model")
        for block in blocks:
            block.recomputes = True
    if compile_it:
        model.compile()
    if processes.world_size == 1:
        return model
    if processes.device.type == "cuda":
        synchronize_norms(model)
    devices = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def synchronize_norms(model: nn.Module) -> None:
    """Batch norm over all processes, in place."""
    if is_of_timm(model):
        from timm.layers import convert_sync_batchnorm  # torch's would lose the activation of a BatchNormAct2d

        convert_sync_batchnorm(model)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def noised_batches(streams: list, num: int, noise: Callable, seed: int, stage: str, processes: Processes) -> Iterator:
    """`num` batches as those of the steps, uint8 on the device, with keys and noise of their own.

    `streams`: (dataset, images a step) of each stream of batches.
    """
    loaders = []
    for dataset, num_images in streams:
        keys = train_keys(len(dataset), num_images, seed, dataset.stream, range(num), processes)
        loaders.append(load_batches(dataset, keys, processes))
    for index, batches in enumerate(zip(*loaders, strict=True)):
        generator, parts = step_generator(seed, f"{stage} norms", index, processes.rank), []
        for batch, (dataset, _) in zip(batches, streams, strict=True):
            images = batch.views[-1].to(processes.device)
            parts.append(noise(images, generator) if isinstance(dataset.noised, Crop) else images)
        yield torch.cat(parts)


@torch.no_grad()
def recompute_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Running statistics of the batch norms: the mean of those of the batches, as torch's swa_utils.update_bn."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def noise_model(model: torch.nn.Module) -> None:
    """Dropout and stochastic depth as in training; batch norms as they are when the model labels."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def micro_batches(ddp_model: nn.Module, number: int, *tensors: Tensor):
    """Cut a batch in `number` parts; the processes exchange gradients once, in the backward pass of the last."""
    for part, chunks in enumerate(zip(*(tensor.tensor_split(number) for tensor in tensors), strict=True), 1):
        waits = part < number and isinstance(ddp_model, nn.parallel.DistributedDataParallel)
        with ddp_model.no_sync() if waits else contextlib.nullcontext():
            yield chunks


def step_generator(seed: int, stream: str, step: int, rank: int) -> torch.Generator:
    """Seed torch (dropout, stochastic depth) for a step, and return a CPU generator for its augmentation."""
    words = np.random.SeedSequence(seed_words(seed, f"{stream} noise", step, rank))
    word = int(words.generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(word)
    return torch.Generator().manual_seed(word ^ 1)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device, or of this process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_parts(num: int, what: str, args: argparse.Namespace, processes: Processes) -> None:
    """A step's images are split evenly over the processes and the parts of --accumulate, or the program ends."""
    if num % (num_parts := processes.world_size * args.accumulate):
        fail(f"{what} cannot be split in {num_parts} parts (processes x --accumulate)")


def refusal(model: nn.Module, size: int) -> str:
    """What a model, in inference mode, says against images of this size; "" if it takes them."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"--image-size {size}: the model takes no images of this size ({error})"
    return ""


def check_input(model: nn.Module, view: View, num_images: int) -> None:
    """End the program where a model does not take images of this size, or not so few at a time."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    values = []  # of a channel that a batch norm sees of one image
    hooks = [norm.register_forward_pre_hook(lambda _, x: values.append(x[0][0, 0].numel())) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    if words := refusal(model.eval(), view.image_size):
        fail(words)
    for hook in hooks:
        hook.remove()
    for module, training in modes:
        module.training = training
    if num_images * min(values, default=2) < 2:
        at = f"at {view.image_size} px it sees one value of each channel"
        fail(f"--batch-size: batch norm cannot train on one image in each part and process: {at}")


def in_halves(function: Callable, *batches: Tensor) -> Tensor:
    """function(*batches), on halves of them where the memory of a GPU is too small for the whole."""
    try:
        return function(*batches)
    except torch.OutOfMemoryError:
        if len(batches[0]) == 1:
            raise
    torch.cuda.empty_cache()  # not above, where the exception holds the activations
    halves = zip(*(batch.tensor_split(2) for batch in batches), strict=True)
    return torch.cat([in_halves(function, *half) for half in halves])


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: ImageList,
    labels: np.ndarray,
    view: View,
    processes: Processes,
    precision: str = "fp32",
    stop: StopSignal | None = None,
) -> dict | None:
    """val_loss, val_top1, val_top5 (percent) of the clean views, each readable image exactly once, by all processes.

    None if a signal came meanwhile.
    """
    model.eval()
    if processes.world_size > 1:  # on CPUs each process has its own running statistics: rank 0's are those that count
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    amp, _ = autocast(precision, processes.device)
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    errors = set()

    def logits_of(pixels: Tensor) -> Tensor:
        with amp:
            return model(normalize(pixels, view)).float()

    keys = grid_keys(len(images), rows_per_batch(view.image_size, processes.device), processes)
    for batch in load_batches(ImageDataset(images, clean=view), keys, processes):
        if stop and stop.received:
            break
        errors.update(batch.errors)
        if not len(batch.rows):
            continue
        logits = in_halves(logits_of, batch.views[0].to(processes.device, non_blocking=True))
        target = torch.from_numpy(labels)[batch.rows].to(processes.device)
        ranked = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        sums += torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(target), device=loss.device)])
    if stop and stop():
        return None
    loss, top1, top5, num = reduce_sum(sums, processes).tolist()
    if errors := sorted(union_of(errors, processes)):
        print0(f"{len(errors)} val images are unreadable and left out; the first: {errors[0][1]}")
    if not num:
        fail("no val image is readable")
    return {"val_loss": loss / num, "val_top1": 100 * top1 / num, "val_top5": 100 * top5 / num}


# ----------------------------------------------------------------------------------------------------------------------
# the training run: Run, which keeps its books
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """The books of a training run, kept once for all stages that train. It never calls the stage, which owns the loop:

        for batch in run.steps(batches):            # the learning rate and the random numbers of the step are set
            for part in run.parts(*tensors):        # --accumulate; the gradients are zero before the first part
                with run.amp:
                    logits = run.ddp_model(...)
                run.backward(sum of losses / run.counts[0])
            run.end_step()                          # updates weights and average; logs, evaluates, saves
        run.finish()                                # evaluates, draws curves.png, writes model.pt

    model      the plain module that trains; ddp_model is for the forward pass of the training alone
    averaged   the running average of its weights: what is evaluated and kept; without --average the model itself
    step       steps done; generator: for the noise of the step in the works, on the CPU
    counts     the readable images of a part, in the mean over parts and processes, for each stream of batches: a sum of
               losses divided by it has the gradient of the mean over all readable images of the step
    header     what a checkpoint says about the model, beside the weights and the metrics
    bad        rows of the labelled images that could not be read before the first step; num_images: of a step, in all
    """

    def __init__(
        self,
        args: argparse.Namespace,
        processes: Processes,
        model: nn.Module,
        header: dict,
        plan: Plan,
        val: tuple[ImageList, np.ndarray],
        num_images: int,
        bad: list[int],
        begun: dict | None,
        noise: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ):
        self.noise, self.streams = noise, []
        self.args, self.processes, self.plan, self.val, self.bad = args, processes, plan, val, bad
        self.header = header | {"format": CHECKPOINT_FORMAT, "args": flags_of(args)}
        self.header |= {"versions": versions(header["arch"])}
        self.view = View.of(header)
        self.model = model.to(processes.device, memory_format=torch.channels_last)
        check_input(model, self.view, num_images // (processes.world_size * args.accumulate))
        self.averaged = copy.deepcopy(model) if hasattr(args, "average") else model
        self.optimizer = make_optimizer(args.optimizer, model, args.weight_decay, getattr(args, "classifier_lr", 1.0))
        training = begun["training"] if begun else {}
        # On another machine --precision auto might choose otherwise: what the run began with counts.
        self.precision = training.get("precision") or precision_of(args.precision, processes)
        self.amp, self.scaler = autocast(self.precision, processes.device)
        self.step = 0
        if begun:
            self.step = training["step"]
            self.model.load_state_dict(training["model"] if "model" in training else begun["model"])
            self.averaged.load_state_dict(begun["model"])
            self.optimizer.load_state_dict(training["optimizer"])
            self.scaler.load_state_dict(training["scaler"])
        self.metrics = begun["metrics"] if begun else {}
        self.unreadable = {tuple(one) for one in training.get("unreadable", [])}  # (stream, row), of all processes
        self.held_out = set()  # rows of the unlabelled images that are images of val
        self.read, self.must_have_read = {}, min(self.step + 10, plan.total_steps)  # images of a stream; by which step
        self.line = training.get("line")  # of the log, whose evaluation a signal cut short
        judged = training.get("evaluations", []), training.get("best")
        self.evaluations = Evaluations(getattr(args, "patience", None), *judged)
        # The sums of the losses since the last line of the log. Saved is the mean over the processes, whose number may
        # be another one now; rank 0 holds all of it.
        self.logged, self.names, self.sums = self.step, training.get("names", []), 0
        if self.names:
            self.logged, sums = training["logged"], training["sums"].to(processes.device)
            self.sums = sums * processes.world_size if processes.is_main else torch.zeros_like(sums)
        if processes.is_main:
            cut_metrics(args.out, self.step)
            lock(args.out)
        self.ddp_model = parallel(model, processes, args.compile, args.checkpoint_activations)
        self.stop = StopSignal(processes)
        self.log_every, self.num_labeled = max(1, min(100, plan.total_steps // 100)), 0

    def announce(self, *facts: str) -> None:
        """Print what was derived from the flags, before the first step."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        num_trained, num = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
        copies = {"sgd": 1}.get(self.args.optimizer, 2) * num_trained + num * (1 + (self.averaged is not self.model))
        copies += num * bool(self.evaluations.patience)
        given, start = self.args.lr is not None, "weights" if getattr(self.args, "init", None) else "scratch"
        why = "--lr" if given else f"the default from {start}" if "init" in self.args else "the end of the schedule"
        print0(
            f"{self.header['arch']} at {self.view.image_size} px, {num_trained:,} of {num:,} parameters train",
            *facts,
            f"{self.plan.total_steps} steps, {self.plan.steps_per_epoch:.1f} an epoch, from step {self.step}",
            f"{self.args.optimizer}, {self.plan.schedule}, peak lr {self.plan.peak:g} ({why})",
            f"{self.precision} on {self.processes.world_size} x {self.processes.device.type}",
            f"last.pt and last.prev.pt take {8 * copies / 1e9:.2f} GB",
            sep="; ",
        )

    def batches(self, images: ImageList, num: int, stream: str, **views) -> torch.utils.data.DataLoader:
        """The batches of the steps that remain: `num` images a step over all processes, in the order of `stream`.

        `views`: clean, noised and held_out of ImageDataset.
        """
        stream, seed = f"{self.header['stage']} {stream}", self.args.seed
        self.streams.append((ImageDataset(images, seed=seed, stream=f"{stream} norms", **views), num))
        self.read[stream] = 0 if num else 1  # --unlabeled-only takes no labelled images: none is missing
        keys = train_keys(len(images), num, seed, stream, range(self.step, self.plan.total_steps), self.processes)
        return load_batches(ImageDataset(images, seed=seed, stream=stream, **views), keys, self.processes)

    def steps(self, *loaders: torch.utils.data.DataLoader) -> Iterator:
        """Iterate over the batches of the steps that remain: a Batch, or one of each loader."""
        if self.line:
            self.log(self.line, evaluates=True)
        self.num_labeled = len(loaders[0].dataset) + len(self.bad)
        name, total = self.args.out.name, self.plan.total_steps
        batches = progress(zip(*loaders, strict=True), total, name, self.processes, self.step)
        self.begin_clock()
        while not self.evaluations.ended_early:
            asked = time.monotonic()
            if (parts := next(batches, None)) is None:
                return
            self.waited += time.monotonic() - asked
            self.count_images(loaders, parts)
            self.lr = learning_rate(self.step, self.plan)
            if self.plan.schedule == "plateau":
                self.lr *= plateau_factor(self.evaluations.values, PLATEAU[self.header["stage"]])
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * group.get("share", 1)
            # A function of (seed, stage, step, rank): a resumed run draws what an uninterrupted one does.
            stage, rank = self.header["stage"], self.processes.rank
            self.generator = step_generator(self.args.seed, stage, self.step, rank)
            yield parts if len(parts) > 1 else parts[0]

    def count_images(self, loaders, batches: tuple[Batch, ...]) -> None:
        """Count the readable images of the step over all processes, and stop all processes if one got a signal.

        This is the one exchange of a step beside that of the gradients. It is between CPUs: it does not wait for GPUs.
        """
        for loader, batch in zip(loaders, batches, strict=True):
            for row, reason in batch.errors:
                if (loader.dataset.stream, row) not in self.unreadable and len(self.unreadable) < 10:
                    print(f"unreadable, left out: {reason}", flush=True)
                self.unreadable.add((loader.dataset.stream, row))
            for row in batch.held_out:
                if row not in self.held_out and len(self.held_out) < 10:
                    print(f"an image of val, left out: {loader.dataset.images.name(row)}", flush=True)
                self.held_out.add(row)
        stops, *counts = sum_of(self.processes, self.stop.received, *(len(batch.rows) for batch in batches))
        if stops:
            self.save("last.pt")
            raise SystemExit(143)
        for loader, batch, count in zip(loaders, batches, counts, strict=True):
            if not count and batch.errors and (loader is loaders[0] or loader.dataset.images.is_lost):
                reason = batch.errors[0][1]
                fail(f"none of the images of step {self.step + 1} is readable, {self.args.out} is kept: {reason}")
            stream = loader.dataset.stream
            self.read[stream] += count
            if not self.read[stream] and self.step + 1 == self.must_have_read:
                why = f"are unreadable or images of val, as the lines above say; {self.args.out} is kept"
                fail(f"no {stream.split()[-1]} image of the first steps is of use: all {why}")
        self.num_seen += sum(counts)
        self.counts = [count / (self.processes.world_size * self.args.accumulate) for count in counts]

    def parts(self, *tensors: Tensor) -> Iterator:
        """The batch in --accumulate parts, with the gradients set to zero before the first."""
        self.optimizer.zero_grad()
        return micro_batches(self.ddp_model, self.args.accumulate, *tensors)

    def backward(self, loss: Tensor, **others: Tensor) -> None:
        """Add the gradients of a part's mean loss. `others`: losses that are only logged, under their names."""
        self.scaler.scale(loss / self.args.accumulate).backward()
        self.names = ["loss", *others]
        self.sums += torch.stack([loss, *others.values()]).detach() / self.args.accumulate  # stays on the device

    def end_step(self) -> None:
        """Update weights and average; then log, evaluate and save where it is time for that."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.num_averaged:
            if (self.step - self.plan.total_steps // 2) % 10 == 0:
                update_swa(self.averaged, self.model, self.num_averaged)
        elif self.averaged is not self.model and self.args.average != "swa":
            update_ema(self.averaged, self.model, self.step, self.args.average)
        is_last = self.step == self.plan.total_steps
        evaluates = not is_last and self.plan.ends_a_period(self.step, getattr(self.args, "eval_every", 0))
        if evaluates or is_last or self.step % self.log_every == 0:
            self.log(self.log_line(), evaluates)
        elif self.step % self.args.save_every == 0:
            self.save("last.pt")

    @property
    def num_averaged(self) -> int:
        """How many weights --average swa is the mean of: those of every 10 steps of the second half."""
        is_swa = getattr(self.args, "average", None) == "swa"
        return max(0, self.step - self.plan.total_steps // 2) // 10 if is_swa else 0

    def prepare_average(self) -> None:
        """Make --average swa fit to be evaluated: the batch norms of a mean of weights are those of none of them."""
        if getattr(self.args, "average", None) != "swa":
            return
        if not self.num_averaged:
            self.averaged.load_state_dict(self.model.state_dict())
            return
        stage, num = self.header["stage"], min(100, self.plan.total_steps)
        batches = noised_batches(self.streams, num, self.noise, self.args.seed, stage, self.processes)
        batches = takewhile(lambda _: not self.stop.received, batches)  # the evaluation will end as well
        with self.amp:
            recompute_norms(self.averaged, (normalize(images, self.view) for images in batches))

    def judge(self, metrics: dict) -> None:
        is_teacher = self.header["stage"] == "teacher"
        value = metrics["val_loss"] if is_teacher else -metrics["val_top1"] / 100
        self.evaluations.add(value, self.averaged, metrics)

    def log_line(self) -> dict:
        """The mean losses since the last line of the log, and how fast it goes."""
        num_steps, seconds = self.step - self.logged, time.monotonic() - self.clock
        means = (reduce_sum(self.sums, self.processes) / self.processes.world_size / num_steps).tolist()
        line = {"step": self.step, "epoch": self.step / self.plan.steps_per_epoch, "lr": self.lr}
        line |= dict(zip(self.names, means, strict=True))
        self.logged, self.sums, self.names = self.step, 0, []
        if not math.isfinite(line["loss"]):
            diverged(self.args.out)
        line |= {"images_per_s": self.num_seen / seconds, "loader_wait": self.waited / seconds}
        line["memory_gb"] = peak_memory(self.processes.device) / 1e9
        self.unreadable = union_of(self.unreadable, self.processes)
        if num := len(self.unreadable) + len(self.bad):
            line["unreadable"] = num
        self.check_max_bad()
        return line

    def check_max_bad(self) -> None:
        num_bad = len(self.bad) + sum(stream.endswith(" labeled") for stream, _ in self.unreadable)
        if num_bad > self.num_labeled * self.args.max_bad / 100:
            shares = f"{num_bad} of {self.num_labeled} labelled images are unreadable"
            fail(f"{shares}, more than --max-bad {self.args.max_bad:g} percent; {self.args.out / 'last.pt'} is kept")

    def log(self, line: dict, evaluates: bool) -> None:
        """Write a line of metrics.jsonl, with an evaluation if it is time for one; then last.pt is saved as well."""
        if evaluates:
            self.line = line  # kept in last.pt, if a signal comes during the evaluation
            self.prepare_average()
            line = line | self.evaluate()
            self.line, self.metrics = None, line
            self.judge(line)
            print0(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
        if self.processes.is_main:
            append_metrics(self.args.out, **line)
        if evaluates or self.step % self.args.save_every == 0:
            self.save("last.pt")
        self.begin_clock()

    def begin_clock(self) -> None:
        self.clock, self.waited, self.num_seen = time.monotonic(), 0.0, 0

    def evaluate(self, view: View | None = None, images=None, labels=None) -> dict:
        """Evaluate on val, or as told. A signal meanwhile ends the program after saving, and it is done again later."""
        images, labels = self.val if images is None else (images, labels)
        metrics = evaluate(self.averaged, images, labels, view or self.view, self.processes, self.precision, self.stop)
        if metrics is None:
            self.save("last.pt")
            raise SystemExit(143)
        if not math.isfinite(metrics["val_loss"]):
            diverged(self.args.out)
        return metrics

    def save(self, name: str) -> None:
        """Write last.pt, or model.pt without what only resuming needs, from rank 0."""
        if self.names:  # losses that are not logged yet
            self.sums = reduce_sum(self.sums, self.processes)
            if not torch.isfinite(self.sums).all():
                diverged(self.args.out)
        self.unreadable = union_of(self.unreadable, self.processes)
        if not self.processes.is_main:
            self.sums = self.sums * 0
            return
        checkpoint = self.header | {"model": self.averaged.state_dict(), "metrics": self.metrics}
        if name == "last.pt":
            training = {"step": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            training |= {"precision": self.precision, "bad": self.bad, "unreadable": sorted(self.unreadable)}
            training |= {"line": self.line} if self.line else {}
            training |= {"evaluations": self.evaluations.values, "best": self.evaluations.best}
            if self.names:
                sums = self.sums.cpu() / self.processes.world_size
                training |= {"names": self.names, "logged": self.logged, "sums": sums}
            if self.averaged is not self.model:
                training["model"] = self.model.state_dict()
            checkpoint["training"] = training
        save_checkpoint(self.args.out / name, checkpoint)

    def finish(self) -> dict:
        """Evaluate, draw the curves, and write model.pt, which says that the run is finished; returns the metrics."""
        out = self.args.out
        # This state may just have been evaluated; --epochs 0 without a data directory has nothing to evaluate on.
        if not self.evaluations.ended_early and len(self.val[0]):
            self.prepare_average()
            self.metrics = self.evaluate()
            line = {"step": self.plan.total_steps, "epoch": self.plan.epochs, **self.metrics}
            if self.processes.is_main and line not in read_metrics(out)[-1:]:  # it is there if a kill came just now
                append_metrics(out, **line)
            self.judge({"step": self.step} | self.metrics)
        if best := self.evaluations.best:
            self.averaged.load_state_dict(best["model"])
            self.metrics = best["metrics"]
            print0(f"the best of {len(self.evaluations.values)} evaluations was that of step {self.metrics['step']}")
        if self.processes.is_main:
            draw_curves(out)
        self.save("model.pt")
        self.save("last.pt")
        top1 = self.metrics.get("val_top1", math.nan)  # of no images where --epochs 0 had no data directory
        print0(f"{out / 'model.pt'}: val_top1 {top1:.2f} on {len(self.val[0])} images")
        if num := len(self.unreadable) + len(self.bad):
            print0(f"{num} images were unreadable and left out")
        if self.stop():
            raise SystemExit(143)
        return self.metrics


# ----------------------------------------------------------------------------------------------------------------------
# results: the rows of robustness.json, seeds together, with their intervals; a table and a picture of them
# ----------------------------------------------------------------------------------------------------------------------

# Student's t at 97.5 percent, 1 to 10 degrees of freedom.
T_95 = [12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139]


class Row(NamedTuple):
    """A row of the table: a model, or the same model with several seeds."""

    name: str
    paths: list[str]  # of checkpoints, one a seed
    entries: list[dict]
    seeds: list[str]
    values: dict[str, list[float]]  # {heading: a value a seed}, of what all of them have
    nums: dict[str, int]  # {heading: images behind the value}, where it is a share of images

    @property
    def model(self) -> str:
        """The folder of the checkpoints: teacher, control, student1 ..."""
        return Path(self.paths[0]).absolute().parent.name

    def cell(self, heading: str) -> str:
        """Of several seeds mean +- standard deviation, of one the value +- half of its 95 percent interval."""
        values = self.values.get(heading, [])
        if len(values) == 1 and heading in self.nums:
            return f"{values[0]:.2f} ± {half_interval(values[0] / 100, self.nums[heading]):.2f}"
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}" if values else "-"


def half_interval(share: float, num: int) -> float:
    """Half the width, in points, of the 95 percent interval of a share of `num` images."""
    return 196 * math.sqrt(share * (1 - share) / num)


def interval_over_seeds(differences: np.ndarray) -> tuple[float, float]:
    """(mean, half of the 95 percent t interval) of one difference a seed, n >= 2."""
    freedom, z = len(differences) - 1, 1.959964
    # Above 10 degrees of freedom Cornish and Fisher's series is right to 0.002.
    series = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t = T_95[freedom - 1] if freedom <= len(T_95) else series
    return float(differences.mean()), float(t * differences.std(ddof=1) / math.sqrt(len(differences)))


def details_of(labels: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict:
    """What is behind a top-1: how sure it is, and which classes it comes from. `predicted`: -1 of unreadable images.

    interval95: half the width of the 95 percent interval of top1, in points. balanced_top1: the mean recall of the
    classes that val has. `right`: a bit an image, in the order of val, base64. confusion: images, true class by row.
    """
    seen, num_classes = predicted >= 0, len(classes)
    true, said = labels[seen], predicted[seen]
    num, named = (np.bincount(column, minlength=num_classes) for column in (true, said))
    right = np.bincount(true[true == said], minlength=num_classes)
    details = {"balanced_top1": 100 * float((right[num > 0] / num[num > 0]).mean())}
    details["interval95"] = half_interval(right.sum() / num.sum(), num.sum())
    counts = zip(classes, num.tolist(), named.tolist(), right.tolist(), strict=True)
    details["per_class"] = {
        name: {"num": n, "recall": 100 * k / n if n else None, "precision": 100 * k / m if m else None}
        for name, n, m, k in counts
    }
    if num_classes <= 100:
        confusion = np.bincount(true * num_classes + said, minlength=num_classes**2)
        details["confusion"] = confusion.reshape(num_classes, num_classes).tolist()
    return details | {"right": base64.b64encode(np.packbits(predicted == labels).tobytes()).decode()}


def paired_difference(one: dict, other: dict) -> tuple[float, float]:
    """How much better `one` is than `other`, both `details_of` the same images: (points, half the 95 percent interval).

    b and c images are right in one alone: (b - c) / n +- 1.96 sqrt(b + c - (b - c)^2 / n) / n.
    """
    bits = (np.frombuffer(base64.b64decode(entry["right"]), np.uint8) for entry in (one, other))
    first, second = (np.unpackbits(packed).astype(bool) for packed in bits)
    num = sum(of_class["num"] for of_class in one["per_class"].values())
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    return 100 * (b - c) / num, 196 * math.sqrt(b + c - (b - c) ** 2 / num) / num


def rows_of(results: dict[str, dict], shown: list[tuple[dict, dict]]) -> list[Row]:
    """The rows of the table. Paths that differ in one folder seedN alone are one model.

    shown: of each entry the values and the numbers of images as a Row has them, one a heading.
    """
    groups = {}
    for (path, entry), columns in zip(results.items(), shown, strict=True):
        seed = [None, *re.finditer(r"(?<![^/])seed\d+(?=/)", path)][-1]
        model = path[: seed.start()] + "seed*" + path[seed.end() :] if seed else path
        groups.setdefault(model, []).append((path, seed and seed.group(), entry, *columns))
    names = short_names([model if len(found) > 1 else found[0][0] for model, found in groups.items()])
    rows = []
    for found, name in zip(groups.values(), names, strict=True):
        paths, seeds, entries, values, nums = zip(*found, strict=True)
        shared = [heading for heading in values[0] if all(heading in of_seed for of_seed in values)]
        name += f" ({len(entries)} seeds)" if len(entries) > 1 else ""
        values = {heading: [of_seed[heading] for of_seed in values] for heading in shared}
        rows.append(Row(name, list(paths), list(entries), list(seeds), values, nums[0]))
    return rows


def short_names(paths: list[str]) -> list[str]:
    """runs/demo/student1/model.pt -> student1; the whole path where two share that name."""
    folders = [Path(path).absolute().parent.name for path in paths]
    return [path if folders.count(folder) > 1 else folder for path, folder in zip(paths, folders, strict=True)]


def difference(one: Row, other: Row, heading: str = "clean top-1") -> tuple[float, float, int] | None:
    """(points by which `one` is better, half the 95 percent interval, seeds) over the seeds that both have; with one
    seed image by image, which says nothing of other seeds, and 0. None where neither can be said."""
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    if not (heading in one.values and heading in other.values):
        return None
    if len(seeds) > 1:
        first, second = (np.array([r.values[heading][r.seeds.index(seed)] for seed in seeds]) for r in (one, other))
        return *interval_over_seeds(first - second), len(seeds)
    if heading == "clean top-1" and len(one.entries) == len(other.entries) == 1:
        return *paired_difference(one.entries[0]["clean"], other.entries[0]["clean"]), 0
    return None


def compare(rows: list[Row]) -> list[str]:
    """A line with the differences of the clean top-1 to `control`, or to the first row."""
    base = next((row for row in rows if row.model == "control"), rows[0])
    found = [(row.name, difference(row, base)) for row in rows if row is not base]
    words = [f"{name} {known[0]:+.2f} ± {known[1]:.2f}" for name, known in found if known]
    nums = sorted({known[2] for _, known in found if known})
    kind = f"over {' or '.join(map(str, nums))} seeds" if any(nums) else "image by image"
    head = f"Clean top-1 against {base.name}, {kind}, with 95 percent intervals:"
    return [f"{head} {', '.join(words)}."] if words else []


def verdict(rows: list[Row], selection: dict, is_rising: bool) -> str:
    """A paragraph on what self-training gained over `control`, from the numbers alone; "" where one of them is missing.

    selection: what balanced.json says of the last student's images. is_rising: it was still getting better at the end.
    """
    models = {row.model: row for row in rows}
    students = [row for row in rows if row.model.startswith("student")]
    if "control" not in models or not students or not (found := difference(students[-1], models["control"])):
        return ""
    student, (points, half, num_seeds) = students[-1], found
    over = f"Over {num_seeds} seeds" if num_seeds else "With one seed"
    better = f"{abs(points):.1f} points {'better' if points >= 0 else 'worse'} than control"
    words = [
        f"{over} {student.model} is {better}, the same training on the labelled images alone (clean top-1, 95 percent "
        f"interval {points - half:+.1f} to {points + half:+.1f} points{'' if num_seeds else ', image by image'})."
    ]
    advice = []
    if not num_seeds:
        words.append("One seed is no evidence: equal trainings with other random numbers lie points apart.")
        advice.append('several seeds (SEEDS="0 1 2 3 4")')
    elif abs(points) <= half:
        words.append("The interval holds 0: these seeds do not show that the unlabelled images changed anything.")
        advice.append("more seeds")
    else:
        kind = "helped" if points > 0 else "did harm"
        words.append(f"The interval leaves out 0, so chance is an unlikely cause: the unlabelled images {kind}.")
    for other, heading in (("teacher", "clean top-1"), ("control", "corrupted top-1")):
        if other in models and (found := difference(student, models[other], heading)):
            words.append(f"Against {other}, {heading}: {found[0]:+.1f} ± {found[1]:.1f} points.")
    if selection:
        share = selection["unique_images"] / max(selection["images"], 1)
        right = selection.get("truth", {}).get("accuracy_after")
        by_val = selection.get("calibration", {}).get("at", {}).get("precision")
        known = f", {right:.1f} percent of their labels right" if right is not None else ""
        if num_no_class := selection.get("truth", {}).get("num_no_class_passed"):
            known = f", {num_no_class} of no class"
            known += f"; of the others {right:.1f} percent of the labels are right" if right is not None else ""
        if right is None and by_val is not None:
            right = 100 * by_val
            known = f"; of images of val above the threshold {right:.1f} percent were right"
        of, above = " of the last seed" if num_seeds else "", f"; confidence above {selection['threshold']:g}"
        above = "" if selection.get("method") == "top-p" else above
        words.append(
            f"The last selection{of} kept {selection['unique_images']} of {selection['images']} unlabelled images "
            f"({100 * share:.0f} percent{above}){known}."
        )
        if right is not None and right < 85:
            advice.append("a higher threshold or more labelled images, for many pseudo-labels are wrong")
        if share < 0.3:
            advice.append("more labelled images or a lower threshold, for most unlabelled images are left out")
    top1 = np.mean(models.get("teacher", student).values.get("clean top-1", 100))
    if top1 < 60:
        advice.append(f"more labelled images or more STEPS, for the teacher is right on only {top1:.0f} percent")
    if (num := student.nums.get("clean top-1", 1000)) < 200:
        advice.append(f"more held-out images (val/), for {num} say little")
    if is_rising:
        advice.append("longer runs (STEPS), for the student was still getting better")
    return " ".join(words) + (f" To try next: {'; '.join(advice)}." if advice else "")


def worst_pairs(row: Row, num: int = 10) -> list[str]:
    """A line with the pairs of classes that the model confuses most: true -> said, how many of the true one."""
    clean = row.entries[0].get("clean", {})
    if "confusion" not in clean or "clean top-1" not in row.values:
        return []
    images, names = np.array(clean["confusion"]), list(clean["per_class"])
    wrong = images - np.diag(images.diagonal())
    pairs = zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:num], wrong.shape), strict=True)
    words = [f"{names[t]} -> {names[s]} {wrong[t, s]} of {images[t].sum()}" for t, s in pairs if wrong[t, s]]
    return [f"- {row.name}: {', '.join(words)}"] if words else []


def history_of(rows: list[Row]) -> tuple[dict, bool]:
    """Of the last student: what 03 says of its images, balanced.json beside the file in its `inputs`, and whether its
    val top-1 still rose, by more than half a point, between the last two evaluations."""
    students = [row for row in rows if row.model.startswith("student")]
    if not students:
        return {}, False
    path = Path(students[-1].paths[-1])
    inputs = read_checkpoint(path).get("inputs", {})
    reports = {name: beside(Path(name), ".json") for name in inputs if os.path.isfile(name)}
    same = [report for name, report in reports.items() if report.is_file() and file_sha256(name) == inputs[name]]
    found = (json.loads(report.read_text()) for report in same)
    selection = next((report for report in found if "unique_images" in report), {})
    top1 = [line["val_top1"] for line in read_metrics(path.parent) if "val_top1" in line]
    return selection, len(top1) > 1 and top1[-1] > top1[-2] + 0.5


def markdown_table(rows: list[Row], headings: list[str]) -> str:
    """A line a model, a column for what was measured of any, aligned for reading in a terminal too."""
    table = [["model", "parameters", *headings]]
    for row in rows:
        parameters = f"{row.entries[0]['parameters'] / 1e6:.2f}M" if "parameters" in row.entries[0] else "-"
        table.append([row.name, parameters, *map(row.cell, headings)])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in table]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_rows(rows: list[Row], headings: list[str], extra: tuple[str, ...], file: Path) -> None:
    """Bars for the top-1 columns; with corruptions top-1 against severity (without the `extra` ones), and of each; the
    confusion matrix of the last row, of up to 40 classes."""
    if (plt := pyplot()) is None:
        return
    headings = [heading for heading in headings if not re.search("mCE|mFR|mFP", heading)]
    corrupted = "corrupted top-1" in headings
    drawn = [entry["corrupt"] for row in rows if "corrupted top-1" in row.values for entry in row.entries]
    names = dict.fromkeys(name for entry in drawn for name in entry["per_corruption"])  # files differ in their order
    confused = next((row for row in reversed(rows) if "confusion" in row.entries[0].get("clean", {})), None)
    confused = confused and (confused if len(confused.entries[0]["clean"]["per_class"]) <= 40 else None)
    num_panels = 1 + 2 * corrupted + bool(confused)
    figure, ((bars, *panels),) = plt.subplots(
        ncols=num_panels, figsize=(3 + 4 * num_panels, 4.4), squeeze=False, layout="constrained"
    )
    places, width = np.arange(len(headings)), 0.84 / len(rows)
    for number, row in enumerate(rows):
        color, found = f"C{number % 10}", [row.values.get(heading, [np.nan]) for heading in headings]
        heights = [np.mean(values) for values in found]
        group = bars.bar(places + width * number, heights, width, color=color, label=row.name)
        bars.bar_label(group, fmt="%.0f", fontsize=7, label_type="center", color="white")
        for place, values in zip(places + width * number, found, strict=True):  # every seed a dot
            if len(values) > 1:
                bars.plot([place] * len(values), values, "o", color="white", markeredgecolor="black", markersize=4)
        if "corrupted top-1" in row.values:
            found = [entry["corrupt"]["per_corruption"] for entry in row.entries]
            top1 = [[of_seed.get(name, [np.nan] * 5) for name in names] for of_seed in found]
            top1, counts = np.mean(top1, axis=0), [name not in extra for name in names]  # (corruptions, 5)
            panels[0].plot(range(1, 6), top1[counts].mean(axis=0), "o-", color=color)
            panels[1].plot(top1.mean(axis=1), range(len(names)), "o", color=color, alpha=0.8)
    bars.set_xticks(places + width * (len(rows) - 1) / 2, [heading.replace(" ", "\n") for heading in headings])
    bars.set_ylabel("top-1 in percent")
    if corrupted:
        panels[0].set(xlabel="severity", ylabel="top-1 in percent, mean of the corruptions", xticks=range(1, 6))
        panels[1].set(xlabel="top-1 in percent, mean of the severities", yticks=range(len(names)))
        panels[1].set_yticklabels([name.replace("_", " ") for name in names])
        panels[1].invert_yaxis()
        panels[1].grid(alpha=0.3)
    if confused:
        clean = confused.entries[0]["clean"]
        images, names = np.array(clean["confusion"]), list(clean["per_class"])
        panels[-1].imshow(images / images.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        panels[-1].set(xlabel="said", ylabel="true class", title=f"{confused.name}, share of the class")
        panels[-1].set_xticks(range(len(names)), names, rotation=90)
        panels[-1].set_yticks(range(len(names)), names)
    figure.legend(loc="outside upper center", ncols=min(5, len(rows)), frameon=False)
    save_figure(plt, file)


# ----------------------------------------------------------------------------------------------------------------------
# pictures
# ----------------------------------------------------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot drawing to files, or None (and a line that says so) where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110, "font.size": 9})
    plt.rcParams["text.parse_math"] = False  # a class may be called a$b$c
    return plt


def save_figure(plt, path: Path) -> None:
    with write_atomically(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a class name in a script that the font lacks
        plt.savefig(temporary, format="png", bbox_inches="tight")
    plt.close("all")


SHEET = {"most confident": 6, "median": 5, "least confident": 5}  # images of a class in the picture
SIDE, CAPTION = 64, 17  # pixels: of a thumbnail, and of the line below it
SHEET_LEFT = [68 * i + 20 * group for i, group in enumerate(np.repeat(range(3), [*SHEET.values()]).tolist())]  # pixels


def of_sheet(num: int) -> np.ndarray:
    """Which of `num` images, in the order of their confidence, are drawn: the first, those in the middle, the last."""
    first, middle, last = SHEET.values()
    if num <= first + middle + last:
        return np.arange(num)
    begin = (num - middle) // 2
    return np.unique(np.r_[:first, begin : begin + middle, num - last : num])


def draw_sheet(images: list, examples, shown: list[int]) -> Image.Image:
    """A row of thumbnails a class, with their confidences below: one canvas, for 640 axes would take a minute."""
    sheet = Image.new("RGB", (SHEET_LEFT[-1] + SIDE, len(shown) * (SIDE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, c in enumerate(shown):
        of_class = np.flatnonzero((examples.label == c) & examples.is_first)
        of_class = of_class[np.argsort(-examples.confidence[of_class], kind="stable")]
        top = line * (SIDE + CAPTION)
        if not len(of_class):
            pen.text((0, top + SIDE // 2), "no image is kept", "gray")
        for left, i in zip(SHEET_LEFT, of_class[of_sheet(len(of_class))], strict=False):
            pen.text((left + SIDE // 2, top + SIDE + 1), f"{examples.confidence[i]:.2f}", "black", anchor="ma")
            with contextlib.suppress(Exception):  # moved or damaged since it was labelled: its place stays empty
                image = images[examples.file[i]].load(int(examples.row[i]), enough=2 * SIDE)
                sheet.paste(ImageOps.fit(image, (SIDE, SIDE)), (left, top))
    return sheet


def draw_selection(path: Path, images: list[ImageList], classes: list[str], examples, report: dict, histogram) -> None:
    """Class sizes before and after, the confidences, the calibration, some images of each class; copies count once.

    `report`: what stage 03's balanced.json says. `histogram`: of all confidences, in equal bins from 0 to 1.
    """
    if (plt := pyplot()) is None:
        return
    sizes = report["classes"]
    shown = sorted(range(len(classes)), key=lambda c: -sizes[classes[c]]["candidates"])
    shown = shown if len(shown) <= 40 else shown[:20] + shown[-20:]  # those with the most images and the fewest
    names = [name if len(name) <= 32 else name[:31] + "…" for name in (classes[c] for c in shown)]
    sheet = draw_sheet(images, examples, shown)

    # Every place is fixed, from the bottom left, in inches and then in shares: a layout engine would draw twice.
    dpi, angle = plt.rcParams["savefig.dpi"], 90 if len(names) > 12 else 30  # of the names of the classes
    names_height = 0.6 + 0.08 * max(map(len, names)) * np.sin(np.radians(angle))
    heights = np.array([sheet.height / dpi, names_height, 3, *((0.8, 2.2) if "calibration" in report else ())])
    figure = plt.figure(figsize=(sheet.width / dpi, heights.sum()))
    sheet_height, names_height, height, *curve_height = heights / heights.sum()

    axis = figure.add_axes((0, sheet_height + names_height, 0.54, height))
    places = np.arange(len(shown))
    for shift, what in ((-0.3, "candidates"), (0, "above_threshold"), (0.3, "examples")):
        axis.bar(places + shift, [sizes[classes[c]][what] for c in shown], 0.3, label=what.replace("_", " "))
    axis.set_xticks(places, names, rotation=angle, ha="right", va="center", rotation_mode="anchor")

    axis = figure.add_axes((0.62, sheet_height + names_height, 0.38, height))
    edges = np.linspace(0, 1, len(histogram) + 1)
    axis.stairs(histogram, edges, fill=True, label="all")
    axis.stairs(
        np.histogram(examples.confidence[examples.is_first], len(histogram), (0, 1))[0], edges, fill=True, label="kept"
    )
    if report["method"] == "noisy-student":
        axis.axvline(report["threshold"], color="black", linestyle=":", label=f"threshold {report['threshold']:g}")
    axis.set_xlabel("confidence")
    for axis in figure.axes:
        axis.set_ylabel("images")
        axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))

    axis = figure.add_axes((0, 0, 1, sheet_height))
    axis.imshow(sheet, aspect="auto", interpolation="none")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_xticks([SHEET_LEFT[column] for column in np.cumsum([0, *SHEET.values()])[:-1]], SHEET, ha="left")
    axis.set_yticks(places * (SIDE + CAPTION) + SIDE / 2, names)

    if "calibration" in report:
        axis = figure.add_axes((0, 1 - curve_height[1], 1, curve_height[1]))
        curve = [point for point in report["calibration"]["curve"] if point["kept"]]
        thresholds = [point["threshold"] for point in curve]
        for what, label in (("precision", "right, of those above the threshold"), ("share", "above the threshold")):
            (line,) = axis.plot(thresholds, [point[what] for point in curve], label=label)
            intervals = np.transpose([point[f"{what}_interval"] for point in curve])
            axis.fill_between(thresholds, *intervals, color=line.get_color(), alpha=0.25, linewidth=0)
        axis.axvline(report["threshold"], color="black", linestyle=":")
        axis.set(xlabel="threshold of the confidence", ylabel="share of val, and 95 % interval", ylim=(0, 1))
        axis.legend(frameon=False)
    save_figure(plt, path)


def draw_curves(out: Path) -> None:
    """curves.png from metrics.jsonl: the losses, the val top-1, the learning rate, against epochs."""
    if (plt := pyplot()) is None:
        return
    lines = read_metrics(out)
    _, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, names in zip(
        axes, (("loss", "loss_labeled", "loss_unlabeled", "val_loss"), ("val_top1",), ("lr",)), strict=True
    ):
        for name in names:
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if name.startswith("val") else "", label=name)
        axis.set_xlabel("epoch (passes over the labelled images)")
        if axis.has_data():
            axis.legend(frameon=False)
    axes[1].set_ylabel("percent")
    save_figure(plt, out / "curves.png")
