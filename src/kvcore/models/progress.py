"""A progress bar over prompts on stderr, for those who ask for one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..errors import MissingExtra


class Progress:
    """Counts finished prompts; shows nothing and needs nothing unless `enabled`.

    Raises:
        MissingExtra: it is enabled and tqdm is not installed.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar: Any = None
        if enabled:
            try:
                from tqdm import tqdm
            except ImportError:
                raise MissingExtra(
                    'progress: expected tqdm to be installed; run: pip install "kvcore[cli]"'
                ) from None
            self._bar = tqdm(total=total, unit="prompt")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, num_tokens: int) -> None:
        """One more prompt is finished, `num_tokens` after the start."""
        if self._bar is not None:
            self._bar.set_postfix(tokens=num_tokens, refresh=False)
            self._bar.update()

    def aside(self) -> AbstractContextManager[None]:
        """Takes the bar off the terminal while something else is written there."""
        if self._bar is None:
            return nullcontext()
        mode: AbstractContextManager[None] = self._bar.external_write_mode()
        return mode
