"""Small models trained here, in minutes, on the standard library's source: for benchmarks that random weights mislead.

Everything lies in a folder and is made once, by the commands that users have: the text, a tokenizer, a run a shape.
"""

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 10  # one file in so many


def text(folder, limit=None):
    """(prefix of the tokens to train on, texts held out); which file is which depends on its name alone."""
    if limit:  # a trial of its own: what it makes is not taken for the whole
        folder = folder / f"first-{limit}"
    kept, held_out, size = [], [], 0
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if "site-packages" in name or "/test" in name or (limit and size > limit):
            continue
        content = path.read_text("utf-8", errors="ignore")
        size += len(content)
        digest = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        (held_out if digest % HELD_OUT == 0 else kept).append(content)
    prefix = folder / "source"
    if not prefix.with_suffix(".idx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = folder / "source.jsonl"
        lines.write_text("".join(json.dumps({"text": content}) + "\n" for content in kept))
        neox("prepare", lines, f"out={prefix}", "vocab_size=4096")
    return prefix, [content for content in held_out if content.strip()]


def run(prefix, name, *options):
    """The run directory of a model trained on what `text` gave; one that is there is finished, or taken as it is."""
    out = prefix.parent / name
    common = (f"data.train={prefix}", f"tokenizer.path={prefix}-tokenizer.json", "model.vocab_size=4096", "lr=2e-3")
    neox("train", *common, *options, f"out={out}", "resume=auto")
    return out


def neox(*arguments):
    subprocess.run([sys.executable, "-m", "neox", *map(str, arguments)], cwd=ROOT, check=True, stdout=sys.stderr)
