"""What kind of server is this, and how long may a request be? Asked once, before a run."""

from dataclasses import dataclass
from typing import Annotated

import msgspec

from loadgen.server.api import NoAnswer, NoPage, ServerApi
from loadgen.server.penstock_status import PenstockStatus
from loadgen.server.prometheus import OTHER_SERVERS
from loadgen.server.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was found out."""

    source: Source | None
    """How to ask the server about itself; None: it does not tell."""
    told: str
    """`/status` or `/metrics` and whose it is, or why nothing is known."""
    context_tokens: int | None
    """Prompt plus answer may not exceed this; None: the server does not say."""
    failing: str = ""
    """Why nothing is known, where the server has a page that could have told; empty if it has none."""

    @property
    def is_penstock(self) -> bool:
        """Whether the server understands our own headers."""
        return isinstance(self.source, PenstockStatus)


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class _Card(msgspec.Struct):
    id: str
    max_model_len: _Tokens | None = None
    """So say vLLM, SGLang and Penstock."""
    context_length: _Tokens | None = None
    context_window: _Tokens | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


async def probe(api: ServerApi, model: str) -> Probe:
    """Ask. Never raises: a server that tells nothing can be measured all the same."""
    source, told, failing = await _source(api)
    context_tokens = await _context_tokens(api, model)
    return Probe(source=source, told=told, context_tokens=context_tokens, failing=failing)


async def _source(api: ServerApi) -> tuple[Source | None, str, str]:
    """The source, `Probe.told` and `Probe.failing`."""
    status, reasons, failing = PenstockStatus(), list[str](), list[str]()
    try:
        status.sample(await api.get(status.path), 0.0)
    except (NoAnswer, ValueError) as error:
        reasons.append(str(error))
        failing += [] if isinstance(error, NoPage | ValueError) else [str(error)]
    else:
        return status, f"{status.path} of {status.server}", ""
    try:
        body = await api.get("/metrics")
    except NoAnswer as error:
        reasons.append(str(error))
        failing += [] if isinstance(error, NoPage) else [str(error)]
    else:
        for other in OTHER_SERVERS:
            if other.speaks(body):
                return other, f"{other.path} of {other.server}", ""
        reasons.append(f"GET /metrics: not of {', '.join(other.server for other in OTHER_SERVERS)}")
    return None, f"the server does not tell: {'; '.join(reasons)}", "; ".join(failing)


async def _context_tokens(api: ServerApi, model: str) -> int | None:
    try:
        cards = msgspec.json.decode(await api.get("/v1/models"), type=_Cards).data
    except (NoAnswer, msgspec.MsgspecError, RecursionError):
        return None
    card = next((card for card in cards if card.id == model), None)
    return None if card is None else card.max_model_len or card.context_length or card.context_window
