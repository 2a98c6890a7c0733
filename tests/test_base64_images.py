"""Images as text: base64 and data URLs are read as the file that they contain."""

import base64
import builtins

import numpy as np
import pytest
import torch
from pictures import encode
from PIL import Image

from comemo import load_image
from comemo.images import open_image
from comemo.processing import base64_images as encoded
from comemo.processing import image_files as opening

KINDS = ["PNG", "JPEG", "GIF", "WEBP", "TIFF"]


@pytest.fixture(scope="module")
def picture(inputs):
    return Image.fromarray(inputs.picture(7, 40, 30))


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_the_file(picture, kind):
    data = encode(picture, kind)
    text = base64.b64encode(data).decode()
    wanted = np.array(open_image(data))
    wrapped = "\n".join(text[place : place + 76] for place in range(0, len(text), 76))
    forms = [text, wrapped, text.rstrip("="), f"data:image/x;base64,{text}"]
    forms += [f"DATA:image/png;name=a;BASE64,{text}", f"data:;base64,{text.replace('=', '%3D')}"]
    for form in forms:
        assert np.array_equal(np.array(open_image(form)), wanted), form[:30]
    url_safe = base64.urlsafe_b64encode(data).decode()
    assert encoded.decode_base64(url_safe) == encoded.decode_base64(text.encode()) == data


def test_base64_is_never_a_file_name(picture, monkeypatch):
    def opened(path, *args, **kwargs):
        raise AssertionError(f"opened {path!r:.40}")

    text = base64.b64encode(encode(picture, "JPEG")).decode()
    assert text.startswith("/9j/")  # like an absolute path
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(opening.os.path, "isdir", opened)
    assert open_image(text).size == picture.size
    with pytest.raises(ValueError, match="cannot be decoded"):
        open_image(text[:-200])
    with pytest.raises(ValueError, match=r"wanted the path .* of 4100 characters"):
        open_image("c2VjcmV0" * 512 + "abcd")


def test_a_path_that_begins_like_base64_is_a_path(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("iVBORw0KGgo", "iVBORw0KGgo" * 6 + ".png", "R0lGODlh" * 6 + ".gif"):
        picture.save(name, "PNG")
        assert open_image(name).size == picture.size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3, "base64 must be a string, got int"),
        ("", "got an empty text"),
        ("secret!", "wanted base64, got 7 other characters"),
        ("abcde", "wanted base64, got 5 other characters"),
        ("sécrèt", "wanted base64, got 6 other characters"),
        ("data:image/png;base64,data:image/png;base64,AAAA", "got another data URL"),
        ("data:text", "without ;base64"),
    ],
)
def test_errors_of_base64_do_not_repeat_the_text(text, message):
    with pytest.raises(ValueError, match=f"^decode_base64: .*{message}") as caught:
        encoded.decode_base64(text)
    assert "secret" not in str(caught.value)


def test_length_is_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(encoded, "MAX_BYTES", 300)
    monkeypatch.setattr(encoded.base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    for text in ("A" * 1500, "data:image/png;base64," + "A" * 1500, b"A" * 1500):
        with pytest.raises(ValueError, match=r"at most 1424 characters of base64 \(300 bytes\)"):
            encoded.decode_base64(text)


def test_errors_do_not_repeat_the_image(picture):
    text = base64.b64encode(encode(picture, "PNG")).decode()
    for form in (text[:200], "data:image/png;base64," + text[:200], "x" * 5000):
        with pytest.raises(ValueError, match="open_image") as caught:
            open_image(form)
        assert len(str(caught.value)) < 200
        assert text[40:80] not in str(caught.value)


def test_tensors_and_arrays_in_either_order(picture):
    rows = np.array(picture)
    wanted = load_image(picture, 28)[0]
    forms = [rows, rows.transpose(2, 0, 1), torch.tensor(rows), torch.tensor(rows).permute(2, 0, 1)]
    for form in forms:
        assert torch.equal(load_image(form, 28)[0], wanted)
    grey = rows[..., 0]
    for form in (grey, torch.tensor(grey)):
        assert np.array_equal(np.array(open_image(form))[..., 1], grey)
    # A shape that fits both orders is read in the order of its library.
    both = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(np.array(open_image(both)), both)
    assert np.array_equal(np.array(open_image(torch.tensor(both))), both.transpose(1, 2, 0))


def test_conversion_to_rgb_can_be_refused(picture):
    assert open_image(picture, convert_rgb=False) is picture
    for source in (picture.convert("L"), encode(picture.convert("RGBA"), "PNG")):
        with pytest.raises(ValueError, match=r"wanted mode RGB.* got mode (L|RGBA)"):
            open_image(source, convert_rgb=False)
