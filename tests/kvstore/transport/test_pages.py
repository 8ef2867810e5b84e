"""Copying pages means assigning them one by one, only faster."""

import random

import numpy as np
import pytest

from kvstore.transport.pages import Rows, copy_pages, gather, rows_of

PAGE_BYTES = 64


def pages(count: int, seed: int) -> Rows:
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), np.uint8)


def order(kind: str, rng: random.Random, count: int) -> list[int]:
    ids = rng.sample(range(400), count)
    match kind:
        case "scattered":
            return ids
        case "one run":
            return list(range(ids[0] % (400 - count), ids[0] % (400 - count) + count))
        case _:  # runs of eight, in any order
            starts = rng.sample(range(0, 400, 8), count // 8 + 1)
            return [start + step for start in starts for step in range(8)][:count]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 64, 300])
@pytest.mark.parametrize("to", ["scattered", "one run", "runs"])
@pytest.mark.parametrize("of", ["scattered", "one run", "runs"])
def test_every_page_arrives_where_it_should_and_no_other_is_touched(of: str, to: str, count: int) -> None:
    rng = random.Random(count)
    source, target = pages(400, 1), pages(400, 2)
    from_pages, to_pages = order(of, rng, count), order(to, rng, count)
    expected = target.copy()
    for one, other in zip(from_pages, to_pages, strict=True):
        expected[other] = source[one]
    copy_pages(source, from_pages, target, to_pages)
    assert np.array_equal(target, expected)


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
    copy_pages(pages(4, 1), [], pages(4, 2), [])


def test_gathered_pages_lie_one_after_the_other() -> None:
    source = pages(9, 3)
    assert np.array_equal(rows_of(gather(source, [7, 2, 3]), PAGE_BYTES), source[[7, 2, 3]])
