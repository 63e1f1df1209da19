"""Write docs/api.md, the page of the public Python API, from the source, its docstrings, and the
examples in scripts/api_examples.md.

python scripts/api_page.py
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama
import llama.explain
from llama import errors
from llama.engine.engine import Engine
from llama.engine.request import Event, Request
from llama.rope_scaling import RopeScaling

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
EXAMPLES = ROOT / "scripts" / "api_examples.md"
WIDTH = 90  # columns; a longer signature has a line for each parameter
PROPERTIES = ("property", "cached_property")
SECTION = re.compile(r"(Args|Attributes|Keys|Returns|Raises):")  # of a docstring
ITEM = re.compile(r"(    )?(\w+(?:, \w+)*): (.*)")  # of a section, or of a parameter outside one

INTRODUCTION = """\
# The Python API

`scripts/api_page.py` makes this page from the docstrings and from `scripts/api_examples.md`. Each
section begins with an example. The blocks of a section run in order. README has
[more examples](../README.md#use-it-from-python).

In shapes, B is the number of rows, S of new tokens, and V of words in the vocabulary. D is the
width of the model, and hd that of a head. A logprob is the natural logarithm of a probability.
"""


class Entry(NamedTuple):
    """A class or function on the page, and the methods to show. None: all public methods."""

    value: Any
    methods: Sequence[str] | None = None


def entries() -> dict[str, list[Entry]]:
    """What is on the page, by section."""
    return {
        "Text from a model": [
            Entry(llama.Llama),
            Entry(llama.CompletionPrediction),
            Entry(llama.ChatPrediction),
            Entry(llama.SamplingParams),
        ],
        "The token loop": [
            Entry(Engine, ("submit", "step", "cancel", "check", "has_work")),
            Entry(Request, ()),
            Entry(Event),
        ],
        "The network": [Entry(llama.Transformer), Entry(llama.ModelArgs), Entry(RopeScaling)],
        "Texts and dialogs as tokens": [
            Entry(llama.Tokenizer),
            Entry(llama.ChatFormat),
            Entry(llama.Message),
        ],
        "Every tensor of a prompt": [
            Entry(getattr(llama.explain, name)) for name in llama.explain.__all__
        ],
        "Errors": [Entry(value) for value in vars(errors).values() if is_error(value)],
    }


def is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, errors.LlamaError)


# ---- definitions in the source ------------------------------------------------------------------


class Definition(NamedTuple):
    """A class, function, method or property. parameters: "name: type = default"; fields, for a
    class without a constructor of its own."""

    name: str
    parameters: list[str]
    result: str  # "": a class
    docstring: str
    is_property: bool = False


def definition(entry: Entry) -> tuple[Definition, list[Definition]]:
    """The class or function, and its methods and properties in the order of the source."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(entry.value))).body
    if isinstance(node, ast.FunctionDef):
        return of_function(node), []
    assert isinstance(node, ast.ClassDef)
    functions = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)
                 and not is_setter(child)}  # fmt: skip
    if "__init__" in functions:
        parameters = of_function(functions["__init__"]).parameters
    else:
        parameters = [ast.unparse(child) for child in node.body if isinstance(child, ast.AnnAssign)]
    public = [name for name in functions if not name.startswith("_")]
    shown = public if entry.methods is None else entry.methods
    methods = [of_function(functions[name]) for name in shown]
    return Definition(node.name, parameters, "", docstring(node)), methods


def of_function(node: ast.FunctionDef) -> Definition:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = len(positional) - len(arguments.defaults)
    defaults = [*[None] * missing, *arguments.defaults]
    parameters = [*map(parameter, positional, defaults)]
    if positional and positional[0].arg in ("self", "cls"):
        del parameters[0]
    if arguments.vararg:
        parameters.append("*" + parameter(arguments.vararg, None))
    elif arguments.kwonlyargs:
        parameters.append("*")
    parameters += map(parameter, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        parameters.append("**" + parameter(arguments.kwarg, None))
    is_property = any(ast.unparse(decorator) in PROPERTIES for decorator in node.decorator_list)
    result = annotation(node.returns)
    return Definition(node.name, parameters, result, docstring(node), is_property)


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = f"{argument.arg}: {annotation(argument.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def annotation(node: ast.expr | None) -> str:
    """The text of an annotation, without the quotes of a forward reference."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return "None" if node is None else ast.unparse(node)


def docstring(node: ast.ClassDef | ast.FunctionDef) -> str:
    return ast.get_docstring(node) or ""


def is_setter(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Attribute) and decorator.attr == "setter"
               for decorator in node.decorator_list)  # fmt: skip


def names_of(parameters: Sequence[str]) -> list[str]:
    """The names of parameters or fields."""
    return [text.partition(":")[0].lstrip("*") for text in parameters if text != "*"]


# ---- Markdown -----------------------------------------------------------------------------------


def page() -> str:
    """The whole page."""
    sections, found_examples = entries(), examples()
    lines = [INTRODUCTION]
    for title, found in sections.items():
        names = [f"[{e.value.__name__}](#{anchor(e.value.__name__)})" for e in found]
        lines.append(f"- [{title}](#{anchor(title)}): {', '.join(names)}")
    for title, found in sections.items():
        lines += ["", f"## {title}", "", found_examples[title]]
        for entry in found:
            lines += ["", *describe(entry)]
    return "\n".join(lines) + "\n"


def examples() -> dict[str, str]:
    """The text and the blocks of code that begin each section, by its title."""
    sections = re.split(r"^## (.+)\n", EXAMPLES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(sections[1::2], map(str.strip, sections[2::2]), strict=True))


def describe(entry: Entry) -> Iterator[str]:
    """The lines of a class or function."""
    whole, methods = definition(entry)
    file = Path(inspect.getfile(inspect.unwrap(entry.value))).relative_to(ROOT)
    yield f"### {whole.name}"
    yield f"\nIn [{file}](../{file})."
    if is_error(entry.value):
        yield ""
    else:
        yield from code(whole, whole.name)
    yield from markdown(whole)
    for method in methods:
        full_name = f"{whole.name}.{method.name}"
        yield f"\n#### {full_name}"
        yield from code(method, full_name)
        yield from markdown(method)


def code(found: Definition, name: str) -> Iterator[str]:
    """The signature. The language is py, because tests run the blocks of language python."""
    result = f" -> {found.result}" if found.result else ""
    line = f"{name}({', '.join(found.parameters)}){result}"
    if found.is_property:
        line = f"{name}: {found.result}"
    elif len(line) > WIDTH:
        parameters = "".join(f"    {text},\n" for text in found.parameters)
        line = f"{name}(\n{parameters}){result}"
    yield f"\n```py\n{line}\n```\n"


def markdown(found: Definition) -> Iterator[str]:
    """The docstring. Parameters, attributes, keys and errors become lists."""
    names = names_of(found.parameters)
    section, is_item = "", False
    for line in found.docstring.splitlines():
        if heading := SECTION.fullmatch(line):
            section, is_item = heading[1], False
            yield f"**{section}**\n"
            continue
        if not line.startswith(" ") and line:
            section = ""
        item = ITEM.fullmatch(line)
        is_named = item is not None and all(name in names for name in item[2].split(", "))
        if item and (is_named or (section and section != "Returns" and item[1])):
            is_item = True
            yield f"- `{item[2].replace(', ', '`, `')}`: {item[3]}"
        elif is_item and line.startswith(" "):
            yield f"  {line.strip()}"
        else:
            if is_item and line:
                yield ""
            is_item = False
            yield line.strip()


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written to {PAGE.relative_to(ROOT)}")
