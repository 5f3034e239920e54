"""Where a training step of Part 2 spends a GPU's time, and what its convolutions cost by shape.

    python -m reports.profile_step        # writes step_profile.csv and convolutions.csv

The pixels are random: which kernels run does not depend on what is in them, and for how long hardly
(through the power that the arithmetic draws). A convolution that is repeated finds part of its
operands in the cache, so that small ones look a little better than they are in a network.
"""

import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import part2_tune as part2
from utils import cli, data, results, timing
from utils.training import memory_format, prepare_backend

PROFILE_COLUMNS = (
    *("gpu", "configuration", "batch_size", "image_size"),
    *("group", "kernels", "ms", "share_percent", "step_ms", "step_tflops"),
)
CONVOLUTION_COLUMNS = (
    *("gpu", "batch_size", "channels", "image_size", "gflop"),
    *("forward_ms", "input_gradient_ms", "weight_gradient_ms", "tflops"),
)
# (preset, batch size, image size) of a step
STEPS = (
    *(("default", 512, 32), ("default", 1024, 32), ("deep", 512, 32)),
    *(("fast", 512, 32), ("fast", 512, 24), ("sprint", 1024, 32), ("sprint", 1024, 24)),
)
QUICK_STEPS = (("default", 8, 16), ("sprint", 8, 16))
# (channels, image size) of 3x3 convolutions: widths that one may want to give each stage
CONVOLUTIONS = (
    *((width, 32) for width in (32, 48, 64, 72, 96, 128)),
    *((width, 16) for width in (64, 128, 144, 160, 192, 256)),
    *((width, 8) for width in (128, 256, 288, 320, 384)),
)
CONVOLUTION_BATCH = 512
NUM_IMAGES, NUM_CLASSES = 50_000, 100
CALLS = 30  # steps of a run; one run warms up, one is timed, one is profiled
REPEATS = 10  # of a convolution in one CUDA graph: single ones are shorter than their launch
REPLAYS = 20  # of such a graph that are timed
WARM_UP_SECONDS = 0.3  # until the clocks are up
FUSED = "fused elementwise, normalisation"
# The first group one of whose words is part of a kernel's name; a library's helpers go with it.
GROUPS = {
    FUSED: "triton_",
    "convolution": "conv fprop dgrad wgrad nhwc cudnn",
    "matrix product": "gemm nvjet cutlass splitk",
    "optimiser, elementwise": "multi_tensor",
    "copies": "memcpy memset",
}


def group_of(kernel: str) -> str:
    """Group of a kernel, by its name."""
    name = kernel.lower()
    for group, words in GROUPS.items():
        if any(word in name for word in words.split()):
            return group
    return "other"


@functools.cache  # several presets see images of one size
def random_task(num_images: int, size: int, device: torch.device) -> part2.Task:
    """Images of noise with as many classes as CIFAR-100."""
    pixels = torch.randint(0, 256, (num_images, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(num_images) % NUM_CLASSES
    classes = tuple(str(n) for n in range(NUM_CLASSES))
    return part2.make_task(data.ImageSet("noise", "train", pixels, labels, classes), True, device)


def profile_step(
    hparams: part2.HParams, task: part2.Task, compiled: bool, calls: int
) -> list[dict[str, Any]]:
    """Milliseconds of one training step by group of kernels: rows of PROFILE_COLUMNS."""
    network = part2.start_network(hparams, NUM_CLASSES, task.device, seed=0)
    optimizers = part2.make_optimizers(network, hparams)
    if compiled:
        torch.compiler.reset()
    mirrored = torch.zeros(len(task.images), dtype=torch.bool, device=task.device)
    step = part2.make_step(network, optimizers, hparams, task, mirrored, compiled)
    batch = torch.randperm(len(task.images), device=task.device)[: hparams.batch_size]

    def run() -> float:
        return timing.time_block(step, [batch], calls, task.device).wall_ms / calls

    run()
    step_ms, on_gpu = run(), task.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        run()
    kernels: defaultdict[str, float] = defaultdict(float)
    ms: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent:
            kernels[group_of(event.key)] += event.count / calls
            ms[group_of(event.key)] += spent / 1e3 / calls
    about = {
        "batch_size": hparams.batch_size,
        "image_size": task.size,
        "step_ms": step_ms,
        "step_tflops": hparams.batch_size * training_gflop(network, task) / step_ms,
    }
    return [
        {"group": group, "kernels": kernels[group], "ms": spent}
        | {"share_percent": 100 * spent / sum(ms.values())}
        | about
        for group, spent in sorted(ms.items(), key=lambda item: -item[1])
    ]


def training_gflop(network: part2.SmallCNN, task: part2.Task) -> float:
    """Billions of multiplications and additions that the network does to learn from one image.

    The forward pass and the gradients that are needed: none for what is not trained, none of the
    images.
    """
    example = torch.zeros(2, 3, task.size, task.size, device=task.device)
    network.train()
    with FlopCounterMode(display=False) as counter:
        network(example).sum().backward()
    network.zero_grad()
    return counter.get_total_flops() / len(example) / 1e9


def measure_convolution(
    channels: int, size: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """A 3x3 convolution in bf16 and its two gradients, each by itself: CONVOLUTION_COLUMNS."""
    layout = memory_format(device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().to(memory_format=layout)

    x, kernel = random(batch_size, channels, size, size), random(channels, channels, 3, 3)
    gradient = random(*x.shape)
    arguments = (gradient, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    backward = functools.partial(torch.ops.aten.convolution_backward, *arguments)
    gflop = 2 * 9 * channels**2 * batch_size * size**2 / 1e9
    row = {
        "forward_ms": replay_ms(lambda: F.conv2d(x, kernel, padding=1), device),
        "input_gradient_ms": replay_ms(lambda: backward([True, False, False])[0], device),
        "weight_gradient_ms": replay_ms(lambda: backward([False, True, False])[1], device),
    }
    about = {"batch_size": batch_size, "channels": channels, "image_size": size, "gflop": gflop}
    return about | row | {"tflops": 3 * gflop / sum(row.values())}


def replay_ms(call: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of a call; on a GPU the median over replays of a CUDA graph of REPEATS calls."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return timing.time_block(lambda _: call(), [None], 1, device).wall_ms
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            output = call()

    def replay(_: None) -> Tensor:
        graph.replay()
        return output

    clock = time.perf_counter()
    while time.perf_counter() - clock < WARM_UP_SECONDS:
        timing.time_block(replay, [None], 1, device)
    block = timing.time_block(replay, [None], REPLAYS, device)
    return statistics.median(block.latencies_ms) / REPEATS


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Profile the presets' steps and measure convolutions."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--quick", action="store_true", help="a few small shapes, to try it out")
    add("--output-dir", type=Path, default=Path("results/part2"), help="folder for the tables")
    args = parser.parse_args(argv)
    device, folder = cli.pick_device(args.device), cli.make_output_dir(args.output_dir)
    prepare_backend(device)
    quick = args.quick
    images, calls, batch = (200, 2, 8) if quick else (NUM_IMAGES, CALLS, CONVOLUTION_BATCH)
    about = {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    convolutions = []
    for channels, size in CONVOLUTIONS[:1] if quick else CONVOLUTIONS:
        convolutions.append(about | measure_convolution(channels, size, batch, device))
        results.write_csv(folder / "convolutions.csv", convolutions, CONVOLUTION_COLUMNS)
    profile = []
    for name, batch_size, size in QUICK_STEPS if quick else STEPS:
        preset = part2.PRESETS[name]
        width = 8 if quick else preset.width
        hparams = replace(preset, batch_size=batch_size, width=width)
        task = random_task(images, size, device)
        rows = profile_step(hparams, task, device.type == "cuda", calls)
        profile += [about | {"configuration": name} | row for row in rows]
        results.write_csv(folder / "step_profile.csv", profile, PROFILE_COLUMNS)
    results.write_json(folder / "profile_environment.json", results.environment())
    shown = {"configuration": "s", "batch_size": "d", "image_size": "d", "group": "s"}
    shown |= {"kernels": ".0f", "ms": ".3f", "share_percent": ".1f", "step_ms": ".3f"}
    results.print_table(profile, shown)
    print(folder / "step_profile.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
