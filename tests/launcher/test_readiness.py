"""What a starting system still lacks, and how a running one is shown."""

import re
from typing import Any

from services.launcher.readiness import Expected, missing
from services.launcher.tables import (
    cache_table,
    columns,
    links_table,
    memory_table,
    memory_text,
    process_table,
    routing_text,
    status_text,
)

EXPECTED = [Expected("prefill-0", "prefill", 1), Expected("decode-0", "decode", 2), Expected("kvstore-0", "kvstore", 3)]
MODEL = {
    "name": "m",
    "architecture": "A",
    "dtype": "float32",
    "layers": 2,
    "kv_heads": 2,
    "head_dim": 8,
    "block_tokens": 16,
}


CACHE: dict[str, Any] = {
    "cached_blocks": 0,
    "oldest_pin_ms": 0.0,
    "blocks_by_tier": {},
    "bytes_by_tier": {},
    "hit_tokens_by_tier": {},
    "missed_tokens": 0,
}

ROUTING = {
    "first_tokens_total": 9.0,
    "predicted_hit_tokens_total": 640.0,
    "actual_hit_tokens_total": 600.0,
    "retries_total{code=busy,kind=retry}": 1.0,
    "retries_total{code=peer_failed,kind=replay}": 2.0,
    "local_prefills_total{reason=few-uncached}": 4.0,
}


def worker(name: str, pid: int, **changed: Any) -> dict[str, Any]:
    pages = {"total": 0, "free": 0, "cached": 0}
    queue = {"waiting": 1, "running": 2, "handing_over": 3}
    fields = {
        "state": "ready",
        "reason": "",
        "reported": True,
        "transports": [],
        "model": None,
        "endpoint": f"tcp://{name}",
        "tier": "device",
        "cache": CACHE,
    }
    return {"id": name, "role": name.split("-")[0], "pid": pid, "pages": pages, "queue": queue, **fields, **changed}


LINK = {"peer": "decode-0@00ff", "kind": "tcp", "gib_per_s": 1.26, "reason": "another host"}


def status(*workers: dict[str, Any]) -> dict[str, Any]:
    return {
        "gateway": {
            "id": "g",
            "endpoint": "http://g",
            "ready": True,
            "open_requests": 4,
            "routing": ROUTING,
            "prompt_tree": {"tree_synced": 1.0, "tree_blocks": 12.0},
        },
        "workers": list(workers),
    }


def complete() -> list[dict[str, Any]]:
    return [worker("prefill-0", 1, transports=[LINK]), worker("decode-0", 2), worker("kvstore-0", 3)]


def test_nothing_is_missing_when_all_are_ready_and_linked() -> None:
    assert missing(EXPECTED, status(*complete())) == {}


def test_everybody_is_missing_from_an_empty_status() -> None:
    assert set(missing(EXPECTED, {})) == {"prefill-0", "decode-0", "kvstore-0"}


def test_a_former_life_does_not_count() -> None:
    workers = complete()
    workers[1]["pid"] = 99
    assert missing(EXPECTED, status(*workers)) == {"decode-0": "has not joined the membership"}


def test_the_reason_of_a_worker_that_is_not_ready_is_passed_on() -> None:
    workers = complete()
    workers[2] |= {"state": "refused", "reason": "dtype differs"}
    assert missing(EXPECTED, status(*workers)) == {"kvstore-0": "is refused: dtype differs"}


def test_a_prefill_worker_needs_a_transport_to_every_decode_worker() -> None:
    both = [*EXPECTED, Expected("decode-1", "decode", 4)]
    lacking = missing(both, status(*complete(), worker("decode-1", 4)))
    assert lacking == {"prefill-0": "has no KV transport to decode-1 yet"}


def test_columns_line_up() -> None:
    assert columns(["A", "BB"], [["xxx", "y"], ["", "zz"]]) == "A    BB\nxxx  y\n     zz"


def test_memory_is_told_in_pages_bytes_and_tokens() -> None:
    full = worker("decode-0", 2, model=MODEL, pages={"total": 64, "free": 60, "cached": 0})
    assert memory_text(full) == "4 of 64 pages used; 128.0 KiB of KV for 512 tokens"
    full["pages"]["cached"] = 3
    assert memory_text(full).startswith("1 of 64 pages used, 3 cached; ")
    resized = {**full, "gauges": {"pool_bytes": 2.0**20, "pool_target_bytes": 2.0**19}}
    assert "3 cached, on the way to 512.0 KiB; " in memory_text(resized)
    assert memory_text(worker("x-0", 1)) == "-"


def test_memory_is_told_by_tier_and_owner_with_what_is_free_apart() -> None:
    workers = complete()
    shares = [("weights", "device", 2**20), ("released", "device", 0), ("kv_requests", "device", 2**19)]
    shares += [("kv_free", "device", 2**21), ("parked", "host", 0), ("parked_free", "host", 2**10)]
    workers[1]["memory"] = [{"owner": owner, "tier": tier, "bytes": n_bytes} for owner, tier, n_bytes in shares]
    rows = [re.split(r"  +", line) for line in memory_table(status(*workers)).splitlines()[1:]]
    assert rows == [
        ["decode-0", "device", "3.5 MiB", "weights 1.0 MiB, kv requests 512.0 KiB", "kv free 2.0 MiB"],
        ["decode-0", "host", "1.0 KiB", "-", "parked free 1.0 KiB"],
    ]
    assert "MEMORY OF" in status_text(status(*workers))
    assert memory_table(status(*complete())) == "", "workers of another version do not tell"


def test_links_name_both_ends_and_why_not_the_faster_way() -> None:
    table = links_table(status(*complete()))
    assert table.splitlines()[1] == "prefill-0  decode-0  tcp  1.3 GiB/s  another host"
    assert links_table(status(worker("mixed-0", 1))) == ""


def test_the_cache_of_each_process_is_one_line() -> None:
    workers = complete()
    hits = {"device": 96, "host": 1504, "disk": 0}
    workers[1]["cache"] = {**CACHE, "cached_blocks": 1200, "hit_tokens_by_tier": hits, "missed_tokens": 400}
    tiers = {"blocks_by_tier": {"host": 5, "disk": 7}, "bytes_by_tier": {"host": 2**20, "disk": 2**30}}
    workers[2]["cache"] = {**CACHE, **tiers, "oldest_pin_ms": 1234.4}
    rows = [re.split(r"  +", line) for line in cache_table(status(*workers)).splitlines()[1:]]
    assert rows == [
        ["decode-0", "device 1,200 blocks", "device 96, host 1,504 of 2,000 (80%)", "-"],
        ["kvstore-0", "disk 7 blocks (1.0 GiB), host 5 blocks (1.0 MiB)", "-", "1,234 ms"],
    ]
    assert cache_table(status(*complete())) == ""
    assert "CACHE OF" in status_text(status(*workers))


def test_the_status_text_shows_workers_links_and_reasons() -> None:
    workers = complete()
    workers[1] |= {"state": "draining", "reason": "it finishes its work", "model": MODEL}
    text = status_text(status(*workers))
    assert "g at http://g: ready, 4 open requests" in text
    assert "m (A, float32)" in text
    assert "decode-0: it finishes its work" in text
    assert "no worker has joined" in status_text(status())


def test_the_process_table_has_a_row_for_every_process() -> None:
    workers = complete()
    workers[1] |= {"model": MODEL, "pages": {"total": 2, "free": 2, "cached": 0}}
    table = process_table([("redis", 9, "redis://r"), ("decode-0", 2, "")], status(*workers), "cpu", 2).splitlines()
    assert table[1].split() == ["redis", "9", "redis://r", "-", "-"]
    assert "tcp://decode-0  cpu, 2 threads  0 of 2 pages used" in table[2]


def test_the_status_text_says_what_became_of_routing() -> None:
    text = routing_text(ROUTING, {"tree_synced": 0.0, "tree_blocks": 12.0})
    assert "640 predicted, 600 real" in text
    assert "3 retries and replays" in text
    assert "4 prompts computed by decode workers" in text
    assert "NOT IN SYNC" in text
    assert routing_text({}, {}) == ""
