"""The page of the server for everybody: keyboard, screen reader, phone, several pictures."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from browsing import (  # noqa: F401
    BROWSER_TESTS,
    DOWN,
    END,
    ENTER,
    HOME,
    LEFT,
    RIGHT,
    SHIFT,
    TAB,
    answer_of,
    driver,
    engine,
    find_axe,
    grey,
    page,
    scripted,
    until,
)

pytestmark = BROWSER_TESTS

WORDS = ["a", "grey", "picture."]


def some_heat(pictures=1):
    """What each of `WORDS` reads of each picture."""
    heat = torch.rand(pictures, len(WORDS), 8, 12)
    return list(heat / heat.sum((0, 2, 3), keepdim=True))


def fill(page, engine, grey):
    """A conversation with everything that the page can show."""
    engine.script = answer_of(WORDS, *some_heat())
    page.choose(grey)
    page.ask("What is this?")
    until(lambda: page.all(".word"))


def walk(page, most=60):
    """What the Tab key reaches, in order, from the top of the page, and whether that is seen."""
    page.script("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.find("model").click()
    seen = {}
    for _ in range(most):
        page.press(TAB)
        element = page.focused()
        if element.tag_name == "body" or element in seen:
            break
        seen[element] = shown_focus(page, element)
    return seen


def shown_focus(page, element):
    """Whether the focus can be seen on an element, and the element itself."""
    return page.script(
        "const style = getComputedStyle(arguments[0]);"
        "const box = arguments[0].getBoundingClientRect();"
        "const inside = box.top < innerHeight && box.bottom > 0 && box.right > 0;"
        "return inside && style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2",
        element,
    )


def test_everything_is_reached_by_the_tab_key(page, engine, scripted, grey):
    page.open(scripted)
    fill(page, engine, grey)
    page.show("positions")
    page.find("settings").find_element("tag name", "summary").click()
    names = []
    for element, seen in walk(page).items():
        name = element.accessible_name or element.text
        assert name, element.get_attribute("outerHTML")
        names.append((element.get_attribute("id") or element.tag_name, name))
        assert seen, name
    reached = [key for key, _ in names]
    wanted = ["restart", "canvas", "file", "question", "ask", "temperature", "max-tokens", "system"]
    assert [key for key in reached if key in wanted] == wanted
    assert ("span", "all words: looks most at") in [(key, name[:24]) for key, name in names]
    assert sum(key == "span" for key in reached) == 1  # the words are one stop
    assert "look" in reached


def test_a_whole_visit_by_keyboard(page, engine, scripted, grey):
    page.open(scripted)
    page.press(TAB, ENTER)  # skip to the question
    page.settle()
    assert page.focused() == page.find("question")
    page.choose(grey)  # the dialog of files is not of the page
    engine.script = answer_of(WORDS, *some_heat())
    page.find("question").send_keys("one line", SHIFT, ENTER)
    page.find("question").send_keys("another", ENTER)
    until(lambda: page.all(".word"))
    assert engine.works[-1].prompt.text.count("one line\nanother") == 1
    page.press(SHIFT + TAB)
    bar = page.focused()
    assert bar.text == "all words"
    for key, word in ((HOME, "a"), (RIGHT, "grey"), (RIGHT, "picture."), (LEFT, "grey")):
        page.press(key)
        page.settle()
        assert page.focused().text == word
        assert f"“{word}”" in page.text("readout")
    page.press(END, RIGHT)
    assert page.focused().text == "a"
    page.show("tiles")
    tiles = page.pixels()
    page.find("question").click()
    page.press(SHIFT + TAB)
    assert np.abs(page.pixels() - tiles.astype(float)).mean() > 20  # while it has the focus
    page.press(TAB)
    assert np.array_equal(page.pixels(), tiles)
    page.press(SHIFT + TAB)
    page.press(ENTER)  # now for good
    page.press(TAB)
    assert np.abs(page.pixels() - tiles.astype(float)).mean() > 20
    assert page.focused() == page.find("question")
    page.find("restart").send_keys(ENTER)
    page.settle()
    assert page.all("#turns > li") == []
    assert not page.find("shown").is_displayed()
    assert page.focused() == page.find("question")
    page.ask("again")
    assert engine.works[-1].prompt.text.count("user") == 1
    assert not engine.works[-1].pictures


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_nothing_that_axe_finds(page, engine, scripted, grey, scheme, width):
    axe = find_axe()
    page.prefer(prefers_color_scheme=scheme)
    page.resize(width, 800)
    page.open(scripted)
    paper = page.script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(251, 250, 248)") == (scheme == "light")
    page.script(axe)
    states = {"empty": no_faults(page)}
    fill(page, engine, grey)
    for view in ("look", "positions", "tiles"):
        page.show(view)
        states[view] = no_faults(page)
    for name in ("settings", "ids"):
        page.find(name).find_element("tag name", "summary").click()
    page.begin("")
    page.script("document.getElementById('key-form').hidden = false")
    states["all open"] = no_faults(page)
    assert states == {state: [] for state in states}


def no_faults(page):
    """What axe finds, each in one line; rules of WCAG 2.2 AA and of good practice."""
    page.settle()
    found = page.driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run().then(({ violations, passes }) => done([passes.length, violations.map("
        "({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(' | ')}`)]))"
    )
    assert found[0] > 15  # it did run
    return found[1]


@pytest.mark.parametrize("size", [(360, 740), (320, 256), (800, 1000)])
def test_no_scrolling_sideways(page, engine, scripted, grey, size, tmp_path):
    page.resize(*size)
    page.open(scripted)
    wide = "document.documentElement.scrollWidth"
    assert page.script(f"return {wide}") <= size[0]
    fill(page, engine, grey)
    tall = tmp_path / f"{'long_name_' * 12}.png"
    Image.new("RGB", (100, 900)).save(tall)
    page.choose(tall)
    engine.script = answer_of(["very" * 60, "long"])
    page.ask("w" * 200)
    for name in ("settings", "ids"):
        page.script("document.getElementById(arguments[0]).open = true", name)
    for view in ("tiles", "positions"):
        page.show(view)
        assert page.script(f"return {wide}") <= size[0], view
    assert page.pixels().shape[1] <= size[0]


def test_a_picture_stays_in_view_on_a_phone(page, engine, scripted, grey):
    page.resize(360, 740)
    page.open(scripted)
    fill(page, engine, grey)
    page.script("arguments[0].focus()", page.all(".word")[1])
    page.settle()
    boxes = [
        page.script("return arguments[0].getBoundingClientRect().toJSON()", element)
        for element in (page.find("canvas"), page.all(".word")[1])
    ]
    assert boxes[0]["top"] >= 0
    assert boxes[0]["bottom"] <= boxes[1]["top"]
    assert boxes[1]["bottom"] <= 740


def test_a_reader_hears_an_answer_once(page, engine, scripted, grey):
    engine.script = answer_of(WORDS, *some_heat())
    page.open(scripted)
    page.choose(grey)
    page.script(
        "window.heard = [];"
        "for (const place of document.querySelectorAll('[role=status], [role=alert], [aria-live]'))"
        "  new MutationObserver(() => window.heard.push(place.textContent)).observe(place,"
        "    { childList: true, characterData: true, subtree: true });"
    )
    page.ask("What is this?")
    page.settle()
    heard = [text for text in page.script("return window.heard") if text]
    assert heard == ["Reading.", "Answer: a grey picture."]
    live = page.all("[role=status], [role=alert], [aria-live]")
    assert {place.get_attribute("id") for place in live} == {"spoken", "alert"}


def test_no_motion_where_none_is_wanted(page, engine, scripted):
    engine.held.clear()
    for wanted, name in (("no-preference", "wait"), ("reduce", "none")):
        page.prefer(prefers_reduced_motion=wanted)
        page.open(scripted)
        page.begin("Wait.")
        note = until(lambda: page.all("li[aria-busy] .note"))[-1]
        script = "return getComputedStyle(arguments[0], '::after').animationName"
        assert page.script(script, note) == name


def test_a_pointer_shows_what_is_under_it(page, engine, scripted, grey):
    page.open(scripted)
    fill(page, engine, grey)
    page.show("positions")
    ids = page.pixels()
    page.point(page.all(".word")[0])
    until(lambda: "“a” looks most at" in page.text("readout"))
    assert np.abs(page.pixels() - ids.astype(float)).mean() > 20
    page.point(page.find("question"))
    until(lambda: page.text("readout").startswith("Point at a token"))
    assert np.array_equal(page.pixels(), ids)
    page.point(page.find("canvas"), 5, 5)
    told = "Tile 5 (column 2, row 2), token row 1, column 3: position id 6, shared by 10 tokens."
    until(lambda: page.text("readout") == told)
    page.point(page.find("thumbnail"), 5, 5)
    told = "Thumbnail, token row 3, column 3: position id 10, shared by 4 tokens."
    until(lambda: page.text("readout") == told)


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_files_come_in_other_ways(page, scripted, grey, way):
    page.open(scripted)
    page.script(
        "const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));"
        "const data = new DataTransfer();"
        "for (const name of ['first.png', 'second.png'])"
        "  data.items.add(new File([bytes], name, { type: 'image/png' }));"
        "data.items.add(new File(['text'], 'notes.txt', { type: 'text/plain' }));"
        "const options = { bubbles: true, cancelable: true };"
        "const event = arguments[1] === 'drop'"
        "  ? new DragEvent('drop', { ...options, dataTransfer: data })"
        "  : new ClipboardEvent('paste', { ...options, clipboardData: data });"
        "document.getElementById('question').dispatchEvent(event);"
        "return event.defaultPrevented",
        base64.b64encode(grey.read_bytes()).decode(),
        way,
    )
    until(lambda: page.text("alert") == "notes.txt is not a picture.")
    labels = [label.text for label in page.all("#which label")]
    assert labels == ["1: first.png", "2: second.png"]


def test_several_pictures(page, engine, scripted, grey, tmp_path):
    white = tmp_path / "white.png"
    Image.new("RGB", (60, 60), "white").save(white)
    page.open(scripted)
    page.choose(grey, white)
    page.choose(grey)
    page.find("remove").click()
    page.settle()
    assert [label.text for label in page.all("#which label")] == ["1: grey.png", "2: white.png"]
    first, second = some_heat()[0], torch.zeros(3, 4, 4)
    first[1] *= 0.25
    second[1, 0, 0] = 0.75
    engine.script = answer_of(WORDS, first, second)
    page.ask("Which is brighter?")
    assert [picture.tiles for picture in engine.works[-1].pictures] == [7, 1]
    assert page.text("pictures-known") == "1 known, 1 computed"
    page.script("arguments[0].focus()", page.all(".word")[1])
    page.settle()
    assert "“grey” looks most at: picture 2, top left, 75 %" in page.text("readout")
    until(lambda: "75.0 % in a cell" in page.text("scale-top"))
    brightest = page.pixels()
    assert brightest.shape[0] == brightest.shape[1]
    assert np.abs(brightest[3, 3] - (0.7 * np.array([253, 231, 37]) + 0.3 * 255)).max() < 6
    page.all("#which input")[0].click()
    dark = page.pixels()
    assert np.abs(dark - (0.7 * np.array([68, 1, 84]) + 0.3 * 128)).mean() < 12  # the same scale
    assert not page.find("remove").is_displayed()
    page.all("#which input")[0].send_keys(DOWN)
    page.settle()
    assert page.text("facts").startswith("white.png: 60 × 60 pixels, one tile, 4 × 4 tokens")
