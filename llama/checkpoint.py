"""Checkpoint folders, Meta's or Hugging Face's, at any number of shards and ranks.

Files are mapped, not read, and a rank touches nothing but its own part: on the CPU, with as many
ranks as Meta's folder has shards, the weights are the file's own pages.
"""

import math
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

from llama import config, hugging_face, parallel
from llama.config import ModelArgs
from llama.errors import CheckpointError, ConfigError
from llama.fast import KINDS, QUANTIZERS, Width, is_quantized, set_quantized
from llama.files import atomic_file, why_unreadable, write_json
from llama.memory import with_huge_pages
from llama.model import Transformer
from llama.quantize import LAYOUT, Quantized, join, narrow, quantize_int8

BUNDLED = Path(__file__).parent / "bundled"  # the trained model that comes with the package
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROTATED = ("wq.weight", "wk.weight")  # what RoPE turns
KEYS_AND_VALUES = ("wk.weight", "wv.weight")
ALIGNMENT = 64  # bytes; safetensors aligns to 8
MOST_NAMES = 10  # how many tensors an error message names
IGNORED = "rope.freqs"  # a table that Llama 2's files carry; it is computed here


def find_folder(ckpt_dir: str | Path) -> Path:
    """The folder that holds the weights: `ckpt_dir` with Meta's or Hugging Face's files, or the
    `original/` inside it, where Hugging Face's repositories keep Meta's."""
    folder = Path(ckpt_dir)
    if not os.path.isdir(folder):  # False too for a name that no file can have
        raise CheckpointError(f"no such checkpoint folder: {folder}")
    if is_metas(folder):
        return folder
    if os.path.lexists(folder / "config.json") and any(folder.glob("*.safetensors")):
        return folder
    if is_metas(folder / "original"):
        return folder / "original"
    raise CheckpointError(
        f"{folder} has no params.json, no config.json with .safetensors, and no original/ folder"
    )


def find_tokenizer(folder: Path, ckpt_dir: Path) -> Path:
    """The tokenizer's file of the weights in `folder`, which was found in `ckpt_dir`.

    Hugging Face's repositories have Meta's in `original/`; Meta's Llama 2 downloads beside the
    models' folders.
    """
    own = (folder, ckpt_dir, ckpt_dir / "original")
    places = [place / name for name in ("tokenizer.model", "tokenizer.json") for place in own]
    for place in (*places, ckpt_dir.parent / "tokenizer.model"):
        if os.path.lexists(place):  # opening it says what is wrong with it
            return place
    raise CheckpointError(
        f"{folder} has no tokenizer.model or tokenizer.json: name one with tokenizer_path"
    )


def shard_name(rank: int, quantization: Width | None = None) -> str:
    return f"consolidated.{rank:02d}.{'pth' if quantization is None else 'safetensors'}"


def find_shards(folder: Path, quantization: Width | None = None) -> list[Path]:
    """The shards consolidated.00.pth, consolidated.01.pth, … in the order of the ranks."""
    first = shard_name(0, quantization)
    shards = sorted(folder.glob(first.replace("00", "*")))
    if not shards:
        raise CheckpointError(f"{folder} has no shards ({first} and so on)")
    for rank, shard in enumerate(shards):
        if shard.name != (name := shard_name(rank, quantization)):
            raise CheckpointError(f"{folder} has {shard.name} where {name} is expected")
    return shards


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.pth` file by name, mapped from the file where its format allows.

    Nothing but tensors is unpickled, so a file cannot run code. Raises CheckpointError for a file
    that is damaged or holds anything else.
    """
    if reason := why_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {reason}")
    try:
        with path.open("rb") as file:  # the format before PyTorch 1.6 cannot be mapped
            is_zip = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not a file of plain tensors and was not run") from error
    except Exception as error:  # whatever a damaged file makes of the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or incomplete: {reason}") from error
    if not isinstance(state, dict) or not state.keys() - {IGNORED}:
        raise CheckpointError(f"{path} does not hold named tensors")
    for name, tensor in state.items():
        _check_kind(path, name, tensor)
    return {name: tensor for name, tensor in state.items() if name != IGNORED}


def _check_kind(path: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"{path} calls a tensor {name!r}, which is no name")
    kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    if kind not in DTYPES:
        raise CheckpointError(f"{path}: {name} is {kind}, not a tensor of floating point")
    # A few bytes can stand for any shape: as a sparse tensor, or with strides of zero.
    is_plain = tensor.layout == torch.strided and not tensor.is_meta
    if not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} has fewer numbers than its shape {tuple(tensor.shape)} says"
        )


@dataclass
class Checkpoint:
    """An opened folder: the model's shape and its tensors by Meta's names, mapped, not yet read.

    shards: equal parts of the model, cut as `parallel.shard_dim` says; Hugging Face's folders are
        one, however many files they have.
    quantization: of the matrices that `fast.is_quantized` names, in a folder that `convert` wrote:
        for each, the shards have the tensors of an `Int8Weight` or `Int4Weight`.
    """

    folder: Path
    args: ModelArgs
    shards: list[dict[str, Tensor]]
    is_hugging_face: bool = False  # Q and K have their rows in Hugging Face's order
    quantization: Width | None = None

    def called(self, name: str) -> str:
        """What the folder's files call a tensor."""
        return hugging_face.their_name(name) if self.is_hugging_face else name

    def file_of(self, shard: int) -> Path:
        if self.is_hugging_face:
            return self.folder
        return self.folder / shard_name(shard, self.quantization)

    def stored(
        self, name: str, shape: Sequence[int]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """The tensors that a shard has for one of the model's of that shape, by their names: the
        shape of each, and the dtype where it must be that."""
        if self.quantization is None or not is_quantized(name):
            return {name: (tuple(shape), None)}
        weight = KINDS[self.quantization].empty(shape, torch.device("meta"))
        return {f"{name}.{f}": (t.shape, t.dtype) for f, t in weight._asdict().items()}

    def settle_vocabulary(self) -> None:
        """Take the size that Llama 2's files leave to the tokenizer from the output matrix."""
        output = self.shards[0].get("output.weight")
        if self.args.vocab_size == -1 and output is not None and output.dim() == 2:
            self.args.vocab_size = output.shape[0] * len(self.shards)

    @property
    def dtype(self) -> torch.dtype:
        """The output matrix's, which all weights get where no other is asked for; the embedding's
        where that one is quantized."""
        name = "output.weight" if self.quantization is None else "tok_embeddings.weight"
        return self.shards[0][name].dtype

    def is_mapped(self, name: str, n_parts: int, dtype: torch.dtype) -> bool:
        """Whether the part of a tensor that `load` takes on the CPU is the file's own pages."""
        if self.quantization is not None and is_quantized(name):
            parts = self._quantized_pieces(name, n_parts, 0)
            return len(parts) == 1 and all(tensor.is_contiguous() for tensor in parts[0])
        pieces = self._pieces(name, n_parts, 0)
        is_turned = self.is_hugging_face and name.endswith(ROTATED)
        return (
            len(pieces) == 1
            and pieces[0].is_contiguous()
            and not is_turned
            and pieces[0].dtype == dtype
            and (self.quantization is not None or pieces[0].data_ptr() % ALIGNMENT == 0)
        )

    def part(self, name: str, n_parts: int, index: int) -> Tensor:
        """One of `n_parts` equal parts of a tensor, its rows in Meta's order; contiguous.

        Nothing is copied where it lies in one piece in a file. With more parts than key/value
        heads, each head is in as many parts in a row.
        """
        pieces = self._pieces(name, n_parts, index)
        if self.is_hugging_face and name.endswith(ROTATED):
            return hugging_face.to_pairs(pieces[0], self.args.head_dim)
        if len(pieces) == 1 and pieces[0].is_contiguous():
            return pieces[0]
        dim = parallel.shard_dim(name, self.args.embedding_shard_dim)
        assert dim is not None
        shape = list(pieces[0].shape)
        shape[dim] = sum(piece.shape[dim] for piece in pieces)
        return torch.cat(pieces, dim, out=with_huge_pages(pieces[0].new_empty(shape)))

    def quantized_part(self, name: str, n_parts: int, index: int, width: Width) -> Quantized:
        """A part of a matrix as it is saved quantized, else rounded now.

        The scale of a row is the whole row's, so that any number of parts is the same weights.
        Raises ConfigError where it cannot be rounded or so cut.
        """
        dim = parallel.SHARD_DIMS[name.split(".")[-2]]
        try:
            if self.quantization is not None:
                return join(self._quantized_pieces(name, n_parts, index), dim)
            part = self.part(name, n_parts, index)
            if width == "int8" and dim == 1 and n_parts > 1:
                of_shards = [vector_norm(shard[name], math.inf, 1) for shard in self.shards]
                return quantize_int8(part, torch.stack(of_shards).amax(0))
            return QUANTIZERS[width](part)
        except ConfigError as error:
            raise ConfigError(f"{self.folder}: {name}: {error}") from error

    def _pieces(self, name: str, n_parts: int, index: int) -> list[Tensor]:
        """What the shards hold of a part, in their order, as views."""
        whole = [shard[name] for shard in self.shards]
        dim = parallel.shard_dim(name, self.args.embedding_shard_dim)
        if dim is None:
            return whole[:1]
        cuts = self._cuts(name, whole[0].shape[dim], n_parts, index)
        return [whole[i].narrow(dim, low, length) for i, low, length in cuts]

    def _quantized_pieces(self, name: str, n_parts: int, index: int) -> list[Quantized]:
        """The same of a matrix that the folder has quantized."""
        assert self.quantization is not None
        kind = KINDS[self.quantization]
        whole = [
            kind(*(shard[f"{name}.{field}"] for field in kind._fields)) for shard in self.shards
        ]
        dim = parallel.SHARD_DIMS[name.split(".")[-2]]
        size = self.args.whole_shapes()[name][dim] // len(whole)  # which may be stored rounded up
        cuts = list(self._cuts(name, size, n_parts, index))
        if len(cuts) == 1 and cuts[0][2] == size:
            return [whole[cuts[0][0]]]
        return [narrow(whole[i], dim, low, length) for i, low, length in cuts]

    def _cuts(
        self, name: str, size: int, n_parts: int, index: int
    ) -> Iterator[tuple[int, int, int]]:
        """Which shards hold a part, from where on, and how much of it; size: of each shard."""
        n_kv_heads = self.args.local_kv_heads(1)
        if name.endswith(KEYS_AND_VALUES) and n_parts > n_kv_heads:
            n_parts, index = n_kv_heads, index * n_kv_heads // n_parts
        length = size * len(self.shards) // n_parts
        start, end = length * index, length * (index + 1)
        for i in range(len(self.shards)):
            low, high = max(start - i * size, 0), min(end - i * size, size)
            if low < high:
                yield i, low, high - low


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, also by name. Raises ConfigError for any other."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if named not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype is {dtype!s}: float32, bfloat16 and float16 are known")
    return named


def default_dtype(device: torch.device) -> torch.dtype | None:
    """What weights become where nobody asks for a dtype; None: they stay as they are."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def is_metas(folder: Path) -> bool:
    return os.path.lexists(folder / "params.json")


def read_args(folder: Path, rope_factor: float | None = None) -> ModelArgs:
    """The model's shape, from the file that says it."""
    if is_metas(folder):
        return config.read_params(folder / "params.json", rope_factor)
    return hugging_face.read_config(folder / "config.json", rope_factor)


def read_quantization(folder: Path) -> Width | None:
    """What the matrices of a folder are saved in, by its `params.json`; None: not quantized."""
    path = folder / "params.json"
    said = config.read_json(path).get("quantization") if is_metas(folder) else None
    if said is None:
        return None
    width = said.get("width") if isinstance(said, dict) else None
    if not isinstance(width, str) or width not in KINDS:
        raise CheckpointError(f"{path}: quantization is {said!r}, not of {', '.join(KINDS)}")
    if said.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{path}: quantized in layout {said.get('layout')!r}, but this version reads {LAYOUT}: "
            "convert the model again"
        )
    return cast(Width, width)


def open_checkpoint(ckpt_dir: str | Path, rope_factor: float | None = None) -> Checkpoint:
    """Open a folder of Meta's or Hugging Face's; see `config.read_params` for rope_factor."""
    folder = find_folder(ckpt_dir)
    args = read_args(folder, rope_factor)
    if quantization := read_quantization(folder):
        if args.vocab_size == -1:
            raise CheckpointError(f"{folder}: vocab_size is -1, which a quantized folder must say")
        shards = [_read_quantized(path) for path in find_shards(folder, quantization)]
        if len(shards) > 1:
            args.embedding_shard_dim = _embedding_shard_dim(shards[0], args)
        return Checkpoint(folder, args, shards, quantization=quantization)
    if is_metas(folder):
        shards = [read_shard(path) for path in find_shards(folder)]
        if len(shards) > 1:  # with one, the family's way stays
            args.embedding_shard_dim = _embedding_shard_dim(shards[0], args)
        args.tied = all(_is_tied(shard) for shard in shards) or _is_tied_in_effect(shards, args)
        return Checkpoint(folder, args, shards)
    tensors = hugging_face.map_tensors(folder)
    for name, tensor in tensors.items():
        _check_kind(folder, name, tensor)
    embedding = tensors.get("tok_embeddings.weight")
    if args.tied and embedding is not None:
        output = tensors.setdefault("output.weight", embedding)
        if not torch.equal(output, embedding):
            raise CheckpointError(
                f"{folder}: config.json ties lm_head.weight to the embedding, but it is another "
                "matrix in the file"
            )
    return Checkpoint(folder, args, [tensors], is_hugging_face=True)


def _read_quantized(path: Path) -> dict[str, Tensor]:
    """A shard of a quantized folder, mapped; `check_complete` looks at what is quantized."""
    tensors = hugging_face.map_file(path)
    for name, tensor in tensors.items():
        if not is_quantized(name):
            _check_kind(path, name, tensor)
    return tensors


def _embedding_shard_dim(shard: dict[str, Tensor], args: ModelArgs) -> int:
    """How `tok_embeddings` is split, by its shape: narrower than `dim` means by features."""
    embedding = shard.get("tok_embeddings.weight")
    return int(embedding is not None and embedding.shape[-1:] != (args.dim,))


def _is_tied(shard: dict[str, Tensor]) -> bool:
    """Whether output and embedding are one tensor in the file."""
    pair = [shard.get("tok_embeddings.weight"), shard.get("output.weight")]
    first, second = (None if t is None else (t.data_ptr(), t.shape) for t in pair)
    return first is not None and first == second


def _is_tied_in_effect(shards: list[dict[str, Tensor]], args: ModelArgs) -> bool:
    """Whether a shape that is published tied has equal matrices: Meta's files of Llama 3.2 hold
    theirs twice. In a fine-tune they may differ, and only reading all of both tells."""
    names = ("tok_embeddings.weight", "output.weight")
    return any(config.PRESETS[name].tied for name in args.published()) and all(
        all(name in shard for name in names) and torch.equal(*(shard[name] for name in names))
        for shard in shards
    )


def load(
    model: Transformer,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: Width | None = None,
) -> None:
    """Give `model`, built on the meta device, this rank's part of each tensor, however many
    shards and ranks there are.

    dtype: of all weights; None: the checkpoint's own.
    quantize: what the matrices of products are rounded to, from the checkpoint's own numbers, or
        saved in; the model is then one for `FastTransformer` alone.
    Raises CheckpointError naming what is missing, not expected or of another shape.
    """
    params = model.params
    check_complete(checkpoint)
    dtype = dtype or checkpoint.dtype
    state: dict[str, Tensor] = {}
    # One at a time, so that a copy never stands beside all the others.
    args = checkpoint.args
    names = args.parameter_shapes() if quantize is None else args.whole_shapes()
    for name in tqdm(names, "Loading", unit="tensor", delay=2, disable=not parallel.is_main_rank()):
        place = parallel.mp_size(), parallel.mp_rank()
        if quantize is not None and is_quantized(name):
            layer = model.get_submodule(name.removesuffix(".weight"))
            set_quantized(layer, checkpoint.quantized_part(name, *place, quantize))
            continue
        part = checkpoint.part(name, *place).to(device, dtype)
        # A product of one row differs in its last bit where a matrix is not aligned.
        is_multiplied = quantize is None
        state[name] = part.clone() if is_multiplied and part.data_ptr() % ALIGNMENT else part
    if params.tied and quantize is None:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if quantize is None:
        model.tie_weights()


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where the shards' names or shapes are not those of the model."""
    args, folder, shards = checkpoint.args, checkpoint.folder, checkpoint.shards
    if args.n_layers > (held := len(shards[0])):  # each has nine: no need to name them all
        raise CheckpointError(f"{folder} has {held} tensors, n_layers is {args.n_layers}")
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, whole in args.whole_shapes().items():
        dim = parallel.shard_dim(name, args.embedding_shard_dim)
        shape = list(whole)
        if dim is not None:  # what one file must hold: its part of the whole tensor
            if shape[dim] % len(shards):
                raise CheckpointError(
                    f"{folder}: {name} has {shape[dim]} rows or columns in all, which cannot come "
                    f"in {len(shards)} shards"
                )
            shape[dim] //= len(shards)
        expected |= checkpoint.stored(name, shape)
    for i, shard in enumerate(shards):
        if missing := [checkpoint.called(name) for name in expected if name not in shard]:
            raise CheckpointError(f"{checkpoint.file_of(i)} lacks {_listed(missing)}")
        if extra := [name for name in shard if name not in expected]:
            raise CheckpointError(
                f"{checkpoint.file_of(i)} has tensors this model has not: {_listed(extra)}"
            )
    wrong = []
    for name, (local, dtype) in expected.items():
        for i, shard in enumerate(shards):
            found = shard[name]
            file = f"{checkpoint.file_of(i).name}: " if len(shards) > 1 else ""
            called = f"{file}{checkpoint.called(name)}"
            if found.shape != local:
                wrong.append(f"{called} {tuple(found.shape)} instead of {tuple(local)}")
            elif dtype not in (None, found.dtype):
                wrong.append(f"{called} is {found.dtype} instead of {dtype}")
    if wrong:
        raise CheckpointError(f"{folder} does not fit its configuration: {_listed(wrong)}")


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


# ---- writing ----------------------------------------------------------------------------------


def write_params(path: Path, args: ModelArgs, quantization: Width | None = None) -> None:
    """Write a `params.json` that `config.read_params` reads back as the same model, and Meta's
    code too where it can; and what the files beside it are quantized to."""
    keys = "dim n_layers n_heads n_kv_heads vocab_size norm_eps rope_theta use_scaled_rope".split()
    params = {key: getattr(args, key) for key in keys} | args.metas_width()
    if args.context_length is not None:
        params["context_length"] = args.context_length
    if args.rope_scaling is not None:
        params["rope_scaling"] = asdict(args.rope_scaling)
    if quantization is not None:
        params["quantization"] = {"width": quantization, "layout": LAYOUT}
    write_json(path, params)


def write_shard(path: Path, state: dict[str, Tensor]) -> None:
    """Write one rank's tensors as Meta does, atomically. Tensors that share their memory (a tied
    embedding and output) are written once."""
    with atomic_file(path) as file:
        torch.save(state, file)
