"""Checkpoints of a divided model: states gathered on one rank, or a part by each."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from comemo.train import ranks
from comemo.train.parallel import state


class DividedStates:
    """Weights and optimizer state of a divided model. All ranks call every method but `write`.

    Args:
        model, optimizer: the latter may be wrapped by accelerate.
        names: of the parameters in each group, as one process groups them.
        tensor: ranks that divide each layer.
    """

    def __init__(self, model: nn.Module, optimizer: Any, names: state.Groups, tensor: int) -> None:
        self.model, self.names, self.tensor = model, names, tensor
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self._announced = False

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Weights and optimizer state in the form of one process, on the first rank."""
        weights = state.whole_weights(self.model, self.tensor)
        own = (self.model, self.optimizer, self.names, self.tensor)
        return weights, state.whole_optimizer(*own)

    def hand_out(self, optimizer: dict[str, Any] | None) -> None:
        """Load the optimizer state of one process, which the first rank has."""
        state.hand_out_optimizer(self.model, self.optimizer, optimizer, self.names, self.tensor)

    def read(self, checkpoint: Path) -> None:
        """Load parts, which any number of ranks wrote."""
        state.read_parts(checkpoint, self.model, self.optimizer, self.tensor)

    def write(self, folder: Path) -> None:
        """Write the first rank's part, while the others are in `finish`.

        Raises:
            OSError: a rank cannot write.
        """
        self._announced = True
        ranks.from_first(True)
        state.write_parts(folder, self.model, self.optimizer, self.tensor)

    def finish(self, folder: Path) -> None:
        """Write the parts of the other ranks, if the first one got to `write`."""
        if ranks.is_first():
            if not self._announced:
                ranks.from_first(False)
        elif ranks.from_first(None):
            try:
                state.write_parts(folder, self.model, self.optimizer, self.tensor)
            except OSError:  # the first rank has the same error, and tells
                return
