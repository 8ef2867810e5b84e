"""What each of the nine calls promises, on its own."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, OutOfPages
from common.kv_layout import KvLayout
from kvstore import Address, Medium, MemPool, PoolOptions, WrongAddress
from kvstore.index.ledger import LedgerMisuse
from tests.kvstore.pool.builders import BLOCK_BYTES, LAYOUT, HandClock, fill, holds, names_of, pattern, pool, tokens_of

DEVICE, HOST = Medium.DEVICE, Medium.HOST


def stored(one: MemPool, tokens: list[int], medium: Medium = DEVICE, salt: str = "") -> list[Address]:
    """Visible, filled blocks of `tokens`."""
    names = names_of(tokens, salt)
    addresses = one.alloc_mem(len(names), medium, "writer")
    fill(one, addresses, names)
    return list(one.insert(tokens, addresses, salt).addresses)


def test_private_blocks_are_an_owner_s_until_freed() -> None:
    one = pool()
    addresses = one.alloc_mem(5, DEVICE, "r1")
    assert len(set(addresses)) == 5
    assert {(address.instance, address.medium) for address in addresses} == {("a", DEVICE)}
    assert (one.available_blocks(DEVICE), one.available_blocks(HOST)) == (3, 8)
    one.check()
    one.free_mem(addresses[:2])
    with pytest.raises(WrongAddress, match="is free"):
        one.free_mem(addresses)
    with pytest.raises(WrongAddress, match="named twice"):
        one.free_mem(addresses[3:4] * 2)
    assert one.available_blocks(DEVICE) == 5
    assert one.abort("r1") == 3
    assert one.abort("r1") == one.abort("nobody") == 0
    one.check()


def test_alloc_is_all_or_nothing_and_evicts_what_nobody_uses() -> None:
    one = pool(device=4)
    stored(one, tokens_of(3))
    with pytest.raises(OutOfPages):
        one.alloc_mem(5, DEVICE, "r")
    with pytest.raises(ValueError, match="-1 blocks"):
        one.alloc_mem(-1, DEVICE, "r")
    assert one.match(tokens_of(3)).n_blocks == 3
    assert len(one.alloc_mem(3, DEVICE, "r")) == 3
    assert one.match(tokens_of(3)).n_blocks == 1
    one.check()


def test_what_is_written_is_read_layer_by_layer() -> None:
    one = pool()
    address = one.alloc_mem(1, HOST, "r")[0]
    fill(one, [address], [b"x"])
    assert holds(one, [address], [b"x"])
    with pytest.raises(ValueError, match="read-only"):
        one.read(address)[0, 0] = 1
    for layer, page in ((3, bytes(LAYOUT.page_bytes)), (-1, bytes(LAYOUT.page_bytes)), (0, b"short")):
        with pytest.raises(ValueError, match="3 layers of"):
            one.write(address, layer, page)
    assert holds(one, [address], [b"x"])


def test_visible_blocks_never_change_and_free_ones_are_nobody_s() -> None:
    one = pool()
    visible = stored(one, tokens_of(1))[0]
    with pytest.raises(WrongAddress, match="is published"):
        one.write(visible, 0, bytes(LAYOUT.page_bytes))
    with pytest.raises(WrongAddress, match="is published"):
        one.free_mem([visible])
    free = Address("a", DEVICE, 7, 0)
    for attempt in (lambda: one.read(free), lambda: one.write(free, 0, bytes(LAYOUT.page_bytes))):
        with pytest.raises(WrongAddress, match="is free"):
            attempt()
    for strange in (Address("b", DEVICE, 0, 0), Address("a", DEVICE, 8, 0), Address("a", HOST, -1, 0)):
        with pytest.raises(WrongAddress, match="is not of 'a'"):
            one.read(strange)


def test_insert_makes_whole_blocks_visible_and_match_finds_the_longest_run() -> None:
    one, tokens = pool(), tokens_of(3)
    addresses = one.alloc_mem(3, DEVICE, "r")
    assert one.match(tokens).n_blocks == 0
    result = one.insert([*tokens, 1, 2, 3], addresses)
    assert (result.n_new_blocks, list(result.addresses)) == (3, addresses)
    match = one.match([*tokens, 9, 9, 9, 9])
    assert (list(match.addresses), list(match.names)) == (addresses, names_of(tokens))
    assert one.match(tokens[:11]).n_blocks == 2
    assert one.match([5, *tokens[1:]]).n_blocks == one.match([]).n_blocks == one.match(tokens, salt="x").n_blocks == 0
    assert one.available_blocks(DEVICE) == 8
    one.check()


def test_insert_uses_up_duplicates_and_says_where_the_first_copy_is() -> None:
    one, tokens = pool(), tokens_of(3)
    first = stored(one, tokens[:8])
    again = one.alloc_mem(3, DEVICE, "r2")
    result = one.insert(tokens, again)
    assert (result.n_new_blocks, list(result.addresses)) == (1, [*first, again[2]])
    for address in again[:2]:
        with pytest.raises(WrongAddress, match="is free"):
            one.read(address)
    assert one.abort("r2") == 0
    one.check()


def test_insert_takes_the_addresses_of_a_match_in_their_places() -> None:
    one, tokens = pool(), tokens_of(4)
    stored(one, tokens[:8])
    hit = one.match(tokens)
    rest = one.alloc_mem(2, DEVICE, "r")
    assert one.insert(tokens, [*hit.addresses, *rest]).n_new_blocks == 2
    with pytest.raises(WrongAddress, match="holds another block"):
        one.insert(tokens, [hit.addresses[1], hit.addresses[0], *rest])
    with pytest.raises(ValueError, match="2 addresses for 4 blocks"):
        one.insert(tokens, rest)
    own = one.alloc_mem(1, DEVICE, "r")
    with pytest.raises(WrongAddress, match="named twice"):
        one.insert(tokens_of(2, first=7), own * 2)
    assert one.abort("r") == 1
    one.check()


def test_a_device_copy_replaces_the_one_on_the_host_and_not_the_other_way() -> None:
    one, tokens = pool(), tokens_of(2)
    stored(one, tokens, HOST)
    result = one.insert(tokens, one.alloc_mem(2, DEVICE, "r"))
    assert {address.medium for address in result.addresses} == {DEVICE}
    assert (result.n_new_blocks, one.available_blocks(HOST)) == (0, 8)
    assert not one._media.host.where
    assert one.insert(tokens, one.alloc_mem(2, HOST, "r")).addresses == result.addresses
    assert not one._media.host.where
    one.check()


def test_one_insert_may_mix_media() -> None:
    one, tokens = pool(), tokens_of(5)
    device, host = one.alloc_mem(3, DEVICE, "r"), one.alloc_mem(2, HOST, "q")
    mixed = [device[0], host[0], host[1], device[1], device[2]]
    assert one.insert(tokens, mixed).n_new_blocks == 5
    assert list(one.match(tokens).addresses) == mixed
    one.check()


def test_delete_spares_what_others_continue() -> None:
    one = pool()
    shared = tokens_of(2)
    stored(one, [*shared, 1, 1, 1, 1])
    stored(one, [*shared, 2, 2, 2, 2])
    assert one.delete([*shared, 1, 1, 1, 1]) == 1
    assert one.match([*shared, 2, 2, 2, 2]).n_blocks == 3
    assert one.delete(shared) == 0
    lease = one.pin(one.match([*shared, 2, 2, 2, 2]), "r", 10)
    assert one.delete([*shared, 2, 2, 2, 2]) == 0
    one.unpin(lease)
    assert one.delete([*shared, 2, 2, 2, 2]) == 3
    assert one.delete([*shared, 2, 2, 2, 2]) == 0
    assert one.available_blocks(DEVICE) == 8
    one.check()


def test_two_tenants_with_the_same_prompt_share_no_block() -> None:
    one, tokens = pool(device=8), tokens_of(3)
    ours = stored(one, tokens, salt="tenant a")
    assert one.match(tokens, salt="tenant b").n_blocks == one.match(tokens).n_blocks == 0
    theirs = stored(one, tokens, salt="tenant b")
    assert not set(ours) & set(theirs)
    assert one.delete(tokens, salt="tenant a") == 3
    assert one.match(tokens, salt="tenant b").n_blocks == 3
    one.check()


def test_swap_out_moves_the_coldest_and_swap_in_brings_them_back() -> None:
    one, old, new = pool(), tokens_of(3), tokens_of(2, first=9)
    stored(one, old)
    stored(one, new)
    moved = one.swap_out(2)
    assert [address.medium for address in moved] == [HOST, HOST]
    match = one.match(old)
    assert [address.medium for address in match.addresses] == [DEVICE, HOST, HOST]
    assert set(match.addresses[1:]) == set(moved)
    assert holds(one, match.addresses, match.names)
    assert one.match(new).n_blocks == 2
    back = one.swap_in(match.addresses)
    assert [address.medium for address in back] == [DEVICE] * 3
    assert one.match(old).addresses == back
    assert holds(one, back, match.names)
    assert not one._media.host.where
    with pytest.raises(WrongAddress, match="is not visible"):
        one.swap_in(moved)
    one.check()


def test_swap_out_takes_no_more_than_the_host_holds_and_nothing_pinned() -> None:
    one = pool(device=8, host=2)
    stored(one, tokens_of(4))
    assert len(one.swap_out(8)) == 2
    one.pin(one.match(tokens_of(4)), "r", 10)
    assert one.swap_out(8) == ()
    assert one.match(tokens_of(4)).n_blocks == 4
    with pytest.raises(ValueError, match="-1 blocks"):
        one.swap_out(-1)
    one.check()
    assert pool(host=0).swap_out(3) == ()


def test_swap_in_of_a_leased_block_leaves_it_where_the_lease_says() -> None:
    one, tokens = pool(), tokens_of(2)
    stored(one, tokens, HOST)
    lease = one.pin(one.match(tokens), "r", 10)
    assert {address.medium for address in one.swap_in(lease.addresses)} == {DEVICE}
    assert holds(one, lease.addresses, lease.names)
    assert {address.medium for address in one.match(tokens).addresses} == {DEVICE}
    one.check()
    one.unpin(lease)
    assert len(one.swap_out(2)) == 2  # the host has them: nothing to copy
    one.check()


def test_swap_in_needs_room() -> None:
    one, tokens = pool(device=2), tokens_of(2)
    stored(one, tokens, HOST)
    one.alloc_mem(1, DEVICE, "r")
    with pytest.raises(OutOfPages):
        one.swap_in(one.match(tokens).addresses)
    assert {address.medium for address in one.match(tokens).addresses} == {HOST}
    one.check()


def test_no_call_makes_room_with_blocks_that_it_needs() -> None:
    a, b, tokens = pool(device=2, instance="a"), pool(device=2, host=2, instance="b"), tokens_of(2)
    stored(a, tokens)
    a.swap_out(1)
    a.alloc_mem(1, DEVICE, "r")
    with pytest.raises(OutOfPages):
        a.swap_in(a.match(tokens).addresses)
    assert [address.medium for address in a.match(tokens).addresses] == [DEVICE, HOST]
    for medium in (DEVICE, HOST):
        stored(b, tokens[:4], medium)
        b.alloc_mem(1, medium, "r")
        with pytest.raises(OutOfPages):
            a.transfer_with_insert(b, tokens, a.match(tokens).addresses, medium=medium)
        assert [address.medium for address in b.match(tokens).addresses] == [medium]
        b.delete(tokens)
    for one in (a, b):
        one.check()


def test_transfer_copies_to_private_blocks_of_the_receiver() -> None:
    clock, peers = HandClock(), dict[str, MemPool]()
    a, b = pool(instance="a", clock=clock, peers=peers), pool(instance="b", clock=clock, peers=peers)
    peers.update(a=a, b=b)
    names = names_of(tokens_of(2))
    visible = stored(a, tokens_of(2))
    private = a.alloc_mem(1, HOST, "r")
    fill(a, private, [b"p"])
    arrived = a.transfer("b", [*visible, *private])
    assert holds(b, arrived, [*names, b"p"])
    assert b.match(tokens_of(2)).n_blocks == 0
    assert holds(a, visible, names)
    named = b.alloc_mem(2, HOST, "q")
    assert list(a.transfer(b, visible, named)) == named
    assert holds(b, named, names)
    a.transfer(b, visible, owner="q", medium=HOST)
    for one in (a, b):
        one.check()
    assert (b.abort("q"), b.abort("a")) == (4, 3)
    assert b.available_blocks(DEVICE) == b.available_blocks(HOST) == 8


def test_transfer_refuses_what_cannot_be() -> None:
    a, b = pool(instance="a"), pool(instance="b", device=1)
    source = a.alloc_mem(2, DEVICE, "r")
    with pytest.raises(WrongAddress, match="no pool 'c'"):
        a.transfer("c", source)
    with pytest.raises(OutOfPages):
        a.transfer(b, source)
    with pytest.raises(ValueError, match="1 addresses for 2"):
        a.transfer(b, source, b.alloc_mem(1, HOST, "q"))
    stored(b, tokens_of(1))
    with pytest.raises(WrongAddress, match="is published"):
        a.transfer(b, source[:1], b.match(tokens_of(1)).addresses)
    other = MemPool.open(LAYOUT, BLOCK_BYTES, 0, instance="c", options=PoolOptions(model="other"))
    with pytest.raises(ValueError, match="fingerprint"):
        a.transfer(other, source[:1])
    wide = MemPool.open(KvLayout(layers=3, kv_heads=2, head_dim=2, dtype="float32", block_tokens=4), 10_000, 0)
    with pytest.raises(ValueError, match="kv_heads: 1 here, 2 there"):
        a.transfer(wide, source[:1])
    with pytest.raises(WrongAddress, match="is free"):
        a.transfer(b, [Address("a", HOST, 0, 0)])
    for one in (a, b):
        one.check()
    assert b.abort("a") == 0


def test_a_transfer_within_one_pool_does_not_evict_its_own_source() -> None:
    one, tokens = pool(device=4), tokens_of(3)
    stored(one, tokens)
    one.alloc_mem(1, DEVICE, "r")
    with pytest.raises(OutOfPages):
        one.transfer(one, one.match(tokens).addresses)
    assert one.match(tokens).n_blocks == 3
    copied = one.transfer(one, one.match(tokens).addresses, medium=HOST)
    assert holds(one, copied, names_of(tokens))
    one.check()


@pytest.mark.parametrize("given", [False, True], ids=["receiver allocates", "target given"])
def test_transfer_with_insert_is_found_at_the_receiver(given: bool) -> None:
    a, b, tokens = pool(instance="a"), pool(instance="b"), tokens_of(4)
    source = stored(a, tokens)
    stored(b, tokens[:4], HOST)
    target = b.alloc_mem(4, DEVICE, "q") if given else ()
    result = a.transfer_with_insert(b, tokens, source, target)
    match = b.match(tokens)
    assert (result.n_new_blocks, result.addresses, match.n_blocks) == (3, match.addresses, 4)
    assert holds(b, match.addresses[1:], match.names[1:])
    assert match.addresses[0].medium is (DEVICE if given else HOST)
    with pytest.raises(ValueError, match="3 addresses for 4"):
        a.transfer_with_insert(b, tokens, source[:3])
    assert a.transfer_with_insert(b, tokens, source).n_new_blocks == 0
    assert b.match(tokens, salt="x").n_blocks == 0
    assert a.transfer_with_insert(b, tokens, source, salt="x", medium=HOST).n_new_blocks == 4
    assert holds(b, b.match(tokens, salt="x").addresses, names_of(tokens))
    for one in (a, b):
        one.check()
        one.abort("q")
    assert b.available_blocks(DEVICE) == b.available_blocks(HOST) == 8


def test_a_lease_keeps_blocks_until_unpin_or_its_end() -> None:
    clock = HandClock()
    one, tokens = pool(device=4, clock=clock), tokens_of(3)
    stored(one, tokens)
    lease = one.pin(one.match(tokens), "r", ttl_ms=100)
    assert (lease.names, lease.ends_ms) == (tuple(names_of(tokens)), 100)
    assert one.available_blocks(DEVICE) == 1
    with pytest.raises(OutOfPages):
        one.alloc_mem(2, DEVICE, "q")
    one.check()
    clock.time_ms = 99.9
    assert one.expire() == 0
    clock.time_ms = 100
    assert one.expire() == 1
    assert not one.unpin(lease)
    again = one.pin(one.match(tokens), "r", ttl_ms=100)
    assert one.unpin(again) and not one.unpin(again)
    one.pin(one.match(tokens), "r", ttl_ms=100)
    clock.time_ms = 300
    assert len(one.alloc_mem(4, DEVICE, "q")) == 4  # a call that needs room ends what is over
    for ttl_ms in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="a lease of"):
            one.pin(one.match(tokens), "r", ttl_ms)
    one.check()


def test_a_lease_covers_what_is_left_of_a_match() -> None:
    one, tokens = pool(), tokens_of(3)
    stored(one, tokens)
    match = one.match(tokens)
    one.delete(tokens[:12])
    stored(one, tokens[:8], HOST)
    lease = one.pin(match, "r", 10)
    assert (len(lease.names), {address.medium for address in lease.addresses}) == (2, {HOST})
    assert one.pin(one.match([7] * 8), "r", 10).addresses == ()
    one.check()


def test_abort_rolls_back_an_owner_and_nobody_else() -> None:
    one, tokens = pool(), tokens_of(2)
    stored(one, tokens)
    for owner in ("dead", "alive"):
        one.alloc_mem(2, DEVICE, owner)
        one.alloc_mem(1, HOST, owner)
        one.pin(one.match(tokens), owner, 1000)
    assert one.abort("dead") == 3
    assert (one.available_blocks(DEVICE), one.available_blocks(HOST)) == (4, 7)
    one.check()
    assert one.abort("alive") == 3
    assert (one.available_blocks(DEVICE), one.match(tokens).n_blocks) == (8, 2)
    one.check()


def test_owners_have_names_of_their_own() -> None:
    one = pool()
    stored(one, tokens_of(1))
    one.pin(one.match(tokens_of(1)), "r", 1000)
    for name in ("cache", "lease:1", "call:1", "call:2", "", "owner:r"):
        one.alloc_mem(1, HOST, name)
        one.check()
    assert one.abort("lease:1") == one.abort("cache") == 1
    assert one.match(tokens_of(1)).n_blocks == 1
    assert one.available_blocks(DEVICE) == 7


@pytest.mark.parametrize("damage", ["map", "holder", "pin", "lease", "private"])
def test_check_finds_every_kind_of_damage(damage: str) -> None:
    one = pool()
    stored(one, tokens_of(2))
    one.alloc_mem(1, DEVICE, "r")
    lease = one.pin(one.match(tokens_of(2)), "r", 1000)
    tier = one._media.device
    one.check()
    match damage:
        case "map":
            tier.where[lease.names[0]] = lease.addresses[1]
        case "holder":
            tier.holders.clear()
        case "pin":
            tier.pool.release("lease:1")
        case "lease":
            one._leases.drop(lease.number)
        case _:
            tier.pool.release("owner:r")
    with pytest.raises(LedgerMisuse):
        one.check()


def test_memory_may_be_the_caller_s_and_ends_at_a_whole_block() -> None:
    device = np.zeros((7, LAYOUT.page_bytes), np.uint8)
    one = MemPool("a", LAYOUT, device, device[:0])
    assert (one.available_blocks(DEVICE), one.available_blocks(HOST)) == (2, 0)
    address = one.alloc_mem(2, DEVICE, "r")[1]
    fill(one, [address], [b"x"])
    assert np.array_equal(device[3:6], pattern(b"x"))
    for strange in (device.view(np.int8), device[:, :8], device[::2], device[0]):
        with pytest.raises(ValueError, match="must be contiguous uint8"):
            MemPool("a", LAYOUT, device, strange)
    with pytest.raises(ConfigError, match=f"a block is {BLOCK_BYTES} bytes"):
        MemPool.open(LAYOUT, BLOCK_BYTES - 1, 0)


def test_pages_of_a_block_lie_together_after_any_history() -> None:
    rng, one = random.Random(2), pool(device=9)
    held: list[list[Address]] = []
    for _ in range(300):
        if held and (rng.random() < 0.5 or one.available_blocks(DEVICE) < 3):
            one.free_mem(held.pop(rng.randrange(len(held))))
        else:
            held.append(one.alloc_mem(rng.randrange(3), DEVICE, f"o{rng.randrange(3)}"))
        one.check()


def test_importing_a_part_of_kvstore_loads_neither_the_pool_nor_torch() -> None:
    script = (
        "import sys, kvstore, kvstore.index.ledger\n"
        "assert 'kvstore.pool.mem_pool' not in sys.modules\n"
        "from kvstore import MemPool, Medium\n"
        "assert 'torch' not in sys.modules and 'zmq' not in sys.modules\n"
        "assert all(getattr(kvstore, name) for name in kvstore.__all__)\n"
        "try: kvstore.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3]
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "module 'kvstore' has no attribute 'nothing'"), ran.stderr


def test_an_address_never_comes_to_mean_what_somebody_else_keeps_there() -> None:
    pool, tokens = MemPool.open(LAYOUT, 2 * BLOCK_BYTES, 0), [1, 2, 3, 4, 5, 6, 7, 8]
    pool.insert(tokens, pool.alloc_mem(2, DEVICE, "first"))
    lease = pool.match(tokens).addresses
    old = pool.alloc_mem(2, DEVICE, "second")  # evicts
    for wrong in (lambda: pool.insert(tokens, lease), lambda: pool.read(lease[0]), lambda: pool.free_mem(lease)):
        with pytest.raises(WrongAddress, match="given out again"):
            wrong()
    pool.free_mem(old)
    new = pool.alloc_mem(2, DEVICE, "third")
    with pytest.raises(WrongAddress, match="given out again"):
        pool.free_mem(old)
    pool.free_mem(new)
    pool.check()


@pytest.mark.parametrize("tokens", [[-1] * 4, [2**70] * 4])
def test_what_is_no_token_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="tokens must lie in"):
        MemPool.open(LAYOUT, BLOCK_BYTES, 0).match(tokens)
