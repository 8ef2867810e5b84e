"""Laws of routing."""

from dataclasses import replace

import pytest

from common.ids import RequestId, WorkerId
from common.policy.routing import POLICIES, LeastLoad, NoRoute, RoundRobin, Route, WorkerView, reason_not_ready


def worker(
    name: str, model: str = "m", accepting: bool = True, waiting_tokens: int = 0, requests: int = 0
) -> WorkerView:
    return WorkerView(
        id=WorkerId(name),
        role=name.split("-")[0],
        model=model,
        accepting=accepting,
        waiting_tokens=waiting_tokens,
        requests=requests,
    )


R = RequestId("r")


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(
    "workers",
    [
        [],
        [worker("prefill-0")],
        [worker("decode-0")],
        [worker("kvstore-0")],
        [worker("prefill-0"), worker("decode-0", accepting=False)],
        [worker("prefill-0", accepting=False), worker("decode-0")],
        [worker("prefill-0", model="a"), worker("decode-0", model="b")],
        [worker("mixed-0", accepting=False)],
    ],
)
def test_without_a_ready_pair_or_mixed_worker_there_is_a_reason(policy, workers: list[WorkerView]) -> None:
    found = policy.choose(R, workers, 0)
    assert isinstance(found, NoRoute)
    assert found.reason == reason_not_ready(workers) != ""


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("turn", range(6))
def test_kv_flows_only_between_equal_models(policy, turn: int) -> None:
    workers = [worker(f"{role}-{m}", model=m) for role in ("prefill", "decode") for m in ("a", "b", "c")]
    found = policy.choose(RequestId(f"r{turn}"), workers, turn)
    assert isinstance(found, Route) and found.decode is not None
    assert found.entry.split("-")[1] == found.decode.split("-")[1]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_order_of_the_views_does_not_matter(policy) -> None:
    workers = [worker(f"{role}-{n}") for role in ("prefill", "decode", "mixed") for n in range(3)]
    for turn in range(20):
        request = RequestId(f"r{turn}")
        assert policy.choose(request, workers, turn) == policy.choose(request, workers[::-1], turn)


def test_round_robin_visits_every_entry_and_every_decode_worker_equally() -> None:
    workers = [worker(f"prefill-{n}") for n in range(4)] + [worker(f"decode-{n}") for n in range(2)]
    routes = [RoundRobin().choose(R, workers, turn) for turn in range(8)]
    assert [route.entry for route in routes if isinstance(route, Route)] == [f"prefill-{n % 4}" for n in range(8)]
    assert [route.decode for route in routes if isinstance(route, Route)] == [f"decode-{n % 2}" for n in range(8)]


def test_a_mixed_worker_answers_alone() -> None:
    assert RoundRobin().choose(R, [worker("mixed-0")], 0) == Route(WorkerId("mixed-0"), None)
    assert Route(WorkerId("mixed-0"), None).workers == ("mixed-0",)


def test_least_load_takes_the_fewest_waiting_tokens_then_the_fewest_requests() -> None:
    workers = [
        worker("prefill-0", waiting_tokens=10),
        worker("prefill-1", waiting_tokens=9, requests=2),
        worker("prefill-2", waiting_tokens=9, requests=1),
        worker("decode-0", requests=5),
        worker("decode-1", requests=4),
    ]
    assert LeastLoad().choose(R, workers, 0) == Route(WorkerId("prefill-2"), WorkerId("decode-1"))
    idle = replace(workers[0], waiting_tokens=0)
    assert LeastLoad().choose(R, [idle, *workers[1:]], 0) == Route(WorkerId("prefill-0"), WorkerId("decode-1"))


def test_least_load_spreads_equals_over_requests_and_repeats_itself() -> None:
    workers = [worker(f"mixed-{n}") for n in range(4)]
    first = [LeastLoad().choose(RequestId(f"r{n}"), workers, n) for n in range(200)]
    assert first == [LeastLoad().choose(RequestId(f"r{n}"), workers, 0) for n in range(200)]
    counts = [first.count(Route(WorkerId(f"mixed-{n}"), None)) for n in range(4)]
    assert sum(counts) == 200
    assert min(counts) >= 25
