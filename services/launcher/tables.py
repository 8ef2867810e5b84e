"""How a system looks on a terminal: workers, memory, links. Pure: status documents in, text out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # Any: JSON

from common.kv_layout import DTYPE_BYTES, KvLayout
from common.units import format_bytes
from services.launcher.lost_checks import lost_text
from services.launcher.readiness import peer_name

_SPARE = frozenset({"kv_free", "released", "parked_free", "free"})
"""Owners that nobody stands behind."""


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, without trailing blanks."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in table)


def memory_text(worker: Mapping[str, Any]) -> str:
    """Pages in use, kept for reuse and in all, and what they stand for in tokens and bytes; `-` for who has no pages."""
    pages, model = worker["pages"], worker["model"]
    if not pages["total"]:
        return "-"
    cached = f", {pages['cached']} cached" if pages["cached"] else ""
    lent = pages.get("lent", 0)  # a worker of another version lends nothing
    used = pages["total"] - pages["free"] - pages["cached"] - lent
    aside = f", {lent} lent" if lent else ""
    text = f"{used} of {pages['total']} pages used{cached}{aside}{_change_text(worker)}"
    if not model or model["dtype"] not in DTYPE_BYTES:
        return text
    layout = KvLayout(
        layers=model["layers"],
        kv_heads=model["kv_heads"],
        head_dim=model["head_dim"],
        dtype=model["dtype"],
        block_tokens=model["block_tokens"],
    )
    tokens = pages["total"] // layout.layers * layout.block_tokens
    total_bytes = pages["total"] * layout.page_bytes
    return f"{text}; {format_bytes(total_bytes)} of KV for {tokens:,} tokens"


def _change_text(worker: Mapping[str, Any]) -> str:
    """Where a pool is going that is being resized; empty for one that is not."""
    gauges = worker.get("gauges", {})
    there, target = gauges.get("pool_bytes", 0.0), gauges.get("pool_target_bytes", 0.0)
    return "" if there == target else f", on the way to {format_bytes(int(target))}"


def memory_table(status: Mapping[str, Any]) -> str:
    """Who has each process' memory, a line per tier; empty text if nobody tells."""
    rows = [row for worker in status["workers"] for row in _memory_rows(worker)]
    return columns(["MEMORY OF", "TIER", "SIZE", "HELD BY", "FREE"], rows) if rows else ""


def _memory_rows(worker: Mapping[str, Any]) -> Iterator[list[str]]:
    parts: Sequence[Mapping[str, Any]] = worker.get("memory", [])  # a gateway of another version has none
    for tier in dict.fromkeys(part["tier"] for part in parts):
        n_bytes = {part["owner"]: part["bytes"] for part in parts if part["tier"] == tier}
        held = {owner: there for owner, there in n_bytes.items() if owner not in _SPARE}
        free = {owner: there for owner, there in n_bytes.items() if owner in _SPARE}
        yield [worker["id"], tier, format_bytes(sum(n_bytes.values())), _shares_text(held), _shares_text(free)]


def _shares_text(n_bytes: Mapping[str, int]) -> str:
    shares = [f"{owner.replace('_', ' ')} {format_bytes(there)}" for owner, there in n_bytes.items() if there]
    return ", ".join(shares) or "-"


def cache_table(status: Mapping[str, Any]) -> str:
    """What each process keeps for reuse and what came of it; empty text if nobody keeps or looked for anything."""
    rows = [_cache_row(worker) for worker in status["workers"] if _has_cache(worker["cache"])]
    return columns(["CACHE OF", "KEEPS", "HIT TOKENS", "OLDEST PIN"], rows) if rows else ""


def _has_cache(cache: Mapping[str, Any]) -> bool:
    hits: Mapping[str, int] = cache["hit_tokens_by_tier"]
    return bool(cache["cached_blocks"] or cache["blocks_by_tier"] or cache["missed_tokens"] or any(hits.values()))


def _cache_row(worker: Mapping[str, Any]) -> list[str]:
    cache = worker["cache"]
    tiers = [
        f"{tier} {n_blocks:,} blocks ({format_bytes(cache['bytes_by_tier'].get(tier, 0))})"
        for tier, n_blocks in sorted(cache["blocks_by_tier"].items())
    ]
    kept = ", ".join(tiers) or f"{worker['tier']} {cache['cached_blocks']:,} blocks"
    pin = f"{cache['oldest_pin_ms']:,.0f} ms" if cache["oldest_pin_ms"] else "-"
    return [worker["id"], kept, _hits_text(cache["hit_tokens_by_tier"], cache["missed_tokens"]), pin]


def _hits_text(hits: Mapping[str, int], missed: int) -> str:
    total = sum(hits.values()) + missed
    if not total:
        return "-"
    parts = [f"{tier} {tokens:,}" for tier, tokens in sorted(hits.items()) if tokens]
    return f"{', '.join(parts) or '0'} of {total:,} ({sum(hits.values()) / total:.0%})"


def links_table(status: Mapping[str, Any]) -> str:
    """How KV travels between each pair, KV stores included; empty text if there is none."""
    rows = [
        [worker["id"], peer_name(link["peer"]), link["kind"], f"{link['gib_per_s']:.1f} GiB/s", link["reason"]]
        for worker in status["workers"]
        for link in worker["transports"]
    ]
    return columns(["KV FROM", "TO", "BY", "PROBED AT", "WHY NOT FASTER"], rows) if rows else ""


def status_text(status: Mapping[str, Any]) -> str:
    """The whole of `penstock status`."""
    gateway = status["gateway"]
    state = "ready" if gateway["ready"] else "NOT READY"
    head = f"{gateway['id']} at {gateway['endpoint']}: {state}, {gateway['open_requests']} open requests"
    rows = [_status_row(worker) for worker in status["workers"]]
    table = columns(["WORKER", "ROLE", "STATE", "PID", "MODEL", "MEMORY", "WAITING", "RUNNING", "HANDING OVER"], rows)
    parts = [
        head,
        table if rows else "no worker has joined",
        memory_table(status),
        cache_table(status),
        links_table(status),
    ]
    parts.append(routing_text(gateway["routing"], gateway["prompt_tree"]))
    parts.append(policies_text(status))
    reasons = [f"{w['id']}: {text}" for w in status["workers"] if (text := w["reason"] or w.get("degraded", ""))]
    reasons += [lost_text(one) for one in status.get("lost", ())]  # a gateway of another version does not remember
    return "\n\n".join(part for part in [*parts, "\n".join(reasons)] if part)


def policies_text(status: Mapping[str, Any]) -> str:
    """Which policies are on, a line per process; those that are the same for several stand together."""
    alike: dict[str, list[str]] = {}
    for one in (status["gateway"], *status["workers"]):
        policies: Mapping[str, str] = one.get("policies", {})  # a process of another version tells none
        if policies:
            alike.setdefault(" ".join(f"{name}={value}" for name, value in policies.items()), []).append(one["id"])
    return (
        columns(["POLICIES OF", "SETTINGS"], [[", ".join(ids), text] for text, ids in alike.items()]) if alike else ""
    )


def routing_text(routing: Mapping[str, float], tree: Mapping[str, float]) -> str:
    """What became of the gateway's routing decisions since its start; empty text before the first."""
    if not routing.get("first_tokens_total"):
        return ""

    def total(name: str) -> float:
        return sum(value for series, value in routing.items() if series.partition("{")[0] == name)

    hits = (
        f"hit tokens {total('predicted_hit_tokens_total'):,.0f} predicted, {total('actual_hit_tokens_total'):,.0f} real"
    )
    tree_text = f"prompt tree {'in sync' if tree['tree_synced'] else 'NOT IN SYNC'}, {tree['tree_blocks']:,.0f} blocks"
    return (
        f"routing: {total('first_tokens_total'):,.0f} answers begun; {hits}; {total('local_prefills_total'):,.0f} prompts "
        f"computed by decode workers; {total('retries_total'):,.0f} retries and replays; "
        f"{total('degraded_routes_total'):,.0f} routed without a complete tree; {tree_text}"
    )


def _status_row(worker: Mapping[str, Any]) -> list[str]:
    queue, model = worker["queue"], worker["model"]
    return [
        worker["id"],
        worker["role"],
        "degraded" if worker["state"] == "ready" and worker.get("degraded") else worker["state"],
        str(worker["pid"]),
        f"{model['name']} ({model['architecture']}, {model['dtype']})" if model else "-",
        memory_text(worker),
        str(queue["waiting"]),
        str(queue["running"]),
        str(queue["handing_over"]),
    ]


def process_table(
    processes: Sequence[tuple[str, int, str]], status: Mapping[str, Any], device: str, threads: int
) -> str:
    """What `penstock up` started: rows of (name, pid, address) joined with what the gateway knows of each."""
    workers = {worker["id"]: worker for worker in status["workers"]}
    rows = []
    for name, pid, address in processes:
        worker = workers.get(name)
        computes = worker is not None and worker["model"] is not None
        rows.append(
            [
                name,
                str(pid),
                address or (worker["endpoint"] if worker else "-"),
                f"{device}, {threads} thread{'s' * (threads > 1)}" if computes else "-",
                memory_text(worker) if worker else "-",
            ]
        )
    return columns(["PROCESS", "PID", "ADDRESS", "DEVICE", "MEMORY PLAN"], rows)
