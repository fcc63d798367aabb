"""The data set and its loaders: the order of images, what a batch holds, unreadable images, any number of workers."""

import numpy as np
import torch
from conftest import encoded, make_tar, noise_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
from common import Crop, ImageDataset, Processes, View, grid_keys, list_images, load_batches, train_keys


def ranks(world_size):
    return [Processes(torch.device("cpu"), rank, world_size, 0) for rank in range(world_size)]


def clean_images(images, size, **more):
    """The data set of the clean views."""
    return ImageDataset(images, clean=View(size, 1.0), **more)


def noised_images(images, size, min_area, **more):
    """The data set of the random views."""
    return ImageDataset(images, noised=Crop(size, min_area, True), **more)


def test_unreadable_images_are_named_errors_and_nothing_takes_their_place(tmp_path):
    noise_image(40, 40).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "half.jpg": whole[: len(whole) // 2],
        "header.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "script.ppm")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    names = {*bad, "float.tif", "script.png", "gone.jpg"}

    images = list_images(tmp_path)
    dataset = clean_images(images, 16)
    for row in range(len(images)):
        name = images.path[row].decode()
        item = dataset[row]
        assert item[0] == row
        if name in names:
            assert item[1] is None and str(tmp_path / name) in item[2], item
        else:
            assert item[2] is None and item[1][0].shape == (16, 16, 3)
    assert names < {path.decode() for path in images.path}

    batch = next(iter(load_batches(dataset, [list(range(len(images)))], ranks(1)[0])))
    good = [row for row in range(len(images)) if images.path[row].decode() not in names]
    assert batch.rows.tolist() == good
    assert {row for row, _ in batch.errors} == set(range(len(images))) - set(good)
    for view, row in zip(batch.views[0], good, strict=True):
        np.testing.assert_array_equal(view.permute(1, 2, 0), dataset[row][1][0])


def test_a_batch_without_any_readable_image_is_empty(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    dataset = clean_images(list_images(tmp_path), 16)
    batch = next(iter(load_batches(dataset, [[0, 0]], ranks(1)[0])))
    assert len(batch.rows) == 0 and [row for row, _ in batch.errors] == [0, 0]


def test_random_view_depends_on_seed_epoch_and_row_alone(tiny_data):
    images = list_images(tiny_data / "unlabeled")
    keys = [(epoch, row) for epoch in range(3) for row in range(len(images))]

    def views(seed, order, **kwargs):
        dataset = noised_images(images, 24, 0.08, seed=seed, **kwargs)
        torch.manual_seed(len(order))  # what ran before must not matter
        return {key: dataset[key][1][-1].tobytes() for key in order}

    first = views(0, keys)
    assert views(0, keys[::-1]) == first
    assert views(0, keys[7:9]) == {key: first[key] for key in keys[7:9]}
    assert views(0, keys, clean=View(8, 1.0)) == first, "a clean view shifts the random one"
    assert len(set(first.values())) == len(keys), "two of them are the same"
    assert not set(views(1, keys).values()) & set(first.values())


def test_random_view_same_with_workers(tiny_data):
    dataset = noised_images(list_images(tiny_data / "val"), 16, 0.2)
    keys = [[(0, 1), (0, 2)], [(0, 3), (1, 1)], [(4, 0)]]
    alone, parallel = (list(load_batches(dataset, keys, ranks(1)[0]._replace(workers=workers))) for workers in (0, 2))
    for a, b in zip(alone, parallel, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.views[0], b.views[0])


def test_shards_are_read_without_a_shared_position(tmp_path):
    make_tar(tmp_path / "0.tar", {f"{i}.png": encoded(noise_image(40, 48, i), "PNG") for i in range(8)})
    images = list_images(tmp_path)
    dataset = clean_images(images, 16)
    dataset[0]  # opens the shard before the loaders are forked
    keys = [[i] * 4 for i in range(8)] * 4
    for key, batch in zip(keys, load_batches(dataset, keys, ranks(1)[0]._replace(workers=2)), strict=True):
        assert batch.errors == [] and (batch.views[0][3].permute(1, 2, 0).numpy() == dataset[key[0]][1][0]).all()


# the order of images


def stream(num, batch_size, seed, which, steps, world_size=1):
    """The keys of each step, the processes' shares together."""
    shares = [list(train_keys(num, batch_size, seed, which, steps, rank)) for rank in ranks(world_size)]
    assert {len(share) for step in shares for share in step} == {batch_size // world_size}, "batches must be constant"
    return [sorted(key for share in step for key in share) for step in zip(*shares, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 3), st.integers(0, 1))
def test_train_keys_use_each_row_once_an_epoch(num, batch_size, seed, which):
    keys = [key for step in train_keys(num, batch_size, seed, which, range(30), ranks(1)[0]) for key in step]
    assert [epoch for epoch, _ in keys] == [position // num for position in range(30 * batch_size)]
    for epoch in range(len(keys) // num):
        assert sorted(row for _, row in keys[epoch * num : (epoch + 1) * num]) == list(range(num))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.integers(0, 20))
def test_train_keys_are_the_same_for_any_processes_and_any_start(num, sixths, seed, start):
    batch_size = 6 * sixths
    alone = stream(num, batch_size, seed, 0, range(25))
    assert stream(num, batch_size, seed, 0, range(25), 2) == alone
    assert stream(num, batch_size, seed, 0, range(25), 3) == alone
    assert stream(num, batch_size, seed, 0, range(start, 25)) == alone[start:]


def test_an_order_is_numpys_permutation():
    (keys,) = train_keys(7, 14, 3, "x", range(1), ranks(1)[0])
    for epoch in (0, 1):
        order = np.random.default_rng(common.seed_words(3, "x order", epoch)).permutation(7)
        assert [row for of, row in keys if of == epoch] == order.tolist()


def test_train_keys_orders_differ():
    def order(seed, which, epoch):
        steps = range(epoch * 10, (epoch + 1) * 10)
        return [row for step in train_keys(50, 5, seed, which, steps, ranks(1)[0]) for _, row in step]

    orders = [order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1)]
    assert all(sorted(rows) == list(range(50)) for rows in orders)
    assert len({tuple(rows) for rows in orders}) == 4, "the same for another seed, stream or epoch"
    assert order(0, 0, 0) != list(range(50))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 25), st.integers(1, 5))
def test_grid_keys_are_each_row_once_in_the_same_batches(num, batch_size, world_size):
    alone = list(grid_keys(num, batch_size, ranks(1)[0]))
    assert [row for batch in alone for row in batch] == list(range(num))
    assert all(len(batch) == batch_size for batch in alone[:-1])
    shares = [batch for rank in ranks(world_size) for batch in grid_keys(num, batch_size, rank)]
    assert sorted(shares, key=min) == alone


def test_copies_of_an_image_are_rows_with_crops_of_their_own(tiny_data):
    images = list_images(tiny_data / "unlabeled")
    dataset = noised_images(images, 24, 0.08, repeated=np.array([3, 3, 7]))
    assert len(dataset) == 3
    first, second, other = (dataset[0, row][1][0] for row in range(3))
    assert (first != second).any()
    words = [common.seed_words(0, " crop", 0, row) for row in range(3)]
    for view, row, image in zip((first, second, other), range(3), (3, 3, 7), strict=True):
        expected = common.random_view(images.load(image), dataset.noised, np.random.default_rng(words[row]))
        np.testing.assert_array_equal(view, expected)


def test_images_of_val_are_neither_views_nor_errors(tmp_path):
    """By their bytes: under any name."""
    for name, seed in {"a": 0, "b": 1, "c": 2}.items():
        noise_image(8, 8, seed).save(tmp_path / f"{name}.png")
    noise_image(8, 8, 1).save(tmp_path / "d.png")
    images = list_images(tmp_path)
    dataset = clean_images(images, 8, held_out=common.digests_of(images[1:2]))
    batch = next(iter(load_batches(dataset, [[0, 1, 2, 3]], ranks(1)[0])))
    assert batch.rows.tolist() == [0, 2] and batch.held_out == [1, 3] and batch.errors == []
