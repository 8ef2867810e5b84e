"""What the doctor says of memory and disk."""

from pathlib import Path

import pytest

from common.units import GIB, MIB, MemoryShare
from services.launcher.checks import check_disk, check_memory
from services.launcher.findings import Level


@pytest.mark.parametrize(
    ("device", "host", "free", "level"),
    [
        (GIB, GIB, 4 * GIB, Level.OK),
        (GIB, GIB, 4 * GIB - 1, Level.WARN),
        (GIB, 0, 3 * GIB, Level.OK),
        (GIB, 5 * GIB, 4 * GIB, Level.FAIL),
        (5 * GIB, GIB, 4 * GIB, Level.FAIL),
    ],
)
def test_two_workers_a_kv_store_and_a_model_must_fit(device: int, host: int, free: int, level: Level) -> None:
    found = check_memory(device, host, free)
    assert found.level is level
    assert ("--host-memory" in found.advice) == (bool(host) and level is not Level.OK)
    assert ("KV store" in found.text) == bool(host)


def test_a_folder_that_is_still_to_be_made_is_judged_by_its_parent(tmp_path: Path) -> None:
    assert check_disk(str(tmp_path / "a/b"), MIB).level is Level.OK
    assert check_disk(str(tmp_path), 2**60).level is Level.WARN


def test_a_disk_tier_cannot_be_a_file_or_below_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/below"):
        assert check_disk(str(place), MIB).level is Level.FAIL


def test_a_share_is_of_what_is_free_and_pages_on_a_gpu_take_none_of_it() -> None:
    assert check_memory(MemoryShare(20), 0, 4 * GIB).level is Level.OK
    found = check_memory(MemoryShare(45), 0, 4 * GIB)
    assert (found.level, "45%" in found.text) == (Level.WARN, True)
    assert check_memory(MemoryShare(90), 0, 4 * GIB, on_host=False).level is Level.OK
