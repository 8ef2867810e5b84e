"""The pure world with real gateway cores, connections that come and go, and the fault kit's rules in virtual time.

Mappings are as the kernel's (tests.support.world_kernel). A process that is stopped does nothing, its copier neither; one
that died says nothing more. Laws are checked after every event; a broken one shows what happened.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence

from common.errors import ProtocolViolation
from common.faults.points import Kind
from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.messages.actions import Dial, HangUp
from common.messages.base import Message
from common.messages.liveness import TransportReport
from services.worker.core.actions import Action, Copy, FetchBlocks, StoreBlocks
from tests.support.world_cluster import Cluster, Happens, Link
from tests.support.world_gateway import GatewayShell
from tests.support.world_kernel import Kernel
from tests.support.world_leases import Leases
from tests.support.world_memory import Page
from tests.support.world_permissions import WatchedCopies
from tests.support.world_process import Process
from tests.support.world_registry import Registry
from tests.support.world_states import StateNotes
from tests.support.world_trace import Event, PageOf, Trace, short_peers
from tests.support.world_wires import Wires

TICK_MS, READ_MEMBERS_MS = 100.0, 500.0
_MOST_EVENTS = 400_000


class FaultyWorld(Cluster):
    """A cluster whose messages, copies and processes fail by rule; `gateway` is real."""

    copies: WatchedCopies

    def __init__(
        self, rng: random.Random, *, timeout_ms: float = 30_000.0, hints: bool = False, **settings: object
    ) -> None:
        """`hints`: the gateway names another worker as a holder, rightly or wrongly. `settings`: of a Cluster."""
        super().__init__(rng, **settings)  # type: ignore[arg-type]  # a test's keywords
        self.trace, self.timeout_ms, self.hints = Trace(), timeout_ms, hints
        self.gateway: GatewayShell | None = None
        self.clients_of_the_dead: list[GatewayShell] = []
        self.wires = Wires(self.trace, self.lives_on)
        self.kernel, self.registry, self.copies = Kernel(self), Registry(), WatchedCopies(self)
        self._leases, self._states = Leases(self), StateNotes(self.say)
        self._depth, self._ticked_ms, self._read_ms, self.n_events = 0, 0.0, 0.0, 0
        self.start_all()
        self.start_gateway()

    # -- what is said of it

    def say(self, who: str, whom: str, what: str, names: Sequence[str] = (), pages: Sequence[PageOf] = ()) -> None:
        self.trace.note(Event(self.now_ms, who, whom, what, "", frozenset(names), frozenset(pages)))

    def violation(self, text: str, names: Sequence[str] = (), pages: Sequence[PageOf] = ()) -> AssertionError:
        """A broken law, with what led to it."""
        rules = "; ".join(str(rule) for rule in self.wires.rules)
        text = short_peers(text)
        return AssertionError(f"{text}\nat {self.now_ms:.1f} ms, rules: {rules}\n{self.trace.about(names, pages)}")

    # -- lives

    def start_gateway(self) -> None:
        """A gateway's new life."""
        self.lives += 1
        self.gateway = GatewayShell(self, self.lives, timeout_ms=self.timeout_ms, rng=self.rng)
        self.kernel.spawn(self.gateway.peer)
        self.tell_members()

    def start(self, name: str, *, same_address: bool = False) -> None:
        """Also while an older life of that name goes on, which keeps its address."""
        old = self.processes.get(name)
        if old is not None and old.alive:
            self.processes[f"{name} before {self.lives + 1}"] = self.processes.pop(name)
        role, _, number = name.partition("-")
        self._listen(f"{role}-{number or 0}", None if old is None or old.alive or not same_address else old.peer)
        super().start(name)

    def start_store(self, *, same_address: bool = False) -> None:
        old = next((member for member in self.members if member.role == "kvstore"), None)
        self._listen("kvstore-0", peer_id(old.id, old.incarnation) if old is not None and same_address else None)
        super().start_store()

    def _listen(self, name: str, old: PeerId | None) -> None:
        """The life that begins next listens at an address of its own, or at that of `old`, which is dead."""
        self.wires.listen(peer_id(WorkerId(name), Incarnation(self.lives + 1)), old, self.now_ms)

    def tell_members(self) -> None:
        """Everybody reads the registry, unless it cannot be read; who runs has renewed its record."""
        for member in self.members:
            peer = peer_id(member.id, member.incarnation)
            if peer not in self.kernel.standing and self.lives_on(peer):
                self.kernel.spawn(peer)
            if self.kernel.runs(peer):
                self.registry.renew(member, self.now_ms)
        members = self.registry.listed(self.now_ms)
        if members is None:
            return
        for process in self.processes.values():
            if self.kernel.runs(process.peer):
                self.perform(process, process.core.on_members(members, self.now_ms, self.now_ms))
        if self.gateway is not None and self.kernel.runs(self.gateway.peer):
            self.gateway.on_members(members, self.now_ms)

    def lives_on(self, peer: PeerId) -> bool:
        is_gateway = self.gateway is not None and peer == self.gateway.peer
        is_store = self.store is not None and peer == self.store.peer
        return is_gateway or is_store or self.process(peer) is not None

    def everybody(self) -> list[PeerId]:
        """Alive, in a fixed order."""
        found = [] if self.gateway is None else [self.gateway.peer]
        found += [process.peer for process in self.processes.values() if process.alive]
        return [*found, self.store.peer] if self.store is not None else found

    def workers_down(self) -> list[str]:
        """Dead or stopped; not the older lives of names that have begun anew."""
        found = self.processes.items()
        return [name for name, process in found if not self.kernel.runs(process.peer) and " " not in name]

    @property
    def n_dead(self) -> int:
        """Processes that could be started."""
        without_store = self.store is None and self.store_blocks > 0
        return len(self.workers_down()) + (self.gateway is None) + without_store

    def die(self, peer: PeerId) -> None:
        """kill -9. The kernel tells who shares memory with it; others notice by silence."""
        self.say(peer, "", "dies")
        victim = self.process(peer)
        if victim is not None:
            victim.alive = False
            victim.copies.clear()
            victim.moves.clear()
        elif self.gateway is not None and peer == self.gateway.peer:
            self.gateway.leave_all(self.now_ms)
            self.clients_of_the_dead.append(self.gateway)
            self.gateway = None
        else:
            self.store = None
        self.wires.bury(peer)
        for process in self.processes.values():
            process.break_moves(peer)
        self.kernel.bury(peer)
        self._states.forget(peer)

    # -- connections

    def hang_up(self, mine: PeerId, peer: PeerId) -> None:
        """Also unmaps the peer's memory: what waits to be copied there fails, and its kernel tells it."""
        self.wires.hang_up(mine, peer)
        process = self.process(mine)
        if process is not None:
            self.copies.break_off(process, peer)
            self.kernel.unmap(mine, peer)

    def open_channel(self, process: Process, peer: PeerId) -> None:
        if not self.lives_on(peer):
            self.perform(process, process.core.on_channel_failed(peer, "nobody is there"))
            return
        if self.transport == "shm":
            self.kernel.map(process.peer, peer)
        report = TransportReport(peer=peer, kind=self.transport, gib_per_s=1.0)
        self.perform(process, process.core.on_channel(report, self.now_ms))

    def send_from(
        self, source: PeerId, target: PeerId, message: Message, payloads: list[list[Page]] | None = None
    ) -> bool:
        """False if the sender is told that it cannot."""
        self._leases.note_said(source, message)
        return self.wires.send(source, target, message, payloads or [], self.now_ms)

    def post(self, source: PeerId, target: PeerId, message: object, payloads: list[list[Page]] | None = None) -> None:
        sent = self.send_from(source, target, message, payloads)  # type: ignore[arg-type]  # a message
        process = self.process(source)
        if not sent and process is not None:
            process.core.on_unsent(target, message, self.now_ms)  # type: ignore[arg-type]  # a message

    def ready_links(self) -> list[Link]:
        self.wires.pump(self.now_ms)
        for link, parcel in self.wires.landed(self.now_ms):
            self.links.setdefault(link, deque()).append(parcel)
        return [link for link in super().ready_links() if self.kernel.runs(link[1])]

    def carry(self, link: Link) -> None:
        parcel = self.links[link].popleft()
        (source, target), message = link, parcel.message
        self.wires.note_heard(link, parcel, self.now_ms)
        self._leases.note_heard(message)
        self.kernel.hear_news(target, about=source)
        if self.gateway is not None and target == self.gateway.peer:
            if (target, source) in self.wires.dialled:
                self.gateway.hear(source, message, self.now_ms)
                self._states.note(target, self.gateway.core)
            return
        try:
            if self.store is not None and target == self.store.peer:
                for answer, frames in self.store.hear(source, message, parcel.payloads, self.now_ms):
                    self.post(target, source, answer, frames)
                self.store.core.check()
            elif (process := self.process(target)) is not None:
                self.perform(process, process.core.on_message(source, message, self.now_ms), parcel.payloads)
        except ProtocolViolation as error:
            self._depth = 0
            self.say(target, source, f"is told off: {error}")

    # -- what cores want done

    def perform(self, process: Process, actions: list[Action], payloads: list[list[Page]] | None = None) -> None:
        self._depth += 1
        super().perform(process, actions, payloads)
        self._depth -= 1
        if not self._depth:
            self._states.note(process.peer, process.core)
            if actions or self.now_ms != self._ticked_ms:  # a tick that leads to nothing changes nothing
                process.core.check()

    def do(self, process: Process, action: Action, payloads: list[list[Page]]) -> None:
        super().do(process, action, payloads)
        match action:
            case Dial(peer, _):
                self.wires.dial(process.peer, peer)
            case HangUp(peer):
                self.hang_up(process.peer, peer)
            case Copy() | FetchBlocks() | StoreBlocks():
                self.copies.begin(process, action)

    # -- events

    def choices(self) -> list[tuple[str, Happens]]:
        return [
            (kind, what)
            for kind, what in super().choices()
            if isinstance(what, tuple) or (self.kernel.runs(what.peer) and not self.copies.is_late(kind, what))
        ]

    def turn(self) -> bool:
        """One event, or time passes up to the next one. False if only the passing of time is left."""
        self.n_events += 1
        assert self.n_events < _MOST_EVENTS, "this world never ends"
        for peer in self.everybody():
            self.kernel.hear_news(peer)
        for kind, peer in self.wires.ends:
            if self.lives_on(peer):
                (self.die if kind is Kind.KILL else self.kernel.stop)(peer)
        self.wires.ends.clear()
        if self.now_ms >= self._ticked_ms + TICK_MS:
            self.tick()
        return super().turn()

    def tick(self) -> None:
        """Everybody's timer; some read the registry."""
        self._ticked_ms = self.now_ms
        if self.now_ms >= self._read_ms + READ_MEMBERS_MS:
            self._read_ms = self.now_ms
            self.tell_members()
        for process in self.processes.values():
            if self.kernel.runs(process.peer):
                self.perform(process, process.core.on_tick(self.now_ms))
        if self.store is not None and self.kernel.runs(self.store.peer):
            self.store.core.on_tick(self.now_ms)
            self.store.core.check()
        if self.gateway is not None and self.kernel.runs(self.gateway.peer):
            self.gateway.tick(self.now_ms)
            self._states.note(self.gateway.peer, self.gateway.core)

    def run(self, ms: float, until: Callable[[], object] | None = None) -> None:
        """So much virtual time, or until `until()`."""
        end_ms = self.now_ms + ms
        while self.now_ms < end_ms and not (until is not None and until()):
            if self.turn():
                continue
            due = [self._ticked_ms + TICK_MS, end_ms, *self.kernel.due_ms(), *self.copies.due_ms()]
            due += [] if self.wires.due_ms is None else [self.wires.due_ms]
            self.now_ms = min((at for at in due if at > self.now_ms), default=end_ms)
