"""Server-sent events: bytes in, the `data` of each complete event out. Pure."""

_LONGEST_EVENT_BYTES = 2**20
_OTHER_FIELDS = (b"", b"event", b"id", b"retry")  # the empty one: comments and blank lines


class SseParser:
    """Takes a stream's bytes in any cut. Line ends may be LF, CRLF or CR; comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self.n_events = 0
        """Events with data so far."""
        self._strange: bytes | None = None

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that `piece` completes. Raises ValueError if an event grows beyond 1 MiB."""
        text = self._rest + piece
        held = b""
        if b"\r" in text:
            if text.endswith(b"\r"):  # the LF that belongs to it may come with the next piece
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, rest = text.split(b"\n\n")
        self._rest = rest + held
        if len(self._rest) > _LONGEST_EVENT_BYTES:
            raise ValueError(f"an event is longer than {_LONGEST_EVENT_BYTES} bytes")
        found = []
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:  # nearly every event there is
                found.append(event[6:])
            elif (data := self._data_of(event)) is not None:
                found.append(data)
        self.n_events += len(found)
        return found

    def strange_line(self) -> bytes | None:
        """The first line, of a whole event or of the one that is under way, that no event stream has; None: all is well."""
        rest = self._rest.rstrip(b"\r")
        if not any(field.startswith(rest) for field in (b"data", *_OTHER_FIELDS)):  # cut within its name it is none yet
            self._data_of(rest)
        return self._strange

    def _data_of(self, event: bytes) -> bytes | None:
        lines = []
        for line in event.split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"data":
                lines.append(value.removeprefix(b" "))
            elif field not in _OTHER_FIELDS and self._strange is None:
                self._strange = line
        return b"\n".join(lines) if lines else None
