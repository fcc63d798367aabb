"""Checkpoints: files that are damaged or have code in them, weights that do not fit, a number that is not finite."""

import pytest
import torch
from conftest import assert_mistake, save_model

from common import CHECKPOINT_FORMAT, build_model, load_model, load_weights


def other_model(arch="efficientnet_b0"):
    return build_model(arch, 3)


@pytest.fixture(scope="module")
def b0(tmp_path_factory):
    """A checkpoint of this toolkit: its path, its bytes."""
    path = save_model(tmp_path_factory.mktemp("b0") / "model.pt", "efficientnet_b0")
    return path, path.read_bytes()


def test_what_is_no_checkpoint_is_one_line(b0, tmp_path, mistake):
    path, data = tmp_path / "model.pt", b0[1]
    for content in (
        b"I am not a checkpoint\n",
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        *(data[:length] for length in (1, 100, len(data) // 2, len(data) - 1000, len(data) - 22, len(data) - 1)),
    ):
        path.write_bytes(content)
        mistake(lambda: load_model(path), path, "not a checkpoint")
        mistake(lambda: load_weights(other_model(), path), path, "not a checkpoint")
    mistake(lambda: load_model(tmp_path / "none.pt"), tmp_path / "none.pt", "no such checkpoint")
    (tmp_path / "x.safetensors").write_text("text")
    mistake(lambda: load_weights(other_model(), tmp_path / "x.safetensors"), "x.safetensors", "not a checkpoint")
    torch.save({"model": {}}, path)
    mistake(lambda: load_model(path), path, "not a checkpoint of this toolkit")


def test_a_flipped_byte_in_a_tensor_is_noticed(b0, tmp_path, mistake):
    path, data = tmp_path / "model.pt", bytearray(b0[1])
    weight = torch.load(b0[0])["model"]["classifier.1.weight"]
    place = data.index(weight.numpy().tobytes()) + 4 * 1000 + 1
    data[place] ^= 1
    path.write_bytes(data)
    other = torch.load(path)["model"]["classifier.1.weight"]  # torch itself sees nothing
    assert (other != weight).sum() == 1 and (other - weight).abs().max() < 1e-3
    mistake(lambda: load_model(path), path, "checksum")
    mistake(lambda: load_weights(other_model(), path), path, "checksum")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(legacy, tiny_data, tmp_path, mistake, call_main):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    path = tmp_path / "evil.pth"
    evil = {"format": CHECKPOINT_FORMAT, "arch": "efficientnet_b0", "model": {"x": torch.zeros(1), "y": Evil()}}
    torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
    mistake(lambda: load_model(path), path, "nothing in it was executed")
    mistake(lambda: load_weights(other_model(), path), path, "nothing in it was executed")
    done = call_main(
        "01_train_teacher",
        "--data",
        tiny_data,
        "--init",
        path,
        "--arch",
        "efficientnet_b0",
        "--epochs",
        0,
        "--out",
        tmp_path / "o",
    )
    assert assert_mistake(done, "nothing in it was executed") and not (tmp_path / "o").exists()
    assert not ran.exists()
    torch.load(path, weights_only=False)["model"]["y"].close()
    assert ran.exists(), "the pickle was harmless"


@pytest.mark.parametrize("arch", ["efficientnet_b0", "resnet18"])
def test_a_checkpoint_whose_weights_do_not_fit_is_one_line(arch, tmp_path, mistake):
    model = other_model(arch)
    missing, wrong = next(iter(model.state_dict())), list(model.state_dict())[-1]
    path = save_model(tmp_path / "model.pt", arch, model=model)
    checkpoint = torch.load(path)
    torch.save(checkpoint | {"classes": ["a", "b"]}, path)
    mistake(lambda: load_model(path), path, wrong, "instead of (2,)")
    del checkpoint["model"][missing]
    torch.save(checkpoint, path)
    mistake(lambda: load_model(path), path, f"missing: {missing}")


def test_what_is_not_finite_is_not_written_and_what_was_there_stays(tmp_path):
    path = save_model(tmp_path / "model.pt", "efficientnet_b0")
    before, model = path.read_bytes(), other_model()
    with torch.no_grad():
        model.classifier[1].bias[1] = torch.nan
    with pytest.raises(SystemExit) as stop:
        save_model(path, "efficientnet_b0", model=model)
    assert stop.value.code == 3 and path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
