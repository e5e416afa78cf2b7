"""Torch's global random numbers: fixed inside, untouched outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_randomness(device: torch.device, seed: int) -> Iterator[list[torch.Generator]]:
    """Fix torch's global random numbers inside, and leave their state untouched outside; yields their generators."""
    # Only the generators used here: torch.manual_seed would also seed those of other devices, and not restore them.
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
