"""Made-up content: token ids or words that follow from a name alone, so that equal names give equal prompts. Pure.

The name of a piece is its whole origin, such as `7/prefix/3`. A longer piece of the same name begins with the shorter
one, which is what prefixes of one stream need. Words are one per token asked for; what a server makes of them may differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from loadgen.workload.plan import Content

KINDS = ("ids", "words")
CHARACTERS_PER_TOKEN = 4
"""Of English under common tokenizers, where none is at hand to count with."""
_SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")
_SHARED_PIECES = 512

CountTokens = Callable[[Content], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentSource:
    """Where made-up prompts come from."""

    kind: str = "ids"
    """`ids` or `words`."""
    first_token_id: int = 10
    last_token_id: int = 250
    """Ids are drawn from these, both included; every tokenizer in use has the default ones."""

    def draw(self, name: str, n_tokens: int) -> Content:
        """The piece of that name and length."""
        if self.kind == "words":
            return _words(name, n_tokens)
        ids = range(self.first_token_id, self.last_token_id + 1)
        return tuple(Random(name).choices(ids, k=n_tokens))

    def shared(self, name: str, n_tokens: int) -> Content:
        """The same piece; one that many conversations hold is drawn once and kept."""
        return _shared(self, name, n_tokens)


@lru_cache(maxsize=_SHARED_PIECES)
def _shared(source: ContentSource, name: str, n_tokens: int) -> Content:
    return source.draw(name, n_tokens)


def _words(name: str, n_words: int) -> str:
    syllables = Random(name).choices(_SYLLABLES, k=2 * n_words)
    return " ".join(map("".join, zip(syllables[::2], syllables[1::2], strict=True)))


def count_words(content: Content) -> int:
    """Tokens of made-up content: ids, or words."""
    return len(content.split()) if isinstance(content, str) else len(content)


def count_by_characters(content: Content) -> int:
    """Tokens of ids, exactly; of real text, at four characters each: an estimate."""
    return -(-len(content) // CHARACTERS_PER_TOKEN) if isinstance(content, str) else len(content)


def join(first: Content, second: Content) -> Content:
    """One content after another; texts are parted by a space, unless one is empty. Raises TypeError if kinds differ."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first} {second}"
    if isinstance(first, tuple) and isinstance(second, tuple):
        return first + second
    raise TypeError("token ids and text in one prompt")


def trim(content: Content, most_tokens: int, count_tokens: CountTokens) -> Content:
    """The beginning of `content` that counts `most_tokens` at most; empty if that is 0."""
    if isinstance(content, tuple):
        return content[:most_tokens]
    text = content
    while text and (tokens := count_tokens(text)) > most_tokens:
        # Proportion first, so that a long text takes two or three steps; whole words, so that the end is no new token.
        kept = min(len(text) - 1, len(text) * most_tokens // tokens)
        border = text.rfind(" ", 0, kept + 1)
        text = text[: border if border > 0 else kept]
    return text
