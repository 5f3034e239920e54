"""Build, keep and run a TensorRT engine: an ONNX file in, logits out; pycuda, no PyTorch.

    recipe = Recipe(Path("model-fp16.onnx"), "fp16", batch_sizes=(1, 8))
    with open_runner(recipe, Path("engines"), batch_size=8) as runner:
        logits = runner.infer(images)  # float32 [8, 3, S, S] -> [8, C], host to host

Networks are strongly typed, so the ONNX graph alone decides each tensor's precision, and the same
code serves TensorRT from 10.13 on, 11 included. An engine has one optimisation profile for each
batch size. A plan is code: open only folders of engines that you trust.
"""

import contextlib
import functools
import importlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.engine_cache import (
    Recipe,
    identify,
    plan_path,
    read_engine,
    timing_cache_path,
    write_engine,
)
from utils.files import replace_file

if TYPE_CHECKING:
    import tensorrt as trt


class MissingError(ImportError):
    """TensorRT, pycuda, or a GPU that they can use is missing."""


class EngineError(RuntimeError):
    """TensorRT refused; the text is its own messages."""


class UnsupportedError(EngineError):
    """This TensorRT has no importer or no kernel for one of the graph's operators."""


@dataclass(frozen=True)
class Opened:
    """A deserialised engine and where it came from."""

    engine: "trt.ICudaEngine"
    size_bytes: int
    build_seconds: float  # when it was built, now or in an earlier run
    cached: bool


def make_engine(recipe: Recipe, folder: Path) -> tuple[float, bool]:
    """Have the engine in `folder`; the seconds its build took, and whether it was there before.

    In a process of its own this gives the build the GPU's memory, which `open_runner` would share
    with whatever else the process holds.
    """
    require_libraries()
    with primary_context() as device:
        opened = open_engine(recipe, folder, describe_gpu(device))
        found = opened.build_seconds, opened.cached
        del opened  # before its context
    return found


@contextlib.contextmanager
def open_runner(
    recipe: Recipe, folder: Path, batch_size: int, cuda_graph: bool = True
) -> Iterator["Runner"]:
    """Take the engine from `folder`, or build it, and hold all it needs until the end."""
    require_libraries()
    with primary_context() as device:
        opened = open_engine(recipe, folder, describe_gpu(device))
        with Runner(opened, batch_size, cuda_graph) as runner:
            del opened
            yield runner


def require_libraries() -> None:
    """Raise MissingError unless TensorRT and pycuda are there and usable."""
    try:
        import tensorrt
    except ImportError as error:
        raise MissingError(f"TensorRT is not installed: {error}") from error
    if not hasattr(tensorrt, "Builder"):  # a folder of type stubs imports as an empty package
        raise MissingError("TensorRT is not installed: its package here is an empty stub")
    try:
        importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise MissingError(f"pycuda is not usable: {error}") from error


@contextlib.contextmanager
def primary_context(ordinal: int = 0) -> Iterator[Any]:
    """Make a GPU's primary context current, which PyTorch uses too; yields the pycuda device."""
    import pycuda.driver as cuda

    try:
        cuda.init()
        device = cuda.Device(ordinal)
        context = device.retain_primary_context()
    except cuda.Error as error:
        raise MissingError(f"CUDA finds no usable GPU: {error}") from error
    context.push()
    try:
        yield device
    finally:
        context.detach()  # after pop() a destructor would end it as if it were not the primary one


def describe_gpu(device: Any) -> dict[str, str]:
    """What of a GPU and its driver an engine depends on."""
    import pycuda.driver as cuda

    major, minor = device.compute_capability()
    cuda_major = cuda.get_driver_version() // 1000
    return {
        "gpu": device.name(),
        "compute_capability": f"{major}.{minor}",
        "cuda": f"{cuda_major}",
    }


@functools.cache
def shared_logger() -> Any:
    """The process's one logger: it collects errors, because raising in it would lose them."""
    import tensorrt as trt

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(msg)

    return Logger()


def take_errors() -> str:
    """What the logger collected, which it then forgets: errors that TensorRT overcame, too."""
    errors = shared_logger().errors
    text = "; ".join(errors)
    errors.clear()
    return text


def refusal(what: str) -> Exception:
    """The exception that carries what the logger collected."""
    text = "; ".join(filter(None, [what, take_errors()]))
    if "outofmemory" in text.lower().replace(" ", ""):  # TensorRT writes it in one, CUDA in three
        return MemoryError(text)
    if "could not find any implementation" in text.lower():
        return UnsupportedError(text)
    return EngineError(text)


def create(kind: Callable[[Any], Any]) -> Any:
    """A `trt.Builder` or `trt.Runtime` with the process's logger."""
    try:
        return kind(shared_logger())
    except TypeError as error:  # all that the binding says when CUDA does not start
        raise MissingError(
            "TensorRT cannot use this GPU: the driver may be older than its CUDA version"
        ) from error


def open_engine(recipe: Recipe, folder: Path, gpu: dict[str, str]) -> Opened:
    """The engine from `folder` if a fitting, undamaged one is there, else a new one.

    Raises:
        EngineError, MemoryError: TensorRT cannot parse, build or load it.
    """
    import tensorrt as trt

    identity = identify(recipe, gpu, trt.__version__)
    path = plan_path(folder, recipe, identity)
    runtime = create(trt.Runtime)
    if found := read_engine(path, identity):
        engine = runtime.deserialize_cuda_engine(found[0])
        if engine is not None:
            return Opened(engine, len(found[0]), found[1], cached=True)
        take_errors()  # they say why it does not load, and it is built anew
    start = time.perf_counter()
    plan = build_plan(recipe, timing_cache_path(folder, identity))
    seconds = time.perf_counter() - start
    write_engine(path, plan, identity, seconds)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise refusal(f"TensorRT cannot load the engine it built from {recipe.onnx.name}")
    return Opened(engine, len(plan), seconds, cached=False)


# --- building -------------------------------------------------------------------------------------


def build_plan(recipe: Recipe, timing_cache: Path) -> bytes:
    """Parse the graph and build its engine; the timing cache makes the next build faster."""
    import tensorrt as trt

    builder = create(trt.Builder)
    take_errors()
    network = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # version 11 knows nothing else
    )
    parse_onnx(network, recipe.onnx)
    config = configure(builder, network, recipe)
    cache = attach_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refusal(f"TensorRT cannot build {recipe.onnx.name}")
    take_errors()  # of kernels that it tried and left out
    with contextlib.suppress(OSError):
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        replace_file(timing_cache, bytes(cache.serialize()))
    return bytes(plan)


def parse_onnx(network: "trt.INetworkDefinition", path: Path) -> None:
    """Parse by path, which finds external weights too; every error is printed."""
    import tensorrt as trt

    parser = trt.OnnxParser(network, shared_logger())
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    for error in errors:
        print(f"{path.name}: {error}", file=sys.stderr)
    take_errors()
    first = str(errors[0]).strip() if errors else "no reason given"
    unsupported = any(error.code().name.startswith("UNSUPPORTED") for error in errors)
    kind = UnsupportedError if unsupported else EngineError
    raise kind(f"TensorRT cannot parse {path.name}, {len(errors)} errors: {first}")


def configure(
    builder: "trt.Builder", network: "trt.INetworkDefinition", recipe: Recipe
) -> "trt.IBuilderConfig":
    """Set what the graph does not decide, and a profile for each batch size.

    A profile of one batch size gives faster kernels than one wide range.
    """
    import tensorrt as trt

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_bytes)
    config.builder_optimization_level = recipe.optimization_level
    config.max_aux_streams = 0  # one stream: what the events enclose is all the work there is
    if recipe.precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and float32 would not be float32
    images = network.get_input(0)
    for batch_size in recipe.batch_sizes:
        shape = trt.Dims([batch_size, *tuple(images.shape)[1:]])
        profile = builder.create_optimization_profile()
        profile.set_shape(images.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise refusal(f"TensorRT refuses a profile for batch size {batch_size}")
    return config


def attach_timing_cache(config: "trt.IBuilderConfig", path: Path) -> "trt.ITimingCache":
    """Load the timing cache if it fits this GPU and TensorRT, else start one."""
    content = b""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


# --- running --------------------------------------------------------------------------------------


class Runner:
    """An engine at one batch size, with a stream, buffers and a CUDA graph of its own.

    Everything is allocated here, so that nothing is later. The methods only enqueue, but for
    `infer`; work of others that shares the buffers belongs on the stream `stream_handle`.
    """

    def __init__(self, opened: Opened, batch_size: int, cuda_graph: bool = True) -> None:
        import pycuda.driver as cuda

        self._cuda = cuda
        self.opened: Any = opened
        self._stream: Any = cuda.Stream()
        self._context: Any = None
        self._launch: Any = self._enqueue
        self._cleanup = contextlib.ExitStack()
        try:
            self._open_context(opened.engine, batch_size)
            self._allocate()
            self.execute()  # the first run sets up what a capture cannot hold
            self._stream.synchronize()
            self.no_graph = self._capture() if cuda_graph else "it was not asked for"
        except cuda.MemoryError as error:
            self.close()
            raise MemoryError(f"not enough GPU memory for the engine: {error}") from error
        except BaseException:
            self.close()
            raise

    def _open_context(self, engine: "trt.ICudaEngine", batch_size: int) -> None:
        """Create the execution context and fix its profile and shapes."""
        import tensorrt as trt

        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if n not in inputs]
        kinds = {engine.get_tensor_dtype(n) for n in names}
        if len(inputs) != 1 or len(outputs) != 1 or kinds != {trt.float32}:
            raise EngineError(f"the engine has {names}: expected one float32 input and output")
        self._names = inputs[0], outputs[0]
        context = self._context = engine.create_execution_context()
        if context is None:
            raise MemoryError("not enough GPU memory for the engine's execution context")
        profile = find_profile(engine, inputs[0], batch_size)
        chosen = context.set_optimization_profile_async(profile, self.stream_handle)
        self._stream.synchronize()
        self.input_shape = (batch_size, *tuple(engine.get_tensor_shape(inputs[0]))[1:])
        if not chosen or not context.set_input_shape(inputs[0], trt.Dims(list(self.input_shape))):
            raise refusal(f"TensorRT refuses the input shape {self.input_shape}")
        if missing := context.infer_shapes():
            raise refusal(f"TensorRT wants more shapes: {missing}")
        self.output_shape = tuple(context.get_tensor_shape(outputs[0]))

    def _allocate(self) -> None:
        """Device buffers, and pinned host buffers of the same shapes."""
        shapes = dict(zip(self._names, (self.input_shape, self.output_shape), strict=True))
        self._device: dict[str, Any] = {}
        self._host: dict[str, np.ndarray] = {}
        for name, shape in shapes.items():
            host = self._cuda.pagelocked_empty(shape, np.float32)
            host.fill(0)
            self._host[name] = host
            self._cleanup.callback(host.base.free)
            self._device[name] = self._cuda.mem_alloc(host.nbytes)
            self._cleanup.callback(self._device[name].free)
            if not self._context.set_tensor_address(name, int(self._device[name])):
                raise refusal(f"TensorRT refuses the buffer of {name}")
        self.upload(self._host[self._names[0]])

    def _capture(self) -> str:
        """Record one enqueue as a CUDA graph; returns why not, if that cannot be."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            return f"cuda-bindings is not usable: {error}"
        stream = driver.CUstream(self.stream_handle)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check_cuda(driver.cuStreamBeginCapture(stream, mode))
        enqueued = self._context.execute_async_v3(self.stream_handle)
        status, graph = driver.cuStreamEndCapture(stream)  # also after a failure: it ends the mode
        if not enqueued or int(status) != 0:
            return take_errors() or f"CUDA: {status}"
        executable = check_cuda(driver.cuGraphInstantiate(graph, 0))
        self._cleanup.callback(driver.cuGraphExecDestroy, executable)
        check_cuda(driver.cuGraphDestroy(graph))
        self._launch = lambda: check_cuda(driver.cuGraphLaunch(executable, stream))
        return ""

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.stream_handle):
            raise refusal("TensorRT cannot run the engine")

    @property
    def uses_graph(self) -> bool:
        """Whether the engine is replayed as a CUDA graph; `no_graph` says why not."""
        return not self.no_graph

    @property
    def stream_handle(self) -> int:
        """The CUstream on which everything happens."""
        return int(self._stream.handle)

    @property
    def device_logits(self) -> Any:
        """The logits' buffer on the device, which PyTorch and CuPy read without a copy."""
        pointer = int(self._device[self._names[1]])
        interface = {"shape": self.output_shape, "typestr": "<f4", "data": (pointer, False)}
        return types.SimpleNamespace(__cuda_array_interface__=interface | {"version": 3})

    def upload(self, images: np.ndarray) -> None:
        """Copy images from the host; asynchronous only if they are in pinned memory."""
        if (images.shape, images.dtype) != (self.input_shape, np.float32):
            raise ValueError(f"{images.dtype} {images.shape}: expected float32 {self.input_shape}")
        if not images.flags.c_contiguous:
            raise ValueError("expected images that are contiguous in memory")
        self._cuda.memcpy_htod_async(self._device[self._names[0]], images, self._stream)

    def copy_from_device(self, pointer: int, size: int) -> None:
        """Copy `size` bytes from elsewhere on the device: contiguous float32 `input_shape`."""
        wanted = self._host[self._names[0]].nbytes
        if size != wanted:
            raise ValueError(f"{size} bytes of images: expected {wanted}, {self.input_shape}")
        self._cuda.memcpy_dtod_async(self._device[self._names[0]], pointer, size, self._stream)

    def execute(self) -> None:
        """Run the engine on the images in its buffer: a graph launch, or an enqueue."""
        self._launch()

    def download(self) -> np.ndarray:
        """Start copying the logits; returns the pinned buffer they will be in."""
        logits = self._host[self._names[1]]
        self._cuda.memcpy_dtoh_async(logits, self._device[self._names[1]], self._stream)
        return logits

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits of float32 images, host to host, when they are ready."""
        pinned = self._host[self._names[0]]
        np.copyto(pinned, images)
        self.upload(pinned)
        self.execute()
        logits = self.download()
        self._stream.synchronize()
        return logits.copy()

    def close(self) -> None:
        """Finish the work and free everything, the context before the engine."""
        if self._stream is None:
            return
        with contextlib.suppress(self._cuda.Error):  # it would hide the error that closes this
            self._stream.synchronize()
        self._cleanup.close()
        self._context = self.opened = self._launch = self._stream = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_profile(engine: "trt.ICudaEngine", name: str, batch_size: int) -> int:
    """The index of the optimisation profile that covers a batch size."""
    shapes = [
        engine.get_tensor_profile_shape(name, i) for i in range(engine.num_optimization_profiles)
    ]
    ranges = [(int(low[0]), int(high[0])) for low, _, high in shapes]
    for index, (low, high) in enumerate(ranges):
        if low <= batch_size <= high:
            return index
    raise EngineError(f"batch size {batch_size} is outside the engine's profiles: {ranges}")


def check_cuda(result: tuple[Any, ...]) -> Any:
    """Unpack what cuda-bindings returns: (error, value…)."""
    error, *values = result
    if int(error) != 0:
        raise EngineError(f"CUDA: {error}")
    return values[0] if values else None
