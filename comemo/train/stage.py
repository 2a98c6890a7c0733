"""A stage of a run: where it is in the run and how far it came."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from comemo.device import default_dtype
from comemo.train.settings import StageSettings, StartSettings, TrainSettings

TILING = ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")


@dataclass
class Stage:
    """A stage of a run.

    Attributes:
        run: settings of the whole run.
        name: of the stage.
        folder: of its checkpoints and logs.
        before: the stages that were trained before it, in order.
        steps: optimizer steps; 0 until they are counted.
        checkpoint: where training goes on, or the last one of a finished stage.
    """

    run: TrainSettings
    name: str
    folder: Path
    before: tuple["Stage", ...] = ()
    steps: int = 0
    checkpoint: Path | None = None

    @property
    def settings(self) -> StageSettings:
        return self.run.stages[self.name]

    @property
    def index(self) -> Path:
        """Folder for indices of JSONL files."""
        return self.folder.parent / "index"

    @property
    def seed(self) -> int:
        """Of the order of the data and the random numbers of training: another in each stage."""
        return self.run.seed + len(self.before)

    def in_parts(self, sharded: bool) -> bool:
        """Whether each rank writes its part of checkpoints; adapters are small and gathered."""
        lora = self.settings.lora
        adapted = lora.vision or lora.language or lora.mixin
        return sharded and self.run.parallel.checkpoints == "sharded" and not adapted

    def precision(self, device: torch.device) -> str:
        """ "bfloat16" or "float32"."""
        chosen = self.settings.precision
        if chosen != "auto":
            return chosen
        # On a CPU the choice would be by a measurement, which a resumed run may decide otherwise.
        half = device.type != "cpu" and default_dtype(device) == torch.bfloat16
        return "bfloat16" if half else "float32"


def start_of(run: TrainSettings) -> StartSettings:
    """What a run begins with; the model's config says how its training data was tiled.

    Otherwise `chat` would cut an image in another way than the one that was learnt.
    """
    given = {name: getattr(run.data, name) for name in TILING}
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(run.start, model=run.start.model | chosen)
