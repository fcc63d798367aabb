"""What the texts say: the commands of the README and of docs/ parse, the blocks of Python run, what is named is there.
And run.sh, the loop over the stages, as a user runs it."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from string import Template

import pytest
import speed
import torch
from conftest import CHEAP, ROOT, checkpoint_of, load_stage, metrics_of, noise_image, save_model
from safetensors import safe_open
from torch.distributed import run as distributed_run

import common

# README and docs/

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_SH = (ROOT / "run.sh").read_text()


def commands_in(path: Path) -> list[str]:
    """Every command of a text, in its order: the lines of its blocks without a language, and what stands in backticks
    and begins as a command does. The shell variables of a block are put in."""
    commands, variables = [], {}
    for language, block, inline in re.findall(r"^```(\w*)\n(.*?)^```|`([^`]+)`", path.read_text(), re.M | re.S):
        inline = " ".join(inline.split())
        if re.match(r"(python|torchrun) .*\.py|\w+=.* \./run\.sh|\./run\.sh ", inline):
            commands.append(inline)
        for line in block.replace("\\\n", " ").splitlines() if not language else []:
            line = Template(line).substitute(variables) if not line.startswith("DATA/") else ""
            if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            elif line:
                commands.append(line.split("  #")[0].strip())
    return commands


COMMANDS = {path.name: commands_in(path) for path in DOCS}


@pytest.fixture
def parse_stage(tmp_path, monkeypatch):
    """parse_stage(words of a command): parse it where recipes/ and the sets that it names are; a typo exits."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)

    def parse(words: list[str]) -> None:
        for flag, folder in pairwise(words):
            if flag.startswith(("--imagenet-", "--cifar10-c", "--folder")):
                Path(folder.split("=")[-1]).mkdir(exist_ok=True)
        monkeypatch.setattr("sys.argv", words)
        load_stage(Path(words[0]).stem).parse_args()

    return parse


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_texts_parses(name, parse_stage):
    for command in COMMANDS[name]:
        words = shlex.split(command)
        stages = [word for word in words if re.fullmatch(r"\d\d_\w+\.py", word)]
        if stages:
            first = words.index(stages[0])
            assert words[0] == "torchrun" or words[:first] == ["python"], command
            distributed_run.parse_args(words[1 : first + 1])
            parse_stage(words[first:])
            continue
        assert words[0] in ("pip", "uv", "python") or "./run.sh" in words, command
        for word in words:
            setting, is_assigned, file = word.rpartition("=")
            assert not is_assigned or re.search(rf"^{setting}=\$\{{{setting}:-", RUN_SH, re.M), command
            assert not re.fullmatch(r"[\w./-]+\.(py|sh|txt)", file) or (ROOT / file).exists(), command


def test_speed_measures_what_its_tables_say(tmp_path, monkeypatch, parse_stage):
    seconds = iter([2, 1, 4, 4, 8, 2])  # of the peer and ours in turns
    rows = speed.take_turns("x", "images", 100, dict.fromkeys(("peer", "ours"), lambda _: (next(seconds), 1.5)), 3)
    assert rows[2:4] == ["| peer | 25 images | 1.50 GB |", "| ours | 2.00 (1.00 to 4.00) | 1.50 GB |"]
    commands = []
    monkeypatch.setattr(speed, "measure", lambda command: commands.append([*map(str, command)]) or (1, 1))
    monkeypatch.setattr(speed, "IMAGES", {32: 20})
    assert len(speed.train_and_label(tmp_path, 32, ["train", "label"], 1)) == 12
    stages = [words for words in commands if "speed.py" not in words[0]]
    assert [words[0][:2] for words in stages] == ["01", "02", "01", "04", "02", "06"]
    for words in stages:
        parse_stage(words)


def test_what_the_texts_name_is_there():
    """Commands, links, pictures and files; the README is short, and its table of files has their lengths."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 140 and sum(map(len, COMMANDS.values())) >= 80
    for path in DOCS:
        text = path.read_text()
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (path.parent / link).exists(), (path.name, link)
        for file in re.findall(r"`((?:\d\d_|recipes/|docs/|tests/)[\w/-]+\.\w+)`", text):
            assert (ROOT / file).exists(), (path.name, file)
        if path.name != "README.md":
            assert f"docs/{path.name}" in readme, path.name
    code = RUN_SH + "".join(path.read_text() for path in ROOT.glob("*.py"))
    lines = (ROOT / "docs" / "reading.md").read_text().splitlines()
    quotes = [quote for line in lines if line[:1] == "|" for quote in re.findall("`(.+?)`", line.split("|")[-2])]
    assert len(quotes) > 15 and all(part.strip(" ,()") in code for quote in quotes for part in quote.split("..."))
    rows = re.findall(r"^\| `(\S+)` \| ([\d,]+) \|", readme, re.M)
    sizes = {name: int(number.replace(",", "")) for name, number in rows}
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
        assert not lines if (ROOT / f"{module}.py").exists() else module in OFFICIAL, module
    numbers = re.findall(r"^(\d+)\. ", (ROOT / "docs/details.md").read_text(), re.M)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1)) and text.count("**deviation**") > 15


def test_the_constraints_name_a_version_of_each_requirement():
    texts = [(ROOT / name).read_text() for name in ("requirements.txt", "tests/requirements.txt")]
    needed = set(re.findall(r"^[\w-]+", "\n".join(texts), re.M))
    assert needed <= set(re.findall(r"^([\w-]+)==", (ROOT / "tests/constraints.txt").read_text(), re.M))


# the use of the result: blocks of Python in docs/use.md

# Of each block, in their order.
SIGNS = ["load_model", "torch.onnx.export", "safetensors", "torchvision.models", "timm_to_own", "pandas", "mine.h5"]


def blocks() -> list[str]:
    return [block for path in DOCS for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)]


@pytest.fixture
def use(tiny_data, tmp_path, monkeypatch, capsys):
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


@pytest.mark.parametrize("mode", common.CROP_MODES)
def test_a_prediction_in_five_lines(mode, use, call_main, tmp_path):
    """It is that of stage 02."""
    assert len(blocks()[0].split("\n\n")[1].splitlines()) == 5
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
    session = pytest.importorskip("onnxruntime").InferenceSession("runs/student/model.onnx")

    def model(images):
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    assert same_logits(names, model, torch.float32)


def test_safetensors(use, tmp_path):
    names, _ = use("safetensors")
    path = tmp_path / "runs/student/model.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == names["checkpoint"]["classes"]
    model = common.build_model("efficientnet_b0", 3)
    common.load_weights(model, common.read_file(path))
    assert same_logits(names, model.eval().double())


OF_OTHERS = [("torchvision.models", "theirs", "efficientnet_b0"), ("torchvision.models", "theirs", CHEAP)]
OF_OTHERS += [("timm_to_own", "of_timm", "efficientnet_b0"), ("timm_to_own", "of_timm", "tf_efficientnet_b2")]


@pytest.mark.parametrize(("sign", "name", "arch"), OF_OTHERS)
def test_the_model_of_another_library(sign, name, arch, use):
    names, _ = use(sign, arch)
    assert same_logits(names, names[name].double())
    assert type(names[name]).__module__.startswith(("torchvision.", "timm."))


def test_labels_in_pandas(use, call_main, tiny_data, tmp_path):
    pytest.importorskip("pandas")
    use("load_model")
    words = ["--out", tmp_path / "runs/logits.h5", "--csv", tmp_path / "l.csv"]
    assert call_main("02_pseudo_label", "--teacher", tmp_path / "runs/student/model.pt", *words).returncode == 0
    names, printed = use("pandas")
    with open(tmp_path / "l.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert names["labels"][["path", "class"]].values.tolist() == [line[:2] for line in lines[1:]] and len(lines) == 21
    assert lines[1][1] in printed and "mean" in printed


def test_labels_of_a_model_of_ones_own(use, call_main, tiny_data, tmp_path):
    """03 selects from the file of the block, and 04 trains on it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/demo").symlink_to(tiny_data)
    names, _ = use("mine.h5", CHEAP)
    words = [tmp_path / "runs/mine.h5", "--threshold", 0, "--per-class", 2, "--out", tmp_path / "b.h5"]
    assert call_main("03_balance", *words).returncode == 0
    words = ["--arch", CHEAP, "--image-size", 32, "--data", tiny_data, "--steps", 1, "--batch-size", 4]
    words += ["--pseudo-labels", tmp_path / "b.h5", "--out", tmp_path / "student"]
    assert call_main("04_train_student", *words).returncode == 0
    assert checkpoint_of(tmp_path / "student/model.pt")["classes"] == names["classes"]


# run.sh


@pytest.fixture
def toolkit(tmp_path):
    """A copy without .venv, from which run.sh would take its Python."""
    folder = tmp_path / "toolkit"
    for name in ("recipes", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for path in (*ROOT.glob("*.py"), ROOT / "run.sh", ROOT / "requirements.txt"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def run_sh(start_stage, toolkit):
    """run_sh(data, NAME="value") -> Popen of run.sh, whose python3 starts stages from the fork server."""

    def start(data, **settings):
        path = f"{Path(start_stage.python3).parent}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "NPROC": "1", "WITHOUT": "matplotlib cv2"} | settings
        command, pipe = ["bash", toolkit / "run.sh", data], subprocess.PIPE
        return subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe, start_new_session=True)

    return start


def finished(process, status=0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == status, f"status {process.returncode}\n{stdout[-3000:]}\n{stderr[-3000:]}"
    return stdout, stderr


def table_of(stdout: str) -> list[str]:
    return [re.sub(" +|-+", " ", line) for line in stdout.splitlines() if line.startswith("|")]


def test_the_loop_to_its_table_and_again_after_a_kill(tiny_data, run_sh, tmp_path):
    """On a user's folder; a finished run says so; killed in the middle of two stages it ends with the same table."""
    data, recipe = tmp_path / "my data", tmp_path / "my recipe.txt"
    shutil.copytree(tiny_data, data)
    recipe.write_text("--optimizer sgd --lr 0.01  # and why\n--average 0.9 --bn-momentum 0.5\n")
    settings = {"STEPS": "8", "BATCH": "6", "ARCHS": CHEAP, "RECIPE": str(recipe), "THRESHOLD": "0", "RELABEL": "1"}
    out = tmp_path / "whole"
    whole, _ = finished(run_sh(data, OUT=str(out), **settings))
    table, names = table_of(whole), ["teacher", "control", "student1", "student2", "fixres"]
    assert [line.split()[1] for line in table[2:]] == names
    verdict = (out / "verdict.md").read_text()
    assert verdict in whole and all(name in verdict.split("|")[-1] for name in ("student2", "control"))
    assert len(whole.splitlines()) < 100, "two screens"
    for name in names[:-1]:  # equal steps at one rate, each with random numbers of its own
        checkpoint = checkpoint_of(out / "seed0" / name / "model.pt")
        assert metrics_of(out / "seed0" / name)[-1]["step"] == 8 and checkpoint["lr"] == 0.01
        assert checkpoint["args"]["seed"] == f"0:{name}"
    relabeled = common.open_label_file(out / "seed0" / "selected2.h5")
    assert (relabeled.column("path") == common.open_label_file(out / "seed0" / "selected1.h5").column("path")).all()
    assert relabeled.attrs["teacher"].endswith("student1/model.pt")

    again, _ = finished(run_sh(data, OUT=str(out), **settings))
    assert table_of(again) == table and again.count("finished") >= 6
    _, stderr = finished(run_sh(data, OUT=str(out), **settings | {"STEPS": "9"}), status=2)
    assert "--steps" in stderr and str(out / "seed0" / "teacher") in stderr

    out, settings["FIXRES"] = tmp_path / "killed", "0"
    for sign in ("labels1.h5", "student1/metrics.jsonl"):
        process = run_sh(data, OUT=str(out), **settings)
        end = time.monotonic() + 120
        while not (out / "seed0" / sign).exists():
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert table_of(finished(run_sh(data, OUT=str(out), **settings))[0]) == table[:-1]


def test_without_unlabeled_images_nothing_is_trained(run_sh, tmp_path):
    _, stderr = finished(run_sh(tmp_path, OUT=str(tmp_path / "out")), status=2)
    assert str(tmp_path / "unlabeled") in stderr and not (tmp_path / "out").exists()


RECORDS = """#!/bin/sh
case "$*" in
*device_count*|*image_size*) echo $GPUS ;;
"-c "*) exit ;;
00_*|*/00_*) for folder in train/a val/a unlabeled; do mkdir -p "$4/$folder" && touch "$4/$folder/1.png"; done ;;
*$FAILS*) echo why && exit 1 ;;
*06_eval*) for last; do :; done && mkdir -p "$last" && touch "$last/robustness.md" ;;
esac
[ "$1" = -c ] || printf '%s\\0' "$@" END >> "$RECORD"
"""


@pytest.fixture
def recorded(tmp_path, parse_stage):
    """recorded(script, *words, NAME="value") -> (status, what it printed, what python would have run: lines).

    All of it parses. A line begins with the name of the file, or with torchrun.
    """
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text(RECORDS)
        (tmp_path / "bin" / name).chmod(0o755)

    def line_of(words: list[str]) -> str:
        launcher = []
        if words[0] == "-m":
            assert distributed_run.parse_args(words[2:6]).nproc_per_node == words[4]
            launcher, words = ["torchrun"], words[5:]
        file = Path(words[0]).name
        if file[0].isdecimal():
            parse_stage(words)
        return " ".join([*launcher, file, *words[1:]])

    def run(*command, **settings):
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(record)}
        env |= {"FAILS": "nothing", "GPUS": "0"} | settings
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=60)
        texts = record.read_text().split("\0END\0")[:-1] if record.exists() else []
        return done.returncode, done.stdout + done.stderr, [line_of(text.split("\0")) for text in texts]

    return run


def test_the_settings_of_run_sh_reach_the_stages(toolkit, recorded, tmp_path):
    data, weights, out = tmp_path / "my data", tmp_path / "my weights.pt", tmp_path / "out"
    (data / "unlabeled").mkdir(parents=True)
    settings = {"SEEDS": "3 5", "ROUNDS": "3", "ARCHS": "resnet18 resnet34", "IMAGE_SIZE": "32 64 96", "BATCH": "8"}
    settings |= {"RATIO": "0.5 1 2", "INIT": str(weights), "NOISE": "--num-ops 1", "EPOCHS": "7", "NPROC": "2"}
    status, printed, lines = recorded("bash", toolkit / "run.sh", data, OUT=str(out), **settings)
    assert status == 0, printed
    assert all(line.startswith("03" if "03_balance" in line else "torchrun ") for line in lines)
    seed3 = {line.split("/")[-1]: line for line in lines if "seed3/" in line and "06_eval" not in line}
    for name, flags in {
        "teacher": "--arch resnet18 --image-size 32 --ratio 0.5",
        "control": "--arch resnet34 --image-size 96 --ratio 2",
        "student1": "--arch resnet34 --image-size 64 --ratio 0.5",
        "student2": "--arch resnet34 --image-size 96 --ratio 1",
        "student3": "--arch resnet34 --image-size 96 --ratio 2",
    }.items():
        assert f"{flags} --seed 3:{name} " in seed3[name]
        assert "finetune.txt --num-ops 1 --batch-size 8 --epochs 7" in seed3[name]
        assert f"--data {data} " in seed3[name] and f"--init {weights}" in seed3[name]
    for number, teacher in enumerate(("teacher", "student1", "student2"), 1):
        assert f"--data {data} --teacher {out}/seed3/{teacher}/model.pt" in seed3[f"labels{number}.h5"]
        both = f"{out}/seed3/probe_full/labels.h5 {out}/seed3/labels{number}.h5 --threshold auto"
        assert both in seed3[f"selected{number}.h5"]
    assert "/student3/model.pt --data" in seed3["fixres"] and "--batch-size 16" in seed3["fixres"]
    assert "--epochs 7" in seed3["probe"] and seed3["probe"].endswith(f"--epochs 0 --out {out}/seed3/probe")
    assert "--own-size --out" in seed3["probe_full"] and "--image-size" not in seed3["probe_full"]
    assert f"--data {data} --teacher {out}/seed3/probe_full/model.pt --unlabeled {data}/unl" in seed3["labels.h5"]
    assert "--temperature 0" in seed3["student1"] and "--temperature" not in seed3["control"]
    names = ("probe", "teacher", "control", "student1", "student2", "student3", "fixres")
    models = [f"{out}/seed{seed}/{name}/model.pt" for seed in (3, 5) for name in names]
    assert lines[-1].startswith(f"torchrun 06_eval_robustness.py {' '.join(models)} --data {data} --val-half judge")


def test_what_run_sh_can_leave_out(toolkit, recorded, tmp_path):
    (tmp_path / "data" / "unlabeled").mkdir(parents=True)
    settings = {"CONTROL": "0", "FIXRES": "0", "RELABEL": "1", "THRESHOLD": "0.3", "NPROC": "1", "GPUS": "77"}
    _, _, lines = recorded("bash", toolkit / "run.sh", tmp_path / "data", OUT=str(tmp_path / "out"), **settings)
    assert [line[:2] for line in lines] == ["01", "02", "03", "04", "02", "04", "06"]
    assert "--ratio 0 --seed 0:teacher" in lines[0] and "small.txt" in lines[0] and "--threshold 0.3" in lines[2]
    assert [line.partition("--image-size ")[2][:2] for line in lines] == ["", "", "", "77", "", "77", ""]
    assert "--unlabeled" in lines[4] and "/selected1.h5 --out" in lines[4] and "/selected2.h5 --data" in lines[5]


def test_help_lists_each_setting_with_its_default():
    done = subprocess.run(["bash", ROOT / "run.sh", "--help"], text=True, capture_output=True, timeout=60, check=True)
    settings = re.findall(r"^([A-Z_]+)=\$\{\1:-", RUN_SH, re.M)
    assert len(settings) >= 16 and re.findall(r"^([A-Z_]+)=\$\{\1:-.*# \S", done.stdout, re.M) == settings
    assert "./run.sh DATA " in done.stdout and not done.stderr


# tests/gpu.sh


def test_what_waits_for_a_gpu_is_known(toolkit, recorded, tmp_path):
    """Every command of gpu.sh parses; without GPUs and files it says what it leaves out; a failure is status 1."""
    (tmp_path / "tf_efficientnet_b0_ns-c0e6a31c.pth").touch()
    given = {"IMAGENET": "imagenet", "SVHN": "svhn", "WEIGHTS": str(tmp_path)}
    status, printed, lines = recorded(toolkit / "tests/gpu.sh", GPUS="2", **given)
    assert status == 0 and printed.splitlines()[-1].endswith("0 left out (), 0 failed ()"), printed
    for precision in ("fp32", "bf16", "fp16"):
        stages = {line[:2] for line in lines if f"--precision {precision}" in line}
        assert stages == {"01", "02", "04", "05", "06"}, precision
    assert sum("--compile" in line for line in lines) == 3
    assert sum(line.startswith("torchrun ") for line in lines) == 5
    assert sum(f"--init {tmp_path}" in line for line in lines) == 1

    status, printed, _ = recorded(toolkit / "tests/gpu.sh", FAILS="04_train_student", WEIGHTS=str(tmp_path))
    lines = printed.splitlines()
    assert status == 1 and [line.split()[1] for line in lines if line.startswith("FAILED")] == ["fp32-04"]
    left_out = [line.split()[1] for line in lines if line.startswith("skipped")]
    assert left_out == ["precisions", "two-gpus", "published-b0", "published-b7", "svhn"]
