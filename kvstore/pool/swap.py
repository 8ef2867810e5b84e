"""Moving visible blocks between the two tiers: copy first, then change what is visible. A failed copy moves nothing."""

from collections.abc import Sequence

from common.block_hash import BlockHash
from common.ids import Owner
from kvstore.index.block_pool import Block
from kvstore.pool.addresses import Address
from kvstore.pool.media import Media, TierCopy
from kvstore.pool.tier import Before


def move_to_host(media: Media, call: Owner, n_blocks: int, copy: TierCopy) -> tuple[Address, ...]:
    """The coldest device blocks, as many as the host has room for; returns where they lie then. `call` ends the move."""
    victims = media.device.pool.withdraw(call, min(n_blocks, media.host.available_blocks))
    moved = False
    try:
        _copy_to_host(media, call, victims, copy)
        moved = True
    finally:
        if not moved:
            media.device.put_back(call, victims)
    return tuple(media.host.where[block.name] for block in victims)


def _copy_to_host(media: Media, call: Owner, victims: Sequence[Block], copy: TierCopy) -> None:
    device, host = media.device, media.host
    host.pin(call, [block.name for block in victims if block.name in host.where])
    moving = [block for block in victims if block.name not in host.where]
    addresses = host.alloc(call, len(moving))
    copy(host, [one.block for one in addresses], device, [device.block_at(victim) for victim in moving])
    for victim, address in zip(moving, addresses, strict=True):  # coldest first, as they were
        host.publish(call, [victim.name], [address], Before(victim.parent, victim.depth))


def move_to_device(media: Media, call: Owner, names: Sequence[BlockHash], copy: TierCopy) -> tuple[Address, ...]:
    """Visible blocks; returns where each lies on the device then. Raises OutOfPages."""
    device, host = media.device, media.host
    device.pin(call, [name for name in names if name in device.where])
    moving = [name for name in dict.fromkeys(names) if name not in device.where]
    addresses = device.alloc(call, len(moving))
    copy(device, [one.block for one in addresses], host, [host.where[name].block for name in moving])
    for name, address in reversed(list(zip(moving, addresses, strict=True))):  # of a chain the end is the older part
        cached = host.pool.cache.get(name)
        assert cached is not None, "pinned above"
        device.publish(call, [name], [address], Before(cached.parent, cached.depth))
    host.pool.forget(moving)
    return tuple(device.where[name] for name in names)
