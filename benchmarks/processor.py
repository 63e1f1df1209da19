"""Name the processor on which figures are measured."""

import os
import re

from llama.fast.cpu.kernels.isa import instruction_sets
from llama.processor import cpuinfo, processor_name

# Linux' names of the instruction sets that matter here.
SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimddp", "i8mm")


def processor() -> str:
    """The processor's name, family and model, its instruction sets, and LLAMA_ISA if it is set."""
    fields, name = cpuinfo(), processor_name()
    if "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields['model']}"
    flags = fields.get("flags", fields.get("Features", "")).split()
    name += f" ({', '.join(s for s in SETS if s in flags)})"
    narrowed = os.environ.get("LLAMA_ISA")
    return f"{name}, narrowed to {narrowed}" if narrowed else name


def file_name() -> str:
    """A part of a file's name: the processor's name and the instruction set that kernels use."""
    return re.sub(r"\W+", "_", f"{processor_name()} {instruction_sets()[0]}".lower())
