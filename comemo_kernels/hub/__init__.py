"""This package's operations as layers for Hugging Face's `kernels` package.

`kernelize` puts them under the modules of a model that declare a layer name. Nothing is downloaded,
and `kernels` itself is not needed to import this.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import comemo_kernels
from comemo_kernels._arguments import public
from comemo_kernels._op import check
from comemo_kernels.hub import layers

__all__ = ["NAMES", "mapping", "write_repository"]

# The layer name that a model declares, and the class that computes it.
NAMES = {
    "rotary_pos_emb": "ApplyRotary",
    "GatedCrossAttention": "GatedCrossAttention",
    "TileProjector": "TileProjector",
}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class LayerOfPackage:
    """What `kernels` asks for a layer, like its LayerRepository, without a folder of files."""

    layer_name: str  # a class in `comemo_kernels.hub.layers`

    def load(self) -> type[nn.Module]:
        found: type[nn.Module] = getattr(layers, self.layer_name)
        return found

    def __str__(self) -> str:
        return f"comemo_kernels {comemo_kernels.__version__}, layer {self.layer_name}"


@public
def mapping(names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """A mapping for `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`.

    Args:
        names: layer names, some of `NAMES`; None for all.

    Returns:
        Layer name -> device type, "cpu" and "cuda" -> what loads the layer, for every mode. On a
        CPU the layers are PyTorch.

    Raises:
        ValueError: another name.
    """
    chosen = list(NAMES) if names is None else list(names)
    unknown = [name for name in chosen if name not in NAMES]
    check(not unknown, f"mapping: names must be some of {list(NAMES)}, got {unknown}")
    return {name: dict.fromkeys(DEVICES, LayerOfPackage(NAMES[name])) for name in chosen}


@public
def write_repository(folder: str | Path) -> Path:
    """Write a kernel repository whose layers are those of this package, for settings by path.

    `kernels.LocalLayerRepository` and transformers' `KernelConfig` with `use_local_kernel` take a
    path. The files import this package, which must be installed where they are loaded.

    Args:
        folder: is created; files of an earlier call are replaced.

    Returns:
        Its absolute path. A layer is named by its class, as in `NAMES`.

    Raises:
        ValueError: a folder that holds other files.
    """
    root = Path(folder).absolute()
    held = root / "build" / "torch-universal"
    files = {"__init__.py": _CODE, "metadata.json": json.dumps(_METADATA, indent=2) + "\n"}
    ours = {root / "build", held, *(held / name for name in files)}
    others = sorted(str(path) for path in root.rglob("*") if path not in ours)
    others = [path for path in others if "__pycache__" not in path]
    check(not others, f"write_repository: folder must be new or empty, got one with {others[:3]}")
    held.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (held / name).write_text(text, encoding="utf-8")
    return root


_CODE = '''"""The layers of `comemo_kernels`, which must be installed."""

from comemo_kernels.hub import layers  # noqa: F401
'''
_METADATA = {
    "id": "comemo_kernels_hub",  # of the Python module that `kernels` makes of the file
    "name": "comemo-kernels",
    "version": 1,
    "license": "MIT",
    "python-depends": [],
    "backend": {"type": "cuda"},
}
