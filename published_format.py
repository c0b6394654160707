"""Models and data as they are published: config.json, safetensors weights in one file or several, JSON, rows of a dataset.

Everything here was written by somebody else, so everything is bounded and checked, and every fault names its file.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AliasChoices, AliasPath, BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

REMEDY = "fetch the model again"
MAX_TEXT_BYTES, MAX_DATA_BYTES = 200 * 1000**2, 10**9
MAX_SHARD_BYTES = 5 * 1000**3  # larger models are saved as several files, as published ones are

Record = TypeVar("Record", bound=BaseModel)
Size = Annotated[int, Field(gt=0, le=10**6)]
Heads = Annotated[int, Field(gt=0, le=1024)]
Id = Annotated[int, Field(ge=0, le=10**6)]
Count = Annotated[int, Field(ge=0, le=10**12)]  # of steps, tokens or bytes
Positive = Annotated[float, Field(gt=0.0, le=1e12)]


class Rope(BaseModel, strict=True, extra="forbid"):
    """Rotary positions as they are: any other key would scale them."""

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"  # an older name of rope_type
    rope_theta: Positive | None = None


class PublishedConfig(BaseModel, strict=True):
    """What a dense Qwen2.5's config.json may say, in the spelling of transformers 4 or 5; other keys do not matter."""

    model_type: Literal["qwen2"]
    architectures: list[Literal["Qwen2ForCausalLM"]] | None = None
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] | None = False
    layer_types: list[Literal["full_attention"]] | None = None
    quantization_config: Literal[None] = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    head_dim: Size | None = None
    vocab_size: Size
    hidden_size: Annotated[int, Field(gt=0, le=2**16)]
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)]
    num_attention_heads: Heads
    num_key_value_heads: Heads = Field(
        validation_alias=AliasChoices("num_key_value_heads", "num_attention_heads")
    )
    max_position_embeddings: Annotated[int, Field(gt=0, le=10**9)]
    rms_norm_eps: Positive
    rope_theta: Positive = Field(
        validation_alias=AliasChoices("rope_theta", AliasPath("rope_parameters", "rope_theta"))
    )
    tie_word_embeddings: bool = False
    bos_token_id: Id | None = None
    eos_token_id: Id | list[Id] | None = None


def read_config(path: Path) -> PublishedConfig:
    """Raises FileNotFoundError, or ValueError naming the setting that is damaged or not implemented."""
    raw = {name: value for name, value in read_json(path).items() if value is not None}
    try:
        config = PublishedConfig.model_validate(raw)
    except ValidationError as error:
        faults = error.errors()
        wrong = next((fault for fault in faults if fault["type"] != "missing"), None)
        if wrong is None:
            raise ValueError(
                f"{path} lacks {', '.join(fault['loc'][0] for fault in faults)}; {REMEDY}"
            ) from None
        name = wrong["loc"][0]
        raise ValueError(
            f"{path}: {name}={raw[name]!r:.100}: {wrong['msg']}; use a dense Qwen2.5 model, or {REMEDY}"
        ) from None
    size, heads, key_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    if size % (2 * heads) or heads % key_heads or config.head_dim not in (None, size // heads):
        raise ValueError(
            f"{path}: hidden_size={size}, num_attention_heads={heads}, num_key_value_heads={key_heads}, head_dim="
            f"{config.head_dim} do not divide into heads of one even size; use a dense Qwen2.5 model, or {REMEDY}"
        )
    return config


def write_config(path: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a config.json that transformers 4 and 5 and vLLM read."""
    name = str(dtype).removeprefix("torch.")
    fixed = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "torch_dtype": name,
        "dtype": name,
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"]},
    }
    path.write_text(json.dumps(fixed | fields, indent=2) + "\n")


# ---------------------------------------------------------------- weights


def find_weights(directory: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """The file that holds each of a checkpoint's tensors; they themselves are not read yet.

    A copy of the embedding under lm_head.weight, which some tied checkpoints hold, is passed over where none is wanted.
    Raises FileNotFoundError for a missing file, ValueError naming what is damaged, missing, unexpected or misshapen.
    """
    files, found = {}, {}
    for file in _weight_files(directory):
        for name, tensor in read_tensors(file):
            if name in shapes or name != "lm_head.weight":
                files[name], found[name] = file, tuple(tensor.shape)
    wrong = [f"missing {name}" for name in shapes.keys() - found] + [
        f"unexpected {name}" for name in found.keys() - shapes
    ]
    both = [(name, found[name], shapes[name]) for name in shapes.keys() & found]
    wrong += [
        f"{name} has shape {shape}, config.json implies {wanted}"
        for name, shape, wanted in both
        if shape != wanted
    ]
    if wrong:
        raise ValueError(
            f"{directory}: {len(wrong)} tensors do not match config.json: {'; '.join(sorted(wrong)[:5])}; {REMEDY}"
        )
    return files


def read_weights(files: dict[str, Path], weights: dict[str, Tensor]) -> None:
    """Copy tensors, one at a time, into `weights` (name -> tensor, on any device, of any float dtype).

    Raises ValueError naming what is damaged, not of a float type, or not finite.
    """
    for file in sorted(set(files.values())):
        for name, tensor in read_tensors(file):
            if files.get(name) != file:
                continue
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{file}: {name} is of {tensor.dtype}, not of a float type; quantised models are not read"
                )
            weights[name].copy_(tensor)
            if not weights[name].isfinite().all():
                raise ValueError(
                    f"{file}: {name} holds numbers that are not finite as {weights[name].dtype}; {REMEDY}"
                )


def write_weights(directory: Path, weights: dict[str, Tensor]) -> None:
    """Write model.safetensors, or shards of at most MAX_SHARD_BYTES and their index."""
    for stale in directory.glob(
        "model*.safetensors*"
    ):  # an old index would win over a new single file
        stale.unlink()
    shards = [{}]
    for name, tensor in weights.items():
        if (
            shards[-1]
            and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > MAX_SHARD_BYTES
        ):
            shards.append({})
        shards[-1][name] = tensor
    files = {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }
    if len(shards) == 1:
        files = {"model.safetensors": weights}
    else:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
            "weight_map": {name: file for file, shard in files.items() for name in shard},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in files.items():
        write_tensors(directory / file, shard)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file. Raises OSError if it cannot be written, whatever the library calls that."""
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, mapped: read from disk when looked at. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  no dict
                yield name, f.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    weight_map = (
        read_json(index).get("weight_map") if index.exists() else {"all": "model.safetensors"}
    )
    if not isinstance(weight_map, dict) or not all(
        isinstance(n, str) and Path(n).name == n for n in weight_map.values()
    ):
        raise ValueError(f"{index} is not a safetensors index; {REMEDY}")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{missing[0]} does not exist; {REMEDY} (only safetensors weights are read)"
        )
    return files


# ---------------------------------------------------------------- text and JSON


def read_text(path: Path, *, remedy: str = REMEDY, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a regular file of at most `limit` bytes. Raises FileNotFoundError or ValueError, naming it and the remedy."""
    try:
        if (size := path.stat().st_size) > limit:
            raise ValueError(f"{path} has {size:,} bytes, more than {limit:,}; {remedy}")
        if not path.is_file():
            raise ValueError(f"{path} is a directory, a pipe or a device, not a file; {remedy}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); {remedy}") from None
    except OSError as error:  # a circle of links, no permission
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def read_json(path: Path, *, remedy: str = REMEDY) -> dict[str, Any]:
    """The object that a JSON file holds. Raises FileNotFoundError or ValueError, naming the file and the remedy."""
    return parse_json(read_text(path, remedy=remedy), str(path), remedy=remedy)


def validated(kind: type[Record], raw: dict[str, Any], name: str, *, remedy: str) -> Record:
    """What an object says. Raises ValueError with its name, the first fault, where in it that is, and the remedy."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(
            f"{name}: {'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}; {remedy}"
        ) from None


def parse_json(text: str, name: str, *, remedy: str = REMEDY) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(
                value, ensure_ascii=False
            ).encode()  # half of a character is no text: nothing could print or encode it
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({str(error)[:200]}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}, not an object; {remedy}")
    return value


# ---------------------------------------------------------------- rows


def read_rows(
    path: Path, columns: Sequence[str], *, remedy: str
) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, {column: value}) of each row of a .jsonl file or of a dataset directory with data/*.parquet.

    Raises FileNotFoundError or ValueError, naming the file, the row and the remedy; ValueError if there are no rows.
    """
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path, remedy=remedy, limit=MAX_DATA_BYTES).split("\n"), 1)
        rows = [
            (f"{path}, line {i}", parse_json(line, f"{path}, line {i},", remedy=remedy))
            for i, line in lines
            if line.strip()
        ]
    else:
        rows = _read_parquet(path, columns, remedy)
    for place, row in rows:
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"{place}: {' and '.join(missing)} missing; {remedy}")
    if not rows:
        raise ValueError(f"{path} holds no rows; {remedy}")
    return rows


def _read_parquet(
    path: Path, columns: Sequence[str], remedy: str
) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((path / "data").glob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{path} {'holds no data/*.parquet' if path.exists() else 'does not exist'}; {remedy}"
        )
    rows = []
    for file in files:
        try:
            table = pq.read_table(file, columns=list(columns)).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is not a parquet file with the columns {' and '.join(columns)} ({error}); {remedy}"
            ) from None
        rows += [(f"{file}, row {i}", row) for i, row in enumerate(table, 1)]
    return rows
