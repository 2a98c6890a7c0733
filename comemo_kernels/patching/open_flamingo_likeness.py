"""Whether a module computes what open_flamingo's attention or block computes.

Names do not prove it: forks share them and mask differently. So the forward of a class runs on
a stand-in of the class with tiny layers. The model's own weights, hooks and devices play no part.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = {"norm", "to_q", "to_kv", "to_out"}
_FLAGS = ("heads", "scale", "only_attend_immediate_media")
_ARGUMENTS = ["self", "x", "media", "media_locations", "use_cached_media"]
_WIDTH, _HEADS, _DIM = 6, 2, 4

# An attention and the arguments of its forward -> arguments of `attend_spans`, or None.
Prepare = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor] | None]


def has_attention(module: nn.Module) -> bool:
    """Whether a module has the parts of MaskedCrossAttention."""
    attributes = vars(module)
    return attributes["_modules"].keys() == _LAYERS and all(name in attributes for name in _FLAGS)


def has_block(module: nn.Module) -> bool:
    """Whether a module has the parts of GatedCrossAttentionBlock."""
    children = vars(module)["_modules"]
    return (
        children.keys() == {"attn", "ff"}
        and has_attention(children["attn"])
        and all(isinstance(getattr(module, f"{name}_gate", None), Tensor) for name in children)
    )


class Likeness:
    """Answers for the classes of one model, each found once.

    Args:
        prepare: how an attention is computed.
    """

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._known: dict[tuple[type, ...], bool] = {}

    def is_attention(self, module: nn.Module) -> bool:
        """Whether a module is a MaskedCrossAttention, or computes the same."""
        if not has_attention(module):
            return False
        kind = type(module)
        return self._compare((kind,), lambda: _attention(kind), self._attend)

    def is_block(self, module: nn.Module) -> bool:
        """Whether a module is a GatedCrossAttentionBlock, or computes the same."""
        if not has_block(module) or not self.is_attention(module.attn):
            return False
        kinds = type(module), type(module.attn)
        return self._compare(kinds, lambda: _block(*kinds), self._run_block)

    def _attend(self, own: nn.Module, x: Tensor, media: Tensor, *seen: object) -> Tensor:
        prepared = self._prepare(own, x, media, *seen)
        if prepared is None:
            raise ValueError("rejected")
        return own.to_out(_attend_spans(*prepared).flatten(2))

    def _run_block(self, own: nn.Module, x: Tensor, media: Tensor, *seen: object) -> Tensor:
        x = x + own.attn_gate.tanh() * self._attend(own.attn, x, media, *seen)
        return x + own.ff_gate.tanh() * own.ff(x)

    def _compare(
        self, kinds: tuple[type, ...], make: Callable[[], nn.Module], ours: Callable[..., Tensor]
    ) -> bool:
        if kinds not in self._known:
            try:
                self._known[kinds] = _names(kinds[0]) == _ARGUMENTS and _are_alike(make(), ours)
            except Exception:  # the forward of a foreign class may raise anything
                self._known[kinds] = False
        return self._known[kinds]


def _names(kind: type) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _are_alike(module: nn.Module, ours: Callable[..., Tensor]) -> bool:
    x, media = _numbers(2, 5, _WIDTH), _numbers(2, 2, 3, _WIDTH + 1)
    # Tokens before any image, after the first, after both, and after one image too many.
    locations = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]], device="cpu").bool()
    attentions = [part for part in module.modules() if has_attention(part)]
    cases = [
        (True, (locations, False)),
        (False, (locations, True)),
        (True, (locations[:, :1], True)),
        (False, (locations, False)),
    ]
    for latest, given in cases[: 4 if has_attention(module) else 2]:
        for part in attentions:
            part.only_attend_immediate_media = latest
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = ours(module, x, media, *given)
            wanted = module(x, media, media_locations=given[0], use_cached_media=given[1])
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
            return False
    return True


def _attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    """As the operation, by steps that use no threads: these wait long where a CPU is busy."""
    place = torch.arange(len(k), device="cpu")
    seen = (place >= spans[..., :1]) & (place < spans[..., 1:])  # [B, N, M]
    scores = (q[:, :, None] * k).sum(-1) * q.shape[-1] ** -0.5  # [B, N, M, H]
    weights = scores.exp() * seen[..., None]
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-9)
    return (weights[..., None] * v).sum(2)


def _numbers(*shape: int) -> Tensor:
    """Uneven numbers that do not touch the state of random generators."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, device="cpu", dtype=torch.float32) * 1.7).sin().view(shape)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, dtype=torch.float32)
    made.weight = nn.Parameter(_numbers(outputs, inputs), requires_grad=False)
    return made


def _bare(kind: type, **attributes: Any) -> nn.Module:
    """An instance of a class whose own __init__ did not run."""
    made: nn.Module = object.__new__(kind)
    nn.Module.__init__(made)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made.eval()


def _attention(kind: type) -> nn.Module:
    inner = _HEADS * _DIM
    return _bare(
        kind,
        heads=_HEADS,
        scale=_DIM**-0.5,
        only_attend_immediate_media=True,
        norm=nn.Tanh(),
        to_q=_linear(_WIDTH, inner),
        to_kv=_linear(_WIDTH + 1, 2 * inner),
        to_out=_linear(inner, _WIDTH),
    )


def _block(kind: type, attention: type) -> nn.Module:
    return _bare(
        kind,
        attn=_attention(attention),
        attn_gate=nn.Parameter(_numbers(2)[1:], requires_grad=False),
        ff=nn.Sequential(_linear(_WIDTH, 3), nn.Tanh(), _linear(3, _WIDTH)),
        ff_gate=nn.Parameter(_numbers(3)[2:], requires_grad=False),
    )
