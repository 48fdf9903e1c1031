"""The page: a model, and a tab for each thing to do with it."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api
from gradio.themes import Base, Default

from vqgen.errors import UserError

from . import codebook, draw, edit, reconstruct, translate
from .controls import answer, closed, sentence
from .drawing import Jobs
from .models import Models
from .program import SECONDS_KEPT, SWEEP, LimitConfig
from .shared import PRIVATE, QUEUED, Page

HERE = Path(__file__).parent
CSS = (HERE / "style.css").read_text(encoding="utf-8")
# Gradio puts its own class in front of all rules of CSS, and this element is above that.
NARROW = "<style>@media (max-width: 480px) { .gradio-container .main { padding: 12px !important; } }</style>"
HEAD = f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>{NARROW}"


def theme() -> Base:
    """Colours, and the fonts of the visitor's system: others would be fetched."""
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return Default(primary_hue="indigo", font=fonts[0], font_mono=fonts[1])


def build(models: Models, limits: LimitConfig, jobs: Jobs) -> gr.Blocks:
    """Build the page; the first model that can be read is chosen. Raises `UserError`."""
    first = models.first()
    # What Gradio knows of is removed in time; the rest by `server.stored`.
    with gr.Blocks(title="vqgen", analytics_enabled=False, delete_cache=(SWEEP, SECONDS_KEPT)) as page:
        with gr.Row(equal_height=True):
            gr.Markdown("# vqgen", elem_classes="title")
            model = gr.Dropdown(models.names, value=first.name, label="Model", info=first.summary, scale=4)
        shared = Page(models, limits, jobs, first, model)
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                drawn, chosen, onward = draw.add(shared)
            with gr.Tab("Edit", id="edit"):
                edited = edit.add(shared)
            with gr.Tab("Translate", id="translate"):
                translate.add(shared)
            with gr.Tab("Reconstruct", id="reconstruct"):
                reconstruct.add(shared)
            with gr.Tab("Codebook", id="codebook"):
                codebook.add(shared)

        def choose(
            pictures: list[tuple[str, str]], conditions: list[tuple[str, str, str]], event: gr.SelectData
        ) -> tuple[tuple[str, ...], Any]:
            known = conditions[event.index] if event.index < len(conditions) else ("", "", "")  # another drawing began
            return (pictures[event.index][0], *known), gr.Button(interactive=True)

        def take(picture: tuple[str, ...], now: str) -> tuple[Any, ...]:
            """Put a drawn image into the editor, with its class and prompt where the chosen model is the one that drew
            it: another may not know them."""
            path, drew, *known = picture
            return path, *(known if drew == now else ("", "")), gr.Tabs(selected="edit")

        drawn.gallery.select(choose, [drawn.gallery, drawn.conditions], [chosen, onward], **PRIVATE)
        onward.click(take, [chosen, model], [*edited, tabs], **PRIVATE)

        def follow(values: dict[str, Any], session: str) -> list[Any]:
            found = models.load(values["model"])
            return [gr.Dropdown(info=found.summary), *(update(found) for _, update in shared.followers)]

        outputs = [model, *(component for component, _ in shared.followers)]
        model.input(answer(follow, {"model": model}), model, outputs, **QUEUED)

        def listing() -> dict[str, str]:
            """The models by name, and what each is, or why it cannot be read; those that were not read yet are read."""
            return {name: summary_of(name) for name in models.names}

        def summary_of(name: str) -> str:
            try:
                return models.summary(name)
            except UserError as error:
                return sentence(error)

        api(listing, api_name="models")

        def leave(request: gr.Request) -> None:
            jobs.stop(request.session_hash or "")

        page.unload(leave)
    # Not open: otherwise a request to `run/` would not wait for its turn.
    page.queue(max_size=limits.most_waiting, default_concurrency_limit=1, api_open=False)
    return closed(page)
