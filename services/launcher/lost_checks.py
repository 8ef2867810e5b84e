"""What `penstock doctor` says of workers that are gone: their rows have vanished, so nothing else would tell of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any  # Any: JSON

from services.launcher.findings import Finding, Level
from services.launcher.process_checks import Here, beside

_CAN_STAND_IN = {"prefill": ("prefill", "mixed"), "decode": ("decode", "mixed"), "mixed": ("mixed",)}
"""Roles without which prompts or answers would be computed elsewhere or not at all; requests go on without a KV store."""
_STOPPED = frozenset("Tt")


def check_lost(status: Mapping[str, Any], here: Here, root: Path = Path("/")) -> Iterator[Finding]:
    """Workers that the gateway lost lately and that are not back."""
    ready = {worker["role"] for worker in status["workers"] if worker["state"] == "ready"}
    for one in status.get("lost", ()):  # a gateway of another version does not remember
        roles = _CAN_STAND_IN.get(one["role"], ())
        alone = bool(roles) and ready.isdisjoint(roles)
        text = lost_text(one)
        if alone:
            text += f"; no {' or '.join(roles)} worker is left"
        seen = _seen_here(one["pid"], root) if beside(one, here) else ""
        advice = seen or "look at its process and log; SIGCONT if it is stopped"
        yield Finding(Level.FAIL if alone else Level.WARN, "lost", text, advice)


def lost_text(one: Mapping[str, Any]) -> str:
    """One lost worker on a line."""
    return f"{one['id']} was lost {one['ago_ms'] / 1000:.0f} s ago: it {one['reason']}"


def _seen_here(pid: int, root: Path) -> str:
    try:
        stat = (root / "proc" / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return f"its process (pid {pid}) is gone; its log says why, if anything does; start it again"
    state = stat.rpartition(")")[2].split()[:1]
    if state and state[0] in _STOPPED:
        return f"its process is stopped (state {state[0]}): kill -CONT {pid}"
    return ""


def check_prompts(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Somebody whose work it is computes prompts."""
    ready = {worker["role"] for worker in status["workers"] if worker["state"] == "ready"}
    if "decode" in ready and ready.isdisjoint({"prefill", "mixed"}):
        off = status["gateway"].get("policies", {}).get("prefill-fallback") == "deny"
        who = "nobody computes prompts (--prefill-fallback deny)" if off else "decode workers compute prompts"
        advice = "start a prefill worker: answers wait for other people's prompts meanwhile"
        yield Finding(Level.WARN, "prefill", f"no prefill worker is ready: {who}", advice)
