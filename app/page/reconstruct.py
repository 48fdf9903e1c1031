"""The tab that shows what a tokenizer keeps of an image: reconstruction, difference, codes and their rate."""

import math
from typing import Any

import gradio as gr
from torch import Tensor

from vqgen.tokenizer.comparison import difference
from vqgen.tokenizer.metrics import psnr

from .controls import answer, gallery, image_file
from .shared import Page
from .uploads import read_upload

AMPLIFY = 4
LABELLED = 16
"""Largest number of rows and columns of codes whose numbers are written on the map."""


def code_map(codes: Tensor, bits: Tensor) -> str:
    """The grid of codes as SVG: the number of each, int64 (h, w, depth), on a colour by its bits (h, w)."""
    rows, columns = bits.shape
    most, size = max(float(bits.max()), 1e-9), 10
    parts = [
        f'<svg class="codes" viewBox="0 0 {size * columns} {size * rows}" role="img" aria-label="Map of the codes">'
    ]
    for y in range(rows):
        for x in range(columns):
            share, numbers = float(bits[y, x]) / most, " ".join(map(str, codes[y, x].tolist()))
            title = f"<title>code {numbers}: {float(bits[y, x]):.1f} bits</title>"
            place = f'x="{size * x}" y="{size * y}" width="{size}" height="{size}"'
            parts.append(f'<rect {place} fill="hsl({250 - 200 * share:.0f} 70% {25 + 45 * share:.0f}%)">{title}</rect>')
            if max(rows, columns) <= LABELLED and codes.shape[2] == 1:
                colour = "#000" if share > 0.5 else "#fff"
                parts.append(f'<text x="{size * (x + 0.5)}" y="{size * (y + 0.5)}" fill="{colour}">{numbers}</text>')
    legend = f"Numbers are codes; colours their bits, from blue (none) to yellow ({most:.1f} bits)."
    return "".join([*parts, f"</svg><p>{legend}</p>"])


def add(page: Page) -> None:
    """Build the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = image_file()
            one = page.one_class("That the prior is told, for the rate of the codes.")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3, min_width=320):
            summary = gr.Markdown("", label="Summary", elem_classes="status")
            images = gallery(f"Original, reconstruction, difference × {AMPLIFY}", 3, "large")
            shown = gr.HTML("", label="Map")
            with gr.Accordion("Numbers", open=False):
                numbers = gr.JSON(label="Rate and codes", show_label=False)

    def reconstruct(values: dict[str, Any], session: str) -> list[Any]:
        """Encode an image and decode its codes; their rate is that under the prior, in bits."""
        generator = page.models.load(values["model"]).generator
        image = read_upload(values["image"], generator.tokenizer.config.channels, page.limits)
        with page.jobs.turn:
            fitted = generator.fitted(image[None])
            codes = generator.encode(fitted)
            again = generator.decode(codes)
            asked = {"class": [values["class_name"]]} if values["class_name"] else None
            nats = generator.nats(codes, generator.conditioning.conditions(asked, absent=True))
        bits = generator.vocabulary.to_grid(nats)[0].reshape(*generator.tokenizer.grid, -1) / math.log(2)
        total, pixels = float(bits.sum()), fitted.shape[2] * fitted.shape[3]
        found = {"psnr": float(psnr(fitted, again)), "bits": total, "bits_per_pixel": total / pixels}
        text = f"{total:.0f} bits under the prior ({total / pixels:.3f} a pixel), PSNR {found['psnr']:.2f} dB"
        parts = zip(
            [fitted[0], again[0], difference(fitted[0], again[0], AMPLIFY)],
            ["original", "reconstruction", f"difference × {AMPLIFY}"],
        )
        pictures = [(part.expand(3, -1, -1).permute(1, 2, 0).numpy(), name) for part, name in parts]
        grid = codes[0].reshape(*generator.tokenizer.grid, -1)
        numbers = {**found, "codes": codes[0].tolist(), "bits_of_codes": bits.sum(2).tolist()}
        return [text, pictures, code_map(grid, bits.sum(2)), numbers]

    inputs = {"model": page.model, "image": image, "class_name": one}
    page.runs(button, answer(reconstruct, inputs), inputs, [summary, images, shown, numbers], "reconstruct")
