"""The page of the server: its files and facts about pictures."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from comemo.cli.image_map import token_ids
from comemo.config import CoMemoConfig
from comemo.images import load_image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from browsing import ROOT, nano_reader

from comemo import nano
from comemo.serve.http.page import page_router, picture_facts
from comemo.serve.http.pictures import PictureReader
from comemo.serve.http.settings import ServerSettings

FOLDER = ROOT / "comemo" / "serve" / "page"
FILES = sorted(file.name for file in FOLDER.iterdir())
TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}

POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob: data:",
    "connect-src 'self'",
    "frame-ancestors 'none'",
}


@pytest.fixture(scope="module")
def client():
    pytest.importorskip("httpx", reason="httpx is not installed")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    app.include_router(page_router())
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def config():
    return CoMemoConfig.from_pretrained(nano.checkpoint())


def path_of(name):
    return "/" if name == "index.html" else f"/page/{name}"


def png(width, height, **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_sent_whole_with_what_protects_it(client, name):
    response = client.get(path_of(name))
    assert response.status_code == 200
    assert response.content == (FOLDER / name).read_bytes()
    headers = response.headers
    assert headers["content-type"] == TYPES[name.rpartition(".")[2]]
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    rules = {rule.strip() for rule in headers["content-security-policy"].split(";")}
    assert rules >= POLICY
    head = client.head(path_of(name))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == headers["etag"]


def test_what_a_browser_has_is_not_sent_again(client):
    tags = {client.get(path_of(name)).headers["etag"] for name in FILES}
    assert len(tags) == len(FILES)
    tag = client.get("/").headers["etag"]
    for known in (tag, f'"old", W/{tag}', "*"):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get("/", headers={"If-None-Match": '"old"'}).status_code == 200


def test_nothing_else_is_served(client):
    for path in ("/page/", "/page/index.html", "/page.py", "/page/%2e%2e/http/page.py"):
        assert client.get(path).status_code == 404
    assert client.post("/").status_code == 405


def test_the_page_needs_nothing_from_elsewhere():
    text = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    for name, content in text.items():
        links = re.findall(r"https?://[^\"'\s]+", content)
        assert set(links) <= {"http://www.w3.org/2000/svg"}, name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write"):
            assert word not in content, name
        for other in re.findall(r"from \"\./(.+?)\"", content):
            assert other in FILES, name
    html = text["index.html"]
    named = re.findall(r"(?:href|src)=\"(?!#)(.+?)\"", html)
    assert {f"page/{name}" for name in ("page.js", "page.css", "parts.css", "icon.svg")} == {*named}
    assert "style=" not in html
    assert not re.search(r"\son\w+=", html)
    ids = re.findall(r"\sid=\"(.+?)\"", html)
    assert len(ids) == len(set(ids))
    used = re.findall(r"find\(\"(.+?)\"\)", "".join(text.values()))
    assert set(used) <= set(ids)


@pytest.mark.parametrize("size", [(600, 400), (400, 600), (1600, 200), (300, 300)])
def test_facts_are_those_of_the_position_map(config, size):
    facts = picture_facts(png(*size), config, 6)
    pixels, (cols, rows) = load_image(Image.new("RGB", size), 64, 6)
    assert (facts["width"], facts["height"]) == size
    assert (facts["cols"], facts["rows"], facts["side"]) == (cols, rows, 4)
    assert facts["thumbnail"] == (cols * rows > 1)
    assert facts["tokens"] == 16 * len(pixels)
    assert facts["ids"] == token_ids((cols, rows), 4).reshape(-1, 16).tolist()
    assert facts["largest_id"] == 15


@pytest.mark.parametrize("rope", ["dhr", "original"])
def test_facts_are_those_of_the_prompt(rope):
    """What the page shows is where the server's own reader puts the tokens of the picture."""
    reader, config = nano_reader(rope)
    url = "data:image/png;base64," + base64.b64encode(png(500, 800)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    pictures = PictureReader(config, ServerSettings("nano"), lambda *_: False)
    messages, opened = pictures.read([{"role": "user", "content": content}], "public")
    (picture,) = reader.read(messages, opened).pictures
    facts = picture_facts(png(500, 800), config, config.max_dynamic_patch, rope)
    assert (facts["cols"], facts["rows"]) == picture.grid
    assert [token for tile in facts["ids"] for token in tile] == picture.ids.tolist()
    assert facts["tokens"] == picture.tokens
    assert facts["largest_id"] == picture.ids.max()
    assert facts["thumbnail"]


def test_tokens_in_the_transposed_order_are_at_their_place(config):
    changed = CoMemoConfig.from_dict({**config.to_dict(), "ps_version": "v1"})
    ids = torch.tensor(picture_facts(png(600, 400), config, 6)["ids"])
    turned = torch.tensor(picture_facts(png(600, 400), changed, 6)["ids"])
    assert torch.equal(turned.view(-1, 4, 4), ids.view(-1, 4, 4).transpose(1, 2))
    assert not torch.equal(turned, ids)


def test_a_picture_is_upright(config):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    facts = picture_facts(png(600, 400, exif=exif), config, 6)
    assert (facts["width"], facts["height"]) == (400, 600)
    assert (facts["cols"], facts["rows"]) == (2, 3)


def test_errors(config):
    with pytest.raises(ValueError, match="is not an image"):
        picture_facts(b"no picture", config, 6)
    with pytest.raises(ValueError, match=r"damaged|truncated"):
        picture_facts(png(600, 400)[:-60], config, 6)
    with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
        picture_facts(png(6, 4), config, 0)
    with pytest.raises(
        ValueError, match="picture_facts: rope must be 'dhr' or 'original', got 'x'"
    ):
        picture_facts(png(6, 4), config, 6, "x")
