"""Name the processor on which figures are measured."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")  # on Linux


def cpuinfo() -> dict[str, str]:
    """The fields that Linux gives for a processor core. Empty on other systems."""
    if not CPUINFO.exists():
        return {}
    lines = [line.split(":", 1) for line in CPUINFO.read_text().splitlines() if ":" in line]
    return {name.strip(): value.strip() for name, value in lines}


def processor_name() -> str:
    """The processor's name, such as "AMD EPYC 7763", or its kind where the system gives no name."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()
