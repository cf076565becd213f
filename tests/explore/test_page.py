"""The page in a real browser: one server, one browser, one page, set back before each test."""

import asyncio
import base64
import contextlib
import io
import shutil
import statistics
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jaxear.config import TrainConfig
from jaxear.data.pipeline import load_split
from jaxear.eigenears import EigenEars
from jaxear.explore import session
from jaxear.explore.pictures import jpeg
from jaxear.explore.session import Explorer
from jaxear.inference import encode_images
from tests.explore.conftest import random_leaves

pytest.importorskip("gradio", reason="needs the `explore` extra")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the `test` extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs Chromium (apt-get install chromium)", allow_module_level=True)

# Gradio makes an event loop that it never closes.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

# Quiet, and without asking its maker for anything.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Far more than anything takes on a quiet machine; what has to be fast is measured.
PATIENCE_MS = 60_000

FIRST = 8  # sliders in sight

# Notes, for each change of the picture, how long ago the slider's last event was.
STOPWATCH = """() => {
  window.delays = [];
  const image = document.querySelector("#ear img");
  document.addEventListener("input", () => { window.started = performance.now(); }, true);
  new MutationObserver(() => window.delays.push(performance.now() - window.started))
    .observe(image, {attributes: true, attributeFilter: ["src"]});
}"""


# What lies over the ear, looked for at points all over it.
COVERED = """() => {
  const stage = document.querySelector("#stage");
  const {x, y, width, height} = document.querySelector("#ear img").getBoundingClientRect();
  const found = [];
  for (let i = 1; i < 20; i++) for (let j = 1; j < 20; j++) {
    const top = document.elementFromPoint(x + width * i / 20, y + height * j / 20);
    if (!stage.contains(top)) found.push(top.outerHTML.slice(0, 80));
  }
  return found;
}"""


@pytest.fixture(scope="module")
def explorer():
    """A random model of the quick start's size, on twelve synthetic ears."""
    config = TrainConfig(
        demo_ears=12,
        weights="none",
        backbone_options={"depth": 1, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": [0]},
        latent_dim=64,
        head_width=256,
        decoder_channels=(256, 128, 64, 32, 16, 8),
    )
    skeleton, leaves = random_leaves(config)
    model = skeleton.model(*leaves)
    ears = load_split(config, "all", progress=False)
    codes, _ = encode_images(model, ears.images)
    _, widths, components = np.linalg.svd(codes - codes.mean(axis=0), full_matrices=False)
    variance = widths[:10] ** 2 / (len(codes) - 1)
    arrays = {
        "mean": codes.mean(axis=0),
        "components": components[:10],
        "explained_variance": variance,
        "explained_variance_ratio": variance / variance.sum(),
    }
    explorer = Explorer(EigenEars(model, arrays, len(codes)), config, ears)
    explorer.warm_up()
    return explorer


@pytest.fixture(scope="module")
def address(explorer):
    from jaxear.explore.server import address_of, bind, create_server

    bound = bind("127.0.0.1", 0)
    # Gradio takes the thread's event loop to build a page, and leaves open the one it had to make.
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        asyncio.set_event_loop(loop)
        server = create_server(explorer)
        asyncio.set_event_loop(None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield address_of(bound)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def tab(address):
    """The page, and every address that it asked for."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1360, "height": 850})
        page.set_default_timeout(PATIENCE_MS)
        sync_api.expect.set_options(timeout=PATIENCE_MS)
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#neighbours li")  # what comes last
        page.evaluate(STOPWATCH)
        yield page, asked
        assert not faults
        browser.close()


@pytest.fixture
def page(tab):
    page, _ = tab
    page.set_viewport_size({"width": 1360, "height": 850})
    # Its answer, too: it would wipe out what a test has shown meanwhile.
    with page.expect_response(lambda response: "/run/" in response.url) as answer:
        page.locator("#to-mean").click()
    answer.value.finished()
    sync_api.expect(caption(page)).to_have_text("The mean ear")
    return page


def caption(page):
    return page.locator("#ear p")


def picture(page):
    return page.locator("#ear img").get_attribute("src")


def scores(page):
    """Of the sliders in sight; the others are not in the page before they are asked for."""
    return [float(s.input_value()) for s in page.locator(".component input[type=number]").all()]


def slider(page, number):
    return page.locator(".component input[type=range]").nth(number)


def wait_for_another(page, before):
    page.wait_for_function("src => document.querySelector('#ear img').src !== src", arg=before)
    return picture(page)


def test_what_the_page_shows_first(page, explorer):
    assert page.title() == "jaxear explorer"
    labels = page.locator(".component label").all_inner_texts()
    assert labels == explorer.labels[:FIRST]
    assert slider(page, 0).get_attribute("aria-label").endswith(explorer.labels[0])
    assert page.locator("#more").is_visible()
    assert len(page.locator("#neighbours li").all()) == 6
    assert not page.locator("footer").is_visible()
    assert page.locator("#ear img").bounding_box()["width"] > 450


def test_the_ear_changes_while_a_slider_is_dragged(page):
    box = slider(page, 0).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    shown = picture(page)
    page.evaluate("window.delays = []")
    pictures = []
    for i in range(1, 10):
        page.mouse.move(x + i * box["width"] / 25, y)
        shown = wait_for_another(page, shown)
        pictures.append(shown)
    delays = page.evaluate("window.delays")
    page.mouse.up()
    assert len(set(pictures)) == 9
    print(f"slider to picture, ms: {sorted(round(d) for d in delays)}")
    assert statistics.median(delays) < 300
    assert scores(page)[0] == pytest.approx(2.2, abs=0.3)
    assert caption(page).inner_text() == "The mean ear, moved"


def test_many_moves_at_once_do_not_pile_up(page, explorer):
    box = slider(page, 1).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate("window.delays = []")
    for i in range(60):
        page.mouse.move(x + (i + 1) * box["width"] / 140, y)
    page.mouse.up()
    page.wait_for_function("window.delays.length > 1")
    sliders = explorer.mean().shown.copy()
    sliders[1] = scores(page)[1]
    wait_for_picture(page, explorer, explorer.moved(explorer.mean(), sliders))  # the last position
    assert len(page.evaluate("window.delays")) < 40


def wait_for_picture(page, explorer, code):
    """Wait until the page shows the picture of a code, as JPEG gives it back."""
    wanted = opened(jpeg(explorer.picture(code)))
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while True:
        shown = opened(base64.b64decode(picture(page).partition(",")[2]))
        if (error := np.abs(shown - wanted).mean()) < 0.5 or time.monotonic() > deadline:
            break
        page.wait_for_timeout(50)
    assert error < 0.5


def opened(content):
    return np.asarray(Image.open(io.BytesIO(content)), float)


def test_sliders_obey_the_arrow_keys(page):
    before = picture(page)
    slider(page, 2).focus()
    page.keyboard.press("ArrowRight")
    one = wait_for_another(page, before)
    page.keyboard.press("ArrowRight")
    two = wait_for_another(page, one)
    assert scores(page)[2] == pytest.approx(0.2)
    page.keyboard.press("ArrowLeft")
    wait_for_another(page, two)
    assert scores(page)[2] == pytest.approx(0.1)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("range slider for PC4")


def test_a_photograph_is_shown_encoded_and_can_be_moved(page, explorer, tmp_path):
    path = tmp_path / "portrait.png"
    Image.fromarray(explorer.thumbnail(4)).resize((300, 300)).save(path)
    page.set_input_files("input[type=file]", path)
    sync_api.expect(caption(page)).to_have_text("Portrait.png")
    sync_api.expect(page.locator("#photo img")).to_be_visible()
    expected = explorer.from_photo(path)
    assert scores(page) == pytest.approx(list(expected.shown[:FIRST]), abs=0.01)
    wait_for_picture(page, explorer, expected.code)
    before = picture(page)
    slider(page, 0).focus()
    page.keyboard.press("PageUp")
    wait_for_another(page, before)
    sliders = expected.shown.copy()
    sliders[0] = scores(page)[0]
    assert sliders[0] > expected.shown[0]
    wait_for_picture(page, explorer, explorer.moved(expected, sliders))
    page.locator("#to-mean").click()
    sync_api.expect(page.locator("#photo img")).to_have_count(0)


def test_what_is_no_photograph_is_refused_on_the_page(page, tmp_path, monkeypatch):
    message = page.locator("#message p")
    text = tmp_path / "notes.jpg"
    text.write_text("no picture")
    page.set_input_files("input[type=file]", text)
    sync_api.expect(message).to_contain_text("notes.jpg cannot be used: not an image")
    sync_api.expect(message).to_contain_text("Give a photograph as JPEG, PNG")
    assert caption(page).inner_text() == "The mean ear"
    monkeypatch.setattr(session, "MAX_BYTES", 1000)
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(2_000_000))
    page.set_input_files("input[type=file]", large)
    sync_api.expect(message).to_contain_text("large.jpg has 2 MB. Give a photograph")


def test_an_ear_becomes_another(page, explorer):
    page.locator("#set-a").click()
    sync_api.expect(page.locator("#ends figcaption").first).to_have_text("A: the mean ear")
    page.locator("#neighbours button").first.click()
    sync_api.expect(caption(page)).to_contain_text("Synthetic ")
    name = caption(page).inner_text().lower()
    known = explorer.from_run(explorer.names.index(name))
    assert scores(page) == pytest.approx(list(known.shown[:FIRST]), abs=0.01)
    page.locator("#set-b").click()
    sync_api.expect(page.locator("#ends figcaption").last).to_have_text(f"B: {name}")
    morph = page.locator("#morph input[type=range]")
    assert morph.input_value() == "1"
    morph.focus()
    page.keyboard.press("Home")
    sync_api.expect(caption(page)).to_have_text("The mean ear")
    page.keyboard.press("PageUp")
    sync_api.expect(caption(page)).to_contain_text("%")
    share = float(morph.input_value())
    assert 0 < share < 0.5
    wanted = explorer.morph(explorer.mean(), known, share)
    wait_for_picture(page, explorer, wanted.code)
    assert scores(page) == pytest.approx(list(wanted.shown[:FIRST]), abs=0.01)


def test_files_that_are_saved(page, explorer):
    with page.expect_download() as download:
        page.locator("#save-png").click()
    assert download.value.suggested_filename == "ear.png"
    with Image.open(download.value.path()) as image:
        assert image.format == "PNG"
        wanted = explorer.picture(explorer.eigenears.mean_)
        np.testing.assert_array_equal(np.asarray(image), wanted)
    with page.expect_download() as download:
        page.locator("#save-gif").click()
    with Image.open(download.value.path()) as image:
        assert (image.format, image.n_frames) == ("GIF", 48)


def test_the_nearest_ears_follow(page):
    values = page.locator("#neighbours span:last-child")
    sync_api.expect(values.first).to_contain_text("SD")
    page.locator("#metric label").last.click()
    sync_api.expect(page.locator("#neighbours .note")).to_contain_text("no direction")
    page.locator("#to-random").click()
    sync_api.expect(caption(page)).to_have_text("A random ear")
    sync_api.expect(values).to_have_count(6)
    found = [float(text) for text in values.all_inner_texts()]
    assert found == sorted(found, reverse=True)
    assert max(found) <= 1
    page.locator("#metric label").first.click()
    sync_api.expect(values.first).to_contain_text("SD")


@pytest.mark.parametrize("size", [(360, 740), (820, 1100)], ids=str)
def test_narrow_screens(page, size):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    for element in page.locator("#ear img, .component, #left button, #neighbours li").all():
        if box := element.bounding_box():
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0]
    if size[0] < 640:  # the ear stays in sight while sliders are moved
        slider(page, 7).scroll_into_view_if_needed()
        assert page.locator("#ear img").bounding_box()["y"] >= 0
        assert page.locator("#ear img").bounding_box()["y"] < 60
        assert page.evaluate(COVERED) == []
        assert slider(page, 7).bounding_box()["width"] > 290


def test_nothing_is_asked_for_elsewhere(page, tab, address):
    _, asked = tab
    assert len(asked) > 20
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert foreign == []
    answer = page.request.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
