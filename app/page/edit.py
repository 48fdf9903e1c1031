"""The tab that changes a part of an image: a painted mask, a box, its sides, a random share, its lower part."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch

from vqgen.errors import UserError
from vqgen.sampling.filling import fitted_masks
from vqgen.tokenizer.reconstruction import write_png_atomic

from .controls import Results, answer, image_file, settings_of, temporary, words_of
from .models import Loaded
from .shared import PRIVATE, QUEUED, Page, lines_of, one_of
from .uploads import png_url, read_mask, read_upload

WAYS = FILL, EXTEND, VARY, LOWER = "fill in", "extend", "vary", "lower part"
ADDED = "; added to what is painted"
"""Of the box."""


def note(model: Loaded) -> str:
    """What the model can do here, as a sentence."""
    if model.inpaints:
        return f"**{model.name}** was trained to fill in. Where colours do not fit, raise the source guidance scale."
    return f"**{model.name}** only draws the lower part of an image anew: it was not trained to fill in."


def first_way(model: Loaded) -> str:
    """The first edit that a model can do."""
    return FILL if model.inpaints else LOWER


def in_pixels(model: Loaded, further: str = "") -> str:
    """What the numbers of a box or of sides are, and something further, as a sentence."""
    return f"In pixels of the image as the model sees it, {model.size[1]}×{model.size[0]}{further}."


def shown_if(wanted: bool) -> Any:
    """`visible` of a part that keeps what was painted in it while it is not shown."""
    return True if wanted else "hidden"


def painter(url: str | None, cell: int) -> str:
    """The element on which a mask is painted, see `page.js`."""
    return f'<mask-painter image="{url}" cell="{cell}"></mask-painter>' if url else ""


def add(page: Page) -> tuple[gr.Image, gr.Dropdown, gr.Textbox]:
    """Build the tab; returns its upload, class and prompt."""
    loaded, limits = page.first, page.limits
    first = first_way(loaded)
    about = gr.Markdown(note(loaded))
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = image_file()
            way = gr.Radio(WAYS, value=first, label="What is drawn anew", visible=loaded.inpaints)
            mask = gr.Textbox("", label="mask", visible=False)
            with gr.Column(visible=shown_if(first == FILL)) as filled:
                view = gr.HTML("", elem_id="edit-view")
                box = gr.Textbox("", label="Box", placeholder="X Y WIDTH HEIGHT", info=in_pixels(loaded, ADDED))
            with gr.Column(visible=shown_if(first == EXTEND)) as extended:
                sides = gr.Textbox("", label="Sides", placeholder="LEFT TOP RIGHT BOTTOM", info=in_pixels(loaded))
            with gr.Column(visible=shown_if(first == VARY)) as varied:
                share = gr.Slider(0.05, 1, value=0.4, step=0.05, label="Share of the codes that is drawn anew")
            with gr.Column(visible=shown_if(first == LOWER)) as lower:
                rows = gr.Number(0, label="Rows of codes that are kept", info="0: half of them.", precision=0)
            one = page.one_class()
            prompt = page.one_prompt()
            with gr.Row():
                n = gr.Slider(1, limits.most_images, value=min(8, limits.most_images), step=1, label="Variations")
                seed = gr.Number(0, label="Seed", precision=0)
            settings = page.settings()
            buttons = page.buttons("Edit")
        with gr.Column(scale=3, min_width=320):
            results = Results("Edited images")

    def fitted(model: Loaded, path: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """An upload, and the same as the model sees it; uint8 (C, H, W) both."""
        upload = read_upload(path, model.generator.tokenizer.config.channels, limits, drawn=True)
        return upload, model.generator.fitted(upload[None])[0]

    def show(values: dict[str, Any], session: str) -> str:
        """Show an upload for painting, as the model sees it."""
        if not values["image"]:
            return ""
        model = page.models.load(values["model"])
        return painter(png_url(fitted(model, values["image"])[1]), model.generator.tokenizer.factor)

    def white(model: Loaded, url: str, upload: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A mask of the size of the upload, or as the model sees it, as uint8 (1, H, W) of the latter size."""
        found = read_mask(url, limits)
        if tuple(found.shape) not in (tuple(upload.shape[1:]), size):
            text = f"found {found.shape[1]}×{found.shape[0]} pixels, the image has {upload.shape[2]}×{upload.shape[1]}"
            raise UserError(f"mask: {text}; give a mask of the same size")
        whole = (
            found
            if tuple(found.shape) == size
            else fitted_masks(found[None], size, model.generator.tokenizer.config.fit)[0]
        )
        return 255 * whole[None].to(torch.uint8)

    def edit(values: dict[str, Any], session: str) -> Iterator[list[Any]]:
        """Draw a part of an image anew. Yields after each batch; the last value has the archive."""
        model = page.models.load(values["model"])
        chosen = values["way"] or first_way(model)
        asked = {"n": values["n"], "seed": values["seed"], "prompt": lines_of(values["prompt"])}
        asked["class"] = one_of(values["class_name"])
        if chosen != LOWER and not model.inpaints:
            raise UserError(f"the model {model.name} was not trained to fill in; choose {LOWER}, or another model")
        with temporary(results.folder) as place:
            upload, seen = fitted(model, values["image"])
            given = {"image.png": place / "image.png"}
            write_png_atomic(given["image.png"], seen)
            asked["init_image"] = list(given.values())
            if chosen == FILL:
                asked["box"] = words_of(values["box"])
                if values["mask"]:
                    given["mask.png"] = place / "mask.png"
                    write_png_atomic(given["mask.png"], white(model, values["mask"], upload, model.size))
                    asked["mask"] = [given["mask.png"]]
                elif not asked["box"]:
                    raise UserError("mask: nothing is painted; paint on the image, or give a box")
            elif chosen == EXTEND:
                asked["extend"] = words_of(values["sides"]) or [0, 0, 0, 0]
            else:
                asked |= {"vary": values["share"]} if chosen == VARY else {"keep_rows": values["rows"] or None}
            series = page.series(model, asked, settings_of(values))
            yield from results.follow(series, page.jobs, session, given)

    inputs = {"model": page.model, "image": image, "way": way, "mask": mask, "box": box, "sides": sides, "share": share}
    inputs |= {"rows": rows, "class_name": one, "prompt": prompt, "n": n, "seed": seed, **settings}
    place = list(inputs).index("mask")
    take = f"const painter = document.querySelector('#edit-view mask-painter'); if (painter) v[{place}] = painter.mask;"
    painted = f"(...v) => {{ {take} return v; }}"
    page.draws(buttons, answer(edit, inputs), inputs, results, "edit", js=painted)
    showing = {"image": image, "model": page.model}
    shows = answer(show, showing)
    for event in (image.change, page.model.input):
        event(shows, list(showing.values()), view, **QUEUED)

    groups = {FILL: filled, EXTEND: extended, VARY: varied, LOWER: lower}
    way.change(
        lambda chosen: [gr.Column(visible=shown_if(name == chosen)) for name in groups], way, list(groups.values()),
        **PRIVATE,
    )  # fmt: skip
    page.follow_model(about, note)
    page.follow_model(box, lambda m: gr.update(info=in_pixels(m, ADDED)))
    page.follow_model(sides, lambda m: gr.update(info=in_pixels(m)))
    page.follow_model(way, lambda m: gr.Radio(value=first_way(m), visible=m.inpaints))
    return image, one, prompt
