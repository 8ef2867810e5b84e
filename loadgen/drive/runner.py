"""Sends conversations: open loop at planned times, or closed loop with a fixed number at a time."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from loadgen.drive.bodies import BodyForm, OutgoingRequest
from loadgen.drive.client import Due, StreamingClient
from loadgen.drive.history import Answer, History
from loadgen.results.records import Outcome, RequestRecord
from loadgen.workload.plan import Conversation

OnRecord = Callable[[RequestRecord], None]
_AHEAD = 256
"""First requests that are made before the run begins, and kept made while it goes on: making one must delay nobody."""
_BACK_OFF_S = 0.5
"""A closed loop asks a server that cannot be reached so often and not faster: nothing else would slow it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """How conversations are sent."""

    run_id: str
    """Begins every request id of the run."""
    form: BodyForm
    concurrency: int | None = None
    """Closed loop: conversations under way; None: open loop."""
    max_in_flight: int | None = None
    """A cap on an open loop: what is due waits until there is room, and what it waited is recorded."""
    stop_after_s: float | None = None
    """Nothing new is sent after this time of the run."""
    with_sessions: bool = False
    """Tell the server which conversation a request belongs to."""
    first_index: int = 0
    index_step: int = 1
    """Several processes share a run: this one numbers its requests first, first + step, first + 2 step, ..."""


class Run:
    """One run against one server. `records` fills as requests end, in the order of their ends."""

    def __init__(
        self, client: StreamingClient, plan: RunPlan, conversations: Iterable[Conversation], on_record: OnRecord
    ) -> None:
        """Makes the first requests; `on_record` hears of each end and must return at once."""
        self._client, self._plan, self._on_record = client, plan, on_record
        self._room = None if plan.max_in_flight is None else asyncio.Semaphore(plan.max_in_flight)
        self._ahead = _Ahead(conversations, plan.form)
        self._ahead.make(_AHEAD if plan.concurrency is None else plan.concurrency)
        self._n_sent, self._start_s = 0, 0.0
        self.records: list[RequestRecord] = []
        self.answers_replaced = 0
        """Answers in prompts that are not the server's own: it told no token ids."""
        self.turns_not_sent = 0
        """Turns of conversations that ended early: a turn before failed or was left, or the run was over."""

    async def drive(self, start_s: float) -> None:
        """Send everything and return when all has ended; `start_s` is a time of the client's clock, and may lie ahead."""
        self._start_s = start_s
        async with asyncio.TaskGroup() as group:
            if self._plan.concurrency is None:
                await self._open_loop(group)
            else:
                for _ in range(self._plan.concurrency):
                    group.create_task(self._place())

    async def _open_loop(self, group: asyncio.TaskGroup) -> None:
        """Start each conversation at its first turn's time, whatever became of the ones before."""
        for first in self._ahead:
            due_s = first.conversation.turns[0].at_s or 0.0
            if not await self._sleep_until(due_s):
                self.turns_not_sent += len(first.conversation.turns)
                return
            group.create_task(self._converse(first, due_s))
            self._make_later()

    async def _place(self) -> None:
        """One conversation after the other, for as long as there are any; one that thinks is under way."""
        await self._sleep_until(0.0)
        for first in self._ahead:
            if self._is_over():
                return
            self._make_later()
            if await self._converse(first, self._now_s()) is Outcome.CONNECT:
                await self._sleep_until(self._now_s() + _BACK_OFF_S)

    def _make_later(self) -> None:
        """One more first request, once those that are due now have been sent."""
        asyncio.get_running_loop().call_soon(self._ahead.make, 1)

    async def _converse(self, first: "_First", due_s: float) -> Outcome | None:
        """All turns, each after the answer of the one before; how the last one ended. Whatever ends one early ends them all."""
        conversation, history, body, waited_s = first.conversation, first.history, first.body, 0.0
        for number, turn in enumerate(conversation.turns):
            if number:
                free_s = self._now_s()
                due_s = max(free_s + turn.think_s, turn.at_s or 0.0)
                waited_s = 0.0 if turn.at_s is None else max(0.0, free_s - turn.at_s)
                if not await self._sleep_until(due_s):
                    self.turns_not_sent += len(conversation.turns) - number
                    return None
                body = self._plan.form.body(history.ask(turn), turn)
            async with self._slot() as held_s:
                if self._is_over():
                    self.turns_not_sent += len(conversation.turns) - number
                    return None
                request = self._request(conversation, number, body, history)
                due = Due(self._start_s, due_s, held_s, waited_s)
                record, answer = await self._client.send(request, due)
            self.records.append(record)
            self._on_record(record)
            if answer is not None:
                self._hear(history, answer)
            elif request.keeps_answer:  # what comes next would refer to an answer that nobody has
                self.turns_not_sent += len(conversation.turns) - number - 1
                return record.outcome
        return record.outcome

    def _hear(self, history: History, answer: Answer) -> None:
        if not history.hear(answer):
            self.answers_replaced += 1

    def _request(self, conversation: Conversation, number: int, body: bytes, history: History) -> OutgoingRequest:
        turn, plan = conversation.turns[number], self._plan
        index = plan.first_index + plan.index_step * self._n_sent
        self._n_sent += 1
        session = conversation.session or f"{plan.run_id}-{conversation.index}"
        return OutgoingRequest(
            index=index,
            conversation=conversation.index,
            turn=number,
            group=conversation.group,
            request_id=f"{plan.run_id}-{conversation.index}-{number}",
            session=session if plan.with_sessions else "",
            body=body,
            input_tokens=history.input_tokens,
            output_tokens=turn.output_tokens,
            cancel_after_tokens=turn.cancel_after_tokens,
            keeps_answer=conversation.keeps_answers and number + 1 < len(conversation.turns),
        )

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[float]:
        """A place under the cap; gives the seconds it was waited for."""
        if self._room is None:
            yield 0.0
            return
        if not self._room.locked():
            async with self._room:
                yield 0.0
            return
        asked_s = self._now_s()
        async with self._room:
            yield self._now_s() - asked_s

    def _now_s(self) -> float:
        return self._client.now_s() - self._start_s

    async def _sleep_until(self, at_s: float) -> bool:
        """False: the run was over before that time."""
        stop_s = self._plan.stop_after_s
        wait_s = (at_s if stop_s is None else min(at_s, stop_s)) - self._now_s()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        return (stop_s is None or at_s < stop_s) and not self._is_over()

    def _is_over(self) -> bool:
        return self._plan.stop_after_s is not None and self._now_s() >= self._plan.stop_after_s


@dataclass(frozen=True, slots=True)
class _First:
    """A conversation whose first request is ready to be sent."""

    conversation: Conversation
    history: History
    body: bytes


class _Ahead:
    """Makes first requests ahead of need, in order."""

    def __init__(self, conversations: Iterable[Conversation], form: BodyForm) -> None:
        self._source, self._form = iter(conversations), form
        self._made: deque[_First] = deque()

    def make(self, n: int) -> None:
        """Make `n` more, or as many as there are."""
        for _ in range(n):
            conversation = next(self._source, None)
            if conversation is None:
                return
            history, turn = History(conversation, self._form.endpoint), conversation.turns[0]
            self._made.append(_First(conversation, history, self._form.body(history.ask(turn), turn)))

    def __iter__(self) -> Iterator[_First]:
        while True:
            if not self._made:
                self.make(1)
            if not self._made:
                return
            yield self._made.popleft()
