"""Settings of `penstock bench run`: flags to one frozen dataclass.

The generator is a client, run by hand: it takes flags alone, so that the PENSTOCK_ variables of a server started from
the same shell (its --model is a folder, here it is a name) never change a measurement.
"""

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import ConfigError
from loadgen.flags import types
from loadgen.flags.workload import add_workload_flags, workload_settings
from loadgen.results.metrics import PERCENTILES, Slo, parse_percentiles, samples_needed
from loadgen.schedule.arrivals import LAWS
from loadgen.schedule.curves import RateCurve, Steady, parse_pattern, parse_ramp
from loadgen.schedule.load import Load
from loadgen.settings import Output, RunSettings, Target
from loadgen.stats.assertions import Assertion, parse_all

SECRET_FLAGS = ("--api-key", "--header")
DEFAULT_URL = "http://127.0.0.1:8000"
_SLO_FIELDS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> RunSettings:
    """Settings from flags; the API key may come from OPENAI_API_KEY. Raises ConfigError; --help exits."""
    parser = types.Parser(
        prog="penstock bench run",
        description="Load an OpenAI-compatible server and report latency and throughput as its clients see them.",
        epilog="Exit code: 0 all requests answered and assertions met; 1 some failed, an assertion failed, or the server "
        "leaked; 2 bad settings or no server; 3 the generator was late, and the numbers do not count.",
    )
    add_target_flags(parser)
    add_load_flags(parser)
    add_workload_flags(parser)
    add_output_flags(parser)
    values = parser.parse_args(arguments)
    return run_settings(values, load_settings(values, values.concurrency), environ)


def run_settings(values: argparse.Namespace, load: Load, environ: Mapping[str, str]) -> RunSettings:
    """What the shared flags say, with the load as the command made it. Raises ConfigError."""
    words = values.endpoint == "chat" or values.prompts == "words"
    if values.endpoint == "chat" and values.prompts == "ids":
        raise ConfigError("--prompts=ids needs --endpoint completions: a chat is made of text")
    output = _output(values)
    _check_samples(output.assertions, load.n_requests)
    return RunSettings(
        target=_target(values, environ),
        load=load,
        workload=workload_settings(values, "words" if words else "ids"),
        output=output,
        seed=values.seed,
        warmup=values.warmup,
        cooldown_s=values.cooldown,
        workers=values.workers,
    )


def _check_samples(assertions: Sequence[Assertion], n_requests: int | None) -> None:
    """Raises ConfigError for a percentile that so many requests cannot give: better before the run than after it."""
    for assertion in assertions:
        match = re.fullmatch(r"p([\d.]+)_(ttft|ttst|tpot|e2el)_ms", assertion.name)
        if match and n_requests is not None and n_requests < samples_needed(float(match[1])):
            needed = samples_needed(float(match[1]))
            raise ConfigError(f"--assert {assertion.text!r}: needs {needed} requests, --num-requests={n_requests}")


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """Whom to ask."""
    add = parser.add_argument_group("server").add_argument
    add("--url", help=f"server root [{DEFAULT_URL}]")
    add("--cluster", metavar="2P2D", help="start our own for the run: prefill (P), decode (D), mixed (M) workers")
    add("--cluster-flags", metavar="FLAGS", default="", help='flags of its `penstock up`, such as "--caching 0"')
    add("--baseline", choices=("mixed",), help="with --cluster: measure as many mixed workers too, and compare")
    add("--model", help="model name [the only one that /v1/models lists]")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="[%(default)s]")
    add("--prompts", choices=("ids", "words"), help="completions: made-up prompts as token ids, or as text [ids]")
    add("--api-key", help="bearer token [OPENAI_API_KEY]")
    add("--header", type=types.header, action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    add("--extra-body", type=types.json_object, default={}, metavar="JSON", help="fields added to every body")
    onoff = argparse.BooleanOptionalAction
    add("--ignore-eos", action=onoff, default=True, help="ask for the full length of answers")
    add("--return-token-ids", action=onoff, default=True, help="ask for token ids, to count tokens per chunk")
    add("--session-ids", action=onoff, default=False, help="send x-session-id, for routing by session")
    add("--timeout", type=types.above_zero, default=600.0, help="seconds that one request may take [%(default)s]")


def add_load_flags(parser: argparse.ArgumentParser, *, with_rate: bool = True) -> None:
    """How much load; a sweep sets the rate itself."""
    add = parser.add_argument_group("load").add_argument
    if with_rate:
        add(
            "--rate", type=types.rate, help="open loop: requests per second, whatever becomes of them; inf: all at once"
        )
        add("--ramp", type=types.typed(parse_ramp), metavar="linear:1-10:60", help="a rate that rises or falls")
        add("--rate-pattern", type=types.typed(parse_pattern), metavar="20:5,2:15", help="RATE:SECONDS,... repeated")
        add("--concurrency", type=types.at_least(1), help="closed loop: so many conversations at a time")
        add("--replay", action="store_true", help="open loop at the times of a trace; see --trace-speed")
    add("--arrival", choices=LAWS, default="poisson", help="law of the gaps of an open loop [%(default)s]")
    add("--burstiness", type=types.above_zero, default=1.0, help="gamma shape: < 1 bursty, > 1 regular [%(default)s]")
    add("--max-concurrency", type=types.at_least(1), help="cap on requests in flight of an open loop [none]")
    turns = "a turn follows the answer before it, or every turn has an arrival of its own [%(default)s]"
    add("--turns-by", choices=("answers", "arrivals"), default="answers", help=turns)
    add(
        "--live",
        type=types.at_least(1),
        default=16,
        help="conversations that --turns-by arrivals draws from [%(default)s]",
    )
    add("--num-requests", type=types.at_least(1), help="[200; with --duration or --replay: no limit]")
    add("--duration", type=types.seconds, metavar="SECONDS", help="nothing new is sent after it")
    warmup = "requests before the run (20), or its first seconds (20s), that do not count [%(default)s]"
    add("--warmup", type=types.count_or_seconds, default=0, metavar="N|Ns", help=warmup)
    add(
        "--cooldown",
        type=types.seconds,
        default=0.0,
        metavar="SECONDS",
        help="last seconds of arrivals that do not count",
    )
    add("--workers", type=types.at_least(1), default=1, help="generator processes [%(default)s]")
    add("--seed", type=int, help="equal seeds send equal requests [drawn, so that no prompt is in a cache]")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """What is judged and written."""
    add = parser.add_argument_group("output").add_argument
    targets = "targets such as ttft:500 tpot:50 e2el:8000"
    add("--goodput", nargs="+", action="extend", metavar="NAME:MS", help=targets)
    add(
        "--percentiles",
        type=types.typed(parse_percentiles),
        default=PERCENTILES,
        help="given [50,90,95,99]",
    )
    asserted = 'fail unless it holds, such as "p99_ttft_ms<800"; any number of result.json; may be repeated'
    add("--assert", dest="asserts", action="append", default=[], metavar="TEXT", help=asserted)
    add("--out", metavar="DIR", help="write result.json, requests.jsonl and report.html there")
    add("--label", type=types.label, action="append", default=[], metavar="NAME=VALUE", help="noted in the result")
    onoff = argparse.BooleanOptionalAction
    add("--html", action=onoff, default=True, help="with --out: write the report too")
    add("--csv", action=onoff, default=False, help="with --out: write requests.csv too")
    add("--watch", action=onoff, default=True, help="ask the server once a second for its queues and memory")
    add("--leak-check", action=onoff, default=True, help="compare what the server holds before and after")
    add("--leak-wait", type=types.not_negative, default=10.0, help="seconds that it may take for that [%(default)s]")
    add("--quiet", action="store_true", help="no progress, no table; errors still show")


def load_settings(values: argparse.Namespace, concurrency: int | None) -> Load:
    """The load that the flags ask for. Raises ConfigError."""
    curves = [curve for curve in (_steady(values.rate), values.ramp, values.rate_pattern) if curve is not None]
    if len(curves) > 1:
        raise ConfigError("give one of --rate, --ramp and --rate-pattern")
    return load_of(values, curve=curves[0] if curves else None, concurrency=concurrency, replay=values.replay)


def load_of(values: argparse.Namespace, *, curve: RateCurve | None, concurrency: int | None, replay: bool) -> Load:
    """A load whose rhythm is given and whose rest the flags say. Raises ConfigError."""
    return Load(
        curve=curve,
        concurrency=concurrency,
        replay=replay,
        arrival=values.arrival,
        burstiness=values.burstiness,
        turns_by=values.turns_by,
        live=values.live,
        max_concurrency=values.max_concurrency,
        n_requests=values.num_requests,
        duration_s=values.duration,
    )


def _steady(rate: float | None) -> Steady | None:
    return None if rate is None else Steady(rate)


def _target(values: argparse.Namespace, environ: Mapping[str, str]) -> Target:
    url = values.url or (None if values.cluster else DEFAULT_URL)
    key = values.api_key or environ.get("OPENAI_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("--api-key (or OPENAI_API_KEY): must be printable ASCII")
    return Target(
        url=url,
        cluster=values.cluster,
        cluster_flags=cluster_words(values.cluster_flags),
        baseline=values.baseline is not None,
        model=values.model,
        endpoint=values.endpoint,
        api_key=key,
        header=dict(values.header),
        extra_body=values.extra_body,
        ignore_eos=values.ignore_eos,
        return_token_ids=values.return_token_ids,
        session_ids=values.session_ids,
        timeout_s=values.timeout,
    )


def cluster_words(text: str) -> tuple[str, ...]:
    """Flags as a shell would cut them. Raises ConfigError."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--cluster-flags={text!r}: {error}") from error


def _output(values: argparse.Namespace) -> Output:
    if values.out is None and values.csv:
        raise ConfigError("--csv needs --out: a folder to write to")
    return Output(
        goodput=slo(values.goodput),
        percentiles=values.percentiles,
        assertions=parse_all(values.asserts, with_base=False, percentiles=values.percentiles),
        out=None if values.out is None else Path(values.out),
        html=values.html,
        csv=values.csv,
        labels=dict(values.label),
        watch=values.watch,
        leak_check=values.leak_check,
        leak_wait_s=values.leak_wait,
        quiet=values.quiet,
    )


def slo(texts: Sequence[str] | None) -> Slo | None:
    """The targets of --goodput. Raises ConfigError."""
    if texts is None:
        return None
    targets_s: dict[str, float] = {}
    for text in texts:
        name, _, target_ms = text.partition(":")
        if _SLO_FIELDS.get(name) in targets_s:
            raise ConfigError(f"--goodput {text!r}: {name} has a target already")
        if name not in _SLO_FIELDS:
            raise ConfigError(f"--goodput {text!r}: must be ttft:MS, tpot:MS or e2el:MS")
        try:
            targets_s[_SLO_FIELDS[name]] = types.above_zero(target_ms) / 1e3
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--goodput {text!r}: {error}") from error
    return Slo(**targets_s)
