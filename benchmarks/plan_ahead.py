"""How long an engine stands idle between two decode steps, with the next step planned while one runs and without.

    python -m benchmarks.plan_ahead [--rows 8 32 128] [--step-ms 5] [--steps 200] [--rounds 3] [--json FILE]

`device`: a mixed worker's core, feed and engine thread over a device that computes by itself: each step takes `--step-ms`,
whatever it holds, and begins when it is launched and the one before has ended. What a GPU's engine
does on the host to fill in a step, drawing up the results and encoding the messages is done for real. Idle is time in which the device has nothing to do.

`cpu`: two mixed worker processes over the tiny model, one that plans ahead and one that does not, taking turns. Idle is what
the wall clock shows and the steps themselves do not account for. There the thread that computes and the one that plans
share the interpreter, so that what is saved between steps may be lost within them: see the tokens per second.

All numbers are medians over rounds that take turns.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.ids import Incarnation, PeerId, RequestId, WorkerId
from common.kv_layout import KvLayout
from common.messages import encode
from common.messages.actions import Send
from common.messages.liveness import Hello, Member, ModelIdentity
from common.messages.requests import Generate, Sampling
from kvstore.transport.load_gate import LoadGate
from services.worker.build_core import build_core
from services.worker.build_parts import Machine
from services.worker.core.actions import Action
from services.worker.core.plan import Sampled, StepPlan, StepResult
from services.worker.core.resizing import PoolSize
from services.worker.core.role import WorkerRole
from services.worker.engine.fused.inputs import StepBuffers, fill_rows, fill_sampling
from services.worker.engine.fused.lane import open_lane
from services.worker.engine.fused.tables import BlockTables
from services.worker.engine_thread import EngineThread
from services.worker.feed import EngineFeed
from services.worker.inbox import Events, StepDone
from services.worker.model.make import make_model
from services.worker.settings import WorkerSettings
from tests.support.driver import Driver
from tests.support.processes import cluster

LAYOUT = KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16)
MODEL = ModelIdentity(
    name="m",
    fingerprint="f",
    architecture="a",
    dtype="bfloat16",
    layers=LAYOUT.layers,
    kv_heads=LAYOUT.kv_heads,
    head_dim=LAYOUT.head_dim,
    block_tokens=LAYOUT.block_tokens,
    vocab_tokens=128_000,
    context_tokens=8_192,
)
GATEWAY = PeerId("gateway@1")
PROMPT_TOKENS, MAX_STEP_TOKENS, TOKEN = 100, 8_192, 7
WARM_STEPS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One engine under so many decoding sequences, medians."""

    engine: str
    rows: int
    idle_off_ms: float
    """Per step, planned when the one before has been heard of."""
    idle_on_ms: float
    """Per step, planned while the one before runs."""
    speed: float
    """Steps per second (device) or tokens per second (cpu): planned ahead over not."""


class Step:
    """On its way through the device."""

    def __init__(self, plan: StepPlan, begun_s: float, ends_s: float) -> None:
        self.plan, self.begun_s, self.ends_s = plan, begun_s, ends_s

    @property
    def done(self) -> bool:
        return time.perf_counter() >= self.ends_s


class Device:
    """Draws the same token for everybody; keeps its own time."""

    def __init__(self, step_s: float, rows: int) -> None:
        host = torch.device("cpu")
        lane = open_lane(host)
        self._buffers = StepBuffers(MAX_STEP_TOKENS + rows, host, lane)
        self._tables = BlockTables(rows, LAYOUT.blocks_for(MODEL.context_tokens), host, lane)
        self._step_s = step_s
        self._free_s = 0.0
        self._drawn: dict[RequestId, int] = {}
        self.idle_s: list[float] = []

    def launch(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None,
        await_layer: Callable[[int], None] | None,
        await_ring: Callable[[int], None] | None = None,
    ) -> Step:
        """Queue a step."""
        fields = self._buffers.next_host()
        fill_rows(fields, plan.segments, len(plan.segments), self._drawn, LAYOUT.block_tokens)
        fill_sampling(fields, plan.segments)
        self._tables.update(plan.segments)
        self._buffers.send()
        drawn = (segment.request for segment in plan.segments if segment.sample)
        self._drawn = {request: row for row, request in enumerate(drawn)}
        now_s = time.perf_counter()
        self.idle_s.append(max(0.0, now_s - self._free_s))
        begun_s = max(now_s, self._free_s)
        self._free_s = begun_s + self._step_s
        return Step(plan, begun_s, self._free_s)

    def use_pages(self, pages: torch.Tensor) -> None:
        """Steps read no pages here."""
        del pages

    def use_scratch(self, memory: torch.Tensor) -> None:
        """Steps compute nothing here."""
        del memory

    def collect(self, launched: Step) -> StepResult:
        """Wait for its end."""
        time.sleep(max(0.0, launched.ends_s - time.perf_counter()))
        sampled = tuple(Sampled(one.request, TOKEN, None) for one in launched.plan.segments if one.sample)
        return StepResult(launched.plan.number, sampled, (launched.ends_s - launched.begun_s) * 1e3)


class Desk:
    """What a worker's loop does with its engine, without sockets."""

    def __init__(self, core: WorkerRole, device: Device, *, ahead: bool) -> None:
        self._core, self._woken = core, threading.Event()
        self._inbox = Events(self._woken.set)
        self._engine = EngineThread(device, self._inbox, LoadGate())
        self._feed = EngineFeed(core, self._engine, ahead=ahead)
        self.steps = 0

    def run(self, steps: int) -> float:
        """Seconds that so many steps took."""
        began_s, goal = time.perf_counter(), self.steps + steps
        self._feed.feed(self._before_step)
        while self.steps < goal:
            self._woken.wait()
            self._woken.clear()
            for event in self._inbox.take():
                if not isinstance(event, StepDone):
                    raise SystemExit(f"the engine broke: {event}")
                self.steps += 1
                self._feed.ended()
                self._act(self._core.on_step(event.result, time.monotonic() * 1e3))
            self._feed.feed(self._before_step)
        return time.perf_counter() - began_s

    def stop(self) -> None:
        """End the thread."""
        self._engine.stop(5.0)

    def _before_step(self) -> None:
        self._act(self._core.loads(time.monotonic() * 1e3))
        self._core.take_events()

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                encode(action.message)


def device_run(rows: int, step_s: float, steps: int, *, ahead: bool) -> tuple[float, float]:
    """Median idle ms per step, and steps per second."""
    mine = Member(
        id=WorkerId("mixed-0"), role="mixed", incarnation=Incarnation(1), endpoint="x", host="h", pid=1, model=MODEL
    )
    settings = WorkerSettings(model="m", max_running=rows, max_step_tokens=MAX_STEP_TOKENS, max_queued=rows)
    n_tokens = steps + WARM_STEPS + 8
    n_pages = rows * LAYOUT.pages_for(PROMPT_TOKENS + n_tokens + LAYOUT.block_tokens)
    core = build_core(mine, settings, Machine(size=PoolSize(n_pages), layout=LAYOUT))
    gateway = Member(id=WorkerId("gateway"), role="gateway", incarnation=Incarnation(1), endpoint="", host="", pid=1)
    core.on_message(GATEWAY, Hello(member=gateway), 0.0)
    rng = random.Random(1)
    for number in range(rows):
        prompt = tuple(rng.randrange(8, 100_000) for _ in range(PROMPT_TOKENS))
        generate = Generate(
            request=RequestId(str(number)), prompt=prompt, sampling=Sampling(max_tokens=n_tokens), timeout_ms=10**7
        )
        core.on_message(GATEWAY, generate, time.monotonic() * 1e3)
    device = Device(step_s, rows)
    desk = Desk(core, device, ahead=ahead)
    desk.run(WARM_STEPS)
    first = len(device.idle_s)
    elapsed_s = desk.run(steps)
    desk.stop()
    return statistics.median(device.idle_s[first:]) * 1e3, steps / elapsed_s


def device_row(rows: int, options: argparse.Namespace) -> Row:
    """Rounds in turn."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(options.rounds):
        for ahead in found:
            found[ahead].append(device_run(rows, options.step_ms / 1e3, options.steps, ahead=ahead))
    return row_of("device", rows, found[False], found[True])


def row_of(engine: str, rows: int, off: Sequence[tuple[float, float]], on: Sequence[tuple[float, float]]) -> Row:
    """Medians over rounds of (idle ms per step, speed); speeds are compared within a round, since a machine has moods."""
    speed = statistics.median(ahead / alone for (_, alone), (_, ahead) in zip(off, on, strict=True))
    return Row(engine, rows, statistics.median(one for one, _ in off), statistics.median(one for one, _ in on), speed)


def cpu_run(driver: Driver, worker: str, rows: int, n_tokens: int) -> tuple[float, float]:
    """Idle ms per step and tokens per second, from the first tokens of all until the first answer ends."""
    name, rng = WorkerId(worker), random.Random(2)
    prompts = [[rng.randrange(8, 1500) for _ in range(32)] for _ in range(rows)]
    requests = [driver.send(worker, prompt, max_tokens=n_tokens, timeout_ms=600_000) for prompt in prompts]
    outcomes = [driver.outcomes[request] for request in requests]
    driver.until(lambda: all(one.tokens for one in outcomes), "first tokens", timeout_s=600)
    driver.refresh()
    before, began_s, had = driver.reports[name].counters, time.perf_counter(), sum(len(o.tokens) for o in outcomes)
    driver.until(lambda: any(len(one.tokens) >= n_tokens - 20 for one in outcomes), "nearly done", timeout_s=600)
    driver.refresh()
    after, elapsed_s = driver.reports[name].counters, time.perf_counter() - began_s
    drawn = sum(len(one.tokens) for one in outcomes) - had
    driver.finish(requests, timeout_s=600)
    busy_ms, steps = (after[one] - before[one] for one in ("engine_busy_ms_total", "steps_total"))
    return (elapsed_s * 1e3 - busy_ms) / steps, drawn / elapsed_s


def cpu_rows(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Both workers in turn."""
    rows: list[Row] = []
    model = make_model("tiny", folder / "tiny")
    with cluster(folder) as processes:
        for name, ahead in (("mixed-off", "off"), ("mixed-on", "on")):
            processes.start("mixed", name, model=model, device_memory="256MiB", plan_ahead=ahead, max_running=256)
        processes.await_members("mixed-off", "mixed-on")
        with Driver([processes.members()[name] for name in ("mixed-off", "mixed-on")]) as driver:
            for n_rows in options.rows:
                found: dict[str, list[tuple[float, float]]] = {"mixed-off": [], "mixed-on": []}
                for number in range(options.rounds + 1):
                    for name, runs in found.items():
                        run = cpu_run(driver, name, n_rows, options.steps)
                        runs += [run] if number else []
                rows.append(row_of("cpu", n_rows, found["mixed-off"], found["mixed-on"]))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=("device", "cpu"), default=["device", "cpu"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: list[Row] = []
    if "device" in options.engines:
        found += [device_row(rows, options) for rows in options.rows]
    if "cpu" in options.engines:
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
            found += cpu_rows(options, Path(temporary))
    print(f"{'engine':8} {'rows':>5} {'idle off ms':>12} {'idle on ms':>11} {'on/off':>7} {'speed on/off':>13}")
    for row in found:
        ratio = row.idle_on_ms / row.idle_off_ms
        print(
            f"{row.engine:8} {row.rows:5} {row.idle_off_ms:12.3f} {row.idle_on_ms:11.3f} {ratio:7.2f} {row.speed:13.2f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
