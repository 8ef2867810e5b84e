"""What the launcher's commands ask a gateway over HTTP."""

from collections.abc import Iterator, Mapping
from typing import Any  # Any: JSON

import httpx
import msgspec

from common.header_key import key_bytes

_TIMEOUT_S = 5.0


class NoGateway(httpx.HTTPError):
    """Something answers there, and it is no gateway of Penstock."""


def refusal(response: httpx.Response) -> str:
    """What a gateway's answer other than 200 means, for people."""
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return "asks for a key: give it with --api-key"
    return f"answered {response.status_code}: {response.text[:200]}"


class GatewayApi:
    """A gateway's address. Every call raises httpx.HTTPError if it does not answer."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {} if api_key is None else {b"authorization": b"Bearer " + key_bytes("--api-key", api_key)}
        # trust_env=False: a proxy set for the outside world must not stand between processes of one machine
        self._client = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False)
        self.url = url

    def is_ready(self) -> bool:
        """True if a request sent now can be served; False too if nobody listens."""
        try:
            return self._client.get("/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def why_not_ready(self) -> str:
        """What `/ready` says, shortened; why nobody answers otherwise."""
        try:
            answer = self._client.get("/ready")
        except httpx.TransportError as error:
            return str(error)
        return f"{answer.status_code} {answer.text[:300]}"

    def status(self) -> Mapping[str, Any]:
        """The document behind `/status`. Raises NoGateway."""
        document = self._document("/status")
        if not isinstance(document.get("gateway"), dict) or not isinstance(document.get("workers"), list):
            raise NoGateway(f"{self.url} is no gateway: its /status names neither a gateway nor workers")
        return document

    def _document(self, path: str) -> Mapping[str, Any]:
        answer = self._client.get(path).raise_for_status()
        try:
            return msgspec.json.decode(answer.content, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            kind = answer.headers.get("content-type", "nothing it names")
            raise NoGateway(f"{self.url} is no gateway: its {path} is {kind[:100]} and no JSON object") from None

    def models(self) -> list[str]:
        """Names of the models that clients may ask for."""
        return [str(entry["id"]) for entry in self._document("/v1/models").get("data", ())]

    def chat(self, model: str, text: str, max_tokens: int, timeout_s: float) -> Iterator[str]:
        """Stream one greedy chat answer, piece by piece."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        with self._client.stream("POST", "/v1/chat/completions", json=body, timeout=timeout_s) as answer:
            if answer.is_error:
                answer.read()
                raise httpx.HTTPStatusError(
                    f"{answer.status_code}: {answer.text[:500]}", request=answer.request, response=answer
                )
            for line in answer.iter_lines():
                field, _, value = line.partition(":")
                if field == "data" and value.strip() != "[DONE]":
                    yield _piece(msgspec.json.decode(value.strip()))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _piece(event: Mapping[str, Any]) -> str:
    if "error" in event:
        raise httpx.RemoteProtocolError(f"the answer broke off: {event['error']}")
    choices = event.get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")
