"""docs/recipes.md: every command of its tables runs, in small and in their order; and what the recipes say."""

import re
import shlex
import shutil

import pytest
from conftest import CHEAP, ROOT, load_stage

import common

COMMANDS = re.findall(r"`python (0\d_\w+)\.py (.+?)`", (ROOT / "docs" / "recipes.md").read_text())
# Appended to each command: argparse takes the last value of a flag. The made-up images have 32 pixels.
SMALL = ["--image-size", "32", "--batch-size", "4", "--epochs", "0.34"]
SMALLER = {
    "01_train_teacher": ["--arch", CHEAP, *SMALL],
    "03_balance": ["--threshold", "0", "--max-confidence", "1"],
    "04_train_student": ["--arch", CHEAP, *SMALL],
    "05_fixres_finetune": ["--image-size", "40", "--batch-size", "4", "--epochs", "0.34"],
    "06_eval_robustness": ["--num-images", "4", "--pgd-steps", "1"],
}


def test_every_recipe_stands_in_the_tables_or_in_run_sh():
    text = (ROOT / "docs" / "recipes.md").read_text() + (ROOT / "run.sh").read_text()
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.txt"))
    assert len(recipes) >= 8
    for name in recipes:
        assert f"recipes/{name}.txt" in text or name in ("small", "finetune"), name
        lines = (ROOT / "recipes" / f"{name}.txt").read_text().splitlines()
        assert re.match(r"# For 0[14]", lines[0]) and max(map(len, lines)) <= 120, name


def test_every_command_of_the_tables_runs(tiny_data, call_main, tmp_path, monkeypatch):
    data = shutil.copytree(tiny_data, tmp_path / "DATA")
    shutil.copytree(data, tmp_path / "OTHER", ignore=shutil.ignore_patterns("square"))  # two classes
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "pyplot", lambda: None)
    assert len(COMMANDS) >= 38
    for stage, words in COMMANDS:
        words = shlex.split(words)
        smaller = [word for word in SMALLER.get(stage, []) if "--top-p" not in words or stage != "03_balance"]
        if "130000" in words:  # an epoch of the selection alone would be as long
            smaller += ["--per-class", "9"]
        if "@recipes/svhn.txt" in words:  # its --small-images is for EfficientNets
            smaller += ["--arch", "efficientnet_b0"]
        done = call_main(stage, *words, *smaller)
        assert done.returncode == 0, (stage, words, done)


# what a recipe says, as the stage reads it


def args_of(load, recipe, *words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["stage.py", f"@{ROOT / 'recipes' / recipe}.txt", *words])
    return load.parse_args()


@pytest.mark.parametrize("name", ["small", "finetune", "noisy-student-b7"])
def test_a_recipe_of_both_is_read_by_both(name, monkeypatch):
    teacher = args_of(load_stage("01_train_teacher"), name, "--data", "x", monkeypatch=monkeypatch)
    student = args_of(load_stage("04_train_student"), name, "--teacher", "x", monkeypatch=monkeypatch)
    for flag in ("optimizer", "lr", "average", "num_ops", "magnitude", "schedule", "bn_momentum", "min_crop_area"):
        assert getattr(teacher, flag) == getattr(student, flag), flag


def test_the_papers_recipe_is_what_the_defaults_are(monkeypatch):
    """Of B7; so that a file nobody runs cannot say another thing than the code."""
    words = ["--teacher", "x", "--arch", "tf_efficientnet_b7", "--batch-size", "2048"]
    load = load_stage("04_train_student")
    told = args_of(load, "noisy-student-b7", *words, monkeypatch=monkeypatch)
    monkeypatch.setattr("sys.argv", ["stage.py", *words])
    default = load.parse_args()
    for flag in ("warmup_epochs", "label_smoothing", "average", "bn_momentum", "min_crop_area", "optimizer"):
        assert getattr(told, flag) == getattr(default, flag), flag
    recipe = common.recipe_of("tf_efficientnet_b7", default)
    assert recipe[1:3] == (told.num_ops, told.magnitude) and told.dropout == common.EFFICIENTNETS["efficientnet_b7"][3]
    plans = [common.plan_of(args, 350, 625) for args in (told, default)]
    assert plans[0].peak == pytest.approx(plans[1].peak) and plans[0].schedule == plans[1].schedule
    assert tuple(plans[0].decays) == tuple(plans[1].decays) and told.weight_decay == common.RATES["rmsprop"][2]
