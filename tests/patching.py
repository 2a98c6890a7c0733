"""Models of other packages under our operations: comparisons, and what must be as before."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness import FEW, SLACK, SLACK_GRADIENT, assert_errs_no_more
from published import published_config, published_weights
from torch import Tensor, nn

import comemo_kernels as ops
from bench.published_model.chat_model import CoMemoChatConfig, CoMemoChatModel

IMAGE_TOKEN = 7
SIDE = 2  # tokens of a tile of the tiny model: 2 x 2
Run = Callable[[nn.Module, float], dict[str, Tensor]]
NEAR = (1.0, 0.97, 1.03, 1.06)  # factors of inputs whose errors are compared together


def tiny_published(seed: int = 0, **config: Any) -> CoMemoChatModel:
    """The stand-in for the published model with random weights, gates included."""
    settings = published_config(**config)
    settings["vision_config"] |= {"layer_norm_eps": 1e-6}
    torch.manual_seed(seed)
    model = CoMemoChatModel(CoMemoChatConfig(**settings)).eval()
    model.load_state_dict(published_weights(settings))
    model.img_context_token_id = IMAGE_TOKEN
    return model


def prompt_of(*grids: tuple[int, int], text: int = 5, dhr: bool = True) -> dict[str, Any]:
    """Inputs of the published `generate`: text, and images of these grids."""
    draw = torch.Generator().manual_seed(len(grids) + text)
    row = torch.randint(10, 40, (text,), generator=draw).tolist()
    tiles = [cols * rows + (cols * rows > 1) for cols, rows in grids]
    for count in tiles:
        row += [IMAGE_TOKEN] * (count * SIDE**2) + [11, 12, 13]
    ids = torch.tensor([row])
    mask, attention = ids == IMAGE_TOKEN, torch.ones_like(ids)
    positions = torch.arange(len(row))[None]
    if dhr:
        positions = ops.reference.rope_dhr_positions(mask, attention, list(grids), SIDE, "column")
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    if grids:
        inputs["pixel_values"] = torch.randn(sum(tiles), 3, 56, 56, generator=draw)
        inputs["cross_attention_media_position_ids"] = positions[mask][None]
    return inputs


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters for a random cotangent of the output."""
    draw = torch.Generator().manual_seed(5)
    cotangent = torch.randn(output.shape, generator=draw).to(output)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(output, [p for _, p in named], cotangent, allow_unused=True)
    return {
        f"gradient of {name}": grad
        for (name, _), grad in zip(named, grads, strict=True)
        if grad is not None
    }


def assert_patched_matches(model: nn.Module, run: Run) -> None:
    """A patched model errs at most as the unpatched one, by the factors of the harness.

    Args:
        model: in the tested dtype.
        run: results by name, for inputs times a factor; of names that begin with "gradient" more
            error is allowed. For results of few elements the largest error on several inputs
            counts, because one may be exact by chance.
    """
    truth = copy.deepcopy(model).double()
    exact, plain = ([run(one, factor) for factor in NEAR] for one in (truth, model))
    with ops.patched(model):
        ours = run(model, NEAR[0])
    assert list(ours) == list(plain[0])
    for name, actual in ours.items():
        slack = SLACK_GRADIENT if name.startswith("gradient") else SLACK
        pairs = [(one[name], other[name]) for one, other in zip(plain, exact, strict=True)]
        others = pairs[1:] if actual.numel() < FEW else []
        assert_errs_no_more(actual, *pairs[0], name, slack, others=others)


def surroundings(model: nn.Module) -> dict[str, Any]:
    """All that a patch must leave: attributes of modules, of their classes and of torch.nn."""
    found: dict[str, Any] = {"torch.nn": dict(vars(nn)), "Module": dict(vars(nn.Module))}
    for path, module in model.named_modules():
        found[path] = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
        found[f"{path} class"] = type(module)
        for kind in type(module).__mro__:
            found[f"{kind} vars"] = dict(vars(kind))
    return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, afterwards the model, its classes and torch.nn are as before."""
    before = surroundings(model)
    names = list(model.state_dict())
    try:
        yield
    finally:
        after = surroundings(model)
        assert after.keys() == before.keys()
        for name, value in before.items():
            if isinstance(value, dict):
                assert after[name].keys() == value.keys(), name
                for key, old in value.items():
                    assert after[name][key] is old or after[name][key] == old, f"{name}: {key}"
            else:
                assert after[name] is value, name
        assert list(model.state_dict()) == names
