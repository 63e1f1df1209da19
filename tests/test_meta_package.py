"""Code written against Meta's packages runs here: names, calls, and changes of the model by users.

`test_meta_interface.py` tests the classes of `model.py`.
"""

import copy
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama, Transformer
from llama.errors import ParallelError

PROMPTS = ["Once upon a time", "The fox said"]
IDS = torch.arange(3, 11)[None]


@pytest.fixture
def llama() -> Llama:
    return Llama.build(max_seq_len=128)


def texts(llama: Llama, prompts: list[str] = PROMPTS) -> list[str]:
    rows = llama.text_completion(prompts, temperature=0, max_gen_len=8)
    return [row["generation"] for row in rows]


# ---- names --------------------------------------------------------------------------------------


def test_names_of_both_releases() -> None:
    from llama.generation import (
        B_INST,
        B_SYS,
        E_INST,
        E_SYS,
        SPECIAL_TAGS,
        UNSAFE_ERROR,
        ChatPrediction,
        CompletionPrediction,
        Dialog,
        Message,
        Role,
        sample_top_p,
    )
    from llama.tokenizer import ChatFormat, Tokenizer
    from llama.tokenizer import Role as SameRole

    assert (B_INST, E_INST) == ("[INST]", "[/INST]")
    assert B_SYS + "x" + E_SYS == "<<SYS>>\nx\n<</SYS>>\n\n"
    assert list(SPECIAL_TAGS) == [B_INST, E_INST, "<<SYS>>", "<</SYS>>"]
    assert UNSAFE_ERROR.startswith("Error: special tags")
    assert Role is SameRole
    assert all([Dialog, ChatPrediction, CompletionPrediction, Message, sample_top_p, ChatFormat])
    assert Tokenizer.num_reserved_special_tokens == 256
    assert r"\p{N}{1,3}" in Tokenizer.pat_str


def test_the_tokenizers_libraries(llama: Llama, llama2_tokenizer_path: str) -> None:
    from llama import Tokenizer

    assert llama.tokenizer.model.encode("a king") == llama.tokenizer.encode("a king", False, False)
    with pytest.raises(AttributeError, match="is no SentencePiece model"):
        _ = llama.tokenizer.sp_model
    old = Tokenizer(llama2_tokenizer_path)
    assert old.sp_model.encode("a king") == old.encode("a king", False, False)
    with pytest.raises(AttributeError, match="is no Llama 3 vocabulary"):
        _ = old.model


# ---- calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [torch.tensor, np.array, lambda rows: [torch.tensor(row) for row in rows],
     lambda rows: [np.array(row) for row in rows]],
    ids=["tensor", "array", "tensors", "arrays"],
)  # fmt: skip
def test_prompts_as_tensors_and_arrays(llama: Llama, make: Any) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    want = llama.generate(rows, 6, temperature=0, logprobs=True)
    assert llama.generate(make(rows), 6, temperature=0, logprobs=True) == want
    events = llama.stream(make(rows), temperature=0, max_gen_len=6)
    tokens: list[list[int]] = [[], []]
    for event in events:
        if event.token is not None:
            tokens[event.row].append(event.token)
    assert tokens == want[0]


# ---- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_the_model_in_another_dtype(llama: Llama, change: str) -> None:
    want = texts(llama)
    getattr(llama.model, change)()
    assert all(texts(llama))
    assert llama.engine.cache.k.dtype == llama.model.norm.weight.dtype
    llama.model.float()
    assert change != "double" or texts(llama) == want


def test_a_patched_layer_with_metas_signature(llama: Llama) -> None:
    want, calls = texts(llama), []

    def patched(forward: Any) -> Any:
        def patch(x: Any, start_pos: Any, freqs_cis: Any, mask: Any) -> Any:
            calls.append(x.shape)
            return forward(x, start_pos, freqs_cis, mask)

        return patch

    for module in (llama.model.layers[0], llama.model.layers[1].attention):
        module.forward = patched(module.forward)
    assert texts(llama) == want
    assert calls


def test_a_subclass_with_metas_signature(llama: Llama) -> None:
    class Louder(Transformer):
        def forward(self, tokens: Any, start_pos: int) -> Any:
            return 2 * super().forward(tokens, start_pos)

    model = Louder(llama.model.params)
    model.load_state_dict(llama.model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(IDS, 0), 2 * llama.model(IDS, 0))
    assert texts(Llama(model, llama.tokenizer)) == texts(llama)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_whole_llama_is_not_copied(llama: Llama, duplicate: Callable[[Llama], Any]) -> None:
    with pytest.raises(TypeError, match=r"copy llama\.model, and make another"):
        duplicate(llama)


def test_hooks_copies_and_compilers(llama: Llama) -> None:
    want, seen = texts(llama), []
    hook = llama.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert texts(llama) == want
    assert seen
    hook.remove()
    with torch.inference_mode():
        logits = llama.model(IDS, 0)
        assert torch.equal(copy.deepcopy(llama.model)(IDS, 0), logits)
        compiled: Any = torch.compile(llama.model, backend="eager")
        torch.testing.assert_close(compiled(IDS, 0), logits)


def test_built_inside_of_inference_mode() -> None:
    with torch.inference_mode():
        llama = Llama.build(max_seq_len=64)
        want = texts(llama)
    assert texts(llama) == want
    llama.model(IDS).sum().backward()
    assert llama.model.layers[0].attention.wq.weight.grad is not None


@pytest.mark.parametrize("options", [{}, dict(mode="fast"), dict(mode="fast", quantize="int8"),
                                     dict(mode="fast", kv_cache="int8")], ids=str)  # fmt: skip
def test_other_defaults_of_pytorch(options: dict[str, Any]) -> None:
    """The caller's default dtype and device change neither results nor the memory check."""
    want = texts(Llama.build(device="cpu", max_seq_len=64, **options))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert texts(Llama.build(device="cpu", max_seq_len=64, **options)) == want
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert texts(Llama.build(device="cpu", max_seq_len=64, **options)) == want


# ---- processes ----------------------------------------------------------------------------------

OWN_GROUP = """
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from llama import Llama
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
initialize_model_parallel(1)
first = Llama.build(max_seq_len=64).text_completion(["Once"], temperature=0, max_gen_len=4)
dist.destroy_process_group()
assert Llama.build(max_seq_len=64).text_completion(["Once"], temperature=0, max_gen_len=4) == first
dist.destroy_process_group()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert Llama.build(max_seq_len=64).text_completion(["Once"], temperature=0, max_gen_len=4) == first
print("same")
"""


def test_a_process_group_of_the_callers() -> None:
    run = subprocess.run([sys.executable, "-c", OWN_GROUP], capture_output=True, text=True)
    assert run.stdout.endswith("same\n"), run.stderr[-2000:]


def in_child(queue: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        queue.put(texts(Llama.build(max_seq_len=128)))
    except ParallelError as error:
        queue.put(str(error))


@pytest.mark.parametrize(("method", "threads"), [("spawn", 2), ("fork", 1), ("fork", 2)])
def test_children(llama: Llama, method: str, threads: int) -> None:
    """A forked child with several threads would hang in PyTorch's thread pool. It gets an error."""
    want = texts(llama)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue, threads))
    child.start()
    found = queue.get(timeout=120)
    child.join(30)
    if (method, threads) == ("fork", 2):
        assert 'Start it by "spawn"' in found
    else:
        assert found == want
