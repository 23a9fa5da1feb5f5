"""Cost of training a model before it is spent: memory, communication and time.

`summary` is arithmetic on a config, without torch. `run_plan` executes a dry run of each pipeline stage (`dry_run`);
`propose` searches for layouts that fit, by formula.
"""

from neox.planning.summary import kv_bytes_per_token, show, table, weight_bytes

__all__ = ["kv_bytes_per_token", "show", "table", "weight_bytes"]
