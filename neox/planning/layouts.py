"""Number of processes of a config, and the microbatches of each."""

from neox.config import Config


def processes(config: Config) -> int:
    """Processes of the run; where dp_shard is left open, the fewest."""
    parallel = config.parallel
    return parallel.pp * parallel.dp_replicate * shards(config) * parallel.cp * parallel.tp


def shards(config: Config) -> int:
    """parallel.dp_shard; 1 where it is left open."""
    return config.parallel.dp_shard or 1


def rows(config: Config) -> list[int]:
    """Sequences of each microbatch of a data-parallel rank, as `neox.data.Loader` cuts its share."""
    size = config.train.micro_batch_size
    share = -(-config.train.global_batch_size // (config.parallel.dp_replicate * shards(config)))
    return [min(size, share - start) for start in range(0, share, size)]


def microbatches(config: Config) -> int:
    return len(rows(config))
