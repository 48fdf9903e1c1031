"""What the tabs are built on: the models, limits and jobs of the page, and the parts that several tabs have."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from vqgen.sampling.write_samples import Series

from .controls import SETTINGS, Results, setting_control, setting_update
from .drawing import Jobs, defaults_of, series_of
from .models import Loaded, Models
from .program import LimitConfig

PRIVATE: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
"""Of events that are not for the API, and need no turn."""
QUEUED: dict[str, Any] = {**PRIVATE, "queue": True}
"""Of events that are not for the API, and read images or models."""
WORK = "work"
"""The queue of all that computes: one request at a time."""


def lines_of(text: str | None) -> list[str] | None:
    """The lines of a text field that are not empty; None where there are none."""
    return [line for line in (text or "").splitlines() if line.strip()] or None


def one_of(value: Any) -> list[Any] | None:
    """The value of a field for one class as a list; None where it is empty. 0 is a class."""
    return None if value in (None, "") else [value]


def prompt_update(model: Loaded) -> Any:
    """What changes of a prompt with the model: where it takes none, none stays in the hidden field."""
    return gr.Textbox(visible=True) if model.takes_text else gr.Textbox(value="", visible=False)


def random_seed() -> int:
    """A seed that a visitor can write down."""
    return random.randrange(10**6)


@dataclass
class Page:
    """The page while it is built, and what its functions share."""

    models: Models
    limits: LimitConfig
    jobs: Jobs
    first: Loaded
    """The model that is chosen when the page opens."""
    model: gr.Dropdown
    followers: list[tuple[Any, Callable[[Loaded], Any]]] = field(default_factory=list)

    def follow_model(self, component: Any, update: Callable[[Loaded], Any]) -> None:
        """Let a component change with the model that is chosen at the top."""
        self.followers.append((component, update))

    def settings(self, model: Loaded | None = None) -> dict[str, Any]:
        """The controls of the sampling settings, by name; they show the values that `model` recommends.

        By default it is the model that is chosen at the top, and they change with it.
        """
        usual = defaults_of(model or self.first)
        with gr.Accordion("Sampling settings", open=False):
            gr.Markdown("What is left empty is as the model recommends.")
            with gr.Row():
                found = {name: setting_control(option, usual[name]) for name, option in SETTINGS.items()}
        for name, control in () if model else found.items():
            self.follow_model(control, lambda m, name=name: setting_update(name, defaults_of(m)[name]))
        return found

    def one_class(self, info: str = "") -> gr.Dropdown:
        """A class, or none."""
        about: dict[str, Any] = {"label": "Class", "info": info or None, "allow_custom_value": True}
        found = gr.Dropdown(["", *self.first.classes], value="", visible=bool(self.first.classes), **about)
        self.follow_model(found, lambda m: gr.Dropdown(["", *m.classes], value="", visible=bool(m.classes)))
        return found

    def one_prompt(self, info: str = "") -> gr.Textbox:
        """A text, or none."""
        about: dict[str, Any] = {"label": "Prompt", "info": info or None, "visible": self.first.takes_text}
        found = gr.Textbox("", max_length=self.limits.prompt_characters, **about)
        self.follow_model(found, prompt_update)
        return found

    def buttons(self, label: str) -> tuple[gr.Button, gr.Button]:
        """A button that begins, and one that stops."""
        with gr.Row():
            return gr.Button(label, variant="primary", min_width=120), gr.Button("Stop", min_width=80)

    def series(self, model: Loaded, values: Mapping[str, Any], settings: Mapping[str, Any]) -> Series:
        """The images of a request, checked. Raises `UserError`."""
        return series_of(model, values, self.limits, settings)

    def runs(
        self,
        button: gr.Button,
        function: Callable[..., Any],
        inputs: Mapping[str, Any],
        outputs: Sequence[Any],
        name: str,
        js: str | None = None,
    ) -> Any:
        """Let a button call a function of the queue, which the API has by this name; return the event."""
        return button.click(
            function, list(inputs.values()), list(outputs), api_name=name, concurrency_id=WORK, concurrency_limit=1,
            show_progress="minimal", js=js, trigger_mode="once",
        )  # fmt: skip

    def draws(
        self,
        buttons: tuple[gr.Button, gr.Button],
        function: Callable[..., Any],
        inputs: Mapping[str, Any],
        results: Results,
        name: str,
        further: Sequence[Any] = (),
        js: str | None = None,
    ) -> Any:
        """Let the first button draw, see `runs`, and the second one stop what the visitor draws there; `further` are
        outputs after those of the results."""
        (begin, stop), archive = buttons, results.archive

        def end(request: gr.Request) -> Any:
            running = self.jobs.stop(request.session_hash or "", results.kind)
            text = "Nothing is being drawn for you here; what waits ends when its turn comes."
            return gr.update() if running else text

        begin.click(lambda: gr.update(interactive=False), None, archive, **PRIVATE)
        event = self.runs(begin, function, inputs, [*results.outputs, *further], name, js)
        for ended in (event.success, event.failure):  # after a failure the images before it may still be shown
            ended(lambda path: gr.update(interactive=bool(path)), archive, archive, **PRIVATE)
        # Not `cancels`: that would leave the drawing under way to its end, and give no archive of what is there.
        stop.click(end, None, results.status, **PRIVATE)
        return event
