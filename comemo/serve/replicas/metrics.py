"""Metrics of several replicas as one text for Prometheus."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Families:
    def __init__(self) -> None:
        self._by_name: dict[str, Metric] = {}

    def add(self, replica: str, text: str) -> None:
        for family in text_string_to_metric_families(text):
            held = self._by_name.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            held.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in family.samples
            ]

    def collect(self) -> Iterator[Metric]:
        yield from self._by_name.values()


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """The metrics of all replicas, each with the label `replica`.

    Args:
        texts: name of a replica -> its metrics.

    Raises:
        ValueError: not the text format of Prometheus.
    """
    families: Any = _Families()
    for replica, text in texts.items():
        families.add(replica, text)
    return generate_latest(families)
