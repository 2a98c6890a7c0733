"""The steps of every conversation: build the prompt, generate, cut the answer.

`model.chat` and `ChatSession` differ in what they keep between questions, not in these steps.

Letters: N tokens of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comemo import prompts
from comemo.chat.streamers import answer_text
from comemo.decode.interface import GeneratingModel
from comemo.generation_inputs import check_range
from comemo.tokenizer import InternLM2Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the next answer.

    Attributes:
        text: with an `<image>` mark for each image, control tokens in user text escaped.
        input_ids: int64 [1, N].
        image_mask: bool [1, N], True at image tokens.
        position_ids: int64 [1, N].
    """

    text: str
    input_ids: Tensor
    image_mask: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> "Prompt":
        """The prompt on a device."""
        ids, mask, positions = self.input_ids, self.image_mask, self.position_ids
        return Prompt(self.text, ids.to(device), mask.to(device), positions.to(device))


def build_prompt(
    model: GeneratingModel,
    tokenizer: InternLM2Tokenizer,
    turns: Sequence[tuple[str, str | None]],
    system_message: str | None,
    image_tokens: Sequence[int],
    grids: Sequence[tuple[int, int]] | None,
) -> Prompt:
    """Write, encode and number the prompt of a conversation.

    Args:
        model: whose config determines template and positions.
        tokenizer: of its checkpoint.
        turns: (question, answer) pairs, the last answer None; `<image>` marks in the questions.
        system_message: instead of the template's own.
        image_tokens: tokens of each image.
        grids: (cols, rows) of each image; None for original RoPE.

    Returns:
        The prompt, on the CPU.

    Raises:
        ValueError: marks and images that differ in number, a prompt beyond the position range.
    """
    config = model.config
    ids, text = prompts.encode_turns(
        tokenizer, turns, config.template, system_message, image_tokens
    )
    input_ids = torch.tensor([ids])
    image_mask = input_ids == tokenizer.convert_tokens_to_ids(prompts.IMAGE_CONTEXT)
    attention_mask = torch.ones_like(input_ids)
    position_ids = model.model.prompt_position_ids(image_mask, attention_mask, grids)
    check_range(config, position_ids, attention_mask, bool(image_tokens))
    return Prompt(text, input_ids, image_mask, position_ids)


def generate_answer(
    model: GeneratingModel,
    tokenizer: InternLM2Tokenizer,
    inputs: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, str]:
    """Generate an answer to a prompt.

    Args:
        model: that answers.
        tokenizer: of its checkpoint.
        inputs: the prompt as `generate` takes it, with ids that are the start token alone: as
            published, penalties on repetition see generated tokens, not the prompt.
        options: of `generate`.

    Returns:
        tokens: int64 [n], generated ids.
        text: of the answer.
    """
    stop = prompts.stop_text(model.config.template)
    tokens = model.generate(**inputs, **options)[0, 1:]
    return tokens, answer_text(tokenizer, tokens, stop)


def check_tokenizer(tokenizer: InternLM2Tokenizer, stop: str) -> None:
    """Refuse a tokenizer that does not know the control tokens: prompts would be wrong.

    Raises:
        ValueError: names the missing tokens.
    """
    wanted = (prompts.IMAGE_START, prompts.IMAGE_CONTEXT, prompts.IMAGE_END, stop)
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(
            f"chat: the tokenizer must hold {list(wanted)} as added tokens, {missing} are missing:"
            " is the checkpoint's tokenizer_config.json there?"
        )
