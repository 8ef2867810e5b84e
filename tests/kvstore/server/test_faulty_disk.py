"""Files that a rule spoils: never given for whole, and gone once that was seen."""

from contextlib import closing
from pathlib import Path

import pytest

from common.log import Log
from common.net.fault_kit import FaultKit
from kvstore.server.faulty_disk import FaultyDiskFolder
from tests.kvstore.server.builders import FILE_BYTES, LAYOUT, block
from tests.kvstore.server.test_disk_folder import PLENTY_BLOCKS, contents, files, parts, read


def folder_with(rules: str, path: Path, slept: list[float] | None = None) -> FaultyDiskFolder:
    sleep = (slept if slept is not None else []).append
    folder = FaultyDiskFolder(path, PLENTY_BLOCKS * FILE_BYTES, FaultKit(rules, "kvstore-0", Log()), sleep)
    folder.scan(LAYOUT, PLENTY_BLOCKS)
    return folder


@pytest.mark.parametrize("what", ["write", "read"])
@pytest.mark.parametrize("kind", ["corrupt", "torn"])
def test_a_spoilt_file_is_not_read_and_goes(kind: str, what: str, tmp_path: Path) -> None:
    with closing(folder_with(f"disk:{kind} peer={what} times=1", tmp_path)) as folder:
        for number in (1, 2):
            assert folder.write(block(number), LAYOUT, parts(number)) == ""
        assert read(folder, block(1)) is None
        assert read(folder, block(2)) == contents(2)
        assert len(files(tmp_path)) == 1


def test_a_write_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with closing(folder_with("disk:fail peer=write times=1", tmp_path)) as folder:
        assert "Input/output error" in folder.write(block(1), LAYOUT, parts(1))
        assert files(tmp_path) == []
        assert folder.write(block(1), LAYOUT, parts(1)) == ""


def test_a_read_that_fails_finds_nothing_and_gives_the_room_back(tmp_path: Path) -> None:
    slept: list[float] = []
    with closing(folder_with("disk:fail peer=read;disk:delay ms=3 peer=read", tmp_path, slept)) as folder:
        folder.write(block(1), LAYOUT, parts(1))
        assert read(folder, block(1)) is None
        assert folder.used_bytes == 0
    assert slept == [0.003]
