"""The Pile as published: 22 components in five groups; open substitutes.

Sources: the Pile's paper (Gao et al. 2020, arXiv 2101.00027), tables 1, 2, 5 and 7, for the figures and the rights; the
GPT-NeoX-20B paper (arXiv 2204.06745), section 3.1, for the groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Group = Literal["academic", "internet", "prose", "dialogue", "miscellaneous"]
GROUPS: tuple[Group, ...] = get_args(Group)
Rights = Literal["author", "terms", "neither"]
"""What the paper's table 5 found: use within the source's terms and with its authors' consent, within the terms alone,
or neither."""


@dataclass(frozen=True)
class Component:
    """One of the 22 components of the Pile, with its published figures."""

    name: str
    """Its `meta.pile_set_name` in the released files."""
    group: Group
    raw_gib: float
    """Size before epochs, GiB of UTF-8."""
    weight: float
    """Share of the bytes of the whole after epochs, percent."""
    epochs: float
    document_kib: float
    """Mean size of a document, KiB of UTF-8."""
    tokens_per_byte: float
    """Of GPT-2's tokenizer."""
    gpt2_bits: float
    """Bits per byte of the smallest GPT-2 (124M) on a tenth of the test set."""
    rights: Rights


# fmt: off
PILE = tuple(Component(*row) for row in (
    # pile_set_name        group            GiB     weight  epochs  KiB/doc  tok/byte  GPT-2   rights
    ("Pile-CC",            "internet",      227.12, 18.11,  1.0,      4.33,  .2291,    1.0878, "terms"),
    ("PubMed Central",     "academic",       90.27, 14.40,  2.0,     30.55,  .3103,    1.0759, "author"),
    ("Books3",             "prose",         100.96, 12.07,  1.5,    538.36,  .2477,    1.1959, "neither"),
    ("OpenWebText2",       "internet",       62.77, 10.01,  2.0,      3.85,  .2434,    1.1111, "neither"),
    ("ArXiv",              "academic",       56.21,  8.96,  2.0,     46.61,  .3532,    1.3548, "author"),
    ("Github",             "miscellaneous",  95.16,  7.59,  1.0,      5.25,  .4412,    1.7912, "terms"),
    ("FreeLaw",            "academic",       51.15,  6.12,  1.5,     15.06,  .2622,    1.0512, "author"),
    ("StackExchange",      "internet",       32.20,  5.13,  2.0,      2.16,  .3436,    1.2981, "author"),
    ("USPTO Backgrounds",  "academic",       22.90,  3.65,  2.0,      4.08,  .2116,    0.8288, "author"),
    ("PubMed Abstracts",   "academic",       19.26,  3.07,  2.0,      1.30,  .2183,    0.9524, "author"),
    ("Gutenberg (PG-19)",  "prose",          10.88,  2.17,  2.5,    398.73,  .2677,    1.2655, "terms"),
    ("OpenSubtitles",      "dialogue",       12.98,  1.55,  1.5,     30.48,  .2765,    1.2465, "neither"),
    ("Wikipedia (en)",     "internet",        6.38,  1.53,  3.0,      1.11,  .2373,    1.1285, "author"),
    ("DM Mathematics",     "miscellaneous",   7.75,  1.24,  2.0,      8.00,  .8137,    2.6911, "author"),
    ("Ubuntu IRC",         "dialogue",        5.52,  0.88,  2.0,    545.48,  .3651,    1.8466, "author"),
    ("BookCorpus2",        "prose",           6.30,  0.75,  1.5,    369.87,  .2430,    1.1295, "neither"),
    ("EuroParl",           "dialogue",        4.59,  0.73,  2.0,     68.87,  .3879,    2.3177, "author"),
    ("HackerNews",         "dialogue",        3.90,  0.62,  2.0,      4.92,  .2627,    1.4433, "terms"),
    ("YoutubeSubtitles",   "dialogue",        3.73,  0.60,  2.0,     22.55,  .4349,    2.0387, "neither"),
    ("PhilPapers",         "academic",        2.38,  0.38,  2.0,     73.37,  .2688,    1.3203, "author"),
    ("NIH ExPorter",       "academic",        1.89,  0.30,  2.0,      2.11,  .1987,    0.9099, "author"),
    ("Enron Emails",       "miscellaneous",   0.88,  0.14,  2.0,      1.78,  .3103,    1.5888, "terms"),
))
# fmt: on

COMPONENTS = {component.name: component for component in PILE}

STAND_INS = {
    "pile-uncopyrighted": "hf:monology/pile-uncopyrighted",
    "pile-deduplicated": "hf:EleutherAI/the_pile_deduplicated",
    "common-pile": "hf:common-pile/comma_v0.1_training_dataset",
    "fineweb-10bt": "hf:HuggingFaceFW/fineweb:sample-10BT",
    "fineweb-100bt": "hf:HuggingFaceFW/fineweb:sample-100BT",
    "fineweb-edu-10bt": "hf:HuggingFaceFW/fineweb-edu:sample-10BT",
}
"""Open data sets that can be had where the Pile cannot, by the name that `neox prepare` takes for them."""


def stand_in(name: str) -> str:
    """Source behind a name: a data set of the hub for STAND_INS, else the name."""
    return STAND_INS.get(name, name)
