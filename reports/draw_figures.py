"""Draw the figures of the reports from the CSV files in reports/data.

python -m reports.draw_figures
"""

import sys
from pathlib import Path

import pandas as pd

from reports import part2_figures, part3_figures
from utils.breakdown import GROUPS
from utils.figures import drawing

DATA = Path(__file__).parent / "data"
FIGURES = Path(__file__).parent / "figures"
BASELINE = "fp32"


def draw_part1(table: pd.DataFrame, machine: str) -> list[Path]:
    """Part 1's figures of one machine; `table` is its quantization.csv."""
    ok = table[table.status == "ok"]
    scored = ok[ok.top1_percent.notna() & (ok.candidate != BASELINE)]
    drawn = []
    for model, rows in ok.groupby("model", sort=False):
        if rows.batch_size.nunique() < 2:
            continue
        path = FIGURES / f"part1_{machine}_{str(model).replace('/', '_')}_speedup.png"
        draw_speedups(rows, path)
        drawn.append(path)
    if len(scored):
        path = FIGURES / f"part1_{machine}_tradeoff.png"
        draw_tradeoff(scored, path)
        drawn.append(path)
    return drawn


def draw_speedups(rows: pd.DataFrame, path: Path) -> None:
    """Speedup against batch size, a line per candidate; bars from the 10th to the 90th percentile.

    With several thread counts, the largest.
    """
    rows = rows[(rows.threads == rows.threads.max()) & (rows.candidate != BASELINE)]
    with drawing(path) as axes:
        for name, group in rows.sort_values("batch_size").groupby("candidate", sort=False):
            below = group.speedup - group.speedup_p10
            above = group.speedup_p90 - group.speedup
            spread = [below.clip(lower=0), above.clip(lower=0)]
            axes.errorbar(group.batch_size, group.speedup, spread, marker="o", label=name, lw=1)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(rows.batch_size.unique()), sorted(rows.batch_size.unique()))
        axes.set(xlabel="batch size", ylabel=f"speedup over {BASELINE}", ylim=(0, None))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_tradeoff(rows: pd.DataFrame, path: Path) -> None:
    """Change of top-1 with its 95 % interval against speedup, at the largest batch scored."""
    rows = rows[rows.batch_size == rows.accuracy_batch_size]
    rows = rows[rows.threads == rows.threads.max()]
    with drawing(path) as axes:
        for row in rows.to_dict("records"):
            place = (row["speedup"], row["top1_difference_points"])
            low = place[1] - row["top1_difference_low_points"]
            high = row["top1_difference_high_points"] - place[1]
            axes.errorbar(*place, [[low], [high]], marker="o")
            axes.annotate(row["candidate"], place, (4, 4), textcoords="offset points", fontsize=8)
        axes.axhline(0, color="grey", lw=0.8)
        axes.margins(x=0.15)
        axes.set(xlabel=f"speedup over {BASELINE}", ylabel="change of top-1, points")


def draw_breakdown(table: pd.DataFrame, name: str) -> list[Path]:
    """Milliseconds a call by group of operators, a bar per candidate; `table` is a breakdown.csv.

    Of several models, batch sizes and thread counts, the first.
    """
    setting = ["model", "batch_size", "threads"]
    rows = table[table.status == "ok"]
    rows = rows[(rows[setting] == rows[setting].iloc[:1].squeeze()).all(axis=1)]
    if rows.empty:
        return []
    ms = rows.pivot(index="candidate", columns="group", values="ms").fillna(0.0)
    ms = ms.loc[rows.candidate.unique()]
    left = 0 * ms.iloc[:, 0]
    path = FIGURES / f"part1_{name}.png"
    with drawing(path) as axes:
        for i, group in enumerate(GROUPS):
            if group in ms:
                axes.barh(ms.index, ms[group], left=left, color=f"C{i}", label=group)
                left += ms[group]
        axes.invert_yaxis()
        axes.set(xlabel="ms per call")
        axes.set_title("{}, batch size {}, {} threads".format(*rows[setting].iloc[0]), fontsize=10)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return [path]


def draw_gpu(path: Path) -> list[Path]:
    """Part 3's figures of one GPU; with its ceilings also the table of distances from them."""
    table, ceilings_path = pd.read_csv(path), path.with_stem(f"{path.stem}_ceilings")
    drawn = part3_figures.draw_part3(table, FIGURES)
    if ceilings_path.exists():
        ceilings = pd.read_csv(ceilings_path)
        roofline = part3_figures.roofline_rows(table, ceilings)
        roofline.to_csv(path.with_stem(f"{path.stem}_roofline"), index=False)
        drawn.append(FIGURES / "part3_roofline.png")
        part3_figures.draw_roofline(roofline, ceilings, drawn[-1])
    return drawn


def main() -> int:
    FIGURES.mkdir(exist_ok=True)
    for path in sorted(DATA.glob("part1_*.csv")):
        draw = draw_breakdown if path.stem.endswith("_breakdown") else draw_part1
        for figure in draw(pd.read_csv(path), path.stem.removeprefix("part1_")):
            print(figure)
    if (DATA / "part2_trials.csv").exists():
        part2_figures.write_tables(DATA)
        for figure in part2_figures.draw_part2(DATA, FIGURES / "part2"):
            print(figure)
    for figure in draw_gpu(DATA / "part3_h100.csv"):
        print(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
