"""What loads, what it is called, and what is refused with which words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import ConfigError
from common.messages.liveness import difference
from services.worker.model.families import ARCHITECTURES
from services.worker.model.identity import inspect_model
from services.worker.model.load import load_inspected, load_model

Checkpoints = Callable[[str], Path]


def copy_with(source: Path, target: Path, **config: object) -> Path:
    """A copy of a checkpoint with other entries in config.json."""
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def test_identity_says_what_the_config_says(checkpoint: Checkpoints) -> None:
    found = inspect_model(checkpoint("qwen3"))
    assert found.identity.name == "qwen3"
    assert found.identity.architecture == "Qwen3ForCausalLM"
    assert (found.identity.dtype, found.identity.vocab_tokens, found.identity.context_tokens) == ("float32", 1536, 2048)
    assert (found.layout.layers, found.layout.kv_heads, found.layout.head_dim) == (2, 2, 32)
    assert load_model(checkpoint("qwen3")).identity == found.identity


def test_a_chosen_dtype_and_name_show_in_the_identity(checkpoint: Checkpoints) -> None:
    found = inspect_model(checkpoint("llama"), "bfloat16", name="served")
    assert (found.identity.name, found.identity.dtype, found.layout.dtype) == ("served", "bfloat16", "bfloat16")


def test_blocks_are_sixteen_tokens_or_what_the_layout_or_the_caller_needs(checkpoint: Checkpoints) -> None:
    paged = inspect_model(checkpoint("qwen3"))
    virtual = inspect_model(checkpoint("qwen3"), kv_layout="virtual")
    asked = inspect_model(checkpoint("qwen3"), block_tokens=48, kv_layout="virtual")
    found = [(one.identity.block_tokens, one.layout.block_tokens) for one in (paged, virtual, asked)]
    assert found == [(16, 16), (128, 128), (48, 48)]  # 2 heads of 32 floats: 64 KiB are K and V of 128 tokens
    assert load_inspected(virtual).layout == virtual.layout


def test_blocks_of_another_length_are_a_difference_that_is_named(checkpoint: Checkpoints) -> None:
    mine, theirs = (inspect_model(checkpoint("qwen3"), block_tokens=tokens).identity for tokens in (16, 128))
    assert difference(mine, theirs) == "block_tokens: 16 here, 128 there"


def test_the_fingerprint_changes_with_weights_and_config_only(checkpoint: Checkpoints, tmp_path: Path) -> None:
    original = inspect_model(checkpoint("qwen2")).identity.fingerprint
    same = copy_with(checkpoint("qwen2"), tmp_path / "same", transformers_version="9.9")
    assert inspect_model(same).identity.fingerprint == original
    other_config = copy_with(checkpoint("qwen2"), tmp_path / "config", rms_norm_eps=1e-5)
    assert inspect_model(other_config).identity.fingerprint != original
    other_weights = copy_with(checkpoint("qwen2"), tmp_path / "weights")
    tensors = load_file(other_weights / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, other_weights / "model.safetensors")
    assert inspect_model(other_weights).identity.fingerprint != original


def test_a_checkpoint_in_several_files_loads_alike(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = load_model(checkpoint("llama")), load_model(tmp_path / "sharded")
    hidden = torch.randn(3, 64)
    assert torch.equal(whole.runner.logits(hidden), sharded.runner.logits(hidden))


def test_memory_of_the_weights_is_counted(checkpoint: Checkpoints) -> None:
    model = load_model(checkpoint("llama"))
    stored_bytes = sum(tensor.nbytes for tensor in load_file(checkpoint("llama") / "model.safetensors").values())
    assert model.weight_bytes == stored_bytes


def test_an_unknown_architecture_is_refused_by_name(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copy_with(checkpoint("llama"), tmp_path / "m", model_type="mamba2", architectures=["Mamba2ForCausalLM"])
    with pytest.raises(ConfigError, match="mamba2") as error:
        inspect_model(folder)
    assert all(name in str(error.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_a_variant_that_would_not_be_exact_is_refused_by_name(
    family: str, config: dict[str, object], named: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=named):
        inspect_model(copy_with(checkpoint(family), tmp_path / "m", **config))


def test_missing_and_unexpected_tensors_are_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copy_with(checkpoint("qwen2"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.surprise"] = tensors.pop("model.layers.1.self_attn.k_proj.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.bias.*k_proj\.surprise"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copy_with(checkpoint("qwen2"), tmp_path / "m", intermediate_size=128)
    with pytest.raises(ConfigError, match=r"mlp\.down_proj\.weight \[64, 160\] \(config says \[64, 128\]\)"):
        load_model(folder)


def test_a_file_cut_short_is_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copy_with(checkpoint("qwen2"), tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model\.safetensors: is cut short"):
        inspect_model(folder)
    file.write_bytes(b"xyz")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        inspect_model(folder)


def test_a_folder_without_weights_or_config_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copy_with(checkpoint("qwen2"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        inspect_model(folder)
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        inspect_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        inspect_model(folder)


def test_a_path_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        inspect_model(tmp_path / "nothing")


def test_a_hub_id_that_cannot_be_had_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("services.worker.model.source.snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=r"the hub did not give it \(no route to host\)"):
        inspect_model("nobody/nothing")


def test_bad_dtype_and_device_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype='int8'"):
        load_model(checkpoint("qwen2"), "int8")
    with pytest.raises(ConfigError, match="--device='abacus'"):
        load_model(checkpoint("qwen2"), device="abacus")
    half = copy_with(checkpoint("qwen2"), tmp_path / "half", dtype="float16")
    with pytest.raises(ConfigError, match="float16; choose --dtype float32 or bfloat16"):
        inspect_model(half)
