"""The tab that restores images, or turns them into another kind, as a model was trained to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vqgen.errors import UsageError
from vqgen.tokenizer.codes.degrade import degrade, parse_degradations, source_seed
from vqgen.tokenizer.reconstruction import write_png_atomic

from .controls import Results, answer, image_file, setting_update, settings_of, temporary, told
from .drawing import defaults_of
from .shared import PRIVATE, QUEUED, Page, lines_of, one_of
from .uploads import as_url, png_url, read_upload

NONE = "No model here was trained to translate; train one on codes of `vqgen-tokenize --source`, and start with it."

NOT = ""
"""The image is taken as it is."""


def slider(before: str, after: str) -> str:
    """Two images behind a slider, see `page.js`."""
    return f'<before-after before="{before}" after="{after}"></before-after>'


def checked_chain(given: object, known: list[str]) -> str:
    """A chain of degradations of the model, or `NOT`. Raises `UsageError`."""
    if given in (None, NOT):
        return NOT
    if not isinstance(given, str) or given not in known:
        expected = " or ".join(map(repr, known)) or "none, as the model was trained on pairs"
        raise UsageError(f"degraded: found {str(given)[:80]!r}, expected {expected}")
    return given


def add(page: Page) -> None:
    """Build the tab."""
    tasks, limits = page.models.tasks, page.limits
    if not tasks:
        gr.Markdown(NONE)
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = gr.Dropdown(
                list(tasks.items()),
                value=next(iter(tasks.values())),
                label="Task and model",
                info="In place of the model above.",
            )
            image = image_file()
            worse = gr.Dropdown(
                [("no", NOT), *[(each.replace(" ", ", "), each) for each in page.models.degradations]],
                value=NOT,
                label="Degrade the image first",
                info="As in training. Grey or enlarged images keep what they show where this is named.",
            )
            with gr.Row():
                n = gr.Slider(1, limits.most_images, value=min(4, limits.most_images), step=1, label="Results")
                seed = gr.Number(0, label="Seed", precision=0)
            one = gr.Textbox("", label="Class", info="Its name, where it is known; the result follows it.")
            prompt = gr.Textbox(
                "",
                label="Prompt",
                info="For a model that was trained with captions.",
                max_length=limits.prompt_characters,
                visible=page.models.translate_text,
            )
            settings = page.settings(page.models.load_or(model.value, page.first))
            buttons = page.buttons("Translate")
        with gr.Column(scale=3, min_width=320):
            compared = gr.HTML("", elem_id="compared")
            results = Results("Translations")
    before = gr.State("")

    def translate(values: dict[str, Any], session: str) -> Iterator[list[Any]]:
        """Make images of an image, as the model was trained to. Yields after each batch; the last has the archive."""
        loaded = page.models.load(values["model"])
        generator = loaded.generator
        generator.check_translation()
        upload = read_upload(values["image"], generator.tokenizer.config.channels, limits)
        original = generator.fitted(upload[None], generator.source_size)
        specs = checked_chain(values["degraded"], page.models.degradations_of(values["model"])).split()
        asked = {
            "n": values["n"],
            "seed": values["seed"],
            "class": one_of(values["class_name"]),
            "prompt": lines_of(values["prompt"]),
            "source": specs or None,
        }
        with temporary(results.folder) as place:
            path, shown = place / "source.png", place / "degraded.png"
            write_png_atomic(path, original[0])
            series = page.series(loaded, {**asked, "source_image": [path]}, settings_of(values))
            seeds = [source_seed(series.config.seed, 0)]  # as `series` degrades it
            source = degrade(original, parse_degradations(specs), seeds) if specs else original
            files = {path.name: path}
            if specs:
                write_png_atomic(shown, source[0])
                files[shown.name] = shown
            for found in results.follow(series, page.jobs, session, files):
                yield [*found, png_url(source[0])]

    def compare(pictures: list[tuple[str, str]] | None, url: str, event: gr.SelectData | None = None) -> str:
        """Show a picture of the gallery beside its source."""
        index = event.index if event is not None else 0
        try:
            return slider(url, as_url(Path(pictures[index][0]).read_bytes())) if pictures and url else ""
        except FileNotFoundError:
            raise told("This image was removed, as it is old; translate again.") from None

    def first(pictures: list[tuple[str, str]] | None, url: str) -> str:
        return compare(pictures, url)

    def chosen(pictures: list[tuple[str, str]] | None, url: str, event: gr.SelectData) -> str:
        return compare(pictures, url, event)

    def recommended(values: dict[str, Any], session: str) -> list[Any]:
        """Let the settings show what another model recommends."""
        usual = defaults_of(page.models.load(values["model"]))
        return [setting_update(name, usual[name]) for name in settings]

    model.input(answer(recommended, {"model": model}), model, list(settings.values()), **QUEUED)
    inputs = {"model": model, "image": image, "degraded": worse, "class_name": one, "n": n, "seed": seed, **settings}
    inputs["prompt"] = prompt  # the last, as requests to the API may give the others by their places
    run = page.draws(buttons, answer(translate, inputs), inputs, results, "translate", [before])
    run.then(first, [results.gallery, before], compared, **PRIVATE)
    results.gallery.select(chosen, [results.gallery, before], compared, **PRIVATE)
