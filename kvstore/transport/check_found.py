"""An answer to Find must be of one piece before a core hears it."""

from collections.abc import Sequence

from common.errors import ProtocolViolation
from common.messages.blocks import Found
from common.net.sockets import Payload


def check_found(message: Found, payloads: Sequence[Payload], layers: int, block_bytes: int) -> None:
    """Raise ProtocolViolation unless every block has either a row of pages or a payload of a block's length."""
    n_blocks = message.n_blocks
    # Compared with what is there before anything is made of it: the number is the peer's own.
    by_pages = len(message.pages) == n_blocks and not payloads and all(len(row) == layers for row in message.pages)
    by_bytes = len(payloads) == n_blocks and not message.pages and all(len(one) == block_bytes for one in payloads)
    if n_blocks and not (by_pages or by_bytes):
        raise ProtocolViolation(
            f"Found {message.call}: {n_blocks} blocks with {len(message.pages)} rows of pages and {len(payloads)} "
            f"payloads; each block needs {layers} pages or {block_bytes} bytes"
        )
