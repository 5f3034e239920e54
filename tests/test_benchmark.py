"""What a model costs, which share of it is quantised, and the folder of a run."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from utils import benchmark, cli, data, results
from utils.benchmark import Cost, Layer, count_cost, quantized_share
from utils.models import LoadedModel, ModelSource


def cost_of(module: nn.Module, size: int) -> Cost:
    how = data.Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return count_cost(LoadedModel("a model", module.eval(), how, None))


class Parts(nn.Module):
    """A convolution, a linear layer called twice, and one whose weight is passed to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.twice = nn.Linear(8, 8)
        self.weight_only = nn.Linear(8, 6)
        self.unused = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.twice(self.twice(tokens))
        return F.linear(tokens.mean(1), self.weight_only.weight)


def test_every_call_of_a_weight_counts_whatever_function_makes_it():
    cost = cost_of(Parts(), size=8)  # 4 tokens
    assert sorted(cost.layers, key=lambda layer: layer.shape) == [
        Layer((3, 4, 4, 8), True, 4 * 8 * 3 * 16),
        Layer((6, 8), False, 6 * 8),
        Layer((8, 8), False, 2 * 4 * 8 * 8),
    ]
    assert cost.multiply_adds == sum(layer.multiply_adds for layer in cost.layers)
    assert cost.gflop == pytest.approx(2e-9 * cost.multiply_adds)


def test_attention_counts_as_two_products():
    class Attention(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(images, images, images)

    cost = cost_of(Attention(), size=5)
    assert cost.multiply_adds == 2 * 3 * 5 * 5 * 5
    assert cost.layers == ()


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("xcit_tiny_12_p16_224", 87.02),
        ("cait_xxs24_224", 84.82),
        ("levit_128s", 75.99),
        ("eva02_tiny_patch14_224", 80.37),
    ],
)
def test_share_of_linear_layers_in_networks_of_timm(name: str, share: float):
    module = timm.create_model(name)
    cost = cost_of(module, timm.data.resolve_model_data_config(module)["input_size"][-1])
    shapes = [layer.shape for layer in cost.layers if not layer.convolution]
    row = quantized_share(cost, shapes)
    assert row["quantized_layers"] == row["linear_layers"] == len(shapes)
    assert row["quantized_macs_percent"] == pytest.approx(share, abs=0.005)
    assert row["quantized_convolutions"] == 0


def test_batch_sizes_keep_to_the_images_that_there_are(capsys: pytest.CaptureFixture[str]):
    images = data.ImageSet("folder", "test", torch.zeros(12, 3, 1, 1), None, ())
    assert benchmark.choose_batch_sizes([1, 8, 32, 128], images) == [8, 1]
    assert "no batches of 128, 32: folder test has 12 images" in capsys.readouterr().out
    assert benchmark.choose_batch_sizes([12], images) == [12]
    assert capsys.readouterr().out == ""
    with pytest.raises(cli.UserError, match="batches of 13: folder test has 12 images"):
        benchmark.choose_batch_sizes([13, 20], images)


def test_share_counts_what_is_held_in_8_bits_and_no_more():
    linear = [Layer((4, 8), False, 100), Layer((4, 8), False, 10), Layer((2, 8), False, 5)]
    cost = Cost(200, 1000, (*linear, Layer((3, 3, 4, 8), True, 500)))
    row = quantized_share(cost, [(8, 4), (8, 8)])  # one of two of its shape: the cheaper one
    assert row == {
        "quantized_layers": 1,
        "linear_layers": 3,
        "quantized_convolutions": 0,
        "convolutions": 1,
        "quantized_parameters_percent": 16.0,
        "quantized_macs_percent": 1.0,
    }
    both = quantized_share(cost, [(8, 4), (4, 8), (8, 4, 3, 3)])
    assert both["quantized_macs_percent"] == 61
    assert (both["quantized_layers"], both["quantized_convolutions"]) == (2, 1)


def arguments(folder: Path, *flags: str) -> argparse.Namespace:
    parser = cli.Parser("")
    benchmark.add_arguments(parser, folder, [4])
    return parser.parse_args(["--model", "vit_digits", "--dataset", "digits", *flags])


def test_a_run_is_what_the_command_line_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--mean", "0.1,0.2,0.3", "--interpolation", "bilinear", "--num-images", "60"]
    flags += ["--batch-sizes", "4,8", "--device", "cpu", "--threads", "1"]
    with benchmark.open_run(arguments(tmp_path, *flags)) as run:
        assert run.folder == tmp_path / "vit_digits"
        assert run.batch_sizes == [8, 4]
        assert (len(run.labelled), len(run.speed)) == (60, 4 * 8)
        assert run.environment["preprocessing"]["mean"] == (0.1, 0.2, 0.3)
        assert run.environment["preprocessing"]["interpolation"] == "bilinear"
        assert all(rate > 0 for rate in run.environment["large_product_gops"].values())
    printed = capsys.readouterr().out
    assert "mean 0.1, 0.2, 0.3" in printed
    assert "fp32" in printed


def test_one_run_holds_its_folder(tmp_path: Path):
    args = arguments(tmp_path, "--device", "cpu", "--threads", "1", "--num-images", "10")
    (tmp_path / "vit_digits").mkdir()
    with (
        cli.hold(tmp_path / "vit_digits/.lock", ""),
        pytest.raises(cli.UserError, match="in use by another run: wait for its end, or take"),
        benchmark.open_run(args),
    ):
        pass
    with benchmark.open_run(args, images=False) as run:
        assert not run.labelled
        assert not run.speed


def make_run(folder: Path) -> benchmark.Run:
    """A run of two labelled images that has loaded nothing."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    labelled = data.ImageSet("digits", "test", images, torch.tensor([0, 1]), ("a", "b"))
    how = data.Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    about: dict[str, Any] = dict.fromkeys(benchmark.Run.__dataclass_fields__)
    about |= {"labelled": labelled, "class_logits": [0, 1], "batch_sizes": [2], "folder": folder}
    about |= {"model": LoadedModel("a model", nn.Identity(), how, None, num_classes=2)}
    about |= {"source": ModelSource("a model"), "environment": {}, "started": False}
    return benchmark.Run(**about)


def test_the_first_table_takes_the_place_of_an_earlier_run(tmp_path: Path):
    ours = (
        "first.csv",
        "first.png",
        "streams.csv",
        "profile-a-batch1-threads1.json",
        "environment.json",
    )
    for name in (*ours, "notes.txt", "engines/kept.csv", "kept.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    run = make_run(tmp_path)
    results.write_csv(tmp_path / "exports.csv", [{"a": 0}], ["a"])
    assert (tmp_path / "first.png").exists()  # it stays until something is measured
    run.write_table("first.csv", [{"a": 1}], ["a"])
    run.write_table("second.csv", [{"a": 2}], ["a"])
    names = ["engines", "environment.json", "exports.csv", "first.csv", "kept.onnx", "notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "second.csv"]
    assert (tmp_path / "environment.json").read_text() == "{}\n"
    assert (tmp_path / "engines/kept.csv").read_text() == "old"


def test_features_have_no_agreement(tmp_path: Path):
    run = make_run(tmp_path)
    logits = {"fp32": torch.eye(2), "other": torch.tensor([[1.0, 0.0], [2.0, 1.0]])}
    rows = benchmark.score(run, logits)
    assert (rows["fp32"]["top1_percent"], rows["other"]["top1_percent"]) == (100, 50)
    assert rows["other"]["agreement_percent"] == 50
    run.model = LoadedModel("a model", nn.Identity(), run.model.preprocessing, None)
    run.class_logits = None
    rows = benchmark.score(run, logits)
    assert rows["other"]["agreement_percent"] is None
    assert rows["other"]["top1_percent"] is None
    assert rows["other"]["logit_cosine"] == pytest.approx(0, abs=1e-6)  # margins 1, -1 and 1, 1


def test_calibration_images_are_none_that_are_scored(tmp_path: Path):
    run = make_run(tmp_path)
    fresh = torch.ones(1, 3, 8, 8, dtype=torch.uint8)
    drawn = torch.cat([run.labelled.images[:1], fresh])
    run.load = lambda **_: data.ImageSet("digits", "train", drawn, None, ())
    assert (benchmark.load_calibration(run, 2) == fresh.numpy()).all()
    drawn = run.labelled.images
    with pytest.raises(benchmark.UnavailableError, match="scored too"):
        benchmark.load_calibration(run, 2)


def test_rates_of_a_large_product_are_numbers_of_this_machine():
    rates = benchmark.measure_products(1)
    assert set(rates) == {"fp32", "int8"}
    assert all(rate > 0.1 for rate in rates.values())
