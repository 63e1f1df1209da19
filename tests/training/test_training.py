"""Training: a step equals transformers', ranks and packing change nothing, and runs are resumed."""

import math
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import context, run_ranks
from helpers.training import (
    BOS,
    VOCAB,
    Rows,
    halves,
    huggingface,
    make_model,
    renamed,
)
from make_checkpoint import demo_pieces, write_tokenizer
from torch import Tensor

from llama import Llama, parallel
from llama.checkpoints.folder import run_checkpoints
from llama.engine.engine import Engine
from llama.errors import ConfigError, LlamaError, TrainingError
from llama.sampling import SamplingParams
from llama.training.checkpoint import WholeModel
from llama.training.loop import Trainer, TrainingOptions, shard_model
from llama.training.objective import document_mask, document_numbers, document_positions
from llama.training.optimizer import Muon, clip_grad_norm, learning_rate_factor, orthogonalize


def make_trainer(
    folder: Path, steps: int = 4, rank: int = 0, ranks: int = 1, rows: int = 4, **more: Any
) -> Trainer:
    model = make_model()
    optimizer = model.configure_optimizers(1e-2)
    options = TrainingOptions(**{**dict(steps=steps, warmup_steps=2, checkpoint_every=2), **more})
    return Trainer(model, [optimizer], Rows(rows, 24, rank, ranks), BOS, options, folder)


# ---- the loss ---------------------------------------------------------------------------------


def test_loss_and_gradients_of_a_step_are_transformers() -> None:
    model = make_model()
    other = huggingface(model)
    tokens = torch.randint(0, VOCAB, (3, 20))
    labels = tokens.clone()
    labels[:, :7] = -100
    loss = model.forward_loss(tokens[:, :-1], labels[:, 1:])
    theirs = other(tokens, labels=labels).loss
    loss.backward()
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5
    gradients = {name: w.grad for name, w in model.named_parameters()}
    wanted = {name: w.grad for name, w in other.named_parameters()}
    for old, new, gradient in renamed(gradients):
        torch.testing.assert_close(halves(old, gradient), wanted[new], atol=1e-5, rtol=1e-5)


def test_training_makes_no_cache_and_equals_the_cached_path() -> None:
    model = make_model()
    tokens = torch.randint(0, VOCAB, (2, 20))
    logits = model(tokens)
    assert model.layers[0].attention._cache is None
    torch.testing.assert_close(logits, model(tokens, 0), atol=1e-5, rtol=1e-5)


def where(documents: Tensor) -> dict[str, Tensor]:
    return dict(positions=document_positions(documents), mask=document_mask(documents))


def test_packed_documents_equal_the_documents_alone() -> None:
    model = make_model()
    lengths = [5, 1, 11, 7]
    documents = [torch.randint(1, VOCAB, (n,)) for n in lengths]
    for document in documents:
        document[0] = BOS
    row = torch.cat(documents)[None]
    numbers, targets = document_numbers(row[:, :-1], row[:, 1:], BOS)
    assert numbers is not None
    packed = model(row[:, :-1], **where(numbers))
    alone = torch.cat([model(document[None])[0] for document in documents])[None, :-1]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)

    model.forward_loss(row[:, :-1], targets, reduction="sum", **where(numbers)).backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    for document in documents:
        inputs, wanted = document[None, :-1], document[None, 1:]
        if inputs.numel():
            model.forward_loss(inputs, wanted, reduction="sum").backward()
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-5)


def test_what_crosses_into_the_next_document_is_ignored() -> None:
    row = torch.tensor([[BOS, 5, 6, BOS, 7, 8, 9]])
    numbers, targets = document_numbers(row[:, :-1], row[:, 1:], BOS)
    assert numbers is not None
    assert numbers.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert targets.tolist() == [[5, 6, -100, 7, 8, 9]]
    alone, _ = document_numbers(row[:, :3], row[:, 1:4], BOS)
    assert alone is None


def test_documents_may_see_each_other(tmp_path: Path) -> None:
    apart = make_trainer(tmp_path / "apart").train_step()[0]
    together = make_trainer(tmp_path / "together", separate_documents=False).train_step()[0]
    model = make_model()
    inputs, targets = Rows(4, 24).next_batch()
    assert together == pytest.approx(model.forward_loss(inputs, targets).item(), abs=1e-5)
    assert apart != pytest.approx(together, abs=1e-3)


# ---- the optimizer ----------------------------------------------------------------------------


def test_only_matrices_decay() -> None:
    model = make_model()
    groups = model.configure_optimizers(1e-3, 0.3, (0.8, 0.9)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {w.dim() for w in groups[0]["params"]} == {2}
    assert {w.dim() for w in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("train", ["norms", "all_but_embeddings"])
def test_what_is_not_trained_stays(tmp_path: Path, train: Any) -> None:
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = model.configure_optimizers(1e-2, train=train)
    Trainer(model, [optimizer], Rows(4, 24), BOS, TrainingOptions(steps=2, warmup_steps=0),
            tmp_path).run()  # fmt: skip
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    if train == "norms":
        assert changed == {name for name in before if "norm" in name}
    else:
        assert changed == before.keys() - {"tok_embeddings.weight"}


def test_an_unknown_choice_of_what_to_train() -> None:
    with pytest.raises(ConfigError, match="train is 'half'"):
        make_model().configure_optimizers(1e-3, train="half")  # type: ignore[arg-type]


def test_cosine_and_straight_schedules() -> None:
    cosine = TrainingOptions(steps=110, warmup_steps=10, final_lr=0.1)
    factors = [learning_rate_factor(step, cosine) for step in range(111)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    straight = TrainingOptions(steps=100, warmup_steps=0, decay_steps=50, final_lr=0.0)
    assert learning_rate_factor(49, straight) == 1
    assert learning_rate_factor(75, straight) == pytest.approx(0.5)
    assert learning_rate_factor(99, straight) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"warmup_steps": 99}, {"final_lr": 2.0}, {"clip": 0.0}, {"keep": 0}]
)
def test_options_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError):
        TrainingOptions(**{**dict(steps=10, warmup_steps=1), **wrong})


def test_clipping_is_torchs() -> None:
    mine, theirs = make_model(), make_model()
    for model in (mine, theirs):
        model.forward_loss(*Rows(4, 24).next_batch()).backward()
    norm = clip_grad_norm(mine, 0.5)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    assert norm == pytest.approx(wanted.item(), rel=1e-5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_orthogonal_updates(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, iterations=8))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_learns(tmp_path: Path) -> None:
    model = make_model()
    matrices = [w for w in model.layers.parameters() if w.dim() == 2]
    others = [w for w in model.parameters() if not any(w is m for m in matrices)]
    optimizers = [Muon(matrices, 0.02), torch.optim.AdamW(others, 1e-2)]
    inputs, targets = Rows(4, 24).next_batch()
    first = model.forward_loss(inputs, targets).item()
    for _ in range(20):
        loss = model.forward_loss(inputs, targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < first / 2


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    parts = make_trainer(tmp_path / "parts", accumulation=2)
    inputs, targets = whole.loader.next_batch()
    targets[0, 3:] = -100  # so the two halves have different numbers of targets
    halves_of_it = iter([(inputs[:1], targets[:1]), (inputs[1:], targets[1:])] * 9)
    whole.loader.next_batch = lambda: (inputs, targets)  # type: ignore[method-assign]
    parts.loader.next_batch = lambda: next(halves_of_it)  # type: ignore[method-assign]
    for _ in range(3):
        assert parts.train_step() == pytest.approx(whole.train_step(), abs=1e-5)


def test_bfloat16_autocast_learns_and_keeps_the_weights(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain").run()
    trainer = make_trainer(tmp_path / "cast", autocast=torch.bfloat16)
    assert trainer.run() == pytest.approx(plain, abs=0.05)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


# ---- ranks ------------------------------------------------------------------------------------


def run_on_rank(folder: Path, fsdp: bool) -> list[float]:
    """Train on this rank and the others. Returns the losses.

    Then the last checkpoint is deleted, and a new trainer with other weights resumes from the one
    before. Its losses must be the same.
    """
    from fairscale.nn.model_parallel import initialize as fs_init

    rank, ranks = fs_init.get_data_parallel_rank(), fs_init.get_data_parallel_world_size()
    runs = []
    for seed in (1, 2):
        model = make_model(seed)
        if fsdp:
            shard_model(model)
        optimizer = model.configure_optimizers(1e-2)
        options = TrainingOptions(steps=4, warmup_steps=2, checkpoint_every=2, accumulation=2)
        trainer = Trainer(model, [optimizer], Rows(4, 24, rank, ranks), BOS, options, folder)
        assert trainer.resume() == (seed == 2)
        runs.append(trainer.run())
        if seed == 1:
            if parallel.is_main_rank():
                shutil.rmtree(run_checkpoints(folder)[-1])
            torch.distributed.barrier()
    assert runs[1] == runs[0][2:]
    if fsdp:  # generation must gather the sharded weights, for sample texts
        engine = Engine(model, 1, 24)
        request = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_gen_len=4))
        while engine.has_work:
            engine.step()
        assert len(request.tokens) == 4
    return runs[0]


def clipped_norms() -> list[float]:
    model = make_model()
    model.forward_loss(*Rows(4, 24).next_batch()).backward()
    return [clip_grad_norm(model, 0.5), clip_grad_norm(model, 0.5)]


def all_on_rank(folder: Path, mp_size: int) -> dict[str, Any]:
    parallel.initialize(mp_size)
    if mp_size == 2:
        return {"tp": run_on_rank(folder / "tp", fsdp=False), "norms": clipped_norms()}
    return {
        "ddp": run_on_rank(folder / "ddp", fsdp=False),
        "fsdp": run_on_rank(folder / "fsdp", fsdp=True),
    }


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and the results of each of two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    found = [run_ranks(2, folder, all_on_rank, folder, mp_size) for mp_size in (1, 2)]
    return folder, [a | b for a, b in zip(*found, strict=True)]


def test_one_rank_goes_on_where_two_replicas_were(
    tmp_path: Path, on_two_ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, found = on_two_ranks
    shutil.copytree(folder / "ddp", tmp_path / "ddp")
    shutil.rmtree(run_checkpoints(tmp_path / "ddp")[-1])
    alone = make_trainer(tmp_path / "ddp", accumulation=2)
    assert alone.resume()
    assert alone.step == 2
    assert alone.run() == pytest.approx(found[0]["ddp"][2:], abs=1e-5)


@pytest.mark.parametrize(("way", "split"), [("fsdp", (1, 2)), ("tp", (2, 1))])
def test_one_rank_does_not_go_on_where_the_state_was_split(
    way: str, split: tuple[int, int], on_two_ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    ranks, replicas = split
    before = rf"the model over {ranks} rank\(s\) and the optimizer's state over {replicas} replica"
    with pytest.raises(TrainingError, match=rf"{before}.* but this run .* 1 rank.* 1 replica"):
        make_trainer(on_two_ranks[0] / way).resume()


@pytest.mark.parametrize("way", ["ddp", "fsdp", "tp"])
def test_two_ranks_equal_one(
    tmp_path: Path, on_two_ranks: tuple[Path, list[dict[str, Any]]], way: str
) -> None:
    folder, found = on_two_ranks
    alone = make_trainer(tmp_path / "alone", accumulation=2)
    losses = alone.run()
    for rank in found:
        assert rank[way] == pytest.approx(losses, abs=1e-5)
    # One rank can read a checkpoint that two ranks have written.
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    newest = run_checkpoints(folder / way)[-1]
    llama = Llama.build(newest, tmp_path / "tokenizer.model")
    batch = Rows(4, 24).next_batch()
    torch.testing.assert_close(
        llama.model.forward_loss(*batch), alone.model.forward_loss(*batch), atol=1e-4, rtol=1e-4
    )


def test_clipping_counts_every_ranks_part_once(
    on_two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    for rank in on_two_ranks[1]:
        assert rank["norms"] == pytest.approx(clipped_norms(), rel=1e-4)


# ---- checkpoints ------------------------------------------------------------------------------


def test_llama_build_opens_a_checkpoint(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    trainer = make_trainer(tmp_path / "run")
    trainer.stored = WholeModel(tmp_path / "tokenizer.model")
    trainer.run()
    newest = run_checkpoints(tmp_path / "run")[-1]
    assert newest.name == "step_00000004"
    llama = Llama.build(newest)
    assert llama.model.params.max_seq_len == 64
    for name, weight in llama.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name


def test_a_tokenizer_json_keeps_its_name(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    (tmp_path / "tokenizer.json").write_text("{}")
    trainer.stored = WholeModel(tmp_path / "tokenizer.json")
    trainer.run()
    [newest] = run_checkpoints(tmp_path / "run")[-1:]
    assert [path.name for path in newest.glob("tokenizer*")] == ["tokenizer.json"]


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=8, keep=2).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000006", "step_00000008"]


def run_and_tell(folder: Path, steps: Any) -> None:
    trainer = make_trainer(folder, steps=12)
    trainer.on_step = lambda _, report: steps.send(report.step)
    trainer.run()


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    unbroken = make_trainer(tmp_path / "unbroken", steps=12)
    losses = unbroken.run()
    steps, its_end = context.Pipe(duplex=False)
    process = context.Process(target=run_and_tell, args=(tmp_path / "killed", its_end))
    process.start()
    while steps.recv() < 7:
        pass
    process.kill()
    process.join()
    resumed = make_trainer(tmp_path / "killed", steps=12)
    assert resumed.resume()
    assert resumed.step in (6, 8, 10)  # the last complete checkpoint
    start = resumed.step
    assert resumed.run() == losses[start:]
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, unbroken.model.state_dict()[name]), name


def test_what_a_kill_leaves_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).run()
    (tmp_path / "partial_00000004").mkdir()
    (tmp_path / "partial_00000004" / "consolidated.00.pth").write_bytes(b"half")
    trainer = make_trainer(tmp_path, steps=4)
    assert trainer.resume()
    assert trainer.step == 2
    trainer.run()
    assert (tmp_path / "step_00000004").is_dir()
    assert not (tmp_path / "partial_00000004").exists()


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not make_trainer(tmp_path / "nowhere").resume()


def test_a_damaged_training_state(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    (tmp_path / "step_00000004" / "training.00.pt").write_bytes(b"junk")
    with pytest.raises(LlamaError, match=r"cannot resume from .*training.00.pt"):
        make_trainer(tmp_path).resume()


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    trainer = make_trainer(tmp_path)
    trainer.model.layers[1].feed_forward.w2.weight = torch.nn.Parameter(torch.zeros(32, 96))
    with pytest.raises(TrainingError, match=r"another model: layers.1.feed_forward.w2.weight is"):
        trainer.resume()


def test_token_ids_of_another_tokenizer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    inputs, targets = Rows(4, 24).next_batch()
    inputs[1, 2] = VOCAB
    trainer.loader.next_batch = lambda: (inputs, targets)  # type: ignore[method-assign]
    with pytest.raises(LlamaError, match=f"token id {VOCAB}, but vocab_size is {VOCAB}"):
        trainer.train_step()


def run_on_a_full_disk(folder: Path) -> str:
    trainer = make_trainer(folder, steps=4)
    assert trainer.resume()
    # Writing beyond the limit is then an error, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    return str(caught.value)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_trainer(folder, steps=2).run()
    before = {p.name: p.read_bytes() for p in (folder / "step_00000002").iterdir()}
    (error,) = run_ranks(1, tmp_path, run_on_a_full_disk, folder)
    assert "step 4 could not be saved: cannot write" in error
    assert [p.name for p in folder.iterdir()] == ["step_00000002"]
    assert {p.name: p.read_bytes() for p in (folder / "step_00000002").iterdir()} == before


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=6)

    def poison(trainer: Trainer, report: Any) -> None:
        if report.step == 3:
            with torch.no_grad():
                trainer.model.norm.weight[0] = math.nan

    trainer.on_step = poison
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan .* are of earlier steps"):
        trainer.run()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]
    healthy = make_trainer(tmp_path, steps=6)
    assert healthy.resume()
    assert all(map(math.isfinite, healthy.run()))


def test_a_batch_without_targets(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    inputs, targets = Rows(4, 24).next_batch()
    empty = torch.full_like(targets, -100)
    trainer.loader.next_batch = lambda: (inputs, empty)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="no target"):
        trainer.train_step()


def test_held_out_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_every=2, eval_batches=3)
    trainer.eval_loader = Rows(4, 24)
    trainer.eval_start = {"step": 100}
    reports: list[Any] = []
    trainer.on_step = lambda trainer, report: reports.append(report)
    trainer.run()
    assert [r.held_out is not None for r in reports] == [False, True, False, True]
    total, count = 0.0, 0
    loader = Rows(4, 24)
    loader.step = 100
    for _ in range(3):
        inputs, targets = loader.next_batch()
        numbers, targets = document_numbers(inputs, targets, BOS)
        total += trainer.model.forward_loss(
            inputs, targets, reduction="sum", **where(numbers)
        ).item()
        count += int((targets != -100).sum())
    assert reports[-1].held_out == pytest.approx(total / count, rel=1e-5)
