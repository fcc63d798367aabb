"""logits.h5 and balanced.h5: how they are laid out, and files made to read others or to fill the memory."""

import os
import shutil
import tempfile
from types import SimpleNamespace
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import assert_mistake, encoded, load_stage, noise_image, write_files
from label_files import create_logits, CLASSES, logits_of, new_file, write_logits

import common
from common import LOGITS_FORMAT, SELECTION_FORMAT, ImageList, list_images, open_label_file, read_classes


def read_all(path):
    """What stage 04 makes of a selection."""
    flags = SimpleNamespace(pseudo_labels=path, unlabeled=None, logits=[], teacher=None, temperature=None)
    flags.label_smoothing = 0.1
    return load_stage("04_train_student").StoredLabels(flags)


def test_a_fresh_logits_file_is_contiguous_and_all_undone(tmp_path):
    nothing = np.zeros(3, np.int64)
    paths = np.array([name.encode() for name in ("a.png", "c.tar/d.png", "ü/b.png")])
    rows = ImageList("/root", paths, nothing + 7, nothing + 9)
    create_logits(tmp_path / "x.h5", rows, CLASSES, 3, arch="a", image_size=32, teacher="t", teacher_sha256="s")
    with open_label_file(tmp_path / "x.h5", LOGITS_FORMAT) as file:
        assert file["status"][:].tolist() == [0, 0, 0]
        assert file["path"][:].tolist() == rows.path.tolist()
        assert file["offset"][:].tolist() == [7] * 3 and file["size"][:].tolist() == [9] * 3
        dtypes = {"logits": "f2", "label": "i4", "confidence": "f4", "status": "u1", "offset": "i8", "size": "i8"}
        assert {name: file[name].dtype for name in dtypes} == {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        assert file["logits"].shape == (3, 3)
        for name in (*dtypes, "path"):
            assert file[name].chunks is None and file[name].id.get_offset() is not None, f"{name} is not in place"
        assert h5py.check_string_dtype(file["path"].dtype).length == 11
        assert read_classes(file) == CLASSES
        assert file.attrs["root"] == "/root" and file.attrs["format"] == LOGITS_FORMAT


@contextmanager
def as_nobody():
    """Permissions do not hold for root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_columns_are_handled_in_parts(tmp_path, monkeypatch):
    """Parts of three rows, and the whole in one: the same files, comparisons, digests and draws."""

    def answers(path):
        names = [f"{i:02}.png" for i in range(11)]
        with open_label_file(write_logits(path, np.eye(11, 3), names=names), LOGITS_FORMAT) as file:
            images, rows = common.image_list(file), np.array([0, 1, 1, 1, 4, 8, 8, 10])
            last = replace(images, path=np.append(images.path[:10], b"x"))
            yield [file[name][:].tolist() for name in ("path", "offset", "size")]
            yield [common.same_paths(images, other) for other in (images, replace(images), last, images[:10])]
            yield [common.same_paths(images, last, found) for found in (rows[:-1], range(10), rows)]
            yield [common.digest_of((file, found)) for found in (rows, rows[::-1], np.unique(rows))]
            yield [column.tolist() for (column,) in common.draw_fraction([file], 0.5, 3)]

    whole = [*answers(tmp_path / "whole.h5")]
    assert whole[1:3] == [[True, True, False, False], [True, True, False]] and len({*whole[3]}) == 1
    assert 0 < np.isnan(whole[4][0]).sum() < 11
    in_threes = lambda num: (slice(begin, min(begin + 3, num)) for begin in range(0, num, 3))  # noqa: E731
    monkeypatch.setattr(common, "slices", in_threes)
    np.testing.assert_equal([*answers(tmp_path / "whole.h5")], whole)


def test_a_folder_or_a_file_without_permission_is_one_line(capsys, mistake):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        out, closed = new_file(Path(folder) / "l.h5"), Path(folder) / "closed"
        write_files(closed / "in", {"0.png": encoded(noise_image(8, 8), "PNG")})
        os.chmod(out, 0o444)
        os.chmod(folder, 0o555)
        os.chmod(closed, 0)
        writer = load_stage("02_pseudo_label").RowWriter
        for call in (lambda: writer(out), lambda: new_file(out.with_name("other.h5"))):
            with as_nobody():
                mistake(call, "Permission denied")
            assert sorted(os.listdir(folder)) == ["closed", "l.h5"]
        with as_nobody():
            assert len(list_images(folder)) == 0
        assert "closed cannot be listed (Permission denied)" in capsys.readouterr().out
        os.chmod(closed, 0o755)
        os.chmod(folder, 0o755)


# files made to read others, or to fill the memory


def low_level(file: h5py.File, name: str, dtype, shape: tuple, *, external=None) -> None:
    """A dataset whose data need not be in the file."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if external:
        creation.set_external(*external)
    h5py.h5d.create(
        file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape), creation
    )


def make_evil(path: Path, name: str, how: str, folder: Path) -> None:
    """Replace a dataset or an attribute by something that a careless reader would follow or fill the memory with."""
    secret = folder / "secret.h5"
    with h5py.File(path, "r+") as file:
        dtype, shape = file[name].dtype, file[name].shape
        with h5py.File(secret, "w") as other:
            other["x"] = np.zeros(shape, "S3" if dtype.kind in "OS" else dtype)
        (folder / "secret.txt").write_bytes(b"password" * 100)
        if "attribute" not in how:
            del file[name]
        huge = (2**40, *shape[1:])
        if how == "external link":
            file[name] = h5py.ExternalLink(str(secret), "x")
        elif how == "soft link":
            file[name] = h5py.SoftLink("/classes" if name != "classes" else "/label")
        elif how == "external storage":
            low_level(
                file,
                name,
                "S3" if dtype.kind in "OS" else dtype,
                shape,
                external=(str(folder / "secret.txt").encode(), 0, 800),
            )
        elif how == "virtual dataset":
            layout = h5py.VirtualLayout(shape, other_dtype := "S3" if dtype.kind in "OS" else dtype)
            layout[...] = h5py.VirtualSource(str(secret), "x", shape, other_dtype)
            file.create_virtual_dataset(name, layout)
        elif how == "group":
            file.create_group(name)
        elif how == "2 TB":
            low_level(file, name, "S3" if dtype.kind in "OS" else dtype, huge)
        elif how == "2 TB in all":  # every column, so that the lengths agree
            for other in [key for key in file if key != "classes" and key != name]:
                kind = file[other].dtype
                more = file[other].shape[1:]
                del file[other]
                low_level(file, other, kind, (2**40, *more))
            low_level(file, name, dtype, huge)
        elif how == "2 TB in chunks":
            file.create_dataset(name, huge, "S3" if dtype.kind in "OS" else dtype, chunks=True, compression="gzip")
        elif how == "strings of any length":
            kind = h5py.string_dtype()
            file.create_dataset(name, shape, kind)[...] = "x" * 10_000
        elif how == "one long string many times":
            kind = h5py.string_dtype()
            dataset = file.create_dataset(name, (3000,), kind)
            dataset[0] = "x" * 10**6
            file.flush()
            where, end = dataset.id.get_offset(), dataset.id.get_storage_size() // 3000
        elif how == "another type":
            file.create_dataset(name, data=np.zeros(shape, "f8" if dtype != "f8" else "i4"))
        elif how == "another shape":
            file.create_dataset(name, data=np.zeros((shape[0] + 1, *shape[1:]), "S3" if dtype.kind in "OS" else dtype))
        elif how == "an attribute of another kind":
            file.attrs["root" if "logits" in file else "files"] = 3
        elif how == "names that are no text":
            file.create_dataset(name, data=[b"\xff\xfe"] * shape[0], dtype=h5py.string_dtype())
        elif how == "an attribute of many values":
            file.attrs["format"] = [file.attrs["format"]] * 100
    if how == "one long string many times":
        data = bytearray(path.read_bytes())
        data[where : where + 3000 * end] = data[where : where + end] * 3000
        path.write_bytes(data)


EVIL = ["external link", "soft link", "external storage", "virtual dataset", "group", "2 TB", "2 TB in chunks"]
EVIL += ["another type", "another shape"]


CASES = [("logits.h5", name, how) for name in ("logits", "confidence", "status", "path") for how in EVIL]
CASES += [("balanced.h5", name, how) for name in ("file", "row", "label", "confidence") for how in EVIL]
CASES += [(name, "classes", how) for name in ("logits.h5", "balanced.h5") for how in EVIL[:7]]
CASES += [(name, "classes", "one long string many times") for name in ("logits.h5", "balanced.h5")]
CASES += [("logits.h5", name, "strings of any length") for name in ("path", "label")]
CASES += [("logits.h5", "label", "2 TB in all"), ("balanced.h5", "row", "2 TB in all")]
CASES += [(name, "label", "an attribute of many values") for name in ("logits.h5", "balanced.h5")]
CASES += [(name, "label", "an attribute of another kind") for name in ("logits.h5", "balanced.h5")]


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_logits(folder / "logits.h5", logits_of((0, 0.9), (1, 0.8)))
    rows = {"file": np.zeros(2, np.uint16), "row": np.arange(2), "label": np.array([0, 1], np.int32)}
    with h5py.File(folder / "balanced.h5", "w") as file:
        for name, values in (rows | {"confidence": np.array([0.9, 0.8], np.float32)}).items():
            file[name] = values
        file.create_dataset("classes", data=CLASSES, dtype=h5py.string_dtype())
        file.attrs.update(format=SELECTION_FORMAT, files='["logits.h5"]', method="noisy-student")
    return folder


@pytest.mark.parametrize("name", ["logits.h5", "balanced.h5"])
def test_class_names_that_are_no_text_are_refused(name, whole_files, tmp_path, mistake):
    for whole in whole_files.iterdir():
        shutil.copy(whole, tmp_path)
    make_evil(tmp_path / name, "classes", "names that are no text", tmp_path)
    mistake(lambda: read_all(tmp_path / "balanced.h5"), name)


@pytest.mark.parametrize(("file", "name", "how"), CASES)
def test_evil_files_are_refused_by_03_and_04(file, name, how, whole_files, tmp_path, call_main, mistake):
    for whole in whole_files.iterdir():
        shutil.copy(whole, tmp_path)
    make_evil(tmp_path / file, name, how, tmp_path)
    if file == "logits.h5":
        assert_mistake(call_main("03_balance", tmp_path / file, "--out", tmp_path / "o.h5"), "logits.h5")
    line = mistake(lambda: read_all(tmp_path / "balanced.h5"), file)
    words = {"strings of any length": "type", "another type": "type", "another shape": "shape", "group": "plain"}
    words |= {"one long string many times": "longer than the file", "2 TB in all": "inside the file"}
    assert words.get(how, "") in line, line
    assert "not a readable HDF5 file" not in line, line  # it is readable, and the line says what is wrong with it


def test_whole_files_are_read(whole_files, tmp_path, call_main, monkeypatch):
    assert read_all(whole_files / "balanced.h5").label.tolist() == [0, 1]
    monkeypatch.setattr(load_stage("03_balance"), "draw_selection", lambda *args: None)
    assert call_main("03_balance", whole_files / "logits.h5", "--out", tmp_path / "o.h5").returncode == 0
