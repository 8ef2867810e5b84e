"""How much memory each owner had during a run, on average and at most. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadgen.results.timeline import ServerSample


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """One owner's memory of one tier over all samples; a sample in which it had none counts as 0 bytes."""

    worker: str | None
    """None: of all workers together."""
    tier: str
    owner: str
    mean_bytes: float
    peak_bytes: int


def memory_use(samples: Sequence[ServerSample]) -> tuple[MemoryUse, ...]:
    """Of all workers together, in the order in which the server names tiers and owners; empty if it does not tell."""
    return _uses([_together(sample) for sample in told(samples)])


def memory_use_by_worker(samples: Sequence[ServerSample]) -> tuple[MemoryUse, ...]:
    """As `memory_use`, of every worker, by name."""
    known = told(samples)
    names = sorted({name for sample in known for name in sample.memory})
    return tuple(use for name in names for use in _uses([_of_worker(sample, name) for sample in known]))


def told(samples: Sequence[ServerSample]) -> list[ServerSample]:
    """Those of the samples that say who has memory."""
    return [sample for sample in samples if sample.memory]


_Place = tuple[str | None, str, str]


def _uses(rows: Sequence[Mapping[_Place, int]]) -> tuple[MemoryUse, ...]:
    places = dict.fromkeys(place for row in rows for place in row)
    return tuple(_use(place, [row.get(place, 0) for row in rows]) for place in places)


def _use(place: _Place, n_bytes: Sequence[int]) -> MemoryUse:
    worker, tier, owner = place
    mean_bytes = sum(n_bytes) / len(n_bytes)
    return MemoryUse(worker=worker, tier=tier, owner=owner, mean_bytes=mean_bytes, peak_bytes=max(n_bytes))


def _together(sample: ServerSample) -> dict[_Place, int]:
    found: dict[_Place, int] = {}
    for name in sample.memory:
        for (_, tier, owner), n_bytes in _of_worker(sample, name).items():
            found[None, tier, owner] = found.get((None, tier, owner), 0) + n_bytes
    return found


def _of_worker(sample: ServerSample, name: str) -> dict[_Place, int]:
    return {(name, tier, owner): n_bytes for tier, owner, n_bytes in _parts(sample.memory.get(name, {}))}


def _parts(tiers: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, str, int]]:
    return ((tier, owner, n_bytes) for tier, owners in tiers.items() for owner, n_bytes in owners.items())
