"""The data set as mini-batches: sizes, devices, order, and that every pass reads the same."""

from __future__ import annotations

import operator
import weakref
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._ranks import Alone
from fisherops._tree import leaves, map_arrays

_EXPECTED = (
    "Pass a list of batches [(X, y), ...] or [(X, y, index), ...], a DataLoader, another re-iterable of them, or one "
    "pair of arrays (X, y)."
)


# Places that ranks compare at a time.
_PLACES_AT_ONCE = 2**20


class Batch(NamedTuple):
    """One mini-batch, on the device of the parameters."""

    number: int
    X: Any
    y: Any
    size: int
    places: Tensor
    """The place of each datum in the data set, (size,)."""


class Data:
    """A data set that is read once for every product.

    Parameters
    ----------
    source : iterable of (X, y), or a pair of arrays (X, y)
        What the user passed as ``data``.
    device : torch.device
        Where batches go.
    dtype : torch.dtype
        Compute precision.
    convert : bool
        Whether floating-point tensors in X are converted to `dtype`.
    batch_size : int or None
        Rows per batch when `source` is a pair of arrays; None takes all rows as one batch.
    batch_size_fn : callable or None
        ``X -> int``; None takes the length of y.
    num_data : int or None
        The number of data that the source is said to have, checked on every pass.
    verify : bool
        Whether the contents of each batch are compared with those of the first pass.
    ordered : bool
        Whether the order of the data matters even where batches (X, y, index) say which data they hold.
    progressbar : bool
        Whether passes show a tqdm bar on stderr.
    ranks : Alone
        Those among which the data are divided.

    Attributes
    ----------
    num_data : int or None
        Number of data here, known after the first complete pass.
    """

    def __init__(
        self,
        source: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        convert: bool,
        batch_size: int | None,
        batch_size_fn: Callable[[Any], int] | None,
        num_data: int | None,
        verify: bool,
        ordered: bool,
        progressbar: bool,
        ranks: Alone,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._convert = convert
        self._size_of = batch_size_fn
        self._said_num_data = None if num_data is None else integer("num_data", num_data, 1)
        self._verify = verify
        self._ordered = ordered
        self._progressbar = progressbar and ranks.rank == 0
        self._ranks = ranks
        self._offset = 0
        self._prints: list[_Print] = []
        self._sum_of_places = self._passes = 0
        self.num_data: int | None = None
        self.order_is_free = False
        """Whether batches say which data they hold, and were read in another order or contents were not looked at."""
        self._source = _as_source(source, batch_size)

    def batches(self, description: str) -> Generator[Batch]:
        """Read all batches once.

        Raises
        ------
        TypeError
            If an item is not a pair (X, y).
        ValueError
            If there is no data, a batch is empty, or their number is not what the user said.
        RuntimeError
            If a batch differs from what the first pass read.
        """
        first_pass = self.num_data is None
        prints: list[_Print] = [] if first_pass else self._prints
        total = count = sum_of_places = 0
        seen: list[Tensor] = []
        total_batches = None if first_pass else len(self._prints)
        with tqdm(
            self._source,
            desc=description,
            total=total_batches,
            unit="batch",
            leave=False,
            disable=not self._progressbar,
        ) as bar:
            for index, item in enumerate(bar):
                X, y, size, places = self._unpack(index, item)
                free = places is not None and not self._ordered
                contents = (X, y) if places is None else (X, y, places)
                if first_pass:
                    prints.append(_Print(contents, size, self._verify))
                    self.order_is_free = free and not self._verify
                elif index >= len(prints):
                    raise RuntimeError(_changed(f"the first pass read {len(prints)} batches, this one has more"))
                elif not self.order_is_free and not prints[index].matches(contents, size):
                    if not free or self._passes > 1:
                        raise RuntimeError(_changed(f"batch {index} is not the one that the first pass read"))
                    self.order_is_free = True
                if places is None:
                    places = torch.arange(total, total + size, device="cpu") + self._offset
                else:
                    sum_of_places += int(places.sum())
                if first_pass and free:
                    seen.append(places)
                count, total = index + 1, total + size
                ready = self._ready(X, self._convert), self._ready(y, False)
                yield Batch(index, *ready, size, places.to(self._device))
        if count < len(prints):
            raise RuntimeError(_changed(f"the first pass read {len(prints)} batches, this one only {count}"))
        if first_pass:
            _check_distinct(seen)
            self._join(total, seen)
        elif (total, sum_of_places) != (self.num_data, self._sum_of_places):
            raise RuntimeError(_changed(f"the first pass read {self.num_data} data, this one other ones ({total})"))
        self._prints, self.num_data, self._sum_of_places = prints, total, sum_of_places
        self._passes += 1

    def _join(self, own: int, places: list[Tensor]) -> None:
        """Compare with the data of the other ranks: without indices, ours follow those of the ranks before."""
        ranks = self._ranks
        ranks.agree("the first pass over the data", num_data=self._said_num_data)
        shares = ranks.share((own, bool(places)))
        total = sum(number for number, _ in shares)
        if total == 0:
            raise ValueError(f"`data` has no batches, so there is no Fisher. {_EXPECTED}")
        if self._said_num_data is not None and total != self._said_num_data:
            raise ValueError(
                f"`num_data` is {self._said_num_data}, but the data has {total}: leave it out, or correct it. "
                "(A `batch_size_fn` that counts wrongly also causes this.)"
            )
        if len({indexed for number, indexed in shares if number}) > 1:
            raise ValueError("the batches of some ranks are (X, y, index), and those of others are not.")
        if any(indexed for _, indexed in shares):
            _check_distinct_over(ranks, torch.cat(places) if places else torch.zeros(0, dtype=torch.int64))
        else:
            self._offset = sum(number for number, _ in shares[: ranks.rank])

    def _unpack(self, index: int, item: Any) -> tuple[Any, Any, int, Tensor | None]:
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
            hint = (
                ' For batches that are mappings, with targets in them, pass `[(b, b["labels"]) for b in loader]`.'
                if isinstance(item, Mapping)
                else ""
            )
            raise TypeError(
                f"batch {index} must be a pair (X, y), or (X, y, index), got {type(item).__name__}{length}. "
                f"{_EXPECTED}{hint}"
            )
        X, y, *places = item
        if not leaves(y):
            raise TypeError(
                f"the targets y of batch {index} must be a tensor or array, or a mapping or tuple of them, got "
                f"{type(y).__name__}."
            )
        y = map_arrays(lambda a: self._tensor(a, f"y of batch {index}"), y)
        X = map_arrays(lambda a: self._tensor(a, f"X of batch {index}"), X)
        if self._size_of is not None:
            size = self._size_of(X)
            if isinstance(size, bool) or not hasattr(size, "__index__"):
                raise TypeError(f"`batch_size_fn` must return an integer, got {size!r} for batch {index}.")
            size = size.__index__()
        elif (first := leaves(y)[0]).ndim == 0:
            raise ValueError(
                f"the targets y of batch {index} have no batch axis (0-d), so the batch size is unknown: "
                "add the axis, or pass `batch_size_fn`."
            )
        else:
            size = first.shape[0]
            lengths = {t.shape[0] if t.ndim else None for t in leaves(y)}
            if len(lengths) > 1:
                raise ValueError(
                    f"the targets of batch {index} must have one row for each datum, got shapes "
                    f"{[tuple(t.shape) for t in leaves(y)]}: make them equally long, or pass `batch_size_fn`."
                )
        if size < 1:
            raise ValueError(
                f"batch {index} has size {size}: every batch must have at least one datum. Leave empty batches out."
            )
        return X, y, size, self._places(index, places[0], size) if places else None

    def _places(self, index: int, places: Any, size: int) -> Tensor:
        if not _arrays.is_array(places):
            raise TypeError(f"the indices of batch {index} must be a tensor or array, got {type(places).__name__}.")
        t = _arrays.to_tensor(places, f"index of batch {index}").cpu()
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or tuple(t.shape) != (size,):
            raise ValueError(
                f"the indices of batch {index} must be {size} integers, one for each datum, got shape "
                f"{tuple(t.shape)} of {t.dtype}."
            )
        if len(t.unique()) < len(t):
            raise ValueError(
                f"the indices of batch {index} are not distinct: each must be the place of one datum in the data set."
            )
        if int(t.min()) < 0 or int(t.max()) >= 2**32:
            raise ValueError(f"the indices of batch {index} must be in [0, 2**32), got {t.min()} to {t.max()}.")
        return t.long()

    def _tensor(self, a: Any, name: str) -> Tensor:
        if isinstance(a, Tensor):
            return a
        t = _arrays.to_tensor(a, name)
        # NumPy's default is float64 whatever the model's precision; a torch tensor's dtype is the user's choice.
        return t.to(self._dtype) if t.is_floating_point() else t

    def _ready(self, x: Any, convert: bool) -> Any:
        def move(t: Tensor) -> Tensor:
            t = t.to(self._device, self._dtype if convert and t.is_floating_point() else t.dtype)
            return t.clone() if t.is_inference() else t  # an inference tensor cannot be part of a graph

        # A graph or a packed sequence knows by itself how to move.
        if not isinstance(x, Tensor | Mapping) and callable(getattr(x, "to", None)):
            return x.to(self._device)
        return map_arrays(move, x)


def _as_source(source: Any, batch_size: int | None) -> Iterable[Any]:
    batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)
    if is_pair(source):
        return _slices(source[0], source[1], batch_size)
    if batch_size is not None:
        raise ValueError(
            f"`batch_size` is for a pair of arrays (X, y), and `data` is {type(source).__name__}: leave it out if the "
            "data are already in batches, and convert Python lists of numbers by `numpy.asarray`."
        )
    if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise TypeError(f"`data` must be iterable, got {type(source).__name__}. {_EXPECTED}")
    if isinstance(source, Iterator):
        raise TypeError(
            f"`data` must be re-iterable, got {type(source).__name__}: every product reads all data again, and a "
            "generator is empty after the first. Pass a list of batches or a DataLoader."
        )
    if _arrays.is_array(source) or isinstance(source, Mapping | str):
        raise TypeError(f"`data` must hold inputs and targets, got one {type(source).__name__}. {_EXPECTED}")
    return source  # type: ignore[no-any-return]


def is_pair(source: Any) -> bool:
    """Whether the data are (X, y) at once, and not two batches (X, y)."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        return False
    X, y = source
    nested = (
        isinstance(y, Mapping | tuple | list) and bool(leaves(y)) and (_arrays.is_array(X) or isinstance(X, Mapping))
    )
    return _arrays.is_array(y) or nested


def _slices(X: Any, y: Any, batch_size: int | None) -> list[tuple[Any, Any]]:
    """Cut a pair of arrays into batches, which are views."""
    N = length_of_pair(X, y)
    step = batch_size or max(N, 1)
    cuts = [slice(start, min(start + step, N)) for start in range(0, N, step)]
    rows = [operator.itemgetter((cut, ...)) for cut in cuts]
    return [(map_arrays(own, X), map_arrays(own, y)) for own in rows]


def length_of_pair(X: Any, y: Any) -> int:
    """Return the number of data in a pair of arrays."""
    inputs, targets = leaves(X), leaves(y)
    if not inputs:
        raise TypeError(f"the inputs X of the pair must be arrays, got {type(X).__name__}. {_EXPECTED}")
    lengths = {a.shape[0] if len(a.shape) else -1 for a in [*inputs, *targets]}
    if len(lengths) > 1 or -1 in lengths:
        shapes = [str([tuple(a.shape) for a in arrays]) for arrays in (inputs, targets)]
        raise ValueError(f"the arrays X and y must have one row for each datum, got shapes {' and '.join(shapes)}.")
    (N,) = lengths
    return N


def _check_distinct(places: list[Tensor]) -> None:
    """Raise ValueError if a datum occurs in two batches: it would be drawn the same in both."""
    if not places or len(torch.cat(places)) == len(torch.cat(places).unique()):
        return
    batches: dict[int, int] = {}
    for number, own in enumerate(places):
        for place in own.tolist():
            if place in batches:
                raise ValueError(
                    f"the index {place} names a datum in batch {batches[place]} and another in batch {number}: each "
                    "must be the place of one datum in the data set."
                )
            batches[place] = number


def _check_distinct_over(ranks: Alone, own: Tensor) -> None:
    """Raise ValueError if a datum occurs on two ranks."""
    ends = [int(own.min()), int(own.max()) + 1] if len(own) else [0, 0]
    spans = sorted((start, stop) for start, stop in ranks.share(ends) if stop)
    if all(before[1] <= after[0] for before, after in pairwise(spans)):
        return
    for start in range(spans[0][0], max(stop for _, stop in spans), _PLACES_AT_ONCE):
        inside = own[(own >= start) & (own < start + _PLACES_AT_ONCE)] - start
        counts = ranks.sum(torch.bincount(inside, minlength=_PLACES_AT_ONCE))
        if (counts > 1).any():
            place = start + int(counts.argmax())
            holders = [rank for rank, holds in enumerate(ranks.share(bool((own == place).any()))) if holds]
            raise ValueError(
                f"the index {place} names a datum on rank {holders[0]} and another on rank {holders[1]}: each must be "
                "the place of one datum in the data set."
            )


class _Print:
    """The fingerprint of one batch: its size, and its contents where they are to be verified."""

    def __init__(self, contents: Any, size: int, verify: bool) -> None:
        self._size = size
        self._prints = [_print_of(t) for t in leaves(contents)] if verify else None

    def matches(self, contents: Any, size: int) -> bool:
        if size != self._size:
            return False
        if self._prints is None:
            return True
        tensors = leaves(contents)
        return len(tensors) == len(self._prints) and all(
            _unchanged_on_device(t, known) or _print_of(t)[:3] == known[:3]
            for t, known in zip(tensors, self._prints, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, and mean nothing elsewhere.
        prints = None if self._prints is None else [(*known[:3], None, None) for known in self._prints]
        return {"_size": self._size, "_prints": prints}


def _print_of(t: Tensor) -> tuple[Any, ...]:
    """Return shape, dtype and checksum of a tensor; and its identity and version."""
    version = None if t.is_inference() else t._version
    return t.shape, t.dtype, _checksum(t), weakref.ref(t), version


def _unchanged_on_device(t: Tensor, known: tuple[Any, ...]) -> bool:
    """Whether a tensor on an accelerator is the same object at the same version, so that it need not be copied here.

    On the CPU a checksum costs little, and NumPy may have written to the memory of a tensor unseen.
    """
    *_, reference, version = known
    same = reference is not None and reference() is t
    return same and t.device.type != "cpu" and version is not None and t._version == version


def _checksum(t: Tensor) -> int:
    """Return a number that depends on every bit of a tensor and on their order."""
    if t.is_nested:
        t = torch.cat([part.flatten() for part in t.unbind()])
    elif t.layout is not torch.strided:
        t = t.to_dense()
    t = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    t = t.as_strided((t.numel(),), (1,))  # one element alone may have any stride
    return zlib.crc32(t.view(torch.uint8).numpy().data)


def _changed(what: str) -> str:
    return (
        f"`data` changed between two passes: {what}. Every product reads all data and must find the same batches in "
        "the same order. Switch shuffling and random augmentation off (`DataLoader(..., shuffle=False)`), and do not "
        "change the arrays in place while the operator is in use."
    )
