"""`penstock doctor`: is this machine fit for Penstock, and how is the system that runs?"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any  # Any: JSON

import httpx
import msgspec

from common.net.host import kernel_identity, pid_space
from common.settings import load
from services.launcher import checks, cluster_checks, counter_checks, lost_checks, process_checks
from services.launcher.api import GatewayApi, NoGateway, refusal
from services.launcher.findings import Finding, Level, worst
from services.launcher.redis_checks import RedisFound, check_told, look_at_redis
from services.launcher.settings import DoctorSettings

_DUMP = (
    "kill -USR1 PID makes a gateway, worker, KV store or `penstock up` write its threads' stacks to its log (`up`: its output) "
    "at once, and its `state` (`up` as well at once, others when their loop comes round); "
    "of one that hangs in C code kill -USR2 PID has the stacks still"
)


def main(argv: Sequence[str]) -> int:
    """Print a line per finding; exit code 1 if one keeps the system from running. Raises ConfigError."""
    settings = load(DoctorSettings, argv, os.environ)
    stored = RedisFound([]) if settings.redis is None else look_at_redis(settings.redis, settings.cluster)
    findings = machine(settings) + stored.findings
    if settings.url is not None:
        findings += running(settings.url, settings.api_key, stored)
    print(as_json(findings) if settings.json else "\n".join(line(finding) for finding in findings))
    return 1 if worst(findings) is Level.FAIL else 0


def line(finding: Finding) -> str:
    """One finding for the terminal, with what to change after an arrow."""
    advice = f"  -> {finding.advice}" if finding.advice else ""
    return f"{finding.level.value:<4}  {finding.subject:<10}  {finding.text}{advice}"


def as_json(findings: Sequence[Finding]) -> str:
    """All findings for a machine; `worst` is ok, warn or fail, as the levels are."""
    rows = [{**asdict(finding), "level": finding.level.value.lower()} for finding in findings]
    return msgspec.json.encode({"worst": worst(findings).value.lower(), "findings": rows}).decode()


def machine(settings: DoctorSettings) -> list[Finding]:
    """Findings about this machine; of what a system would take that is to be started, only without --url."""
    findings = [
        checks.check_python(),
        *checks.check_packages(),
        checks.check_cores(),
        checks.check_shared_memory(),
        process_checks.check_shared_folder(),
        *checks.check_peer_access(),
    ]
    if settings.url is None:
        findings += _to_start(settings)
    if settings.disk is not None:
        findings.append(checks.check_disk(settings.disk, settings.disk_size_bytes))
    return findings


def _to_start(settings: DoctorSettings) -> list[Finding]:
    on_host, free_bytes = settings.device == "cpu", checks.available_bytes()
    findings = [
        checks.check_memory(settings.device_memory, settings.host_memory_bytes, free_bytes, on_host=on_host),
        checks.check_device(settings.device),
        checks.check_open_files(),
        checks.check_port(settings.host, settings.port),
    ]
    return findings + ([checks.check_redis_binary()] if settings.redis is None else [])


def running(url: str, api_key: str | None, stored: RedisFound) -> list[Finding]:
    """Findings about the system behind a gateway. `stored`: what its Redis said, if it was asked."""
    api = GatewayApi(url, api_key)
    try:
        status = api.status()
        why = None if api.is_ready() else api.why_not_ready()
    except httpx.HTTPStatusError as error:
        advice = "a key, or another --url" if error.response.status_code < 500 else "see the gateway's log"
        return [Finding(Level.FAIL, "gateway", f"{url} {refusal(error.response)}", advice)]
    except NoGateway as error:
        return [Finding(Level.FAIL, "gateway", str(error), "correct --url: another program listens there")]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return [Finding(Level.FAIL, "gateway", f"{url} does not answer: {error}", "start it, or correct --url")]
    finally:
        api.close()
    findings = [Finding(Level.OK, "gateway", f"{url} is ready")]
    if why is not None:
        findings = [
            Finding(Level.FAIL, "gateway", f"{url} is not ready: {why}", "see the workers below and their logs")
        ]
    return findings + judge(status, stored) + [Finding(Level.OK, "dump", _DUMP)]


def judge(status: Mapping[str, Any], stored: RedisFound) -> list[Finding]:
    """Findings from a gateway's status document, and from what can be seen here of the processes that it names."""
    here = process_checks.Here(
        kernel_identity(), pid_space(), process_checks.machine_bytes(), process_checks.memory_limit_bytes()
    )
    on_gateways_host = status["gateway"].get("host") == here.host
    clocks = {"redis": stored.skew_ms} if stored.skew_ms is not None and on_gateways_host else {}
    return [
        *check_told(status),
        *cluster_checks.check_workers(status),
        *lost_checks.check_lost(status, here),
        *lost_checks.check_prompts(status),
        *counter_checks.check_counters(status),
        *cluster_checks.check_links(status),
        *cluster_checks.check_versions(status),
        *cluster_checks.check_clocks(status, clocks),
        *cluster_checks.check_openness(status),
        *cluster_checks.check_keys(status),
        *cluster_checks.check_gone(status, stored.members),
        *process_checks.check_plans(status, here),
        *process_checks.check_processes(status, here),
    ]
