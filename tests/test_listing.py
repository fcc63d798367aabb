"""Listing folders and shards, labels by the names of folders, and the tenth that is held out where there is no val/."""

import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CHEAP, ROOT, encoded, make_tar, noise_image, write_files
from PIL import Image, features

import common
from common import ImageDataset, View, labeled_images, list_images, unlabeled_images


def errors_of(rows):
    """Of each row why it cannot be read, or None."""
    dataset = ImageDataset(rows, clean=View(8, 1.0))
    return [dataset[row][2] for row in range(len(rows))]


def names_of(rows):
    return [path.decode() for path in rows.path.tolist()]


def test_list_images_is_sorted_nested_and_takes_images_only(tmp_path):
    names = ["b.png", "a/z.JPG", "a/deep/er/x.webp", "a/b.bmp", "B.png", "ü.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(4, 4).save(tmp_path / name)
    for name in ("notes.txt", "a/labels.csv", ".hidden.png", "a/._b.bmp"):
        (tmp_path / name).write_text("no image")
    rows = list_images(tmp_path)
    assert names_of(rows) == sorted(names, key=os.fsencode)
    assert not rows.offset.any() and not rows.size.any()
    assert len(list_images(tmp_path / "a" / "deep")) == 1
    (tmp_path / "empty").mkdir()
    assert len(list_images(tmp_path / "empty")) == 0


def test_links_are_followed_and_a_loop_of_them_counts_once(tmp_path):
    real = tmp_path / "real" / "inside"
    real.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(real / name)
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "real")
    (real / "up").symlink_to(root)
    assert list_images(root).path.tolist() == [b"linked/inside/a.png", b"linked/inside/b.png"]


# shards


def test_shards_are_read_in_place_like_folders(tmp_path, tiny_data):
    source = list_images(tiny_data / "unlabeled")
    shards = tmp_path / "shards" / "x.tar" / "deep"  # a folder may end in .tar
    shards.mkdir(parents=True)
    files = {name: (tiny_data / "unlabeled" / name).read_bytes() for name in names_of(source)}
    long = "long" * 40 + "/"  # over the 100 characters of a plain header
    make_tar(shards / "0.tar", {**{name: files[name] for name in names_of(source)[:12]}, "0.json": b"{}"})
    make_tar(shards / "1.tar", {long + name: files[name] for name in names_of(source)[12:]})
    rows = list_images(tmp_path / "shards" / "x.tar")
    prefixes = ["deep/0.tar/"] * 12 + ["deep/1.tar/" + long] * 8
    assert names_of(rows) == [prefix + name for prefix, name in zip(prefixes, names_of(source), strict=True)]
    assert rows.size.tolist() == [len(files[name]) for name in names_of(source)]
    for row in range(len(rows)):
        np.testing.assert_array_equal(np.asarray(rows.load(row)), np.asarray(source.load(row)))
    part = rows[np.array([3, 15])]
    np.testing.assert_array_equal(np.asarray(part.load(1)), np.asarray(source.load(15)))


def test_shards_that_cannot_be_read_are_said_and_the_others_seen(tmp_path, capsys):
    make_tar(tmp_path / "0.tar", {"a.png": b"1"})
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.tar")
    assert names_of(list_images(tmp_path)) == ["0.tar/a.png"]
    out = capsys.readouterr().out
    assert "gone.tar cannot be read (No such file or directory)" in out
    assert "pipe.tar cannot be read (not a regular file)" in out


@pytest.mark.parametrize("cores", [1, 3])
def test_many_shards_are_indexed_by_several_processes(cores, tmp_path, tiny_data, monkeypatch, capfd, run_stage):
    source = list_images(tiny_data / "unlabeled")
    data = Path(source.name(0)).read_bytes()
    for i in range(30):  # names that sort otherwise than their shards
        names = [f"{j}.png" for j in range(i % 4)] + ["notes.txt"]
        make_tar(tmp_path / f"{i % 3}{i}.{'TAR' if i % 2 else 'tar'}", {name: data for name in names})
    data_of_7 = (tmp_path / "17.TAR").read_bytes()
    (tmp_path / "17.TAR").write_bytes(data_of_7[: -10240 + 512] + b"x" * 512)
    (tmp_path / "0.png").write_bytes(data)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    rows = list_images(tmp_path)
    assert capfd.readouterr().out.count("17.TAR is damaged after") == 1
    # what waits in a buffer must not be printed by each process
    code = f"import os, common; os.cpu_count = lambda: {cores}; print('waiting'); common.list_images({str(tmp_path)!r})"
    (tmp_path / "script.py").write_text(code)
    done = run_stage(tmp_path / "script.py", PYTHONPATH=ROOT)
    assert done.stdout.count("waiting") == 1 and done.stdout.count("17.TAR is damaged after") == 1
    expected = [f"{i % 3}{i}.{'TAR' if i % 2 else 'tar'}/{j}.png" for i in range(30) for j in range(i % 4)]
    assert names_of(rows) == sorted([*expected, "0.png"])
    for row in range(len(rows)):
        np.testing.assert_array_equal(np.asarray(rows.load(row)), np.asarray(source.load(0)))
    for i in range(40):
        make_tar(tmp_path / f"9{i}.tar", {"a.png": data}, "w:gz")
    with pytest.raises(SystemExit) as stop:
        list_images(tmp_path)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and ".tar is not a plain .tar file" in err


def test_a_shard_below_a_folder_named_like_one(tmp_path, tiny_data):
    source = list_images(tiny_data / "unlabeled")
    (tmp_path / "x.tar").mkdir()
    make_tar(tmp_path / "x.tar" / "0.tar", {"a.png": Path(source.name(0)).read_bytes()})
    rows = list_images(tmp_path)
    assert names_of(rows) == ["x.tar/0.tar/a.png"]
    np.testing.assert_array_equal(np.asarray(rows.load(0)), np.asarray(source.load(0)))


def test_an_empty_member_of_a_shard_is_an_error_of_its_row_alone(tmp_path):
    data = io.BytesIO()
    noise_image(8, 8).save(data, "PNG")
    make_tar(tmp_path / "0.tar", {"a.png": data.getvalue(), "b.png": b"", "c.png": data.getvalue()})
    errors = errors_of(list_images(tmp_path))
    assert [error is None for error in errors] == [True, False, True] and "0.tar/b.png" in errors[1]


def test_of_a_shard_that_is_cut_off_the_members_before_the_end_are_read(tmp_path, capsys):
    data = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(data, "PNG")
    make_tar(tmp_path / "0.tar", {f"{i}.png": data.getvalue() for i in range(5)})
    whole = (tmp_path / "0.tar").read_bytes()
    fourth = 3 * (512 + -(-len(data.getvalue()) // 512) * 512)  # members are padded to blocks of 512 bytes
    for end, number in ((fourth + 600, 4), (fourth + 300, 3)):  # in the data, in the header
        (tmp_path / "0.tar").write_bytes(whole[:end])
        rows = list_images(tmp_path)
        assert "is damaged after" in capsys.readouterr().out and len(rows) == number
        errors = errors_of(rows)
        assert errors[:3] == [None] * 3 and all(errors[3:])
    (tmp_path / "0.tar").write_bytes(whole[:fourth])  # without the two empty blocks at the end: that is no damage
    assert len(list_images(tmp_path)) == 3 and not capsys.readouterr().out
    (tmp_path / "0.tar").write_bytes(whole[:fourth] + b"x" * 512 + whole[fourth + 512 :])  # no header
    assert len(list_images(tmp_path)) == 3 and "is damaged after 2.png" in capsys.readouterr().out


def by_tarfile(path):
    """(name, offset, size) of the files of a shard, and whether it is damaged, as tarfile alone says."""
    found = []
    try:
        with tarfile.open(path, "r:") as shard:
            while (member := shard.next()) is not None:
                if member.isfile() and not member.issparse():
                    found.append((os.fsencode(member.name), member.offset_data, member.size))
            shard.fileobj.seek(shard.offset)
            return found, bool(shard.fileobj.read(512).strip(b"\0"))
    except tarfile.TarError:
        return found, True


MEMBERS = [
    ("a.jpg", {}),
    ("d/b.jpg", {"size": 513}),
    ("time.jpg", {"mtime": 1.7e9 + 0.123}),
    ("empty.jpg", {"size": 0}),
]
MEMBERS += [
    ("d", {"type": tarfile.DIRTYPE, "size": 0}),
    ("link", {"type": tarfile.SYMTYPE, "linkname": "a.jpg", "size": 0}),
]
MEMBERS += [("x" * 96 + ".jpg", {}), ("p" * 99 + "/" + "q" * 99, {}), ("bär.jpg", {"uname": "ä", "mode": 0o7777})]
MEMBERS += [
    ("old.jpg", {"type": tarfile.AREGTYPE}),
    ("old/", {"type": tarfile.AREGTYPE, "size": 0}),
    ("last.jpg", {"mtime": 5.5}),
]
KINDS = [(tarfile.USTAR_FORMAT, {}), (tarfile.GNU_FORMAT, {}), (tarfile.PAX_FORMAT, {})]


@pytest.mark.parametrize(("kind", "of_all"), [*KINDS, (tarfile.PAX_FORMAT, {"comment": "of all members"})])
def test_members_are_those_that_tarfile_finds(kind, of_all, tmp_path, capsys):
    """Of all kinds, and in shards of which a byte of a header has changed."""
    path, rng = tmp_path / "0.tar", np.random.default_rng(0)
    with tarfile.open(path, "w", format=kind, pax_headers=of_all) as shard:
        for name, how in MEMBERS:
            member = tarfile.TarInfo(name)
            member.size = 600
            for key, value in how.items():
                setattr(member, key, value)
            shard.addfile(member, io.BytesIO(b"x" * member.size))
    whole, (members, is_damaged) = path.read_bytes(), by_tarfile(path)
    assert len(members) >= 9 and not is_damaged
    assert [*common.tar_members(path)] == members
    blocks = np.arange(0, len(whole), 512)
    headers = [at for at in blocks.tolist() if whole[at + 257 : at + 262] == b"ustar"]
    fields = [0, 99, *range(100, 157), 157, *range(257, 265), 265, 330, 345, 400, 511]
    for _ in range(200):
        data, at = bytearray(whole), rng.choice(headers) + rng.choice(fields)
        data[at] = rng.choice([*b"\0 7x01", 0x80, rng.integers(256)])
        if rng.random() < 0.5:  # with a sum that is right
            begin = at // 512 * 512
            data[begin + 148 : begin + 156] = b" " * 8
            data[begin + 148 : begin + 156] = b"%06o\0 " % sum(data[begin : begin + 512])
        path.write_bytes(data)
        capsys.readouterr()
        found = []
        try:
            found.extend(common.tar_members(path))
            is_damaged = "is damaged after" in capsys.readouterr().out
        except tarfile.TarError:
            is_damaged = True
        assert (found, is_damaged) == by_tarfile(path), at


@pytest.mark.parametrize("mtime", [0, 1.7e9 + 0.123])  # a fraction has a record of its own, as WebDataset's shards
def test_plain_members_are_found_without_tarfile(mtime, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for i in range(50):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.mtime = mtime
            shard.addfile(member)
    parsed, parse = [], tarfile.TarInfo.frombuf
    monkeypatch.setattr(tarfile.TarInfo, "frombuf", lambda *words: parsed.append(1) or parse(*words))
    assert len(list_images(tmp_path)) == 50 and len(parsed) <= 4


def test_a_list_on_the_disk_is_the_list_in_memory(tmp_path, mistake):
    """Also where names of files and shards begin alike, and with members that are not in order."""
    root, scratch = tmp_path / "images", tmp_path / "scratch"
    scratch.mkdir()
    members = {
        name: b"x" * i for i, name in enumerate(["b.png", "a.png", "deep/a.png", "deep-a.png", "long" * 9 + ".png"])
    }
    for name in ("a.tar", "a.tar-b.tar", "a/b.tar", "a-b.tar", "b/c.tar", "z.tar"):
        make_tar(root / name, members)
    names = [
        "a.png",
        "a.tar-a.png",
        "a.tar.png",
        "a.tarr/a.png",
        "a/b.png",
        "a/b.tar.png",
        "b.png",
        "b/c.tar0.png",
        "~.png",
    ]
    write_files(root, dict.fromkeys(names, b""))
    rows, on_disk = list_images(root), list_images(root, scratch)
    assert len(rows) == 6 * len(members) + len(names) and rows.path.tolist() == sorted(rows.path.tolist())
    for column in ("path", "offset", "size"):
        one, other = getattr(rows, column), getattr(on_disk, column)
        assert one.dtype == other.dtype and (one == other).all() and isinstance(other, np.memmap)
    assert not [*scratch.iterdir()]
    mistake(lambda: list_images(root, tmp_path / "missing"), "missing", "cannot be kept")


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz"), ("a.tar", "w:gz")]
)
def test_a_compressed_shard_is_refused_by_name(tmp_path, mistake, name, mode):
    make_tar(tmp_path / name, {"a.png": b"1"}, mode)
    mistake(lambda: list_images(tmp_path), name)


def test_evil_places_of_members_are_errors_of_their_rows(tmp_path):
    make_tar(tmp_path / "0.tar", {f"{i}.png": encoded(noise_image(40, 48, i), "PNG") for i in range(2)})
    rows = list_images(tmp_path)
    for offset, size in ((0, 100), (-512, 100), (512, 2**60), (2**61, 2**61), (513, int(rows.size[0]))):
        evil = replace(rows, offset=np.array([offset, 0]), size=np.array([size, 0]))
        assert errors_of(evil)[0], (offset, size)


# labels


def folders(root, **splits):
    """folders(root, train={"cat": 3}) draws three images in root/train/cat."""
    for split, classes in splits.items():
        for name, num in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                noise_image(4, 4, i).save(root / split / name / f"{i:03}.png")
    return root


def test_classes_are_matched_by_name(tmp_path):
    data = folders(tmp_path, train={"cat": 2, "ant": 3, "bee": 1}, val={"cat": 2, "bee": 1})
    rows, labels, classes = labeled_images(data, "train")
    assert classes == ["ant", "bee", "cat"]
    assert [names_of(rows)[i].split("/")[0] for i in range(6)] == [classes[label] for label in labels]
    rows, labels, same = labeled_images(data, "val", classes)  # val lacks the first class
    assert same == classes and labels.dtype == np.int64
    assert labels.tolist() == [1, 2, 2]
    order = ["cat", "ant", "bee"]  # a checkpoint's own order
    rows, labels, same = labeled_images(data, "train", order)
    assert same == order and labels.tolist() == [1, 1, 1, 2, 0, 0]


def test_images_beside_the_class_folders_have_no_label(tmp_path):
    data = folders(tmp_path, train={"cat": 2}, val={"cat": 1})
    noise_image(4, 4).save(data / "train" / "cover.png")
    assert len(labeled_images(data, "train")[0]) == 2


def test_nested_folders_belong_to_their_class(tmp_path):
    data = folders(tmp_path, train={"cat/indoor": 2, "cat/out/door": 1, "dog": 1}, val={"cat": 1})
    _, labels, classes = labeled_images(data, "train")
    assert classes == ["cat", "dog"] and labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("splits", "split", "words"),
    [
        ({}, "train", ["train/"]),
        ({"val": {"cat": 1}}, "train", ["train/"]),
        ({"train": {"cat": 1, "dog": 0}, "val": {"cat": 1}}, "train", ["dog"]),
        ({"train": {"cat": 1}, "val": {"cat": 1, "wolf": 1}}, "val", ["wolf", "cat"]),
        ({"train": {"cat": 1}, "val": {}}, "val", ["val"]),
    ],
)
def test_wrong_folders_are_one_line_and_status_2(tmp_path, mistake, splits, split, words):
    data = folders(tmp_path, **splits)
    for name in splits:
        (data / name).mkdir(exist_ok=True)
    mistake(lambda: labeled_images(data, split, ["cat"] if split == "val" else None), *words)


# what is held out


def held_out(data):
    train, _, classes = labeled_images(data, "train")
    val, labels, _ = labeled_images(data, "val", classes)
    return names_of(train), names_of(val), labels


def test_without_val_a_tenth_is_held_out(tmp_path):
    data = folders(tmp_path / "one", train={"cat": 150, "dog": 150, "single": 1})
    train, val, labels = held_out(data)
    everything = names_of(list_images(data / "train"))
    assert sorted(train + val, key=os.fsencode) == everything, "not disjoint, or some are in neither"
    assert 15 <= len(val) <= 48
    assert {name.split("/")[0] for name in train} == {"cat", "dog", "single"}
    assert [("cat", "dog", "single")[label] for label in labels] == [name.split("/")[0] for name in val]
    assert names_of(unlabeled_images(data / "train")) == train, "labelling train/ would leak val"

    # a function of the paths alone: other pixels, another place, and other images beside them change nothing
    data = folders(tmp_path / "two" / "elsewhere", train={"cat": 75, "dog": 150, "single": 1, "zebra": 20})
    noise_image(9, 9).save(data / "train" / "cat" / "000.png")
    other = set(held_out(data)[1])
    shared = {name for name in everything if name in names_of(list_images(data / "train"))}
    assert set(val) & shared == other & shared


def test_never_a_classs_last_image_is_held_out(tmp_path):
    data = folders(tmp_path, train={f"class{i:02}": 1 + i % 2 for i in range(60)})
    train, val, _ = held_out(data)
    assert val, "none is held out"
    assert len({name.split("/")[0] for name in train}) == 60


def test_with_val_nothing_is_held_out(tmp_path):
    data = folders(tmp_path, train={"cat": 40}, val={"cat": 1})
    assert len(labeled_images(data, "train")[0]) == 40
    assert len(unlabeled_images(data / "train")) == 40


def test_half_of_val_is_kept_for_judging_by_the_paths_below_it_alone(tmp_path):
    names = [f"c{i % 10}/{i:04}.png" for i in range(2000)]
    paths, nothing = np.array([name.encode() for name in names]), np.zeros(len(names), np.int64)
    judged = common.judged_half(common.ImageList(str(tmp_path), paths, nothing, nothing))
    assert judged.dtype == bool and judged.shape == (2000,) and 900 < judged.sum() < 1100
    for c in range(10):
        assert 70 < judged[c::10].sum() < 130, "the classes are halved too"
    # neither the root nor the others nor the width of the column counts, but the folder of the class does
    other = common.ImageList("/elsewhere", paths[::-3].astype("S99"), nothing[::-3], nothing[::-3])
    assert (common.judged_half(other) == judged[::-3]).all()
    moved = common.ImageList(str(tmp_path), np.array([b"x" + path for path in paths.tolist()]), nothing, nothing)
    assert 900 < (common.judged_half(moved) == judged).sum() < 1100
    tenth = common.is_held_out(paths, np.zeros(2000, int))
    assert 0.35 < judged[tenth].mean() < 0.65, "where there is no val/, the held-out tenth is halved"
    assert common.judged_half(common.list_images(tmp_path)).shape == (0,)


def test_the_held_out_tenth_is_halved_alike_for_choosing_and_for_judging(tmp_path):
    """Where there is no val/, 02 labels it as DATA/val, for 03's --calibration, and 06 evaluates it."""
    data = folders(tmp_path, train={"cat": 200, "dog": 200})
    judges, chooses = labeled_images(data, "val")[0], unlabeled_images(data / "val")
    assert names_of(judges) == names_of(chooses) and 20 < len(judges) < 80
    judged = common.judged_half(judges)
    assert (judged == common.judged_half(chooses)).all() and 0 < judged.sum() < len(judged)
    classes = common.classes_of_folders(chooses.path, ["dog", "cat"])
    assert [("dog", "cat")[c] for c in classes] == [name.split("/")[0] for name in names_of(chooses)]


def test_unlabeled_folder_missing_or_empty(tmp_path, mistake):
    mistake(lambda: unlabeled_images(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "empty").mkdir()
    mistake(lambda: unlabeled_images(tmp_path / "empty"), "empty")


def test_files_that_are_left_out_for_their_names_are_counted(tmp_path, capsys):
    noise_image(4, 4).save(tmp_path / "a.JFIF", "JPEG")
    noise_image(4, 4).save(tmp_path / "noending", "JPEG")
    for name in ("b.heic", "c.HEIC", "d.txt", ".hidden.txt"):
        (tmp_path / name).write_text("not listed")
    rows = list_images(tmp_path)
    assert names_of(rows) == ["a.JFIF"] and errors_of(rows) == [None]
    printed = capsys.readouterr().out
    assert f"{tmp_path}: 4 files are left out" in printed and "2 of .heic" in printed
    assert "1 of .txt" in printed and "1 of no ending" in printed
    (tmp_path / "noending").unlink()
    for name in ("b.heic", "c.HEIC", "d.txt"):
        (tmp_path / name).unlink()
    list_images(tmp_path)
    assert not capsys.readouterr().out


def test_avif_counts_as_an_image_where_pillow_has_a_decoder_for_it(tmp_path, capsys, run_stage):
    image = Image.linear_gradient("L").convert("RGB")
    if features.check("avif"):
        image.save(tmp_path / "a.AVIF", quality=95)
        rows = list_images(tmp_path)
        assert names_of(rows) == ["a.AVIF"] and errors_of(rows) == [None] and not capsys.readouterr().out
        assert np.abs(np.asarray(rows.load(0)).astype(int) - np.asarray(image)).mean() < 3
    (tmp_path / "b.avif").write_bytes(b"no image")
    code = "from PIL import features; features.check = lambda name: name != 'avif'; import common\n"
    code += f"print(len(common.list_images({str(tmp_path)!r})), 'listed')"
    (tmp_path / "script.py").write_text(code)
    assert run_stage(tmp_path / "script.py", PYTHONPATH=ROOT).stdout.count(" of .avif") == 1


def test_01_and_02_say_what_they_leave_out(tiny_data, call_main, tmp_path, monkeypatch):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for name in ("train/disc/a.heic", "train/disc/b.heic", "val/disc/c.txt", "unlabeled/d.heic", "unlabeled/e.pdf"):
        (data / name).write_bytes(b"1")
    monkeypatch.setattr(common.Run, "steps", lambda run, *_: iter(()))
    flags = ["--arch", CHEAP, "--image-size", 32, "--batch-size", 8, "--epochs", 1, "--out", tmp_path / "t"]
    printed = call_main("01_train_teacher", "--data", data, *flags).stdout
    assert "train: 2 files are left out for their names: 2 of .heic" in printed
    assert "val: 1 files are left out for their names: 1 of .txt" in printed
    words = ["--teacher", tmp_path / "t" / "model.pt", "--out", tmp_path / "l.h5"]
    printed = call_main("02_pseudo_label", *words).stdout
    assert "unlabeled: 2 files are left out for their names: 1 of .heic, 1 of .pdf" in printed


def test_a_class_whose_name_is_not_utf8_is_refused_before_the_training(tmp_path, mistake):
    data = write_files(tmp_path / "d", {"train/cat/0.jpg": b"x"})
    os.mkdir(os.fsencode(data / "train") + b"/caf\xe9")
    mistake(lambda: common.labeled_images(data, "train"), "caf\\udce9", "not UTF-8")


def test_a_flat_val_as_in_imagenets_archive_says_how_to_sort_it(tmp_path, mistake):
    """And the line that it gives does it."""
    files = {"train/cat/0.jpg": b"x", "train/dog/0.jpg": b"x", "val/a.JPEG": b"cat", "val/b.JPEG": b"dog"}
    data = write_files(tmp_path / "d", files)
    line = mistake(lambda: common.labeled_images(data, "val"), "no class folders", "side by side", "a.JPEG")
    (tmp_path / "labels.txt").write_text("a.JPEG cat\nb.JPEG dog\n")
    command = line[line.index("while read") :].replace("LABELS", str(tmp_path / "labels.txt"))
    subprocess.run(["bash", "-c", command], check=True)
    images, labels, _ = common.labeled_images(data, "val")
    assert [path.decode() for path in images.path] == ["cat/a.JPEG", "dog/b.JPEG"] and labels.tolist() == [0, 1]
