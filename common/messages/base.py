"""The root of every message. Evolution: append fields, give each a default, never reuse a name."""

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base of everything that crosses a socket. One MessagePack map with the class name under `type`."""
