"""The report: one schema, and the views of it."""

from .card import model_card
from .html import to_html
from .markdown import to_markdown
from .schema import (
    Environment,
    Latency,
    LayerRow,
    Metric,
    ModelInfo,
    Report,
    Row,
    StageRow,
    TaskMetric,
    TrainingPoint,
)
from .share import shareable
from .table import summary

__all__ = [
    "Environment",
    "Latency",
    "LayerRow",
    "Metric",
    "ModelInfo",
    "Report",
    "Row",
    "StageRow",
    "TaskMetric",
    "TrainingPoint",
    "model_card",
    "shareable",
    "summary",
    "to_html",
    "to_markdown",
]
