"""Chat messages to one prompt text, with the model's own Jinja template, rendered as `transformers` renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn  # Any: whatever a template passes to its functions

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import ConfigError, InvalidRequest

_REFUSED = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    RecursionError,  # deep values of the client's own, written out
)


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ConfigError when `source` is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any]) -> str:
        """The prompt up to where the assistant's answer begins. `extra`: the client's `chat_template_kwargs`.

        Raises InvalidRequest with the template's own words, such as that roles must alternate.
        """
        values = {**self._special_tokens, "add_generation_prompt": True, **extra, "messages": messages}
        try:
            return self._template.render(values)
        except _REFUSED as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _refuse(text: str) -> NoReturn:
    raise jinja2.TemplateError(text)


def _now(pattern: str) -> str:
    return datetime.now(tz=UTC).strftime(pattern)


def _to_json(value: Any, **options: Any) -> str:  # Any: see above
    """JSON as models were trained on: not escaped for HTML, as Jinja's own filter would."""
    return json.dumps(value, **{"ensure_ascii": False, **options})
