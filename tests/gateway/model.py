"""A model folder as a gateway reads it: every byte is one token, so that a test decides where tokens end."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.messages.liveness import ModelIdentity

NAME = "letters"
END_ID, TURN_ID = 256, 257
VOCAB_TOKENS = 300
CONTEXT_TOKENS = 512
_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def ids(text: str) -> tuple[int, ...]:
    """Token ids of a text: its UTF-8 bytes."""
    return tuple(text.encode())


def write_model(folder: Path) -> Path:
    """Config, tokenizer and chat template; ids 0..255 are the bytes, 256 and 257 special."""
    folder.mkdir(parents=True)
    alphabet = _characters_of_bytes()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<turn>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": VOCAB_TOKENS, "max_position_embeddings": CONTEXT_TOKENS, "eos_token_id": END_ID}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


def _characters_of_bytes() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte, taken from the library itself."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found: dict[int, str] = {}
    for code in [
        *range(0x800),
        *range(0x800, 0xD800, 0x100),
        *range(0xE000, 0x110000, 0x1000),
    ]:  # every byte occurs in the UTF-8 of these, or stands below
        raw = chr(code).encode()
        for byte, letter in zip(raw, splitter.pre_tokenize_str(chr(code))[0][0], strict=True):
            found[byte] = letter
    rest = sorted(set(splitter.alphabet()) - set(found.values()))
    for byte in range(256):
        if byte not in found:
            found[byte] = rest.pop()  # C0, C1 and F5 to FF never occur in UTF-8
    return [found[byte] for byte in range(256)]


def identity(**changes: object) -> ModelIdentity:
    """What a fitting worker says of its model."""
    fields: dict[str, object] = {
        "name": NAME,
        "fingerprint": "f0",
        "architecture": "test",
        "dtype": "float32",
        "layers": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "block_tokens": 16,
        "vocab_tokens": VOCAB_TOKENS,
        "context_tokens": CONTEXT_TOKENS,
        **changes,
    }
    return ModelIdentity(**fields)  # type: ignore[arg-type]  # a builder that changes one argument at a time
