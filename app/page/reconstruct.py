"""The tab that shows what a tokenizer keeps of an image: reconstruction, difference, codes and their rate."""

import math
from typing import Any

import gradio as gr
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.comparison import difference
from vqgen.tokenizer.metrics import psnr

from .controls import answer, gallery, image_file
from .drawing import check_length
from .shared import Page, one_of
from .uploads import read_upload

AMPLIFY = 4
LABELLED = 16
"""Largest number of rows and columns of codes whose numbers are written on the map."""


def bits_of(generator: Generator, codes: Tensor, name: str | int, prompt: str = "") -> Tensor | None:
    """Bits of the codes (1, h, w[, depth]) of an image of a class, by name or index, and a text, "" for none:
    (h, w, depth).

    None where the prior never had an image without something that an upload does not have. Raises `UsageError` where
    that is the class.
    """
    conditioning = generator.conditioning
    given = {key: found for key, value in (("class", name), ("text", prompt.strip())) if (found := one_of(value))}
    needed = [part for part in conditioning.parts if part.required and part.name not in given]
    for part in (conditioning.classes, conditioning.text):
        if part in needed:
            text = f"the prior was trained with {part.undropped}, always with its {part.name}"
            raise UsageError(f"{part.flag()}: {text}; give one")
    if needed:
        return None
    conditions = conditioning.conditions(given, absent=True)
    nats = generator.nats(codes, conditions)
    return generator.vocabulary.to_grid(nats)[0].reshape(*generator.tokenizer.grid, -1) / math.log(2)


def code_map(codes: Tensor, bits: Tensor | None) -> str:
    """The grid of codes as SVG: the number of each, int64 (h, w, depth), on a colour by its bits (h, w), if known."""
    (rows, columns), size = codes.shape[:2], 10
    most = 0.0 if bits is None else max(float(bits.max()), 1e-9)
    parts = [
        f'<svg class="codes" viewBox="0 0 {size * columns} {size * rows}" role="img" aria-label="Map of the codes">'
    ]
    for y in range(rows):
        for x in range(columns):
            share, numbers = 0.0, " ".join(map(str, codes[y, x].tolist()))
            title = f"<title>code {numbers}</title>"
            if bits is not None:
                share = float(bits[y, x]) / most
                title = f"<title>code {numbers}: {float(bits[y, x]):.1f} bits</title>"
            place = f'x="{size * x}" y="{size * y}" width="{size}" height="{size}"'
            parts.append(f'<rect {place} fill="hsl({250 - 200 * share:.0f} 70% {25 + 45 * share:.0f}%)">{title}</rect>')
            if max(rows, columns) <= LABELLED and codes.shape[2] == 1:
                colour = "#000" if share > 0.27 else "#fff"  # by contrast
                parts.append(f'<text x="{size * (x + 0.5)}" y="{size * (y + 0.5)}" fill="{colour}">{numbers}</text>')
    legend = "Numbers are codes."
    if bits is not None:
        legend = f"Numbers are codes; colours their bits, from blue (none) to yellow ({most:.1f} bits)."
    return "".join([*parts, f"</svg><p>{legend}</p>"])


def add(page: Page) -> None:
    """Build the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = image_file()
            one = page.one_class("That the prior is told, for the rate of the codes.")
            prompt = page.one_prompt("That the prior is told, too.")
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
        check_length("--prompt", values["prompt"], page.limits.prompt_characters)
        with page.jobs.turn:
            fitted = generator.fitted(image[None])
            codes = generator.encode(fitted)
            again = generator.decode(codes)
            bits = bits_of(generator, codes, values["class_name"], values["prompt"] or "")
        found = {"psnr": float(psnr(fitted, again))}
        text, numbers = f"PSNR {found['psnr']:.2f} dB", dict[str, Any](codes=codes[0].tolist())
        if bits is not None:
            total, pixels, bits = float(bits.sum()), fitted.shape[2] * fitted.shape[3], bits.sum(2)
            found |= {"bits": total, "bits_per_pixel": total / pixels}
            text = f"{total:.0f} bits under the prior ({total / pixels:.3f} a pixel), {text}"
            numbers["bits_of_codes"] = bits.tolist()
        parts = zip(
            [fitted[0], again[0], difference(fitted[0], again[0], AMPLIFY)],
            ["original", "reconstruction", f"difference × {AMPLIFY}"],
        )
        pictures = [(part.expand(3, -1, -1).permute(1, 2, 0).numpy(), name) for part, name in parts]
        grid = codes[0].reshape(*generator.tokenizer.grid, -1)
        return [text, pictures, code_map(grid, bits), {**found, **numbers}]

    inputs = {"model": page.model, "image": image, "class_name": one, "prompt": prompt}
    page.runs(button, answer(reconstruct, inputs), inputs, [summary, images, shown, numbers], "reconstruct")
