"""Fold norms and gates into the projections that they scale, for inference.

    (y * norm) W^T = y (W * norm)^T            tanh(gate) * (a W^T) = a (tanh(gate) * W)^T

A folded vector is set to a neutral value: norms to ones, gates to 20, whose tanh is 1 in every
dtype. So modules that have to be called compute the same. The q, k and v weights of a
self-attention are concatenated. Then a layer takes one launch for each group of projections, and
the image memory of all mixin layers is built from one norm of the media.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from comemo.mixin import MixinLayer
from comemo.model import CoMemoModel
from comemo.weights.fusable import is_fusable, refuse_folded

OPEN = 20.0  # a gate whose tanh is exactly 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Fold(NamedTuple):
    """A vector, by its module and name, and the linear layers that it is folded into."""

    module: nn.Module
    name: str
    neutral: float  # the vector's value while it is folded
    linears: tuple[nn.Linear, ...]

    def factor(self) -> Tensor:
        """The factor of weights [O, d], in float32 at least: [d] of a norm, [1] of a gate."""
        vector = self.module._parameters[self.name]
        assert vector is not None
        exact = vector.data.to(torch.promote_types(vector.dtype, torch.float32))
        return exact if self.neutral == 1 else exact.tanh()


class Original(NamedTuple):
    """A parameter's tensor before folding; by its module, because a conversion replaces it."""

    module: nn.Module
    name: str
    tensor: Tensor


class FoldedModel:
    """The handle that `fold_for_inference` returns: it holds the original weights.

    As a context manager it undoes the fold at the end of the block. Otherwise the caller calls
    `undo`; without the handle the original weights are lost.

    Attributes:
        active: whether the model is folded.
    """

    def __init__(self, model: "FoldsForInference", keep_on: torch.device | None) -> None:
        self.active = True
        self._layers = list(model.model.language_model.layers)
        self._originals: list[Original] = []
        try:
            for fold in folds_of(model):
                self._apply(fold, keep_on)
            for layer in self._layers:
                attention = layer.self_attn
                if attention.q_proj.bias is None:
                    attention.join()
                for module in filter(None, (layer, layer.mixin)):
                    module.folded = True
        except BaseException:
            self.undo()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of the original weights."""
        return sum(original.tensor.nbytes for original in self._originals)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore every weight bit for bit, on the model's current device and in its dtype.

        Raises:
            ValueError: already undone.
        """
        if not self.active:
            raise ValueError("undo: wanted a model that is folded, got one that is undone already")
        for layer in self._layers:
            for module in filter(None, (layer, layer.mixin, layer.self_attn)):
                for name in ("folded", "qkv"):
                    vars(module).pop(name, None)
        for module, name, tensor in self._originals:
            held = module._parameters[name]
            assert held is not None
            held.data = tensor.to(held.device, held.dtype)
        self.active, self._originals, self._layers = False, [], []

    def __enter__(self) -> "FoldedModel":
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.undo()

    @torch.no_grad()
    def _apply(self, fold: Fold, keep_on: torch.device | None) -> None:
        factor = fold.factor()
        for linear in fold.linears:
            weight = linear.weight
            # One rounding: the product is computed in the wider dtype and rounded into `out`.
            product = torch.mul(
                weight.data, factor.to(weight.device), out=torch.empty_like(weight.data)
            )
            if not torch.stack(torch.aminmax(product)).isfinite().all():  # NaN is both
                raise ValueError(
                    f"fold_for_inference: products with {fold.name} of a"
                    f" {type(fold.module).__name__} must be finite in {product.dtype}, got up to"
                    f" {weight.abs().max().item():.3g} times {factor.abs().max().item():.3g}"
                )
            self._replace(linear, "weight", product, keep_on)
        vector = fold.module._parameters[fold.name]
        assert vector is not None
        neutral = torch.full_like(vector.data, fold.neutral)
        self._replace(fold.module, fold.name, neutral, keep_on)

    def _replace(
        self, module: nn.Module, name: str, new: Tensor, keep_on: torch.device | None
    ) -> None:
        held = module._parameters[name]
        assert held is not None
        kept = held.data if keep_on is None else held.data.to(keep_on)
        self._originals.append(Original(module, name, kept))
        held.data = new


class FoldsForInference(nn.Module):
    """`fold_for_inference` for a model with a language modelling head."""

    model: CoMemoModel
    lm_head: nn.Linear

    def fold_for_inference(self, keep_on: torch.device | str | None = "cpu") -> FoldedModel:
        """Fold the decoder's norms and gates into its projections, until `undo`.

        Each product is computed in float32 (of float64 in float64) and rounded once. The last
        hidden state then lacks the final norm's weight, which is in `lm_head`; everything else
        is equal up to rounding. A folded model cannot be trained, saved or loaded into. An image
        memory is valid for the folded and the original model. Weights change their addresses: a
        CUDA graph captured before this call, or before `undo()`, has to be captured again.

        Args:
            keep_on: device for the original weights, the CPU by default; None for their own.

        Returns:
            The handle whose `undo()` restores the model; also a context manager.

        Raises:
            ValueError: the model is folded already, in training mode or has parameters that
                require gradients; adapters, hooks, quantised, sharded, offloaded or tied weights;
                products that overflow the dtype. The model is then unchanged, as after any other
                error.
        """
        place = None if keep_on is None else torch.device(keep_on)
        if place is not None and place.type == "meta":
            raise ValueError("fold_for_inference: keep_on must be a device with memory, got meta")
        check_foldable(self)
        return FoldedModel(self, place)

    def train(self, mode: bool = True) -> Any:
        """Set training mode, see `nn.Module.train`; a folded model has only evaluation mode.

        Raises:
            ValueError: `mode` is True and the model is folded: `undo` would discard the training.
        """
        if mode:
            refuse_folded("train", self)
        return super().train(mode)


def folds_of(model: FoldsForInference) -> Iterator[Fold]:
    """All folds of a `CoMemoForConditionalGeneration`; each weight is part of one."""
    text = model.model.language_model
    for layer in text.layers:
        mixin, attention, mlp = layer.mixin, layer.self_attn, layer.mlp
        if mixin is not None:
            inner = mixin.mlp
            yield Fold(mixin.attn_norm, "weight", 1, (mixin.q_proj, mixin.kv_proj))
            yield Fold(mixin.mlp_norm, "weight", 1, (inner.gate_proj, inner.up_proj))
            yield Fold(mixin, "attn_gate", OPEN, (mixin.o_proj,))
            yield Fold(mixin, "mlp_gate", OPEN, (inner.down_proj,))
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        yield Fold(layer.input_layernorm, "weight", 1, projections)
        yield Fold(layer.post_attention_layernorm, "weight", 1, (mlp.gate_proj, mlp.up_proj))
    yield Fold(text.norm, "weight", 1, (model.lm_head,))


def check_foldable(model: FoldsForInference) -> None:
    """Raise the errors of `fold_for_inference` that depend on the model.

    Raises:
        ValueError: with the reason.
    """
    verb = "fold_for_inference"
    refuse_folded(verb, model)
    if model.training:
        raise ValueError(f"{verb}: wanted a model in evaluation mode, got training: call eval()")
    try:
        folds = list(folds_of(model))
    except AttributeError as error:
        raise ValueError(f"{verb}: wanted the model's original modules: {error}") from error
    modules = {id(module): name for name, module in model.named_modules()}
    owners: dict[tuple[torch.device, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault((parameter.device, parameter.data_ptr()), []).append(name)
    for fold in folds:
        parts = [(fold.module, fold.name), *((linear, "weight") for linear in fold.linears)]
        for module, name in parts:
            title = f"{modules[id(module)]}.{name}"
            if type(module) is not MixinLayer and not is_fusable(module, biased=True):
                raise ValueError(
                    f"{verb}: modules must be the original ones (no adapter, quantisation,"
                    f" sharding, offloading or hook), got {title} of a {type(module).__name__}"
                )
            parameter = getattr(module, name)
            kind = type(parameter).__name__
            if kind != "Parameter" or parameter.is_meta or parameter.dtype not in DTYPES:
                raise ValueError(
                    f"{verb}: weights must be parameters in memory, of float16, bfloat16, float32"
                    f" or float64, got {title}: {kind} of {parameter.dtype} on {parameter.device}"
                )
            if parameter.requires_grad:
                raise ValueError(
                    f"{verb}: wanted weights that require no gradients, got {title} that does:"
                    " call requires_grad_(False)"
                )
            shared = owners[parameter.device, parameter.data_ptr()]
            if len(shared) > 1:
                raise ValueError(f"{verb}: wanted weights that are not tied, got {shared}")
