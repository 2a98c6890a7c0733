"""The text of training data: ids of the whole prompt, and where its answers are."""

import pytest
from conftest import SLOW
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from comemo import InternLM2Tokenizer
from comemo.prompts import (
    IMAGE_CONTEXT,
    IMAGE_START,
    TEMPLATES,
    build_prompt,
    encode_with_images,
    escape,
)
from comemo.train.data.encode import ONE_IMAGE, PromptEncoder

ALIKE = ("Hermes-2", "internlm2-flamingo-chat")  # as internlm2-chat
SOME = [pytest.param(name, marks=SLOW if name in ALIKE else ()) for name in TEMPLATES]
# pieces of text that merge with what stands beside them, or name tokens
CONTROL = ("<|im_end|>", "<|im_start|>assistant\n", "[UNUSED_TOKEN_3]", "<IMG_CONTEXT>", "</img>")
PARTS = st.sampled_from(
    (*CONTROL, "<|end|>", "a", " boat", "the", "\n", "  ", "<", "|>", "▁", "请", "\t", "x" * 9)
)
TEXT = st.lists(PARTS, min_size=1, max_size=6).map("".join).map(str.strip).filter(bool)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizers(demo_checkpoint):
    """The published kind, one where no template's stop is a token, and one of another library."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ours = InternLM2Tokenizer.from_pretrained(demo_checkpoint)
    merges = [("\n", "a"), ("|", ">"), ("t", "\n"), ("\n", "<"), (">", "\n")]
    letters = ["<unk>", "\n", *map(chr, range(32, 127))]
    vocab = {text: index for index, text in enumerate([*letters, *map("".join, merges)])}
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Split("zzz", "isolated")
    special = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", IMAGE_CONTEXT]
    other = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", additional_special_tokens=special
    )
    return {"ours": ours, "other": other}


@pytest.mark.parametrize("kind", ["ours", "other"])
@pytest.mark.parametrize("template", SOME)
@pytest.mark.parametrize("published_text", [False, True])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS, system=st.none() | TEXT, image=st.booleans())
def test_ids_are_those_of_the_whole_prompt(
    tokenizers, kind, template, published_text, turns, system, image
):
    tokenizer = tokenizers[kind]
    if image:
        turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    encoder = PromptEncoder(tokenizer, template, published_text)
    ids, learnt = encoder.encode(turns, system)

    def safe(text):
        return text if published_text or text is None else escape(text, tokenizer)

    asked = [(safe(question), safe(answer)) for question, answer in turns]
    prompt = build_prompt(asked, template, safe(system))
    written = "".join(text for message in encoder.write(turns, system) for text, _ in message)
    assert written == prompt.replace("<image>", ONE_IMAGE)
    if IMAGE_CONTEXT not in prompt:
        assert ids.tolist() == encode_with_images(tokenizer, prompt, [1] * image)
    # a run of labels is an answer with its stop token
    runs, before = [], False
    for index, is_learnt in zip(ids.tolist(), learnt.tolist(), strict=True):
        if is_learnt:
            runs = [*runs, [index]] if not before else [*runs[:-1], [*runs[-1], index]]
        before = is_learnt
    assert len(runs) == len(turns)
    stop = tokenizer.convert_tokens_to_ids(encoder.stop)
    if encoder.apart:
        assert kind == "ours"
        for run, (_, answer) in zip(runs, turns, strict=True):
            assert run[-1] == stop
            head = encoder._ids(encoder.words.assistant)
            whole = encoder._ids(encoder.words.assistant + safe(answer))
            start = len(whole) - (len(run) - 1)
            assert head[:start] == whole[:start]
            assert whole[start:] == run[:-1]


@pytest.mark.parametrize("template", ["internlm2-chat", "internvl2_5"])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS, system=st.none() | TEXT)
def test_messages_one_by_one_are_as_the_whole(tokenizers, template, turns, system):
    encoder = PromptEncoder(tokenizers["ours"], template)
    assert encoder.apart
    ids, learnt = encoder.encode(turns, system)
    encoder.apart = False
    again, also_learnt = encoder.encode(turns, system)
    assert ids.tolist() == again.tolist()
    assert learnt.tolist() == also_learnt.tolist()


def test_a_template_whose_stop_is_text(tokenizers):
    encoder = PromptEncoder(tokenizers["ours"], "phi3-chat")
    assert not encoder.apart
    ids, learnt = encoder.encode([("one?", "a boat"), ("two?", "the sky")])
    tokens = tokenizers["ours"].convert_ids_to_tokens(ids[learnt].tolist())
    text = tokenizers["ours"].sp_model.decode(tokens)
    assert text == "a boat<|end|>the sky<|end|>"


def test_labels_begin_where_generation_would(tokenizers):
    """`other` merges the end of the role with its last letter, or with the answer's first."""
    tokenizer = tokenizers["other"]
    encoder = PromptEncoder(tokenizer, "internlm2-chat")
    for answer, expected in [("bc", ["b", "c"]), ("ab", ["t", "\na", "b"])]:
        ids, learnt = encoder.encode([("q", answer)], "s")
        tokens = tokenizer.convert_ids_to_tokens(ids[learnt].tolist())
        assert tokens == [*expected, "<|im_end|>"]
        start = learnt.argmax()
        asked = encode_with_images(
            tokenizer, build_prompt([("q", None)], "internlm2-chat", "s"), []
        )
        assert ids[:start].tolist() == asked[:start]
        assert start == len(asked) or ids[start] != asked[start]


def test_tokenizers_without_a_token_for_images(tokenizers):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers["other"].backend_tokenizer, unk_token="<unk>"
    )
    assert bare.convert_tokens_to_ids(IMAGE_START) is not None
    assert PromptEncoder(bare, "internlm2-chat").context == bare.convert_tokens_to_ids(
        IMAGE_CONTEXT
    )
    from tokenizers import Tokenizer, models

    none = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<unk>": 0}, [], unk_token="<unk>")),
        unk_token="<unk>",
    )
    with pytest.raises(ValueError, match="must have the token <IMG_CONTEXT>"):
        PromptEncoder(none, "internlm2-chat")
    with pytest.raises(ValueError, match="wanted a template of"):
        PromptEncoder(tokenizers["ours"], "none")
