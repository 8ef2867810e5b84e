"""`penstock doctor`: is this machine fit for Penstock, and how is the system that runs?"""

import os
from collections.abc import Sequence

import httpx

from common.settings import load
from services.launcher import checks
from services.launcher.api import GatewayApi
from services.launcher.checks import Finding, Level
from services.launcher.readiness import peer_name
from services.launcher.settings import DoctorSettings


def main(argv: Sequence[str]) -> int:
    """Print a line per finding; exit code 1 if one keeps the system from running. Raises ConfigError."""
    settings = load(DoctorSettings, argv, os.environ)
    findings = machine(settings) + (running(settings.url, settings.api_key) if settings.url is not None else [])
    for finding in findings:
        print(line(finding))
    return 1 if checks.worst(findings) is Level.FAIL else 0


def line(finding: Finding) -> str:
    """One finding for the terminal, with what to change after an arrow."""
    advice = f"  -> {finding.advice}" if finding.advice else ""
    return f"{finding.level.value:<4}  {finding.subject:<10}  {finding.text}{advice}"


def machine(settings: DoctorSettings) -> list[Finding]:
    """Findings about this machine."""
    findings = [
        checks.check_python(),
        *checks.check_packages(),
        checks.check_cores(),
        checks.check_memory(
            settings.device_memory,
            settings.host_memory_bytes,
            checks.available_bytes(),
            on_host=settings.device == "cpu",
        ),
        checks.check_shared_memory(),
        checks.check_open_files(),
        checks.check_redis(settings.redis),
        checks.check_device(settings.device),
    ]
    if settings.disk is not None:
        findings.append(checks.check_disk(settings.disk, settings.disk_size_bytes))
    if settings.url is None:
        findings.append(checks.check_port(settings.host, settings.port))
    return findings


def running(url: str, api_key: str | None) -> list[Finding]:
    """Findings about the system behind a gateway."""
    api = GatewayApi(url, api_key)
    try:
        status = api.status()
        why = None if api.is_ready() else api.why_not_ready()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return [Finding(Level.FAIL, "gateway", f"{url} does not answer: {error}", "start it, or correct --url")]
    finally:
        api.close()
    findings = [Finding(Level.OK, "gateway", f"{url} is ready")]
    if why is not None:
        findings = [
            Finding(Level.FAIL, "gateway", f"{url} is not ready: {why}", "see the workers below and their logs")
        ]
    for worker in status["workers"]:
        fine = worker["state"] == "ready"
        text = f"{worker['id']} is {worker['state']}" + (f": {worker['reason']}" if worker["reason"] else "")
        findings.append(Finding(Level.OK if fine else Level.WARN, "worker", text))
        findings += [_link(worker["id"], link) for link in worker["transports"] if worker["role"] == "prefill"]
    return findings


def _link(name: str, link: dict[str, object]) -> Finding:
    text = f"{name} -> {peer_name(str(link['peer']))}: {link['kind']}, {link['gib_per_s']:.1f} GiB/s when probed"
    if not link["reason"]:
        return Finding(Level.OK, "transport", text)
    return Finding(Level.WARN, "transport", text, f"not the fastest: {link['reason']}")
