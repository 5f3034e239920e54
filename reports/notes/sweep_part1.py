"""Part 1's CPU candidates over thirty networks with random weights, batch 1: what each row holds.

    python -m reports.notes.sweep_part1 --output results/sweep_part1.csv

A network at a time, a candidate at a time; a second call goes on where the first one stopped.
Cosine and agreement compare a candidate with fp32 on the same images. Milliseconds are those of a
warmed-up call and no measurement of speed.
"""

import argparse
import csv
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import part1_quantize
from utils import benchmark, cli, data, evaluation, results, timing
from utils.models import ModelSource, load_model
from utils.workers import Worker, recorded

NETWORKS = [
    "timm/resnet18",
    "timm/resnet50",
    "timm/resnext50_32x4d",
    "timm/densenet121",
    "timm/vgg11_bn",
    "timm/mobilenetv3_small_100",
    "timm/mobilenetv2_100",
    "timm/efficientnet_lite0",
    "timm/efficientnet_b0",
    "timm/regnety_004",
    "timm/convnext_atto",
    "timm/convnextv2_atto",
    "timm/inception_v3",
    "timm/vit_tiny_patch16_224",
    "timm/deit_tiny_patch16_224",
    "timm/deit3_small_patch16_224",
    "timm/vit_small_patch14_dinov2",
    "timm/beit_base_patch16_224",
    "timm/eva02_tiny_patch14_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/swinv2_tiny_window8_256",
    "timm/xcit_tiny_12_p16_224",
    "timm/cait_xxs24_224",
    "timm/levit_128s",
    "timm/coat_tiny",
    "timm/maxvit_tiny_tf_224",
    "timm/mixer_s16_224",
    "timm/mvitv2_tiny",
    "timm/hiera_tiny_224",
    "timm/vit_base_patch16_siglip_224",
]
COLUMNS = (
    "model",
    "candidate",
    "status",
    "reason",
    *benchmark.SHARE_COLUMNS,
    "logit_cosine",
    "agreement_percent",
    "latency_ms",
    "build_seconds",
)


def try_candidate(job: benchmark.Job, cost: benchmark.Cost, images: Any) -> dict[str, Any]:
    """Build one candidate in a process of its own: its row, with its logits."""
    row: dict[str, Any] = {"candidate": job.candidate, "status": "ok"}
    with recorded(row), Worker() as worker:
        row |= worker.run(benchmark.open_candidate, job, cost)
        row["logits"] = torch.from_numpy(worker.run(benchmark.predict_logits, images))
        worker.run(benchmark.load_inputs, images)
        row["latency_ms"] = timing.warm_up(functools.partial(worker.run, benchmark.time_calls))
    return row


def sweep(network: str, dataset: str, data_dir: Path | None, threads: int) -> list[dict[str, Any]]:
    """The rows of one network."""
    source = ModelSource(network, untrained=True)
    model = load_model(source)
    preprocessing, cost = model.preprocessing, benchmark.count_cost(model)
    load = functools.partial(data.load_images, dataset, data_dir=data_dir, num_images=64)
    size = preprocessing.input_size
    images = load(split=data.ACCURACY_SPLIT[dataset], image_size=size).images.numpy()
    training = load(split="train", image_size=size).images.numpy()
    rows: list[dict[str, Any]] = []
    baseline: torch.Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, (build, devices) in part1_quantize.CANDIDATES.items():
            if "cpu" not in devices:
                continue
            job = part1_quantize.CalibratedJob(
                candidate=name,
                build=build,
                source=source,
                device="cpu",
                threads=threads,
                folder=Path(folder),
                images=training,
                preprocessing=preprocessing,
            )
            row = try_candidate(job, cost, images)
            logits = row.pop("logits", None)
            if logits is not None:
                baseline = logits if baseline is None else baseline
                scores = evaluation.accuracy_row(logits, baseline, None, None)
                row |= {name: scores[name] for name in ("logit_cosine", "agreement_percent")}
            outcome = row.get("reason") or f"cosine {row['logit_cosine']:.5f}"
            print(f"{network:36}{name:22}{row['status']:12}{outcome}", flush=True)
            rows.append({name: value for name, value in row.items() if name in COLUMNS})
    return [{"model": network, **row} for row in rows]


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Complete the CSV, network by network."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write or complete")
    parser.add_argument("--networks", type=cli.name_list, default=NETWORKS, help="as --model")
    parser.add_argument("--dataset", default="tiny-imagenet", help="whose images are compared on")
    parser.add_argument("--data-dir", type=Path, help="its folder")
    parser.add_argument("--threads", type=cli.positive_int, default=1, help="CPU threads")
    args: argparse.Namespace = parser.parse_args(argv)
    cli.make_output_dir(args.output.parent, "--output")
    rows: list[dict[str, Any]] = []
    if args.output.is_file():
        rows += csv.DictReader(args.output.read_text().splitlines())
    for network in args.networks:
        if network not in {row["model"] for row in rows}:
            rows += sweep(network, args.dataset, args.data_dir, args.threads)
            results.write_csv(args.output, rows, COLUMNS)
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
