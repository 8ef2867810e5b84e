"""What `penstock doctor` reads out of counters: what went wrong since the start of a process, though all is well now."""

from collections.abc import Iterator, Mapping
from typing import Any  # Any: JSON

from services.launcher.findings import Finding, Level

Counters = Mapping[str, float]


def check_counters(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Wrong pages, strangers at the door, faults on purpose, the watchdog."""
    gateway = status["gateway"]
    yield from _of_one(gateway["id"], gateway.get("routing", {}), "gateway", _may_fault(gateway))
    for worker in status["workers"]:
        yield from _of_one(worker["id"], worker.get("counters", {}), worker["role"], _may_fault(worker))
    yield from _closed_doors(status)


def _may_fault(one: Mapping[str, Any]) -> bool:
    return bool(one.get("policies", {}).get("faults") == "set" or one.get("gauges", {}).get("faults_on"))


def _of_one(name: str, counters: Counters, role: str, may_fault: bool) -> Iterator[Finding]:
    for series, n_pages in sorted(_series(counters, "kv_mismatches_total").items()):
        path = _label(series, "path")
        text = f"{name} got {n_pages:.0f} wrong pages on the path {path or 'of KV'} since its start; none was used"
        advice = "`kv_mismatch` in its log names who sent them: faulty memory, network or disk, unless faults are on"
        yield Finding(Level.FAIL, "kv", text, advice)
    yield from _faults(name, counters, may_fault)
    if n_fired := _total(counters, "watchdog_fired_total"):
        yield Finding(Level.WARN, "watchdog", *_watchdog(name, n_fired, role))


def _faults(name: str, counters: Counters, may_fault: bool) -> Iterator[Finding]:
    injected = _series(counters, "faults_injected_total")
    if not injected and not may_fault:
        return
    points = ", ".join(sorted({f"{_label(series, 'point')}:{_label(series, 'kind')}" for series in injected}))
    done = f", {sum(injected.values()):.0f} times so far: {points}" if injected else ""
    text = f"{name} goes wrong on purpose (--faults){done}"
    yield Finding(
        Level.WARN, "faults", text, "start it without PENSTOCK_FAULTS and --debug-faults, unless somebody tests"
    )


def _watchdog(name: str, n_fired: float, role: str) -> tuple[str, str]:
    if role == "gateway":
        text = f"{name} lost track of {n_fired:.0f} requests since its start (its own bug), and answered with an error"
        return text, "report it with the `stuck` lines of its log"
    return f"the watchdog of {name} fired {n_fired:.0f} times since its start", "read the `stuck` lines of its log"


def _closed_doors(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Handshakes that failed. With somebody who cannot be connected they tell why; alone they may be long over."""
    refused = {
        one["id"]: _total(counters, "refused_connections_total")
        for one, counters in (
            (status["gateway"], status["gateway"].get("routing", {})),
            *((worker, worker.get("counters", {})) for worker in status["workers"]),
        )
    }
    told = ", ".join(f"{name} {n:.0f}" for name, n in refused.items() if n)
    if not told:
        return
    outside = [worker["id"] for worker in status["workers"] if worker["state"] == "connecting"]
    if outside:
        text = f"{', '.join(outside)} cannot be connected, and handshakes are refused ({told}): it has no cluster key, or another one"
        yield Finding(Level.WARN, "key", text, "give all processes the same --cluster-key")
    else:
        text = f"handshakes refused since the start: {told}"
        advice = "`connection_refused` in these logs says who: a process without the cluster key or with another one, or a stranger"
        yield Finding(Level.WARN, "key", text, advice)


def _series(counters: Counters, name: str) -> dict[str, float]:
    return {series: n for series, n in counters.items() if series.partition("{")[0] == name and n}


def _total(counters: Counters, name: str) -> float:
    return sum(_series(counters, name).values())


def _label(series: str, label: str) -> str:
    for pair in series.partition("{")[2].rstrip("}").split(","):
        name, _, value = pair.partition("=")
        if name == label:
            return value
    return ""
