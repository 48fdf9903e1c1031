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
from vqgen.errors import UserError, lacks_memory
from vqgen.options import Option, options
from vqgen.sampling.settings import SamplingOptions
from vqgen.sampling.write_samples import Series

from .drawing import Jobs, Picture, Session, draw, pack

SETTINGS = {option.name: option for option in options(SamplingOptions)}
OPTION_OF = {
    "classes": "class", "class_name": "class", "prompts": "prompt", "sides": "extend", "rows": "keep_rows",
    "share": "vary", "degraded": "source",
}  # fmt: skip
"""Input of the page -> the option of vqgen-sample that it gives, where that has another name."""


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
    """Let a page refuse values with a file that was not uploaded to it; what Gradio itself refuses is as `told`,
    values of other types than its components take included.

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
        except ValueError as error:
            raise told(misfit(block_fn, inputs, error)) from None

    page.preprocess_data = checked
    return page


def misfit(block_fn: Any, inputs: Sequence[Any], error: ValueError) -> str:
    """A sentence on values that components cannot take; it names the parameter where Gradio's error says which."""
    place = re.search(r"component at index (\d+)", str(error))
    index = int(place[1]) if place else 0
    if not place or not (kind := block_fn.inputs[index].api_info().get("type")):
        return "The values of this request do not fit its parameters; see Use via API at the foot of the page."
    return f"{block_fn.input_parameter_names[index]}: found {inputs[index]!r:.80}, expected a value of the type {kind}."


def label_of(name: str) -> str:
    """The label of a setting on the page: `top_p` -> Top p."""
    return name.replace("_", " ").capitalize()


def labels_of(inputs: Mapping[str, Component]) -> dict[str, str]:
    """Option -> what it is called on the page, in a tab with these inputs."""
    image = dict.fromkeys(("init_image", "source_image"), "the image")
    found = {"size": "Height and width", **image, **{name: label_of(name) for name in SETTINGS}}
    return found | {OPTION_OF.get(name, name): str(getattr(each, "label", name)) for name, each in inputs.items()}


def without_flags(text: str, labels: Mapping[str, str]) -> str:
    """A text in which options are called by their labels, but for those after the name of a program."""

    def called(match: re.Match[str]) -> str:
        label = labels.get((match[2] or "").replace("-", "_"), match[0])
        return label if label.startswith("the ") or label == match[0] else f"{match[1] or ''}{label}"

    return re.sub(r"vqgen-[a-z]+ --[a-z-]+|(the )?(?<![\w/-])--([a-z]+(?:-[a-z]+)*)", called, text)


def short(text: str) -> str:
    """The beginning of an option's help text: its first part, without what is in brackets."""
    return without_flags(re.split(r"[;:.](?: |$)", re.sub(r" \([^)]*\)", "", text))[0], labels_of({})) + "."


def sentence(error: UserError, inputs: Mapping[str, Component] | None = None) -> str:
    """An error of the command line as a sentence for the page, in a tab with these inputs.

    It begins with a capital letter, unless with the name of a file.
    """
    text = without_flags(one_line(str(error)), labels_of(inputs or {}))
    begins = text[:1].upper() if re.match(r"\w+\W?( |$)", text) else text[:1]
    return begins + text[1:].rstrip(".") + "."


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
            return told(sentence(error, inputs))
        if lacks_memory(error):
            return told("There is not enough memory; ask for fewer or smaller images.")
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
    about |= {"value": "", **usual_shown(option, usual)}
    return gr.Dropdown(**about) if "choices" in about else gr.Textbox(**about)  # an empty gr.Number is 0 in the browser


def setting_update(name: str, usual: Any) -> Any:
    """What changes of the control of a setting with the model: what it shows while it is empty."""
    return gr.update(**usual_shown(SETTINGS[name], usual))


def usual_shown(option: Option, usual: Any) -> dict[str, Any]:
    """How the control of a setting shows the value that it has while it is empty: as the name of the empty choice, or
    in the empty field."""
    if typing.get_origin(option.type) is typing.Literal:
        choices = typing.get_args(option.type)
        return {"choices": [(f"as recommended: {usual}", ""), *((each, each) for each in choices)]}
    return {"placeholder": " ".join(f"{each:g}" for each in (usual if isinstance(usual, (list, tuple)) else [usual]))}


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
        self.kind = label
        """What is drawn there, for `Jobs`."""
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
        with temporary(self.folder) as place, jobs.job(session, self.kind) as job:
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
            text += "" if stopped else left_out(series)
            packed = str(pack(series, place, pictures, given))
            yield [captioned(pictures), packed, text, conditions()]


def left_out(series: Series) -> str:
    """The end of a line on the images of a series: how many of the prompts and classes that were given it leaves out,
    "" where none."""
    given = {"prompts": series.config.prompts, "classes": series.config.class_}
    kinds = [name for name, values in given.items() if values]
    count = series.generator.conditioning.cycle(series.conditions)
    if not kinds or series.n >= count:
        return ""
    what = kinds[0] if len(kinds) == 1 else "pairs of prompt and class"
    return f"; of {count} {what} these are the first {series.n}, ask for {count} images to have all"


def captioned(pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """Pictures as a gallery takes them."""
    return [(str(picture.path), picture.caption) for picture in pictures]
