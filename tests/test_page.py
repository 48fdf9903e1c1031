"""vqgen-app without a browser: the models that are offered, uploads, what a request draws, and what is served."""

import asyncio
import base64
import io
import json
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import make_prior, make_square_prior, text_part
from PIL import Image

from vqgen.app.page.drawing import BATCH, Jobs, Session, Stopped, candidates, draw, pack, series_of
from vqgen.app.page.models import Loaded, Models, find_models, task_of
from vqgen.app.page.program import MASK_BYTES, AppConfig, LimitConfig, main
from vqgen.app.page.reconstruct import bits_of, code_map
from vqgen.app.page.server import POLICY, Guard, sweep
from vqgen.app.page.uploads import png_url, read_mask, read_upload
from vqgen.config import parse
from vqgen.errors import UsageError, UserError
from vqgen.prior.parts.source import MaskedSource, PairedSource
from vqgen.sampling.generator import SHIPPED, Generator
from vqgen.sampling.oversample import GROUP
from vqgen.sampling.sample import main as vqgen_sample
from vqgen.tokenizer.codes.format import SourceRecord

LIMITS = LimitConfig()


@pytest.fixture(scope="module", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the files of Gradio and its client, in place of the machine's."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files"))
        yield folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: one that fills in, a run with `prior/` in it, one that translates, and what is no model."""
    folder = tmp_path_factory.mktemp("models")
    make_square_prior(folder / "fills", MaskedSource(0.5))
    make_prior(folder / "run" / "prior")
    make_square_prior(folder / "colours", PairedSource(SourceRecord("degraded", [8, 8], "d" * 64, ["grey"])))
    (make_prior(folder / "damaged") / "model.safetensors").write_bytes(b"?")
    (folder / "broken").mkdir()
    (folder / "broken" / "vqgen.json").write_text("{")
    (folder / "notes.txt").write_text("no model")
    return folder


@pytest.fixture(scope="module")
def fills(models: Path) -> Loaded:
    return Models(models, "cpu", "fp32").load("fills")


def image_file(path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    pixels = torch.arange(size[0] * size[1] * 3, dtype=torch.long).remainder(251).to(torch.uint8)
    Image.fromarray(pixels.view(size[1], size[0], 3).numpy()).save(path)
    return path


def test_a_rate_is_that_of_conditions_that_the_prior_has_learned(fills: Loaded, tmp_path: Path) -> None:
    paired, codes = SourceRecord("degraded", [8, 8], "d" * 64, ["grey"]), torch.zeros(1, 8, 8, dtype=torch.long)

    def generator(name: str, **changed: float) -> Generator:
        path = make_square_prior(tmp_path / name, *([PairedSource(paired, 0.0)] if name == "sourced" else []))
        about = json.loads((path / "vqgen.json").read_text())
        (path / "vqgen.json").write_text(json.dumps(about | changed))
        return Generator.load(path, "cpu", "fp32")

    strict = generator("strict", label_dropout=0.0)
    with pytest.raises(UsageError, match=r"--class.*give one"):
        bits_of(strict, codes, "")
    for one, name in ((strict, "bag"), (fills.generator, "")):
        bits = bits_of(one, codes, name)
        assert bits is not None and bits.shape == (8, 8, 1) and bits.min() > 0
    assert bits_of(generator("sourced"), codes, "bag") is None
    part = text_part(["a red bag"] * 3, dropout=0.0, uncaptioned=False)
    captioned = Generator.load(make_square_prior(tmp_path / "captioned", part), "cpu", "fp32")
    with pytest.raises(UsageError, match=r"--prompt.*give one"):
        bits_of(captioned, codes, "bag")
    told = [bits_of(captioned, codes, name, text) for name, text in (("bag", "red"), ("bag", "a bag"), ("", "red"))]
    assert len({float(bits.sum()) for bits in told if bits is not None}) == 3
    assert "bits" not in code_map(codes[0, ..., None], None)


# ---- models ----


def test_sub_folders_that_are_priors_are_offered_and_nothing_else(models: Path) -> None:
    found = find_models(models)
    assert list(found) == ["colours", "damaged", "fills", "run", *SHIPPED]
    assert found["run"] == models / "run" / "prior"
    assert find_models(None) == SHIPPED


def test_a_folder_without_models_is_an_error_that_names_it(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=str(folder)):
            find_models(folder)


def test_a_model_called_as_that_of_the_package_is_offered_beside_it(tmp_path: Path) -> None:
    make_prior(tmp_path / "cifar10")
    found = find_models(tmp_path)
    assert len(found) == 1 + len(SHIPPED) and found["cifar10"] == tmp_path / "cifar10"


def test_models_are_loaded_once_and_only_by_the_names_that_are_offered(models: Path) -> None:
    found = Models(models, "cpu", "fp32")
    assert found.load("run") is found.load("run")
    wrong: list[Any] = ["../run", str(models / "run" / "prior"), "notes.txt", "broken", "", None, ["run"]]
    for name in wrong:
        with pytest.raises(UserError, match=r"^model: found"):
            found.load(name)


def test_errors_of_loading_name_the_model_and_not_its_place_on_disk(models: Path, tmp_path: Path) -> None:
    (make_prior(tmp_path / "damaged") / "model.safetensors").write_bytes(b"?")
    with pytest.raises(UserError) as caught:
        Models(tmp_path, "cpu", "fp32").load("damaged")
    assert "damaged" in str(caught.value) and str(tmp_path) not in str(caught.value)
    found = Models(tmp_path, "cpu", "fp32")
    (tmp_path / "damaged" / "vqgen.json").unlink()
    with pytest.raises(UserError, match=r"^the model damaged "):  # the page begins with a capital letter
        found.load("damaged")


def test_the_page_begins_with_the_first_model_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (make_prior(tmp_path / "a") / "model.safetensors").write_bytes(b"?")
    make_prior(tmp_path / "b")
    models = Models(tmp_path, "cpu", "fp32")
    assert models.first().name == "b" and models.names[0] == "a"
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "a/model.safetensors" in said
    models.folders = {"a": models.folders["a"]}
    with pytest.raises(UserError, match=r"a/model\.safetensors"):
        models.first()


def test_tasks_are_those_of_models_with_a_source(models: Path) -> None:
    found = Models(models, "cpu", "fp32").tasks
    assert list(found.values()) == ["colours", "cifar10-restorer"] and "grey" in next(iter(found))
    assert "night" in task_of({"description": "day to night"})


def test_a_description_that_vanishes_or_is_malformed_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = SourceRecord("degraded", [8, 8], "d" * 64, ["grey", "or", "blur:2", "jpeg:10"])
    for name in ("good", "number", "text", "word", "unknown"):
        make_square_prior(tmp_path / name, PairedSource(record))
    about = json.loads((tmp_path / "good" / "vqgen.json").read_text())
    wrong = {
        "number": {"degradations": 5},
        "text": {"degradations": [5]},
        "word": "grey",
        "unknown": {"degradations": ["x"]},
    }
    for name, source in wrong.items():
        (tmp_path / name / "vqgen.json").write_text(json.dumps({**about, "source": source}))
    models = Models(tmp_path, "cpu", "fp32")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(wrong) and all(any(f"{name}/vqgen.json" in line for line in said) for name in wrong)
    assert set(models.names) >= {"good", *wrong} and list(models.tasks.values()) == ["good", "cifar10-restorer"]
    for name in ("good", "number"):
        (tmp_path / name / "vqgen.json").unlink()
    assert models.degradations_of("good") == ["grey", "blur:2 jpeg:10"] and models.degradations_of("run") == []
    assert "grey" in models.degradations_of("cifar10-restorer") and "good" in models.tasks.values()


# ---- uploads ----


def test_uploads_are_decoded_as_the_program_does(tmp_path: Path) -> None:
    path = image_file(tmp_path / "a.png", (5, 4))
    assert read_upload(str(path), 3, LIMITS).shape == (3, 4, 5)
    assert read_upload(str(path), 1, LIMITS).shape == (1, 4, 5)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nrest"])
def test_broken_uploads_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"^image: "):
        read_upload(str(tmp_path / "a.png"), 3, LIMITS)
    with pytest.raises(UserError, match=r"^image: "):
        read_upload(None, 3, LIMITS)
    with pytest.raises(UserError, match="upload it again"):
        read_upload(str(tmp_path / "gone.png"), 3, LIMITS)
    with pytest.raises(UserError, match="draw it again"):
        read_upload(str(tmp_path / "gone.png"), 3, LIMITS, drawn=True)


def test_pixels_and_bytes_of_uploads_are_limited_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqgen.app.page.uploads.decode", lambda *_: pytest.fail("it was decoded"))
    path = tmp_path / "large.png"
    Image.new("L", (10_000, 10_000)).save(path, compress_level=1)
    with pytest.raises(UserError):
        read_upload(str(path), 3, LIMITS)
    with pytest.raises(UserError, match="at most 1 million"):
        read_upload(str(image_file(tmp_path / "b.png", (1001, 1000))), 3, LimitConfig(upload_megapixels=1))
    with pytest.raises(UserError, match=r"0\.001 MB"):
        read_upload(str(tmp_path / "b.png"), 3, LimitConfig(upload_megabytes=0.001))


def test_masks_are_what_was_painted() -> None:
    painted = torch.zeros(1, 6, 4, dtype=torch.uint8)
    painted[:, 2:4, 1] = 255
    url = png_url(painted)
    assert torch.equal(read_mask(url, LIMITS), painted[0] > 0)
    assert torch.equal(read_mask(url.partition(",")[2], LIMITS), painted[0] > 0)
    for wrong in ("http://example.com/a.png", "data:image/png;base64,AAAA", "äöü"):
        with pytest.raises(UserError, match=r"^mask: "):
            read_mask(wrong, LIMITS)


# ---- requests ----


def folder_of(series: Any, place: Path, *given: Path) -> tuple[list[Any], Path]:
    """All pictures of a series, and the folder that its zip holds."""
    place.mkdir()
    jobs = Jobs()
    with jobs.job("s") as check:
        parts = list(draw(series, place, jobs, check))
    assert [len(part) for part in parts] == [*range(BATCH, series.n, BATCH), series.n]
    out, files = place / "unpacked", {path.name: path for path in given}
    with zipfile.ZipFile(pack(series, place, parts[-1], files)) as file:
        file.extractall(out)
    return parts[-1], out


def test_a_request_draws_what_vqgen_sample_draws(models: Path, fills: Loaded, tmp_path: Path, cli: Any) -> None:
    series = series_of(fills, {"n": 10, "seed": 3, "class": ["bag", "1"]}, LIMITS, {"temperature": 0.8, "top_k": 5})
    pictures, out = folder_of(series, tmp_path / "page")
    words = f"--model {models / 'fills'} --n 10 --seed 3 --class bag 1 --temperature 0.8 --top-k 5 --precision fp32"
    assert cli(vqgen_sample, *words.split(), "--output", tmp_path / "other").code == 0
    for index in range(10):
        name = f"{index:05d}.png"
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    text = (out / "samples.json").read_text()
    listed = json.loads(text)
    assert [image["nats"] for image in listed["images"]] == [picture.nats for picture in pictures]
    assert (
        str(models) not in (out / "samples.json").read_text()
        and str(tmp_path) not in (out / "samples.json").read_text()
    )
    again = cli(vqgen_sample, *words.split(), "--output", out)
    assert again.code == 0 and "already" in again.out


def test_an_edit_can_be_made_again_from_its_zip(models: Path, fills: Loaded, tmp_path: Path, cli: Any) -> None:
    image = image_file(tmp_path / "image.png")
    mask = tmp_path / "mask.png"
    whole = Image.new("L", (16, 16))
    whole.paste(255, (4, 4, 10, 10))
    whole.save(mask)
    series = series_of(fills, {"n": 2, "init_image": [image], "mask": [mask]}, LIMITS, {"source_guidance_scale": 3})
    _, out = folder_of(series, tmp_path / "page", image, mask)
    given = ["--init-image", out / "image.png", "--mask", out / "mask.png", "--source-guidance-scale", 3]
    words = ["--model", models / "fills", "--n", 2, "--precision", "fp32", *given, "--output", tmp_path / "other"]
    assert cli(vqgen_sample, *words).code == 0
    for name in ("00000.png", "00001.png"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    listed = (out / "samples.json").read_text()
    assert json.loads(listed)["init_images"] == ["image.png"] and json.loads(listed)["mask"] == ["mask.png"]
    assert str(tmp_path) not in listed


@pytest.mark.parametrize("name", ["cifar10", "cifar10 (package)", "fills"])
def test_the_zip_names_the_model_as_the_page_does(name: str, fills: Loaded, tmp_path: Path) -> None:
    """Also where the visitor's model is called as one of the package."""
    series = series_of(Loaded(name, fills.generator), {"n": 1}, LIMITS, {})
    listed = json.loads((folder_of(series, tmp_path / "page")[1] / "samples.json").read_text())
    assert listed["model"] == name and str(SHIPPED["cifar10"]) not in str(listed)


def test_settings_that_are_not_given_are_as_the_model_recommends(models: Path) -> None:
    loaded = Generator.load(models / "fills", "cpu", "fp32")
    loaded.recommended = {"temperature": 0.5, "guidance_scale": 2.0}
    model = Loaded("fills", loaded)
    plain = series_of(model, {"n": 1}, LIMITS, {})
    assert (plain.settings.temperature, plain.settings.guidance_scale) == (0.5, 2.0)
    given = series_of(model, {"n": 1}, LIMITS, {"temperature": 1})
    assert (given.settings.temperature, given.settings.guidance_scale) == (1, 2.0)


@pytest.mark.parametrize(
    ("values", "settings", "named"),
    [
        ({"n": 101}, {}, "--n"),
        ({"n": "many"}, {}, "--n"),
        ({"n": 16, "class": ["bag"]}, {"oversample": 100.0}, "--oversample"),
        ({"n": 1, "class": ["bag"]}, {"oversample": 100.0}, "--oversample"),
        ({"n": 1, "class": ["unicorn"]}, {}, "unicorn"),
        ({"n": 1, "prompt": ["x" * 501]}, {}, "--prompt"),
        ({"n": 1, "prompt": ["a shoe"]}, {}, "--prompt"),
        ({"n": 1, "size": [10**6, 10**6]}, {}, "--size"),
        ({"n": 100, "size": [512, 512]}, {}, "--size"),
        ({"n": 1, "seed": -1}, {}, "--seed"),
        ({"n": 1}, {"temperature": -1.0}, "--temperature"),
        ({"n": 1}, {"temperature": float("nan")}, "--temperature"),
        ({"n": 1}, {"top_k": "a"}, "--top-k"),
        ({"n": 1}, {"guidance_interval": ["0", "x"]}, "--guidance-interval"),
        ({"n": 1}, {"guidance_interval": ["0"] * 10**6}, "--guidance-interval: found 1000000 characters"),
        ({"n": 1}, {"guidance_interval": ["[" * 10**6]}, "--guidance-interval: found 1000000 characters"),
        ({"n": 1, "extend": [10**4, 0, 0, 0]}, {}, "--extend: found a side"),
    ],
)
def test_requests_beyond_the_limits_are_refused(
    fills: Loaded, values: dict[str, Any], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        series_of(fills, values, LIMITS, settings)


def test_images_are_counted_where_their_number_is_not_given_and_with_the_candidates(fills: Loaded) -> None:
    with pytest.raises(UsageError, match="--n"):
        series_of(fills, {"n": None}, LimitConfig(most_images=10), {})  # as many as vqgen-sample draws
    with pytest.raises(UsageError, match=r"^--prompt: fills was trained without text"):
        series_of(fills, {"n": 1, "prompt": ["a bag"]}, LimitConfig(), {})
    with pytest.raises(UsageError, match="--class: found 11 classes, at most 10"):
        series_of(fills, {"n": 1, "class": ["bag"] * 11}, LimitConfig(most_images=10), {})
    asked: tuple[Any, ...] = ({"n": 16, "class": ["bag"]}, LimitConfig(most_images=32), {"oversample": 2.0})
    series = series_of(fills, *asked)
    assert candidates(series) == 32
    with pytest.raises(UsageError, match="--oversample"):
        series_of(fills, asked[0], LimitConfig(most_images=32, most_megapixels=0.005), asked[2])


def test_a_stopped_drawing_ends_between_two_codes_and_keeps_what_is_there(fills: Loaded, tmp_path: Path) -> None:
    jobs, codes = Jobs(), 0
    series = series_of(fills, {"n": 3 * BATCH}, LIMITS, {})
    with jobs.job("mine") as check, jobs.job("other") as others:

        def counted(*_: Any) -> None:
            nonlocal codes
            codes += 1
            if codes == 100:  # of 64 an image: in the second batch
                assert jobs.stop("mine") == 1
            check()

        parts = list(draw(series, tmp_path, jobs, counted))
        others()  # is not stopped
        with pytest.raises(Stopped):
            check()
    assert [len(part) for part in parts] == [BATCH] and codes == 100
    assert jobs.running == 0 and jobs.stop("mine") == 0
    with zipfile.ZipFile(pack(series, tmp_path, parts[-1], {})) as file:
        listed = json.loads(file.read("samples.json"))
        assert listed["n"] == len(listed["images"]) == BATCH
        assert {f"{i:05d}.png" for i in range(BATCH)} | {"grid.png", "samples.json"} == set(file.namelist())


def test_a_stopped_drawing_of_several_classes_keeps_all_that_is_there(fills: Loaded, tmp_path: Path) -> None:
    series = series_of(fills, {"n": 3 * GROUP, "class": fills.classes}, LIMITS, {"oversample": 1.25})
    parts = draw(series, tmp_path, Jobs(), lambda *_: None)
    pictures = next(parts)  # all of the first class: every third image
    assert len(pictures) == GROUP and pictures[1].path.name == "00003.png"
    with zipfile.ZipFile(pack(series, tmp_path, pictures, {})) as file:
        assert json.loads(file.read("samples.json"))["n"] == 1
        assert {picture.path.name for picture in pictures} | {"grid.png", "samples.json"} == set(file.namelist())
    pictures[0].path.unlink()  # as if another class had been first
    with zipfile.ZipFile(pack(series, tmp_path, pictures[1:], {})) as file:
        assert {picture.path.name for picture in pictures[1:]} == set(file.namelist())


def test_errors_have_no_place_of_the_server(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    from vqgen.app.page.controls import temporary

    with pytest.raises(UsageError, match=r"^--box: ends outside of image\.png, which"), temporary(tmp_path) as place:
        raise UsageError(f"--box: ends outside of {place / 'image.png'}, which is small")
    assert not list(tmp_path.iterdir())


def test_a_stop_holds_for_what_waits_and_not_for_what_comes_later(fills: Loaded, tmp_path: Path) -> None:
    jobs, series = Jobs(), series_of(fills, {"n": 1}, LIMITS, {})
    waits, other = Session("mine", time.monotonic()), Session("other", time.monotonic())
    assert jobs.stop("mine") == 0
    later = Session("mine", time.monotonic() + 1e-6)
    found = []
    for session in (waits, other, later):
        with jobs.job(session) as check:
            found.append(len(list(draw(series, tmp_path, jobs, check))))
    assert found == [0, 1, 1]


def test_a_stop_of_one_kind_leaves_the_drawings_of_others() -> None:
    jobs = Jobs()
    with jobs.job("mine", "drawn") as drawn, jobs.job("mine", "edited") as edited, jobs.job("other", "drawn") as other:
        assert jobs.stop("mine", "drawn") == 1
        assert [job.stop.is_set() for job in (drawn, edited, other)] == [True, False, False]
        arrived = Session("mine", time.monotonic())
        assert jobs.stop("mine", "translated") == 0
        kinds = ("translated", "edited")
        assert [_stopped(jobs, arrived, kind) for kind in kinds] == [True, False]
        assert jobs.stop("mine") == 2
        assert edited.stop.is_set() and not other.stop.is_set()
        assert all(_stopped(jobs, arrived, kind) for kind in kinds)
    assert jobs.running == 0


def _stopped(jobs: Jobs, session: Session, kind: str) -> bool:
    """Whether a drawing whose turn comes now ends at once."""
    with jobs.job(session, kind) as job:
        return job.stop.is_set()


def test_the_line_says_which_of_the_prompts_and_classes_are_left_out(fills: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    import gradio as gr

    from vqgen.app.page.controls import Results, left_out

    with gr.Blocks(analytics_enabled=False):
        results = Results("Drawn images")
    Path(results.folder).mkdir(parents=True, exist_ok=True)
    lines = {}
    for n in (2, 3):
        series = series_of(fills, {"n": n, "class": ["bag", "shirt", "shoe"]}, LIMITS, {})
        lines[n] = [part[2] for part in results.follow(series, Jobs(), "mine", {})][-1]
    assert "3 classes" in lines[2] and "first 2" in lines[2] and lines[3].endswith("nats each")
    assert left_out(series_of(fills, {"n": 1}, LIMITS, {})) == ""  # every class, as none was given
    part = text_part(["a red bag"] * 3)
    read = Loaded("read", Generator.load(make_square_prior(tmp_path / "read", part), "cpu", "fp32"))
    texts = {"prompt": ["red", "blue"]}
    assert "2 prompts" in left_out(series_of(read, {"n": 1, **texts}, LIMITS, {}))
    pairs = {"class": ["bag", "shirt", "shoe"], **texts}
    assert "6 pairs of prompt and class" in left_out(series_of(read, {"n": 5, **pairs}, LIMITS, {}))
    assert left_out(series_of(read, {"n": 6, **pairs}, LIMITS, {})) == ""


def test_errors_call_options_as_the_tab_does_and_models_by_their_names() -> None:
    gr = pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    from vqgen.app.page.controls import sentence, short

    labels = {"n": "Variations", "sides": "Sides", "rows": "Rows that are kept", "classes": "Classes"}
    inputs = {name: gr.Textbox(label=label) for name, label in labels.items()}
    expected = {
        "--n: found 101": "Variations: found 101.",
        "--extend: found 1 2": "Sides: found 1 2.",
        "give --keep-rows, or --top-k": "Give Rows that are kept, or Top k.",
        "--class: found x": "Classes: found x.",
        "--size: found 1": "Height and width: found 1.",
        "--source-image: trained without": "The image: trained without.",
        "larger than the --init-image": "Larger than the image.",
        "train one on codes of vqgen-tokenize --source": "Train one on codes of vqgen-tokenize --source.",
        "trained without --inpainting": "Trained without --inpainting.",
        "ffhq-small/model.safetensors is damaged": "ffhq-small/model.safetensors is damaged.",
        "image.png is small": "image.png is small.",
    }
    assert {text: sentence(UserError(text), inputs) for text in expected} == expected
    assert short("Guidance by the --source-image, or that of --guidance-scale: 1 = none") == (
        "Guidance by the image, or that of Guidance scale."
    )


def test_an_empty_setting_shows_what_the_model_recommends() -> None:
    pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    from vqgen.app.page.controls import SETTINGS, setting_control, setting_update

    schedule: Any = setting_control(SETTINGS["guidance_schedule"], "cosine")
    assert schedule.value == "" and schedule.choices[0] == ("as recommended: cosine", "")
    changed = setting_update("guidance_schedule", "linear")["choices"]
    assert changed == [("as recommended: linear", ""), *schedule.choices[1:]]
    assert setting_update("guidance_interval", [0.2, 0.8])["placeholder"] == "0.2 0.8"


def test_a_lack_of_memory_is_no_defect(capsys: pytest.CaptureFixture[str]) -> None:
    gr = pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    from vqgen.app.page.controls import answer

    def fails(values: dict[str, Any], session: str) -> None:
        raise values["error"]

    request = SimpleNamespace(session_hash="s", request=SimpleNamespace(state=SimpleNamespace(arrived=0.0)))
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        with pytest.raises(gr.Error, match="not enough memory"):
            answer(fails, {"error": gr.Textbox()})(request, error)
    assert capsys.readouterr().err == ""
    with pytest.raises(gr.Error, match="defect"):
        answer(fails, {"error": gr.Textbox()})(request, RuntimeError("another"))
    assert "Traceback" in capsys.readouterr().err


def test_the_number_of_a_code_is_explained_where_codes_have_depths() -> None:
    pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    from vqgen.app.page.codebook import numbering

    def model(depth: int) -> Any:
        return SimpleNamespace(generator=SimpleNamespace(tokenizer=SimpleNamespace(depth=depth, codebook_size=512)))

    assert numbering(model(1)) is None and "d × 512 + c" in (numbering(model(4)) or "")


def test_a_drawing_that_takes_too_long_ends_with_what_is_there(fills: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    import gradio as gr

    from vqgen.app.page.controls import Results

    now, pace, series = 0.0, 0.0, series_of(fills, {"n": 3 * BATCH}, LIMITS, {})

    def monotonic() -> float:
        nonlocal now
        now += pace
        return now

    monkeypatch.setattr("vqgen.app.page.drawing.time", SimpleNamespace(monotonic=monotonic))
    with gr.Blocks(analytics_enabled=False):
        results = Results("Drawn images")
    Path(results.folder).mkdir(parents=True, exist_ok=True)
    parts = []
    for part in results.follow(series, Jobs(most_seconds=30), "mine", {}):
        parts.append((len(part[0]), bool(part[1] and zipfile.is_zipfile(part[1])), part[2]))
        now += 20  # the first batch begins in time, the second does not
    assert [part[:2] for part in parts] == [(0, False), (BATCH, False), (BATCH, True)]
    assert parts[-1][2].startswith(f"Stopped after 30 s, the longest a drawing may take: {BATCH} of {3 * BATCH} images")
    found = []
    for part in results.follow(series, Jobs(most_seconds=10), "mine", {}):
        found.append(part[2])
        now += 20
    assert found[-1] == "Stopped after 10 s, the longest a drawing may take."
    pace, begun = 1.0, now  # a second each time that the clock is read: after each of the 64 codes
    shown = [len(part[0]) for part in results.follow(series, Jobs(most_seconds=100), "mine", {})]
    assert shown == [0, BATCH, BATCH] and now - begun < 128  # it ended within the second batch


# ---- the program and its server ----


def test_it_listens_on_this_machine_alone_unless_asked() -> None:
    config = parse(AppConfig, [])
    assert config.host == "127.0.0.1" and config.share is False
    assert parse(AppConfig, ["--host", "0.0.0.0"]).host == "0.0.0.0"


def test_a_wrong_folder_or_port_is_one_line(cli: Any, tmp_path: Path) -> None:
    assert cli(main, "--port", "70000").code == 2
    pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    found = cli(main, "--models", tmp_path)
    assert found.code == 1 and str(tmp_path) in found.err and len(found.err.splitlines()) == 1


def served(path: str, length: bytes = b"0", chunked: bool = False, **limits: Any) -> tuple[int, str]:
    """Status and body of a request that passes the guard to an application that answers all with 200."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    headers = [(b"content-length", length)] * bool(length) + [(b"transfer-encoding", b"chunked")] * chunked
    given = {"type": "http", "path": path, "method": "POST", "headers": headers}
    guard = Guard(app, **limits)
    asyncio.run(guard(given, receive, send))
    assert guard.arriving == 0
    answered = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    assert answered["content-security-policy"] == POLICY
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:]).decode()


def test_routes_that_fetch_elsewhere_or_show_more_are_closed() -> None:
    for path in ("/", "/config", "/assets/index.js", "/gradio_api/queue/join", "/gradio_api/file=/tmp/x/a.png"):
        assert served(path)[0] == 200, path
    for path in (
        "/gradio_api/file=http://example.com/a", "/gradio_api/file=https:/example.com", "/gradio_api/file=ftp://a",
        "/gradio_api/proxy=http://example.com", "/monitoring", "/gradio_api/vibe-code", "/gradio_api/runs", "/docs",
        "/gradio_api/process_recording", "/gradio_api/component_server", "/login", "//config", "/nothing",
        "/gradio_api/api/draw",
    ):  # fmt: skip
        assert served(path)[0] == 404, path


def test_uploads_beyond_their_limits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join, upload, limits = (
        "/gradio_api/queue/join",
        "/gradio_api/upload",
        {"folder": str(tmp_path), "most_uploaded": 2**20, "most_stored": 3 * 2**20},
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(bytes(2**21))
    for path in (upload, upload + "/"):
        assert served(path, b"500000", **limits) == (200, "")
        status, text = served(path, b"1048570", **limits)  # with the folders it is too much
        assert (
            status == 507
            and text == "This server keeps 3 MB of uploads and drawn images, for an hour; try again later."
        )
    status, text = served(upload, b"1200000", **limits)
    assert status == 413 and "more than 1 MB" in text
    for path in (join, upload):
        for length in (b"", b"-1", b"x"):
            assert served(path, length, **limits)[0] == 411
        assert served(path, b"100", chunked=True, **limits)[0] == 411  # it may be longer than that
    assert served(join, b"1048570", **limits)[0] == 200
    assert served(join, b"%d" % (MASK_BYTES + 2**20 + 1), **limits)[0] == 413
    assert served(upload, b"9000", folder=str(tmp_path), most_uploaded=0.5, most_stored=0.25)[1].startswith(
        "This server"
    )
    assert "more than 0.5 MB" in served(upload, b"900000", folder=str(tmp_path), most_uploaded=2**19)[1]
    monkeypatch.setattr("vqgen.app.page.server.SECONDS_KEPT", -1)  # what is older than that is removed
    assert served(upload, b"1048570", **limits)[0] == 200 and not list(tmp_path.iterdir())


def test_what_is_old_is_removed_while_nobody_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, done = tmp_path / "files", threading.Event()
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "samples.zip").write_bytes(b"old")
    monkeypatch.setattr("vqgen.app.page.server.SWEEP", 0.01)
    thread = threading.Thread(target=sweep, args=(str(folder), done))
    thread.start()
    try:
        time.sleep(0.1)
        assert (folder / "a" / "samples.zip").exists()
        monkeypatch.setattr("vqgen.app.page.server.SECONDS_KEPT", -1)
        deadline = time.monotonic() + 60
        while (folder / "a").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        done.set()
        thread.join()
    assert folder.exists() and not (folder / "a").exists()


def test_the_policy_names_no_other_server() -> None:
    assert "://" not in POLICY and "*" not in POLICY and "default-src 'self'" in POLICY


def test_what_the_page_is_made_of_names_no_other_server() -> None:
    folder = Path(__file__).parents[1] / "app" / "page"
    paths = [*folder.glob("*.js"), *folder.glob("*.css")]
    assert len(paths) > 1
    for path in paths:
        assert "://" not in path.read_text(encoding="utf-8"), path


def test_base64_is_not_read_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgen.app.page.uploads.MASK_BYTES", 100)
    data = io.BytesIO()
    Image.effect_noise((20, 20), 50).save(data, "PNG")
    with pytest.raises(UserError, match="at most 100"):
        read_mask(base64.b64encode(data.getvalue()).decode(), LIMITS)


# ---- the page as Gradio has it ----


@pytest.fixture(scope="module")
def page(models: Path) -> Any:
    pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'vqgen[app]'")
    from vqgen.app.page.layout import build

    jobs, offered = Jobs(), Models(models, "cpu", "fp32")
    found: Any = build(offered, LimitConfig(most_waiting=3), jobs)
    found.jobs, found.models = jobs, offered
    return found


def forged(path: Any) -> list[Any]:
    """Values of requests that name a file; Gradio checks only the first."""
    files = {"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}, {"path": path, "meta": {"_type": "x"}}
    return [*files, *([{"image": file, "caption": None}] for file in files), {"path": None, "value": files[1]}]


def test_no_function_takes_a_file_that_was_not_uploaded(page: Any, tmp_path: Path) -> None:
    import gradio as gr
    from gradio.utils import get_upload_folder

    folder, secret = Path(get_upload_folder()), tmp_path / "secret.txt"
    secret.write_text("secret")
    (folder / "up").mkdir(parents=True)
    (folder / "up" / "link").symlink_to(secret)
    (folder.parent / "files-of-others").mkdir()
    paths = [str(secret), str(folder / "up" / ".." / ".." / "other"), str(folder / "up" / "link"), "", "a.png", 3]
    paths += [str(folder.parent / "files-of-others" / "a.png"), str(folder / "a\0.png"), ["a"]]
    for function in page.fns.values():
        for index, _ in enumerate(function.inputs):
            for path in paths:
                for value in forged(path):
                    inputs = [value if each == index else None for each in range(len(function.inputs))]
                    with pytest.raises(gr.Error, match="uploaded to this page"):
                        asyncio.run(page.preprocess_data(function, inputs, None))
    Image.new("RGB", (4, 4)).save(folder / "up" / "a.png")
    reconstruct = next(function for function in page.fns.values() if function.api_name == "reconstruct")
    inputs = ["fills", {"path": str(folder / "up" / "a.png"), "meta": {"_type": "gradio.FileData"}}, "", ""]
    assert str(folder / "up" / "a.png") in asyncio.run(page.preprocess_data(reconstruct, inputs, None))


def test_no_function_fetches_a_file_by_address(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio as gr

    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    file = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
    count = 0
    for function in page.fns.values():
        for index, _ in enumerate(function.inputs):
            for value in (file, [{"image": file, "caption": None}], {"path": "a", "value": file}):
                inputs = [value if each == index else None for each in range(len(function.inputs))]
                with pytest.raises(gr.Error, match="uploaded to this page"):
                    asyncio.run(page.preprocess_data(function, inputs, None))
                count += 1
    assert count > 100


@pytest.fixture(scope="module")
def address(page: Any) -> Iterator[str]:
    from starlette.middleware import Middleware

    where = {"server_name": "127.0.0.1", "prevent_thread_lock": True, "quiet": True}
    yield page.launch(app_kwargs={"middleware": [Middleware(Guard)]}, ssr_mode=False, **where)[1]
    page.close(verbose=False)


@pytest.fixture
def connect(address: str, tmp_path: Path) -> Any:
    """A new client of the page: `connect()`."""
    from gradio_client import Client

    return lambda: Client(address, verbose=False, download_files=tmp_path / "downloads")


def test_all_drawings_wait_for_their_turn(address: str, connect: Any) -> None:
    pictures, archive, text = connect().predict(model="fills", n=1, api_name="/draw")
    assert len(pictures) == 1 and text.startswith("1 of 1") and zipfile.is_zipfile(archive)
    request = urllib.request.Request(f"{address}gradio_api/run/draw", b'{"data": []}')
    request.add_header("content-type", "application/json")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 404 and b"queue" in caught.value.read()


@pytest.mark.slow
def test_a_request_that_waits_is_stopped_by_its_session(page: Any, connect: Any) -> None:
    first, second = connect(), connect()
    with page.jobs.turn:  # the first cannot end before the second waits
        under_way = first.submit(model="fills", n=40, api_name="/draw")
        while page.jobs.running == 0 and not under_way.done():
            time.sleep(0.01)
        waits = second.submit(model="fills", n=24, api_name="/draw")
        while waits.status().code.name in ("STARTING", "JOINING_QUEUE"):  # the server does not have it yet
            time.sleep(0.01)
        page.jobs.stop(second.session_hash)
    assert under_way.result()[2].startswith("40 of 40") and waits.result()[2] == "Stopped."
    assert second.predict(model="fills", n=1, api_name="/draw")[2].startswith("1 of 1")


def test_a_model_that_cannot_be_read_is_listed_with_the_reason(models: Path, connect: Any) -> None:
    found = connect().predict(api_name="/models")
    assert list(found) == ["colours", "damaged", "fills", "run", *SHIPPED]
    assert "16×16 pixels" in found["fills"] and "pixels" not in found["damaged"] and str(models) not in str(found)


def test_errors_on_the_page_have_no_elements_of_a_visitor(connect: Any) -> None:
    from gradio_client.exceptions import AppError

    wrong: list[dict[str, Any]] = [{"model": "<b>x</b>"}, {"model": "fills", "classes": ["<b>x</b>"]}]
    for values in wrong:
        with pytest.raises(AppError) as caught:
            connect().predict(**values, api_name="/draw")
        assert "&lt;b&gt;" in str(caught.value) and "<" not in str(caught.value)


def component(page: Any, **about: Any) -> Any:
    """The first component of the page with these attributes."""
    return next(
        each
        for each in page.blocks.values()
        if all(getattr(each, name, None) == value for name, value in about.items())
    )


def followed(page: Any, control: str, model: str) -> dict[str, Any]:
    """Label -> what changes, where a control by which models are chosen is set to a model."""
    chosen = component(page, label=control)
    changing = [fn for fn in page.fns.values() if (chosen._id, "input") in fn.targets]
    follow = max(changing, key=lambda fn: len(fn.outputs))  # another one shows an upload
    request = SimpleNamespace(session_hash="s", request=SimpleNamespace(state=SimpleNamespace(arrived=0.0)))
    return dict(zip([each.label for each in follow.outputs], follow.fn(request, model), strict=True))


def test_the_controls_show_what_a_model_recommends_and_its_pixels(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("Box", "Sides"):
        assert "16×16" in component(page, label=label).info
        assert "6×4" in followed(page, "Model", "run")[label]["info"]
    monkeypatch.setattr(page.models.load("fills").generator, "recommended", {"guidance_schedule": "linear"})
    for control in ("Model", "Task and model"):
        choices = followed(page, control, "fills")["Guidance schedule"]["choices"]
        assert choices[0] == ("as recommended: linear", "")


def test_the_button_to_stop_stops_what_its_tab_draws(page: Any) -> None:
    stops = [each._id for each in page.blocks.values() if getattr(each, "value", None) == "Stop"]
    draws, edits, _ = (next(fn for fn in page.fns.values() if (stop, "click") in fn.targets) for stop in stops)
    request = SimpleNamespace(session_hash="s")
    with page.jobs.job("s", "Drawn images") as drawn, page.jobs.job("s", "Edited images") as edited:
        draws.fn(request)
        assert drawn.stop.is_set() and not edited.stop.is_set()
        edits.fn(request)
        assert edited.stop.is_set()
    assert "Nothing" in draws.fn(request)


def test_an_image_that_is_still_shown_can_be_taken_on_after_a_drawing_was_refused(page: Any) -> None:
    onward = component(page, value="Edit the chosen image")
    draw = next(fn for fn in page.fns.values() if fn.api_name == "draw")
    failed = next(fn for fn in page.fns.values() if onward in fn.outputs and fn.trigger_after == draw._id)
    assert failed.trigger_only_on_failure
    shown = [("a.png", "bag"), ("b.png", "bag")]
    chosen = [("b.png", "fills", "bag", ""), ("c.png", "fills", "bag", ""), ("", "", "", "")]
    assert [failed.fn(shown, each)["interactive"] for each in chosen] == [True, False, False]
    assert failed.fn(None, chosen[0])["interactive"] is False


def test_models_are_read_for_their_list_once(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = next(fn for fn in page.fns.values() if fn.api_name == "models").fn
    first, read = listing(), []
    kept, load = page.models.load("fills"), Generator.load
    monkeypatch.setattr(Generator, "load", lambda folder, *rest: (read.append(folder), load(folder, *rest))[1])
    assert listing() == first and read == [page.models.folders["damaged"]]
    assert page.models.load("fills") is kept


def test_values_of_another_type_are_refused_by_one_sentence_that_names_them(
    connect: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from gradio_client.exceptions import AppError

    client = connect()
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("draw", {"n": None}, "n: found None"),
        ("draw", {"n": "many"}, "n: found 'many'"),
        ("draw", {"n": "4"}, "n: found '4'"),
        ("draw", {"seed": "x"}, "seed: found 'x'"),
        ("draw", {"n": 1.5}, "Images: found 1.5"),
        ("draw", {"n": 1, "model": ["fills"]}, "Model: found"),
        ("codebook", {"first": "x"}, "first: found 'x'"),
        ("reconstruct", {"image": 3}, "Use via API"),
    ]
    for name, values, said in wrong:
        with pytest.raises(AppError) as caught:
            client.predict(**{"model": "fills", **values}, api_name=f"/{name}")
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1 and "<" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_class_0_is_a_class_and_no_way_the_first_one_of_the_model(connect: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    client, image = connect(), handle_file(image_file(tmp_path / "a.png"))

    def drawn(name: str, **values: Any) -> dict[str, Any]:
        archive = client.predict(**{"model": "fills", "n": 1, "class_name": 0, **values}, api_name=f"/{name}")[1]
        with zipfile.ZipFile(archive) as file:
            return json.loads(file.read("samples.json"))

    filled = drawn("edit", image=image, way=None, box="4 4 8 8")
    assert filled["labels"] == [0] and filled["box"] == [4, 4, 8, 8]
    assert drawn("translate", model="colours", image=image)["labels"] == [0]
    with pytest.raises(AppError, match=r"^'?The model run was not trained"):
        drawn("edit", model="run", image=image, way="vary")
    lower = drawn("edit", model="run", image=image, way=None, box="4 4 8 8")
    assert "box" not in lower and lower["init_images"]
    archive = client.predict(model="fills", n=1, classes=0, api_name="/draw")[1]
    with zipfile.ZipFile(archive) as file:
        assert json.loads(file.read("samples.json"))["labels"] == [0]
    rates = [
        client.predict(model="fills", image=image, class_name=name, api_name="/reconstruct")[3]["bits"]
        for name in (0, "bag", "")
    ]
    assert rates[0] == rates[1] != rates[2]


def test_a_drawn_image_is_offered_in_place_of_an_upload_where_one_can_be_taken(connect: Any) -> None:
    from gradio_client.exceptions import AppError

    client, said = connect(), {}
    for name, model in (("edit", "fills"), ("translate", "colours"), ("reconstruct", "fills")):
        with pytest.raises(AppError) as caught:
            client.predict(model=model, image=None, api_name=f"/{name}")
        said[name] = str(caught.value)
    assert all("upload one" in text for text in said.values())
    assert {name for name, text in said.items() if "drawn" in text} == {"edit"}


def test_requests_beyond_those_that_may_wait_are_refused(page: Any, connect: Any) -> None:
    from gradio_client.utils import QueueError

    client, asked = connect(), {"model": "fills", "n": 1, "api_name": "/draw"}
    deadline = time.monotonic() + 60
    with page.jobs.turn:  # nothing ends before one request is refused
        under_way = client.submit(**asked)
        while page.jobs.running == 0 and not under_way.done():
            time.sleep(0.01)
        waiting = [client.submit(**asked) for _ in range(3 + 1)]
        while not any(job.done() for job in waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
    errors = [job.exception() for job in (under_way, *waiting)]
    assert [type(error) for error in errors if error] == [QueueError]
