"""Train the bundled model on two files of tales (`book`, `title`, `text`), and export it.

    python scripts/train_bundled.py train CORPUS run
    python scripts/train_bundled.py refine CORPUS run refined
    python scripts/train_bundled.py export refined llama/bundled
    python scripts/train_bundled.py texts CORPUS texts
    python benchmarks/stories.py llama/bundled --texts texts --out stories.json
    python scripts/train_bundled.py card CORPUS refined llama/bundled stories.json --hours 3 \
        --machine …

If a run is stopped, the same command continues it, also on another kind of machine. The learning
rate is constant until the last `decay_steps`, so a run may be continued with another number of
`steps`.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fire
import torch
from bundled_corpus import PREJUDICE, Tale, read_corpus
from bundled_loader import BATCH, CONTEXT, StoryLoader
from bundled_refine import WithUnlikelihood

from llama import Llama, parallel
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import open_checkpoint, run_checkpoints
from llama.errors import DataError, LlamaError
from llama.fast.cpu.kernels.isa import instruction_sets
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer
from llama.training.log import TrainingLog
from llama.training.loop import Trainer, TrainingOptions
from llama.training.optimizer import muon_and_adamw
from llama.training.vocabulary import train_vocabulary

SHAPE: dict[str, Any] = dict(
    dim=256, n_layers=6, n_heads=4, n_kv_heads=2, hidden_dim=704, rope_theta=10000.0,
    max_seq_len=CONTEXT, context_length=CONTEXT, tied=True,
)  # fmt: skip
WARMUP_STEPS = 20
# The stories of the card.
REQUESTS = """Tell me a story about a fox and a king
Tell me a story about a clock and a garden
Write a short tale with an owl in it
Tell me a story about a sailor and an island
A story about a girl named Rose, please
Tell me a story about a lamp and a spider
Write a story about a pirate and a balloon
Tell me a fairy tale
Continue this story: Once there was a little bear who was afraid of the dark.
I would like to hear a long story about a giant""".splitlines()


def train(
    corpus: str,
    run: str,
    init: str | None = None,
    steps: int = 3000,
    decay_steps: int = 1000,
    step_tokens: int = 2 * BATCH,
    ranks: int = 6144,
    muon: float = 0.02,
    adam: float = 0.003,
    checkpoint_every: int = 100,
    device: str | None = None,
    bfloat16: bool | None = None,
    compiled: bool | None = None,
) -> None:
    """Start a run, or continue the run in a folder.

    Args:
        corpus: folder of the two files of tales.
        run: folder for the tokenizer and the checkpoints.
        init: checkpoint folder with this shape, whose weights and tokenizer begin the run; by
            default new ones.
        steps: optimizer steps of the whole run.
        decay_steps: steps at the end, in which the learning rate falls linearly to 0.
        step_tokens: tokens of a step; a multiple of 4,096.
        ranks: byte sequences of the vocabulary.
        muon: learning rate of the layers' matrices.
        adam: learning rate of the embedding and the norms.
        checkpoint_every: steps between checkpoints.
        device: such as cuda or cpu; by default a GPU if there is one.
        bfloat16: compute matrix products in bfloat16; by default where the device has instructions
            for it.
        compiled: compile the layers by torch.compile; by default on a GPU.
    """
    target = parallel.local_device(device)
    parallel.initialize(1, target)
    if step_tokens % BATCH or step_tokens < BATCH:
        raise DataError(f"step_tokens is {step_tokens}: it must be a multiple of {BATCH}")
    begun = None if init is None else _weights_of(init)
    tales = read_corpus(corpus).training
    tokenizer_path = Path(run, "tokenizer.model")
    if not tokenizer_path.exists():
        Path(run).mkdir(parents=True, exist_ok=True)
        if init is None:
            train_vocabulary((tale.text for tale in tales), ranks, tokenizer_path)
        else:
            shutil.copy(Path(init, "tokenizer.model"), tokenizer_path)
    options = TrainingOptions(
        steps=steps,
        warmup_steps=min(WARMUP_STEPS, steps - decay_steps),
        decay_steps=decay_steps,
        final_lr=0.0,
        accumulation=step_tokens // BATCH,
        autocast=torch.bfloat16 if _or_default(bfloat16, _has_bfloat16(target)) else None,
        checkpoint_every=checkpoint_every,
    )
    trainer, _ = _make_trainer(tales, run, options, target, muon, adam)
    if trainer.resume():
        print(f"Continuing after step {trainer.step} of {run}")
    elif begun is not None:
        trainer.model.load_state_dict(begun)
    if _or_default(compiled, target.type == "cuda"):
        for layer in trainer.model.layers:
            layer.compile()
    _run(trainer)


def refine(
    corpus: str,
    run: str,
    refined: str,
    steps: int = 120,
    rate: float = 1.0,
    muon: float = 0.003,
    adam: float = 0.0005,
    device: str | None = None,
    bfloat16: bool | None = None,
) -> None:
    """Train the last checkpoint of a run further, so that its stories repeat less.

    Args:
        corpus: folder of the two files of tales.
        run: the folder of `train`.
        refined: folder for the checkpoints, which `export` and `card` take too.
        steps: optimizer steps of 4,096 tokens and eight stories.
        rate: weight of a repeat in the loss, beside a token of the batch.
        muon: learning rate of the layers' matrices at the first step; it falls linearly to 0.
        adam: learning rate of the embedding and the norms.
        device: such as cuda or cpu; by default a GPU if there is one.
        bfloat16: compute matrix products in bfloat16; by default where the device has instructions
            for it.
    """
    target = parallel.local_device(device)
    parallel.initialize(1, target)
    tales = read_corpus(corpus).training
    last = _last(run)
    if not run_checkpoints(Path(refined)):
        shutil.copytree(last, Path(refined, last.name))
        shutil.copy(Path(run, "tokenizer.model"), refined)
    options = TrainingOptions(
        steps=int(last.name.removeprefix("step_")) + steps,
        warmup_steps=0,
        decay_steps=steps,
        final_lr=0.0,
        autocast=torch.bfloat16 if _or_default(bfloat16, _has_bfloat16(target)) else None,
        checkpoint_every=20,
    )
    trainer, loader = _make_trainer(tales, refined, options, target, muon, adam)
    trainer.resume()
    tokenizer = Tokenizer(Path(refined, "tokenizer.model"))
    trainer.loss = WithUnlikelihood(trainer.loss, trainer.model, tokenizer, loader.dialogs, rate)
    _run(trainer)


def _make_trainer(
    tales: Sequence[Tale],
    run: str,
    options: TrainingOptions,
    device: torch.device,
    muon: float,
    adam: float,
) -> tuple[Trainer, StoryLoader]:
    """A trainer of the untrained model, and its loader."""
    path = Path(run, "tokenizer.model")
    tokenizer = Tokenizer(path)
    model, loader = _new_model(tokenizer, device), StoryLoader(tales, tokenizer)
    optimizers = muon_and_adamw(model, muon, adam)
    log = TrainingLog(tokenizer, options.accumulation * BATCH)
    trainer = Trainer(model, optimizers, loader, tokenizer.bos_id, options, run, path, on_step=log)
    return trainer, loader


def _run(trainer: Trainer) -> None:
    try:
        trainer.run()
    finally:
        trainer.on_step.close()  # type: ignore[union-attr]


def _new_model(tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """The untrained model. Its layers add nothing to their inputs."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(**SHAPE, vocab_size=tokenizer.n_words))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                weight.zero_()
    return model.to(device)


def _weights_of(folder: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint folder. Raises DataError if it has another shape than SHAPE, or
    no tokenizer.model."""
    if not Path(folder, "tokenizer.model").is_file():
        raise DataError(f"{folder} has no tokenizer.model")
    begun = Llama.build(folder, dtype="float32", device="cpu")
    shapes = begun.model.params.parameter_shapes()
    wanted = ModelArgs(**SHAPE, vocab_size=begun.tokenizer.n_words).parameter_shapes()
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise DataError(
                f"{folder} is of another model: {name} is {shapes.get(name)}, not "
                f"{wanted.get(name)}"
            )
    return begun.model.state_dict()


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or "avx512bf16" in instruction_sets()


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def texts(corpus: str, folder: str) -> None:
    """Write the texts to train on and the held-out ones as JSONL files, for the benchmarks.

    Args:
        corpus: folder of the two files of tales.
        folder: gets training.jsonl, held_out_titles.jsonl and held_out_books.jsonl.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, tales in vars(read_corpus(corpus)).items():
        lines = [json.dumps(asdict(tale)) + "\n" for tale in tales]
        Path(folder, f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def export(run: str, folder: str) -> None:
    """Write the last checkpoint of a run as a checkpoint of two Meta shards in bfloat16.

    Args:
        run: the folder of `train`.
        folder: the folder to write, such as llama/bundled.
    """
    convert(_last(run), folder, to="meta", mp=2, dtype="bfloat16", force=True)
    total = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(f"{total:,} bytes in {folder}")


def card(corpus: str, run: str, folder: str, figures: str, hours: float, machine: str) -> None:
    """Write README.md of the exported model: what it is, its figures and ten stories.

    Args:
        corpus: folder of the two files of tales.
        run: the folder of `train`.
        folder: the folder of `export`.
        figures: file that benchmarks/stories.py wrote, of the model before, of this one before
            `refine`, and of this one.
        hours: duration of the training.
        machine: the machine that trained.
    """
    texts = read_corpus(corpus)
    llama = Llama.build(folder, dtype="float32", device="cpu")
    last = _last(run)
    batches = torch.load(last / "training.00.pt", weights_only=True)["loader"]["batch"]
    shapes = open_checkpoint(Path(folder)).args.parameter_shapes().values()
    models = list(json.loads(Path(figures).read_text(encoding="utf-8"))["models"].values())
    facts = {
        "parameters": f"{sum(torch.Size(shape).numel() for shape in shapes) / 1e6:.2f} million",
        "layers": str(SHAPE["n_layers"]),
        "hidden": str(SHAPE["hidden_dim"]),
        "ranks": f"{llama.tokenizer.n_words - 256:,}",
        "context": f"{CONTEXT:,}",
        "tales": f"{len(texts.training):,}",
        "characters": f"{sum(len(tale.text) for tale in texts.training) / 1e6:.1f} million",
        "titles": str(len(texts.held_out_titles)),
        "held_out_books": _list({tale.book for tale in texts.held_out_books}),
        "books": _list({tale.book for tale in texts.training}),
        "left_out": _list(f"{book}, {title}: {why}" for (book, title), why in PREJUDICE.items()),
        "steps": f"{int(last.name.removeprefix('step_')):,}",
        "tokens": f"{batches * BATCH / 1e6:.1f} million",
        "hours": f"{hours:g}",
        "machine": machine,
        "loops": f"{models[-2]['all']['distinct 4-grams']:.0%}",
        "distinct": f"{models[-1]['all']['distinct 4-grams']:.0%}",
        "figures": _table(models[0], models[-1]),
        "stories": "\n\n".join(_story(llama, request) for request in REQUESTS),
    }
    text = Path(__file__).with_name("bundled_card.md").read_text(encoding="utf-8")
    for key, value in facts.items():
        text = text.replace(f"{{{key}}}", value)
    Path(folder, "README.md").write_text(text, encoding="utf-8")


def _last(run: str) -> Path:
    found = run_checkpoints(Path(run))
    if not found:
        raise DataError(f"{run} has no checkpoint")
    return found[-1]


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in sorted(lines))


def _table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The figures of two models, side by side."""
    lines = ["| | before | now |", "| --- | --- | --- |"]
    for group, row in after.items():
        for name, value in row.items():
            old = before[group][name]
            lines.append(f"| {name} ({group}) | {old:.3f} | {value:.3f} |")
    return "\n".join(lines)


def _story(llama: Llama, request: str) -> str:
    dialog = [{"role": "user", "content": request}]
    (answer,) = llama.chat_completion([dialog], temperature=0.6, seed=1)  # type: ignore[list-item]
    quoted = answer["generation"]["content"].replace("\n", "\n> ")
    return f"**{request}**\n\n> {quoted}"


if __name__ == "__main__":
    try:
        fire.Fire(
            {"train": train, "refine": refine, "export": export, "texts": texts, "card": card}
        )
    except LlamaError as error:
        print(f"train_bundled.py: {error}", file=sys.stderr)
        sys.exit(2)
