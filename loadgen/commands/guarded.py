"""What all commands have in common: their exit codes, and that what a person can put right is one line and no traceback."""

import sys
from collections.abc import Callable

from common.errors import ConfigError
from loadgen.drive.processes import GeneratorDied

OK, FAILED, BAD_SETTINGS, LATE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes. FAILED: requests, an assertion, or a leak; LATE: the generator's fault, the numbers do not count."""


def guarded(command: str, work: Callable[[], int]) -> int:
    """Do it; its exit code, or that of what stood in the way."""
    try:
        return work()
    except (ConfigError, OSError, GeneratorDied) as error:
        print(f"penstock bench {command}: {error}", file=sys.stderr)
        return BAD_SETTINGS
    except KeyboardInterrupt:
        print(f"penstock bench {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
