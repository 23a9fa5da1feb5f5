"""Ground that every program stands on: files, console, machine, processes."""
