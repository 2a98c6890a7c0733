import copy
import io
import json
import re
import shutil

import pytest
import sentencepiece
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, TextIteratorStreamer

from comemo import prompts
from comemo.prompts import escape
from comemo.tokenizer import MARKER, InternLM2Tokenizer

ALIAS = "[UNUSED_TOKEN_145]"
CORPUS = ["hello world, what is in the picture? a small house.", "im end start img s 1 4 5 token"]


@pytest.fixture(scope="module", params=["tokenizer", "ckpt_a"])
def folder(golden, request):
    return golden / request.param


@pytest.fixture(scope="module")
def tokenizer(folder):
    return InternLM2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "tokenizer_golden.json").read_text())["tokenizer"]


def assert_recorded(tokenizer, recorded):
    assert len(tokenizer) == recorded["len"]
    assert tokenizer.vocab_size == recorded["sp_size"]
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(tokenizer, f"{name}_token_id") == recorded[name]
    for token, index in recorded["special"].items():
        assert tokenizer.convert_tokens_to_ids(token) == index
    for case in recorded["encode"]:
        text, ids = case["text"], case["ids"]
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == case["ids_no_special"]
        assert tokenizer.convert_ids_to_tokens(ids) == case["tokens"]
        assert tokenizer.decode(ids) == case["decode"], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode_skip"], text
    for case in recorded["decode_random"]:
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"]


def test_matches_recorded(tokenizer, recorded):
    assert_recorded(tokenizer, recorded)


def test_survives_saving(tokenizer, recorded, folder, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model = "tokenizer.model"
    assert (tmp_path / model).read_bytes() == (folder / model).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "InternLM2Tokenizer"
    assert_recorded(InternLM2Tokenizer.from_pretrained(tmp_path), recorded)


def test_loading_keywords_are_not_saved(folder, recorded, tmp_path):
    keywords = {"use_fast": False, "trust_remote_code": True}
    tokenizer = InternLM2Tokenizer.from_pretrained(folder, **keywords)
    assert_recorded(tokenizer, recorded)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"auto_map", *keywords} & set(saved)


def test_ids_around_a_text(folder):
    tokenizer = InternLM2Tokenizer.from_pretrained(folder)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer("a", "a")["input_ids"] == [bos, *text, *text]
    assert tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"] == [1, 0]
    tokenizer.add_bos_token, tokenizer.add_eos_token = False, True
    assert tokenizer("a")["input_ids"] == [*text, eos]


def test_decodes_batches_and_single_ids(tokenizer):
    index = tokenizer.convert_tokens_to_ids("<img>")
    assert tokenizer.decode(index) == "<img>"
    ids = tokenizer(["hello", "a?"], add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids) == ["hello", "a?"]
    assert tokenizer.decode([]) == ""


def test_clean_up_and_spaces_are_optional(tokenizer):
    ids = tokenizer("<img>?", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "<img> ?"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "<img>?"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "<img>?"


def test_added_words_are_not_control_tokens(folder):
    tokenizer = InternLM2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["wombat"])
    assert "wombat" not in tokenizer.control_literals
    ids = tokenizer(escape("a wombat", tokenizer), add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("wombat")
    assert tokenizer.decode([*ids, ids[0]]) == "a  wombat a"


def test_errors():
    with pytest.raises(ValueError, match=r"InternLM2Tokenizer: wanted .* tokenizer\.model"):
        InternLM2Tokenizer()


def test_control_literals_name_their_aliases(tokenizer):
    literals = tokenizer.control_literals
    assert {"<s>", "<img>", "<IMG_CONTEXT>", "<|im_end|>", ALIAS} <= literals
    assert "[UNUSED_TOKEN_140]" not in literals


def control_ids(tokenizer):
    return set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}


def as_decoded(tokenizer, text):
    """A text without control tokens, encoded and decoded."""
    return tokenizer.clean_up_tokenization(text.replace("▁", " "))


LITERALS = ["<s>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"]
LITERALS += [ALIAS, "[UNUSED_TOKEN_141]"]
FRAGMENTS = [part for literal in LITERALS for part in (literal[:1], literal[:4], literal[4:])]
CODES = [MARKER, "<0xEF>", "<0xB7>", "<0x90>", "▁", " ", "\n", "猫", "😀"]
texts = st.lists(st.sampled_from(LITERALS + FRAGMENTS + CODES) | st.text(max_size=5)).map("".join)


@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_escaped_text_stays_text(tokenizer, text):
    escaped = escape(text, tokenizer)
    assert escaped.replace(MARKER, "") == text.replace(MARKER, "")
    ids = tokenizer(escaped, add_special_tokens=False)["input_ids"]
    assert not control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == as_decoded(tokenizer, text.replace(MARKER, ""))


@settings(deadline=None, max_examples=150)
@given(text=st.text() | texts)
def test_ordinary_text_is_unchanged(tokenizer, text):
    for literal in [MARKER, *tokenizer.control_literals]:
        text = text.replace(literal, "a")
    if any(literal in text for literal in tokenizer.control_literals):
        return
    assert escape(text, tokenizer) == text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == as_decoded(tokenizer, text)


@pytest.mark.parametrize(
    "text",
    [
        "<<img>img>",
        "<|im_<|im_end|>end|>",
        "<|im_end|><|im_end|>",
        f"[UNUSED_TOKEN_14{ALIAS}5]",
        f"<{MARKER}img>",
        f"{MARKER}<im{MARKER}{MARKER}g>",
        f"a {ALIAS} b",
    ],
)
def test_nested_and_broken_literals_stay_text(tokenizer, text):
    ids = tokenizer(escape(text, tokenizer), add_special_tokens=False)["input_ids"]
    assert not control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == text.replace(MARKER, "")


def test_template_around_escaped_text_keeps_its_control_tokens(tokenizer):
    # Text that ends next to a control token must neither absorb it nor complete another.
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for text in ("<|im_end|>", "<|im_end", "<", ALIAS[:-1], "|>"):
        prompt = "<|im_end|>" + escape(text, tokenizer) + "<|im_end|>"
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert [index for index in ids if index in control_ids(tokenizer)] == [end, end]
        assert tokenizer.decode(ids[1:-1]) == text


@pytest.fixture(scope="module", params=["byte_fallback", "no_byte_fallback"])
def with_dummy_prefix(request, tmp_path_factory):
    """A tokenizer that puts a space before every text, with one piece renamed."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=330 if request.param == "byte_fallback" else 60,
        byte_fallback=request.param == "byte_fallback",
        user_defined_symbols=[ALIAS],
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = InternLM2Tokenizer(str(path))
    end = AddedToken("<|im_end|>", special=True, normalized=False)
    tokenizer.added_tokens_decoder = {processor.piece_to_id(ALIAS): end}
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>", "<img>"]})
    return tokenizer


@settings(deadline=None)
@given(text=texts)
def test_no_control_id_with_any_sentencepiece_model(with_dummy_prefix, text):
    tokenizer = with_dummy_prefix
    ids = tokenizer(escape(text, tokenizer), add_special_tokens=False)["input_ids"]
    assert not control_ids(tokenizer) & set(ids)
    if "▁" not in text and tokenizer.sp_model.is_byte(tokenizer.convert_tokens_to_ids("<0x00>")):
        # These models also merge spaces and strip them at the ends.
        merged = re.sub(" +", " ", text.replace(MARKER, "")).strip(" ")
        assert tokenizer.decode(ids) == tokenizer.clean_up_tokenization(merged)


def test_renamed_piece_of_another_model(with_dummy_prefix):
    tokenizer = with_dummy_prefix
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end < tokenizer.vocab_size
    assert end in tokenizer(ALIAS)["input_ids"]
    assert end not in tokenizer(escape(ALIAS, tokenizer))["input_ids"]


def test_overlapping_names_and_unknown_characters(with_dummy_prefix):
    tokenizer = copy.deepcopy(with_dummy_prefix)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<<x", "<x>", "¤¥"]})
    for text in ("<<x>", "¤¥", "a¤¥¥b"):
        ids = tokenizer(escape(text, tokenizer), add_special_tokens=False)["input_ids"]
        assert not control_ids(tokenizer) & set(ids), text


def test_a_damaged_model_file_is_named(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"wanted a sentencepiece model, got .*tokenizer\.model"):
        InternLM2Tokenizer.from_pretrained(tmp_path / "ckpt")


HALVES = ["\ud83d", "a\ude00b", "\ud83d\ude00", "<|im_end|>\udfff"]


@pytest.mark.parametrize("text", HALVES)
def test_a_lone_surrogate_is_refused_everywhere(tokenizer, processor, text):
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    doors = {
        "InternLM2Tokenizer": [
            lambda: tokenizer(text),
            lambda: tokenizer(["whole", text], padding=True),
            lambda: tokenizer([text], is_split_into_words=True),
            lambda: tokenizer.tokenize(text),
            lambda: tokenizer.encode(text),
        ],
        "encode_prompt": [
            lambda: prompts.encode_prompt(tokenizer, text),
            lambda: processor(text=text),
            lambda: processor(text=["whole", text]),
        ],
        "escape": [
            lambda: prompts.escape(text, tokenizer),
            lambda: processor.apply_chat_template(messages),
            lambda: processor.apply_chat_template([{"role": "system", "content": text}]),
            lambda: prompts.encode_turns(tokenizer, [(text, None)], "internlm2-chat", None, []),
            lambda: prompts.encode_turns(tokenizer, [("q", text)], "internlm2-chat", None, []),
            lambda: prompts.encode_turns(tokenizer, [("q", None)], "internlm2-chat", text, []),
        ],
    }
    for name, calls in doors.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{name}: .*a lone surrogate") as caught:
                call()
            assert not isinstance(caught.value, UnicodeError)
    assert tokenizer.decode(tokenizer("\U0001f600", add_special_tokens=False)["input_ids"]) == "😀"


def streamed(tokenizer, ids, **options):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5, **options)
    streamer.put(torch.tensor([[1, 5]]))
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    return "".join(streamer)


PARTS = ["ab", " word", "\n", "\n\n", " the", " 猫", "猫", "😀", ".", "!", ", and", "  ", "\n  x"]


@settings(deadline=None, max_examples=50)
@given(text=st.lists(st.sampled_from(PARTS), min_size=1, max_size=25).map("".join))
def test_a_streamer_of_transformers_gives_the_decoded_text(tokenizer, text):
    # Otherwise clean-up removes spaces that were already printed.
    assume(tokenizer.clean_up_tokenization(text) == text)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    decoded = tokenizer.decode([*ids, end], skip_special_tokens=True)
    assert streamed(tokenizer, [*ids, end], skip_special_tokens=True) == decoded == text
