"""`--cluster 2P2D`: how many workers of which kind. Pure."""

import re
from dataclasses import dataclass

from common.errors import ConfigError

_ROLES = {"P": "prefill", "D": "decode", "M": "mixed"}
_ALLOWED = "a number before each of P (prefill), D (decode) and M (mixed workers), such as 1P1D, 2P2D, 4M or 1P1D1M"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Workers by kind."""

    prefill: int = 0
    decode: int = 0
    mixed: int = 0

    @property
    def workers(self) -> int:
        """Of all kinds."""
        return self.prefill + self.decode + self.mixed

    def __str__(self) -> str:
        return "".join(f"{count}{letter}" for letter, role in _ROLES.items() if (count := getattr(self, role)))


def parse_cluster(text: str) -> ClusterSpec:
    """What `text` names. Raises ConfigError."""
    if not re.fullmatch(r"([0-9]+[PDM])+", text.upper()):
        raise ConfigError(f"--cluster={text!r}: must be {_ALLOWED}")
    counts: dict[str, int] = {}
    for number, letter in re.findall(r"([0-9]+)([PDM])", text.upper()):
        if letter in counts:
            raise ConfigError(f"--cluster={text!r}: names {letter} twice; must be {_ALLOWED}")
        if int(number) < 1:
            raise ConfigError(f"--cluster={text!r}: a number must be 1 or more; leave out what there is none of")
        counts[letter] = int(number)
    if ("P" in counts) != ("D" in counts):
        raise ConfigError(f"--cluster={text!r}: prefill and decode workers need each other; give both, or M alone")
    return ClusterSpec(**{_ROLES[letter]: count for letter, count in counts.items()})


def equal_mixed(spec: ClusterSpec) -> ClusterSpec:
    """The baseline with the same resources: as many workers, each doing both phases.

    `penstock up` gives every worker the same memory, and shares the cores out by their number.
    """
    return ClusterSpec(mixed=spec.workers)
