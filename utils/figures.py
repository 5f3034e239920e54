"""Figures as files: written to a temporary name, then renamed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def drawing(path: Path, columns: int = 1, sharey: bool = True) -> Iterator[Any]:
    """Yield matplotlib axes, an array of them if there are several columns; save at the end."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(max(7, 4 * columns), 4), layout="tight")
    yield figure.subplots(1, columns, sharey=sharey)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
