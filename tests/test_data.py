"""Data sets from tensors, what is refused, and the batches made of them."""

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from data_splits import identities, numbered, sizes, splits

from csdiv.models import Dataset, load_data
from csdiv.models.data import Batches, binarize, mix_seed

# from tensors


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(100, 0.1, (70, 10, 20)), (100, 0.0, (80, 0, 20)), (3, 0.1, (2, 0, 1)), (12, 0.7, (1, 8, 3))],
)
def test_dataset_splits_are_disjoint_complete_and_fixed(n: int, fraction: float, expected: tuple[int, ...]) -> None:
    first = Dataset.from_tensors(numbered(n), validation_fraction=fraction)
    torch.manual_seed(5)
    second = Dataset.from_tensors(numbered(n), validation_fraction=fraction)
    assert sizes(first) == expected
    assert sorted(chain(*identities(first))) == list(range(n))
    assert identities(first) == identities(second)
    assert n < 100 or identities(first)[0] != sorted(identities(first)[0])


def test_dataset_refuses_splits_that_leave_none_for_training() -> None:
    with pytest.raises(ValueError, match="got 11, of which 8 for validation and 3 for the test set"):
        Dataset.from_tensors(numbered(11), validation_fraction=0.7)


def test_dataset_keeps_labels_with_their_samples_and_a_given_test_set_whole() -> None:
    names = np.array(["a", "c", "b"])
    data = Dataset.from_tensors(numbered(30), names[np.arange(30) % 3], test=(numbered(4), ["d", "a", "b", "d"]))
    assert data.class_names == ("a", "b", "c", "d")
    assert data.num_classes == 4
    assert sizes(data) == (27, 3, 4)
    for part in (data.train, data.validation):
        assert part.labels is not None
        assert part.labels.dtype == torch.int64
        assert part.labels.tolist() == [(0, 2, 1)[i % 3] for i in part.x[:, 0].long().tolist()]
    assert data.test.x.equal(numbered(4))
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [3, 0, 1, 3]


@pytest.mark.parametrize(
    ("labels", "names"),
    [([5, -2, 5, 9], ("-2", "5", "9")), (torch.tensor([1.5, 0.5, 1.5, 0.5]), ("0.5", "1.5")), ([True] * 4, ("True",))],
)
def test_dataset_labels_of_any_type(labels: Any, names: tuple[str, ...]) -> None:
    data = Dataset.from_tensors(numbered(4), labels, validation_fraction=0.25)
    assert data.class_names == names
    for part in splits(data):
        assert part.labels is not None
        for row, label in zip(part.x[:, 0].long().tolist(), part.labels.tolist(), strict=True):
            assert names[label] == str(labels[row].item() if isinstance(labels, torch.Tensor) else labels[row])


def test_dataset_without_labels() -> None:
    data = Dataset.from_tensors(numbered(10), test=(numbered(2), None))
    assert data.class_names == ()
    assert data.num_classes == 0
    assert all(part.labels is None for part in splits(data))


@pytest.mark.parametrize(
    ("shape", "sample_shape"),
    [
        ((6, 5), (5,)),
        ((6, 4, 5), (1, 4, 5)),
        ((6, 1, 4, 5), (1, 4, 5)),
        ((6, 3, 4, 5), (3, 4, 5)),
        ((6, 4, 5, 3), (3, 4, 5)),
        ((6, 4, 5, 1), (1, 4, 5)),
    ],
)
def test_dataset_channel_order(shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    data = Dataset.from_tensors(x, test=(x, None))
    assert data.sample_shape == sample_shape
    assert data.num_features == math.prod(sample_shape)
    assert data.is_image == (len(shape) > 2)
    channels_first = np.moveaxis(x, -1, 1) if shape == (6, 4, 5, 3) else x
    np.testing.assert_array_equal(data.test.x.numpy(), channels_first.reshape(6, -1))


def test_dataset_scales_uint8_images_only() -> None:
    levels = np.arange(3 * 256, dtype=np.uint8).reshape(3, 16, 16)
    images = Dataset.from_tensors(levels, test=(levels, None))
    assert images.test.x.dtype == torch.float32
    torch.testing.assert_close(images.test.x[0], torch.arange(256) / 255, rtol=0, atol=1e-7)
    flat = Dataset.from_tensors(levels.reshape(3, -1), test=(levels.reshape(3, -1), None))
    assert flat.test.x.max() == 255
    wide = Dataset.from_tensors(levels.astype(np.int64), test=(levels.astype(np.int64), None))
    assert wide.test.x.max() == 255


def test_dataset_keeps_no_graph() -> None:
    data = Dataset.from_tensors(torch.rand(5, 2, requires_grad=True))
    assert not any(part.x.requires_grad for part in splits(data))


@pytest.mark.parametrize("odd", ["none", "train", "test"])
def test_dataset_likelihood_suits_every_split(odd: str) -> None:
    x, test = torch.rand(9, 4), torch.rand(2, 4)
    if odd != "none":
        {"train": x, "test": test}[odd][0, 0] = 1.01
    data = Dataset.from_tensors(x, test=(test, None), validation_fraction=0)
    assert data.likelihood == ("bernoulli" if odd == "none" else "gaussian")


@pytest.mark.parametrize("n", [1, 2])
def test_dataset_refuses_too_few_samples(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 3 samples .* got {n}"):
        Dataset.from_tensors(numbered(n))


def test_dataset_with_a_test_set_needs_two_samples() -> None:
    assert sizes(Dataset.from_tensors(numbered(2), test=(numbered(1), None))) == (2, 0, 1)
    with pytest.raises(ValueError, match=r"at least 2 samples .* got 1"):
        Dataset.from_tensors(numbered(1), test=(numbered(1), None))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_dataset_refuses_validation_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"validation_fraction: in \[0, 1\)"):
        Dataset.from_tensors(numbered(50), validation_fraction=fraction)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "no samples or no features"),
        (torch.zeros(5, 0), "no samples or no features"),
        (torch.zeros(5), r"\(n, P\).*got torch.float32 \(5,\)"),
        (torch.zeros(2, 2, 2, 2, 2), r"\(n, P\).*got"),
        (torch.zeros(5, 2, dtype=torch.complex64), "real numbers"),
        (torch.zeros(5, 4, 4, 2), r"1 or 3 channels expected, got \(5, 4, 4, 2\)"),
        (np.full((5, 2), "a"), "x: an array of numbers"),
        ([[1.0], [1.0, 2.0]], "x: an array of numbers"),
        (torch.tensor([[0.0], [1.0], [math.nan], [math.inf]]), "x: finite values expected, got nan in sample 2"),
        (torch.tensor([[0.0], [1e39]], dtype=torch.float64), "got inf in sample 1"),
    ],
)
def test_dataset_refuses_samples(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset.from_tensors(x)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"one for each sample, \(4,\), expected, got \(2,\)"),
        (np.zeros((4, 1)), r"got \(4, 1\)"),
        ([0.0, 1.0, math.nan, 1.0], "labels: finite values"),
        ([0, 1, None, "a"], "labels: values that can be sorted"),
    ],
)
def test_dataset_refuses_labels(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset.from_tensors(numbered(4), labels)


def test_dataset_refuses_test_sets_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"test samples of shape \(3,\) expected, got \(2,\)"):
        Dataset.from_tensors(numbered(4), test=(numbered(4, 2), None))
    for labels, test_labels in ((None, [0, 1]), ([0, 1, 0, 1], None)):
        with pytest.raises(ValueError, match="or for neither"):
            Dataset.from_tensors(numbered(4), labels, test=(numbered(2), test_labels))
    with pytest.raises(ValueError, match="x of the test set: finite values expected, got nan in sample 1"):
        Dataset.from_tensors(numbered(4, 1), test=(torch.tensor([[0.0], [math.nan]]), None))


def test_last_samples_can_be_for_validation() -> None:
    x = torch.arange(20.0).view(20, 1)
    data = Dataset.from_tensors(x, test=(x, None), validation_fraction=0.25, validation_split="last")
    assert data.train.x.flatten().tolist() == list(range(15))
    assert data.validation.x.flatten().tolist() == list(range(15, 20))
    alone = Dataset.from_tensors(x, validation_fraction=0.25, validation_split="last")
    assert [len(split.x) for split in (alone.train, alone.validation, alone.test)] == [11, 5, 4]
    assert alone.validation.x.flatten().tolist() == list(range(11, 16))


# the embedded digits


def test_load_data_digits() -> None:
    data = load_data("digits", validation_fraction=0.2)
    assert data.name == "digits"
    assert data.sample_shape == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    assert sizes(data) == (1078, 359, 360)
    assert data.likelihood == "bernoulli"
    assert data.train.x.max() == 1
    assert data.train.labels is not None
    mean_of_zero = data.train.x[data.train.labels == 0].mean(0).view(8, 8)
    assert mean_of_zero[3:5, 3:5].max() < 0.3 < mean_of_zero[3:5, 2].min()  # a ring


# batches


@pytest.mark.parametrize(("n", "batch_size"), [(20, 6), (18, 6), (5, 6), (1, 1)])
def test_batches_are_the_rows_in_a_new_order_for_each_epoch(n: int, batch_size: int) -> None:
    batches = Batches(numbered(n), batch_size, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        parts = list(batches)
        assert [len(part) for part in parts] == [min(batch_size, n - i) for i in range(0, n, batch_size)]
        assert len(batches) == len(parts)
        orders.append(torch.cat(parts)[:, 0].tolist())
        assert sorted(orders[-1]) == list(range(n))
    assert orders[0] == orders[2]
    assert n < 5 or orders[0] != orders[1]
    batches.seed = 4
    assert n < 5 or torch.cat(list(batches))[:, 0].tolist() != orders[0]


def test_batches_without_a_seed_keep_the_order() -> None:
    batches = Batches(numbered(7), 3)
    batches.set_epoch(2)
    assert torch.cat(list(batches)).equal(numbered(7))


def test_batches_do_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    list(Batches(numbered(7), 3, seed=0))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 12, 24, 25, 26, 27, 35])
@pytest.mark.parametrize("seed", [None, 0])
def test_batches_are_dealt_out_evenly(world_size: int, n: int, seed: int | None) -> None:
    whole = list(Batches(numbered(n), 12, seed))
    ranks = [Batches(numbered(n), 12, seed, rank, world_size) for rank in range(world_size)]
    dealt = [list(rank) for rank in ranks]
    assert {len(rank) for rank in ranks} == {len(parts) for parts in dealt} == {len(dealt[0])}
    assert len(dealt[0]) == sum(len(batch) >= world_size for batch in whole)
    for batch, *parts in zip(whole, *dealt, strict=False):
        assert {len(part) for part in parts} == {len(batch) // world_size}
        together = sorted(torch.cat(parts)[:, 0].tolist())
        assert len(set(together)) == len(together)
        assert set(together) <= set(batch[:, 0].tolist())
        assert len(batch) % world_size or together == sorted(batch[:, 0].tolist())


@pytest.mark.parametrize(("batch_size", "rank", "world_size"), [(2, 0, 3), (0, 0, 1), (8, 2, 2), (8, -1, 2)])
def test_batches_refuse(batch_size: int, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="0 <= rank < world_size <= batch_size"):
        Batches(numbered(9), batch_size, 0, rank, world_size)


def test_binarize_draws_gray_levels_as_probabilities() -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).expand(40_000, 3)
    drawn = binarize(x, 1)
    assert drawn.unique().tolist() == [0.0, 1.0]
    assert drawn.mean(0)[[0, 2]].tolist() == [0.0, 1.0]
    assert drawn[:, 1].mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 40_000))
    torch.manual_seed(7)
    assert binarize(x, 1).equal(drawn)
    assert not binarize(x, 2).equal(drawn)
    assert binarize(x[:0], 1).shape == (0, 3)


def test_mix_seed_differs_between_sequences() -> None:
    assert mix_seed(3, 4) == mix_seed(3, 4)
    sequences = [(a,) for a in range(50)] + [(a, b) for a in range(50) for b in range(50)]
    sequences += [(a, b, 0) for a in range(50) for b in range(50)] + [(2**32,), (2**32, 0)]
    seeds = {mix_seed(*numbers) for numbers in sequences}
    assert len(seeds) == len(sequences)
    assert all(0 <= seed < 2**63 for seed in seeds)
