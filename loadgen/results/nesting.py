"""How deep JSON is nested. Pure."""

from typing import Any  # Any: JSON


def is_deeper(value: Any, levels: int) -> bool:
    """True if objects and lists stand in one another more than `levels` deep. Looks no deeper than that."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(one, levels - 1) for one in inner)
