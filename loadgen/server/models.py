"""Which model to ask for: the one that was named, if the server has it, or the only one that it has."""

import msgspec

from common.errors import ConfigError
from loadgen.drive.printable import printable
from loadgen.server.api import NoAnswer, NoServer, ServerApi


class _Card(msgspec.Struct):
    id: str


class _Cards(msgspec.Struct):
    data: list[_Card]


async def choose_model(api: ServerApi, url: str, named: str | None) -> str:
    """The model's name. Raises ConfigError if there is no server, no such model, or more than one to choose from."""
    try:
        offered = [card.id for card in msgspec.json.decode(await api.get("/v1/models"), type=_Cards).data]
    except NoServer as error:
        raise ConfigError(f"--url={url!r}: no server there: {error}") from error
    except (NoAnswer, msgspec.MsgspecError, RecursionError) as error:
        if named is not None:
            return named  # the server does not list its models; the name given must do
        raise ConfigError(f"--url={url!r}: does not list its models: {error}; name one with --model") from error
    shown = printable(", ".join(offered)) or "no model"
    if named is None:
        if len(offered) != 1:
            raise ConfigError(f"--model is required: the server offers {shown}")
        return offered[0]
    if named not in offered:
        raise ConfigError(f"--model={named!r}: the server offers {shown}")
    return named
