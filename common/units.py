"""Quantities as people write them: `512MiB`, `1.5GiB`, `8G`. Sizes are binary: MB and MiB both mean 2**20 bytes."""

import re

KIB, MIB, GIB = 2**10, 2**20, 2**30
_SCALE = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 2**40}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes meant by `text`. Raises ValueError that shows an example of the right form."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB or 2GiB")
    return int(float(match[1]) * _SCALE[match[2].upper()])


def format_bytes(n_bytes: int) -> str:
    """`n_bytes` with the largest unit that keeps it at 1 or above, one decimal."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"
