"""Mooncake's JSONL: `{"timestamp": ms, "input_length": n, "output_length": m, "hash_ids": [..]}`.

A hash id names a block of 512 tokens and everything before it, the last block of a prompt may be partial, and there is no
text. Lines that are not of this form are errors; lines without prompt or answer are left out and counted.
Source of the format: the traces published with Mooncake (FAST'25, arXiv 2407.00079).
"""

from collections import Counter
from collections.abc import Iterable

import msgspec

from common.errors import ConfigError
from loadgen.traces.trace import MOONCAKE_BLOCK_TOKENS, Session, Trace, TraceRequest, from_start


class _Line(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_mooncake(lines: Iterable[str], name: str, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
    """The trace in `lines` of the file `name`. Raises ConfigError with file and line."""
    decode = msgspec.json.Decoder(_Line).decode
    sessions: list[Session] = []
    left_out: Counter[str] = Counter()
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decode(text)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{name}:{number}: no line of a Mooncake trace: {error}") from error
        if line.input_length < 1 or line.output_length < 1:
            left_out["without prompt or answer"] += 1
            continue
        check_blocks(f"{name}:{number}", line.input_length, len(line.hash_ids), block_tokens)
        request = TraceRequest(
            at_s=line.timestamp / 1e3,
            added_tokens=line.input_length,
            output_tokens=line.output_length,
            hash_ids=line.hash_ids,
        )
        sessions.append(Session(requests=(request,)))
    return Trace(format="mooncake", sessions=from_start(sessions), block_tokens=block_tokens, left_out=left_out)


def check_blocks(place: str, tokens: int, n_ids: int, block_tokens: int, setting: str = "--block") -> None:
    """Raise ConfigError if so many ids cannot stand for so many tokens; one id too many or too few is let through.

    `setting` is where the size of blocks is said.
    """
    blocks = -(-tokens // block_tokens)
    if abs(blocks - n_ids) > 1:
        raise ConfigError(
            f"{place}: {n_ids} hash_ids for {tokens} tokens do not fit blocks of {block_tokens}; "
            f"blocks of {_fitting(tokens, n_ids)} would fit: set {setting}"
        )


def _fitting(tokens: int, n_ids: int) -> str:
    """Sizes of blocks of which `tokens` need `n_ids`, powers of two if there are any, as that is what servers have."""
    if n_ids <= 1:
        return f"{1 << max(0, tokens - 1).bit_length()} or more"
    least_tokens = max(1, -(-tokens // n_ids))
    most_tokens = max(least_tokens, -(-tokens // (n_ids - 1)) - 1)
    powers = [1 << bits for bits in range(most_tokens.bit_length()) if least_tokens <= 1 << bits]
    if powers:
        return " or ".join(map(str, powers))
    return str(least_tokens) if least_tokens == most_tokens else f"{least_tokens} to {most_tokens}"
