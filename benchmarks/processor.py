"""Name the processor on which figures are measured."""

import os
import platform
import re
from pathlib import Path

from llama.fast.cpu.kernels.isa import instruction_sets

# Linux' names of the instruction sets that matter here.
SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimddp", "i8mm")


def _cpuinfo() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {}
    lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    return {name.strip(): value.strip() for name, value in lines}


def processor() -> str:
    """The processor's name, family and model, its instruction sets, and LLAMA_ISA if it is set."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields['model']}"
    flags = fields.get("flags", fields.get("Features", "")).split()
    name += f" ({', '.join(s for s in SETS if s in flags)})"
    narrowed = os.environ.get("LLAMA_ISA")
    return f"{name}, narrowed to {narrowed}" if narrowed else name


def file_name() -> str:
    """A part of a file's name: the processor's name and the instruction set that kernels use."""
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return re.sub(r"\W+", "_", f"{name} {instruction_sets()[0]}".lower())
