"""Calls from several threads run together, with the results of single calls, and fail
separately."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks

from llama import Llama
from llama.engine.turns import Turns
from llama.errors import GenerationError

PROMPTS = ["Once upon a time", "The fox said", "A king had three sons", "In a wood there lived"]
THREADS = 8


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(mode="fast", max_seq_len=256)


def calls(llama: Llama, n: int) -> list[Callable[[], Any]]:
    """Different calls: whole and streamed texts, dialogs, scores, closed streams, wrong options."""
    made: list[Callable[[], Any]] = []
    for i in range(n):
        prompt = PROMPTS[i % 4]
        options: dict[str, Any] = dict(max_gen_len=4 + i % 9, seed=i, temperature=0.8 * (i % 2))

        def completion(prompt: str = prompt, options: dict[str, Any] = options) -> Any:
            return llama.text_completion([prompt, prompt + " and"], logprobs=True, **options)

        def chat(prompt: str = prompt, options: dict[str, Any] = options) -> Any:
            return llama.chat_completion([[{"role": "user", "content": prompt}]], **options)

        def stream(prompt: str = prompt, options: dict[str, Any] = options) -> Any:
            return [event.text for event in llama.stream(prompt, **options)]

        def broken(prompt: str = prompt, options: dict[str, Any] = options) -> Any:
            events = llama.stream(prompt, **options)
            first = next(events).text
            events.close()
            return first

        def score(prompt: str = prompt) -> Any:
            return llama.score([prompt])

        def failing(prompt: str = prompt, options: dict[str, Any] = options) -> Any:
            def fails(tokens: Any, logits: Any) -> Any:
                raise KeyError("mine")

            with pytest.raises(KeyError, match="mine"):
                llama.text_completion([prompt], logits_processor=fails, **options)
            with pytest.raises(GenerationError, match="top_p"):
                llama.text_completion([prompt], max_gen_len=1, top_p=7.0)

        made.append([completion, chat, stream, broken, score, failing][i % 6])
    return made


def test_calls_together_give_what_they_give_alone(llama: Llama) -> None:
    todo = calls(llama, 6 * THREADS)
    alone = [call() for call in todo]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda call: call(), todo))
    assert together == alone
    assert not llama.engine.has_work
    assert llama.text_completion(PROMPTS[:1], temperature=0, max_gen_len=5)


def test_calls_run_in_one_batch(llama: Llama) -> None:
    """Four callers together need few more steps than one."""
    steps = 0
    step = llama.engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    barrier = threading.Barrier(4)

    def call(prompt: str) -> Any:
        barrier.wait()
        return llama.text_completion([prompt], temperature=0, max_gen_len=60, ignore_eos=True)

    llama.engine.step = counted  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, PROMPTS))
    finally:
        del llama.engine.step  # type: ignore[method-assign]
    assert steps < 120  # four calls in turn would need 240


def test_asyncio(llama: Llama) -> None:
    def call(prompt: str) -> Any:
        return llama.text_completion([prompt], temperature=0, max_gen_len=12)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(call, prompt) for prompt in PROMPTS))

    assert asyncio.run(all_of_them()) == [call(prompt) for prompt in PROMPTS]


def test_two_models_at_once(llama: Llama) -> None:
    other = Llama.build(mode="fast", quantize="int8", max_seq_len=256)

    def call(model: Llama) -> Any:
        return [model.score([prompt]) for prompt in PROMPTS * 3]

    alone = [call(llama), call(other)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, [llama, other])) == alone


def test_an_interrupted_caller_ends_its_own_rows(llama: Llama) -> None:
    """Ctrl-C interrupts the main thread, and the other threads continue."""
    want = llama.text_completion(PROMPTS[:1], temperature=0, max_gen_len=40)
    found = []

    def call() -> None:
        found.append(llama.text_completion(PROMPTS[:1], temperature=0, max_gen_len=40))

    threads = [threading.Thread(target=call) for _ in range(3)]
    events = llama.stream(PROMPTS[1], temperature=0, max_gen_len=200)
    next(events)
    for thread in threads:
        thread.start()
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt())
    for thread in threads:
        thread.join(60)
    assert found == [want] * 3
    assert not llama.engine.has_work


def test_turns_are_taken_in_order() -> None:
    turns, order = Turns(), []

    def take(name: int) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(5)]
    with turns:
        for i, thread in enumerate(threads):
            thread.start()
            while len(turns._queue) <= i:
                time.sleep(0.001)
        assert turns.is_wanted
        assert not turns.take_if_free()
    for thread in threads:
        thread.join(10)
    assert order == list(range(5))
    assert turns.take_if_free()


def hosted_on_rank() -> Any:
    llama = Llama.build(mode="fast", max_seq_len=128)
    torch.set_num_threads(1)

    def call(prompt: str) -> Any:
        return llama.text_completion([prompt], temperature=0, max_gen_len=12)

    with llama.runner.leading() as is_first_rank:
        if is_first_rank:
            with ThreadPoolExecutor(4) as pool:
                return list(pool.map(call, PROMPTS))
    return None


def test_threads_of_the_first_rank(llama: Llama, tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, hosted_on_rank)
    want = [llama.text_completion([prompt], temperature=0, max_gen_len=12) for prompt in PROMPTS]
    assert first == want
    assert second is None
