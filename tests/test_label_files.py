"""Label files: how they are laid out, what is read of those made elsewhere, and how damaged ones are refused."""

import h5py
import numpy as np
import pytest
from conftest import CLASSES as DRAWN
from conftest import assert_mistake, load_stage
from label_files import CLASSES, COLUMNS, change, logits_of, made_elsewhere, read_labels, write_labels

from common import LABELS_FORMAT, TODO, ImageList, check_label_rows, new_label_file, open_label_file

LOGITS = logits_of((0, 0.9), (1, 0.8), (2, 0.7))


def test_a_new_file_is_contiguous_aligned_and_complete_from_the_start(tmp_path):
    path = tmp_path / "x.h5"
    val = {"val_logits": np.zeros((2, 3), np.float16), "val_label": np.zeros(2, np.int32)}
    attrs = val | {"class_counts": np.arange(3), "root": "/root", "arch": "a"}
    with new_label_file(path, 4, 11, CLASSES, [*COLUMNS, "copies"], **attrs) as file:
        assert not path.exists(), "it gets its name when it is whole"
    labels = open_label_file(path)
    dtypes = {"logits": "f2", "label": "i4", "confidence": "f4", "status": "u1", "copies": "u4"}
    dtypes |= {"path": "S11", "offset": "i8", "size": "i8"}
    dtypes |= {"class_counts": "i8", "val_logits": "f2", "val_label": "i4"}
    assert {name: dtype for name, (dtype, _, _) in labels.places.items()} == dtypes
    assert all(offset % 4096 == 0 for _, offset, _ in labels.places.values())
    assert len(labels) == 4 and labels.classes == CLASSES and labels.column("logits").shape == (4, 3)
    assert labels.attrs == {"format": LABELS_FORMAT, "root": "/root", "arch": "a"}
    with h5py.File(path) as file:
        assert h5py.check_string_dtype(file["path"].dtype).encoding == "utf-8"
        assert all(file[name].chunks is None for name in dtypes)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), new_label_file(path, 4, 11, CLASSES, COLUMNS, root="/other"):
        raise RuntimeError
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1, "what was there before is lost"


def test_a_file_made_elsewhere_needs_few_columns(tmp_path, call_main, monkeypatch):
    images = ImageList.of("/data", [(b"%d.png" % i, 0, 0) for i in range(3)])
    path = made_elsewhere(tmp_path / "x.h5", images, [0, 1, 2])
    change(path, status={1: 2}, label={1: -1}, confidence={1: np.nan}, logits={1: np.nan})
    labels = open_label_file(path)
    check_label_rows(labels)
    assert labels.column("offset").tolist() == labels.column("size").tolist() == [0] * 3
    assert labels.column("copies").tolist() == [1, 0, 1] and "copies" not in labels.places
    assert labels.images.name(2) == "/data/2.png"
    monkeypatch.setattr(load_stage("03_balance"), "draw", lambda *args: None)
    assert call_main("03_balance", path, "--out", tmp_path / "o.h5", "--per-class", "all").returncode == 0
    assert read_labels(tmp_path / "o.h5")["path"].tolist() == [b"0.png", b"2.png"]


def replace(name, make=lambda values: values, **how):
    """Another dataset in the place of one: make(its values), stored as `how` says; None: no dataset."""

    def damage(path):
        with h5py.File(path, "r+") as file:
            values = make(file[name][:])
            del file[name]
            if values is not None:
                file.create_dataset(name, data=values, **how)

    return damage


DAMAGES = {
    "another format": lambda path: path.write_bytes(path.read_bytes().replace(b"labels-2", b"labels-1")),
    "a missing column": replace("confidence", lambda values: None),
    "another type": replace("label", dtype="i8"),
    "another shape": replace("label", lambda labels: labels[:2]),
    "fewer classes": replace("classes", lambda classes: classes[:2]),
    "in chunks": replace("logits", chunks=(1, 3)),
    "strings of any length": replace("path", lambda paths: ["x"] * 3),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "no HDF5": lambda path: path.write_text("name,label\n"),
    "missing": lambda path: path.unlink(),
    "a row of status 0": lambda path: change(path, status={1: TODO}),
    "probabilities": lambda path: change(path, logits={1: [0.1, 0.8, 0.1]}),
    "another label": lambda path: change(path, label={1: 2}),
    "no class": lambda path: change(path, label={0: -1}),
    "another confidence": lambda path: change(path, confidence={1: 0.5}),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_refused_by_03_and_04(how, tmp_path, tiny_data, call_main):
    path = write_labels(tmp_path / "labels.h5", LOGITS, tiny_data / "unlabeled", classes=DRAWN)
    DAMAGES[how](path)
    assert_mistake(call_main("03_balance", path, "--out", tmp_path / "o.h5"), "labels.h5")
    flags = ["--data", tiny_data, "--out", tmp_path / "out", "--steps", 1]
    assert_mistake(call_main("04_train_student", "--pseudo-labels", path, *flags), "labels.h5")
    assert not (tmp_path / "o.h5").exists() and not (tmp_path / "out" / "last.pt").exists()
