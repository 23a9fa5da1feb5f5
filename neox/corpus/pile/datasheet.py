"""Datasheet of prepared text of the Pile: content, known problems, licences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neox.config.pile import COMPONENTS, GROUPS, PILE, Rights

RIGHTS: dict[Rights, str] = {
    "author": "within the source's terms, and its authors agreed",
    "terms": "within the source's terms; its authors were not asked",
    "neither": "neither within the source's terms nor agreed by its authors",
}

ORIGIN = """\
Collected by EleutherAI in 2020 to train large language models (Gao et al., arXiv 2101.00027, "the paper"; a datasheet
by its makers is arXiv 2201.07311). 22 sources, 825 GiB as text; 1254 GiB as released, since good sources come up to
three times (epochs). Released in 30 training shards, in random order across sources, with 0.1 % of it for validation
and as much for testing. Each document is text with the name of its source; other metadata were dropped, the order of
text within a document was kept. 97.4 % of it is English by fastText's judgement (paper)."""

PROBLEMS = """\
- **Repeats.** Only OpenWebText2 and Pile-CC were deduplicated, each by itself: 28 and 26 % were repeats (paper).
  Epochs above 1 repeat documents on purpose, and `dedup=` removes those repeats too. EleutherAI later deduplicated all
  of it: Pythia's deduplicated models saw that, 207 billion tokens.
- **Shared by training and held-out text.** Equal lines were taken out of the training shards, near-repeats were not
  looked for; some documents may be on both sides (paper).
- **Text of evaluation sets.** The release was not searched for it; the paper (appendix D.3) leaves that to the user.
  `decontaminate=` does it, by the rule that the paper used for its ablation.
- **Personal data, offensive text.** Both may be in it (paper): much of it is mail, chat and crawled pages.
- **Cut text.** Of Github, files below 100,000 characters and a sample of these; DM Mathematics is cut every 8 KiB.
- **Age.** It is of 2020: Wikipedia is the state of 1 March of that year.
- **No longer distributed** by those who hosted it (gpt-neox's issues 713, 909 and 949)."""

LICENCES = """\
There is no licence to the whole. What the paper found on the use of each source (its table 5) is in the table above.
By the card of the Open License Corpus, which took from the same sources: Wikipedia and Stack Exchange are CC BY-SA,
Gutenberg is in the public domain, DM Mathematics is under the Apache licence, HackerNews and Ubuntu IRC under MIT or
Apache. Other components hold text under many licences, or none. Whether training on it is lawful depends on where and
what for; this sheet is no legal advice. `neox prepare pile-uncopyrighted` and `common-pile` name alternatives."""


def datasheet(content: dict[str, Any], absent: Sequence[str]) -> str:
    """Write the datasheet as Markdown.

    `content` comes from `statistics`; `absent` names the missing files of the release.
    """
    found = {name for split in content.values() for name in split["components"]}
    lines = ["# Datasheet: the Pile", "", ORIGIN, "", "## What was prepared here", ""]
    for split, figures in content.items():
        total = figures["total"]
        lines.append(
            f"- {split}: {total['documents']:,} documents, {total['bytes']:,} bytes, {total['tokens']:,} tokens"
        )
    lines.append("- statistics.md has each component's share beside the published one")
    if absent:
        lines.append(f"- not there, and so not in it: {', '.join(absent)}")
    if missing := [component.name for component in PILE if component.name not in found]:
        lines.append(f"- without a document: {', '.join(missing)}")
    if unknown := sorted(found - set(COMPONENTS)):
        lines.append(f"- not components of the Pile: {', '.join(unknown)}")
    lines += [
        "",
        "| component | group | GiB | epochs | share, % | use (paper, table 5) |",
        "|---|---|---:|---:|---:|---|",
    ]
    for group in GROUPS:
        lines += [
            f"| {row.name} | {row.group} | {row.raw_gib:.2f} | {row.epochs} | {row.weight:.2f} | {RIGHTS[row.rights]} |"
            for row in PILE
            if row.group == group
        ]
    lines += ["", "## Known problems", "", PROBLEMS, "", "## Licences", "", LICENCES]
    return "\n".join(lines) + "\n"
