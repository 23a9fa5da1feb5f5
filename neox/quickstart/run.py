"""`neox quickstart`: measure the machine, tokenize, train, export, score and draw in minutes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from neox.checkpoint import save
from neox.checkpoint.steps import folder_kind
from neox.config import Config, load_config
from neox.config.structured import read_json
from neox.corpus import prepare
from neox.data.token_file import pair
from neox.generate import Engine, Sampling, bits_per_byte, token_logprobs
from neox.model.decoder import GPTNeoX
from neox.model.flops import parameters
from neox.quickstart.baselines import start_baselines
from neox.quickstart.budget import measure_machine
from neox.quickstart.corpus import Corpus, build_corpus
from neox.quickstart.curve import draw_loss_curve
from neox.quickstart.flipbook import merge_pieces, write_flipbook
from neox.system.files import try_lock, write_atomic
from neox.tokenizer import Tokenizer, train_bpe
from neox.train import Result, Trainer
from neox.train.metrics import read_rows

PROMPTS = ("def", "class Graph(", "    Returns\n    -------\n", '    """Return')
EXCERPT = 1400  # characters of held-out text that the flipbook colours
NAMES = {"gzip": "gzip -9", "xz": "xz -9", "xz_primed": "xz primed with the training text"}
PAGE_WINDOWS = 96  # windows, spaced evenly over all held-out text, that a page's bits per byte are taken over


def quickstart(overrides: Sequence[str] = (), corpus: Corpus | None = None, out: Path | None = None) -> Result:
    """Run it, or continue an interrupted run. `overrides` are key=value options on top of the preset `quickstart`.

    Raises ValueError and OSError with one line for the user.
    """
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    config = load_config("quickstart", overrides=[f"log.out={out or Path('runs/quickstart')}", *overrides])
    with _claimed(Path(config.log.out)):
        return _quickstart(config, corpus, say)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold the folder, a new one or that of an earlier quickstart. Raises ValueError before anything is written."""
    owned = folder / ".quickstart"
    if folder_kind(folder) not in ("absent", "empty") and not owned.exists():
        raise ValueError(f"{folder}: holds files that quickstart did not write: choose another out=, a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with owned.open("ab") as file:
        if not try_lock(file):
            raise ValueError(f"{folder}: another quickstart is running here: wait for it, or choose another out=")
        (folder / ".lock").touch()  # from now on it is a run's
        yield


def _quickstart(config: Config, corpus: Corpus | None, say: Callable[[str], None]) -> Result:
    folder = Path(config.log.out)
    for line in measure_machine().lines():
        say(line)

    corpus = corpus or build_corpus()
    train_mb, heldout_kb = len(corpus.train_bytes) / 1e6, len(corpus.heldout_bytes) / 1e3
    say(
        f"Corpus: {train_mb:.1f} MB of source and documentation from {', '.join(corpus.package_bytes)}; "
        f"{len(corpus.heldout)} files ({heldout_kb:.0f} kB) are held out"
    )
    if corpus.note:
        say(corpus.note)
    baselines = _baselines(folder / "baselines.json", corpus)
    config, tokenizer = _tokens(config, corpus, folder)
    # Waited for here: the compressor would take a core from the training.
    write_atomic(folder / "baselines.json", json.dumps(baselines()).encode())

    pages, witness = _Pages(folder / "pages", tokenizer, corpus), _Witness(folder)
    started = _started(folder, config)
    trainer = Trainer(config, resume=started, hooks=(witness.hook, pages.hook))
    counted = parameters(config.model)
    say(f"Training {counted.total:,} parameters, {config.train.steps} steps; Ctrl-C saves, the same command continues")
    result = trainer.fit()
    if continued := witness.says():
        say(continued)
    if not result.finished:
        witness.stopped(trainer)
        say(f"Stopped and saved at step {result.step}: run `neox quickstart` again and it continues, bit for bit")
        return result

    save(trainer.model, folder / "hf", tokenizer)
    scorer, name = _exported(folder / "hf", trainer.model)
    bpb = _heldout_bpb(scorer, config, tokenizer, corpus)
    compressors = baselines()
    pages.finish(trainer, bpb)
    _pictures(folder, config, pages, compressors)
    _report(folder, config, trainer.model, tokenizer, bpb, name, compressors)
    return result


def _baselines(kept: Path, corpus: Corpus) -> Callable[[], dict[str, float]]:
    """Compression baselines, from an earlier call or computed in the background."""
    if kept.exists():
        stored: dict[str, float] = read_json(kept)
        return lambda: stored
    return start_baselines(corpus.train_bytes, corpus.heldout_bytes).result


def _tokens(config: Config, corpus: Corpus, folder: Path) -> tuple[Config, Tokenizer]:
    """Tokenizer and token files of the corpus, made once; and the config that names them."""
    kept = folder / "tokenizer.json"
    if kept.exists():
        tokenizer = Tokenizer.from_file(kept)
    else:
        tokenizer = train_bpe((text for _, text in corpus.train), **config.tokenizer.training)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(kept)
    names = {}
    for part, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
        prefix = folder / "data" / part
        if not pair(prefix)[1].exists():
            lines = [json.dumps({"text": text, "path": path}) for path, text in documents]
            source = folder / "data" / f"{part}.jsonl"
            write_atomic(source, ("\n".join(lines) + "\n").encode())
            prepare([source], prefix, tokenizer)
        names[part] = str(prefix)
    sections = {
        "data": config.data.model_copy(update={"train": (names["train"],), "valid": (names["heldout"],)}),
        "tokenizer": config.tokenizer.model_copy(update={"path": str(kept)}),
    }
    return config.model_copy(update=sections), tokenizer


def _started(folder: Path, config: Config) -> bool:
    """True if there is a run to continue. Raises ValueError if it has other options."""
    path = folder / "config.toml"
    if not path.exists():
        return False
    before = load_config(files=[path])
    for section, values in config:
        for key, value in values if section != "preset" else ():
            if getattr(getattr(before, section), key) != value:
                raise ValueError(
                    f"{folder} holds a run with another {section}.{key}: delete the folder, or choose another out="
                )
    return True


class _Witness:
    """Check that a continued run is bit-identical to the interrupted one.

    A run that was stopped leaves a hash of its weights and optimizer state; one that was killed leaves logged losses
    beyond its last checkpoint, whose steps are computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.kept, self.rows = folder / "stopped.json", folder / "metrics.jsonl"
        self.losses = self._losses() if self.rows.exists() else {}
        self.start = -1
        self.same_state: bool | None = None

    def _losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_rows(self.rows) if "loss" in row}

    def hook(self, trainer: Trainer, step: int) -> None:
        if self.start < 0:
            self.start = step
            if self.kept.exists():
                stored = read_json(self.kept)
                self.same_state = stored["sha256"] == _digest(trainer) if stored["step"] == step else None

    def stopped(self, trainer: Trainer) -> None:
        write_atomic(self.kept, json.dumps({"step": trainer.step, "sha256": _digest(trainer)}).encode())

    def says(self) -> str | None:
        """One line about a continued run, None for one that began here."""
        if self.start <= 0:
            return None
        now = self._losses()
        again = [step for step in self.losses if step > self.start and step in now]
        different = [step for step in again if now[step] != self.losses[step]]
        if different or self.same_state is False:
            where = f"step {different[0]}'s loss" if different else f"the state at step {self.start}"
            return (
                f"Continued from step {self.start}, not bit-identically: {where} differs (another machine or install?)"
            )
        checks = ["the weights and the optimizer state had the hash that was saved"] if self.same_state else []
        if again:
            checks.append(f"{len(again)} logged steps computed again gave the same losses to the last bit")
        return f"Continued from step {self.start}" + (f", bit-identically: {'; '.join(checks)}" if checks else "")


def _digest(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
        for optimizer in trainer.optimizers:
            for _, value in sorted(optimizer.state.get(parameter, {}).items()):
                digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Pages:
    """Pages of the flipbook, one file each, so that an interrupted run keeps them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, corpus: Corpus) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.title, text = max(corpus.heldout, key=lambda d: (d[0].startswith("networkx"), len(d[1])))
        start = text.find("\n\n", len(text) // 4) + 2
        end = text.find("\n", start + EXCERPT)
        self.text = text[start : end if end > 0 else None]
        self.heldout, self.heldout_bytes = _heldout_ids(tokenizer, corpus), len(corpus.heldout_bytes)

    def hook(self, trainer: Trainer, step: int) -> None:
        """Write the page of steps 0, 1, 2, 4, 8 .. and of the last one."""
        path = self.folder / f"step_{step:08d}.json"
        if (step & (step - 1) and step != trainer.config.train.steps) or path.exists():
            return
        trainer.model.eval()
        window = trainer.config.data.seq_length
        engine = Engine(trainer.model, self.tokenizer, slots=len(PROMPTS))
        room = max(1, trainer.config.model.max_position_embeddings - 64)
        sampling = Sampling(max_tokens=min(96, room), temperature=0.8, top_p=0.95, seed=1)
        done = engine.generate(PROMPTS, sampling)
        eod = self.tokenizer.eod_id
        ids = self.tokenizer.encode(self.text)
        nats = -token_logprobs(_scorer(trainer.model), ids, window, first=eod)
        bits = [n / math.log(2) for n in nats.tolist()]
        loss, bpb = self._spot_check(trainer.model, window)
        page = {
            "step": step,
            "tokens_seen": trainer.state.loader.read(step) * window,
            "loss": loss,
            "bpb": bpb,
            "samples": [{"prompt": p, "text": c.text} for p, c in zip(PROMPTS, done, strict=True)],
            "surprise": merge_pieces([self.tokenizer.token_bytes(i) for i in ids], bits),
        }
        write_atomic(path, json.dumps(page).encode())
        trainer.model.train()

    def _spot_check(self, model: GPTNeoX, window: int) -> tuple[float, float]:
        """Nats per token and bits per byte of the second half of evenly spaced windows.

        That is the context that the final score gives a token, so the curve runs into it.
        """
        half = window // 2
        last = max(0, len(self.heldout) - window - 1)
        starts = sorted({round(i * last / (PAGE_WINDOWS - 1)) for i in range(PAGE_WINDOWS)})
        rows = torch.tensor([self.heldout[start : start + window + 1] for start in starts])
        nats, count, size = 0.0, 0, 0
        with torch.inference_mode():
            for part in rows.split(16):
                logits = _scorer(model)(part[:, :-1])[:, half:].float().cpu()
                targets = part[:, half + 1 :]
                nats -= logits.log_softmax(-1).gather(-1, targets[..., None]).double().sum().item()
                count += targets.numel()
                special = self.tokenizer.eod_id
                size += sum(len(self.tokenizer.token_bytes(i)) for i in targets.flatten().tolist() if i != special)
        return nats / count, nats / math.log(2) / max(1, size)

    def finish(self, trainer: Trainer, bpb: float) -> None:
        """Put the final score, taken over all held-out text, on the last page."""
        path = self.folder / f"step_{trainer.step:08d}.json"
        page = read_json(path)
        page["bpb"] = bpb
        write_atomic(path, json.dumps(page).encode())

    def all(self) -> list[dict[str, Any]]:
        return [read_json(path) for path in sorted(self.folder.glob("step_*.json"))]


def _scorer(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    device = next(model.parameters()).device

    def logits(tokens: Tensor) -> Tensor:
        out = model(tokens.to(device))
        return out if isinstance(out, Tensor) else out.logits

    return logits


def _exported(folder: Path, model: GPTNeoX) -> tuple[Callable[[Tensor], Tensor], str]:
    """Model that scores the held-out text: the export loaded by transformers if installed, else ours."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return _scorer(model.eval()), "neox (install transformers for a second opinion)"
    logging.disable_progress_bar()
    return _scorer(AutoModelForCausalLM.from_pretrained(folder).eval()), "transformers, from the exported files"


def _heldout_ids(tokenizer: Tokenizer, corpus: Corpus) -> list[int]:
    """All held-out text as one stream, each document ended by the end-of-document token."""
    assert tokenizer.eod_id is not None
    return [i for _, text in corpus.heldout for i in (*tokenizer.encode(text), tokenizer.eod_id)]


def _heldout_bpb(logits: Callable[[Tensor], Tensor], config: Config, tokenizer: Tokenizer, corpus: Corpus) -> float:
    """Bits per byte of all held-out text; the tokens that end its documents are paid for too."""
    ids = _heldout_ids(tokenizer, corpus)
    window = config.model.max_position_embeddings
    scores = token_logprobs(logits, ids, window, stride=max(1, window // 2), batch=16, first=tokenizer.eod_id)
    return bits_per_byte(scores, len(corpus.heldout_bytes))


def _pictures(folder: Path, config: Config, pages: _Pages, compressors: dict[str, float]) -> None:
    shown = pages.all()
    per_token = pages.heldout_bytes / len(pages.heldout)
    rows = read_rows(folder / "metrics.jsonl") + [
        {"step": p["step"], "valid_bpb": p["bpb"]} for p in shown if p["step"]
    ]
    named = {NAMES[key]: value for key, value in compressors.items()}
    title = f"{parameters(config.model).total / 1e6:.1f}M parameters, {config.train.steps} steps"
    draw_loss_curve(folder / "loss.png", rows, title, named, per_token)
    model = config.model
    facts = {
        "parameters": f"{parameters(model).total:,}",
        "shape": f"{model.num_hidden_layers} layers, {model.hidden_size} wide, {model.num_attention_heads} heads",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{model.max_position_embeddings} tokens",
        "optimizer": config.optim.name,
    }
    meta = {"title": "A small GPT-NeoX learns", "facts": facts, "baselines": named}
    write_flipbook(folder / "flipbook.html", shown, {"title": pages.title, "text": pages.text}, meta)


def _report(
    folder: Path,
    config: Config,
    model: GPTNeoX,
    tokenizer: Tokenizer,
    bpb: float,
    scored_by: str,
    compressors: dict[str, float],
) -> None:
    console = Console(highlight=False)
    table = Table(title="Bits per byte of the held-out text (lower is better)", title_justify="left")
    table.add_column("by")
    table.add_column("bits/byte", justify="right")
    rows = [(f"this model, scored by {scored_by}", bpb), *((NAMES[k], v) for k, v in compressors.items())]
    for name, value in sorted(rows, key=lambda row: -row[1]):
        table.add_row(name, f"{value:.3f}", style="bold" if value == bpb else None)
    console.print(table)
    prompt = '    """Return'
    sampling = Sampling(max_tokens=60, temperature=0.7, top_p=0.9, seed=7)
    text = Engine(model, tokenizer).generate(prompt, sampling)[0].text
    console.print("\nA sample:\n")
    console.print(prompt + text, markup=False)
    console.print(
        f"\nLoss curve: {folder / 'loss.png'}\nFlipbook:   {folder / 'flipbook.html'}  (open it in a browser)"
    )
    console.print("\nNext:")
    for command in (
        f"neox generate {folder / 'hf'} prompt='def' max_tokens=200",
        f"neox train quickstart data.train={folder / 'data' / 'train'} train.steps=50 out=runs/mine",
        "neox show neox-20b",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)
