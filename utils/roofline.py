"""What a device can do at most, measured: matrix products in each precision, and copies.

Between them they bound a model from below (Williams et al. 2009, "Roofline"): a call takes at least
its arithmetic over the first and, if its weights come from memory, its bytes over the second. Small
weights can stay in the cache from one call to the next.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import timing

CEILING_COLUMNS = ("device", "ceiling", "size", "tflops", "gb_per_s", "calls")
PRODUCTS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
CALLS = 30


def measure_ceilings(device: str, size: int = 8192) -> list[dict[str, Any]]:
    """Time square matrix products and a copy, on random numbers; one row of CEILING_COLUMNS each.

    It changes the process's TF32 setting: call it in a process of its own. Products of `size`
    rows; the copy moves `size * size` float32, read and written.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows = []
    for precision, dtype in PRODUCTS.items():
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = median_seconds(functools.partial(torch.matmul, other=b), a, device)
        rows.append({"ceiling": precision, "tflops": 2 * size**3 / seconds / 1e12})
    source = torch.randn(size, size, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(target.copy_, source, device)
    rows.append({"ceiling": "copy", "gb_per_s": 2 * source.nbytes / seconds / 1e9})
    return [{"device": name, "size": size, "calls": CALLS} | row for row in rows]


def median_seconds(call: Callable[[Tensor], Tensor], x: Tensor, device: str) -> float:
    """Median over CALLS calls, after as many to warm up."""
    blocks = [timing.time_block(call, [x], CALLS, device) for _ in range(2)]
    return float(np.median(blocks[-1].latencies_ms)) / 1e3
