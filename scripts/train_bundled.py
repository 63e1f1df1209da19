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
from bundled_dialogs import DialogSource
from torch import Tensor

from llama import Llama, parallel
from llama.chat_format import ChatFormat
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import open_checkpoint, run_checkpoints
from llama.evaluation.perplexity import score
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer
from llama.training.chat_data import Example, to_batch
from llama.training.loop import StepReport, Trainer, TrainingOptions
from llama.training.optimizer import Muon
from llama.training.vocabulary import train_vocabulary

RANKS = 4096
CONTEXT = 512
SHAPE: dict[str, Any] = dict(
    dim=256, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=640, rope_theta=10000.0,
    max_seq_len=CONTEXT, context_length=CONTEXT, tied=True,
)  # fmt: skip
HELD_OUT = 0.05  # fraction of the titles
CHAT_SHARE = 0.2  # fraction of the rows that begin with a dialog, not with a tale


def read_tales(corpus: str) -> tuple[list[str], list[str]]:
    """The texts to train on, and the held-out texts. A hash of the title chooses, so tales with the
    same title, in several books, are either all trained on or all held out."""
    lines = Path(corpus).read_text(encoding="utf-8").splitlines()
    tales = [(t["title"].casefold(), t["text"]) for t in map(json.loads, lines)]
    titles = sorted({t for t, _ in tales}, key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    held_out = set(titles[: round(len(titles) * HELD_OUT)])
    return (
        [text for title, text in tales if title not in held_out],
        [text for title, text in tales if title in held_out],
    )


class TaleLoader:
    """Endless batches of rows of CONTEXT + 1 tokens.

    A row is bos and a window of a tale, or dialogs. Every epoch cuts the tales into other windows.
    The content of a row depends only on its number, so that number is the state of the loader.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer, rows: int, rank: int, ranks: int):
        self.tales = [tokenizer.encode(text, bos=False, eos=True) for text in texts]
        self.dialogs = DialogSource(texts, ChatFormat(tokenizer))
        self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id
        self.rows, self.rank, self.ranks = rows, rank, ranks
        self.row = 0  # number of the next row, counted over all ranks
        self.epoch, self.windows = -1, self._cut(0)
        self.rows_an_epoch = len(self.windows)

    def _cut(self, epoch: int) -> list[list[int]]:
        """The windows of an epoch, shuffled, each with a bos before it."""
        rng = random.Random(f"epoch {epoch}")
        windows = []
        for tale in self.tales:
            for start in range(-rng.randrange(CONTEXT), len(tale), CONTEXT):
                window = tale[max(0, start) : start + CONTEXT]
                if len(window) >= 32:
                    windows.append([self.bos, *window])
        rng.shuffle(windows)
        return windows

    def _row(self, number: int) -> Example:
        """The row with this number, CONTEXT + 1 tokens."""
        rng = random.Random(f"row {number}")
        row = Example([], [])
        is_chat = rng.random() < CHAT_SHARE
        if not is_chat:
            epoch, index = divmod(number, self.rows_an_epoch)
            if epoch != self.epoch:
                self.epoch, self.windows = epoch, self._cut(epoch)
            window = self.windows[index % len(self.windows)]
            row.tokens += window
            row.learned += [False] + [True] * (len(window) - 1)
        while (room := CONTEXT + 1 - len(row)) > 40:  # dialogs also fill the rest of a short window
            dialog = self.dialogs.draw(rng, room)
            if dialog is not None:
                row.tokens += dialog.tokens
                row.learned += dialog.learned
        row.tokens += [self.eos] * room
        row.learned += [False] * room
        return row

    def next_batch(self) -> tuple[Tensor, Tensor]:
        first = self.row + self.rank * self.rows
        self.row += self.rows * self.ranks
        return to_batch([self._row(first + i) for i in range(self.rows)])

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row = state["row"]


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
    rows: int = 4,
    step_rows: int = 16,
    muon: float = 0.02,
    adam: float = 0.003,
    checkpoint_every: int = 50,
) -> None:
    """Start a run, or continue the run in out_dir.

    Args:
        corpus: JSONL file with book, title and text.
        out_dir: folder for the tokenizer and the checkpoints.
        steps: optimizer steps of the whole run.
        decay_steps: steps at the end, in which the learning rate falls linearly to 0.
        rows: rows of 512 tokens that a rank computes at a time.
        step_rows: rows of a step on all ranks together.
        muon: learning rate of the layers' matrices.
        adam: learning rate of the embedding and the norms.
        checkpoint_every: steps between checkpoints.
    """
    parallel.TIMEOUT = timedelta(hours=2)  # a user may suspend a run in the background for hours
    parallel.initialize(1)
    ranks, rank = parallel.dp_size(), parallel.dp_rank()
    tokenizer_path = Path(out_dir, "tokenizer.model")
    texts, _ = read_tales(corpus)
    if parallel.is_main_rank() and not tokenizer_path.exists():
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        train_vocabulary(texts, RANKS, tokenizer_path)
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
        accumulation=step_rows // (rows * ranks),
        checkpoint_every=checkpoint_every,
    )

    def report(trainer: Trainer, step: StepReport) -> None:
        if parallel.is_main_rank():
            speed = step_rows * CONTEXT / step.seconds
            print(
                f"{time.strftime('%H:%M:%S')} step {step.step} loss {step.loss:.4f} "
                f"norm {step.norm:.3f} {speed:.0f} tokens/s",
                flush=True,
            )

    trainer = Trainer(
        model,
        make_optimizers(model, muon, adam),
        TaleLoader(texts, tokenizer, rows, rank, ranks),
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
