"""Write the bundled model's certificates of parity, and show them in docs/parity.md.

Run it when the bundled model has changed: python scripts/make_certificates.py
"""

import re
from pathlib import Path

from llama.commands.parity_tables import report
from llama.explain.certificate import certify, write_certificate
from llama.explain.oracles import ORACLES
from llama.explain.parity import compare

DOCS = Path(__file__).parent.parent / "docs"


def with_block(text: str, shown: str) -> str:
    """The text, with `shown` in place of the code block that has the same first line. It must have
    one such block."""
    title = re.escape(shown.splitlines()[0])
    block = re.compile(rf"^{title}\n.*?^```$", re.MULTILINE | re.DOTALL)
    found, n_blocks = block.subn(lambda _: f"{shown}\n```", text)
    if n_blocks != 1:
        raise SystemExit(f"the page has {n_blocks} blocks that begin with {title}, not one")
    return found


def main() -> None:
    page = DOCS / "parity.md"
    text = page.read_text(encoding="utf-8")
    for against in ORACLES:
        certificate = certify(compare(against=against, device="cpu"), device="cpu")
        name = f"bundled_{against.replace('-', '_')}.json"
        write_certificate(certificate, DOCS / "parity" / name)
        shown = report(certificate)
        print(f"{shown}\n")
        text = with_block(text, shown)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
