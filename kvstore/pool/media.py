"""The two tiers of a MemPool as one: addresses and names are looked up in both, and every call is undone in both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.block_hash import BlockHash, hash_blocks, root_hash
from common.ids import Owner
from common.messages.liveness import ModelIdentity
from kvstore.pool.addresses import Address, Medium, WrongAddress
from kvstore.pool.tier import Before, Tier
from kvstore.pool.transfer import by_media, runs

TierCopy = Callable[[Tier, Sequence[int], Tier, Sequence[int]], None]
"""Copies blocks: into a tier, to these of it, out of a tier, from those of it."""


class Media:
    """Owns the device and the host tier of one instance, and the number of calls made."""

    def __init__(self, instance: str, identity: ModelIdentity, device: Tier, host: Tier) -> None:
        self.instance, self.identity = instance, identity
        self.device, self.host = device, host
        self.tiers = {Medium.DEVICE: device, Medium.HOST: host}
        self._calls = 0

    @contextmanager
    def call(self) -> Iterator[Owner]:
        """An owner for one call. What it still holds at the end, private blocks and pins, is given back."""
        self._calls += 1
        owner = Owner(f"call:{self._calls}")
        try:
            yield owner
        finally:
            self.release(owner)

    def release(self, owner: Owner) -> int:
        """The owner is over in both tiers; returns how many private blocks it had."""
        return self.device.release(owner) + self.host.release(owner)

    # -- names

    def chain(self, tokens: Sequence[int], salt: str) -> tuple[Before, list[BlockHash]]:
        """The root, and the names of the whole blocks of `tokens`."""
        root = root_hash(self.identity, salt)
        return Before(root, 0), hash_blocks(tokens, root, self.identity.block_tokens)

    def find(self, name: BlockHash) -> Address | None:
        """Where a visible block lies; the device goes before the host."""
        return self.device.where.get(name) or self.host.where.get(name)

    def where(self, name: BlockHash) -> Address:
        """As `find`, of a block that is known to be visible."""
        return self.device.where.get(name) or self.host.where[name]

    def run(self, names: Sequence[BlockHash]) -> tuple[Address, ...]:
        """Where the first of `names` lie, up to the first that is not visible."""
        device, host = self.device.where, self.host.where
        found: list[Address] = []
        for name in names:
            address = device.get(name) or host.get(name)
            if address is None:
                break
            found.append(address)
        return tuple(found)

    def drop(self, names: Sequence[BlockHash]) -> int:
        """Take out a chain, last first, up to a block that others continue or that is pinned; returns how many names went."""
        n_dropped = 0
        for name in reversed(names):
            if any(tier.pool.cache.has_child(name) for tier in self.tiers.values()):
                break
            n_copies = sum(tier.pool.forget([name]) for tier in self.tiers.values())
            if self.find(name) is not None:
                break
            n_dropped += n_copies > 0
        return n_dropped

    # -- addresses: each raises WrongAddress and changes nothing

    def tier(self, address: Address) -> Tier:
        """The tier of an address of this pool."""
        tier = self.tiers[address.medium]
        if address.instance != self.instance or not 0 <= address.block < tier.n_blocks:
            raise WrongAddress(
                f"{address} is not of {self.instance!r}, which has {tier.n_blocks} {tier.medium.value} blocks"
            )
        if not tier.is_current(address):
            raise WrongAddress(f"{address} is out of date: the block was freed or evicted, and given out again")
        return tier

    def visible_name(self, address: Address) -> BlockHash:
        """The name of a visible block."""
        name = self.tier(address).names.get(address.block)
        if name is None:
            raise WrongAddress(f"{address} is not visible: evicted, moved, or never published")
        return name

    def require_private(self, addresses: Sequence[Address]) -> None:
        """Each is a private block, and named once."""
        if len(set(addresses)) != len(addresses):
            raise WrongAddress(f"of {len(addresses)} addresses some are named twice")
        for address in addresses:
            self.tier(address).holder_of(address.block)

    def require_offered(self, names: Sequence[BlockHash], addresses: Sequence[Address]) -> None:
        """Each is a private block, or the visible block of the name in its place."""
        require_one_each(names, addresses)
        if len(set(addresses)) != len(addresses):
            raise WrongAddress(f"of {len(addresses)} addresses some are named twice")
        for name, address in zip(names, addresses, strict=True):
            tier = self.tier(address)
            if address.block in tier.holders:
                continue
            if address.block not in tier.names:
                tier.holder_of(address.block)
            if tier.names[address.block] != name:
                raise WrongAddress(f"{address} holds another block of tokens")

    # -- parts of calls; `call` is the owner that `call()` gave

    def hand_over(self, addresses: Sequence[Address], owner: Owner) -> None:
        """Private blocks become `owner`'s."""
        for medium, tier in self.tiers.items():
            blocks = [address.block for address in addresses if address.medium is medium]
            if blocks:
                tier.hand_over(blocks, owner)

    def publish(self, call: Owner, root: Before, names: Sequence[BlockHash], addresses: Sequence[Address]) -> int:
        """Make what is private among `addresses` visible, or leave it to the end of `call`; returns how many names are new."""
        device, host = self.device.where, self.host.where
        n_known = len((device.keys() & names) | (host.keys() & names))
        for medium, tier in self.tiers.items():
            visible = tier.names
            places = [at for at, one in enumerate(addresses) if one.medium is medium and one.block not in visible]
            if not places:
                continue
            holders = {tier.holders[addresses[at].block] for at in places}
            wanted = places
            if n_known:
                wanted = [at for at in places if names[at] not in device and names[at] not in tier.where]
            spare = places if len(holders) > 1 else sorted(set(places).difference(wanted)) if n_known else []
            if spare:
                tier.hand_over([addresses[at].block for at in spare], call)
            holder = call if len(holders) > 1 else holders.pop()
            for first, end in runs(wanted):
                before = Before(names[first - 1], first) if first else root
                tier.publish(holder, names[first:end], addresses[first:end], before)
        if n_known and host:
            self.host.pool.forget([name for name in names if name in device and name in host])
        return len(names) - n_known

    @contextmanager
    def reading(self, addresses: Sequence[Address]) -> Iterator[None]:
        """Private and visible blocks stay where they are meanwhile."""
        with self.call() as call:
            for address in addresses:
                tier = self.tier(address)
                name = tier.names.get(address.block)
                if name is None:
                    tier.holder_of(address.block)
                else:
                    tier.pin(call, [name])
            yield

    def pin_known(self, call: Owner, names: Sequence[BlockHash]) -> list[int]:
        """Pin what is visible of `names`; returns the positions of the others."""
        device, host = self.device.where, self.host.where
        self.device.pin(call, [name for name in names if name in device])
        self.host.pin(call, [name for name in names if name in host and name not in device])
        return [at for at, name in enumerate(names) if name not in device and name not in host]

    def send(self, source: Sequence[Address], receiver: "Media", target: Sequence[Address], copy: TierCopy) -> None:
        """Copy blocks of this pool into private blocks of another, or of itself."""
        for sources, targets in by_media(source, target):
            into, out_of = receiver.tiers[targets[0].medium], self.tiers[sources[0].medium]
            copy(into, [one.block for one in targets], out_of, [one.block for one in sources])


def require_one_each(blocks: Sequence[object], addresses: Sequence[Address]) -> None:
    """Raise ValueError unless there are as many addresses as blocks."""
    if len(blocks) != len(addresses):
        raise ValueError(f"{len(addresses)} addresses for {len(blocks)} blocks")
