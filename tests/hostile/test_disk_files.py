"""Block files that anything happened to: never a crash, a wait or another block; a file that is no good goes, and is counted."""

import os
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from kvstore.server import disk_folder
from kvstore.server.core.disk_format import file_bytes, header_bytes, read_header
from kvstore.server.disk_folder import DiskFolder
from tests.kvstore.server.builders import FILE_BYTES, LAYOUT, block, name
from tests.kvstore.server.test_disk_folder import contents, parts, path_of, read

PLENTY = 100
SIZE = file_bytes(LAYOUT)


@contextmanager
def folder_of(root: Path, *numbers: int) -> Iterator[DiskFolder]:
    """A folder that holds these blocks, by its own account too."""
    with closing(DiskFolder(root, PLENTY * FILE_BYTES)) as found:
        found.scan(LAYOUT, PLENTY)
        for number in numbers:
            assert found.write(block(number), LAYOUT, parts(number)) == ""
        yield found


def scan(root: Path) -> tuple[list[int], int]:
    """What a new start finds, and how many files it gave up."""
    with closing(DiskFolder(root, PLENTY * FILE_BYTES)) as found:
        blocks = found.scan(LAYOUT, PLENTY)
        return sorted(int.from_bytes(one.name, "big") for one in blocks), found.discarded_files


def test_a_file_cut_anywhere_is_a_miss_and_goes(tmp_path: Path) -> None:
    with folder_of(tmp_path) as folder:
        header = header_bytes(LAYOUT)
        for length in [*range(header + 2), *range(header + 2, SIZE, 61), *range(SIZE - 34, SIZE)]:
            folder.write(block(1), LAYOUT, parts(1))
            os.truncate(path_of(tmp_path, 1), length)
            assert read(folder, block(1)) is None, f"of {SIZE} bytes {length} were left"
            assert not path_of(tmp_path, 1).exists() and folder.used_bytes == 0


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "drop", "insert", "swap", "zero", "absurd"]))
def test_a_changed_file_is_never_taken_for_a_block(tmp_path: Path, seed: int, kind: str) -> None:
    chance = random.Random(seed)
    with folder_of(tmp_path, 1, 2) as folder:
        path, whole = path_of(tmp_path, 1), bytearray(path_of(tmp_path, 1).read_bytes())
        before, at = bytes(whole), chance.randrange(SIZE)
        if chance.random() < 0.5:
            at = chance.randrange(header_bytes(LAYOUT))
        match kind:
            case "flip":
                whole[at] ^= 1 << chance.randrange(8)
            case "drop":
                del whole[at : at + chance.randrange(1, 50)]
            case "insert":
                whole[at:at] = chance.randbytes(chance.randrange(1, 50))
            case "swap":
                whole[at:] = path_of(tmp_path, 2).read_bytes()[at:]
            case "zero":
                whole[at : at + 512] = bytes(len(whole[at : at + 512]))
            case "absurd":  # a length or a depth
                offset = chance.choice([8, 12, 16, 24])
                struct.pack_into("<Q", whole, offset, chance.choice([2**63, 2**64 - 1, 0, 2**32]))
        path.write_bytes(whole)
        got = read(folder, block(1))
        assert got == (contents(1) if bytes(whole) == before else None)
        assert read(folder, block(2)) == contents(2)
    assert set(scan(tmp_path)[0]) <= {1, 2}


@settings(max_examples=40, deadline=None, database=None)
@given(header=st.binary(max_size=300))
def test_no_bytes_are_a_header_unless_a_store_wrote_them(header: bytes) -> None:
    assert read_header(header, LAYOUT) is None
    assert read_header((header * 300)[: header_bytes(LAYOUT)], LAYOUT) is None


def test_files_that_changed_names_are_misses(tmp_path: Path) -> None:
    with folder_of(tmp_path, 1, 2, 3) as folder:
        spare = tmp_path / "spare"
        path_of(tmp_path, 1).rename(spare)
        path_of(tmp_path, 2).rename(path_of(tmp_path, 1))
        spare.rename(path_of(tmp_path, 2))
        assert [read(folder, block(number)) for number in (1, 2, 3)] == [None, None, contents(3)]
        assert folder.used_bytes == FILE_BYTES
    assert scan(tmp_path) == ([3], 0)


def _elsewhere(root: Path) -> Path:
    return root.parent / f"{root.name}-elsewhere"


def _link(path: Path) -> None:
    target = path.rename(_elsewhere(path.parents[1]))
    path.symlink_to(target)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    os.truncate(path, 2**40)


@pytest.mark.parametrize("put", [_link, _dangling, _loop, _pipe, _device, _sparse])
def test_what_is_no_file_of_ours_goes_at_a_read_and_at_a_scan(tmp_path: Path, put: Callable[[Path], None]) -> None:
    root = tmp_path / "disk"
    with folder_of(root, 1, 2) as folder:
        put(path_of(root, 1))
        assert read(folder, block(1)) is None
        assert not os.path.lexists(path_of(root, 1)) and folder.used_bytes == FILE_BYTES
        assert folder.write(block(1), LAYOUT, parts(1)) == ""
        put(path_of(root, 1))
    assert scan(root) == ([2], 1)
    assert not os.path.lexists(path_of(root, 1))
    if put is _link:
        assert _elsewhere(root).stat().st_size == SIZE, "what it pointed to is not ours"


def test_a_folder_in_place_of_a_file_is_a_miss_and_costs_only_its_block(tmp_path: Path) -> None:
    with folder_of(tmp_path, 1, 2) as folder:
        path_of(tmp_path, 1).unlink()
        path_of(tmp_path, 1).mkdir()
        assert read(folder, block(1)) is None
        assert "cannot write" in folder.write(block(1), LAYOUT, parts(1))
        assert read(folder, block(2)) == contents(2)
    assert scan(tmp_path) == ([2], 0)


@pytest.mark.parametrize("put", [_pipe, lambda path: path.symlink_to(path.parents[1] / "precious"), Path.mkdir])
def test_what_lies_where_a_file_is_begun_is_neither_waited_for_nor_followed(
    tmp_path: Path, put: Callable[[Path], None]
) -> None:
    (tmp_path / "precious").write_text("not ours")
    with folder_of(tmp_path, 2) as folder:
        new = path_of(tmp_path, 1).with_suffix(".tmp")
        new.parent.mkdir(exist_ok=True)
        put(new)
        told = folder.write(block(1), LAYOUT, parts(1))
        assert read(folder, block(1)) == (None if told else contents(1))
        assert bool(told) == (put is Path.mkdir)
        assert read(folder, block(2)) == contents(2)
    assert (tmp_path / "precious").read_text() == "not ours"


def test_a_link_in_place_of_a_folder_is_not_written_through(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with folder_of(root) as folder:
        path_of(root, 1).parent.symlink_to(elsewhere)
        assert "cannot write" in folder.write(block(1), LAYOUT, parts(1))
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("put", [_pipe, _loop, Path.mkdir])
def test_a_lock_that_is_no_file_is_refused_at_once(tmp_path: Path, put: Callable[[Path], None]) -> None:
    (tmp_path / "lock").touch()
    if put is Path.mkdir:
        (tmp_path / "lock").unlink()
    put(tmp_path / "lock")
    with pytest.raises(ConfigError, match="cannot be used"):
        DiskFolder(tmp_path, 1)


def test_a_file_that_grows_while_it_is_read_is_the_block_or_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folder_of(tmp_path, 1) as folder:
        fill = disk_folder._fill

        def after_it_grew(*arguments: Any) -> bool:
            with open(path_of(tmp_path, 1), "ab") as file:
                file.write(b"more" * 10_000)
            return fill(*arguments)

        monkeypatch.setattr(disk_folder, "_fill", after_it_grew)
        assert read(folder, block(1)) in (None, contents(1))
        monkeypatch.undo()
        assert read(folder, block(1)) is None, "it has another length now"


def test_a_full_disk_ends_a_write_with_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    """The system itself refuses, in the middle of a file."""
    with folder_of(tmp_path, 1) as folder:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
        try:
            told = folder.write(block(2), LAYOUT, parts(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert "cannot write" in told and folder.used_bytes == FILE_BYTES
        assert [path.name for path in tmp_path.rglob("*.tmp")] == []
        assert folder.write(block(2), LAYOUT, parts(2)) == ""


def test_a_scan_of_rubbish_of_every_kind_finds_the_rest(tmp_path: Path) -> None:
    chance = random.Random(5)
    with folder_of(tmp_path, *range(1, 9)):
        pass
    for number in range(100, 160):
        path = path_of(tmp_path, number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(chance.choice([0, 1, header_bytes(LAYOUT), SIZE])))
    for number in (1, 3):
        path_of(tmp_path, number).write_bytes(path_of(tmp_path, 2).read_bytes())
    (tmp_path / "zz").mkdir()
    (tmp_path / "ff").write_text("no folder")
    assert name(5).hex()[:2] == "00"
    os.utime(path_of(tmp_path, 5), ns=(2**62, 2**62))
    os.utime(path_of(tmp_path, 6), ns=(0, 0))
    assert scan(tmp_path) == ([2, 4, 5, 6, 7, 8], 62)
