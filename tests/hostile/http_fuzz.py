"""Requests made from the gateway's own description, right ones and wrong ones, and what their answers must be like."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks as rules

from common.ids import PeerId
from common.messages.requests import Generate
from common.messages.resizing import Resize, ResizeAnswer
from tests.gateway.cluster import Cluster
from tests.gateway.fake_worker import FakeWorker, tokens
from tests.gateway.model import NAME, VOCAB_TOKENS

PATIENCE_S = 10.0
_LESS_OFTEN = 4  # those without a body have little that could be wrong
NAMED_BY_POSITION = "the body must be"
"""Errors of a body that is no JSON object, where there is no field to name."""


@dataclass
class Counts:
    """What a run did."""

    requests: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        yield f"{self.requests} requests: " + ", ".join(f"{n} {kind}" for kind, n in sorted(self.by_kind.items()))
        yield "answers: " + ", ".join(f"{n} x {status}" for status, n in sorted(self.by_status.items()))


def answer_everything(one: Cluster) -> None:
    """Workers that serve: two tokens for every prompt, and memory as it was ordered."""

    def on_generate(gateway: PeerId, generate: Generate) -> None:
        last = min(2, generate.sampling.max_tokens)
        for position in range(last):
            finish = "length" if position == last - 1 else None
            one.decode.say(gateway, tokens(generate.request, position, (97,), finish))

    for worker in (one.prefill, one.decode):
        worker.on_generate, worker.on_resize = on_generate, _resizes(worker)


def _resizes(worker: FakeWorker) -> Callable[[PeerId, Resize], None]:
    def answer(gateway: PeerId, order: Resize) -> None:
        size = order.device_memory_bytes
        worker.say(
            gateway,
            ResizeAnswer(call=order.call, device_memory_bytes=size, target_bytes=size, pages=1, leaving_pages=0),
        )

    return answer


def described(one: Cluster) -> Any:
    """The description, with what only this deployment knows: so that right requests reach the workers."""
    with one.http() as client:
        raw = client.get("/openapi.json").json()
    schemas = raw["components"]["schemas"]
    for body in ("CompletionRequest", "ChatRequest"):
        schemas[body]["properties"]["model"] = {"const": NAME}
        schemas[body]["properties"]["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 16}
        schemas[body]["properties"].pop("max_completion_tokens", None)
        schemas[body]["properties"].pop("stop_token_ids")
    token = {"type": "integer", "minimum": 0, "maximum": VOCAB_TOKENS - 1}
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    prompt[2]["items"], prompt[3]["items"]["items"] = token, token
    for path, item in raw["paths"].items():
        for parameter in [p for operation in item.values() for p in operation["parameters"] if p["in"] == "path"]:
            parameter["schema"] = {"enum": [NAME] if "models" in path else ["prefill-0", "decode-0", "nobody"]}
    return raw


def fuzz(one: Cluster, examples: int, *, seed: int = 0, only_bodies: bool = False) -> Counts:
    """`examples` right and as many wrong requests for each operation. Raises what an answer breaks, with the request.

    `only_bodies`: operations that take one, and no other.
    """
    load_all_checks()
    counts = Counts()
    schema = schemathesis.openapi.from_dict(described(one))
    with requests.Session() as session:  # what one answer leaves in a kept connection would be the next one's
        for found in schema.get_all_operations():
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                terms = (
                    hypothesis.seed(seed),
                    lambda case: case.call(base_url=one.url, session=session, timeout=PATIENCE_S),
                )
                assert isinstance(found, Ok), found
                operation = found.ok()
                if only_bodies and not operation.body:
                    continue
                share = 1 if operation.body else _LESS_OFTEN
                _fuzz_one(operation, mode, max(1, examples // share), terms, counts)
    return counts


def _fuzz_one(operation: Any, mode: GenerationMode, examples: int, terms: Any, counts: Counts) -> None:
    seeded, call = terms

    @seeded  # type: ignore[untyped-decorator]  # came as Any
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.target),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_one(case: Any) -> None:
        response = call(case)
        counts.requests += 1
        counts.by_kind[mode.value] += 1
        counts.by_status[response.status_code] += 1
        case.validate_response(response, checks=_CHECKS)
        _require_named_field(response.status_code, response.content, operation.label)

    try_one()


_CHECKS = [
    schemathesis.checks.not_a_server_error,
    rules.status_code_conformance,
    rules.content_type_conformance,
    rules.response_headers_conformance,
    rules.response_schema_conformance,
    rules.negative_data_rejection,
]


def _require_named_field(status: int, content: bytes, label: str) -> None:
    """A refused request says which field was wrong."""
    if status != 400 or label.startswith("HEAD"):
        return
    error = json.loads(content)["error"]
    assert (
        error["param"] is not None
        or error["code"] == "context_length_exceeded"
        or error["message"].startswith(NAMED_BY_POSITION)
    ), error
