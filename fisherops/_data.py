"""The data set as mini-batches: sizes, devices and order, and the check that every pass reads the same data."""

from __future__ import annotations

import copy
import operator
import types
import weakref
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler
from tqdm import tqdm

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._tree import leaves, map_arrays

_EXPECTED = (
    "Pass a list of batches [(X, y), ...] or [(X, y, index), ...], a DataLoader, another re-iterable of them, or one "
    "pair of arrays (X, y)."
)

INDEX = (
    "The third element of a batch (X, y, index) is the index of each example in the data set. If yours means something "
    "else, such as a task or a weight, leave it out (`[(X, y) for X, y, _ in loader]`), or pass it to the model in X "
    "(`[((X, task), y) for X, y, task in loader]`)."
)

# Bytes of examples that are hashed at a time.
_HASH_BYTES = 2**24


class Batch(NamedTuple):
    """One mini-batch, on the device of the parameters."""

    number: int
    X: Any
    y: Any
    size: int
    places: Tensor
    """The place of each datum in the data set, (size,)."""
    as_before: bool
    """Whether it is the batch that earlier passes read as this number."""


class Placed(NamedTuple):
    """Where the data of a process are among those of all."""

    first: int
    """Index of the first, if they are numbered by their order."""
    total: int
    """Number of data of all processes."""
    is_indexed: bool
    """Whether batches are (X, y, index)."""


def place_alone(number: int, num_data: int | None, index: Tensor | None) -> Placed:  # noqa: ARG001
    """Return the place of data that no other process has a part of."""
    return Placed(0, number, index is not None)


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
    order : {"fixed", "index", "any"}
        Which order of the examples the matrix depends on: the order in which they are read; none if batches
        (X, y, index) identify them; or none at all.
    progressbar : bool
        Whether passes show a tqdm bar on stderr.
    place : callable
        ``(number, num_data, index) -> Placed``: at the end of the first pass, where the data are among those of all
        processes, from their number here, what `num_data` is, and the indices (number,) if batches have them.
    may_be_empty : bool
        Whether there may be no data at all.

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
        order: str,
        progressbar: bool,
        place: Callable[[int, int | None, Tensor | None], Placed] = place_alone,
        may_be_empty: bool = False,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._convert = convert
        self._size_of = batch_size_fn
        self._said_num_data = None if num_data is None else integer("num_data", num_data, 1)
        self._verify = verify
        self._order = order
        self.progressbar = progressbar
        self._place, self._may_be_empty = place, may_be_empty
        self._first = 0
        self._fingerprints: list[_Fingerprint] = []
        self._sum_of_places = 0
        # Of the examples of each batch, whatever their order; None if some cannot be told apart.
        self._sums_of_fingerprints: list[int | None] = []
        self.num_data: int | None = None
        self.total: int | None = None
        """Number of examples of all processes, known after the first complete pass."""
        self.is_indexed = False
        """Whether batches are (X, y, index); known after the first complete pass."""
        self.order_is_free = False
        """Whether the examples were read in another order, or batches with indices were not compared."""
        self._source = _as_source(source, batch_size)

    def to(self, device: torch.device) -> Data:
        """Return the same data for a model on another device."""
        other = copy.copy(self)
        other._device = device
        return other

    def of(self, source: Any, *, batch_size: int | None, order: str, **options: Any) -> Data:
        """Return another data set, which may be empty, that is read for the same model."""
        return Data(
            source,
            device=self._device,
            dtype=self._dtype,
            convert=self._convert,
            batch_size=batch_size,
            num_data=None,
            verify=self._verify,
            order=order,
            place=self._place,
            may_be_empty=True,
            **options,
        )

    @property
    def has_known_order(self) -> bool:
        """Whether an example's position in a pass is its index in the data set, as far as the source shows it."""
        source = self._source
        return not isinstance(source, DataLoader) or (
            isinstance(source.sampler, SequentialSampler) and type(source.batch_sampler) in (BatchSampler, type(None))
        )

    @property
    def is_stored(self) -> bool:
        """Whether batches are read from a list, so that no random numbers can change them."""
        return type(self._source) in (list, tuple)

    @property
    def num_batches(self) -> int | None:
        """Number of batches here, or None if it is not known before the first complete pass."""
        if self.num_data is not None:
            return len(self._fingerprints)
        return len(self._source) if isinstance(self._source, list | tuple) else None

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
        was_free = self.order_is_free
        try:
            yield from self._read(description)
        except BaseException:
            self.order_is_free = was_free  # what a pass that failed has seen says nothing
            raise

    def _read(self, description: str) -> Generator[Batch]:
        first_pass = self.num_data is None
        fingerprints: list[_Fingerprint] = [] if first_pass else self._fingerprints
        total = count = sum_of_places = 0
        sums_of_fingerprints: list[int | None] = []
        compares = not self.order_is_free  # else a batch is not known by its number
        seen: list[Tensor] = []
        total_batches = None if first_pass else len(self._fingerprints)
        with tqdm(
            self._source,
            desc=description,
            total=total_batches,
            unit="batch",
            leave=False,
            disable=not self.progressbar,
        ) as bar:
            for index, item in enumerate(bar):
                X, y, size, places = self._unpack(index, item)
                free = self._order != "fixed" and (places is not None or self._order == "any")
                contents = (X, y) if places is None else (X, y, places)
                as_before = compares
                if first_pass:
                    fingerprints.append(_Fingerprint(contents, size, self._verify))
                    self.order_is_free = free and places is not None and not self._verify
                elif index >= len(fingerprints):
                    raise RuntimeError(
                        self._changed(f"the first pass read {len(fingerprints)} batches, this one has more")
                    )
                elif compares and not fingerprints[index].matches(contents, size):
                    as_before = False
                    identified = places is not None or (self._verify and None not in self._sums_of_fingerprints)
                    if not free or not identified:
                        raise RuntimeError(self._changed(f"batch {index} is not the one that the first pass read"))
                    if not self.order_is_free:  # the batches before were those of the first pass
                        self.order_is_free, sums_of_fingerprints = True, self._sums_of_fingerprints[:index]
                if free and self._verify and (first_pass or self.order_is_free):
                    if places is None and not fingerprints[index].fits(contents, size):
                        raise RuntimeError(self._changed(f"batch {index} does not have the shapes of the first pass"))
                    sums_of_fingerprints.append(_fingerprint_of_examples(contents, size))
                if places is None:
                    places = torch.arange(total, total + size, device="cpu") + self._first
                else:
                    sum_of_places += int(places.sum())
                    if first_pass:
                        seen.append(places)
                count, total = index + 1, total + size
                ready = self._ready(X, self._convert), self._ready(y, False)
                yield Batch(index, *ready, size, places.to(self._device), as_before)
        if count < len(fingerprints):
            raise RuntimeError(self._changed(f"the first pass read {len(fingerprints)} batches, this one only {count}"))
        if first_pass:
            _check_distinct(seen)
            indices = torch.cat(seen) if seen else None
            placed = self._place(total, self._said_num_data, indices)
            if placed.total or not self._may_be_empty:
                _check_number(placed.total, self._said_num_data)
            self._first, self.total, self.is_indexed = placed
            self._sums_of_fingerprints = sums_of_fingerprints
        elif (total, sum_of_places) != (self.num_data, self._sum_of_places):
            raise RuntimeError(self._changed(f"the first pass read {self.num_data} examples, this one {total} others"))
        elif self.order_is_free and _total_fingerprint(sums_of_fingerprints) != _total_fingerprint(
            self._sums_of_fingerprints
        ):
            raise RuntimeError(self._changed("it read other examples than the first pass, not only another order"))
        self._fingerprints, self.num_data, self._sum_of_places = fingerprints, total, sum_of_places

    def _changed(self, what: str) -> str:
        """Return the text of the error for data that differ from pass to pass."""
        cure = "Switch shuffling and random augmentation off (`DataLoader(..., shuffle=False)`)"
        if self._order == "index":
            cure += "; to shuffle, let the loader yield (X, y, index)"
        if self._order == "any":
            cure = (
                "Switch random augmentation off, and read the same examples in every pass, in batches of equal shapes"
            )
        if isinstance(self._source, Iterator):
            cure = "Let its `__iter__` start again from the first batch, or pass a list of batches or a DataLoader"
        return (
            f"`data` must be the same in every pass, but it changed between two passes: {what}. {cure}. Do not change "
            "the arrays in place while the operator is in use."
        )

    def _unpack(self, index: int, item: Any) -> tuple[Any, Any, int, Tensor | None]:
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
            hint = ""
            if isinstance(item, Mapping):
                hint = ' For batches that are mappings with targets in them, pass `[(b, b["labels"]) for b in loader]`.'
            elif length == " of length 1":
                hint = " For data without targets pass `[(X, None) for X, in loader]`."
            raise TypeError(
                f"batch {index} must be a pair (X, y), or (X, y, index), got {type(item).__name__}{length}. "
                f"{_EXPECTED}{hint}"
            )
        X, y, *places = item
        y = _as_arrays(y)
        if not leaves(y) and y is not None:
            raise TypeError(
                f"the targets y of batch {index} must be a tensor or array, a list of numbers, or a mapping or tuple "
                f"of them, got {type(y).__name__}. Convert them, for example by `numpy.asarray`."
            )
        y = map_arrays(lambda a: self._tensor(a, f"y of batch {index}"), y)
        X = map_arrays(lambda a: self._tensor(a, f"X of batch {index}"), X)
        size = self._size(index, X, y)
        if size < 1:
            raise ValueError(f"batch {index} must have at least one example, got size {size}. Leave empty batches out.")
        return X, y, size, self._places(index, places[0], size) if places else None

    def _size(self, index: int, X: Any, y: Any) -> int:
        """Return the number of examples of a batch."""
        if self._size_of is not None:
            size = self._size_of(X)
            if isinstance(size, bool) or not hasattr(size, "__index__"):
                raise TypeError(f"`batch_size_fn` must return an integer, got {size!r} for batch {index}.")
            number: int = size.__index__()
            return number
        name, arrays = ("targets y", leaves(y)) if y is not None else ("inputs X", leaves(X)[:1])
        if not arrays or arrays[0].ndim == 0:
            got = f"an array without axes (0-d) in batch {index}" if arrays else f"{type(X).__name__} in batch {index}"
            raise ValueError(f"the {name} must have a batch axis, got {got}. Add the axis, or pass `batch_size_fn`.")
        if len({t.shape[0] if t.ndim else None for t in arrays}) > 1:
            raise ValueError(
                f"the targets of batch {index} must have one row for each example, got shapes "
                f"{[tuple(t.shape) for t in arrays]}. Make them equally long, or pass `batch_size_fn`."
            )
        return arrays[0].shape[0]

    def _places(self, index: int, places: Any, size: int) -> Tensor:
        if not _arrays.is_array(places):
            raise TypeError(
                f"the indices of batch {index} must be a tensor or array, got {type(places).__name__}. {INDEX}"
            )
        t = _arrays.to_tensor(places, f"index of batch {index}").cpu()
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or tuple(t.shape) != (size,):
            raise ValueError(
                f"the indices of batch {index} must be {size} integers, one for each example, got shape "
                f"{tuple(t.shape)} of {t.dtype}. {INDEX}"
            )
        if len(t.unique()) < len(t):
            raise ValueError(
                f"the indices of batch {index} must be distinct, got {_repeated(t)} more than once. {INDEX}"
            )
        if int(t.min()) < 0 or int(t.max()) >= 2**32:
            raise ValueError(f"the indices of batch {index} must be in [0, 2**32), got {t.min()} to {t.max()}. {INDEX}")
        return t.long()

    def _tensor(self, a: Any, name: str) -> Tensor:
        if isinstance(a, Tensor):
            return _arrays.signed(a)
        t = _arrays.to_tensor(a, name)
        # NumPy's default is float64 whatever the model's precision; a torch tensor's dtype is the user's choice.
        return t.to(self._dtype) if t.is_floating_point() else t

    def _ready(self, x: Any, convert: bool) -> Any:
        def move(t: Tensor) -> Tensor:
            t = t.to(self._device, self._dtype if convert and t.is_floating_point() else t.dtype)
            return t.clone() if t.is_inference() else t  # an inference tensor cannot be part of a graph

        def move_object(x: Any) -> Any:
            if not convert:
                return x.to(self._device)
            with _FloatsAs(self._dtype):
                return x.to(self._device)

        return map_arrays(move, x, move_object)


class _FloatsAs(TorchFunctionMode):
    """Converts floating-point tensors that are moved inside, whatever object moves them.

    The methods ``to`` of graph batches know no dtype, and those of packed sequences would convert integers too.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu) and result.is_floating_point():
            return result.to(self._dtype)
        return result


def _as_arrays(x: Any) -> Any:
    """Return `x` with lists of numbers, and objects that convert themselves to NumPy (pandas'), as NumPy arrays."""
    if _arrays.is_array(x) or isinstance(x, np.generic | Mapping):
        return x
    if hasattr(type(x), "__array__") or _is_list_of_numbers(x):
        try:
            return np.asarray(x)
        except ValueError as error:
            raise ValueError(
                f"a list of numbers must be rectangular, got parts of different lengths ({error}). Pad them."
            ) from None
    return type(x)(map(_as_arrays, x)) if type(x) in (tuple, list) else x


def _is_list_of_numbers(x: Any) -> bool:
    """Return whether `x` is a rectangular list of numbers, or of such lists; its first entry decides."""
    while isinstance(x, list) and x:
        x = x[0]
        if isinstance(x, int | float | complex | np.number | np.bool_):
            return True
    return False


def _as_source(source: Any, batch_size: int | None) -> Iterable[Any]:
    batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)
    if is_pair(source):
        X, y = map(_as_arrays, source)
        return _slices(X, y, batch_size)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise TypeError(
            f"`data` must yield batches, got the Dataset {type(source).__name__}, which holds single examples. Wrap it "
            "in a DataLoader: `torch.utils.data.DataLoader(dataset, batch_size=...)`."
        )
    if batch_size is not None:
        raise ValueError(
            f"`batch_size` must be None unless `data` is a pair of arrays (X, y), got `data` of type "
            f"{type(source).__name__}. Leave it out if the data are already in batches, and convert Python lists of "
            "numbers by `numpy.asarray`."
        )
    if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise TypeError(f"`data` must be iterable, got {type(source).__name__}. {_EXPECTED}")
    if isinstance(source, Iterator) and not _may_restart(source):
        raise TypeError(
            f"`data` must be re-iterable, got {type(source).__name__}: every product reads all data again, and a "
            "generator is empty after the first. Pass a list of batches or a DataLoader."
        )
    if _arrays.is_array(source) or isinstance(source, Mapping | str):
        raise TypeError(f"`data` must hold inputs and targets, got one {type(source).__name__}. {_EXPECTED}")
    return source  # type: ignore[no-any-return]


def _may_restart(iterator: Iterator[Any]) -> bool:
    """Return whether an object with ``__next__`` may begin anew in ``iter()``: its class has written that itself."""
    start = type(iterator).__iter__
    return isinstance(start, types.FunctionType) and start is not Iterator.__iter__


def is_pair(source: Any) -> bool:
    """Return whether the data are one pair (X, y), and not two batches."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        return False
    X, y = source
    if y is None or _arrays.is_array(y) or hasattr(type(y), "__array__"):
        return True
    if _is_list_of_numbers(y):
        return not isinstance(X, tuple | list)
    return (
        isinstance(y, Mapping | tuple | list)
        and bool(leaves(y))
        and (_arrays.is_array(_as_arrays(X)) or isinstance(X, Mapping))
    )


def _slices(X: Any, y: Any, batch_size: int | None) -> list[tuple[Any, Any]]:
    """Cut a pair of arrays into batches, which are views."""
    N = length_of_pair(X, y)
    step = batch_size or max(N, 1)
    cuts = [slice(start, min(start + step, N)) for start in range(0, N, step)]
    rows = [operator.itemgetter((cut, ...)) for cut in cuts]
    return [(map_arrays(own, X), map_arrays(own, y)) for own in rows]


def length_of_pair(X: Any, y: Any) -> int:
    """Return the number of examples in a pair of arrays."""
    X, y = map(_as_arrays, (X, y))
    inputs, targets = leaves(X), leaves(y)
    if not inputs:
        raise TypeError(f"the inputs X of a pair (X, y) must be arrays, got {type(X).__name__}. {_EXPECTED}")
    lengths = {a.shape[0] if len(a.shape) else -1 for a in [*inputs, *targets]}
    if len(lengths) > 1 or -1 in lengths:
        shapes = [str([tuple(a.shape) for a in arrays]) for arrays in (inputs, targets)]
        raise ValueError(
            f"the arrays X and y must have one row for each example, got shapes {' and '.join(shapes)}. Make them "
            "equally long."
        )
    (N,) = lengths
    return N


def _check_number(total: int, num_data: int | None) -> None:
    """Raise ValueError if there are no data, or not as many as the user said."""
    if total == 0:
        raise ValueError(f"`data` must have at least one batch, got none. {_EXPECTED}")
    if num_data is not None and total != num_data:
        raise ValueError(
            f"`num_data` must be the number of examples in `data`, {total}, got {num_data}. Leave it out, or correct "
            "it or the `batch_size_fn`."
        )


def _repeated(t: Tensor) -> int:
    """Return an integer that occurs twice."""
    values, counts = t.unique(return_counts=True)
    return int(values[counts > 1][0])


def _check_distinct(places: list[Tensor]) -> None:
    """Raise ValueError if a datum occurs in two batches: it would be drawn the same in both."""
    if not places or len(torch.cat(places)) == len(torch.cat(places).unique()):
        return
    batches: dict[int, int] = {}
    for number, own in enumerate(places):
        for place in own.tolist():
            if place in batches:
                raise ValueError(
                    f"the indices of all batches must be distinct, got {place} in batch {batches[place]} and in batch "
                    f"{number}. {INDEX}"
                )
            batches[place] = number


class _Fingerprint:
    """The fingerprint of one batch: its size and shapes, and its contents if they are to be verified."""

    def __init__(self, contents: Any, size: int, verify: bool) -> None:
        self._size = size
        self._fingerprints = [_fingerprint_of(t) for t in leaves(contents)] if verify else None

    def fits(self, contents: Any, size: int) -> bool:
        """Return whether contents have the size, and their arrays the shapes and dtypes, of the first pass."""
        fingerprints, tensors = self._fingerprints or [], leaves(contents)
        return (
            size == self._size
            and len(tensors) == len(fingerprints)
            and all((t.shape, t.dtype) == known[:2] for t, known in zip(tensors, fingerprints, strict=True))
        )

    def matches(self, contents: Any, size: int) -> bool:
        """Return whether contents are those of the first pass, as far as these are known."""
        if self._fingerprints is None:
            return size == self._size
        return self.fits(contents, size) and all(
            _unchanged_on_device(t, known) or _fingerprint_of(t)[:3] == known[:3]
            for t, known in zip(leaves(contents), self._fingerprints, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, and mean nothing elsewhere.
        fingerprints = (
            None if self._fingerprints is None else [(*known[:3], None, None) for known in self._fingerprints]
        )
        return {"_size": self._size, "_fingerprints": fingerprints}


def _fingerprint_of(t: Tensor) -> tuple[Any, ...]:
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
    return zlib.crc32(_bytes_of(t).data)


def _bytes_of(t: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of a tensor in the order of its elements."""
    if t.is_nested:
        t = torch.cat([part.flatten() for part in t.unbind()])
    elif t.layout is not torch.strided:
        t = t.to_dense()
    t = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    t = t.as_strided((t.numel(),), (1,))  # one element alone may have any stride
    return t.view(torch.uint8).numpy()


def _total_fingerprint(sums: list[int | None]) -> int | None:
    """Return the fingerprint of the examples of all batches; None if some have none."""
    return None if None in sums else sum(own for own in sums if own is not None) % 2**64


def _fingerprint_of_examples(contents: Any, size: int) -> int | None:
    """Return a fingerprint of the examples of a batch, which does not depend on their order.

    It is the sum over the examples of a hash of their rows. None if some array does not have one row per example.
    """
    tensors = leaves(contents)
    if any(t.is_nested or t.ndim == 0 or t.shape[0] != size for t in tensors):
        return None
    hashes = np.zeros(size, np.uint64)
    for t in tensors:
        rows = _bytes_of(t).reshape(size, -1)
        weights = _mixed(np.arange(1, -(-rows.shape[1] // 8) + 1, dtype=np.uint64)) | np.uint64(1)
        step = max(1, _HASH_BYTES // max(1, rows.shape[1]))
        for start in range(0, size, step):
            block = rows[start : start + step]
            words = np.pad(block, ((0, 0), (0, -block.shape[1] % 8))).view(np.uint64)
            own = hashes[start : start + step]
            # Mixed after each array, so that rows of one array cannot be exchanged without those of the others.
            own[:] = _mixed(own + (words * weights).sum(1, dtype=np.uint64) + np.uint64(1))
    return int(hashes.sum(dtype=np.uint64))


def _mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a bijective hash of 64-bit integers (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
