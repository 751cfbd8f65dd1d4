"""Classification: fine-tuning and evaluation on labelled shards. Start at `task.py`."""

from simmim_scale.tasks.classification.task import ClassificationTask, build

__all__ = ["ClassificationTask", "build"]
