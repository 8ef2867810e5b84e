"""Messages whose types are right and whose values are absurd, and frames that are next to a message."""

import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec
from msgspec import inspect

from common.errors import ProtocolViolation
from common.messages import AnyMessage, decode, encode

KINDS: tuple[type[msgspec.Struct], ...] = get_args(AnyMessage)
_INTS = (0, 1, 2, 3, 7, -1, -2, 2**31, 2**31 - 1, 2**32, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), float("-inf"), 1e308, 5e-324)
_TEXTS = ("", "x", "\0", "*", "y" * 2_000, "stop", "length", "shm", "tcp", "host", "device", "prefill", "kvstore")
_BYTES = (b"", b"\0" * 16, b"n" * 15, b"n" * 16, b"m" * 16, b"z" * 5_000)
_LENGTHS = (0, 1, 1, 2, 2, 3, 5, 40)
Known = Mapping[str, Sequence[Any]]
"""Values that exist, by the name of the field they stand in: an absurd message is often nearly right."""


class Absurd:
    """A seeded source of them."""

    def __init__(self, chance: random.Random, known: Known) -> None:
        self._chance, self._known = chance, known

    def message(self, kinds: Sequence[type[msgspec.Struct]] = KINDS) -> Any:
        """One message, as it comes out of a frame: a known value in a field of another type makes none."""
        while True:
            with contextlib.suppress(ProtocolViolation, OverflowError):
                return decode(encode(self._struct(self._chance.choice(kinds))))

    def frame(self) -> bytes:
        """The bytes of one, damaged more often than not."""
        whole = bytearray(encode(self.message()))
        match self._chance.randrange(5):
            case 0:
                return bytes(whole)
            case 1:
                return bytes(whole[: self._chance.randrange(len(whole))])
            case 2:
                return self._chance.randbytes(self._chance.randrange(200))
            case 3:
                return bytes(whole) + self._chance.randbytes(3)
        for _ in range(self._chance.randrange(1, 4)):
            whole[self._chance.randrange(len(whole))] = self._chance.randrange(256)
        return bytes(whole)

    def _struct(self, kind: type[msgspec.Struct]) -> Any:
        fields = msgspec.structs.fields(kind)
        given = {
            field.name: self._value(inspect.type_info(field.type), field.name)
            for field in fields
            if field.required or self._chance.random() < 0.7
        }
        return kind(**given)

    def _value(self, kind: Any, name: str) -> Any:
        known = self._known.get(name, ())
        if known and self._chance.random() < 0.6:
            return self._chance.choice(known)
        match kind:
            case inspect.IntType():
                return self._chance.choice(_INTS)
            case inspect.FloatType():
                return self._chance.choice(_FLOATS)
            case inspect.StrType():
                return self._chance.choice(_TEXTS)
            case inspect.BytesType():
                return self._chance.choice(_BYTES)
            case inspect.BoolType():
                return self._chance.random() < 0.5
            case inspect.NoneType():
                return None
            case inspect.UnionType(types=types):
                return self._value(self._chance.choice(types), name)
            case inspect.VarTupleType(item_type=item):
                return tuple(self._value(item, name) for _ in range(self._chance.choice(_LENGTHS)))
            case inspect.TupleType(item_types=items):
                return tuple(self._value(item, name) for item in items)
            case inspect.DictType():
                return {self._chance.choice(_TEXTS): self._chance.choice(_FLOATS) for _ in range(3)}
            case inspect.StructType(cls=struct):
                return self._struct(struct)
        raise AssertionError(f"no absurd value for {kind}")
