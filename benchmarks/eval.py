"""Evaluating on a CPU: neox and lm-evaluation-harness' own `hf` backend in turn, in one process, the same requests.

    pip install 'neox-lm[eval]'
    python benchmarks/eval.py [limit=N] [turns=3] [sample=32] [batches=1,2,4,8,16,32] [dtypes=float32,bfloat16]
                              [only=mmlu,hellaswag,lambada] [shape=pythia-160m] [data=../shared/data] [weights=auto]

Random float16 weights of a published shape, the tokenizer of GPT-NeoX-20B (`data`/20B_tokenizer.json; one trained on
this project's guides where it is absent). The texts of `mmlu` and `hellaswag` are random words; their lengths are what
the real tasks were counted to have, in tokens, and their templates, shots and metrics are lm-eval's:

    mmlu        5 shots, the first ones, for three subjects whose documents have 70, 120 and 180 tokens in the mean
                (all of MMLU: 123; a prefix of 596), as many documents as subjects of those lengths have
    hellaswag   10 shots, drawn for each document; 52 tokens of context and 26 of each ending in the mean; 1,000 of them
    lambada     the real file, `data`/lambada_test.jsonl; left out where it is absent

What is timed is `lm_eval.simple_evaluate`, models loaded, so that building prompts and metrics count for both; its
reading of all its own tasks' files and its report on the machine, seconds that neither has a part in, are left out.
Before it, the hf backend scores `sample` documents of each task in every dtype at every batch size; it is then run with
the fastest. Where that is not float32 it is also run in float32, at its fastest batch size: 16 bits are within 1e-4 of
nothing, so that is whom log-likelihoods are compared with. neox holds the float16 weights as they are and computes in
float32; `weights` chooses another way, w16a16 for one. It begins each turn with an empty cache. Medians over the
turns; `tokens` is what went through the model, padding included.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
CLOSE = 1e-4
SUBJECTS = (("short", 70, 100), ("middle", 120, 152), ("long", 180, 165))  # name, tokens a document, documents
CHOICE, ENDING, CONTEXT, HELLASWAG = 8, 26, 52, 1000
TARGETS = {"mmlu": 4.0, "hellaswag": 3.0, "lambada": 1.3}  # times the hf backend


# --- data ------------------------------------------------------------------------------------------------------------


class Words:
    """Random text of a wanted number of tokens."""

    def __init__(self, tokenizer, source, seed):
        found = sorted({word for word in source.split() if word.isalpha()})
        self.words = [word for word in found if len(tokenizer.encode(" " + word)) == 1]
        self.draw = random.Random(seed)

    def text(self, mean):
        """About `mean` words of one token each, their number log-normal."""
        count = max(2, round(mean * self.draw.lognormvariate(-0.125, 0.5)))
        return " ".join(self.draw.choice(self.words) for _ in range(count))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mmlu(folder, words, limit):
    """One task a subject: lm-eval's own template, the first five of the split `dev` as shots."""
    tasks = []
    for name, tokens, documents in SUBJECTS:
        rows = [
            # "A." and its like, line breaks and "Answer: A" are 18 tokens.
            {
                "question": words.text(tokens - 18 - 4 * CHOICE),
                "choices": [words.text(CHOICE) for _ in range(4)],
                "answer": words.draw.randrange(4),
            }
            for _ in range(5 + documents)
        ]
        files = {
            "dev": write_rows(folder / f"{name}-dev.jsonl", rows[:5]),
            "test": write_rows(folder / f"{name}-test.jsonl", rows[5:][:limit]),
        }
        tasks.append(
            {
                "task": f"mmlu_like_{name}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": files},
                "test_split": "test",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "num_fewshot": 5,
                "output_type": "multiple_choice",
                "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
                "D. {{choices[3]}}\nAnswer:",
                "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}],
            }
        )
    return tasks


def hellaswag(folder, words, limit):
    def row():
        choices = [words.text(ENDING) for _ in range(4)]
        return {"query": words.text(CONTEXT), "choices": choices, "gold": words.draw.randrange(4)}

    files = {
        "train": write_rows(folder / "hellaswag-train.jsonl", [row() for _ in range(500)]),
        "test": write_rows(folder / "hellaswag-test.jsonl", [row() for _ in range(min(limit or HELLASWAG, HELLASWAG))]),
    }
    return [
        {
            "task": "hellaswag_like",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            "test_split": "test",
            "num_fewshot": 10,
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    ]


def lambada(folder, rows, limit):
    return [
        {
            "task": "lambada",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": write_rows(folder / "lambada.jsonl", rows[:limit])}},
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        }
    ]


# --- the two ----------------------------------------------------------------------------------------------------------


def write_model(folder, shape, tokenizer):
    import transformers

    import neox
    from neox.model.decoder import GPTNeoX

    model = GPTNeoX(neox.ModelConfig(**neox.preset(shape)["model"])).initialize(1)
    neox.save(model.half(), folder, tokenizer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    file = str(folder / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=file, **special).save_pretrained(folder)


class Ours:
    name = "neox"

    def __init__(self, folder, weights):
        from neox.generate.loading import load_engine

        self.folder, self.first = folder, load_engine(folder, "cpu", weights=weights)

    def model(self):
        """As new: with an empty cache."""
        from neox.evaluation import EngineLM
        from neox.generate import Engine

        self.engine = Engine(self.first.model, self.first.tokenizer)
        return EngineLM(self.engine, progress=False)

    def tokens(self):
        return self.engine.stats.misses


class Theirs:
    def __init__(self, folder, dtype):
        from lm_eval.models.huggingface import HFLM

        self.dtype, self.seen, self.lm = dtype, 0, HFLM(str(folder), dtype=dtype, device="cpu")
        self.lm.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, arguments, named):
        self.seen += (arguments[0] if arguments else named["input_ids"]).numel()

    @property
    def name(self):
        return f"hf {self.dtype}, batch {self.lm.batch_size}"

    def at(self, batch):
        self.lm.batch_size_per_gpu = batch
        return self

    def model(self):
        self.seen = 0
        return self.lm

    def tokens(self):
        return self.seen


def evaluate(who, tasks, limit=None):
    """(seconds, tokens computed, scores, {request: its log-likelihoods and greedy flags}) of one run."""
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    evaluator.add_env_info = lambda results: None
    model, manager = who.model(), TaskManager(include_defaults=False)
    started = time.perf_counter()
    result = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    seconds = time.perf_counter() - started
    answers = {
        (task, sample["doc_id"]): [(float(value), bool(greedy)) for value, greedy in sample["filtered_resps"]]
        for task, samples in result["samples"].items()
        for sample in samples
    }
    scores = {
        f"{task} {name.partition(',')[0]}": value
        for task, row in result["results"].items()
        for name, value in row.items()
        if isinstance(value, float)
    }
    return seconds, who.tokens(), scores, answers


def fastest(folder, tasks, dtypes, batches, sample):
    """For each dtype the hf backend at the batch size that is fastest on `sample` documents a task, the best first."""
    tried = []
    for dtype in dtypes:
        lm = Theirs(folder, dtype)
        evaluate(lm.at(batches[0]), tasks, 1)  # warms up
        times = []
        for batch in batches:
            try:
                times.append((evaluate(lm.at(batch), tasks, sample)[0], batch))
            except (MemoryError, RuntimeError) as error:
                print(f"{lm.name}: left out, {str(error).splitlines()[0]}", file=sys.stderr)
        best = min(times)
        print(
            f"  {lm.at(best[1]).name} is the fastest of " + ", ".join(f"{b}: {s:.1f} s" for s, b in times), flush=True
        )
        tried.append((best[0], lm))
    return [lm for _, lm in sorted(tried, key=lambda pair: pair[0])]


def compare(name, tasks, ours, folder, options):
    print(f"\n### {name}\n", flush=True)
    tried = fastest(folder, tasks, options["dtypes"], options["batches"], options["sample"])
    exact = [peer for peer in tried if peer.dtype == "float32"]
    peers = list(dict.fromkeys(tried[:1] + exact))
    runs = [ours, *peers]
    found = {who.name: [] for who in runs}
    for turn in range(options["turns"]):
        for who in runs:
            found[who.name].append(evaluate(who, tasks))
            print(f"{name} turn {turn} {who.name}: {found[who.name][-1][0]:.1f} s", file=sys.stderr, flush=True)
    middle = {who: statistics.median(run[0] for run in own) for who, own in found.items()}
    print("\n| | seconds | neox is faster | tokens computed |\n|---|---|---|---|")
    for who, own in found.items():
        times = "" if who == ours.name else f"{middle[who] / middle[ours.name]:.2f} times"
        print(f"| {who} | {middle[who]:.1f} | {times} | {own[0][1]:,} |")
    stats = ours.engine.stats
    requests = sum(len(answers) for answers in found[ours.name][0][3].values())
    print(
        f"\n{requests:,} requests; {stats.hits:,} tokens found in the prefix tree, {stats.evictions:,} blocks given up"
    )
    for peer in exact:
        (_, _, scores, answers), (_, _, their_scores, their_answers) = found[ours.name][0], found[peer.name][0]
        pairs = [pair for key, own in answers.items() for pair in zip(own, their_answers[key], strict=True)]
        largest = max(abs(a[0] - b[0]) for a, b in pairs)
        greedy = sum(a[1] == b[1] for a, b in pairs)
        # A perplexity is a mean of log-likelihoods, and as close as they are; the others count documents.
        same = all(
            abs(value - their_scores[key]) <= CLOSE * max(1, abs(value))
            if "perplexity" in key
            else value == their_scores[key]
            for key, value in scores.items()
        )
        print(
            f"against {peer.name}: log-likelihoods {'' if largest <= CLOSE else 'NOT '}within {CLOSE} "
            f"(largest difference {largest:.1e}), {greedy} of {len(pairs)} greedy flags equal, "
            f"scores {'identical' if same else 'DIFFER'}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
        )
    for peer in peers:
        ratio = middle[peer.name] / middle[ours.name]
        print(f"target {TARGETS[name]} times against {peer.name}: {'' if ratio >= TARGETS[name] else 'not '}met")


def main(options):
    import torch

    from neox.tokenizer import Tokenizer, train_bpe

    root, data = Path(__file__).resolve().parent.parent, Path(options["data"])
    data = data if data.is_absolute() else root / data
    guides = "\n".join(path.read_text() for path in sorted(root.glob("docs/*.md")))
    file = data / "20B_tokenizer.json"
    tokenizer = Tokenizer.from_file(file) if file.exists() else train_bpe([guides], 4096, progress=False)
    texts = data / "lambada_test.jsonl"
    rows = [{"text": json.loads(line)["text"]} for line in texts.open()] if texts.exists() else []
    words = Words(tokenizer, "\n".join(row["text"] for row in rows) or guides, seed=1)
    print(
        f"{options['shape']}, {torch.get_num_threads()} threads, {'20B' if file.exists() else 'small'} tokenizer, "
        f"{options['turns']} turns, at most {options['limit'] or 'all'} documents a task"
    )
    with tempfile.TemporaryDirectory(prefix="eval-") as place:
        folder = Path(place)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        write_model(folder / "model", options["shape"], tokenizer)
        ours = Ours(folder / "model", options["weights"])
        for name in options["only"]:
            if name == "lambada" and not rows:
                print(f"lambada is left out: no {texts}")
                continue
            limit = options["limit"]
            tasks = lambada(folder, rows, limit) if name == "lambada" else globals()[name](folder, words, limit)
            compare(name, tasks, ours, folder / "model", options)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(
        {
            "limit": int(given["limit"]) if "limit" in given else None,
            "turns": int(given.get("turns", 3)),
            "sample": int(given.get("sample", 32)),
            "batches": [int(batch) for batch in given.get("batches", "1,2,4,8,16,32").split(",")],
            "dtypes": given.get("dtypes", "float32,bfloat16").split(","),
            "only": given.get("only", ",".join(TARGETS)).split(","),
            "shape": given.get("shape", "pythia-160m"),
            "weights": given.get("weights", "auto"),
            "data": given.get("data", "../shared/data"),
        }
    )
