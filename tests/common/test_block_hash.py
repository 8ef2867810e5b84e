"""A block's name stands for its model, its salt, and every token up to its end."""

import random
import struct
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import msgspec
import pytest

from common.block_hash import HASH_BYTES, extend_hashes, hash_blocks, root_hash
from common.messages.liveness import ModelIdentity

MODEL = ModelIdentity(
    name="m",
    fingerprint="f00d",
    architecture="llama",
    dtype="bfloat16",
    layers=2,
    kv_heads=1,
    head_dim=4,
    block_tokens=4,
    vocab_tokens=100,
    context_tokens=1000,
)
TOKENS = list(range(19))


def test_only_whole_blocks_have_a_name() -> None:
    root = root_hash(MODEL)
    assert [len(hash_blocks(TOKENS[:n], root, 4)) for n in (0, 3, 4, 7, 8, 19)] == [0, 0, 1, 1, 2, 4]
    assert {len(name) for name in hash_blocks(TOKENS, root, 4)} == {HASH_BYTES}


def test_names_are_the_documented_chain() -> None:
    root = root_hash(MODEL, "salt")
    first = blake2b(root + struct.pack("<4I", 0, 1, 2, 3), digest_size=16).digest()
    second = blake2b(first + struct.pack("<4I", 4, 5, 6, 7), digest_size=16).digest()
    assert hash_blocks(TOKENS, root, 4)[:2] == [first, second]


@pytest.mark.parametrize("changed", range(16))
def test_one_other_token_changes_its_block_and_all_after_it(changed: int) -> None:
    root, other = root_hash(MODEL), [*TOKENS]
    other[changed] += 1
    same = [a == b for a, b in zip(hash_blocks(TOKENS, root, 4), hash_blocks(other, root, 4), strict=True)]
    assert same == [block < changed // 4 for block in range(4)]


def test_the_same_tokens_elsewhere_have_another_name() -> None:
    names = hash_blocks([5, 5, 5, 5] * 50, root_hash(MODEL), 4)
    assert len(set(names)) == 50


@pytest.mark.parametrize("change", [{"fingerprint": "beef"}, {"dtype": "float32"}, {"block_tokens": 2}])
def test_kv_of_another_model_dtype_or_block_length_has_other_names(change: dict[str, str | int]) -> None:
    other = msgspec.structs.replace(MODEL, **change)
    assert root_hash(other) != root_hash(MODEL)


def test_salts_share_nothing_and_cannot_be_forged_by_gluing_fields() -> None:
    salts = ["", "a", "b", "ab", "a" * 1000, "ä", "4", "\0"]
    names = [name for salt in salts for name in hash_blocks(TOKENS, root_hash(MODEL, salt), 4)]
    assert len(set(names)) == len(names)
    glued = msgspec.structs.replace(MODEL, fingerprint="f00db", dtype="float16")
    apart = msgspec.structs.replace(MODEL, fingerprint="f00d", dtype="bfloat16")
    assert root_hash(glued) != root_hash(apart)


@pytest.mark.parametrize("seed", range(10))
def test_hashing_bit_by_bit_gives_the_same_names(seed: int) -> None:
    rng, root = random.Random(seed), root_hash(MODEL)
    tokens = [rng.randrange(2**32) for _ in range(rng.randrange(200))]
    names, at = [], 0
    while at < len(tokens):
        at += rng.randrange(1, 30)
        extend_hashes(names, tokens[:at], root, 4)
    assert names == hash_blocks(tokens, root, 4)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_none_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="tokens must lie in"):
        hash_blocks([1, 2, 3, token], root_hash(MODEL), 4)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_every_process_gives_the_same_names(seed: str) -> None:
    script = (
        "from tests.common.test_block_hash import *; print(hash_blocks(TOKENS, root_hash(MODEL, 's'), 4)[-1].hex())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": seed},
    )
    assert ran.stdout.strip() == hash_blocks(TOKENS, root_hash(MODEL, "s"), 4)[-1].hex()
