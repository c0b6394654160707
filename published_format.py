"""Read and write models and data in their published formats: config.json, safetensors, JSON, rows.

Other people wrote these files, so sizes are bounded, values are checked, and every error names the
file and the fix.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

import torch
from pydantic import AliasChoices, AliasPath, BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
REMEDY = "fetch the model again"
MAX_TEXT_BYTES, MAX_DATA_BYTES = 200 * 1000**2, 10**9
MAX_SHARD_BYTES = 5 * 1000**3  # the shard size of published models

Record = TypeVar("Record", bound=BaseModel)
Size = Annotated[int, Field(gt=0, le=10**6)]
Heads = Annotated[int, Field(gt=0, le=1024)]
TokenId = Annotated[int, Field(ge=0, le=10**6)]
Count = Annotated[int, Field(ge=0, le=10**12)]  # steps, tokens or bytes
Positive = Annotated[float, Field(gt=0.0, le=1e12)]
Rows = list[tuple[str, dict[str, Any]]]  # (where the row is from, {column: value})

# ---------------------------------------------------------------- config.json


class Rope(BaseModel, strict=True, extra="forbid"):
    """Unscaled rotary positions. Any other key would scale them, which is not implemented."""

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"  # an older name of rope_type
    rope_theta: Positive | None = None


class PublishedConfig(BaseModel, strict=True):
    """config.json of a dense Qwen2.5 as transformers 4 or 5 writes it. Other keys are ignored."""

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
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


def read_config(path: Path) -> PublishedConfig:
    """Raises FileNotFoundError, or ValueError naming the setting that is damaged or unsupported."""
    remedy = REMEDY
    if (path.parent / "adapter_config.json").exists():
        remedy = "this is a LoRA adapter: merge it into its model, and use the result"
    elif snapshots := [*path.parent.glob("snapshots/*/"), *path.parent.glob("*/snapshots/*/")]:
        remedy = f"this is a cache of downloads: use {snapshots[0]}"
    raw = {
        name: value for name, value in read_json(path, remedy=remedy).items() if value is not None
    }
    fix = f"use a dense Qwen2.5 model, or {REMEDY}"
    try:
        config = PublishedConfig.model_validate(raw)
    except ValidationError as error:
        wrong = [fault for fault in error.errors() if fault["type"] != "missing"]
        if not wrong:
            missing = ", ".join(fault["loc"][0] for fault in error.errors())
            raise ValueError(f"{path} lacks {missing}; {fix}") from None
        name = wrong[0]["loc"][0]
        raise ValueError(f"{path}: {name}={raw[name]!r:.100}: {wrong[0]['msg']}; {fix}") from None
    for rope in (config.rope_scaling, config.rope_parameters):
        if rope and rope.rope_theta not in (None, config.rope_theta):
            got = f"rope_theta is both {config.rope_theta:g} and {rope.rope_theta:g}"
            raise ValueError(f"{path}: {got}; keep the one that the model was trained with")
    size, heads = config.hidden_size, config.num_attention_heads
    key_heads, head_size = config.num_key_value_heads, config.head_dim or size // heads
    # RoPE rotates pairs of dimensions, so the head size must be even.
    if size != heads * head_size or heads % key_heads or head_size % 2:
        raise ValueError(
            f"{path}: hidden_size={size}, num_attention_heads={heads}, "
            f"num_key_value_heads={key_heads}, head_dim={config.head_dim}: wanted query heads of "
            f"one even size that divide evenly among the key heads; {fix}"
        )
    return config


def write_config(path: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a config.json that transformers 4 and 5 and vLLM read."""
    dtype_name = str(dtype).removeprefix("torch.")
    fixed = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"]},
    }
    path.write_text(json.dumps(fixed | fields, indent=2) + "\n")


# ---------------------------------------------------------------- weights


def find_weights(directory: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Checks names and shapes; reads no values.

    Ignores what published files may hold beside the weights: rotary frequencies and, if the head is
    tied, a copy of the embedding as lm_head.weight. Raises FileNotFoundError for a missing file, or
    ValueError naming what is damaged, missing, unexpected or of another shape.
    """
    files, found = {}, {}
    for file in _weight_files(directory):
        for name, tensor in read_tensors(file):
            if not name.endswith("rotary_emb.inv_freq"):
                files[name], found[name] = file, tuple(tensor.shape)
    if HEAD in files and HEAD not in shapes:
        _check_copy(directory, files)
        del files[HEAD], found[HEAD]
    missing = [f"missing {name}" for name in sorted(shapes.keys() - found.keys())]
    unexpected = [f"unexpected {name}" for name in sorted(found.keys() - shapes.keys())]
    misshapen = []
    for name in sorted(found.keys() & shapes.keys()):
        if found[name] != shapes[name]:
            misshapen.append(f"{name} has shape {found[name]}, config.json implies {shapes[name]}")
    if problems := missing + unexpected + misshapen:
        listed = "; ".join(missing[:3] + unexpected[:3] + misshapen[:3])
        raise ValueError(
            f"{directory}: {len(problems)} tensors do not match config.json: {listed}; {REMEDY}"
        )
    return files


def _check_copy(directory: Path, files: dict[str, Path]) -> None:
    """Raises ValueError if a tied checkpoint holds a head of its own, which would be lost."""
    found = {}
    for file in {files[name] for name in (HEAD, EMBEDDING) if name in files}:
        for name, tensor in read_tensors(file):
            if name in (HEAD, EMBEDDING):
                found[name] = tensor
    if EMBEDDING not in found or not torch.equal(found[HEAD], found[EMBEDDING]):
        raise ValueError(
            f"{directory}: config.json ties the head to the embedding, but {HEAD} is not a copy of "
            f"{EMBEDDING}; set tie_word_embeddings to false in config.json, or {REMEDY}"
        )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map; {REMEDY}")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index}: {name!r:.100} is not the name of a file; {REMEDY}")
        names = set(weight_map.values())
        single = directory / "model.safetensors"
        if single.exists() and single.name not in names:
            raise ValueError(
                f"{directory} has both {single.name} and {index.name} with other files; remove the "
                "ones that do not belong to this model"
            )
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; {REMEDY}, with its safetensors files")
    return files


def read_weights(files: dict[str, Path], weights: dict[str, Tensor]) -> None:
    """Copy each tensor into weights[name], one at a time; any device and float dtype will do.

    Raises ValueError naming what is damaged, not a float, or not finite.
    """
    for file in sorted(set(files.values())):
        for name, tensor in read_tensors(file):
            if files.get(name) != file:
                continue
            if not tensor.is_floating_point():
                problem = f"{tensor.dtype}, wanted a float dtype; use a model that is not quantised"
                raise ValueError(f"{file}: {name} is {problem}")
            weights[name].copy_(tensor)
            if not weights[name].isfinite().all():
                problem = f"has values that are not finite in {weights[name].dtype}"
                raise ValueError(f"{file}: {name} {problem}; {REMEDY}")


def write_weights(directory: Path, weights: dict[str, Tensor]) -> None:
    """Write model.safetensors, or shards of at most MAX_SHARD_BYTES and their index."""
    for stale in directory.glob("model*.safetensors*"):  # readers prefer an index, even an old one
        stale.unlink()
    shards, shard_bytes = [{}], 0
    for name, tensor in weights.items():
        if shards[-1] and shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
    if len(shards) == 1:
        write_tensors(directory / "model.safetensors", weights)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file. Raises OSError if it cannot be written."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # by the umask; the library would make the file private
    try:
        save_file(on_cpu, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, memory-mapped. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  the file is not a dict
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from None


# ---------------------------------------------------------------- text and JSON


@contextmanager
def open_text(path: Path, *, remedy: str = REMEDY) -> Iterator[TextIO]:
    """A regular file of UTF-8 text, open for reading.

    Raises FileNotFoundError or ValueError with the path and the remedy, also while it is read.
    """
    try:
        if not path.is_file() and path.exists():
            raise ValueError(f"{path} is not a regular file; {remedy}")
        # utf-8-sig: some editors write a byte order mark
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); {remedy}") from None
    except OSError as error:  # no permission, or a loop of symbolic links
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def read_text(path: Path, *, remedy: str = REMEDY, limit: int = MAX_TEXT_BYTES) -> str:
    """The whole text of a file of at most `limit` bytes. Raises what open_text raises."""
    with open_text(path, remedy=remedy) as file:
        if (size := path.stat().st_size) > limit:
            raise ValueError(f"{path} has {size:,} bytes, more than {limit:,}; {remedy}")
        return file.read()


def read_json(path: Path, *, remedy: str = REMEDY) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError or ValueError, as read_text does."""
    return parse_json(read_text(path, remedy=remedy), str(path), remedy=remedy)


def parse_json(text: str, name: str, *, remedy: str = REMEDY) -> dict[str, Any]:
    """The object in a JSON text; error messages use `name` to say where the text is from."""
    try:
        value = json.loads(text)
        if "\\u" in text:  # may spell half a surrogate pair, which cannot be encoded or printed
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({str(error)[:200]}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, not {type(value).__name__}; {remedy}")
    return value


def validated(kind: type[Record], raw: dict[str, Any], name: str, *, remedy: str) -> Record:
    """A record of this kind from a JSON object. Raises ValueError with the first invalid field."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{name}: {field}: {fault['msg'].lower()}; {remedy}") from None


# ---------------------------------------------------------------- rows of a data set


def read_rows(path: Path, columns: Sequence[str], *, remedy: str) -> Rows:
    """(where, {column: value}) of each row; `where` names file and row for error messages.

    path: a .jsonl, .json or .parquet file, or a directory with parquet files in one folder. Raises
    FileNotFoundError, or ValueError naming the file and row if one is damaged, a column is missing,
    or there are no rows.
    """
    if path.suffix in (".jsonl", ".json"):
        rows = _read_jsonl(path, remedy)
    elif path.is_file() and path.suffix != ".parquet":
        wanted = "a .jsonl, .json or .parquet file, or a directory with parquet files"
        raise ValueError(f"{path} is not {wanted}; unpack or convert it, or {remedy}")
    else:
        rows = _read_parquet(path, columns, remedy)
    for where, row in rows:
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{where}: {' and '.join(missing)} missing; {remedy}")
    if not rows:
        raise ValueError(f"{path} has no rows; {remedy}")
    return rows


def _read_jsonl(path: Path, remedy: str) -> Rows:
    rows, text = [], read_text(path, remedy=remedy, limit=MAX_DATA_BYTES)
    if text.lstrip().startswith("["):  # one list instead of an object per line
        listed = parse_json(f'{{"rows": {text}}}', str(path), remedy=remedy)["rows"]
        return [(f"{path}, row {number}", row) for number, row in enumerate(listed, 1)]
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append((where, parse_json(line, f"{where},", remedy=remedy)))
    return rows


def _read_parquet(path: Path, columns: Sequence[str], remedy: str) -> Rows:
    import pyarrow as pa  # from the optional dependency group "data"
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted((path / "data").glob("*.parquet"))
    files = files or sorted(path.rglob("*.parquet"))
    # With several splits beside each other, the test split must not be trained on.
    by_name = [file for file in files if "train" in re.split("[^a-z]+", file.stem.lower())]
    files = by_name or [file for file in files if file.parent.name == "train"] or files
    if not files:
        problem = "does not exist"
        if path.exists():
            names = ", ".join(sorted(entry.name for entry in path.iterdir()))
            problem = f"has no parquet files; it holds {names or 'nothing':.200}"
        raise FileNotFoundError(f"{path} {problem}; {remedy}")
    if len(folders := {str(file.parent) for file in files}) > 1:
        named = " and ".join(sorted(folders))
        raise ValueError(f"{path} has parquet files in {named:.400}; set data.path to one of them")
    rows = []
    for file in files:
        try:
            table = pq.read_table(file, columns=list(columns)).to_pylist()
        except (pa.ArrowException, OSError) as error:
            names = " and ".join(columns)
            raise ValueError(
                f"{file} is not a parquet file with the columns {names} ({error}); {remedy}"
            ) from None
        rows += [(f"{file}, row {number}", row) for number, row in enumerate(table, 1)]
    return rows
