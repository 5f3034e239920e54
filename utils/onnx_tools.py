"""ONNX files: export, checks, sessions on CPU and GPU, and what in them is 8-bit."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ONNX_OPSET = 20  # LayerNormalization and Gelu stay single operators; attention stays products
EXTERNAL_DATA_BYTES = 1_800_000_000  # larger weights lie in a file beside: a graph ends at 2 GB


def export_onnx(module: nn.Module, example: Tensor, folder: Path) -> tuple[Path, float]:
    """Export with a dynamic batch axis, once per run; return the file and the seconds it took."""
    path = folder / "model.onnx"
    seconds = path.with_suffix(".seconds")
    if seconds.exists():
        return path, float(seconds.read_text())
    seconds.write_text(f"{write_onnx(module, example, path)}")
    return path, 0.0


class HalfPrecision(nn.Module):
    """A module, which it halves in place, that takes float32 images and gives float32 logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half()
        self.train(module.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images.half()).float()


def write_onnx(module: nn.Module, example: Tensor, path: Path) -> float:
    """Export images `[B, 3, S, S]` -> logits `[B, C]`, any B, to `path`; return the seconds.

    The same module gives the same bytes wherever it is exported: what the exporter notes about
    source files is dropped. The file appears whole or not at all.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
        program: Any = torch.onnx.export(
            module,
            (example[:1].expand(2, -1, -1, -1),),
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    ClearMetadataAndDocStringPass()(program.model)
    weights = program.model.graph.initializers.values()
    size = sum(weight.const_value.nbytes for weight in weights)
    with replacing_graph(path) as unfinished:
        program.save(unfinished, external_data=size > EXTERNAL_DATA_BYTES)
    return time.perf_counter() - start


def save_onnx(model: Any, path: Path) -> None:
    """Save an onnx.ModelProto, weights beside it where they are too large; whole or not at all."""
    import onnx

    external = sum(len(t.raw_data) for t in model.graph.initializer) > EXTERNAL_DATA_BYTES
    with replacing_graph(path) as unfinished:
        onnx.save_model(
            model, unfinished, save_as_external_data=external, location=f"{path.name}.data"
        )


@contextlib.contextmanager
def replacing_graph(path: Path) -> Iterator[Path]:
    """A name to write a graph to, and its data beside; at the end they move to `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        for file in sorted(unfinished.parent.iterdir(), key=lambda file: file == unfinished):
            file.replace(path.parent / file.name)


def check_onnx(path: Path) -> dict[str, Any]:
    """Run ONNX's checker and its strict shape inference; say what the file holds.

    Raises:
        Exception: what the checker found, or that the batch axis is not dynamic.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=True)  # by path: also above 2 GB
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ValueError(f"{path.name}: the batch axis of {value.name} is not dynamic")
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return {
        "onnx_opset": opset,
        "nodes": len(model.graph.node),
        "size_mb": onnx_bytes(path) / 1e6,
    }


def onnx_bytes(path: Path) -> int:
    """Size of an ONNX file, with its external data."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def onnx_session_options(threads: int) -> Any:
    """Options of a session on the CPU; its threads spin within a call and sleep between calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def onnx_session(path: Path, threads: int, optimize: bool = True) -> Callable[[Tensor], Any]:
    """Run an ONNX file on the CPU.

    Args:
        optimize: False runs the operators as they are written, which is what a check wants: fused
            8-bit kernels differ between versions and CPUs, and some do not load fp8 graphs.
    """
    import onnxruntime

    options = onnx_session_options(threads)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x.numpy()})[0]


def onnx_cuda_session(path: Path) -> Callable[[Tensor], Tensor]:
    """Run an ONNX file on PyTorch's current CUDA stream; images and logits stay on the device.

    Raises:
        ImportError: ONNX Runtime has no CUDA provider, or fell back to the CPU, which it does
            silently when it does not find CUDA's libraries.
    """
    import onnxruntime

    wanted = "CUDAExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise ImportError("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
    stream = torch.cuda.current_stream().cuda_stream
    settings = {"use_tf32": "0", "user_compute_stream": str(stream)}
    session = onnxruntime.InferenceSession(path, providers=[(wanted, settings)])
    if wanted not in session.get_providers():
        raise ImportError("ONNX Runtime fell back to the CPU: it found no usable CUDA libraries")
    unsynchronized = onnxruntime.RunOptions()
    unsynchronized.add_run_config_entry("disable_synchronize_execution_providers", "1")
    binding = session.io_binding()
    logits = torch.empty(0)

    def call(x: Tensor) -> Tensor:
        nonlocal logits
        if len(logits) != len(x):
            logits = torch.empty(len(x), session.get_outputs()[0].shape[1], device=x.device)
            shape = tuple(logits.shape)
            binding.bind_output("logits", "cuda", 0, np.float32, shape, logits.data_ptr())
        binding.bind_input("images", "cuda", 0, np.float32, tuple(x.shape), x.data_ptr())
        session.run_with_iobinding(binding, unsynchronized)
        return logits

    return call


def onnx_int8_shapes(path: Path) -> list[tuple[int, int]]:
    """Shapes of the 8-bit weight matrices in an ONNX file."""
    import onnx

    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    weights = onnx.load(path).graph.initializer
    return [(w.dims[1], w.dims[0]) for w in weights if w.data_type in kinds and len(w.dims) == 2]
