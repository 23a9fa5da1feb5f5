"""Trainer hook that generates sample text during training, without any effect on the run."""

from pathlib import Path

from neox.config import Config
from neox.generate import Engine, Sampling
from neox.model.decoder import GPTNeoX
from neox.system.files import read_rows
from neox.tokenizer import Tokenizer
from neox.train import Trainer


class SampleHook:
    """Generate from `log.sample_prompt` before the first step, every `log.sample_every` steps, and after the last.

    `Trainer(config, hooks=(SampleHook(config),))`; does nothing if `log.sample_every` is 0. It samples with
    the options of the section `generate` and the same seed each time; the text goes to the trainer's sinks. The losses
    are bit-identical to those of a run without the hook.
    """

    def __init__(self, config: Config) -> None:
        log = config.log
        self.every, self.prompt, self.last = log.sample_every, log.sample_prompt, config.train.steps
        options = {key: getattr(config.generate, key) for key in ("temperature", "top_k", "top_p", "seed")}
        self.sampling = Sampling(max_tokens=log.sample_tokens, **options)
        self.tokenizer: Tokenizer | None = None

    def __call__(self, trainer: Trainer, step: int) -> None:
        """Generate where a sample is due.

        Raises ValueError before the first step if the run has no tokenizer or the prompt fills the context.
        """
        if not self.every:
            return
        if self.tokenizer is None:
            self._begin(trainer)
            if step and trainer.processes.all_reduce_max(_is_sampled(trainer.run, step)):
                return  # a resumed run: its samples up to here are kept
        if step % self.every and step != self.last:
            return
        model = trainer.whole_model()
        if model is not None:  # on rank 0
            trainer.sinks.sample({"step": step, "prompt": self.prompt, "text": self._text(model)})

    def _begin(self, trainer: Trainer) -> None:
        file = trainer.run / "tokenizer.json"
        if not file.exists():
            raise ValueError(
                f"log.sample_every is set, but {trainer.run} has no tokenizer to write text with: "
                "set tokenizer.path, or log.sample_every=0"
            )
        self.tokenizer = Tokenizer.from_file(file)
        context = trainer.config.model.max_position_embeddings
        if (length := len(self.tokenizer.encode(self.prompt))) >= context:
            raise ValueError(f"log.sample_prompt: has {length} tokens, the context {context}: shorten it")

    def _text(self, model: GPTNeoX) -> str:
        training = model.training
        try:
            # Draws from a generator of its own, and puts the model into evaluation mode.
            return Engine(model, self.tokenizer, slots=1).generate(self.prompt, self.sampling)[0].text
        finally:
            model.train(training)


def _is_sampled(run: Path, step: int) -> bool:
    samples = run / "samples.jsonl"
    return samples.exists() and any(row.get("step") == step for row in read_rows(samples))
