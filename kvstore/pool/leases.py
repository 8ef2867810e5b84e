"""Which pins end when. Pure: time is an argument."""

from collections.abc import Callable

from kvstore.pool.addresses import Lease


class LeaseTable:
    """Owns `_leases`. A lease leaves with `drop`, at the end of its time (`due`) or with its owner (`of`)."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, make: Callable[[int], Lease]) -> Lease:
        """Keep the lease that `make` gives for the next number. Numbers never come back."""
        self._numbers += 1
        lease = make(self._numbers)
        self._leases[lease.number] = lease
        return lease

    def drop(self, number: int) -> Lease | None:
        """The lease, which is over now; None if it was over before."""
        return self._leases.pop(number, None)

    def due(self, now_ms: float) -> list[Lease]:
        """Leases whose time is up."""
        return [lease for lease in self._leases.values() if lease.ends_ms <= now_ms]

    def of(self, owner: str) -> list[Lease]:
        """Leases of one owner."""
        return [lease for lease in self._leases.values() if lease.owner == owner]

    def all(self) -> list[Lease]:
        """Every lease, oldest first."""
        return list(self._leases.values())
