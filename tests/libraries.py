"""Array libraries as the tests see them: how to make an array, and how to read it as NumPy."""

from dataclasses import dataclass
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import torch


@dataclass(frozen=True)
class Library:
    name: str
    array_type: type
    make: Any
    """NumPy array → array of this library, on its default device."""
    read: Any
    """Array of this library → NumPy."""
    pointer: Any
    """Array of this library → address of its numbers."""
    writable: bool = True
    left_product: bool = True
    """Whether `x @ op` reaches the operator."""

    def __str__(self):
        return self.name


NUMPY = Library("numpy", np.ndarray, np.array, np.asarray, lambda x: x.__array_interface__["data"][0])
TORCH = Library("torch", torch.Tensor, torch.tensor, lambda x: x.numpy(), lambda x: x.data_ptr())
STRICT = Library(
    "array-api-strict",
    type(array_api_strict.ones(1)),
    array_api_strict.asarray,
    lambda x: np.asarray(x._array),
    lambda x: x._array.__array_interface__["data"][0],
    left_product=False,
)
JAX = Library("jax", jax.Array, jnp.asarray, np.asarray, lambda x: x.unsafe_buffer_pointer(), writable=False)
LIBRARIES = [NUMPY, TORCH, STRICT, JAX]
