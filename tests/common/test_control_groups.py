"""Every limit above this process is found, wherever it stands."""

from pathlib import Path

from common.control_groups import group_limits
from tests.support.control_groups import group, system

MIB = 2**20


def limits(root: Path) -> list[tuple[int, int, str]]:
    return [(one.limit_bytes, one.taken_bytes, str(one.file.relative_to(root))) for one in group_limits(root)]


def test_an_unlimited_group_limits_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", "max", 5)}
    assert limits(system(tmp_path, files)) == []


def test_a_parent_groups_limit_counts_and_reclaimable_files_are_not_taken(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        **group("sys/fs/cgroup/a", str(64 * MIB), 50 * MIB, inactive=16 * MIB),
        **group("sys/fs/cgroup/a/b", str(90 * MIB), 0),
    }
    inner, outer = limits(system(tmp_path, files))
    assert inner == (90 * MIB, 0, "sys/fs/cgroup/a/b/memory.max")
    assert outer == (64 * MIB, 34 * MIB, "sys/fs/cgroup/a/memory.max")


def test_a_container_that_sees_only_its_own_root_finds_its_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu:/x\n7:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{20 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{8 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {1 * MIB}\n",
    }
    assert limits(system(tmp_path, files)) == [(20 * MIB, 7 * MIB, "sys/fs/cgroup/memory/memory.limit_in_bytes")]
