"""Packages of extras: import them where they are needed, and name the extra where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

DISTRIBUTION = "neox-lm"
"""Name of this project on the package index; `neox` there is another project."""


def install_command(extra: str) -> str:
    """Command that installs an extra of this project."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def optional(module: str, needed_by: str, extra: str) -> ModuleType:
    """Import a module of an extra.

    Raises ValueError that names `needed_by`, the missing package and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, needed_by, extra, str(error)) from None


def check_installed(module: str, needed_by: str, extra: str) -> None:
    """Raise `optional`'s ValueError where the module is not installed, without importing it."""
    if importlib.util.find_spec(module) is None:
        raise _missing(module, needed_by, extra, "not installed")


def _missing(module: str, needed_by: str, extra: str, reason: str) -> ValueError:
    package = module.partition(".")[0].replace("_", "-")
    return ValueError(f"{needed_by}: needs the package {package} ({reason}): {install_command(extra)}")
