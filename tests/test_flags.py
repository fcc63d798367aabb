"""Every flag of the training stages does something: a run of two steps with it ends elsewhere than one without it, or,
for what must not matter, at the same bits. And what the flags leave open: recipes, crops, the noise of small images."""

import shutil

import numpy as np
import pytest
import torch
from conftest import CHEAP, call_main_of, checkpoint_of, load_stage, save_model, watch

import common

TRAININGS = ["01_train_teacher", "04_train_student", "05_fixres_finetune"]
BASE = {"--image-size": 32, "--batch-size": 8, "--epochs": 2 / 3, "--lr": 0.01, "--optimizer": "sgd"}
NOISE = {"--warmup-epochs": 0, "--num-ops": 1, "--magnitude": 5, "--average": 0.5, "--bn-momentum": 0.1}

FIXRES = {  # flag: a value that must change the result; None: the flag alone
    "--image-size": 48, "--batch-size": 12, "--accumulate": 2, "--epochs": 1, "--steps": 1, "--optimizer": "adamw",
    "--lr": 0.02, "--schedule": "1:0.1", "--weight-decay": 0.5, "--label-smoothing": 0.5, "--seed": 1,
    "--precision": "bf16", "--bn-momentum": 0.5,
}  # fmt: skip
TEACHER = FIXRES | {
    "--image-size": 40, "--small-images": None, "--dropout": 0.9, "--drop-path": 0.9, "--zero-init-residual": None,
    "--warmup-epochs": 1, "--average": 0.1, "--num-ops": 2, "--magnitude": 9, "--min-crop-area": 0.1,
    "--no-hflip": None, "--arch": CHEAP, "--classifier-lr": 0.1, "--ratio": 1, "--seed": "0:student1",
}  # fmt: skip
STUDENT = TEACHER | {"--ratio": 2, "--unlabeled-weight": 3, "--temperature": 3, "--consistency": "kl"}
FIXRES |= {"--frozen-blocks": 9}
SAME = {"--compile": ("01_train_teacher", None), "--workers": ("04_train_student", 1)}
SAME["--save-every"] = ("05_fixres_finetune", 1)
CASES = list(zip(TRAININGS, (TEACHER, STUDENT, FIXRES), strict=True))


@pytest.fixture(scope="module")
def weights_of(tiny_data, tmp_path_factory):
    """weights_of(stage, flag, value) -> the checkpoint's weights after two steps; each run is made once."""
    root = tmp_path_factory.mktemp("flags")
    weights, patch, compile_model = {}, pytest.MonkeyPatch(), torch.nn.Module.compile
    patch.setitem(common.EFFICIENTNETS, "efficientnet_b0", (0.2, 0.5, 224, 0.2))  # 10 blocks

    def in_32_bits(logits, *args, **options):  # also with --precision bf16
        assert logits.dtype == torch.float32

    watch(patch, torch.nn.functional, "cross_entropy", in_32_bits)
    # torch's tracer alone: the compilers behind it take half a minute a model
    patch.setattr(torch.nn.Module, "compile", lambda model: compile_model(model, backend="eager"))

    def weights_of(stage, flag="", value=None):
        if (stage, flag) not in weights:
            out = root / stage / (flag or "base")
            flags = {"--out": out, "--data": tiny_data, **BASE}
            if stage == "05_fixres_finetune":
                flags |= {"--image-size": 40}
            else:
                flags |= NOISE | {"--eval-every": 0}
            if stage != "01_train_teacher":
                weights_of("01_train_teacher")
                source = "--teacher" if stage == "04_train_student" else "--checkpoint"
                flags[source] = root / "01_train_teacher" / "base" / "model.pt"
            if flag:
                flags.pop(flag, None)
                flags[flag] = value
            command = [word for item in flags.items() for word in item if word is not None]
            if flag and flag not in SAME:  # what changes the result does not go on with another one's run
                again = [*command, "--out", root / stage / "base"]
                assert call_main_of(load_stage(stage), patch, None, again).returncode == 2, (stage, flag)
            assert call_main_of(load_stage(stage), patch, None, command).returncode == 0, (stage, flag)
            weights[stage, flag] = checkpoint_of(out / "model.pt")["model"]
        return weights[stage, flag]

    yield weights_of
    patch.undo()
    torch.compiler.reset()
    shutil.rmtree(root)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.xdist_group("flags")
@pytest.mark.parametrize(
    ("stage", "flag", "value"), [(stage, *item) for stage, flags in CASES for item in flags.items()]
)
def test_a_flag_changes_the_result(stage, flag, value, weights_of):
    assert not equal(weights_of(stage), weights_of(stage, flag, value))


@pytest.mark.xdist_group("flags")
@pytest.mark.parametrize(("flag", "case"), SAME.items())
def test_a_flag_changes_no_bit_of_the_result(flag, case, weights_of):
    stage, value = case
    assert equal(weights_of(stage), weights_of(stage, flag, value))


@pytest.mark.parametrize(("stage", "flags"), CASES)
def test_no_flag_is_forgotten_here(stage, flags, capsys, args_of):
    """What --help lists is either in the tables above or tested where it belongs."""
    elsewhere = {"--help", "--data", "--out", "--init", "--classes", "--teacher", "--checkpoint", "--pseudo-labels"}
    elsewhere |= {"--unlabeled", "--unlabeled-only", "--eval-every", "--patience", "--crop-mode"}
    elsewhere |= {"--own-size", "--hflip", "--no-small-images"}
    with pytest.raises(SystemExit):
        args_of(stage, "--help")
    usage = capsys.readouterr().out.split("\n\n")[0]
    listed = {word.strip("[],|") for word in usage.split() if word.strip("[|").startswith("--")}
    assert listed - elsewhere == flags.keys() | SAME.keys()
    assert len({flag for flag in listed if not flag.startswith("--no-")} - {"--help"}) <= 42


@pytest.mark.parametrize("stage", TRAININGS)
def test_the_last_of_epochs_and_steps_counts(stage, args_of, tmp_path):
    """Also behind a recipe that says one of them."""
    (tmp_path / "recipe.txt").write_text("--steps auto # a comment\n--batch-size 8")
    recipe = f"@{tmp_path / 'recipe.txt'}"
    cases = {
        (recipe,): 1000,
        (recipe, "--epochs", 2): 6,
        (recipe, "--steps", 7): 7,
        (recipe, "--epochs", 2, "--steps", 5): 5,
        (recipe, "--steps", 5, "--epochs", 2): 6,
    }
    for given, steps in cases.items():
        assert common.plan_of(args_of(stage, *given), 1, 24).total_steps == steps, given


def test_recipes_are_official():
    """Epochs, RandAugment ops, their magnitude, unlabelled images a labelled one.

    local_scripts/imagenet/train.sh:37-76, its 350 epochs doubled where it has --train_ratio=2; the paper for L2.
    """
    assert common.RECIPES == {
        "efficientnet_b0": (700, 0, 0, 1), "efficientnet_b1": (700, 0, 0, 3), "efficientnet_b2": (700, 2, 6, 3),
        "efficientnet_b3": (700, 2, 12, 3), "efficientnet_b4": (700, 2, 15, 3), "efficientnet_b5": (350, 2, 18, 3),
        "efficientnet_b6": (350, 2, 24, 3), "efficientnet_b7": (350, 2, 27, 3), "efficientnet_l0": (350, 2, 27, 3),
        "efficientnet_l1": (350, 2, 27, 3), "efficientnet_l2": (350, 2, 27, 14),
    }  # fmt: skip


@pytest.mark.parametrize(("size", "given", "expected"), [(64, [], 0.7), (65, [], 0.08), (64, [0.3], 0.3), (65, [0], 0)])
def test_up_to_64_pixels_the_smallest_crop_is_larger(size, given, expected, args_of):
    args = args_of(TRAININGS[0], *[word for value in given for word in ("--min-crop-area", value)])
    assert common.setup_of(args, {}, {}, size).crop.min_area == expected


@pytest.mark.parametrize(
    ("given", "of_teacher", "of_init", "expected"),
    [
        ([], None, None, None),
        (["--no-small-images"], True, True, False),
        ([], True, None, True),
        ([], True, False, False),
        ([], False, True, True),
    ],
)
def test_small_images_get_their_noise_in_place_of_crops(given, of_teacher, of_init, expected, args_of, monkeypatch):
    """A flag comes before --init, and that before the teacher. Where the images are mirrored, they are so once."""
    view = common.View.default(32)._asdict()
    teacher, init = ({"arch_options": {"small_images": small}, **view} for small in (of_teacher, of_init))
    args = args_of(TRAININGS[1], "--no-hflip", "--arch", CHEAP, "--num-ops", 0, *given)
    setup = common.setup_of(args, teacher, {} if of_init is None else init, 32)
    calls = []
    monkeypatch.setattr(common, "small_image_noise", lambda images, hflip, generator: calls.append(hflip))
    setup.noise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.Generator())
    assert setup.small_images is expected and calls == ([False] if expected else [])
    assert setup.crop.min_area == (None if expected else 0.7) and not setup.crop.hflip


@pytest.mark.parametrize("stage", TRAININGS[:2])
def test_the_model_sees_the_noise_of_both_kinds_of_images(stage, tiny_data, call_main, monkeypatch, tmp_path):
    """Of random crops, none of which is a whole image of 32 pixels, as the teacher sees it."""
    cropped, seen = [], []

    def noise(images, generator, **options):
        cropped.extend(image.numpy().tobytes() for image in images.permute(0, 2, 3, 1).contiguous())
        return torch.full_like(images, 7)

    monkeypatch.setattr(common, "add_noise", noise)
    watch(monkeypatch, load_stage(stage), "normalize", lambda x, view: seen.append((len(x), (x == 7).all())))
    flags = ["--data", tiny_data, "--arch", CHEAP, "--image-size", 32, "--batch-size", 8, "--ratio", 1, "--steps", 1]
    if stage == "04_train_student":
        flags += ["--teacher", save_model(tmp_path / "teacher.pt")]
    assert call_main(stage, *flags, "--out", tmp_path / "o").returncode == 0
    assert len(cropped) == 16 and seen[-1] == (16, True)
    assert not {np.asarray(common.load_image(path)).tobytes() for path in tiny_data.rglob("*.png")} & set(cropped)
