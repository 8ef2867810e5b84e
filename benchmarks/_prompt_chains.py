"""The prompts of the prompt_tree benchmark, equal in every process that asks. Standard library only: peers run it too."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NAME_BYTES = 16
KINDS = ("full", "half", "miss", "ragged")


@dataclass(frozen=True)
class Load:
    """Prompts by the worker that holds them, and prompts to ask for. A prompt is one run of names."""

    held: Sequence[Sequence[Sequence[bytes]]]
    """Worker -> prompts, each a chain from its first block."""
    asked: dict[str, Sequence[Sequence[bytes]]]
    """Kind -> prompts: `full` one worker has all of it, `half` one has its first half, `miss` nobody has any; `ragged` every
    worker has another length of it."""


def load(total_blocks: int, workers: int, prompt_blocks: int, rounds: int) -> Load:
    """A tree of about `total_blocks` names. 50 prompts of it are ragged."""
    rng = random.Random(total_blocks)
    ragged = [chain(rng, prompt_blocks) for _ in range(50)]
    n_prompts = max(workers, total_blocks // prompt_blocks - len(ragged))
    prompts = [chain(rng, prompt_blocks) for _ in range(n_prompts)]
    held = [list(prompts[worker::workers]) for worker in range(workers)]
    for one in ragged:
        lengths = sorted(rng.sample(range(1, prompt_blocks + 1), workers))
        for worker, n_blocks in zip(rng.sample(range(workers), workers), lengths, strict=True):
            held[worker].append(one[:n_blocks])
    half = prompt_blocks // 2
    asked = {
        "full": [rng.choice(prompts) for _ in range(rounds)],
        "half": [rng.choice(prompts)[:half] + chain(rng, prompt_blocks - half) for _ in range(rounds)],
        "miss": [chain(rng, prompt_blocks) for _ in range(rounds)],
        "ragged": [rng.choice(ragged) for _ in range(rounds)],
    }
    return Load(held, {kind: fresh(asked[kind]) for kind in KINDS})


def chain(rng: random.Random, n_blocks: int) -> list[bytes]:
    whole = rng.randbytes(NAME_BYTES * n_blocks)
    return [whole[at : at + NAME_BYTES] for at in range(0, len(whole), NAME_BYTES)]


def fresh(prompts: Sequence[Sequence[bytes]]) -> list[list[bytes]]:
    """Copies, as a request brings its own: no name's hash is known yet."""
    return [[bytes(bytearray(name)) for name in prompt] for prompt in prompts]


def pieces(prompt: Sequence[bytes], limit: int) -> Iterator[Sequence[bytes]]:
    for at in range(0, len(prompt), limit):
        yield prompt[at : at + limit]
