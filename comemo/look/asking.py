"""A question about one picture, its answer, and where the memory path looked for each word.

Letters: n tokens of the answer, M tokens of the image memory, L mixin layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import comemo_kernels as ops
from comemo import prompts
from comemo.chat.driver import build_prompt, check_tokenizer, generate_answer
from comemo.chat.options import text_options
from comemo.decode.cache import ROOM_FOR_ANSWER, RoomyCache
from comemo.decode.interface import GeneratingModel, Prefilled
from comemo.decode.prefill import prefill
from comemo.images import Grid
from comemo.look.picture import PictureHeat, heat_over_picture
from comemo.look.weights import (
    answer_tokens,
    check_layers,
    gate_sizes,
    look_at_answer,
    over_layers,
)
from comemo.look.words import Word, split_words
from comemo.parallel.split import refuse_divided
from comemo.tokenizer import InternLM2Tokenizer
from comemo.vision import check_tiles

CHUNK = 4096  # tokens of a prefill pass; bounds memory


@dataclass(frozen=True)
class Look:
    """An answer, and what each of its words read of the picture.

    Attributes:
        question, answer: text.
        words: of the answer, in order; none for an answer without text.
        layers: indices of the decoder layers after the mixin layers that were looked at.
        gates: size of each of their gates, see `gate_sizes`.
        weights: float32 [L, n, M] on the CPU, see `memory_weights`.
        of_words: where each word looked, [words, height, width]: the mean of its tokens, the mixin
            layers counted by the size of their gates.
        of_answer: the mean over all words' tokens, [height, width].
    """

    question: str
    answer: str
    words: list[Word]
    layers: tuple[int, ...]
    gates: tuple[float, ...]
    weights: Tensor
    of_words: PictureHeat
    of_answer: PictureHeat


@torch.no_grad()
def ask_and_look(
    model: GeneratingModel,
    tokenizer: InternLM2Tokenizer,
    question: str,
    pixel_values: Tensor,
    grid: Grid,
    *,
    rope: str = "dhr",
    system_message: str | None = None,
    layers: Sequence[int] | None = None,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Look:
    """Answer a question about a picture, then read the answer once more to see what it looked at.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        tokenizer: of its checkpoint.
        question: text; `<image>` marks the position of the picture, else it is before the text.
        pixel_values: [T, 3, side, side], the picture's tiles, see `load_image`.
        grid: (cols, rows) of the tiles.
        rope: "dhr" or "original".
        system_message: instead of the template's own.
        layers: indices of decoder layers in `config.mixin_layers`; None for all.
        streamer: receives tokens as they are generated.
        options: of `generate`, as far as they give one text; not several beams.

    Returns:
        The answer is that of `ChatSession.ask`.

    Raises:
        ValueError: options that would not give one text, several beams, tiles that do not match
            the grid, several `<image>` marks, unknown layers, a prompt beyond the position range,
            or a model that ranks divide. Nothing was computed.
    """
    verb, config = "ask_and_look", model.config
    refuse_divided(verb, model)
    stop = prompts.stop_text(config.template)
    check_tokenizer(tokenizer, stop)
    options = text_options(verb, options, model, tokenizer)
    if rope not in ("dhr", "original"):
        raise ValueError(f"{verb}: rope must be 'dhr' or 'original', got {rope!r}")
    given = options.get("generation_config") or model.generation_config
    beams = options.get("num_beams") or getattr(given, "num_beams", None) or 1
    if beams > 1:
        raise ValueError(f"{verb}: num_beams must be 1, got {beams}")
    chosen = check_layers(verb, model, layers)
    check_tiles(verb, pixel_values, config.vision_config.image_size[0])
    tokens_of_image = ops.image_tokens(grid, config.side, config.use_thumbnail)
    if tokens_of_image != len(pixel_values) * config.tokens_per_tile:
        raise ValueError(
            f"{verb}: an image of grid {grid} must have"
            f" {tokens_of_image // config.tokens_per_tile} tiles, got {len(pixel_values)}"
        )
    turns = [(prompts.with_image_mark(question), None)]
    grids = [grid] if rope == "dhr" else None
    prompt = build_prompt(model, tokenizer, turns, system_message, [tokens_of_image], grids)
    prompt = prompt.to(model.device)
    memory = model.model.build_image_memory(
        pixel_values, prompt.image_mask, prompt.position_ids, [grid]
    )
    model.model.build_memory(memory)
    length = prompt.input_ids.shape[1]
    room = min(options.get("max_new_tokens") or 0, ROOM_FOR_ANSWER)
    cache = RoomyCache(config.text_config.num_hidden_layers, length + room)
    output = prefill(
        model,
        lambda first, last: model.model.embed(
            prompt.input_ids, prompt.image_mask, memory, first, last
        ),
        prompt.position_ids,
        cache,
        chunk=CHUNK,
        memory=lambda first, last: memory,
    )
    prefilled = Prefilled(output.logits, cache, prompt.position_ids, memory)
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids(stop)}
    options = ends | {"pad_token_id": tokenizer.pad_token_id} | options
    inputs = {"prefilled": prefilled, "streamer": streamer}
    tokens, answer = generate_answer(model, tokenizer, inputs, options)
    cache.crop_to(length - 1)
    again = answer_tokens(model, prompt.input_ids, prompt.position_ids, tokens)
    weights = look_at_answer(model, *again, cache, memory, layers=chosen).cpu()
    gates = gate_sizes(model, chosen)
    words = split_words(tokenizer, tokens, stop)
    of_tokens = over_layers(weights, gates)  # [n, M]
    named = [index for word in words for index in word.tokens] or list(range(len(tokens)))
    of_words = [of_tokens[list(word.tokens)].mean(0) for word in words]
    return Look(
        question=question,
        answer=answer,
        words=words,
        layers=chosen,
        gates=tuple(gates),
        weights=weights,
        of_words=heat_over_picture(torch.stack(of_words) if words else of_tokens[:0], grid, config),
        of_answer=heat_over_picture(of_tokens[named].mean(0), grid, config),
    )
