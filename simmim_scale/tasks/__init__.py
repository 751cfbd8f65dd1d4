"""What can be trained. A task builds the module, the batches and the evaluators; the loop in `train/` does the rest.

A task is a function of the configuration that returns an object like `tasks/pretrain.py`'s `PretrainTask`.
"""

from simmim_scale.config.schema import Config

# name -> "module:function"; the function takes the configuration. Resolved when asked for.
TASKS = {
    "pretrain": "simmim_scale.tasks.pretrain:build",
    "classification": "simmim_scale.tasks.classification:build",
}


def build_task(config: Config):
    """The task that `config.task` names.

    Raises:
        ValueError: an unknown name, or data that is not there.
    """
    from simmim_scale.config.lookup import lookup

    return lookup(TASKS, config.task, setting="task")(config)
