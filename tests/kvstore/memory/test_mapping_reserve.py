"""Laws of mappings in reserve: each counts for the kernel, and whoever has used up all others can still undo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import OutOfChunks
from kvstore.memory.mapping_reserve import MappingReserve
from kvstore.memory.memfd import _load_libc
from tests.kvstore.memory.test_memfd import listed_areas

ROOT = Path(__file__).parents[3]
WHOLE = 1 << 47


def test_what_is_held_the_kernel_counts_and_what_is_given_up_it_does_not() -> None:
    reserve, before = MappingReserve(_load_libc()), listed_areas(0, WHOLE)
    reserve.keep(300)
    assert listed_areas(0, WHOLE) - before >= 300
    reserve.give_up()
    assert listed_areas(0, WHOLE) - before < 8
    assert reserve.n_mappings == 0


def test_a_small_order_keeps_what_there_is_and_no_great_many_are_kept_for_it() -> None:
    reserve = MappingReserve(_load_libc())
    reserve.keep(300)
    had = reserve.n_mappings
    reserve.keep(3)
    assert reserve.n_mappings == had
    reserve.keep(2000)
    assert reserve.n_mappings >= 2000
    reserve.keep(3)
    assert reserve.n_mappings < had
    reserve.give_up()


def test_what_the_kernel_cannot_hold_is_refused_and_nothing_stays_held(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = _load_libc()
    reserve, calls, before = MappingReserve(libc), list[int](), listed_areas(0, WHOLE)

    def refuses(*_: object) -> int:
        calls.append(0)
        return -1 if len(calls) > 20 else 0

    with monkeypatch.context() as patched:
        patched.setattr(libc, "mprotect", refuses, raising=False)
        with pytest.raises(OutOfChunks, match="must be free before chunks move"):
            reserve.keep(100)
    assert (reserve.n_mappings, len(calls)) == (0, 21)
    assert listed_areas(0, WHOLE) - before < 8
    reserve.keep(100)
    reserve.give_up()


@pytest.mark.system
def test_at_the_kernel_s_limit_an_order_is_done_or_leaves_all_as_it_was() -> None:
    if int(Path("/proc/sys/vm/max_map_count").read_text()) > 300_000:
        pytest.skip("this kernel's limit takes too long to reach")
    program = [sys.executable, "-m", "tests.kvstore.memory.at_the_limit"]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout)
    outcomes = {outcome for some in told.values() for outcome in some}
    assert outcomes == {"moved", "undone", "not begun"}, told
    assert set(told["first"]) == {"not begun"}, "nothing was kept before it"
    assert all("undone" in told[name] for name in ("lend", "give away")), told
