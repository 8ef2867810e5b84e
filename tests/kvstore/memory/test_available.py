"""The tightest limit counts, wherever it stands."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from kvstore.memory.available import Available, available_memory, require_available

MIB = 2**20


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    102400 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(path: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{path}/memory.max": f"{limit}\n",
        f"{path}/memory.current": f"{usage}\n",
        f"{path}/memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }


def test_without_control_groups_the_kernels_estimate_counts(tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, {})).n_bytes == 100 * MIB


def test_an_unlimited_group_limits_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", "max", 5)}
    assert available_memory(system(tmp_path, files)).n_bytes == 100 * MIB


def test_a_parent_groups_limit_counts_and_reclaimable_files_do_not(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        **group("sys/fs/cgroup/a", str(64 * MIB), 50 * MIB, inactive=16 * MIB),
        **group("sys/fs/cgroup/a/b", str(90 * MIB), 0),
    }
    found = available_memory(system(tmp_path, files))
    assert found.n_bytes == 30 * MIB
    assert found.limit.endswith("cgroup/a/memory.max")


def test_a_container_that_sees_only_its_own_root_finds_its_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu:/x\n7:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{20 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{8 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {1 * MIB}\n",
    }
    assert available_memory(system(tmp_path, files)).n_bytes == 13 * MIB


def test_a_budget_above_the_available_memory_is_refused_with_the_numbers() -> None:
    available = Available(512 * MIB, "the test")
    require_available(512 * MIB, available)
    with pytest.raises(ConfigError, match=r"--device-memory=2.0 GiB is more than the 512.0 MiB .* \(the test\)"):
        require_available(2048 * MIB, available)
