"""The tables that `llama parity` prints."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from llama.explain.certificate import Certificate, Figure
from llama.explain.parity import Comparison
from llama.explain.recording import LOGITS

# The columns of the table of layers, and the modules that each stands for.
COLUMNS = {
    "attention norm": ["attention_norm"],
    "attention": ["attention.wq", "attention.wk", "attention.wv", "attention.wo"],
    "feed-forward norm": ["ffn_norm"],
    "feed-forward": ["feed_forward.w1", "feed_forward.w3", "feed_forward.w2"],
    "output": [""],
}
HOLDS = {True: "holds", False: "DOES NOT HOLD", None: "need not hold"}


def report(certificate: Certificate) -> str:
    """A comparison as text: what was compared, a table of the layers, and the verdict."""
    found = certificate.comparison
    ranks = "1 rank" if found.ranks == 1 else f"{found.ranks} ranks"
    rope = "" if found.rope_factor is None else f", RoPE scaled by {found.rope_factor:g}"
    n_equal = found.n_equal_tokens
    return "\n".join(
        [
            f"llama-reference in reference mode, against {found.against}",
            f"  model     {certificate.model}, {found.dtype}, {ranks}{rope}",
            f"  weights   of {found.against}: {found.oracle_weights}",
            f"  machine   {_machine(certificate)}",
            f"  versions  {_versions(certificate)}",
            f"  prompt    {len(found.prompt_tokens)} tokens, then {found.max_gen_len} decoded",
            "",
            "The largest differences in ulps. One ulp is the spacing of the dtype's numbers at the",
            "largest number of a tensor. The last column is the output's absolute difference.",
            "",
            *_aligned(_rows(found), str.rjust),
            "",
            f"logprobs  differ by at most {found.logprob_difference:.3g} nats",
            f"tokens    {n_equal} of {found.max_gen_len} are equal",
            found.verdict,
        ]
    )


def check_table(stated: Certificate, found: Certificate, figures: Sequence[Figure]) -> str:
    """The figures of a certificate beside those of this machine, and whether each holds."""
    rows = [("", "certificate", "here", "")]
    rows += [(figure.name, figure.stated, figure.found, HOLDS[figure.holds]) for figure in figures]
    holds = all(figure.holds is not False for figure in figures)
    return "\n".join(
        [
            f"certificate  {_machine(stated)}; {_versions(stated)}",
            f"             {stated.comparison.verdict}",
            f"here         {_machine(found)}; {_versions(found)}",
            f"             {found.comparison.verdict}",
            "",
            *_aligned(rows, str.ljust),
            "",
            "the certificate holds here" if holds else "the certificate does NOT hold here",
        ]
    )


def _rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    """The header, a row for each layer, and a row for each tensor outside the layers."""
    yield ("", *COLUMNS, "absolute")
    for name, difference in found.modules.items():
        is_part = name.count(".") > 1  # such as layers.0.ffn_norm: a column of its layer's row
        if not is_part:
            parts = [[f"{name}.{part}".rstrip(".") for part in of] for of in COLUMNS.values()]
            yield (
                "logits" if name == LOGITS else name,
                *(_largest(found, names) for names in parts),
                f"{difference.absolute:.2g}",
            )
    last = f"{found.decoded.ulps:.3g}", f"{found.decoded.absolute:.2g}"
    yield ("decoded logits", *[""] * (len(COLUMNS) - 1), *last)


def _largest(found: Comparison, names: Sequence[str]) -> str:
    ulps = [found.modules[name].ulps for name in names if name in found.modules]
    return f"{max(ulps):.3g}" if ulps else ""


def _aligned(rows: Iterable[tuple[str, ...]], align: Callable[[str, int], str]) -> list[str]:
    """The rows as lines. The first column is aligned to the left, and the others by `align`."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(align, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _machine(certificate: Certificate) -> str:
    return f"{certificate.device} ({certificate.processor}), {certificate.threads} thread(s)"


def _versions(certificate: Certificate) -> str:
    return ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
