"""Modules for models with images, computed by the operations of this package.

A module holds weights and settings, nothing else: what a call needs is an argument.
"""

from comemo_kernels.nn.feed_forward import FeedForward
from comemo_kernels.nn.gated_cross_attention import GatedCrossAttention
from comemo_kernels.nn.memory_filling import fill_memory
from comemo_kernels.nn.rotary_dhr import RotaryDHR
from comemo_kernels.nn.tile_projector import TileProjector

__all__ = ["FeedForward", "GatedCrossAttention", "RotaryDHR", "TileProjector", "fill_memory"]
