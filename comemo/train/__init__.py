"""Training: the recipe of three stages, from JSON lines to a checkpoint.

`read_settings` reads a YAML file, `check` counts what a run would read, `train` runs it.
"""

from comemo.train.config import read_settings, write_settings
from comemo.train.recipe import check, train
from comemo.train.settings import TrainSettings

__all__ = ["TrainSettings", "check", "read_settings", "train", "write_settings"]
