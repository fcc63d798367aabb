"""The program around the method: what the user got wrong ends with status 2 and one line, and leaves nothing behind;
which packages a stage needs, and which definitions of common.py."""

import ast
import os

import pytest
from conftest import ROOT, assert_mistake, save_model

import common

BAD_INPUT = {  # {}: the places below
    "no data directory": ("01_train_teacher.py --data {tmp}/nothing --out {tmp}/o", "{tmp}/nothing"),
    "no data": ("01_train_teacher.py --out {tmp}/o", "--data"),
    "batch size 0": ("01_train_teacher.py --data {data} --out {tmp}/o --batch-size 0", "--batch-size"),
    "a typo in a flag": ("01_train_teacher.py --data {data} --out {tmp}/o --epoch 1", "--epoch"),
    "no such recipe": ("01_train_teacher.py @{tmp}/recipe.txt --data {data} --out {tmp}/o", "recipe.txt"),
    "no such teacher": ("04_train_student.py --teacher {tmp}/none.pt --out {tmp}/o", "none.pt"),
    "no labels at all": ("04_train_student.py --out {tmp}/o", "--pseudo-labels"),
    "unused names": ("01_train_teacher.py --data {data} --out {tmp}/o --classes {text}", "--classes"),
    "no schedule": ("01_train_teacher.py --data {data} --out {tmp}/o --schedule 3:0.5.5", "--schedule"),
    "text over a teacher": ("02_pseudo_label.py --teacher {teacher} --out {tmp}/o --csv {teacher}", "--csv {teacher}"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_data):
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "text.pt").write_text("I am not a checkpoint\n")
    teacher = save_model(tmp / "teacher.pt", data=str(tiny_data))
    return {"tmp": tmp, "text": tmp / "text.pt", "data": tiny_data, "teacher": teacher}


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_a_mistake_is_one_line_and_status_2(mistake, places, call_main):
    command, named = (text.format(**places) for text in BAD_INPUT[mistake])
    stage, *words = command.split()
    assert_mistake(call_main(stage.removesuffix(".py"), *words), named)
    files = {path for path in places["tmp"].rglob("*") if path.is_file() and path.name != ".lock"}
    assert files == {places["text"], places["teacher"]}


@pytest.mark.parametrize("launcher", [None, "torchrun"])
def test_a_mistake_of_two_processes_is_said_once(launcher, places, run_stage):
    flags = ["--teacher", places["text"], "--out", places["tmp"] / "l.h5"]
    done = run_stage(ROOT / "02_pseudo_label.py", *flags, nproc=2, check=False, launcher=launcher)
    assert done.returncode == (1 if launcher else 2) and done.stderr.count(f"error: {places['text']}") == 1


def test_every_stage_runs_with_five_packages_alone(tiny_data, run_stage, tmp_path):
    """torch, torchvision, numpy, pillow and h5py. 06 --corrupt alone needs more: test_06_eval_robustness.py."""
    hidden = {"WITHOUT": "tqdm matplotlib scipy cv2 timm av safetensors pandas sklearn"}
    drawn, selected, report = tmp_path / "drawn", tmp_path / "selected.h5", tmp_path / "report"
    teacher, student, fixres = (tmp_path / name / "model.pt" for name in ("teacher", "student", "fixres"))
    short = ["--batch-size", 8, "--steps", 2]
    run_stage("-c", SMALL_DEMO, "demo", "--out", drawn, **hidden)
    run_stage("01_train_teacher.py", "--data", tiny_data, *short, "--image-size", 32, "--out", teacher.parent, **hidden)
    run_stage("02_pseudo_label.py", "--teacher", teacher, "--out", tmp_path / "logits.h5", **hidden)
    run_stage("03_balance.py", tmp_path / "logits.h5", "--threshold", 0, "--out", selected, **hidden)
    run_stage("04_train_student.py", "--pseudo-labels", selected, *short, "--out", student.parent, **hidden)
    run_stage("05_fixres_finetune.py", "--checkpoint", student, *short, "--out", fixres.parent, **hidden)
    run_stage("06_eval_robustness.py", teacher, fixres, "--fgsm", 2, "--out", report, **hidden)
    assert (drawn / "unlabeled_truth.csv").exists() and (report / "robustness.json").exists()


SMALL_DEMO = """import importlib
stage = importlib.import_module("00_prepare_data")
stage.DEMO |= {"labels_per_class": 2, "val_per_class": 2, "unlabeled": 40}
stage.main()
"""


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, os.listdir(tmp_path))))
    with common.write_atomically(tmp_path / "a") as temporary:
        temporary.write_text("123")
    assert synced == [(3, [temporary.name])]


FOR_OTHERS = {"EFFICIENTNETS", "build_model", "load_weights", "load_model", "rand_augment", "RAND_AUGMENT_OPS"}


def names_used(node: ast.AST) -> set[str]:
    """The names that a statement reads and does not bind itself: what it takes of its module."""
    names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
    bound = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    bound |= {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
    return {name.id for name in names if isinstance(name.ctx, ast.Load)} - bound


def definitions(tree: ast.Module) -> dict[str, set[str]]:
    """{name that the module defines: the names that its statements use}; what one statement binds belongs together"""
    uses = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            uses[node.name] = names_used(node)
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            for name in names:
                if isinstance(name.ctx, ast.Store):
                    uses[name.id] = uses.get(name.id, set()) | {other.id for other in names}
    return uses


def test_each_definition_of_common_is_reached_from_two_stages():
    """Itself or through others of common. What one stage alone uses lives in that stage."""
    uses = definitions(ast.parse((ROOT / "common.py").read_text()))
    stages = {name: set() for name in uses}
    for path in sorted(ROOT.glob("0*.py")):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        reached, todo = set(), {alias.name for node in imports if node.module == "common" for alias in node.names}
        assert todo <= uses.keys(), f"{path.name} imports what is not there: {todo - uses.keys()}"
        while todo:
            name = todo.pop()
            reached.add(name)
            todo |= (uses[name] & uses.keys()) - reached
        for name in reached:
            stages[name].add(path.name)
    assert uses.keys() >= FOR_OTHERS and len(uses) > 100
    lonely = {name: sorted(of) for name, of in stages.items() if len(of) < 2 and name not in FOR_OTHERS}
    assert lonely == {}
