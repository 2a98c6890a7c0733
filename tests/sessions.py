"""Images, questions and comparisons for tests of a session."""

import pytest
import torch
from transformers import DynamicCache

from comemo import ChatSession, prompts

GREEDY = {"max_new_tokens": 6, "do_sample": False}


QUESTIONS = ("hello there", "what is this?", "and more?", "now <image> compare", "last one")


GRIDS = {1: (2, 1), 3: (1, 1)}  # of the images of a question


TILES = {1: 3, 3: 1}


@pytest.fixture(scope="module")
def pictures():
    return {
        turn: (
            torch.randn(TILES[turn], 3, 448, 448, generator=torch.Generator().manual_seed(turn)),
            grid,
        )
        for turn, grid in GRIDS.items()
    }


@pytest.fixture
def session(model, processor):
    return ChatSession(model, processor, **GREEDY)


@pytest.fixture(params=["raw", "compressed"])
def positions(request, model):
    model.config.decode_positions = request.param
    return request.param


def read_whole(model, tokenizer, history, question, pictures, turns, visibility, rope="dhr"):
    """Cache and last logits of the whole prompt read at once; `turns` are those of the images."""
    text = prompts.build_prompt([*history, (question, None)])
    tiles = [pictures[turn][0] for turn in turns]
    grids = [pictures[turn][1] for turn in turns]
    counts = [len(t) * 256 for t in tiles]
    ids = prompts.encode_prompt(tokenizer, prompts.expand_images(text, counts))
    ids = torch.tensor([ids], device=model.device)
    image = model.model.find_image_tokens(ids)
    core = model.model
    places = core.prompt_position_ids(image, torch.ones_like(ids), grids if rope == "dhr" else None)
    cache = DynamicCache()
    memory = None
    if turns:
        memory = core.build_image_memory(torch.cat(tiles), image, places, grids)
        embeds = core.embed(ids, image, memory)
        # Where each question begins, from the text alone.
        heads = [
            len(
                prompts.encode_prompt(
                    tokenizer,
                    prompts.expand_images(
                        prompts.build_prompt(history[:turn]),
                        [256 * len(pictures[t][0]) for t in turns if t < turn],
                    ),
                )
            )
            for turn in turns
        ]
        ends = torch.tensor([0, *counts], device=model.device).cumsum(0)
        seen = torch.zeros(ids.shape[1], dtype=torch.long, device=model.device)
        for head, turn in zip(heads, turns, strict=True):
            seen[0 if turn == 0 or visibility == "all" else head :] += 1
        spans = torch.stack([torch.zeros_like(seen), ends[seen]], -1)[None]
        memory = memory.reading(spans)
    else:
        embeds = core.embed(ids, None, None)
    with torch.no_grad():
        out = model(
            inputs_embeds=embeds,
            position_ids=places,
            image_memory=memory,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return ids, cache, out.logits[0, -1]


def same_cache(session, cache, tokens):
    """Whether the session's first tokens have these keys and values."""
    for ours, theirs in zip(session._held.cache.layers, cache.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, :, :tokens], b[:, :, :tokens], rtol=1e-3, atol=1e-4)
