"""Every flag of the training stages does something: a run of two steps with it ends elsewhere than one without it, or,
for what must not matter, at the same bits. And what the flags of the noise and the papers' recipes do in 01 and 04."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import CHEAP, call_main_of, checkpoint_of, load_stage, patch_name, save_model
from torch import nn

import common
from common import EFFICIENTNETS, load_image, rand_augment, small_image_noise


BASE = {"--image-size": 32, "--batch-size": 8, "--epochs": 2 / 3, "--lr": 0.01, "--warmup-epochs": 0, "--num-ops": 1}
BASE |= {"--magnitude": 5, "--average": 0.5, "--bn-momentum": 0.1, "--eval-every": 0, "--optimizer": "sgd"}


TRAINING = {  # flag: a value that must change the result; None: the flag alone
    "--small-images": None, "--dropout": 0.9, "--drop-path": 0.9, "--bn-momentum": 0.5, "--zero-init-residual": None,
    "--image-size": 40, "--batch-size": 12, "--accumulate": 2, "--epochs": 1, "--optimizer": "adamw", "--lr": 0.02,
    "--schedule": "cosine", "--warmup-epochs": 1, "--weight-decay": 0.5, "--label-smoothing": 0.5, "--average": 0.1,
    "--num-ops": 2, "--magnitude": 9, "--min-crop-area": 0.9, "--no-hflip": None, "--seed": 1, "--precision": "bf16",
    "--arch": CHEAP, "--decays": (1, 0.1), "--classifier-lr": 0.1,
}  # fmt: skip


STUDENT = TRAINING | {"--ratio": 2, "--unlabeled-weight": 3, "--temperature": 3, "--clean-unlabeled": None}
STUDENT |= {"--consistency": "kl"}


FIXRES = {
    "--image-size": 48, "--frozen-blocks": 15, "--train": "classifier", "--batch-size": 12, "--accumulate": 2,
    "--epochs": 1, "--lr": 0.02,
    "--optimizer": "adamw", "--schedule": "cosine", "--weight-decay": 0.5, "--label-smoothing": 0.5, "--seed": 1,
    "--precision": "bf16", "--bn-momentum": 0.5,
}  # fmt: skip


SAME = {"--workers": 1, "--save-every": 1, "--device": "cpu", "--max-bad": 5, "--checkpoint-activations": None}


@pytest.fixture(scope="module")
def weights_of(tiny_data, tmp_path_factory):
    """weights_of(stage, flag, value) -> the checkpoint's weights after two steps; each run is made once."""
    root = tmp_path_factory.mktemp("flags")
    done, patch = {}, pytest.MonkeyPatch()
    patch.setitem(EFFICIENTNETS, "efficientnet_b0", (0.2, *EFFICIENTNETS["efficientnet_b0"][1:]))  # a toy of B0

    def weights_of(name, flag=None, value=None):
        if (name, flag) not in done:
            out = root / name / (flag or "base").strip("-")
            given = {"01_train_teacher": {"--data": tiny_data}, "04_train_student": {}, "05_fixres_finetune": {}}[name]
            if name != "01_train_teacher":
                teacher = weights_of("01_train_teacher") and root / "01_train_teacher" / "base" / "model.pt"
                given["--teacher" if name == "04_train_student" else "--checkpoint"] = teacher
            kept = {"--image-size", "--batch-size", "--epochs", "--lr", "--optimizer"}
            given |= {k: v for k, v in BASE.items() if name != "05_fixres_finetune" or k in kept}
            given |= {"--image-size": 40} if name == "05_fixres_finetune" else {}
            if flag:
                given[flag] = value
            words = [[k, *(v if isinstance(v, tuple) else (v,))] for k, v in given.items()]
            words = [word for words_of_one in words for word in words_of_one if word is not None]
            ended = call_main_of(load_stage(name), patch, None, ["--out", out, *words])
            assert ended.returncode == 0, (name, flag)
            done[name, flag] = checkpoint_of(out / "model.pt")["model"]
            shutil.copy(out / "metrics.jsonl", root / f"{name}{flag}.jsonl")
            if flag:
                shutil.rmtree(out)
        return done[name, flag]

    weights_of.root = root
    yield weights_of
    patch.undo()


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


CASES = [(name, *item) for name, flags in (("01_train_teacher", TRAINING), ("04_train_student", STUDENT),
         ("05_fixres_finetune", FIXRES)) for item in flags.items()]  # fmt: skip


@pytest.mark.xdist_group("flags")
@pytest.mark.parametrize(("name", "flag", "value"), CASES, ids=lambda part: str(part))
def test_a_flag_changes_the_result(name, flag, value, weights_of):
    assert not equal(weights_of(name), weights_of(name, flag, value))


@pytest.mark.xdist_group("flags")
@pytest.mark.parametrize("flag", SAME)
@pytest.mark.parametrize("name", ["01_train_teacher", "04_train_student", "05_fixres_finetune"])
def test_a_flag_changes_no_bit_of_the_result(name, flag, weights_of):
    assert equal(weights_of(name), weights_of(name, flag, SAME[flag]))


@pytest.mark.xdist_group("flags")
def test_the_loss_is_the_weighted_sum(weights_of):
    for flag, weight in ((None, 1), ("--unlabeled-weight", 3)):
        weights_of("04_train_student", flag, weight)
        lines = map(json.loads, (weights_of.root / f"04_train_student{flag}.jsonl").read_text().splitlines())
        lines = [line for line in lines if "loss" in line]
        assert len(lines) == 2
        for line in lines:
            expected = line["loss_labeled"] + weight * line["loss_unlabeled"]
            assert line["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["01_train_teacher", "04_train_student", "05_fixres_finetune"])
def test_no_flag_is_forgotten_here(name, capsys, monkeypatch):
    """What --help lists is either in the tables above or tested where it belongs."""
    elsewhere = {"--help", "--data", "--out", "--init", "--teacher", "--checkpoint", "--pseudo-labels", "--logits",
                 "--unlabeled", "--unlabeled-only", "--eval-every", "--compile", "--hflip", "--patience",
                 "--crop-mode"}  # fmt: skip
    elsewhere |= {"--no-small-images"} | ({"--decays"} if name == "05_fixres_finetune" else set())
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        load_stage(name).parse_args()
    usage = capsys.readouterr().out.split("\n\n")[0]
    listed = {word.strip("[],|") for word in usage.split() if word.strip("[|").startswith("--")}
    flags = {"01_train_teacher": TRAINING, "04_train_student": STUDENT, "05_fixres_finetune": FIXRES}[name]
    assert listed - elsewhere == (flags.keys() | SAME.keys()), listed ^ (flags.keys() | SAME.keys() | elsewhere)


# 01 and 04: the noise of small images, and the papers' recipes


def stop_here(*_):
    raise SystemExit(0)


def small_model(arch, num_classes, **options):
    """Any model is this one, which says nothing and takes no time."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


@pytest.fixture
def run_main(call_main, monkeypatch, tiny_data, tmp_path):
    """run_main(stage, *flags) -> what a stage prints; 8 labelled images a step, 3 steps an epoch."""

    def run(name, *flags, **arch_options):
        patch_name(monkeypatch, "build_model", small_model, load_stage(name))
        options = dict.fromkeys(("small_images", "dropout", "drop_path", "zero_init_residual")) | arch_options
        header = {"arch_options": options, "data": str(tiny_data)}
        teacher = save_model(tmp_path / "teacher.pt", "efficientnet_b0", model=small_model("", 3), **header)
        source = ["--teacher", teacher] if name == "04_train_student" else ["--data", tiny_data]
        flags = ["--out", tmp_path / name, "--batch-size", 8, "--image-size", 32, *flags]
        return call_main(name, *source, *flags).stdout

    return run


STAGES = ["01_train_teacher", "04_train_student"]


SMALL = [  # stage, flags, the teacher's or --init's own small_images, whether the noise of small images is on
    (STAGES[0], [], None, False),
    (STAGES[0], ["--small-images"], None, True),
    (STAGES[0], ["--no-small-images"], None, False),
    (STAGES[0], ["--init"], True, True),
    (STAGES[0], ["--init"], None, False),
    (STAGES[0], ["--init", "--no-small-images"], True, False),
    (STAGES[1], [], None, False),
    (STAGES[1], [], True, True),
    (STAGES[1], ["--small-images"], None, True),
    (STAGES[1], ["--no-small-images"], True, False),
]


@pytest.mark.parametrize(("name", "flags", "teachers", "on"), SMALL)
@pytest.mark.parametrize(
    ("more", "randaugment", "mirrors"),
    [
        (["--num-ops", 1, "--magnitude", 3], (1, 3.0), True),
        (["--arch", "efficientnet_b2", "--no-hflip"], (2, 6), False),
    ],
    ids=["given", "recipe"],
)
def test_small_images_get_their_noise_after_randaugment_and_others_do_not(
    name, flags, teachers, on, more, randaugment, mirrors, run_main, tiny_data, tmp_path, monkeypatch
):
    """On what is not cropped: the pixels of the files, which have 32 pixels here, of both kinds of images in 04."""
    stage, calls, seen = load_stage(name), [], []

    def recorded(original):
        def noise(images, *args, **more):
            *args, generator = args
            noised = original(images, *args, generator, **more)
            calls.append((original.__name__, images, tuple(args), noised, generator))
            return noised

        return noise

    def recorded_normalize(images, view):
        seen.append(images)
        return common.normalize(images, view)

    for noise in rand_augment, small_image_noise:
        monkeypatch.setattr(common, noise.__name__, recorded(noise))
    monkeypatch.setattr(stage, "normalize", recorded_normalize)
    flags = [part for flag in flags for part in ([flag, tmp_path / "teacher.pt"] if flag == "--init" else [flag])]
    more = [*more, "--ratio", 1] if name == "04_train_student" else more
    run_main(name, *flags, *more, "--epochs", 0.34, small_images=teachers)
    expected = [("rand_augment", randaugment), ("small_image_noise", (mirrors,))][: 1 + on]  # one step
    assert [(function, args) for function, _, args, _, _ in calls] == expected
    assert calls[-1][1] is calls[0][3 if on else 1], "not one after the other"
    assert calls[0][4] is calls[-1][4] and isinstance(calls[0][4], torch.Generator)
    assert torch.equal(seen[-1], calls[-1][3]), "the model sees something else"
    files = {np.asarray(load_image(path)).tobytes() for path in tiny_data.rglob("*.png") if "val" not in path.parts}
    num_files = sum(image.permute(1, 2, 0).numpy().tobytes() in files for image in calls[0][1])
    assert len(calls[0][1]) == (16 if name == "04_train_student" else 8)
    assert num_files == len(calls[0][1]) if on else num_files < 4


# The official script (local_scripts/imagenet/train.sh:37-76), 350 epochs but for --train_ratio=2, and the paper's
# setting for L2: epochs, ops, magnitude, unlabelled images a labelled one
OFFICIAL_RECIPES = {
    "efficientnet_b0": (700, 0, 0, 1),
    "efficientnet_b1": (700, 0, 0, 3),
    "efficientnet_b2": (700, 2, 6, 3),
    "efficientnet_b3": (700, 2, 12, 3),
    "efficientnet_b4": (700, 2, 15, 3),
    "efficientnet_b5": (350, 2, 18, 3),
    "efficientnet_b6": (350, 2, 24, 3),
    "efficientnet_b7": (350, 2, 27, 3),
    "efficientnet_l2": (350, 2, 27, 14),
}


OTHERS = {
    "efficientnet_l0": (350, 2, 27, 3),
    "efficientnet_l1": (350, 2, 27, 3),
    "tf_efficientnet_b3": (700, 2, 12, 3),
    "resnet18": (350, 2, 9, 3),
}


FLAGS = [
    ([], {}),
    (["--epochs", 2], {0: 2}),
    (["--epochs", 0], {0: 0}),
    (["--num-ops", 3], {1: 3}),  # B0 has no magnitude: it takes the 9 of other models, and the other way around
    (["--num-ops", 0], {1: 0}),
    (["--magnitude", 4.5], {2: 4.5}),
    (["--magnitude", 0], {2: 0}),
    (["--ratio", 2], {3: 2}),
    (["--ratio", 0], {3: 0}),
]


@pytest.mark.parametrize("name", STAGES)
def test_recipes_are_official_and_each_number_yields_to_its_flag(name, run_main, monkeypatch):
    """As the line says that is printed before the first step, at which it is stopped."""
    recipes = OFFICIAL_RECIPES | OTHERS
    width = 4 if name == "04_train_student" else 3
    assert {arch: recipes[arch] for arch in EFFICIENTNETS} == common.RECIPES
    monkeypatch.setattr(common.Run, "steps", stop_here)
    runs = [(arch, [], {}) for arch in recipes]
    runs += [(arch, *change) for arch in ("efficientnet_b0", "efficientnet_l2") for change in FLAGS]
    for arch, flags, changed in runs:
        if "--ratio" in flags and width == 3:
            continue
        expected = {**dict(enumerate(recipes[arch])), **changed}
        if arch == "efficientnet_b0" and {1, 2} & changed.keys():
            expected = {1: 2, 2: 9} | changed | {i: expected[i] for i in (0, 3)}
        printed = run_main(name, "--arch", arch, *flags)
        found = re.search(
            r" 8(?: \+ (\d+))? a step; RandAugment (\d+) ops of magnitude ([\d.]+), .*; (\d+) steps, 3\.0 an ", printed
        )
        assert found, printed
        unlabeled, num_ops, magnitude, steps = found.groups()
        assert (int(steps) / 3, int(num_ops), float(magnitude)) == tuple(expected[i] for i in range(3)), printed
        assert unlabeled == (str(8 * expected[3]) if width == 4 else None), printed
