"""Which processes a system has, and that each would be started with flags that its program takes."""

from dataclasses import replace

import pytest

from common.errors import ConfigError
from common.settings import load
from services.launcher.cli import find
from services.launcher.commands import named
from services.launcher.plan import Site, compute_threads, http_url, plan_processes
from services.launcher.settings import UpSettings

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
        (["--device-memory", "plenty"], "--device-memory='plenty'"),
        (["--threads", "0"], "--threads=0"),
        (["--transport", "pigeon"], "auto or shm or tcp"),
    ],
)
def test_impossible_systems_are_refused_by_name(flags: list[str], named_setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(UpSettings, flags, {})
    assert named_setting in str(caught.value)
