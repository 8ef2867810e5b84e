"""Fields of a body that this gateway does not know: named in a header of the answer, since nothing else tells of a typo.

`x-penstock-ignored-fields: max_token,top_n;more=2`: names in order, and how many more there were; `;more` without a number
where not all of them were looked for. Names come from clients, so only those are repeated that are tokens of RFC 9110
(section 5.6.2) and short, and only the first few.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

HEADER = "x-penstock-ignored-fields"
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}"
PATTERN = rf"(?:{_NAME}(?:,{_NAME})*)?(?:;more(?:=[1-9][0-9]*)?)?"
"""Of the header's value."""
_MOST_NAMES = 16


@dataclass(frozen=True, slots=True)
class IgnoredFields:
    """What is told of them."""

    total: int = 0
    """As far as they were looked for."""
    header: str = ""
    """The header's value; empty: there were none."""


NOTHING_IGNORED = IgnoredFields()


def ignored_fields(names: Iterable[str], *, all_of_them: bool = True) -> IgnoredFields:
    """Of the names of unknown fields, in any order; not `all_of_them`: there may be more."""
    unknown = set(names)
    told = sorted(name for name in unknown if re.fullmatch(_NAME, name))[:_MOST_NAMES]
    more = len(unknown) - len(told)
    rest = (f";more={more}" if more else "") if all_of_them else ";more"
    return IgnoredFields(len(unknown), ",".join(told) + rest)
