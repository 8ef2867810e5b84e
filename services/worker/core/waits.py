"""What each request of a worker waits for, and for whom: for the watchdog, and for people. Pure; reads, owns nothing."""

from collections.abc import Callable, Hashable, Mapping

from common.errors import Stuck
from common.ids import RequestId
from kvstore.handover.sender import Sender
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import Action
from services.worker.core.generation import Generation
from services.worker.core.incoming import Incoming
from services.worker.core.local import LocalPrompts
from services.worker.core.overseer import Subject
from services.worker.core.parts import Parts
from services.worker.core.prompt import Prompt
from services.worker.core.reporting import CopyTotals
from services.worker.core.sequence import Sequence
from services.worker.core.watchdog import Wait


def sequence_wait(sequence: Sequence, pool: BlockPool, phase: str, age_ms: float, until_ms: float | None) -> Wait:
    """Of one that the scheduler has. `until_ms`: when its load, if it has one, is given up."""
    loads = sequence.loading is not None
    return Wait(
        request=sequence.request,
        phase=phase,
        age_ms=age_ms,
        pages=int(pool.ledger.page_ids(sequence.owner).size),
        waits_for=_barrier(sequence),
        until_ms=until_ms if loads else None,
        queued=not sequence.has_pages,
        loads=loads,
        over=sequence.dropped,
        in_step=sequence.in_steps > 0,
        progress=(sequence.computed_tokens, len(sequence.tokens), sequence.loading, sequence.ring),
    )


def _barrier(sequence: Sequence) -> str:
    if sequence.loading is not None:
        where = f" from {sequence.found.peer}" if sequence.found is not None else ""
        return f"load {sequence.loading}{where}"
    if sequence.ring is not None:
        return f"layers that leave, call {sequence.ring}"
    if sequence.held:
        return "copies of its pages to a decode worker"
    if not sequence.has_pages:
        return "pages"
    if sequence.in_steps:
        return "the step in flight"
    if sequence.lost:
        return "its next try, since its KV was lost"
    return "a grant, before its layers can leave" if sequence.is_barred else ""


def prompt_wait(prompt: Prompt, parts: Parts, sender: Sender, now_ms: float) -> Wait:
    """Of one on its way through a prefill worker."""
    pool = parts.pool
    request, age_ms = prompt.message.request, now_ms - prompt.arrived_ms
    sequence, decode = prompt.sequence, prompt.decode
    if sequence is None or decode is None:
        for_whom = f"room, or for {prompt.decode_worker} to be connected and to have granted others"
        return Wait(request=request, phase=prompt.phase, age_ms=age_ms, waits_for=for_whom, queued=True)
    if sequence.loading is not None or (prompt.computed_ms is None and not sequence.is_barred):
        until_ms = None if sequence.loading is None else parts.cache.load_until_ms(sequence.loading)
        return sequence_wait(sequence, pool, prompt.phase, age_ms, until_ms)
    assert prompt.transfer is not None, "a prompt that was started has a transfer"
    return Wait(
        request=request,
        phase=prompt.phase,
        age_ms=age_ms,
        pages=int(pool.ledger.page_ids(sequence.owner).size),
        waits_for=f"{decode} to {'grant pages' if prompt.granted_ms is None else 'commit, or copies to it to end'}",
        # a decode worker that answers may be full for as long as the request has time; its silence, death or Stop ends it
        until_ms=prompt.deadline_ms if prompt.granted_ms is None else sender.commit_by_ms_of(prompt.transfer),
        over=prompt.told,
        progress=(sequence.computed_tokens, prompt.computed_ms, prompt.granted_ms, prompt.copied),
    )


def prompts_subject(
    parts: Parts,
    prompts: Mapping[RequestId, Prompt],
    totals: CopyTotals,
    sender: Sender,
    idle: Callable[[], bool],
    end_all: Callable[[list[Prompt], str, str, float], list[Action]],
) -> Subject:
    """A prefill worker, as its watchdog sees it. `end_all`: ends prompts with a code and a text, at a time."""

    def end(request: RequestId, text: str, now_ms: float) -> list[Action]:
        return end_all([prompts[request]], Stuck.code, text, now_ms) if request in prompts else []

    def waits(now_ms: float) -> list[Wait]:
        return [prompt_wait(one, parts, sender, now_ms) for one in prompts.values()]

    def mark() -> Hashable:
        granted = sum(1 for one in prompts.values() if one.granted_ms is not None)
        return granted, totals.handed_over, totals.copied_bytes, sum(totals.copies.values())

    return Subject(idle=idle, waits=waits, end=end, mark=mark)


def answers_subject(
    parts: Parts,
    local: LocalPrompts,
    generation: Generation,
    incoming: Incoming,
    idle: Callable[[], bool],
    end: Callable[[RequestId, str, float], list[Action]],
) -> Subject:
    """A decode or mixed worker, as its watchdog sees it."""

    def waits(now_ms: float) -> list[Wait]:
        found = [*local.waits(now_ms), *incoming.waits(now_ms, parts.watch.held_ms)]
        for one in parts.scheduler.sequences:
            until_ms = None if one.loading is None else parts.cache.load_until_ms(one.loading)
            phase, age_ms = generation.standing(one.request, now_ms)
            found.append(sequence_wait(one, parts.pool, phase, age_ms, until_ms))
        return found

    def mark() -> Hashable:
        return generation.generated_tokens_total, generation.finished_total

    return Subject(idle=idle, waits=waits, end=end, mark=mark, oldest_held_ms=incoming.oldest_quarantined_ms)
