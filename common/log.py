"""Log lines are events: one line, a name, and fields; never prose, never inside a policy or a core."""

import contextlib
import json
import sys
import time


class Log:
    """Writes JSON lines to standard error. `fields` given here stand in every line."""

    def __init__(self, **fields: object) -> None:
        self._fields = fields

    def event(self, name: str, **fields: object) -> None:
        """One line: wall time (UTC, seconds), event name, fields."""
        record = {"at": round(time.time(), 3), "event": name, **self._fields, **fields}
        with contextlib.suppress(OSError):  # a full disk or a closed pipe must not end who only wants to tell
            sys.stderr.write(json.dumps(record, default=str) + "\n")
            sys.stderr.flush()
