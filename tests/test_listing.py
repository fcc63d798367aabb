"""Listing folders and shards, labels by the names of folders, and the tenth that is held out where there is no val/."""

import os

import numpy as np
import pytest
from conftest import encoded, folders, make_tar, noise_image, write_files

import common
from common import ImageDataset, ImageList, View, labeled_images, list_images, unlabeled_images


def names_of(images):
    return [path.decode() for path in images.path.tolist()]


def test_list_images_is_sorted_nested_and_takes_images_only(tmp_path):
    names = ["b.png", "a/z.JPG", "a/deep/er/x.webp", "a/b.bmp", "B.png", "ü.png", "a-b.png", "a.JFIF"]
    others = ["notes.txt", "a/labels.csv", ".hidden.png", "a/._b.bmp", ".folder/a.png"]
    write_files(tmp_path / "set", dict.fromkeys([*names, *others], b""))
    images = list_images(tmp_path / "set")
    assert names_of(images) == sorted(names, key=os.fsencode)
    assert not images.offset.any() and not images.size.any()
    (tmp_path / "links").mkdir()
    assert len(list_images(tmp_path / "links")) == 0
    (tmp_path / "links" / "linked").symlink_to(tmp_path / "set" / "a" / "deep")
    assert names_of(list_images(tmp_path / "links")) == ["linked/er/x.webp"]


# shards


def test_shards_are_read_in_place_like_folders(tmp_path, tiny_data):
    """Also in a folder that has the name of a shard."""
    source = list_images(tiny_data / "unlabeled")
    shards = tmp_path / "shards" / "deep.tar"
    names = names_of(source)
    files = {name: (tiny_data / "unlabeled" / name).read_bytes() for name in names}
    long = "long" * 40 + "/"  # over the 100 characters of a plain header
    make_tar(shards / "0.tar", {**{name: files[name] for name in names[:12]}, "0.json": b"{}", ".a.png": b""})
    make_tar(shards / "1.TAR", {long + name: files[name] for name in names[12:]})
    images = list_images(tmp_path / "shards")
    prefixes = ["deep.tar/0.tar/"] * 12 + ["deep.tar/1.TAR/" + long] * 8
    assert names_of(images) == [prefix + name for prefix, name in zip(prefixes, names, strict=True)]
    assert images.size.tolist() == [len(files[name]) for name in names]
    for row in range(len(images)):
        np.testing.assert_array_equal(np.asarray(images.load(row)), np.asarray(source.load(row)))
    part = list_images(tmp_path)[np.array([3, 15])]
    np.testing.assert_array_equal(np.asarray(part.load(1)), np.asarray(source.load(15)))


def test_paths_of_files_and_members_are_sorted_together(tmp_path):
    """Also where names of files and shards begin alike, and with members that are not in order."""
    members = dict.fromkeys(["b.png", "a.png", "deep/a.png", "deep-a.png"], b"x")
    for name in ("a.tar", "a.tar-b.tar", "a/b.tar", "z.tar"):
        make_tar(tmp_path / name, members)
    names = ["a.png", "a.tar-a.png", "a.tar.png", "a/b.png", "a/b.tar.png", "~.png"]
    write_files(tmp_path, dict.fromkeys(names, b""))
    images = list_images(tmp_path)
    assert len(images) == 4 * len(members) + len(names) and images.path.tolist() == sorted(images.path.tolist())
    assert [size > 0 for size in images.size] == [b".tar/" in path for path in images.path.tolist()]


def test_a_bad_member_of_a_shard_is_an_error_of_its_row_alone(tmp_path):
    data = encoded(noise_image(8, 8), "PNG")
    make_tar(tmp_path / "0.tar", {"a.png": data, "b.png": b"", "c.png": b"no image", "d.png": data})
    images = list_images(tmp_path)
    dataset = ImageDataset(images, clean=View(8, 1.0))
    errors = [dataset[row][2] for row in range(4)]
    assert [error is None for error in errors] == [True, False, False, True] and "0.tar/c.png" in errors[2]
    os.truncate(tmp_path / "0.tar", images.offset[3] + 10)  # cut off after it was listed
    assert "0.tar/d.png" in dataset[3][2]


@pytest.mark.parametrize("kind", ["compressed", "garbage", "cut in a header", "gone"])
def test_a_shard_that_is_no_plain_tar_is_named(kind, tmp_path, mistake):
    path = tmp_path / ("a.tar.gz" if kind == "compressed" else "a.tar")
    make_tar(path, {"a.png": b"1", "b.png": b"2"})
    if kind == "garbage":  # where the second header is
        data = path.read_bytes()
        path.write_bytes(data[:1024] + b"x" * 512 + data[1536:])
    if kind == "cut in a header":
        os.truncate(path, 1024 + 300)
    if kind == "gone":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    mistake(lambda: list_images(tmp_path), path)


# labels


def test_classes_are_matched_by_name(tmp_path):
    data = folders(tmp_path, train={"cat": 2, "ant": 3, "bee": 1}, val={"cat": 2, "bee": 1})
    images, labels, classes = labeled_images(data, "train")
    assert classes == ["ant", "bee", "cat"] and labels.dtype == np.int64
    assert [name.split("/")[0] for name in names_of(images)] == [classes[label] for label in labels]
    _, labels, same = labeled_images(data, "val", classes)  # val lacks the first class
    assert same == classes and labels.tolist() == [1, 2, 2]
    order = ["cat", "ant", "bee"]  # a checkpoint's own order
    _, labels, same = labeled_images(data, "train", order)
    assert same == order and labels.tolist() == [1, 1, 1, 2, 0, 0]


def test_only_what_lies_in_a_class_folder_has_a_label_at_any_depth(tmp_path):
    data = folders(tmp_path, train={"cat/indoor": 2, "cat/out/door": 1, "dog": 1, ".cache": 1}, val={"cat": 1})
    noise_image(4, 4).save(data / "train" / "cover.png")
    _, labels, classes = labeled_images(data, "train")
    assert classes == ["cat", "dog"] and labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("splits", "split", "word"),
    [
        ({"val": {"cat": 1}}, "train", "train/"),
        ({"train": {"cat": 1, "dog": 0}, "val": {"cat": 1}}, "train", "dog"),
        ({"train": {"cat": 1}, "val": {"cat": 1, "wolf": 1}}, "val", "wolf"),
        ({"train": {"cat": 1}, "val": {"cat": 0}}, "val", "val"),
    ],
)
def test_wrong_folders_are_one_line_and_status_2(tmp_path, mistake, splits, split, word):
    data = folders(tmp_path, **splits)
    mistake(lambda: labeled_images(data, split, ["cat"] if split == "val" else None), word)


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
    assert names_of(unlabeled_images(data / "val")) == val

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


def test_half_of_val_is_kept_for_judging_by_the_paths_below_it_alone(tmp_path):
    def judged(root, names):
        return common.judged_half(ImageList.of(root, [(name.encode(), 0, 0) for name in names]))

    names = [f"c{label}/{i:04}.png" for label in range(10) for i in range(200)]
    halves = judged("/val", names)
    for label in range(10):
        assert 70 < halves[200 * label :][:200].sum() < 130, "the classes are halved too"
    # Neither the root nor the others nor the width of the column counts, but the folder of the class does.
    assert (judged("/elsewhere", [*names[::3], "~" * 99])[:-1] == halves[::3]).all()
    assert {judged("/val", names[i : i + 2]).sum() for i in range(20)} == {1}, "neither half of a few images is empty"
    moved = judged("/val", ["x" + name for name in names])
    assert 900 < (moved == halves).sum() < 1100
    tenth = common.is_held_out(np.array([name.encode() for name in names]), np.zeros(2000, int))
    assert 0.35 < halves[tenth].mean() < 0.65, "where there is no val/, the held-out tenth is halved"


# what can be labelled


def test_unlabeled_images_that_cannot_be_are_named(tmp_path, mistake):
    data = folders(tmp_path / "data", train={"cat": 3}, val={"cat": 1})
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        mistake(lambda path=path: unlabeled_images(path), path)
    for path in (data, tmp_path):  # both hold the labelled images
        mistake(lambda path=path: unlabeled_images(path, data), "--unlabeled", data / "train")
    assert len(unlabeled_images(data / "train", data)) == 3  # named itself it is meant
