"""The page of the server in a browser: with comemo-nano, and with an engine that plays a script."""

import base64
import itertools
import json
import re
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from browsing import (  # noqa: F401
    BROWSER_TESTS,
    DOWN,
    ENTER,
    ESCAPE,
    HOME,
    LEFT,
    PATIENCE,
    RIGHT,
    TAB,
    UP,
    address,
    answer_of,
    driver,
    endless,
    engine,
    grey,
    page,
    scripted,
    scripted_app,
    serve_in_thread,
    sign,
    until,
)

from comemo.serve.http.settings import digest_of_key
from comemo.serve.work import Failed, Refused

pytestmark = BROWSER_TESTS

WORDS = ["a", "white", "sign."]
HOTTEST, OPACITY = (253, 231, 37), 0.7  # the last colour of viridis, and its share


def look_at(address, path, question):
    """What a client of the API is told about the words of an answer."""
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    content = [image, {"type": "text", "text": question}]
    body = {
        "model": "comemo-nano",
        "messages": [{"role": "user", "content": content}],
        "comemo": {"look": True},
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return json.load(response)["comemo"]["look"]


def shares_of(heat):
    """The sums of the ninths of a heat map [down, across], a cell where its middle is."""
    down, across = ((np.arange(n) + 0.5) * 3 // n for n in heat.shape)
    return np.array([[heat[down == r][:, across == c].sum() for c in range(3)] for r in range(3)])


def place_of(shares):
    row, column = np.unravel_index(shares.argmax(), shares.shape)
    name = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip()
    return f"{name or 'centre'}, {round(100 * shares.max())} %"


def test_an_answer_and_where_each_word_looked(page, address, sign):
    path, truth = sign
    page.open(address)
    assert page.text("model") == "comemo-nano"
    page.choose(path)
    assert page.text("facts").startswith("sign.png: 1200 × 800 pixels, 3 × 2 tiles and a thumbnail")
    tiles = page.pixels()
    height, width, _ = tiles.shape
    for x in (width / 3, 2 * width / 3):  # white lines between tiles
        assert (tiles[10 : height // 3, int(x) - 1 : int(x) + 1].max(1) > 200).all()
    small = page.pixels("thumbnail")
    shown = np.asarray(Image.open(path).resize(small.shape[1::-1], Image.Resampling.BOX), float)
    assert np.abs(small - shown).mean() < 8

    question = "Describe the picture."
    assert page.ask(question) == truth[question] == "a white sign that says FOX"
    look = look_at(address, path, question)
    (found,) = look["pictures"]
    words = page.all(".word")
    assert [word.text for word in words] == [*look["words"], "all words"]
    assert look["words"] == truth[question].split()
    # The view of all words is shown; from there to the last word.
    everything = page.pixels()
    assert np.abs(everything - tiles.astype(float)).mean() > 20
    page.script("arguments[0].focus()", words[-1])
    page.press(LEFT)
    assert page.focused() == words[-2]
    heat = np.array(found["heat"][-1]).reshape(found["down"], found["across"])
    seen = page.pixels()
    assert np.abs(seen - everything.astype(float)).mean() > 2
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    places = zip((row, column), seen.shape, heat.shape, strict=False)
    at = [int((i + 0.5) * n / m) for i, n, m in places]
    weights = np.array([0.299, 0.587, 0.114])
    grey = tiles[at[0], at[1]] @ weights
    hottest = OPACITY * np.array(HOTTEST) + (1 - OPACITY) * grey
    assert np.abs(seen[at[0], at[1]] - hottest).max() < 12
    # In words: the share of the ninth with the most, by its own sums.
    told = f"looks most at: {place_of(shares_of(heat))}"
    assert told in page.text("readout")
    assert told.replace("at:", "at") in words[-2].accessible_name
    page.press(HOME)
    assert page.focused() == words[0]
    assert page.focused().get_attribute("aria-pressed") == "true"
    assert "“a”" in page.text("readout")


def test_a_second_question_reads_only_what_is_new(page, address, sign):
    path, truth = sign
    page.open(address)
    page.choose(path)
    page.ask("Which number is on the sign?")
    assert page.ask("Where does the arrow point?") == truth["Where does the arrow point?"]
    cached, read = (int(page.text(name)) for name in ("tokens-cached", "tokens-read"))
    assert cached > 112  # the tokens of the picture at least
    assert 0 < read < 40
    assert page.text("pictures-known") == "1 known, 0 computed"
    assert re.fullmatch(r"\d+\.\d\d s", page.text("waited"))
    assert re.fullmatch(r"\d+\.\d\d s", page.text("first-token"))
    assert re.fullmatch(r"[\d.]+ ms on average", page.text("per-token"))
    assert page.find("spark").get_attribute("aria-label").startswith("1 step, ")
    assert page.text("answer-tokens") == "2"


@pytest.mark.parametrize("rope", ["dhr", "original"])
def test_the_position_map_has_a_colour_for_each_id(page, engine, grey, rope):
    with serve_in_thread(scripted_app(engine, rope)) as (url, _):
        page.open(url)
        page.choose(grey)
        page.show("positions")
        ids = facts_ids(page)
        whole, small = page.pixels(), page.pixels("thumbnail")
        looks = {}
        tiles, cols, side = len(ids) - 1, 3, 4
        for tile, row, column in itertools.product(range(tiles), range(side), range(side)):
            x, y = (tile % cols) * side + column, (tile // cols) * side + row
            colour = corner_of(whole, x, y, cols * side, tiles // cols * side)
            looks.setdefault(ids[tile][row * side + column], set()).add(colour)
        for row, column in itertools.product(range(side), range(side)):
            colour = corner_of(small, column, row, side, side)
            looks.setdefault(ids[-1][row * side + column], set()).add(colour)
        assert len(looks) == (16 if rope == "dhr" else 112)
        assert all(len(colours) == 1 for colours in looks.values())
        if rope == "dhr":  # more ids than that cannot all be told apart
            assert len(set.union(*looks.values())) == len(looks)
        assert f"{len(looks)} position ids (0 to {len(looks) - 1})" in page.text("facts")


def corner_of(pixels, x, y, across, down):
    """The colour inside the top left corner of a cell, where nothing is written."""
    height, width, _ = pixels.shape
    return tuple(pixels[int(y * height / down) + 4, int(x * width / across) + 4].tolist())


def facts_ids(page):
    """The ids of every tile, from the tables of the page."""
    page.find("ids").find_element("tag name", "summary").click()
    until(lambda: page.all("#tables td"))
    tables = page.script(
        "return [...document.querySelectorAll('#tables table')].map("
        "table => [...table.querySelectorAll('td')].map(cell => Number(cell.textContent)))"
    )
    captions = [caption.text for caption in page.all("#tables caption")]
    assert captions[:2] == ["Tile 1: column 1, row 1", "Tile 2: column 2, row 1"]
    assert captions[-1] == "The whole picture"
    return tables


def test_arrow_keys_move_among_tokens(page, scripted, grey):
    page.open(scripted)
    page.choose(grey)
    page.show("positions")
    plain = page.pixels()
    page.find("canvas").send_keys(*[RIGHT] * 4, *[DOWN] * 2, LEFT, RIGHT, UP)
    told = "Tile 2 (column 2, row 1), token row 2, column 1: position id 1, shared by 7 tokens."
    until(lambda: page.text("readout") == told)
    assert page.find("spoken").get_attribute("textContent") == told
    marked = np.abs(page.pixels() - plain.astype(float)).max(2) > 60
    cell = [n / m for n, m in zip(plain.shape, (8, 12), strict=False)]
    for row, column in ((0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5)):
        top, left = round(row * cell[0]), round(column * cell[1])
        assert marked[top : top + 8, left : left + round(cell[1])].any()
    assert not marked[round(2.2 * cell[0]) :].any()
    page.press(*[LEFT] * 20, *[UP] * 20)
    until(lambda: "row 1, column 1: position id 0" in page.text("readout"))


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_a_running_answer_can_be_stopped(page, engine, scripted, how):
    engine.script = endless()
    page.open(scripted)
    page.begin("Count.")
    until(lambda: "word3" in page.text("turns"))
    if how == "button":
        page.find("stop").click()
    else:
        page.press(ESCAPE)
    assert engine.cancelled.wait(PATIENCE)
    until(lambda: "Stopped here." in page.text("turns"))
    kept = page.all(".text")[-1].text
    assert page.find("ask").is_displayed()
    assert not page.find("stop").is_displayed()
    assert page.focused() == page.find("question")
    engine.script = answer_of(["yes"])
    assert page.ask("And then?") == "yes"
    # What was kept is a part of the conversation.
    assert f"word0 {kept.split()[1]}" in engine.works[-1].prompt.text
    assert page.text("alert") == ""


def test_a_stop_before_the_answer_gives_the_question_back(page, engine, scripted, grey):
    engine.held.clear()
    page.open(scripted)
    page.choose(grey)
    page.begin("What is this?")
    until(lambda: engine.works)
    page.press("typed meanwhile", ESCAPE)
    until(lambda: page.find("ask").is_displayed())
    assert page.all("#turns > li") == []
    assert page.find("question").get_attribute("value") == "What is this?\ntyped meanwhile"
    assert page.find("remove").text == "Remove grey.png"
    engine.held.set()
    engine.script = answer_of(["grey"], torch.ones(1, 8, 12) / 96)
    page.find("ask").click()
    until(lambda: page.all("#turns > li:not([aria-busy])"))
    assert len(engine.works[-1].pictures) == 1


def test_errors_are_told_and_take_nothing(page, engine, scripted, grey, tmp_path):
    page.expected = ["429", "400", "ERR_CONNECTION_REFUSED"]
    page.open(scripted)
    assert page.find("alert").get_attribute("role") == "alert"
    page.press(TAB)
    page.begin("")
    assert page.text("alert") == "Write a question first."
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"not a picture")
    page.find("file").send_keys(str(wrong))
    until(lambda: page.text("alert").startswith("wrong.png: "))
    assert "not an image" in page.text("alert")
    page.choose(grey)
    assert page.text("alert") == ""
    engine.script = Refused("busy", "too many requests wait")
    page.begin("What is this?")
    until(lambda: "too many requests wait" in page.text("alert"))
    engine.script = [*answer_of(["half"])[:1], Failed(Refused("failed", "the model broke"))]
    page.find("ask").click()
    until(lambda: "the model broke" in page.text("alert"))
    assert page.all("#turns > li") == []
    assert page.find("question").get_attribute("value") == "What is this?"
    engine.script = answer_of(WORDS, torch.rand(3, 8, 12))
    page.find("ask").click()
    until(lambda: page.all(".word"))
    assert page.text("alert") == ""
    assert engine.works[-1].prompt.text.count("What is this?") == 1
    engine.script = [*answer_of(["whole"]), Failed(Refused("failed", "no look"))]
    assert page.ask("And this?") == "whole"  # what is complete is kept
    assert page.text("alert") == "no look"


def test_a_server_that_is_gone(page, engine):
    page.expected = ["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_SOCKET"]
    with serve_in_thread(scripted_app(engine)) as (url, stop):
        page.open(url)
        stop()
        page.begin("Is anybody there?")
        until(lambda: page.text("alert") == "The server cannot be reached.")
    assert page.find("question").get_attribute("value") == "Is anybody there?"


def test_a_key_is_asked_for(page, engine, grey):
    page.expected = ["401"]
    keys = {digest_of_key("right"): "somebody"}
    with serve_in_thread(scripted_app(engine, keys=keys)) as (url, _):
        page.open(url)
        until(lambda: page.find("key").is_displayed())
        assert "API key" in page.text("alert")
        assert page.focused() == page.find("key")
        page.press("wrong", ENTER)
        until(lambda: page.text("alert"))
        page.find("key").clear()
        page.find("key").send_keys("right", ENTER)
        until(lambda: not page.find("key").is_displayed())
        assert page.text("alert") == ""
        assert page.text("model") == "scripted"
        page.choose(grey)
        engine.script = answer_of(["yes"])
        assert page.ask("May I?") == "yes"
        assert engine.works[-1].namespace == "somebody"
        page.driver.refresh()
        until(lambda: page.find("key").is_displayed())  # it is kept nowhere


def test_text_is_never_html(page, engine, scripted, tmp_path):
    hostile = '<img src="x" onerror="document.title = 1"><b>bold</b>'
    path = tmp_path / "<b>&amp; name.png"
    Image.new("RGB", (600, 400)).save(path)
    words = hostile.split()
    engine.script = answer_of(words, torch.ones(len(words), 8, 12) / 96)
    page.open(scripted)
    page.choose(path)
    assert page.ask(hostile) == hostile
    assert [word.text for word in page.all(".word")][:-1] == words
    assert page.all("#turns b, #turns img, #pictures b") == []
    assert page.driver.title == "CoMemo"
    assert path.name in page.text("turns")
    assert engine.works[-1].prompt.text.count(hostile) == 1


def test_settings_are_sent(page, engine, scripted):
    engine.script = answer_of(["yes"])
    page.open(scripted)
    page.ask("plain")
    assert engine.works[-1].sampling.temperature == 0
    page.find("settings").find_element("tag name", "summary").click()
    for name, value in (("temperature", "0.7"), ("max-tokens", "9"), ("system", "Be short.")):
        page.find(name).send_keys(value)
    page.ask("set")
    work = engine.works[-1]
    assert (work.sampling.temperature, work.sampling.max_tokens) == (0.7, 9)
    assert "Be short." in work.prompt.text
    page.find("temperature").send_keys("9")  # after the 0.7: fine
    assert page.find("temperature").get_attribute("value") == "0.79"
    page.find("temperature").clear()
    page.find("temperature").send_keys("9")
    page.begin("wrong")
    page.settle()
    assert page.focused() == page.find("temperature")
    assert len(engine.works) == 2


def test_the_page_looks_only_where_there_is_something_to_see(page, engine, scripted, grey):
    engine.script = answer_of(["yes"])
    page.open(scripted)
    page.ask("without a picture")
    assert not engine.works[-1].look
    page.choose(grey)
    page.ask("with one")
    assert engine.works[-1].look
    page.find("settings").find_element("tag name", "summary").click()
    page.find("look").click()
    page.ask("not now")
    assert not engine.works[-1].look
