"""Train the bundled model on a JSONL file of tales (`book`, `title`, `text`), and export it.

    torchrun --nproc_per_node 2 scripts/train_bundled.py train fairy_tales.jsonl run
    python scripts/train_bundled.py export run llama/bundled fairy_tales.jsonl 1.5 "two CPU cores"

One process per core is faster than several threads. If a run is stopped, the same command
continues it. The learning rate is constant until the last `decay_steps`, so a run may be continued
with another number of `steps`.
"""

import hashlib
import json
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import fire
import torch
from bundled_corpus import Tale, read_corpus
from bundled_dialogs import SHORTEST_STORY, DialogSource
from torch import Tensor

from llama import Llama, parallel
from llama.chat_format import ChatFormat
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import open_checkpoint, run_checkpoints
from llama.evaluation.perplexity import score
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer
from llama.training.chat_data import Example, padded, to_batch
from llama.training.loop import StepReport, Trainer, TrainingOptions
from llama.training.optimizer import Muon
from llama.training.vocabulary import train_vocabulary

FILES = ("fairy_tales.jsonl", "children_books.jsonl")
RANKS = 6144
CONTEXT = 1024
SHAPE: dict[str, Any] = dict(
    dim=256, n_layers=6, n_heads=4, n_kv_heads=2, hidden_dim=704, rope_theta=10000.0,
    max_seq_len=CONTEXT, context_length=CONTEXT, tied=True,
)  # fmt: skip
BATCH = 4096  # tokens
# The rows of the batches, in turn: dialogs in rows of 256, 512 or 1,024 tokens, or windows of the
# tales (None). Short rows need less attention, and most stories are short.
TURNS = [256, None, 512, 256, None, 512, 256, None, 512, 256,
         None, 1024, 256, None, 512, 256, None, 512, 1024, None]  # fmt: skip


class StoryLoader:
    """Endless batches of 4,096 tokens: windows of the tales, or rows of whole dialogs.

    Every epoch cuts the tales into other windows. The content of a batch depends only on its
    number, so that number is the state of the loader.
    """

    def __init__(self, tales: list[Tale], tokenizer: Tokenizer, rank: int, ranks: int):
        self.tales = [tokenizer.encode(tale.text, bos=False, eos=True) for tale in tales]
        self.dialogs = DialogSource(tales, ChatFormat(tokenizer))
        self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id
        self.rank, self.ranks = rank, ranks
        self.batch = 0  # number of the next batch, counted over all ranks
        self.epoch, self.windows = -1, self._cut(0)
        self.windows_an_epoch = len(self.windows)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        number = self.batch + self.rank
        self.batch += self.ranks
        turn, index = divmod(number, len(TURNS))
        length = TURNS[index] or CONTEXT
        count = BATCH // length
        rows = [Example([], []) for _ in range(count)]
        if TURNS[index] is None:
            first = (turn * TURNS.count(None) + TURNS[:index].count(None)) * count
            rows = [self._window(first + i) for i in range(count)]
        rng = random.Random(f"batch {number}")
        return to_batch([self._filled(rng, row, length + 1) for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]

    def _window(self, number: int) -> Example:
        """The window with this number, at most CONTEXT + 1 tokens."""
        epoch, index = divmod(number, self.windows_an_epoch)
        if epoch != self.epoch:
            self.epoch, self.windows = epoch, self._cut(epoch)
        window = self.windows[index % len(self.windows)]
        return Example(window, [False] + [True] * (len(window) - 1))

    def _cut(self, epoch: int) -> list[list[int]]:
        """The windows of an epoch, shuffled, each with a bos before it."""
        rng = random.Random(f"epoch {epoch}")
        windows = []
        for tale in self.tales:
            for start in range(-rng.randrange(CONTEXT), len(tale), CONTEXT):
                window = tale[max(0, start) : start + CONTEXT]
                if len(window) >= 64:
                    windows.append([self.bos, *window])
        rng.shuffle(windows)
        return windows

    def _filled(self, rng: random.Random, row: Example, length: int) -> Example:
        """The row with dialogs after it, filled up to `length` tokens."""
        row = Example(list(row.tokens), list(row.learned))
        while (room := length - len(row)) > 40:
            if room < SHORTEST_STORY and row.tokens and rng.random() < 0.85:
                break  # so that answers about the model itself, which fit, stay rare
            if dialog := self.dialogs.draw(rng, room):
                row.tokens += dialog.tokens
                row.learned += dialog.learned
        return padded(row, length, self.eos)


def make_optimizers(model: Transformer, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, and AdamW for the embedding and the norms. Norms have no
    weight decay."""
    layers = [w for w in model.layers.parameters() if w.dim() == 2]
    norms = [w for w in model.parameters() if w.dim() == 1]
    groups = [
        {"params": [model.tok_embeddings.weight], "weight_decay": 0.1},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        Muon(layers, learning_rate=muon),
        torch.optim.AdamW(groups, lr=adam, betas=(0.9, 0.95), fused=True),
    ]


def train(
    corpus: str,
    out_dir: str,
    steps: int = 1300,
    decay_steps: int = 550,
    step_tokens: int = 8192,
    muon: float = 0.02,
    adam: float = 0.003,
    checkpoint_every: int = 50,
    bfloat16: bool = True,
) -> None:
    """Start a run, or continue the run in out_dir.

    Args:
        corpus: folder of the two files of tales.
        out_dir: folder for the tokenizer and the checkpoints.
        steps: optimizer steps of the whole run.
        decay_steps: steps at the end, in which the learning rate falls linearly to 0.
        step_tokens: tokens of a step, on all ranks together.
        muon: learning rate of the layers' matrices.
        adam: learning rate of the embedding and the norms.
        checkpoint_every: steps between checkpoints.
        bfloat16: compute matrix products in bfloat16.
    """
    parallel.TIMEOUT = timedelta(hours=2)  # a user may suspend a run in the background for hours
    parallel.initialize(1)
    ranks, rank = parallel.dp_size(), parallel.dp_rank()
    tokenizer_path = Path(out_dir, "tokenizer.model")
    tales = read_corpus([Path(corpus, name) for name in FILES]).training
    if parallel.is_main_rank() and not tokenizer_path.exists():
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        train_vocabulary((tale.text for tale in tales), RANKS, tokenizer_path)
    if ranks > 1:
        torch.distributed.barrier()
    tokenizer = Tokenizer(tokenizer_path)

    torch.manual_seed(1)
    model = Transformer(ModelArgs(**SHAPE, vocab_size=tokenizer.n_words))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(
                ("wo.weight", "w2.weight")
            ):  # an untrained block adds nothing to its input
                weight.zero_()
    options = TrainingOptions(
        steps=steps,
        warmup_steps=20,
        decay_steps=decay_steps,
        final_lr=0.0,
        accumulation=step_tokens // (BATCH * ranks),
        checkpoint_every=checkpoint_every,
        autocast=torch.bfloat16 if bfloat16 else None,
    )

    def report(trainer: Trainer, step: StepReport) -> None:
        if parallel.is_main_rank():
            speed = step_tokens / step.seconds
            print(
                f"{time.strftime('%H:%M:%S')} step {step.step} loss {step.loss:.4f} "
                f"norm {step.norm:.3f} {speed:.0f} tokens/s",
                flush=True,
            )

    trainer = Trainer(
        model,
        make_optimizers(model, muon, adam),
        StoryLoader(tales, tokenizer, rank, ranks),
        tokenizer.bos_id,
        options,
        out_dir,
        tokenizer_path,
        on_step=report,
    )
    if trainer.resume() and parallel.is_main_rank():
        print(f"Continuing after step {trainer.step}")
    trainer.run()


def export(run: str, bundled: str, corpus: str, hours: float, machine: str) -> None:
    """Write a run's last checkpoint as the bundled model: bfloat16, two shards, model card.

    Args:
        run: the out_dir of `train`.
        bundled: the folder to write, llama/bundled.
        corpus: the file that `train` read; it gives the held-out texts and the list of books.
        hours: duration of the training, for the card.
        machine: the machine that trained, for the card.
    """
    folder, last = Path(bundled), run_checkpoints(Path(run))[-1]
    convert(last, folder, to="meta", mp=2, dtype="bfloat16", force=True)

    texts, held_out = read_tales(corpus)
    result = score(Llama.build(folder, dtype="float32", device="cpu"), held_out, CONTEXT)
    step = int(last.name.removeprefix("step_"))
    loader = torch.load(last / "training.00.pt", weights_only=True)["loader"]
    shapes = open_checkpoint(folder).args.parameter_shapes().values()
    size = sum(torch.Size(shape).numel() for shape in shapes)
    lines = Path(corpus).read_text(encoding="utf-8").splitlines()
    books = sorted({json.loads(line)["book"] for line in lines})
    card = Path(__file__).with_name("bundled_card.md").read_text(encoding="utf-8")
    facts = {
        "parameters": f"{size / 1e6:.2f} million",
        "ranks": f"{RANKS:,}",
        "tales": str(len(texts) + len(held_out)),
        "train_tales": str(len(texts)),
        "held_out": str(len(held_out)),
        "books": "\n".join(f"- {book}" for book in books),
        "bits": f"{result.bits_per_byte:.3f}",
        "perplexity": f"{result.perplexity:.1f}",
        "bytes": f"{result.bytes:,}",
        "steps": f"{step:,}",
        "tokens": f"{loader['row'] * CONTEXT / 1e6:.1f} million",
        "hours": f"{hours:g}",
        "machine": machine,
    }
    for key, value in facts.items():
        card = card.replace(f"{{{key}}}", value)
    (folder / "README.md").write_text(card, encoding="utf-8")
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{result.bits_per_byte:.4f} bits a byte on held-out tales; {total:,} bytes in {folder}")


if __name__ == "__main__":
    fire.Fire({"train": train, "export": export})
