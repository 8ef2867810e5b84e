"""ShareGPT's JSON: texts of people and the answers that were recorded.

A list of `{"conversations": [{"from": "human", "value": ..}, {"from": "gpt", "value": ..}, ..]}`; `messages`, `role` and
`content` are understood as well, one list or one object a line. What people wrote is sent as it is; recorded answers
give the lengths that are asked for, and the server's own answers take their place. Conversations in which the roles do not
take turns, or a text is empty, are in the real files: they are left out and counted, as is a last question without answer
where nobody says how long its answer should be.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from common.errors import ConfigError
from loadgen.traces.answers import Answers
from loadgen.traces.measure import BY_CHARACTERS, TextMeasure
from loadgen.traces.trace import PAGE_TOKENS, Session, Trace, TraceRequest
from loadgen.workload.content import CountTokens

ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant", "chatgpt", "bing", "bard", "model")


class Message(msgspec.Struct, frozen=True):
    """One text of a conversation, under either pair of names."""

    role: str | None = None
    content: str | None = None
    sender: str | None = msgspec.field(default=None, name="from")
    value: str | None = None

    @property
    def who(self) -> str:
        """The role, in whichever field."""
        return (self.role or self.sender or "").lower()

    @property
    def text(self) -> str:
        """What was said, in whichever field."""
        return (self.content if self.content is not None else self.value) or ""


class _Entry(msgspec.Struct, frozen=True):
    conversations: tuple[Message, ...] | None = None
    messages: tuple[Message, ...] | None = None


def read_sharegpt(
    lines: Iterable[str], name: str, measure: TextMeasure = BY_CHARACTERS, answers: Answers | None = None
) -> Trace:
    """The conversations in the file `name`; `answers`: to last questions that have none. Raises ConfigError with file and, where there is one an entry, line."""
    sessions: list[Session] = []
    left_out: Counter[str] = Counter()
    for place, entry in enumerate(_entries(lines, name)):
        messages = entry.conversations if entry.conversations is not None else entry.messages
        if not messages:
            left_out["empty conversations"] += 1
            continue
        last_tokens = answers.tokens(place) if answers is not None and messages[-1].who in ASKING else None
        try:
            session = session_of(messages, measure.count_tokens, last_tokens)
        except ValueError as error:
            left_out[str(error)] += 1
            continue
        if messages[-1].who in ASKING and last_tokens is None:
            left_out["last questions without answer"] += 1
        sessions.append(session)
    notes = (measure.note,) if measure.note else ()
    return Trace(
        format="sharegpt",
        sessions=tuple(sessions),
        block_tokens=PAGE_TOKENS,
        left_out=left_out,
        notes=notes,
        measure=measure,
    )


def session_of(
    messages: Sequence[Message], count_tokens: CountTokens, last_output_tokens: int | None = None
) -> Session:
    """A session of recorded messages: a system prompt may come first, then people and answers take turns.

    The last question asks for `last_output_tokens`; None: for as much as was recorded, and is dropped if nothing was.
    Raises ValueError.
    """
    opening = ""
    if messages[0].who == "system":
        opening, messages = messages[0].text, messages[1:]
    asked, answers = messages[::2], messages[1::2]
    if not all(message.who in ASKING for message in asked) or not all(m.who in ANSWERING for m in answers):
        raise ValueError("roles do not take turns")
    if not all(message.text.strip() for message in messages):
        raise ValueError("empty texts")
    lengths: list[int] = [max(1, count_tokens(answer.text)) for answer in answers]
    if last_output_tokens is not None:
        lengths = [*lengths[: len(asked) - 1], last_output_tokens]
    if not lengths:
        raise ValueError("nothing was answered (--osl would say how long to answer)")
    requests = tuple(
        TraceRequest(added_tokens=count_tokens(question.text), output_tokens=output_tokens, content=question.text)
        for question, output_tokens in zip(asked, lengths, strict=False)
    )
    return Session(requests=requests, opening=opening)


def _entries(lines: Iterable[str], name: str) -> Iterable[_Entry]:
    pieces = iter(lines)
    first = next((piece for piece in pieces if piece.strip()), "")
    try:
        if first.lstrip().startswith("["):
            yield from msgspec.json.decode("".join((first, *pieces)), type=list[_Entry])
            return
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{name}: no list of conversations: {error}") from error
    decode = msgspec.json.Decoder(_Entry).decode
    for number, text in enumerate((first, *pieces), 1):
        if text.strip():
            try:
                yield decode(text)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{name}:{number}: no conversation: {error}") from error
