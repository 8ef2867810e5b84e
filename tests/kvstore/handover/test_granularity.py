"""What is posted when, in each granularity, and in which pieces."""

import pytest

from common.ids import Incarnation, TransferId
from common.messages.actions import Send
from common.messages.handover import Abort, Commit, Grant, HandOver, KvSent, KvSpan, Stop
from common.policy.transfer import Granularity
from kvstore.handover.actions import GaveUp, Granted, HandedOver, PostCopy, Release, SenderAction
from kvstore.handover.outgoing import FirstToken, Way
from kvstore.handover.sender import Sender
from tests.kvstore.handover.world import D, request

T, EPOCH, FIRST = TransferId("t"), Incarnation(7), FirstToken(token=3)
GRANT = Grant(transfer=T, epoch=EPOCH, first_block=1, pages=((10, 11), (20, 21), (30, 31)), lease_ms=30_000)
NOTHING = Grant(transfer=T, epoch=EPOCH, first_block=3, pages=((), (), ()), lease_ms=30_000)
CHUNKS = [KvSpan(layer, low, n_blocks) for low, n_blocks in ((0, 2), (2, 1)) for layer in range(3)]
ALL = KvSpan(0, 1, 2, 3)
LATE = [Granularity.REQUEST, Granularity.AGGREGATED]


def asking(mode: Granularity, transport: str = "shm", max_copy_pages: int = 100) -> Sender:
    core = Sender(3, max_copy_pages=max_copy_pages)
    core.ask(D, request(T, transport), 3, 0.0, 50_000.0, Way(mode))
    return core


def computed(core: Sender) -> list[SenderAction]:
    return [action for span in CHUNKS for action in core.computed(T, span)]


def posts(actions: list[SenderAction]) -> list[PostCopy]:
    return [action for action in actions if isinstance(action, PostCopy)]


def wanted(mode: Granularity) -> list[PostCopy]:
    if mode is Granularity.AGGREGATED:
        return [PostCopy(T, D, ALL, (10, 20, 30, 11, 21, 31))]
    return [PostCopy(T, D, KvSpan(layer, 1, 2), GRANT.pages[layer]) for layer in range(3)]


@pytest.mark.parametrize("granted_first", [True, False])
@pytest.mark.parametrize("mode", LATE)
def test_nothing_is_posted_before_the_prompt_is_computed_and_then_all(mode: Granularity, granted_first: bool) -> None:
    core = asking(mode)
    if granted_first:
        assert core.on_message(D, GRANT, 1.0) == [Granted(T, 1)]
        assert computed(core) == []
        posted = core.finished(T, FIRST, 2.0)
    else:
        assert computed(core) == []
        assert core.finished(T, FIRST, 1.0) == []
        granted, *posted = core.on_message(D, GRANT, 2.0)
        assert granted == Granted(T, 1)
    assert posted == wanted(mode)
    *others, last = posts(posted)
    for post in others:
        assert core.copied(T, post.span, 3.0) == [Send(D, KvSent(transfer=T, epoch=EPOCH, spans=(post.span,)))]
    sent, handover = core.copied(T, last.span, 3.0)
    assert sent == Send(D, KvSent(transfer=T, epoch=EPOCH, spans=(last.span,)))
    assert isinstance(handover, Send)
    assert isinstance(handover.message, HandOver)
    assert core.on_message(D, Commit(transfer=T), 4.0) == [HandedOver(T), Release(T)]
    assert core.open_transfers == []


@pytest.mark.parametrize("granted_first", [True, False])
@pytest.mark.parametrize("mode", list(Granularity))
def test_where_everything_is_there_already_nothing_is_copied(mode: Granularity, granted_first: bool) -> None:
    core, actions = asking(mode), list[SenderAction]()
    for event in ("grant", "finish") if granted_first else ("finish", "grant"):
        if event == "grant":
            actions += core.on_message(D, NOTHING, 1.0)
        else:
            actions += [*computed(core), *core.finished(T, FIRST, 1.0)]
    granted, handover = actions
    assert granted == Granted(T, 3)
    assert isinstance(handover, Send)
    assert isinstance(handover.message, HandOver)


def test_cached_blocks_of_all_layers_go_at_once_by_layer() -> None:
    core = asking(Granularity.LAYER)
    core.on_message(D, GRANT, 1.0)
    assert core.computed(T, KvSpan(0, 0, 2, 3)) == [PostCopy(T, D, KvSpan(0, 1, 1, 3), (10, 20, 30))]
    assert core.computed(T, KvSpan(1, 2, 1)) == [PostCopy(T, D, KvSpan(1, 2, 1), (21,))]


@pytest.mark.parametrize("granted_first", [True, False])
def test_what_is_computed_again_is_copied_again_and_the_hand_over_waits_for_it(granted_first: bool) -> None:
    core, span = asking(Granularity.LAYER), KvSpan(0, 1, 2, 3)
    if granted_first:
        core.on_message(D, GRANT, 1.0)
        assert len(posts(core.computed(T, span))) == 1
        core.copied(T, span, 2.0)
        assert posts(core.computed(T, span)) == wanted(Granularity.AGGREGATED)
    else:
        assert core.computed(T, span) == core.computed(T, span) == []
        assert posts(core.on_message(D, GRANT, 1.0)) == wanted(Granularity.AGGREGATED), "once: it lies there anew"
    assert core.finished(T, FIRST, 3.0) == []
    assert isinstance(core.copied(T, span, 4.0)[-1], Send)


@pytest.mark.parametrize("mode", LATE)
def test_what_is_computed_again_is_copied_once_after_the_prompt(mode: Granularity) -> None:
    core = asking(mode)
    core.on_message(D, GRANT, 1.0)
    assert computed(core) == computed(core) == []
    assert core.finished(T, FIRST, 2.0) == wanted(mode)


def test_large_spans_go_in_pieces_of_whole_blocks_and_a_few_at_a_time() -> None:
    n_blocks = 40
    pages = tuple(tuple(range(layer * 100, layer * 100 + n_blocks)) for layer in range(3))
    core = Sender(3, max_copy_pages=8)
    core.ask(D, request(T), n_blocks, 0.0, 50_000.0, Way(Granularity.AGGREGATED))
    core.on_message(D, Grant(transfer=T, epoch=EPOCH, first_block=0, pages=pages, lease_ms=30_000), 1.0)
    core.computed(T, KvSpan(0, 0, n_blocks, 3))
    flying, copied = posts(core.finished(T, FIRST, 2.0)), list[PostCopy]()
    while flying:
        assert sum(len(post.target_pages) for post in flying) < 4 * 8 + 8
        copied.append(flying.pop(0))
        assert (copied[-1].span.n_blocks, copied[-1].span.n_layers) == (2, 3)
        core.check()
        flying += posts(core.copied(T, copied[-1].span, 3.0))
    assert [post.span.first_block for post in copied] == list(range(0, n_blocks, 2))
    assert copied[1].target_pages == (2, 102, 202, 3, 103, 203)
    assert core.on_message(D, Commit(transfer=T), 4.0) == [HandedOver(T), Release(T)]


@pytest.mark.parametrize("stopped", [True, False])
def test_a_transfer_that_ends_starts_no_more_of_its_pieces(stopped: bool) -> None:
    core = asking(Granularity.AGGREGATED, max_copy_pages=1)
    core.on_message(D, GRANT, 1.0)
    computed(core)
    flying = posts(core.finished(T, FIRST, 2.0))
    assert len(flying) == 2
    core = asking(Granularity.REQUEST, max_copy_pages=1)
    core.on_message(D, GRANT, 1.0)
    computed(core)
    flying = posts(core.finished(T, FIRST, 2.0))
    assert len(flying) == 4, "two of six wait for their turn"
    if stopped:
        assert isinstance(core.on_message(D, Stop(transfer=T, code="x"), 3.0)[0], GaveUp)
    else:
        assert core.cancel(T, "cancelled", 3.0) == []
    assert [core.copied(T, post.span, 4.0) for post in flying[:-1]] == [[], [], []]
    farewell, release = core.copied(T, flying[-1].span, 4.0)
    assert release == Release(T)
    assert isinstance(farewell, Send)
    assert stopped or farewell.message == Abort(transfer=T, code="cancelled")


@pytest.mark.parametrize("mode", list(Granularity))
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_repeat_announces_or_sends_everything_in_the_pieces_of_its_mode(mode: Granularity, transport: str) -> None:
    core = asking(mode, transport)
    core.on_message(D, GRANT, 1.0)
    actions = [*computed(core), *core.finished(T, FIRST, 2.0)]
    for post in posts(actions):
        core.copied(T, post.span, 3.0)
    repeated = core.on_tick(2_003.0)
    spans = tuple(post.span for post in wanted(mode))
    if transport == "tcp":
        assert posts(repeated) == wanted(mode)
    else:
        assert repeated[0] == Send(D, KvSent(transfer=T, epoch=EPOCH, spans=spans))
        assert posts(repeated) == []


@pytest.mark.parametrize("mode", list(Granularity))
def test_our_own_mistakes_are_errors_in_every_mode(mode: Granularity) -> None:
    core = asking(mode)
    for span in (KvSpan(0, 0, 4), KvSpan(0, 0, 1, 4), KvSpan(2, 0, 1, 2)):
        with pytest.raises(ValueError, match="lies outside"):
            core.computed(T, span)
    core.on_message(D, GRANT, 1.0)
    with pytest.raises(ValueError, match="never computed"):
        core.finished(T, FIRST, 2.0)
    with pytest.raises(ValueError, match="was finished before"):
        core.computed(T, CHUNKS[0])
