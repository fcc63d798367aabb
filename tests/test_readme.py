"""The commands of the README and of docs/ are run as they stand there, only smaller, the blocks of Python too; what
the texts name is there; and run.sh, the loop over the stages."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from string import Template
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHEAP, ROOT, checkpoint_of, load_stage, noise_image, save_model
from safetensors import safe_open
from torch.distributed import run as distributed_run
from torchvision import models

import common

# ----------------------------------------------------------------------------------------------------------------------
# README and docs/
# ----------------------------------------------------------------------------------------------------------------------

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_in(path: Path) -> list[str]:
    """Every command of a text, in its order: the lines of its blocks without a language, and what stands in backticks
    and begins as a command does. The shell variables of a block are put in."""
    found, names = [], {}
    for language, block, inline in re.findall(r"^```(\w*)\n(.*?)^```|`([^`]+)`", path.read_text(), re.M | re.S):
        inline = " ".join(inline.split())
        if re.match(r"(python|torchrun) .*\.py|\w+=.* \./run\.sh|\./run\.sh ", inline):
            found.append(inline)
        for line in block.splitlines() if not language else []:
            line = Template(line).substitute(names) if not line.startswith("DATA/") else ""
            if name := re.fullmatch(r'(\w+)="(.*)"', line):
                names[name[1]] = name[2]
            elif line:
                found.append(line.split("  #")[0].strip())
    return found


COMMANDS = {path.name: commands_in(path) for path in DOCS}
# Appended to a command: argparse takes the last value of a flag. The made-up images have 32 pixels.
SMALL = "--image-size 32 --batch-size 4 --epochs 0.34"
SMALLER = {
    "00_prepare_data": "",
    "01_train_teacher": SMALL,
    "02_pseudo_label": "",
    "03_balance": "--threshold 0",  # a teacher of two steps is sure of nothing
    "04_train_student": SMALL,
    "05_fixres_finetune": "--image-size 40 --batch-size 4 --epochs 0.34",
    "06_eval_robustness": "--num-images 2",
}


def in_small(stage: str, words: list[str]) -> list[str]:
    """The words of a documented command, and after them what makes it small."""
    smaller = SMALLER[stage].split()
    if "--epochs" in words and words[words.index("--epochs") + 1] == "0":  # it only reads weights
        smaller = []
    if "--arch" in words:
        smaller += ["--arch", CHEAP]
    if "--per-class" in words and "all" not in words:  # the paper's would be long
        smaller += ["--per-class", "9"]
    if "--labels-per-class" in words:
        smaller += ["--labels-per-class", "2"]
    if "--max-confidence" in words:
        smaller += ["--max-confidence", "1"]
    if "--min-precision" in words:  # in place of a threshold
        smaller = ["--min-precision", "0.01"]
    return [*words, *smaller]


@pytest.fixture
def sandbox(tiny_data, tmp_path, monkeypatch):
    """A folder in which all that the documented commands name lies in small, as the current one."""
    for name in ("DATA", "IMAGENET", "photos"):
        (tmp_path / name).symlink_to(tiny_data)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    save_model(tmp_path / "ckpt.pt", data=str(tiny_data))
    weights = models.get_model(CHEAP).state_dict()
    names = [f"n{number:04}" for number in range(1000)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    for folder in ("imagenet-a", *(f"imagenet-c/noise/gaussian_noise/{severity}" for severity in range(1, 6))):
        for name in names[:2]:
            (tmp_path / folder / name).mkdir(parents=True)
            noise_image(40, 40).save(tmp_path / folder / name / "0.png")
    url = models.get_model_weights(CHEAP).DEFAULT.url
    for file in (tmp_path / "cache/hub/checkpoints" / Path(url).name, tmp_path / "tf_efficientnet_b7_ns-1dbc32de.pth"):
        file.parent.mkdir(parents=True, exist_ok=True)  # where a download would lie
        torch.save(weights if file.parent != tmp_path else models.get_model(CHEAP, num_classes=3).state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def download(name, downloads):
        images, labels = np.zeros((6, 32, 32, 3), np.uint8), [0, 0, 0, 1, 1, 1]
        return ["a", "b"], {split: (images, np.array(labels)) for split in ("train", "val")}

    stage = load_stage("00_prepare_data")
    monkeypatch.setattr(stage, "download", download)
    for name, value in {"labels_per_class": 4, "val_per_class": 2, "unlabeled": 60}.items():
        monkeypatch.setitem(stage.DEMO, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_stage_in_the_texts_runs(sandbox, call_main, monkeypatch):
    """In their order, in one folder, the README first; docs/recipes.md has a test of its own."""
    stages = [re.match(r"python (0\d_\w+)\.py", command) for command in COMMANDS["README.md"]]
    assert [found[1] for found in stages if found][:7] == sorted(path.stem for path in ROOT.glob("0*.py")), "one round"
    number = 0
    for name, commands in COMMANDS.items():
        if name != "README.md":
            monkeypatch.setattr(common, "pyplot", lambda: None)  # its pictures suffice
        for command in commands if name != "recipes.md" else []:
            if found := re.fullmatch(r"(python|torchrun( .*?)?) (0\d_\w+)\.py (.+)", command):
                if found[1] != "python":
                    distributed_run.parse_args([*shlex.split(found[2] or ""), f"{found[3]}.py"])  # a typo exits
                done = call_main(found[3], *in_small(found[3], shlex.split(found[4])))
                assert done.returncode == 0, (name, command, done)
                number += 1
    assert number >= 41
    for name in ("teacher/model.pt", "logits.h5", "balanced.png", "fixres/resolution.png", "l2-3/model.pt"):
        assert (sandbox / "runs" / name).exists(), name
    for name in ("teacher", "student"):
        assert checkpoint_of(sandbox / "runs" / "photos" / name / "model.pt")["args"]["init"] == "published"
    assert checkpoint_of(sandbox / "runs/l2-800/model.pt")["image_size"] == 40
    results = json.loads((sandbox / "runs/robustness/robustness.json").read_text())
    assert {"corrupt", "fgsm"} <= results["runs/student1/model.pt"].keys()
    assert "imagenet_a" in results["runs/resnet50/model.pt"] and (sandbox / "runs/labels.csv").exists()


def test_every_other_command_of_the_texts_is_known(commands_of, monkeypatch):
    """run.sh's settings reach the stages, the tools take their flags, what pip reads is there. Nothing else is said."""
    for name, command in ((name, command) for name, commands in COMMANDS.items() for command in commands):
        words = shlex.split(command)
        if command.startswith("python tests/"):
            monkeypatch.setattr("sys.argv", words[1:])
            tool = importlib.import_module(Path(words[1]).stem)
            assert not hasattr(tool, "parse_args") or tool.parse_args(), command  # a typo exits
        elif "./run.sh" in words:
            settings = dict(word.split("=", 1) for word in words[: words.index("./run.sh")])
            for setting in settings:
                assert f"\n{setting}=${{{setting}:-" in (ROOT / "run.sh").read_text(), (name, command)
            if words[-1] != "test":
                commands, _ = commands_of(NPROC="1", **settings)
                for setting, flag in {"INIT": "--init", "ARCHS": "--arch"}.items():
                    assert setting not in settings or f"{flag} {settings[setting]}" in commands["student2"], command
        elif words[0].startswith("tests/"):
            assert (ROOT / words[0]).exists(), (name, command)
        elif words[0] in ("pip", "uv"):
            for flag, file in pairwise(words):
                assert flag not in ("-r", "-c") or (ROOT / file).exists(), (name, command)
        else:
            assert re.match(r"(python|torchrun( --[\w-]+ \S+)*) 0\d_\w+\.py", command), (name, command)


def test_what_the_texts_name_is_there():
    """Links, pictures and files; the README is short, and its table of files has their lengths."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 160
    for path in DOCS:
        text = path.read_text()
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (path.parent / link).exists(), (path.name, link)
        for file in re.findall(r"`((?:\d\d_|recipes/|docs/|tests/)[\w/-]+\.\w+)`", text):
            assert (ROOT / file).exists(), (path.name, file)
        if path.name != "README.md":
            assert f"docs/{path.name}" in readme or path.name in (ROOT / "docs/details.md").read_text(), path.name
    sizes = {
        name: int(number.replace(",", "")) for name, number in re.findall(r"^\| `(\S+)` \| ([\d,]+) \|", readme, re.M)
    }
    assert sizes.keys() == {path.name for path in (*ROOT.glob("*.py"), ROOT / "run.sh")}
    for name, number in sizes.items():
        assert len((ROOT / name).read_text().splitlines()) == pytest.approx(number, rel=0.1), name


OFFICIAL = {"main", "utils", "predict_label", "filter_unlabel", "randaugment", "preprocessing", "task_info"}
OFFICIAL |= {"efficientnet_model", "efficientnet_builder"}


def test_the_details_name_what_the_code_has():
    """Each `file`, `name` of docs/details.md is defined there; other .py files are the official ones."""
    text = " ".join((ROOT / "docs/details.md").read_text().split())
    pairs = re.findall(r"`(\w+)\.py`, `(\w+)`", text)
    assert len(pairs) >= 50
    for module, name in pairs:
        assert hasattr(common if module == "common" else load_stage(module), name), (module, name)
    for module, lines in re.findall(r"`(\w+)\.py(?::(\d+)(?:-\d+)?)?`", text):
        if (ROOT / f"{module}.py").exists():
            assert not lines, module
        else:
            assert module in OFFICIAL, module
    numbers = re.findall(r"^(\d+)\. ", (ROOT / "docs/details.md").read_text(), re.M)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1)) and text.count("**deviation**") > 15


def test_the_version_stands_in_one_place():
    (version,) = re.findall(r"^version: (\d+\.\d+\.\d+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    for path in (*DOCS, *ROOT.glob("*.py"), ROOT / "run.sh", ROOT / "ruff.toml"):
        assert version not in path.read_text(), path.name


def test_the_constraints_name_a_version_of_each_requirement():
    """One that the requirement allows; and the README names the file."""
    texts = [(ROOT / name).read_text() for name in ("requirements.txt", "tests/requirements.txt")]
    wanted = dict(re.findall(r"^([\w-]+)(?:>=([\d.]+))?$", "\n".join(texts), re.M))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/constraints.txt").read_text(), re.M))
    assert len(wanted) > 10 and wanted.keys() <= pinned.keys()
    for name, low in wanted.items():
        at_least, found = ([int(part) for part in text.split(".") if part] for text in (low, pinned[name]))
        assert found >= at_least, name
    assert "-c tests/constraints.txt" in (ROOT / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# the use of the result: blocks of Python in docs/use.md
# ----------------------------------------------------------------------------------------------------------------------

SIGNS = [
    "load_model",
    "torch.onnx.export",
    "safetensors",
    "torchvision.models",
    "timm_names",
    "pandas",
    "noisy-student-logits-1",
]  # of the blocks


def blocks() -> list[str]:
    return [block for path in DOCS for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)]


@pytest.fixture
def use(tiny_data, call_main, tmp_path, monkeypatch, capsys):
    """use(sign, arch) -> (the names that the first block and the block with this sign leave, what it printed)."""

    def run(sign: str, arch: str = "efficientnet_b0", **header) -> tuple[dict, str]:
        path = tmp_path / "runs" / "student" / "model.pt"
        save_model(path, arch, seed=1, image_size=64, data=str(tiny_data), **header)
        noise_image(90, 60).save(tmp_path / "photo.jpg")
        monkeypatch.chdir(tmp_path)
        names = {}
        for block in blocks():
            if SIGNS[0] in block or sign in block:
                capsys.readouterr()
                exec(compile(block, sign, "exec"), names)
        return names, capsys.readouterr().out

    return run


def same_logits(names: dict, other, dtype=torch.float64) -> bool:
    """Whether the checkpoint's model and another give the same. In double: fresh weights blow rounding up."""
    images, model = torch.randn(3, 3, 64, 64, dtype=dtype), names["model"].to(dtype)
    with torch.no_grad():
        expected = model(images)
        assert expected.std(0).min() > 0.01
        limit = {torch.float64: 1e-8, torch.float32: 1e-3}[dtype] * expected.abs().max()
        return bool((other(images) - expected).abs().max() < limit)


def test_each_block_has_a_test():
    assert len(blocks()) == len(SIGNS) and all(sign in block for sign, block in zip(SIGNS, blocks(), strict=True))


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_prediction_in_five_lines(mode, use, call_main, tmp_path):
    """It is that of stage 02."""
    lines = blocks()[0].split("\n\n")[1].splitlines()
    assert len(lines) == 5
    _, printed = use(SIGNS[0], crop_mode=mode)
    name, confidence = printed.split()
    words = ["--unlabeled", tmp_path / "photo.jpg", "--out", tmp_path / "l.h5", "--csv", tmp_path / "l.csv"]
    assert call_main("02_pseudo_label", "--teacher", tmp_path / "runs/student/model.pt", *words).returncode == 0
    with open(tmp_path / "l.csv", newline="") as file:
        _, line = csv.reader(file)
    assert line[:2] == ["photo.jpg", name] and float(line[2]) == pytest.approx(float(confidence), rel=1e-4)


@pytest.mark.parametrize("arch", ["efficientnet_b0", CHEAP])
def test_onnx(arch, use):
    """The exporter, and, where it is installed, what its file gives in ONNX Runtime for a batch of another size."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    names, _ = use("torch.onnx.export", arch)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession("runs/student/model.onnx")

    def model(images):
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    assert same_logits(names, model, torch.float32)


def test_safetensors(use, tmp_path):
    names, _ = use("safetensors")
    path = tmp_path / "runs" / "student" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == names["checkpoint"]["classes"]
    model = common.build_model("efficientnet_b0", 3)
    common.load_weights(model, path)
    assert same_logits(names, model.eval().double())


@pytest.mark.parametrize("arch", ["efficientnet_b0", CHEAP])
def test_the_model_of_torchvision(arch, use):
    names, _ = use("torchvision.models", arch)
    assert same_logits(names, names["theirs"].double()) and type(names["theirs"]).__module__.startswith("torchvision.")


@pytest.mark.parametrize("arch", ["efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnet_b2"])
def test_the_model_of_timm(arch, use):
    names, _ = use("timm_names", arch)
    assert same_logits(names, names["of_timm"].double()) and type(names["of_timm"]).__module__.startswith("timm.")


def test_logits_in_pandas(use, call_main, tiny_data, tmp_path):
    pytest.importorskip("pandas")
    use("load_model")
    data = shutil.copytree(tiny_data / "unlabeled", tmp_path / "u")
    (data / os.fsdecode(b"caf\xe9.png")).write_bytes((data / "part0/000.png").read_bytes())
    (data / "bad.png").write_bytes(b"")
    words = ["--unlabeled", data, "--out", tmp_path / "runs/logits.h5", "--csv", tmp_path / "l.csv", "--max-bad", 50]
    assert call_main("02_pseudo_label", "--teacher", tmp_path / "runs/student/model.pt", *words).returncode == 0
    names, printed = use("pandas")
    with open(tmp_path / "l.csv", newline="", errors="surrogateescape") as file:
        lines = list(csv.reader(file))
    assert names["labels"][["path", "class"]].values.tolist() == [line[:2] for line in lines[1:]] and len(lines) == 22
    assert lines[1][1] in printed and "mean" in printed


def test_labels_of_a_model_of_ones_own(use, call_main, tiny_data, tmp_path):
    """03 selects from the file of the block, and 04 trains on it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(tiny_data)
    (tmp_path / "runs").mkdir()
    names, _ = use("noisy-student-logits-1", CHEAP)
    words = [tmp_path / "runs" / "mine.h5", "--threshold", 0, "--per-class", 2, "--out", tmp_path / "b.h5"]
    assert call_main("03_balance", *words).returncode == 0
    words = ["--arch", CHEAP, "--epochs", 0.1, "--batch-size", 4, "--out", tmp_path / "student"]
    assert call_main("04_train_student", "--pseudo-labels", tmp_path / "b.h5", *words).returncode == 0
    assert checkpoint_of(tmp_path / "student" / "model.pt")["classes"] == names["classes"]


# ----------------------------------------------------------------------------------------------------------------------
# run.sh
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_sh(start_stage, tmp_path):
    """run_sh(data, NAME="value") -> Popen of run.sh, whose python3 starts stages from the fork server."""
    loop = tmp_path / "toolkit"  # without a .venv, which run.sh would take its Python from
    loop.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, loop)
    shutil.copytree(ROOT / "recipes", loop / "recipes")
    text, costly = (ROOT / "run.sh").read_text(), "--corrupt --fgsm 2"
    assert text.count(costly) == 1

    def start(data, corrupt=False, **settings):
        """corrupt: the table as a user gets it; False: of clean images alone, a second less a model"""
        (loop / "run.sh").write_text(text if corrupt else text.replace(costly, ""))
        env = os.environ | {"PATH": f"{Path(start_stage.python3).parent}:{os.environ['PATH']}"} | settings
        command, pipe = ["bash", loop / "run.sh", data], subprocess.PIPE
        return subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe, start_new_session=True)

    return start


def finished(process, status=0):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{stdout[-3000:]}\n{stderr[-3000:]}"
    return stdout, stderr


def table_of(stdout):
    return [line for line in stdout.splitlines() if line.startswith("|")]


def test_the_whole_loop_twice(tiny_data, run_sh, tmp_path):
    """run.sh on a user's folder ends with the table, without matplotlib too; again it says that all is done."""
    data = shutil.copytree(tiny_data, tmp_path / "mine")
    for path in (*data.glob("train/*/[4-7].png"), *data.glob("val/*/[1-3].png"), *data.glob("unlabeled/*/01*.png")):
        path.unlink()
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("--optimizer sgd --lr 0.01")
    small = {"IMAGE_SIZE": "32", "WITHOUT": "matplotlib", "EPOCHS": "8", "ROUNDS": "1", "THRESHOLD": "0", "NPROC": "1"}
    small |= {"FIXRES_STEPS": "4", "OUT": str(tmp_path / "out"), "ARCHS": CHEAP, "RECIPE": str(recipe)}
    first, _ = finished(run_sh(data, corrupt=True, **small))
    again, _ = finished(run_sh(data, corrupt=True, **small))
    for name in ("teacher", "control", "student1", "fixres"):
        assert (tmp_path / "out" / name / "model.pt").exists() and f"done: {name}" in again
    table = table_of(first)
    assert [line.split()[1] for line in table[2:]] == ["teacher", "control", "student1", "untuned", "fixres"]
    assert table == table_of(again)
    assert "CHOOSE=0: half of the 3 images in val is too few to choose on" in first
    _, stderr = finished(run_sh(data, **small | {"EPOCHS": "9"}), status=2)
    assert f"{tmp_path}/out/teacher was made by another command" in stderr
    shutil.rmtree(tmp_path / "out" / "fixres")  # as it says
    again, _ = finished(run_sh(data, corrupt=True, **small))
    assert "done: untuned" in again and "done: fixres" not in again and table == table_of(again)

    # killed in the middle of two stages, and started again each time: the same table
    small["OUT"] = str(tmp_path / "killed")
    for sign in ("logits1.h5", "student1/metrics.jsonl"):
        process = run_sh(data, corrupt=True, **small)
        end = time.monotonic() + 120
        while not (tmp_path / "killed" / sign).exists():
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert table == table_of(finished(run_sh(data, corrupt=True, **small))[0])


def test_the_loop_with_its_own_recipe_and_two_processes(tiny_data, run_sh, tmp_path):
    """Set is what makes it short. Without a round the teacher is all that there is."""
    small = {"IMAGE_SIZE": "16", "EPOCHS": "1", "ROUNDS": "0", "CONTROL": "0", "FIXRES_STEPS": "0", "NPROC": "2"}
    stdout, _ = finished(run_sh(tiny_data, **small, OUT=str(tmp_path / "out"), WITHOUT="matplotlib"))
    assert "2 x cpu" in stdout and [line.split()[1] for line in table_of(stdout)[2:]] == ["teacher"]
    args = checkpoint_of(tmp_path / "out" / "teacher" / "model.pt")["args"]
    assert args["arch"] == "efficientnet_b0" and args["zero_init_residual"] and args["classifier_lr"] == 0.03


def test_the_papers_own_loop_relabels_what_was_selected_once(tiny_data, run_sh, tmp_path):
    """RELABEL=1, and lists with one entry for the teacher and for each student; run.sh's settings are a recipe's."""
    out = tmp_path / "out"
    (tmp_path / "recipe.txt").write_text("# any\n--optimizer sgd --lr 0.01  # and why\n--warmup-epochs 0.5\n")
    settings = {"RELABEL": "1", "ROUNDS": "3", "STEPS": "2 3", "BATCH": "4", "CONTROL": "0", "FIXRES_STEPS": "0"}
    settings |= {"ARCHS": "squeezenet1_1 squeezenet1_0", "IMAGE_SIZE": "32 40", "RATIO": "0 1 2", "THRESHOLD": "0"}
    settings |= {"RECIPE": str(tmp_path / "recipe.txt"), "NOISE": "--num-ops 1", "OUT": str(out), "NPROC": "1"}
    stdout, _ = finished(run_sh(tiny_data, WITHOUT="matplotlib", **settings))
    commands = {line.split()[1].strip(":"): line for line in stdout.splitlines() if line.startswith("== ")}
    assert [name for name in commands if name.startswith("balance")] == ["balance1"]
    for number in (2, 3):
        assert f"--only {out}/balanced1.h5" in commands[f"label{number}"]
        assert f"--pseudo-labels {out}/balanced1.h5 --logits {out}/logits{number}.h5" in commands[f"student{number}"]
    archs = ["squeezenet1_1", "squeezenet1_0", "squeezenet1_0", "squeezenet1_0"]
    for name, arch, ratio, size in zip(("teacher", "student1", "student2", "student3"), archs, (0, 1, 2, 2),
                                       (32, 40, 40, 40), strict=True):  # fmt: skip
        checkpoint = checkpoint_of(out / name / "model.pt")
        args = checkpoint["args"]
        assert (checkpoint["arch"], checkpoint["image_size"], args.get("ratio", 0)) == (arch, size, ratio)
        assert (args["optimizer"], args["lr"], args["num_ops"], args["warmup_epochs"]) == ("sgd", 0.01, 1, 0.5)
        steps = json.loads((out / name / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert steps == (2 if name == "teacher" else 3) and args["batch_size"] == 4


def test_every_model_starts_from_the_weights_of_init(tiny_data, run_sh, tmp_path):
    weights, out = save_model(tmp_path / "w.pt", CHEAP), tmp_path / "out"
    settings = {"INIT": str(weights), "STEPS": "1", "BATCH": "4", "RATIO": "1", "ROUNDS": "1", "THRESHOLD": "0"}
    settings |= {"ARCHS": CHEAP, "OUT": str(out), "NPROC": "1", "FIXRES_STEPS": "1", "WITHOUT": "matplotlib"}
    finished(run_sh(tiny_data, **settings))
    for name in ("teacher", "control", "student1"):
        checkpoint = checkpoint_of(out / name / "model.pt")
        assert checkpoint["inputs"][str(weights)] and checkpoint["args"]["average"] == 0.999  # recipes/finetune.txt


def test_a_run_that_chooses_ends_with_the_table_of_the_other_half(tiny_data, run_sh, tmp_path):
    """Set is only what makes it short. Each choice is that of the files: the threshold's, the next teacher's."""
    data, out = shutil.copytree(tiny_data, tmp_path / "my pictures"), tmp_path / "out"
    for path in data.glob("val/*/*.png"):
        for copy in range(5):  # 60 images
            shutil.copy(path, path.with_name(f"{copy}-{path.name}"))
        path.unlink()
    (tmp_path / "recipe.txt").write_text("--optimizer sgd --lr 0.01")
    small = {"EPOCHS": "1", "CONTROL": "0", "FIXRES_STEPS": "0", "OUT": str(out), "WITHOUT": "matplotlib", "NPROC": "1"}
    stdout, _ = finished(run_sh(data, ARCHS=CHEAP, RECIPE=str(tmp_path / "recipe.txt"), **small))
    assert "IMAGE_SIZE=32: the labelled images' short side is 32 in the median" in stdout
    judged = int(common.judged_half(common.list_images(data / "val")).sum())
    assert f"on {60 - judged} images of val" in stdout and f"the other {judged} judge" in stdout
    for number in (1, 2):
        if (out / f"balanced{number}.json").exists():
            calibration = json.loads((out / f"balanced{number}.json").read_text())["calibration"]
            assert (calibration["images"], calibration["min_precision"]) == (60 - judged, 0.9)
    top1 = [clean["top1"] for clean in cleans_of(out / "choice")]
    teacher = "teacher" if top1[0] > top1[1] else "student1"
    assert f"student2 by {teacher}." in stdout and (out / "balanced2.h5").exists() == (teacher == "student1")
    assert [line.split()[1] for line in table_of(stdout)[-3:]] == ["teacher", "student1", "student2"]
    cleans = [*cleans_of(out / "choice"), *cleans_of(out / "robustness")]
    nums = [sum(of_class["num"] for of_class in clean["per_class"].values()) for clean in cleans]
    assert nums == [60 - judged] * 2 + [judged] * 3


def test_seeds_end_with_a_verdict(tiny_data, run_sh, tmp_path):
    """SEEDS="0 1": the loop for each, one table, and a verdict whose numbers are those of robustness.json by hand."""
    out = tmp_path / "out"
    small = {"EPOCHS": "1", "ROUNDS": "1", "FIXRES_STEPS": "0", "THRESHOLD": "0", "ARCHS": CHEAP, "NPROC": "1"}
    small |= {"RECIPE": str(tmp_path / "recipe.txt"), "WITHOUT": "matplotlib", "OUT": str(out), "SEEDS": "0 1"}
    (tmp_path / "recipe.txt").write_text("--optimizer sgd --lr 0.01")
    stdout, _ = finished(run_sh(tiny_data, **small))
    results = json.loads((out / "robustness" / "robustness.json").read_text())
    names = ("teacher", "control", "student1")
    assert [Path(path).parts[-3:-1] for path in results] == [(f"seed{s}", name) for s in (0, 1) for name in names]
    clean = {name: [results[f"{out}/seed{s}/{name}/model.pt"]["clean"]["top1"] for s in (0, 1)] for name in names}
    for line, (name, (first, second)) in zip(table_of(stdout)[-3:], clean.items(), strict=True):
        mean, deviation = (first + second) / 2, abs(first - second) / 2**0.5
        assert line.split()[1] == name and f" {mean:.2f} ± {deviation:.2f} " in line
    differences = [student - control for student, control in zip(clean["student1"], clean["control"], strict=True)]
    mean, half = sum(differences) / 2, 12.7062 * abs(differences[0] - differences[1]) / 2  # t of 1 degree of freedom
    words = f"Over 2 seeds student1 is {abs(mean):.1f} points {'better' if mean >= 0 else 'worse'} than control"
    verdict = (out / "verdict.md").read_text()
    for text in (stdout, verdict):
        assert words in text and f"interval {mean - half:+.1f} to {mean + half:+.1f} points" in text
    balanced = json.loads((out / "seed1" / "balanced1.json").read_text())
    assert f"kept {balanced['unique_images']} of {balanced['images']} unlabelled images" in verdict
    assert len(list(out.glob("seed*/robustness"))) == 0  # one table, of all
    again, _ = finished(run_sh(tiny_data, **small))
    assert again.count("done: student1") == 2 and table_of(again) == table_of(stdout)


def cleans_of(folder):
    return [entry["clean"] for entry in json.loads((folder / "robustness.json").read_text()).values()]


# What run.sh finds as python3 where no stage runs: what it learns of the images is in FOUND, of two models in TOP1.
NO_STAGES = """#!/bin/sh
for last; do :; done
case "$1 $*" in
-c*device_count*) echo "$FOUND" ;;
-c*version_info*) exit "${{FLOORS:-0}}" ;;
-c*) exec {python} -IS "$@" ;;
01*) for word; do if [ "$word" = "$INIT" ]; then echo "INIT is one word"; fi; done ;;
06*"--val-half choose"*)
    mkdir -p "$last"
    clean='"%s": {{"clean": {{"top1": %s}}}}'
    printf "{{$clean, $clean}}" "$2" "${{TOP1% *}}" "$3" "${{TOP1#* }}" >"$last/robustness.json" ;;
esac
"""


@pytest.fixture
def commands_of(tmp_path):
    """commands_of(found, NAME="value") -> ({stage: its command}, what was printed); no stage runs."""
    toolkit, data = tmp_path / "toolkit", tmp_path / "my data"
    (toolkit / ".venv" / "bin").mkdir(parents=True)
    (data / "unlabeled").mkdir(parents=True)
    (data / "unlabeled" / "a.png").touch()
    for name in ("python3", "python"):
        (toolkit / ".venv" / "bin" / name).write_text(NO_STAGES.format(python=sys.executable))
        (toolkit / ".venv" / "bin" / name).chmod(0o755)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, toolkit)
    shutil.copy(ROOT / "requirements.txt", toolkit / ".venv" / ".installed-requirements.txt")
    shutil.copytree(ROOT / "recipes", toolkit / "recipes")

    def commands(found="0 300 500 500 500", status=0, data=data, **settings):
        """found: GPUs, labelled images, their short side, images of val that choose, that judge"""
        shutil.rmtree(toolkit / "runs", ignore_errors=True)
        env = os.environ | {"FOUND": found, "TOP1": "70 71"} | settings
        done = subprocess.run(["bash", toolkit / "run.sh", data], env=env, text=True, capture_output=True, timeout=60)
        assert done.returncode == status, done
        lines = [line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith("== ")]
        return {name.removeprefix("== "): command for name, command in lines}, done.stdout + done.stderr

    return commands


@pytest.mark.parametrize(
    ("side", "gpus", "init", "size", "crop"),
    [
        (20, 0, "", 32, "0.7"),
        (500, 0, "", 64, "0.7"),
        (63, 1, "", 32, "0.7"),
        (100, 1, "", 96, "0.08"),
        (500, 8, "", 224, "0.08"),
        (130, 0, "published", 128, "0.25"),
    ],
)
def test_image_size_and_recipe_are_chosen_for_the_images(commands_of, side, gpus, init, size, crop):
    """`crop`: the smallest one, the last on the command line."""
    commands, printed = commands_of(f"{gpus} 300 {side} 500 500", INIT=init, NPROC="1")
    assert f"IMAGE_SIZE={size}: the labelled images' short side is {side}" in printed
    assert ("without INIT and without a GPU" in printed) == (gpus == 0 and not init)
    for name in ("teacher", "control", "student1", "student2"):
        words = shlex.split(commands[name])
        assert words[words.index("--image-size") + 1] == str(size)
        assert words[len(words) - words[::-1].index("--min-crop-area")] == crop
        assert ("--init" in words) == bool(init)


@pytest.mark.parametrize(("num", "steps"), [(10, 1012), (1200, 2862), (6464, 10_120), (10**6, 10_120)])
def test_the_length_grows_with_the_number_of_images(commands_of, num, steps):
    commands, printed = commands_of(f"0 {num} 32 500 500")
    assert f"STEPS={steps}: for {num} labelled images" in printed
    words = {name: shlex.split(commands[name]) for name in ("teacher", "student1")}
    epochs = {name: float(words[name][words[name].index("--epochs") + 1]) for name in words}
    assert epochs["student1"] * num / 32 == pytest.approx(steps) == epochs["teacher"] * num / 64


def test_the_length_has_a_point_in_countries_with_a_comma(commands_of, tmp_path):
    """Debian's awk and that of macOS print 3,5 in a German locale, which need not be installed here."""
    (tmp_path / "bin").mkdir()
    comma = (
        f"""#!/bin/sh\n[ "$LC_ALL" = C ] && exec {shutil.which("awk")} "$@"\n{shutil.which("awk")} "$@" | tr . ,\n"""
    )
    (tmp_path / "bin" / "awk").write_text(comma)
    (tmp_path / "bin" / "awk").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    commands, _ = commands_of("0 350 32 500 500", LC_ALL="de_DE.UTF-8", PATH=path)
    for command in (shlex.split(commands[name]) for name in ("teacher", "student1")):
        assert float(command[command.index("--epochs") + 1]) % 1 > 0


def test_what_is_given_is_not_chosen(commands_of):
    given = {"IMAGE_SIZE": "96", "RECIPE": "recipes/svhn.txt", "STEPS": "7", "THRESHOLD": "0.7", "TOP1": "72 71"}
    commands, printed = commands_of("1 300 500 500 500", NPROC="1", **given)
    words = shlex.split(commands["student1"])
    last = {word: value for word, value in pairwise(words) if word.startswith("--")}  # of a flag given twice it counts
    assert last["--image-size"] == "96" and "--min-crop-area" not in last
    assert float(last["--epochs"]) == pytest.approx(7 * 32 / 300)
    assert "--threshold 0.7" in commands["balance1"] and "val1" not in commands and "choice1" in commands
    assert not any(f"{name}=" in printed for name in ("IMAGE_SIZE", "RECIPE", "STEPS"))
    commands, printed = commands_of("1 300 500 500 500", NPROC="1", EPOCHS="7")
    assert "--epochs 7 " in commands["student1"] and "STEPS=" not in printed


def test_what_is_given_reaches_the_stages(commands_of, monkeypatch, tmp_path):
    """A ratio below 1, weights with a space in their name, a recipe of the user's folder, a slash at the end."""
    (tmp_path / "mine.txt").write_text("--optimizer sgd")
    monkeypatch.chdir(tmp_path)
    given = {"RATIO": "0.5", "INIT": "my weights.pt", "RECIPE": "mine.txt", "NPROC": "1", "STEPS": "6"}
    commands, printed = commands_of("0 300 32 500 400", **given)
    assert printed.count("INIT is one word") == 2 and f"--init {tmp_path}/my weights.pt" in commands["student2"]
    for name, flags in (("teacher", "--batch-size 48 --epochs 0.96"), ("student1", "--batch-size 32 --epochs 0.64")):
        assert flags in commands[name] and "--optimizer sgd" in commands[name]
    assert "--ratio 0.5" in commands["student1"] and "--batch-size 48 --epochs 33" in commands["fixres"]
    with_slash, _ = commands_of("0 300 32 500 400", **given, data=f"{tmp_path}/my data/")
    assert with_slash == commands
    monkeypatch.chdir(tmp_path / "my data")
    here, _ = commands_of("0 300 32 500 400", **given | {"INIT": "../my weights.pt", "RECIPE": "../mine.txt"}, data=".")
    assert [*here] == [*commands] and here["control"].split(" --init ")[0] == commands["control"].split(" --init ")[0]
    assert here["teacher"].endswith("/runs/my data/teacher")
    # as many images as 04 will take, which rounds so
    for ratio, all_images in (("0.3", 42), ("0.1", 35), ("0.328125", 42), ("3", 128)):
        commands, _ = commands_of("0 300 32 500 400", RATIO=ratio, STEPS="6")
        assert round(float(ratio) * 32) + 32 == all_images
        words = shlex.split(commands["control"])
        assert words[words.index("--batch-size") + 1] == str(all_images)
        assert float(words[words.index("--epochs") + 1]) * 300 == pytest.approx(6 * all_images)

    (tmp_path / "empty" / "unlabeled").mkdir(parents=True)
    _, printed = commands_of(status=2, data=tmp_path / "empty")
    assert "no folder unlabeled/ with images" in printed


@pytest.mark.parametrize(
    ("setting", "value"),
    [("SEEDS", "0 08"), ("ROUNDS", "two"), ("STEPS", "3,000"), ("STEPS", "1k 2k"), ("RATIO", "1,14"), ("BATCH", "4.5")],
)
def test_what_is_no_number_is_named(setting, value, commands_of):
    commands, printed = commands_of(status=2, **{setting: value})
    assert commands == {} and printed.startswith(f"error: {setting}={value}: ") and len(printed.splitlines()) == 1


def test_a_space_more_makes_no_second_seed(commands_of):
    assert "runs/my data/teacher" in commands_of(SEEDS=" 3 ")[0]["teacher"]


def test_a_stage_whose_input_was_made_again_is_asked_again(commands_of, tmp_path):
    """As after `rm -r student1`, which is then trained again with the same flags: what rests on it is older."""
    runs = tmp_path / "out"
    settings = {"OUT": str(runs), "CHOOSE": "0"}
    commands, _ = commands_of(**settings)
    for command in commands.values():
        out = Path(shlex.split(command.replace("my data", "data"))[-1])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch() if out.suffix else out.mkdir(exist_ok=True)
    assert commands_of(**settings)[0] == {}, "all is done"
    (runs / "student1").rmdir()
    again, printed = commands_of(**settings)
    assert [*again] == [*commands][[*commands].index("student1") :]
    assert "done: control" in printed and "done: balance1" in printed
    (runs / "student1").mkdir()
    assert commands_of(**settings)[0] == {}


def test_threshold_and_teacher_are_chosen_on_half_of_val(commands_of):
    commands, printed = commands_of("0 300 32 500 400", TOP1="70 71")
    assert "on 500 images of val" in printed and "the other 400 judge" in printed
    for number, teacher in ((1, "/teacher/model.pt"), (2, "/student1/model.pt")):
        assert all(f"{teacher} " in commands[f"{name}{number}"] for name in ("label", "val", "student"))
        assert "/my data/val --out" in commands[f"val{number}"]
        rule = f"/val{number}.h5 --val-half choose --min-precision 0.9 --min-share 0.67"
        assert rule in commands[f"balance{number}"] and "--threshold" not in commands[f"balance{number}"]
    assert "Taught: student1 by teacher, student2 by student1." in printed and "71.00 percent" in printed
    assert re.search(
        r"The result is .*/fixres/model\.pt: fixres has 71.00 percent against 70.00 of student2\.", printed
    )

    # the teacher is better: it teaches again, and what it has labelled is used again
    commands, printed = commands_of(TOP1="72 71")
    assert "Taught: student1 by teacher, student2 by teacher." in printed and "label2" not in commands
    assert re.search(r"The result is .*/student2/model\.pt: fixres has 71.00 percent against 72.00 of", printed)
    assert "/teacher/model.pt --pseudo-labels" in commands["student2"] and "/balanced1.h5" in commands["student2"]
    assert "student2/model.pt --image-size 80" in commands["fixres"], "the last student is fine-tuned"
    commands, _ = commands_of(TOP1="72 71", RELABEL="1")
    assert "/teacher/model.pt --only" in commands["label2"] and "/logits2.h5" in commands["student2"]


@pytest.mark.parametrize(
    ("found", "settings"), [("0 300 32 500 500", {"CHOOSE": "0"}), ("0 300 32 19 300", {}), ("0 300 32 300 19", {})]
)
def test_nothing_is_chosen_on_too_few_images_or_if_told_so(commands_of, found, settings):
    commands, printed = commands_of(found, **settings, TOP1="72 71")
    assert "--threshold 0.5" in commands["balance1"] and not {"val1", "choice1", "choice"} & commands.keys()
    assert re.search(r"The result is .*/student2/model\.pt, or .*/fixres/model\.pt where that is better", printed)
    assert "student2 by student1" in printed and ("is too few to choose on" in printed) == (settings == {})
    assert settings or "too few to choose on: THRESHOLD=0.5, and the last student" in printed


def test_floors_are_a_line_each_and_status_2(commands_of, monkeypatch, capsys):
    """In the code that run.sh gives to python3; of what it says with that status, the end."""
    code = (ROOT / "run.sh").read_text().split("floors='")[1].split("'\n")[0]

    def run(python=(3, 11, 0), **installed):
        versions = {
            "torch": "2.11.0+cpu",
            "torchvision": "0.26.0",
            "Pillow": "13.0.0",
            "numpy": "2.1.0",
            "h5py": "3.12",
        }
        versions = {name: number for name, number in (versions | installed).items() if number}
        packages = [SimpleNamespace(name=name, version=number) for name, number in versions.items()]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "version_info", python)
            patch.setattr("importlib.metadata.distributions", lambda: packages)
            with pytest.raises(SystemExit) as stop:
                exec(code, {})
        return stop.value.code, capsys.readouterr().err.splitlines()

    assert run() == (0, [])
    assert run((3, 14, 1), torch="2.12.0.dev20261101", torchvision="1.0") == (0, [])
    assert "Python 3.10 was found, 3.11 or newer is needed" in run((3, 10, 9))[0]
    status, lines = run(torch="2.9.1", torchvision="0.9.2", Pillow=None)
    assert status == 3 and len(lines) == 3
    for line, words in zip(lines, ("torch: 2.9.1 was", "torchvision: 0.9.2 was", "pillow: none was"), strict=True):
        assert line.startswith(words) and "pip install" in line and " or newer is needed" in line
    assert commands_of(FLOORS="3", status=2)[0] == {} == commands_of(FLOORS="1", status=2)[0]


def test_help_lists_each_setting_with_its_default():
    done = subprocess.run(["bash", ROOT / "run.sh", "--help"], text=True, capture_output=True, timeout=60, check=True)
    settings = re.findall(r"^([A-Z_]+)=\$\{\1:-", (ROOT / "run.sh").read_text(), re.M)
    assert len(settings) >= 17 and re.findall(r"^([A-Z_]+)=.* # \w", done.stdout, re.M) == settings
    assert "ROUNDS=2 " in done.stdout and "./run.sh DATA_DIR" in done.stdout and not done.stderr
    assert "$" not in done.stdout


def test_a_folder_without_unlabeled_is_said_before_anything_is_trained(commands_of, tmp_path):
    (tmp_path / "mine").mkdir()
    commands, printed = commands_of(data=tmp_path / "mine", status=2)
    assert commands == {} and "error: " in printed and "no folder unlabeled/" in printed


# ----------------------------------------------------------------------------------------------------------------------
# tests/gpu.sh
# ----------------------------------------------------------------------------------------------------------------------

RECORDS = """#!/bin/sh
case "$*" in
*device_count*) echo $GPUS ;;
00_*) for folder in train/a val/a unlabeled; do mkdir -p "$4/$folder" && touch "$4/$folder/1.png"; done ;;
*$FAILS*) echo why && exit 1 ;;
esac
[ "$1" = -c ] || echo "$*" >> commands
"""


def test_what_waits_for_a_gpu_is_known(tmp_path, monkeypatch):
    """Every command of gpu.sh parses; without GPUs and files it says what it leaves out; a failure is status 1."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "gpu.sh", tmp_path / "tests")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(RECORDS)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "tf_efficientnet_b0_ns-c0e6a31c.pth").touch()
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "FAILS": "nothing",
        "WEIGHTS": str(tmp_path),
    }

    def run(**settings):
        done = subprocess.run([tmp_path / "tests/gpu.sh"], env=env | settings, text=True, capture_output=True)
        assert not done.stderr, done
        return done.returncode, done.stdout.splitlines()

    status, lines = run(GPUS="2", IMAGENET="imagenet", SVHN="svhn")
    assert status == 0 and len(lines) == 48 and lines[-1] == "46 steps done, 0 left out (), 0 failed ()"
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    monkeypatch.chdir(tmp_path)
    for words in commands:
        if words[0] == "-m":
            assert distributed_run.parse_args(words[2:]).nproc_per_node == "2"
            words = words[5:]
        monkeypatch.setattr("sys.argv", words)
        path = Path(words[0])
        (importlib.import_module(path.stem) if path.parts[0] == "tests" else load_stage(path.stem)).parse_args()
    text = [" ".join(words) for words in commands]
    for precision in ("fp32", "bf16", "fp16"):
        stages = {line[:2] for line in text if f"--device cuda --precision {precision}" in line}
        assert stages == {"01", "02", "04", "05", "06"}, precision
    assert sum("--compile" in line for line in text) == 5 and sum(line.startswith("-m") for line in text) == 5
    assert sum("--init tf_efficientnet" in line or f"--init {tmp_path}" in line for line in text) == 1

    status, lines = run(GPUS="0", FAILS="04_train_student")
    assert status == 1 and [line.split()[1] for line in lines if line.startswith("FAILED")] == ["fp32-04"]
    left_out = [line.split()[1] for line in lines if line.startswith("skipped")]
    assert left_out == ["precisions", "two-gpus", "benchmark", "published-b0", "published-b7", "svhn"]
    assert lines[-1] == f"7 steps done, 6 left out ({' '.join(left_out)}), 1 failed (fp32-04)"
