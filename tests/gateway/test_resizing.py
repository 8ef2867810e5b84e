"""An operator changes a worker's memory over HTTP and reads what became of it, whatever the worker does meanwhile."""

import asyncio

import pytest

from common.errors import InvalidRequest, PeerFailed
from common.ids import PeerId
from common.messages.resizing import Resize, ResizeAnswer
from gateway.resizes import Resizes
from gateway.routes_admin import read_size
from tests.gateway.cluster import Cluster
from tests.gateway.fake_worker import PATIENCE_S

GIB = 2**30
PATH = "/admin/workers/decode-0/memory"
PEER = PeerId("decode-0@1")


def answer(call: int, **more: object) -> ResizeAnswer:
    fields = {"device_memory_bytes": 6 * GIB, "target_bytes": 6 * GIB, "pages": 100, "leaving_pages": 0, **more}
    return ResizeAnswer(call=call, **fields)  # type: ignore[arg-type]  # a test's keywords


def ordered(up: Cluster, said: dict[str, object], status: int) -> dict[str, object]:
    """Order 6 GiB, answer with `said`; what the operator gets."""
    with up.http() as client:
        posted = up.in_background(lambda: client.post(PATH, json={"device_memory": "6GiB"}))
        gateway, order = up.decode.hear(Resize)
        assert order.device_memory_bytes == 6 * GIB
        up.decode.say(gateway, answer(order.call, **said))
        got = posted.result(PATIENCE_S)
    assert got.status_code == status, got.text
    return got.json()


def test_an_operator_gets_what_the_worker_reached(up: Cluster) -> None:
    done = ordered(up, {}, 200)
    assert done == {
        "worker": "decode-0",
        "state": "resized",
        "device_memory_bytes": 6 * GIB,
        "target_bytes": 6 * GIB,
        "pages": 100,
        "leaving_pages": 0,
    }
    leaving = ordered(up, {"device_memory_bytes": 7 * GIB, "leaving_pages": 5}, 202)
    assert (leaving["state"], leaving["leaving_pages"]) == ("leaving", 5)


def test_what_the_worker_cannot_do_is_an_error_with_its_numbers(up: Cluster) -> None:
    error = ordered(up, {"problem": "6.0 GiB more asked for; 1.0 GiB are available"}, 400)["error"]
    assert isinstance(error, dict)
    assert (error["param"], error["message"]) == ("device_memory", "6.0 GiB more asked for; 1.0 GiB are available")


def test_unknown_workers_and_what_is_no_size_are_refused_without_asking(up: Cluster) -> None:
    with up.http() as client:
        assert client.post("/admin/workers/nobody/memory", json={"device_memory": "6GiB"}).status_code == 404
        for body in ({"device_memory": "much"}, {"device_memory": "80%"}, {"memory": "6GiB"}, [], {}):
            got = client.post(PATH, json=body)
            assert (got.status_code, got.json()["error"]["param"]) == (400, "device_memory")
            assert '{"device_memory": "6GiB"}' in got.json()["error"]["message"]
    assert up.decode.heard.empty()


@pytest.mark.parametrize(("text", "n_bytes"), [('"512MiB"', 2**29), ("1048576", 2**20), ('"1.5G"', 3 * 2**29)])
def test_sizes_are_read_as_flags_are(text: str, n_bytes: int) -> None:
    assert read_size(b'{"device_memory": %s}' % text.encode()) == n_bytes


@pytest.mark.parametrize("text", ["0", "-5", '"0"', str(2**70), '"99999999999999999999T"', "1.5", "null", "{"])
def test_what_no_memory_can_have_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        read_size(b'{"device_memory": %s}' % text.encode())


def test_a_lost_worker_ends_the_wait_for_it_and_no_other() -> None:
    async def run() -> None:
        resizes = Resizes()
        call, mine = resizes.begin(PEER)
        other_call, other = resizes.begin(PeerId("decode-1@1"))
        resizes.answered(PEER, answer(other_call))
        resizes.lost(PEER)
        with pytest.raises(PeerFailed, match="decode-0"):
            await mine
        assert not other.done(), "only the worker that was asked may answer"
        resizes.answered(PeerId("decode-1@1"), answer(other_call))
        assert (await other).call == other_call
        resizes.answered(PEER, answer(call))
        resizes.lost(PeerId("decode-1@1"))

    asyncio.run(run())
