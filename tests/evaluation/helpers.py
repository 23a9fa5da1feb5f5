"""Tasks of our own, as YAML over local files: sums to choose, to write and to read."""

import json
import random
from pathlib import Path

import pytest

SUMS = {
    "choose": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 2
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "write": """
output_type: generate_until
doc_to_target: "{{sum}}"
num_fewshot: 1
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}} {{sum}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


REST = "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: 0\n"


def write_tasks(folder: Path, count: int = 12) -> Path:
    """Tasks sums_choose, sums_write and sums_read, `count` documents each; group sums of the three."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "sums.jsonl").open("w") as file:
        for _ in range(count):
            a, b = draw.randrange(100), draw.randrange(100)
            choices = [str(a + b), str(a + b + 1), str(a + b + 10), str(a)]
            document = {"question": f"{a} + {b} =", "choices": choices, "answer": 0, "sum": str(a + b)}
            file.write(json.dumps(document) + "\n")
    for name, rest in SUMS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: sums_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'sums.jsonl'}}}}}\n"
            f'test_split: test\nfewshot_split: test\ndoc_to_text: "{{{{question}}}}"\nmetadata: {{version: 1}}\n{rest}'
        )
    (folder / "lost.yaml").write_text(
        f"task: lost\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'lost.jsonl'}}}}}\n{REST}"
    )
    (folder / "group.yaml").write_text(
        "group: sums\ntask: [sums_choose, sums_write]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    (folder / "far.yaml").write_text(f"task: far\ndataset_path: nobody/far-away\n{REST}")
    return folder


ALL = tuple(f"sums_{name}" for name in SUMS)


def close(one, other) -> bool:
    """Whether two results are the same but for the last bits of their numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-5) if isinstance(one, float) else one == other
