"""TensorBoard's event files: the log of a training run and the graph of a model (extra `[train]`).

This is the only file that imports TensorBoard.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.errors import DataError


@dataclass(frozen=True)
class GraphNode:
    """An operation, a weight or an input of a model.

    name: its boxes and its own name, separated by slashes. inputs: names of the nodes whose results
    it takes. shape, dtype: those of its result.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


def summary_writer(folder: str | Path) -> Any:
    """A `torch.utils.tensorboard.SummaryWriter` that adds its events to a folder.

    Raises DataError if TensorBoard is not installed or the folder cannot be written.
    """
    with _one_line_errors(folder):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))


def write_graph(folder: str | Path, nodes: Sequence[GraphNode]) -> None:
    """Add a graph to a folder, for TensorBoard's graph page. Raises as `summary_writer` does."""
    with _one_line_errors(folder):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.graph_pb2 import GraphDef
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        graph = GraphDef()
        for node in nodes:
            written = graph.node.add(name=node.name, op=node.op, input=node.inputs)
            shape = written.attr["_output_shapes"].list.shape.add()
            for size in node.shape:
                shape.dim.add(size=size)
            written.attr["dtype"].s = node.dtype.encode()
        writer = EventFileWriter(str(folder))
        writer.add_event(Event(wall_time=time.time(), graph_def=graph.SerializeToString()))
        writer.close()


@contextlib.contextmanager
def _one_line_errors(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError("TensorBoard is missing: pip install 'llama-reference[train]'") from error
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}") from error
