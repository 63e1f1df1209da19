"""lm-eval's client for completions against the server gives the numbers of `llama evaluate`."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers.server import MODEL, running
from lm_eval.tasks import TaskManager

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED
from llama.evaluation.harness import LlamaLM

QUESTIONS = [
    ("Once upon a time there was a", ["king", "carburettor"], 0),
    ("He opened the door and", ["elephant of", "went in"], 1),
    ("They lived happily ever", ["seven", "after"], 1),
]


def test_the_same_logprobs(tmp_path: Path) -> None:
    tokenizer = convert(BUNDLED, tmp_path / "hf", "hf")
    lines = [json.dumps(dict(zip("qca", question, strict=True))) for question in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    files = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
    task = {
        "task": "tale", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": files | {"cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "c",
        "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tale.yaml").write_text(json.dumps(task))  # YAML knows JSON
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def run(model: Any, **options: Any) -> list[Any]:
        found = lm_eval.simple_evaluate(
            model, tasks=["tale"], task_manager=manager, log_samples=True, **options
        )
        return [sample["filtered_resps"] for sample in found["samples"]["tale"]]

    llama = Llama.build(max_seq_len=256, max_batch_size=4, mode="fast", device="cpu")
    with running(llama) as (_, url):
        arguments = dict(
            model=MODEL, base_url=f"{url}/v1/completions", tokenizer=str(tokenizer),
            tokenizer_backend="huggingface", max_length=256, add_bos_token=True,
        )  # fmt: skip
        served = run("local-completions", model_args=arguments)
    own = run(LlamaLM(device="cpu", max_seq_len=256))
    for theirs, ours in zip(served, own, strict=True):
        for (logprob, is_greedy), (want, want_greedy) in zip(theirs, ours, strict=True):
            assert logprob == pytest.approx(want, abs=1e-3)
            assert is_greedy == want_greedy
