"""The instruction sets that the kernels are compiled for, and those that this processor has."""

import functools
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import llvmlite.binding

from llama.errors import ConfigError


class Tile(NamedTuple):
    """The size of a tile of floats: its most rows of weights, and its most rows of activations."""

    rows: int
    inputs: int


@dataclass(frozen=True)
class InstructionSet:
    """What the tiles of an instruction set are.

    lanes: how many numbers of 32 bits a vector has; a tile of bytes has as many rows of weights.
    decode, prefill: tiles of floats; all their sums fit the registers. byte_inputs: the most rows
    of activations of a tile of bytes. dot: the instruction that multiplies and adds four bytes.
    has_pairs: one instruction multiplies and adds two bfloat16. needs: LLVM's names of features.
    """

    lanes: int
    decode: Tile
    prefill: Tile
    byte_inputs: int
    dot: Literal["vpdpbusd", "sdot"] | None
    has_pairs: bool
    needs: tuple[str, ...]


AVX2 = ("avx2", "fma")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
# decode, prefill and byte_inputs. MANY: for 32 registers that hold a whole vector each. FEW: for 16
# such registers, or for 32 that hold half a vector each.
MANY = Tile(3, 8), Tile(2, 8), 8
FEW = Tile(3, 4), Tile(3, 4), 4
# The fastest first. "dotprod" is for ARM. "plain" is LLVM's vectors alone, for every processor.
ISAS = {
    "avx512bf16": InstructionSet(16, *MANY, "vpdpbusd", True, (*AVX512, "avx512bf16")),
    "avx512": InstructionSet(16, *MANY, "vpdpbusd", False, AVX512),
    "vnni": InstructionSet(8, *FEW, "vpdpbusd", False, (*AVX2, "avxvnni")),
    "avx2": InstructionSet(8, *FEW, None, False, AVX2),
    "dotprod": InstructionSet(8, *FEW, "sdot", False, ("neon", "dotprod")),
    "plain": InstructionSet(8, *FEW, None, False, ()),
}


@functools.cache
def _of_this_processor() -> list[str]:
    features = {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}
    if {"avx512vnni", "avx512vl"} <= features:  # has the instructions of AVX-VNNI too
        features.add("avxvnni")
    return [name for name, isa in ISAS.items() if features.issuperset(isa.needs)]


def instruction_sets() -> list[str]:
    """The names of the instruction sets that the kernels may use here, the fastest first.

    The environment variable LLAMA_ISA names the fastest one that is allowed. Raises ConfigError if
    this processor lacks it.
    """
    found, wanted = _of_this_processor(), os.environ.get("LLAMA_ISA")
    if not wanted:
        return found
    if wanted not in found:
        raise ConfigError(f"LLAMA_ISA is {wanted!r}, but this processor has {', '.join(found)}")
    return found[found.index(wanted) :]
