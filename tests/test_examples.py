"""The Python examples of the README run as they stand, with the models in the package."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == README.count("```python") > 0


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no run of a user's own
    monkeypatch.delenv("VQGEN_MODEL", raising=False)
    exec(compile(EXAMPLES[number], "README.md", "exec"), {"__name__": "__main__"})
