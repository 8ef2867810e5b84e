"""One measured run: settings in, Result out. Finds out about the server, warms it up, drives it, watches it, sums up."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean

from common.errors import ConfigError
from loadgen.drive.bodies import BodyForm
from loadgen.drive.connection import parse_server
from loadgen.drive.job import Driven, Job
from loadgen.drive.processes import drive
from loadgen.host import host_facts
from loadgen.output.progress import LiveProgress
from loadgen.ready_workload import ReadyWorkload, describe, describe_source, warmup_of, workload_of
from loadgen.results.health import generator_health
from loadgen.results.metrics import summarize
from loadgen.results.records import RequestRecord
from loadgen.results.result import Result, RunFacts
from loadgen.results.window import mark_measured
from loadgen.schedule.load import Load
from loadgen.server.api import ServerApi
from loadgen.server.models import choose_model
from loadgen.server.probe import probe
from loadgen.server.watch import Watch
from loadgen.settings import RunSettings, Target, shown
from loadgen.stats.intervals import intervals
from loadgen.stats.saturation import judge

_WARMUP_CONCURRENCY = 4
_WAITED_SHARE = 0.05
_TEMPLATE_TOKENS = 256
_EVERY_S, _NEVER_S = 1.0, 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the person asked for, for the record."""

    url: str
    command: Sequence[str]
    """As typed, secrets replaced."""
    title: str = ""
    """Shown beside the progress; names a run among several."""


async def measure(settings: RunSettings, asked: Asked) -> Result:
    """Run once against the server at `asked.url`. Raises ConfigError."""
    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    target, output = settings.target, settings.output
    async with ServerApi(asked.url, _headers(target)) as api:
        model = await choose_model(api, asked.url, target.model)
        probed = await probe(api, model)
        room_tokens = _room_tokens(probed.context_tokens, target)
        workload = workload_of(settings.workload, seed, room_tokens)
        job = Job(
            server=parse_server(asked.url),
            headers={**({"x-penstock-explain": "1"} if probed.is_penstock else {}), **_headers(target)},
            timeout_s=target.timeout_s,
            form=_form(target, model),
            workload=workload.workload,
            load=settings.load,
            seed=seed,
            run_id=f"bench-{seed:x}-{secrets.token_hex(3)}",
            with_sessions=target.session_ids,
            starts_s=workload.starts_s,
        )
        watched = probed if output.watch or output.leak_check else replace(probed, source=None, told="not asked")
        async with Watch(api, watched, every_s=_EVERY_S if output.watch else _NEVER_S) as watch:
            await _warm_up(job, settings, room_tokens)
            driven, start_s = await _drive(job, settings, asked.title)
            view = await watch.finish(start_s, leak_check=output.leak_check, deadline_s=output.leak_wait_s)
    records = _counted(driven, settings)
    return Result(
        _facts(settings, asked, job, driven, workload),
        summarize(records, output.goodput, output.percentiles),
        generator_health(records, driven.gap_s, driven.cpu_s, driven.wall_s),
        records,
        view if output.watch else replace(view, samples=()),
        judge(records) if settings.load.concurrency is None else None,
        intervals(records, output.goodput),
    )


def _headers(target: Target) -> dict[str, str]:
    """Headers that every request carries."""
    bearer = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    return {**bearer, **target.header}


def _form(target: Target, model: str) -> BodyForm:
    return BodyForm(
        endpoint=target.endpoint,
        model=model,
        ignore_eos=target.ignore_eos,
        token_ids=target.return_token_ids,
        extra=target.extra_body,
    )


def _room_tokens(context_tokens: int | None, target: Target) -> int | None:
    """Tokens that prompt and answer may have; a chat template adds some that nobody here can count."""
    if context_tokens is None or target.endpoint != "chat":
        return context_tokens
    return max(1, context_tokens - min(_TEMPLATE_TOKENS, context_tokens // 8))


async def _warm_up(job: Job, settings: RunSettings, context_tokens: int | None) -> None:
    n_requests = settings.warmup
    if not isinstance(n_requests, int) or n_requests == 0:
        return
    concurrency = settings.load.concurrency or _WARMUP_CONCURRENCY
    warmup = replace(
        job,
        workload=warmup_of(settings.workload, job.seed, context_tokens).workload,
        load=Load(concurrency=min(concurrency, n_requests), n_requests=n_requests),
        run_id=f"warmup-{secrets.token_hex(6)}",
    )
    with LiveProgress("warm-up", n_requests, shown=not settings.output.quiet) as progress:
        driven, _ = await drive(warmup, 1, progress.advance)
    if driven.interrupted:
        raise asyncio.CancelledError
    failed = [record for record in driven.records if record.outcome.failed]
    if failed and len(failed) == len(driven.records):
        raise ConfigError(f"every warm-up request failed: {failed[0].outcome}: {failed[0].detail}")


async def _drive(job: Job, settings: RunSettings, title: str) -> tuple[Driven, float]:
    with LiveProgress(title or "requests", settings.load.n_requests, shown=not settings.output.quiet) as progress:
        driven, start_s = await drive(job, settings.workers, progress.advance)
    if not driven.records:
        raise ConfigError("nothing was sent: --duration ended before the first arrival")
    return driven, start_s


def _counted(driven: Driven, settings: RunSettings) -> list[RequestRecord]:
    """All records, those outside the measured window marked. Raises ConfigError if none is inside."""
    warmup_s = settings.warmup if isinstance(settings.warmup, float) else 0.0
    records = mark_measured(driven.records, warmup_s, settings.cooldown_s)
    if not any(record.measured for record in records):
        raise ConfigError("--warmup and --cooldown leave no request that counts: run longer")
    return records


def _facts(settings: RunSettings, asked: Asked, job: Job, driven: Driven, workload: ReadyWorkload) -> RunFacts:
    load = settings.load
    open_loop = load.curve is not None
    return RunFacts(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=tuple(asked.command),
        url=asked.url,
        endpoint=settings.target.endpoint,
        model=job.form.model,
        num_prompts=len(driven.records),
        request_rate=load.rate_per_s,
        arrival=load.arrival if open_loop else None,
        burstiness=load.burstiness if open_loop else None,
        max_concurrency=load.max_concurrency or load.concurrency,
        seed=job.seed,
        settings=shown(settings),
        host=host_facts(),
        workload=describe(settings.workload),
        workload_source=describe_source(settings.workload) or "",
        interrupted=driven.interrupted,
        notes=(*_lengths_notes(settings, driven), *_notes(driven, workload)),
    )


def _lengths_notes(settings: RunSettings, driven: Driven) -> list[str]:
    """Where numbers of requests or tokens are not those that were asked for."""
    notes, asked = list[str](), settings.load.n_requests
    if driven.interrupted:
        return ["interrupted: this is the part of the run that had ended by then"]
    found = len(driven.records) + driven.turns_not_sent
    if asked is not None and settings.workload.file is not None and found < asked:
        notes.append(f"the file has {found} requests, --num-requests asked for {asked}")
    counted = [record.input_tokens for record in driven.records if record.input_tokens is not None]
    if settings.workload.content == "words" and settings.workload.file is None and counted:
        notes.append(
            f"lengths of text prompts are words, one for each token that was asked for: the server's tokenizer made "
            f"{fmean(counted):.0f} tokens of a prompt in the mean; compare with runs of the same --prompts only"
        )
    return notes


def _notes(driven: Driven, workload: ReadyWorkload) -> tuple[str, ...]:
    """What of the plan was not sent as planned."""
    notes = list(workload.notes)
    cuts = workload.cuts(max(record.conversation for record in driven.records) + 1)
    if cuts is not None and (cuts.cut_conversations or cuts.trimmed_conversations):
        notes.append(str(cuts))
    if driven.answers_replaced:
        notes.append(
            f"{driven.answers_replaced} answers went into later prompts as random tokens: the server tells no token ids, "
            "so it cannot have cached what it is sent; --endpoint chat sends its own text back"
        )
    if driven.turns_not_sent:
        notes.append(
            f"{driven.turns_not_sent} requests of the plan were not sent: --duration was over, or a turn before them "
            "failed or was left"
        )
    waits_s = [record.waited_s for record in driven.records if record.waited_s > 0]
    if len(waits_s) > _WAITED_SHARE * len(driven.records):
        notes.append(
            f"{len(waits_s)} of {len(driven.records)} requests arrived before the answer that they follow, and waited "
            f"{fmean(waits_s):.2f} s for it in the mean, {max(waits_s):.2f} s at most: the rate was offered where a "
            "conversation was free; more --live spreads it"
        )
    return tuple(notes)
