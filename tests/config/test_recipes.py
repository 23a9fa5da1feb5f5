"""What lies in recipes/: the files are configs, the SLURM script gives torchrun a command that neox takes."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from neox import cli
from neox.cli.verb import resolve
from neox.config import presets

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


def test_the_recipe_of_neox_20b_is_the_run_as_it_was(monkeypatch, capsys):
    """Values of gpt-neox's configs/20B.yml; `neox show` plans it sharded over its 96 processes."""
    config = resolve([str(RECIPES / "neox-20b.toml")], [])
    train, parallel, optim, schedule = config.train, config.parallel, config.optim, config.schedule
    assert (config.preset, train.steps, train.dtype, train.activation_checkpointing) == (
        "neox-20b",
        150000,
        "fp16",
        "full",
    )
    assert (parallel.tp, parallel.pp, parallel.dp_shard, parallel.zero, parallel.processes) == (2, 4, 12, 1, 96)
    assert (train.global_batch_size, config.microbatches) == (1536, [4] * 32)
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay, optim.clip) == (0.97e-4, (0.9, 0.95), 1e-8, 0.01, 1.0)
    scaler = (optim.loss_scale, optim.loss_scale_window, optim.loss_scale_hysteresis, optim.loss_scale_min)
    assert scaler == (2**12, 1000, 2, 1)
    assert (schedule.name, schedule.warmup_updates(train.steps), schedule.min_lr) == ("cosine_floored", 1500, 0.97e-5)
    assert (config.data.order, config.data.split, config.data.seq_length) == ("megatron", "995,4,1", 2048)
    assert (config.checkpoint.every, config.eval.every, config.eval.batches, config.log.every) == (500, 1000, 10, 2)
    assert any("recipes/neox-20b.toml" in note for note in presets.notes("neox-20b"))
    planned = []
    monkeypatch.setattr("neox.planning.run_plan.plan", lambda *arguments: planned.append(arguments) or "the plan")
    assert cli.main(["show", str(RECIPES / "neox-20b.toml"), "gpu=a100-40gb"]) == 0
    assert planned[0][0] == config
    assert capsys.readouterr().out.endswith("\nthe plan\n")


@pytest.mark.slow
def test_the_recipe_of_neox_20b_fits_its_gpus(capsys):
    """The dry run of its stages: less than the 40 GB of the A100s that trained it."""
    assert cli.main(["show", str(RECIPES / "neox-20b.toml")]) == 0
    plan = capsys.readouterr().out.partition("Plan: ")[2]
    assert plan.startswith("96 processes (dp_shard 12 x tp 2 x pp 4), 32 microbatches of 4 a step, zero=1, fp16")
    peaks = [float(gb) for gb in re.findall(r"([\d.]+) GB$", plan.partition("Bytes that")[0], flags=re.M)]
    assert len(peaks) >= 3
    assert max(peaks) < 40


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
