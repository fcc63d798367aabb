"""The program around the method: what the user got wrong ends with status 2 and one line, and leaves nothing behind."""

import shutil

import pytest
from conftest import ROOT, assert_mistake, draw_data, save_model


BAD_INPUT = {  # {}: the places below
    "no data directory": ("01_train_teacher.py --data {tmp}/nothing --out {tmp}/o", "train/"),
    "an empty class": ("01_train_teacher.py --data {empty} --out {tmp}/o", "'hollow' has no images"),
    "val with a class that train lacks": ("01_train_teacher.py --data {extra} --out {tmp}/o", "unicorn"),
    "batch size 0": ("01_train_teacher.py --data {data} --out {tmp}/o --batch-size 0", "--batch-size"),
    "a typo in a flag": ("01_train_teacher.py --data {data} --out {tmp}/o --epoch 1", "--epoch"),
    "an unknown model": ("01_train_teacher.py --data {data} --out {tmp}/o --arch b0", "--arch"),
    "a text file as teacher": ("02_pseudo_label.py --teacher {text} --out {tmp}/o.h5", "not a checkpoint"),
    "no such teacher": ("04_train_student.py --teacher {tmp}/none.pt --out {tmp}/o", "no such checkpoint"),
    "no labels at all": ("04_train_student.py --out {tmp}/o", "--teacher or --pseudo-labels"),
    "no images": ("02_pseudo_label.py --teacher {teacher} --unlabeled {tmp}/no --out {tmp}/l", "no such folder"),
    "a text file as logits": ("03_balance.py {text} --out {tmp}/b.h5", "not a readable HDF5"),
    "a checkpoint as logits": ("03_balance.py {teacher} --out {tmp}/b.h5", "not a readable HDF5"),
    "a text file to tune": (
        "05_fixres_finetune.py --checkpoint {text} --image-size 40 --out {tmp}/o",
        "not a checkpoint",
    ),
    "too many blocks": (
        "05_fixres_finetune.py --checkpoint {teacher} --image-size 40 --out {tmp}/o --frozen-blocks 17",
        "--frozen-blocks 17",
    ),
    "a text file to evaluate": ("06_eval_robustness.py {text} --data {data} --out {tmp}/o", "not a checkpoint"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_data):
    tmp = tmp_path_factory.mktemp("bad")
    empty, extra = draw_data(tmp / "empty"), draw_data(tmp / "extra")
    (empty / "train" / "hollow").mkdir()
    (extra / "val" / "unicorn").mkdir()
    shutil.copy(extra / "val" / "disc" / "0.png", extra / "val" / "unicorn" / "0.png")
    (tmp / "text.pt").write_text("I am not a checkpoint\n")
    teacher = save_model(tmp / "teacher.pt", "efficientnet_b0", data=str(tiny_data))
    return {"tmp": tmp, "empty": empty, "extra": extra, "text": tmp / "text.pt", "data": tiny_data, "teacher": teacher}


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_a_mistake_is_one_line_and_status_2(mistake, places, call_main):
    command, message = BAD_INPUT[mistake]
    listing = sorted(places["tmp"].rglob("*"))
    stage, *words = command.format(**places).split()
    assert_mistake(call_main(stage.removesuffix(".py"), *words), message)
    assert sorted(places["tmp"].rglob("*")) == listing, "it left something behind"


def test_a_mistake_of_two_processes_is_said_once(places, run_stage):
    flags = ["--teacher", places["text"], "--out", places["tmp"] / "l.h5"]
    assert_mistake(run_stage("02_pseudo_label.py", *flags, nproc=2, check=False), "not a checkpoint")


def test_under_torchrun_a_mistake_is_said_once(places, run_stage):
    flags = ["--teacher", places["text"], "--out", places["tmp"] / "l.h5"]
    done = run_stage(ROOT / "02_pseudo_label.py", *flags, nproc=2, check=False, launcher="torchrun")
    assert done.returncode == 1 and done.stderr.count("not a checkpoint") == 1
