"""A program for torchrun, in which one rank fails itself at a chosen point.

Arguments: mode, the point (start, load, prefill, decode, idle), the rank, and what happens to it:
the name of a signal, `exception`, or `sleep`.
"""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import llama.generation as generation
from llama import Llama
from llama.commands import terminal
from llama.engine.plan import Action, Plan
from llama.engine.worker import Worker
from llama.errors import one_line
from llama.sampling import SamplingParams

MODE, POINT, RANK, FAULT = sys.argv[1:]


def meet(point: str) -> None:
    """Fail, if this is the rank and the point."""
    if point != POINT or os.environ["RANK"] != RANK:
        return
    print("it is lost now", flush=True)
    if FAULT == "exception":
        raise ZeroDivisionError("a mistake in the program")
    if FAULT == "sleep":
        time.sleep(600)
    else:
        os.kill(os.getpid(), getattr(signal, FAULT))


def patch(owner: Any, name: str, before: Any) -> None:
    """Call `before` with the arguments of each call of the function."""
    function = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return function(*args, **kwargs)

    setattr(owner, name, patched)


def before_plan(worker: Worker, plan: Plan) -> None:
    if plan.action is Action.FORWARD:
        meet("prefill" if len(plan.tokens[0]) > 1 else "decode")


def main() -> None:
    meet("start")
    patch(generation, "load_model", lambda *_: meet("load"))
    patch(Worker, "_execute", before_plan)
    llama = Llama.build(Path(generation.__file__).parent / "bundled", mode=MODE, device="cpu")
    if POINT == "idle":
        threading.Timer(0.5, meet, ["idle"]).start()
        with terminal.on_first_rank(llama) as is_first_rank:
            if is_first_rank:
                terminal.read_line(llama, "")
    prompt = "Once upon a time there was a king. " * 5
    with terminal.on_first_rank(llama) as is_first_rank:
        if is_first_rank:
            params = SamplingParams(max_gen_len=8, ignore_eos=True)
            with terminal.stream(llama, prompt, params) as events:
                print(len(list(events)), "events")


if __name__ == "__main__":
    logging.basicConfig()
    with one_line():
        main()
