"""ONNX files: export, the CPU session, and what in them is 8-bit."""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ONNX_OPSET = 20  # LayerNormalization and Gelu stay single operators


def export_onnx(module: nn.Module, example: Tensor, folder: Path) -> tuple[Path, float]:
    """Export with a dynamic batch axis, once per run; return the file and the seconds it took."""
    path = folder / "model.onnx"
    if path.exists():
        return path, float(path.with_suffix(".seconds").read_text())
    unfinished = path.with_suffix(".tmp")
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
        torch.onnx.export(
            module,
            (example[:1].expand(2, -1, -1, -1),),
            unfinished,
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
        )
    seconds = time.perf_counter() - start
    path.with_suffix(".seconds").write_text(f"{seconds}")
    unfinished.replace(path)
    return path, 0.0


def onnx_session(path: Path, threads: int) -> Callable[[Tensor], Any]:
    """Run an ONNX file on the CPU; its threads spin within a call and sleep between calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x.numpy()})[0]


def onnx_int8_shapes(path: Path) -> list[tuple[int, int]]:
    """Shapes of the 8-bit weight matrices in an ONNX file."""
    import onnx

    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    weights = onnx.load(path).graph.initializer
    return [(w.dims[1], w.dims[0]) for w in weights if w.data_type in kinds and len(w.dims) == 2]
