"""LoRA: gradients are PEFT's, ranks and checkpointing change nothing, and runs are resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import context, run_ranks
from helpers.training import ARGS, BOS, VOCAB, Rows, huggingface, make_model
from make_checkpoint import demo_pieces, write_tokenizer
from torch import Tensor

from llama import Llama, ModelArgs, Transformer, parallel
from llama.checkpoints.adapter import open_adapter
from llama.checkpoints.folder import run_checkpoints
from llama.checkpoints.params import write_params
from llama.checkpoints.shards import write_shard
from llama.errors import TrainingError
from llama.fast.gpu.device_weights import Matrix, narrow
from llama.training.adapter_folder import AdapterFolder
from llama.training.loop import Trainer, TrainingOptions, checkpoint_activations, shard_model
from llama.training.lora import TARGETS, LoraOptions, add_lora, check_base, lora_optimizer, trained
from llama.training.objective import loss_in_chunks, next_token_loss

CPU = torch.device("cpu")
LORA = LoraOptions(r=4, alpha=12)


def make_trainer(
    folder: Path,
    lora: LoraOptions = LORA,
    steps: int = 4,
    rank: int = 0,
    ranks: int = 1,
    width: str | None = None,
    fsdp: bool = False,
    saves_memory: bool = False,
    **more: Any,
) -> Trainer:
    """A trainer of changes of `make_model()`; with a width, of a wider model that is rounded."""
    model = make_model() if width is None else make_model(dim=64)
    if width is not None:
        narrow(model, width, CPU)
    add_lora(model, lora, seed=3)
    if saves_memory:
        checkpoint_activations(model)
    if fsdp:
        shard_model(model)
    optimizer = lora_optimizer(model, 1e-2, 0.0, (0.9, 0.95), "cpu")
    options = TrainingOptions(**{**dict(steps=steps, warmup_steps=2, checkpoint_every=2), **more})
    stored = AdapterFolder(lora, None)
    loader = Rows(4, 24, rank, ranks)
    return Trainer(model, [optimizer], loader, BOS, options, folder, stored=stored)


def write_base(folder: Path) -> Path:
    """`make_model()` as a folder."""
    model = make_model()
    folder.mkdir()
    write_shard(folder / "consolidated.00.pth", model.state_dict())
    write_params(folder / "params.json", model.params)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return folder


def gradients(model: Transformer) -> dict[str, Tensor]:
    for weight in model.parameters():
        weight.grad = None
    model.forward_loss(*Rows(4, 24).next_batch()).backward()
    return {name: weight.grad.clone() for name, weight in trained(model).items()}  # type: ignore[union-attr]


# ---- the changes --------------------------------------------------------------------------------


def test_a_model_begins_with_its_own_logits() -> None:
    model = make_model()
    tokens, _ = Rows(4, 24).next_batch()
    before = model(tokens)
    add_lora(model, LORA, seed=3)
    assert torch.equal(model(tokens), before)
    assert set(trained(model)) == {
        f"layers.{i}.{part}.{name}.lora_{letter}"
        for i in range(2)
        for part, names in (("attention", TARGETS[:4]), ("feed_forward", TARGETS[4:]))
        for name in names
        for letter in "AB"
    }


def test_gradients_and_logits_are_pefts(tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = make_trainer(tmp_path / "run", LoraOptions(4, 12, targets=("wq", "wk", "wo", "w2")))
    trainer.run()
    newest = run_checkpoints(tmp_path / "run")[-1]
    theirs = PeftModel.from_pretrained(huggingface(make_model()), newest, is_trainable=True)
    inputs, targets = Rows(4, 24).next_batch()
    logits = theirs(inputs).logits
    torch.testing.assert_close(trainer.model(inputs), logits, atol=1e-5, rtol=1e-5)
    next_token_loss(logits, targets).backward()
    found = gradients(trainer.model)
    # The trainer stores gradients in the place of A and B, so that names and rows are compared too.
    stored = AdapterFolder(trainer.stored.options, None)  # type: ignore[attr-defined]
    (tmp_path / "gradients").mkdir()
    stored.write(tmp_path / "gradients", trainer.model, found)
    ours = PeftModel.from_pretrained(huggingface(make_model()), tmp_path / "gradients")
    wanted = dict(theirs.named_parameters())
    n_compared = 0
    for name, weight in ours.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(weight, wanted[name].grad, atol=1e-5, rtol=1e-5)
            n_compared += 1
    assert n_compared == len(found) == 16


def test_only_the_changes_are_trained_and_the_loss_falls(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", steps=30)
    batch = trainer.loader.next_batch()
    trainer.loader.next_batch = lambda: batch  # type: ignore[method-assign]
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    losses = trainer.run()
    assert losses[-1] < 0.8 * losses[0]
    after = trainer.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(trained(trainer.model))
    state = trainer.optimizers[0].state
    assert len(state) == len(changed)


def test_llama_build_merges_what_was_trained(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run")
    trainer.run()
    tokens, _ = Rows(4, 24).next_batch()
    # The folder of a run stands for its newest checkpoint.
    for folder in (tmp_path / "run", run_checkpoints(tmp_path / "run")[-1]):
        merged = Llama.build(base, adapter=folder).model
        torch.testing.assert_close(merged(tokens), trainer.model(tokens), atol=1e-5, rtol=1e-5)


def test_checkpointed_activations_give_the_same_steps(tmp_path: Path) -> None:
    lora = LoraOptions(4, 12, dropout=0.3)
    plain = make_trainer(tmp_path / "plain", lora)
    saving = make_trainer(tmp_path / "saving", lora, saves_memory=True)
    assert saving.run() == plain.run()
    for name, weight in trained(saving.model).items():
        assert torch.equal(weight, trained(plain.model)[name]), name


@pytest.mark.parametrize("width", [None, "int8"])
def test_bfloat16_autocast(width: str | None, tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", width=width).run()
    trainer = make_trainer(tmp_path / "cast", width=width, autocast=torch.bfloat16)
    assert trainer.run() == pytest.approx(plain, abs=0.05)
    assert {weight.dtype for weight in trained(trainer.model).values()} == {torch.float32}


def test_dropout_is_for_training_only(tmp_path: Path) -> None:
    dropped = make_trainer(tmp_path / "dropped", LoraOptions(4, 12, dropout=0.5))
    plain = make_trainer(tmp_path / "plain")
    state = torch.get_rng_state()
    losses = [trainer.run() for trainer in (dropped, plain)]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    assert losses[0][0] == losses[1][0]  # B is 0
    assert losses[0][1] != losses[1][1]
    plain.resume()
    for name, weight in trained(plain.model).items():
        weight.data = trained(dropped.model)[name].data
    tokens, _ = Rows(4, 24).next_batch()
    with torch.no_grad():
        assert torch.equal(dropped.model(tokens), plain.model(tokens))


def test_a_loss_in_chunks_is_the_loss() -> None:
    model = make_model().requires_grad_(False)
    torch.manual_seed(0)
    features = torch.randn(2, 600, 32, requires_grad=True)
    targets = torch.randint(0, VOCAB, (2, 600))
    targets[0, :40] = -100
    results = []
    for loss in (
        loss_in_chunks(features, targets, model.logits),
        next_token_loss(model.logits(features), targets, reduction="sum"),
    ):
        (gradient,) = torch.autograd.grad(2 * loss, features)
        results.append((loss, gradient))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert loss_in_chunks(features, targets, model.logits).item() == results[0][0].item()


# ---- a quantized base ---------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_gradients_through_quantized_products(width: str) -> None:
    """They are those of a model with the dequantized weights."""
    quantized, dequantized = make_model(), make_model()
    narrow(quantized, width, CPU)
    for name, layer in dequantized.named_modules():
        if name.endswith((*TARGETS, "output")):
            narrow_layer: Any = quantized.get_submodule(name)
            matrix = Matrix(narrow_layer.values, narrow_layer.scales, width)
            layer.weight.data = matrix.widened(torch.float32)
    for model in (quantized, dequantized):
        add_lora(model, LORA, seed=3)
        for i, weight in enumerate(trained(model).values()):
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(i))
    found, wanted = gradients(quantized), gradients(dequantized)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5)


def test_a_quantized_base_learns(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", steps=30, width="int4")
    batch = trainer.loader.next_batch()
    trainer.loader.next_batch = lambda: batch  # type: ignore[method-assign]
    losses = trainer.run()
    assert losses[-1] < 0.8 * losses[0]
    assert make_trainer(tmp_path / "run", width="int4").resume()


# ---- ranks --------------------------------------------------------------------------------------


def train_on_rank(folder: Path, **more: Any) -> list[float]:
    """Train on this rank and the others. Returns the losses.

    Then the last checkpoint is deleted, and a new trainer resumes from the one before. Its losses
    must be the same.
    """
    place = dict(rank=parallel.dp_rank(), ranks=parallel.dp_size(), accumulation=2)
    losses = make_trainer(folder, **place, **more).run()
    if parallel.is_main_rank():
        shutil.rmtree(run_checkpoints(folder)[-1])
    torch.distributed.barrier()
    again = make_trainer(folder, **place, **more)
    assert again.resume()
    assert again.run() == losses[2:]
    return losses


def all_on_rank(folder: Path, mp_size: int) -> dict[str, Any]:
    parallel.initialize(mp_size)
    if mp_size == 2:
        return {
            "tp": train_on_rank(folder / "tp"),
            "tp-int8": train_on_rank(folder / "tp-int8", width="int8"),
        }
    return {
        "ddp": train_on_rank(folder / "ddp", saves_memory=True),
        "fsdp": train_on_rank(folder / "fsdp", fsdp=True, saves_memory=True),
    }


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and the results of each of two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    found = [run_ranks(2, folder, all_on_rank, folder, mp_size) for mp_size in (1, 2)]
    return folder, [a | b for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "tp", "tp-int8"])
def test_two_ranks_equal_one(
    tmp_path: Path, on_two_ranks: tuple[Path, list[dict[str, Any]]], way: str
) -> None:
    folder, found = on_two_ranks
    width = "int8" if way == "tp-int8" else None
    alone = make_trainer(tmp_path / "alone", accumulation=2, width=width)
    losses = alone.run()
    tolerance = 1e-5 if width is None else 1e-2  # each rank rounds its own columns of wo and w2
    for rank in found:
        assert rank[way] == pytest.approx(losses, abs=tolerance)
    if width is None:
        changes = [
            open_adapter(run_checkpoints(run)[-1], alone.model.params).changes
            for run in (folder / way, tmp_path / "alone")
        ]
        for name, (a, b, _) in changes[0].items():
            torch.testing.assert_close((a, b), changes[1][name][:2], atol=1e-4, rtol=1e-4)


# ---- checkpoints --------------------------------------------------------------------------------


def run_and_tell(folder: Path, steps: Any) -> None:
    trainer = make_trainer(folder, LoraOptions(4, 12, dropout=0.1), steps=12)
    trainer.on_step = lambda _, report: steps.send(report.step)
    trainer.run()


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    unbroken = make_trainer(tmp_path / "unbroken", LoraOptions(4, 12, dropout=0.1), steps=12)
    losses = unbroken.run()
    steps, its_end = context.Pipe(duplex=False)
    process = context.Process(target=run_and_tell, args=(tmp_path / "killed", its_end))
    process.start()
    while steps.recv() < 7:
        pass
    process.kill()
    process.join()
    resumed = make_trainer(tmp_path / "killed", LoraOptions(4, 12, dropout=0.1), steps=12)
    assert resumed.resume()
    start = resumed.step
    assert resumed.run() == losses[start:]
    for name, weight in trained(resumed.model).items():
        assert torch.equal(weight, trained(unbroken.model)[name]), name


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    others = (
        LoraOptions(4, 12, targets=("wq",)),
        LoraOptions(4, 13),
        LoraOptions(8, 24),
    )
    for lora in others:
        with pytest.raises(TrainingError, match="choose another out_dir"):
            make_trainer(tmp_path, lora).resume()


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=0), "lora_r is 0: it must be a whole number, 1 or more"),
        (dict(alpha=0), "lora_alpha is 0: it must be above 0"),
        (dict(alpha=float("nan")), "lora_alpha is nan: it must be above 0"),
        (dict(dropout=1.0), "lora_dropout is 1.0: it must be 0 or more, and below 1"),
        (dict(targets=("wq", "wx")), "lora_targets is 'wq,wx': it must be some of wq,wk,wv,wo,w1"),
        (dict(targets=()), "lora_targets is '': it must be some of"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as error:
        LoraOptions(**{**dict(r=4, alpha=8), **options})
    assert message in str(error.value)


def test_biases_are_not_trained_quantized() -> None:
    args = ModelArgs(**ARGS, attention_bias=True)
    check_base(args, None)
    with pytest.raises(TrainingError, match="a model with biases is not trained quantized"):
        check_base(args, "int8")
