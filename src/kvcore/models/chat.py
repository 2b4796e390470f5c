"""Chat templates: Jinja programs that turn messages into the text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from kvcore.errors import InvalidArgument
from kvcore.models.files import require


def render_chat(template: str, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
    """The text of a conversation, up to where the assistant's answer begins.

    Args:
        template: Jinja source; it runs in a sandbox.
        messages: mappings with "role" and "content".
        variables: further names for the template, such as bos_token.

    Raises:
        InvalidArgument: for messages that are not of this form or that the template refuses.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InvalidArgument(
                f"messages[{index}]: a mapping with role and content expected, got {message!r}"
            )
    jinja2 = require("jinja2")
    try:
        return str(
            _compile(template).render(
                messages=list(messages), add_generation_prompt=True, **variables
            )
        )
    except jinja2.TemplateError as error:
        raise InvalidArgument(f"messages: refused by the chat template: {error}") from error


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    jinja2 = require("jinja2")
    sandbox = require("jinja2.sandbox", "jinja2")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Templates are written for these names and for a tojson that does not escape for HTML.
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment.from_string(template)
