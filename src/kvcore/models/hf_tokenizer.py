"""The tokenizer of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvcore.errors import ModelFileError
from kvcore.models.hf import read_json
from kvcore.models.tokenizer import Tokenizer, load_tokenizer_json


def read_tokenizer(directory: Path, eos_ids: Iterable[int]) -> Tokenizer:
    """Reads tokenizer.json, and from the files beside it the chat template and special tokens.

    Args:
        eos_ids: ends of text that the model's configuration names.

    Raises:
        ModelFileError: if there is no tokenizer or a file is malformed.
    """
    backend = load_tokenizer_json(directory / "tokenizer.json")
    file = directory / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    names = {
        key: name
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (name := _token_name(config.get(key))) is not None
    }
    ids = set(eos_ids)
    eos = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
    if eos is not None:
        ids.add(eos)
    return Tokenizer(
        backend,
        eos_ids=ids,
        chat_template=_chat_template(directory, config),
        special_tokens=names,
    )


def _token_name(value: Any) -> str | None:
    """A token's text; older files wrap it in an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the template of tokenizer_config.json; of several, the default."""
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{file}: a readable template expected: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
