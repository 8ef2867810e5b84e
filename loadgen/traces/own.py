"""Our own JSONL, one request a line, which also is what custom prompts are written in.

| key | meaning |
|---|---|
| `prompt` | text or token ids that the request adds to its session; alone, the whole prompt |
| `messages` | a chat instead of a prompt; answers in it give lengths, and the server's own take their place |
| `isl` | length of what is added, where neither is known |
| `hash_ids`, `block` | names of the blocks of what is added, and tokens per block; with `isl` |
| `osl` or `output_tokens` | length of the answer; optional where `messages` end with one, or `--osl` says it |
| `t` | seconds from the start of the trace |
| `session`, `turn` | lines of one session are one conversation, in the order of `turn`, or of lines |
| `opening` | with the first turn: text or ids before it, such as a system prompt |
| `think_s` | seconds from the end of the answer before |
| `cancel_after_tokens` | the client leaves after so many tokens |

Every bad line is an error with file and line. Other keys are not used, and counted in a note.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any  # Any: a line before it is checked

import msgspec

from common.errors import ConfigError
from loadgen.traces.answers import Answers
from loadgen.traces.measure import BY_CHARACTERS, TextMeasure
from loadgen.traces.mooncake import check_blocks
from loadgen.traces.sharegpt import ASKING, Message, session_of
from loadgen.traces.trace import MOONCAKE_BLOCK_TOKENS, PAGE_TOKENS, Session, Trace, TraceRequest, from_start
from loadgen.workload.content import CountTokens
from loadgen.workload.plan import Content


class OwnLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line, as it is read and written."""

    t: float | None = None
    session: str | int | None = None
    turn: int | None = None
    opening: str | tuple[int, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    isl: int | None = None
    osl: int | None = None
    output_tokens: int | None = None
    hash_ids: tuple[int, ...] | None = None
    block: int | None = None
    think_s: float = 0.0
    cancel_after_tokens: int | None = None

    @property
    def answer_tokens(self) -> int | None:
        """Under either name."""
        return self.osl if self.osl is not None else self.output_tokens


def read_own(
    lines: Iterable[str], name: str, measure: TextMeasure = BY_CHARACTERS, answers: Answers | None = None
) -> Trace:
    """The trace in `lines` of the file `name`; `answers`: where a line does not say their length. Raises ConfigError with file and line."""
    alone: list[Session] = []
    shared: dict[str, list[tuple[str, OwnLine]]] = {}
    unused: Counter[str] = Counter()
    blocks: set[int] = set()
    texts = False
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        place = f"{name}:{number}"
        line = _line(text, place, unused, None if answers is None else answers.tokens(number))
        texts = texts or isinstance(line.prompt, str) or line.messages is not None
        if line.hash_ids is not None:
            blocks.add(line.block or MOONCAKE_BLOCK_TOKENS)
            if len(blocks) > 1:
                raise ConfigError(f"{place}: blocks of {line.block} tokens after others; a trace has one block size")
        if line.session is None or line.messages is not None:
            alone.append(_session([(place, line)], measure.count_tokens))
        else:
            shared.setdefault(str(line.session), []).append((place, line))
    sessions = alone + [_session(rows, measure.count_tokens) for rows in shared.values()]
    notes = [f"not used: {key!r} of {count} lines" for key, count in unused.items()]
    if texts and measure.note:
        notes.append(measure.note)
    return Trace(
        format="custom",
        sessions=from_start(sessions),
        block_tokens=blocks.pop() if blocks else PAGE_TOKENS,
        notes=tuple(notes),
        measure=measure,
    )


def _line(text: str, place: str, unused: Counter[str], unsaid_tokens: int | None) -> OwnLine:
    try:
        fields: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
        line = msgspec.convert(fields, OwnLine)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{place}: no request: {error}") from error
    if "cancel_after_s" in fields:
        raise ConfigError(f"{place}: cancel_after_s depends on the server's speed; say cancel_after_tokens")
    unused.update(key for key in fields if key not in OwnLine.__struct_fields__)
    if sum(part is not None for part in (line.prompt, line.messages, line.hash_ids)) > 1:
        raise ConfigError(f"{place}: prompt, messages and hash_ids: give one of them")
    if line.prompt is None and line.messages is None and (line.isl is None or line.isl < 1):
        raise ConfigError(f"{place}: needs prompt, messages, or isl of 1 token or more")
    if line.prompt is not None and not line.prompt:
        raise ConfigError(f"{place}: prompt is empty")
    if line.answer_tokens is None and not _answered(line):
        if unsaid_tokens is None:
            raise ConfigError(f"{place}: does not say how long to answer: give output_tokens in the line, or --osl")
        line = msgspec.structs.replace(line, osl=unsaid_tokens)
    if line.answer_tokens is not None and line.answer_tokens < 1:
        raise ConfigError(f"{place}: needs output_tokens (or osl) of 1 or more")
    if line.think_s < 0 or (line.cancel_after_tokens or 0) < 0 or (line.block is not None and line.block < 1):
        raise ConfigError(f"{place}: think_s, cancel_after_tokens and block must not be negative, nor block 0")
    if line.hash_ids is not None:
        check_blocks(place, line.isl or 0, len(line.hash_ids), line.block or MOONCAKE_BLOCK_TOKENS, "block")
    return line


def _answered(line: OwnLine) -> bool:
    """A chat that does not end with a question."""
    return line.messages is not None and (not line.messages or line.messages[-1].who not in ASKING)


def _session(rows: list[tuple[str, OwnLine]], count_tokens: CountTokens) -> Session:
    place, first = rows[0]
    if first.messages is not None:
        return _chat(place, first, count_tokens)
    turns = [line.turn for _, line in rows]
    known = [turn for turn in turns if turn is not None]
    if known and (len(known) < len(turns) or len(set(known)) < len(turns)):
        raise ConfigError(f"{place}: lines of session {first.session!r} need a turn each, no two alike, or none at all")
    if known:
        rows = sorted(rows, key=lambda row: row[1].turn or 0)
        place, first = rows[0]
    kinds = {type(part) for _, line in rows for part in (line.opening, line.prompt) if part is not None}
    if len(kinds) > 1:
        raise ConfigError(f"{place}: text and token ids in one conversation")
    if late := next((at for at, line in rows[1:] if line.opening is not None), None):
        raise ConfigError(f"{late}: opening belongs to the first turn of a session")
    name = "" if first.session is None else str(first.session)
    requests = tuple(_request(line, count_tokens) for _, line in rows)
    return Session(name=name, requests=requests, opening=_opening(first))


def _opening(first: OwnLine) -> Content:
    return first.opening if first.opening is not None else ()


def _chat(place: str, line: OwnLine, count_tokens: CountTokens) -> Session:
    assert line.messages is not None
    if not line.messages:
        raise ConfigError(f"{place}: messages is empty")
    try:
        chat = session_of(line.messages, count_tokens, line.answer_tokens)
    except ValueError as error:
        raise ConfigError(f"{place}: messages: {error}") from error
    begun = replace(chat.requests[0], at_s=line.t, cancel_after_tokens=line.cancel_after_tokens)
    name = "" if line.session is None else str(line.session)
    return replace(chat, name=name, requests=(begun, *chat.requests[1:]))


def _request(line: OwnLine, count_tokens: CountTokens) -> TraceRequest:
    counted = line.isl
    if line.prompt is not None and (counted is None or not isinstance(line.prompt, str)):
        counted = count_tokens(line.prompt)
    return TraceRequest(
        added_tokens=counted or 1,
        output_tokens=line.answer_tokens or 1,
        at_s=line.t,
        think_s=line.think_s,
        content=line.prompt,
        hash_ids=line.hash_ids or (),
        cancel_after_tokens=line.cancel_after_tokens,
    )
