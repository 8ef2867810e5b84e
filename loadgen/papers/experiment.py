"""What a paper's experiment consists of, as data: workloads and systems to cross, and the figures that the paper prints."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to serve."""

    name: str
    cluster: str
    """As in --cluster."""
    flags: tuple[str, ...]
    """As in --cluster-flags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperWorkload:
    """One kind of work."""

    name: str
    flags: tuple[str, ...]
    """Of `bench run`."""
    load: float | None = None
    """Rate, as a share of what the system `capacity_of` can do; None: as `--load` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the paper says changes when one system takes the place of another."""

    workload: str
    base: str
    other: str
    """Names of systems."""
    changes: Mapping[str, float | None]
    """Ratio other / base by metric (`mean_e2el_ms`, ...); None: not given."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """All of it."""

    paper: str
    workloads: tuple[PaperWorkload, ...]
    systems: tuple[System, ...]
    capacity_of: str
    """The system whose capacity sets the rate for all."""
    claims: tuple[Claim, ...] = field(default_factory=tuple)
    shown: Mapping[str, str] = field(
        default_factory=lambda: {
            "mean_e2el_ms": "mean JCT (ms)",
            "p99_e2el_ms": "P99 JCT (ms)",
            "mean_ttft_ms": "mean TTFT (ms)",
            "p99_ttft_ms": "P99 TTFT (ms)",
        }
    )
    """Numbers of `result.json` that the paper is about, and their titles."""
    preset: str = "mini"
    """The model that is made if none is named."""
    requests: int = 250
    """Of a run, if nothing is said."""
    load: float = 0.6
    scale: float = 0.25
    """Factor of all lengths, if nothing is said."""
    turns_by_arrivals: bool = False
    """Whether conversations are cut into requests that arrive one by one (`--turns-by arrivals`)."""
    rhythm: tuple[str, ...] | None = None
    """Flags of `bench run` for how requests follow one another, instead of a rate; None: a rate."""
    flags: tuple[str, ...] = ()
    """Of every `bench run`, such as targets."""

    def system(self, name: str) -> System:
        """Raises StopIteration for a name that is none."""
        return next(system for system in self.systems if system.name == name)
