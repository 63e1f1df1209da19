"""The log of a run: a progress bar, TensorBoard scalars and sample texts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama import parallel
from llama.generation import Llama
from llama.tensorboard_files import summary_writer
from llama.terminal_text import without_controls
from llama.tokenizer import Tokenizer
from llama.training.loop import StepReport, Trainer


class TrainingLog:
    """Reports every step of a `Trainer` that has it as `on_step`. Only the main rank prints.

    Args:
        tokens_per_step: tokens of a step on all ranks together, to compute the speed.
        log_dir: folder for TensorBoard; None: nothing is written.
        sample_every: steps between sample texts; 0: no samples.
        prompts: beginnings of the sample texts.

    Raises DataError if `log_dir` cannot be written, or if TensorBoard is not installed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens_per_step: int,
        log_dir: str | Path | None = None,
        sample_every: int = 0,
        prompts: Sequence[str] = ("Once upon a time",),
    ) -> None:
        self.tokenizer, self.tokens_per_step = tokenizer, tokens_per_step
        self.sample_every, self.prompts = sample_every, list(prompts)
        self.bar: tqdm[Any] | None = None
        self.writer: Any = None
        if log_dir is not None and parallel.is_main_rank():
            self.writer = summary_writer(log_dir)

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if parallel.is_main_rank():
            self._show(trainer, report)
        # Every rank generates the samples, because it holds a part of the model.
        if self.sample_every and report.step % self.sample_every == 0:
            for prompt, text in zip(self.prompts, self.samples(trainer), strict=True):
                if parallel.is_main_rank():
                    tqdm.write(without_controls(f"step {report.step}: {prompt}{text}\n"))
                    if self.writer is not None:
                        self.writer.add_text(prompt, text, report.step)

    def _show(self, trainer: Trainer, report: StepReport) -> None:
        if self.bar is None:
            self.bar = tqdm(total=trainer.options.steps, initial=report.step - 1, unit="step")
            # The bar is made after the first step, whose seconds belong to the rate it shows.
            self.bar.start_t -= report.seconds
            self.bar.last_print_t -= report.seconds
        speed = self.tokens_per_step / report.seconds
        self.bar.update(report.step - self.bar.n)
        self.bar.set_postfix_str(f"loss {report.loss:.3f}, {speed:,.0f} tokens/s")
        if report.held_out is not None:
            perplexity = math.exp(min(report.held_out, 700.0))
            tqdm.write(
                f"step {report.step}: held-out loss {report.held_out:.4f} nats a token, "
                f"perplexity {perplexity:.2f}"
            )
        if self.writer is not None:
            scalars = {
                "loss/train": report.loss,
                "gradient norm": report.norm,
                "learning rate": report.learning_rate,
                "tokens per second": speed,
            }
            if report.held_out is not None:
                scalars["loss/held out"] = report.held_out
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, report.step)

    def samples(self, trainer: Trainer) -> list[str]:
        """Greedy continuations of the prompts, of at most 128 tokens. The KV cache lives only
        during this call."""
        model = trainer.model
        llama = Llama(model, self.tokenizer, max_batch_size=1)
        length = min(128, model.params.max_seq_len // 2)
        done = llama.text_completion(self.prompts, temperature=0, max_gen_len=length)
        return [prediction["generation"] for prediction in done]

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
