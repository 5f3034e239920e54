"""What the command lines of several scripts have in common."""

from types import ModuleType

import pytest

import part1_quantize
import part3_tensorrt


@pytest.mark.parametrize("script", [part1_quantize, part3_tensorrt], ids=lambda m: m.__name__)
def test_list_names_every_candidate(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert script.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(script.CANDIDATES)
    assert all(len(line) > 40 for line in lines)
