"""Turn text into tokens: SOURCES in, one .bin/.idx pair out.

neox prepare SOURCE... out=PREFIX [tokenizer=tokenizer.json] [key=value ...]
neox prepare pile FOLDER out=FOLDER [tokenizer=tokenizer.json] [key=value ...]

SOURCE is a file (.txt, .jsonl, .json with a document a line; each also .gz or .zst; .parquet,
.arrow), a glob, a folder of such files, the URL of any of these (s3://, gs://, http://), a folder
that Hugging Face's save_to_disk wrote, or a data set of the hub,
hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]. PREFIX.json lists what was read and what was left out.

pile is the release of the Pile: FOLDER has 00.jsonl.zst to 29.jsonl.zst, or some of them, val and
test; train, val and test are prepared, with statistics by component and a datasheet beside them.
Open data sets of the hub have names too: pile-uncopyrighted, pile-deduplicated, common-pile,
fineweb-10bt, fineweb-100bt, fineweb-edu-10bt.

The work is cut into shards of about 64 MiB, whose parts lie in PREFIX.parts until all are done.
Interrupted and called again, it makes the missing parts; finished and called again, it reads no
more than evaluation sets. The output is the same from any number of processes.

Examples:
  neox prepare corpus.txt out=data/corpus
  neox prepare a.jsonl.zst b.parquet out=data/ab tokenizer=tokenizer.json text_key=content
  neox prepare crawl/ out=data/crawl on_error=skip
  neox prepare 's3://bucket/crawl/*.jsonl.zst' out=data/crawl tokenizer=tokenizer.json
  neox prepare hf:roneneldan/TinyStories#validation out=data/stories
  neox prepare crawl/ out=data/clean dedup=minhash decontaminate=lambada_test.jsonl
  neox prepare pile the-pile/ out=data/pile tokenizer=20B_tokenizer.json
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from neox.cli.verb import UsageError, read_all
from neox.config.sections.data import BPEConfig, PrepareConfig


class PrepareOptions(PrepareConfig, BPEConfig):
    """Options of `neox prepare`."""

    out: str = Field(default="", title="PREFIX")
    """Prefix of the output: PREFIX.bin and PREFIX.idx, PREFIX.json beside them."""
    tokenizer: str | None = Field(default=None, title="FILE")
    """File tokenizer.json to encode with, copied to PREFIX-tokenizer.json; by default one is trained on the sources."""
    overwrite: bool = False
    """Replace an output of other text or other settings; false refuses."""


OPTIONS = PrepareOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the verb."""
    chosen = read_all("prepare", PrepareOptions, options)
    if not targets:
        raise UsageError("prepare needs a SOURCE")
    out = chosen.out
    if not out:
        raise UsageError("prepare needs out=PREFIX")
    training = {key: getattr(chosen, key) for key in BPEConfig.model_fields}
    trained = sorted(chosen.model_fields_set & training.keys())
    if chosen.tokenizer and trained:
        raise UsageError(f"give tokenizer= to use one or {trained[0]}= to train one, not both")

    from neox.config.pile import stand_in
    from neox.corpus.preparation import prepare
    from neox.corpus.train_tokenizer import TRAINED, keep_tokenizer, refuse_other, trained_tokenizer
    from neox.data.token_file import beside
    from neox.tokenizer import Tokenizer

    pile = targets[0] == "pile"
    trained_to = f"{out}/train" if pile else out
    if pile:
        from neox.corpus.pile.release import find_release, prepare_pile

        if len(targets) != 2:
            raise UsageError("prepare pile needs the FOLDER of the release, and nothing else")
        sources = find_release(Path(targets[1])).splits["train"]
    else:
        # A file here comes before an open data set of that name.
        sources = [target if Path(target).exists() else stand_in(target) for target in targets]
    if chosen.tokenizer:
        tokenizer = Tokenizer.from_file(chosen.tokenizer)
        if not chosen.overwrite:
            refuse_other(tokenizer, trained_to)
    else:
        tokenizer = trained_tokenizer(sources, trained_to, training, chosen.text_key, chosen.on_error, chosen.overwrite)
        print(f"{beside(trained_to, TRAINED)}: {tokenizer.vocab_size} tokens")
    if pile:
        reports = list(prepare_pile(targets[1], out, tokenizer, chosen, overwrite=chosen.overwrite).values())
    else:
        reports = [prepare(sources, out, tokenizer, chosen, overwrite=chosen.overwrite)]
    if chosen.tokenizer:  # a run finds it there
        keep_tokenizer(tokenizer, trained_to)
    for report in reports:
        how = "done before" if report.done_before else f"{report.seconds:.1f} s"
        print(
            f"{report.prefix}.bin: {report.tokens:,} tokens of {report.documents:,} documents, "
            f"{report.bytes / max(report.tokens, 1):.2f} bytes a token, {how}"
        )
        for line in report.left_out():
            print(line)
    if pile:
        print(f"{out}/statistics.md, statistics.json: sizes by component; {out}/datasheet.md: contents, faults")
