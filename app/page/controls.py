"""Controls that the tabs share, and how their functions answer: as an API with names, errors as one sentence."""

import html
import inspect
import os
import re
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.data_classes import ImageData
from gradio.utils import get_upload_folder

from vqgen.config import one_line
from vqgen.errors import UserError
from vqgen.options import Option, options
from vqgen.sampling.settings import SamplingOptions
from vqgen.sampling.write_samples import Series

from .drawing import Jobs, Picture, Session, draw, pack

SETTINGS = {option.name: option for option in options(SamplingOptions)}


def image_file() -> gr.Image:
    """An upload of one image that comes as the path of the file itself: nothing decodes it before it is checked.

    No subclass: gradio writes a stub file beside the source of each.
    """
    found = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], image_mode=None, height=200)

    def preprocess(payload: ImageData | None) -> str | None:
        return None if payload is None else payload.path

    found.preprocess = preprocess
    return found


def told(text: str) -> gr.Error:
    """An error that shows a text until it is closed; the browser takes it for HTML."""
    return gr.Error(html.escape(text, quote=False), duration=None, title="", print_exception=False)


def names_others(value: Any, folder: str) -> bool:
    """Whether a value of a request, as read from JSON, names a file that is not below `folder`, at any depth."""
    if isinstance(value, dict):
        path = value.get("path")
        return (path is not None and not is_below(path, folder)) or any(names_others(v, folder) for v in value.values())
    return isinstance(value, list) and any(names_others(each, folder) for each in value)


def is_below(path: Any, folder: str) -> bool:
    """Whether a value is the absolute path of something in a folder, with all links followed."""
    if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
        return False
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def closed(page: gr.Blocks) -> gr.Blocks:
    """Let a page refuse values with a file that was not uploaded to it; what Gradio itself refuses is as `told`.

    Gradio fetches addresses, and checks paths only where a value is marked as a file. It does so whatever the component
    is, and an update makes a new component: so not each of them is guarded.
    """
    prepare, folder = page.preprocess_data, get_upload_folder()

    async def checked(block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False) -> list[Any]:
        if names_others(inputs, folder):
            raise told("Found a file by its path or address, expected one that was uploaded to this page.")
        try:
            return await prepare(block_fn, inputs, state, explicit_call)
        except gr.Error as error:  # of Gradio's own checks, with what was found
            raise told(error.message) from None

    page.preprocess_data = checked
    return page


def label_of(name: str) -> str:
    """The label of an option on the page: `top_p` -> Top p."""
    return name.replace("_", " ").capitalize()


def without_flags(text: str) -> str:
    """A text in which options are called by their labels."""
    return re.sub(r"(?<![\w/-])--([a-z]+(?:-[a-z]+)*)", lambda m: label_of(m[1].replace("-", "_")), text)


def short(text: str) -> str:
    """The beginning of an option's help text: its first part, without what is in brackets."""
    return without_flags(re.split(r"[;:.](?: |$)", re.sub(r" \([^)]*\)", "", text))[0]) + "."


def sentence(error: UserError) -> str:
    """An error of the command line as a sentence for the page."""
    text = without_flags(one_line(str(error)))
    return text[:1].upper() + text[1:].rstrip(".") + "."


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A new folder in `folder` that is removed at the end; errors name its files without their place on the server."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            yield Path(place)
        except UserError as error:
            raise type(error)(str(error).replace(os.path.join(place, ""), "")) from error


def answer(function: Callable[..., Any], inputs: Mapping[str, Component]) -> Callable[..., Any]:
    """A function of (values by name, session) as one of the values of `inputs` in turn, whose names the API has.

    What a user can mend is one sentence on the page. Any other exception is printed where the server runs.
    """

    def known(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if isinstance(error, UserError):
            return told(sentence(error))
        print("".join(traceback.format_exception(error)), file=sys.stderr)
        return told("This is a defect of vqgen, whose traceback is where the server runs; please report it.")

    def arguments(given: tuple[Any, ...]) -> tuple[dict[str, Any], Session]:
        request, *values = given
        session = Session(request.session_hash or "", request.request.state.arrived)
        return dict(zip(inputs, values, strict=True)), session

    def once(*given: Any) -> Any:
        try:
            return function(*arguments(given))
        except Exception as error:
            raise known(error) from None

    def stream(*given: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments(given))
        except Exception as error:
            raise known(error) from None

    chosen = stream if inspect.isgeneratorfunction(function) else once
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    # The API fills in what a caller leaves out by the default of the parameter, or the value of the component.
    parameters = [inspect.Parameter(name, kind, default=getattr(c, "value", None)) for name, c in inputs.items()]
    request = inspect.Parameter("request", kind, annotation=gr.Request)
    chosen.__signature__ = inspect.Signature([request, *parameters])  # type: ignore[attr-defined]
    chosen.__annotations__ = {"request": gr.Request}
    chosen.__doc__ = function.__doc__
    return chosen


def setting_control(option: Option, usual: Any) -> Component:
    """The control of a sampling setting, by its type; empty, and showing what it then is, until it is set."""
    about: dict[str, Any] = {"label": label_of(option.name), "info": short(option.help), "min_width": 160}
    if choices := typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else ():
        return gr.Dropdown([("", ""), *((each, each) for each in choices)], value="", **about)
    return gr.Textbox("", placeholder=shown(usual), **about)  # an empty gr.Number is 0 in the browser


def setting_update(usual: Any) -> Any:
    """What changes of a control with the model."""
    return gr.update(placeholder=shown(usual)) if not isinstance(usual, str) else gr.update()


def shown(value: Any) -> str:
    """A setting as text."""
    return " ".join(f"{each:g}" for each in value) if isinstance(value, (list, tuple)) else f"{value:g}"


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings among the values of a request that are not empty; lists are words."""
    found = {name: values[name] for name in SETTINGS if values.get(name) not in (None, "")}
    lists = {name for name, option in SETTINGS.items() if typing.get_origin(option.type) is list}
    return {name: words_of(value) if name in lists else value for name, value in found.items()}


def words_of(text: str | None) -> list[str] | None:
    """The words of a text field; None where there are none."""
    return (text or "").split() or None


def gallery(label: str, columns: int, size: str = "pictures") -> gr.Gallery:
    """Images that are shown, not uploaded; `size` is a class of `style.css`."""
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        interactive=False,
        elem_classes=["pictures", size],
        format="png",
        height="auto",
        object_fit="contain",
        buttons=["fullscreen"],
    )


class Results:
    """Where a drawing appears: a line of text, the images with what each was drawn of, and the archive."""

    def __init__(self, label: str) -> None:
        self.status = gr.Markdown("", label="Status", elem_classes="status")
        self.gallery = gallery(label, 8)
        self.archive = gr.DownloadButton("Download as zip", size="sm", interactive=False)
        self.conditions = gr.State([])
        """Model, class and prompt of each image that is shown, "" where it has none."""
        self.outputs = [self.gallery, self.archive, self.status, self.conditions]

    @property
    def folder(self) -> Path:
        """Where temporary folders lie: all of it is removed when the program ends."""
        return Path(self.gallery.GRADIO_CACHE).parent  # from the cache itself Gradio would show files without a copy

    def follow(self, series: Series, jobs: Jobs, session: str, given: Mapping[str, Path]) -> Iterator[list[Any]]:
        """Values of `outputs` while a series is drawn."""
        with temporary(self.folder) as place, jobs.job(session) as job:
            pictures: list[Picture] = []

            def conditions() -> list[tuple[str, str, str]]:
                return [(str(series.config.model), picture.class_name, picture.prompt) for picture in pictures]

            yield [[], None, f"Drawing {series.n} images …", []]
            for pictures in draw(series, place, jobs, job):
                yield [captioned(pictures), None, f"{len(pictures)} of {series.n} images", conditions()]
            late = f" after {jobs.most_seconds:g} s, the longest a drawing may take" if job.late else ""
            if not pictures:
                yield [[], None, f"Stopped{late}.", []]
                return
            stopped = f"Stopped{late}: " if len(pictures) < series.n else ""
            mean = sum(picture.nats for picture in pictures) / len(pictures)
            text = f"{stopped}{len(pictures)} of {series.n} images, on average {mean:.1f} nats each"
            packed = str(pack(series, place, pictures, given))
            yield [captioned(pictures), packed, text, conditions()]


def captioned(pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """Pictures as a gallery takes them."""
    return [(str(picture.path), picture.caption) for picture in pictures]
