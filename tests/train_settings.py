"""Words that settings of training need, and the mistakes in others."""

import warnings

import pytest

from comemo.train.config import (
    SettingsError,
    read_settings,
)
from comemo.train.config.layers import SettingsNote

NEEDED = ["output=runs/a", "data.train=a.jsonl", "start.checkpoint=model"]
PARTS = ["output=runs/a", "data.train=a.jsonl", "start.vision=v", "start.language=l"]


@pytest.fixture
def write(tmp_path):
    def written(text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return file

    return written


def faults_of(*words, file=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SettingsNote)
        with pytest.raises(SettingsError) as raised:
            read_settings(file, words)
    assert all(fault in str(raised.value) for fault in raised.value.faults)
    return raised.value.faults
