"""Log lines are events: one line, a name, and fields; never prose, never inside a policy or a core."""

import contextlib
import json
import sys
import time
from collections.abc import Mapping

import msgspec

_ENCODER = json.JSONEncoder(default=str)  # `dumps` would make one for each line
_COMPACT = msgspec.json.Encoder(enc_hook=str)


class Log:
    """Writes JSON lines to standard error. `fields` given here stand in every line."""

    def __init__(self, **fields: object) -> None:
        self._fields = fields

    def event(self, name: str, **fields: object) -> None:
        """One line: wall time (UTC, seconds), event name, fields."""
        record = {"at": round(time.time(), 3), "event": name, **self._fields, **fields}
        self._write(_ENCODER.encode(record))

    def frequent(self, name: str, at_unix_s: float, fields: Mapping[str, object]) -> None:
        """A line of which there are many, for an eighth of the time: the same JSON without spaces."""
        record = {"at": round(at_unix_s, 3), "event": name, **self._fields, **fields}
        try:
            line = _COMPACT.encode(record).decode()
        except (UnicodeError, OverflowError):  # half a surrogate pair, a very large number: the other one takes all
            line = _ENCODER.encode(record)
        self._write(line)

    @staticmethod
    def _write(line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk or a closed pipe must not end who only wants to tell
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
