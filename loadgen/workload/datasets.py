"""The made-up datasets by name: which options each takes, their defaults, and how it is built from them. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from loadgen.workload import documents
from loadgen.workload.agent import Agent
from loadgen.workload.content import ContentSource
from loadgen.workload.dialogue import Dialogue
from loadgen.workload.documents import Documents
from loadgen.workload.independent import Independent
from loadgen.workload.lengths import Fixed, LengthLaw, LogNormal, Uniform
from loadgen.workload.multi_turn import MultiTurn
from loadgen.workload.options import Options, flag, needed
from loadgen.workload.plan import Workload
from loadgen.workload.shared_prefix import SharedPrefix
from loadgen.workload.think import ExponentialPause, FixedPause, LogNormalPause


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What every made-up workload comes from besides its options."""

    seed: int | str
    source: ContentSource
    scale_isl: float = 1.0
    """Factor of every length that is sent."""
    scale_osl: float = 1.0
    """Factor of every length that is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One kind of made-up workload."""

    summary: str
    defaults: Options
    build: Callable[[Options, Origin], Workload]
    """From options that are complete."""
    optional: tuple[str, ...] = ()
    """Options without a default."""

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the options that mean something here."""
        return (*self.defaults.given(), *self.optional)


def complete(name: str, options: Options) -> Options:
    """`options` with the dataset's defaults. Raises ValueError for options that it does not take or that clash."""
    dataset = DATASETS[name]
    if foreign := [flag(option) for option in options.given() if option not in dataset.takes]:
        allowed = ", ".join(map(flag, dataset.takes))
        raise ValueError(f"{', '.join(foreign)}: means nothing to dataset {name}, which takes {allowed}")
    defaults = dataset.defaults
    if options.prefix_share is not None:
        if options.prefix_len is not None:
            raise ValueError("--prefix-len and --prefix-share: give one of them")
        defaults = replace(defaults, prefix_len=None)
    filled = options.over(defaults)
    if filled.prefix_groups == 0 and name != "multi-turn":
        raise ValueError(f"--prefix-groups=0: dataset {name} needs 1 or more")
    if filled.siblings not in (None, 1) and filled.group_order == "shuffled":
        raise ValueError(f"--siblings={filled.siblings} needs --group-order grouped or together, not shuffled")
    if filled.group_order == "grouped" and filled.zipf:
        raise ValueError(f"--zipf={filled.zipf:g} needs --group-order shuffled or together: grouped visits all alike")
    if name == "multi-turn" and options.prefix_len is None and (options.prefix_groups is not None or options.zipf):
        raise ValueError("--prefix-groups and --zipf need --prefix-len: without it there is no system prompt to share")
    if name == "documents" and filled.group_order not in documents.ORDERS:
        raise ValueError(f"--group-order={filled.group_order}: documents take {' or '.join(documents.ORDERS)}")
    return filled


def _random(options: Options, origin: Origin) -> Workload:
    return Independent(
        seed=origin.seed,
        source=origin.source,
        input_lengths=_sent(options.isl, origin),
        output_lengths=_asked(options, origin),
    )


def _shared_prefix(options: Options, origin: Origin) -> Workload:
    return SharedPrefix(
        seed=origin.seed,
        source=origin.source,
        n_groups=needed(options.prefix_groups, "prefix_groups"),
        question_lengths=_sent(options.isl, origin),
        output_lengths=_asked(options, origin),
        prefix_lengths=None if options.prefix_len is None else _sent(options.prefix_len, origin),
        prefix_share=options.prefix_share or 0.0,
        zipf=needed(options.zipf, "zipf"),
        order=needed(options.group_order, "group_order"),
        siblings=needed(options.siblings, "siblings"),
    )


def _multi_turn(options: Options, origin: Origin) -> Workload:
    return MultiTurn(
        seed=origin.seed,
        dialogue=_dialogue(options, origin, options.isl),
        system_lengths=None if options.prefix_len is None else _sent(options.prefix_len, origin),
        n_systems=needed(options.prefix_groups, "prefix_groups"),
        zipf=needed(options.zipf, "zipf"),
    )


def _agent(options: Options, origin: Origin) -> Workload:
    return Agent(
        seed=origin.seed,
        dialogue=_dialogue(options, origin, options.observation_len),
        tools_lengths=_sent(options.prefix_len, origin),
        n_tool_sets=needed(options.prefix_groups, "prefix_groups"),
        zipf=needed(options.zipf, "zipf"),
    )


def _documents(options: Options, origin: Origin) -> Workload:
    return Documents(
        seed=origin.seed,
        dialogue=_dialogue(options, origin, options.isl),
        document_lengths=_sent(options.prefix_len, origin),
        n_documents=needed(options.prefix_groups, "prefix_groups"),
        share_ratio=needed(options.share_ratio, "share_ratio"),
        order=needed(options.group_order, "group_order"),
    )


def _dialogue(options: Options, origin: Origin, next_lengths: LengthLaw | None) -> Dialogue:
    return Dialogue(
        source=origin.source,
        n_turns=_law(options.turns),
        first_lengths=_sent(options.isl, origin),
        next_lengths=_sent(next_lengths, origin),
        output_lengths=_asked(options, origin),
        pauses=options.think_time or FixedPause(0.0),
    )


def _sent(lengths: LengthLaw | None, origin: Origin) -> LengthLaw:
    law = _law(lengths)
    return law if origin.scale_isl == 1 else law.scaled(origin.scale_isl)


def _asked(options: Options, origin: Origin) -> LengthLaw:
    law = _law(options.osl)
    return law if origin.scale_osl == 1 else law.scaled(origin.scale_osl)


def _law(lengths: LengthLaw | None) -> LengthLaw:
    assert lengths is not None, "complete() fills in every length that the dataset has"
    return lengths


DATASETS: Mapping[str, Dataset] = {
    "random": Dataset(
        summary="requests that share nothing",
        defaults=Options(isl=Fixed(128), osl=Fixed(64)),
        build=_random,
    ),
    "shared-prefix": Dataset(
        summary="groups that begin alike",
        defaults=Options(
            isl=Fixed(128),
            osl=Fixed(64),
            prefix_len=Fixed(1024),
            prefix_groups=16,
            zipf=0.0,
            group_order="shuffled",
            siblings=1,
        ),
        build=_shared_prefix,
        optional=("prefix_share",),
    ),
    "multi-turn": Dataset(
        summary="chats that keep their history",
        defaults=Options(
            isl=Fixed(128),
            osl=Fixed(64),
            prefix_groups=1,
            zipf=0.0,
            turns=Fixed(4),
            think_time=ExponentialPause(1.0),
        ),
        build=_multi_turn,
        optional=("prefix_len",),
    ),
    "agent": Dataset(
        summary="loops of thought, action and observation after a long shared prompt",
        defaults=Options(
            isl=Fixed(32),
            osl=LogNormal(48, 96, 256),
            prefix_len=Fixed(2048),
            prefix_groups=1,
            zipf=0.0,
            turns=Uniform(2, 7),
            think_time=LogNormalPause(0.2, 1.0, 5.0),
            observation_len=LogNormal(96, 192, 512),
        ),
        build=_agent,
    ),
    "documents": Dataset(
        summary="sessions of short questions about long documents",
        defaults=Options(
            isl=Fixed(32),
            osl=Fixed(32),
            prefix_len=Fixed(4096),
            prefix_groups=27,
            group_order="shuffled",
            share_ratio=3,
            turns=Uniform(2, 4),
            think_time=FixedPause(0.0),
        ),
        build=_documents,
    ),
}
