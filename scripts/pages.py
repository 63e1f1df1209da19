"""The code blocks of a Markdown page, its Python snippets, and its links to lines of code.

A snippet is a ```python block. A ```text block right after it shows what the snippet prints. A
block without a language holds commands of a shell, or shows a folder.
"""

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```\n(?:\n?```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
# [`Class.method`](../llama/file.py#L12)
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<file>[\w./]+\.py)#L(?P<line>\d+)\)")
END = "\N{SYMBOL FOR RECORD SEPARATOR}"  # is printed at the end of each snippet


class PageError(Exception):
    """A snippet that fails, or a link to code that does not exist."""


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    language: "" if the block names none.
    line: the number of its first line in the page.
    output: the content of the text block after it. None: there is no such block.
    """

    language: str
    line: int
    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    return [
        Block(
            match["language"],
            page[: match.start("code")].count("\n") + 1,
            textwrap.dedent(match["code"]),
            match["output"],
        )
        for match in BLOCK.finditer(page)
    ]


def snippets(page: str) -> list[Block]:
    """The Python snippets of a page, in order."""
    return [block for block in blocks(page) if block.language == "python"]


def run(some: Sequence[Block], **environment: str) -> list[str]:
    """Run snippets of one page, in order, in one new process. Returns what each of them prints.

    The names that a snippet defines exist in the snippets after it. A traceback has the line
    numbers of the page. environment: variables that are set in the process.
    Raises PageError if a snippet fails; its traceback is on stderr.
    """
    lines: list[str] = []
    for snippet in some:
        lines += [""] * (snippet.line - 1 - len(lines))
        lines += [*snippet.code.splitlines(), f"print({END!r})"]
    outputs, output = [], ""
    process = subprocess.Popen(
        [sys.executable, "-u", "-"],
        cwd=ROOT,
        # One thread, so that sums do not depend on the number of cores.
        env=os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, tqdm(total=len(some), desc="Running", unit="snippet", delay=2) as bar:
        process.stdin.write("\n".join(lines) + "\n")
        process.stdin.close()
        for line in process.stdout:
            text, end, _ = line.partition(END)
            output += text
            if end:
                outputs.append(output + "\n" if text else output)  # a block ends with a line end
                output = ""
                bar.update()
    if process.returncode:
        failed = some[min(len(outputs), len(some) - 1)]
        raise PageError(f"the snippet at line {failed.line} fails")
    return outputs


def with_outputs(page: str, outputs: Sequence[str]) -> str:
    """The page with these outputs after its snippets. An empty output has no text block."""
    remaining = iter(outputs)

    def renewed(match: re.Match[str]) -> str:
        if match["language"] != "python":
            return match[0]
        output = next(remaining)
        return f"```python\n{match['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return BLOCK.sub(renewed, page)


def with_line_numbers(page: str, folder: Path) -> str:
    """The page with the right line in each link to code. folder: that of the page.

    Raises PageError if a linked file or the named class, function or constant does not exist.
    """

    def link(match: re.Match[str]) -> str:
        line = line_of(match["name"], folder / match["file"])
        return f"[`{match['name']}`]({match['file']}#L{line})"

    return LINK.sub(link, page)


def line_of(name: str, file: Path) -> int:
    """The line where a Python file defines a class, function or constant, such as `Llama.build`.

    Raises PageError if the file does not exist or does not define the name.
    """
    if not file.is_file():
        raise PageError(f"{file} does not exist")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    line = 0
    for part in name.split("."):
        found = [node for node in body if part in _defined(node)]
        if not found:
            raise PageError(f"{file} does not define {name}")
        line, body = found[0].lineno, getattr(found[0], "body", [])
    return line


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines. An overload of a function defines none."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        is_overload = "overload" in map(ast.unparse, node.decorator_list)
        return [] if is_overload else [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]
