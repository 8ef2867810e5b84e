"""The tightest limit counts, wherever it stands."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from kvstore.memory.available import Available, available_memory, require_available
from tests.support.control_groups import group, system

MIB = 2**20


def test_without_control_groups_the_kernels_estimate_counts(tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, {})).n_bytes == 100 * MIB


def test_what_is_left_of_a_groups_limit_counts_if_it_is_less_and_says_where_that_stands(tmp_path: Path) -> None:
    left = group("sys/fs/cgroup/a", str(200 * MIB), 170 * MIB)
    found = available_memory(system(tmp_path, {"proc/self/cgroup": "0::/a\n", **left}))
    assert found.n_bytes == 30 * MIB
    assert found.limit.endswith("cgroup/a/memory.max")


def test_a_budget_above_the_available_memory_is_refused_with_the_numbers() -> None:
    available = Available(512 * MIB, "the test")
    require_available(512 * MIB, available)
    with pytest.raises(ConfigError, match=r"--device-memory=2.0 GiB is more than the 512.0 MiB .* \(the test\)"):
        require_available(2048 * MIB, available)
