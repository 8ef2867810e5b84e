"""Flags that say what is sent, common to every command that sends or writes a workload.

`add_workload_flags` declares them, `workload_settings` checks them together, `loadgen.ready_workload` builds from them.
No flag is ignored: one that the chosen dataset does not use is refused.
"""

import argparse

from common.errors import ConfigError
from loadgen.flags.types import above_zero, id_range, not_negative, typed
from loadgen.settings import WorkloadSettings
from loadgen.traces.change import Change
from loadgen.traces.files import FORMATS, TEXT_FORMATS, TraceFile, format_of
from loadgen.workload.content import KINDS
from loadgen.workload.datasets import DATASETS, complete
from loadgen.workload.lengths import ALLOWED
from loadgen.workload.mix_text import ALLOWED as MIX_ALLOWED
from loadgen.workload.mix_text import parse_mix
from loadgen.workload.options import OPTION_NAMES, PARSERS, Options, flag, options_from, parse_share
from loadgen.workload.shapes import SHAPES
from loadgen.workload.think import ALLOWED as THINK_ALLOWED

CHOICES = (*DATASETS, "mix", *FORMATS)
DEFAULT_IDS = (10, 250)
_TRACE_FLAGS = ("trace_speed", "trace_start", "trace_end")

_OPTION_HELP = {
    "isl": f"tokens of a prompt; of shared-prefix, multi-turn, agent and documents: of each question or task: {ALLOWED}",
    "osl": "tokens of an answer, written alike; custom, sharegpt: where the file does not say",
    "prefix_len": "tokens of what is shared: prefix, system prompt, tools, document",
    "prefix_share": "instead of --prefix-len: --isl is the whole prompt, and this share of it is the group's",
    "prefix_groups": "how many prefixes, system prompts, tool sets or documents; multi-turn, 0: one each",
    "zipf": "popularity of the groups: exponent, 0 for all alike",
    "group_order": "shuffled, grouped (all groups in turn) or together (siblings one after the other)",
    "siblings": "requests of a group in a row, under grouped and together",
    "share_ratio": "sessions that read each document",
    "turns": "turns of a conversation, written as a length",
    "think_time": f"pause before each later turn: {THINK_ALLOWED}",
    "observation_len": "tokens that a tool answers with",
}


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags in a group of their own."""
    group = parser.add_argument_group("workload")
    add = group.add_argument
    made_up = "; ".join(f"{name}: {dataset.summary}" for name, dataset in DATASETS.items())
    add(
        "--dataset",
        choices=CHOICES,
        help=f"{made_up}; mix: see --mix; the others are files [the shape's, the file's, or random]",
    )
    add("--shape", choices=tuple(SHAPES), help="a dataset with the lengths of a published data set")
    for name in OPTION_NAMES:
        add(flag(name), type=typed(PARSERS[name]), help=f"{_OPTION_HELP[name]} {_defaults(name)}")
    add("--mix", type=typed(parse_mix), metavar="PARTS", help=f"{MIX_ALLOWED}; names are datasets or shapes")
    add("--dataset-path", metavar="FILE", help="trace or prompts, for " + ", ".join(FORMATS))
    add("--block", type=typed(PARSERS["siblings"]), help="mooncake: tokens for each hash id [512]")
    add("--tokenizer", metavar="PATH", help="custom, sharegpt: counts texts [one token for four characters]")
    add("--trace-speed", type=above_zero, help="files: 2 sends twice as fast [1]")
    add("--trace-start", type=not_negative, metavar="S", help="files: from this second of the trace on [0]")
    add("--trace-end", type=above_zero, metavar="S", help="files: up to this second of the trace [its end]")
    add("--scale-isl", type=above_zero, help="factor of everything sent, to fit a small model [1]")
    add("--scale-osl", type=above_zero, help="factor of every answer's length [1]")
    add("--cancel-rate", type=typed(parse_share), default=0.0, help="share of requests that the client leaves [0]")
    add("--token-ids-from", type=id_range, help="ids that made-up prompts are drawn from [10-250]")


def _defaults(option: str) -> str:
    """The defaults of an option, the datasets that have it named where they differ."""
    values = {name: getattr(dataset.defaults, option) for name, dataset in DATASETS.items() if option in dataset.takes}
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in values.items()}
    texts = dict.fromkeys(map(str, values.values()))
    if len(texts) == 1:
        (only,) = texts
        known = f"[{only}]" if only != "None" else ""
        return known if len(values) == len(DATASETS) else f"{known} ({', '.join(values)})".strip()
    return "[" + "; ".join(f"{name}: {'none' if value is None else value}" for name, value in values.items()) + "]"


def workload_settings(values: argparse.Namespace, content: str = "ids") -> WorkloadSettings:
    """The settings of parsed flags; `content` is `ids` or `words`. Raises ConfigError for flags that do not go together."""
    assert content in KINDS, content
    dataset = _dataset(values)
    is_file = dataset in FORMATS
    _refuse_foreign(values, dataset, is_file)
    end_s, start_s = values.trace_end, values.trace_start or 0.0
    if end_s is not None and end_s <= start_s:
        raise ConfigError(f"--trace-end={end_s:g} must be after --trace-start={start_s:g}")
    options = Options()
    if dataset in DATASETS:
        options = options_from({name: getattr(values, name) for name in OPTION_NAMES})
        if values.shape is not None:
            options = _over_shape(options, values.shape)
        try:
            options = complete(dataset, options)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    file = None
    if is_file:
        file = TraceFile(
            path=values.dataset_path,
            format=dataset,
            block_tokens=values.block,
            tokenizer=values.tokenizer,
            output_lengths=values.osl,
        )
        options = Options(osl=values.osl)
    return WorkloadSettings(
        dataset=dataset,
        shape=values.shape,
        options=options,
        mix=values.mix or (),
        file=file,
        change=Change(
            speed=values.trace_speed or 1.0,
            scale_isl=values.scale_isl or 1.0,
            scale_osl=values.scale_osl or 1.0,
            start_s=start_s,
            end_s=end_s,
        ),
        cancel_rate=values.cancel_rate,
        token_ids_from=values.token_ids_from or DEFAULT_IDS,
        content=content,
    )


def _over_shape(options: Options, shape: str) -> Options:
    """What was typed, over the shape; of --prefix-len and --prefix-share the one that was typed wins."""
    shaped = SHAPES[shape].parsed().given()
    if options.prefix_len is not None:
        shaped.pop("prefix_share", None)
    if options.prefix_share is not None:
        shaped.pop("prefix_len", None)
    return options.over(options_from(shaped))


def _dataset(values: argparse.Namespace) -> str:
    implied = "mix" if values.mix else SHAPES[values.shape].dataset if values.shape is not None else None
    if values.mix and values.shape is not None:
        raise ConfigError("--shape and --mix: name the shape inside --mix instead")
    told = format_of(values.dataset_path) if values.dataset is None and values.dataset_path and not implied else None
    dataset: str = values.dataset or implied or told or "random"
    if implied is not None and dataset != implied:
        given = "--mix" if values.mix else f"--shape={values.shape}"
        raise ConfigError(f"{given} is of dataset {implied}, not {dataset}")
    if dataset == "mix" and not values.mix:
        raise ConfigError(f"--dataset mix needs --mix: {MIX_ALLOWED}")
    return dataset


def _refuse_foreign(values: argparse.Namespace, dataset: str, is_file: bool) -> None:
    foreign: list[str] = []
    if dataset not in DATASETS:
        foreign += [name for name in OPTION_NAMES if name != "osl" or dataset not in TEXT_FORMATS]
    if not is_file:
        foreign += ["dataset_path", *_TRACE_FLAGS]
    if dataset != "mooncake":
        foreign.append("block")
    if dataset not in TEXT_FORMATS:
        foreign.append("tokenizer")
    if dataset == "sharegpt":
        foreign.append("token_ids_from")
    if given := [flag(name) for name in foreign if getattr(values, name) is not None]:
        raise ConfigError(f"{', '.join(given)}: means nothing to dataset {dataset}")
    if is_file and values.dataset_path is None:
        raise ConfigError(f"--dataset {dataset} needs --dataset-path: the file to read")
