"""Figures of Part 3, from its tensorrt.csv and ceilings.csv of one GPU."""

from pathlib import Path

import pandas as pd

from utils.figures import drawing

PRECISION_COLOURS = {"fp32": "tab:blue", "tf32": "tab:orange", "fp16": "tab:green"}
BYTES_PER_VALUE = 4  # images arrive in float32
ROOFLINE_COLUMNS = [
    *("model", "candidate", "batch_size", "latency_ms_median", "tflops", "flop_per_byte"),
    *("floor_ms", "floor_percent", "bound"),
]


def draw_part3(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Of each model: latency and throughput, and what a speedup is made of."""
    ok = table[table.status == "ok"]
    drawn = []
    for model in ok.model.unique():
        rows, stem = ok[ok.model == model], f"part3_{model.replace('/', '_')}"
        drawn += [folder / f"{stem}_latency.png", folder / f"{stem}_speedup.png"]
        draw_latency(rows, drawn[-2])
        draw_parts(speedup_parts(rows), drawn[-1])
    return drawn


def draw_latency(rows: pd.DataFrame, path: Path) -> None:
    """Latency and images per second against batch size, a line per candidate."""
    with drawing(path, columns=2, sharey=False) as (left, right):
        for name, group in rows.sort_values("batch_size", kind="stable").groupby(
            "candidate", sort=False
        ):
            style = "--" if name == "torch-fp32" else "-"
            left.plot(group.batch_size, group.latency_ms_median, style, marker=".", lw=1)
            right.plot(group.batch_size, group.images_per_s, style, marker=".", lw=1, label=name)
        sizes = sorted(rows.batch_size.unique())
        for axes, what in ((left, "latency, ms a batch"), (right, "images/s")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, sizes)
            axes.set(xlabel="batch size", ylabel=what)
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def speedup_parts(rows: pd.DataFrame) -> pd.DataFrame:
    """The fastest candidate's speedup over eager float32 at each batch size, as three factors.

    `launches`: float32 as a CUDA graph over float32 eager. `precision`: the CUDA graph of the
    fastest candidate's baseline over that of float32. `kernels`: the candidate over its baseline,
    which for 8 bits is half precision. Their product is the ratio of the median latencies.
    """
    parts = []
    rows = rows[rows.graph_baseline.notna()]
    for batch_size, group in rows.groupby("batch_size"):
        by_name = group.set_index("candidate")
        ms = by_name.latency_ms_median
        fastest = str(ms.idxmin())
        baseline = ms[by_name.graph_baseline[fastest]]
        parts.append(
            {
                "batch_size": batch_size,
                "candidate": fastest,
                "launches": ms["torch-fp32"] / ms["torch-fp32-graph"],
                "precision": ms["torch-fp32-graph"] / baseline,
                "kernels": baseline / ms[fastest],
            }
        )
    return pd.DataFrame(parts)


def draw_parts(parts: pd.DataFrame, path: Path) -> None:
    """Stacked on a logarithmic axis, where factors add up."""
    labels = {
        "launches": "no launches (CUDA graph)",
        "precision": "precision",
        "kernels": "better kernels (and 8 bits, if it has them)",
    }
    positions = range(len(parts))
    with drawing(path) as axes:
        bottom = pd.Series(1.0, index=parts.index)
        for column, label in labels.items():
            axes.bar(positions, bottom * parts[column] - bottom, 0.6, bottom, label=label)
            bottom = bottom * parts[column]
        for position, total in zip(positions, bottom, strict=True):
            axes.annotate(f"{total:.1f}", (position, total), ha="center", va="bottom")
        axes.set_yscale("log", base=2)
        axes.set_ylim(1, 1.25 * bottom.max())
        ticks = [2**n for n in range(10) if 2**n <= bottom.max()]
        axes.set_yticks(ticks, ticks)
        names = parts.batch_size.astype(str) + "\n" + parts.candidate
        axes.set_xticks(positions, names, fontsize=7)
        axes.set(xlabel="batch size, fastest candidate", ylabel="speedup over eager float32")
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(labels))


def rates(ceilings: pd.DataFrame) -> tuple["pd.Series[float]", float]:
    """TFLOP/s by precision, and GB/s of a copy."""
    by_name = ceilings.set_index("ceiling")
    return by_name.tflops.dropna(), float(by_name.gb_per_s["copy"])


def roofline_rows(rows: pd.DataFrame, ceilings: pd.DataFrame) -> pd.DataFrame:
    """ROOFLINE_COLUMNS of the rows in PRECISION_COLOURS: how far each call is from its floor.

    The floor is the longer of its arithmetic at the rate of a large matrix product, and of its
    least bytes (weights and images, each once) at the rate of a copy.
    """
    tflops, gb_per_s = rates(ceilings)
    rows = rows[(rows.status == "ok") & rows.precision.isin(PRECISION_COLOURS)]
    gflop = rows.gflop_per_image * rows.batch_size
    image_mb = rows.batch_size * 3 * rows.image_size**2 * BYTES_PER_VALUE / 1e6
    megabytes = rows.size_mb + image_mb
    arithmetic_ms, memory_ms = gflop / rows.precision.map(tflops), megabytes / gb_per_s
    floor_ms = pd.concat([arithmetic_ms, memory_ms], axis=1).max(axis=1)
    return rows.assign(
        tflops=gflop / rows.latency_ms_median,
        flop_per_byte=1e3 * gflop / megabytes,
        floor_ms=floor_ms,
        floor_percent=100 * floor_ms / rows.latency_ms_median,
        bound=(arithmetic_ms >= memory_ms).map({True: "arithmetic", False: "memory"}),
    )[ROOFLINE_COLUMNS]


def attainable_tflops(flop_per_byte: float, tflops: float, gb_per_s: float) -> float:
    """The roof at an intensity: what memory can feed, or the arithmetic's own rate."""
    return min(tflops, flop_per_byte * gb_per_s / 1e3)


def draw_roofline(rows: pd.DataFrame, ceilings: pd.DataFrame, path: Path) -> None:
    """Arithmetic rate against intensity, below the measured ceilings; compiled candidates."""
    tflops, gb_per_s = rates(ceilings)
    with drawing(path) as axes:
        for precision, colour in PRECISION_COLOURS.items():
            x = [10.0, 1e3 * tflops[precision] / gb_per_s, 1e5]
            roof = [attainable_tflops(value, tflops[precision], gb_per_s) for value in x]
            axes.plot(x, roof, color=colour, lw=1, label=precision)
            shown = rows[rows.candidate == f"torch-{precision}-compile"]
            for i, (model, group) in enumerate(shown.groupby("model", sort=False)):
                label, marker = (model if precision == "fp32" else None), "os^Dv"[i % 5]
                axes.scatter(
                    group.flop_per_byte,
                    group.tflops,
                    16,
                    colour,
                    marker=marker,
                    label=label,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlabel="operations per byte that must be moved", ylabel="TFLOP/s")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
