"""What is asked to go wrong, as text and as values.

    rules = rule { ";" rule }            a line's end separates as well; what follows a # is not read
    rule  = [process "/"] point ":" kind { " " key "=" value }

    decode-0/grant: stop after=3 times=1 ; prefill/transfer: corrupt share=0.1 seed=7

`process` is the beginning of a process's id. The point `*` stands for one such rule at every point that messages strike.
Keys: `share` of the hits that are faulty (default 1), `after` how many hits
go by first, `times` how many are faulty at the most, `ms`, `seed`, `peer` the beginning of the other side's id, `side`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from common.faults.points import MESSAGES, Kind, Point, Side, kinds_of, sides_of

T = TypeVar("T", Point, Kind, Side)

_KEYS = ("share", "after", "times", "ms", "seed", "peer", "side")
_NEED_MS = frozenset({Kind.DELAY, Kind.JUMP})
_TAKE_MS = _NEED_MS | {Kind.REORDER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of what goes wrong."""

    point: Point
    kind: Kind
    process: str = ""
    """Beginning of the id of who does it; empty: everybody."""
    share: float = 1.0
    after: int = 0
    times: int | None = None
    ms: float = 0.0
    seed: int = 0
    peer: str = ""
    """Beginning of the other side's id; empty: anybody."""
    side: Side | None = None
    """None: wherever the point is struck."""


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Raises ValueError that names the rule, what is wrong, and what is allowed."""
    lines = [line.partition("#")[0] for line in text.splitlines()]
    parts = [part.strip() for line in lines for part in line.split(";")]
    return tuple(rule for part in parts if part for rule in _rules(part))


def rules_for(rules: Sequence[Rule], process: str) -> tuple[Rule, ...]:
    """Those that a process with this id obeys."""
    return tuple(rule for rule in rules if process.startswith(rule.process))


def _rules(text: str) -> list[Rule]:
    """One, or one at every point of messages."""
    head, colon, rest = text.partition(":")
    words = rest.split()
    if not colon or not words:
        raise ValueError(f"fault rule {text!r}: must read [process/]point:kind key=value ..., as in grant:drop times=1")
    process, _, name = head.strip().rpartition("/")
    try:
        points = list(MESSAGES) if name.strip() == "*" else [_one_of(Point, "point", name.strip())]
        return [_rule(process.strip(), point, words) for point in points]
    except ValueError as error:
        raise ValueError(f"fault rule {text!r}: {error}") from None


def _rule(process: str, point: Point, words: Sequence[str]) -> Rule:
    kind, keys = _one_of(Kind, "kind", words[0]), _keys(words[1:])
    rule = Rule(
        process=process,
        point=point,
        kind=kind,
        share=_number(keys, "share", float, 1.0),
        after=_number(keys, "after", int, 0),
        times=_number(keys, "times", int, None),
        ms=_number(keys, "ms", float, 0.0),
        seed=_number(keys, "seed", int, 0),
        peer=keys.get("peer", ""),
        side=_one_of(Side, "side", keys["side"]) if "side" in keys else None,
    )
    _require_sense(rule, keys)
    return rule


def _require_sense(rule: Rule, keys: Mapping[str, str]) -> None:
    if rule.side is not None and rule.side not in sides_of(rule.point):
        raise ValueError(f"{rule.point} has no side {rule.side}: {_listed(sides_of(rule.point))}")
    allowed = kinds_of(rule.point, rule.side)
    if rule.kind not in allowed:
        where = rule.point if rule.side is None else f"{rule.point} side={rule.side}"
        raise ValueError(f"{rule.kind} makes no sense at {where}: {_listed(allowed)}")
    if not 0.0 < rule.share <= 1.0:
        raise ValueError(f"share={rule.share:g}: must be above 0 and at most 1")
    if rule.kind in _NEED_MS and not rule.ms > 0.0:
        raise ValueError(f"{rule.kind} needs ms=, above 0")
    if "ms" in keys and rule.kind not in _TAKE_MS:
        raise ValueError(f"{rule.kind} has no ms: {_listed(_TAKE_MS)}")
    if rule.after < 0 or (rule.times is not None and rule.times < 1) or rule.ms < 0.0:
        raise ValueError("after and ms must be 0 or more, times 1 or more")


def _keys(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _KEYS or not equals or not value:
            raise ValueError(f"{word!r} is no key=value; {_listed(_KEYS)}")
        if key in found:
            raise ValueError(f"{key} is given twice")
        found[key] = value
    return found


N = TypeVar("N", int, float, int | None)


def _number(keys: Mapping[str, str], key: str, parse: Callable[[str], N], default: N) -> N:
    if key not in keys:
        return default
    try:
        return parse(keys[key])
    except ValueError:
        raise ValueError(f"{key}={keys[key]} is no number of that kind") from None


def _one_of(kind: type[T], what: str, text: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"there is no {what} {text!r}: {_listed(kind)}") from None


def _listed(names: Sequence[str] | frozenset[Kind] | type[T]) -> str:
    order = list(Kind)
    ordered = sorted(names, key=order.index) if isinstance(names, frozenset) else list(names)
    return "allowed are " + ", ".join(str(name) for name in ordered)
