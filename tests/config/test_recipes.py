"""What lies in recipes/: the files are configs, the SLURM script gives torchrun a command that neox takes."""

import os
import subprocess
from pathlib import Path

import pytest

from neox.cli.verb import resolve

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SLURM = RECIPES / "slurm.sh"
FAKES = {
    "scontrol": 'printf "host-1\\nhost-2\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "torchrun": 'printf "%s\\n" "$OMP_NUM_THREADS" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"',
}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_a_recipe_is_a_config(recipe):
    assert len(recipe.read_text().splitlines()) <= 30
    assert resolve([str(recipe)], ["data.train=text.txt"]).data.train == ("text.txt",)


def test_the_slurm_script_starts_torchrun_with_what_neox_takes(tmp_path):
    """With srun, scontrol and torchrun of our own: what would run on each host, read by torchrun's own parser."""
    assert len(SLURM.read_text().splitlines()) <= 30
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    for name, script in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    given = {"JOB_NODELIST": "host-[1-2]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "8", "JOB_ID": "7"}
    given["CPUS_PER_TASK"] = "64"
    environment = {f"SLURM_{key}": value for key, value in given.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run([SLURM, "train.steps=5"], env=environment, text=True, capture_output=True, check=True)
    threads, killed, *command = done.stdout.splitlines()
    assert threads == "8"

    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(command)
    assert (read.nnodes, read.nproc_per_node, read.max_restarts) == ("2", "8", 3)
    assert (read.rdzv_backend, read.rdzv_id, read.rdzv_endpoint) == ("c10d", "7", "host-1:29500")
    assert (read.module, read.training_script) == (True, "neox")
    verb, *rest = read.training_script_args
    assert verb == "train"
    assert "resume=auto" in rest
    options = [word for word in rest if "=" in word and word != "resume=auto"]
    config = resolve([word for word in rest if "=" not in word], options)
    parallel = config.parallel
    assert 16 % (parallel.pp * parallel.tp) == 0
    assert (config.preset, config.train.steps, config.log.out) == ("neox-20b", 5, "runs/20b")
    # The signal comes as many seconds before the end as the run may take, and torchrun waits for it.
    early = int(SLURM.read_text().partition("--signal=TERM@")[2].split()[0])
    assert config.train.grace < int(killed) < early
