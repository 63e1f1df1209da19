"""Regular expressions from a file, matched with names.

A hostile expression can run for years, and nothing in its own process can stop it. So expressions
are matched in another process, which has a time limit.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from llama.errors import ConfigError

SECONDS = 20  # the time limit
PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
found = []
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        sys.exit(f"{pattern!r} is no regular expression: {error}")
    found.append([name for name in names if compiled.fullmatch(name)])
json.dump(found, sys.stdout)
"""


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """For each pattern the names that it matches as a whole.

    Raises ConfigError for a pattern that is not valid, or if matching takes too long.
    """
    if not patterns:
        return []
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        shown = ", ".join(patterns)
        raise ConfigError(f"matching takes more than {SECONDS} seconds: {shown}") from None
    except OSError as error:
        raise ConfigError(f"cannot match regular expressions: {error.strerror}") from error
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or ["the regular expressions cannot be matched"]
        raise ConfigError(lines[-1])
    found: list[list[str]] = json.loads(child.stdout)
    return found
