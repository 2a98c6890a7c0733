"""Models of the published sizes with random weights, a tokenizer and prompts for them."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import measure
from comemo import CoMemoConfig, CoMemoForConditionalGeneration, CoMemoProcessor
from comemo.cli.tiny_checkpoint import make_checkpoint
from comemo_kernels import ImageMemory

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "2B": {"llm_config": {}, "mixin_config": {}},
    "9B": {
        "llm_config": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 14336,
        },
        "mixin_config": {
            "language_dim": 4096,
            "vision_dim": 4096,
            "num_heads": 32,
            "intermediate_size": 14336,
        },
    },
}


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside the `with` block have parameters of this device and dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def layers_of(options: argparse.Namespace, few: int) -> int | None:
    """Decoder layers for `draw_model`: `--layers`, or on a CPU `few` of them without --all."""
    if options.layers is not None:
        return options.layers or None
    return few if measure.few(options) else None


def draw_model(
    size: str, dtype: torch.dtype, layers: int | None = None
) -> CoMemoForConditionalGeneration:
    """A model with open gates, on a GPU if there is one.

    Args:
        size: "2B" or "9B".
        dtype: of the weights.
        layers: decoder layers; None for those of the size.
    """
    base = CoMemoConfig().to_dict() | {"text_config": None}  # it is made from llm_config
    parts = {part: base[part] | sizes for part, sizes in SIZES[size].items()}
    if layers:
        parts["llm_config"]["num_hidden_layers"] = layers
    config = CoMemoConfig.from_dict(base | parts)
    print(f"drawing random weights of {size}, {config.text_config.num_hidden_layers} layers")
    torch.manual_seed(0)
    with made_on(measure.default_device(), dtype):
        model = CoMemoForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    return model


def give_words(model: CoMemoForConditionalGeneration) -> CoMemoProcessor:
    """A processor with a small tokenizer; the model then generates only its words.

    Args:
        model: of any larger vocabulary. Its `lm_head` is zero for all other tokens afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        processor = CoMemoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    control = list(tokenizer.added_tokens_decoder)
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    with torch.no_grad():  # a logit of 0 is never the largest of hundreds
        model.lm_head.weight[len(tokenizer) :].zero_()
        model.lm_head.weight[control].zero_()
    return processor


def draw_prompts(
    model: CoMemoForConditionalGeneration, grid: tuple[int, int], batch: int
) -> tuple[dict[str, Tensor], Tensor, ImageMemory]:
    """Prompts with one image each and 96 words around it.

    Returns:
        Input ids, attention mask and position ids by name, each [B, N]; the image mask, bool
        [B, N]; the image memory, of random media.
    """
    device, config = model.device, model.config
    M = ops.image_tokens(grid, config.side)
    image = torch.zeros(batch, M + 96, dtype=torch.bool, device=device)
    image[:, 60 : 60 + M] = True
    words = torch.randint(3, 400, image.shape, device=device)
    input_ids = torch.where(image, config.image_token_id or 0, words)
    mask = torch.ones_like(input_ids)
    position_ids = model.model.prompt_position_ids(image, mask, [grid] * batch)
    media = torch.randn(batch * M, config.text_config.hidden_size, device=device).to(model.dtype)
    memory = ImageMemory.from_media(media, position_ids[image], [M] * batch)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    return inputs, image, memory


def copies_of(memory: ImageMemory, batch: int) -> ImageMemory:
    """The built memory of a prompt, as many times: rows of a batch with a picture of their own.

    Args:
        memory: of one prompt; `memory.repeat_interleave(batch)` lets the rows share it instead.
        batch: of rows.
    """
    assert memory.spans is not None
    assert memory.starts is not None
    assert memory.biases is not None
    assert memory.ids is not None
    M = len(memory)
    shift = M * torch.arange(batch, device=memory.starts.device)

    def repeated(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
        return {layer: t[:M].repeat(batch, 1, 1) for layer, t in tensors.items()}

    return replace(
        memory,
        spans=memory.spans + shift[:, None, None],
        media=None,
        ids=memory.ids[:M].repeat(batch),
        sizes=memory.sizes * batch,
        starts=(memory.starts + shift[:, None]).flatten().int(),
        biases=memory.biases.repeat(1, batch),
        keys=repeated(memory.keys),
        values=repeated(memory.values),
    )
