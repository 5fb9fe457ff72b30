"""The order of streams is computed: every record once an epoch, whatever the numbers are."""

import numpy as np
import pytest

from capvl.data.randomness import permutation
from capvl.data.reading.stream_order import Shares, StreamOrder, pieces

DRAWN = np.random.default_rng(0)
# (sizes of the pieces, lanes, window)
CASES = [
    ([1], 1, 1),
    ([7], 32, 10_000),
    ([3, 1, 4, 1, 5], 3, 4),
    ([10] * 8, 4, 16),
    ([100, 1, 1, 1], 4, 20),
    *((DRAWN.integers(1, 40, 30).tolist(), int(DRAWN.integers(1, 12)), int(DRAWN.integers(1, 300))) for _ in range(8)),
]


@pytest.mark.parametrize("sizes, lanes, window", CASES)
def test_every_record_of_an_epoch_once(sizes, lanes, window):
    order = StreamOrder(sizes, 3, lanes=lanes, window=window)
    size = sum(sizes)
    assert order.size == size and order.lanes == min(lanes, len(sizes))
    for epoch in range(2):
        places = order(np.arange(epoch * size, (epoch + 1) * size))
        assert sorted(places.record) == list(range(size))
        assert set(places.epoch) == {epoch}
    if size > 10:
        assert order(np.arange(size)).record.tolist() != order(np.arange(size, 2 * size)).record.tolist()


@pytest.mark.parametrize("sizes, lanes, window", CASES)
def test_any_numbers_alone_are_as_in_the_whole(sizes, lanes, window):
    size = sum(sizes)
    whole = np.stack(StreamOrder(sizes, 3, lanes=lanes, window=window)(np.arange(3 * size)), axis=1)
    chosen = np.random.default_rng(1).permutation(3 * size)[:50]
    alone = np.stack(StreamOrder(sizes, 3, lanes=lanes, window=window)(chosen), axis=1)
    np.testing.assert_array_equal(alone, whole[chosen])


@pytest.mark.parametrize("sizes, lanes, window", CASES)
def test_blocks(sizes, lanes, window):
    """A block is what of a lane has its number; none has more records than its share of the window."""
    order, size = StreamOrder(sizes, 3, lanes=lanes, window=window), sum(sizes)
    numbers = np.arange(size, 2 * size)
    places = order(numbers)
    np.testing.assert_array_equal(places.lane, (numbers - size) % order.lanes)
    for key in {tuple(map(int, k)) for k in zip(*places[:3], strict=True)}:
        own = (places.lane == key[1]) & (places.block == key[2])
        assert sorted(order.records(key)) == sorted(places.record[own])
        assert order.last(key) == numbers[own].max()
        assert order.block_of(1, int(numbers[own][0]) - size) == key
        if window < size:
            assert own.sum() <= -(-window // order.lanes)
    if window >= size:
        assert set(places.block) == {0}


def test_lanes_dont_end_their_blocks_together():
    order = StreamOrder([500] * 64, 0, lanes=32, window=6_400)
    ends = [order.last((0, lane, 1)) // 32 for lane in range(32)]
    assert len(set(ends)) == 32 and max(ends) - min(ends) == 194


def test_shuffled_over_files_and_within_them():
    order = StreamOrder([500] * 64, 0, lanes=8, window=8_000)
    first = order(np.arange(4_000)).record
    assert len({record // 500 for record in first}) >= 8
    lane = first[::8]
    assert 0.4 < np.mean(np.diff(lane) > 0) < 0.6


def test_pieces_of_files():
    assert pieces(0) == [] and pieces(500) == [500] and pieces(501) == [250, 251] and pieces(3, 2) == [1, 2]
    assert sum(pieces(12_345)) == 12_345 and max(pieces(12_345)) <= 500


def test_a_permutation_is_the_same_for_ever():
    assert permutation(8, 1, 2).tolist() == [5, 6, 7, 4, 1, 2, 3, 0]
    assert sorted(permutation(1000, 5)) == list(range(1000))
    assert permutation(8, 2, 1).tolist() != permutation(8, 1, 2).tolist()


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [3, 1, 1], [0.001, 10]])
def test_shares(weights):
    part, number = Shares(weights)(np.arange(10_000))
    for i, weight in enumerate(weights):
        own = number[part == i]
        np.testing.assert_array_equal(own, np.arange(len(own)))
        assert abs(len(own) - 10_000 * weight / sum(weights)) <= len(weights)
    late = Shares(weights)(np.arange(9_000, 9_050))
    np.testing.assert_array_equal(late[0], part[9_000:9_050])
    np.testing.assert_array_equal(late[1], number[9_000:9_050])
