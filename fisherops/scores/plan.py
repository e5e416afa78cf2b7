"""What an operator keeps between products, in words and bytes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """What was chosen for one batch."""

    size: int
    form: str
    nbytes: int
    reason: str
    file_size: int = 0


@dataclass
class Plan:
    """What an operator keeps between products; print it.

    Attributes
    ----------
    cache : str
        What was asked for.
    max_memory : int
        Bytes that may be kept.
    entries : list of Entry
        The choice for each batch, its memory and reason.
    """

    cache: str
    max_memory: int
    entries: list[Entry] = field(default_factory=list)
    nbytes: int = 0
    """Bytes kept in memory: counted entry by entry, because every batch asks how many are left."""
    file_size: int = 0
    """Bytes kept in files."""
    holds_rows: bool = True
    """Whether rows of G are kept, dense or as factors, for every batch."""

    def add(self, entry: Entry) -> None:
        """Note the choice for the next batch."""
        self.entries.append(entry)
        self.nbytes += entry.nbytes
        self.file_size += entry.file_size
        self.holds_rows = self.holds_rows and entry.form not in ("none", "linearization")

    def forget(self, reason: str) -> None:
        """Note that nothing is kept."""
        self.entries = [Entry(entry.size, "none", 0, reason) for entry in self.entries]
        self.nbytes = self.file_size = 0
        self.holds_rows = not self.entries

    def __str__(self) -> str:
        lines = [
            f"cache={self.cache!r}: {readable(self.nbytes)} of at most {readable(self.max_memory)} kept "
            f"for {sum(entry.size for entry in self.entries)} data in {len(self.entries)} batches"
            + (f", {readable(self.file_size)} in files" if self.file_size else "")
        ]
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.form, entry.reason), []).append(entry)
        for (form, reason), entries in groups.items():
            size = readable(sum(e.nbytes + e.file_size for e in entries))
            lines.append(f"  {len(entries)} × {form}, {size}: {reason}")
        return "\n".join(lines)


def readable(n: float) -> str:
    """Return a number of bytes in a unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"
