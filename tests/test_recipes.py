"""recipes/*.txt: each is read by its stages, and gives the plan that it says. docs/recipes.md has a command for each;
test_readme.py reads those."""

import re

import pytest
from conftest import ROOT

import common

IMAGENET = 1_281_167  # labelled images
# recipe: (its stages, other flags, images of an epoch, steps, peak rate, rate of the last step)
PLANS = {
    "billion-scale-pretrain": ("4", "--pseudo-labels x", 16_000_000, 651_042, 0.6, 0.6 * 0.5**13),
    "billion-scale-finetune": ("1", "--init x", IMAGENET, 25_023, 0.0015, 0.0015 * 0.1**3),
    "consistency-teacher": ("1", "", 50_000, 39_062, 1e-3, 1e-3),  # plateau takes off what the evaluations say
    "consistency": ("4", "", 50_000, 39_062, 1e-3, 1e-3),
    "finetune": ("14", "--init x --batch-size 32", 4_000, 3_750, 1e-4, 0),
    "fixres-l2": ("5", "", IMAGENET, 938, 0.128 * 0.97**145, 0.128 * 0.97**145),
    "noisy-student-b7": ("14", "--batch-size 2048 --epochs 350", IMAGENET, 218_949, 0.128, 0.128 * 0.97**145),
    "small": ("14", "--batch-size 32", 300, 1_000, 4e-3, 0),
    "svhn": ("4", "", 69_257, 109_296, 0.008, 0.008 * 0.97**144),
}
STAGES = {"1": "01_train_teacher", "4": "04_train_student", "5": "05_fixres_finetune"}
PAIRS = [(name, STAGES[number]) for name, plan in PLANS.items() for number in plan[0]]


def file_of(recipe: str) -> str:
    return f"@{ROOT}/recipes/{recipe}.txt"


@pytest.mark.parametrize(("name", "stage"), PAIRS)
def test_a_recipe_gives_the_plan_that_it_says(name, stage, args_of):
    _, flags, num_images, steps, peak, last = PLANS[name]
    args = args_of(stage, file_of(name), *flags.split())
    plan = common.plan_of(args, 1, num_images)
    assert plan.total_steps == steps and plan.peak == pytest.approx(peak, rel=1e-3)
    assert common.learning_rate(steps - 1, plan) == pytest.approx(last, rel=1e-2, abs=1e-7)
    first = common.learning_rate(1, plan)
    assert first == pytest.approx(peak / plan.warmup_steps if plan.warmup_steps else peak, rel=1e-3)


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan[0] == "14"])
def test_a_recipe_of_both_says_the_same_to_both(name, args_of):
    teacher, student = (vars(args_of(STAGES[n], file_of(name), *PLANS[name][1].split())) for n in "14")
    text = (ROOT / "recipes" / f"{name}.txt").read_text()
    flags = re.findall(r"(?:^| )--([\w-]+)", text, re.M)
    names = {flag.replace("-", "_") for flag in flags} & teacher.keys()
    assert len(names) > 5 and all(teacher[name] == student[name] for name in names)


def test_the_papers_recipe_is_what_the_defaults_are(args_of):
    """Of B7; so that a file nobody runs cannot say another thing than the code."""
    flags = ["--arch", "tf_efficientnet_b7", "--batch-size", 2048, "--image-size", 600]
    recipes = [file_of("noisy-student-b7")], []
    told, default = (args_of(STAGES["4"], *recipe, *flags) for recipe in recipes)
    assert told.bn_momentum == 0.01 and default.bn_momentum is None  # which is 0.01 from scratch
    for flag in ("warmup_epochs", "average", "optimizer", "classifier_lr"):
        assert getattr(told, flag) == getattr(default, flag), flag
    recipe = common.recipe_of("tf_efficientnet_b7", default)
    assert recipe[1:3] == (told.num_ops, told.magnitude) and told.dropout == common.EFFICIENTNETS["efficientnet_b7"][3]
    assert told.label_smoothing == 0.1 and told.weight_decay == common.RATES["rmsprop"][2]
    setups = [common.setup_of(args, {}, {}, 600) for args in (told, default)]
    assert setups[0].crop == setups[1].crop
    plans = [common.plan_of(args, recipe.epochs, IMAGENET) for args in (told, default)]
    assert plans[0].total_steps == plans[1].total_steps and plans[0].peak == pytest.approx(plans[1].peak)
    assert plans[0][3:] == plans[1][3:]


def test_every_recipe_has_a_plan_here_and_says_what_it_is_for():
    assert {path.stem for path in (ROOT / "recipes").iterdir()} == PLANS.keys()
    settings = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", (ROOT / "run.sh").read_text(), re.M))
    for name, plan in PLANS.items():
        text = (ROOT / "recipes" / f"{name}.txt").read_text()
        first = text.splitlines()[0]
        assert first.startswith("# For ") and all(f"0{number}" in first for number in plan[0]), name
        assert max(map(len, text.splitlines())) <= 120, name
        assert set(re.findall(r"\b([A-Z_\d]+)=", text)) <= settings, f"{name} names settings that run.sh has not"


@pytest.mark.parametrize(("name", "stage"), [pair for pair in PAIRS if pair[0].startswith("consistency")])
def test_the_keras_example_is_tested_on_all_of_an_image(name, stage, args_of):
    """As 06 --cifar10-c shows it; the middle square would be 48 percent of it."""
    assert args_of(stage, file_of(name)).crop_mode == "squash"


def test_a_checkout_on_windows_keeps_the_line_ends_of_shell_scripts():
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()
