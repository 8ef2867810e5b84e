"""Means and peaks of who had which memory."""

from loadgen.results.memory_use import memory_use, memory_use_by_worker
from loadgen.results.timeline import ServerSample


def sample(memory: dict[str, dict[str, dict[str, int]]]) -> ServerSample:
    return ServerSample(at_s=0.0, waiting=0, running=0, kv_used=None, memory=memory)


SAMPLES = (
    sample({"a": {"device": {"weights": 10, "kv": 4}}, "b": {"device": {"kv": 6}}}),
    sample({"a": {"device": {"weights": 10, "kv": 8}}, "b": {"device": {"kv": 0}, "host": {"kv": 3}}}),
    sample({"a": {"device": {"weights": 10, "kv": 0}}}),
)


def test_the_peak_of_all_workers_is_that_of_their_sum_at_one_time() -> None:
    found = {(use.tier, use.owner): (use.mean_bytes, use.peak_bytes) for use in memory_use(SAMPLES)}
    assert found == {("device", "weights"): (10.0, 10), ("device", "kv"): (6.0, 10), ("host", "kv"): (1.0, 3)}


def test_a_worker_that_was_gone_had_nothing_then() -> None:
    found = {
        (use.worker, use.tier, use.owner): (use.mean_bytes, use.peak_bytes) for use in memory_use_by_worker(SAMPLES)
    }
    assert found["b", "device", "kv"] == (2.0, 6)
    assert found["b", "host", "kv"] == (1.0, 3)
    assert found["a", "device", "kv"] == (4.0, 8)


def test_samples_that_tell_nothing_of_memory_do_not_count() -> None:
    assert memory_use((*SAMPLES, sample({}))) == memory_use(SAMPLES)
    assert memory_use((sample({}),)) == ()
