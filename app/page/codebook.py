"""The tab that shows what each code decodes to, and which codes are near it."""

import math
from typing import Any

import gradio as gr
import torch

from vqgen.errors import UserError
from vqgen.evaluation.codebook import TILE, code_vectors, nearest_codes, tiles
from vqgen.tokenizer.data.pixels import image_grid

from .controls import answer, gallery
from .models import Loaded
from .shared import PRIVATE, Page

SHEET = 256
"""Codes on one sheet."""
NEAR = 11
"""Codes that are shown beside one."""


def numbering(model: Loaded) -> str | None:
    """Which number a code has; None where it is the code itself."""
    tokenizer = model.generator.tokenizer
    if tokenizer.depth == 1:
        return None
    return f"Code c of depth d, both from 0, has the number d × {tokenizer.codebook_size} + c."


def add(page: Page) -> None:
    """Build the tab."""
    gr.Markdown(
        f"Each tile is what {TILE}×{TILE} cells of one code decode to. Choose a tile to see the codes nearest to it."
    )
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                about: dict[str, Any] = {"info": numbering(page.first), "precision": 0, "minimum": 0, "min_width": 120}
                first = gr.Number(0, label="First code", **about)
                button = gr.Button("Show", variant="primary", min_width=120)
            sheet = gr.Image(
                label="Codes", show_label=False, format="png", elem_classes="sheet", buttons=["fullscreen"],
                interactive=False,
            )  # fmt: skip
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                code = gr.Number(0, label="Code", **about)
                find = gr.Button("Nearest", min_width=120)
            near = gallery("It and the codes nearest to it, with their distances", 4)
    shown = gr.State(0)

    def place(model: str, number: Any) -> tuple[Any, int]:
        """The tokenizer of a model, and a number of its codes, depth * K + code. Raises `UserError`."""
        tokenizer = page.models.load(model).generator.tokenizer
        most = tokenizer.depth * tokenizer.codebook_size
        if not isinstance(number, int) or not 0 <= number < most:
            raise UserError(f"code: found {number}, expected 0 to {most - 1}")
        return tokenizer, number

    def pictures(tokenizer: Any, codes: torch.Tensor) -> torch.Tensor:
        """What codes decode to, uint8 (n, 3, H, W); at other depths all cells have code 0."""
        with page.jobs.turn:
            found = tiles(tokenizer, codes, torch.zeros(tokenizer.depth, dtype=torch.long), TILE)
        return found.expand(-1, 3, -1, -1)

    def codebook(values: dict[str, Any], session: str) -> tuple[Any, int]:
        """A sheet of what codes decode to, in rows of 16, from a first one on; and that one."""
        tokenizer, start = place(values["model"], values["first"])
        end = min(start + SHEET, tokenizer.depth * tokenizer.codebook_size)
        found = pictures(tokenizer, torch.arange(start, end))
        return image_grid(found, math.isqrt(SHEET), 1).permute(1, 2, 0).numpy(), start

    def nearest(values: dict[str, Any], session: str) -> list[Any]:
        """A code, and the codes nearest to it by their vectors, with their distances."""
        tokenizer, number = place(values["model"], values["code"])
        found = nearest_codes(code_vectors(tokenizer), number, min(NEAR, tokenizer.codebook_size - 1))
        shown = pictures(tokenizer, torch.tensor([number, *(other for other, _ in found)]))
        names = [f"{number}", *(f"{other} ({distance:.3g})" for other, distance in found)]
        return [(image.permute(1, 2, 0).numpy(), name) for image, name in zip(shown, names, strict=True)]

    def chosen(model: str, start: int, event: gr.SelectData) -> int:
        """The code whose tile was clicked."""
        side = page.models.load(model).generator.tokenizer
        rows, columns = (min(TILE, length) * side.factor + 1 for length in side.grid)
        x, y = event.index
        last = side.depth * side.codebook_size - 1
        return min(start + int(y // rows) * math.isqrt(SHEET) + min(int(x // columns), math.isqrt(SHEET) - 1), last)

    inputs = {"model": page.model, "first": first}
    page.runs(button, answer(codebook, inputs), inputs, [sheet, shown], "codebook")
    asked = {"model": page.model, "code": code}
    page.runs(find, answer(nearest, asked), asked, [near], "nearest")
    picked = sheet.select(chosen, [page.model, shown], code, **PRIVATE)
    picked.then(answer(nearest, asked), list(asked.values()), near, api_visibility="private")
    page.follow_model(sheet, lambda m: None)
    page.follow_model(first, lambda m: gr.update(value=0, info=numbering(m)))
    page.follow_model(code, lambda m: gr.update(info=numbering(m)))
    page.follow_model(near, lambda m: None)
