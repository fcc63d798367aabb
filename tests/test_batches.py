"""The data set and its loaders: the order of images, what a batch holds, unreadable images, any number of workers."""

import numpy as np
import pytest
import torch
from conftest import encoded, make_tar, noise_image, write_files
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import Crop, ImageDataset, Processes, View, grid_keys, list_images, load_batches, train_keys


def rank(number=0, world_size=1, workers=0):
    return Processes(torch.device("cpu"), number, world_size, workers)


ALONE = rank()


def test_a_batch_without_any_readable_image_is_empty(tmp_path):
    dataset = ImageDataset(list_images(write_files(tmp_path, {"a.png": b""})), clean=View(16, 1.0))
    batch = next(iter(load_batches(dataset, [[0, 0]], ALONE)))
    assert len(batch.rows) == 0 and batch.views[0].shape == (0, 3, 16, 16)
    assert [row for row, _ in batch.errors] == [0, 0]


def test_random_view_depends_on_seed_epoch_and_row_alone(tiny_data):
    images = list_images(tiny_data / "unlabeled")
    keys = [(epoch, row) for epoch in range(3) for row in range(len(images))]

    def views(seed, order, **more):
        dataset = ImageDataset(images, noised=Crop(24, 0.08, True), seed=seed, **more)
        torch.manual_seed(len(order))  # what ran before must not matter
        return {key: dataset[key][1][-1].tobytes() for key in order}

    first = views(0, keys)
    assert views(0, keys[::-1]) == first
    assert views(0, keys[7:9]) == {key: first[key] for key in keys[7:9]}
    assert views(0, keys, clean=View(8, 1.0)) == first, "a clean view shifts the random one"
    assert len(set(first.values())) == len(keys), "two of them are the same"
    assert not set(views(1, keys).values()) & set(first.values())


def test_copies_of_an_image_are_rows_with_crops_of_their_own(tiny_data):
    images = list_images(tiny_data / "unlabeled")
    dataset = ImageDataset(images, noised=Crop(24, 0.08, True), repeated=np.array([3, 3, 7]))
    assert len(dataset) == 3 and (dataset[0, 0][1][0] != dataset[0, 1][1][0]).any()
    for row, image in enumerate((3, 3, 7)):
        rng = np.random.default_rng(common.seed_words(0, " crop", 0, row))
        expected = common.random_view(images.load(image), dataset.noised, rng)
        np.testing.assert_array_equal(dataset[0, row][1][0], expected)


def test_shards_are_read_without_a_shared_position(tmp_path):
    make_tar(tmp_path / "0.tar", {f"{i}.png": encoded(noise_image(40, 48, i), "PNG") for i in range(8)})
    dataset = ImageDataset(list_images(tmp_path), clean=View(16, 1.0))
    dataset[0]  # opens the shard before the loaders are forked
    keys = [[i] * 4 for i in range(8)] * 4
    for key, batch in zip(keys, load_batches(dataset, keys, rank(workers=2)), strict=True):
        assert batch.errors == []
        np.testing.assert_array_equal(batch.views[0][3].permute(1, 2, 0), dataset[key[0]][1][0])


def stream(num, batch_size, seed, steps, world_size=1):
    """The keys of each step, the processes' shares together."""
    ranks = [rank(number, world_size) for number in range(world_size)]
    shares = [list(train_keys(num, batch_size, seed, "x", steps, process)) for process in ranks]
    sizes = {len(share) for step in shares for share in step}
    assert sizes == {batch_size // world_size}, "batches must be constant"
    return [sorted(key for share in step for key in share) for step in zip(*shares, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 3))
def test_train_keys_use_each_row_once_an_epoch(num, batch_size, seed):
    steps = train_keys(num, batch_size, seed, "x", range(30), ALONE)
    keys = [key for step in steps for key in step]
    assert [epoch for epoch, _ in keys] == [position // num for position in range(30 * batch_size)]
    for epoch in range(len(keys) // num):
        assert sorted(row for _, row in keys[epoch * num : (epoch + 1) * num]) == list(range(num))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.integers(0, 20))
def test_train_keys_are_the_same_for_any_processes_and_any_start(num, sixths, seed, start):
    batch_size = 6 * sixths
    alone = stream(num, batch_size, seed, range(25))
    assert stream(num, batch_size, seed, range(25), 2) == alone
    assert stream(num, batch_size, seed, range(25), 3) == alone
    assert stream(num, batch_size, seed, range(start, 25)) == alone[start:]


@pytest.mark.parametrize(("seed", "name"), [(3, "x"), (3, "y"), ("4:student1", "x")])
def test_an_order_is_numpys_permutation(seed, name):
    (keys,) = train_keys(7, 14, seed, name, range(1), ALONE)
    for epoch in (0, 1):
        order = np.random.default_rng(common.seed_words(seed, f"{name} order", epoch)).permutation(7)
        assert [row for of, row in keys if of == epoch] == order.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 25), st.integers(1, 5))
def test_grid_keys_are_each_row_once_in_the_same_batches(num, batch_size, world_size):
    alone = list(grid_keys(num, batch_size, ALONE))
    assert [row for batch in alone for row in batch] == list(range(num))
    assert all(len(batch) == batch_size for batch in alone[:-1])
    ranks = [rank(number, world_size) for number in range(world_size)]
    shares = [batch for process in ranks for batch in grid_keys(num, batch_size, process)]
    assert sorted(shares, key=min) == alone
