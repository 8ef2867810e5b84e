"""Quantities as people write them: `512MiB`, `1.5GiB`, `8G`, `80%`. Sizes are binary: MB and MiB both mean 2**20 bytes."""

import re
from dataclasses import dataclass

KIB, MIB, GIB = 2**10, 2**20, 2**30
_SCALE = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 2**40}
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes meant by `text`. Raises ValueError that shows an example of the right form."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB or 2GiB")
    return int(float(match[1]) * _SCALE[match[2].upper()])


@dataclass(frozen=True, slots=True)
class MemoryShare:
    """A part of the memory that there is."""

    percent: float
    """Above 0 and at most 100."""

    def of(self, total_bytes: int) -> int:
        """So many bytes of `total_bytes`."""
        return int(total_bytes * self.percent / 100)

    def __str__(self) -> str:
        """As people write it; `parse_memory` reads it back."""
        return f"{self.percent:g}%"


def parse_memory(text: str) -> MemoryShare | int:
    """Bytes, or a share such as 80%. Raises ValueError that shows an example of the right form."""
    match = _SHARE.fullmatch(text.strip())
    if match is None:
        try:
            return parse_bytes(text)
        except ValueError as error:
            raise ValueError(f"{error}, or like 80%") from None
    percent = float(match[1])
    if not 0 < percent <= 100:
        raise ValueError(f"{text!r} is not a share; write it like 80%, above 0% and at most 100%")
    return MemoryShare(percent)


def format_bytes(n_bytes: int) -> str:
    """`n_bytes` with the largest unit that keeps it at 1 or above, one decimal."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"
