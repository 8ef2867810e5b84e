"""`penstock bench trace`: look into a trace, change it, write it in another form, or make one up."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.errors import ConfigError
from loadgen.commands.guarded import OK, guarded
from loadgen.flags.types import Parser, above_zero, not_negative, typed
from loadgen.flags.workload import add_workload_flags, workload_settings
from loadgen.ready_workload import workload_of
from loadgen.traces.change import Change, changed
from loadgen.traces.facts import Lengths, TraceFacts, facts_of
from loadgen.traces.files import FORMATS, TraceFile, format_of, read_trace
from loadgen.traces.make import made_trace
from loadgen.traces.trace import MOONCAKE_BLOCK_TOKENS, PAGE_TOKENS, Trace
from loadgen.traces.write import mooncake_lines, own_lines
from loadgen.workload.lengths import parse_lengths
from loadgen.workload.options import parse_count


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one of the commands. Exit code 0: done; 2: a bad setting or file; --help exits."""
    return guarded("trace", lambda: _trace(parser().parse_args(arguments)))


def _trace(values: argparse.Namespace) -> int:
    values.command(values)
    return OK


def parser() -> Parser:
    """Of the command's flags."""
    made = Parser(
        prog="penstock bench trace",
        description="Look into a trace, change it, write it in another form, or make one up.",
    )
    commands = made.add_subparsers(required=True, metavar="info|convert|scale|make")
    info = commands.add_parser("info", help="counts, rate, lengths, and what a cache could save")
    _add_file(info, "tokens of a block that sharing is judged by, and of each hash id of a Mooncake trace")
    info.set_defaults(command=_info)
    convert = commands.add_parser("convert", help="write it in another form")
    _add_file(convert)
    convert.add_argument(
        "--to",
        choices=("custom", "mooncake"),
        required=True,
        help="form of OUT; custom: our own, which keeps everything",
    )
    own_block = "tokens for each hash id of OUT, of Mooncake traces [as `info` shows for FILE]"
    convert.add_argument("--out-block", type=typed(parse_count(1)), help=own_block)
    convert.add_argument("out", metavar="OUT", help="file to write")
    convert.set_defaults(command=_convert)
    scale = commands.add_parser("scale", help="another speed, other lengths, a part of its time")
    _add_file(scale)
    add = scale.add_argument
    add("--speed", type=above_zero, default=1.0, help="2: twice as fast [1]")
    add("--scale-isl", type=above_zero, default=1.0, help="factor of prompts, blocks and what they share included [1]")
    add("--scale-osl", type=above_zero, default=1.0, help="factor of answers [1]")
    add("--start", type=not_negative, default=0.0, metavar="S", help="from this second on [0]")
    add("--end", type=above_zero, metavar="S", help="up to this second [the end]")
    add("out", metavar="OUT", help="file to write, in our own form (custom)")
    scale.set_defaults(command=_scale)
    make = commands.add_parser(
        "make",
        help="write down a made-up workload",
        description="Write down a made-up workload. To send it: run --dataset custom --dataset-path OUT --replay",
    )
    add = make.add_argument
    add("--num-requests", type=typed(parse_count(1)), default=1000, help="requests, all turns counted [1000]")
    add("--rate", type=above_zero, required=True, help="conversations begun per second, by a Poisson process")
    add("--seed", type=int, default=0, help="equal seeds write equal traces [0]")
    add("--made-block", type=typed(parse_count(1)), default=PAGE_TOKENS, help="tokens that a hash id names [16]")
    add("out", metavar="OUT", help="file to write, in our own form (custom)")
    add_workload_flags(make)
    make.set_defaults(command=_make)
    return made


def _add_file(parser: argparse.ArgumentParser, block: str = "tokens for each hash id of a Mooncake trace") -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="a trace")
    add("--format", choices=FORMATS, help="form of FILE [told by its content]")
    add("--block", type=typed(parse_count(1)), help=f"{block} [512 of a Mooncake trace, or as in FILE, or 16]")
    add("--tokenizer", metavar="PATH", help="counts recorded texts [one token for four characters]")
    add("--osl", type=typed(parse_lengths), help="tokens of answers that a custom or sharegpt FILE does not say")


def _read(values: argparse.Namespace) -> Trace:
    return read_trace(_file(values, values.format, values.block))


def _file(values: argparse.Namespace, name: str | None, block_tokens: int | None) -> TraceFile:
    return TraceFile(
        path=values.file,
        format=name,
        block_tokens=block_tokens,
        tokenizer=values.tokenizer,
        output_lengths=values.osl,
    )


def _info(values: argparse.Namespace) -> None:
    name = values.format or format_of(values.file)
    read_at, judged_at = (values.block, None) if name == "mooncake" else (None, values.block)
    trace = read_trace(_file(values, name, read_at))
    Console().print(_table(values.file, facts_of(trace, judged_at)))


def _convert(values: argparse.Namespace) -> None:
    if values.out_block is not None and values.to != "mooncake":
        raise ConfigError("--out-block is for --to mooncake; our own form keeps the blocks of FILE")
    trace = _read(values)
    block_tokens = values.out_block or trace.block_tokens
    lines = own_lines(trace) if values.to == "custom" else mooncake_lines(trace, block_tokens)
    _write(values.out, lines, values.file)
    if values.to == "mooncake" and block_tokens != MOONCAKE_BLOCK_TOKENS:
        print(f"{values.out}: a hash id names {block_tokens} tokens; whoever reads it needs --block {block_tokens}")


def _scale(values: argparse.Namespace) -> None:
    if values.end is not None and values.end <= values.start:
        raise ConfigError(f"--end={values.end:g} must be after --start={values.start:g}")
    change = Change(
        speed=values.speed,
        scale_isl=values.scale_isl,
        scale_osl=values.scale_osl,
        start_s=values.start,
        end_s=values.end,
    )
    _write(values.out, own_lines(changed(_read(values), change)), values.file)


def _make(values: argparse.Namespace) -> None:
    settings = workload_settings(values)
    if settings.dataset in FORMATS:
        raise ConfigError(f"--dataset {settings.dataset} is a trace already: use `trace scale` or `trace convert`")
    workload = workload_of(settings, values.seed, None)
    trace = made_trace(workload, values.num_requests, values.rate, values.made_block, values.seed)
    _write(values.out, own_lines(trace), None)


def _write(out: str, lines: Iterable[bytes], source: str | None) -> None:
    """All lines or nothing: a file that looks whole is whole."""
    if source is not None and Path(out).exists() and Path(out).samefile(source):
        raise ConfigError(f"{out}: is the trace that is read; name another file")
    part = Path(f"{out}.part")
    try:
        with part.open("wb") as file:
            for line in lines:
                file.write(line + b"\n")
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _table(name: str, facts: TraceFacts) -> Table:
    table = Table(title=name, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = [
        ("Format", facts.format),
        ("Requests", f"{facts.requests:,}"),
        ("Sessions", f"{facts.sessions:,}"),
        *_times(facts),
        ("ISL mean / p50 / p90 / max", _lengths(facts.input)),
        ("OSL mean / p50 / p90 / max", _lengths(facts.output)),
        (
            f"Ideal hit share, blocks of {facts.block_tokens}",
            "not said" if facts.ideal_hit_share is None else f"{facts.ideal_hit_share:.1%}",
        ),
        (
            "The same, of prompt tokens",
            "not said" if facts.ideal_token_share is None else f"{facts.ideal_token_share:.1%}",
        ),
        *((f"Left out: {reason}", f"{count:,}") for reason, count in facts.left_out.items()),
    ]
    for what, value in rows:
        table.add_row(what, value)
    table.caption = "\n".join(facts.notes) or None
    return table


def _times(facts: TraceFacts) -> list[tuple[str, str]]:
    if facts.span_s is None:
        return [("Span (s)", "no times"), ("Mean rate (req/s)", "-")]
    span = f"{facts.span_s:,.1f}"
    rate = "-" if facts.requests_per_s is None else f"{facts.requests_per_s:,.3f}"
    if facts.follows_answers:
        return [("Span (s), plus waits for answers", span), ("Mean rate (req/s), at most", rate)]
    return [("Span (s)", span), ("Mean rate (req/s)", rate)]


def _lengths(lengths: Lengths) -> str:
    return (
        f"{lengths.mean_tokens:,.0f} / {lengths.p50_tokens:,.0f} / {lengths.p90_tokens:,.0f} / {lengths.most_tokens:,}"
    )
