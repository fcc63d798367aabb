"""What the stages share: everything that would be a silent bug if two of them did it differently.

The rooms, in the order of the file; a stage's imports say which of them it needs.

the program       flags and their types, @FILE; fail (status 2); files written whole or not at all
processes         those of torchrun, sums over them; signals, seeds, progress
models            EfficientNet, the table of sizes and recipes; build_model
weights           --init: weights of torchvision and timm, and how their images must look
noise             rand_augment and its ops; the official noise of small images
views             load_image; the clean view and the random crop
listing           images of folders and shards, labels, held-out images
batches           ImageDataset; the images of a step or an evaluation; loaders
label files       logits.h5 and balanced.h5
optimization      a run's length and rate; RMSprop; EMA and SWA
checkpoints       model.pt and last.pt; may a run be continued? metrics.jsonl
training          the model that the flags describe; precision, DDP, evaluate
the training run  Run: what happens around a step
pictures          matplotlib, curves.png
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import unicodedata
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# ----------------------------------------- the program ------------------------------------------


def is_rank0() -> bool:
    """Whether this is the one process of those that torchrun started that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def print0(*words) -> None:
    """Print from rank 0 alone, at once: the output may be a file that somebody watches."""
    if is_rank0():
        print(*words, flush=True)


def fail(message: str, from_any: bool = False, status: int = 2) -> NoReturn:
    """The user's mistake: one line on stderr, status 2. `from_any`: not from rank 0 alone."""
    if from_any or is_rank0():
        print("error:", message.replace("\n", " "), file=sys.stderr, flush=True)
    raise SystemExit(status)


def diverged(out: Path) -> NoReturn:
    fail(f"the training diverged; {out} keeps the last good state: lower --lr", status=3)


class OneLineParser(argparse.ArgumentParser):
    """A mistake is one line; `@FILE` stands for the flags in a file, `#` begins a comment in it."""

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message} (see --help)")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return line.partition("#")[0].split()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the lines of a stage's docstring."""


def check_torchrun_variables() -> None:
    """End the program if not all of torchrun's variables are set: it would write nothing or hang."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    complete = len(given) == len(names) and "MASTER_ADDR" in os.environ
    if given and (not complete or int(given["RANK"]) >= int(given["WORLD_SIZE"])):
        message = f"the environment has {given}, but not as torchrun sets them: unset"
        fail(f"{message} {' '.join(given)}", from_any=True)


def argument_parser(description: str) -> OneLineParser:
    """A parser that shows defaults, reads @FILE, and takes no abbreviated flags: a typo fails."""
    check_torchrun_variables()
    for number in (signal.SIGTERM, signal.SIGINT):  # from here on they end the stage quietly
        signal.signal(number, lambda *_: sys.exit(143))
    options = {"allow_abbrev": False, "fromfile_prefix_chars": "@"}
    return OneLineParser(description=description, formatter_class=HelpFormatter, **options)


def at_least(low: float, kind: type = float, high: float = math.inf, words: tuple = ()) -> Callable:
    """An argparse type: a finite number of this kind from `low` to `high`, or one of the words."""

    def parse(text: str):
        if text in words:
            return text
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


def text_like(pattern: str) -> Callable:
    """An argparse type: a text that the pattern matches."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text} is not of the form {pattern}")
        return text

    return parse


RATE = at_least(0, high=1)
COUNT = at_least(1, int)
SWITCH = argparse.BooleanOptionalAction  # --flag and --no-flag


class Length(argparse.Action):
    """--epochs and --steps: the last one on the command line counts, so it can follow a recipe."""

    def __call__(self, parser, args, value, option=None):
        args.epochs = args.steps = None
        setattr(args, self.dest, value)


def path_or_published(text: str) -> Path | str:
    return text if text == "published" else Path(text)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Of the model and of the noise of its input."""
    add = parser.add_argument_group("model").add_argument
    add("--init", type=path_or_published, help="weights to start from: a file, or `published` ones of --arch")
    add("--arch", help="[tf_]efficientnet_b0..b7, _l0.._l2, torchvision's, timm/NAME; None: --init's, teacher's, B0")
    add("--image-size", type=COUNT, help="pixels; None: as --init, the teacher or the images have it")
    add("--crop-mode", choices=CROP_MODES, help="clean view: middle square, or all; None: as --init or the teacher")
    add("--small-images", action=SWITCH, help="model and noise for 32 pixels; None: as --init or the teacher")
    add("--dropout", type=RATE, help="rate before the classifier; None: the model's own (B0 0.2 ... B7 0.5)")
    add("--drop-path", type=RATE, help="stochastic depth of the last block; None: the model's own (paper: 0.2)")
    add("--bn-momentum", type=RATE, help="a batch's weight in running statistics; 0: frozen; None: 0.01, --init: 0")
    add("--zero-init-residual", action="store_true", help="blocks start as the identity: short runs learn sooner")
    add = parser.add_argument_group("noise of the input").add_argument
    add("--num-ops", type=at_least(0, int), help="RandAugment ops an image; None: 2; B0, B1: 0 without --magnitude")
    add("--magnitude", type=at_least(0), help="of RandAugment, on a scale of 10; None: B2 6 ... B7, L* 27, else 9")
    add("--min-crop-area", type=RATE, help="smallest crop, share of the area; None: 0.7 up to 64 pixels, else 0.08")
    add("--hflip", action=SWITCH, default=True, help="mirror half of the images; --no-hflip for digits")


def add_optimization_flags(parser: argparse.ArgumentParser, from_scratch: bool = True) -> None:
    """`from_scratch`: with a warm-up and an average, for which a fine-tuning is too short."""
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=COUNT, default=256, help="labelled images a step, all processes (paper: 2048)")
    add("--accumulate", type=COUNT, default=1, help="split the batch in N: less memory; norms see 1 / N")
    length = "None: 700 up to B4, else 350; with --init 30" if from_scratch else "None: 1.5 or 200 steps"
    add("--epochs", type=at_least(0), action=Length, help=f"passes over the labelled images; {length}")
    steps = at_least(0, int, words=("auto",))
    add("--steps", type=steps, action=Length, help="in place of --epochs; auto: as many as the images need")
    add("--optimizer", choices=list(RATES), default="rmsprop", help="rmsprop: TensorFlow's (paper)")
    add("--lr", type=at_least(0), help="peak rate; None: the optimizer's, per 256 images; --init: for any batch")
    schedules = r"staircase|cosine|constant|[1-9]\d*:\d*\.?\d+" + ("|plateau" if from_scratch else "")
    schedule_help = "None: staircase (paper), --init cosine; constant, plateau (not 05), N:FACTOR"
    add("--schedule", type=text_like(schedules), help=schedule_help)
    if from_scratch:
        add("--warmup-epochs", type=at_least(0), default=5.0, help="linear warm-up; at most a fifth of the run")
        average = at_least(0, high=1, words=("swa",))
        add("--average", type=average, default=0.9999, help="decay of the weight average; 0: off; swa: equal mean")
        add("--classifier-lr", type=at_least(0), default=1.0, help="the classifier's share of the rate")
    add("--weight-decay", type=at_least(0), help="not of norms; None: rmsprop 1e-5 (paper), sgd 1e-4, adamw 0.05")
    add("--label-smoothing", type=RATE, default=0.1, help="of hard labels; None: 0.1, 0 if --consistency")


def add_run_flags(parser: argparse.ArgumentParser, evaluates: bool = True) -> None:
    """`evaluates`: on val during the training too, not only at its end."""
    add = parser.add_argument_group("run").add_argument
    if evaluates:
        add("--eval-every", type=at_least(0), help="epochs between evaluations; None: 1, or 250 steps")
        add("--patience", type=COUNT, help="end after this many evaluations that are no better; None: never")
    add("--save-every", type=COUNT, default=1000, help="steps between saving last.pt: what a crash can cost")
    seed = text_like(r"\d+(:.+)?")  # 7, or 7:student1: a round's numbers are not another round's
    add("--seed", type=seed, default="0", help="of all random numbers: N, or N:NAME for independent ones")
    add("--compile", action="store_true", help="torch.compile the model: a minute at the start, faster steps")
    add_device_flags(parser)


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Of every stage that runs a model; 02 and 06, which do not train, have these alone."""
    add = parser.add_argument
    add("--workers", type=at_least(0, int), help="loaders a process; None: CPUs 0, GPUs their share of the cores")
    precisions = ["auto", "fp32", "bf16", "fp16"]
    add("--precision", choices=precisions, default="auto", help="auto: GPUs bf16, or fp16 without it; CPUs fp32")


def flags_of(args: argparse.Namespace) -> dict:
    """The flags as plain values, with absolute paths: what a checkpoint may hold."""
    return {k: os.path.abspath(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; at the end sync and rename it, or remove it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")  # process ids may be equal
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:  # some systems sync only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # no permission, a full disk, a folder of that name
        fail(f"{path} cannot be written: {error.strerror or error}; what was there before is kept")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def optional(module: str, package: str = "", what: str | Path = "--arch timm/NAME"):
    """A module that only `what` needs; where it is not installed the program ends."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        fail(f"{what} needs a package that is not installed: pip install {package or module}")


def digest_of_bytes(data: bytes) -> bytes:
    """What tells the bytes of an image file from those of another: blake2b, 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


# ------------------------------------------ processes -------------------------------------------


def seed_words(seed: int | str, stream: str, *numbers: int) -> list[int]:
    """The seed of a random generator. Each stream has a word of its own: streams share no numbers.

    All randomness is a function of these words, never of what ran before: that is what makes a
    resumed run equal an uninterrupted one. The name in a seed N:NAME is part of the stream.
    """
    num, _, name = str(seed).partition(":")
    return [int(num), zlib.crc32(f"{name} {stream}".strip().encode()), *numbers]


def seed_word(seed: int | str, stream: str, *numbers: int) -> int:
    """`seed_words` as one number of 63 bits, for torch."""
    words = np.random.SeedSequence(seed_words(seed, stream, *numbers))
    return int(words.generate_state(1, np.uint64)[0] >> 1)


class Processes(NamedTuple):
    """This process's place among those that torchrun started."""

    device: torch.device
    rank: int
    world_size: int
    workers: int  # loaders of each process


def init_processes(workers: int | None = None, connect: bool = True) -> Processes:
    """This process's device and rank; alone without torchrun. `connect`: to exchange tensors."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            fail(f"process {local_rank} has no GPU, there are {torch.cuda.device_count()}", from_any=True)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if workers is None:
        workers = min(16, os.cpu_count() // local_size) if device.type == "cuda" else 0
    if world_size > 1 and connect:
        # gloo beside nccl carries the stop flag without waiting for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A process may list files for long.
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        atexit.register(dist.destroy_process_group)
    return Processes(device, rank, world_size, workers)


def reduce_sum(tensor: Tensor, processes: Processes) -> Tensor:
    """The sum over all processes, in place."""
    if processes.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


# Kept: gloo's thread may let go of it after Python's end, and abort.
BUFFER = torch.zeros(8, dtype=torch.float64)


def sum_of(processes: Processes, *numbers: float) -> list[float]:
    """The sums over all processes of a few numbers on the CPU. It does not wait for a GPU."""
    BUFFER.zero_()[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    return reduce_sum(BUFFER, processes)[: len(numbers)].tolist()


class StopSignal:
    """SIGTERM and SIGINT set `received`: the process stops where it can save. A second one kills."""

    def __init__(self):
        self.received = False
        self.since = math.inf  # when the first one came
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        # torchrun passes the first one on: that makes two, in milliseconds.
        if time.monotonic() - self.since > 0.5:
            os._exit(143)
        self.received = True
        self.since = min(self.since, time.monotonic())


def ignore_signals(worker: int) -> None:
    """A worker outlives the signal: its process decides when to stop, after saving."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def progress(iterable: Iterable, name: str, total: int, processes: Processes, start: int = 0):
    """The same items, with a tqdm bar of rank 0 on a terminal."""
    if processes.rank == 0 and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(iterable, name, total, initial=start, dynamic_ncols=True, leave=False)
    return iterable


# -------------------------------------------- models --------------------------------------------


class SamePadConv2d(nn.Conv2d):
    """TensorFlow's SAME padding: ceil(size / stride) pixels out, the odd one bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for size in (x.shape[3], x.shape[2]):  # F.pad takes the last dimension first
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, stride, groups=self.groups)


def conv_norm(inputs, outputs, kernel, stride=1, groups=1, eps=1e-3, tf=False, activation=True):
    """Convolution, batch norm (official momentum 0.99, which torch counts as 0.01) and SiLU."""
    if tf and stride > 1:  # at stride 1 TensorFlow's padding is symmetric too
        conv = SamePadConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(outputs, eps=eps, momentum=0.01)]
    return nn.Sequential(*layers, nn.SiLU(inplace=True)) if activation else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(mean))))


class Recipe(NamedTuple):
    """How the official script trains a model (local_scripts/imagenet/train.sh:37-76)."""

    epochs: float
    num_ops: int  # of RandAugment
    magnitude: float  # of RandAugment
    ratio: float  # unlabeled images per labeled one


MODELS = {  # width, depth, training resolution in pixels, final dropout, and the Recipe
    "efficientnet_b0": (1.0, 1.0, 224, 0.2, 700, 0, 0, 1),
    "efficientnet_b1": (1.0, 1.1, 240, 0.2, 700, 0, 0, 3),
    "efficientnet_b2": (1.1, 1.2, 260, 0.3, 700, 2, 6, 3),
    "efficientnet_b3": (1.2, 1.4, 300, 0.3, 700, 2, 12, 3),
    "efficientnet_b4": (1.4, 1.8, 380, 0.4, 700, 2, 15, 3),
    "efficientnet_b5": (1.6, 2.2, 456, 0.4, 350, 2, 18, 3),
    "efficientnet_b6": (1.8, 2.6, 528, 0.5, 350, 2, 24, 3),
    "efficientnet_b7": (2.0, 3.1, 600, 0.5, 350, 2, 27, 3),
    "efficientnet_l0": (2.8, 3.7, 380, 0.5, 350, 2, 27, 3),  # dropout and recipe of L0, L1: B7's,
    "efficientnet_l1": (3.9, 3.7, 380, 0.5, 350, 2, 27, 3),  # for they were published for L2 only
    "efficientnet_l2": (4.3, 5.3, 475, 0.5, 350, 2, 27, 14),  # ratio: the paper's
}
EFFICIENTNETS = {name: row[:4] for name, row in MODELS.items()}
RECIPES = {name: Recipe(*row[4:]) for name, row in MODELS.items()}
OTHER_RECIPE = Recipe(350, 2, 9, 3)  # RandAugment's own setting for ResNet-50 (1909.13719)
TIMM_NOISE = {"dropout": 0.2, "drop_path": 0.2}  # B0's: timm's models have both off by default


def recipe_of(arch: str, args: argparse.Namespace) -> Recipe:
    """The recipe of a model; flags that were given replace its values."""
    flags = {name: getattr(args, name, None) for name in Recipe._fields}
    recipe = RECIPES.get(arch.removeprefix("tf_"), OTHER_RECIPE)
    if args.init:
        recipe = recipe._replace(epochs=30)  # our choice
    asks_for_ops = flags["num_ops"] is not None or flags["magnitude"] is not None
    if recipe.num_ops == 0 and asks_for_ops:
        # B0 and B1 have none: the flag that is not given gets a usual value (0 is not off).
        recipe = recipe._replace(num_ops=OTHER_RECIPE.num_ops, magnitude=OTHER_RECIPE.magnitude)
    return recipe._replace(**{name: value for name, value in flags.items() if value is not None})


# B0: repeats, kernel, stride, expansion, channels out (official efficientnet_builder.py:123-131).
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
    """To a multiple of 8, at most 10 percent down (official efficientnet_model.py:119-134)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class MBConv(nn.Module):
    """Inverted residual block; stochastic depth: an image skips it with probability `drop_path`."""

    def __init__(self, inputs, outputs, kernel, stride, expand, drop_path, conv_norm):
        super().__init__()
        expanded = inputs * expand
        layers = [conv_norm(inputs, expanded, 1)] if expand > 1 else []
        layers += [
            conv_norm(expanded, expanded, kernel, stride, groups=expanded),
            SqueezeExcitation(expanded, max(1, inputs // 4)),  # a quarter of the block's *input*
            conv_norm(expanded, outputs, 1, activation=False),
        ]
        self.block = nn.Sequential(*layers)
        self.has_skip = stride == 1 and inputs == outputs
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if not self.has_skip:
            return y
        if self.training and self.drop_path > 0:
            keep = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop_path
            y = y * (keep / (1 - self.drop_path)).to(y.dtype)
        return x + y


class EfficientNet(nn.Module):
    """EfficientNet (Tan & Le 2019) as in the official code: (N, 3, H, W) -> logits (N, classes).

    `small_images`: the official variant for 32 pixels, whose stages 2 and 3 keep their resolution.
    `drop_path`: block i of n is dropped with probability drop_path * i / n (0.2 is the paper's
    survival 0.8). `zero_init_residual`: blocks with a skip start as the identity (1706.02677).
    """

    def __init__(
        self, width, depth, dropout, num_classes, eps, tf, small_images=False, drop_path=0.2, zero_init_residual=False
    ):
        super().__init__()
        layer = partial(conv_norm, eps=eps, tf=tf)
        channels = round_channels(32 * width)
        stages = [layer(3, channels, 3, 2)]
        num_blocks = sum(math.ceil(depth * stage[0]) for stage in STAGES)
        index = 0
        for number, (repeats, kernel, first_stride, expand, out) in enumerate(STAGES, start=1):
            stride = 1 if small_images and number in (2, 3) else first_stride
            out = round_channels(out * width)
            blocks = []
            for _ in range(math.ceil(depth * repeats)):
                rate = drop_path * index / num_blocks  # official efficientnet_model.py:469-483
                blocks.append(MBConv(channels, out, kernel, stride, expand, rate, layer))
                channels, stride = out, 1
                index += 1
            stages.append(nn.Sequential(*blocks))
        head = round_channels(1280 * width)
        self.features = nn.Sequential(*stages, layer(channels, head, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(head, num_classes))
        self.init_weights(tf, zero_init_residual)

    def init_weights(self, tf: bool, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # TensorFlow counts the fan-out of one group (official efficientnet_model.py:74-98),
                # torchvision that of all: smaller depthwise weights, which AdamW moves sooner.
                fan_out = module.kernel_size[0] ** 2 * module.out_channels
                fan_out = fan_out // module.groups if tf else fan_out
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if zero_init_residual and isinstance(module, MBConv) and module.has_skip:
                nn.init.zeros_(module.block[-1][1].weight)  # the last batch norm's
        # Official: U(+-1/sqrt(classes)), 0.03 for ImageNet. For 10 classes it would be 0.3 and
        # nearly every image confident at once, so never more than ImageNet's (deviation).
        linear = self.classifier[1]
        bound = 1 / math.sqrt(max(linear.out_features, 1000))
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def build_model(arch: str, num_classes: int = 1000, **arch_options) -> nn.Module:
    """Build a model by name, with fresh weights; ValueError for an unknown name or option.

    `efficientnet_b0` ... `_l2`: torchvision's numbers; `tf_efficientnet_...`: TensorFlow's padding
    and batch-norm eps; `timm/NAME`: timm's; `resnext101_32xNd`: any N; others: torchvision's
    `get_model`. Options (None: the model's own): `small_images`, `dropout`, `drop_path`,
    `zero_init_residual`, and timm's `img_size`.
    """
    options = {name: value for name, value in arch_options.items() if value is not None}
    name = arch.removeprefix("tf_")
    if name in EFFICIENTNETS:
        width, depth, _, dropout = EFFICIENTNETS[name]
        # torchvision's B0 to B4 have torch's eps; its B5 to B7, and all of TensorFlow's, 1e-3.
        eps = 1e-5 if arch in list(EFFICIENTNETS)[:5] else 1e-3
        dropout = options.pop("dropout", dropout)
        return EfficientNet(width, depth, dropout, num_classes, eps, tf=arch != name, **options)
    if arch.startswith("timm/"):
        create = optional("timm").create_model
        names = {"dropout": "drop_rate", "drop_path": "drop_path_rate", "zero_init_residual": "zero_init_last"}
    else:
        from torchvision import models

        create = models.get_model
        if arch in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": True, "transform_input": True}
        names = {"drop_path": "stochastic_depth_prob"}
    options = {names.get(option, option): value for option, value in options.items()}
    resnext = re.fullmatch(r"resnext101_32x([1-9]\d*)d", arch)  # 1905.00546: a teacher of 32x48d
    if resnext:
        options.update(groups=32, width_per_group=int(resnext[1]))
    name = "resnet101" if resnext else arch.removeprefix("timm/")
    try:
        if name == arch and arch not in models.list_models(module=models):  # the others fetch weights
            raise ValueError("torchvision has no such classifier")
        return create(name, num_classes=num_classes, **options)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # each has its own way
        raise ValueError(f"cannot build {arch!r} with {arch_options}; timm's are timm/NAME: {error}") from error


def fuse_batch_norms(model: nn.Module) -> None:
    """Fold batch norms into the convolutions before them, in place: the same function, faster."""
    model.eval()
    for module in list(model.modules()):
        for (name, conv), (next_name, norm) in pairwise(list(module.named_children())):
            # Not timm's BatchNormAct2d, with an activation inside; not a LambdaLayer's norm_q.
            is_pair = isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d
            if is_pair and conv.out_channels == norm.num_features:
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """0: inference mode. A few small noised batches would only disturb published statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            if momentum == 0:
                module.eval()


# ------------------------------------------- weights --------------------------------------------

# timm's names of an EfficientNet's layers: ours, which are torchvision's. First blocks do not expand.
TIMM_TOP = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
TIMM_TOP |= {"conv_head": "features.8.0", "bn2": "features.8.1"}
TIMM_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1"}
TIMM_BLOCK |= {"conv_pwl": "3.0", "bn3": "3.1", "se.conv_reduce": "2.fc1", "se.conv_expand": "2.fc2"}
TIMM_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "2.0", "bn2": "2.1"}
TIMM_FIRST |= {"se.conv_reduce": "1.fc1", "se.conv_expand": "1.fc2"}


def timm_to_own(name: str) -> str:
    """Our (torchvision's) name of a tensor of timm's EfficientNet."""
    layer, _, tensor = name.rpartition(".")
    match = re.fullmatch(r"blocks\.(\d)\.(\d+)\.(.+)", layer)
    if not match:
        return f"{TIMM_TOP.get(layer, layer)}.{tensor}"
    stage, block, part = match.groups()
    names = TIMM_FIRST if stage == "0" else TIMM_BLOCK
    return f"features.{int(stage) + 1}.{block}.block.{names.get(part, part)}.{tensor}"


def own_names(weights: dict, like: Iterable[str] = ()) -> dict[str, Tensor]:
    """A state_dict by our names: out of its containers, without prefixes, timm's translated.

    `like`: the names that the model has; timm's own model keeps timm's.
    """
    # Averaged weights first; twice, for an --init that is such a file is in a container of ours.
    for container in 2 * ("model_ema", "state_dict_ema", "state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(container), dict):
            weights = weights[container]
    items = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise ValueError("not a state_dict: some entries are not named tensors")
    renamed = {re.sub(r"^((module|_orig_mod)\.)+", "", name): weights[name] for name in weights}
    # of torch's AveragedModel, and of the classifiers in the middle of GoogLeNet and Inception
    renamed = {k: v for k, v in renamed.items() if not re.match(r"n_averaged$|aux[12]\.|AuxLogits\.", k)}
    if "conv_stem.weight" in renamed and "conv_stem.weight" not in like:
        return {timm_to_own(name): tensor for name, tensor in renamed.items()}
    return renamed


def head_names(model: nn.Module) -> list[str]:
    """The layers that give the logits: the last one; timm's models say, and may have two."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if not hasattr(model, "get_classifier"):
        return list(layers)[-1:]
    heads = model.get_classifier()
    heads = nn.ModuleList(heads if isinstance(heads, tuple) else [heads])
    inside = set(heads.modules())  # some heads are several layers
    return [n for n, m in layers.items() if m in inside and len(m.weight) == model.num_classes]


def load_weights(model: nn.Module, state_dict: dict, new_head: bool = False) -> None:
    """Load a state_dict of this toolkit, torchvision or timm.

    ValueError names what is missing, extra or of another shape. `new_head`: the last layer starts
    at zero. Random weights would stay as noise wherever few training images touch them.
    """
    own = model.state_dict()
    weights = own_names(state_dict, own)
    if new_head:
        heads = head_names(model)
        weights |= {name: torch.zeros(t.shape) for name, t in own.items() if name.rpartition(".")[0] in heads}
    weights = OrderedDict(weights)
    weights._metadata = {"": {"version": model._version}}  # MNASNet asks for it
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:1000]) from error


def torchvision_view(weights) -> "View":
    """How images must look for a member of torchvision's enums of weights."""
    record = weights.transforms()
    size = record.crop_size[0]
    fraction = size / record.resize_size[0]
    return View(size, fraction, record.interpolation.value, tuple(record.mean), tuple(record.std))


def published_weights(arch: str, image_size: int | None) -> dict:
    """The published weights of a model, by torchvision's or timm's own download."""
    from torchvision import models

    download = os.environ.get("HF_HOME", "~/.cache/huggingface")  # timm's folder
    try:
        if arch.startswith(("timm/", "tf_")):
            name = arch.removeprefix("timm/")
            view = view_of(f"timm/{name}")
            view = view.at(image_size or view.image_size)
            options = img_size_option(f"timm/{name}", view.image_size)  # a ViT's positions are resized
            model = optional("timm").create_model(name, pretrained=True, **options)
        else:
            weights = models.get_model_weights(arch).DEFAULT
            download = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
            view = torchvision_view(weights)
            model = models.get_model(arch, weights=weights)
    except Exception as error:  # no such model, no network, a damaged file
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        fail(f"--init published: no weights of {arch} ({reason}); a damaged download is in {download}: delete it")
    return {"arch": arch, "model": model.state_dict(), **view._asdict()}


def view_of_file(path: Path, arch: str) -> "View":
    """How images must look for a file of foreign weights, as far as its name says.

    A file that torchvision does not know is taken for the first that it published of that model,
    which is right for the semi-supervised ResNets (1905.00546).
    """
    from torchvision import models

    # TensorFlow's weights: size / (size + 32), bicubic (official preprocessing.py:104-134).
    if arch.startswith(("tf_", "efficientnet_l")):
        name = "/".join(path.absolute().parts[-4:])  # Hugging Face's cache names a folder
        size = view_of(arch).image_size
        if arch == "tf_efficientnet_l2" and not re.search(r"ns(_jft_in1k)?_475", name):
            size = 800  # trained at 475, tuned for 800
        view = View.default(size)
        is_advprop = re.search(r"[._]ap[-._]", name)
        return view._replace(mean=(0.5,) * 3, std=(0.5,) * 3) if is_advprop else view
    if arch.startswith("timm/"):
        return view_of(arch)  # timm's record of the model, whatever the file
    if arch not in models.list_models(module=models):  # resnext101_32x16d
        return View(224, 224 / 256, "bilinear")
    published = list(models.get_model_weights(arch))
    same_name = [weights for weights in published if Path(weights.url).name == path.name]
    return torchvision_view((same_name or published)[0])


def initial_weights(init: str | Path, arch: str | None, image_size: int | None) -> dict:
    """--init, as a checkpoint or a dict like one: arch, model (the weights) and the view."""
    source = {} if init == "published" else read_file(init)
    if isinstance(source, dict) and "format" in source:  # a checkpoint of this toolkit
        return source
    if not arch:
        fail(f"--init {init}: --arch must say of which model these weights are")
    if init == "published":
        return published_weights(arch, image_size)
    return {"arch": arch, "model": source, **view_of_file(Path(init), arch)._asdict()}


def load_initial_weights(model: nn.Module, source: dict, args, classes: list[str]) -> bool:
    """Start from --init. Returns whether its classifier fits: it has the same classes in order."""
    try:
        weights = own_names(source, model.state_dict())
        if "classes" in source:
            same_classes = source["classes"] == classes
        else:  # of a foreign file only their number is known
            same_classes = len(weights.get(f"{head_names(model)[0]}.weight", ())) == len(classes)
        load_weights(model, weights, new_head=not same_classes)
    except ValueError as error:
        at_size = " at this --image-size" if img_size_option(source["arch"], 1) else ""  # of a ViT
        fail(f"--init {args.init} does not fit --arch {args.arch or source['arch']}{at_size}: {error}")
    return same_classes


def timm_config(arch: str):
    """timm's record of a model's published weights, None where it has none or no such model."""
    return optional("timm").get_pretrained_cfg(arch.removeprefix("timm/"))


def fixes_size(initial: Mapping) -> bool:
    """Whether --init is for one image size: a checkpoint of this toolkit, or weights of a ViT."""
    return "format" in initial or bool(img_size_option(initial.get("arch", ""), 1))


def img_size_option(arch: str, image_size: int) -> dict[str, int]:
    """The option of models that are made for one size of images, as a ViT is; else none."""
    if arch.startswith("vit_"):  # torchvision's
        return {"image_size": image_size}
    config = timm_config(arch) if arch.startswith("timm/") else None
    return {"img_size": image_size} if config and config.fixed_input_size else {}


# -------------------------------------------- noise ---------------------------------------------
# RandAugment (Cubuk et al., 1909.13719) as the official Noisy Student code runs it, on whole
# batches. Magnitudes are on a scale of 10 without a cap: the paper's 27 is 2.7 times each op's
# range (rotate by 81 degrees). torchvision's 27 is on a scale of 30 (27 degrees), timm clamps it to
# 10. An op maps uint8 (N, 3, H, W) to the same; `sign` (N,) is +1 or -1. Draws come from
# `generator` on the CPU, so all devices get the same noise. Source: official randaugment.py.


def put(images: Tensor, rows: Tensor, values: Tensor) -> None:
    if images.device.type == "cpu":
        images.numpy()[rows.numpy()] = values.numpy()  # 20 times as fast as torch's
    else:
        images.index_copy_(0, rows.to(images.device, non_blocking=True), values)


def table_lookup(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each pixel by its entry in tables (N, 3, 256), (N, 1, 256) or (256,), clipped."""
    tables = tables.clamp(0, 255).to(images.device, torch.uint8)  # truncates, as Pillow does
    return tables.expand(len(images), 3, 256).gather(2, images.flatten(2).long()).view_as(images)


def blend(degenerate: Tensor, images: Tensor, magnitude: float) -> Tensor:
    """degenerate + factor * (image - degenerate), truncated as in Pillow. At 5 nothing changes."""
    factor = 1.8 * magnitude / 10 + 0.1  # official range 0.1 to 1.9
    degenerate = degenerate.float()
    return (images - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def grayscale(images: Tensor) -> Tensor:
    """ITU-R 601 luma as Pillow rounds it, int32 (N, 1, H, W)."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768) >> 16


@lru_cache(maxsize=64)
def source_pixels(height: int, width: int, matrix: tuple, device: torch.device) -> Tensor:
    """Where each pixel comes from in the flattened image, int64 (H * W,); H * W: from outside."""
    a, b, c, d, e, f = matrix
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    source_x = (a * x + b * y + c + 0.5).floor().long()
    source_y = (d * x + e * y + f + 0.5).floor().long()
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    return torch.where(inside, source_y * width + source_x, height * width).flatten().to(device)


def geometric(matrix: Callable) -> Callable:
    """The op that makes out(x, y) = in(a x + b y + c, d x + e y + f), nearest, grey 128 outside.

    matrix(images, m): (a, ..., f) at the signed magnitude m, in pixel indices as TensorFlow counts.
    """

    def op(images, magnitude, sign, generator):
        flat = F.pad(images.flatten(2), (0, 1), value=128)  # the last pixel is what lies outside
        moved = torch.empty_like(images.flatten(2))
        for s in set(sign.tolist()):  # at most two transforms in a batch
            rows = (sign == s).nonzero().squeeze(1)
            index = source_pixels(*images.shape[2:], matrix(images, s * magnitude), images.device)
            values = flat.index_select(0, rows.to(images.device, non_blocking=True))
            if images.device.type == "cpu":  # numpy's take is faster than torch's index_select
                values = torch.from_numpy(values.numpy().take(index.numpy(), axis=2, mode="clip"))
            else:
                values = values.index_select(2, index)
            put(moved, rows, values)
        return moved.view_as(images)

    return op


def rotation(images: Tensor, m: float) -> tuple:
    """By 3 m degrees around the middle."""
    y, x = ((length - 1) / 2 for length in images.shape[2:])
    cos, sin = math.cos(math.radians(3 * m)), math.sin(math.radians(3 * m))
    return cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos


def pixels(images: Tensor, official: int, m: float) -> float:
    """m / 10 of the official length; of size // 8 up to 64 pixels (preprocessing.py:189-224)."""
    size = min(images.shape[2:])
    return (official if size > 64 else size // 8) * m / 10


def auto_contrast(images, magnitude, sign, generator):
    low = images.flatten(2).amin(2, keepdim=True).double()
    high = images.flatten(2).amax(2, keepdim=True).double()
    # As Pillow's int(ix * scale + offset); torch takes number / tensor as number * (1 / tensor).
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    return table_lookup(images, torch.where(high > low, levels * scale - low * scale, levels))


def equalize(images, magnitude, sign, generator):
    levels = torch.arange(256, device=images.device)
    planes = images.flatten(0, 1).flatten(1)
    first_bins = 256 * torch.arange(len(planes), dtype=torch.int32, device=images.device)
    index = (planes + first_bins[:, None]).flatten()  # 256 bins for each plane, one after the other
    histogram = index.new_zeros(256 * len(planes))  # bincount would wait for a GPU
    histogram = histogram.scatter_add_(0, index.long(), torch.ones_like(index)).view(-1, 3, 256)
    last = histogram.gather(2, images.flatten(2).amax(2, keepdim=True).long())  # of the brightest level
    step = (planes.shape[1] - last) // 255  # pixels a level should have
    below = (histogram.cumsum(2) - histogram).double()  # pixels darker than the level
    return table_lookup(images, torch.where(step > 0, (below + step // 2) / step, levels))


def posterize(images, magnitude, sign, generator):
    """Keep int(4 M/10) bits; above M = 10, where that wraps, torchvision's 8 - round(4 M/30)."""
    bits = int(4 * magnitude / 10) if magnitude <= 10 else 8 - round(4 * magnitude / 30)
    return images & (256 - 2 ** (8 - max(1, bits)))


def solarize(images, magnitude, sign, generator):
    """Invert from int(256 M/10) up; above M = 10 that wraps: from torchvision's 255 (1 - M/30)."""
    threshold = int(256 * magnitude / 10) if magnitude <= 10 else 255 * (1 - magnitude / 30)
    levels = torch.arange(256)
    return table_lookup(images, torch.where(levels < threshold, levels, 255 - levels))


def solarize_add(images, magnitude, sign, generator):
    levels = torch.arange(256)
    return table_lookup(images, torch.where(levels < 128, levels + int(magnitude / 10 * 110), levels))


def contrast(images, magnitude, sign, generator):
    """Blend with the mean grey (official: with the pixel count over 256, tensorflow/tpu#825)."""
    total = grayscale(images).flatten(2).sum(2, keepdim=True).double()  # float32 would round it
    mean = (total / images[0, 0].numel() + 0.5).floor()
    return table_lookup(images, blend(mean, torch.arange(256, device=images.device), magnitude))


def brightness(images, magnitude, sign, generator):
    return table_lookup(images, torch.arange(256.0) * (1.8 * magnitude / 10 + 0.1))


def sharpness(images, magnitude, sign, generator):
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the outermost pixels stay."""
    wide = images.short()  # sums of nine uint8
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    smooth = total.float().div_(13).add_(0.5).floor_()
    out = images.clone()
    out[..., 1:-1, 1:-1] = blend(smooth, images[..., 1:-1, 1:-1], magnitude)
    return out


def cutout(images, magnitude, sign, generator):
    return cut_squares(images, int(pixels(images, 40, magnitude)), generator)


def cut_squares(images: Tensor, half: int, generator: torch.Generator | None) -> Tensor:
    """Grey squares of 2 * half pixels a side around uniformly drawn pixels, cut off at the edge."""
    centers = torch.rand(len(images), 2, generator=generator) * torch.tensor(images.shape[2:])
    inside = []
    for center, size in zip(centers.long().unbind(1), images.shape[2:], strict=True):
        distance = torch.arange(size) - center[:, None]
        inside.append((distance >= -half) & (distance < half))
    hole = (inside[0][:, None, :, None] & inside[1][:, None, None]).to(images.device, non_blocking=True)
    return (images * ~hole).add_(hole.byte() * 128)  # 4 times as fast as masked_fill


RAND_AUGMENT_OPS = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": lambda images, magnitude, sign, generator: 255 - images,
    "Rotate": geometric(rotation),
    "Posterize": posterize,
    "Solarize": solarize,
    "Color": lambda images, magnitude, sign, generator: blend(grayscale(images), images, magnitude),
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": geometric(lambda images, m: (1, 0.3 * m / 10, 0, 0, 1, 0)),
    "ShearY": geometric(lambda images, m: (1, 0, 0, 0.3 * m / 10, 1, 0)),
    "TranslateX": geometric(lambda images, m: (1, 0, pixels(images, 100, m), 0, 1, 0)),
    "TranslateY": geometric(lambda images, m: (1, 0, 0, 0, 1, pixels(images, 100, m))),
    "SolarizeAdd": solarize_add,
    "Cutout": cutout,
}


def rand_augment(images: Tensor, num_ops=2, magnitude=27, generator=None, resolution=None) -> Tensor:
    """Apply `num_ops` ops, drawn for each image with replacement: uint8 (N, 3, H, W) -> the same.

    `generator`: a CPU generator (None: torch's own). `resolution`: the side in pixels for which the
    official sizes of translation and cutout are meant, a model's own (B0 224 ... B7 600). Images
    between 64 pixels and it get them in proportion: B7's 270 pixels would empty most images of 224.
    Source: official randaugment.py:530-554 (the op's probability there is never used).
    """
    images = images.clone(memory_format=torch.contiguous_format)
    ops = torch.randint(len(RAND_AUGMENT_OPS), (num_ops, len(images)), generator=generator)
    signs = torch.randint(2, (num_ops, len(images)), generator=generator) * 2 - 1
    side = min(images.shape[2:])
    in_pixels = magnitude  # of the ops whose sizes are in pixels
    if resolution and 64 < side < resolution:
        in_pixels = magnitude * side / resolution
    fits_cache = max(1, 2**18 // math.prod(images.shape[1:]))  # images in 256 KB
    chunk = fits_cache if images.device.type == "cpu" else len(images)
    for drawn, sign in zip(ops, signs, strict=True):
        for number, (name, op) in enumerate(RAND_AUGMENT_OPS.items()):
            level = in_pixels if name in ("TranslateX", "TranslateY", "Cutout") else magnitude
            for rows in (drawn == number).nonzero().squeeze(1).split(chunk):  # on the CPU: no sync
                if len(rows) > 0:
                    chosen = images.index_select(0, rows.to(images.device, non_blocking=True))
                    put(images, rows, op(chosen, level, sign[rows], generator))
    return images


def small_image_noise(images: Tensor, hflip: bool, generator: torch.Generator | None = None) -> Tensor:
    """The official noise of 32 pixels, after RandAugment (preprocessing.py:189-224).

    A grey square of half the side; a shift by up to an eighth of it, reflected at the edge; half of
    the images mirrored, if `hflip`. uint8 (N, 3, H, W) -> the same.
    """
    num, _, height, width = images.shape
    size = min(height, width)
    images = cut_squares(images, size // 4, generator)  # 16 x 16 of 32 pixels, official
    shifts = torch.randint(-(size // 8), size // 8 + 1, (num, 2), generator=generator)  # y, x
    mirrored = torch.rand(num, 1, generator=generator) < (0.5 if hflip else 0)
    y = (torch.arange(height) + shifts[:, :1]).abs()
    x = (torch.arange(width) + shifts[:, 1:]).abs()
    y = height - 1 - (height - 1 - y).abs()  # reflected at the far edge too
    x = width - 1 - (width - 1 - x).abs()
    x = torch.where(mirrored, x.flip(1), x)
    index = (y[:, :, None] * width + x[:, None, :]).flatten(1).to(images.device, non_blocking=True)
    return images.flatten(2).gather(2, index[:, None].expand(-1, 3, -1)).view_as(images)


def add_noise(images, generator, recipe: Recipe, resolution, small_images, hflip) -> Tensor:
    """What the input of a training step gets after cropping: uint8 (N, 3, H, W) -> the same."""
    if recipe.num_ops > 0:
        images = rand_augment(images, recipe.num_ops, recipe.magnitude, generator, resolution)
    return small_image_noise(images, hflip, generator) if small_images else images


# -------------------------------------------- views ---------------------------------------------

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of values in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
# Most CVEs are in the other decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def load_image(file: str | Path | BinaryIO, enough: int = 0) -> Image.Image:
    """Read an image as RGB, as a person would see it.

    EXIF rotation is applied, 16-bit grey scaled, alpha laid over grey 128. `enough`: an upright
    JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while its short side keeps that many pixels,
    which is faster. Raises whatever the decoder raises, and above 179 million pixels.
    """
    # EXIF data is often bad, and Pillow warns of it.
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if enough and image.format == "JPEG" and upright:
            image.draft(None, (enough, enough))
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range")
    if image.mode.startswith("I"):  # Pillow's own convert() clips 16 bits at 255: a white image
        pixels = np.asarray(image, dtype=np.uint32) >> 8
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        grey = Image.new("RGBA", image.size, (128, 128, 128, 255))
        image = Image.alpha_composite(grey, image)
    return image.convert("RGB")


CROP_MODES = ("center", "squash")


class View(NamedTuple):
    """How a model sees an image when it labels or is tested; every checkpoint has these fields.

    center: the middle square of side crop_fraction x short side, resized to image_size. squash: all
    of the image, whatever its shape, resized to image_size / crop_fraction, and of that the middle.
    """

    image_size: int  # pixels
    crop_fraction: float
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_mode: str = "center"

    @classmethod
    def of(cls, checkpoint: Mapping) -> "View":
        view = cls(**{name: checkpoint[name] for name in cls._fields if name in checkpoint})
        if view.crop_mode not in CROP_MODES:
            fail(f"crop_mode is {view.crop_mode!r}, expected one of {', '.join(CROP_MODES)}")
        return view

    @classmethod
    def default(cls, image_size: int, crop_mode: str = "center") -> "View":
        """size / (size + 32) of the short side (official preprocessing.py), all of small images."""
        shows_all = crop_mode == "squash" or image_size <= 64
        fraction = 1.0 if shows_all else image_size / (image_size + 32)
        return cls(image_size, fraction, crop_mode=crop_mode)

    @property
    def enough(self) -> int:
        """Pixels of an image's short side that leave the resize twice what it needs."""
        return math.ceil(2 * self.image_size / self.crop_fraction)

    def at(self, image_size: int, crop_mode: str | None = None) -> "View":
        """The view at another size or in another mode, with the crop fraction usual there."""
        crop_mode = crop_mode or self.crop_mode
        view = self._replace(image_size=image_size, crop_mode=crop_mode)
        if crop_mode != self.crop_mode or (image_size != self.image_size and crop_mode == "center"):
            view = view._replace(crop_fraction=View.default(image_size, crop_mode).crop_fraction)
        return view


def view_of(arch: str) -> View:
    """The clean view that a model is meant for; of its own models timm keeps a record."""
    config = timm_config(arch) if arch.startswith("timm/") else None
    if config is None:
        _, _, resolution, _ = EFFICIENTNETS.get(arch.removeprefix("tf_"), (1, 1, 224, 0))
        return View.default(resolution)
    # border is the whole image in a grey square: here the whole image, its crop_pct is 1 too.
    crop_mode = "squash" if config.crop_mode == "border" else config.crop_mode
    mean, std = tuple(config.mean), tuple(config.std)
    return View(config.input_size[-1], config.crop_pct, config.interpolation, mean, std, crop_mode)


class Crop(NamedTuple):
    """How a model sees an image in training: a random part of it, perhaps mirrored."""

    image_size: int  # pixels
    min_area: float | None  # smallest share of the area; None: the clean view, for small images
    hflip: bool
    crop_mode: str = "center"  # of the clean view


def eval_view(image: Image.Image, view: View) -> np.ndarray:
    """The clean view, what a teacher labels: antialiased, uint8 (size, size, 3)."""
    size = view.image_size
    resample = Image.Resampling[view.interpolation.upper()]
    if view.crop_mode == "squash":
        side = int(size / view.crop_fraction)  # what is outside the middle is cut off
        left = round((side - size) / 2)  # as torchvision's CenterCrop
        image = image.resize((side, side), resample)
        return np.asarray(image.crop((left, left, left + size, left + size)))
    side = max(1, int(view.crop_fraction * min(image.size)))  # pixels of the original
    left = (image.width - side + 1) // 2  # official preprocessing.py:104-134
    top = (image.height - side + 1) // 2
    image = image.crop((left, top, left + side, top + side))  # resize(box=...) looks around the box
    return np.asarray(image.resize((size, size), resample))


def random_view(image: Image.Image, crop: Crop, rng: np.random.Generator) -> np.ndarray:
    """Inception crop: `min_area` to all of the area, aspect 3/4 to 4/3, bicubic, perhaps mirrored.

    Official preprocessing.py:81-102 tries 10 times and then takes the clean view. Areas and
    log-aspects are uniform, as in torchvision; TensorFlow draws heights uniformly (deviation).
    """
    size = crop.image_size
    clean = View.default(size, crop.crop_mode)
    if crop.min_area is None:  # small_image_noise moves and mirrors it later
        return eval_view(image, clean)
    for _ in range(10):
        area = image.width * image.height * rng.uniform(crop.min_area, 1)  # pixels
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = rng.integers(image.width - width + 1)
            top = rng.integers(image.height - height + 1)
            part = image.crop((left, top, left + width, top + height))
            view = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
            break
    else:
        view = eval_view(image, clean)
    return view[:, ::-1] if crop.hflip and rng.random() < 0.5 else view


def normalize(images: Tensor, view: View) -> Tensor:
    """uint8 (N, 3, H, W) -> float32, standardized, channels_last (2 to 5 times as fast on CPUs)."""
    mean = torch.tensor(view.mean, device=images.device).view(1, 3, 1, 1) * 255  # of 0..255
    std = torch.tensor(view.std, device=images.device).view(1, 3, 1, 1) * 255
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


# ------------------------------------------- listing --------------------------------------------

# What file managers and network disks leave behind: thumbnails and deleted files.
JUNK = {"@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "lost+found", "System Volume Information"}
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class ImageList:
    """Where images are: the file `path` below `root`; in a shard `size` > 0 bytes at `offset`."""

    root: str
    path: np.ndarray  # fixed-length bytes (N,), sorted; in a shard `name.tar/member`
    offset: np.ndarray  # int64 (N,)
    size: np.ndarray  # int64 (N,)

    @classmethod
    def of(cls, root: str, members: list[tuple[bytes, int, int]]) -> "ImageList":
        """The list of these (path, offset, size), sorted by path."""
        path, offset, size = zip(*sorted(members), strict=True) if members else ((), (), ())
        return cls(root, np.array(path, "S"), np.array(offset, np.int64), np.array(size, np.int64))

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows) -> "ImageList":
        return ImageList(self.root, self.path[rows], self.offset[rows], self.size[rows])

    def name(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.path[row]))

    def open(self, row: int) -> BinaryIO:
        name, size = self.name(row), int(self.size[row])
        if not size:
            return open(name, "rb")
        path = next((folder for folder in Path(name).parents if folder.is_file()), name)
        with open(path, "rb") as shard:
            shard.seek(int(self.offset[row]))
            return io.BytesIO(shard.read(size))

    def load(self, row: int, enough: int = 0) -> Image.Image:
        with self.open(row) as file:
            return load_image(file, enough)


def shard_members(root: str, path: str) -> Iterator[tuple[bytes, int, int]]:
    """(path below root, offset, size) of the images in one plain .tar file."""
    try:
        with tarfile.open(os.path.join(root, path), "r:") as shard:
            for member in shard:
                shard.members.clear()  # a shard may have millions
                parts = Path(member.name).parts  # without the . of ./a.jpg
                is_junk = any(part.startswith(".") or part in JUNK for part in parts)
                if member.isreg() and member.name.lower().endswith(EXTENSIONS) and not is_junk:
                    name = os.fsencode(f"{path}/{member.name}")  # ImageList.open takes it apart
                    yield name, member.offset_data, member.size
            shard.fileobj.seek(shard.offset)  # tarfile takes what is no header for the end
            if shard.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError("no header of a member, and not the end")
    except (OSError, tarfile.TarError) as error:
        fail(f"{os.path.join(root, path)} is no plain .tar file, or damaged ({error})")


def list_images(root: str | Path) -> ImageList:
    """All images below `root`, sorted by path, links followed; .tar shards are read in place."""
    root, members = os.path.abspath(root), []
    junk = []
    for folder, folders, names in os.walk(root, onerror=lambda error: print0(f"not seen: {error}"), followlinks=True):
        junk += JUNK.intersection(folders)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in JUNK]
        for name in names:
            path = os.path.join(folder, name).removeprefix(root).lstrip("/")
            if name.startswith("."):
                continue
            if name.lower().endswith(COMPRESSED):
                fail(f"{root}/{path} is compressed: images are read in place, from plain .tar files")
            if name.lower().endswith(".tar"):
                members += shard_members(root, path)
            elif name.lower().endswith(EXTENSIONS):
                members.append((os.fsencode(path), 0, 0))
            elif name.lower().endswith((".heic", ".heif")):
                junk.append("HEIC, which is not read")
    if junk:
        print0(f"{root}: {len(junk)} are left out: {', '.join(sorted(set(junk)))}")
    return ImageList.of(root, members)


def is_held_out(paths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The val set of data without one: a tenth, by the path's hash, never a class's last image."""
    hashes = np.array([zlib.crc32(path) for path in paths.tolist()], dtype=np.int64)
    held_out = hashes < 2**32 // 10
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if held_out[of_class].all():
            held_out[of_class[hashes[of_class].argmax()]] = False
    return held_out


def digests_of(images: ImageList) -> frozenset[bytes]:
    """The digests of val's readable files, so that nothing trains on a renamed copy of one."""
    digests = set()
    for row in range(len(images)):
        with contextlib.suppress(OSError), images.open(row) as file:
            digests.add(digest_of_bytes(file.read()))
    return frozenset(digests - {digest_of_bytes(b"")})  # an empty file is unreadable, and no copy


def check_copies(train: ImageList, labels: np.ndarray, val: ImageList) -> None:
    """Tell of images of val that are in train too (many end the program) or under two classes.

    Byte for byte. Only files of equal size are read, and none of more than 200,000: it takes minutes.
    """
    if not is_rank0() or len(train) + len(val) > 200_000:
        return
    places = {}  # {size in bytes: [(list, row, class)]}
    for images, kinds in ((val, np.full(len(val), -1)), (train, labels)):
        for row in range(len(images)):
            with contextlib.suppress(OSError):
                size = int(images.size[row]) or os.path.getsize(images.name(row))
                if size:  # files of no bytes are no copies: a bad image stops no run
                    places.setdefault(size, []).append((images, row, int(kinds[row])))
    first, copies, twice = {}, {}, {}  # {name: line}
    for same_size in places.values():
        if len({kind for _, _, kind in same_size}) > 1:
            for images, row, kind in same_size:
                with contextlib.suppress(OSError), images.open(row) as file:
                    digest = digest_of_bytes(file.read())
                    kind_of_first, name = first.setdefault(digest, (kind, images.name(row)))
                    if kind != kind_of_first:
                        pairs = copies if kind_of_first < 0 else twice
                        pairs[name] = f"{name} = {images.name(row)}"
    if twice:
        print0(f"{len(twice)} images are under two classes, byte for byte: {'; '.join([*twice.values()][:3])}")
    if copies:
        few = "; ".join([*copies.values()][:3])
        message = f"{len(copies)} images of val/ are byte for byte in train/ too: {few}"
        if len(copies) > len(val) / 50:
            fail(f"{message}: what is trained on cannot be measured: remove them from one of the two")
        print0(message)


def judged_half(images: ImageList) -> np.ndarray:
    """Which images of val are kept for judging, bool (N,), by the hash of the path below val.

    One chooses on the others: what a run chooses on an image (a threshold) is no measurement of it
    any more. Another hash than that of `is_held_out`, so that the held-out tenth is halved too.
    """
    is_judged = np.array([digest_of_bytes(path)[0] % 2 == 1 for path in images.path.tolist()], dtype=bool)
    if len(is_judged) > 1 and is_judged.all() == is_judged.any():  # no half of a few images is empty
        is_judged[0] = not is_judged[0]
    return is_judged


def nfc(name: str) -> str:
    """A class's name with composed letters: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", name)


def images_by_class(folder: str | Path, classes: list[str] | None = None):
    """(ImageList, labels int64 (N,), classes) of `folder`/<class>/**, nothing beside these.

    `classes`: the known names in the order of their labels; None: the sorted names of the folders.
    ValueError where there are no class folders, two that differ in case alone, or an unknown one.
    """
    entries = list(os.scandir(folder)) if os.path.isdir(folder) else []
    folders = [e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name not in JUNK]
    names = sorted(map(nfc, folders))
    if not names:
        raise ValueError(f"{folder}: no class folders in it; expected {folder}/<class>/<image>")
    for name, next_name in pairwise(sorted(names, key=str.casefold)):
        if name.casefold() == next_name.casefold():
            raise ValueError(f"{folder}: {name} and {next_name} look like one class in two spellings")
    classes = classes or names
    if unknown := sorted(set(names) - set(classes)):
        missing = sorted(set(classes) - set(names))
        few = f"{', '.join(unknown[:5])}; known ones without a folder: {', '.join(missing[:5]) or 'none'}"
        raise ValueError(f"{folder} has unknown classes: {few}: rename or remove folders")
    label_of = {name: label for label, name in enumerate(classes)}
    number = {os.fsencode(name): label_of[nfc(name)] for name in folders}
    images = list_images(folder)
    labels = np.array([number.get(p.split(b"/")[0], -1) for p in images.path.tolist()], np.int64)
    return images[labels >= 0], labels[labels >= 0], classes


def data_of(args: argparse.Namespace, source: Mapping) -> Path:
    """The data directory: --data, or that of the checkpoint or label file which is the source."""
    if not args.data and not os.path.isdir(source.get("data") or ""):
        fail(f"--data: say where it is, for it is not where it was ({source.get('data')})")
    return args.data or Path(source["data"])


def labeled_images(data: str | Path, split: str, classes: list[str] | None = None):
    """`images_by_class` of DATA/train or DATA/val; without val/ a tenth of train/ is held out."""
    held_out = not (Path(data) / "val").is_dir()
    folder = Path(data) / ("train" if held_out else split)
    try:
        images, labels, classes = images_by_class(folder, classes)
    except ValueError as error:
        fail(str(error))
    if len(classes) == 1 and split == "train":
        inner = sorted(entry.name for entry in os.scandir(folder / classes[0]) if entry.is_dir())
        hint = f"; its folders look like classes: {', '.join(inner[:5])}" if inner else ""
        fail(f"{folder} has one class, {classes[0]}: expected two or more{hint}")
    empty = np.setdiff1d(np.arange(len(classes)), labels)
    if split == "train" and len(empty):
        fail(f"{folder}: class {classes[empty[0]]!r} has no images ({' '.join(EXTENSIONS)})")
    if held_out:
        wanted = is_held_out(images.path, labels) == (split == "val")
        images, labels = images[wanted], labels[wanted]
        if split == "val":
            print0(f"{data} has no val/: {len(images)} images, a tenth of train/, are held out")
    if not len(images):
        fail(f"{folder}: no images for {split}: put some into {data}/{split}/<class>/")
    return images, labels, classes


def unlabeled_images(path: str | Path, data: str | Path | None = None) -> ImageList:
    """The images of a folder, a .tar shard, a label file or a single image file.

    If DATA has no val/, DATA/train gives the images that train and DATA/val the held-out ones.
    `data`: the data directory, whose train/ and val/ must not lie below `path`.
    """
    path = Path(os.path.abspath(path))
    if path.suffix == ".h5":
        return open_label_file(path).images
    if path.is_file():
        root = str(path.parent)
        is_shard = path.suffix.lower() == ".tar"
        members = shard_members(root, path.name) if is_shard else [(os.fsencode(path.name), 0, 0)]
        return ImageList.of(root, list(members))
    no_val = (path.parent / "train").is_dir() and not (path.parent / "val").is_dir()
    if no_val and path.name in ("train", "val"):
        return labeled_images(path.parent, path.name)[0]
    for split in ("train", "val") if data else ():  # train/ or val/ itself may be labelled
        labeled = (Path(data) / split).resolve()
        if labeled.is_dir() and path.resolve() in labeled.parents:
            fail(f"--unlabeled {path} holds the labelled images of {labeled}: name another folder")
    images = list_images(path) if path.is_dir() else ()
    if not len(images):
        fail(f"--unlabeled {path}: no images in it, or no such folder ({' '.join(EXTENSIONS)} and .tar)")
    return images


# ------------------------------------------- batches --------------------------------------------


class Batch(NamedTuple):
    rows: Tensor  # int64 (n,): positions in the dataset of the images that could be read
    views: list[Tensor]  # uint8 (n, 3, H, W) each, channels_last in memory; n may be 0
    errors: list[tuple[int, str]]  # (row, reason) of those that could not


@dataclass(eq=False)
class ImageDataset(torch.utils.data.Dataset):
    """Views of images as uint8. An item is (row, views, error): a list of (H, W, 3), or why not.

    `clean` and `noised`: each that is given makes one view, in this order. The key of an item is
    `row` or `(epoch, row)`: the random view is a function of (seed, stream, epoch, row) alone, so
    workers, processes and interruptions do not change it. `repeated` (M,): row i of the dataset is
    images[repeated[i]]. `held_out`: the digests of val, whose images have neither views nor an
    error. A bad image never stops a run, and no other takes its place.
    """

    images: ImageList
    clean: View | None = None
    noised: Crop | None = None
    seed: int | str = 0
    stream: str = ""
    repeated: np.ndarray | None = None
    held_out: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self.images if self.repeated is None else self.repeated)

    def __getitem__(self, key):
        epoch, row = key if isinstance(key, tuple) else (0, key)
        image_row = row if self.repeated is None else int(self.repeated[row])
        views = []
        try:
            with self.images.open(image_row) as file:
                data = file.read()
            if self.held_out and digest_of_bytes(data) in self.held_out:
                return row, None, None
            # A random crop may need every pixel.
            image = load_image(io.BytesIO(data), 0 if self.noised else self.clean.enough)
            if self.clean:
                views.append(eval_view(image, self.clean))
            if self.noised:
                words = seed_words(self.seed, f"{self.stream} crop", epoch, row)
                views.append(random_view(image, self.noised, np.random.default_rng(words)))
        except Exception as error:  # decoders raise anything
            return row, None, f"{self.images.name(image_row)}: {type(error).__name__}: {error}"
        return row, views, None

    def collate(self, items: list) -> Batch:
        good = [(row, views) for row, views, _ in items if views is not None]
        sizes = [view.image_size for view in (self.clean, self.noised) if view]
        stacks = [np.zeros((0, size, size, 3), np.uint8) for size in sizes]
        if good:
            stacks = [np.stack(stack) for stack in zip(*(views for _, views in good), strict=True)]
        views = [torch.from_numpy(stack).permute(0, 3, 1, 2) for stack in stacks]
        rows = torch.tensor([row for row, _ in good], dtype=torch.int64)
        if torch.utils.data.get_worker_info():
            for tensor in (rows, *views):  # a full /dev/shm: an error here, a hang in torch's thread
                tensor.share_memory_()
        errors = [(row, error) for row, _, error in items if error is not None]
        return Batch(rows, views, errors)


def train_keys(num: int, batch_size: int, seed, stream: str, steps: range, processes: Processes):
    """Yield this process's keys (epoch, row) of each step: endless permutations of `num` images.

    `stream` names the order. A key has its epoch because the random crop depends on it.
    """
    epoch, order = -1, None
    for step in steps:
        keys = []
        first, end = step * batch_size + processes.rank, (step + 1) * batch_size
        for p in range(first, end, processes.world_size):
            if p // num != epoch:  # the positions ascend: one order at a time, it may be large
                epoch = p // num
                order = np.arange(num, dtype=np.int32 if num < 2**31 else np.int64)
                np.random.default_rng(seed_words(seed, f"{stream} order", epoch)).shuffle(order)
            keys.append((epoch, int(order[p % num])))
        yield keys


def grid_keys(num: int, batch_size: int, processes: Processes) -> Iterator[range]:
    """This process's share of the batches of a fixed grid, whatever the number of processes."""
    for first in range(processes.rank * batch_size, num, processes.world_size * batch_size):
        yield range(first, min(first + batch_size, num))


def rows_per_batch(image_size: int, device: torch.device) -> int:
    """How many images a model takes at a time without gradients, by size and device alone."""
    # CPUs are fastest while a batch's activations fit the cache; GPUs take 64 times that.
    fits = 512 * 32**2 / image_size**2 * (64 if device.type == "cuda" else 1)
    return min(2 ** int(math.log2(max(fits, 1))), 1024)


def load_batches(dataset: ImageDataset, keys: Iterable, processes: Processes) -> Iterator[Batch]:
    """Load a Batch for each list (or range) of keys, which are rows or (epoch, row)."""
    # A fork shares millions of paths, spawn copies them; libraries of macOS do not survive it.
    context = "fork" if processes.workers and sys.platform == "linux" else None
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=processes.workers,
        collate_fn=dataset.collate,
        pin_memory=processes.device.type == "cuda",
        multiprocessing_context=context,
        worker_init_fn=ignore_signals,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not processes.workers:
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for worker in active_children():  # they ignore SIGTERM
            worker.kill()
        # Docker gives /dev/shm 64 MB unless it is told otherwise.
        reason = str(error).strip().split("\n")[-1]
        fail(f"the loaders have died ({reason}): try docker run --shm-size 8g, or --workers 0", from_any=True)


def check_parts(num: int, what: str, args, processes: Processes) -> None:
    """A step's images are split evenly over processes and parts, or the program ends."""
    num_parts = processes.world_size * args.accumulate
    if num % num_parts:
        fail(f"{what} cannot be split in {num_parts} parts (processes x --accumulate)")


# ----------------------------------------- label files ------------------------------------------

LABELS_FORMAT = "noisy-student-labels-2"
TODO, DONE, UNREADABLE, HELD_OUT = 0, 1, 2, 3  # status of a row; HELD_OUT: an image of val
# The columns that a label file may have, and their types; "S": bytes of a fixed length.
LABEL_COLUMNS = {"logits": "f2", "label": "i4", "confidence": "f4", "status": "u1", "path": "S"}
LABEL_COLUMNS |= {"offset": "i8", "size": "i8", "copies": "u4", "class_counts": "i8"}
LABEL_COLUMNS |= {"val_logits": "f2", "val_label": "i4"}


@dataclass(frozen=True)
class LabelFile:
    """A label file for reading. No file stays open: a column is mapped when it is asked for."""

    path: Path
    attrs: dict
    classes: list[str]
    places: dict[str, tuple[np.dtype, int, tuple]]  # column: (type, offset in bytes, shape)

    def __len__(self) -> int:
        return self.places["status"][2][0]

    def column(self, name: str) -> np.ndarray:
        """A column, mapped. offset, size (0: plain files) and copies (1 a label) may be missing."""
        if name in self.places:
            dtype, offset, shape = self.places[name]
            return np.memmap(str(self.path), dtype, "r", offset, shape) if math.prod(shape) else np.zeros(shape, dtype)
        if name == "copies":
            return (self.column("status") == DONE).astype(np.uint32)
        return np.zeros(len(self), LABEL_COLUMNS[name])

    @property
    def images(self) -> ImageList:
        columns = (self.column(name) for name in ("path", "offset", "size"))
        return ImageList(os.path.abspath(self.attrs["root"]), *columns)


def open_label_file(path: str | Path) -> LabelFile:
    """Read what a label file says of itself; anything else ends the program."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in file.attrs.items()}
            if attrs.get("format") != LABELS_FORMAT:
                fail(f"{path}: format is {attrs.get('format')!r}, expected {LABELS_FORMAT!r}: run 02 or 03 again")
            needed = {"classes", "path", "status", "label", "confidence"}
            if attrs.get("method") != "top-p":
                needed.add("logits")
            if missing := (needed - file.keys()) | ({"root"} - attrs.keys()):
                fail(f"{path}: lacks {', '.join(sorted(missing))}")
            classes = [nfc(name.decode()) for name in file["classes"][:]]
            columns = {name: file[name] for name in LABEL_COLUMNS if name in file}
            places = {name: (c.dtype, c.id.get_offset(), c.shape) for name, c in columns.items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path}: not a readable label file ({error})")  # what h5py raises of damage is many things
    num_rows = places["status"][2]
    shapes = {"logits": (*num_rows, len(classes)), "class_counts": (len(classes),)}
    shapes["val_label"] = places.get("val_label", (None, None, ()))[2]
    shapes["val_logits"] = (*shapes["val_label"], len(classes))
    for name, (dtype, offset, shape) in places.items():
        expected = np.dtype(LABEL_COLUMNS[name])
        fits = dtype.kind == "S" if name == "path" else dtype == expected
        right_shape = shapes.get(name, num_rows)
        if not fits or shape != right_shape:
            fail(f"{path}: {name} is {dtype} {shape}, expected {expected} {right_shape}")
        if offset is None and math.prod(shape):
            fail(f"{path}: {name} is not stored in one piece")
    return LabelFile(Path(path), attrs, classes, places)


def check_label_rows(labels: LabelFile) -> None:
    """End the program where, in some thousand rows, logits, label and confidence do not agree."""
    firsts = np.linspace(0, max(0, len(labels) - 64), 64).astype(int)  # neighbours are on one page
    rows = np.unique(firsts[:, None] + np.arange(min(64, len(labels))))
    rows = rows[labels.column("status")[rows] == DONE]
    if "logits" not in labels.places or not len(rows):
        return
    logits = labels.column("logits")[rows].astype(np.float32)
    label = labels.column("label")[rows].clip(0, logits.shape[1] - 1)
    of_label = logits[np.arange(len(rows)), label]
    probs = torch.from_numpy(logits).softmax(1).numpy()[np.arange(len(rows)), label]
    fits = (logits.max(1) == 0) & (abs(probs - labels.column("confidence")[rows]) <= 0.02)
    fits &= labels.column("label")[rows] == label  # not below 0 or above the last class
    if labels.attrs.get("method") != "top-p":
        fits &= of_label >= -0.01
    if not fits.all():
        expected = "logits whose largest is 0, and label and confidence of that one"
        fail(f"{labels.path}: row {rows[~fits][0]}: expected {expected}; of probabilities take the logarithm")


@contextlib.contextmanager
def new_label_file(path: Path, num: int, path_width: int, classes: list, columns: Iterable[str], **attrs):
    """Give an h5py.File with these columns of `num` rows, unfilled; it becomes `path` at the end.

    `path_width`: bytes of the longest path. class_counts, val_logits and val_label, arrays among
    `attrs`, are written. Every dataset is contiguous and has its place from the start (sparse on
    disk), so that any number of processes can fill it with os.pwrite: the HDF5 structure does not
    change, and the file opens at any time, after kill -9 too.
    """
    arrays = {name: attrs.pop(name) for name in LABEL_COLUMNS if name in attrs}
    shapes = {"logits": (num, len(classes))} | {name: values.shape for name, values in arrays.items()}
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)  # h5py's own calls cannot ask for these
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # the same bytes again
    # Columns begin at pages, so no page is written for two of them.
    aligned = {"alignment_threshold": 1, "alignment_interval": 4096}
    with write_atomically(path) as temporary, h5py.File(temporary, "w", locking=False, **aligned) as file:
        for name in (*columns, *arrays):
            dtype = np.dtype(LABEL_COLUMNS[name])
            if name == "path":
                dtype = h5py.string_dtype("utf-8", max(path_width, 1))
            kind = h5py.h5t.py_create(dtype, logical=True)
            space = h5py.h5s.create_simple(shapes.get(name, (num,)))
            h5py.h5d.create(file.id, name.encode(), kind, space, creation)
        for name, values in arrays.items():
            file[name][...] = values
        file.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        file.attrs.update({"format": LABELS_FORMAT} | attrs)
        yield file


# ----------------------------------------- optimization -----------------------------------------


class Plan(NamedTuple):
    """How long a run is, and its learning rate."""

    total_steps: int
    steps_per_epoch: float  # a pass over the labelled images; with --unlabeled-only the selected ones
    peak: float  # learning rate
    schedule: str
    warmup_steps: float


# Peak rate from scratch for each 256 images of a batch; from weights for any batch (a guess); decay.
RATES = {
    "rmsprop": (0.016, 0.0016, 1e-5),  # the paper's: 0.128 at 2048; official main.py:173-182
    "sgd": (0.1, 0.01, 1e-4),  # ResNets: Goyal et al., 1706.02677
    "adamw": (0.00025, 1e-4, 0.05),  # DeiT: 0.0005 at 512; Touvron et al., 2012.12877
}


def plan_of(args, epochs: float, num_images: int, peak=None, unlabeled="", num_unlabeled=0) -> Plan:
    """The plan of a run. `epochs` and `peak` count where no flag says how long and how fast.

    --steps auto, ours: from scratch 100 passes over the labelled images, at least 1,000 steps; from
    weights 30, or if longer 3 over those in the folder `unlabeled`, `num_unlabeled` a step, at least 300.
    """
    init, steps_per_epoch = getattr(args, "init", None), max(num_images, 1) / args.batch_size
    if args.steps == "auto":
        passes, least = (30, 300) if init else (100, 1000)
        steps = max(least, round(passes * steps_per_epoch))
        product = f"{num_images} labelled images x {passes} passes = {passes * steps_per_epoch:.0f}"
        if init and num_unlabeled and os.path.isdir(unlabeled):
            num = len(list_images(unlabeled))
            steps = max(steps, round(3 * num / num_unlabeled))
            product += f"; {num} unlabelled x 3 = {3 * num / num_unlabeled:.0f}"
        print0(f"--steps auto: {steps} steps ({product}; at least {least})")
    elif args.steps is not None:
        steps = args.steps
    else:
        epochs = epochs if args.epochs is None else args.epochs
        steps = round(epochs * steps_per_epoch)
        if epochs and not steps:
            fail(f"--epochs {epochs:g} with --batch-size {args.batch_size} is not one step: use --steps")
    scratch_rate, weights_rate, _ = RATES[args.optimizer]
    if peak is None:
        peak = weights_rate if init else scratch_rate * args.batch_size / 256
    if args.lr is not None:
        peak = args.lr
    warmup_steps = min(getattr(args, "warmup_epochs", 0) * steps_per_epoch, steps / 5)
    schedule = args.schedule or ("cosine" if init else "staircase")
    return Plan(steps, steps_per_epoch, peak, schedule, warmup_steps)


def learning_rate(step: int, plan: Plan) -> float:
    """The learning rate of a step: linear warm-up from 0, then the schedule.

    staircase: x 0.97 every 2.4 epochs of 350, every 4.8 of 700: one rule, 2.4 / 350 of the run. Its
    clock starts at step 0, not after the warm-up (official utils.py:39-74, main.py:569-584).
    N:FACTOR divides the run evenly. plateau: see `plateau_factor`.
    """
    if step < plan.warmup_steps:
        return plan.peak * step / plan.warmup_steps
    if plan.schedule == "staircase":
        return plan.peak * 0.97 ** math.floor(step / (plan.total_steps * 2.4 / 350))
    if plan.schedule == "cosine":
        share = (step - plan.warmup_steps) / max(1, plan.total_steps - plan.warmup_steps)  # 0 to 1
        return plan.peak * 0.5 * (1 + math.cos(math.pi * share))
    if ":" in plan.schedule:
        num, factor = plan.schedule.split(":")
        return plan.peak * float(factor) ** (step * (int(num) + 1) // plan.total_steps)
    return plan.peak


# The Keras example's: its teacher watches the loss on val, its student the accuracy.
PLATEAU = {"teacher": 0.1, "student": 0.5}


def plateau_factor(values: list[float], factor: float, patience: int = 3, min_delta: float = 1e-4):
    """Keras' ReduceLROnPlateau: the factor of the rate after these values, of which low is good."""
    best, waited, product = math.inf, 0, 1.0  # waited: evaluations since the best
    for value in values:
        waited += 1
        if value < best - min_delta:
            best, waited = value, 0
        elif waited == patience:
            product, waited = product * factor, 0
    return product


class RMSpropTF(torch.optim.Optimizer):
    """TensorFlow's RMSProp, the paper's (official utils.py:77-97).

    torch.optim.RMSprop differs in three things: here epsilon is inside the root, the mean square
    starts at 1, and the rate is inside the momentum. Weight decay is part of the gradient.
    """

    def __init__(self, params, lr: float, decay=0.9, momentum=0.9, eps=1e-3, weight_decay=0.0):
        defaults = {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["mean_square"] = torch.ones_like(p)  # TensorFlow's start; torch's is 0
                    self.state[p]["momentum"] = torch.zeros_like(p)
            if not params:
                continue
            grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            mean_square = [self.state[p]["mean_square"] for p in params]
            momentum = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(mean_square, group["decay"])
            torch._foreach_addcmul_(mean_square, grads, grads, 1 - group["decay"])
            root = torch._foreach_add(mean_square, group["eps"])  # epsilon inside the root
            torch._foreach_sqrt_(root)
            torch._foreach_mul_(momentum, group["momentum"])
            torch._foreach_addcdiv_(momentum, grads, root, group["lr"])  # the rate inside it
            torch._foreach_sub_(params, momentum)


def make_optimizer(name: str, model: nn.Module, weight_decay: float | None, classifier_lr: float = 1.0):
    """`rmsprop` (the paper's), `sgd` (Nesterov 0.9) or `adamw`; the loop sets the rate.

    Weight decay (None: that of RATES) spares the norms and nothing else, as the official code
    (main.py:552-555); AdamW's is decoupled. `classifier_lr`: the classifier's share of the rate,
    kept in its group as `share`: AdamW moves each weight by about the rate, and a logit by as many
    times that as it has inputs (muP, 2203.03466, table 3).
    """
    weight_decay = RATES[name][2] if weight_decay is None else weight_decay
    norms = [m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm))]
    heads = [model.get_submodule(head) for head in head_names(model)]
    spared = {p for module in norms for p in module.parameters()}
    classifier = {p for module in heads for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]  # 05 freezes some
    body = [p for p in trained if p not in spared and p not in classifier]
    head = [p for p in trained if p in classifier and p not in spared]
    groups = [{"params": body, "weight_decay": weight_decay}]
    groups.append({"params": [p for p in trained if p in spared], "weight_decay": 0.0})
    groups.append({"params": head, "weight_decay": weight_decay, "share": classifier_lr})
    if name == "rmsprop":
        return RMSpropTF(groups, lr=0.0)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema += (1 - d) (model - ema) with d = min(decay, (1 + step) / (10 + step)), step from 1.

    Of parameters and batch-norm running statistics (official main.py:472-476, utils.py:292-306).
    """
    rate = 1 - min(decay, (1 + step) / (10 + step))  # a ramp: at first it follows closely
    # These share the models' memory. What is no float counts batches.
    averages = [t for t in ema_model.state_dict().values() if t.is_floating_point()]
    latest = [t for t in model.state_dict().values() if t.is_floating_point()]
    torch._foreach_lerp_(averages, latest, rate)


@torch.no_grad()
def update_swa(swa_model: nn.Module, model: nn.Module, step: int, total_steps: int) -> None:
    """The equal mean of the weights at each 10th step of the second half; before it the latest.

    Parameters alone: batch norms are recomputed before an evaluation.
    """
    num, rest = divmod(step - total_steps // 2, 10)  # the num-th set of weights
    if num <= 0 or rest == 0:
        rate = 1 / max(num, 1)  # mean of n: the n-th moves it by 1 / n
        torch._foreach_lerp_(list(swa_model.parameters()), list(model.parameters()), rate)


@torch.no_grad()
def recompute_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Running statistics: the mean over batches, without dropout (torch's update_bn has it on)."""
    norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.momentum != 0]  # 0: frozen
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # an equal mean
    for images in batches:
        model(images)


# ----------------------------------------- checkpoints ------------------------------------------

CHECKPOINT_FORMAT = "noisy-student-checkpoint-2"
OLD_FORMAT = "noisy-student-checkpoint-1"  # is read
ROLES = ("init", "teacher", "checkpoint", "pseudo_labels")  # flags that name files, compared by content
MAY_DIFFER = ("out", "workers", "save_every", "data", "unlabeled", *ROLES)  # when a run is resumed


def read_file(path: str | Path) -> dict:
    """What a .pt, .pth or .safetensors file holds, onto the CPU. Code in it is never run."""
    try:
        if Path(path).suffix == ".safetensors":
            return optional("safetensors.torch", "safetensors", path).load_file(path)
        # Namespace: plain data, in the files of many training scripts
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles by others, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except Exception as error:  # a text file, a truncated one, a pickle with code in it
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0][:120]
        reason = reason or type(error).__name__
        fail(f"{path}: not a checkpoint of weights (a state_dict), or damaged; nothing in it was executed ({reason})")


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this toolkit onto the CPU; anything else ends the program."""
    checkpoint = read_file(path)
    format = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if format not in (CHECKPOINT_FORMAT, OLD_FORMAT):
        hint = "01 --init FILE --epochs 0 makes a checkpoint of other weights"
        fail(f"{path}: format is {format!r}, not {CHECKPOINT_FORMAT!r}; {hint}")
    if format == OLD_FORMAT and checkpoint.get("crop_mode") == "squash":
        checkpoint["crop_fraction"] = 1.0  # it showed all of the image, whatever it said
    return checkpoint


def load_model(path: str | Path, device: str | torch.device = "cpu", fuse: bool = False):
    """(model in eval mode with the averaged weights, checkpoint) of a model.pt or last.pt.

    `fuse`: with the batch norms folded into the convolutions, for inference: 1.4 times as fast.
    """
    checkpoint = read_checkpoint(path)
    try:
        options = checkpoint.get("arch_options", {})
        model = build_model(checkpoint["arch"], len(checkpoint["classes"]), **options)
        load_weights(model, checkpoint["model"])
    except KeyError as error:
        fail(f"{path}: the checkpoint lacks {error}")
    except (TypeError, ValueError) as error:
        fail(f"{path}: {error}")
    if fuse:
        fuse_batch_norms(model)
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def fingerprint(thing: Path | ImageList) -> str:
    """The sha256 of a file, of the names of images, or of a label file without its logits."""
    if isinstance(thing, ImageList):
        names = hashlib.sha256(np.ascontiguousarray(thing.path))
        return f"{len(thing)} images, names {names.hexdigest()}"
    if thing.suffix != ".h5":
        with open(thing, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    labels = open_label_file(thing)
    sha256 = hashlib.sha256(json.dumps(labels.classes).encode())
    for name in sorted(labels.places.keys() - {"logits"}):
        sha256.update(labels.column(name).ravel().view(np.uint8))  # mapped: nothing is copied
    return sha256.hexdigest()


LOCKS = []  # keeps the files open: closing one would end its lock


def lock(out: Path) -> None:
    """Let no second run write to `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(out / ".lock", "a"))  # noqa: SIM115
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loaders would inherit it
    except BlockingIOError:
        fail(f"another run is writing to {out}: wait for its end, or choose another --out")
    except OSError as error:
        fail(f"--out {out} cannot be written or locked: {error.strerror}")


def previous_run(args: argparse.Namespace) -> dict | None:
    """The checkpoint of the run that --out holds, None for a new run.

    Ends the program if the flags differ, or (status 0) if it is finished and its inputs are gone.
    """
    if is_rank0():
        lock(args.out)
    path = args.out / ("model.pt" if (args.out / "model.pt").exists() else "last.pt")
    if not path.exists():
        return None
    checkpoint = read_checkpoint(path)
    before, flags = checkpoint["args"], flags_of(args)
    other = []
    for name in sorted(before.keys() | flags.keys()):
        old, new = before.get(name), flags.get(name)
        may_differ = name in MAY_DIFFER and "published" not in (old, new)
        if old != new and not (may_differ and (name not in ROLES or (old and new))):
            other.append(f"--{name.replace('_', '-')} {old}, not {new}")
    if other:
        fail(f"{args.out} was begun with {'; '.join(other)}: use that, or another --out")
    paths = [*checkpoint.get("roots", []), *(before.get(role) for role in ROLES)]
    if path.name == "model.pt" and any(p and p != "published" and not os.path.exists(p) for p in paths):
        exit_finished(args.out, checkpoint)
    return checkpoint


def compare_inputs(args: argparse.Namespace, resumed: dict | None, **images: ImageList) -> dict[str, str]:
    """{role: fingerprint} of the files and images that a run is made from, for its checkpoints.

    Ends the program where they have changed since the run began, and (status 0) if it is finished.
    """
    things = {role: getattr(args, role, None) for role in ROLES} | images
    things = {role: thing for role, thing in things.items() if isinstance(thing, (Path, ImageList))}
    inputs = {role: fingerprint(thing) for role, thing in things.items()}
    before = resumed.get("inputs", inputs) if resumed else inputs
    changed = [role for role in before.keys() | inputs.keys() if before.get(role) != inputs.get(role)]
    if changed:
        names = ", ".join(f"--{name.replace('_', '-')}" if name in ROLES else name for name in sorted(changed))
        fail(f"{args.out} was begun with other files as {names}: put them back, or choose another --out")
    if resumed and (args.out / "model.pt").exists():
        exit_finished(args.out, resumed)
    return inputs


def exit_finished(out: Path, checkpoint: dict) -> NoReturn:
    top1 = checkpoint["metrics"].get("val_top1", math.nan)  # there may have been no val
    print0(f"{out / 'model.pt'} is finished: val_top1 {top1:.2f}")
    raise SystemExit(0)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint whole or not at all; a diverged one is not written: exit status 3."""
    for weights in (checkpoint["model"], checkpoint.get("training", {}).get("model", {})):
        if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
            diverged(path.parent)
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides the OSError of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None  # write_atomically reports it
            raise


def append_metrics(out: Path, **values) -> None:
    try:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        fail(f"{out / 'metrics.jsonl'} cannot be written: {error.strerror}; last.pt is kept")


def read_metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may leave half a line


# ------------------------------------------- training -------------------------------------------


class Setup(NamedTuple):
    """What flags, initial weights and teacher say about a model and its images."""

    arch: str
    small_images: bool | None
    view: View
    crop: Crop
    recipe: Recipe
    noise: Callable[[Tensor, torch.Generator], Tensor]  # of a batch, uint8 (n, 3, H, W), on the device
    initial: dict  # --init, as `initial_weights` gives it; {}: from scratch


def setup_of(args, teacher: Mapping, initial: dict, image_size: int) -> Setup:
    """A flag counts first, then --init (`initial`, or {}), the teacher, the model's usual."""
    source = initial or teacher
    arch = args.arch or source.get("arch", "efficientnet_b0")
    small_images = args.small_images
    if small_images is None:
        small_images = source.get("arch_options", {}).get("small_images")
    view = View.of(initial) if initial else view_of(arch)
    view = view.at(image_size, args.crop_mode or (None if "format" in initial else teacher.get("crop_mode")))
    min_area = args.min_crop_area
    if min_area is None:  # a figure of 20 pixels does not survive the paper's 0.08
        min_area = 0.7 if image_size <= 64 else 0.08
    crop = Crop(image_size, None if small_images else min_area, args.hflip, view.crop_mode)
    recipe, resolution = recipe_of(arch, args), view_of(arch).image_size
    options = {"recipe": recipe, "resolution": resolution}
    options |= {"small_images": small_images, "hflip": args.hflip}
    return Setup(arch, small_images, view, crop, recipe, partial(add_noise, **options), initial)


def model_of(stage: str, setup: Setup, train: tuple, classes: list[str], args, processes: Processes):
    """(a model as the flags want it, what its checkpoints say of it, where its weights come from).

    `train`: the labelled images and their labels, on which a new classifier is fitted.
    """
    arch, num_classes = setup.arch, len(classes)
    # None: the model's own.
    options = {"small_images": setup.small_images, "dropout": args.dropout, "drop_path": args.drop_path}
    options["zero_init_residual"] = args.zero_init_residual or None
    for name in ("dropout", "drop_path", "zero_init_residual"):
        is_asked = options[name] is not None
        if arch.startswith("timm/") and not is_asked:
            options[name] = TIMM_NOISE.get(name)
        if options[name] is not None and arch.removeprefix("tf_") not in EFFICIENTNETS:
            try:
                build_model(arch, num_classes, **{name: options[name]})
            except ValueError:  # ResNets, for example, have neither of the first two
                options[name] = None
                if is_asked:
                    print0(f"{arch} has no --{name.replace('_', '-')}: it is left out")
    options |= img_size_option(arch, setup.view.image_size)
    # Teacher, student and the rounds of one --seed must not start from the same weights.
    torch.manual_seed(seed_word(args.seed, f"{stage} weights"))
    try:
        model = build_model(arch, num_classes, **options)
    except ValueError as error:
        fail(f"--arch: {error}")
    origin = "from scratch"
    if setup.initial:
        origin = f"from {args.init}"
        fits = load_initial_weights(model, setup.initial, args, classes)
        if fits and "classes" not in setup.initial:
            origin += f", its outputs taken for {', '.join(classes[:3])} ..."
        if not fits:
            if not len(train[0]):
                fail(f"--init {args.init}: its outputs are not the {len(classes)} classes of --classes or --data")
            model = model.to(processes.device, memory_format=torch.channels_last)
            origin += fit_classifier(model, *train, setup.view, processes)
    bn_momentum = args.bn_momentum
    if bn_momentum is None:
        bn_momentum = 0.0 if setup.initial else 0.01
    set_bn_momentum(model, bn_momentum)
    names = ("p", "drop_rate", "drop_prob", "drop_path")  # all libraries' rates of model noise
    rates = [getattr(module, name, 0) for module in model.modules() for name in names]
    if not any(isinstance(rate, float) and rate > 0 for rate in rates):
        origin += ", no model noise"
    header = {"stage": stage, "arch": arch, "arch_options": options, "classes": classes}
    header |= {"class_counts": np.bincount(train[1], minlength=num_classes).tolist(), "hflip": args.hflip}
    return model, header | setup.view._asdict(), origin


def logistic_regression(features: Tensor, target: Tensor, num_classes: int, decay: float) -> Tensor:
    """Weights (classes, features + 1), biases last: least cross-entropy + decay / 2 |weights|^2."""
    weights = features.new_zeros(num_classes, features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss_of():
        optimizer.zero_grad()
        logits = features @ weights[:, :-1].T + weights[:, -1]
        loss = F.cross_entropy(logits, target) + decay / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_of)
    return weights.detach()


@torch.no_grad()
def features_of(model: nn.Module, head: nn.Linear, images: ImageList, view: View, processes: Processes):
    """(inputs of `head` (n, features) for the readable clean images, their rows (n,))."""
    features, rows = [], []
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    alone = processes._replace(rank=0, world_size=1)
    keys = grid_keys(len(images), rows_per_batch(view.image_size, processes.device), alone)
    model.eval()
    for batch in load_batches(ImageDataset(images, clean=view), keys, alone):
        for _, error in batch.errors:
            print0(f"unreadable, left out: {error}")
        if len(batch.rows):
            rows.append(batch.rows)
            model(normalize(batch.views[0].to(processes.device), view))
    model.train()
    hook.remove()
    if not rows:
        fail("no labelled image is readable")
    return torch.cat(features), torch.cat(rows)


def fit_classifier(model: nn.Module, images: ImageList, labels: np.ndarray, view: View, processes: Processes) -> str:
    """Make the last layer the logistic regression on frozen features; returns what to say of it.

    Then step 0 is what a linear probe gives, and the first steps do not distort the features to
    suit a random classifier (LP-FT, Kumar et al., 2202.10054). The weight decay has the least
    cross-entropy in five folds. A last layer that is not one linear layer with biases stays zero.
    """
    names = head_names(model)
    head = model.get_submodule(names[0])
    if len(names) > 1 or not isinstance(head, nn.Linear) or head.bias is None:
        return " with a new classifier"
    chosen = np.unique(np.linspace(0, len(images) - 1, 20_000).astype(int))
    x, rows = features_of(model, head, images[chosen], view, processes)
    target = torch.from_numpy(labels[chosen])[rows].to(x.device)
    fold = torch.empty_like(target)  # the images of each class are dealt to the folds in turn
    for c in range(head.out_features):
        of_class = (target == c).nonzero().squeeze(1)
        fold[of_class] = torch.arange(len(of_class), device=x.device) % 5
    size = x.square().sum(1).mean().item()
    losses = {}
    for decay in (size * 10.0**exponent for exponent in (-4, -6, -5, -3, -2, -1)):  # of equal ones the first
        losses[decay] = 0.0
        for k in range(5 if len(x) <= 2000 else 1):  # of many images one fold tells enough
            weights = logistic_regression(x[fold != k], target[fold != k], head.out_features, decay)
            logits = x[fold == k] @ weights[:, :-1].T + weights[:, -1]
            losses[decay] += F.cross_entropy(logits, target[fold == k], reduction="sum").item()
    weights = logistic_regression(x, target, head.out_features, min(losses, key=losses.get))
    if processes.world_size > 1:  # Run copies the model before DDP makes all processes equal
        dist.broadcast(weights, 0)
    with torch.no_grad():
        head.weight.copy_(weights[:, :-1])
        head.bias.copy_(weights[:, -1])
    return f" with the logistic regression of {len(x)} images as its classifier"


def precision_of(precision: str, device: torch.device) -> str:
    """What --precision auto means. GPUs before Ampere (T4, V100, RTX 20xx) only emulate bf16."""
    if precision == "bf16" and device.type == "cpu":
        print0("--precision bf16: on CPUs it is slower than fp32")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device):
    """(autocast context, GradScaler) of fp32, bf16 or fp16."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    context = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    return context, torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def parallel(model: nn.Module, processes: Processes, compile_it: bool) -> nn.Module:
    """What the training forward calls: compiled in place, DDP around it with several processes."""
    if compile_it:
        model.compile()
    if processes.world_size == 1:
        return model
    if processes.device.type == "cpu":  # torch has no synchronised batch norm for CPUs
        return nn.parallel.DistributedDataParallel(model)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if hasattr(model, "get_classifier"):  # timm's: torch's would lose a BatchNormAct2d's activation
        convert = optional("timm").layers.convert_sync_batchnorm
    return nn.parallel.DistributedDataParallel(convert(model), device_ids=[processes.device])


def in_halves(function: Callable, *batches: Tensor) -> Tensor:
    """function(*batches), on halves of them where a GPU has not the memory for the whole."""
    try:
        return function(*batches)
    except torch.OutOfMemoryError:
        if len(batches[0]) == 1:
            raise
    torch.cuda.empty_cache()  # not above, where the exception holds the activations
    halves = zip(*(batch.tensor_split(2) for batch in batches), strict=True)
    return torch.cat([in_halves(function, *half) for half in halves])


@torch.inference_mode()
def evaluate(model: nn.Module, images: ImageList, labels, view: View, processes: Processes, precision: str):
    """{val_loss, val_top1, val_top5 (percent)} of the clean views, each readable image once."""
    model.eval()
    if processes.world_size > 1:  # on CPUs each process has its own running statistics: rank 0's count
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    amp, _ = autocast(precision, processes.device)
    sums = torch.zeros(3, dtype=torch.float64, device=processes.device)  # loss, top-1, top-5
    num_read = 0
    bad = []  # reasons

    def logits_of(pixels: Tensor) -> Tensor:
        with amp:
            return model(normalize(pixels, view)).float()

    size = rows_per_batch(view.image_size, processes.device)
    keys = grid_keys(len(images), size, processes)
    for batch in load_batches(ImageDataset(images, clean=view), keys, processes):
        bad += [reason for _, reason in batch.errors]
        num_read += len(batch.rows)
        if not len(batch.rows):
            continue
        logits = in_halves(logits_of, batch.views[0].to(processes.device, non_blocking=True))
        target = torch.from_numpy(labels)[batch.rows].to(processes.device)
        right = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        sums += torch.stack([loss, right[:, 0].sum(), right.sum()])
    if bad:
        print(f"{len(bad)} val images are unreadable and left out; the first: {bad[0]}", flush=True)
    (num_of_all,) = sum_of(processes, num_read)
    if not num_of_all:
        fail("no val image is readable")
    loss, top1, top5 = (reduce_sum(sums, processes) / num_of_all).tolist()
    return {"val_loss": loss, "val_top1": 100 * top1, "val_top5": 100 * top5}


def wilson(num_right: int, num: int) -> list[float]:
    """Wilson's 95 percent interval of num_right / num: honest near 0 and 1, and for few images."""
    z2 = 1.959964**2
    share = num_right / num if num else 0.5
    middle = num_right + z2 / 2
    half = (z2 * (share * (1 - share) * num + z2 / 4)) ** 0.5
    return [max((middle - half) / (num + z2), 0.0), min((middle + half) / (num + z2), 1.0)]


# --------------------------------------- the training run ---------------------------------------


class Run:
    """The state of a training run, and what happens around a step. The stage owns loop and loss:

        for batch in run.steps(batches):            # sets the learning rate and the step's random numbers
            for part in run.parts(*tensors):        # --accumulate; gradients are zero before the first part
                with run.amp:
                    logits = run.forward(...)
                run.backward(sum of losses / run.counts[0])
            run.end_step()                          # updates weights and average; logs, evaluates, saves
        run.finish()                                # evaluates, draws curves.png, writes model.pt

    model      the plain module that trains; ddp_model is for the forward pass of the training alone
    averaged   the running average of its weights, which is evaluated and kept; or the model itself
    generator  for the current step's noise, on the CPU
    amp        the autocast context of --precision
    counts     of each stream the readable images of the step / (processes x parts): sums of losses
               divided by it have, averaged over both, the gradient of the mean over the step
    """

    def __init__(self, args, processes: Processes, model: nn.Module, header: dict, plan: Plan, train, val, resumed):
        """header: what checkpoints say of the model. train: for SWA's norms. val: images, labels."""
        self.args, self.processes, self.plan = args, processes, plan
        self.train, self.val = train, val
        self.header = {"format": CHECKPOINT_FORMAT, **header, "lr": plan.peak, "args": flags_of(args)}
        self.header |= {"versions": {"torch": str(torch.__version__)}, "roots": [val[0].root]}  # of the images
        self.stage = header["stage"]
        self.view = View.of(header)
        self.model = model.to(processes.device, memory_format=torch.channels_last)
        self.average = getattr(args, "average", None)  # a decay, "swa"; None: no copy, as none is needed
        self.averaged = model if self.average is None else copy.deepcopy(model)
        share = getattr(args, "classifier_lr", 1.0)
        self.optimizer = make_optimizer(args.optimizer, model, args.weight_decay, share)
        self.precision = precision_of(args.precision, processes.device)
        self.amp, self.scaler = autocast(self.precision, processes.device)
        self.patience = getattr(args, "patience", None)
        eval_every = getattr(args, "eval_every", 0)  # epochs; an epoch may be a few steps
        self.eval_steps = max(plan.steps_per_epoch, 250) if eval_every is None else eval_every * plan.steps_per_epoch
        self.step = 0
        self.metrics = {}
        self.judged = []  # of each evaluation the loss, of a student minus the accuracy: low is good
        self.unreadable = set()  # (number of the stream, row), of all processes
        if resumed:
            self.load(resumed)
        if processes.rank == 0:  # what came after the step that is resumed, and the evaluation at the end, goes
            lines = [line for line in read_metrics(args.out) if line["step"] <= self.step and "loss" in line]
            with write_atomically(args.out / "metrics.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.ddp_model = parallel(model, processes, args.compile)
        self.num_asked = []  # images a step, of each stream
        self.stop, self.must_stop = StopSignal(), False

    def load(self, resumed: dict) -> None:
        training = resumed["training"]
        self.step = training["step"]
        # Where no flag says them, they follow from the images and the device, which may have changed.
        total_steps = training.get("total_steps", self.plan.total_steps)
        if (total_steps, View.of(resumed)) != (self.plan.total_steps, self.view):
            of_run = f"{total_steps} steps and {View.of(resumed)}, not {self.plan.total_steps} and {self.view}"
            fail(f"--steps, --image-size: {self.args.out} was begun with {of_run}: say so, or choose another --out")
        self.metrics = resumed["metrics"]
        self.judged = training["judged"]
        self.unreadable = set(training["unreadable"])
        self.averaged.load_state_dict(resumed["model"])
        self.model.load_state_dict(training["model"])
        self.optimizer.load_state_dict(training["optimizer"])
        if training["scaler"] and self.scaler.is_enabled():  # the earlier device may have had another precision
            self.scaler.load_state_dict(training["scaler"])

    def save(self, name: str) -> None:
        """Write last.pt, or a model.pt or best.pt without what only resuming needs, from rank 0."""
        if self.processes.rank > 0:
            return
        checkpoint = self.header | {"model": self.averaged.state_dict(), "metrics": self.metrics}
        if name == "last.pt":
            training = {"step": self.step, "judged": self.judged, "unreadable": sorted(self.unreadable)}
            training["total_steps"] = self.plan.total_steps
            for part in ("model", "optimizer", "scaler"):
                training[part] = getattr(self, part).state_dict()
            checkpoint["training"] = training
        save_checkpoint(self.args.out / name, checkpoint)

    def announce(self, *facts: str) -> None:
        """Print what was derived from the flags, before the first step."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        num, num_trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        plan, processes = self.plan, self.processes
        view = f"{self.view.image_size} px, {self.view.crop_mode} {self.view.crop_fraction:.3g}"
        rate = f"{plan.schedule}, peak lr {plan.peak:g}, warm-up {plan.warmup_steps:.0f} steps"
        facts = [f"{self.header['arch']} at {view}, {num_trained:,} of {num:,} parameters train", *facts]
        facts.append(f"{self.precision} on {processes.world_size} x {processes.device.type}")
        facts.append(f"{plan.total_steps} steps, {plan.steps_per_epoch:.1f} per epoch, from step {self.step}")
        print0("; ".join([*facts, f"{self.args.optimizer}, {rate}"]))

    def batches(self, images: ImageList, num: int, stream: str, repeated=None, **views):
        """A loader of the steps that remain, `num` images a step; the rest is ImageDataset's."""
        stream, seed = f"{self.stage} {stream}", self.args.seed
        steps = range(self.step, self.plan.total_steps)
        self.num_asked.append(num)
        self.header["roots"].append(images.root)
        dataset = ImageDataset(images, seed=seed, stream=stream, repeated=repeated, **views)
        keys = train_keys(len(dataset), num, seed, stream, steps, self.processes)
        return load_batches(dataset, keys, self.processes)

    def steps(self, *loaders: torch.utils.data.DataLoader) -> Iterator:
        """Iterate over the batches of the steps that remain: a Batch, or one of each loader."""
        name, total = self.args.out.name, self.plan.total_steps
        batches = iter(progress(zip(*loaders, strict=True), name, total, self.processes, self.step))
        self.begin_line()
        while not self.ended_early:
            asked = time.monotonic()
            loaded = next(batches, None)
            if loaded is None:
                return
            self.waited += time.monotonic() - asked
            self.count_images(loaded)
            self.lr = learning_rate(self.step, self.plan)
            if self.plan.schedule == "plateau":
                self.lr *= plateau_factor(self.judged, PLATEAU[self.stage])
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * group.get("share", 1)
            # Of (seed, stage, step, rank) alone: a resumed run draws what an uninterrupted one does.
            word = seed_word(self.args.seed, f"{self.stage} noise", self.step, self.processes.rank)
            torch.manual_seed(word)  # dropout, stochastic depth
            self.generator = torch.Generator().manual_seed(word ^ 1)
            yield loaded if len(loaded) > 1 else loaded[0]

    def count_images(self, batches: tuple[Batch, ...]) -> None:
        """Count the readable images of the step over all processes; learn whether one must stop.

        The only communication in a step besides the gradients'. It does not wait for GPUs.
        """
        errors = {(i, row): text for i, batch in enumerate(batches) for row, text in batch.errors}
        counts = [len(batch.rows) for batch in batches]
        stops, num_errors, *counts = sum_of(self.processes, self.stop.received, len(errors), *counts)
        self.must_stop = stops > 0
        if num_errors:
            for key in errors.keys() - self.unreadable:
                print(f"unreadable, left out: {errors[key]}", flush=True)
            of_all = [set(errors)] * self.processes.world_size
            if self.processes.world_size > 1:
                dist.all_gather_object(of_all, set(errors))
            self.unreadable.update(*of_all)
        if not counts[0 if self.num_asked[0] else 1]:  # the labelled ones, if there are any
            fail(f"none of the images of step {self.step + 1} is readable; {self.args.out} is kept")
        self.num_seen += sum(counts)
        num_parts = self.processes.world_size * self.args.accumulate
        self.counts = [count / num_parts for count in counts]

    def parts(self, *tensors: Tensor) -> Iterator:
        """The batch in --accumulate parts. Gradients are exchanged in the last backward pass."""
        self.optimizer.zero_grad()
        num = self.args.accumulate
        parts = zip(*(tensor.tensor_split(num) for tensor in tensors), strict=True)
        for number, part in enumerate(parts, 1):
            exchanges_later = number < num and self.processes.world_size > 1
            with self.ddp_model.no_sync() if exchanges_later else contextlib.nullcontext():
                yield part

    def forward(self, images: Tensor) -> Tensor:
        """The logits (n, C) in training. A small image alone comes twice: norms of 1 x 1 maps need two values."""
        twice = images.repeat(2, 1, 1, 1) if len(images) == 1 and self.view.image_size <= 64 else images
        return self.ddp_model(twice)[: len(images)]

    def backward(self, loss: Tensor, **others: Tensor) -> None:
        """Add the gradients of a part's mean loss. `others`: losses that are only logged."""
        self.scaler.scale(loss / self.args.accumulate).backward()
        for name, value in {"loss": loss, **others}.items():  # the sums stay on the device
            self.sums[name] = self.sums.get(name, 0) + value.detach() / self.args.accumulate

    def end_step(self) -> None:
        """Update weights and average; then log, evaluate and save where it is time for that."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        total = self.plan.total_steps
        if self.average == "swa":
            update_swa(self.averaged, self.model, self.step, total)
        elif self.average is not None:
            update_ema(self.averaged, self.model, self.step, self.average)
        is_last = self.step == total
        every = self.eval_steps
        evaluates = not is_last and every > 0 and self.step // every > (self.step - 1) // every
        saves = evaluates or self.must_stop or self.step % self.args.save_every == 0
        if saves or is_last or self.step % max(1, min(100, total // 100)) == 0:
            self.log(evaluates)
        if saves:  # always behind a line of the log, so that no line's mean is cut in two
            self.save("last.pt")
        if self.must_stop:
            raise SystemExit(143)

    def begin_line(self) -> None:
        self.began, self.waited, self.num_seen = time.monotonic(), 0.0, 0
        self.logged = self.step
        self.sums = {}

    def log(self, evaluates: bool) -> None:
        """Write a line of metrics.jsonl: mean losses since the last one, maybe an evaluation."""
        num = (self.step - self.logged) * self.processes.world_size
        means = {name: reduce_sum(sums, self.processes).item() / num for name, sums in self.sums.items()}
        if not math.isfinite(means["loss"]):
            diverged(self.args.out)
        seconds = time.monotonic() - self.began
        line = {"step": self.step, "epoch": self.step / self.plan.steps_per_epoch, "lr": self.lr, **means}
        line |= {"images_per_s": self.num_seen / seconds, "loader_wait": self.waited / seconds}
        if self.unreadable:
            line["unreadable"] = len(self.unreadable)
        if evaluates:
            metrics = self.evaluate_average()
            line |= metrics
            print0(f"step {self.step}, loss {means['loss']:.3f}, val_top1 {metrics['val_top1']:.2f}")
        if self.processes.rank == 0:
            append_metrics(self.args.out, **line)
        self.begin_line()

    def evaluate_average(self) -> dict:
        """val_loss, val_top1 and val_top5 of the averaged weights, kept for --patience and plateau."""
        if self.average == "swa" and self.step:  # averaged weights need batch-norm statistics of their own
            alone = self.processes._replace(rank=0, world_size=1)  # all processes see the same images
            rows = np.random.default_rng(0).permutation(len(self.train))[:6400]  # they are sorted by class
            keys = np.split(rows, range(64, len(rows), 64))
            batches = load_batches(ImageDataset(self.train, clean=self.view), keys, alone)
            pixels = (batch.views[0].to(alone.device) for batch in batches if len(batch.rows) > 1)
            clean = (normalize(images, self.view) for images in pixels)
            recompute_norms(self.averaged, clean)
        settings = self.view, self.processes, self.precision
        metrics = watched = evaluate(self.averaged, *self.val, *settings)
        if not math.isfinite(metrics["val_loss"]):
            diverged(self.args.out)
        chooses = self.patience or self.plan.schedule == "plateau"
        choosing_half = ~judged_half(self.val[0])
        if chooses and choosing_half.any():  # 06 --val-half judge measures on the other half
            watched = evaluate(self.averaged, *(part[choosing_half] for part in self.val), *settings)
        value = watched["val_loss"] if self.stage == "teacher" else -watched["val_top1"] / 100
        is_best = value < min(self.judged, default=math.inf)
        self.judged.append(value)
        if is_best or not self.patience:
            self.metrics = {"step": self.step, **metrics}
        if is_best and self.patience:
            self.save("best.pt")
        return metrics

    @property
    def ended_early(self) -> bool:
        """Whether the last --patience evaluations were no better than the best (Keras)."""
        if not self.patience or not self.judged:
            return False
        return len(self.judged) - 1 - self.judged.index(min(self.judged)) >= self.patience

    def finish(self) -> None:
        """Evaluate, draw the curves, and write model.pt, which says that the run is finished."""
        out, best = self.args.out, self.args.out / "best.pt"
        num_val = len(self.val[0])  # none where --epochs 0 had no data directory
        if num_val and not self.ended_early:
            metrics = self.evaluate_average()
            if self.processes.rank == 0:
                append_metrics(out, step=self.step, epoch=self.step / self.plan.steps_per_epoch, **metrics)
        if self.processes.rank == 0:
            draw_curves(out)
        if self.processes.rank == 0 and self.patience and best.exists():
            os.replace(best, out / "model.pt")
        else:
            self.save("model.pt")
        self.save("last.pt")
        print0(f"{out / 'model.pt'}: val_top1 {self.metrics.get('val_top1', math.nan):.2f} on {num_val} images")
        if self.stop.received:
            raise SystemExit(143)


# ------------------------------------------- pictures -------------------------------------------


def pyplot():
    """matplotlib.pyplot drawing to files, or None (and a line) where there is no matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures: pip install matplotlib")
        return None
    plt.switch_backend("Agg")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"savefig.dpi": 110, "font.size": 9})
    plt.rcParams["text.parse_math"] = False  # a class may be called a$b$c
    return plt


def save_figure(plt, path: Path) -> None:
    with write_atomically(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a class name in a script that the font lacks
        plt.savefig(temporary, format="png", bbox_inches="tight")
    plt.close("all")


def draw_curves(out: Path) -> None:
    """curves.png from metrics.jsonl: losses, val top-1 and learning rate against steps."""
    plt = pyplot()
    if plt is None:
        return
    lines = read_metrics(out)
    _, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharex=True, layout="constrained")
    panels = [("loss", "loss_labeled", "loss_unlabeled", "val_loss"), ("val_top1",), ("lr",)]
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                marker = "." if name.startswith("val") else ""
                axis.plot(*zip(*points, strict=True), marker=marker, label=name)
        axis.set_xlabel("step")
        if axis.has_data():
            axis.legend(frameon=False)
    axes[1].set_ylabel("percent")
    save_figure(plt, out / "curves.png")
