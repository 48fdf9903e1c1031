"""The tab that draws from nothing: by class or prompt."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .controls import Results, answer, settings_of
from .shared import PRIVATE, Page, lines_of, prompt_update, random_seed


def still_shown(pictures: list[tuple[str, str]] | None, chosen: tuple[str, ...]) -> Any:
    """What changes of the button that takes the chosen image on: it works where that image is among those shown."""
    return gr.update(interactive=chosen[0] in [path for path, _ in pictures or []])


def add(page: Page) -> tuple[Results, gr.State, gr.Button]:
    """Build the tab; returns where its images appear, which of them was chosen (its file, model, class and prompt), and
    the button that takes it on."""
    loaded, limits = page.first, page.limits
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            classes = gr.Dropdown(
                loaded.classes, value=[], multiselect=True, allow_custom_value=True, label="Classes",
                visible=bool(loaded.classes),
                info="In turn, each prompt in every one. If none is chosen: every class, or with a prompt no class.",
            )  # fmt: skip
            prompts = gr.Textbox(
                "",
                label="Prompts", lines=2, max_length=limits.prompt_characters, visible=loaded.takes_text,
                info="One a line, given to the images in turn.",
            )  # fmt: skip
            n = gr.Slider(1, limits.most_images, value=min(16, limits.most_images), step=1, label="Images")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=140)
                gr.Button("New seed", size="md", scale=0, min_width=110).click(random_seed, None, seed, **PRIVATE)
            settings = page.settings()
            with gr.Accordion("Larger images", open=False), gr.Row():
                height = gr.Number(0, label="Height", info="0: as in training.", precision=0, min_width=120)
                width = gr.Number(0, label="Width", info="0: as in training.", precision=0, min_width=120)
            buttons = page.buttons("Draw")
        with gr.Column(scale=3, min_width=320):
            results = Results("Drawn images")
            onward = gr.Button("Edit the chosen image", size="sm", interactive=False)
            chosen = gr.State(("", "", "", ""))

    def draw(values: dict[str, Any], session: str) -> Iterator[list[Any]]:
        """Draw images. Yields after each batch; the last value has the archive."""
        model, size = page.models.load(values["model"]), [values["height"], values["width"]]
        asked = {"n": values["n"], "seed": values["seed"]}
        asked |= {
            "class": None if values["classes"] in (None, "", []) else values["classes"],
            "prompt": lines_of(values["prompts"]),
            "size": [side or own for side, own in zip(size, model.size)] if any(size) else None,
        }
        series = page.series(model, asked, settings_of(values))
        yield from results.follow(series, page.jobs, session, {})

    inputs = {"model": page.model, "classes": classes, "prompts": prompts, "n": n, "seed": seed}
    inputs |= {"height": height, "width": width, **settings}
    # The chosen image is one of those that go.
    buttons[0].click(lambda: gr.update(interactive=False), None, onward, **PRIVATE)
    drawing = page.draws(buttons, answer(draw, inputs), inputs, results, "draw")
    drawing.failure(still_shown, [results.gallery, chosen], onward, **PRIVATE)
    page.follow_model(classes, lambda m: gr.Dropdown(m.classes, value=[], visible=bool(m.classes)))
    page.follow_model(prompts, prompt_update)
    return results, chosen, onward
