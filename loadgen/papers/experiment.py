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

    def system(self, name: str) -> System:
        """Raises StopIteration for a name that is none."""
        return next(system for system in self.systems if system.name == name)
