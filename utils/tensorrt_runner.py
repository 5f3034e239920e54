"""Run a TensorRT engine with pycuda: images in, logits out, as a CUDA graph; no PyTorch.

    with primary_context(), Runner(read_plan(Path("model.plan")), batch_size=8) as runner:
        logits = runner.infer(images)  # float32 [8, 3, H, W] -> [8, C], host to host

A plan is code: open only plans that you trust. TensorRT's objects must be gone before the CUDA
context that they live in: hold none outside `Runner`.
"""

import contextlib
import functools
import hashlib
import json
import traceback
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

PROFILED_RUNS = 10  # whose layer times are averaged


class EngineError(RuntimeError):
    """TensorRT refused; the text is its own messages."""


# --- libraries, context, messages -----------------------------------------------------------------


@contextlib.contextmanager
def primary_context() -> Iterator[Any]:
    """Make the first GPU's primary context current, PyTorch's own; yields the pycuda device.

    Raises:
        ImportError: TensorRT, pycuda or a GPU that CUDA can use is missing.
    """
    import pycuda.driver as cuda
    from tensorrt import Builder  # noqa: F401  # a folder of type stubs imports, but is empty

    try:
        cuda.init()
        device = cuda.Device(0)
        context = device.retain_primary_context()
    except cuda.Error as error:
        raise ImportError(f"CUDA finds no usable GPU: {error}") from error
    context.push()
    try:
        yield device
    except BaseException as error:
        release_frames(error)
        raise
    finally:
        context.detach()  # after pop() a destructor would end it as if it were not the primary one


def release_frames(error: BaseException | None) -> None:
    """Drop the local variables of a failure's frames: builders and engines among them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@functools.cache
def shared_logger() -> Any:
    """The process's one logger: it collects errors, because raising in it would lose them."""
    import tensorrt as trt

    class Logger(trt.ILogger):
        errors: ClassVar[list[str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(msg.split()))

    return Logger()


def take_errors() -> list[str]:
    """What the logger collected, which it then forgets; not the kernels that were only skipped."""
    errors = shared_logger().errors
    found = [error for error in dict.fromkeys(errors) if "skipping" not in error.lower()]
    errors.clear()
    return found


def refusal(what: str) -> Exception:
    """The exception that carries the first error that the logger collected, and the last."""
    errors = take_errors()
    text = "; ".join([what, *errors[:1], *errors[1:][-1:]])
    if "outofmemory" in "".join(errors).lower().replace(" ", ""):  # written in one word or in three
        return MemoryError(text)
    return EngineError(text)


def create(kind: Callable[[Any], Any]) -> Any:
    """A `trt.Builder` or `trt.Runtime` with the process's logger."""
    take_errors()  # of earlier work
    try:
        return kind(shared_logger())
    except TypeError as error:  # all that the binding says when CUDA does not start
        reason = "TensorRT cannot use this GPU: the driver may be older than its CUDA version"
        raise ImportError(reason) from error


# --- plans ----------------------------------------------------------------------------------------


def read_plan(path: Path) -> bytes:
    """A plan that is the one its card (`.json` beside it) tells of.

    TensorRT loads a plan with a flipped byte without a word.

    Raises:
        EngineError: the plan or its card is missing or damaged.
    """
    try:
        plan = path.read_bytes()
        digest = json.loads(path.with_suffix(".json").read_text())["sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError(f"{path} has no readable plan or card: {error}") from error
    if digest != hashlib.sha256(plan).hexdigest():
        raise EngineError(f"{path} is damaged: it is not the plan of its card")
    return plan


def load_engine(plan: bytes) -> Any:
    """Deserialise a plan.

    Raises:
        MemoryError: the GPU has too little memory for it.
        EngineError: it is damaged, or made by another TensorRT or for another GPU.
    """
    import tensorrt as trt

    engine = create(trt.Runtime).deserialize_cuda_engine(plan)
    if engine is None:
        raise refusal("TensorRT cannot load the engine")
    return engine


# --- running --------------------------------------------------------------------------------------


class Runner(contextlib.AbstractContextManager["Runner"]):
    """An engine at one batch size, with a stream, buffers and a CUDA graph of its own.

    Everything is allocated here, so that nothing is later. The methods only enqueue, but for
    `wait`, `infer` and `layers`; work of others that shares the buffers belongs on `stream_handle`.

    Attributes:
        execute: runs the engine on the images in its buffer: launches the CUDA graph, or enqueues.
        host_images: float32 `input_shape` in pinned memory, for `submit`.
        no_graph: why the engine is not replayed as a CUDA graph; empty if it is.
        memory_bytes: of the GPU, taken by the engine with its weights, scratch and buffers.
        stream_handle: the CUstream on which everything happens.
    """

    def __init__(self, plan: bytes, batch_size: int, cuda_graph: bool = True) -> None:
        import pycuda.driver as cuda

        self._cuda = cuda
        self._stream: Any = cuda.Stream()
        self.stream_handle = int(self._stream.handle)
        self._context: Any = None
        self._engine: Any = None
        self._cleanup = contextlib.ExitStack()
        self.execute: Any = self._enqueue
        free, _ = cuda.mem_get_info()
        try:
            self._engine = load_engine(plan)
            images, logits = self._open_context(batch_size)
            self._images, self.host_images = self._allocate(images, self.input_shape)
            self._logits, self._host_logits = self._allocate(logits, self.output_shape)
            self.upload(self.host_images)
            self.execute()  # the first run sets up what a capture cannot hold
            self._stream.synchronize()
            self.no_graph = self._capture() if cuda_graph else "it was not asked for"
        except BaseException as error:
            self.close()
            if isinstance(error, cuda.MemoryError):
                raise MemoryError(f"not enough GPU memory for the engine: {error}") from error
            raise
        self.memory_bytes = free - cuda.mem_get_info()[0]

    def _open_context(self, batch_size: int) -> tuple[str, str]:
        """Create the execution context, fix its profile and shapes; names of images and logits."""
        import tensorrt as trt

        engine, strategies = self._engine, trt.ExecutionContextAllocationStrategy
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if n not in inputs]
        kinds = {engine.get_tensor_dtype(n) for n in names}
        if len(inputs) != 1 or len(outputs) != 1 or kinds != {trt.float32}:
            raise EngineError(f"the engine has {names}: expected one float32 input and output")
        images, logits = *inputs, *outputs
        # Scratch memory of the chosen profile; by default it is that of the largest batch.
        self._context = engine.create_execution_context(strategies.ON_PROFILE_CHANGE)
        if self._context is None:
            raise refusal("TensorRT cannot make an execution context")
        profile = find_profile(engine, images, batch_size)
        chosen = self._context.set_optimization_profile_async(profile, self.stream_handle)
        self._stream.synchronize()
        usual = tuple(engine.get_tensor_profile_shape(images, profile)[1])
        self.input_shape = (batch_size, *usual[1:])
        shape = trt.Dims(list(self.input_shape))
        if not chosen or not self._context.set_input_shape(images, shape):
            raise refusal(f"TensorRT refuses the input shape {self.input_shape}")
        if missing := self._context.infer_shapes():
            raise refusal(f"TensorRT wants more shapes: {missing}")
        self.output_shape = tuple(self._context.get_tensor_shape(logits))
        return images, logits

    def _allocate(self, name: str, shape: tuple[int, ...]) -> tuple[Any, np.ndarray]:
        """A tensor's buffer on the device, and one of the same shape in pinned host memory."""
        host = self._cuda.pagelocked_empty(shape, np.float32)
        host.fill(0)
        self._cleanup.callback(host.base.free)
        device = self._cuda.mem_alloc(host.nbytes)
        self._cleanup.callback(device.free)
        if not self._context.set_tensor_address(name, int(device)):
            raise refusal(f"TensorRT refuses the buffer of {name}")
        return device, host

    def _capture(self) -> str:
        """Record one enqueue as a CUDA graph; returns why not, if that cannot be."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            return f"cuda-bindings is not usable: {error}"
        stream = driver.CUstream(self.stream_handle)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        (status,) = driver.cuStreamBeginCapture(stream, mode)
        if int(status) != 0:
            return str(driver.CUresult(status).name)
        enqueued = self._context.execute_async_v3(self.stream_handle)
        status, graph = driver.cuStreamEndCapture(stream)  # also after a failure: it ends the mode
        if not enqueued or int(status) != 0:  # a refused enqueue leaves an empty graph that runs
            if graph:
                driver.cuGraphDestroy(graph)
            return "; ".join(take_errors()) or driver.CUresult(status).name
        status, executable = driver.cuGraphInstantiate(graph, 0)
        check_cuda(driver.cuGraphDestroy(graph))
        if int(status) != 0:
            return str(driver.CUresult(status).name)
        self._cleanup.callback(driver.cuGraphExecDestroy, executable)
        self.execute = lambda: check_cuda(driver.cuGraphLaunch(executable, stream))
        return ""

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.stream_handle):
            raise refusal("TensorRT cannot run the engine")

    @property
    def device_logits(self) -> Any:
        """The logits' buffer on the device, which PyTorch and CuPy read without a copy."""
        data = int(self._logits), False
        interface = {"shape": self.output_shape, "typestr": "<f4", "data": data}
        return types.SimpleNamespace(__cuda_array_interface__=interface | {"version": 3})

    def upload(self, images: np.ndarray) -> None:
        """Copy images from the host; asynchronous only if they are in pinned memory."""
        self._check(images)
        if not images.flags.c_contiguous:
            raise ValueError("images are strided: expected float32 that is contiguous in memory")
        self._cuda.memcpy_htod_async(self._images, images, self._stream)

    def _check(self, images: np.ndarray) -> None:
        if (images.shape, images.dtype) != (self.input_shape, np.float32):
            found = f"{images.dtype} {images.shape}"
            raise ValueError(f"images are {found}: expected float32 {self.input_shape}")

    def copy_from_device(self, pointer: int, size: int) -> None:
        """Copy `size` bytes from elsewhere on the device: contiguous float32 `input_shape`."""
        wanted = self.host_images.nbytes
        if size != wanted:
            raise ValueError(f"{size} bytes of images: expected {wanted}, {self.input_shape}")
        self._cuda.memcpy_dtod_async(self._images, pointer, size, self._stream)

    def submit(self, images: np.ndarray) -> np.ndarray:
        """Upload images, execute, and copy the logits to the pinned buffer that it returns."""
        self.upload(images)
        self.execute()
        self._cuda.memcpy_dtoh_async(self._host_logits, self._logits, self._stream)
        return self._host_logits

    def wait(self) -> None:
        """Wait for all that was enqueued on the stream."""
        self._stream.synchronize()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits of float32 images `input_shape`, normalised, host to host, when they are ready."""
        self._check(images)  # a copy would broadcast and convert
        np.copyto(self.host_images, images)
        logits = self.submit(self.host_images)
        self.wait()
        return logits.copy()

    def layers(self) -> list[dict[str, Any]]:
        """What the inspector tells of each layer, and its time as "ms".

        Of an engine built with detailed verbosity. The inspector may have nothing to say; names and
        times remain.
        """
        import tensorrt as trt

        times: defaultdict[str, float] = defaultdict(float)

        class Profiler(trt.IProfiler):
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name] += ms / PROFILED_RUNS

        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        take_errors()  # an empty answer logs one
        described = json.loads(text)["Layers"] if text else []
        self._profiler = Profiler()  # the context calls it from now on and holds no reference
        self._context.profiler = self._profiler
        for _ in range(PROFILED_RUNS):
            self._enqueue()
            self._stream.synchronize()
        known = {layer["Name"]: layer for layer in described if isinstance(layer, dict)}
        names = dict.fromkeys([*known, *times])
        return [{"Name": n, **known.get(n, {}), "ms": times[n]} for n in names]

    def close(self) -> None:
        """Finish the work and free everything, the context before the engine."""
        if self._stream is None:
            return
        with contextlib.suppress(self._cuda.Error):  # it would hide the error that closes this
            self._stream.synchronize()
        with contextlib.suppress(self._cuda.Error):
            self._cleanup.close()
        self.execute = self._context = None
        self._engine = self._stream = None

    def __exit__(self, *_: object) -> None:
        self.close()


def find_profile(engine: Any, name: str, batch_size: int) -> int:
    """The index of the optimisation profile that covers a batch size.

    TensorRT may end the process on an index that is out of range.
    """
    ranges = []
    for index in range(engine.num_optimization_profiles):
        low, _, high = engine.get_tensor_profile_shape(name, index)
        ranges.append((int(low[0]), int(high[0])))
        if low[0] <= batch_size <= high[0]:
            return index
    raise EngineError(f"batch size {batch_size} is outside the engine's profiles: {ranges}")


def check_cuda(result: tuple[Any]) -> None:
    """Raise the error that a call of cuda-bindings returns, if it is one."""
    (error,) = result
    if int(error) != 0:
        raise EngineError(f"CUDA: {error.name}")
