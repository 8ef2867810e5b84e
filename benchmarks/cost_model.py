"""Error of the learned exec(prompt, cached) and step(batch, kv) on steps that were not learned from, beside tokens alone.

    python -m benchmarks.cost_model [--model DIR | --preset tiny] [--steps 800] [--rounds 9] [--threads 1] [--json FILE]

A mixed run: prompts of many lengths, some of which begin like an earlier one, and their answers, through the worker's
scheduler and engine; the model learns from each step as a worker does, from nothing. After as many steps as told the run
goes on unlearned, and between its steps prompts and batches of other sizes are measured (the median of some rounds). No
prompt is measured twice: the first step of a size is slower, since kernels are built for it, and prompts have many sizes. The baseline learns from the same steps: milliseconds per
prompt token and per decoding sequence, the median over steps that are all of one kind.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from common.block_hash import BlockHash, hash_blocks
from common.cost.step_fit import StepFit
from common.ids import RequestId
from common.messages.requests import Sampling
from common.policy.batching import DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger
from services.worker.core.costing import Costing, step_work
from services.worker.core.plan import StepPlan
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt
from services.worker.engine.engine import TorchEngine
from services.worker.engine.make import EngineLimits
from services.worker.engine.torch_options import configure_torch
from services.worker.model.load import LoadedModel, load_model
from services.worker.model.make import PRESETS, make_model
from services.worker.profile.grid import GridPoint
from services.worker.profile.measure import StepTimer

CHUNK_TOKENS, MAX_RUNNING, POOL_TOKENS = 512, 24, 40_000
ROOT = BlockHash(bytes(16))
PROMPTS = [(40, 0), (200, 0), (200, 160), (700, 0), (700, 480), (1200, 0), (1200, 1120), (1900, 0), (1900, 960)]
BATCHES = [(1, 48), (1, 700), (3, 200), (6, 90), (6, 1000), (12, 400), (20, 150), (20, 900)]
"""Sequences, and tokens of each on average: they are spread from half to one and a half of it."""
_STEPS_BETWEEN = 5


@dataclass(frozen=True)
class Checked:
    """One prompt or one batch that was not learned from."""

    what: str
    measured_ms: float
    predicted_ms: float
    by_tokens_ms: float

    @property
    def error(self) -> float:
        return abs(self.predicted_ms / self.measured_ms - 1.0)

    @property
    def error_by_tokens(self) -> float:
        return abs(self.by_tokens_ms / self.measured_ms - 1.0)


@dataclass
class ByTokens:
    """The baseline: milliseconds per token, per phase."""

    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    def learn(self, plan: StepPlan, ms: float) -> None:
        work = step_work(plan.segments)
        if not work.rows:
            self.prefill_ms.append(ms / work.new_tokens)
        elif not work.new_tokens:
            self.decode_ms.append(ms / work.rows)

    def exec_ms(self, prompt_tokens: int, cached_tokens: int) -> float:
        return (prompt_tokens - cached_tokens) * statistics.median(self.prefill_ms)

    def step_ms(self, batch: int) -> float:
        return batch * statistics.median(self.decode_ms)


class MixedRun:
    """A worker's scheduler and engine under a made-up load; prompts come so that some steps hold both phases."""

    def __init__(self, model: LoadedModel, pages: torch.Tensor, seed: int) -> None:
        layout = model.layout
        pool = BlockPool(Ledger(pages.shape[0]), layout.layers, Lru())
        reuse = PrefixReuse(pool, Keep.ALL, layout.block_tokens)
        policy = DecodeFirst(CHUNK_TOKENS, layout.block_tokens)
        context_tokens = model.identity.context_tokens
        self._scheduler = Scheduler(reuse, layout, policy, max_running=MAX_RUNNING, context_tokens=context_tokens)
        self._engine, self._layout = TorchEngine(model, pages, layout), layout
        self._rng, self._vocab_tokens = random.Random(seed), model.identity.vocab_tokens
        self._longest_tokens = min(model.identity.context_tokens - 128, 1800)
        self._said: list[tuple[int, ...]] = []
        self.fit, self.by_tokens = StepFit(CHUNK_TOKENS), ByTokens()
        self._costing = Costing(self.fit, pool, layout.block_tokens)

    def run(self, n_steps: int, *, learn: bool) -> None:
        for _ in range(n_steps):
            if self._rng.random() < 0.15 or self._scheduler.idle:
                self._submit()
            self._scheduler.take_started()
            plan = self._scheduler.plan()
            if plan is None:
                continue
            result = self._engine.step(plan)
            if learn:
                self._costing.learn(plan, result)
                self.by_tokens.learn(plan, result.compute_ms)
            for new in self._scheduler.complete(result):
                if new.sequence.generated_tokens == new.sequence.sampling.max_tokens:
                    self._said.append(tuple(new.sequence.tokens))
                    self._scheduler.drop(new.sequence.request)

    def _submit(self) -> None:
        rng = self._rng
        start = rng.choice(self._said) if self._said and rng.random() < 0.4 else ()
        fresh = tuple(rng.randrange(5, self._vocab_tokens) for _ in range(int(16 * 2 ** rng.uniform(0.0, 6.5))))
        tokens = (start + fresh)[: self._longest_tokens]
        request = RequestId(f"r{rng.getrandbits(64):x}")
        names = tuple(hash_blocks(tokens[:-1], ROOT, self._layout.block_tokens))
        sampling = Sampling(max_tokens=rng.choice([1, 1, 8, 32, 64]))
        self._scheduler.submit(NewPrompt(request=request, tokens=tokens, sampling=sampling, root=ROOT, hashes=names))


def chunks(prompt_tokens: int, cached_tokens: int) -> list[list[GridPoint]]:
    """The steps in which a worker computes a prompt alone."""
    starts = range(cached_tokens, prompt_tokens, CHUNK_TOKENS)
    return [[GridPoint(1, min(CHUNK_TOKENS, prompt_tokens - start), start)] for start in starts]


def batch_of(batch: int, mean_tokens: int) -> list[GridPoint]:
    """One decoding step."""
    shares = [0.5 + (row + 0.5) / batch for row in range(batch)]
    return [GridPoint(1, 1, round(mean_tokens * share) - 1) for share in shares]


def _near(prompt_tokens: int, cached_tokens: int, more_tokens: int) -> list[list[GridPoint]]:
    return chunks(prompt_tokens + more_tokens, cached_tokens)


def _same(step: list[GridPoint], _: int) -> list[list[GridPoint]]:
    return [step]


def check(run: MixedRun, timer: StepTimer, rounds: int) -> list[Checked]:
    """What was not learned from, measured in turns between steps of the run."""
    cost, by_tokens = run.fit.cost, run.by_tokens
    assert cost is not None, "the run had a step"
    points: list[tuple[str, Callable[[int], list[list[GridPoint]]], float, float]] = []
    for prompt, cached in PROMPTS:
        predicted, by_tokens_ms = cost.exec_ms(prompt, cached), by_tokens.exec_ms(prompt, cached)
        steps = partial(_near, prompt, cached)
        points.append((f"exec({prompt}, {cached})", steps, predicted, by_tokens_ms))
    for batch, mean_tokens in BATCHES:
        step = batch_of(batch, mean_tokens)
        kv_tokens = sum(point.n_tokens for point in step)
        predicted, by_tokens_ms = cost.step_ms(batch, kv_tokens), by_tokens.step_ms(batch)
        points.append((f"step({batch}, {kv_tokens})", partial(_same, step), predicted, by_tokens_ms))
    times: list[list[float]] = [[] for _ in points]
    for number in range(rounds):
        for index, (_, measured, _, _) in enumerate(points):
            run.run(_STEPS_BETWEEN, learn=False)
            times[index].append(sum(timer.run(step) for step in measured(number - rounds // 2)))
    return [
        Checked(what, statistics.median(ms), predicted, tokens)
        for (what, _, predicted, tokens), ms in zip(points, times, strict=True)
    ]


def print_table(results: Sequence[Checked]) -> None:
    print(f"{'':<22}{'measured ms':>12}{'learned ms':>12}{'error':>8}{'by tokens ms':>14}{'error':>8}")
    for one in results:
        print(
            f"{one.what:<22}{one.measured_ms:>12.2f}{one.predicted_ms:>12.2f}{one.error:>8.0%}"
            f"{one.by_tokens_ms:>14.2f}{one.error_by_tokens:>8.0%}"
        )
    for kind in ("exec", "step"):
        mine = [one for one in results if one.what.startswith(kind)]
        errors = [[one.error for one in mine], [one.error_by_tokens for one in mine]]
        learned, tokens = (f"median {statistics.median(e):.0%}, largest {max(e):.0%}" for e in errors)
        print(f"{kind}: learned {learned}; by tokens {tokens}")


def main(argv: Sequence[str]) -> int:
    """Exit code 1 if tokens alone predict better."""
    parser = argparse.ArgumentParser(prog="cost_model", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None, help="folder of the checkpoint; default: a new one of --preset")
    parser.add_argument("--preset", default="tiny", choices=tuple(PRESETS))
    parser.add_argument("--steps", type=int, default=800, help="of the mixed run")
    parser.add_argument("--rounds", type=int, default=9, help="in which everything else is measured")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="also write the results to this file")
    options = parser.parse_args(argv)
    threads = configure_torch(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(options.model or make_model(options.preset, Path(scratch) / options.preset))
    layout = model.layout
    shape = (layout.pages_for(POOL_TOKENS), layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
    run = MixedRun(model, torch.full(shape, 0.5, dtype=model.dtype), options.seed)
    run.run(options.steps, learn=True)
    limits = EngineLimits(max_running=64, max_step_tokens=512, context_tokens=model.identity.context_tokens)
    results = check(run, StepTimer(model, torch.full(shape, 0.5, dtype=model.dtype), limits), options.rounds)
    cost = run.fit.cost
    assert cost is not None, "the run had a step"
    print(f"{model.identity.name}, {threads} threads, learned from {cost.n_samples} steps: {cost}")
    misses = (run.fit.prefill_misses.median, run.fit.decode_misses.median)
    print("predicted before learning, median error: " + ", ".join(f"{miss:.0%}" for miss in misses if miss is not None))
    print_table(results)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    better = statistics.median(one.error - one.error_by_tokens for one in results) < 0.0
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
