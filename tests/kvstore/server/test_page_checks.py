"""A store takes nothing that is not what its writer had, and tells every page's checksum for as long as it has the page."""

import zlib
from collections.abc import Iterator

import pytest

from common.kv_layout import KvLayout
from common.messages.blocks import BlockName, Publish, Put
from kvstore.memory.available import Available
from kvstore.server.block_memory import BlockMemory
from kvstore.server.page_checks import PageChecks, Row

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32")
PAGE = LAYOUT.page_bytes
BLOCK = bytes([1]) * PAGE + bytes([2]) * PAGE
SUMS: Row = (zlib.crc32(BLOCK[:PAGE]), zlib.crc32(BLOCK[PAGE:]))
NAME = BlockName(bytes(16), bytes(16), 0)


@pytest.fixture
def memory() -> Iterator[BlockMemory]:
    made = BlockMemory(4 * 2**20, Available(2**30, "test"))
    made.shape(PAGE, 100)
    yield made
    made.close()


@pytest.fixture
def checks(memory: BlockMemory) -> PageChecks:
    made = PageChecks(memory)
    made.shape(LAYOUT, 100)
    return made


def counted(checks: PageChecks) -> tuple[float, ...]:
    return tuple(checks.counters().values())  # checked, unchecked, wrong; accused and wrong, accused and right


def test_a_put_that_is_not_what_it_says_is_refused(checks: PageChecks) -> None:
    assert checks.on_put(Put(call=1, blocks=(NAME,), checksums=(SUMS,)), [BLOCK]) == ""
    wrong = BLOCK[:-1] + b"\x03"
    assert "1 of 2 pages" in checks.on_put(Put(call=1, blocks=(NAME,), checksums=(SUMS,)), [wrong])
    assert checks.on_put(Put(call=1, blocks=(NAME,), checksums=((1,),)), [BLOCK]) != ""
    assert counted(checks)[:2] == (6, 0)


def test_a_put_without_checksums_or_of_another_shape_is_the_cores_to_judge(checks: PageChecks) -> None:
    assert checks.on_put(Put(call=1, blocks=(NAME,)), [BLOCK]) == ""
    assert checks.on_put(Put(call=1, blocks=(NAME,), checksums=(SUMS,)), [b"short"]) == ""
    assert counted(checks)[:3] == (0, 2, 0)


def test_what_was_written_is_known_from_its_publish_on(memory: BlockMemory, checks: PageChecks) -> None:
    memory.write((5, 6), BLOCK)
    assert checks.on_publish(Publish(call=1, ok=True, checksums=(SUMS,)), [(5, 6)]) == []
    assert checks.of([(5, 6)]) == (SUMS,) and counted(checks)[:3] == (2, 0, 0)


def test_a_page_that_was_written_wrong_is_named(memory: BlockMemory, checks: PageChecks) -> None:
    memory.write((5, 6), BLOCK)
    memory.parts((6,))[0][0] ^= 1
    assert checks.on_publish(Publish(call=1, ok=True, checksums=(SUMS,)), [(5, 6)]) == [6]
    assert checks.on_publish(Publish(call=1, ok=True, checksums=(SUMS[:1],)), [(5, 6)]) == [6]
    assert counted(checks)[2] == 2


def test_a_publish_for_a_reservation_that_is_gone_is_no_mismatch(checks: PageChecks) -> None:
    assert checks.on_publish(Publish(call=1, ok=True, checksums=(SUMS,)), []) == []
    assert counted(checks)[:3] == (0, 0, 0)


def test_what_comes_without_checksums_gets_them_here(memory: BlockMemory, checks: PageChecks) -> None:
    memory.write((5, 6), BLOCK)
    assert checks.on_publish(Publish(call=1, ok=True), [(5, 6)]) == []
    checks.written((8, 9), BLOCK)
    assert checks.of([(5, 6), (8, 9)]) == (SUMS, SUMS) and counted(checks)[:3] == (0, 2, 0)


def test_what_went_wrong_while_it_lay_here_keeps_its_checksum_and_never_becomes_a_file(
    memory: BlockMemory, checks: PageChecks
) -> None:
    memory.write((5, 6), BLOCK)
    checks.make((5, 6))
    assert checks.before_disk((5, 6)) == ""
    memory.parts((5,))[0][0] ^= 1
    assert checks.of([(5, 6)]) == (SUMS,) and checks.before_disk((5, 6)) != ""


def test_an_accused_block_is_right_or_wrong_by_its_own_checksum(memory: BlockMemory, checks: PageChecks) -> None:
    memory.write((5, 6), BLOCK)
    checks.make((5, 6))
    assert checks.still_right((5, 6))
    memory.parts((6,))[0][0] ^= 1
    assert not checks.still_right((5, 6))
    assert counted(checks)[3:] == (1, 1)
