"""A stand-in for TensorRT, pycuda and cuda-bindings, for tests on a machine without a GPU.

It covers the calls that Part 3 makes, and does what the bindings of TensorRT 10.6 were seen to do:
calls fail by None or False and say why only in the log, a file that is missing is no parser error,
a plan with a flipped byte loads, a refused enqueue leaves an empty CUDA graph that replays. Objects
of TensorRT note themselves in `Gpu.orphans` if they end without a current context. Device memory is
host memory, and ONNX Runtime computes. Nothing but `install` puts it in place, and it takes
pytest's monkeypatch.
"""

import ctypes
import enum
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

MAGIC = b"standin-plan\n"
BUILD_ERRORS = {  # as TensorRT words them; after the first it goes on building
    "tactic": ["Error Code 2: OutOfMemory (no further information): skipping this tactic"],
    "memory": ["Cuda Runtime (out of memory)"],
    "kernel": [
        "NVRTC Compilation failure",
        "Error Code 10: Could not find any implementation for node {ForeignNode[a...b]}.",
    ],
}
SCRATCH = 1000  # bytes for each image of a batch


class Gpu:
    """The state of the pretended GPU, and the faults it should show."""

    def __init__(self, name: str = "Stand-in GPU", capability: tuple[int, int] = (9, 0)) -> None:
        self.name, self.capability = name, capability
        self.memory_bytes = 1 << 30
        # Of: device, driver, memory, tactic, kernel, load, context, enqueue, crash, capture,
        # instantiate, inspector.
        self.faults: set[str] = set()
        self.orphans: list[str] = []  # what ended after its context
        self.scratch = 0  # bytes that execution contexts hold
        self.executables = 0  # CUDA graphs, recorded or instantiated, that exist
        self.phases: list[str] = []  # of builds, as a progress monitor was told
        self.broken = False  # after a crash every call fails, as on a real GPU
        self.current: list[object] = []  # the stack of contexts
        self.live: dict[int, Any] = {}  # address -> memory, device and pinned
        self.allocations = 0
        self.captures: dict[int, list[Callable[[], None]]] = {}  # stream -> what it recorded
        self.builds = 0
        self.flags: dict[str, Any] = {}  # of the last build
        self.graph_launches = 0

    def allocate(self, size: int) -> Any:
        """`size` bytes at an address that is a multiple of 256."""
        assert self.current, "no current context"
        if size > self.memory_bytes:
            raise CudaMemoryError("cuMemAlloc failed: out of memory")
        memory = ctypes.create_string_buffer(size + 256)
        address = -(-ctypes.addressof(memory) // 256) * 256
        self.live[address] = memory
        self.allocations += 1
        return address

    def taken(self) -> int:
        """Bytes in use on the device."""
        return self.scratch + sum(len(memory) for memory in self.live.values())

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Do the work, or record it if the stream is being captured."""
        assert self.current, "no current context"
        if stream in self.captures:
            self.captures[stream].append(work)
        else:
            work()


GPU = Gpu()


class InContext:
    """An object that must end while its context is current."""

    def __del__(self) -> None:
        if not GPU.current:
            GPU.orphans.append(type(self).__name__)


def install(
    monkeypatch: pytest.MonkeyPatch, version: str = "10.14.1", gpu: Gpu | None = None
) -> Gpu:
    """Put the stand-ins in the place of the three packages until the test ends."""
    from utils import tensorrt_runner

    gpu = gpu or Gpu()
    monkeypatch.setattr(sys.modules[__name__], "GPU", gpu)
    driver = make_cuda_driver()
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version))
    monkeypatch.setitem(sys.modules, "pycuda", types.ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", make_pycuda_driver())
    sys.modules["pycuda"].driver = sys.modules["pycuda.driver"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr("cuda.bindings.driver", driver, raising=False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: gpu.capability)
    tensorrt_runner.shared_logger.cache_clear()
    return gpu


# --- tensorrt -------------------------------------------------------------------------------------


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.initialised = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Dims:
    """Constructed from a sequence; no tuple, but one can be made of it."""

    def __init__(self, values: Any) -> None:
        self.values = tuple(values)

    def __iter__(self) -> Iterator[int]:
        return iter(self.values)

    def __getitem__(self, index: int) -> int:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


class Network(InContext):
    def __init__(self) -> None:
        self.model: Any = None

    def get_input(self, index: int) -> Any:
        value = self.model.graph.input[index]
        return types.SimpleNamespace(name=value.name, shape=shape_of(value))


def shape_of(value: Any) -> Dims:
    dims = value.type.tensor_type.shape.dim
    return Dims(-1 if dim.dim_param else dim.dim_value for dim in dims)


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network, self.logger, self.errors = network, logger, list[str]()

    def parse_from_file(self, path: str) -> bool:
        if not Path(path).is_file():
            self.logger.log(Severity.ERROR, f"could not open file {path}")
            return False
        try:
            model = onnx.load(path)
        except Exception as error:
            self.errors.append(f"In node -1: cannot parse the file: {error}")
            return False
        for node in model.graph.node:
            if node.domain not in ("", "ai.onnx"):
                self.errors.append(f"In node {node.name}: no importer for {node.op_type}")
        self.network.model = model
        return not self.errors

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> str:
        return self.errors[index]


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Dims, Dims, Dims]] = {}

    def set_shape(self, name: str, low: Dims, best: Dims, high: Dims) -> None:
        assert all(isinstance(shape, Dims) for shape in (low, best, high))
        self.shapes[name] = (low, best, high)


class IProgressMonitor:
    def __init__(self) -> None:
        self.initialised = True


class IProfiler(IProgressMonitor):
    pass


class TimingCache:
    def __init__(self, content: bytes) -> None:
        known = content.startswith(b"gpu:")  # anything else is taken, with a warning
        self.gpu = content.removeprefix(b"gpu:").decode() if known else GPU.name

    def serialize(self) -> bytes:
        return f"gpu:{self.gpu}".encode()


class BuilderConfig:
    def __init__(self, flags: Any) -> None:
        self.flags = {flags.TF32}
        self.profiles: list[Profile] = []
        self.cache: TimingCache | None = None
        self.builder_optimization_level, self.profiling_verbosity = 3, "LAYER_NAMES_ONLY"
        self.progress_monitor: Any = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> TimingCache:
        return TimingCache(content)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.gpu != GPU.name and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1 if profile.shapes else -1


class HostMemory:
    """It has no length, but bytes can be made of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __bytes__(self) -> bytes:
        return self.content


class Engine(InContext):
    def __init__(self, header: dict[str, Any], model: Any, logger: ILogger, modes: Any) -> None:
        self.profiles, self.detailed, self.logger = header["profiles"], header["detailed"], logger
        self.modes = {value.name: modes.INPUT for value in model.graph.input}
        self.modes |= {value.name: modes.OUTPUT for value in model.graph.output}
        self.tensors = {v.name: v for v in (*model.graph.input, *model.graph.output)}
        self.nodes = [node.name for node in model.graph.node]
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.modes[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].type.tensor_type.elem_type

    def get_tensor_shape(self, name: str) -> Dims:
        return shape_of(self.tensors[name])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Dims]:
        return [Dims(shape) for shape in self.profiles[index][name]]

    def create_execution_context(self, strategy: str = "STATIC") -> "Context | None":
        if "context" in GPU.faults:
            self.logger.log(Severity.ERROR, "Error Code 2: OutOfMemory (no further information)")
            return None
        return None if "no context" in GPU.faults else Context(self, strategy)

    def create_engine_inspector(self) -> "Inspector":
        return Inspector(self)


class Inspector(InContext):
    def __init__(self, engine: Engine) -> None:
        self.engine, self.execution_context = engine, None

    def get_engine_information(self, kind: str) -> str:
        assert (kind, self.engine.detailed) == ("JSON", True)
        assert self.execution_context is not None
        if "inspector" in GPU.faults:
            self.engine.logger.log(Severity.ERROR, "Error Code 1: Myelin (No Myelin Error exists)")
            return ""
        outputs = [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}]
        return json.dumps({"Layers": [{"Name": n, "Outputs": outputs} for n in self.engine.nodes]})


class Context(InContext):
    def __init__(self, engine: Engine, strategy: str) -> None:
        self.engine, self.profile, self.warm, self.strategy = engine, 0, False, strategy
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profiler: Any = None
        self.scratch = 0
        self._take_scratch()

    def __del__(self) -> None:
        super().__del__()
        GPU.scratch -= self.scratch

    def _take_scratch(self) -> None:
        """That of the profile, or of the largest one where TensorRT manages it statically."""
        (name,) = self._inputs()
        batches = [self.engine.get_tensor_profile_shape(name, i)[2][0] for i in self._profiles()]
        batch = max(batches) if self.strategy == "STATIC" else batches[self.profile]
        GPU.scratch += SCRATCH * batch - self.scratch
        self.scratch = SCRATCH * batch

    def _profiles(self) -> range:
        return range(self.engine.num_optimization_profiles)

    def _refuse(self, text: str) -> bool:
        self.engine.logger.log(Severity.ERROR, text)
        return False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert index in self._profiles(), "the real one ends the process"
        self.profile, self.shapes, self.warm = index, {}, False
        self._take_scratch()
        return True

    def set_input_shape(self, name: str, shape: Dims) -> bool:
        if name not in self._inputs():
            return self._refuse(f"there is no input {name}")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or any(
            not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)
        ):
            return self._refuse(f"{tuple(shape)} of {name} is outside profile {self.profile}")
        self.shapes[name], self.warm = tuple(shape), False
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._inputs() if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        shape = self.shapes.get(name)
        batch = next(iter(self.shapes.values()))[0] if self.shapes else -1
        return Dims(shape or (batch, *tuple(self.engine.get_tensor_shape(name))[1:]))

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 4:
            return self._refuse(f"the address of {name} must be aligned on 4 boundary")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream != 0, "the default stream costs a synchronisation"
        GPU.broken |= "crash" in GPU.faults
        if GPU.broken or "enqueue" in GPU.faults or self.infer_shapes():
            return self._refuse("enqueue failed")
        if len(self.addresses) < len(self.engine.tensors):
            return self._refuse("a tensor has no address")
        if stream in GPU.captures and (not self.warm or "capture" in GPU.faults):
            return self._refuse("operation not permitted when stream is capturing")
        GPU.submit(stream, self._compute)
        self.warm = True
        for name in self.engine.nodes if self.profiler else ():
            self.profiler.report_layer_time(name, 0.5)
        return True

    def _inputs(self) -> list[str]:
        return [value.name for value in self.engine.session.get_inputs()]

    def _compute(self) -> None:
        feeds = {name: as_array(self.addresses[name], self.shapes[name]) for name in self._inputs()}
        names = [value.name for value in self.engine.session.get_outputs()]
        for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
            as_array(self.addresses[name], value.shape)[...] = value


def as_array(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array at an address."""
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape)


def make_tensorrt(version: str) -> Any:
    """The module `tensorrt` of a version: from 11 on, precision flags are gone."""
    names = ["TF32"] if int(version.split(".")[0]) >= 11 else ["TF32", "FP16", "INT8", "FP8"]
    module: Any = types.ModuleType("tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # PyTorch's exporter looks
    module.__version__, module.ILogger, module.Dims = version, ILogger, Dims
    module.OnnxParser, module.IProgressMonitor = OnnxParser, IProgressMonitor
    module.IProfiler, module.float32 = IProfiler, onnx.TensorProto.FLOAT
    module.BuilderFlag = types.SimpleNamespace(**{name: name for name in names})
    module.ProfilingVerbosity = types.SimpleNamespace(DETAILED="DETAILED")
    module.LayerInformationFormat = types.SimpleNamespace(JSON="JSON")
    module.TensorIOMode = types.SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(
        STATIC="STATIC", ON_PROFILE_CHANGE="ON_PROFILE_CHANGE"
    )
    module.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)

    def check_start(logger: ILogger) -> ILogger:
        assert logger.initialised
        if "driver" in GPU.faults:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return logger

    class Builder(InContext):
        def __init__(self, logger: ILogger) -> None:
            self.logger = check_start(logger)

        def create_network(self, flags: int) -> Network:
            assert flags & 2, "weakly typed: on 10.x this ignores the precisions of the file"
            return Network()

        def create_builder_config(self) -> BuilderConfig:
            return BuilderConfig(module.BuilderFlag)

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(
            self, network: Network, config: BuilderConfig
        ) -> HostMemory | None:
            report_progress(config.progress_monitor)
            for fault in sorted(GPU.faults & BUILD_ERRORS.keys(), reverse=True):
                for text in BUILD_ERRORS[fault]:
                    self.logger.log(Severity.ERROR, text)
            if GPU.faults & {"memory", "kernel"} or not config.profiles or network.model is None:
                return None
            GPU.builds += 1
            GPU.flags = {
                "tf32": module.BuilderFlag.TF32 in config.flags,
                "level": config.builder_optimization_level,
            }
            header = {
                "version": version,
                "gpu": GPU.name,
                "detailed": config.profiling_verbosity == "DETAILED",
                "profiles": [
                    {name: [list(shape) for shape in shapes] for name, shapes in p.shapes.items()}
                    for p in config.profiles
                ],
            }
            body = json.dumps(header).encode() + b"\n" + network.model.SerializeToString()
            return HostMemory(MAGIC + len(body).to_bytes(8) + body)

    class Runtime(InContext):
        def __init__(self, logger: ILogger) -> None:
            self.logger = check_start(logger)

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            body = plan[len(MAGIC) + 8 :]
            text = ""
            if not plan:
                text = "Cannot deserialize with an empty memory buffer"
            elif not plan.startswith(MAGIC):
                text = "Serialization assertion magicTagRead == kPLAN_MAGIC_TAG failed"
            elif plan != MAGIC + len(body).to_bytes(8) + body:
                text = "Serialization assertion header.size == blobSize failed"
            elif "load" in GPU.faults:
                text = "Cuda Runtime (out of memory)"
            else:
                head, _, model = body.partition(b"\n")
                header = json.loads(head)
                if (header["version"], header["gpu"]) == (version, GPU.name):
                    graph = onnx.load_from_string(model)
                    return Engine(header, graph, self.logger, module.TensorIOMode)
                text = "the engine plan was built elsewhere"
            self.logger.log(Severity.ERROR, text)
            return None

    module.Builder, module.Runtime = Builder, Runtime
    return module


def report_progress(monitor: Any) -> None:
    """A phase with a phase inside it, as a build has them."""
    if monitor is None:
        return
    assert monitor.initialised
    monitor.phase_start("Building Engine", None, 1)
    monitor.phase_start("Timing", "Building Engine", 3)
    for step in range(3):
        assert monitor.step_complete("Timing", step) is True
    monitor.phase_finish("Timing")
    assert monitor.step_complete("Building Engine", 0) is True
    monitor.phase_finish("Building Engine")
    GPU.phases.append("Building Engine")


# --- pycuda.driver --------------------------------------------------------------------------------


class CudaError(Exception):
    pass


class CudaMemoryError(CudaError):
    pass


class PrimaryContext:
    def push(self) -> None:
        GPU.current.append(self)

    def detach(self) -> None:
        assert GPU.current.pop() is self


class Device:
    def __init__(self, ordinal: int) -> None:
        if "device" in GPU.faults:
            raise CudaError("cuDeviceGet failed: invalid device ordinal")

    def name(self) -> str:
        return GPU.name

    def compute_capability(self) -> tuple[int, int]:
        return GPU.capability

    def retain_primary_context(self) -> PrimaryContext:
        return PrimaryContext()


class Stream:
    def __init__(self) -> None:
        assert GPU.current, "no current context"
        self.handle = id(self)

    def synchronize(self) -> None:
        assert self.handle not in GPU.captures, "synchronised while capturing"
        if GPU.broken:
            raise CudaError("cuStreamSynchronize failed: an illegal memory access was encountered")


class DeviceAllocation:
    def __init__(self, size: int) -> None:
        self.address = GPU.allocate(size)

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        assert GPU.current, "freed after its context"
        del GPU.live[self.address]


class PinnedAllocation(DeviceAllocation):
    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (self.address, False),
        }


def copy_async(target: Any, source: Any, size: int, stream: Stream) -> None:
    def copy() -> None:
        ctypes.memmove(int(target), int(source), size)

    GPU.submit(stream.handle, copy)


def make_pycuda_driver() -> Any:
    module: Any = types.ModuleType("pycuda.driver")
    module.Error, module.MemoryError = CudaError, CudaMemoryError
    module.init, module.Device, module.Stream = lambda: None, Device, Stream
    module.mem_get_info = lambda: (GPU.memory_bytes - GPU.taken(), GPU.memory_bytes)
    module.mem_alloc = DeviceAllocation
    module.pagelocked_empty = lambda shape, dtype: np.asarray(PinnedAllocation(shape, dtype))
    module.memcpy_htod_async = lambda target, array, stream: copy_async(
        target, array.ctypes.data, array.nbytes, stream
    )
    module.memcpy_dtoh_async = lambda array, source, stream: copy_async(
        array.ctypes.data, source, array.nbytes, stream
    )
    module.memcpy_dtod_async = copy_async
    return module


# --- cuda.bindings.driver -------------------------------------------------------------------------


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


def make_cuda_driver() -> Any:
    module: Any = types.ModuleType("cuda.bindings.driver")
    success = CUresult.CUDA_SUCCESS

    class Graph(list):
        """Recorded work; also an empty one is a graph."""

        def __bool__(self) -> bool:
            return True

    def begin(stream: int, mode: Any) -> tuple[CUresult]:
        if "begin" in GPU.faults:
            return (CUresult.CUDA_ERROR_NOT_SUPPORTED,)
        GPU.captures[stream] = []
        return (success,)

    def end(stream: int) -> tuple[CUresult, Graph]:
        GPU.executables += 1
        return success, Graph(GPU.captures.pop(stream))  # of a refused enqueue, it is empty

    def instantiate(graph: Graph, flags: int) -> tuple[CUresult, Any]:
        if "instantiate" in GPU.faults:
            return CUresult.CUDA_ERROR_NOT_SUPPORTED, None
        GPU.executables += 1
        return success, Graph(graph)

    def launch(executable: list[Callable[[], None]], stream: int) -> tuple[CUresult]:
        assert GPU.current, "no current context"
        GPU.graph_launches += 1
        for work in executable:
            work()
        return (success,)

    def destroy(graph: Graph) -> tuple[CUresult]:
        GPU.executables -= 1
        return (success,)

    module.CUresult, module.CUstream = CUresult, int
    module.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    module.cuStreamBeginCapture, module.cuStreamEndCapture = begin, end
    module.cuGraphInstantiate, module.cuGraphLaunch = instantiate, launch
    module.cuGraphDestroy = module.cuGraphExecDestroy = destroy
    return module


def read_plan(path: Path) -> dict[str, Any]:
    """The header of a plan that the stand-in built."""
    return json.loads(path.read_bytes()[len(MAGIC) + 8 :].partition(b"\n")[0])
