"""Generation equals Meta's, except where Meta's has a mistake, and refuses wrong arguments."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import ChatPrediction, CompletionPrediction, Llama, ModelArgs, Tokenizer, Transformer
from llama.chat_format import Dialog, Message
from llama.errors import GenerationError, LlamaError
from llama.sampling import SamplingParams

SEED = 11
N_RANKS = len(demo_pieces())
VOCAB = N_RANKS + 256
CHECKPOINT: dict[str, Any] = dict(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32, norm_eps=1e-5
)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path, demo_pieces())
    return path


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(1)
    args = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32)
    model = Transformer(ModelArgs(**args, max_batch_size=4, max_seq_len=96))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0.0, 0.2)
    return model


@pytest.fixture
def llama(model: Transformer, tokenizer_path: Path) -> Llama:
    return Llama(model, Tokenizer(tokenizer_path), seed=SEED)


@pytest.fixture(scope="module")
def metas(oracle: Any, model: Transformer, tokenizer_path: Path) -> Any:
    """Meta's generator with the same weights and tokenizer file."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of")
    names += ("max_batch_size", "max_seq_len")
    args = oracle.args.ModelArgs(**{name: getattr(model.params, name) for name in names})
    twin = oracle.model.Transformer(args)
    twin.load_state_dict(model.state_dict(), strict=True)
    return oracle.generation.Llama3(twin, oracle.tokenizer.Tokenizer(tokenizer_path), args)


def metas_rows(metas: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    """The tokens and logprobs of each row by Meta's generator, up to the row's stop token."""
    torch.manual_seed(SEED)
    inputs = [SimpleNamespace(tokens=prompt, vision=None) for prompt in prompts]
    rows: list[Any] = [([], []) for _ in prompts]
    ended = [False] * len(prompts)
    for results in metas.generate(inputs, **options):
        for row, result in enumerate(results):
            if not (result.ignore_token or ended[row]) and len(rows[row][0]) < 20:
                ended[row] = result.token in metas.tokenizer.stop_tokens
                if not ended[row]:
                    rows[row][0].append(result.token)
                    rows[row][1].extend(result.logprobs or [])
    return rows


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, N_RANKS, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("lengths", [(12,), (5, 9, 3, 14), (1, 1, 30), (40, 2)])
def test_greedy_tokens_are_metas(llama: Llama, metas: Any, lengths: tuple[int, ...]) -> None:
    prompts = random_prompts(*lengths)
    tokens, logprobs = llama.generate(prompts, max_gen_len=20, temperature=0)
    assert logprobs is None
    assert tokens == [row for row, _ in metas_rows(metas, prompts, temperature=0, max_gen_len=20)]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 1.0), (1.5, 0.5)])
def test_a_single_prompts_samples_are_metas(
    llama: Llama, metas: Any, temperature: float, top_p: float
) -> None:
    options = dict(temperature=temperature, top_p=top_p, max_gen_len=20)
    tokens, _ = llama.generate(random_prompts(9), **options)
    assert tokens == [row for row, _ in metas_rows(metas, random_prompts(9), **options)]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logprobs_are_metas(llama: Llama, metas: Any, temperature: float) -> None:
    options = dict(temperature=temperature, max_gen_len=20, logprobs=True)
    tokens, logprobs = llama.generate(random_prompts(9), **options)
    ((want_tokens, want_logprobs),) = metas_rows(metas, random_prompts(9), **options)
    assert tokens == [want_tokens]
    assert logprobs is not None
    assert logprobs[0] == pytest.approx(want_logprobs, abs=1e-6)


def test_a_seed_repeats_and_calls_go_on(model: Transformer, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    one, two = Llama(model, tokenizer, seed=3), Llama(model, tokenizer, seed=3)
    prompts = random_prompts(6)
    first = one.generate(prompts, max_gen_len=30, temperature=1.0)
    assert two.generate(prompts, max_gen_len=30, temperature=1.0) == first
    assert one.generate(prompts, max_gen_len=30, temperature=1.0) != first


def test_a_seed_may_be_negative(model: Transformer, tokenizer_path: Path) -> None:
    one, again, other = (
        Llama(model, Tokenizer(tokenizer_path), seed).generate(random_prompts(5, 6), 8, 1.0)
        for seed in (-1, -1, -2)
    )
    assert one == again != other


def test_prompt_logprobs_are_those_of_a_plain_forward(llama: Llama) -> None:
    (prompt,) = random_prompts(25)
    tokens, logprobs = llama.generate(
        [prompt], max_gen_len=5, temperature=0, logprobs=True, echo=True
    )
    assert tokens[0][:25] == prompt
    ids = torch.tensor(tokens)
    want = llama.model(ids).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).flatten()
    assert logprobs is not None
    assert logprobs[0][0] == 0.0
    assert logprobs[0][1:] == pytest.approx(want.tolist(), abs=1e-4)


@pytest.mark.parametrize("lengths", [(25,), (25, 25), (25, 7), (96,), (1,)])
def test_scoring_without_generating(llama: Llama, lengths: tuple[int, ...]) -> None:
    """In Meta's release these logprobs are shifted by one position if nothing is generated."""
    prompts = random_prompts(*lengths)
    tokens, logprobs = llama.generate(prompts, max_gen_len=0, logprobs=True, echo=True)
    assert tokens == prompts
    assert logprobs is not None
    for prompt, got in zip(prompts, logprobs, strict=True):
        ids = torch.tensor(prompt)
        want = llama.model(ids[None])[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None]).flatten()
        assert got == pytest.approx([0.0, *want.tolist()], abs=1e-4)


def test_echo_keeps_a_stop_token_of_the_prompt(llama: Llama) -> None:
    stop = llama.tokenizer.stop_tokens[0]
    prompt = [5, stop, 6, 7]
    tokens, _ = llama.generate([prompt], max_gen_len=3, temperature=0, echo=True)
    alone, _ = llama.generate([prompt], max_gen_len=3, temperature=0)
    assert tokens[0] == prompt + alone[0]


def test_generation_ends_at_a_stop_token_that_is_assigned(llama: Llama) -> None:
    prompts = random_prompts(8, 11)
    free, _ = llama.generate(prompts, max_gen_len=20, temperature=0)
    llama.tokenizer.stop_tokens = [free[0][4]]
    tokens, logprobs = llama.generate(prompts, max_gen_len=20, temperature=0, logprobs=True)
    assert tokens[0] == free[0][: free[0].index(free[0][4])]
    assert logprobs is not None
    assert [len(row) for row in logprobs] == [len(row) for row in tokens]


def test_every_row_has_its_own_max_gen_len(llama: Llama) -> None:
    llama.tokenizer.stop_tokens = []
    tokens, _ = llama.generate(random_prompts(3, 30, 94), max_gen_len=7, temperature=0)
    assert [len(row) for row in tokens] == [7, 7, 2]  # the cache has 96 positions


def test_kinds_of_ids_that_are_as_good(llama: Llama) -> None:
    (prompt,) = random_prompts(6)
    llama.tokenizer.stop_tokens = {1, 2}  # type: ignore[assignment]
    want = llama.generate([prompt], max_gen_len=5, temperature=0)
    assert llama.generate([np.array(prompt).tolist()], max_gen_len=5, temperature=0) == want
    assert llama.generate([list(np.array(prompt))], max_gen_len=5, temperature=0) == want


def test_text_completion(llama: Llama) -> None:
    prompts = ["the word", "and"]
    plain = llama.text_completion(prompts, temperature=0, max_gen_len=12)
    assert all(set(result) == {"generation"} for result in plain)
    echoed: list[CompletionPrediction] = llama.text_completion(
        prompts, temperature=0, max_gen_len=12, echo=True, logprobs=True
    )
    for prompt, short, long in zip(prompts, plain, echoed, strict=True):
        assert long["generation"] == f"<|begin_of_text|>{prompt}{short['generation']}"
        assert "".join(long["tokens"]) == long["generation"]
        assert len(long["tokens"]) == len(long["logprobs"])


def test_a_character_of_several_bytes_stays_whole(llama: Llama) -> None:
    """The first three tokens of an emoji give no text, and the fourth gives the emoji."""
    emoji = llama.tokenizer.encode("\N{GRINNING FACE}", bos=False, eos=False)
    assert len(emoji) == 4
    prediction = llama.text_completion(
        ["a\N{GRINNING FACE}b"], temperature=0, max_gen_len=0, echo=True, logprobs=True
    )[0]
    assert prediction["tokens"][1:] == ["a", "", "", "", "\N{GRINNING FACE}", "b"]


def test_chat_completion(llama: Llama) -> None:
    dialogs = [
        [{"role": "user", "content": "word"}],
        [
            {"role": "system", "content": "be"},
            {"role": "user", "content": "the"},
            {"role": "assistant", "content": "and"},
            {"role": "user", "content": "you"},
        ],
    ]
    results: list[ChatPrediction] = llama.chat_completion(
        dialogs, temperature=0, max_gen_len=10, logprobs=True
    )
    prompts = [llama.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
    tokens, logprobs = llama.generate(prompts, max_gen_len=10, temperature=0, logprobs=True)
    assert logprobs is not None
    for result, ids, values in zip(results, tokens, logprobs, strict=True):
        message = result["generation"]
        assert message["role"] == "assistant"
        assert message["content"] == llama.tokenizer.decode(ids)
        assert "".join(result["tokens"]) == message["content"]
        assert result["logprobs"] == pytest.approx(
            values, abs=1e-5
        )  # now the prompts are in the KV cache


BEGUN: list[Message] = [
    {"role": "user", "content": "word"},
    {"role": "assistant", "content": "the "},
]


def test_a_final_message_is_continued(llama: Llama) -> None:
    """The answer's own beginning in the prompt gives the rest of the answer."""
    dialog = BEGUN[:1]
    options: dict[str, Any] = dict(temperature=0, max_gen_len=10, stop_tokens=[])
    prompt = llama.formatter.encode_dialog_prompt(dialog)
    (answer,), _ = llama.generate([prompt], **options)
    beginning = [*dialog, {"role": "assistant", "content": llama.tokenizer.decode(answer[:3])}]
    begun = llama.encode_dialog(beginning, continue_final_message=True)
    assert begun[: len(prompt)] == prompt
    assert llama.tokenizer.decode(begun) == llama.tokenizer.decode(prompt + answer[:3])
    (rest,), _ = llama.generate([begun], **options)
    results = llama.chat_completion(
        [beginning], continue_final_message=True, logprobs=True, **options
    )
    message = results[0]["generation"]
    assert message["role"] == "assistant"
    assert message["content"] == beginning[-1]["content"] + llama.tokenizer.decode(rest)
    assert "".join(results[0]["tokens"]) == llama.tokenizer.decode(rest)
    events = llama.stream(beginning, continue_final_message=True, **options)
    assert "".join(event.text for event in events) == llama.tokenizer.decode(rest)


def test_each_sample_continues_its_own_dialog(llama: Llama) -> None:
    other: Dialog = [*BEGUN[:1], {"role": "assistant", "content": "and"}]
    results = llama.chat_completion([BEGUN, other], n=2, continue_final_message=True, max_gen_len=4)
    starts = [result["generation"]["content"][:3] for result in results]
    assert starts == ["the", "the", "and", "and"]


@pytest.mark.parametrize(
    ("prompt", "continues", "message"),
    [
        (BEGUN, False, "the last message must be from user or ipython, not assistant"),
        (BEGUN[:1], True, "the last message must be from assistant, not user"),
        ("a text", True, "continue_final_message needs a dialog, not a text or token ids"),
    ],
)
def test_what_cannot_be_continued(llama: Llama, prompt: Any, continues: bool, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        llama.stream(prompt, continue_final_message=continues)


def test_a_message_that_ends_in_eom_says_so(llama: Llama) -> None:
    dialog = [{"role": "user", "content": "word"}]
    free = llama.chat_completion([dialog], temperature=0, max_gen_len=10)[0]["generation"]
    assert "stop_reason" not in free
    eom = llama.tokenizer.special_tokens["<|eom_id|>"]
    with torch.no_grad():  # make <|eom_id|> the likeliest of all
        row = llama.model.output.weight[eom].clone()
        hidden = llama.model(torch.tensor([llama.formatter.encode_dialog_prompt(dialog)]))
        likeliest = hidden[0, -1].argmax()
        llama.model.output.weight[eom] = llama.model.output.weight[likeliest] * 2
    try:
        message = llama.chat_completion([dialog], temperature=0, max_gen_len=10)[0]["generation"]
    finally:
        with torch.no_grad():
            llama.model.output.weight[eom] = row
    assert message == {"role": "assistant", "content": "", "stop_reason": "end_of_message"}


# ---- misuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 97], {}, "prompt 0 has 97 tokens, but max_seq_len is 96"),
        ([[1, -1]], {}, "prompt 0 has token id -1"),
        ([[1], [VOCAB]], {}, f"prompt 1 has token id {VOCAB}, but vocab_size is {VOCAB}"),
        ([[1.5]], {}, "prompt 0 has 1.5, which is no token id"),
        ([1, 2], {}, "prompt 0 is 1"),
        ([[1]], {"temperature": -1}, "temperature is -1"),
        ([[1]], {"temperature": math.nan}, "temperature is nan"),
        ([[1]], {"top_p": -0.5}, "top_p is -0.5"),
        ([[1]], {"top_p": math.nan}, "top_p is nan"),
        ([[1]], {"max_gen_len": -1}, "max_gen_len is -1"),
        ([[1]], {"max_gen_len": 1.5}, "max_gen_len is 1.5"),
    ],
)
def test_bad_prompts_and_options(
    llama: Llama, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        llama.generate(prompts, **{"max_gen_len": 4} | options)


def test_bad_texts_and_dialogs(llama: Llama) -> None:
    with pytest.raises(GenerationError, match="give a list"):
        llama.text_completion("one string")  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="give a list"):
        llama.score("one string")
    with pytest.raises(GenerationError, match="no prompts"):
        llama.text_completion([])
    with pytest.raises(GenerationError, match="a stream has no echo"):
        llama.text_completion(["text"], echo=True, stream=True)
    with pytest.raises(LlamaError, match="role"):
        llama.chat_completion([[{"role": "king", "content": "hear me"}]])  # type: ignore[list-item]
    with pytest.raises(LlamaError, match="last"):
        llama.chat_completion([[{"role": "assistant", "content": "hello"}]])


# ---- more than Meta's loop does ---------------------------------------------------------------


def test_more_prompts_than_rows_of_the_cache_wait(llama: Llama) -> None:
    prompts = random_prompts(5, 3, 8, 12, 2, 30, 7)
    tokens, _ = llama.generate(prompts, max_gen_len=10, temperature=0)
    alone = [llama.generate([prompt], max_gen_len=10, temperature=0)[0][0] for prompt in prompts]
    assert tokens == alone


EMOJI = (
    "the \N{GRINNING FACE}\N{FAMILY}\N{ZERO WIDTH JOINER}e\N{COMBINING ACUTE ACCENT} \u4e16\u754c"
)


def saying(llama: Llama, text: str) -> dict[str, Any]:
    """Options that force the model to generate a text."""
    ids = llama.tokenizer.encode(text, bos=False, eos=True)

    def process(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        said = len(tokens) - 3
        wanted = ids[said] if said < len(ids) else llama.tokenizer.eos_id
        return torch.full_like(logits, -math.inf).index_fill(0, torch.tensor([wanted]), 0.0)

    return dict(logits_processor=process, max_gen_len=60)


@pytest.mark.parametrize(
    "stop", [[], ["\N{FAMILY}"], ["e\N{COMBINING ACUTE ACCENT} \u4e16"], ["zz"]]
)
def test_a_stream_joined_is_the_whole_text(llama: Llama, stop: list[str]) -> None:
    options = saying(llama, EMOJI) | dict(stop=stop)
    prompt = llama.tokenizer.encode("ab", bos=True, eos=False)
    events = list(llama.stream(prompt, **options))
    whole = llama.text_completion(["ab"], **options)[0]["generation"]
    assert whole == (EMOJI.split(stop[0])[0] if stop else EMOJI)
    assert "".join(event.text for event in events) == whole
    assert not any("\ufffd" in event.text for event in events)
    assert events[-1].finish_reason == "stop"


def test_streams_of_text_ids_and_dialogs(llama: Llama) -> None:
    dialog = [{"role": "user", "content": "word"}]
    ids = random_prompts(6)[0]
    options = dict(temperature=0, max_gen_len=8)
    texts = {0: "", 1: "", 2: ""}
    for event in llama.stream(["the", ids, dialog], logprobs=2, **options):
        texts[event.row] += event.text
        if event.token is not None:
            assert event.top_logprobs is not None
            assert event.top_logprobs[0][0] == event.token  # temperature 0
            assert event.logprob == pytest.approx(event.top_logprobs[0][1], abs=1e-6)
    assert texts[0] == llama.text_completion(["the"], **options)[0]["generation"]
    assert texts[1] == llama.tokenizer.decode(llama.generate([ids], **options)[0][0])
    assert texts[2] == llama.chat_completion([dialog], **options)[0]["generation"]["content"]
    streamed = llama.text_completion(["the"], stream=True, **options)
    assert "".join(event.text for event in streamed) == texts[0]


def test_streams_can_take_turns_and_a_closed_one_is_cancelled(llama: Llama) -> None:
    options = dict(temperature=0, max_gen_len=20, ignore_eos=True)
    one, two = llama.stream("the", **options), llama.stream("and", **options)
    texts = ["", ""]
    for a, b in zip(one, two, strict=True):
        texts[0] += a.text
        texts[1] += b.text
    assert texts == [p["generation"] for p in llama.text_completion(["the", "and"], **options)]
    left = llama.stream("the", **options)
    next(left)
    left.close()
    assert not [slot for slot in llama.engine._slots if slot.request]
    llama.generate(random_prompts(3), max_gen_len=2)
    assert not llama.runner._inboxes


def test_several_samples_of_a_prompt(llama: Llama) -> None:
    (prompt,) = random_prompts(5)
    tokens, _ = llama.generate([prompt], max_gen_len=12, temperature=1.0, n=3, seed=8)
    assert len({tuple(row) for row in tokens}) == 3
    (second,), _ = llama.generate([prompt], max_gen_len=12, temperature=1.0, seed=9)
    assert tokens[1] == second


def test_what_a_row_samples_does_not_depend_on_its_neighbours(llama: Llama) -> None:
    prompts = random_prompts(5, 9, 3)
    options = dict(max_gen_len=12, temperature=1.0, seed=4)
    together, _ = llama.generate(prompts, **options)
    assert together == [llama.generate([prompt], **options)[0][0] for prompt in prompts]


def test_a_stop_string_cuts_text_and_echo(llama: Llama) -> None:
    options = saying(llama, "word for word")
    plain = llama.text_completion(["ab"], stop=[" for"], **options)[0]
    echoed = llama.text_completion(["ab"], stop=[" for"], echo=True, logprobs=True, **options)[0]
    assert plain["generation"] == "word"
    assert echoed["generation"] == "<|begin_of_text|>abword"


def test_score(llama: Llama) -> None:
    prompts = random_prompts(
        30, 1, 97, 8
    )  # a text that is only scored may have one token more than the cache has positions
    scores = llama.score(prompts)
    for prompt, got in zip(prompts, scores, strict=True):
        ids = torch.tensor(prompt)
        logits = llama.model(ids[None, :96])[0].log_softmax(-1)
        want = logits[: len(ids) - 1].gather(-1, ids[1:, None]).flatten()
        assert got == pytest.approx([0.0, *want.tolist()], abs=1e-5)
    text = "the word"
    ids = llama.tokenizer.encode(text, bos=True, eos=False)
    assert llama.score([text]) == [pytest.approx(llama.score([ids])[0], abs=1e-5)]


def test_reference_mode_alone_is_exact_and_fast_mode_reuses(
    model: Transformer, tokenizer_path: Path
) -> None:
    (prompt,) = random_prompts(40)
    fed: dict[str, list[int]] = {"reference": [], "fast": []}
    for mode, sizes in fed.items():
        llama = Llama(model, Tokenizer(tokenizer_path), mode=mode)  # type: ignore[arg-type]
        network = llama.engine.model
        features = network.features
        network.features = lambda tokens, *args, sizes=sizes, features=features: (  # type: ignore[method-assign]
            sizes.append(tokens.shape[1]) or features(tokens, *args)
        )
        for _ in range(2):
            llama.generate([prompt], max_gen_len=1, temperature=0)
        del network.features
    assert fed == {"reference": [40, 40], "fast": [40, 1]}


@pytest.mark.parametrize("length", [1, 2, 25])
def test_alternatives_of_a_prompts_tokens(llama: Llama, length: int) -> None:
    (prompt,) = random_prompts(length)
    params = SamplingParams(max_gen_len=0, logprobs=3, prompt_logprobs=True)
    (request,) = llama.runner.complete([prompt], params)
    assert len(request.prompt_logprobs) == len(request.prompt_top_logprobs) == length
    assert request.prompt_top_logprobs[0] == []
    rows = llama.model(torch.tensor([prompt]))[0].log_softmax(-1)
    for row, found in zip(rows, request.prompt_top_logprobs[1:], strict=False):
        values, ids = row.topk(3)
        assert [token for token, _ in found] == ids.tolist()
        assert [value for _, value in found] == pytest.approx(values.tolist(), abs=1e-4)


def generate_on_rank(folder: Path) -> Any:
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=2)
    prompts = random_prompts(5, 9, 20)
    results: list[Any] = [
        llama.generate(prompts, max_gen_len=8, temperature=0.9, seed=3, logprobs=True, echo=True),
        llama.text_completion(["the word", "and"], temperature=0, max_gen_len=8, logprobs=True),
        llama.generate([prompts[0]], max_gen_len=8, temperature=0.9),
        llama.score(prompts),
    ]
    params = SamplingParams(temperature=0, max_gen_len=3, logprobs=2, prompt_logprobs=True)
    for request in llama.runner.complete(prompts, params):
        results.append((request.prompt_top_logprobs, request.top_logprobs))
    events = list(llama.stream("the word", temperature=0, max_gen_len=8))
    stopped = llama.stream("the word", temperature=0, max_gen_len=8)
    next(stopped, None)
    stopped.close()
    results.append(llama.generate(prompts, max_gen_len=4, temperature=0))

    def fails(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    errors = []
    for options in (dict(logits_processor=fails), dict(top_p=3)):
        try:
            llama.generate(prompts, max_gen_len=4, **options)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return results, "".join(event.text for event in events), errors


def test_two_ranks_say_the_same(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", CHECKPOINT, mp_size=2, dtype=torch.float32)
    write_tokenizer(tmp_path / "model" / "tokenizer.model", demo_pieces())
    one, text, errors = generate_on_rank(tmp_path / "model")
    (first, streamed, raised), (second, nothing, followed) = run_ranks(
        2, tmp_path, generate_on_rank, tmp_path / "model"
    )
    assert first == second
    assert streamed == text
    assert nothing == ""
    assert first[0][0] == one[0][0]
    assert first[2] == one[2]
    for got, want in zip(first[0][1] + first[3], one[0][1] + one[3], strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    assert raised == errors
    assert followed[0].startswith("ParallelError: the first rank failed")
    assert followed[1] == raised[1]


def call_while_a_stream_is_open(ckpt_dir: Path) -> tuple[str, list[list[int]]]:
    llama = Llama.build(ckpt_dir, max_seq_len=32, device="cpu")
    events = llama.stream([1, 2, 3], max_gen_len=5, temperature=0)
    refused = ""
    if next(events, None):  # on the first rank
        try:
            llama.generate([[4, 5]], 3, temperature=0)
        except GenerationError as error:
            refused = str(error)
        events.close()  # type: ignore[attr-defined]
    return refused, llama.generate([[4, 5]], 3, temperature=0)[0]


def test_two_ranks_end_a_stream_before_another_call(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", CHECKPOINT, mp_size=2, dtype=torch.float32)
    write_tokenizer(tmp_path / "model" / "tokenizer.model", demo_pieces())
    first, second = run_ranks(2, tmp_path, call_while_a_stream_is_open, tmp_path / "model")
    assert "a stream is open" in first[0]
    assert first[1] == second[1]
