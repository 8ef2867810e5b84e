"""Copying pages means assigning them one by one, only faster."""

import itertools
import random

import numpy as np
import pytest

from kvstore.transport.pages import Ids, Rows, as_range, copy_pages, count_pieces

PAGE_BYTES = 64
ORDERS = ["scattered", "one run", "runs", "one layer", "falling"]


def pages(count: int, seed: int) -> Rows:
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), np.uint8)


def order(kind: str, rng: random.Random, count: int) -> list[int]:
    ids = rng.sample(range(400), count)
    match kind:
        case "scattered":
            return ids
        case "one run":
            return list(range(ids[0] % (400 - count), ids[0] % (400 - count) + count))
        case "one layer":  # of blocks of three pages, with a hole in the middle
            return [(3 * block + (300 if block >= count // 2 and count < 30 else 0)) % 400 for block in range(count)]
        case "falling":
            return list(range(count, 0, -1))
        case _:  # runs of eight, in any order
            starts = rng.sample(range(0, 400, 8), count // 8 + 1)
            return [start + step for start in starts for step in range(8)][:count]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 64, 300])
@pytest.mark.parametrize("to", ORDERS)
@pytest.mark.parametrize("of", ORDERS)
def test_every_page_arrives_where_it_should_and_no_other_is_touched(of: str, to: str, count: int) -> None:
    rng = random.Random(count)
    source, target = pages(400, 1), pages(400, 2)
    from_pages, to_pages = order(of, rng, count), order(to, rng, count)
    expected = target.copy()
    for one, other in zip(from_pages, to_pages, strict=True):
        expected[other] = source[one]
    n_copies = copy_pages(source, from_pages, target, to_pages)
    assert np.array_equal(target, expected)
    runs = list(zip(from_pages, to_pages, strict=True))
    joined = sum(b == (a[0] + 1, a[1] + 1) for a, b in itertools.pairwise(runs))
    assert n_copies == count - joined
    again = pages(400, 2)
    assert copy_pages(source, np.array(from_pages, np.int32), again, np.array(to_pages, np.int32)) == n_copies
    assert np.array_equal(again, expected)


@pytest.mark.parametrize(
    ("of", "to"), [([0, 400], [0, 1]), ([0, 1], [-1, 3]), ([0, 1], [2]), (range(10), range(395, 405))]
)
def test_pages_that_do_not_exist_are_refused_before_anything_is_copied(of: list[int], to: list[int]) -> None:
    source, target = pages(400, 1), pages(400, 2)
    before = target.copy()
    with pytest.raises(IndexError):
        copy_pages(source, of, target, to)
    assert np.array_equal(target, before)


def test_no_pages_are_no_copy() -> None:
    assert copy_pages(pages(4, 1), [], pages(4, 2), []) == 0
    assert count_pieces([], []) == 0


def test_a_source_page_may_be_read_twice() -> None:
    source, target = pages(9, 3), pages(9, 4)
    assert copy_pages(source, [5, 5, 5], target, [1, 2, 3]) == 3
    assert np.array_equal(target[[1, 2, 3]], source[[5, 5, 5]])


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ((4,), range(4, 5)),
        ((4, 5, 6), range(4, 7)),
        ((4, 28, 52), range(4, 76, 24)),
        (np.array([4, 28, 52], np.int32), range(4, 76, 24)),
        (range(3, 9, 2), range(3, 9, 2)),
        ((4, 28, 53), None),
        (np.array([4, 29, 52]), None),
        ((4, 29, 52), None),
        ((6, 5, 4), None),
        ((5, 5), None),
        (range(5, 2, -1), None),
        ((), None),
    ],
)
def test_pages_at_one_distance_are_a_range(ids: Ids, wanted: range | None) -> None:
    assert as_range(ids) == wanted


@pytest.mark.parametrize("width", [1, 3, 4, 8])
def test_some_layers_of_neighbouring_blocks_are_copied_whole(width: int) -> None:
    source, target = pages(24 * 8, 1), np.zeros((24 * 10, PAGE_BYTES), np.uint8)
    ids = np.arange(24 * 5).reshape(5, 24)
    sources, targets = (ids + 48)[:, 2 : 2 + width].reshape(-1), (ids + 72)[:, 9 : 9 + width].reshape(-1)
    assert copy_pages(source, sources, target, targets) == 5
    expected = np.zeros_like(target)
    expected[targets] = source[sources]
    assert (target == expected).all()
