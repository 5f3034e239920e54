"""The pictures of a run. Each script draws its own at its end, from the rows of its CSV.

They can be drawn again from those files; the reports' figures are drawn like this, too:

    python -m utils.figures --input results --output figures
    python -m utils.figures --input reports/data/part3_h200.csv --output figures

A candidate has the same colour in every picture: that of its precision.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils import cli, results

Rows = Iterable[Mapping[Any, Any]]

# By the first of these that a candidate's name holds; float32 is grey.
COLOURS = {"fp8": "C4", "int8": "C3", "fp16": "C0", "bf16": "C9", "tf32": "C2", "": "dimgrey"}
MARKERS = "osD^vPX*<>"  # by batch size
PANELS = {  # of a run: the column, what it is, and the value that means no change
    "speedup": ("speedup over {}", 1),
    "speedup_over_graph": ("speedup over PyTorch's CUDA graph", 1),
    "top1_difference_points": ("change of top-1, points", 0),
}
LOWEST_SHOWN = 0.2  # quantile of the trials' accuracies; those below lie on the picture's edge
UNKNOWN = {"gpu": "unknown GPU", "cpu": "unknown CPU", "cpu_cores": "?"}


def draw_run(rows: Rows, path: Path, environment: Mapping[str, Any]) -> bool:
    """Draw the candidates of a run of Part 1 or 3, the fastest on top; False if none ran.

    Panels, as far as there are values: the speedup over the baseline at each batch size with its
    10th to 90th percentile over rounds, the same over PyTorch's CUDA graph, and the change of top-1
    with its 95 % interval. Of several thread counts the largest is drawn.

    Args:
        rows: of one model, with the columns of the script's CSV; the baseline comes first.
        environment: of `results.environment`; the picture names its GPU or its CPU.
    """
    table = _ok(rows)
    if table.empty:
        return False
    cpu = f"{environment['cpu']}, {environment['cpu_cores']} cores"
    machine = environment["gpu"] if table.device.iloc[0] == "cuda" else cpu
    table = table[table.threads == table.threads.max()]
    panels = [name for name in PANELS if name in table and table[name].notna().any()]
    sizes = sorted(table.batch_size.unique())
    last = table.sort_values("batch_size").drop_duplicates("candidate", keep="last")
    last = last.sort_values("speedup")
    names = list(last.candidate)
    size = (3 + 3.3 * len(panels), 1.6 + len(names) * (0.12 + 0.1 * len(sizes)))
    where = f"{machine}, {table.threads.iloc[0]} threads; ms a call at batch size {sizes[-1]}"
    with _drawing(path, size, _finding(table), where, len(panels)) as all_axes:
        for axes, name in zip(all_axes, panels, strict=True):
            _draw_candidates(axes, table, name, names, sizes)
            axes.set_xlabel(PANELS[name][0].format(table.candidate.iloc[0]))
        ms = last.latency_ms_median.where(last.batch_size == sizes[-1])
        labels = []
        for name, x in zip(names, ms, strict=True):
            number = f"{x:.3g}" if x < 1000 else f"{x:,.0f}"
            labels.append(name if x != x else f"{name}  {number} ms")
        all_axes[0].set_yticks(range(len(names)), labels)
        all_axes[0].set_ylim(-0.6, len(names) - 0.4)
        for batch, marker in zip(sizes, MARKERS, strict=False):
            all_axes[0].plot([], [], marker, color="grey", label=f"batch size {batch}")
        columns = int(size[0] / 1.6)
        all_axes[0].figure.legend(loc="outside lower left", ncols=columns, frameon=False)
    return True


def _finding(table: pd.DataFrame) -> str:
    """Who is fastest by the geometric mean over all batch sizes, and its worst and best of them.

    Over PyTorch's CUDA graph where that was measured: eager calls wait for their launches.
    """
    logarithms = np.log(table.speedup).groupby(table.candidate)
    fastest = logarithms.mean()[logarithms.size() == table.batch_size.nunique()].idxmax()
    rows = table[table.candidate == fastest]
    speedups, baseline = rows.speedup, table.candidate.iloc[0]
    is_graph = fastest.endswith("-graph")
    if "speedup_over_graph" in table and rows.speedup_over_graph.notna().all() and not is_graph:
        speedups, baseline = rows.speedup_over_graph, "PyTorch's CUDA graph"
    model, times, sizes = table.model.iloc[0], _span(speedups, ".1f"), _span(rows.batch_size, "d")
    return f"{model}: {fastest} is {times} times as fast as {baseline}, batch size {sizes}"


def _span(values: pd.Series, spec: str) -> str:
    least, most = format(values.min(), spec), format(values.max(), spec)
    return least if least == most else f"{least} to {most}"


def _draw_candidates(
    axes: Any, table: pd.DataFrame, column: str, names: list[str], sizes: list[int]
) -> None:
    """One panel: a marker with its spread for each row that has a value, batch size below size.

    Accuracy does not depend on the batch size: it is drawn where it was measured, in the middle.
    """
    is_accuracy = column.startswith("top1")
    low, high = f"{column}_p10", f"{column}_p90"
    if is_accuracy:
        low, high = "top1_difference_low_points", "top1_difference_high_points"
        table = table[table.batch_size == table.accuracy_batch_size]
    for row in table[table[column].notna()].to_dict("records"):
        index = sizes.index(row["batch_size"])
        middle = 0.0 if is_accuracy else 0.7 * (0.5 - (index + 0.5) / len(sizes))
        y = names.index(row["candidate"]) + middle
        colour = next(colour for key, colour in COLOURS.items() if key in row["candidate"])
        axes.plot([row[low], row[high]], [y, y], color=colour, lw=1)
        axes.plot(row[column], y, MARKERS[index % len(MARKERS)], color=colour, markersize=4)
    axes.axvline(PANELS[column][1], color="grey", lw=0.8)
    axes.grid(axis="y", lw=0.3)


def draw_study(rows: Rows, path: Path) -> bool:
    """Draw the trials of one or several studies and each one's best so far; False if none is ok.

    Args:
        rows: with columns `study`, `trial` (0 is the default configuration), `status`, `device`
            (its name) and `held_out_top1_percent`.
    """
    table = _ok(rows).sort_values("trial")
    if table.empty:
        return False
    best = table.groupby("study", sort=False).held_out_top1_percent.max()
    title = "Best trial: " + ", ".join(f"{study} {top1:.2f} %" for study, top1 in best.items())
    floor = float(table.held_out_top1_percent.quantile(LOWEST_SHOWN))
    device = table.device.iloc[0]
    where = f"{device}; dots are trials, lines the best so far; what is below {floor:.1f} % is cut"
    with _drawing(path, (8, 4.5), title, where) as (axes,):
        for i, (study, trials) in enumerate(table.groupby("study", sort=False)):
            top1, colour = trials.held_out_top1_percent.clip(lower=floor), f"C{i}"
            axes.scatter(trials.trial, top1, s=10, color=colour, alpha=0.6)
            axes.step(trials.trial, top1.cummax(), where="post", color=colour, label=study)
        default = table.held_out_top1_percent[table.trial == 0].clip(lower=floor)
        if len(default):
            axes.axhline(default.mean(), color="grey", lw=0.8, ls="--", label="default")
        axes.set(xlabel="trial", ylabel="held-out top-1, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.figure.legend(loc="outside lower left", ncols=5, frameon=False)
    return True


def draw_final(rows: Rows, path: Path) -> bool:
    """Draw the test accuracy of every final training, with each configuration's mean.

    Its 95 % interval is Student's over seeds: it speaks of other seeds, not of other images. False
    if no training is ok.

    Args:
        rows: with columns `study`, `configuration`, `status`, `device` (its name), `top1_percent`
            and `train_seconds`.
    """
    from scipy import stats

    table = _ok(rows)
    if table.empty:
        return False
    if table.study.nunique() > 1:
        table = table.assign(configuration=table.study + ", " + table.configuration)
    by_configuration = table.groupby("configuration", sort=False).top1_percent
    groups = {str(name): top1 for name, top1 in by_configuration}
    title = ", ".join(f"{name} {top1.mean():.2f} %" for name, top1 in groups.items())
    device, seconds = table.device.iloc[0], table.train_seconds.mean()
    where = f"{device}; {seconds:.0f} s a training; bar: 95 % interval of the mean over seeds"
    with _drawing(path, (8, 1.5 + 0.5 * len(groups)), f"Test top-1: {title}", where) as (axes,):
        for i, top1 in enumerate(groups.values()):
            axes.scatter(top1, [i] * len(top1), s=14, color=f"C{i}")
            half = stats.t.ppf(0.975, len(top1) - 1) * top1.sem() if len(top1) > 2 else 0
            axes.errorbar(top1.mean(), i + 0.25, xerr=half, fmt="|", color="black")
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set(xlabel="test top-1, %", ylim=(len(groups) - 0.5, -0.5))
    return True


def _ok(rows: Rows) -> pd.DataFrame:
    table = pd.DataFrame(list(rows))
    return table[table.status == "ok"]


@contextlib.contextmanager
def _drawing(
    path: Path, size: tuple[float, float], title: str, subtitle: str, panels: int = 1
) -> Iterator[Sequence[Any]]:
    """Matplotlib's axes side by side in a figure of at least `size` inches; saved at the end."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    size = (max(size[0], 0.085 * len(title), 0.065 * len(subtitle)), size[1])
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=10, weight="bold")
    figure.text(0.01, 1 - 0.4 / size[1], subtitle, fontsize=8, color="dimgrey", va="center")
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    yield all_axes
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    results.replace_file(path, image.getvalue())


def redraw(path: Path, output: Path, name: str) -> list[Path]:
    """Draw the picture of a CSV as `<output>/<name>.png`, of several models one for each.

    The columns tell what the CSV holds. None for tables of other things.
    """
    table = pd.read_csv(path)
    columns, pictures = set(table), {name: table}
    draw: Callable[..., bool]
    if {"candidate", "speedup", "device"} <= columns:
        draw = draw_run
        if table.model.nunique() > 1:
            models = table.groupby(table.model.str.replace("/", "-"), sort=False)
            pictures = {f"{name}-{model}": rows for model, rows in models}
    elif {"configuration", "device", "top1_percent"} <= columns:
        draw = draw_final
    elif {"trial", "device"} <= columns and not name.endswith("finalists"):
        draw = draw_study
    else:
        return []
    drawn = []
    for picture, rows in pictures.items():
        file = output / f"{picture}.png"
        environment = [_environment_of(path, rows)] if draw is draw_run else []
        if draw(rows.to_dict("records"), file, *environment):
            drawn.append(file)
    return drawn


def _environment_of(path: Path, rows: pd.DataFrame) -> Mapping[str, Any]:
    """The environment.json beside a CSV; the reports' may have one for each model."""
    for name in (f"{path.stem}_environment.json", "environment.json"):
        with contextlib.suppress(FileNotFoundError):
            content = json.loads((path.parent / name).read_text())
            return content if "gpu" in content else content.get(rows.model.iloc[0], UNKNOWN)
    return UNKNOWN


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures of result files again."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help="CSV files, or folders of results")
    add("--output", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args(argv)
    output = cli.make_output_dir(args.output, "--output")
    drawn = []
    for path in args.input:
        if not path.exists():
            raise cli.UserError(f"--input {path} does not exist")
        folder, files = (path, path.rglob("*.csv")) if path.is_dir() else (path.parent, [path])
        for file in sorted(files):
            drawn += redraw(file, output, "-".join(file.relative_to(folder).with_suffix("").parts))
    if not drawn:
        raise cli.UserError("--input holds no CSV of a run with anything to draw")
    print("\n".join(map(str, drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
