"""A made-up workload written down as a trace: its lengths, pauses and times, and which blocks its prompts share. Pure."""

from random import Random

from loadgen.traces.trace import Session, Trace, TraceRequest
from loadgen.workload.content import count_words
from loadgen.workload.plan import Content, Conversation, Workload, conversations


def made_trace(workload: Workload, n_requests: int, rate_per_s: float, block_tokens: int, seed: int | str) -> Trace:
    """The first `n_requests` of a workload; conversations begin by a Poisson process of `rate_per_s` conversations.

    What prompts share is kept to whole blocks: an opening that two prompts share and that ends within a block shares one
    block less. Later turns are new to everybody, so lengths say all of them.
    """
    gaps = Random(f"{seed}/times")
    numbers: dict[tuple[int, Content], int] = {}
    sessions: list[Session] = []
    at_s, missing = 0.0, n_requests
    for planned in conversations(workload):
        session = _session(planned, at_s, missing, block_tokens, numbers)
        sessions.append(session)
        missing -= len(session.requests)
        if missing <= 0:
            break
        at_s += gaps.expovariate(rate_per_s)
    return Trace(format="custom", sessions=tuple(sessions), block_tokens=block_tokens)


def _session(
    planned: Conversation, at_s: float, most: int, block_tokens: int, numbers: dict[tuple[int, Content], int]
) -> Session:
    requests: list[TraceRequest] = []
    for place, turn in enumerate(planned.turns[:most]):
        first = place == 0
        tokens = count_words(turn.added) + (count_words(planned.opening) if first else 0)
        requests.append(
            TraceRequest(
                added_tokens=tokens,
                output_tokens=turn.output_tokens,
                at_s=round(at_s, 6) if first else None,
                think_s=round(turn.think_s, 6),
                hash_ids=_blocks(planned, block_tokens, numbers) if first else (),
                cancel_after_tokens=turn.cancel_after_tokens,
            )
        )
    name = f"s{planned.index}" if len(requests) > 1 else ""
    return Session(requests=tuple(requests), name=name)


def _blocks(planned: Conversation, block_tokens: int, numbers: dict[tuple[int, Content], int]) -> tuple[int, ...]:
    """Numbers of the first prompt's blocks, equal where everything up to the block's end is equal."""
    opening, added = planned.opening, planned.turns[0].added
    assert isinstance(opening, tuple) and isinstance(added, tuple), "traces are made of token ids"
    prompt = opening + added
    blocks: list[int] = []
    for start in range(0, len(prompt), block_tokens):
        key = (blocks[-1] if blocks else -1, prompt[start : start + block_tokens])
        blocks.append(numbers.setdefault(key, len(numbers)))
    return tuple(blocks)
