"""Messages in the forms that clients send: one prompt for all, or one clear error."""

import base64
import dataclasses
import itertools
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import encode
from PIL import Image

import comemo
from comemo import CoMemoProcessor, prompts
from comemo.chat.conversation import load_images

ASK = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}


@pytest.fixture(scope="module")
def small(checkpoint):
    """A processor with small tiles."""
    return CoMemoProcessor.from_pretrained(checkpoint, input_size=28, max_num=2)


@pytest.fixture(scope="module")
def picture(inputs):
    return Image.fromarray(inputs.picture(7, 40, 30))


@dataclasses.dataclass
class Message:
    role: str
    content: object
    tool_calls: object = None


class Model:
    """With the one method of pydantic models that is used."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self):
        return self.fields


FORMS = {
    "dictionary": dict,
    "mapping": UserDict,
    "dataclass": Message,
    "pydantic": Model,
    "object": SimpleNamespace,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_message_is_the_same_prompt(small, form):
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    contents = ["What is it?", parts, [UserDict(part) for part in parts], ["What is it?"]]
    if form is not Message:
        contents.append([Model(**part, annotations=None) for part in parts])
    wanted = prompts.build_prompt([("What is it?", "A cat."), ("More?", None)])
    for content in contents:
        messages = [form(role="user", content=content), form(role="assistant", content="A cat.")]
        messages += [form(role="user", content="More?")]
        for conversation in (messages, tuple(messages), SimpleNamespace(messages=messages)):
            assert small.apply_chat_template(conversation, add_generation_prompt=True) == wanted
        both = small.apply_chat_template([messages, messages], add_generation_prompt=True)
        assert both == [wanted, wanted]


@pytest.mark.parametrize("empty", [{"content": None}, {}, {"content": ""}, {"content": []}])
def test_a_message_without_content_is_its_role_alone(small, empty):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", **empty, "tool_calls": []}]
    wanted = prompts.build_prompt([("Hi", "")])
    assert small.apply_chat_template(messages) == wanted
    ids = small.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids[0].tolist() == small.tokenizer(wanted)["input_ids"]


CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "wanted at least one message, got an empty list"),
        ([[]], "wanted at least one message"),
        (None, "wanted a list of messages, got NoneType"),
        ("hi", "wanted a list of messages, got str"),
        ([3], "a message must be a mapping or an object with .*role.*, got int"),
        ([{"content": "x"}], "a message must have a role, got None"),
        ([{"role": "developer", "content": "x"}], "role must be one of .* got 'developer'"),
        ([{"role": "tool", "content": "x"}], "know no tools, got a message of role tool"),
        ([{"role": "assistant", "tool_calls": [CALL]}], "got tool_calls in a message of role assi"),
        ([{"role": "assistant", "content": None, "function_call": CALL}], "got function_call"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "must come first"),
        ([{"role": "user", "content": 3}], "content must be text or a list of parts, got int"),
        ([{"role": "user", "content": [3]}], "a part of the content must be .* got int"),
        ([{"role": "user", "content": [{"text": "x"}]}], "parts of type text, .* got None"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "got 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must have a text, got NoneType"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], None),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "hold a url"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}],
            r"one source, got \['path', 'url'\]",
        ),
        ([{"role": "user", "content": [{"type": "image", "base64": "?"}]}], "wanted base64, got 1"),
        ([{"role": "user", "content": "half \ud83d"}], "a lone surrogate '.ud83d' at 5"),
        ([{"role": "user", "content": ["\ude00"]}], "a lone surrogate '.ude00' at 0"),
    ],
)
def test_errors(small, messages, complaint):
    for tokenize in (True, False):
        if complaint is None and not tokenize:
            continue  # its image may be passed next to the messages
        with pytest.raises(ValueError, match=complaint or r"marks in the texts for 0 images"):
            small.apply_chat_template(messages, tokenize=tokenize)


def test_tools_need_a_template_that_knows_them(small):
    tools = [{"type": "function", "function": {"name": "look", "description": "<|im_end|>"}}]
    messages = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "<img>"}]
    for name in ("tools", "documents"):
        with pytest.raises(ValueError, match=f"know no {name}, got 1"):
            small.apply_chat_template([{"role": "user", "content": "Hi"}], **{name: tools})
    template = (
        "{% for tool in tools %}{{ tool.function.description }}{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content is defined }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %} {% endfor %}"
    )
    text = small.apply_chat_template(messages, template, tools)
    assert text.replace(prompts.MARKER, "") == "<|im_end|>assistant:Falselook tool:True "
    assert "<|im_end|>" not in text
    small_with_two = CoMemoProcessor(
        small.image_processor, small.tokenizer, {"default": small.chat_template, "tools": template}
    )
    assert small_with_two.apply_chat_template(messages, "tools", tools) == text
    with pytest.raises(ValueError, match="know no tools"):
        small_with_two.apply_chat_template(messages)


def test_every_form_of_an_image_is_the_same_pixels(small, picture, tmp_path):
    file = tmp_path / "a picture ü.png"
    file.write_bytes(data := encode(picture, "PNG"))
    text = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{text}"
    wanted, grid = comemo.load_image(picture, 28, 2)
    parts = [{"type": "image", "image": one} for one in (picture, file, str(file), data, url, text)]
    parts += [{"type": "image", "path": str(file)}, {"type": "image", "base64": text}]
    parts += [{"type": "image", "url": url, "path": None}, {"type": "image", "image": [picture]}]
    parts += [
        {"type": "image_url", "image_url": one} for one in (url, {"url": url, "detail": "low"})
    ]
    parts += [SimpleNamespace(type="image_url", image_url=SimpleNamespace(url=url))]
    parts += [Model(type="image_url", image_url={"url": url, "detail": None})]
    for part in parts:
        content = [part, {"type": "text", "text": "What?"}]
        batch = small.apply_chat_template([{"role": "user", "content": content}], **ASK)
        assert torch.equal(batch["pixel_values"], wanted), part
        assert batch["tile_grid"].tolist() == [list(grid)]
    web = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    messages = [{"role": "user", "content": [web]}]
    assert "<image>" in small.apply_chat_template(messages)
    with pytest.raises(ValueError, match="reads no URL, download the image"):
        small.apply_chat_template(messages, **ASK)


def test_a_session_takes_images_as_text(model, processor, picture):
    text = base64.b64encode(encode(picture, "PNG")).decode()
    forms = [picture, text, f"data:image/png;base64,{text}", torch.tensor(np.array(picture))]
    found = load_images(forms, 0, itertools.count(), processor.image_processor, model.config)
    wanted = comemo.load_image(picture)[0]
    assert all(torch.equal(one.pixel_values, wanted) for one in found)
