"""Progress of computations that take steps in several files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

BAR: ContextVar[Any] = ContextVar("bar", default=None)
"""The present progress, whose `total` grows by the steps that are known, and `update` counts them; or None."""

# Seconds that a computation takes at least to be shown.
_DELAY = 1.0


@contextmanager
def progress(description: str, is_shown: bool) -> Iterator[None]:
    """Show the steps inside on stderr, if they take longer than a second."""
    if not is_shown:
        yield
        return
    with tqdm(desc=description, total=0, delay=_DELAY, leave=False) as bar:
        token = BAR.set(bar)
        try:
            yield
        finally:
            BAR.reset(token)
