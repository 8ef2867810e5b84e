"""Other hosts: the sender gathers a span into one payload frame; the receiver's loop writes it into its own pages."""

from collections.abc import Sequence

from common.errors import PeerFailed, ProtocolViolation
from common.messages.handover import KvSent, KvSpan
from common.net.sockets import Payload
from kvstore.transport.channel import Copied
from kvstore.transport.pages import Rows, copy_pages, rows_of


class TcpChannel:
    """Channel that turns spans into payloads for the Exchange."""

    kind = "tcp"

    def __init__(self, source: Rows) -> None:
        self._source = source

    def posted(self, span: KvSpan) -> None:
        """What was launched on the host is done."""

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """The span's pages, one after the other. Raises PeerFailed."""
        if len(source_pages) != len(target_pages):
            raise PeerFailed(f"{span}: {len(source_pages)} pages for {len(target_pages)} granted ones")
        payload, n_copies = _gather(self._source, source_pages)
        return Copied(n_copies, len(payload), payload)

    def close(self) -> None:
        """Nothing is held."""
        del self._source


def check_payloads(message: KvSent, payloads: Sequence[Payload], page_bytes: int) -> None:
    """Raise ProtocolViolation unless there is one payload per span, of the span's length. Call before the core hears."""
    found = [len(payload) for payload in payloads]
    wanted = [span.n_blocks * span.n_layers * page_bytes for span in message.spans]
    if found != wanted:
        raise ProtocolViolation(f"transfer {message.transfer}: payloads of {found} bytes for spans of {wanted}")


def read_payload(source: Rows, pages: Sequence[int]) -> bytearray:
    """Local pages, one after the other. Raises IndexError."""
    return _gather(source, pages)[0]


def _gather(source: Rows, pages: Sequence[int]) -> tuple[bytearray, int]:
    """The bytes, and how many pieces they came from."""
    payload = bytearray(len(pages) * source.shape[1])
    n_copies = copy_pages(source, pages, rows_of(payload, source.shape[1]), range(len(pages)))
    return payload, n_copies


def write_payload(target: Rows, pages: Sequence[int], payload: Payload) -> None:
    """Write one checked payload into local pages. Raises ProtocolViolation, with nothing written, if it does not fit."""
    page_bytes = target.shape[1]
    if len(payload) != len(pages) * page_bytes:
        raise ProtocolViolation(f"a payload of {len(payload)} bytes for {len(pages)} pages of {page_bytes}")
    copy_pages(rows_of(payload, page_bytes), range(len(pages)), target, pages)
