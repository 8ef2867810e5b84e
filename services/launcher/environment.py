"""Which PENSTOCK_ variables belong to a process, when one environment serves them all. Pure."""

import difflib
from collections.abc import Iterable, Mapping

from common.errors import ConfigError
from common.settings import PREFIX, describe


def variables(kinds: Iterable[type]) -> set[str]:
    """The variables of these settings classes."""
    return {one.variable for kind in kinds for one in describe(kind).values()}


def foreign_variables(environ: Mapping[str, str], mine: type, everybody: Iterable[type]) -> list[str]:
    """Variables in `environ` that other processes read and `mine` does not. ConfigError if nobody reads one."""
    own, known = variables([mine]), variables(everybody)
    present = sorted(name for name in environ if name.startswith(PREFIX))
    for name in present:
        if name not in own | known:
            near = difflib.get_close_matches(name, sorted(own | known), n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "see penstock COMMAND --help for those there are"
            raise ConfigError(f"{name} is not a setting of any command; {hint}")
    return [name for name in present if name not in own]
