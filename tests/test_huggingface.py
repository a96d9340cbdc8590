"""transformers models, from configs with random weights: nothing is downloaded."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

from torch_csb import CSBLinear, densify_, load_into, migrate_optimizer_, sparsify_

transformers = pytest.importorskip("transformers", reason="pip install transformers")

ARRAYS = {"values": "F32", "codes": "U8", "blk_ptr": "I32", "blk_pad": "U8", "layout": "I32"}


def llama(tied=False):
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def bert():
    """A BERT that generates: its head is tied to the embeddings."""
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
        pad_token_id=0,
    )
    return transformers.BertLMHeadModel(config)


MODELS = {"llama": llama, "tied llama": lambda: llama(tied=True), "bert": bert}
HEADS = {"llama": "lm_head", "tied llama": "lm_head", "bert": "cls.predictions.decoder"}


def pruned(name):
    model = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not model.get_input_embeddings().weight:
            with torch.no_grad():
                # Random nets this small say nearly the same everywhere; larger weights set the logits apart.
                module.weight.mul_(5)
            prune.l1_unstructured(module, "weight", 0.9)
    return model


def detached(model):
    """The products with a mask as data, as a forward without gradients leaves them; deepcopy takes nothing else."""
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long))
    return model


def prompt():
    return {"input_ids": torch.randint(1, 99, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}


def generate(model, ids):
    return model.generate(**ids, max_new_tokens=10, do_sample=False)


def logits(model, ids):
    with torch.no_grad():
        return model(**ids).logits


def assert_same(model, other, ids):
    assert torch.equal(logits(model, ids), logits(other, ids))
    assert torch.equal(generate(model, ids), generate(other, ids))


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_kept_and_everything_else_that_is_pruned_converts(name):
    model, ids = pruned(name), prompt()
    expected = logits(model, ids)
    report = sparsify_(model)
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear and model.get_submodule(HEADS[name]) is head
    reason = next(row.reason for row in report.kept if row.name == HEADS[name])
    if name == "llama":
        assert reason == "output head: kept by default, include='lm_head' converts it"
    else:
        assert reason.startswith("tied weight: used as ") and "embeddings.weight" in reason.replace(
            "embed_tokens", "embeddings"
        )
    assert reason in str(report)
    assert [row.name for row in report.kept] == [HEADS[name]]
    linears = [n for n, module in model.named_modules() if isinstance(module, CSBLinear)]
    assert len(linears) == len(report.converted) > 10
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_wrote_is_loaded_and_generates_the_same(name, tmp_path):
    model, ids = pruned(name), prompt()
    dense = detached(model)
    expected = generate(dense, ids)
    sparsify_(model)
    assert torch.equal(generate(model, ids), expected)
    model.save_pretrained(tmp_path)

    config = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded = type(model)(config).eval()
    assert load_into(loaded, tmp_path) == ([], [])
    assert_same(loaded, model, ids)
    assert torch.equal(generate(loaded, ids), expected)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (name != "llama")
    converted = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    load_into(converted, tmp_path)
    assert_same(converted, model, ids)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_plain_tensors(name, tmp_path):
    model = pruned(name)
    sparsify_(model)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        assert keys <= set(state)
        for layer in (n for n, module in model.named_modules() if isinstance(module, CSBLinear)):
            assert f"{layer}.weight" not in keys
            for array, dtype in ARRAYS.items():
                piece = file.get_slice(f"{layer}.{array}")
                assert piece.get_dtype() == dtype and piece.get_shape() == list(state[f"{layer}.{array}"].shape)
        for key in keys:
            tensor = file.get_tensor(key)
            assert type(tensor) is torch.Tensor and torch.equal(tensor, state[key])


def test_a_model_in_several_files_is_loaded_from_its_folder(tmp_path):
    model, ids = pruned("llama"), prompt()
    sparsify_(model)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    loaded = type(model)(model.config).eval()
    load_into(loaded, tmp_path)
    assert_same(loaded, model, ids)
    shards[0].unlink()
    fresh = type(model)(model.config)
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        load_into(fresh, tmp_path)
    assert not any(isinstance(module, CSBLinear) for module in fresh.modules())
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json: expected a weight_map from tensors to files"):
        load_into(fresh, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or model.safetensors.index.json"):
        load_into(fresh, tmp_path)


def test_a_dense_checkpoint_comes_by_from_pretrained_and_is_converted_then(tmp_path):
    model, ids = pruned("llama"), prompt()
    for module in model.modules():
        if prune.is_pruned(module) and isinstance(module, nn.Linear):
            prune.remove(module, "weight")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(sparsify_(loaded).converted) == 14
    sparsify_(model)
    assert_same(loaded, model, ids)


def test_include_converts_the_head():
    model, ids = pruned("llama"), prompt()
    expected = generate(detached(model), ids)
    report = sparsify_(model, include="lm_head")
    assert not report.kept and type(model.lm_head) is CSBLinear
    assert torch.equal(generate(model, ids), expected)
    tied = pruned("tied llama")
    assert [row.name for row in sparsify_(tied, include="lm_head").kept] == ["lm_head"]
    with pytest.raises(ValueError, match="include: the model has no module 'head'"):
        sparsify_(model, include="head")


def test_densify_gives_the_model_back():
    model, ids = pruned("bert"), prompt()
    expected = generate(detached(model), ids)
    sparsify_(model)
    densify_(model)
    assert torch.equal(generate(model, ids), expected)


def test_fine_tuning_goes_on_with_the_optimizer_of_the_dense_model():
    model, ids = pruned("llama").train(), prompt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        loss = model(**ids, labels=ids["input_ids"]).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    before = [step() for _ in range(2)]
    sparsify_(model)
    assert len(migrate_optimizer_(optimizer, model)) == 14
    after = [step() for _ in range(5)]
    assert after[-1] < after[0] < before[0]


def test_a_layer_of_another_kind_that_is_pruned_is_named():
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    prune.l1_unstructured(model.transformer.h[0].mlp.c_fc, "weight", 0.9)
    with pytest.warns(UserWarning, match="1 unsupported layer"):
        report = sparsify_(model)
    assert {row.name: row.reason for row in report.kept}["transformer.h.0.mlp.c_fc"] == (
        "unsupported layer: there is no CSB form of Conv1D"
    )
