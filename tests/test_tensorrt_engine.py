"""The engine's cache, builder and runner, against stand-ins; the runner also on a real GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests import tensorrt_standin as standin
from tests.test_onnx_tools import digit_inputs, small_cnn
from utils import engine_cache
from utils import tensorrt_engine as trt_engine
from utils.engine_cache import Recipe
from utils.onnx_tools import onnx_session, write_onnx
from utils.tensorrt_engine import EngineError, MissingError, UnsupportedError, open_runner

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("pycuda") is not None


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "cnn.onnx"
    write_onnx(small_cnn(), torch.zeros(1, 3, 32, 32), path)
    return path


@pytest.fixture(params=["10.13.2", "11.1.0"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> standin.Gpu:
    return standin.install(monkeypatch, request.param)


@pytest.fixture
def recipe(graph: Path) -> Recipe:
    return Recipe(graph, "fp32", (1, 4))


def images(count: int) -> np.ndarray:
    return digit_inputs(count).numpy()


# --- running --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_runner_gives_the_logits_and_frees_everything(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path, cuda_graph: bool
):
    expected = onnx_session(recipe.onnx, 1, optimize=False)(digit_inputs(4))
    with open_runner(recipe, tmp_path, 4, cuda_graph) as runner:
        assert runner.input_shape == (4, 3, 32, 32)
        assert runner.output_shape == (4, 10)
        assert runner.uses_graph is cuda_graph
        allocated, launched = gpu.allocations, gpu.graph_launches
        for _ in range(3):
            np.testing.assert_array_equal(runner.infer(images(4)), expected)
        other = runner.infer(images(8)[4:])
        assert not np.allclose(other, expected)
        assert gpu.allocations == allocated  # nothing is allocated once it runs
        assert gpu.graph_launches - launched == (4 if cuda_graph else 0)
        assert len(gpu.live) == 4
    assert gpu.live == {}
    assert gpu.current == []


def test_runner_takes_images_from_the_device_and_shows_its_logits(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path
):
    expected = onnx_session(recipe.onnx, 1, optimize=False)(digit_inputs(4))
    x = images(4)
    with open_runner(recipe, tmp_path, 4) as runner:
        runner.copy_from_device(x.ctypes.data, x.nbytes)  # its device memory is the host's
        runner.execute()
        interface = runner.device_logits.__cuda_array_interface__
        logits = standin.as_array(interface["data"][0], interface["shape"])
        np.testing.assert_array_equal(logits, expected)
        assert interface["typestr"] == "<f4"


def test_runner_refuses_other_shapes_and_types(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    with open_runner(recipe, tmp_path, 4) as runner:
        for wrong in (images(3), images(4).astype(np.float16), images(4)[:, :2]):
            with pytest.raises(ValueError, match="expected float32"):
                runner.upload(wrong)
        with pytest.raises(ValueError, match="contiguous"):
            runner.upload(images(4).transpose(0, 1, 3, 2))
        x = images(3)
        with pytest.raises(ValueError, match="36864 bytes of images: expected 49152"):
            runner.copy_from_device(x.ctypes.data, x.nbytes)


def test_batch_outside_the_profiles(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    with (
        pytest.raises(EngineError, match=r"batch size 2 .*\(1, 1\), \(4, 4\)"),
        open_runner(recipe, tmp_path, 2),
    ):
        pass
    assert gpu.live == {}
    assert gpu.current == []


def test_capture_that_fails_falls_back_to_plain_enqueues(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path
):
    gpu.faults.add("capture")
    with open_runner(recipe, tmp_path, 4) as runner:
        assert runner.uses_graph is False
        assert runner.no_graph == "operation not permitted when stream is capturing"
        assert gpu.captures == {}  # the capture was ended
        expected = onnx_session(recipe.onnx, 1, optimize=False)(digit_inputs(4))
        np.testing.assert_array_equal(runner.infer(images(4)), expected)


def test_without_cuda_bindings_it_runs_by_plain_enqueues(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr("cuda.bindings.driver")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with open_runner(recipe, tmp_path, 4) as runner:
        assert runner.uses_graph is False
        assert "cuda-bindings is not usable" in runner.no_graph
        expected = onnx_session(recipe.onnx, 1, optimize=False)(digit_inputs(4))
        np.testing.assert_array_equal(runner.infer(images(4)), expected)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("device", MissingError, "no usable GPU"),
        ("driver", MissingError, "driver may be older"),
        ("memory", MemoryError, "cannot build cnn.onnx; .*OutOfMemory"),
        ("kernel", UnsupportedError, "cannot build cnn.onnx; .*Could not find any implementation"),
        ("context", MemoryError, "execution context"),
        ("enqueue", EngineError, "cannot run the engine; enqueue failed"),
        ("crash", EngineError, "cannot run the engine; enqueue failed"),
    ],
)
def test_faults_come_back_with_their_reason_and_leave_nothing(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path, fault: str, error: type, text: str
):
    gpu.faults.add(fault)
    with pytest.raises(error, match=text), open_runner(recipe, tmp_path, 4):
        pass
    assert gpu.live == {}
    assert gpu.current == []


@pytest.mark.parametrize("text", ["Error Code 2: OutOfMemory (no details)", "CUDA: Out of memory"])
def test_too_little_memory_in_either_spelling(gpu: standin.Gpu, text: str):
    trt_engine.shared_logger().log(standin.Severity.ERROR, text)
    assert isinstance(trt_engine.refusal("TensorRT cannot build it"), MemoryError)
    assert type(trt_engine.refusal("TensorRT cannot run it")) is EngineError  # all is told once


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ({"tactic", "enqueue"}, "TensorRT cannot run the engine; enqueue failed"),
        ({"tactic", "capture"}, "operation not permitted when stream is capturing"),
    ],
)
def test_errors_that_a_build_overcame_do_not_explain_a_later_one(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path, faults: set[str], text: str
):
    gpu.faults |= faults
    try:
        with open_runner(recipe, tmp_path, 4) as runner:
            found = runner.no_graph
    except EngineError as error:
        found = str(error)
    assert found == text
    assert trt_engine.take_errors() == ""


def test_closing_twice_is_closing_once(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    with open_runner(recipe, tmp_path, 4) as runner:
        runner.close()
        assert gpu.live == {}


def test_too_little_memory_for_the_buffers(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    gpu.memory_bytes = 1000
    with (
        pytest.raises(MemoryError, match="not enough GPU memory"),
        open_runner(recipe, tmp_path, 4),
    ):
        pass
    assert gpu.live == {}


def test_nan_weight_gives_nan_logits(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    model = onnx.load(recipe.onnx)
    weight = next(t for t in model.graph.initializer if t.name.endswith("weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "nan.onnx")
    broken = Recipe(tmp_path / "nan.onnx", "fp32", (4,))
    with open_runner(broken, tmp_path, 4) as runner:
        assert np.isnan(runner.infer(images(4))).any()


def test_engine_with_other_inputs_is_refused(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    model = onnx.load(recipe.onnx)
    model.graph.output.extend([v for v in model.graph.value_info if v.name == "relu"][:1])
    assert len(model.graph.output) == 2
    onnx.save(model, tmp_path / "two.onnx")
    with (
        pytest.raises(EngineError, match="expected one float32 input and output"),
        open_runner(Recipe(tmp_path / "two.onnx", "fp32", (4,)), tmp_path, 4),
    ):
        pass


# --- building -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("int8", False)])
def test_only_tf32_engines_may_use_tf32(
    gpu: standin.Gpu, graph: Path, tmp_path: Path, precision: str, tf32: bool
):
    with open_runner(Recipe(graph, precision, (1,), workspace_bytes=1 << 20), tmp_path, 1):
        assert gpu.flags == {"tf32": tf32, "limits": {"WORKSPACE": 1 << 20}}


def test_one_profile_for_each_batch_size(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    with open_runner(recipe, tmp_path, 1):
        (plan,) = tmp_path.glob("*.plan")
    shapes = [profile["images"] for profile in standin.read_plan(plan)["profiles"]]
    assert shapes == [[[b, 3, 32, 32]] * 3 for b in (1, 4)]


def test_every_parser_error_is_printed(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = onnx.load(recipe.onnx)
    for node in [n for n in model.graph.node if n.op_type == "Conv"][:2]:
        node.domain, node.op_type = "my.domain", "Fancy"
    onnx.save(model, tmp_path / "odd.onnx")
    with (
        pytest.raises(UnsupportedError, match=r"cannot parse odd.onnx, 2 errors: .*Fancy"),
        open_runner(Recipe(tmp_path / "odd.onnx", "fp32", (1,)), tmp_path, 1),
    ):
        pass
    assert capsys.readouterr().err.count("no importer for Fancy") == 2
    assert list(tmp_path.glob("*.plan")) == []


def test_truncated_onnx_file(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(recipe.onnx.read_bytes()[:5000])
    with (
        pytest.raises(ValueError, match=r"broken.onnx is no ONNX file"),
        open_runner(Recipe(broken, "fp32", (1,)), tmp_path, 1),
    ):
        pass


def test_parser_errors_come_from_the_parser(gpu: standin.Gpu, tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"\x08nonsense")
    with pytest.raises(EngineError, match=r"cannot parse broken.onnx, 1 errors") as caught:
        trt_engine.build_plan(Recipe(tmp_path / "broken.onnx", "fp32", (1,)), tmp_path / "cache")
    assert not isinstance(caught.value, UnsupportedError)


def test_timing_cache_is_kept_and_a_foreign_one_replaced(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path
):
    cache = tmp_path / "timing"
    cache.write_bytes(b"Another GPU")
    trt_engine.build_plan(recipe, cache)
    assert cache.read_bytes() == gpu.name.encode()


# --- the cache of engines -------------------------------------------------------------------------


def open_once(recipe: Recipe, folder: Path) -> bool:
    """Whether the engine came from the folder."""
    with open_runner(recipe, folder, 4) as runner:
        assert np.isfinite(runner.infer(images(4))).all()
        return runner.opened.cached


def test_engine_is_built_once_and_its_card_says_how_long_it_took(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path
):
    assert open_once(recipe, tmp_path) is False
    assert open_once(recipe, tmp_path) is True
    assert gpu.builds == 1
    (plan,) = tmp_path.glob("*.plan")
    card = json.loads(plan.with_suffix(".json").read_text())
    assert card["identity"]["gpu"] == gpu.name
    assert card["identity"]["compute_capability"] == "9.0"
    assert card["identity"]["batch_sizes"] == [1, 4]
    with open_runner(recipe, tmp_path, 4) as runner:
        assert runner.opened.build_seconds == card["build_seconds"]
        assert runner.opened.size_bytes == plan.stat().st_size
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_engine_made_ahead_is_only_opened(gpu: standin.Gpu, recipe: Recipe, tmp_path: Path):
    seconds, cached = trt_engine.make_engine(recipe, tmp_path)
    assert seconds > 0
    assert cached is False
    assert gpu.current == []
    assert open_once(recipe, tmp_path) is True
    assert trt_engine.make_engine(recipe, tmp_path) == (pytest.approx(seconds, abs=0.01), True)
    assert gpu.builds == 1


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "tf32"},
        {"batch_sizes": (4,)},
        {"workspace_bytes": 1 << 20},
        {"optimization_level": 5},
    ],
)
def test_another_recipe_is_another_engine(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path, change: dict[str, Any]
):
    assert open_once(recipe, tmp_path) is False
    assert open_once(replace(recipe, **change), tmp_path) is False
    assert open_once(recipe, tmp_path) is True


def test_another_graph_version_or_gpu_is_another_engine(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    standin.install(monkeypatch, "10.13.2")
    assert open_once(recipe, tmp_path) is False
    standin.install(monkeypatch, "11.1.0")
    assert open_once(recipe, tmp_path) is False
    standin.install(monkeypatch, "11.1.0", standin.Gpu("Other GPU"))
    assert open_once(recipe, tmp_path) is False
    standin.install(monkeypatch, "11.1.0", standin.Gpu(capability=(8, 9)))
    assert open_once(recipe, tmp_path) is False
    older = standin.Gpu()
    older.cuda = 12_040
    standin.install(monkeypatch, "11.1.0", older)
    assert open_once(recipe, tmp_path) is False
    assert {path.name for path in tmp_path.glob("timing-11.1.0-cuda12-*")} == {
        "timing-11.1.0-cuda12-Stand-in-GPU.cache"
    }
    monkeypatch.setattr(engine_cache, "FORMAT", engine_cache.FORMAT + 1)
    assert open_once(recipe, tmp_path) is False
    monkeypatch.setattr(engine_cache, "FORMAT", engine_cache.FORMAT - 1)
    changed = tmp_path / recipe.onnx.name
    changed.write_bytes(recipe.onnx.read_bytes() + b"\x12\x00")  # an empty producer name
    assert open_once(replace(recipe, onnx=changed), tmp_path) is False
    standin.install(monkeypatch, "10.13.2")
    assert open_once(recipe, tmp_path) is True


def test_external_weights_are_part_of_the_key(recipe: Recipe, tmp_path: Path):
    path = tmp_path / "external.onnx"
    onnx.save(
        onnx.load(recipe.onnx), path, save_as_external_data=True, location="w", size_threshold=0
    )
    before = engine_cache.hash_graph(path)
    content = bytearray((tmp_path / "w").read_bytes())
    content[0] ^= 1
    (tmp_path / "w").write_bytes(content)
    assert engine_cache.hash_graph(path) != before


def test_damaged_or_foreign_engines_are_rebuilt_and_never_run(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path
):
    assert open_once(recipe, tmp_path) is False
    (plan,) = tmp_path.glob("*.plan")
    good, card = plan.read_bytes(), plan.with_suffix(".json")
    flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    for damaged in (b"", good[: len(good) // 2], flipped, b"another program's file"):
        plan.write_bytes(damaged)
        assert open_once(recipe, tmp_path) is False
        assert plan.read_bytes() == good
    for damaged_card in ("", "{", "[]", '{"identity": {}}', card.read_text().replace("9.0", "8.0")):
        card.write_text(damaged_card)
        assert open_once(recipe, tmp_path) is False
    assert open_once(recipe, tmp_path) is True


def test_engine_that_does_not_load_is_rebuilt_once(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path
):
    assert open_once(recipe, tmp_path) is False
    (plan,) = tmp_path.glob("*.plan")
    identity = json.loads(plan.with_suffix(".json").read_text())["identity"]
    engine_cache.write_engine(plan, b"accepted by the card, refused by TensorRT", identity, 1.0)
    assert open_once(recipe, tmp_path) is False
    assert open_once(recipe, tmp_path) is True
    assert gpu.builds == 2
    assert trt_engine.take_errors() == ""


def test_engine_folder_that_cannot_be_written_costs_only_the_next_build(
    gpu: standin.Gpu, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "a file"
    folder.touch()
    assert open_once(recipe, folder) is False
    assert open_once(recipe, folder) is False
    assert "note: the engine is not kept" in capsys.readouterr().out


# --- what is missing ------------------------------------------------------------------------------


def test_missing_libraries_have_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingError, match="TensorRT is not installed"):
        trt_engine.require_libraries()
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(MissingError, match="empty stub"):
        trt_engine.require_libraries()
    standin.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(MissingError, match="pycuda is not usable"):
        trt_engine.require_libraries()


def test_module_needs_no_pytorch():
    code = "import sys, utils.tensorrt_engine; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "False", done.stderr


# --- on a real GPU, with a copy in TensorRT's place -----------------------------------------------


class CopyEngine:
    """An engine whose only work is a copy on the device: logits are the first floats."""

    num_io_tensors, num_optimization_profiles = 2, 1
    shapes = types.MappingProxyType({"images": (8, 3, 32, 32), "logits": (8, 10)})

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "images" else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> int:
        return onnx.TensorProto.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [self.shapes[name]] * 3

    def create_execution_context(self) -> "CopyEngine":
        return self

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        return tuple(shape) == self.shapes[name]

    def infer_shapes(self) -> list[str]:
        return []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        from cuda.bindings import driver

        source, target = self.addresses["images"], self.addresses["logits"]
        (error,) = driver.cuMemcpyDtoDAsync(target, source, 8 * 10 * 4, driver.CUstream(stream))
        return int(error) == 0


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU and pycuda")
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_runner_on_a_gpu_shares_it_with_pytorch(monkeypatch: pytest.MonkeyPatch, cuda_graph: bool):
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_tensorrt("11.1.0"))
    opened = trt_engine.Opened(CopyEngine(), 0, 0.0, cached=False)
    x = torch.rand(4, 8, 3, 32, 32)
    on_device = x.cuda()
    with (
        trt_engine.primary_context() as device,
        trt_engine.Runner(opened, 8, cuda_graph) as runner,
    ):
        assert trt_engine.describe_gpu(device)["gpu"] == torch.cuda.get_device_name()
        assert runner.uses_graph is cuda_graph
        logits = torch.as_tensor(runner.device_logits, device="cuda")
        assert logits.shape == (8, 10)
        stream = torch.cuda.ExternalStream(runner.stream_handle)
        for i in range(4):
            first = x[i].flatten()[:80].view(8, 10)
            np.testing.assert_array_equal(runner.infer(x[i].numpy()), first)  # host to host
            with torch.cuda.stream(stream):  # device to device, timed by PyTorch's events
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                source = on_device[3 - i]
                runner.copy_from_device(source.data_ptr(), source.nbytes)
                runner.execute()
                end.record()
                seen = logits.clone()
            end.synchronize()
            assert 0 < start.elapsed_time(end) < 1000
            torch.testing.assert_close(
                seen.cpu(), x[3 - i].flatten()[:80].view(8, 10), rtol=0, atol=0
            )
            pinned = x[i].pin_memory()
            runner.upload(pinned.numpy())
            runner.execute()
            downloaded = runner.download()
            stream.synchronize()
            np.testing.assert_array_equal(downloaded, first)
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        for _ in range(200):
            runner.execute()
        torch.cuda.synchronize()
        assert torch.cuda.mem_get_info()[0] == free  # nothing was allocated
        del logits
    assert float(torch.ones(3, device="cuda").sum()) == 3  # PyTorch's context is still alive


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU and pycuda")
def test_runner_on_a_gpu_reports_too_little_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_tensorrt("11.1.0"))
    monkeypatch.setattr(trt_engine.Runner, "_allocate", allocate_too_much)
    opened = trt_engine.Opened(CopyEngine(), 0, 0.0, cached=False)
    with (
        trt_engine.primary_context(),
        pytest.raises(MemoryError, match="not enough GPU memory"),
        trt_engine.Runner(opened, 8),
    ):
        pass


def allocate_too_much(runner: Any) -> None:
    """Ask for more memory than any GPU has."""
    runner._cuda.mem_alloc(1 << 46)


def test_sources_name_no_stand_in():
    for path in (ROOT / "part3_tensorrt.py", *(ROOT / "utils").glob("*.py")):
        assert "standin" not in path.read_text(), os.fspath(path)
