"""Container health: the gateway answers, or the service's process is there and not a zombie. Standard library only.

    healthcheck.py URL     0 if a GET of URL gives 200
    healthcheck.py         0 if a `penstock` service runs in this container

Whether a worker is of use is for the gateway to say (`/ready`, `/status`): it asks every worker twice a second.
"""

import sys
import urllib.error
import urllib.request
from pathlib import Path

_TIMEOUT_S = 3.0
_SERVICES = {"prefill", "decode", "mixed", "kvstore", "gateway"}


def answers(url: str) -> bool:
    """True if a GET of `url` gives 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def service_runs(processes: Path = Path("/proc")) -> bool:
    """True if a process of this container is a live `penstock SERVICE`."""
    for folder in processes.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it ended while we looked
        names = [Path(word).name for word in words]
        runs_python = names[0].startswith("python")  # the container's init carries the same words
        if runs_python and "penstock" in names and _SERVICES.intersection(words) and state not in "ZX":
            return True
    return False


if __name__ == "__main__":
    sys.exit(0 if (answers(sys.argv[1]) if len(sys.argv) > 1 else service_runs()) else 1)
