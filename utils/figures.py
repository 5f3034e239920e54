"""Figures as files that are whole or absent."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.files import replace_file


@contextlib.contextmanager
def drawing(path: Path, columns: int = 1, sharey: bool = True) -> Iterator[Any]:
    """Yield matplotlib axes, an array of them if there are several columns; save at the end."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(max(7, 4 * columns), 4), layout="tight")
    yield figure.subplots(1, columns, sharey=sharey)
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    replace_file(path, image.getvalue())
