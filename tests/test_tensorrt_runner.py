"""The runner against stand-ins that do what TensorRT 10.6 was seen to do; also on a real GPU."""

import gc
import hashlib
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import part3_tensorrt as part3
from tests import tensorrt_standin as standin
from tests.test_onnx_tools import DIGITS, digit_inputs, export, small_cnn
from utils import tensorrt_runner
from utils.onnx_tools import hash_onnx, onnx_session
from utils.tensorrt_runner import EngineError, Runner, primary_context, read_plan

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("pycuda") is not None


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small_cnn(), tmp_path_factory.mktemp("onnx") / "cnn.onnx")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Gpu]:
    """A pretended GPU; nothing of TensorRT may outlive its context, nor any memory a test."""
    gpu = standin.install(monkeypatch, "11.1.0")
    yield gpu
    gc.collect()
    assert gpu.orphans == []
    assert (gpu.live, gpu.current, gpu.scratch, gpu.executables) == ({}, [], 0, 0)


def make_job(folder: Path, **changes: Any) -> part3.EngineJob:
    settings: dict[str, Any] = {
        "candidate": "tensorrt-fp32",
        "build": part3.build_tensorrt,
        "source": DIGITS,
        "device": "cuda",
        "export": {},
        "engine_dir": folder,
        "timing_dir": folder,
        "engine_batch_sizes": (1, 4),
        "optimization_level": 3,
        "cuda_graph": True,
        "batch_size": 4,
        "columns": {"image_size": 32},
    }
    return part3.EngineJob(**settings | changes)


def row_of(onnx_file: Path) -> dict[str, str]:
    """What its export's row says of a file that was checked."""
    return {"file": str(onnx_file), "sha256": hash_onnx(onnx_file), "status": "ok"}


def build(onnx_file: Path, folder: Path, **changes: Any) -> Path:
    """Have the engine; where its plan lies."""
    job = make_job(folder, **{"export": row_of(onnx_file)} | changes)
    return Path(part3.make_engine(job)["engine_file"])


@pytest.fixture
def plan(gpu: standin.Gpu, onnx_file: Path, tmp_path: Path) -> bytes:
    return read_plan(build(onnx_file, tmp_path))


def images(count: int) -> np.ndarray:
    return digit_inputs(count).numpy()


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_runner_gives_the_logits_and_frees_everything(
    gpu: standin.Gpu, plan: bytes, onnx_file: Path, cuda_graph: bool
):
    expected = onnx_session(onnx_file, 1, optimize=False)(digit_inputs(4))
    with primary_context(), Runner(plan, 4, cuda_graph) as runner:
        assert runner.input_shape == (4, 3, 32, 32)
        assert runner.output_shape == (4, 10)
        assert (runner.no_graph == "") is cuda_graph
        allocated, launched = gpu.allocations, gpu.graph_launches
        for _ in range(3):
            np.testing.assert_array_equal(runner.infer(images(4)), expected)
        assert not np.allclose(runner.infer(images(8)[4:]), expected)
        assert gpu.allocations == allocated  # nothing is allocated once it runs
        assert gpu.graph_launches - launched == (4 if cuda_graph else 0)
        runner.close()  # closing twice is closing once


def test_runner_takes_images_from_the_device_and_shows_its_logits(
    gpu: standin.Gpu, plan: bytes, onnx_file: Path
):
    expected = onnx_session(onnx_file, 1, optimize=False)(digit_inputs(4))
    x = images(4)
    with primary_context(), Runner(plan, 4) as runner:
        runner.copy_from_device(x.ctypes.data, x.nbytes)  # its device memory is the host's
        runner.execute()
        interface = runner.device_logits.__cuda_array_interface__
        logits = standin.as_array(interface["data"][0], interface["shape"])
        np.testing.assert_array_equal(logits, expected)
        assert interface["typestr"] == "<f4"
        for wrong in (images(3), images(4).astype(np.float16), images(4).transpose(0, 1, 3, 2)):
            with pytest.raises(ValueError, match="expected float32"):
                runner.upload(wrong)
        for wrong in (images(1), images(4)[0], images(4).astype(np.uint8)):
            with pytest.raises(ValueError, match="expected float32"):
                runner.infer(wrong)
        with pytest.raises(ValueError, match="36864 bytes of images: expected 49152"):
            runner.copy_from_device(x.ctypes.data, 36864)


def test_a_small_batch_does_not_hold_the_scratch_of_a_large_one(gpu: standin.Gpu, plan: bytes):
    with primary_context():
        taken = {}
        for batch_size in (1, 4):
            with Runner(plan, batch_size) as runner:
                assert gpu.scratch == standin.SCRATCH * batch_size
                taken[batch_size] = runner.memory_bytes
    assert taken[4] - taken[1] > 3 * standin.SCRATCH


def test_batch_outside_the_profiles_never_reaches_tensorrt(gpu: standin.Gpu, plan: bytes):
    with pytest.raises(EngineError, match=r"batch size 2 .*\(1, 1\), \(4, 4\)"), primary_context():
        Runner(plan, 2)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("capture", "operation not permitted when stream is capturing"),
        ("instantiate", "CUDA_ERROR_NOT_SUPPORTED"),
        ("begin", "CUDA_ERROR_NOT_SUPPORTED"),
    ],
)
def test_capture_that_fails_falls_back_to_enqueues(
    gpu: standin.Gpu, plan: bytes, onnx_file: Path, fault: str, text: str
):
    gpu.faults.add(fault)
    with primary_context(), Runner(plan, 4) as runner:
        assert runner.no_graph == text
        assert gpu.captures == {}  # the capture was ended
        assert gpu.executables == 0  # and what it left is gone
        expected = onnx_session(onnx_file, 1, optimize=False)(digit_inputs(4))
        np.testing.assert_array_equal(runner.infer(images(4)), expected)
        assert gpu.graph_launches == 0


def test_without_cuda_bindings_it_runs_by_enqueues(
    gpu: standin.Gpu, plan: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr("cuda.bindings.driver")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with primary_context(), Runner(plan, 4) as runner:
        assert "cuda-bindings is not usable" in runner.no_graph
        assert np.isfinite(runner.infer(images(4))).all()


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("device", ImportError, "no usable GPU"),
        ("driver", ImportError, "driver may be older"),
        ("load", MemoryError, r"cannot load the engine; Cuda Runtime \(out of memory\)"),
        ("context", MemoryError, "cannot make an execution context; .*OutOfMemory"),
        ("no context", EngineError, "cannot make an execution context$"),
        ("enqueue", EngineError, "cannot run the engine; enqueue failed"),
        ("crash", EngineError, "cannot run the engine; enqueue failed"),
    ],
)
def test_faults_come_back_with_their_reason(
    gpu: standin.Gpu, plan: bytes, fault: str, error: type[Exception], text: str
):
    gpu.faults.add(fault)
    with pytest.raises(error, match=text), primary_context():
        Runner(plan, 4)
    gpu.faults.clear()


def test_too_little_memory_for_the_buffers(gpu: standin.Gpu, plan: bytes):
    gpu.memory_bytes = 1000
    with pytest.raises(MemoryError, match="not enough GPU memory"), primary_context():
        Runner(plan, 4)


def test_what_does_not_load_says_why(gpu: standin.Gpu, plan: bytes):
    damaged = {
        b"": "empty memory buffer",
        plan[: len(plan) // 2]: "header.size == blobSize failed",
        b"another program's file": "kPLAN_MAGIC_TAG failed",
    }
    for content, text in damaged.items():
        with primary_context(), pytest.raises(EngineError, match=text):
            tensorrt_runner.load_engine(content)


def test_flipped_byte_loads_so_the_card_is_asked_first(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path
):
    path = build(onnx_file, tmp_path)
    content = bytearray(path.read_bytes())
    weight = max(onnx.load(onnx_file).graph.initializer, key=lambda tensor: len(tensor.raw_data))
    content[content.index(weight.raw_data)] ^= 1
    path.write_bytes(content)
    with primary_context():
        assert tensorrt_runner.load_engine(bytes(content)) is not None
    with pytest.raises(EngineError, match="it is not the plan of its card"):
        read_plan(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(EngineError, match="no readable plan or card"):
        read_plan(path)


def test_engine_with_other_inputs_is_refused(gpu: standin.Gpu, onnx_file: Path, tmp_path: Path):
    model = onnx.load(onnx_file)
    model.graph.output.extend([v for v in model.graph.value_info if v.name == "relu"][:1])
    onnx.save(model, tmp_path / "two.onnx")
    content = read_plan(build(tmp_path / "two.onnx", tmp_path))
    with (
        pytest.raises(EngineError, match="expected one float32 input and output"),
        primary_context(),
    ):
        Runner(content, 4)


def test_frames_of_a_failure_are_emptied_before_the_context_goes(gpu: standin.Gpu):
    def build_badly() -> None:
        held = standin.Network()
        try:
            held.get_input(0)
        except AttributeError as error:
            raise EngineError("it failed") from error

    with pytest.raises(EngineError) as caught, primary_context():
        build_badly()
    assert caught.value.__traceback__ is not None  # it is alive, and holds no Network


@pytest.mark.parametrize("silent", [False, True])
def test_layers_have_names_and_times_even_if_the_inspector_is_silent(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path, silent: bool
):
    content = read_plan(build(onnx_file, tmp_path, detailed=True))
    gpu.faults |= {"inspector"} if silent else set()
    with primary_context(), Runner(content, 4, cuda_graph=False) as runner:
        layers = runner.layers()
        assert tensorrt_runner.take_errors() == []
    nodes = [node.name for node in onnx.load(onnx_file).graph.node]
    assert [layer["Name"] for layer in layers] == nodes
    assert all(layer["ms"] == pytest.approx(0.5) for layer in layers)
    assert all(("Outputs" in layer) is not silent for layer in layers)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("tensorrt", None),
        ("tensorrt", types.ModuleType("tensorrt")),  # a folder of type stubs
        ("pycuda.driver", None),
    ],
)
def test_missing_libraries_have_a_reason(
    gpu: standin.Gpu, monkeypatch: pytest.MonkeyPatch, name: str, module: Any
):
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match=name), primary_context():
        pass


def test_runner_needs_no_pytorch():
    code = "import sys, utils.tensorrt_runner; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
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

    def create_execution_context(self, strategy: str) -> "CopyEngine":
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
    monkeypatch.setattr(tensorrt_runner, "load_engine", lambda plan: CopyEngine())
    x = torch.rand(4, 8, 3, 32, 32)
    on_device = x.cuda()
    with primary_context() as device, Runner(b"", 8, cuda_graph) as runner:
        assert device.name() == torch.cuda.get_device_name()
        assert (runner.no_graph == "") is cuda_graph
        logits = torch.as_tensor(runner.device_logits, device="cuda")
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
            assert start.elapsed_time(end) > 0
            expected = x[3 - i].flatten()[:80].view(8, 10)
            torch.testing.assert_close(seen.cpu(), expected, rtol=0, atol=0)
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        for _ in range(200):
            runner.execute()
        torch.cuda.synchronize()
        assert torch.cuda.mem_get_info()[0] == free  # nothing was allocated
        del logits
    assert float(torch.ones(3, device="cuda").sum()) == 3  # PyTorch's context is still alive


# --- keeping engines ------------------------------------------------------------------------------


def test_engine_is_built_once_and_its_card_tells_of_it(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path
):
    path = build(onnx_file, tmp_path)
    assert build(onnx_file, tmp_path) == path
    assert gpu.builds == 1
    assert gpu.phases == ["Building Engine"]
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["identity"]["tensorrt"] == sys.modules["tensorrt"].__version__
    assert card["identity"]["batch_sizes"] == [1, 4]
    profiles = standin.read_plan(path)["profiles"]
    assert [p["images"] for p in profiles] == [[[b, 3, 32, 32]] * 3 for b in (1, 4)]


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "tf32"},
        {"engine_batch_sizes": (4,)},
        {"optimization_level": 5},
        {"detailed": True},
    ],
)
def test_another_choice_is_another_engine(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path, change: dict[str, Any]
):
    assert build(onnx_file, tmp_path) != build(onnx_file, tmp_path, **change)
    assert gpu.flags["tf32"] is (change.get("precision") == "tf32")
    assert gpu.flags["level"] == change.get("optimization_level", 3)


def test_another_tensorrt_or_gpu_is_another_engine_and_timing_cache(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    paths = set()
    for version, gpu in (
        ("10.14.1", standin.Gpu()),
        ("11.1.0", standin.Gpu()),
        ("11.1.0", standin.Gpu("Other GPU")),
        ("11.1.0", standin.Gpu(capability=(8, 9))),
    ):
        standin.install(monkeypatch, version, gpu)
        paths.add(build(onnx_file, tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    paths.add(build(onnx_file, tmp_path))
    assert len(paths) == 5
    assert {path.name for path in tmp_path.glob("timing-*")} == {
        "timing-10.14.1-13.0-Stand-in-GPU.cache",
        "timing-11.1.0-13.0-Stand-in-GPU.cache",
        "timing-11.1.0-13.0-Other-GPU.cache",
        "timing-11.1.0-12.6-Stand-in-GPU.cache",
    }


def test_damaged_engines_are_built_again(gpu: standin.Gpu, onnx_file: Path, tmp_path: Path):
    path = build(onnx_file, tmp_path)
    good = path.read_bytes()
    flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    for damaged in (b"", good[: len(good) // 2], flipped, b"another program's file"):
        path.write_bytes(damaged)
        assert build(onnx_file, tmp_path) == path
        assert path.read_bytes() == good
    for card in ("", "{", "[]", '{"sha256": 1}'):
        path.with_suffix(".json").write_text(card)
        build(onnx_file, tmp_path)
    assert gpu.builds == 9


def test_engine_that_does_not_fit_into_memory_is_not_built_again(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path
):
    build(onnx_file, tmp_path)
    gpu.faults.add("load")
    with pytest.raises(MemoryError, match="out of memory"):
        build(onnx_file, tmp_path)
    assert gpu.builds == 1


@pytest.mark.parametrize(
    ("faults", "error", "text"),
    [
        ({"kernel"}, EngineError, "NVRTC Compilation failure; .*Could not find any implementation"),
        ({"kernel", "tactic"}, EngineError, "cannot build cnn.onnx; NVRTC Compilation failure"),
        ({"memory"}, MemoryError, "cannot build cnn.onnx; .*out of memory"),
    ],
)
def test_build_that_fails_says_the_first_cause(
    gpu: standin.Gpu,
    onnx_file: Path,
    tmp_path: Path,
    faults: set[str],
    error: type[Exception],
    text: str,
):
    gpu.faults |= faults
    with pytest.raises(error, match=text):
        build(onnx_file, tmp_path)
    assert list(tmp_path.glob("*.plan")) == []


def test_kernels_that_were_skipped_explain_nothing_later(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path
):
    gpu.faults |= {"tactic", "enqueue"}
    content = read_plan(build(onnx_file, tmp_path))
    with pytest.raises(EngineError) as caught, primary_context():
        Runner(content, 4)
    assert str(caught.value) == "TensorRT cannot run the engine; enqueue failed"


def test_parser_errors_are_printed_and_a_missing_file_is_in_the_log(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = onnx.load(onnx_file)
    for node in [n for n in model.graph.node if n.op_type == "Conv"][:2]:
        node.domain, node.op_type = "my.domain", "Fancy"
    onnx.save(model, tmp_path / "odd.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x08nonsense")
    for name, text in {
        "odd.onnx": "no importer for Fancy",
        "broken.onnx": "cannot parse the file",
        "missing.onnx": "could not open file",
    }.items():
        with pytest.raises(EngineError, match=f"cannot parse {name}: .*{text}"), primary_context():
            part3.parse_onnx(standin.Network(), tmp_path / name)
    assert capsys.readouterr().err.count("no importer for Fancy") == 2


def test_timing_cache_is_kept_and_a_foreign_one_replaced(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path
):
    build(onnx_file, tmp_path)
    (cache,) = tmp_path.glob("timing-*.cache")
    assert cache.read_bytes() == f"gpu:{gpu.name}".encode()
    for content in (b"gpu:Another GPU", b"garbage, which TensorRT takes with a warning"):
        cache.write_bytes(content)
        for path in tmp_path.glob("*.plan"):
            path.unlink()
        build(onnx_file, tmp_path)
        assert cache.read_bytes() == f"gpu:{gpu.name}".encode()


def test_onnx_file_that_another_run_wrote_is_not_built(
    gpu: standin.Gpu, onnx_file: Path, tmp_path: Path
):
    export_row = {"file": str(onnx_file), "sha256": "of another file"}
    with pytest.raises(RuntimeError, match="no longer the file that was checked"):
        build(onnx_file, tmp_path, export=export_row)
    assert gpu.builds == 0


def test_sources_name_no_stand_in():
    sources = [ROOT / "part3_tensorrt.py", *(ROOT / "utils").glob("*.py")]
    assert not [path.name for path in sources if "standin" in path.read_text()]
