"""llama parity: compare this library with another implementation, layer by layer."""

import sys
from typing import Any

from llama.commands.flags import as_text
from llama.errors import ConfigError
from llama.terminal_text import say


@as_text
def parity(
    prompt: str | None = None,
    *words: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    against: str | None = None,
    max_gen_len: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
    check: str | None = None,
    force: bool = False,
) -> None:
    """Compare this library, in reference mode, with another implementation (extra [parity]).

    Both compute the same prompt with the same weights, and the outputs of all modules are compared.
    Then both decode the likeliest tokens, each with its own KV cache.

    Against llama-models the two must be bit-equal. transformers rounds at other places, so against
    it the logits may differ up to a limit, which the output states. Under torchrun each rank
    compares its own part of the tensors with llama-models.

    Reads:
        PROMPT: the text, such as
            Once upon a time there was a fox
        CHECK: a certificate that an earlier run wrote to OUT, if the flag is given.

    Writes:
        Standard output: a line for each module, and the verdict.
        OUT: the certificate as JSON, if the flag is given.

    Examples:
        llama parity "Once upon a time" --ckpt_dir Meta-Llama-3-8B --out certificate.json
        llama parity --ckpt_dir Meta-Llama-3-8B --check certificate.json

    Exit codes:
        1: the two differ, or a figure of the certificate CHECK does not hold

    Args:
        prompt: the text, in quotes; by default the beginning of a tale.
        ckpt_dir: a checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        against: llama-models (Meta's own code) or transformers; by default llama-models.
        max_gen_len (tokens): tokens that both decode; by default 32.
        device: cuda, mps or cpu; by default the first of these that is available.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
        out: a file, to which the certificate is written as JSON.
        check: a certificate; the comparison is run again with its settings, and the figures are
            compared.
        force: replace OUT if it exists.
    """
    from llama.commands.parity_tables import check_table, report
    from llama.explain.certificate import (
        certify,
        compare_figures,
        read_certificate,
        write_certificate,
    )
    from llama.explain.parity import compare
    from llama.files import check_can_write
    from llama.parallel import is_main_rank

    if words:
        raise ConfigError(f"unexpected {words[0]!r}: put the prompt in quotes")
    if out is not None:
        check_can_write(out, force)
    flags = dict(prompt=prompt, against=against, max_gen_len=max_gen_len, dtype=dtype)
    settings: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    stated = None
    if check is not None:
        if settings:
            raise ConfigError(
                f"--check takes its settings from the certificate: leave out {', '.join(settings)}"
            )
        stated = read_certificate(check)
        settings = stated.comparison.settings
    comparison = compare(ckpt_dir, tokenizer_path, device=device, **settings)
    if not is_main_rank():
        return
    certificate = certify(comparison, ckpt_dir, tokenizer_path, device)
    if stated is None:
        say(report(certificate))
        holds = comparison.holds
    else:
        figures = compare_figures(stated, certificate)
        say(check_table(stated, certificate, figures))
        holds = all(figure.holds is not False for figure in figures)
    if out is not None:
        write_certificate(certificate, out)
    if not holds:  # on the main rank only, since torchrun stops the others when a rank fails
        sys.exit(1)
