"""Numbers and texts as people read them. Pure. What is not known is an en dash."""

import html

UNKNOWN = "–"
NBSP = "\u00a0"
"""Keeps a number and its unit on one line."""
_SECONDS_FROM_S = 10.0


def latency(value_s: float | None) -> str:
    """Milliseconds under 10 s, seconds above."""
    if value_s is None:
        return UNKNOWN
    if abs(value_s) >= _SECONDS_FROM_S:
        return f"{value_s:,.1f}{NBSP}s"
    value_ms = value_s * 1e3
    decimals = 0 if abs(value_ms) >= 100 else 1 if abs(value_ms) >= 1 else 2
    return f"{value_ms:,.{decimals}f}{NBSP}ms"


def target_text(value_s: float) -> str:
    """A latency that somebody chose: no digits that were not given."""
    return f"{value_s:,g}{NBSP}s" if value_s >= _SECONDS_FROM_S else f"{value_s * 1e3:,g}{NBSP}ms"


def seconds(value_s: float) -> str:
    """A length of time that is no latency."""
    return f"{value_s:,.1f}{NBSP}s"


def quantity(value: float | None) -> str:
    """A count, or something like one: three figures that count, thousands apart."""
    if value is None:
        return UNKNOWN
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def share(part: float | None) -> str:
    """A part of one as percent; a few promille are not nothing, and not quite all is not all."""
    if part is None:
        return UNKNOWN
    percent = 100 * part
    if 0 < percent < 0.1:
        return f"< 0.1{NBSP}%"
    if 99 < percent < 100:
        return f"{min(percent, 99.9):.1f}{NBSP}%"
    return f"{percent:.{1 if 0 < percent < 10 else 0}f}{NBSP}%"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def per_second(value: float) -> str:
    """A rate of requests."""
    return f"{quantity(value)}/s"


def plot_text(text: str) -> str:
    """Text from outside for a plot, where plotly takes some tags for its own."""
    return html.escape(text, quote=False)
