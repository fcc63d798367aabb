"""What the tests share: stages in a process of their own or in this one, small data, small checkpoints.

run_stage    runs a stage as a user would, to its end     start_stage   the same, to be watched and killed
call_main    runs a stage's main() in this process        mistake       "one line on stderr and status 2"
save_model   a checkpoint of a small model                draw_data     a small data directory
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import signal
import sys
import tarfile
import threading
import time
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Listener
from pathlib import Path
from subprocess import CompletedProcess

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and before the fork server starts

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PLAIN_PATH = [folder for folder in sys.path if Path(folder or ".").resolve() not in (ROOT, TESTS)]
sys.path[:0] = [str(folder) for folder in (ROOT, TESTS) if str(folder) not in sys.path]
torch.set_num_threads(1)

import common  # noqa: E402
from label_files import write_labels  # noqa: E402
from stage_process import run_file  # noqa: E402

CLASSES = ["disc", "square", "triangle"]  # of draw_data

# stages in a process of their own

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    ["stage_process", "torch.distributed.run", "torchvision", "h5py", "PIL.Image", "numpy", "matplotlib.pyplot"]
)


def pytest_sessionfinish():
    forkserver._forkserver._stop()  # and wait for it: so the time of its children counts in `time pytest`


class Stage:
    """A running or finished stage, of one process or several, which have .pids."""

    def __init__(self, folder: Path, command, nproc: int, own_python: bool, cwd, file_size: int, env: dict):
        folder.mkdir()
        self.outputs = [str(folder / name) for name in ("stdout", "stderr")]
        for path in self.outputs:
            Path(path).touch()
        self.command = [str(word) for word in command]
        env = os.environ | {name: str(value) for name, value in env.items()}
        if nproc > 1:  # the store that torchrun's agent keeps
            self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            env |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        path = [*filter(None, env.get("PYTHONPATH", "").split(":")), *PLAIN_PATH]
        self.processes = []
        for rank in map(str, range(nproc)):
            place = {"RANK": rank, "LOCAL_RANK": rank} if nproc > 1 else {}
            args = (self.command, env | place, str(cwd), self.outputs, path, file_size, own_python)
            self.processes.append(SERVER.Process(target=run_file, args=args))
            self.processes[-1].start()
        self.pids = [process.pid for process in self.processes]

    @property
    def returncode(self) -> int | None:
        """None while one of its processes runs; then the first status that is not 0, or 0."""
        statuses = [process.exitcode for process in self.processes]
        return None if None in statuses else next(filter(None, statuses), 0)

    @property
    def stdout(self) -> str:
        return Path(self.outputs[0]).read_text()

    @property
    def stderr(self) -> str:
        return Path(self.outputs[1]).read_text()

    def wait(self, timeout: float = 120) -> int:
        self.wait_until(lambda: self.returncode is not None, timeout)
        return self.returncode

    def wait_until(self, condition, timeout: float = 120) -> None:
        """Wait until condition() is true while the stage runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.returncode is None or condition(), f"it ended before: {self}"
            if time.monotonic() > end:
                self.kill()
                pytest.fail(f"not in time: {self}")
            time.sleep(0.005)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes and their loaders, and wait for their end."""
        below = [pid for p in self.pids for pid in descendants(p)]  # torchrun's workers have groups of their own
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        for process in self.processes:
            process.join(120)

    def __repr__(self) -> str:
        return f"{' '.join(self.command)}\nstatus {self.returncode}\n{self.stdout[-4000:]}\n{self.stderr[-4000:]}"


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pids += [below for child in task.read_text().split() for below in descendants(int(child))]
    return pids


@pytest.fixture(scope="session")
def start_stage(tmp_path_factory):
    """start_stage("03_balance.py", flag, value, ..., nproc=1, NAME="value") -> Stage, running.

    It comes from the fork server, nproc > 1: as so many ranks. launcher="python": in a Python of its own.
    launcher="torchrun": by torchrun's own agent, which starts and watches start_stage.python3.
    WITHOUT="matplotlib": as if this package was not installed; it saves the second that a picture takes.
    """
    started, number, root = [], itertools.count(), tmp_path_factory.mktemp("stages")

    def start(*command, nproc=1, launcher=None, cwd=ROOT, file_size=-1, **env) -> Stage:
        if launcher == "torchrun":
            run = "from torch.distributed.run import main; main()"
            command = ["-c", run, "--standalone", f"--nproc-per-node={nproc}", *command]
            env |= {"PYTHON_EXEC": start.python3}
            nproc = 1
        if command[0] != "-c":
            command = [ROOT / command[0], *command[1:]]
        stage = Stage(root / str(next(number)), command, nproc, launcher == "python", cwd, file_size, env)
        started.append(stage)  # several threads of python_that_forks start stages
        return stage

    with python_that_forks(root, start) as start.python3:
        yield start
    for stage in started:
        if stage.returncode is None:
            stage.kill()


# A python3 that starts in no time: it has the fork server run the command, hands SIGTERM on, and ends with its status.
PYTHON3 = """#!{python} -IS
import os, signal, sys
from multiprocessing.connection import Client
with Client({address!r}) as server:
    server.send((sys.argv[1:], os.getcwd(), dict(os.environ)))
    pids = server.recv()
    signal.signal(signal.SIGTERM, lambda number, frame: [os.kill(pid, number) for pid in pids])
    status, *outputs = server.recv()
for file, text in zip((sys.stdout, sys.stderr), outputs):
    file.write(text)
sys.exit(status)
"""


@contextlib.contextmanager
def python_that_forks(root: Path, start):
    """Path of a program python3 in a folder of its own, which does for a stage, and for -c, what a python3 would."""

    def serve(connection):
        command, cwd, env = connection.recv()
        command, nproc = [word for word in command if word != "-u"], 1
        if command[0] == "-m":  # torch.distributed.run --standalone --nproc-per-node N
            nproc, command = int(command[4]), command[5:]
        if command[0] != "-c":
            command[0] = os.path.join(cwd, command[0])
        stage = start(*command, nproc=nproc, cwd=cwd, **env)
        connection.send(stage.pids)
        while stage.returncode is None:
            if connection.poll(0.01):  # who asked was killed
                stage.kill()
                return
        connection.send((stage.returncode, stage.stdout, stage.stderr))

    def listen(listener):
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=serve, args=(listener.accept(),), daemon=True).start()

    (root / "bin").mkdir()
    with Listener(str(root / "socket"), backlog=16) as listener:
        for name in ("python3", "python"):
            (root / "bin" / name).write_text(PYTHON3.format(python=sys.executable, address=listener.address))
            (root / "bin" / name).chmod(0o755)
        threading.Thread(target=listen, args=(listener,), daemon=True).start()
        yield str(root / "bin" / "python3")


@pytest.fixture(scope="session")
def run_stage(start_stage):
    """run_stage("03_balance.py", flag, value, ..., check=True) -> Stage, finished; otherwise as start_stage.

    check: a status other than 0 fails the test with what was printed.
    """

    def run(*command, check: bool = True, timeout: float = 120, **how) -> Stage:
        done = start_stage(*command, **how)
        done.wait(timeout)
        if check and done.returncode:
            pytest.fail(repr(done))
        return done

    return run


# stages in this process


def load_stage(name: str):
    """Import a stage such as "03_balance", whose name no import statement can hold."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def watch(patch: pytest.MonkeyPatch, owner, name: str, note) -> None:
    """Call note(*args) before each call of owner.name(*args)."""
    function = getattr(owner, name)

    def watched(*args, **how):
        note(*args, **how)
        return function(*args, **how)

    patch.setattr(owner, name, watched)


def call_main_of(stage, patch: pytest.MonkeyPatch, capsys, flags, stop_after: int = 0, pictures: bool = False):
    """stage.main() with these flags on its command line, without pictures of curves and without signal handlers.

    stop_after: the step during which it believes that SIGTERM arrives.
    """

    def hear(run, *batches):
        run.stop.received = run.step == stop_after - 1

    with patch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
        patch.setattr(common, "LOCKS", [])
        if stop_after:
            watch(patch, common.Run, "count_images", hear)
        if not pictures:
            patch.setattr(common, "draw_curves", lambda out: None)
        patch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, flags)])
        printed = capsys.readouterr if capsys else lambda: ("", "")
        printed()
        try:
            stage.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        for file in common.LOCKS:  # as when the process has ended
            file.close()
        return CompletedProcess(stage.__name__, status, *printed())


@pytest.fixture
def call_main(monkeypatch, capsys):
    """call_main("03_balance", flag, value, ...) -> CompletedProcess; see call_main_of."""

    def call(name: str, *flags, **how) -> CompletedProcess:
        return call_main_of(load_stage(name), monkeypatch, capsys, flags, **how)

    return call


@pytest.fixture
def planned(call_main, monkeypatch):
    """planned("01_train_teacher", flag, value, ...) -> the Run that would now take its first step."""
    runs = []

    def stop(run, *loaders):
        runs.append(run)
        raise SystemExit(0)

    monkeypatch.setattr(common.Run, "steps", stop)

    def run_of(*flags) -> common.Run:
        done = call_main(*flags)
        assert done.returncode == 0 and runs, done
        return runs.pop()

    return run_of


@pytest.fixture
def args_of(monkeypatch):
    """args_of("01_train_teacher", flag, value, ...) -> the args of a command line of these, and of what it needs"""
    needed = {"04_train_student": ["--teacher", "x"], "05_fixres_finetune": ["--checkpoint", "x", "--out", "x"]}

    def parse(stage: str, *given) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *needed.get(stage, []), *map(str, given)])
        return load_stage(stage).parse_args()

    return parse


def assert_mistake(done, *named) -> str:
    """Status 2 and one line on stderr with these names; returns the line."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done
    assert all(str(name) in lines[0] for name in named), (lines, named)
    return lines[0]


@pytest.fixture
def mistake(capsys):
    """mistake(call, name, ...): the call ends the program with status 2 and one line that has these names."""

    def check(call, *named) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call()
        return assert_mistake(CompletedProcess(call, stop.value.code, *capsys.readouterr()), *named)

    return check


# data and checkpoints


def draw_image(label: int, rng: np.random.Generator) -> Image.Image:
    """Class 0 a red disc, 1 a green square, 2 a blue triangle, on a dark noisy ground of 32 pixels."""
    image = Image.fromarray(rng.integers(0, 60, (32, 32, 3), dtype=np.uint8))
    x, y = rng.integers(4, 12, 2).tolist()
    draw = ImageDraw.Draw(image)
    if label == 0:
        draw.ellipse((x, y, x + 16, y + 16), fill=(230, 40, 40))
    elif label == 1:
        draw.rectangle((x, y, x + 16, y + 16), fill=(40, 230, 40))
    else:
        draw.polygon([(x, y + 16), (x + 16, y + 16), (x + 8, y)], fill=(40, 40, 230))
    return image


def draw_data(folder: Path) -> Path:
    """3 classes x 8 train, 4 val, 20 unlabelled (two folders deep), unlabeled_truth.csv; all 32 pixels, PNG."""
    rng = np.random.default_rng(0)
    unlabeled = {f"part{i % 2}/{i:03}.png": i % 3 for i in range(20)}
    labels = {f"train/{name}/{i}.png": label for label, name in enumerate(CLASSES) for i in range(8)}
    labels |= {f"val/{name}/{i}.png": label for label, name in enumerate(CLASSES) for i in range(4)}
    labels |= {f"unlabeled/{name}": label for name, label in unlabeled.items()}
    for name, label in labels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(label, rng).save(folder / name)
    truth = [f"{name},{CLASSES[label]}\n" for name, label in unlabeled.items()]
    (folder / "unlabeled_truth.csv").write_text("name,class\n" + "".join(truth))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The small data directory, one copy a session: do not change it."""
    return draw_data(tmp_path_factory.mktemp("tiny") / "data")


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def folders(root: Path, **splits: dict[str, int]) -> Path:
    """folders(root, train={"cat": 3}) draws three images in root/train/cat, no two alike."""
    seeds = itertools.count()
    for split, classes in splits.items():
        for name, num in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                noise_image(4, 4, next(seeds)).save(root / split / name / f"{i:03}.png")
    return root


def make_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


CHEAP = "shufflenet_v2_x0_5"  # where any model will do: 34 ms a step of 8 images of 32 pixels, EfficientNet-B0 160


@torch.no_grad()
def tell_images_apart(model: torch.nn.Module, size: int = 32) -> torch.nn.Module:
    """Give a fresh model batch norms with the statistics of a batch and a spread of logits; returns it in eval mode."""
    patches = torch.nn.functional.interpolate(torch.randn(16, 3, 8, 8), size=(size, size))
    images = patches + 0.3 * torch.randn(16, 3, size, size)
    common.recompute_norms(model, [images])
    spread = model.eval()(images).std(0).mean()
    classifier = [p for p in model.parameters() if p.dim() > 1][-1]
    classifier.mul_(1 / spread.clamp(min=1e-3))
    return model


def save_model(path: Path, arch=CHEAP, classes=CLASSES, model=None, seed=0, **header) -> Path:
    """Write a checkpoint as stage 01 writes it and return its path.

    model: what to save; None: a fresh one of `arch`, whose classifier is made to tell images apart.
    """
    options = dict.fromkeys(("small_images", "dropout", "drop_path", "zero_init_residual"))
    checkpoint = {"format": common.CHECKPOINT_FORMAT, "stage": "teacher", "arch": arch, "arch_options": options}
    checkpoint |= {"classes": list(classes), "image_size": 32, "crop_fraction": 1.0, "interpolation": "bicubic"}
    checkpoint |= {"mean": common.IMAGENET_MEAN, "std": common.IMAGENET_STD, "data": str(path.parent)}
    checkpoint |= {"metrics": {}, "args": {}, **header}
    if model is None:
        torch.manual_seed(seed)
        model = common.build_model(arch, len(classes), **checkpoint["arch_options"])
        tell_images_apart(model, checkpoint["image_size"])
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(path, checkpoint | {"model": model.state_dict()})
    return path


@pytest.fixture
def labels(tiny_data, tmp_path) -> Path:
    """Labels of the unlabelled images of tiny_data, nearly all of them right; the first seven stand twice."""
    names = sorted(str(path.relative_to(tiny_data / "unlabeled")) for path in (tiny_data / "unlabeled").rglob("*.png"))
    logits = 3 * np.eye(3)[[int(name[-7:-4]) % 3 for name in names]]
    logits += np.random.default_rng(0).normal(size=(20, 3))
    columns = {"copies": np.array([2] * 7 + [1] * 13, np.uint32)}
    file = {"root": tiny_data / "unlabeled", "names": names, "classes": CLASSES, "arch": CHEAP}
    return write_labels(tmp_path / "labels.h5", logits, **file, **columns)


def clean_batch(images: common.ImageList, view: common.View) -> torch.Tensor:
    """What a model is tested on, or a teacher labels: float (N, 3, size, size)."""
    pixels = np.stack([common.eval_view(images.load(row), view) for row in range(len(images))])
    return common.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), view)


@torch.no_grad()
def logits_on(views: list, model: torch.nn.Module, checkpoint: dict) -> np.ndarray:
    """What the model of a checkpoint says of views: uint8 (H, W, 3) each."""
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    return model(common.normalize(pixels, common.View.of(checkpoint))).numpy()


def checkpoint_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what measures time."""
    return [{key: line[key] for key in line.keys() - {"images_per_s", "loader_wait"}} for line in metrics_of(out)]


def assert_same_weights(a: Path | dict, b: Path | dict) -> None:
    a, b = (checkpoint_of(weights)["model"] if isinstance(weights, Path) else weights for weights in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


SHORT_RUN = ["--image-size", 32, "--batch-size", 8, "--optimizer", "adamw", "--lr", 4e-3, "--warmup-epochs", 1]
SHORT_RUN += ["--schedule", "cosine", "--num-ops", 1, "--magnitude", 3, "--min-crop-area", 0.7, "--average", 0.9]
SHORT_RUN += ["--bn-momentum", 0.1]
