"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models.chat import render_chat
from kvcore.models.files import require

# What a decoder writes for bytes that are not UTF-8, among them a character that is not complete.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# An incomplete character is at most this many bytes, and so as many tokens or replacements.
MAX_INCOMPLETE = 3


class Tokenizer:
    """A tokenizer with what surrounds it: special ids and a chat template.

    Args:
        backend: a `tokenizers.Tokenizer`.
        eos_ids: tokens that end a text.
        chat_template: Jinja source, or None.
        special_tokens: names that chat templates use, such as {"bos_token": "<s>"}.
    """

    def __init__(
        self,
        backend: Any,
        *,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.eos_ids = frozenset(eos_ids)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of a text; `add_special` adds what the model expects around it, such as a BOS."""
        if not isinstance(text, str):
            raise InvalidArgument(f"text: a str expected, got {type(text).__name__}")
        return list(self.backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; those outside the vocabulary raise InvalidArgument."""
        checked = [self._check(token) for token in ids]
        return str(self.backend.decode(checked, skip_special_tokens=skip_special))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name, or None."""
        found = self.backend.token_to_id(token)
        return None if found is None else int(found)

    def stream(self, skip_special: bool = True) -> TokenStream:
        """An incremental decoder for tokens that arrive one at a time."""
        return TokenStream(self, skip_special)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in the model's own template, ready for the assistant's answer.

        Args:
            messages: mappings with "role" ("system", "user", "assistant") and "content".

        Raises:
            InvalidArgument: if the model has no chat template, or the messages do not fit it.
        """
        if self.chat_template is None:
            raise InvalidArgument("messages: this model has no chat template to put them in")
        text = render_chat(self.chat_template, messages, **self.special_tokens)
        return self.encode(text, add_special=False)

    def _check(self, token: int) -> int:
        token = int(token)
        if not 0 <= token < self.vocab_size:
            raise InvalidArgument(f"ids: from 0 to {self.vocab_size - 1} expected, got {token}")
        return token


class TokenStream:
    """Turns ids into text one at a time, never splitting a character.

    What `push` and `flush` return, joined, is what `decode` gives for all ids at once. (Bytes that
    are no character may differ where a tokenizer decodes single bytes: there `decode` also gives
    up the characters that stand before such a byte, and `push` has already returned them.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Tokens are decoded together with the ones before them, because some tokenizers drop the
        # space at the start of a text. `_context` counts the ids of the window already given out.
        self._window: list[int] = []
        self._context = 0
        self._emitted = 0

    def push(self, token: int) -> str:
        """The text that the next token completes, perhaps none."""
        self._window.append(self._tokenizer._check(token))
        text = self._decode(self._window)
        stable = len(text)
        if text.endswith(REPLACEMENT):
            # The character may still complete, and until then some decoders write nothing but
            # replacements for all the bytes before it.
            if len(self._window) - self._context <= MAX_INCOMPLETE:
                return ""
            while stable > len(text) - MAX_INCOMPLETE and text[:stable].endswith(REPLACEMENT):
                stable -= 1
        delta = text[self._emitted : stable]
        self._emitted = max(stable, self._emitted)
        if stable == len(text) and delta:
            self._slide()
        return delta

    def flush(self) -> str:
        """The text of bytes that never became a character; call it after the last token."""
        text = self._decode(self._window)
        delta = text[self._emitted :]
        self._window, self._context, self._emitted = [], 0, 0
        return delta

    def _slide(self) -> None:
        """Forgets all but the tokens since the last slide, which the next ones are decoded with."""
        del self._window[: self._context]
        self._context = len(self._window)
        self._emitted = len(self._decode(self._window))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.backend.decode(ids, skip_special_tokens=self._skip_special))


def load_tokenizer_json(file: Path) -> Any:
    """A `tokenizers.Tokenizer` from tokenizer.json, or ModelFileError."""
    if not file.is_file():
        raise ModelFileError(f"{file}: a tokenizer expected, but there is no such file")
    tokenizers = require("tokenizers")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise ModelFileError(f"{file}: a tokenizer expected: {error}") from error
