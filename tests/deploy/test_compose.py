"""compose.yaml is valid, and every process that it runs is one that our command line would start."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from common.settings import PREFIX, describe, load
from services.launcher.cli import find
from services.launcher.commands import Command, named
from tests.deploy.compose_schema import COMPOSE

ROOT = Path(__file__).parents[2]
FILE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("penstock")]
RUN_BY_US = [name for name in OURS if "entrypoint" not in SERVICES[name]]
_REFERENCE = re.compile(r"\$\{([A-Z_]+):([-+])([^}]*)\}")


def resolved(value: object, environ: Mapping[str, str] | None = None) -> str:
    """As compose would fill it in, with an empty environment if none is given."""
    given = environ or {}

    def filled(match: re.Match[str]) -> str:
        name, sign, word = match.groups()
        return (word if given.get(name) else "") if sign == "+" else given.get(name) or word

    return _REFERENCE.sub(filled, str(value))


def command_of(service: str) -> Command:
    command = find(SERVICES[service]["command"])
    assert command is not None, f"{SERVICES[service]['command']} is no penstock command"
    return command


def test_the_file_follows_the_specification() -> None:
    jsonschema.Draft202012Validator(COMPOSE).validate(FILE)


def test_a_misspelt_key_would_be_found() -> None:
    wrong = {**FILE, "services": {"x": {"image": "i", "comand": ["x"]}}}
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.Draft202012Validator(COMPOSE).validate(wrong)


@pytest.mark.parametrize("service", RUN_BY_US)
def test_every_service_starts_with_settings_that_its_program_takes(service: str) -> None:
    command = command_of(service)
    assert command.settings is not None
    environ = {name: resolved(value) for name, value in SERVICES[service]["environment"].items()}
    load(named(command.settings), SERVICES[service]["command"][len(command.words) :], environ)


def test_a_variable_that_no_program_knows_would_be_found() -> None:
    environ = {**SERVICES["decode"]["environment"], "PENSTOCK_DEVICE_MEMROY": "1GiB"}
    with pytest.raises(Exception, match="DEVICE_MEMORY"):
        load(named("services.worker.settings:WorkerSettings"), [], environ)


def test_every_variable_that_the_operator_may_set_is_a_setting_or_of_the_file() -> None:
    of_the_file = {"PENSTOCK_PORTS", "TORCH_INDEX_URL", "TORCH_GPU_INDEX_URL"}
    settings = {one.variable for name in RUN_BY_US for one in describe(named(command_of(name).settings or "")).values()}
    used = {match[1] for match in _REFERENCE.finditer((ROOT / "compose.yaml").read_text())}
    assert used <= settings | of_the_file
    assert all(name.startswith((PREFIX, "TORCH_")) for name in used)


def test_the_model_service_runs_the_command_that_makes_models() -> None:
    (script,) = SERVICES["model"]["command"]
    words = script.split("||")[1].split()
    assert words[0] == "penstock"
    command = find(words[1:])
    assert command is not None and command.name == "model make"
    made_in = words[words.index("--out") + 1]
    assert script.startswith(f"test -f {made_in}/config.json")
    assert resolved(SERVICES["decode"]["environment"]["PENSTOCK_MODEL"]) == made_in


def test_every_service_can_be_scaled() -> None:
    for name, service in SERVICES.items():
        assert "container_name" not in service, name
        for port in service.get("ports", []):
            host, _, _ = resolved(port).rpartition(":")
            first, _, last = host.partition("-")
            assert last and int(last) > int(first), f"{name} publishes one port, so a second copy could not start"
        assert "PENSTOCK_ID" not in service.get("environment", {}), f"{name}: every copy would have the same name"


def test_workers_share_the_folder_of_their_sockets() -> None:
    for name in ("prefill", "decode", "mixed", "prefill-gpu", "decode-gpu"):
        folder = SERVICES[name]["environment"]["PENSTOCK_RUN_DIR"]
        assert f"run:{folder}" in SERVICES[name]["volumes"], name


def test_workers_reach_the_memory_of_the_kv_store() -> None:
    store = SERVICES["kvstore"]
    folders = {SERVICES[name]["environment"]["PENSTOCK_RUN_DIR"] for name in ("prefill", "decode", "mixed")}
    assert folders == {store["environment"]["PENSTOCK_RUN_DIR"]}
    assert f"run:{folders.pop()}" in store["volumes"]
    for variable in ("PENSTOCK_MODEL", "PENSTOCK_DTYPE", "PENSTOCK_EVICTION", "PENSTOCK_CLUSTER"):
        assert store["environment"][variable] == SERVICES["decode"]["environment"][variable]


def test_the_disk_tier_is_off_and_its_folder_is_a_volume() -> None:
    environ = SERVICES["kvstore"]["environment"]
    assert resolved(environ["PENSTOCK_DISK"]) == ""
    mounts = [volume.split(":")[1] for volume in SERVICES["kvstore"]["volumes"] if volume.startswith("kv:")]
    (named_in_the_file,) = re.findall(r"PENSTOCK_DISK=(\S+)", (ROOT / "compose.yaml").read_text())
    assert mounts == [named_in_the_file]


def test_one_variable_gives_every_process_the_cluster_key_as_a_secret() -> None:
    ((name, secret),) = FILE["secrets"].items()
    given = {"PENSTOCK_CLUSTER_KEY": "./cluster.key"}
    assert (resolved(secret["file"]), resolved(secret["file"], given)) == ("/dev/null", "./cluster.key")
    for service in RUN_BY_US:
        variable = SERVICES[service]["environment"]["PENSTOCK_CLUSTER_KEY"]
        assert (resolved(variable), resolved(variable, given)) == ("", f"/run/secrets/{name}"), service
        assert SERVICES[service]["secrets"] == [name], service
    strangers = set(SERVICES) - set(RUN_BY_US)
    assert not any(SERVICES[service].get("secrets") for service in strangers), "these need no key"


def test_the_gpu_services_ask_for_a_gpu_and_only_they() -> None:
    for name in OURS:
        asks = "deploy" in SERVICES[name]
        assert asks == name.endswith("-gpu")
        assert (SERVICES[name].get("environment", {}).get("PENSTOCK_DEVICE") == "cuda") == asks
        assert ("gpu" in SERVICES[name].get("profiles", [])) == asks


def test_whoever_is_waited_for_exists_and_can_become_healthy() -> None:
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            assert other in SERVICES, f"{name} waits for {other}"
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other}, which has no health check"


def test_volumes_and_networks_are_declared() -> None:
    for service in SERVICES.values():
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= set(FILE["volumes"])
        assert set(service.get("networks", [])) <= set(FILE["networks"])


def test_a_stopping_container_has_longer_than_its_requests() -> None:
    grace_s = int(SERVICES["gateway"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > describe_default("gateway.settings:GatewaySettings", "drain_s")


def describe_default(settings: str, field: str) -> float:
    return float(describe(named(settings))[field].default_text)
