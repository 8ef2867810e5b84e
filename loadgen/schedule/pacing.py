"""Which conversation starts when, and when a run ends. Pure.

The result is always the same: conversations whose turns carry the earliest time at which they may be sent.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from random import Random

from loadgen.workload.plan import Conversation, Workload, conversations


def untimed(conversation: Conversation) -> Conversation:
    """The same without times of its own, as of a trace that is not replayed; the time to think stays."""
    if all(turn.at_s is None for turn in conversation.turns):
        return conversation
    return replace(conversation, turns=tuple(replace(turn, at_s=None) for turn in conversation.turns))


def start_each(conversations: Iterable[Conversation], times_s: Iterable[float]) -> Iterator[Conversation]:
    """Arrivals are those of conversations: the first turn gets a time, the others follow the answers and the thinking."""
    for conversation, at_s in zip(conversations, times_s, strict=False):
        first, *others = conversation.turns
        yield replace(conversation, turns=(replace(first, at_s=at_s), *others))


def start_turns(workload: Workload, times_s: Iterable[float], live: int, random: Random) -> Iterator[Conversation]:
    """Arrivals are those of requests: each is the next turn of one of `live` conversations, drawn at random.

    A conversation that is through is replaced by the next one. A turn whose answer before is not there yet waits for it
    (MemServe section 7: "Poisson arrivals that respect turn order in a session"). Thinking is left out: the arrivals say
    when. Ends when the times do, or when no conversation is left; in the order of the first turns.
    """
    source = ((talk.index, len(talk.turns)) for talk in conversations(workload))
    open_ = list(islice(source, live))
    given: dict[int, list[float]] = {}
    for at_s in times_s:
        if not open_:
            break
        place = random.randrange(len(open_))
        index, n_turns = open_[place]
        times = given.setdefault(index, [])
        times.append(at_s)
        if len(times) == n_turns:
            following = next(source, None)
            if following is None:
                open_.pop(place)
            else:
                open_[place] = following
    return (_timed(workload.conversation(index), times) for index, times in given.items())


def _timed(conversation: Conversation, times_s: list[float]) -> Conversation:
    turns = (replace(turn, at_s=at_s, think_s=0.0) for turn, at_s in zip(conversation.turns, times_s, strict=False))
    return replace(conversation, turns=tuple(turns))


def within(times_s: Iterable[float], n_requests: int | None, duration_s: float | None) -> Iterator[float]:
    """The first so many of these ascending times, those before the end."""
    for number, at_s in enumerate(times_s):
        if number == n_requests or at_s >= (math.inf if duration_s is None else duration_s):
            return
        yield at_s


def cut(conversations: Iterable[Conversation], n_requests: int | None) -> Iterator[Conversation]:
    """Conversations with `n_requests` turns in all; the last one may lose its end. None: all of them."""
    left = math.inf if n_requests is None else n_requests
    for conversation in conversations:
        if left <= 0:
            return
        if len(conversation.turns) > left:
            conversation = replace(conversation, turns=conversation.turns[: int(left)])
        left -= len(conversation.turns)
        yield conversation
        if left <= 0:
            return
