"""Checkpoints: files that are damaged or have code in them, weights that do not fit, format 1, what is not finite."""

import pytest
import torch
from conftest import checkpoint_of, save_model

import common


def test_what_is_no_checkpoint_is_one_line(tmp_path, mistake):
    path = save_model(tmp_path / "model.pt")
    data = path.read_bytes()
    contents = [b"I am not a checkpoint\n", b"", b"PK\x03\x04", b"\x80\x02"]
    contents += [data[:length] for length in (100, len(data) // 2, len(data) - 1)]
    for content in contents:
        path.write_bytes(content)
        mistake(lambda: common.load_model(path), path)
        mistake(lambda: common.initial_weights(path, "resnet18", None), path)
    mistake(lambda: common.load_model(tmp_path / "none.pt"), tmp_path / "none.pt")
    (tmp_path / "x.safetensors").write_text("text")
    mistake(lambda: common.initial_weights(tmp_path / "x.safetensors", "resnet18", None), "x.safetensors")
    for content in ({"model": {}}, {"format": "noisy-student-checkpoint-3"}, [1]):
        torch.save(content, path)
        mistake(lambda: common.load_model(path), path, "noisy-student-checkpoint-2")
    torch.save({"format": common.CHECKPOINT_FORMAT}, path)
    mistake(lambda: common.load_model(path), path)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(legacy, tmp_path, mistake):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    path = tmp_path / "evil.pth"
    evil = {"format": common.CHECKPOINT_FORMAT, "arch": "resnet18", "model": {"x": torch.zeros(1), "y": Evil()}}
    torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
    mistake(lambda: common.load_model(path), path)
    mistake(lambda: common.initial_weights(path, "resnet18", None), path)
    assert not ran.exists()
    torch.load(path, weights_only=False)["model"]["y"].close()
    assert ran.exists(), "the pickle was harmless"


def test_a_checkpoint_whose_weights_do_not_fit_is_one_line(tmp_path, mistake):
    path = save_model(tmp_path / "model.pt")
    checkpoint = checkpoint_of(path)
    missing, wrong = next(iter(checkpoint["model"])), list(checkpoint["model"])[-1]
    torch.save(checkpoint | {"classes": ["a", "b"]}, path)
    mistake(lambda: common.load_model(path), path, wrong)
    del checkpoint["model"][missing]
    torch.save(checkpoint, path)
    mistake(lambda: common.load_model(path), path, missing)


def test_what_is_not_finite_is_not_written_and_what_was_there_stays(tmp_path):
    path = save_model(tmp_path / "model.pt")
    before, model = path.read_bytes(), common.load_model(path)[0]
    with torch.no_grad():
        model.fc.bias[1] = torch.nan
    with pytest.raises(SystemExit) as stop:
        save_model(path, model=model)
    assert stop.value.code == 3 and path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_format_1_is_read_by_every_stage(tiny_data, call_main, tmp_path):
    """Without options, class_counts, hflip, lr, inputs and crop_mode."""
    path = save_model(tmp_path / "t.pt", arch_options={}, data=str(tiny_data), format="noisy-student-checkpoint-1")
    short = ["--batch-size", 8, "--steps", 1]
    runs = {
        "01_train_teacher": ["--data", tiny_data, "--init", path, "--epochs", 0],
        "02_pseudo_label": ["--teacher", path],
        "04_train_student": ["--teacher", path, "--ratio", 1, *short],
        "05_fixres_finetune": ["--checkpoint", path, *short],
    }
    for stage, flags in runs.items():
        assert call_main(stage, *flags, "--out", tmp_path / f"{stage}.h5").returncode == 0
    saved = [checkpoint_of(path) for path in tmp_path.glob("*/model.pt")]
    assert [checkpoint["format"] for checkpoint in saved] == ["noisy-student-checkpoint-2"] * 3
    assert [checkpoint["crop_mode"] for checkpoint in saved] == ["center"] * 3


def test_of_format_1_a_squashed_view_is_the_whole_image(tmp_path):
    """It was so whatever its crop_fraction said."""
    for format, fraction in ((1, 1.0), (2, 0.9)):
        header = {"format": f"noisy-student-checkpoint-{format}", "crop_mode": "squash", "crop_fraction": 0.9}
        checkpoint = common.read_checkpoint(save_model(tmp_path / f"{format}.pt", **header))
        assert common.View.of(checkpoint).crop_fraction == fraction
