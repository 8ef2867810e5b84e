"""Names of the blocks of prompts, computed once however often a prompt is placed. Pure.

Hashing is most of what placing a long prompt costs; the choices of one request share a prompt, and what failed is placed
again. Owns the names of the latest prompts, up to MOST_NAMES in all; the oldest go first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from common.block_hash import BlockHash, extend_hashes, hash_blocks, root_hash
from common.messages.liveness import ModelIdentity

MOST_NAMES = 200_000

_Key = tuple[int, BlockHash]


class PromptNames:
    """Prompts are told apart by identity: an entry keeps its prompt, so that no other can take its place in memory."""

    def __init__(self) -> None:
        self._known: OrderedDict[_Key, tuple[tuple[int, ...], list[BlockHash]]] = OrderedDict()
        self._n_names = 0

    def of(
        self, prompt: tuple[int, ...], emitted: Sequence[int], model: ModelIdentity, cache_salt: str
    ) -> Sequence[BlockHash]:
        """Of the whole blocks of prompt and emitted tokens. Not to be changed."""
        root = root_hash(model, cache_salt)
        names = self._of_prompt(prompt, root, model.block_tokens)
        if not emitted:
            return names
        longer = list(names)
        extend_hashes(longer, (*prompt, *emitted), root, model.block_tokens)
        return longer

    def _of_prompt(self, prompt: tuple[int, ...], root: BlockHash, block_tokens: int) -> list[BlockHash]:
        key = id(prompt), root
        entry = self._known.get(key)
        if entry is not None:
            self._known.move_to_end(key)
            return entry[1]
        names = hash_blocks(prompt, root, block_tokens)
        self._known[key] = prompt, names
        self._n_names += len(names) + 1
        while self._n_names > MOST_NAMES and len(self._known) > 1:
            _, (_, oldest) = self._known.popitem(last=False)
            self._n_names -= len(oldest) + 1
        return names
