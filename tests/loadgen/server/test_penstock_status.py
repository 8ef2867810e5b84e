import json

import pytest

from loadgen.server.penstock_status import PenstockStatus
from tests.loadgen.server.pages import status, worker

SOURCE = PenstockStatus()


def test_used_memory_is_what_requests_hold_and_cached_memory_is_not() -> None:
    pages = {"reserved": 1, "granted": 2, "active": 30, "quarantined": 4, "cached": 50}
    found = SOURCE.sample(status(worker("a", "prefill", pages=pages), worker("b", "decode")), 3.0)
    assert (found.at_s, found.kv_used) == (3.0, 37 / 200)
    assert (found.workers["a"].kv_used, found.workers["a"].kv_cached) == (0.37, 0.5)
    assert (found.workers["b"].kv_used, found.workers["b"].role) == (0.0, "decode")


def test_cached_blocks_that_running_requests_pin_are_used() -> None:
    page = status(
        worker("d", "decode", pages={"active": 5, "cached": 60}, gauges={"pinned_blocks": 10.0}, model={"layers": 2})
    )
    found = SOURCE.sample(page, 0.0)
    assert (found.kv_used, found.workers["d"].kv_cached) == (0.25, 0.4)


def test_requests_wait_at_workers_and_at_the_gateway() -> None:
    page = status(
        worker("p", "prefill", queue={"waiting": 2}), worker("m", "mixed", queue={"waiting": 3}), waiting_requests=4
    )
    found = SOURCE.sample(page, 0.0)
    assert found.waiting == 9
    assert {name: one.waiting for name, one in found.workers.items()} == {"p": 2, "m": 3}


def test_a_prompt_that_is_handed_over_counts_once() -> None:
    page = status(
        worker("p", "prefill", queue={"running": 1, "handing_over": 2}),
        worker("d", "decode", queue={"running": 5, "handing_over": 2}),
    )
    found = SOURCE.sample(page, 0.0)
    assert (found.running, found.workers["p"].running, found.workers["d"].running) == (8, 3, 5)


def test_kv_stores_compute_nothing_and_hold_pins_alone() -> None:
    store = worker("kvstore-0", "kvstore", pages={"active": 90}, gauges={"pinned_blocks": 2.0})
    page = status(store, worker("m", "mixed"))
    found = SOURCE.sample(page, 0.0)
    assert (set(found.workers), found.kv_used) == ({"m"}, 0.0)
    assert {name: value for name, value in SOURCE.held(page).items() if value} == {"kvstore-0: pinned blocks": 2.0}


def test_all_that_a_request_can_leave_behind_is_held() -> None:
    one = worker(
        "m",
        "mixed",
        pages={"reserved": 1, "granted": 2, "active": 3, "quarantined": 4, "cached": 99},
        queue={"waiting": 5, "running": 6, "handing_over": 7},
        gauges={"leases": 8.0, "pinned_blocks": 9.0, "oldest_pin_ms": 99.0},
        charged_requests=10,
    )
    assert SOURCE.held(status(one, open_requests=11, waiting_requests=12)) == {
        "m: reserved pages": 1,
        "m: granted pages": 2,
        "m: active pages": 3,
        "m: quarantined pages": 4,
        "m: waiting requests": 5,
        "m: running requests": 6,
        "m: handing over requests": 7,
        "m: leases": 8,
        "m: pinned blocks": 9,
        "m: charged requests": 10,
        "gateway: open requests": 11,
        "gateway: waiting requests": 12,
    }


def test_memory_is_told_by_process_tier_and_owner_kv_stores_included() -> None:
    parts = [("weights", "device", 5), ("kv_free", "device", 7), ("parked", "host", 3)]
    memory = [{"owner": owner, "tier": tier, "bytes": n_bytes} for owner, tier, n_bytes in parts]
    store = worker("kvstore-0", "kvstore", memory=[{"owner": "cached", "tier": "disk", "bytes": 9}])
    found = SOURCE.sample(status(worker("m", "mixed", memory=memory), worker("old", "mixed"), store), 0.0)
    assert found.memory == {
        "m": {"device": {"weights": 5, "kv_free": 7}, "host": {"parked": 3}},
        "kvstore-0": {"disk": {"cached": 9}},
    }


def test_missing_fields_read_as_nothing() -> None:
    found = SOURCE.sample(b'{"gateway": {}, "workers": [{"id": "x", "role": "mixed", "new": [1]}]}', 0.0)
    assert (found.waiting, found.running, found.kv_used) == (0, 0, None)


def test_the_whole_page_is_kept() -> None:
    page = status(worker("m", "mixed"), open_requests=1)
    assert SOURCE.document(page) == json.loads(page)


@pytest.mark.parametrize("page", [b"", b"[]", b"{}", b'{"workers": []}', b'{"gateway": 1, "workers": []}', b"<html>"])
def test_what_is_not_ours_is_refused(page: bytes) -> None:
    for read in (lambda: SOURCE.sample(page, 0.0), lambda: SOURCE.held(page), lambda: SOURCE.document(page)):
        with pytest.raises(ValueError, match="/status"):
            read()


@pytest.mark.parametrize(
    "page",
    [
        b'{"gateway": {}, "workers": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        status(worker("m", "mixed", pages={"total": 10**30})),
        status(worker("m", "mixed", gauges={"leases": 1e300})),
    ],
)
def test_a_status_beyond_all_sense_is_a_value_error(page: bytes) -> None:
    for read in (lambda: SOURCE.sample(page, 0.0), lambda: SOURCE.held(page), lambda: SOURCE.document(page)):
        with pytest.raises(ValueError, match="/status: not Penstock's"):
            read()


def test_a_document_too_deep_to_be_written_is_not_kept() -> None:
    page = b'{"gateway": {}, "workers": [], "x": ' + b"[" * 40 + b"]" * 40 + b"}"
    assert SOURCE.sample(page, 0.0).running == 0
    with pytest.raises(ValueError, match="deeper"):
        SOURCE.document(page)
