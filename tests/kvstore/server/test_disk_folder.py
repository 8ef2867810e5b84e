"""Block files: whole or not there, whatever happens to them."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.messages.blocks import BlockName
from kvstore.server import disk_folder
from kvstore.server.core import disk_format
from kvstore.server.core.disk_format import file_bytes, header_bytes
from kvstore.server.disk_folder import DiskFolder, Parts
from tests.kvstore.server.builders import BLOCK_BYTES, FILE_BYTES, LAYOUT, block, chain, name

PLENTY_BLOCKS = 100
OTHER_LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")  # blocks of the same length


@contextmanager
def opened(path: Path, blocks: int = PLENTY_BLOCKS, layout: KvLayout = LAYOUT) -> Iterator[DiskFolder]:
    with closing(DiskFolder(path, blocks * FILE_BYTES)) as folder:
        folder.scan(layout, blocks)
        yield folder


def contents(number: int) -> bytes:
    return number.to_bytes(4, "big") * (BLOCK_BYTES // 4)


def parts(number: int) -> list[memoryview]:
    whole = memoryview(contents(number))
    return [whole[:1000], whole[1000:]]


def write(folder: DiskFolder, *numbers: int) -> None:
    for one in numbers:
        assert folder.write(block(one), LAYOUT, parts(one)) == ""


def read(folder: DiskFolder, which: BlockName) -> bytes | None:
    buffer = bytearray(BLOCK_BYTES)
    into = [memoryview(buffer)[:5000], memoryview(buffer)[5000:]]
    return bytes(buffer) if folder.read(which, LAYOUT, into) else None


def path_of(root: Path, number: int) -> Path:
    return root / name(number).hex()[:2] / f"{name(number).hex()}.kv"


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.name != "lock")


def test_blocks_come_back_as_they_were_also_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        write(folder, 1, 2)
        assert read(folder, block(2)) == contents(2)
    with closing(DiskFolder(tmp_path, PLENTY_BLOCKS * FILE_BYTES)) as folder:
        assert {*folder.scan(LAYOUT, PLENTY_BLOCKS)} == {block(1), block(2)}
        assert folder.used_bytes == 2 * FILE_BYTES
        assert [read(folder, block(number)) for number in (1, 2)] == [contents(1), contents(2)]


def test_a_flipped_byte_anywhere_is_a_miss_and_the_file_is_deleted(tmp_path: Path) -> None:
    header = header_bytes(LAYOUT)
    size = file_bytes(LAYOUT)
    for offset in [*range(0, header, 3), *range(header, size, 97), size - 33, size - 32, size - 1]:
        with opened(tmp_path) as folder:
            write(folder, 1)
            path = path_of(tmp_path, 1)
            torn = bytearray(path.read_bytes())
            torn[offset] ^= 0x10
            path.write_bytes(torn)
            assert read(folder, block(1)) is None, f"byte {offset} was flipped"
            assert files(tmp_path) == []
            assert folder.used_bytes == 0


@pytest.mark.parametrize("change_bytes", [-1, -BLOCK_BYTES, 1, 4096])
def test_a_file_of_another_length_is_a_miss(tmp_path: Path, change_bytes: int) -> None:
    with opened(tmp_path) as folder:
        write(folder, 1)
        os.truncate(path_of(tmp_path, 1), file_bytes(LAYOUT) + change_bytes)
        assert read(folder, block(1)) is None
        assert files(tmp_path) == []


def test_a_whole_file_under_the_name_of_another_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        write(folder, 1, 2)
        os.replace(path_of(tmp_path, 1), path_of(tmp_path, 2))
        assert read(folder, block(2)) is None
        write(folder, 1)
        os.replace(path_of(tmp_path, 1), path_of(tmp_path, 3))
    with closing(DiskFolder(tmp_path, PLENTY_BLOCKS * FILE_BYTES)) as folder:
        assert folder.scan(LAYOUT, PLENTY_BLOCKS) == []
        assert files(tmp_path) == []


def test_a_block_that_is_not_there_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        assert read(folder, block(1)) is None
        write(folder, 1)
        path_of(tmp_path, 1).unlink()
        assert read(folder, block(1)) is None
        assert folder.used_bytes == 0


def test_a_scan_deletes_what_is_torn_or_of_another_layout_and_leaves_strangers_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        write(folder, 1, 2, 3)
    path_of(tmp_path, 4).with_suffix(".tmp").write_bytes(b"half a bl")
    path_of(tmp_path, 5).write_bytes(b"")
    os.truncate(path_of(tmp_path, 2), 1000)
    (tmp_path / "00" / "notes.txt").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / path_of(tmp_path, 9).name).write_text("mine")
    with closing(DiskFolder(tmp_path, PLENTY_BLOCKS * FILE_BYTES)) as folder:
        assert {*folder.scan(LAYOUT, PLENTY_BLOCKS)} == {block(1), block(3)}
    strangers = sorted(["notes.txt", path_of(tmp_path, 9).name])
    assert files(tmp_path) == sorted([path_of(tmp_path, 1).name, path_of(tmp_path, 3).name, *strangers])
    with opened(tmp_path, layout=OTHER_LAYOUT):
        assert files(tmp_path) == strangers


def test_a_scan_deletes_what_an_earlier_version_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_format, "VERSION", disk_format.VERSION - 1)
    with opened(tmp_path) as folder:
        write(folder, 1)
    monkeypatch.undo()
    with closing(DiskFolder(tmp_path, PLENTY_BLOCKS * FILE_BYTES)) as folder:
        assert folder.scan(LAYOUT, PLENTY_BLOCKS) == []
    assert files(tmp_path) == []


def test_a_scan_keeps_the_newest_and_tells_the_oldest_first(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        for number, used_s in ((1, 50), (2, 20), (3, 30), (4, 10), (5, 40)):
            write(folder, number)
            os.utime(path_of(tmp_path, number), (used_s, used_s))
        read(folder, block(4))  # a use
    with closing(DiskFolder(tmp_path, PLENTY_BLOCKS * FILE_BYTES)) as folder:
        assert folder.scan(LAYOUT, 3) == [block(5), block(1), block(4)]
    assert len(files(tmp_path)) == 3


def test_of_blocks_written_at_one_time_the_end_of_the_chain_is_the_oldest(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        for one in chain(1, 2, 3):
            folder.write(one, LAYOUT, parts(1))
            os.utime(path_of(tmp_path, int.from_bytes(one.name, "big")), (5, 5))
        assert folder.scan(LAYOUT, 2) == list(reversed(chain(1, 2)))


def test_the_cap_is_never_exceeded(tmp_path: Path) -> None:
    with opened(tmp_path, blocks=2) as folder:
        write(folder, 1, 2)
        assert "are used" in folder.write(block(3), LAYOUT, parts(3))
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) <= 2 * FILE_BYTES
        folder.delete(name(1), LAYOUT)
        write(folder, 3)
        assert files(tmp_path) == [path_of(tmp_path, 2).name, path_of(tmp_path, 3).name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_write_that_fails_says_why_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    def fail_halfway(path: Path, pieces: Parts) -> None:
        disk_folder.write_file(path, pieces[:1])
        raise OSError(code, os.strerror(code))

    with closing(DiskFolder(tmp_path, PLENTY_BLOCKS * FILE_BYTES, write=fail_halfway)) as folder:
        folder.scan(LAYOUT, PLENTY_BLOCKS)
        assert os.strerror(code) in folder.write(block(1), LAYOUT, parts(1))
        assert files(tmp_path) == []
        assert folder.used_bytes == 0


def test_two_stores_cannot_use_one_folder(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(ConfigError, match="another KV store uses this folder"):
            DiskFolder(tmp_path, 1)
    DiskFolder(tmp_path, 1).close()


def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=f"--disk={file}: cannot be used"):
        DiskFolder(file, 1)
