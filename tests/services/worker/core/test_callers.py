"""Who may give orders to a worker: whoever said in its Hello that it is what gives them."""

import msgspec
import pytest

from common.errors import ProtocolViolation
from common.ids import Incarnation, PeerId, RequestId, TransferId
from common.messages.handover import GrantRefused, GrantRequest
from common.messages.liveness import Drain, Hello, Refused
from common.messages.requests import AskAbout, Cancel, Sampling
from common.messages.resizing import Resize
from services.worker.core.callers import Callers
from tests.services.worker.core.test_peer_fetch import PROMPT, world
from tests.support.fake_engine import answer
from tests.support.world import World

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


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_whoever_is_no_prefill_worker_takes_no_request_over(transport: str) -> None:
    """A grant for a request ends its older transfer: a stranger's would leave the request without an answer."""
    target = world(transport=transport)
    theirs = granted(target, transport)
    decode = target.processes["decode"]
    for sender in (STRANGER, target.processes["mixed"].peer):
        with pytest.raises(ProtocolViolation, match=r"got GrantRequest from .*, which is no prefill"):
            decode.core.on_message(sender, theirs, target.now_ms)
    target.settle()
    assert target.answers[R].tokens == answer(PROMPT, 3)


def test_silence_does_not_unmake_a_caller_and_a_new_hello_does() -> None:
    target = world()
    mine = target.processes["decode"].core._mine
    callers, order = Callers(mine, silent_ms=10.0), Cancel(request=R)
    hello = Hello(member=msgspec.structs.replace(mine, role="gateway", model=None, id="g", incarnation=Incarnation(1)))
    callers.heard(STRANGER, 0.0)
    callers.greet(STRANGER, hello)
    assert callers.gone_silent(11.0) == [STRANGER]
    callers.require("gateway", STRANGER, order)
    callers.greet(STRANGER, Hello(member=msgspec.structs.replace(hello.member, role="prefill")))
    callers.require("prefill", STRANGER, order)
    with pytest.raises(ProtocolViolation):
        callers.require("gateway", STRANGER, order)


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


def test_a_stranger_with_ever_new_names_takes_no_more_than_its_place() -> None:
    mine = world().processes["decode"].core._mine
    callers, order = Callers(mine, silent_ms=10.0), Cancel(request=R)
    hello = Hello(member=msgspec.structs.replace(mine, role="gateway", model=None, id="g"))
    for number in range(300):
        callers.greet(PeerId(f"g@{number}"), hello)
    callers.require("gateway", PeerId("g@299"), order)
    with pytest.raises(ProtocolViolation):
        callers.require("gateway", PeerId("g@0"), order)
