"""What a model costs: bytes of its weights, multiply-adds, and the share that is quantised."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, int]  # of a weight matrix: outputs, inputs


@dataclass(frozen=True)
class Cost:
    """Counts of one model for one input."""

    parameters: int
    multiply_adds: int  # of the whole model, attention products included
    linear_layers: Counter[Shape]  # how many of each weight shape
    layer_multiply_adds: dict[Shape, int]  # of one layer of that shape

    @property
    def gflop(self) -> float:
        """Billions of operations; a multiply-add is two."""
        return 2 * self.multiply_adds / 1e9


def state_bytes(module: nn.Module) -> int:
    """Bytes of the saved state dict."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def count_cost(module: nn.Module, example: Tensor) -> Cost:
    """Run the module once on `example` and count."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    layers: Counter[Shape] = Counter()
    multiply_adds: dict[Shape, int] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        shape = (layer.out_features, layer.in_features)
        layers[shape] += 1
        multiply_adds[shape] = inputs[0].numel() * layer.out_features

    hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, nn.Linear)]
    # The counter does not see into the CPU's fused attention; two plain products it counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(example)
    for hook in hooks:
        hook.remove()
    parameters = sum(p.numel() for p in module.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, layers, multiply_adds)


def quantized_share(cost: Cost, shapes: Sequence[Shape]) -> dict[str, float]:
    """Which share of layers, parameters and multiply-adds lies in quantised weight matrices.

    Args:
        shapes: of the weight matrices that a candidate holds in 8 bits.
    """
    found = Counter(shapes) & cost.linear_layers
    parameters = sum(outputs * inputs * n for (outputs, inputs), n in found.items())
    multiply_adds = sum(cost.layer_multiply_adds[shape] * n for shape, n in found.items())
    return {
        "quantized_layers": found.total(),
        "linear_layers": cost.linear_layers.total(),
        "quantized_parameters_percent": 100 * parameters / cost.parameters,
        "quantized_macs_percent": 100 * multiply_adds / cost.multiply_adds,
    }
