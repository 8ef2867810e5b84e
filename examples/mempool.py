"""A conversation of two turns over two MemPools, one per instance, as MemServe uses them. Run: python examples/mempool.py"""

from common.kv_layout import KvLayout
from kvstore import Match, Medium, MemPool, PoolOptions

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32")
BLOCK_TOKENS, BLOCK_BYTES = LAYOUT.block_tokens, LAYOUT.layers * LAYOUT.page_bytes


def compute(pool: MemPool, tokens: list[int]) -> Match:
    """Stands for prefill: what is cached is pinned meanwhile, the KV of the rest is written and becomes visible."""
    hit = pool.match(tokens)
    lease = pool.pin(hit, owner="request", ttl_ms=1000)
    new = pool.alloc_mem(len(tokens) // BLOCK_TOKENS - hit.n_blocks, Medium.DEVICE, owner="request")
    for number, address in enumerate(new, hit.n_blocks):
        for layer in range(LAYOUT.layers):
            kv = bytes([tokens[number * BLOCK_TOKENS] % 256]) * LAYOUT.page_bytes
            pool.write(address, layer, kv)
    pool.insert(tokens, [*lease.addresses, *new])
    pool.unpin(lease)
    print(f"  {pool.instance}: {hit.n_blocks} blocks were cached, {len(new)} computed")
    return pool.match(tokens)


def main() -> None:
    """Prefill on one instance, decode on the other; the answer's KV goes back for the next turn."""
    peers: dict[str, MemPool] = {}
    for name in ("prefill", "decode"):
        options = PoolOptions(model="a fingerprint of the weights", peers=peers)
        peers[name] = MemPool.open(LAYOUT, 16 * BLOCK_BYTES, 32 * BLOCK_BYTES, instance=name, options=options)
    prefill, decode = peers["prefill"], peers["decode"]

    print("turn 1")
    question, answer = list(range(100)), list(range(500, 550))
    prompt = compute(prefill, question)
    sent = prefill.transfer_with_insert("decode", question[: prompt.n_blocks * BLOCK_TOKENS], prompt.addresses)
    print(f"  prefill -> decode: {sent.n_new_blocks} blocks")
    history = question + answer
    whole = compute(decode, history)
    back = decode.transfer_with_insert("prefill", history, whole.addresses)
    print(f"  decode -> prefill: {back.n_new_blocks} blocks, those of the answer")

    print("between the turns")
    print(f"  prefill: {len(prefill.swap_out(5))} coldest blocks go to the host")
    found = prefill.match(history)
    print(f"  prefill: a match finds {[address.medium.value for address in found.addresses]}")
    prefill.swap_in(found.addresses)

    print("turn 2")
    compute(prefill, history + list(range(900, 940)))
    for pool in peers.values():
        pool.abort("request")
        pool.check()
    print("every block accounted for")


if __name__ == "__main__":
    main()
