"""Numbers that check themselves: every one in the reports' tables is in the CSV they name.

A table is introduced by a comment with its CSV and, if wanted, the rows that it shows:

    <!-- reports/data/part1_cpu.csv threads=2 batch_size=16 -->

In each table row, the first cell that is a text of the CSV (`int8-eager`, say) narrows the rows
further. Every number of the other cells must then be a value of those rows, as far as its decimals
go.
"""

import re
from collections.abc import Iterable
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from pathlib import Path

import pandas as pd
import pytest

import part1_quantize
import part2_tune
import part3_tensorrt

ROOT = Path(__file__).resolve().parent.parent
REPORTS = sorted((ROOT / "reports").rglob("*.md"))  # with their notes
DOCUMENTS = [ROOT / "README.md", *REPORTS]
COLUMN_NOTES = ROOT / "reports/notes/columns.md"
SOURCE = re.compile(r"<!-- (reports/data/\S+\.csv)((?: \w+=\S+)*) -->")
MINUS = "\N{MINUS SIGN}"
NUMBER = re.compile(rf"(?<![\w.])[-+{MINUS}]?\d[\d,]*(?:\.\d+)?(?![\w.]*\w)")


def tables_of(text: str) -> list[tuple[str, dict[str, str], list[list[str]]]]:
    """The tables that name a CSV: (its path, conditions on its rows, cells without the header)."""
    found = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if match := SOURCE.fullmatch(line.strip()):
            rows: list[list[str]] = []
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    if rows:
                        break
                    continue
                rows.append([cell.strip() for cell in row.strip().strip("|").split("|")])
            conditions = dict(pair.split("=", 1) for pair in match[2].split())
            found.append((match[1], conditions, rows[2:]))
    return found


def select(table: pd.DataFrame, conditions: dict[str, str]) -> pd.DataFrame:
    for column, value in conditions.items():
        table = table[table[column].astype(str) == value]
    return table


def narrow(table: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    """The CSV's rows that a table row speaks of, by the first cell that is a text in it."""
    for cell in cells:
        name = cell.strip("*`")
        rows = table[(table == name).any(axis=1)]
        if len(rows) and not NUMBER.fullmatch(name):
            return rows
    return table


def numbers_in(cell: str) -> list[str]:
    """The numbers of a cell; those inside `code` are names."""
    plain = re.sub(r"`[^`]*`", "", cell)
    return [match[0].replace(MINUS, "-").replace(",", "") for match in NUMBER.finditer(plain)]


def holds(values: set[float], number: str) -> bool:
    """Whether one of the values, rounded to as many decimals, is the number."""
    wanted = Decimal(number)
    unit = Decimal(1).scaleb(wanted.as_tuple().exponent)  # type: ignore[arg-type]
    return any(
        Decimal(repr(value)).quantize(unit, rounding) == wanted
        for value in values
        for rounding in (ROUND_HALF_UP, ROUND_HALF_EVEN)
    )


def missing_numbers(text: str, root: Path = ROOT) -> list[str]:
    """What the document says and its CSV files do not."""
    problems = []
    for path, conditions, cells_of_rows in tables_of(text):
        table = select(pd.read_csv(root / path), conditions)
        if table.empty:
            problems.append(f"{path} {conditions}: no such rows")
        for cells in cells_of_rows:
            rows = narrow(table, cells)
            numeric = rows.select_dtypes("number").to_numpy().ravel()
            values = {float(value) for value in numeric if value == value}
            problems += [
                f"{path}: {number} in {' | '.join(cells)}"
                for cell in cells
                for number in numbers_in(cell)
                if not holds(values, number)
            ]
    return problems


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_number_of_a_table_is_in_its_csv(document: Path):
    assert missing_numbers(document.read_text()) == []


@pytest.mark.parametrize("document", [d for d in REPORTS if d != COLUMN_NOTES], ids=name_of)
def test_every_table_with_numbers_in_a_report_names_its_csv(document: Path):
    text = document.read_text()
    named = {tuple(cells) for _, _, rows in tables_of(text) for cells in rows}
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        is_header = following.startswith("| ---")
        if line.startswith("|") and numbers_in(line) and not is_header:
            assert tuple(cell.strip() for cell in line.strip("|").split("|")) in named


def test_every_figure_is_committed_and_shown():
    shown = {
        (document.parent / target).resolve()
        for document in DOCUMENTS
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", document.read_text())
    }
    assert shown == set((ROOT / "reports/figures").rglob("*.png"))


# What needs no explanation.
PLAIN_COLUMNS = {"model", "dataset", "candidate", "device", "threads", "batch_size", "seed"}
PLAIN_COLUMNS |= {"study", "configuration", "trial", "epochs", "parameters"}
COLUMNS = {
    "quantization.csv": part1_quantize.COLUMNS,
    **{f"{name}.csv": columns for name, columns in part2_tune.COLUMNS.items()},
    "exports.csv": part3_tensorrt.EXPORT_COLUMNS,
    "tensorrt.csv": part3_tensorrt.COLUMNS,
    "streams.csv": part3_tensorrt.STREAM_COLUMNS,
}


def undocumented(columns: Iterable[str], text: str) -> list[str]:
    """Columns that no table row of the text explains.

    A row names a column in full, or a family of them: `latency_ms_median`, `_p90`.
    """
    rows = [re.findall(r"`(\w+)`", line) for line in text.splitlines() if line.startswith("|")]

    def is_explained(column: str) -> bool:
        family = column.split("_")[0]
        return column in PLAIN_COLUMNS or any(
            column in names
            or (
                any(name.split("_")[0] == family for name in names)
                and any(name.startswith("_") and name in column for name in names)
            )
            for names in rows
        )

    return [column for column in columns if not is_explained(column)]


@pytest.mark.parametrize("file", COLUMNS)
def test_every_column_is_explained(file: str):
    documents = [ROOT / "README.md", COLUMN_NOTES]
    text = "\n".join(path.read_text() for path in documents if path.exists())
    assert f"`{file}`" in text or f"/{file}`" in text
    assert undocumented(COLUMNS[file], text) == []


def test_a_column_that_is_not_explained_is_found():
    text = "| `latency_ms_median`, `_p90` | over all calls |\nalso `speedup`\n"
    columns = ["model", "latency_ms_median", "latency_ms_p90", "latency_ms_p99", "wall_ms_p90"]
    assert undocumented([*columns, "speedup"], text) == ["latency_ms_p99", "wall_ms_p90", "speedup"]


@pytest.mark.parametrize(
    ("table", "problems"),
    [
        (f"| a | 1.26 |\n| b | {MINUS}2 |", 0),
        ("| a | **1.3** |\n| `b` | 1,234.5 |", 0),
        ("| a | 1.27 |\n| b | -2 |", 1),  # a rounding of nothing
        ("| a | -2 |", 1),  # of another row
        ("| c | 1.26 and 1234 |", 0),  # no row of this name: any row will do
        ("| a | \N{MULTIPLICATION SIGN}1.26 |", 0),
        ("| a | 1.26 % of `int8` |", 0),
    ],
)
def test_the_check_finds_what_is_wrong(table: str, problems: int, tmp_path: Path):
    (tmp_path / "reports/data").mkdir(parents=True)
    csv = "name,x,y\na,1.2594,\nb,-2,1234.46\nb,9,9\n"
    (tmp_path / "reports/data/some.csv").write_text(csv)
    text = f"<!-- reports/data/some.csv -->\n\n| name | x |\n| --- | --- |\n{table}\n"
    assert len(missing_numbers(text, tmp_path)) == problems
    absent = text.replace("csv -->", "csv name=d -->")
    assert "no such rows" in missing_numbers(absent, tmp_path)[0]
