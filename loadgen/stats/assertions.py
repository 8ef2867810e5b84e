"""Gates on a result's numbers: `--assert "p99_ttft_ms<800"`. Pure.

    NAME OP NUMBER     the number itself, in the unit that its name says
    NAME OP NUMBERx    how many times the base's number; only where there is a base

NAME is any measured number of result.json (`send_lag_ms.p99` for one inside another), OP one of < <= > >= ==. What can
be refused without a run is refused by `parse_all`, so that nobody measures for an hour and then learns of a typing error.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any  # Any: JSON

from common.errors import ConfigError
from loadgen.results.metrics import PERCENTILES, samples_needed
from loadgen.stats.measured_names import known_names, percentile_of

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_FORM = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|==|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(x?)\s*")
_MATCHES_SHOWN = 4
_NEEDS_BASE = "a limit with x needs a base run; give one to penstock bench compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assertion:
    """One gate."""

    text: str
    """As it was written."""
    name: str
    operator: str
    limit: float
    of_base: bool
    """The limit is a multiple of the base's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one gate."""

    holds: bool
    why: str
    """One line with the numbers."""


def parse_all(
    texts: Sequence[str], *, with_base: bool, percentiles: Collection[float] | None = None
) -> tuple[Assertion, ...]:
    """Read the gates of --assert. `with_base`: there will be a base; `percentiles`: those that are computed, None: any.

    Raises ConfigError that says what is allowed.
    """
    try:
        return tuple(parse(text, with_base=with_base, percentiles=percentiles) for text in texts)
    except ValueError as error:
        raise ConfigError(f"--assert {error}") from error


def parse(text: str, *, with_base: bool = True, percentiles: Collection[float] | None = None) -> Assertion:
    """Read a gate, as `parse_all`. Raises ValueError that says what is allowed."""
    match = _FORM.fullmatch(text)
    try:
        if match is None:
            raise ValueError("no such form")
        name, compared, number, times = match.groups()
        found = Assertion(text=text.strip(), name=name, operator=compared, limit=float(number), of_base=times == "x")
    except ValueError as error:
        allowed = "p99_ttft_ms<800, or against a base p99_ttft_ms<1.1x; signs are < <= > >= =="
        raise ValueError(f"{text!r}: must be like {allowed}") from error
    if found.of_base and not with_base:
        raise ValueError(f"{text!r}: {_NEEDS_BASE}")
    _check_name(found, percentiles)
    return found


def _check_name(gate: Assertion, percentiles: Collection[float] | None) -> None:
    asked = percentile_of(gate.name)
    known = known_names({*(percentiles or ()), *({asked} if asked is not None and percentiles is None else ())})
    if gate.name in known:
        return
    close = difflib.get_close_matches(gate.name, sorted(known), n=_MATCHES_SHOWN, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see the keys of result.json"
    if asked is not None and f"p{asked:g}_" in gate.name and asked not in PERCENTILES:
        hint = f": it has to be in --percentiles, such as 50,99,{asked:g}"
    raise ValueError(f"{gate.text!r}: there is no number {gate.name!r}{hint}")


def judge_all(
    assertions: Sequence[Assertion],
    results: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]] | None = None,
) -> list[Verdict]:
    """What became of the gates. `results`: the result.json of each run of a side; of several runs the mean counts.

    Raises ValueError for a multiple of a base where there is none.
    """
    if not assertions:
        return []
    values = _mean_numbers(results)
    base_values = None if base is None else _mean_numbers(base)
    return [check(assertion, values, base_values) for assertion in assertions]


def _mean_numbers(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """None where a run has no value."""
    of_runs = [numbers(result) for result in results]
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for of_run in of_runs for name in of_run):
        values = [value for of_run in of_runs if (value := _value(of_run, name)) is not None]
        found[name] = sum(values) / len(values) if len(values) == len(of_runs) else None
    return found


def _value(values: Mapping[str, float | None], name: str) -> float | None:
    """Outcomes are told where they occurred."""
    return values.get(name, 0.0 if name.startswith("outcomes.") else None)


def numbers(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Numeric keys of a result.json; one inside another gets both names, with a dot between. None: no value there."""
    found: dict[str, float | None] = {}
    for name, value in result.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": number for inner, number in numbers(value).items()}
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[name] = value
    return found


def check(
    assertion: Assertion, values: Mapping[str, float | None], base: Mapping[str, float | None] | None = None
) -> Verdict:
    """Does it hold? A number that is not there makes it fail, with the reason.

    Raises ValueError for a multiple of a base where there is none.
    """
    value = _value(values, assertion.name)
    if value is None or math.isnan(value):
        return Verdict(holds=False, why=f"{assertion.text}: failed, {_no_value(assertion.name)}")
    limit, of_base = assertion.limit, ""
    if assertion.of_base:
        if base is None:
            raise ValueError(f"{assertion.text!r}: {_NEEDS_BASE}")
        of_base_value = _value(base, assertion.name)
        if of_base_value is None or math.isnan(of_base_value):
            return Verdict(holds=False, why=f"{assertion.text}: failed, of the base {_no_value(assertion.name)}")
        limit, of_base = limit * of_base_value, f" = {limit:g} x {of_base_value:g}"
    holds = _OPERATORS[assertion.operator](value, limit)
    verdict = "holds" if holds else "failed"
    return Verdict(
        holds=holds, why=f"{assertion.text}: {verdict}, {assertion.name} is {value:g}, limit {limit:g}{of_base}"
    )


def _no_value(name: str) -> str:
    percentile = percentile_of(name)
    if percentile is None:
        return f"{name} has no value: it was not measured"
    return f"{name} has no value: it needs {samples_needed(percentile)} samples"
