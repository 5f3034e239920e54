"""The ONNX graphs of a model: one for each precision, exported, and checked against PyTorch."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import cli, data, evaluation
from utils.benchmark import Job, prepare_process
from utils.isolation import UnavailableError, Worker, recorded
from utils.models import LoadedModel
from utils.onnx_quantization import NothingToQuantizeError, quantize_graph
from utils.onnx_tools import HalfPrecision, check_onnx, onnx_session, write_onnx

GRAPHS = {  # exported graph: (precision, what is quantised in it); the rest of it is fp16
    "fp32": ("fp32", ()),
    "fp16": ("fp16", ()),
    "int8": ("int8", ("linear",)),
    "int8-attention": ("int8", ("linear", "attention")),
    "int8-residual": ("int8", ("linear", "residual")),
    "fp8": ("fp8", ("linear",)),
    "fp8-attention": ("fp8", ("linear", "attention")),
}
# The least mean cosine of the (centred) logits with those of PyTorch in float32 on the CPU. Below
# it an 8-bit engine is broken; above it the accuracy column speaks.
GATES = {"fp32": 0.9999, "tf32": 0.9995, "fp16": 0.999, "int8": 0.90, "fp8": 0.90}
CHECKED_BATCHES = (1, 3)  # at which a graph is checked; it is exported with a batch of 2
CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 16  # training images that set the 8-bit ranges

PARITY_COLUMNS = ("parity_cosine", "parity_max_difference", "parity_images")
GRAPH_FILE_COLUMNS = (
    *("model", "graph", "precision", "file", "status", "reason", "onnx_opset", "nodes", "size_mb"),
    *("export_seconds", *PARITY_COLUMNS, "checked_batch_sizes"),
    *("quantized_weights", "quantized_activations", "calibration_images"),
)


class ParityError(Exception):
    """Logits too far from PyTorch's."""


def compare_logits(logits: Tensor, reference: Tensor) -> dict[str, Any]:
    """PARITY_COLUMNS of logits `[N, C]`."""
    return {
        "parity_cosine": evaluation.centred_cosine(logits, reference),
        "parity_max_difference": (logits - reference).abs().max().item(),
        "parity_images": len(logits),
    }


def require_parity(row: dict[str, Any], precision: str, untrained: bool = False) -> None:
    """ParityError if the row's cosine is below the precision's gate, or is not a number.

    Args:
        untrained: of 8 bits only a number is asked: random weights tell nothing of what they cost.
    """
    cosine, gate = row["parity_cosine"], GATES[precision]
    if untrained and precision in ("int8", "fp8"):
        gate = -1.0
    if not cosine >= gate:
        raise ParityError(f"cosine {cosine:.5f} with PyTorch's logits, at least {gate} wanted")


def load_calibration(
    load: Callable[..., data.ImageSet], scored: data.ImageSet, seed: int
) -> np.ndarray | None:
    """Training images uint8 `[N, 3, H, W]`, none of them scored; None if there are none."""
    try:
        train = load(split="train", num_images=CALIBRATION_IMAGES, seed=seed, fewer=True)
    except cli.UserError as error:
        print(f"note: no images to calibrate int8 and fp8 on ({error})")
        return None
    seen = {hash(image.tobytes()) for image in scored.images.numpy()}  # CIFAR-100 repeats ten
    images = train.images.numpy()
    images = images[[hash(image.tobytes()) not in seen for image in images]]
    if not len(images):
        print("note: no images to calibrate int8 and fp8 on (all that were drawn are scored too)")
        return None
    return images


def graph_path(folder: Path | str, model: str, graph: str) -> Path:
    """Where a model's graph lies."""
    stem = model.removesuffix(".safetensors").replace("/", "-").strip("-.")
    return Path(folder) / f"{stem}-{graph}.onnx"


def export_graphs(
    names: Sequence[str], job: Job, calibration: np.ndarray | None, images: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Make each graph in a process of its own; a row of GRAPH_FILE_COLUMNS for each.

    Args:
        names: of GRAPHS, in its order: the quantised ones start from fp16.
        job: the model, and the folder for the graphs.
        calibration, images: uint8 `[N, 3, H, W]`, training images and labelled ones.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        path = graph_path(job.folder, job.model, name)
        for file in (path, path.with_name(f"{path.name}.data")):
            file.unlink(missing_ok=True)  # a failed export must not leave an older graph
        precision, parts = GRAPHS[name]
        row = rows[name] = {"model": job.model, "graph": name, "precision": precision}
        row |= {"file": str(path), "status": "ok"}
        with recorded(row), Worker() as worker:
            if parts and rows["fp16"]["status"] != "ok":
                raise UnavailableError("it starts from the fp16 graph, which there is not")
            row["checked_batch_sizes"] = " ".join(map(str, CHECKED_BATCHES))
            row |= worker.run(make_graph, name, job, calibration, images)
            require_parity(row, precision, job.untrained)
        print(f"  {name:20}{row.get('reason') or format(row['parity_cosine'], '.5f')}", flush=True)
    return rows


def make_graph(
    name: str, job: Job, calibration: np.ndarray | None, images: np.ndarray
) -> dict[str, Any]:
    """In a worker: write one of GRAPHS, check it, compare it with PyTorch."""
    prepare_process(job)
    model = job.load(job.model, job.untrained)
    how, path = model.preprocessing, graph_path(job.folder, job.model, name)
    reference = evaluation.predict(model.module, torch.from_numpy(images), how, len(images))
    start = time.perf_counter()
    row = write_graph(name, model, job, calibration)
    row |= {"export_seconds": time.perf_counter() - start, **check_onnx(path)}
    call = onnx_session(path, job.threads, optimize=False)
    logits = [
        evaluation.predict(call, torch.from_numpy(images), how, size) for size in CHECKED_BATCHES
    ]
    compared = compare_logits(torch.cat(logits), torch.cat([reference] * len(logits)))
    return row | compared | {"parity_images": len(images)}  # each once at every batch size


def write_graph(
    name: str, model: LoadedModel, job: Job, calibration: np.ndarray | None
) -> dict[str, Any]:
    """Write one of GRAPHS; the columns that tell how it was quantised."""
    precision, parts = GRAPHS[name]
    how, path = model.preprocessing, graph_path(job.folder, job.model, name)
    if not parts:
        module = HalfPrecision(model.module) if precision == "fp16" else model.module
        write_onnx(module, torch.zeros(1, 3, how.input_size, how.input_size), path)
        return {}
    if calibration is None:
        raise UnavailableError("there are no training images to calibrate on")
    source = graph_path(job.folder, job.model, "fp16")
    inputs = data.preprocess(torch.from_numpy(calibration), how).numpy()
    try:
        counts = quantize_graph(
            source, path, precision, parts, inputs, CALIBRATION_BATCH, job.threads
        )
    except NothingToQuantizeError as error:
        raise UnavailableError(str(error)) from error
    return {**counts, "calibration_images": len(inputs)}
