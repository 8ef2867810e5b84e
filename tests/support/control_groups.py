"""What Linux says of memory, below a root of its own."""

from pathlib import Path


def system(root: Path, files: dict[str, str]) -> Path:
    """100 MiB are available on the machine; `files`: name below the root -> text."""
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    102400 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(path: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    """The files of one group, of version 2."""
    return {
        f"{path}/memory.max": f"{limit}\n",
        f"{path}/memory.current": f"{usage}\n",
        f"{path}/memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }
