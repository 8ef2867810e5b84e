"""How a prompt asks its decode worker for pages: under which name, and in what pieces its KV will be copied. Pure."""

from collections.abc import Iterable

from common.ids import PeerId, TransferId
from common.kv_layout import KvLayout
from common.messages.liveness import Member
from common.policy.transfer import Granularity, choose
from kvstore.handover.actions import SenderAction
from kvstore.handover.outgoing import Way
from kvstore.handover.sender import Sender
from services.worker.core.neighbours import Neighbours
from services.worker.core.prompt import Prompt


class Asking:
    """Owns the count of transfers: each has a name of its own."""

    def __init__(self, mine: Member, sender: Sender, neighbours: Neighbours, layout: KvLayout, setting: str) -> None:
        """`setting`: of common.policy.transfer."""
        self._mine, self._sender, self._neighbours = mine, sender, neighbours
        self._layout, self._setting = layout, setting
        self._transfers = 0

    def ask(
        self, prompt: Prompt, decode: PeerId, others: tuple[Iterable[Prompt], int], now_ms: float
    ) -> list[SenderAction]:
        """Begin the prompt's transfer. `others`: all prompts of the worker, and how many of them are queued.

        One without pages for all of its layers goes by layer, and what is copied is gone.
        """
        by_load = _granularity(self._setting, *others, decode)
        prompt.mode = Granularity.LAYER if prompt.layer_wise else by_load
        self._transfers += 1
        prompt.transfer = TransferId(f"{self._mine.id}@{self._mine.incarnation:016x}/{self._transfers}")
        prompt.decode = decode
        request = prompt.grant_request(self._neighbours.transport(decode), now_ms)
        way = Way(prompt.mode, pages_last=not prompt.layer_wise)
        return self._sender.ask(
            decode, request, self._layout.blocks_for(len(prompt.tokens)), now_ms, prompt.deadline_ms, way
        )


def _granularity(setting: str, prompts: Iterable[Prompt], n_queued: int, decode: PeerId) -> Granularity:
    """By how many transfers of the moment wait for their grant; queued prompts are held back behind such ones."""
    started = [p for p in prompts if p.transfer is not None]
    without_grant = [p for p in started if p.granted_ms is None]
    held_back = n_queued if any(p.decode == decode for p in without_grant) else 0
    waiting = len(without_grant) + held_back
    return choose(setting, open_transfers=len(started) + held_back, waiting=waiting)
