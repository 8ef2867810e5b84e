"""Settings of `penstock bench`: flags to one frozen dataclass.

The generator is a client, run by hand: it takes flags alone, so that the PENSTOCK_ variables of a server started from
the same shell (its --model is a folder, here it is a name) never change a measurement.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn  # Any: JSON that the user gives

import msgspec

from common.errors import ConfigError
from loadgen.results.metrics import Slo
from loadgen.schedule import arrivals
from loadgen.workload.lengths import ALLOWED, LengthLaw, parse_lengths

_SLO_FIELDS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
SECRET_FLAGS = ("--api-key", "--header")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """One field per flag; see `penstock bench --help`."""

    url: str
    model: str | None
    endpoint: str
    rate: float | None
    concurrency: int | None
    arrival: str
    burstiness: float
    num_requests: int
    warmup: int
    isl: LengthLaw
    osl: LengthLaw
    token_ids_from: tuple[int, int]
    seed: int | None
    ignore_eos: bool
    return_token_ids: bool
    cancel_rate: float
    timeout: float
    goodput: Slo | None
    api_key: str | None
    header: Mapping[str, str] = field(repr=False)
    extra_body: Mapping[str, Any]
    out: str | None
    quiet: bool

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other. Raises ConfigError."""
        if (self.rate is None) == (self.concurrency is None):
            raise ConfigError("give --rate (open loop) or --concurrency (closed loop): exactly one of them")
        if self.burstiness != 1.0 and self.arrival != "gamma":
            raise ConfigError(f"--burstiness={self.burstiness:g} needs --arrival gamma, not {self.arrival}")
        if self.concurrency is not None and self.arrival != "poisson":
            raise ConfigError(f"--arrival={self.arrival} needs --rate; a closed loop has no arrivals of its own")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see penstock bench --help")


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> BenchSettings:
    """Settings from flags; the API key may come from OPENAI_API_KEY. Raises ConfigError; --help exits."""
    values = vars(_parser().parse_args(arguments))
    values["header"] = dict(values["header"])
    values["goodput"] = _slo(values["goodput"])
    values["api_key"] = values["api_key"] or environ.get("OPENAI_API_KEY") or None
    return BenchSettings(**values)


def _parser() -> _Parser:
    parser = _Parser(
        prog="penstock bench",
        description="Load an OpenAI-compatible server and report latency and throughput as its clients see them.",
        epilog="Exit code: 0 all requests answered, 1 some failed, 2 bad settings or no server.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server root [%(default)s]")
    add("--model", help="model name [the only one that /v1/models lists]")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="[%(default)s]")
    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--rate", type=_rate, help="open loop: requests per second, sent whatever becomes of them; inf: all at once")
    add("--concurrency", type=_at_least(1), help="closed loop: so many requests at a time")
    add("--arrival", choices=arrivals.LAWS, default="poisson", help="law of the gaps under --rate [%(default)s]")
    add("--burstiness", type=_positive, default=1.0, help="gamma shape: < 1 bursty, > 1 regular [%(default)s]")
    add("--num-requests", type=_at_least(1), default=200, help="requests measured [%(default)s]")
    add("--warmup", type=_at_least(0), default=0, help="requests sent first and not measured [%(default)s]")
    add("--cancel-rate", type=_share, default=0.0, help="share of requests that the client leaves [%(default)s]")
    add("--timeout", type=_positive, default=600.0, help="seconds that one request may take [%(default)s]")
    shape = parser.add_argument_group("requests")
    add = shape.add_argument
    add("--isl", type=_lengths, default=parse_lengths("128"), help=f"prompt tokens: {ALLOWED} [128]")
    add("--osl", type=_lengths, default=parse_lengths("64"), help="answer tokens, written alike [64]")
    add("--seed", type=int, help="equal seeds send equal requests [drawn, so that no prompt is in a cache]")
    add("--token-ids-from", type=_id_range, default=(10, 250), help="ids that prompts are drawn from [10-250]")
    onoff = argparse.BooleanOptionalAction
    add("--ignore-eos", action=onoff, default=True, help="ask for the full --osl")
    add("--return-token-ids", action=onoff, default=True, help="ask for token ids, to count tokens per chunk")
    add("--api-key", help="bearer token [OPENAI_API_KEY]")
    add("--header", type=_header, action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    add("--extra-body", type=_json_object, default={}, metavar="JSON", help="fields added to every body")
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--goodput", nargs="+", metavar="NAME:MS", help="targets such as ttft:500 tpot:50 e2el:8000")
    add("--out", metavar="FILE.json", help="write the result, every request included")
    add("--quiet", action="store_true", help="no progress bar, no table; errors still show")
    return parser


def _rate(text: str) -> float:
    return _number(text, "a number of requests per second above 0, or inf", allow_infinity=True)


def _positive(text: str) -> float:
    return _number(text, "a number above 0", allow_infinity=False)


def _number(text: str, allowed: str, *, allow_infinity: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0 or (math.isinf(value) and not allow_infinity):
        raise argparse.ArgumentTypeError(f"{text!r}: must be {allowed}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be between 0 and 1")
    return value


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, {least} or more")
        return int(text)

    return read


def _lengths(text: str) -> LengthLaw:
    try:
        return parse_lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _id_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be two token ids such as 10-250")
    return int(first), int(last)


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not (name + value).isprintable() or " " in name or not text.isascii():
        raise argparse.ArgumentTypeError("must be name=value in printable ASCII")
    return name.lower(), value


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {error}") from error


def _slo(texts: Sequence[str] | None) -> Slo | None:
    if texts is None:
        return None
    targets_s: dict[str, float] = {}
    for text in texts:
        name, _, target_ms = text.partition(":")
        if name not in _SLO_FIELDS:
            raise ConfigError(f"--goodput {text!r}: must be ttft:MS, tpot:MS or e2el:MS")
        try:
            targets_s[_SLO_FIELDS[name]] = _positive(target_ms) / 1e3
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--goodput {text!r}: {error}") from error
    return Slo(**targets_s)
