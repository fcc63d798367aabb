"""Stage 01: a teacher that learns, what its checkpoint says, the control, `--init`, the default image size."""

import shutil

import numpy as np
import pytest
import torch
from conftest import CHEAP, CLASSES, SHORT_RUN, assert_mistake, assert_same_weights, checkpoint_of, load_stage
from conftest import metrics_of, noise_image, save_model

import common

stage = load_stage("01_train_teacher")
STAGE = "01_train_teacher"


def test_the_teacher_learns_and_its_checkpoint_says_how_it_was_made(tiny_data, call_main, tmp_path):
    out = tmp_path / "t"
    flags = ["--data", tiny_data, "--out", out, "--arch", CHEAP, *SHORT_RUN, "--batch-size", 12, "--steps", 80]
    done = call_main(STAGE, *flags, "--no-hflip", "--eval-every", 20, pictures=True)
    assert done.returncode == 0, done
    lines = metrics_of(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    assert lines[0].keys() == {"step", "epoch", "loss", "lr", "images_per_s", "loader_wait"}
    assert lines[-1].keys() == {"step", "epoch", "val_loss", "val_top1", "val_top5"}
    assert lines[-1]["step"] == 80 and lines[-1]["val_top1"] >= 75
    assert f"val_top1 {lines[-1]['val_top1']:.2f} on 12 images" in done.stdout
    assert (out / "curves.png").stat().st_size > 5000
    saved, last = checkpoint_of(out / "model.pt"), checkpoint_of(out / "last.pt")
    assert last["training"]["total_steps"] == 80 and saved.keys() == last.keys() - {"training"}
    expected = {"format": "noisy-student-checkpoint-2", "stage": "teacher", "arch": CHEAP, "classes": CLASSES}
    expected |= {"class_counts": [8, 8, 8], "image_size": 32, "crop_fraction": 1, "interpolation": "bicubic"}
    expected |= {"mean": common.IMAGENET_MEAN, "std": common.IMAGENET_STD, "crop_mode": "center", "hflip": False}
    expected |= {"lr": 4e-3, "data": str(tiny_data)}
    assert {name: saved[name] for name in expected} == expected
    assert saved.keys() - expected.keys() == {"arch_options", "inputs", "versions", "roots", "model", "metrics", "args"}
    assert saved["inputs"].keys() == {"train", "val"} and "24 images" in saved["inputs"]["train"]
    assert saved["metrics"]["val_top1"] == lines[-1]["val_top1"] and saved["versions"]["torch"] == torch.__version__


CONTROLS = [["--epochs", 4, "--arch", CHEAP], ["--steps", "auto", "--arch", CHEAP]]
CONTROLS += [["--epochs", 4, "--optimizer", "adamw", "--init"], ["@recipes/small.txt", "--arch", "efficientnet_b0"]]


@pytest.mark.parametrize("flags", CONTROLS, ids=str)
def test_with_ratio_it_is_the_students_control(flags, planned, tiny_data, tmp_path):
    """Equal images a step, steps, rate, warm-up and view with the same flags."""
    teacher = save_model(tmp_path / "teacher.pt", data=str(tiny_data))
    flags = [*flags, teacher] if flags[-1] == "--init" else flags
    flags += ["--data", tiny_data, "--batch-size", 8, "--image-size", 40, "--ratio", 1.45]
    control = planned(STAGE, *flags, "--out", tmp_path / "t")
    run = planned("04_train_student", "--teacher", teacher, *flags, "--out", tmp_path / "s")
    assert control.plan == run.plan and control.view == run.view
    assert sum(control.num_asked) == sum(run.num_asked) == 20
    assert run.plan.steps_per_epoch == 3 and run.plan.total_steps >= 12


def test_the_loss_of_a_control_counts_as_its_students(tiny_data, call_main, tmp_path):
    """That is a mean + ratio x a mean. SGD and RMSprop go as far as the gradient is large."""
    for ratio in (0, 3):
        flags = ["--data", tiny_data, *SHORT_RUN, "--epochs", 1, "--ratio", ratio, "--out", tmp_path / str(ratio)]
        assert call_main(STAGE, *flags).returncode == 0
        assert metrics_of(tmp_path / str(ratio))[0]["loss"] == pytest.approx((1 + ratio) * np.log(3), rel=0.25)


def test_a_run_is_not_continued_at_another_size(tiny_data, call_main, tmp_path):
    """Without --image-size it follows from the images, whose names are the same."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    flags = [STAGE, "--data", data, "--arch", CHEAP, "--batch-size", 8, "--steps", 3, "--out", tmp_path / "t"]
    assert call_main(*flags, stop_after=1).returncode == 143
    for path in (data / "train").rglob("*.png"):
        noise_image(64, 64).save(path)
    assert_mistake(call_main(*flags), "--image-size", tmp_path / "t")


SIZES = [(20, {}, False, 32), (300, {}, False, 64), (120, {}, True, 96), (300, {}, True, 224)]  # a CPU: at most 64
SIZES += [(200, {"arch": CHEAP}, False, 192), (40, {"arch": CHEAP}, False, 96), (40, {"arch": CHEAP}, True, 224)]
SIZES += [(20, {"format": "of this toolkit"}, False, 224), (40, {"arch": "vit_b_16"}, False, 224)]  # its positions


@pytest.mark.parametrize(("side", "initial", "gpu", "expected"), SIZES)
def test_the_default_image_size_is_that_of_the_images(side, initial, gpu, expected, monkeypatch, tmp_path):
    for i in range(5):
        noise_image(side + 50, [side, side, side, 16, 400][i]).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"<html>")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert stage.default_size(common.list_images(tmp_path), initial, 224) == expected


@pytest.mark.parametrize(("flags", "size"), [([], 96), (["--own-size", "--image-size", 40], 224)])
def test_the_probe_at_the_size_of_the_weights(flags, size, tiny_data, planned, tmp_path):
    torch.save(common.build_model(CHEAP, 5).state_dict(), tmp_path / "w.pth")
    flags += ["--init", tmp_path / "w.pth", "--arch", CHEAP, "--data", tiny_data, "--out", tmp_path / "t"]
    assert planned(STAGE, *flags, "--steps", 1, "--batch-size", 8).view.image_size == size


@pytest.fixture
def foreign(tmp_path):
    """Flags that start from weights which do not say what their outputs are called."""
    torch.manual_seed(0)
    torch.save(common.build_model(CHEAP, 3).state_dict(), tmp_path / "foreign.pth")
    return [STAGE, "--init", tmp_path / "foreign.pth", "--arch", CHEAP, "--out", tmp_path / "t", "--epochs", 0]


@pytest.mark.parametrize("measured", [False, True])
def test_classes_says_what_the_outputs_of_foreign_weights_are_called(measured, foreign, tiny_data, call_main, tmp_path):
    last = "square" if measured else "cafe\u0301"  # as macOS writes it
    (tmp_path / "names.txt").write_text(f"triangle\ndisc\n{last}\n")
    done = call_main(*foreign, "--classes", tmp_path / "names.txt", *(["--data", tiny_data] if measured else []))
    saved = checkpoint_of(tmp_path / "t" / "model.pt")
    assert saved["classes"] == ["triangle", "disc", common.nfc(last)]
    assert ("data" in saved) == measured == ("on 12 images" in done.stdout)
    assert_same_weights(saved["model"], torch.load(tmp_path / "foreign.pth", weights_only=True))


def test_without_classes_the_folders_say_it_unless_they_are_numbers(foreign, tiny_data, call_main, tmp_path):
    assert_mistake(call_main(*foreign), "--classes")
    done = call_main(*foreign, "--data", tiny_data)
    assert ", ".join(CLASSES) in done.stdout and checkpoint_of(tmp_path / "t" / "model.pt")["classes"] == CLASSES
    for number, name in enumerate(CLASSES):
        for split in ("train", "val"):
            (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / split / str(number + 9)).symlink_to(tiny_data / split / name)
    flags = [*foreign, "--out", tmp_path / "o"]
    assert_mistake(call_main(*flags, "--data", tmp_path / "data"), "--classes")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert_mistake(call_main(*flags, "--classes", tmp_path / "names.txt"), "--init")  # it has three outputs
    assert_mistake(call_main(*flags, "--classes", tmp_path / "none.txt"), "--classes")
    assert not list(tmp_path.glob("o/*.pt"))


def test_val_is_numbered_as_train_where_it_lacks_a_class(tiny_data, args_of, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.rmtree(data / "val" / "disc")
    _, (_, labels), classes = stage.labeled_data(args_of(STAGE, "--data", data), {})
    assert classes == CLASSES and set(labels.tolist()) == {1, 2}


@pytest.mark.parametrize("classes", [["triangle", "square", "disc"], ["disc", "square"]])
def test_a_classifier_of_other_classes_starts_anew(classes, tiny_data, call_main, tmp_path):
    path = save_model(tmp_path / "model.pt", classes=classes)
    flags = [STAGE, "--init", path, "--data", tiny_data, "--out", tmp_path / "t", "--batch-size", 8]
    assert call_main(*flags, "--steps", 1, "--lr", 0).returncode == 0
    before, after = (checkpoint_of(file)["model"] for file in (path, tmp_path / "t" / "model.pt"))
    assert after["fc.weight"].shape == (3, 1024) and not torch.equal(before["fc.weight"][:2], after["fc.weight"][:2])
    assert torch.equal(before["conv5.0.weight"], after["conv5.0.weight"])


@pytest.mark.parametrize(
    ("weights", "flags", "named"),
    [
        ({"x": torch.zeros(1)}, [], "--arch"),
        ({"x": torch.zeros(1)}, ["--arch", "resnet18"], "--arch resnet18"),
        ({"x": torch.zeros(1)}, ["--arch", "efficientnet_b9"], "--arch"),
        ([torch.zeros(1)], ["--arch", "resnet18"], "--init"),
    ],
)
def test_a_mistaken_init_is_one_line_and_status_2(weights, flags, named, tiny_data, call_main, tmp_path):
    torch.save(weights, tmp_path / "weights.pth")
    flags = [STAGE, "--init", tmp_path / "weights.pth", "--data", tiny_data, "--out", tmp_path / "t", *flags]
    for steps in (0, 1):
        assert_mistake(call_main(*flags, "--steps", steps), named)
    assert not list(tmp_path.glob("t/*.pt"))
