"""Statistics of a corpus by component, beside published ones; bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any, TypeVar

from neox.config.pile import COMPONENTS, GROUPS, PILE


@dataclass(frozen=True)
class ComponentCounts:
    """Amount of text. `a + b` is the text of both."""

    documents: int = 0
    bytes: int = 0
    """UTF-8, without end-of-document tokens."""
    tokens: int = 0
    """Without end-of-document tokens."""

    def __add__(self, other: ComponentCounts) -> ComponentCounts:
        return ComponentCounts(self.documents + other.documents, self.bytes + other.bytes, self.tokens + other.tokens)

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / self.bytes if self.bytes else math.nan


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of some text under a model. `a + b` is that of both."""

    loglikelihood: float = 0.0
    """Sum of ln p over the tokens, each scored once."""
    bytes: int = 0
    """UTF-8 of the text itself."""
    tokens: int = 0

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(
            self.loglikelihood + other.loglikelihood, self.bytes + other.bytes, self.tokens + other.tokens
        )

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte: (tokens / bytes) * loss / ln 2 (the Pile's paper, 3.1).

        The loss is the mean of -ln p over the tokens.

        Tokens and bytes are those of the whole text, so of two tokenizers neither has an advantage; nan without text.
        """
        if not self.bytes:
            return math.nan
        loss = -self.loglikelihood / self.tokens
        return self.tokens / self.bytes * loss / math.log(2)


Sum = TypeVar("Sum", ComponentCounts, Likelihood)


def by_group(components: Mapping[str, Sum]) -> dict[str, Sum]:
    """Sums over the Pile's five groups; names that are not components are left out."""
    groups: dict[str, Sum] = {}
    for group in GROUPS:
        found = [value for name, value in components.items() if name in COMPONENTS and COMPONENTS[name].group == group]
        if found:
            groups[group] = total(found)
    return groups


def total(values: Iterable[Sum]) -> Sum:
    """Sum of at least one value."""
    return reduce(add, values)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of components as the paper does, then all others by name."""
    given = set(names)
    return [component.name for component in PILE if component.name in given] + sorted(given - set(COMPONENTS))


def statistics(splits: Mapping[str, Mapping[str, ComponentCounts]]) -> dict[str, Any]:
    """Counts by split: total, groups, components, and published figures, for a JSON file."""
    content: dict[str, Any] = {}
    for split, components in splits.items():
        if not components:
            continue
        whole = total(components.values())
        content[split] = {
            "total": _row(whole, whole),
            "groups": {group: _row(counts, whole) for group, counts in by_group(components).items()},
            "components": {
                name: _row(components[name], whole) | ({"published": _published(name)} if name in COMPONENTS else {})
                for name in in_order(components)
            },
        }
    return content


def statistics_page(splits: Mapping[str, Mapping[str, ComponentCounts]]) -> str:
    """Counts by split as Markdown tables, with published figures in parentheses."""
    lines = [
        "# Components",
        "",
        "In parentheses is what the Pile's paper gives: share of the bytes after epochs and mean size of a document",
        "(table 1), tokens per byte of GPT-2's tokenizer (table 7). The tokens here are of the tokenizer that encoded",
        "the text, without those that end documents.",
    ]
    for split, components in splits.items():
        if not components:
            continue
        whole = total(components.values())
        rows = [_line(name, components[name], whole) for name in in_order(components)]
        rows += [_line(f"*{group}*", counts, whole) for group, counts in by_group(components).items()]
        rows.append(_line("**total**", whole, whole))
        lines += ["", f"## {split}", "", *HEAD, *rows]
    return "\n".join(lines) + "\n"


def likelihood_page(components: Mapping[str, Likelihood], name: str) -> str:
    """Bits per byte of a model by component and group, as a Markdown table.

    GPT-2's published ones stand beside it.
    """
    rows = [
        f"| {component} | {components[component].bytes:,} | {components[component].tokens:,} "
        f"| {components[component].bits_per_byte:.4f} "
        f"| {f'{COMPONENTS[component].gpt2_bits:.4f}' if component in COMPONENTS else ''} |"
        for component in in_order(components)
    ]
    sums = {f"*{group}*": found for group, found in by_group(components).items()}
    sums |= {"**total**": total(components.values())} if components else {}
    rows += [f"| {row} | {s.bytes:,} | {s.tokens:,} | {s.bits_per_byte:.4f} | |" for row, s in sums.items()]
    head = [
        f"| component | bytes | tokens | {name}, bits per byte | GPT-2 124M (published) |",
        "|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def _figures(counts: ComponentCounts, whole: ComponentCounts) -> dict[str, float]:
    return {
        "share": 100 * counts.bytes / whole.bytes if whole.bytes else math.nan,
        "document_kib": counts.bytes / counts.documents / 1024 if counts.documents else math.nan,
        "tokens_per_byte": counts.tokens_per_byte,
    }


def _published(name: str) -> dict[str, float]:
    known = COMPONENTS[name]
    return {
        "share": known.weight,
        "document_kib": known.document_kib,
        "tokens_per_byte": known.tokens_per_byte,
    }


def _row(counts: ComponentCounts, whole: ComponentCounts) -> dict[str, Any]:
    """Counts and figures as JSON; a figure that no text gives is null."""
    figures = {key: None if math.isnan(value) else value for key, value in _figures(counts, whole).items()}
    return asdict(counts) | figures


HEAD = (
    "| component | documents | bytes | tokens | share of bytes, % | KiB a document | tokens a byte |",
    "|---|---:|---:|---:|---:|---:|---:|",
)


def _line(name: str, counts: ComponentCounts, whole: ComponentCounts) -> str:
    known = _published(name) if name in COMPONENTS else {}
    places = {"share": 2, "document_kib": 2, "tokens_per_byte": 4}
    cells = [
        f"{value:.{places[key]}f}" + (f" ({known[key]:.{places[key]}f})" if known else "")
        for key, value in _figures(counts, whole).items()
    ]
    return f"| {name} | {counts.documents:,} | {counts.bytes:,} | {counts.tokens:,} | {' | '.join(cells)} |"
