"""What the tests share: loading a stage by its file name, running one as a user would, and a small data directory."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def load_stage(name: str):
    """Import a stage such as "03_balance", whose name no import statement can hold."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def draw_image(label: int, rng: np.random.Generator, size: int = 32) -> Image.Image:
    """Class 0 a red disc, 1 a green square, 2 a blue triangle, on a dark noisy ground."""
    image = Image.fromarray(rng.integers(0, 60, (size, size, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    x, y = rng.integers(4, size // 2 - 4, 2).tolist()
    side = size // 2
    box = (x, y, x + side, y + side)
    if label == 0:
        draw.ellipse(box, fill=(230, 40, 40))
    elif label == 1:
        draw.rectangle(box, fill=(40, 230, 40))
    else:
        draw.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=(40, 40, 230))
    return image


def draw_data(folder: Path) -> Path:
    """3 classes x 8 train, 4 val, 20 unlabelled (two folders deep), unlabeled_truth.csv; all 32 pixels, PNG."""
    rng = np.random.default_rng(0)
    classes = ("disc", "square", "triangle")
    for split, num in (("train", 8), ("val", 4)):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(num):
                draw_image(label, rng).save(folder / split / name / f"{i}.png")
    truth = []
    for i in range(20):
        label = i % 3
        name = f"part{i % 2}/{i:03}.png"
        path = folder / "unlabeled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(label, rng).save(path)
        truth.append((name, classes[label]))
    with open(folder / "unlabeled_truth.csv", "w", newline="") as file:
        csv.writer(file).writerows([("name", "class"), *truth])
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The small data directory, one copy a session: do not change it."""
    return draw_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def run_stage():
    """run_stage("03_balance.py", ..., nproc=1, check=True, NAME="value") -> CompletedProcess with text output.

    nproc > 1 starts that many processes with torchrun. `check`: a status other than 0 fails the test with the output.
    """

    def run(*args, nproc: int = 1, check: bool = True, timeout: float = 300, **env) -> subprocess.CompletedProcess:
        launcher = [sys.executable]
        if nproc > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        command = [*launcher, *map(str, args)]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in env.items()}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}\nstatus {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done

    return run
