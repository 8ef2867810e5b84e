"""`penstock bench`: settings in; one measured run; table, file and exit code out."""

import asyncio
import os
import platform
import resource
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any  # Any: JSON

import msgspec
import uvloop

from common.errors import ConfigError
from loadgen.commands.options import SECRET_FLAGS, BenchSettings, parse
from loadgen.drive.client import StreamingClient
from loadgen.drive.connection import parse_server
from loadgen.drive.runner import Run
from loadgen.output.progress import ProgressBar
from loadgen.output.report import table, to_json, warnings
from loadgen.results.health import generator_health
from loadgen.results.metrics import summarize
from loadgen.results.result import Result, RunFacts
from loadgen.results.timeline import ServerView
from loadgen.schedule.arrivals import schedule_s
from loadgen.workload.random_prompts import Workload, plan_requests

_WARMUP_CONCURRENCY = 4


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Measure one server. Exit code 0: all answered; 1: some failed; 2: bad settings or no server; 130: interrupted."""
    try:
        settings = parse(arguments, environ)
        _check_writable(settings.out)
        _allow_many_sockets()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(measure(settings, arguments))
        if settings.out is not None:
            Path(settings.out).write_bytes(msgspec.json.format(msgspec.json.encode(to_json(result))))
    except ConfigError as error:
        print(f"penstock bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"penstock bench: --out={settings.out!r}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("penstock bench: interrupted; nothing was reported", file=sys.stderr)
        return 130
    if not settings.quiet:
        print(table(result))
    elif noted := warnings(result):
        print(*(f"warning: {text}" for text in noted), sep="\n", file=sys.stderr)
    return 1 if result.summary.failed else 0


async def measure(settings: BenchSettings, arguments: Sequence[str]) -> Result:
    """Find the model, warm up, send the run's requests and sum up. Raises ConfigError."""
    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    path = "/v1/chat/completions" if settings.endpoint == "chat" else "/v1/completions"
    client = StreamingClient(parse_server(settings.url), path, _headers(settings), settings.timeout)
    try:
        model = await _model(client, settings)
        workload = _workload(settings, model, seed)
        await _warm_up(client, workload, settings)
        requests = plan_requests(workload, settings.num_requests)
        started_cpu_s, started_s = time.process_time(), time.monotonic()
        with ProgressBar("requests", settings.num_requests, shown=not settings.quiet) as bar:
            run_id = f"bench-{seed:x}-{secrets.token_hex(3)}"
            measured = Run(client, run_id, bar.advance)
            if settings.rate is not None:
                times_s = schedule_s(
                    settings.arrival, settings.rate, settings.burstiness, len(requests), Random(f"{seed}/arrivals")
                )
                await measured.open_loop(requests, times_s)
            elif settings.concurrency is not None:
                await measured.closed_loop(requests, settings.concurrency)
        cpu_s, wall_s = time.process_time() - started_cpu_s, time.monotonic() - started_s
    finally:
        client.close()
    return Result(
        _facts(settings, arguments, model, seed),
        summarize(measured.records, settings.goodput),
        generator_health(measured.records, settings.rate, cpu_s, wall_s),
        measured.records,
        ServerView(source="not asked"),
        None,
    )


async def _model(client: StreamingClient, settings: BenchSettings) -> str:
    try:
        offered = await client.models()
    except TimeoutError as error:
        raise ConfigError(f"--url={settings.url!r}: no answer within {settings.timeout:g} s") from error
    except OSError as error:
        raise ConfigError(f"--url={settings.url!r}: no server there: {error}") from error
    except ValueError as error:
        if settings.model is not None:
            return settings.model  # the server does not list its models; the name given must do
        raise ConfigError(f"--url={settings.url!r}: {error}; name the model with --model") from error
    if settings.model is None:
        if len(offered) != 1:
            raise ConfigError(f"--model is required: the server offers {', '.join(offered) or 'no model'}")
        return offered[0]
    if settings.model not in offered:
        raise ConfigError(f"--model={settings.model!r}: the server offers {', '.join(offered) or 'no model'}")
    return settings.model


def _workload(settings: BenchSettings, model: str, seed: int) -> Workload:
    return Workload(
        endpoint=settings.endpoint,
        model=model,
        seed=seed,
        input_lengths=settings.isl,
        output_lengths=settings.osl,
        ignore_eos=settings.ignore_eos,
        token_ids=settings.return_token_ids,
        first_token_id=settings.token_ids_from[0],
        last_token_id=settings.token_ids_from[1],
        cancel_rate=settings.cancel_rate,
        extra_body=settings.extra_body,
    )


async def _warm_up(client: StreamingClient, workload: Workload, settings: BenchSettings) -> None:
    if settings.warmup == 0:
        return
    requests = plan_requests(workload, settings.warmup, "warmup")
    with ProgressBar("warm-up", settings.warmup, shown=not settings.quiet) as bar:
        warmup = Run(client, f"warmup-{secrets.token_hex(6)}", bar.advance)
        await warmup.closed_loop(requests, settings.concurrency or _WARMUP_CONCURRENCY)
    failed = [record for record in warmup.records if record.outcome.failed]
    if len(failed) == len(requests):
        raise ConfigError(f"every warm-up request failed: {failed[0].outcome}: {failed[0].detail}")


def _headers(settings: BenchSettings) -> dict[str, str]:
    bearer = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    return {**bearer, **settings.header}


def _facts(settings: BenchSettings, arguments: Sequence[str], model: str, seed: int) -> RunFacts:
    shown: dict[str, Any] = {name: value for name, value in asdict(settings).items() if name != "api_key"}
    shown["header"] = sorted(settings.header)  # values may be secrets
    open_loop = settings.rate is not None
    return RunFacts(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=("penstock", "bench", *_without_secrets(arguments)),
        url=settings.url,
        endpoint=settings.endpoint,
        model=model,
        num_prompts=settings.num_requests,
        request_rate=settings.rate,
        arrival=settings.arrival if open_loop else None,
        burstiness=settings.burstiness if open_loop else None,
        max_concurrency=settings.concurrency,
        seed=seed,
        settings=shown,
        host={"name": platform.node(), "cores": os.cpu_count(), "python": platform.python_version()},
    )


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    shown: list[str] = []
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if shown and shown[-1] in SECRET_FLAGS:
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if equals and flag in SECRET_FLAGS else argument)
    return shown


def _check_writable(out: str | None) -> None:
    """Find out before the run, not after it, that its result cannot be written. Raises ConfigError."""
    if out is None:
        return
    folder = Path(out).absolute().parent
    if Path(out).is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--out={out!r}: must be a file in an existing folder that can be written to")


def _allow_many_sockets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
