"""How loops are compiled: by numba, to run without the GIL, so that frames are coded side by side in a thread pool.

Compiling takes many seconds and holds the GIL: whoever codes beside an engine codes a block of its shape before that starts.
They use no threads of numba's own, which may not be started from several threads at once. numba comes with vLLM; what needs
it is imported only where a lossy codec is asked for.
"""

from typing import Any

import numba


def compiled(function: Any) -> Any:
    """Compile on first use and keep the result on disk, where there is a directory for that.

    Divisions are those of numpy: they raise nothing and need no checks.
    """
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:  # no directory can be written to
        return numba.njit(function, nogil=True, error_model="numpy")
