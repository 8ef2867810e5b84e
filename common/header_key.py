"""API keys as HTTP headers carry them: bytes, since clients write text beyond ASCII in UTF-8 and servers hear Latin-1."""


def key_bytes(flag: str, key: str) -> bytes:
    """What a client sends for `key`. Raises ValueError that names `flag`, never the key, if no header can carry it."""
    try:
        found = key.encode("utf-8", "surrogateescape")  # an environment may hold bytes that are no text
    except UnicodeEncodeError:
        raise ValueError(f"{flag}: is no text") from None
    if not found:
        raise ValueError(f"{flag}: must not be empty; leave it out to ask for none")
    if found != found.strip(b" ") or any(byte < 0x20 or byte == 0x7F for byte in found):
        raise ValueError(
            f"{flag}: begins or ends with a space, or holds a control character, which no HTTP header can carry"
        )
    return found


def require_keys(**keys: str | None) -> None:
    """Raise ValueError, by the name of the flag, for keys that no header can carry; None: not given."""
    for name, key in keys.items():
        if key is not None:
            key_bytes(f"--{name.replace('_', '-')}", key)
