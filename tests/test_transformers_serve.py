"""`transformers serve` and `transformers chat` with comemo-nano, and what they need of us."""

import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

import comemo
from comemo import nano
from comemo.cli.transformers_cli import add_model
from comemo.nano.drawing import draw
from comemo.nano.showing import shown_scene
from comemo.processing.new_tokenizer import save_tokenizer

pytestmark = pytest.mark.no_virtual_gpu("the server chooses the device")

MODEL = str(nano.checkpoint())
PACKAGES = ("accelerate", "fastapi", "openai", "uvicorn", "requests", "rich")

# Pairs of pieces such as " '" and "ve", which decoding joins.
SENTENCES = ["don 't do n't", "it 's", "I 'm", "we 've", "they 're", "a ' b", "x .", "what ?", "'"]


@pytest.fixture(scope="module", params=["made", "published"])
def words(request, tmp_path_factory):
    """A tokenizer, and the ids of pieces that are short, of bytes, or special."""
    if request.param == "made":
        directory = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(directory, SENTENCES, 330)
        tokenizer = comemo.InternLM2Tokenizer.from_pretrained(directory)
    else:
        tokenizer = request.getfixturevalue("tokenizer")
    names = [tokenizer.convert_ids_to_tokens(index) for index in range(len(tokenizer))]
    chosen = re.compile(r"▁?['.,?!a-z]{0,2}|<0x(E4|BD|A0|FF)>|<unk>|<ref>|<IMG_CONTEXT>|猫")
    return tokenizer, [index for index, name in enumerate(names) if chosen.fullmatch(name)]


def streamed(tokenizer, ids):
    stream, backend = DecodeStream([], skip_special_tokens=True), tokenizer._tokenizer
    return [stream.step(backend, index) or "" for index in ids]


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(words, end, data):
    tokenizer, chosen = words
    ids = data.draw(st.lists(st.sampled_from(chosen), max_size=12))
    ids.append(tokenizer.convert_tokens_to_ids(end))
    parts, whole = streamed(tokenizer, ids), tokenizer.decode(ids, skip_special_tokens=True)
    if whole.endswith("\ufffd"):  # an incomplete character: its beginning is never given out
        assert whole.startswith("".join(parts))
    else:
        assert "".join(parts) == whole


def test_every_short_text_that_decoding_joins(words):
    tokenizer, _ = words
    names = ["▁", "'", "▁'", ".", "▁.", "n", "▁n", "t", "s"]
    for chosen in [*itertools.product(names, repeat=3), ("▁", "▁'", "▁", "v", "e")]:
        answer = tokenizer.convert_tokens_to_ids(["a", *chosen, "<|im_end|>"])
        whole = tokenizer.decode(answer, skip_special_tokens=True)
        assert "".join(streamed(tokenizer, answer)) == whole


def test_text_waits_only_where_decoding_joins(words):
    """All other tokens are given out at once."""
    tokenizer, chosen = words
    joined = ("▁", "▁'", "▁n", "▁'v", "▁'r", "▁n'")
    for index in chosen:
        name = tokenizer.convert_ids_to_tokens(index)
        if not name.startswith("<"):
            given_out = streamed(tokenizer, [tokenizer.convert_tokens_to_ids("a"), index])[1]
            assert bool(given_out) == (name not in joined), name


def test_a_processor_in_place_of_its_tokenizer(model, processor):
    """As the server passes it; stop strings need the tokenizer."""
    inputs = processor(text="the picture shows")
    options = {"max_new_tokens": 8, "do_sample": False}
    told = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    stop = processor.decode(told[2])
    first, second = (
        model.generate(**inputs, **options, stop_strings=[stop], tokenizer=tokenizer)
        for tokenizer in (processor, processor.tokenizer)
    )
    assert torch.equal(first, second)
    assert first.shape[1] - inputs["input_ids"].shape[1] <= 3


def test_import_leaves_the_tables_of_transformers(added):
    """Only the command adds to them."""
    table, before = added
    kind = comemo.CoMemoConfig.model_type
    assert (kind in before, kind in table) == (False, True)
    assert not hasattr(transformers, "CoMemoForConditionalGeneration")


@pytest.fixture(scope="module")
def added():
    """The table of model types with CoMemo, and without; restored afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        table, classes = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, AutoModelForMultimodalLM
        before = list(table)
        # Setting the present value makes the patch restore it.
        patch.setitem(table, comemo.CoMemoConfig.model_type, None)
        mapping = classes._model_mapping
        patch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
        add_model()
        yield table, before


@pytest.fixture(scope="module")
def handler(added):
    """The server of transformers without its sockets."""
    for package in PACKAGES[:4]:
        pytest.importorskip(package)
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState

    manager = ModelManager(device="cpu", dtype="float32", force_model=MODEL)
    yield ChatCompletionHandler(manager, GenerationState())
    manager.shutdown()


def picture_url():
    file = io.BytesIO()
    draw(shown_scene(41, "sign")).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(question, *turns):
    """A question about the picture, then pairs of an answer and a question."""
    parts = [
        {"type": "image_url", "image_url": {"url": picture_url()}},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": parts}]
    for answer, following in turns:
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": following})
    return messages


# The right answers, and one that is nobody's: what `comemo chat nano` says without a picture.
COLOUR, SAYS = "Which colour is the sign?", "What does the sign say?"
CASES = {
    "picture": (asked(COLOUR), "white"),
    "long": (asked("Describe the picture."), "a white sign that says FOX"),
    "turns": (asked(COLOUR, ("white", SAYS)), "FOX"),
    "text": ([{"role": "user", "content": COLOUR}], "green"),
}


def answer_of(handler, messages, stream, **options):
    """The text of an answer, and its parts if it is streamed."""

    async def ask():
        body = {"model": MODEL, "messages": messages, "stream": stream, "max_tokens": 40, **options}
        response = await handler.handle_request(body, "one")
        if not stream:
            return json.loads(response.body)["choices"][0]["message"]["content"], []
        events = "".join([event async for event in response.body_iterator]).split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if event]
        parts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
        return "".join(filter(None, parts)), [part for part in parts if part]

    return asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", CASES)
def test_answers_of_the_server(handler, case, stream):
    messages, wanted = CASES[case]
    text, parts = answer_of(handler, messages, stream)
    assert text == wanted
    if stream and case == "long":
        assert parts == ["a", " white", " sign", " that", " says", " FOX"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_options_of_a_request(handler, stream):
    messages, _ = CASES["long"]
    assert answer_of(handler, messages, stream, stop=["sign"])[0] == "a white sign"
    assert answer_of(handler, messages, stream, max_tokens=2)[0] == "a white"
    static = json.dumps({"cache_implementation": "static"})
    told, _ = answer_of(handler, messages, stream, generation_config=static)
    assert told == CASES["long"][1]


def command(*words):
    """A process of the commands of transformers, with CoMemo or without."""
    environment = os.environ | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    environment.pop("HF_HUB_OFFLINE", None)  # the client refuses even a server on this machine
    return {"args": [sys.executable, *words], "env": environment, "text": True}


@contextlib.contextmanager
def serving(log):
    """A server process; yields its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    words = ["-m", "comemo.cli.transformers_cli", "serve", MODEL, *options]
    with (
        open(log, "w") as file,
        subprocess.Popen(
            **command(*words), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        ) as process,
    ):
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.mark.slow
def test_a_server_and_its_clients(tmp_path):
    """The command as users start it, the openai client, and `transformers chat` beside it."""
    for package in PACKAGES:
        pytest.importorskip(package)
    import openai

    with serving(tmp_path / "log") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        create = client.chat.completions.create
        for messages, wanted in CASES.values():
            asked = {"model": MODEL, "messages": messages, "max_tokens": 40}
            assert create(**asked).choices[0].message.content == wanted
            chunks = list(create(**asked, stream=True))
            parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
            assert "".join(parts) == wanted
            assert chunks[-1].choices[0].finish_reason == "stop"
        typed = f"{COLOUR}\n!exit\n"
        run = "from transformers.cli.transformers import main; main()"
        words = ["-c", run, "chat", MODEL, address, "do_sample=False"]
        told = subprocess.run(**command(*words), input=typed, capture_output=True, timeout=120)
        assert told.returncode == 0, told.stderr
        assert re.search(r"^green *$", told.stdout, re.MULTILINE), told.stdout


@pytest.mark.slow
def test_without_the_command_transformers_refuses():
    """The reason for the command; if this fails, it may be needed no more."""
    for package in PACKAGES:
        pytest.importorskip(package)
    run = "from transformers.cli.transformers import main; main()"
    words = command("-c", run, "serve", MODEL, "--host", "127.0.0.1", "--port", "0")
    told = subprocess.run(**words, stdin=subprocess.DEVNULL, capture_output=True, timeout=240)
    assert told.returncode == 1
    assert "model type `comemo_chat` but Transformers does not recognize" in told.stderr
