"""Tasks by name or by file, with what is wrong with them in one line."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from neox.config.spelling import did_you_mean
from neox.corpus.readers.errors import one_line


def load_tasks(names: Sequence[str], include_path: str | None = None) -> tuple[list[Any], TaskManager]:
    """The tasks and groups of these names, their data with them, and lm-eval's manager of them.

    A name is a task, a group or a tag of lm-eval or of the YAML files below `include_path`, or a YAML file. Raises
    ValueError for a name that is none of these, with the nearest ones, and for a task that cannot be loaded.
    """
    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"eval.include_path={include_path}: is no folder; give the one with the tasks' YAML files")
    manager = _manager(names, include_path)
    found: list[Any] = []
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            hint = did_you_mean(name, manager.all_tasks, "give eval.include_path= for tasks of your own", 3)
            raise ValueError(f"eval.tasks: no task {name!r}; {hint}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a task's own code, its data's reader or the network raise
            raise ValueError(f"eval.tasks: {name} cannot be loaded: {one_line(error)}") from error
        inner = {member for members in loaded["group_map"].values() for member in members}
        found += [group for name, group in loaded["groups"].items() if name not in inner] or loaded["tasks"].values()
    return found, manager


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """One that knows all names; lm-eval's own thousands of files are read only where one of them may be meant."""
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
        return TaskManager(include_path=include_path)
    return _built_in()


@functools.cache
def _built_in() -> TaskManager:
    return TaskManager()  # seconds: once for all models of a process
