"""How recorded texts are counted: with a tokenizer from a file, or by their characters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from common.errors import ConfigError
from loadgen.workload.content import CHARACTERS_PER_TOKEN, CountTokens, count_by_characters
from loadgen.workload.plan import Content

Unit = int | str
"""A token id, or the characters that stand for a token."""


@dataclass(frozen=True, slots=True)
class TextMeasure:
    """One way to count; both functions agree."""

    count_tokens: CountTokens
    split: Callable[[str], tuple[Unit, ...]]
    note: str = ""
    """What a reader of counted lengths must know."""


def _split_by_characters(text: str) -> tuple[str, ...]:
    return tuple(text[start : start + CHARACTERS_PER_TOKEN] for start in range(0, len(text), CHARACTERS_PER_TOKEN))


BY_CHARACTERS = TextMeasure(
    count_by_characters,
    _split_by_characters,
    f"no --tokenizer: lengths of texts are counted as one token for {CHARACTERS_PER_TOKEN} characters",
)


def with_tokenizer(path: str) -> TextMeasure:
    """The measure of a `tokenizer.json`, or of a model's folder that has one. Raises ConfigError."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"--tokenizer={path!r}: must be a tokenizer.json, or a folder with one")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise ConfigError(f"--tokenizer={path!r}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def split(text: str) -> tuple[Unit, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    def count_tokens(content: Content) -> int:
        return len(split(content)) if isinstance(content, str) else len(content)

    return TextMeasure(count_tokens, split)
