"""Who may give orders to a worker: whoever said in its Hello that it is what gives them."""

import msgspec
import pytest

from common.errors import ProtocolViolation
from common.ids import Incarnation, PeerId, RequestId, TransferId
from common.messages.actions import Send
from common.messages.handover import GrantRefused, GrantRequest
from common.messages.liveness import Drain, Hello, Refused
from common.messages.requests import AskAbout, Cancel, NotHere, Sampling, StillHere
from common.messages.resizing import Resize
from services.worker.core.callers import Callers
from tests.services.worker.core.test_peer_fetch import PROMPT, world
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, World

STRANGER = PeerId("stranger@1")
R = RequestId("r")


def granted(target: World, transport: str) -> GrantRequest:
    """A request was asked for and heard; what the same sender would say of it under another transfer's name."""
    link = target.processes["prefill"].peer, target.processes["decode"].peer

    def asked() -> list[GrantRequest]:
        return [m for m, _ in target.links.get(link, ()) if isinstance(m, GrantRequest)]

    target.send("r", PROMPT, 3)
    while not asked():
        assert target.turn()
    request = asked()[0]
    while asked():
        assert target.turn()
    return msgspec.structs.replace(request, transfer=TransferId("x/1"), transport=transport)


@pytest.mark.parametrize("to", ["prefill", "decode", "mixed"])
def test_a_stranger_orders_nothing(to: str) -> None:
    target = world()
    process = target.processes[to]
    orders = [target.generate("r", PROMPT[:8], Sampling(max_tokens=3)), Cancel(request=R), Drain(on=True)]
    for order in [*orders, AskAbout(requests=(R,)), Resize(call=1, device_memory_bytes=2**20)]:
        with pytest.raises(ProtocolViolation, match=f"got {type(order).__name__} from stranger@1, which is no gateway"):
            process.core.on_message(STRANGER, order, target.now_ms)
    assert process.core.idle and not process.core.report(1, target.now_ms).draining


@pytest.mark.parametrize("to", ["prefill", "decode", "mixed"])
def test_of_every_request_that_is_asked_about_a_worker_says_whether_it_is_there(to: str) -> None:
    target = world()
    process, gone = target.processes[to], RequestId("gone")
    target.send("r", PROMPT, 3, to=to)
    while process.core.idle:
        assert target.turn()
    told = process.core.on_message(GATEWAY, AskAbout(requests=(gone, R)), target.now_ms)
    assert told == [Send(GATEWAY, StillHere(requests=(R,))), Send(GATEWAY, NotHere(requests=(gone,)))]
    target.settle()
    both = process.core.on_message(GATEWAY, AskAbout(requests=(gone, R)), target.now_ms)
    assert both == [Send(GATEWAY, NotHere(requests=(gone, R)))]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_whoever_is_no_prefill_worker_takes_no_request_over(transport: str) -> None:
    """A grant for a request ends its older transfer: a stranger's would leave the request without an answer."""
    target = world(transport=transport)
    theirs = granted(target, transport)
    decode = target.processes["decode"]
    for sender in (STRANGER, target.processes["mixed"].peer):
        (answered,) = decode.core.on_message(sender, theirs, target.now_ms)
        assert isinstance(answered.message, GrantRefused) and answered.to == sender
        assert (answered.message.code, answered.message.retryable) == ("no_worker", True)
    target.settle()
    assert target.answers[R].tokens == answer(PROMPT, 3)


def hello(role: str) -> Hello:
    mine = world().processes["decode"].core._mine
    return Hello(member=msgspec.structs.replace(mine, role=role, model=None, id="g", incarnation=Incarnation(1)))


def test_silence_does_not_unmake_a_caller_and_a_new_hello_does() -> None:
    callers = Callers(hello("decode").member, silent_ms=10.0)
    callers.heard(STRANGER, 0.0)
    callers.greet(STRANGER, hello("gateway"))
    assert callers.gone_silent(11.0) == [STRANGER]
    callers.require_gateway(STRANGER, Cancel(request=R))
    callers.greet(STRANGER, hello("prefill"))
    assert callers.is_welcome("prefill", STRANGER)
    with pytest.raises(ProtocolViolation):
        callers.require_gateway(STRANGER, Cancel(request=R))


def test_a_hello_that_is_refused_unmakes_the_caller() -> None:
    mine = world().processes["decode"].core._mine
    callers, good = Callers(mine, silent_ms=10.0), msgspec.structs.replace(mine, role="prefill", id="p")
    callers.greet(STRANGER, Hello(member=good))
    assert callers.is_welcome("prefill", STRANGER)
    bad = msgspec.structs.replace(good, model=msgspec.structs.replace(mine.model, layers=3))
    callers.greet(STRANGER, Hello(member=bad))
    assert not callers.is_welcome("prefill", STRANGER)


def test_who_does_not_fit_is_told_so_when_it_asks_for_pages_too() -> None:
    """Its Hello was refused; without a word to its request it would wait for pages until the deadline."""
    target = world()
    request = granted(target, "tcp")
    decode = target.processes["decode"]
    model = msgspec.structs.replace(decode.core._mine.model, layers=3)
    other = msgspec.structs.replace(decode.core._mine, role="prefill", id="p", model=model)
    (refused,) = decode.core.on_message(STRANGER, Hello(member=other), target.now_ms)
    assert isinstance(refused.message, Refused)
    (answered,) = decode.core.on_message(STRANGER, request, target.now_ms)
    assert isinstance(answered.message, GrantRefused)
    assert (answered.message.code, answered.message.retryable) == ("config", False)


@pytest.mark.parametrize("role", ["gateway", "prefill"])
def test_ever_new_names_take_no_more_than_their_place_and_not_that_of_who_is_heard(role: str) -> None:
    """A prefill worker that crashes and comes back all day long must not mute the one beside it that does not."""
    callers, honest, greeting = Callers(hello("decode").member, silent_ms=10.0), PeerId("g@honest"), hello(role)
    callers.greet(honest, greeting)
    for number in range(3_000):
        callers.greet(PeerId(f"g@{number}"), greeting)
        if number % 500 == 0:
            callers.heard(honest, float(number))
    assert callers.is_welcome(role, honest) and callers.is_welcome(role, PeerId("g@2999"))
    assert not callers.is_welcome(role, PeerId("g@0"))
    assert sum(callers.is_welcome(role, PeerId(f"g@{number}")) for number in range(3_000)) < 1_024
