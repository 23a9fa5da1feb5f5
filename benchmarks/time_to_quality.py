"""Held-out bits per byte after a fixed time of training: neox's Trainer beside a transformers Trainer loop.

    python benchmarks/time_to_quality.py [seconds=240] [out=runs/time_to_quality]

Same text (the quickstart corpus), tokenizer, shape (the quickstart preset), sequence length and batch, float32, all
cores, one after the other. Each side runs its own recipe: ours the preset's (Muon and AdamW, cosine to zero), theirs
transformers' Trainer with its AdamW and cosine, its learning rate the best of 1e-3, 3e-3 and 1e-2 in short probes that
run first and are not counted. Each schedule is laid over the number of steps that fit: measured on 20 steps, then
fixed. Scored alike by transformers: sliding windows, half overlapping.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers


def main(seconds, out):
    from neox.checkpoint import save
    from neox.config import load_config
    from neox.data import Loader, TokenDataset
    from neox.generate import bits_per_byte, token_logprobs
    from neox.quickstart.corpus import build_corpus
    from neox.quickstart.run import _heldout_ids, _tokens
    from neox.train import Trainer

    corpus = build_corpus()
    base = load_config("quickstart", overrides=[f"log.out={out / 'data'}"])
    base, tokenizer = _tokens(base, corpus, out / "data")
    batch, length = base.train.global_batch_size, base.data.seq_length
    ids = _heldout_ids(tokenizer, corpus)

    def score(model):
        model.eval()
        scores = token_logprobs(lambda t: model(t).logits, ids, length, first=tokenizer.eod_id, batch=16)
        return bits_per_byte(scores, len(corpus.heldout_bytes))

    def ours(steps, folder):
        config = base.model_copy(
            update={
                "train": base.train.model_copy(update={"steps": steps}),
                "log": base.log.model_copy(update={"out": str(folder)}),
                "checkpoint": base.checkpoint.model_copy(update={"every": 0}),
            }
        )
        trainer = Trainer(config, quiet=True)
        started = time.perf_counter()
        trainer.fit()
        return trainer.model, time.perf_counter() - started

    class Samples(torch.utils.data.Dataset):
        def __init__(self, steps):
            self.loader = Loader(TokenDataset(base.data.train, length, base.train.seed), batch)
            self.steps = steps

        def __len__(self):
            return self.steps * batch

        def __getitem__(self, i):
            row = torch.from_numpy(self.loader.dataset.sample([i])[0])
            return {"input_ids": row[:-1], "labels": row[:-1]}

    def theirs(steps, lr):
        from transformers import Trainer as TheirTrainer
        from transformers import TrainingArguments, set_seed

        set_seed(0)
        model = peers.gpt_neox(base.model)
        arguments = TrainingArguments(
            output_dir=str(out / "peer"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            adam_beta2=0.95,
            weight_decay=0.1,
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = TheirTrainer(model=model, args=arguments, train_dataset=Samples(steps))
        started = time.perf_counter()
        trainer.train()
        return model, time.perf_counter() - started

    from transformers import AutoModelForCausalLM

    probe = {lr: score(theirs(60, lr)[0]) for lr in (1e-3, 3e-3, 1e-2)}
    lr = min(probe, key=probe.get)
    print("transformers, 60 steps each:", {rate: round(bpb, 3) for rate, bpb in probe.items()}, f"-> lr {lr}")

    def fits(run):
        run(20)
        return max(1, int(seconds / (run(20)[1] / 20)))

    rows = []
    steps = fits(lambda n: theirs(n, lr))
    model, taken = theirs(steps, lr)
    rows.append(("transformers Trainer", steps, taken, score(model)))
    count = iter(range(100))
    steps = fits(lambda n: ours(n, out / f"ours-{next(count)}"))
    model, taken = ours(steps, out / "ours")
    save(model, out / "hf", tokenizer)
    rows.append(("neox Trainer", steps, taken, score(AutoModelForCausalLM.from_pretrained(out / "hf"))))

    print(
        f"{torch.get_num_threads()} threads; {batch} x {length} tokens a step; "
        f"{len(corpus.heldout_bytes):,} bytes held out"
    )
    print(f"{'':22} {'steps':>7} {'seconds':>8} {'bits/byte':>10}")
    for name, steps, taken, bpb in rows:
        print(f"{name:22} {steps:>7} {taken:>8.0f} {bpb:>10.3f}")


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    target = Path(options.get("out", "runs/time_to_quality"))
    if target.exists():
        sys.exit(f"{target} exists: remove it, or choose another out=")
    main(float(options.get("seconds", 240)), target)
