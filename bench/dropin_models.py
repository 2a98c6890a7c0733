"""Models of other packages with random weights, and prompts with images for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import comemo_kernels as ops
from bench import flamingo_sources, measure
from bench.models import made_on
from bench.published_model.cached import add_cache, remove_cache
from bench.published_model.chat_model import CoMemoChatConfig, CoMemoChatModel, repair_generate

GRID = (4, 3)  # of the image: 12 tiles and a thumbnail
WORDS = 96  # tokens of text in a prompt


class Subject(NamedTuple):
    """A model that people already run.

    Attributes:
        model: with open gates.
        generate: tokens that it generates, for keyword arguments of `generate`.
        case: what the rows call it.
        ways: other ways than as shipped and patched: name -> what puts it in place and back.
    """

    model: nn.Module
    generate: Callable[..., Tensor]
    case: str
    ways: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}


def open_gates(model: nn.Module) -> None:
    """Random models have gates of zero, and then their images change nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)


def published(dtype: torch.dtype, layers: int | None, vision_layers: int | None) -> Subject:
    """The published model with the dimensions of CoMemo-2B, one image of 13 tiles.

    The vision tower is the same in all ways: its output is given, unless it has layers.
    """
    settings: dict[str, Any] = {
        "llm_config": {"num_hidden_layers": layers or 24, "vocab_size": 92553},
        "vision_config": {"num_hidden_layers": vision_layers or 0},
    }
    with made_on(measure.default_device(), dtype):
        model = repair_generate(CoMemoChatModel(CoMemoChatConfig(**settings)).eval())
    open_gates(model)
    model.img_context_token_id = 92546
    count = ops.image_tokens(GRID)
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(1000, 90000, (WORDS,), generator=draw).tolist()
    ids = torch.tensor([words[:60] + [92546] * count + words[60:]])
    mask = ids == 92546
    positions = ops.reference.rope_dhr_positions(
        mask, torch.ones_like(ids), [GRID], tile_order="column"
    )
    tiles = count // 256
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions,
        "cross_attention_media_position_ids": positions[mask][None],
        "pixel_values": torch.randn(tiles, 3, 448, 448, generator=draw).to(dtype),
    }
    if not vision_layers:
        features = torch.randn(tiles, 256, 2048, generator=draw)
        inputs["visual_features"] = features.to(dtype)
    inputs = {name: t.to(measure.default_device()) for name, t in inputs.items()}

    def generate(**options: Any) -> Tensor:
        return model.generate(**inputs, **options)[0, -options["max_new_tokens"] :]

    case = f"stand-in for published CoMemo-2B, {layers or 24} layers"
    return Subject(model, generate, case, {"with a simple cache": (add_cache, remove_cache)})


def mllama(dtype: torch.dtype, layers: int | None, vision_layers: int | None) -> Subject:
    """transformers' Mllama with the widths of Llama 3.2 11B Vision, one image of 4 tiles."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    count = layers or 40
    text: dict[str, Any] = {
        "num_hidden_layers": count,
        "cross_attention_layers": list(range(3, count, 5)),
    }
    vision: dict[str, Any] = {"num_hidden_layers": vision_layers or 1, "num_global_layers": 1}
    vision["intermediate_layers_indices"] = [0] * 5
    config = MllamaConfig(text_config=text, vision_config=vision)
    config.text_config.pad_token_id = 128004
    with made_on(measure.default_device(), dtype):
        model = MllamaForConditionalGeneration(config).eval()
    open_gates(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 100000, (1, WORDS), generator=draw)
    size = config.vision_config.image_size
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 1, 4, 3, size, size, generator=draw).to(dtype),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.int64),
        "cross_attention_mask": torch.ones(1, WORDS, 1, 4, dtype=torch.int64),
    }
    inputs = {name: t.to(measure.default_device()) for name, t in inputs.items()}

    def generate(**options: Any) -> Tensor:
        return model.generate(**inputs, **options)[0, WORDS:]

    return Subject(model, generate, f"transformers Mllama 11B, {count} layers")


def internvl(dtype: torch.dtype, layers: int | None, vision_layers: int | None) -> Subject:
    """transformers' InternVL with the widths of InternVL3 2B, one image of 13 tiles."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    count = layers or 28
    text = {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": count,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151674,
    }
    vision = {"num_hidden_layers": vision_layers or 1}
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=151667)
    with made_on(measure.default_device(), dtype):
        model = InternVLForConditionalGeneration(config).eval()
    tokens = ops.image_tokens(GRID)
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(1000, 150000, (WORDS,), generator=draw).tolist()
    ids = torch.tensor([words[:60] + [151667] * tokens + words[60:]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(tokens // 256, 3, 448, 448, generator=draw).to(dtype),
    }
    inputs = {name: t.to(measure.default_device()) for name, t in inputs.items()}

    def generate(**options: Any) -> Tensor:
        return model.generate(**inputs, **options)[0, ids.shape[1] :]

    return Subject(model, generate, f"transformers InternVL3-2B, {count} layers")


class Features(nn.Module):
    """In place of a vision tower, which is the same in all ways: its output, random."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.visual = self.forward
        self.register_buffer("tokens", torch.randn(tokens, width))

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.tokens.expand(len(images), -1, -1)


def open_flamingo(dtype: torch.dtype, layers: int | None, vision_layers: int | None) -> Subject:
    """open_flamingo 2.0.1 with the widths of OpenFlamingo-9B and nine images, a few-shot prompt.

    Its language model is a Llama: current transformers decode MPT without a KV cache there. The
    vision tower's output is random and given.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sources = flamingo_sources.load()
    assert sources is not None
    count, pictures, image = layers or 32, 9, 50277
    with made_on(measure.default_device(), dtype):
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=count,
            num_attention_heads=32,
            vocab_size=50280,
        )
        language = LlamaForCausalLM(config)
        sources.utils.extend_instance(language, sources.flamingo_lm.FlamingoLMMixin)
        language.set_decoder_layers_attr_name("model.layers")
        model = sources.flamingo.Flamingo(
            Features(256, 1024), language, 50278, image, 1024, cross_attn_every_n_layers=4
        ).eval()
    open_gates(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 50000, (1, 24 * pictures), generator=draw)
    ids[0, ::24] = image
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # transformers leaves out a mask of ones, and open_flamingo needs one
    images = torch.zeros(1, pictures, 1, 3, 8, 8, dtype=dtype)
    inputs = [t.to(measure.default_device()) for t in (images, ids, mask)]

    def generate(**options: Any) -> Tensor:
        return model.generate(*inputs, **options)[0, ids.shape[1] :]

    return Subject(model, generate, f"open_flamingo 9B, {pictures} images, {count} layers")


SUBJECTS: dict[str, Callable[[torch.dtype, int | None, int | None], Subject]] = {
    "published": published,
    "internvl": internvl,
    "mllama": mllama,
}
if flamingo_sources.load() is not None:
    SUBJECTS["open_flamingo"] = open_flamingo
