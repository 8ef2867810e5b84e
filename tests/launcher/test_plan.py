"""Which processes a system has, and that each would be started with flags that its program takes."""

from dataclasses import replace

import pytest

from common.errors import ConfigError
from common.policy.routing_rules import RULES
from common.settings import load
from common.units import MemoryShare
from services.launcher.cli import find
from services.launcher.commands import named
from services.launcher.plan import Site, compute_threads, http_url, memory_plan, plan_processes
from services.launcher.settings import ROUTING_RULES, UpSettings

SITE = Site(program=("penstock",), model="/m", redis="redis://r:1/0", run_dir="/r", cores=8)


def test_every_planned_process_parses_with_its_own_settings() -> None:
    settings = UpSettings(prefill=2, decode=3, mixed=1, gateways=2, api_key="secret", served_model_name="n")
    plans = plan_processes(settings, SITE)
    assert [plan.name for plan in plans] == [
        *("kvstore-0", "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "mixed-0"),
        *("gateway-0", "gateway-1"),
    ]
    for plan in plans:
        command = find(plan.argv[1:])
        assert command is not None and command.settings is not None
        own = {name: text for name, text in plan.environ.items() if name.startswith("PENSTOCK_")}
        loaded = load(named(command.settings), plan.argv[2:], own)
        assert loaded.id == plan.name
        assert loaded.redis == SITE.redis


def loaded(settings: UpSettings, name: str) -> object:
    """The settings that the process of that name would have."""
    plan = next(plan for plan in plan_processes(settings, SITE) if plan.name == name)
    command = find(plan.argv[1:])
    assert command is not None and command.settings is not None
    return load(named(command.settings), plan.argv[2:], {})


def test_what_is_said_of_caching_reaches_every_worker() -> None:
    settings = UpSettings(
        caching=1, transfer="request", eviction="cost-aware", spill="selective", on_load_failure="fail", mixed=1
    )
    for name in ("prefill-0", "decode-0", "mixed-0"):
        found = loaded(settings, name)
        for field in ("caching", "transfer", "eviction", "spill", "on_load_failure"):
            assert getattr(found, field) == getattr(settings, field), f"{name}: {field}"
        assert found.kvstore == "auto"


def test_every_worker_starts_from_the_cost_profile_that_was_named() -> None:
    for name in ("prefill-0", "decode-0", "mixed-0"):
        assert loaded(UpSettings(cost_profile="/p.json", mixed=1), name).cost_profile == "/p.json"
        assert loaded(UpSettings(mixed=1), name).cost_profile is None


def test_the_kv_store_gets_its_tiers_and_the_folder_of_the_sockets() -> None:
    store = loaded(UpSettings(host_memory_bytes=2**30, disk="/d", disk_size_bytes=2**31, eviction="lru"), "kvstore-0")
    fields = ("host_memory_bytes", "disk", "disk_size_bytes", "eviction", "run_dir")
    assert [getattr(store, field) for field in fields] == [2**30, "/d", 2**31, "lru", SITE.run_dir]
    assert loaded(UpSettings(), "kvstore-0").disk is None


def test_without_host_memory_there_is_no_kv_store_and_nobody_looks_for_one() -> None:
    settings = UpSettings(host_memory_bytes=0)
    assert [plan.role for plan in plan_processes(settings, SITE)] == ["prefill", "decode", "gateway"]
    assert loaded(settings, "decode-0").kvstore == "off"


def test_the_memory_plan_adds_up_what_is_taken() -> None:
    settings = UpSettings(device_memory=2**30, host_memory_bytes=2**29, disk="/d", disk_size_bytes=2**31)
    lines = memory_plan(settings).splitlines()
    assert lines[0] == "KV memory: 2 x 1.0 GiB on workers + 512.0 MiB in the KV store = 2.5 GiB"
    assert lines[1] == "KV on disk: up to 2.0 GiB in /d"
    assert lines[2] == "KV reuse: caching 3, transfer auto, eviction lru, spill write-through"
    assert memory_plan(UpSettings(host_memory_bytes=0)).endswith(", no KV store")


def test_gateways_and_workers_get_the_same_time_to_drain() -> None:
    settings = UpSettings(drain_s=7.5, mixed=1)
    drains = [loaded(settings, name).drain_s for name in ("gateway-0", "prefill-0", "decode-0", "mixed-0")]
    assert drains == [7.5] * 4


def test_secrets_never_stand_in_a_command_line() -> None:
    plans = plan_processes(UpSettings(api_key="secret"), SITE)
    assert not [plan for plan in plans if "secret" in " ".join(plan.argv)]
    assert [plan.name for plan in plans if "secret" in plan.environ.values()] == ["gateway-0"]


def test_gateways_listen_on_consecutive_ports() -> None:
    plans = plan_processes(UpSettings(gateways=3, port=9000), SITE)
    assert [plan.url for plan in plans if plan.role == "gateway"] == [
        f"http://127.0.0.1:{port}" for port in (9000, 9001, 9002)
    ]


@pytest.mark.parametrize(("workers", "cores", "threads"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (4, 2, 1)])
def test_workers_share_the_cores_without_oversubscribing(workers: int, cores: int, threads: int) -> None:
    settings = UpSettings(prefill=0, decode=0, mixed=workers)
    assert compute_threads(settings, cores) == threads
    plan = plan_processes(settings, replace(SITE, cores=cores))[1]
    assert plan.environ["OMP_NUM_THREADS"] == str(threads)
    assert plan.argv[plan.argv.index("--threads") + 1] == str(threads)


def test_threads_that_the_operator_gives_win() -> None:
    assert compute_threads(UpSettings(threads=5), 2) == 5


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1"), ("::1", "http://[::1]:1"), ("h", "http://h:1")],
)
def test_a_wildcard_is_no_address_to_call(host: str, url: str) -> None:
    assert http_url(host, 1) == url


@pytest.mark.parametrize(
    ("flags", "named_setting"),
    [
        (["--prefill", "-1"], "--prefill=-1"),
        (["--prefill", "0"], "--decode=1"),
        (["--prefill", "0", "--decode", "0"], "--mixed"),
        (["--gateways", "0"], "--gateways=0"),
        (["--port", "0"], "--port=0"),
        (["--port", "65535", "--gateways", "2"], "--port=65535"),
        (["--device-memory", "1KiB"], "--device-memory"),
        (["--caching", "4"], "--caching=4"),
        (["--caching", "all"], "0, 1, 2 or 3"),
        (["--eviction", "fifo"], "lru or cost-aware"),
        (["--spill", "never"], "--spill='never'"),
        (["--transfer", "fast"], "--transfer='fast'"),
        (["--on-load-failure", "hope"], "recompute or fail"),
        (["--host-memory", "5"], "--host-memory=5"),
        (["--host-memory", "0", "--disk", "/d"], "--disk=/d"),
        (["--device-memory", "plenty"], "--device-memory='plenty'"),
        (["--threads", "0"], "--threads=0"),
        (["--transport", "pigeon"], "auto or cuda_ipc or shm or tcp"),
        (["--transport", "cuda_ipc"], "use --device cuda"),
    ],
)
def test_impossible_systems_are_refused_by_name(flags: list[str], named_setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(UpSettings, flags, {})
    assert named_setting in str(caught.value)


def test_the_launcher_knows_every_routing_rule() -> None:
    assert set(ROUTING_RULES) == set(RULES)


def test_a_share_of_memory_is_passed_on_as_it_is() -> None:
    settings = UpSettings(device_memory=MemoryShare(37.5), host_memory_bytes=0)
    assert loaded(settings, "decode-0").device_memory == MemoryShare(37.5)
    assert memory_plan(settings).startswith("KV memory: 2 x 37.5% on workers\n")


def test_shares_that_together_exceed_all_there_is_are_refused() -> None:
    with pytest.raises(ValueError, match=r"40% is for each of 3 workers.*give 33% or less"):
        UpSettings(device_memory=MemoryShare(40), mixed=1)


def test_requests_wait_longer_for_a_worker_than_its_restart_takes_unless_told_otherwise() -> None:
    assert loaded(UpSettings(), "gateway-0").retry_wait_s == 30.0
    assert loaded(UpSettings(retry_wait_s=2.0, gateways=2), "gateway-1").retry_wait_s == 2.0


def test_a_wait_that_no_gateway_would_take_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="--retry-wait-s=-1"):
        UpSettings(retry_wait_s=-1.0)
