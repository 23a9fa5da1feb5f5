"""Show training data: by step, by string, or by document.

neox inspect data RUN_DIR [key=value ...]
neox inspect data [PRESET] [FILE.toml ...] data.train=PREFIX [section.key=value ...] [key=value ...]

Works without a run too, from its config. Steps count as in the logs: step 1 is the first. Without
step=, find=, document= and export= it prints the tokens that were read of each component.

Examples:
  neox inspect data runs/first step=100
  neox inspect data runs/first step=100 out=step100.html
  neox inspect data runs/first find='the Higgs boson' until=5000
  neox inspect data runs/first document=17
  neox inspect data pythia-160m data.train=document data.order=preshuffled step=1 out=step1.npy
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from neox.cli.verb import UsageError, read_options, resolve
from neox.config import Section
from neox.config.sections import NotNegative, OptionalInt
from neox.system.console import aligned

if TYPE_CHECKING:
    from neox.analysis.sample_inspector import SampleInspector

SHOWN = 60  # characters of a text in a table
QUESTIONS = ("step", "find", "document", "export")


class InspectDataOptions(Section):
    """Options of `neox inspect data` besides those of the config."""

    step: OptionalInt = None
    """Step to show: its documents, decoded, with source and component."""
    row: OptionalInt = None
    """Row of step=N to show alone, with all of its text."""
    find: str | None = None
    """Text to find in the data that was read, with the steps that read it."""
    document: str | None = Field(default=None, title="I")
    """Document to find the steps and epochs of; FILE:I if there are several files."""
    export: str | None = Field(default=None, title="PREFIX")
    """Prefix to export the order to, as gpt-neox's PREFIX_..._{doc,sample,shuffle}_idx.npy."""
    names: Literal["today", "v1"] = "today"
    """Names of the exported files: those that today's gpt-neox looks for, or v1 = those of gpt-neox 1.0."""
    until: OptionalInt = None
    """Last step to consider; by default the last one that the run has done."""
    limit: NotNegative = 20
    """Number of places that find= prints; 0 = all."""
    out: str | None = Field(default=None, title="FILE")
    """File for step=N: .html for a page, .npy for its rows of seq_length + 1 tokens."""
    tokenizer: str | None = Field(default=None, title="FILE")
    """File tokenizer.json to decode with; by default the one beside the data."""


OPTIONS = InspectDataOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the topic."""
    chosen, rest = read_options(InspectDataOptions, options)
    asked = [key for key in QUESTIONS if key in chosen.model_fields_set]
    if len(asked) > 1:
        raise UsageError(f"inspect data answers one question at a time, not {' and '.join(asked)}")
    if chosen.model_fields_set & {"row", "out"} and chosen.step is None:
        raise UsageError("row= and out= belong to step=N")
    if "names" in chosen.model_fields_set and chosen.export is None:
        raise UsageError("names= belongs to export=PREFIX")
    out = Path(chosen.out) if chosen.out else None
    if out and out.suffix not in (".html", ".npy"):
        raise ValueError(f"out={out}: must end in .html (a page) or .npy (rows of tokens)")

    from neox.analysis.sample_inspector import SampleInspector

    if len(targets) == 1 and Path(targets[0]).is_dir():
        if rest:
            names = ", ".join(InspectDataOptions.model_fields)
            raise UsageError(f"{rest[0]}: a run keeps its config; options of inspect data are {names}")
        inspector = SampleInspector.of_run(Path(targets[0]), chosen.tokenizer)
    else:
        inspector = SampleInspector.of_config(resolve(targets, rest), chosen.tokenizer)
    until = inspector.last if chosen.until is None else chosen.until
    if chosen.step is not None:
        _step(inspector, chosen.step, chosen.row, out)
    elif chosen.find is not None:
        _find(inspector, chosen.find, until, chosen.limit)
    elif chosen.document is not None:
        _document(inspector, chosen.document, until)
    elif chosen.export is not None:
        _export(inspector, Path(chosen.export), until, chosen.names)
    else:
        _components(inspector, until)


def _step(inspector: SampleInspector, step: int, row: int | None, out: Path | None) -> None:
    import numpy as np

    from neox.analysis.step_page import write_step_page
    from neox.system.files import write_whole

    rows = list(inspector.rows(step, None if row is None else [row]))
    title = (
        f"step {step}: {len(rows)} rows of {inspector.dataset.seq_length + 1} tokens, from sample {rows[0].sample} on"
    )
    if out and out.suffix == ".html":
        write_step_page(out, rows, title)
        print(f"{out}: open it in a browser")
    elif out:
        tokens = np.stack([one.tokens for one in rows])
        write_whole(out, lambda file: np.save(file, tokens))
        print(f"{out}: written")
    elif row is not None:
        print(title)
        for one in rows:
            for passage in one.passages:
                known = ", ".join([*passage.origin.known, passage.name])
                print(f"\n--- {known}, from token {passage.span.offset} on:")
                print(_plain(passage.text))
    else:
        print(title)
        table = [("row", "sample", "tokens", "document", "component", "source", "text")]
        for one in rows:
            table += [
                (
                    str(one.row),
                    str(one.sample),
                    str(passage.span.tokens),
                    passage.name,
                    passage.origin.component or "-",
                    passage.origin.source or "-",
                    _short(passage.text),
                )
                for passage in one.passages
            ]
        print(*aligned(table, ">>><<<<"), sep="\n")


def _find(inspector: SampleInspector, text: str, until: int, limit: int) -> None:
    from neox.analysis.search import Search
    from neox.system.console import progress_bar

    count, search = 0, Search(inspector, text, until)
    with progress_bar("bytes", show=sys.stderr.isatty()) as bar:
        task = bar.add_task("find", total=search.size)
        for hit in search.hits(lambda done: bar.advance(task, done)):
            count += 1
            passage = inspector.passage(hit.span)
            where = ", ".join([f"{passage.name} at token {hit.span.offset}", *passage.origin.known])
            bar.console.print(where, *_reads(hit.reads), sep="\n", markup=False, highlight=False, soft_wrap=True)
            if count == limit:
                break
    more = f", the first {limit}: limit=0 finds all" if count == limit and limit else ""
    print(f"{count} places in what steps 1 to {until} read{more}")


def _document(inspector: SampleInspector, name: str, until: int) -> None:
    span = inspector.document(name)
    passage = inspector.passage(span)
    print(", ".join([passage.name, f"{span.tokens} tokens", *passage.origin.known, _short(passage.text)]))
    reads = inspector.reads(span, until)
    for line in _reads(reads):
        print(line)
    steps = len({step for step, _, _ in reads})
    print(f"seen in {steps} of steps 1 to {until}")


def _reads(reads: Sequence[tuple[int, int, int]]) -> list[str]:
    return [f"  step {step}, row {row}, epoch {epoch}" for step, row, epoch in reads]


def _export(inspector: SampleInspector, out: Path, until: int, names: str) -> None:
    from neox.data.order_files import export_order

    samples = inspector.samples_before(until)
    for path in export_order(inspector.dataset, samples, inspector.config.train.seed, out, names):
        print(f"{path}: written")


def _components(inspector: SampleInspector, until: int) -> None:

    from neox.analysis.search import component_tokens
    from neox.system.console import progress_bar

    with progress_bar("count", "rate", show=sys.stderr.isatty()) as bar:
        task = bar.add_task("steps", total=until)
        components = component_tokens(inspector, until, lambda done: bar.advance(task, done))
    read = sum(component.tokens for component in components) or 1
    print(f"steps 1 to {until}:")
    table = [("file", "component", "tokens", "share", "epochs")]
    for component in sorted(components, key=lambda component: -component.tokens):
        name = component.component or "-"
        share = f"{100 * component.tokens / read:.2f} %"
        table.append((component.file, name, f"{component.tokens:,}", share, f"{component.epochs:.3f}"))
    print(*aligned(table, "<<>>>"), sep="\n")


def _plain(text: str) -> str:
    """Text that does not steer the terminal."""
    from neox.train.sinks import visible

    return visible(text)


def _short(text: str) -> str:
    line = _plain(" ".join(text.split()))
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
