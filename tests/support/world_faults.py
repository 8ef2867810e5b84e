"""The pure world with real gateway cores, connections that come and go, and the fault kit's rules in virtual time.

Mappings are as the kernel's: their end is news, at once or a little later, and always before what the same peer says
afterwards; what a process said before it died may be heard first, and its memory be written to in vain. A process that is stopped does nothing, its copier neither; one that died says nothing more. Laws are checked
after every event; a broken one shows what happened.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import ProtocolViolation
from common.faults.points import Kind, Point
from common.ids import Incarnation, Owner, PeerId, TransferId, WorkerId, peer_id
from common.messages.actions import Dial, HangUp
from common.messages.base import Message
from common.messages.handover import Renew
from common.messages.liveness import Member, TransportReport
from common.messages.requests import Failed
from kvstore.handover.states import SenderState
from services.worker.core.actions import Action, Copy, FetchBlocks, Moved, OpenChannel, StoreBlocks
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.core.prefill import PrefillCore
from tests.support.world import Happens, Process, World
from tests.support.world_gateway import GatewayShell
from tests.support.world_memory import Page
from tests.support.world_states import states_of
from tests.support.world_trace import Event, PageOf, Trace, short_peers
from tests.support.world_wires import Link, Wires

TICK_MS, READ_MEMBERS_MS, LISTED_MS = 100.0, 500.0, 3_000.0
RENEWED_WITHIN_MS = 6_000.0
"""A writer renews every 5 s (kvstore.handover.sender)."""
_IDLE_TICK_MS = 400.0
_MOST_EVENTS = 400_000
_WORK_SHARE = 0.3


@dataclass
class Standing:
    """Whether a process runs, and what its kernel will tell it, in order."""

    stopped: bool = False
    ran_since_ms: float = 0.0
    news: deque[tuple[float, str, PeerId]] = field(default_factory=deque)


class FaultyWorld(World):
    """`World` whose messages, copies and processes fail by rule; `gateway` is real."""

    def __init__(
        self, rng: random.Random, *, timeout_ms: float = 30_000.0, hints: bool = False, **settings: object
    ) -> None:
        """`hints`: the gateway names another worker as a holder, rightly or wrongly."""
        self.trace, self.timeout_ms, self.hints = Trace(), timeout_ms, hints
        self.gateway: GatewayShell | None = None
        self.wires = Wires(self.trace, self.lives_on)
        self.mapped: dict[Link, None] = {}
        self.standing: dict[PeerId, Standing] = {}
        self.registry: dict[str, tuple[Member, float]] = {}
        self.blind_until_ms = 0.0
        """Before that, nobody reads the registry."""
        self.clients_of_the_dead: list[GatewayShell] = []
        self._due: dict[int, float] = {}
        self._broken: set[int] = set()
        self._own: dict[int, list[int]] = {}
        self._leaving: dict[int, list[Page]] = {}
        """What a StoreBlocks began to copy."""
        self._states: dict[tuple[PeerId, str], str] = {}
        self._renewed_ms: dict[TransferId, float] = {}
        self._renewals_heard_ms: dict[TransferId, float] = {}
        self._depth, self._ticked_ms, self._read_ms, self.n_events = 0, 0.0, 0.0, 0
        super().__init__(rng, **settings)  # type: ignore[arg-type]  # World's keywords
        self.start_gateway()

    # -- what is said of it

    def say(self, who: str, whom: str, what: str, names: Sequence[str] = (), pages: Sequence[PageOf] = ()) -> None:
        self.trace.note(Event(self.now_ms, who, whom, what, "", frozenset(names), frozenset(pages)))

    def violation(self, text: str, names: Sequence[str] = (), pages: Sequence[PageOf] = ()) -> AssertionError:
        """A broken law, with what led to it."""
        rules = "; ".join(str(rule) for rule in self.wires.rules)
        text = short_peers(text)
        return AssertionError(f"{text}\nat {self.now_ms:.1f} ms, rules: {rules}\n{self.trace.about(names, pages)}")

    def _note_states(self, peer: PeerId, core: object) -> None:
        now = states_of(core)  # type: ignore[arg-type]  # one of the three
        before = {name: state for (who, name), state in self._states.items() if who == peer}
        for name in before.keys() | now.keys():
            if before.get(name) != now.get(name):
                self.say(peer, "", f"    {name} {now.get(name, 'is over here')}", (name,))
                self._states[peer, name] = now.get(name, "")
                if name not in now:
                    del self._states[peer, name]

    # -- processes

    def start_gateway(self) -> None:
        """A gateway's new life."""
        self.lives += 1
        self.gateway = GatewayShell(self, self.lives, timeout_ms=self.timeout_ms, rng=self.rng)
        self.standing[self.gateway.peer] = Standing()
        self.say(self.gateway.peer, "", "starts")
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
        life = self.lives + 1
        address = None if old is None else self.wires.address_of(old)
        if address is not None:
            self.say(f"{name}@{life:016x}", "", f"will listen where {old} did")
        self.wires.listen(peer_id(WorkerId(name), Incarnation(life)), address or f"{name} {life}", self.now_ms)

    def tell_members(self) -> None:
        """Everybody reads the registry, unless it cannot be read; who runs has renewed its record."""
        for member in self.members:
            peer = peer_id(member.id, member.incarnation)
            if peer not in self.standing and self.lives_on(peer):
                self.standing[peer] = Standing()
                self.say(peer, "", "starts")
            if self.runs(peer):
                self.registry[member.id] = member, self.now_ms + LISTED_MS
        self.registry = {name: (m, until) for name, (m, until) in self.registry.items() if until > self.now_ms}
        if self.now_ms < self.blind_until_ms:
            return
        members = [member for member, _ in self.registry.values()]
        for process in self.processes.values():
            if self.runs(process.peer):
                self.perform(process, process.core.on_members(members, self.now_ms, self.now_ms))
        if self.gateway is not None and self.runs(self.gateway.peer):
            self.gateway.on_members(members, self.now_ms)

    def lives_on(self, peer: PeerId) -> bool:
        is_gateway = self.gateway is not None and peer == self.gateway.peer
        is_store = self.store is not None and peer == self.store.peer
        return is_gateway or is_store or self.process(peer) is not None

    def runs(self, peer: PeerId) -> bool:
        return self.lives_on(peer) and peer in self.standing and not self.standing[peer].stopped

    def everybody(self) -> list[PeerId]:
        """Alive, in a fixed order."""
        found = [] if self.gateway is None else [self.gateway.peer]
        found += [process.peer for process in self.processes.values() if process.alive]
        return [*found, self.store.peer] if self.store is not None else found

    @property
    def n_dead(self) -> int:
        """Processes that could be started."""
        down = sum(not self.runs(process.peer) for name, process in self.processes.items() if " " not in name)
        return down + (self.gateway is None) + (self.store is None and self.store_blocks > 0)

    def stop(self, peer: PeerId) -> None:
        self.standing[peer].stopped = True
        self.say(peer, "", "is stopped")

    def go_on(self, peer: PeerId) -> None:
        """Its other threads may be quicker than the one that hears the news."""
        standing, late_ms = self.standing[peer], self.now_ms + self.rng.choice((0.0, 1.0, 30.0))
        standing.ran_since_ms = self.now_ms
        standing.stopped, standing.news = (
            False,
            deque((max(due, late_ms), what, whom) for due, what, whom in standing.news),
        )
        self.say(peer, "", "goes on")

    def die(self, peer: PeerId) -> None:
        """kill -9. The kernel tells who shares memory with it; others notice by silence."""
        self.say(peer, "", "dies")
        victim = self.process(peer)
        if victim is not None:
            victim.alive = False
            victim.copies.clear()
            victim.moves.clear()
        elif self.gateway is not None and peer == self.gateway.peer:
            for client in self.gateway.clients.values():
                if not client.done:
                    client.cancelled, client.ended_ms = True, self.now_ms
            self.clients_of_the_dead.append(self.gateway)
            self.gateway = None
        else:
            self.store = None
        self.wires.bury(peer)
        for process in self.processes.values():
            for move in process.moves:
                move.broken = move.broken or move.order.peer == peer
        for guest, host in [link for link in self.mapped if peer in link]:
            self.mapped.pop((guest, host), None)
            self._news(*((host, "gone") if guest == peer else (guest, "lost")), peer)
        for name in [name for who, name in self._states if who == peer]:
            del self._states[peer, name]

    def _news(self, peer: PeerId, what: str, about: PeerId) -> None:
        """The kernel has news for a process; of an end not always at once."""
        if self.lives_on(peer):
            news = self.standing[peer].news
            due_ms = self.now_ms + (self.rng.choice((0.0, 0.0, 1.0, 30.0)) if what != "joined" else 0.0)
            if (due_ms, what, about) not in news:
                news.append((due_ms, what, about))

    def hear_news(self, peer: PeerId, about: PeerId | None = None) -> None:
        """All that is due; all there is if `about` speaks next."""
        news = self.standing[peer].news
        while self.runs(peer) and news and (news[0][0] <= self.now_ms or any(_precedes(one, about) for one in news)):
            _, what, whom = news.popleft()
            if what != "joined":
                self.say(peer, "", f"hears that {whom} {'maps it' if what == 'gone' else 'is mapped'} no more")
            process = self.process(peer)
            if process is not None and what == "gone":
                self.perform(process, process.core.on_peer_dead(whom, self.now_ms))
            elif process is not None and what == "lost":
                self.perform(process, process.core.on_peer_lost(whom, self.now_ms))
            elif process is not None:
                self.perform(process, process.core.on_peer_joined(whom))
            elif self.store is not None and what == "gone":
                self.store.core.on_peer_dead(whom)
            elif self.store is not None:
                self.store.core.on_peer_joined(whom, self.now_ms)

    # -- connections

    def dial(self, mine: PeerId, peer: PeerId) -> None:
        self.wires.dial(mine, peer)

    def hang_up(self, mine: PeerId, peer: PeerId) -> None:
        """Also unmaps the peer's memory: what waits to be copied there fails, and its kernel tells it."""
        self.wires.hang_up(mine, peer)
        process = self.process(mine)
        if process is None:
            return
        self._broken |= {id(copy) for copy in process.copies if copy.order.to == peer}
        for move in process.moves:
            move.broken = move.broken or move.order.peer == peer
        if (mine, peer) in self.mapped:
            del self.mapped[mine, peer]
            self._news(peer, "gone", mine)

    def send_from(
        self, source: PeerId, target: PeerId, message: Message, payloads: list[list[Page]] | None = None
    ) -> bool:
        if isinstance(message, Renew):
            self._renewed_ms |= dict.fromkeys(message.transfers, self.now_ms)
        if isinstance(message, Failed) and message.transfer is not None and "did not renew" in message.text:
            self._require_unrenewed(source, message.transfer)
        return self.wires.send(source, target, message, payloads or [], self.now_ms)

    def _require_unrenewed(self, receiver: PeerId, transfer: TransferId) -> None:
        """A lease has ended. Whoever lives, runs and still writes has said Renew in its time, and it was lost on the way."""
        heard_ms = self.now_ms - self._renewals_heard_ms.get(transfer, -RENEWED_WITHIN_MS)
        if heard_ms < RENEWED_WITHIN_MS:
            text = f"{receiver} ended the lease of {transfer}, and heard its renewal {heard_ms:.0f} ms ago"
            raise self.violation(text, (transfer,))
        sender = self.process(PeerId(transfer.partition("/")[0]))
        if sender is None or not self.runs(sender.peer) or not isinstance(sender.core, PrefillCore):
            return
        since_ms = max(self._renewed_ms.get(transfer, 0.0), self.standing[sender.peer].ran_since_ms)
        writes = sender.core._sender.state_of(transfer) in (SenderState.FILLING, SenderState.HANDING_OVER)
        if writes and self.now_ms - since_ms > RENEWED_WITHIN_MS:
            text = f"{receiver} ended the lease of {transfer}, which {sender.peer} fills and has not renewed"
            raise self.violation(text, (transfer,))

    def post(self, source: PeerId, target: PeerId, message: object, payloads: list[list[Page]] | None = None) -> None:
        sent = self.send_from(source, target, message, payloads)  # type: ignore[arg-type]  # a message
        process = self.process(source)
        if not sent and process is not None:
            process.core.on_unsent(target, message)  # type: ignore[arg-type]  # a message

    # -- events

    def perform(self, process: Process, actions: list[Action], payloads: list[list[Page]] | None = None) -> None:
        self._depth += 1
        super().perform(process, actions, payloads)
        self._depth -= 1
        if not self._depth:
            self._note_states(process.peer, process.core)
            if actions or self.now_ms != self._ticked_ms:  # a tick that leads to nothing changes nothing
                process.core.check()

    def do(self, process: Process, action: Action, payloads: list[list[Page]]) -> None:
        match action:
            case OpenChannel(peer=peer):
                self._open_channel(process, peer)
            case Dial(peer, _):
                self.dial(process.peer, peer)
            case HangUp(peer):
                self.hang_up(process.peer, peer)
            case Copy():
                super().do(process, action, payloads)
                self._begin(process, action, Point.TRANSFER, action.order.to)
            case FetchBlocks() | StoreBlocks():
                super().do(process, action, payloads)
                parks = action.peer == HOST_BUFFER
                point = Point.PARK if parks else Point.FETCH if isinstance(action, FetchBlocks) else Point.SPILL
                self._begin(process, action, point, action.peer)
                if isinstance(action, FetchBlocks):
                    self._own[id(action)] = self._owners(process, action)
                else:
                    self._leaving[id(action)] = process.memory.read_all(action.own_pages.ravel().tolist())
            case _:
                super().do(process, action, payloads)

    def _begin(self, process: Process, action: object, point: Point, peer: PeerId) -> None:
        """Something is copied from now on; rules say how long it takes, and whether it fails."""
        outcome = self.wires.work(process.peer, point, peer)
        if not outcome.faults:
            return
        self._due[id(action)] = self.now_ms + outcome.ms_of(Kind.DELAY)
        if outcome.has(Kind.FAIL, Kind.CUT, Kind.CORRUPT):
            self._broken.add(id(action))

    def _open_channel(self, process: Process, peer: PeerId) -> None:
        if not self.lives_on(peer):
            self.perform(process, process.core.on_channel_failed(peer, "nobody is there"))
            return
        if self.transport == "shm":
            self.mapped[process.peer, peer] = None
            self._news(peer, "joined", process.peer)
        report = TransportReport(peer=peer, kind=self.transport, gib_per_s=1.0)
        self.perform(process, process.core.on_channel(report, self.now_ms))

    def ready_links(self) -> list[Link]:
        self.wires.pump(self.now_ms)
        for link, parcel in self.wires.landed(self.now_ms):
            self.links.setdefault(link, deque()).append(parcel)
        return [link for link, queue in self.links.items() if queue and self.runs(link[1])]

    def choices(self) -> list[tuple[str, Happens]]:
        choices: list[tuple[str, Happens]] = []
        for kind, what in super().choices():
            if kind == "link":
                choices.append((kind, what))
                continue
            assert isinstance(what, Process)
            if not self.runs(what.peer) or (kind == "copy" and self._is_late(what.copies[0])):
                continue
            if kind == "move" and self._is_late(self.next_move(what).order):
                continue
            choices.append((kind, what))
        return choices

    def _is_late(self, order: object) -> bool:
        return self._due.get(id(order), 0.0) > self.now_ms

    def carry(self, link: Link) -> None:
        parcel = self.links[link].popleft()
        (source, target), message = link, parcel.message
        self.wires.note_heard(link, parcel, self.now_ms)
        if isinstance(message, Renew):
            self._renewals_heard_ms |= dict.fromkeys(message.transfers, self.now_ms)
        self.hear_news(target, about=source)
        if self.gateway is not None and target == self.gateway.peer:
            if (target, source) in self.wires.dialled:
                self.gateway.hear(source, message, self.now_ms)
                self._note_states(target, self.gateway.core)
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

    def copy(self, process: Process) -> None:
        """The copier: one span. Who writes must be allowed to, at that moment."""
        copy = process.copies.popleft()
        order, contents = copy.order, process.memory.read_all(copy.source_pages)
        target, broken = self.process(order.to), id(copy) in self._broken
        self._broken.discard(id(copy))
        self._due.pop(id(copy), None)
        maps = any(what == "lost" and whom == order.to for _, what, whom in self.standing[process.peer].news)
        ok = not broken and (target is not None or maps or self.transport == "tcp")
        pages = tuple((order.to, page) for page in order.target_pages)
        if not ok:
            what = f"    copy of {_span(order.span)} of {order.transfer} failed"
        elif self.transport == "tcp":
            process.payloads[order.transfer, order.span] = contents
            what = f"    copied {_span(order.span)} of {order.transfer}"
        else:
            what = f"    wrote {_span(order.span)} of {order.transfer} to pages {_few(order.target_pages)}"
        self.say(process.peer, order.to, what, (order.transfer,), pages)
        if ok and target is not None and self.transport != "tcp":
            self._require_granted(process, copy, target)
            target.memory.write_all(order.target_pages, contents)
        moved = Moved(ok, 1.0, 1, len(contents) * self.layout.page_bytes)
        self.perform(process, process.core.on_copied(order.transfer, order.span, moved, self.now_ms))
        process.payloads.clear()

    def _require_granted(self, process: Process, copy: Copy, target: Process) -> None:
        order, owner = copy.order, Owner(f"transfer/{copy.order.transfer}")
        allowed = target.ledger.pages_of(owner) if target.ledger.state_of(owner) is not None else []
        late = sorted(set(order.target_pages) - set(allowed))
        if late:
            owners = sorted({_owner_of(target, page) for page in late})
            text = f"{process.peer} wrote {_span(order.span)} of {order.transfer} into pages {late} of {order.to}"
            raise self.violation(
                f"{text}, which belong to {owners} now", (order.transfer, *owners), [(order.to, page) for page in late]
            )

    def require_permission(self, process: Process, order: FetchBlocks | StoreBlocks) -> None:
        """What is read is kept by its holder as long as the reader believes; what is written is the writer's."""
        peer = order.peer
        if isinstance(order, StoreBlocks):
            now = process.memory.read_all(order.own_pages.ravel().tolist())
            if self._leaving.get(id(order)) != now:
                raise self.violation(f"{process.peer} copies pages out to {peer} that hold something else by now", ())
        if peer == HOST_BUFFER:
            return
        if isinstance(order, FetchBlocks) and self._own.get(id(order)) != self._owners(process, order):
            raise self.violation(f"{process.peer} fetches into pages that have gone to others since", ())
        if self.now_ms > getattr(order, "deadline_ms", self.now_ms):
            return
        holder, store = self.process(peer), self.store
        is_store = store is not None and peer == store.peer
        if store is not None and is_store:
            shelves = store.core._shelves
            pool = None if shelves is None else shelves.pool
        else:
            pool = None if holder is None else holder.core.pool
        if pool is None:
            return
        reads = isinstance(order, FetchBlocks)
        name = f"{'find:' if is_store else 'lent/'}{process.peer}{':' if is_store else '/'}{order.call}"
        owner = Owner(name if reads else f"write:{process.peer}:{order.call}")
        pages = order.peer_pages.ravel().tolist()
        held = pool.pins_of(owner) if reads else set(pages) <= set(pool.pages_of(owner))
        if not held:
            verb = "reads" if reads else "writes"
            raise self.violation(f"{process.peer} {verb} pages {_few(pages)} of {peer} without a lease ({owner})", ())

    def _owners(self, process: Process, order: FetchBlocks) -> list[int]:
        owners: list[int] = process.ledger._owner_of[order.own_pages.ravel()].tolist()
        return owners

    def move(self, process: Process) -> None:
        for move in process.moves:
            move.broken = move.broken or id(move.order) in self._broken
        before = {id(move.order) for move in process.moves}
        super().move(process)
        gone = before - {id(move.order) for move in process.moves}
        for order in gone:
            self._broken.discard(order)
            self._due.pop(order, None)
            self._own.pop(order, None)
            self._leaving.pop(order, None)

    # -- time

    def turn(self) -> bool:
        """One event, or time passes up to the next one. False if only the passing of time is left."""
        self.n_events += 1
        assert self.n_events < _MOST_EVENTS, "this world never ends"
        for peer in self.everybody():
            self.hear_news(peer)
        for kind, peer in self.wires.ends:
            if self.lives_on(peer):
                (self.die if kind is Kind.KILL else self.stop)(peer)
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
            if self.runs(process.peer):
                self.perform(process, process.core.on_tick(self.now_ms))
        if self.store is not None and self.runs(self.store.peer):
            self.store.core.on_tick(self.now_ms)
            self.store.core.check()
        if self.gateway is not None and self.runs(self.gateway.peer):
            self.gateway.tick(self.now_ms)
            self._note_states(self.gateway.peer, self.gateway.core)

    def run(self, ms: float, until: object = None) -> None:
        """So much virtual time, or until `until()`."""
        end_ms = self.now_ms + ms
        while self.now_ms < end_ms and not (callable(until) and until()):
            if self.turn():
                continue
            due = [self._ticked_ms + TICK_MS, end_ms]
            due += [] if self.wires.due_ms is None else [self.wires.due_ms]
            due += [one.news[0][0] for one in self.standing.values() if one.news]
            due += list(self._due.values())
            self.now_ms = min((at for at in due if at > self.now_ms), default=end_ms)


def _precedes(news: tuple[float, str, PeerId], speaker: PeerId | None) -> bool:
    """Whether it is heard before what the speaker says: it did that afterwards. The dead say nothing afterwards."""
    return news[2] == speaker and news[1] != "lost"


def _span(span: object) -> str:
    return f"L{span.layer}+{span.n_layers} b{span.first_block}+{span.n_blocks}"  # type: ignore[attr-defined]


def _few(pages: Sequence[int]) -> str:
    return ",".join(map(str, pages[:12])) + (f" and {len(pages) - 12} more" if len(pages) > 12 else "")


def _owner_of(process: Process, page: int) -> str:
    """Who has a page now."""
    ledger = process.ledger
    owners = [owner for owner in ledger.owners() if page in ledger.pages_of(owner)]
    return owners[0] if owners else "nobody"
