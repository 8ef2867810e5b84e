"""Laws of the gateway's shell: whatever cannot be sent, everybody is answered, and nothing is nested or lost."""

import asyncio
from dataclasses import dataclass, field

import pytest

from common.errors import ServingError, Stuck
from common.ids import PeerId, RequestId
from common.log import Log
from common.messages.base import Message
from common.messages.requests import AskAbout, Cancel, Generate, TokenDelta
from gateway.core.actions import Deliver, End, Routed
from gateway.core.dispatch import Dispatch
from gateway.core.recovery import RetryTerms
from gateway.inbox import Inbox, Sent
from gateway.switchboard import Switchboard
from tests.gateway.core.builders import dispatch, failed, order, peer, report, tokens

NAMES = ("mixed-0", "mixed-1")


@dataclass
class Wires:
    """An exchange that loses connections when a test says so: whoever is in `deaf` cannot be sent anything."""

    deaf: set[str] = field(default_factory=set)
    sent: list[tuple[PeerId, Message]] = field(default_factory=list)

    def send(self, to: PeerId, message: Message) -> bool:
        if to in self.deaf or (isinstance(message, Generate) and message.request.partition("~")[0] in self.deaf):
            return False
        self.sent.append((to, message))
        return True

    def receive(self, timeout_ms: float) -> list[tuple[PeerId, Message, object]]:
        """Nobody answers by himself."""
        return []


@dataclass
class Watch:
    """A clock that a test moves."""

    ms: float = 0.0

    def now_ms(self) -> float:
        return self.ms


@dataclass
class Gateway:
    core: Dispatch
    wires: Wires = field(default_factory=Wires)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        self.board = Switchboard(
            self.core,
            self.wires,
            self.watch,
            Log(service="gateway"),
            lambda members: None,  # type: ignore[arg-type]
        )

    def tick(self, ms: float) -> None:
        self.watch.ms = ms
        for name in NAMES:
            self.core.on_message(peer(name), report(name), ms)
        self.board._perform(self.core.on_tick(ms))
        self.board.check()


def news(inbox: Inbox) -> list[str]:
    """Kinds of all that has come, as a coroutine would take it, but for times of sending."""
    kept = [one for _, one in inbox._news if not isinstance(one, Sent)]
    return ["error" if isinstance(one, ServingError) else type(one).__name__ for one in kept]


def test_a_request_that_cannot_be_sent_is_answered_also_if_it_wants_to_know_where_it_went() -> None:
    up = Gateway(dispatch(*NAMES))
    up.wires.deaf = {peer(name) for name in NAMES}
    inbox = up.board.submit([order("r", explain=True), order("s", explain=True)])
    assert sorted(news(inbox)) == sorted([Routed.__name__, "error"] * 2)
    assert news(inbox)[-1] == "error"
    up.board.check()
    assert up.board.open_requests == 0


def test_a_retry_that_cannot_be_sent_takes_nobody_along() -> None:
    up = Gateway(dispatch(*NAMES, retry=RetryTerms(attempts=2)))
    unlucky, lucky = up.board.submit([order("A", explain=True)]), up.board.submit([order("B")])
    for to, message in list(up.wires.sent):
        assert isinstance(message, Generate)
        up.board._perform(up.core.on_message(to, failed(message.request), 1.0))
    up.wires.deaf, up.wires.sent = {"A"}, []
    up.tick(200.0)
    assert news(unlucky) == ["Routed", "Routed", "error"]
    (sent,) = [message.request for _, message in up.wires.sent if isinstance(message, Generate)]
    assert (sent, news(lucky)) == ("B~2", [])


@pytest.mark.parametrize("retry", [RetryTerms(attempts=1), RetryTerms(budget_burst=50.0, wait_ms=100.0)])
def test_hundreds_who_wait_for_a_worker_that_cannot_be_reached_are_all_answered(retry: RetryTerms) -> None:
    up = Gateway(dispatch("mixed-0", max_open=1, max_waiting=1024, retry=retry))
    boxes = [up.board.submit([order(f"q{n}")]) for n in range(1025)]
    up.wires.deaf = {peer("mixed-0")}
    up.board._perform(up.core.on_message(peer("mixed-0"), tokens(0, 7, finish="length", request="q0"), 1.0))
    up.board.check()
    for n in range(1, 800):
        up.tick(n * 100.0)
    assert [kinds[-1] for kinds in map(news, boxes)] == ["TokenDelta", *["error"] * 1024]
    assert up.board.open_requests == 0


def test_news_of_requests_that_are_gone_reach_nobody_and_break_nothing() -> None:
    up = Gateway(dispatch(*NAMES))
    inbox = up.board.submit([order("r")])
    up.board.cancel(RequestId("r"))
    gone = RequestId("r")
    up.board._perform([Deliver(gone, TokenDelta(gone, 0, (7,))), End(gone, ServingError("late"))])
    assert news(inbox) == []
    assert [type(message) for _, message in up.wires.sent] == [Generate, Cancel, AskAbout]
    up.board.check()


def test_a_prompt_counts_as_sent_before_its_worker_can_have_it() -> None:
    """The loop may lose its processor in `send`, while the worker computes already."""
    up = Gateway(dispatch(*NAMES))
    up.watch.ms = 7.0
    send = up.wires.send

    def slow(to: PeerId, message: Message) -> bool:
        up.watch.ms += 50.0
        return send(to, message)

    up.wires.send = slow  # type: ignore[method-assign]
    inbox = up.board.submit([order("r")])
    assert [one.sent_ms for _, one in inbox._news if isinstance(one, Sent)] == [7.0]


def test_who_would_wait_for_ever_is_answered_by_the_second_look() -> None:
    """The table knows a client, and the core knows of no request."""
    up, inbox = Gateway(dispatch(*NAMES)), Inbox()

    async def play() -> None:
        up.board._inboxes[RequestId("lost")] = (inbox, 0)
        for up.watch.ms in (1_000.0, 1_500.0, 2_000.0):
            up.board._loop = asyncio.get_running_loop()
            up.board._tick()
            assert up.board._tick_timer is not None
            up.board._tick_timer.cancel()

    asyncio.run(play())
    ((_, error),) = inbox._news
    assert isinstance(error, Stuck) and not up.board._inboxes


def test_a_worker_that_cannot_be_sent_anything_fills_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    one = Gateway(dispatch(*NAMES), Wires(deaf=set(NAMES) | {peer(name) for name in NAMES}))
    for now_ms in range(0, 10_000, 500):
        one.tick(float(now_ms))
    n_lines = sum('"send_refused"' in line for line in "".join(capsys.readouterr()).splitlines())
    assert n_lines == len(NAMES)
    assert one.board._unsent.total > 10 * len(NAMES), "they are counted"
