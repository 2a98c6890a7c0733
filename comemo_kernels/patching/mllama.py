"""Mllama of transformers (MllamaForConditionalGeneration)."""

from torch import nn

from comemo_kernels.patching.plan import Plan

NAME = "Mllama of transformers (MllamaForConditionalGeneration)"


def recognise(model: nn.Module) -> bool:
    """Whether a model has this structure."""
    return False


def make_plan(plan: Plan) -> None:
    """Plan all replacements in `plan.model`."""
