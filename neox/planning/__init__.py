"""What training a model costs, before any of it is spent.

`page` is arithmetic on a config, without torch. `plan` rehearses a step of each pipeline stage (`trace`) by the real
code on processes that are not there; `propose` looks for layouts that fit.
"""

from neox.planning.summary import TrainMemory, kv_bytes_per_token, show, table, train_memory, weight_bytes

__all__ = ["TrainMemory", "kv_bytes_per_token", "show", "table", "train_memory", "weight_bytes"]
