"""The workload that settings mean, ready to be sent or written; and what it is, in words."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from common.errors import ConfigError
from loadgen.settings import WorkloadSettings
from loadgen.traces.change import Change, changed
from loadgen.traces.files import read_trace
from loadgen.traces.replay import Replay
from loadgen.traces.trace import Trace
from loadgen.workload.cancels import WithCancels
from loadgen.workload.content import ContentSource, CountTokens, count_words
from loadgen.workload.context import Cuts, WithinContext
from loadgen.workload.datasets import DATASETS, Origin, complete
from loadgen.workload.mix import Mix, Part
from loadgen.workload.options import Options
from loadgen.workload.plan import Content, Conversation, Workload
from loadgen.workload.shapes import SHAPES


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyWorkload:
    """A workload with all that a run must know of it."""

    workload: Workload
    count_tokens: CountTokens
    """Tokens of its contents, as far as they can be known without the server."""
    starts_s: tuple[float, ...] | None = None
    """When each conversation begins, of a trace that says so."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know, one sentence each."""
    within: WithinContext | None = None
    """None: no limit was given."""

    @property
    def n_conversations(self) -> int | None:
        """How many there are; None: as many as are asked for."""
        return self.workload.n_conversations

    def conversation(self, index: int) -> Conversation:
        """Raises IndexError beyond the last."""
        return self.workload.conversation(index)

    def cuts(self, n_conversations: int) -> Cuts | None:
        """What the first ones lose to the context's limit; None: no limit was given."""
        return None if self.within is None else self.within.cuts(n_conversations)


def workload_of(settings: WorkloadSettings, seed: int | str, max_context_tokens: int | None) -> ReadyWorkload:
    """Build it. Another seed, such as f"{seed}/warmup", gives other prompts of the same kind. Raises ConfigError."""
    first_token_id, last_token_id = settings.token_ids_from
    source = ContentSource(kind=settings.content, first_token_id=first_token_id, last_token_id=last_token_id)
    count_tokens: CountTokens = count_words
    starts_s, notes = None, list[str]()
    workload: Workload
    if settings.file is not None:
        trace = changed(read_trace(settings.file, seed), settings.change)
        count_tokens, starts_s, notes = _counter(trace), _starts_s(trace), _notes(trace)
        workload = Replay(trace=trace, source=source, seed=seed)
    elif settings.mix:
        workload = _mix(settings, source, seed)
    else:
        workload = _made_up(settings, source, seed)
    within = None
    if max_context_tokens is not None:
        within = WithinContext(workload=workload, most_tokens=max_context_tokens, count_tokens=count_tokens)
        workload = within
    if settings.cancel_rate:
        workload = WithCancels(workload=workload, seed=seed, rate=settings.cancel_rate)
    return ReadyWorkload(
        workload=workload, count_tokens=count_tokens, starts_s=starts_s, notes=tuple(notes), within=within
    )


def warmup_of(settings: WorkloadSettings, seed: int, max_context_tokens: int | None) -> ReadyWorkload:
    """Requests like those of the run, but none of them: what is sent twice would be found in the cache. Raises ConfigError."""
    if settings.file is not None:  # another seed reads the same file
        settings = replace(
            settings, file=None, dataset="random", options=complete("random", Options()), change=Change()
        )
    return workload_of(settings, f"{seed}/warmup", max_context_tokens)


def _made_up(settings: WorkloadSettings, source: ContentSource, seed: int | str) -> Workload:
    return DATASETS[settings.dataset].build(settings.options, _origin(settings, source, seed))


def _mix(settings: WorkloadSettings, source: ContentSource, seed: int | str) -> Workload:
    parts = tuple(
        Part(
            weight=part.weight,
            label=part.label,
            workload=DATASETS[part.dataset].build(part.options, _origin(settings, source, f"{seed}/part/{place}")),
        )
        for place, part in enumerate(settings.mix)
    )
    try:
        return Mix(seed=seed, parts=parts)
    except ValueError as error:
        raise ConfigError(f"--mix: {error}") from error


def _origin(settings: WorkloadSettings, source: ContentSource, seed: int | str) -> Origin:
    change = settings.change
    return Origin(seed=seed, source=source, scale_isl=change.scale_isl, scale_osl=change.scale_osl)


def _counter(trace: Trace) -> Callable[[Content], int]:
    """Made-up words are one token each; recorded texts are counted as the trace counted them."""
    recorded = any(
        isinstance(content, str)
        for session in trace.sessions
        for content in (session.opening or None, *(request.content for request in session.requests))
    )
    return trace.measure.count_tokens if recorded else count_words


def _starts_s(trace: Trace) -> tuple[float, ...] | None:
    starts_s = [session.requests[0].at_s for session in trace.sessions]
    known = tuple(at_s for at_s in starts_s if at_s is not None)
    return known if len(known) == len(starts_s) else None


def _notes(trace: Trace) -> list[str]:
    left_out = [f"the trace has {count} rows left out: {reason}" for reason, count in trace.left_out.items()]
    return [*trace.notes, *left_out]


def describe(settings: WorkloadSettings) -> str:
    """One line for reports: dataset, shape, and every option with its value."""
    scales = [
        f"{name} {factor:g}"
        for name, factor in (("scale-isl", settings.change.scale_isl), ("scale-osl", settings.change.scale_osl))
        if factor != 1
    ]
    cancels = [f"{settings.cancel_rate:.0%} cancelled"] if settings.cancel_rate else []
    if settings.file is not None:
        change = settings.change
        window = []
        if change.start_s or change.end_s is not None:
            end = "its end" if change.end_s is None else f"{change.end_s:g} s"
            window = [f"from {change.start_s:g} s to {end}"]
        speed = [f"{change.speed:g} times as fast"] if change.speed != 1 else []
        osl = [f"osl {settings.file.output_lengths} where it does not say"] if settings.file.output_lengths else []
        return ", ".join([f"{settings.dataset} trace {settings.file.path}", *window, *speed, *osl, *scales, *cancels])
    if settings.mix:
        return "mix of " + ", ".join([*map(str, settings.mix), *scales, *cancels])
    options = [f"{name.replace('_', '-')} {value}" for name, value in settings.options.given().items()]
    shape = "" if settings.shape is None else f" in the shape of {settings.shape}"
    return f"{settings.dataset}{shape}: {', '.join([*options, *scales, *cancels])}"


def describe_source(settings: WorkloadSettings) -> str | None:
    """Where the shape's figures come from and what was assumed; None: there is no shape."""
    if settings.shape is None:
        return None
    shape = SHAPES[settings.shape]
    return f"{shape.source}. Fit: {shape.fit}"
