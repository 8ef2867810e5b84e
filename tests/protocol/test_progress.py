"""Whatever the sizes and whatever memory lacks, all admitted work ends, and nobody who could go on waits.

PROTOCOL_EXAMPLES=N runs N schedules; 10,000 of them: `python -m benchmarks.progress`.
"""

import os

import pytest

from tests.support.world_progress import run

SCHEDULES = int(os.environ.get("PROTOCOL_EXAMPLES", "0")) or 20


@pytest.mark.parametrize("first", range(0, SCHEDULES, 20))
def test_all_work_ends_in_a_bounded_number_of_steps_and_no_ready_sequence_waits(first: int) -> None:
    for number in range(first, first + 20):
        run(number)
