"""The structure of the package: where files are, and which modules they may import."""

import ast
from pathlib import Path

import pytest

LLAMA = Path(__file__).parent.parent / "llama"

# The layers from the bottom up. A file imports from its own package and from lower layers only.
FLOORS: list[set[str]] = [
    {"errors", "files", "memory", "processor", "tensorboard_files", "terminal_text"},
    {
        "config",
        "rope_scaling",
        "parallel",
        "lost_ranks",
        "slow_ranks",
        "cache",
        "sampling",
        "chat_format",
        "chat_forms",
        "gguf_reader",
        "gguf_file",
        "prompts",
        "tools",
        "tool_calls",
    },
    {"model", "adapters", "tokenizer_files", "tokenizer"},
    {"fast"},
    {"engine"},
    {"checkpoints"},
    {"predictions", "infilling", "generation"},
    {"training", "evaluation", "server", "explain"},
    {"commands"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NEVER = {
    ("checkpoints", "engine"),
    ("evaluation", "training"),
    ("training", "evaluation"),
}
MOST_LINES = 350
# The docstring at the top of each of these files says why the file is longer.
LONGER = {"model", "generation"}


def modules() -> dict[str, Path]:
    """The files of all modules, by dotted name without `llama.`. The name "" is `llama` itself."""
    found = {}
    for path in LLAMA.rglob("*.py"):
        parts = path.relative_to(LLAMA).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere, also inside functions and under
    TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package != "llama":
                continue
            while rest not in MODULES:  # the last part is a class or function of a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room_of(name) for name in MODULES} - {""} <= FLOOR_OF.keys()


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {""}))
def test_imports_go_down(name: str) -> None:
    own = room_of(name)
    for imported in IMPORTS[name]:
        room = room_of(imported)
        if room == own:
            continue
        assert imported != "", f"{name} imports the package itself: import the module instead"
        is_below = FLOOR_OF[room] < FLOOR_OF[own]
        is_beside = FLOOR_OF[room] == FLOOR_OF[own] and (LLAMA / f"{own}.py").exists()
        assert is_below or is_beside, f"{name} imports {imported}, which is not below it"
        assert (own, room) not in NEVER, f"{name} imports {imported}"


def test_no_circles() -> None:
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join([*path, name])}"
        if name in finished:
            return
        for imported in IMPORTS[name]:
            visit(imported, (*path, name))
        finished.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_has_one_responsibility(name: str) -> None:
    n_lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert n_lines <= MOST_LINES or name in LONGER, f"{name} has {n_lines} lines"


def test_optional_packages_are_imported_in_one_file() -> None:
    places: dict[str, set[str]] = {"tensorboard": set(), "lm_eval": set(), "huggingface_hub": set()}
    places |= {name: set() for name in ("uvicorn", "pydantic", "llguidance", "prometheus_client")}
    places |= {name: set() for name in ("llama_models", "transformers")}
    places["gguf"] = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for module in modules:
                for part in module.split("."):  # also torch.utils.tensorboard
                    if part in places and not module.startswith("llama."):
                        places[part].add(name)
    assert all(len(files) <= 1 for files in places.values()), places
