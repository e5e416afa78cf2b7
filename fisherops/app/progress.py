"""What is being done, on stderr."""

from __future__ import annotations

import sys
import threading
import time


class Progress:
    """A line on stderr, from the second second on; a terminal rewrites it, other streams get one every ten seconds."""

    def __init__(self, shown: bool) -> None:
        self._stage = self._detail = ""
        self._begun, self._done = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True) if shown else None

    def start(self, stage: str) -> None:
        """Begin a stage."""
        self._stage, self._detail = stage, ""

    def report(self, detail: str) -> None:
        """Describe how far the stage is."""
        self._detail = detail and f": {detail}"

    def __enter__(self) -> Progress:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        stream, pause = sys.stderr, 1.0
        clear, end = ("\r\x1b[K", "") if stream.isatty() else ("", "\n")
        while not self._done.wait(pause):
            seconds, pause = time.perf_counter() - self._begun, 0.5 if clear else 10.0
            print(f"{clear}{self._stage}{self._detail} ({seconds:.0f} s)", end=end, file=stream, flush=True)
        print(clear, end="", file=stream, flush=True)
