"""The page at / in a headless Chromium: a person drops a picture, asks, and sees the answer.

Not covered: other browsers, and touch.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

from glmv_jax.rl.envs import browser as browsers  # noqa: E402
from tests.data.local import examples  # noqa: E402
from tests.serving import parrot  # noqa: E402
from tests.serving.test_limits import slow  # noqa: E402

if reason := browsers.missing():
    pytest.skip(reason, allow_module_level=True)

TOOL = {"type": "function", "function": {"name": "zoom", "parameters": {"properties": {"where": {"type": "string"}}}}}
SHOTS = os.environ.get("GLMV_SCREENSHOTS", "")  # a folder for what the page looks like


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        yield driver


@pytest.fixture
def page(driver, bird):
    """The page as a phone shows it, with the key in its settings."""
    driver.set_window_size(390, 844)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1,
                                                                  "mobile": True})  # fmt: skip
    driver.get(bird.url)
    driver.execute_script("sessionStorage.setItem('key', arguments[0])", parrot.KEY)
    driver.get(bird.url)
    until(driver, lambda d: d.find_element(By.ID, "name").text == parrot.NAME)
    driver.get_log("browser")  # of the first time, without the key
    return driver


def until(driver, what, seconds: float = 30.0):
    return WebDriverWait(driver, seconds, 0.05).until(what)


def shot(driver, name: str) -> None:
    if SHOTS:
        driver.save_screenshot(os.path.join(SHOTS, f"{name}.png"))


def ask(page, words: str) -> None:
    ended = len(page.find_elements(By.CSS_SELECTOR, ".meta, .bad"))
    page.find_element(By.ID, "words").send_keys(words + "\n")
    until(page, lambda d: d.execute_script("return running === null"))
    until(page, lambda d: len(d.find_elements(By.CSS_SELECTOR, ".meta, .bad")) > ended)


def sizes(page) -> dict:
    """Of the page, of the picture in the answer and of what is drawn on it."""
    return page.execute_script(
        "const box = (x) => { const r = x.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };"
        "const answer = document.querySelector('article.answer');"
        "const shown = answer.querySelector('figure img');"
        "return {wide: document.documentElement.scrollWidth, image: shown && box(shown),"
        " drawn: [...answer.querySelectorAll('.drawn')].map(box)};"
    )


def picture(tmp_path) -> str:
    """A red square at a quarter of the width, from a quarter to half of the height."""
    image = Image.new("RGB", (400, 200), "white")
    image.paste("red", (100, 50, 200, 100))
    image.save(tmp_path / "square.png")
    return str(tmp_path / "square.png")


def written() -> list[int]:
    """[12 34,567,890] without any token twice: of three spaces and commas one is a space and one a byte."""
    piece = parrot.TOKENIZER._model.piece_to_id
    return [piece(x) for x in ["[", "1", "2", "\u2581", "3", "4", ",", "5", "6", "7", "<0x2C>", "8", "9", "0", "]"]]


def test_a_person_shows_a_picture_asks_and_sees_thinking_box_and_call(page, bird, tmp_path):
    bird.say("look", "</think>", "a heart", "<|begin_of_box|>", *written(), "<|end_of_box|>",
             *parrot.call("zoom", where="left"), "<|observation|>", after=["<think>"])  # fmt: skip
    page.find_element(By.ID, "file").send_keys(picture(tmp_path))
    until(page, lambda d: d.find_elements(By.CSS_SELECTOR, "#shown img"))
    page.find_element(By.ID, "open").click()
    page.find_element(By.CSS_SELECTOR, "#thinking option[value=on]").click()
    page.find_element(By.ID, "tools").send_keys(json.dumps([TOOL]))
    shot(page, "asking")
    page.find_element(By.ID, "open").click()
    ask(page, "Where is it?")
    shot(page, "answered")
    answer = page.find_element(By.CSS_SELECTOR, "article.answer")
    fold = answer.find_element(By.TAG_NAME, "details")
    assert fold.is_displayed() and fold.get_attribute("open") is None and "look" not in answer.text
    fold.find_element(By.TAG_NAME, "summary").click()
    assert "look" in answer.text and "a heart" in answer.text and "begin_of_box" not in answer.text
    assert answer.find_element(By.CSS_SELECTOR, ".call").text.startswith("calls zoom")

    shown = sizes(page)
    (left, top, right, bottom), ((x1, y1, x2, y2),) = shown["image"], shown["drawn"]
    width, height = right - left, bottom - top
    assert 0 <= left < right <= 390 and abs(width / height - 2) < 0.02 and shown["wide"] <= 390
    found = (x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height
    assert max(abs(f - w / 1000) for f, w in zip(found, (12, 34, 567, 890))) < 0.005
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []

    # What the tool found is told as the tool's; the picture stays in the conversation.
    bird.say("so", "</think>", "two hearts", after=["<think>"])
    assert page.find_element(By.ID, "words").get_attribute("placeholder") == "What the tool found"
    encoded = bird.engine.counts.encoded
    ask(page, "it is red")
    roles = page.execute_script("return messages.map((m) => m.role)")
    assert roles == ["user", "assistant", "tool", "assistant"] and bird.engine.counts.encoded == encoded + 1


def test_a_dropped_picture_dark_and_wide(page, bird):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 1200, "height": 800, "deviceScaleFactor": 1,
                                                                "mobile": False})  # fmt: skip
    bird.say("a red heart")
    page.execute_async_script("""
        const done = arguments[0], canvas = document.createElement("canvas");
        canvas.toBlob((blob) => {
          const carried = new DataTransfer();
          carried.items.add(new File([blob], "a.png", { type: "image/png" }));
          dispatchEvent(new DragEvent("drop", { dataTransfer: carried }));
          done();
        });""")
    until(page, lambda d: d.find_elements(By.CSS_SELECTOR, "#shown img"))
    ask(page, "What is it?")
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme",
                                                                          "value": scheme}]})  # fmt: skip
        shot(page, scheme)
        ink, paper = page.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        assert contrast(ink, paper) > 7 and (luminance(paper) < 0.1) == (scheme == "dark")
    assert sizes(page)["wide"] <= 1200 and len(page.find_elements(By.CSS_SELECTOR, "article.user figure img")) == 1


def test_a_film_is_shown_and_asked_about(page, bird, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(examples.film(seconds=2.0, rate=6, codec="h264"))
    said, encoded = bird.say("lighter"), bird.engine.counts.encoded
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "a.mp4"))
    until(page, lambda d: d.find_elements(By.CSS_SELECTOR, "#shown video"))
    ask(page, "What becomes of it?")
    film = "document.querySelector('article.user video')"
    until(page, lambda d: d.execute_script(f"return {film}.readyState > 1 && {film}.videoWidth === 64"))
    shot(page, "film")
    assert page.find_element(By.CSS_SELECTOR, "article.answer > .text").text == "lighter" and len(said) > 1
    assert bird.engine.counts.encoded == encoded + 4 and page.get_log("browser") == []


def test_a_server_without_films_says_so_at_once(page, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    page.execute_script("films = false; document.getElementById('file').accept = ''")
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "a.mp4"))
    until(page, lambda d: "takes none" in d.find_element(By.TAG_NAME, "main").text)
    assert not page.find_elements(By.CSS_SELECTOR, "#shown *")


def test_an_answer_can_be_stopped_and_an_error_is_said(page, bird):
    bird.say_forever("one two three")
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 260, "deviceScaleFactor": 1,
                                                                "mobile": True})  # fmt: skip
    below = "const t = document.getElementById('talk'); return t.scrollHeight - t.scrollTop - t.clientHeight"
    with slow(bird):
        page.find_element(By.ID, "words").send_keys("hi\n")
        until(page, lambda d: d.find_element(By.TAG_NAME, "main").text.count("three") > 12)
        until(page, lambda d: abs(d.execute_script(below)) < 2)
        page.execute_script("document.getElementById('talk').scrollTop = 0")
        until(page, lambda d: d.execute_script(below) > 60)  # goes on below, and a reader is left where they are
        assert page.execute_script("return document.getElementById('talk').scrollTop") == 0
        page.find_element(By.ID, "stop").click()
        until(page, lambda d: bird.engine.running == 0 and d.find_element(By.ID, "send").is_displayed())
    assert page.find_element(By.CSS_SELECTOR, ".meta").text == "stopped"
    page.execute_script("document.getElementById('key').value = 'wrong'")
    ask(page, "again")
    assert "API key" in page.find_element(By.CSS_SELECTOR, ".bad").text
    assert page.execute_script("return messages.length") == 2  # what was not answered is not part of it
    page.find_element(By.ID, "fresh").click()
    assert page.find_element(By.ID, "hint").is_displayed() and page.execute_script("return messages.length") == 0


@pytest.mark.parametrize(("text", "found"), [
    ("<|begin_of_box|>[[1,2,3,4],[5,6,7,8]]<|end_of_box|>", [([1, 2, 3, 4], ""), ([5, 6, 7, 8], "")]),
    ('<|begin_of_box|>[{"label": "cat", "bbox_2d": [1, 2, 3, 4]}]<|end_of_box|>', [([1, 2, 3, 4], "cat")]),
    ('<|begin_of_box|>[{"label": "cat", "bbox_2d": [1, 2, 3, 4]}, {"lab', [([1, 2, 3, 4], "cat")]),
    ("<|begin_of_box|>(10, 20)<|end_of_box|><|begin_of_box|>{30 40}<|end_of_box|>", [([10, 20], ""), ([30, 40], "")]),
    ("<|begin_of_box|>[[1, 2], [1001, 5]]<|end_of_box|>", [([1, 2], "")]), ("three of (1, 2)", []),
    ("<|begin_of_box|>3<|end_of_box|>", []), ('[{"bbox_2d": [0, 0, 1000, 999]}]', [([0, 0, 1000, 999], "")]),
    ('<|begin_of_box|>{"0": [{"label": "car", "bbox_2d": [1, 2, 3, 4]}]}<|end_of_box|>', [([1, 2, 3, 4], "car")]),
])  # fmt: skip
def test_boxes_and_points_are_found_in_what_models_write(driver, bird, text, found):
    if driver.current_url != f"{bird.url}/":
        driver.get(bird.url)
    shapes = driver.execute_script("return shapes(arguments[0])", text)
    assert [(shape["numbers"], shape["label"]) for shape in shapes] == found


def luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
