"""Parts of the page, as data."""

from dataclasses import dataclass, field

from loadgen.output.html.theme import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One plot."""

    name: str
    """Unique on the page."""
    title: str
    data: list[Json]
    """Traces; one with a `legendgroup` is shown and hidden by the key of that name."""
    layout: Json
    height_px: int = 260
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    text_columns: frozenset[int] = frozenset({0})
    """Aligned left, and may break; the others are numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of the key above a section's plots."""

    name: str
    """The `legendgroup` it shows and hides."""
    color: str
    mark: str = "solid"
    """A dash, `points`, or `bar`."""
    text: str = ""
    """Shown; empty: the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is under it. A section with a note alone says why there is nothing to see."""

    name: str
    """Its anchor."""
    title: str
    short: str
    """For the bar of links."""
    note: str = ""
    keys: tuple[Key, ...] = ()
    figures: tuple[Figure, ...] = ()
    columns: int = 2
    """Plots side by side, where the screen is wide enough."""
    tables: tuple[Table, ...] = ()
    facts: tuple[tuple[str, str], ...] = field(default=())
    """Name and value, shown as a list."""
