"""Everything on the wire is plain MessagePack, comes back equal, and garbage is refused in one way only."""

from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from common.errors import ProtocolViolation
from common.messages import AnyMessage, decode, encode
from common.messages.base import Message

KINDS: tuple[type[Message], ...] = get_args(AnyMessage)
_integers = st.integers(0, 2**62)
_BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: _integers,
    str: st.text(max_size=8),
    bytes: st.binary(max_size=16),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    type(None): st.none(),
}


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may hold."""
    info = msgspec.inspect.type_info(type_)
    match info:
        case msgspec.inspect.StructType(cls=cls):
            return st.builds(cls, **{f.name: values_of_info(f.type) for f in info.fields})
        case _:
            return values_of_info(info)


def values_of_info(info: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case msgspec.inspect.StructType(cls=cls):
            return values_of(cls)
        case msgspec.inspect.UnionType(types=types):
            return st.one_of([values_of_info(one) for one in types])
        case msgspec.inspect.VarTupleType(item_type=item):
            return st.lists(values_of_info(item), max_size=3).map(tuple)
        case msgspec.inspect.TupleType(item_types=items):
            return st.tuples(*[values_of_info(one) for one in items])
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values_of_info(key), values_of_info(value), max_size=3)
        case msgspec.inspect.IntType():
            return _integers
        case msgspec.inspect.StrType():
            return _BY_TYPE[str]
        case msgspec.inspect.BytesType():
            return _BY_TYPE[bytes]
        case msgspec.inspect.BoolType():
            return _BY_TYPE[bool]
        case msgspec.inspect.FloatType():
            return _BY_TYPE[float]
        case msgspec.inspect.NoneType():
            return st.none()
        case _:
            raise AssertionError(f"no strategy for {info}")


_ANY = settings(max_examples=1, phases=(Phase.generate,), database=None)
"""The first value will do: looking for the smallest takes seconds."""
any_message = st.one_of([values_of(kind) for kind in KINDS])


@given(any_message)
def test_a_message_comes_back_equal(message: Message) -> None:
    assert decode(encode(message)) == message


@given(any_message)
def test_the_plain_msgpack_package_reads_every_frame(message: Message) -> None:
    frame = msgpack.unpackb(encode(message), strict_map_key=False)
    assert frame.pop("type") == type(message).__name__
    assert set(frame) == set(message.__struct_fields__)


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_violation_and_nothing_else(frame: bytes) -> None:
    try:
        decode(frame)
    except ProtocolViolation:
        return


@given(any_message, st.data())
def test_a_damaged_frame_is_a_message_or_a_protocol_violation(message: Message, draw: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(draw.draw(st.integers(1, 4))):
        frame[draw.draw(st.integers(0, len(frame) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(frame)))
    try:
        decode(bytes(frame[:cut]))
    except ProtocolViolation:
        return


@pytest.mark.parametrize(
    "frame", [b"", b"\x80", msgpack.packb({"type": "Nobody"}), msgpack.packb({"type": "Ping"}), b"\xa1\xff"]
)
def test_a_frame_that_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolViolation, match=f"{len(frame)} bytes"):
        decode(frame)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_newer_peer_may_add_fields(kind: type[Message]) -> None:
    fields = _example(kind) | {"added_later": 1}
    assert isinstance(decode(msgpack.packb(fields)), kind)


def _example(kind: type[Message]) -> dict[str, Any]:
    message = find(values_of(kind), lambda _: True, settings=_ANY)
    found: dict[str, Any] = msgpack.unpackb(encode(message), strict_map_key=False)
    return found


def test_messages_are_frozen() -> None:
    for kind in KINDS:
        assert kind.__struct_config__.frozen, kind.__name__
