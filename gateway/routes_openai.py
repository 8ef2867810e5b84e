"""OpenAI's endpoints: from a body to a Reply."""

import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any  # Any: JSON

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from common.clock import Clock
from common.errors import InvalidRequest, UnknownModel
from common.ids import RequestId
from gateway.account import Account
from gateway.answer import Choice
from gateway.border import read_body
from gateway.chunks import ChatWriter, CompletionWriter, Heading
from gateway.core.order import Order
from gateway.errors import cut
from gateway.metrics import GatewayMetrics
from gateway.openai_schema import ChatRequest, CompletionRequest, read_chat, read_completion
from gateway.reply import Plan, Reply
from gateway.routing_wishes import RoutingWishes, read_routing_wishes
from gateway.sampling import Limits, read_cache_salt, read_messages, read_sampling, read_wishes
from gateway.switchboard import Switchboard
from gateway.tokens import Tokens

MAX_CHOICES = 128  # prompts times n of one request


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The one model that this gateway serves, and how far it goes."""

    name: str
    since_unix_s: int
    limits: Limits
    max_body_bytes: int
    request_timeout_ms: float


class OpenAiRoutes:
    """Owns nothing but the numbering of requests."""

    def __init__(
        self, served: Served, tokens: Tokens, switchboard: Switchboard, metrics: GatewayMetrics, clock: Clock
    ) -> None:
        self._served, self._tokens, self._switchboard = served, tokens, switchboard
        self._metrics, self._clock = metrics, clock
        # Workers remember cancelled ids, and clients may repeat theirs: each prompt gets a number of its own.
        self._serials = itertools.count(secrets.randbits(48))

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoints."""
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"])
        # Starlette's own way: FastAPI would look for dependencies in every request, and there are none.
        app.add_route("/v1/completions", self.completions, methods=["POST"])
        app.add_route("/v1/chat/completions", self.chat_completions, methods=["POST"])

    async def models(self, request: Request) -> Response:
        """The served model, as a list of one."""
        return _json({"object": "list", "data": [self._model_fields()]})

    async def model(self, request: Request) -> Response:
        """The served model."""
        self._check_model(request.path_params["model"])
        return _json(self._model_fields())

    def _model_fields(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._served.since_unix_s,
            "owned_by": "penstock",
            "max_model_len": self._limits().context_tokens,
        }

    def _limits(self) -> Limits:
        """The model's own limits, or the workers' where they can take less."""
        limits, offered = self._served.limits, self._switchboard.context_tokens()
        if offered is None or offered >= limits.context_tokens:
            return limits
        return replace(limits, context_tokens=offered)

    def _check_model(self, name: str) -> None:
        if name != self._served.name:
            raise UnknownModel(f"the model {cut(name)!r} does not exist here; {self._served.name!r} does")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await read_body(request, self._served.max_body_bytes)
        parsed = read_completion(body, request.state.account.note_ignored)
        self._check_model(parsed.model)
        prompts = [await self._prompt(prompt, param) for prompt, param in _prompts(parsed)]
        return self._reply(request, parsed, prompts)

    async def _prompt(self, prompt: str | Sequence[int], param: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._tokens.encode(prompt)
        return self._tokens.check_ids(prompt, param)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await read_body(request, self._served.max_body_bytes)
        parsed = read_chat(body, request.state.account.note_ignored)
        self._check_model(parsed.model)
        messages = read_messages(parsed.messages)
        prompt = await self._tokens.encode_chat(messages, parsed.chat_template_kwargs or {})
        return self._reply(request, parsed, [prompt])

    def _reply(
        self,
        request: Request,
        parsed: CompletionRequest | ChatRequest,
        prompts: Sequence[tuple[int, ...]],
    ) -> Reply:
        wishes = read_wishes(parsed)
        n = wishes.choices_per_prompt
        if len(prompts) * n > MAX_CHOICES:
            text = (
                f"{len(prompts)} prompts times n={n} are {len(prompts) * n} choices; at most {MAX_CHOICES} are allowed"
            )
            raise InvalidRequest(text, param="n" if len(prompts) == 1 else "prompt")
        request_id: str = request.state.request_id
        routing = read_routing_wishes(request.headers, parsed)
        orders = [
            replace(self._order(request_id, parsed, prompt, index), key=request.state.key_name, **_fields(routing))
            for prompt in prompts
            for index in range(n)
        ]
        is_chat = isinstance(parsed, ChatRequest)
        heading = Heading(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
            created_unix_s=int(time.time()),
            model=self._served.name,
            include_usage=wishes.include_usage,
            token_ids=wishes.token_ids,
            top_logprobs=orders[0].sampling.logprobs,
        )
        client_stop_ids = parsed.stop_token_ids or ()
        account: Account = request.state.account
        plan = Plan(
            orders=orders,
            choices=[Choice(index, self._tokens, wishes.stops, client_stop_ids) for index in range(len(orders))],
            prompt_tokens=sum(map(len, prompts)),
            choices_per_prompt=n,
            writer=(ChatWriter if is_chat else CompletionWriter)(heading, self._tokens, len(orders)),
            stream=wishes.stream,
            include_usage=wishes.include_usage,
            explain=routing.explain,
            account=account,
            timeout_ms=self._served.request_timeout_ms,
        )
        account.model, account.stream, account.choices = self._served.name, plan.stream, len(orders)
        account.prompt_tokens = plan.prompt_tokens
        self._metrics.prompt_tokens_total += plan.prompt_tokens
        return Reply(plan, self._switchboard, self._metrics, self._clock)

    def _order(
        self, request_id: str, parsed: CompletionRequest | ChatRequest, prompt: tuple[int, ...], index: int
    ) -> Order:
        """The prompt's choice number `index`. With the client's seed, choice i continues as seed + i alone would."""
        if not prompt:
            raise InvalidRequest("the prompt has no tokens; it must have one or more", param="prompt")
        seed = secrets.randbits(63) if parsed.seed is None else parsed.seed + index
        sampling = read_sampling(parsed, self._limits(), len(prompt), seed)
        return Order(
            request=RequestId(f"{request_id}.{next(self._serials):x}"),
            prompt=prompt,
            sampling=sampling,
            model=self._served.name,
            cache_salt=read_cache_salt(parsed),
        )


def _prompts(parsed: CompletionRequest) -> list[tuple[str | list[int], str]]:
    """Every prompt with its place in the body. Raises InvalidRequest for an empty or mixed list."""
    prompt = parsed.prompt
    if isinstance(prompt, str):
        return [(prompt, "prompt")]
    if not prompt:
        raise InvalidRequest("prompt must not be an empty list", param="prompt")
    if all(isinstance(one, int) for one in prompt):
        return [([one for one in prompt if isinstance(one, int)], "prompt")]
    texts_or_lists = [one for one in prompt if not isinstance(one, int)]
    if len({type(one) for one in prompt}) != 1:
        raise InvalidRequest(
            "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids, not a mixture",
            param="prompt",
        )
    if len(texts_or_lists) > MAX_CHOICES:
        raise InvalidRequest(f"at most {MAX_CHOICES} prompts are allowed in one request", param="prompt")
    return [(one, f"prompt[{index}]") for index, one in enumerate(texts_or_lists)]


def _fields(wishes: RoutingWishes) -> dict[str, Any]:
    return {name: getattr(wishes, name) for name in ("session", "priority", "prefill_rule", "decode_rule", "explain")}


def _json(fields: Mapping[str, Any]) -> Response:
    return Response(msgspec.json.encode(fields), media_type="application/json")
