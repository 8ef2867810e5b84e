"""The Dockerfile copies what exists, builds what compose names, and keeps torch out of the gateway."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def stages() -> dict[str, str]:
    """Stage name -> its instructions, those of the stages it is built from included."""
    found: dict[str, str] = {}
    for block in re.split(r"(?m)^(?=FROM )", TEXT)[1:]:
        head, _, body = block.partition("\n")
        _, source, _, name = head.split()
        found[name] = found.get(source, "") + body
    return found


def test_every_copied_path_exists() -> None:
    for line in TEXT.splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from"):
            for path in words[1:-1]:
                assert (ROOT / path).exists(), f"{path} is copied and is not there"


def test_every_package_of_the_project_is_copied() -> None:
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = set(re.findall(r"COPY (\w+) \./\1", TEXT))
    assert copied == packages


def test_the_targets_that_compose_builds_exist() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    assert {service["build"]["target"] for service in services if "build" in service} <= set(stages())


def test_whatever_compose_mounts_belongs_to_the_user_of_the_image() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    mounted = {volume.split(":")[1] for service in services for volume in service.get("volumes", [])}
    owned = re.findall(r"chown penstock:penstock (.*)", TEXT)[0].split()
    assert mounted <= set(owned)


def test_only_the_worker_image_gets_torch() -> None:
    assert "torch" not in stages()["gateway"]
    assert 'ARG EXTRAS="worker"' in stages()["worker"] and ".[${EXTRAS}]" in stages()["worker"]
    assert "EXTRAS" not in stages()["gateway"]
    assert not any(line.startswith(("torch", "safetensors")) for line in PROJECT["project"]["dependencies"])


def test_no_image_runs_as_root() -> None:
    for name in ("gateway", "worker"):
        assert "USER penstock" in stages()[name]


def test_installs_stay_within_the_tested_versions() -> None:
    for line in TEXT.splitlines():
        if "pip install" in line and not line.lstrip().startswith("#"):
            assert "-c requirements.lock" in line
