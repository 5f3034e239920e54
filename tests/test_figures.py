"""What the pictures of a run show, on tables small enough to check by hand."""

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils import figures

MACHINE = "NVIDIA H200"
ENVIRONMENT = {"gpu": MACHINE, "cpu": "Intel(R) Xeon(R) Platinum 8480+", "cpu_cores": 56}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Matplotlib's figures, in the order in which they were saved."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        kept.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def measured(candidate: str, batch_size: int, speedup: float, **more: Any) -> dict[str, Any]:
    row = {"model": "vit", "candidate": candidate, "status": "ok", "threads": 2, "device": "cuda"}
    spread = {"speedup": speedup, "speedup_p10": 0.9 * speedup, "speedup_p90": 1.1 * speedup}
    row |= {"batch_size": batch_size, "latency_ms_median": 12.0 / speedup, **spread}
    return row | {"top1_difference_points": None, "accuracy_batch_size": 8} | more


def scored(points: float) -> dict[str, float]:
    low, high = "top1_difference_low_points", "top1_difference_high_points"
    return {"top1_difference_points": points, low: points - 0.5, high: points + 0.25}


RUN = [
    measured("fp32", 1, 1.0),
    measured("fp32", 8, 1.0),
    measured("int8", 1, 5.0, **scored(-0.25)),
    measured("int8", 8, 2.0, **scored(-0.25)),
    measured("bf16", 1, 3.0, **scored(0.125)),
    measured("bf16", 8, 3.0, **scored(0.125)),
    measured("bf16-compile", 1, 9.0),  # it did not run at the other batch size
    measured("int8", 1, 99.0, threads=1),
    {"model": "vit", "candidate": "tf32", "status": "unavailable", "threads": 2, "batch_size": 1},
]


def labels_of(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def markers_of(figure: Figure, panel: int) -> set[tuple[float, float]]:
    """Where the panel's markers are."""
    lines = figure.axes[panel].get_lines()
    points = [np.asarray(line.get_xydata()) for line in lines if line.get_marker() != "None"]
    return {(xy[0][0], round(xy[0][1], 3)) for xy in points if len(xy)}


def texts_of(figure: Figure) -> list[str]:
    """The title and the line below it."""
    return [text.get_text().strip() for text in figure.texts]


def test_a_run_has_its_candidates_in_order_of_speed(tmp_path: Path, saved: list[Figure]):
    assert figures.draw_run(RUN, tmp_path / "run.png", ENVIRONMENT)
    (figure,) = saved
    assert labels_of(figure) == ["fp32  12 ms", "int8  6 ms", "bf16  4 ms", "bf16-compile"]
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "speedup over fp32",
        "change of top-1, points",
    ]
    up, down = 0.175, -0.175  # the small batch lies above the large one
    speedups = {(1, up), (1, down), (5, 1 + up), (2, 1 + down), (3, 2 + up), (3, 2 + down)}
    assert markers_of(figure, 0) == speedups | {(9, 3 + up)}
    assert markers_of(figure, 1) == {(-0.25, 1), (0.125, 2)}
    title, subtitle = texts_of(figure)
    assert title == "vit: int8 is 2.0 to 5.0 times as fast as fp32, batch size 1 to 8"
    assert subtitle == "NVIDIA H200, 2 threads; ms a call at batch size 8"


def test_a_run_on_a_gpu_also_has_its_speedup_over_cuda_graphs(tmp_path: Path, saved: list[Figure]):
    over = {"speedup_over_graph": 1.5, "speedup_over_graph_p10": 1, "speedup_over_graph_p90": 2}
    slow = {"latency_ms_median": 1234.5}
    rows = [measured("torch-fp32", 1, 1.0, **slow), measured("tensorrt-fp16", 1, 6.0, **over)]
    assert figures.draw_run(rows, tmp_path / "run.png", ENVIRONMENT)
    assert labels_of(saved[0]) == ["torch-fp32  1,234 ms", "tensorrt-fp16  2 ms"]
    assert markers_of(saved[0], 1) == {(1.5, 1)}
    title = "vit: tensorrt-fp16 is 1.5 times as fast as PyTorch's CUDA graph, batch size 1"
    assert texts_of(saved[0])[0] == title


def test_a_precision_has_one_colour(tmp_path: Path, saved: list[Figure]):
    figures.draw_run(RUN, tmp_path / "run.png", ENVIRONMENT)
    figures.draw_run([*RUN[:2], measured("onnx-int8", 1, 2.0)], tmp_path / "other.png", ENVIRONMENT)
    lines = [figure.axes[0].get_lines() for figure in saved]
    colours = [{line.get_color() for line in own if line.get_marker() != "None"} for own in lines]
    assert colours == [{"dimgrey", "C3", "C9", "grey"}, {"dimgrey", "C3", "grey"}]


def test_no_labels_overlap_in_the_longest_run(tmp_path: Path, saved: list[Figure]):
    sizes = (1, 8, 32, 128, 256)
    names = [f"int8-torchao-bf16-{i:02}" for i in range(18)]
    about = {"model": "timm/vit_base_patch16_siglip_224", "device": "cpu"}
    rows = [measured(name, b, 1.0 + i, **about) for i, name in enumerate(names) for b in sizes]
    figures.draw_run(rows, tmp_path / "run.png", ENVIRONMENT)
    figure = saved[0]
    assert texts_of(figure)[1].startswith("Intel(R) Xeon(R) Platinum 8480+, 56 cores, 2 threads;")
    FigureCanvasAgg(figure).draw()
    for texts in (figure.axes[0].get_yticklabels(), figure.legends[0].get_texts()):
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) in (len(names), len(sizes))
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)


def trial(study: str, number: int, top1: float, status: str = "ok") -> dict[str, Any]:
    about = {"study": study, "trial": number, "status": status, "device": MACHINE}
    return about | {"held_out_top1_percent": top1}


def test_a_study_shows_the_best_so_far(tmp_path: Path, saved: list[Figure]):
    rows = [trial("gp", i, top1) for i, top1 in enumerate((70.0, 71.0, 60.0, 73.0))]
    rows += [trial("random", 0, 70.0), trial("random", 1, 69.0), trial("random", 2, 99, "failed")]
    assert figures.draw_study(rows, tmp_path / "trials.png")
    lines = saved[0].axes[0].get_lines()
    heights = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in lines}
    assert heights == {"gp": [70, 71, 71, 73], "random": [70, 70], "default": [70, 70]}
    title, subtitle = texts_of(saved[0])
    assert title == "Best trial: gp 73.00 %, random 70.00 %"
    assert "what is below 69.0 % is cut" in subtitle


def final(configuration: str, top1: float, study: str = "gp", status: str = "ok") -> dict[str, Any]:
    about = {"study": study, "configuration": configuration, "status": status, "device": MACHINE}
    return about | {"top1_percent": top1, "train_seconds": 60.2}


def test_final_trainings_have_their_mean_and_interval(tmp_path: Path, saved: list[Figure]):
    rows = [final("default", top1) for top1 in (80.0, 81.0, 82.0)]
    rows += [final("best", 83.0), final("best", 99.0, status="failed")]
    assert figures.draw_final(rows, tmp_path / "final.png")
    axes = saved[0].axes[0]
    assert labels_of(saved[0]) == ["default", "best"]
    title, subtitle = texts_of(saved[0])
    assert title == "Test top-1: default 81.00 %, best 83.00 %"
    assert subtitle.startswith("NVIDIA H200; 60 s a training;")
    (low, high), *_ = (
        (segment[0][0], segment[1][0])
        for bars in axes.containers
        for segment in bars[2][0].get_segments()
    )
    assert (low, high) == pytest.approx((81 - 2.484, 81 + 2.484), abs=1e-3)  # 4.303 / sqrt(3)


def test_finals_of_several_studies_are_told_apart(tmp_path: Path, saved: list[Figure]):
    figures.draw_final([final("best", 80.0), final("best", 81.0, "random")], tmp_path / "f")
    assert labels_of(saved[0]) == ["gp, best", "random, best"]


@pytest.mark.parametrize(
    ("draw", "row"),
    [
        (functools.partial(figures.draw_run, environment=ENVIRONMENT), RUN[-1]),
        (figures.draw_study, trial("gp", 0, 1.0, "failed")),
        (figures.draw_final, final("best", 1.0, status="failed")),
    ],
)
def test_where_nothing_is_ok_nothing_is_drawn(tmp_path: Path, draw: Any, row: dict[str, Any]):
    assert not draw([row], tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


# --- drawn again from files -----------------------------------------------------------------------


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_csv(path, index=False)


def test_every_kind_of_table_is_drawn(
    tmp_path: Path, saved: list[Figure], capsys: pytest.CaptureFixture[str]
):
    environment = {"gpu": "idle GPU", "cpu": "Some CPU", "cpu_cores": 4}
    write(tmp_path / "part1/vit/quantization.csv", [row | {"device": "cpu"} for row in RUN])
    (tmp_path / "part1/vit/environment.json").write_text(json.dumps(environment))
    both = [*RUN, *(row | {"model": "timm/other"} for row in RUN)]
    write(tmp_path / "report.csv", both)
    content = {"vit": environment | {"gpu": "GPU A"}, "timm/other": environment | {"gpu": "GPU B"}}
    (tmp_path / "report_environment.json").write_text(json.dumps(content))
    write(tmp_path / "part2/s/trials.csv", [trial("s", 0, 70.0)])
    write(tmp_path / "part2/s/finalists.csv", [trial("s-finalists", 0, 70.0)])
    write(tmp_path / "part2/s/final.csv", [final("best", 80.0)])
    write(tmp_path / "part2/s/importances.csv", [{"hyperparameter": "width", "importance": 1}])
    output = tmp_path / "figures"
    assert figures.main(["--input", str(tmp_path), "--output", str(output)]) == 0
    names = ["part1-vit-quantization", "part2-s-final", "part2-s-trials"]
    names += ["report-timm-other", "report-vit"]
    assert sorted(path.stem for path in output.iterdir()) == names
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, output.iterdir()))
    machines = {texts_of(figure)[1].partition(",")[0] for figure in saved}
    assert {"Some CPU", "GPU A", "GPU B"} < machines
    assert "idle GPU" not in machines
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.iterdir())


@pytest.mark.parametrize(
    ("rows", "message"),
    [(None, "does not exist"), ([{"hyperparameter": "width"}], "holds no CSV of a run")],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, message: str
):
    if rows is not None:
        write(tmp_path / "table.csv", rows)
    argv = ["--input", str(tmp_path / "table.csv"), "--output", str(tmp_path / "figures")]
    assert figures.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
