"""The lm-evaluation-harness on the bundled model: its figures equal those of plain forwards."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from lm_eval.api.instance import Instance

from llama import Llama
from llama.__main__ import main
from llama.errors import GenerationError
from llama.evaluation.harness import LlamaLM, evaluate
from llama.evaluation.perplexity import score

BEGINNING = "Once upon a time there was a"
TEXT = "There was once a poor woodcutter who had two children, a boy and a girl. " * 4
QUESTIONS = [
    (BEGINNING, ["king", "carburettor"], 0),
    ("He opened the door and", ["elephant of", "went in"], 1),
    ("They lived happily ever", ["seven", "after"], 1),
    ("The princess said to her", ["father", "invoice"], 1),  # the wrong answer is marked as right
]


@pytest.fixture(scope="module")
def lm() -> LlamaLM:
    return LlamaLM(device="cpu")


@pytest.fixture(scope="module")
def short() -> LlamaLM:
    return LlamaLM(device="cpu", max_seq_len=32)


def instances(*arguments: tuple) -> list[Instance]:
    return [Instance("any", {}, args, i) for i, args in enumerate(arguments)]


def forward(llama: Llama, tokens: list[int], n: int) -> tuple[float, bool]:
    """The sum of the logprobs of the last n tokens, and whether all of them are the likeliest."""
    logits = llama.model(torch.tensor([tokens[:-1]]))[0, len(tokens) - 1 - n :].double()
    targets = torch.tensor(tokens[len(tokens) - n :])
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])
    return logprobs.sum().item(), bool((logits.argmax(-1) == targets).all())


def encode(llama: Llama, text: str, bos: bool = True) -> list[int]:
    return llama.tokenizer.encode(text, bos=bos, eos=False)


def test_loglikelihood_is_that_of_a_plain_forward(lm: LlamaLM) -> None:
    (greedy,) = lm.llama.text_completion([BEGINNING], temperature=0, max_gen_len=8)
    pairs = [
        (BEGINNING, greedy["generation"]),
        (BEGINNING, greedy["generation"] + " carburettor"),
        (BEGINNING + " ", "king"),  # the harness moves the blank to the continuation
        (TEXT, " The boy was called Hans."),
        ("", "Once upon a time"),
        (" ", "Once upon a time"),
    ]
    found = lm.loglikelihood(instances(*pairs))
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        tokens = encode(lm.llama, context + continuation)
        n = len(tokens) - len(encode(lm.llama, context.rstrip()))
        expected = forward(lm.llama, tokens, n)
        assert logprob == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]
    assert [is_greedy for _, is_greedy in found[:2]] == [True, False]
    # An empty continuation has probability 1.
    assert lm.loglikelihood(instances((BEGINNING, ""))) == [(0, True)]


def test_a_long_context_loses_its_beginning(short: LlamaLM) -> None:
    tokens = encode(short.llama, TEXT + "Hans")
    n = len(tokens) - len(encode(short.llama, TEXT.rstrip()))
    (found,) = short.loglikelihood(instances((TEXT, "Hans")))
    assert found[0] == pytest.approx(forward(short.llama, tokens[-33:], n)[0], abs=1e-4)
    with pytest.raises(GenerationError, match=r"continuation has .* max_seq_len is 32"):
        short.loglikelihood(instances(("Hans", TEXT)))


def test_rolling_predicts_every_token_once(lm: LlamaLM, short: LlamaLM) -> None:
    found = lm.loglikelihood_rolling(instances((TEXT,), ("",), (BEGINNING,)))
    expected = [-score(lm.llama, [TEXT]).nats, 0, -score(lm.llama, [BEGINNING]).nats]
    assert found == pytest.approx(expected, abs=1e-3)

    tokens = encode(short.llama, TEXT)
    assert len(tokens) > 65
    expected_sum = 0.0
    for start in range(1, len(tokens), 32):
        end = min(start + 32, len(tokens))
        expected_sum += forward(short.llama, tokens[end - 33 : end], end - start)[0]
    (found_sum,) = short.loglikelihood_rolling(instances((TEXT,)))
    assert found_sum == pytest.approx(expected_sum, abs=1e-3)


def test_generation_ends_at_the_stop_strings(lm: LlamaLM, short: LlamaLM) -> None:
    contexts = [BEGINNING, "The wolf said to the king", TEXT]
    until = {"until": [".", " and"], "max_gen_toks": 24}
    found = lm.generate_until(instances(*((context, until) for context in contexts)))
    expected = lm.llama.text_completion(contexts, temperature=0, max_gen_len=24, stop=[".", " and"])
    assert found == [prediction["generation"] for prediction in expected]
    assert not any("." in text for text in found)

    # Requests with different options keep their order. A single stop string needs no list.
    more = lm.generate_until(
        instances((BEGINNING, until), (TEXT, {"until": "t", "max_gen_toks": 3}), (TEXT, until))
    )
    assert more == [found[0], more[1], found[2]]
    assert "t" not in more[1]

    cut = encode(short.llama, TEXT)[-24:]
    (text,) = short.generate_until(instances((TEXT, {"until": [], "max_gen_toks": 8})))
    tokens, _ = short.llama.generate([cut], max_gen_len=8, temperature=0)
    assert text == short.llama.tokenizer.decode(tokens[0])
    with pytest.raises(GenerationError, match=r"max_gen_toks is 256, .* max_seq_len is 32"):
        short.generate_until(instances((TEXT, {"until": ["."]})))
    with pytest.raises(GenerationError, match="num_beams"):
        lm.generate_until(instances((TEXT, until | {"num_beams": 4})))


@pytest.fixture
def tasks(lm: LlamaLM, tmp_path: Path) -> Path:
    """A folder with two tasks: choose an answer, and generate the text that the model generates."""
    expected = lm.llama.text_completion(
        [question for question, _, _ in QUESTIONS], temperature=0, max_gen_len=16, stop=["."]
    )
    lines = [
        {"question": question, "choices": choices, "label": label, "answer": text["generation"]}
        for (question, choices, label), text in zip(QUESTIONS, expected, strict=True)
    ]
    lines[0]["answer"] = "something else"
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "question",
    }
    choose = {
        "task": "tale_choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        "task": "tale_write",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choose, write):  # JSON is valid YAML
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return tmp_path


def test_a_task_of_the_harness(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["llama", "evaluate", *map(str, arguments)])
        main()

    out = tasks / "results.json"
    run("tale_choose,tale_write", "--include_path", tasks, "--device=cpu", "--out", out)
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())["results"]
    assert results["tale_choose"]["acc,none"] == 0.75
    assert results["tale_write"]["exact_match,none"] == 0.75
    assert printed.count("0.75") == 2

    def fail(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            run(*arguments, "--device=cpu")
        assert exit_.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    where = ["--include_path", tasks]
    assert "no task tale_sing" in fail("tale_sing", *where)
    assert "limit is 'all'" in fail("tale_choose", *where, "--limit=all")
    assert "num_fewshot is -1" in fail("tale_choose", *where, "--num_fewshot=-1")
    assert "no such folder: " in fail("tale_choose", "--include_path", tasks / "none")
    assert "there is no folder" in fail("tale_choose", *where, "--out", tasks / "none" / "r.json")
    assert "it is a folder" in fail("tale_choose", *where, "--out", tasks)
    (tasks / "questions.jsonl").unlink()
    assert "cannot read the data" in fail("tale_choose", *where)


def test_ranks_that_share_a_model_do_the_same(tasks: Path, tmp_path: Path) -> None:
    table, nothing = run_ranks(2, tmp_path, table_of_rank, tasks)
    assert nothing == ""
    rows = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()[2:]]
    assert [(row[1], float(row[7])) for row in rows] == [("tale_choose", 1), ("tale_write", 0.6667)]


def table_of_rank(folder: Path) -> str:
    return evaluate(["tale_choose", "tale_write"], folder, limit=3, device="cpu")


def test_without_the_extra_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python does for a missing package
    monkeypatch.delitem(sys.modules, "llama.evaluation.harness")
    with pytest.raises(ValueError, match=r"pip install 'llama-reference\[eval\]'"):
        import llama.evaluation.harness  # noqa: F401
