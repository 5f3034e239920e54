"""What a model costs: bytes of its weights, multiply-adds, and the share that is quantised."""

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def state_bytes(module: nn.Module) -> int:
    """Bytes of the saved state dict."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def count_layers(module: nn.Module, example: Tensor) -> tuple[Counter[tuple[int, int]], dict, int]:
    """Linear layers by weight shape, multiply-adds of one such layer, and those of the model."""
    from torch.utils.flop_counter import FlopCounterMode

    linear: Counter[tuple[int, int]] = Counter()
    macs: dict[tuple[int, int], int] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        shape = (layer.out_features, layer.in_features)
        linear[shape] += 1
        macs[shape] = inputs[0].numel() * layer.out_features

    hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, nn.Linear)]
    with FlopCounterMode(display=False) as counter:
        module(example)
    for hook in hooks:
        hook.remove()
    return linear, macs, counter.get_total_flops() // 2


def quantized_share(
    module: nn.Module, example: Tensor, shapes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Which share of layers, parameters and multiply-adds lies in quantised weight matrices."""
    linear, macs, total_macs = count_layers(module, example)
    found = Counter(shapes) & linear
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "quantized_layers": found.total(),
        "linear_layers": linear.total(),
        "quantized_parameters_percent": 100
        * sum(out * into * n for (out, into), n in found.items())
        / parameters,
        "quantized_macs_percent": 100 * sum(macs[s] * n for s, n in found.items()) / total_macs,
    }
