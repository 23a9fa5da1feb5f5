"""Examine this machine: versions, speeds, disk, traps, and what mends them.

neox doctor [out=RUN_DIR]

Takes some seconds. Exit status 1 if something that neox needs is broken, else 0.

Examples:
  neox doctor
  neox doctor out=/scratch/runs
"""

from __future__ import annotations

from pathlib import Path

from neox.cli.verb import UsageError, read_all
from neox.config import Section


class DoctorOptions(Section):
    """Options of `neox doctor`."""

    out: str = "runs"
    """Folder that runs are to be written to; its disk is examined."""


OPTIONS = DoctorOptions


def run(targets: list[str], options: list[str]) -> int:
    """Run the verb."""
    if targets:
        raise UsageError("doctor takes out=RUN_DIR only")
    chosen = read_all("doctor", DoctorOptions, options)
    from neox.system.diagnosis import examine

    return examine(Path(chosen.out))
