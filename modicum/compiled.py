"""How loops that neither torch nor numpy has are compiled: by numba, at their first call on a machine, and kept for the next process."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, *, reordered: bool = False) -> Function:
    """Without Python's lock, so that threads share the work. Kept in __pycache__ beside the source, or where NUMBA_CACHE_DIR says.

    Sums stand as they are written: of a loop from one array to another there are two codes, and where the arrays lie in memory chooses. A
    compiled function calls those of its own file alone, since numba looks at no other to see whether what it has kept is stale.
    """
    fastmath = {"contract", "nsz", "arcp"} | ({"reassoc"} if reordered else set())
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that may be written
        return njit(**options)(function)


def compiled_sum(function: Function) -> Function:
    """The same for a sum over one array, which is reordered alike for every image, and several times as fast."""
    return compiled(function, reordered=True)
