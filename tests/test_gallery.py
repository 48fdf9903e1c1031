"""The gallery: its commands, with the models in the package, draw its pictures."""

import importlib.util
import re
from pathlib import Path

import pytest

from vqgen.files import read_bytes
from vqgen.tokenizer.data.decoding import decode

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("gallery", ROOT / "benchmarks" / "gallery.py")
assert _spec and _spec.loader
gallery = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gallery)
FIGURES = {figure.name: figure for figure in gallery.figures()}
FAST = "colouring"


def test_every_picture_has_its_commands_and_every_file_is_shown():
    shown = re.findall(r"images/gallery/([\w-]+)\.png", gallery.PAGE.read_text())
    assert shown == list(FIGURES) and {path.stem for path in gallery.FOLDER.glob("*.png")} == set(shown)
    for figure in FIGURES.values():
        for words in figure.commands:
            assert "--model" in words and words[-2:] == ["--precision", "fp32"]


@pytest.mark.parametrize(
    "name", [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in FIGURES]
)
def test_a_picture_is_what_its_commands_draw(name: str, monkeypatch: pytest.MonkeyPatch):
    """The same codes on any processor; a pixel may be rounded the other way on another one than that of the files."""
    monkeypatch.chdir(ROOT)
    drawn, kept = FIGURES[name].draw(), decode(read_bytes(FIGURES[name].path), 3)
    assert drawn.shape == kept.shape
    assert (drawn.int() - kept.int()).abs().max() <= 1 and (drawn != kept).float().mean() < 1e-3
