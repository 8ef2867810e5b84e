"""The example runs, and does what it prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_tells_of_two_turns() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples/mempool.py")], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line.strip() for line in ran.stdout.splitlines()]
    assert lines == [
        "turn 1",
        "prefill: 0 blocks were cached, 6 computed",
        "prefill -> decode: 6 blocks",
        "decode: 6 blocks were cached, 3 computed",
        "decode -> prefill: 3 blocks, those of the answer",
        "between the turns",
        "prefill: 5 coldest blocks go to the host",
        "prefill: a match finds ['device', 'device', 'device', 'device', 'host', 'host', 'host', 'host', 'host']",
        "turn 2",
        "prefill: 9 blocks were cached, 2 computed",
        "every block accounted for",
    ]
