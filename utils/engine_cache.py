"""TensorRT engines kept in a folder: each plan has a card that says what it fits; no TensorRT here.

A plan is code: read only folders of engines that you trust.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.files import replace_file

FORMAT = 2  # raise it when the builder is configured in another way


@dataclass(frozen=True)
class Recipe:
    """Everything chosen about an engine; with the machine it decides which plan fits."""

    onnx: Path  # one float32 input [B, ...], one float32 output [B, C]
    precision: str  # that of the graph; `tf32` allows TF32 products in a float32 graph
    batch_sizes: tuple[int, ...]  # one optimisation profile each
    workspace_bytes: int = 4 << 30  # scratch memory that a layer may use at most
    optimization_level: int = 3  # 0 to 5: TensorRT's own default


def identify(recipe: Recipe, gpu: dict[str, str], version: str) -> dict[str, Any]:
    """All that decides whether a plan fits: it is in the plan's name and on its card.

    Raises:
        ValueError: the recipe's graph is not an ONNX file.
    """
    choices = asdict(recipe) | {"onnx": hash_graph(recipe.onnx), "format": FORMAT}
    choices["batch_sizes"] = list(recipe.batch_sizes)
    return choices | gpu | {"tensorrt": version}


def hash_graph(path: Path) -> str:
    """SHA-256 of an ONNX file and of the weights that it keeps in other files."""
    import onnx

    digest = hashlib.sha256(path.read_bytes())
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own, of several versions
        raise ValueError(f"{path} is no ONNX file, or not a whole one: {error}") from error
    entries = (entry for tensor in graph.initializer for entry in tensor.external_data)
    for name in sorted({entry.value for entry in entries if entry.key == "location"}):
        with (path.parent / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def plan_path(folder: Path, recipe: Recipe, identity: dict[str, Any]) -> Path:
    """Where a plan lies; its card has the same name with `.json`."""
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return folder / f"{recipe.onnx.stem}-{recipe.precision}-{key}.plan"


def timing_cache_path(folder: Path, identity: dict[str, Any]) -> Path:
    """Where the builder's timings lie, which hold for one TensorRT, one CUDA and one GPU."""
    gpu = "".join(c if c.isalnum() else "-" for c in identity["gpu"])
    return folder / f"timing-{identity['tensorrt']}-cuda{identity['cuda']}-{gpu}.cache"


def read_engine(path: Path, identity: dict[str, Any]) -> tuple[bytes, float] | None:
    """The plan and its build seconds, if its card fits and its bytes are those saved with it."""
    try:
        card = json.loads(path.with_suffix(".json").read_text())
        plan = path.read_bytes()
        fits = card["identity"] == identity
        whole = card["sha256"] == hashlib.sha256(plan).hexdigest()
        return (plan, float(card["build_seconds"])) if fits and whole else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_engine(path: Path, plan: bytes, identity: dict[str, Any], seconds: float) -> None:
    """Save a plan and its card; a folder that cannot be written to costs only the next build."""
    card = {
        "identity": identity,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "build_seconds": round(seconds, 2),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, plan)
        replace_file(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())
    except OSError as error:
        print(f"note: the engine is not kept ({error})")
