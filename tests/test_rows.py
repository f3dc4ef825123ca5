"""Rows of block calls."""

import numpy as np
import pytest

from flowturbo.contract import PAIR, X
from flowturbo.rows import in_batches


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8, 16), (2, 8), (2,)])
def test_rows_are_cut_into_batches_and_no_pair_is(sizes: tuple[int, ...]) -> None:
    chance = np.random.default_rng(0)
    for _ in range(300):
        pair = [
            part
            for _ in range(chance.integers(1, 25))
            for part in ([[0], [1, -1]][chance.integers(2)])
        ]
        rows = np.arange(len(pair), dtype=np.float32)[:, None]
        tensors = {X: rows, PAIR: np.array(pair, np.int32)[:, None]}
        found = []
        for batch, count in in_batches(tensors, sizes):
            assert len(batch[X]) == len(batch[PAIR]) in sizes
            assert (batch[X][count:] == batch[X][count - 1]).all()
            of = batch[PAIR][:count, 0]
            assert of[0] >= 0 and of[-1] <= 0  # both ends of a pair are inside
            found.append(batch[X][:count])
        np.testing.assert_array_equal(np.concatenate(found), rows)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, [1]), (3, [4]), (6, [8]), (10, [8, 2]), (14, [16]), (16, [16]), (26, [16, 8, 2])],
)
def test_few_calls_and_few_rows_too_many(rows: int, sizes: list[int]) -> None:
    """A call costs about as much as two rows."""
    tensors = {X: np.zeros((rows, 1), np.float32)}
    assert [len(batch[X]) for batch, _ in in_batches(tensors, (1, 2, 4, 8, 16))] == sizes


def test_images_one_at_a_time() -> None:
    tensors = {X: np.arange(3.0)[:, None]}
    assert [batch[X].tolist() for batch, _ in in_batches(tensors, (1,))] == [[[0]], [[1]], [[2]]]
