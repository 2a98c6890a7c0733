"""The heads that comemo-nano begins with attend to what they are made for."""

import math

import pytest
import torch

from comemo import CoMemoForConditionalGeneration, CoMemoProcessor, prompts
from comemo.nano.heads import BACK, COLUMN, IMAGES, ROW, SHARED, _directions, mark_images
from comemo.nano.start import make_start
from comemo.nano.words import place_names
from comemo_kernels import reference

THINGS = ["red star", "blue circle", "green ring", "yellow square"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder)
    model = CoMemoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = CoMemoProcessor.from_pretrained(folder).tokenizer
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def weights_of(query, key, ids, theta, size):
    """Causal attention weights [heads, n, n] of queries and keys [n, heads * size]."""
    angles = ids[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = (f(angles)[None] for f in (torch.cos, torch.sin))
    query, key = (x.unflatten(-1, (-1, size)) for x in (query, key))
    query, key = reference.apply_rotary(query[None], key[None], cos, sin)
    scores = torch.einsum("qhd,khd->hqk", query[0], key[0]) / math.sqrt(size)
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)


def attend(model, layer, x, ids):
    own = model.model.language_model.layers[layer]
    x, attention = own.input_layernorm(x), own.self_attn
    theta = model.config.text_config.rope_parameters["rope_theta"]
    return weights_of(attention.q_proj(x), attention.k_proj(x), ids, theta, attention.head_dim)


@torch.no_grad()
def conversations(model, encode):
    """Words, four image tokens of each thing, and a question for one of them.

    Yields:
        Embeddings [n, width], the range of all image tokens and of the right ones, and the place of
        the word that names them.
    """
    words = model.get_input_embeddings().weight
    shared, mark, *_ = _directions(model)
    first, images = encode("system\nYou are"), []
    for thing in THINGS:
        x = words[encode("a " + thing)[1:]].sum(0)
        images.append((x - (x @ shared) * shared + SHARED * (shared + mark)).expand(4, -1))
    begin, end = len(first), len(first) + 4 * len(THINGS)
    for number, thing in enumerate(THINGS):
        question = encode(f"Which colour is the {thing.split()[1]}?\n")
        at = end + question.index(encode("a " + thing)[-1])
        x = torch.cat([words[first], *images, words[question]])
        yield x, range(begin, end), range(begin + 4 * number, begin + 4 * number + 4), at


@torch.no_grad()
def test_the_first_layer_looks_back_at_words(start):
    model, encode = start
    words = encode("Which colour is the star? Is there a blue circle?")
    x = model.get_input_embeddings().weight[words]
    found = attend(model, 0, x, torch.arange(len(words)))
    for head, back in enumerate(BACK, 2):
        for i in range(back, len(words)):
            assert found[head, i].argmax() == i - back


@torch.no_grad()
def after_the_first_layer(model, encode, question):
    """An image that shows one thing, and a question: [n, width], and the range of image tokens."""
    words, attention = model.get_input_embeddings().weight, model.model.language_model.layers[0]
    _, mark, *_ = _directions(model)
    prompt = prompts.build_prompt([("<image>", None)], "internlm2-chat").split("<image>")[0]
    before = [model.config.text_config.bos_token_id, *encode(prompt + "<img>")]
    assert len(before) == 16
    (thing,) = encode("Q")
    image = words[thing] + SHARED * mark
    x = torch.cat([words[before], image.expand(16, -1), words[encode(question)]])
    weights = attend(model, 0, x, torch.arange(len(x)))
    norm, own = attention.input_layernorm, attention.self_attn
    values = own.v_proj(norm(x)).unflatten(-1, (4, -1))
    x = x + own.o_proj(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
    return x, range(16, 32)


def cells(side):
    """Of a picture of so many rows and columns: the place of each image token."""
    rows, columns = (torch.arange(16) // 4) * side // 4, (torch.arange(16) % 4) * side // 4
    return rows * side + columns


@torch.no_grad()
@pytest.mark.parametrize("side", [2, 4])
def test_image_tokens_get_the_names_of_their_places(start, side):
    model, encode = start
    words = model.get_input_embeddings().weight
    x, images = after_the_first_layer(model, encode, "")
    ids = [encode("is " + name)[-1] for name in place_names(side, side).values()]
    lines = torch.stack(_directions(model)[3:])
    scores = (words[ids] @ lines.T) @ (x[list(images)] @ lines.T).T
    assert (scores.argmax(0) == cells(side)).sum() >= 15


@torch.no_grad()
@pytest.mark.parametrize("side", [2, 4])
def test_the_words_for_a_place_find_it(start, side):
    model, encode = start
    for place, name in enumerate(place_names(side, side).values()):
        x, images = after_the_first_layer(model, encode, f"What is {name}")
        found = attend(model, 1, x, torch.arange(len(x)))[1, -1, list(images)]
        shares = torch.zeros(side * side).index_add(0, cells(side), found)
        assert shares.argmax() == place
        assert shares[place] > 2.5 / side**2


@torch.no_grad()
@pytest.mark.parametrize(("layer", "lines"), [(2, COLUMN), (3, ROW)], ids=["column", "row"])
def test_what_was_found_finds_its_column_and_its_row(start, layer, lines):
    """The names of places themselves do not."""
    model, encode = start
    directions = torch.stack(_directions(model)[3:])
    for place in range(16):
        x, images = after_the_first_layer(model, encode, "star")
        x[-1] += 0.5 * directions.T @ (directions @ x[images[place]])
        found = attend(model, layer, x, torch.arange(len(x)))[1, -1, list(images)]
        own = torch.arange(16) % 4 == place % 4 if lines == COLUMN else cells(4) // 4 == place // 4
        assert found[own].sum() > 0.35
    x, images = after_the_first_layer(model, encode, "is at the top left")
    assert attend(model, layer, x, torch.arange(len(x)))[1, -1, list(images)].sum() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_a_word_finds_the_image_tokens_it_names(start, layer):
    shares = []
    for x, _, right, at in conversations(*start):
        found = attend(start[0], layer, x, torch.arange(len(x)))[list(IMAGES), at]
        shares.append(found[:, list(right)].sum(-1).max())
    assert sum(shares) / len(shares) > 0.6


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3, 5])
def test_mixin_layers_find_them_too(start, layer):
    model, _ = start
    mixin = model.model.language_model.layers[layer].mixin
    theta = model.config.mixin_config.rope_theta
    shares = []
    for x, images, right, at in conversations(*start):
        x = mixin.attn_norm(x)
        key = mixin.kv_proj(x).chunk(2, -1)[0]
        found = weights_of(mixin.q_proj(x), key, torch.arange(len(x)), theta, mixin.head_dim)
        found = found[list(IMAGES), at]
        seen = found[:, list(images)].sum(-1)
        shares.append((found[:, list(right)].sum(-1) / seen).max())
    assert sum(shares) / len(shares) > 0.6


@torch.no_grad()
def test_the_end_of_a_prompt_looks_at_the_end_of_the_question(start):
    model, encode = start
    words = encode(prompts.build_prompt([("Is there a red star?", None)], "internlm2-chat"))
    star = len(words) - 1 - words[::-1].index(encode("a star")[-1])
    x = model.get_input_embeddings().weight[words]
    ids = torch.arange(len(x))
    for layer, back in ((2, 0), (3, 1), (4, 0), (5, 1)):
        assert attend(model, layer, x, ids)[-2, -1].argmax() == star - back


@torch.no_grad()
def test_words_of_an_answer_look_at_the_end_of_their_prompt(start):
    model, encode = start
    turns = [("Is there a red star?", "no"), ("What is at the top left?", "a blue circle")]
    words = encode(prompts.build_prompt(turns, "internlm2-chat"))
    (newline,) = encode("\n")
    end = len(words) - 1 - words[::-1].index(newline)
    x, ids = model.get_input_embeddings().weight[words], torch.arange(len(words))
    assert len(words) - end == 5
    for layer in (4, 5):
        assert (attend(model, layer, x, ids)[1, end:].argmax(-1) == end).all()


@torch.no_grad()
def test_images_are_marked_after_any_training(start):
    model, _ = start
    projector = model.model.multi_modal_projector
    before = projector[-1].bias.clone()
    projector[-1].bias += 1
    projector[-1].weight += 0.1
    mark_images(model)
    seen = projector(torch.randn(5, projector[0].weight.shape[0]))
    shared, mark, *others = _directions(model)
    for own in (shared, mark):
        torch.testing.assert_close(seen @ own, torch.full((5,), SHARED))
        assert (model.get_input_embeddings().weight @ own).std() < 0.01 * SHARED
    assert (seen @ torch.stack(others).T).abs().max() < 1e-4
    projector[-1].bias.copy_(before)
