"""Results as files: lm-eval's own JSON, a Markdown and an HTML table, samples."""

import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

from neox.system.console import padded
from neox.system.files import write_atomic
from neox.system.pictures import html_page

Results = dict[str, Any]
HEADS = ("Task", "Version", "Filter", "Shots", "Metric", "Value", "Stderr")


def metrics(row: Results) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield (metric, filter, value, standard error) of a task's results, whose keys are "metric,filter"."""
    for key, value in row.items():
        metric, comma, filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filter, value, row.get(f"{metric}_stderr,{filter}", "")


def scores(results: Results) -> Iterator[tuple[str, float, float | None]]:
    """("task metric", value, standard error) of all that are numbers; "task metric (filter)" where a task has one."""
    for task, row in results["results"].items():
        for metric, filter, value, error in metrics(row):
            if isinstance(value, int | float):
                name = f"{task} {metric}" + (f" ({filter})" if filter != "none" else "")
                yield name, value, error if isinstance(error, int | float) else None


def rows(results: Results) -> Iterator[list[str]]:
    """Yield the cells (HEADS) of each metric of each task; tasks of a group follow it, indented."""
    members = results.get("group_subtasks", {})
    inner = {name for names in members.values() for name in names}

    def below(name: str, depth: int) -> Iterator[tuple[str, int]]:
        yield name, depth
        for member in members.get(name, ()):
            yield from below(member, depth + 1)

    for top in dict.fromkeys([*members, *results["results"]]):
        for name, depth in below(top, 0) if top not in inner else ():
            version, shots = (str(results[key].get(name, "")) for key in ("versions", "n-shot"))
            for metric, filter, value, error in metrics(results["results"].get(name, {})):
                yield ["  " * depth + name, version, filter, shots, metric, _text(value), _text(error)]


def markdown(results: Results) -> str:
    """Results as an aligned Markdown table, and a line that says so where documents were left out."""
    table = [list(HEADS), *([cell.replace("|", "\\|") for cell in row] for row in rows(results))]
    head, *others = padded(table, "<" * len(HEADS))
    lines = "".join(f"| {' | '.join(row)} |\n" for row in (head, ["-" * len(cell) for cell in head], *others))
    return lines + (f"\n{note}\n" if (note := limited(results)) else "")


def limited(results: Results) -> str:
    """Sentence about documents that `limit` left out; "" where all were asked."""
    limit = results.get("config", {}).get("limit")
    if not limit:
        return ""
    part = f"{limit:.3g} of the documents" if limit < 1 else f"{int(limit):,} documents"
    return f"limit={limit:g}: only the first {part} of each task count here."


def page(results: Results) -> str:
    """Results as a self-contained HTML page."""
    above = f"<p>lm-evaluation-harness {html.escape(results['lm_eval_version'])}</p>"
    above += f"<p><strong>{html.escape(note)}</strong></p>" if (note := limited(results)) else ""
    return table_page(str(results["model_name"]), above, HEADS, rows(results))


def table_page(title: str, above: str, heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Table as a self-contained HTML page; `above`, which is HTML, precedes the table."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return html_page(title, f'{above}\n<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>')


def write(results: Results, out: Path) -> None:
    """results.json, results.md and results.html in the folder `out`, and samples_TASK.jsonl where there are samples."""
    for task, samples in (results.get("samples") or {}).items():
        lines = [json.dumps(_flat(one), default=handle_non_serializable, ensure_ascii=False) + "\n" for one in samples]
        write_atomic(out / f"samples_{task.replace('/', '__')}.jsonl", "".join(lines).encode())
    whole = {key: value for key, value in results.items() if key != "samples"}
    text = json.dumps(whole, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_atomic(out / "results.md", markdown(results).encode())
    write_atomic(out / "results.html", page(results).encode())
    write_atomic(out / "results.json", text.encode())


def task_hashes(samples: dict[str, list[Results]]) -> dict[str, str]:
    """lm-eval's hash of each task's documents, prompts and targets."""
    parts = ("doc_hash", "prompt_hash", "target_hash")
    return {task: hash_string("".join(one[part] for one in many for part in parts)) for task, many in samples.items()}


def _flat(sample: Results) -> Results:
    """Convert a sample to the form of lm-eval's files, which a data set reader splits into columns."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(one)} for i, one in enumerate(sample["arguments"])
    }
    return sample | {
        "arguments": arguments,
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
        "target": str(sample["target"]),
    }


def _text(cell: Any) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)
