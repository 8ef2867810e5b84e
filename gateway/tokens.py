"""Text to token ids and back, without torch.

`TextStream` turns a growing answer into text piece by piece: characters that are cut in half by a token border wait
for their other half.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any  # Any: a client's template variables

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from common.errors import ConfigError, InvalidRequest
from gateway.byte_level import piece_bytes
from gateway.chat_template import ChatTemplate
from gateway.model_files import ModelFiles

_INLINE_CHARACTERS = 2_000  # about half a millisecond of tokenising; longer texts go to a thread
_REPLACEMENT = "\ufffd"


class Tokens:
    """The tokenizer of the served model. Any thread may use it."""

    def __init__(self, files: ModelFiles) -> None:
        """Raises ConfigError when the tokenizer file or the chat template is broken."""
        try:
            self._tokenizer = Tokenizer.from_file(str(files.tokenizer_file))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise ConfigError(f"{files.tokenizer_file} is no tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_tokens = files.vocab_tokens
        self._template = (
            None if files.chat_template is None else ChatTemplate(files.chat_template, files.special_tokens)
        )

    async def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens that the model's tokenizer adds."""
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, special=True)
        return await asyncio.to_thread(self._encode, text, special=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of a conversation; the template writes its special tokens itself. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        text = self._template.render(messages, extra)
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, special=False)
        return await asyncio.to_thread(self._encode, text, special=False)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        # The batch call gives up the interpreter lock while it works; the single one does not.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def check_ids(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Token ids as a client gave them. Raises InvalidRequest naming the first bad one."""
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocab_tokens:
                raise InvalidRequest(
                    f"{param}[{index}] is token id {token}; this model's are 0 to {self.vocab_tokens - 1}", param=param
                )
        return tuple(ids)

    def text_of(self, token: int) -> str:
        """One token alone, special ones included; halves of characters show as the replacement character."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def bytes_of(self, token: int) -> bytes:
        """What one token stands for, exactly."""
        text = self.text_of(token)
        if _REPLACEMENT not in text:
            return text.encode()
        return piece_bytes(self._tokenizer.id_to_token(token) or "")

    def stream(self) -> "TextStream":
        """The text of one answer, from its first token."""
        return TextStream(self._tokenizer)


class TextStream:
    """Text of one answer as it grows. Special tokens have no text."""

    __slots__ = ("_decoder", "_ids", "_tokenizer", "_waiting")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._waiting = 0
        """Tokens at the end of `_ids` whose text is not out yet."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        text = ""
        for token in tokens:
            self._ids.append(token)
            piece = self._decoder.step(self._tokenizer, token)
            if piece is None:
                self._waiting += 1
            else:
                text += piece
                self._waiting = 0
        return text

    def finish(self) -> str:
        """What still waits when no token will come: the halves of characters, as replacement characters."""
        if not self._waiting:
            return ""
        before = self._tokenizer.decode(self._ids[: -self._waiting], skip_special_tokens=True)
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._waiting = 0
        return str(whole[len(before) :])
