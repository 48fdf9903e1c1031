"""vqgen-app in headless Chromium, and its API: the server is a process of its own, the models are small and random."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_prior, make_square_prior, text_part
from PIL import Image
from processes import free_port

from vqgen.prior.parts.source import MaskedSource, PairedSource
from vqgen.sampling.generator import SHIPPED
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.codes.format import SourceRecord
from vqgen.tokenizer.data.decoding import decode

CHROMIUM = shutil.which("chromium")
gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed: pip install 'vqgen[app]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'vqgen[browser]'"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 120_000  # milliseconds: the machine may be busy
playwright.expect.set_options(timeout=PATIENCE)  # of assertions; pages have their own


@dataclass
class Server:
    url: str
    models: Path
    process: subprocess.Popen
    temporary: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    make_square_prior(folder / "fills", MaskedSource(0.5))
    source = PairedSource(SourceRecord("degraded", [8, 8], "d" * 64, ["grey"]))
    make_square_prior(folder / "restores", source, text_part(["a red bag"] * 3))
    make_prior(folder / "plain")
    log = (folder / "log.txt").open("w+")
    temporary = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "TMPDIR": str(temporary)}

    def begun() -> tuple[str, subprocess.Popen]:
        for _ in range(3):  # a port may be taken, and Gradio gives its server five seconds
            url = f"http://127.0.0.1:{(port := free_port())}/"
            words = ["--models", str(folder), "--port", str(port), "--upload-megabytes", "1"]
            words += ["--stored-megabytes", "64"]
            run = [sys.executable, "-m", "vqgen.app.page.program", *words]
            process = subprocess.Popen(run, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)
            until = time.monotonic() + 5 * PATIENCE / 1000
            while process.poll() is None:
                if f"open {url}" in (folder / "log.txt").read_text():
                    return url, process
                if time.monotonic() > until:
                    process.kill()
                time.sleep(0.1)
        raise AssertionError((folder / "log.txt").read_text())

    url, process = begun()
    try:
        yield Server(url, folder, process, temporary)
        assert process.poll() is None and "Traceback" not in (folder / "log.txt").read_text()
        assert list(temporary.iterdir())
    finally:
        process.terminate()
        process.wait(60)
        log.close()
    assert not list(temporary.iterdir())  # uploads and drawn images are gone


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@dataclass
class Visit:
    """A page that is open in the browser, and what went wrong in it."""

    page: Any
    url: str
    errors: list[str] = field(default_factory=list)

    def listen(self) -> None:
        page = self.page
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda r: self.note(r.url))
        page.on("websocket", lambda w: self.note(w.url))
        page.on("requestfailed", lambda r: self.errors.append(f"{r.url} {r.failure}") if "queue" not in r.url else None)
        page.on("response", lambda r: self.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)

    def note(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.errors.append(f"a request left the page: {url}")

    def tab(self, name: str) -> None:
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            self.page.get_by_role("button", name="…").or_(self.page.locator(".overflow-menu > button")).click()
            self.page.locator(".overflow-dropdown button", has_text=name).click()
        else:
            tab.click()

    def choose(self, label: str, value: str) -> None:
        self.page.get_by_label(label, exact=True).locator("visible=true").first.click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def set(self, label: str, value: object) -> None:
        named = self.page.get_by_label(re.compile(f"{label}$")).locator("visible=true")
        named.locator("xpath=self::input[@type='number']").first.fill(str(value))

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def upload(self, name: str, data: bytes) -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": data}
        self.page.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(file)

    def status(self, pattern: str) -> str:
        """The line of text of the visible tab, once it is of a pattern."""
        line = self.page.locator(".status:visible p").first
        playwright.expect(line).to_have_text(re.compile(pattern), timeout=PATIENCE)
        return line.inner_text()

    def sentence(self) -> str:
        """The error that is shown, which is closed then."""
        toast = self.page.get_by_test_id("toast-body").first
        toast.wait_for(timeout=PATIENCE)
        text = " ".join(toast.inner_text().split())
        self.page.get_by_test_id("toast-close").first.click()
        return text

    def ended(self) -> Any:
        """Wait for the end of a drawing, until which its button does nothing; returns the button of its archive."""
        link = self.page.get_by_role("button", name="Download as zip").locator("visible=true")
        playwright.expect(link).to_be_enabled()
        return link

    def download(self) -> zipfile.ZipFile:
        link = self.ended()
        with self.page.expect_download() as found:
            link.click()
        return zipfile.ZipFile(io.BytesIO(Path(found.value.path()).read_bytes()))


def visited(browser: Any, server: Server, **options: Any) -> Visit:
    context = browser.new_context(accept_downloads=True, **options)
    visit = Visit(context.new_page(), server.url)
    visit.listen()
    visit.page.set_default_timeout(PATIENCE)
    visit.page.goto(server.url)
    visit.page.get_by_role("tab", name="Draw").wait_for()
    return visit


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """A visitor with a wide screen; afterwards nothing must have gone wrong in the page."""
    found = visited(browser, server)
    yield found
    found.page.context.close()
    assert found.errors == []


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A picture whose pixels all differ."""
    ramp = torch.arange(0, 256, 16)
    image = torch.stack([ramp.expand(16, 16), ramp.expand(16, 16).T, ramp.flip(0).expand(16, 16)], -1)
    return png(Image.fromarray(image.to(torch.uint8).numpy()))


# ---- the page ----


def test_draw(visit: Visit) -> None:
    visit.set("Images", 10)
    visit.set("Seed", 7)
    visit.press("Draw")
    visit.status("^10 of 10 images")
    captions = visit.page.locator(".pictures:visible .caption-label").all_inner_texts()
    assert len(captions) == 10 and all(re.fullmatch(r"(bag|shirt|shoe) · \d+\.\d nats", each) for each in captions)
    with visit.download() as file:
        listed = json.loads(file.read("samples.json"))
        assert listed["seed"] == 7 and len([name for name in file.namelist() if re.match(r"\d+\.png", name)]) == 10


def test_settings_that_are_left_empty_are_as_the_model_recommends(visit: Visit) -> None:
    visit.page.get_by_text("Sampling settings").locator("visible=true").click()
    visit.page.get_by_label("Top k").locator("visible=true").fill("7")
    visit.set("Images", 1)
    visit.press("Draw")
    visit.status("^1 of 1 image")
    with visit.download() as file:
        settings = json.loads(file.read("samples.json"))["settings"]
    assert settings == {**json.loads(json.dumps(vars(SamplingSettings()))), "top_k": 7}
    visit.page.get_by_label("Top k").locator("visible=true").fill("many")
    visit.press("Draw")
    assert "Top k: found many" in visit.sentence()
    visit.download()  # of the images that are still shown


def test_stop(visit: Visit) -> None:
    visit.choose("Model", "cifar10")
    visit.set("Images", 100)
    for _ in range(3):  # all images may be there before a busy machine presses the button
        visit.press("Draw")
        visit.status(r"^8 of 100|^[1-9]\d of 100")
        visit.press("Stop")
        if (ended := visit.status("^Stopped|^100 of 100 images, ")).startswith("Stopped"):
            break
    count = int(re.findall(r"\d+", ended)[0])
    assert 8 <= count < 100
    with visit.download() as file:
        assert json.loads(file.read("samples.json"))["n"] == count
    visit.choose("Model", "fills")
    visit.set("Images", 1)
    visit.press("Draw")  # the turn is free again
    visit.status("^1 of 1 image")


def test_a_visitor_who_leaves_stops_the_drawing(browser: Any, server: Server, visit: Visit) -> None:
    other = visited(browser, server)
    other.choose("Model", "cifar10")
    other.set("Images", 100)
    other.press("Draw")
    other.status(r"^8 of 100|^[1-9]\d of 100")
    began = time.perf_counter()
    other.page.context.close()
    visit.set("Images", 1)
    visit.press("Draw")
    visit.status("^1 of 1 image")
    waited = time.perf_counter() - began
    visit.ended()
    visit.choose("Model", "cifar10")
    visit.set("Images", 8)
    visit.press("Draw")
    began = time.perf_counter()
    visit.status("^8 of 8 images")
    # All that was left to draw is eleven times this.
    assert waited < 6 * (time.perf_counter() - began) + 5


def test_fill_in_what_is_painted(visit: Visit, photo: bytes) -> None:
    visit.tab("Edit")
    visit.upload("photo.png", photo)
    canvas = visit.page.locator("mask-painter canvas")
    playwright.expect(canvas).to_have_attribute("width", "512")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.1)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.1, steps=4)
    visit.page.mouse.up()
    painted = visit.page.evaluate("[...document.querySelector('mask-painter').cells]")
    assert 0 < sum(painted) < 60
    for way in ("extend", "fill in"):  # what is painted stays
        visit.page.get_by_label(way, exact=True).check()
    playwright.expect(canvas).to_be_visible()
    assert visit.page.evaluate("[...document.querySelector('mask-painter').cells]") == painted
    visit.set("Variations", 2)
    visit.press("Edit")
    visit.status("^2 of 2 images")
    with visit.download() as file:
        mask = decode(file.read("mask.png"), 1)[0] > 127
        assert mask.flatten().tolist() == [value == 1 for value in painted]
        before, after = decode(file.read("image.png"), 3), decode(file.read("00000.png"), 3)
    assert torch.equal(before[:, 10:], after[:, 10:]) and not torch.equal(before, after)


def test_paint_with_the_keyboard(visit: Visit, photo: bytes) -> None:
    visit.tab("Edit")
    visit.upload("photo.png", photo)
    playwright.expect(visit.page.locator("mask-painter canvas")).to_have_attribute("width", "512")
    visit.page.locator("mask-painter canvas").focus()
    at = "(({x, y}) => [x, y])(document.querySelector('mask-painter').at)"
    left, top = visit.page.evaluate(at)
    visit.page.keyboard.press("ArrowLeft")
    visit.page.keyboard.press("ArrowDown")
    assert visit.page.evaluate(at) == [left - 1, top + 1]
    visit.page.keyboard.press("Space")
    count = "document.querySelector('mask-painter').cells.reduce((a, b) => a + b)"
    assert visit.page.evaluate(count) > 0
    visit.press("Clear")
    visit.press("Box")
    visit.page.locator("mask-painter canvas").focus()
    for key in ("Space", "ArrowRight", "ArrowRight", "ArrowDown", "Space"):
        visit.page.keyboard.press(key)
    assert visit.page.evaluate(count) == 6
    visit.press("Erase")
    visit.page.locator("mask-painter canvas").focus()
    visit.page.keyboard.press("Space")
    assert visit.page.evaluate(count) < 6


def test_a_drawn_image_is_taken_on_to_the_editor(visit: Visit) -> None:
    visit.set("Images", 2)
    visit.press("Draw")
    visit.status("^2 of 2 images")
    visit.ended()
    visit.page.locator(".pictures:visible .thumbnail-lg").nth(1).click()
    taken = visit.page.get_by_role("button", name="Edit the chosen image")
    visit.set("Images", 3)  # the line says when this drawing has ended, not the one before
    visit.press("Draw")
    playwright.expect(taken).to_be_disabled()
    visit.status("^3 of 3 images, on average")
    visit.page.locator(".pictures:visible button[aria-label^=Thumbnail]").nth(1).click()
    taken.click()
    canvas = visit.page.locator("mask-painter canvas")
    its_class = visit.page.get_by_label("Class", exact=True).locator("visible=true")
    playwright.expect(its_class).to_have_value("shirt")
    playwright.expect(canvas).to_have_attribute("width", "512")
    shown = visit.page.locator("mask-painter").get_attribute("image")
    canvas.click()
    visit.tab("Draw")
    visit.page.locator(".pictures:visible button[aria-label^=Thumbnail]").nth(0).click()
    taken.click()
    playwright.expect(visit.page.locator("mask-painter")).not_to_have_attribute("image", shown)
    playwright.expect(canvas).to_be_visible()  # the other picture, on which nothing is painted
    playwright.expect(visit.page.locator("mask-painter .hint")).to_have_text(re.compile("^0 of 256"))
    visit.page.get_by_placeholder("X Y WIDTH HEIGHT").fill("4 4 8 8")
    visit.set("Variations", 1)
    visit.press("Edit")
    visit.status("^1 of 1 image")


def is_grey(url: str | None) -> bool:
    """Whether the image in a data URL has no colour."""
    image = decode(base64.b64decode((url or "").partition(",")[2]), 3)
    return bool((image == image[:1]).all())


def test_translate_and_compare(visit: Visit, photo: bytes) -> None:
    visit.tab("Translate")
    visit.upload("photo.png", photo)
    visit.set("Results", 2)
    visit.page.get_by_label("trained with captions").locator("visible=true").fill("a red bag")
    visit.press("Translate")
    visit.status("^2 of 2 images")
    playwright.expect(visit.page.locator(".pictures:visible").get_by_text("a red bag").first).to_be_visible()
    slider = visit.page.locator("before-after input")
    slider.wait_for()
    slider.focus()
    visit.page.keyboard.press("Home")
    clipped = visit.page.locator("before-after .before").evaluate("e => getComputedStyle(e).clipPath")
    assert "100%" in clipped
    after = visit.page.locator("before-after .after")
    shown = after.get_attribute("src")
    visit.set("Seed", 5)
    visit.press("Translate")
    playwright.expect(after).not_to_have_attribute("src", shown, timeout=PATIENCE)
    playwright.expect(visit.page.locator("before-after .before")).to_be_visible()
    shown = after.get_attribute("src")
    visit.page.locator(".pictures:visible .thumbnail-lg").nth(1).click()
    playwright.expect(after).not_to_have_attribute("src", shown)
    playwright.expect(visit.page.locator("before-after input")).to_be_visible()
    before = visit.page.locator("before-after .before")
    assert not is_grey(before.get_attribute("src"))
    shown = before.get_attribute("src")
    visit.choose("Degrade the image first", "grey")
    visit.press("Translate")
    playwright.expect(before).not_to_have_attribute("src", shown, timeout=PATIENCE)
    assert is_grey(before.get_attribute("src"))


def test_reconstruct_and_codebook(visit: Visit, photo: bytes) -> None:
    visit.tab("Reconstruct")
    visit.upload("photo.png", photo)
    visit.press("Reconstruct")
    assert float(re.match(r"(\d+) bits", visit.status("bits under the prior"))[1]) > 0  # type: ignore[index]
    assert visit.page.locator("svg.codes rect").count() == 64
    visit.tab("Codebook")
    visit.press("Show")
    sheet = visit.page.locator(".sheet img").get_attribute("src")
    visit.press("Nearest")
    playwright.expect(visit.page.locator(".pictures:visible .thumbnail-lg")).to_have_count(12)
    visit.page.get_by_label("First code").fill("5")  # not shown yet
    visit.page.get_by_label("Code", exact=True).fill("3")
    visit.page.locator(".sheet img").click(position={"x": 4, "y": 4})
    playwright.expect(visit.page.get_by_label("Code", exact=True)).to_have_value("0")
    visit.press("Show")
    playwright.expect(visit.page.locator(".sheet img")).not_to_have_attribute("src", sheet)
    visit.page.locator(".sheet img").click(position={"x": 4, "y": 4})
    playwright.expect(visit.page.get_by_label("Code", exact=True)).to_have_value("5")


def test_wrong_uploads_are_a_sentence_on_the_page(visit: Visit, photo: bytes) -> None:
    visit.tab("Reconstruct")
    visit.upload("broken.png", photo[:60])
    visit.press("Reconstruct")
    assert "cannot be decoded" in visit.sentence()
    visit.page.get_by_label("Remove Image").locator("visible=true").click()
    visit.upload("huge.png", png(Image.new("L", (10_000, 10_000))))
    visit.press("Reconstruct")
    assert "10000" in visit.sentence()
    visit.page.get_by_label("Remove Image").locator("visible=true").click()
    visit.upload("photo.png", photo)
    visit.press("Reconstruct")
    visit.status("bits under the prior")


def test_a_file_beyond_the_limit_is_refused(browser: Any, server: Server) -> None:
    visit = visited(browser, server)
    visit.tab("Reconstruct")
    visit.upload("noise.png", png(Image.effect_noise((1200, 1200), 90)))
    assert "size" in visit.sentence().lower()
    visit.page.context.close()


def test_an_upload_for_which_there_is_no_room_is_refused(browser: Any, server: Server, photo: bytes) -> None:
    visit = visited(browser, server)
    visit.tab("Reconstruct")
    (folder,) = server.temporary.glob("vqgen-app-*/files")
    large = folder / "large"
    large.write_bytes(bytes(64 * 2**20))
    try:
        visit.upload("photo.png", photo)
        assert "keeps 64 MB" in visit.sentence()
    finally:
        large.unlink()
    visit.upload("photo.png", photo)
    visit.press("Reconstruct")
    visit.status("bits under the prior")
    visit.page.context.close()


def test_a_model_that_cannot_says_so(visit: Visit, photo: bytes) -> None:
    visit.choose("Model", "plain")
    visit.tab("Edit")
    playwright.expect(visit.page.get_by_text("was not trained to fill in")).to_be_visible()
    playwright.expect(visit.page.get_by_label("extend")).not_to_be_visible()
    visit.upload("photo.png", photo)
    visit.set("Variations", 1)
    visit.press("Edit")
    visit.status("^1 of 1 image")
    visit.choose("Model", "fills")
    playwright.expect(visit.page.get_by_label("extend")).to_be_visible()


def test_two_visitors_at_once(browser: Any, server: Server) -> None:
    visits = [visited(browser, server) for _ in range(2)]
    for seed, visit in enumerate(visits):
        visit.set("Images", 9)
        visit.set("Seed", seed)
        visit.press("Draw")
    for seed, visit in enumerate(visits):
        visit.status("^9 of 9 images")
        with visit.download() as file:
            assert json.loads(file.read("samples.json"))["seed"] == seed
        visit.page.context.close()
        assert visit.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_to_the_side(browser: Any, server: Server, scheme: str) -> None:
    size = {"width": 390, "height": 844}
    visit = visited(browser, server, viewport=size, color_scheme=scheme, has_touch=True)
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 380) == (scheme == "dark")
    for name in ("Edit", "Translate", "Reconstruct", "Codebook", "Draw"):
        visit.tab(name)
        visit.page.wait_for_timeout(300)
        assert visit.page.evaluate("document.scrollingElement.scrollWidth") <= 390, name
    visit.page.context.close()
    assert visit.errors == []


def test_the_keyboard_reaches_the_button_that_draws(visit: Visit) -> None:
    visit.set("Images", 1)
    draw = visit.page.get_by_role("button", name="Draw", exact=True).locator("visible=true")
    for _ in range(60):  # enough to come round again, should the page have taken the focus while it loaded
        if draw.evaluate("button => button === document.activeElement"):
            break
        visit.page.keyboard.press("Tab")
    playwright.expect(draw).to_be_focused()
    visit.page.keyboard.press("Enter")
    visit.status("^1 of 1 image")


# ---- the API ----


def test_the_api_has_the_same_functions(server: Server, photo: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(photo)
    client = gradio_client.Client(server.url, verbose=False, download_files=tmp_path / "got")
    image = gradio_client.handle_file(tmp_path / "photo.png")
    assert list(client.predict(api_name="/models")) == ["fills", "plain", "restores", *SHIPPED]
    job = client.submit(model="fills", classes=["bag"], n=20, temperature=0.7, api_name="/draw")
    pictures, archive, text = job.result()
    assert len(pictures) == 20 and text.startswith("20 of 20")
    with zipfile.ZipFile(archive) as file:
        assert json.loads(file.read("samples.json"))["settings"]["temperature"] == 0.7
        assert file.read("00003.png") == Path(pictures[3]["image"]).read_bytes()
    assert [len(each[0]) for each in job.outputs()][:4] == [0, 8, 16, 20]
    larger = {"model": "fills", "n": 1, "width": 24, "source_guidance_scale": 3}
    pictures, archive, _ = client.predict(**larger, api_name="/draw")
    assert Image.open(pictures[0]["image"]).size == (24, 16)
    with zipfile.ZipFile(archive) as file:
        assert json.loads(file.read("samples.json"))["settings"]["source_guidance_scale"] == 3
    for values in ({"way": "fill in", "box": "4 4 8 8"}, {"way": "extend", "sides": "8 0 0 0"}, {"way": "vary"}):
        pictures, _, _ = client.predict(model="fills", image=image, n=2, api_name="/edit", **values)
        size = Image.open(pictures[0]["image"]).size
        assert size == ((24, 16) if values["way"] == "extend" else (16, 16))
    with pytest.raises(gradio_client.exceptions.AppError, match="The model plain was not trained to fill in"):
        client.predict(model="plain", image=image, way="extend", api_name="/edit")
    assert len(client.predict(model="restores", image=image, degraded="grey", n=1, api_name="/translate")[0]) == 1
    for wrong in ("noise:0.2", "sepia", ["grey"], ["grey", "grey"]):  # of another model, none, no text
        with pytest.raises(gradio_client.exceptions.AppError) as refused:
            client.predict(model="restores", image=image, degraded=wrong, n=1, api_name="/translate")
        assert "defect" not in str(refused.value)
    asked = {"model": "restores", "image": image, "degraded": None, "prompt": "a red bag", "n": 1}
    pictures, archive, _ = client.predict(**asked, api_name="/translate")
    assert len(pictures) == 1
    with zipfile.ZipFile(archive) as file:
        assert json.loads(file.read("samples.json"))["images"][0]["text"] == "a red bag"
    with pytest.raises(gradio_client.exceptions.AppError, match="trained without text"):
        client.predict(**{**asked, "model": "cifar10-restorer"}, api_name="/translate")
    numbers = client.predict(model="fills", image=image, api_name="/reconstruct")[3]
    assert sum(map(sum, numbers["bits_of_codes"])) == pytest.approx(numbers["bits"]) and len(numbers["codes"]) == 8
    assert Path(client.predict(model="fills", first=0, api_name="/codebook")).is_file()
    for wrong in ({"n": 101}, {"temperature": -1}, {"classes": ["unicorn"]}, {"model": "../plain"}, {"n": 0}):
        with pytest.raises(gradio_client.exceptions.AppError) as caught:
            client.predict(**{"model": "fills", "n": 1, **wrong}, api_name="/draw")
        assert len(str(caught.value).splitlines()) == 1


def called(server: Server, name: str, data: list[Any]) -> str:
    """What the plain HTTP interface answers to a call."""
    body = json.dumps({"data": data}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}gradio_api/call/{name}", body, headers)
    event = json.loads(urllib.request.urlopen(request, timeout=60).read())["event_id"]
    return urllib.request.urlopen(f"{server.url}gradio_api/call/{name}/{event}", timeout=60).read().decode()


def test_no_other_file_and_no_other_server_is_read(server: Server, photo: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(photo)
    places = [secret, server.models / "fills" / "vqgen.json", server.models / "log.txt", "log.txt", "/etc/passwd"]
    for place in [*places, "http://127.0.0.1:1/a", "https:/example.com/a"]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}gradio_api/file={place}", timeout=60)
        assert caught.value.code in (403, 404), place
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.setblocking(False)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"
        for place in (str(secret), "/etc/passwd", address):
            file = {"path": place, "url": place, "meta": {"_type": "gradio.FileData"}}
            answer = called(server, "reconstruct", ["fills", file, "", ""])
            assert "event: error" in answer and "bits" not in answer, place
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_a_port_that_is_taken_is_one_line(server: Server) -> None:
    port = server.url.rstrip("/").rpartition(":")[2]
    run = [sys.executable, "-m", "vqgen.app.page.program", "--port", port]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and port in done.stderr, done.stderr
