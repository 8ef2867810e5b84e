"""Loading a model: built without memory, then filled layer by layer from safetensors and packed at once.

At the peak a load needs the finished model plus the plain weights of one layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.messages.liveness import ModelIdentity
from services.worker.model.checkpoint import StoredTensor, stored_tensors
from services.worker.model.identity import InspectedModel, inspect_model
from services.worker.model.packing import (
    LinearPath,
    PackedLinear,
    PlainLinear,
    RmsNorm,
    choose_path,
    compute_dtype,
)
from services.worker.model.tiled import TiledDecoder, TiledLayer, norm_offset, tile_layer

if TYPE_CHECKING:
    from services.worker.model.fused import FusedDecoder, FusedLayer

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LAYERS, _EMBEDDING, _NORM, _HEAD = "model.layers.", "model.embed_tokens.weight", "model.norm.weight", "lm_head."
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run."""

    identity: ModelIdentity
    layout: KvLayout
    runner: "TiledDecoder | FusedDecoder"
    device: torch.device
    dtype: torch.dtype
    """Of pages; the identity's dtype."""
    compute_dtype: torch.dtype
    """Of activations and matrices; float32 for a bfloat16 model where the processor has no bf16 instructions."""
    weight_bytes: int
    """Memory of the weights as they are held."""


def load_model(
    path_or_hub_id: str | Path,
    dtype: str = "auto",
    device: str = "cpu",
    *,
    name: str | None = None,
    path: LinearPath | None = None,
) -> LoadedModel:
    """Load a model for `device`. `dtype` is auto (the checkpoint's own), float32 or bfloat16.

    `path` is how its matrices are held; None: what `device` gains by most. Raises ConfigError: not found, not servable
    exactly, tensors missing, unexpected or of another shape.
    """
    require_device(device)  # before the folder is read
    return load_inspected(inspect_model(path_or_hub_id, dtype, name=name), device, path=path)


def load_inspected(inspected: InspectedModel, device: str = "cpu", *, path: LinearPath | None = None) -> LoadedModel:
    """As `load_model`, of a model that was inspected already."""
    place = require_device(device)
    own_dtype = _TORCH_DTYPES[inspected.identity.dtype]
    path = path or choose_path(place)
    computed_in = own_dtype if path is LinearPath.FUSED else compute_dtype(place, own_dtype)
    with torch.no_grad():
        model = _build_empty(inspected, computed_in)
        stored = stored_tensors(inspected.folder)
        _require_tensors(model, stored, inspected.folder)
        runner = _fill(model, stored, _Target(place, own_dtype, computed_in, path))
    return LoadedModel(
        identity=inspected.identity,
        layout=inspected.layout,
        runner=runner,
        device=place,
        dtype=own_dtype,
        compute_dtype=computed_in,
        weight_bytes=runner.weight_bytes,
    )


def require_device(device: str) -> torch.device:
    """The device that `--device` names. Raises ConfigError if torch knows or sees no such device."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device={device!r}: must be cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device={device}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device={device!r}: must be cpu, cuda or cuda:N")
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def _build_empty(inspected: InspectedModel, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(inspected.config, dtype=dtype)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:  # a config's lies
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"{inspected.folder / 'config.json'}: no model can be made of it ({type(error).__name__}: {reason})"
        ) from error
    return model.eval()


def _require_tensors(model: PreTrainedModel, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}  # computed; old checkpoints hold it
    optional = {f"{_HEAD}weight"} if model.config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in stored and name not in optional]
    unexpected = [name for name in stored if name not in expected and name not in ignored | optional]
    if missing or unexpected:
        parts = [("missing", missing), ("unexpected", unexpected)]
        text = "; ".join(f"{len(names)} {kind}: {_shown(names)}" for kind, names in parts if names)
        raise ConfigError(f"{folder}: the weights do not fit config.json; tensors {text}")
    wrong = [
        f"{name} {list(stored[name].shape)} (config says {list(shape)})"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    wrong += [
        f"{name} is in {stored[name].dtype}" for name in expected if name in stored and not _is_float(stored[name])
    ]
    if wrong:
        raise ConfigError(f"{folder}: the weights do not fit config.json; shapes or dtypes differ: {_shown(wrong)}")


def _is_float(tensor: StoredTensor) -> bool:
    """Whether it holds weights as they are; 8 bits and whole numbers are quantised ones, which need their scales."""
    return tensor.dtype in ("F64", "F32", "F16", "BF16")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(sorted(names)[:_NAMES_SHOWN]) + more


@dataclass(frozen=True, slots=True)
class _Target:
    """Where tensors go, and as what."""

    device: torch.device
    own_dtype: torch.dtype
    computed_in: torch.dtype
    path: LinearPath


def _fill(model: PreTrainedModel, stored: Mapping[str, StoredTensor], target: _Target) -> "TiledDecoder | FusedDecoder":
    """Load layer after layer and bring each at once into the form it is used in; then what is around them."""
    make = PackedLinear if target.path is LinearPath.PACKED else PlainLinear
    tiled: list[TiledLayer] = []
    fused: list[FusedLayer] = []
    layers = cast(nn.ModuleList, model.get_submodule("model.layers"))
    for index, layer in enumerate(layers):
        prefix = f"{_LAYERS}{index}."
        names = [name for name in stored if name.startswith(prefix)]
        for name, tensor in _read(stored, names):
            _assign(layer, name.removeprefix(prefix), tensor.to(target.device, target.computed_in))
        _require_complete(layer)
        if target.path is LinearPath.FUSED:
            fused.append(_fuse(layer, model))
        else:
            tiled.append(tile_layer(layer, model.config, make))
        layers[index] = nn.Identity()  # its own matrices go
    head = _fill_outer(model, stored, target)
    _make_buffers(model, target.device, target.own_dtype)
    if target.path is LinearPath.FUSED:
        return _fused_decoder(model, fused, head)
    norm = RmsNorm(model.get_submodule("model.norm"), norm_offset(model.config))
    return TiledDecoder(model, tiled, norm, make(head, None), target.computed_in)


def _fill_outer(model: PreTrainedModel, stored: Mapping[str, StoredTensor], target: _Target) -> Tensor:
    """Load the embedding and the final norm; returns the head's matrix."""
    outer = dict(_read(stored, [name for name in stored if name in (_EMBEDDING, _NORM) or name.startswith(_HEAD)]))
    # The table only gives rows, so it keeps the model's own dtype whatever the matrices are computed in.
    embedding = outer[_EMBEDDING].to(target.device, target.own_dtype)
    _assign(model, _EMBEDDING, embedding)
    _assign(model, _NORM, outer[_NORM].to(target.device, target.computed_in))
    tied = model.config.tie_word_embeddings
    head = embedding if tied else outer[f"{_HEAD}weight"].to(target.device, target.own_dtype)
    return head.to(target.computed_in)


def _fuse(layer: nn.Module, model: PreTrainedModel) -> "FusedLayer":
    from services.worker.model.fused import fuse_layer  # needs triton, which a CPU has no use for

    return fuse_layer(layer, model.config)


def _fused_decoder(model: PreTrainedModel, layers: "list[FusedLayer]", head: Tensor) -> "FusedDecoder":
    from services.worker.model.fused import FusedDecoder, norm_terms  # needs triton, as above

    return FusedDecoder(model, layers, head, norm_terms(model.config))


def _read(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(stored[name].file, []).append(name)
    for file, wanted in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in wanted:
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from error


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.contiguous(), requires_grad=False))


def _make_buffers(model: PreTrainedModel, device: torch.device, own_dtype: torch.dtype) -> None:
    """Fill what checkpoints do not hold: rotary frequencies, and gemma's embedding scale."""
    rotary = model.get_submodule("model.rotary_emb")
    with torch.device(device):
        model.set_submodule("model.rotary_emb", type(rotary)(config=model.config))
    embedding = model.get_submodule("model.embed_tokens")
    if hasattr(embedding, "embed_scale"):
        # Rounded to the model's dtype, as the reference rounds it before the product.
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device).to(own_dtype)


def _require_complete(model: nn.Module) -> None:
    """An invariant of ours: nothing is left without memory."""
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not empty, f"not loaded: {_shown(empty)}"
