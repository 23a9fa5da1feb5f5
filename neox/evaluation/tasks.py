"""Load tasks by name or by file, with one-line errors."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from neox.config.options import did_you_mean
from neox.system.console import one_line


def load_tasks(names: Sequence[str], include_path: str | None = None) -> tuple[list[Any], TaskManager]:
    """Load tasks and groups with their data; returns them and lm-eval's task manager.

    A name is a task, group or tag of lm-eval or of the YAML files below `include_path`, or a YAML file. Raises
    ValueError for an unknown name, with the nearest ones, and for a task that cannot be loaded.
    """
    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"eval.include_path={include_path}: is no folder; give the one with the tasks' YAML files")
    manager = _manager(names, include_path)
    tasks: list[Any] = []
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            hint = did_you_mean(name, manager.all_tasks, "give eval.include_path= for tasks of your own", 3)
            raise ValueError(f"eval.tasks: no task {name!r}; {hint}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # from a task's own code, its data set's reader, or the network
            raise ValueError(f"eval.tasks: {name} cannot be loaded: {one_line(error)}") from error
        inner = {member for members in loaded["group_map"].values() for member in members}
        tasks += [group for name, group in loaded["groups"].items() if name not in inner] or loaded["tasks"].values()
    return tasks, manager


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """Task manager that knows all names; reads lm-eval's thousands of files only if a name needs them."""
    if include_path:
        custom = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(custom.all_subtasks):
            return custom
        return TaskManager(include_path=include_path)
    return _built_in()


@functools.cache
def _built_in() -> TaskManager:
    return TaskManager()  # seconds: once for all models of a process
