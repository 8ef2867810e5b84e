"""The bytes behind one vocabulary piece, for tokens that are no whole characters.

Byte-level vocabularies write each byte as one printable character: printable Latin-1 stands for itself, the other 68
bytes, in order, for U+0100 and up (the mapping of GPT-2). Others write a single byte as `<0xE2>`.
"""

import re

_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    found = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    found.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return found


_BYTE_OF = _byte_of_character()


def piece_bytes(piece: str) -> bytes:
    """Bytes of a vocabulary piece; a piece in neither notation stands for its own UTF-8."""
    match = _HEX.fullmatch(piece)
    if match is not None:
        return bytes([int(match[1], 16)])
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:
        return piece.encode()
