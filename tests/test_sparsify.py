from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_csb
from torch_csb import CSBConv2d, CSBLinear, densify_, sparsify_
from torch_csb.nn._layer import CSBLayer
from torch_csb.nn.report import human_bytes


def zero_out(model, sparsity=0.9):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.mix = nn.Sequential(nn.Conv2d(64, 96, 1, bias=False), nn.ReLU())
        self.head = nn.Linear(96, 80)

    def forward(self, x):
        return self.head(self.mix(self.stem(x)).mean((2, 3)))


def reasons(report):
    return {row.name: row.reason for row in report.kept}


def names(report):
    return [row.name for row in report.converted]


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def test_pruned_layers_are_converted_and_the_model_computes_the_same(device):
    model = zero_out(Net()).double().to(device)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    expected = model(x)
    report = sparsify_(model)
    assert type(model.mix[0]) is CSBConv2d and type(model.head) is CSBLinear and type(model.stem) is nn.Conv2d
    torch.testing.assert_close(model(x), expected)
    assert names(report) == ["mix.0", "head"]
    assert reasons(report) == {"stem": "not a 1x1 convolution: kernel_size is (3, 3)"}


def test_densify_is_the_inverse(device):
    model = zero_out(Net()).to(device)
    before, types = snapshot(model), [type(module) for module in model.modules()]
    sparsify_(model)
    report = densify_(model)
    assert names(report) == ["mix.0", "head"]
    assert [type(module) for module in model.modules()] == types
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_report_rows_hold_what_was_measured():
    model = zero_out(Net())
    kept = int(model.head.weight.count_nonzero())
    report = sparsify_(model)
    assert [row.name for row in report.rows] == ["stem", "mix.0", "head"]
    stem, _, head = report.rows
    assert (head.kind, head.shape, head.action, head.reason) == ("Linear", (80, 96), "converted", "")
    assert head.sparsity == 1 - kept / (80 * 96)
    assert head.bytes_before == 80 * 96 * 4 and head.bytes_after == model.head.matrix.nbytes
    assert stem.bytes_after == stem.bytes_before == 64 * 27 * 4
    assert stem.sparsity is None and stem.shape == (64, 3, 3, 3)
    assert report.bytes_after == sum(row.bytes_after for row in report.rows)


def test_report_prints_an_aligned_table():
    report = sparsify_(zero_out(Net()))
    lines = str(report).splitlines()
    assert all(len(line) <= len(lines[1]) for line in lines)
    lines, notes = lines[:7], lines[7:]
    assert " ".join(notes) == report.notes[0] and "torch_csb.param_groups(model, weight_decay)" in report.notes[0]
    after = lines[0].index("after") + len("after")
    for line, row in zip(lines[2:5], report.rows, strict=True):
        assert line[:after].endswith(human_bytes(row.bytes_after)) and row.name in line and row.action in line
    assert lines[-1].startswith("2 of 3 layers converted") and lines[-1].endswith(human_bytes(report.bytes_after))
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 << 20)] == ["0 B", "1023 B", "1.5 KiB", "3.0 MiB"]


def test_dry_run_tells_the_same_and_changes_nothing():
    model = zero_out(Net())
    prune.l1_unstructured(model.head, "weight", 0.95)
    before, structure = snapshot(model), str(model)
    dry = sparsify_(model, dry_run=True)
    assert str(model) == structure and prune.is_pruned(model.head)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert dry == sparsify_(model)


def test_pruning_masks_are_resolved_in_place():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)).double()
    for layer in model:
        prune.l1_unstructured(layer, "weight", 0.9)
    prune.random_unstructured(model[0], "bias", 0.5)
    model[1].weight_orig.requires_grad_(False)
    mask, bias = model[0].weight_mask, model[0].bias_orig
    model[0].weight_orig.data[mask.bool().nonzero()[0].unbind()] = 0
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = model(x)
    sparsify_(model)
    torch.testing.assert_close(model(x), expected)
    assert model[0].nnz == mask.sum()
    assert model[0].bias is bias and (bias == 0).sum() == 24
    assert model[0].values.requires_grad and not model[1].values.requires_grad
    assert not any("orig" in key or "mask" in key for key in model.state_dict())
    assert not any(module._forward_pre_hooks for module in model)


def test_hooks_bias_and_handles_move_to_the_new_layer():
    model = zero_out(nn.Sequential(nn.Linear(64, 48)))
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    bias = model[0].bias
    sparsify_(model)
    model(torch.randn(2, 64))
    assert seen == [1] and model[0].bias is bias
    densify_(model)
    model(torch.randn(2, 64))
    assert seen == [1, 1] and model[0].bias is bias
    handle.remove()
    model(torch.randn(2, 64))
    assert seen == [1, 1]


def test_a_shared_module_is_converted_once_and_stays_shared():
    shared = nn.Linear(64, 64)
    model = zero_out(nn.ModuleDict({"a": shared, "list": nn.ModuleList([shared, nn.ReLU(), shared])}))
    report = sparsify_(model)
    assert names(report) == ["a"] and len(report.rows) == 1
    assert type(model["a"]) is CSBLinear and model["a"] is model["list"][0] is model["list"][2]
    densify_(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["list"][0] is model["list"][2]


def tied_parameter():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 48), "head": nn.Linear(48, 64)})
    model["head"].weight = model["embed"].weight
    return model, "tied weight: used as embed.weight and head.weight"


def tied_storage():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 48), "head": nn.Linear(64, 48)})
    model["head"].weight = nn.Parameter(model["embed"].weight.data.t())
    return model, "tied weight: shares memory with embed.weight"


@pytest.mark.parametrize("tie", [tied_parameter, tied_storage])
def test_a_tied_weight_is_kept(tie):
    model, reason = tie()
    zero_out(model)
    with pytest.warns(UserWarning, match="converted none of 1 layers \\(1 tied weight\\)"):
        report = sparsify_(model)
    assert reasons(report) == {"head": reason}


def test_multihead_attention_keeps_its_projection_and_the_layer_works_in_train_and_eval():
    encoder = zero_out(nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)).double()
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    expected = encoder.train()(x)
    report = sparsify_(encoder)
    assert names(report) == ["linear1", "linear2"]
    assert reasons(report) == {"self_attn.out_proj": "part of MultiheadAttention: it reads this weight directly"}
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(encoder.train(mode)(x), expected)


def test_subclasses_and_parametrizations_are_kept_with_a_reason():
    class MyLinear(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "mine": MyLinear(64, 64),
            "lazy": nn.LazyLinear(64),
            "normed": parametrizations.weight_norm(nn.Linear(64, 64)),
            "old_norm": nn.utils.spectral_norm(nn.Linear(64, 64)),
            "meta": nn.Linear(64, 64, device="meta"),
            "plain": zero_out(nn.Linear(64, 64)),
        }
    )
    report = sparsify_(model)
    assert names(report) == ["plain"]
    for name, reason in {
        "mine": "not a plain layer: it is a MyLinear",
        "lazy": "not a plain layer: it is a LazyLinear",
        "normed": "parametrized",
        "old_norm": "not a plain layer: its state_dict hooks",
        "meta": "unsupported weight: it is on meta",
    }.items():
        assert reasons(report)[name].startswith(reason)


def test_min_sparsity_decides_and_says_so():
    model = zero_out(nn.Sequential(nn.Linear(64, 64)), 0.4)
    with pytest.warns(UserWarning, match="1 too dense"):
        report = sparsify_(model)
    assert report.kept[0].reason.startswith("too dense: ") and report.kept[0].reason.endswith("50 % are asked for")
    with pytest.warns(UserWarning, match="1 too dense"):
        sparsify_(model, min_sparsity=0.6)
    assert names(sparsify_(model, min_sparsity=0.2)) == ["0"]


def layers_of_two_sizes():
    """80 % zeros: more than enough for a large layer on a GPU, too few for a small one."""
    return zero_out(nn.Sequential(nn.Linear(64, 128), nn.Linear(2048, 512)), 0.8)


def test_a_batch_keeps_what_would_be_faster_dense():
    model = layers_of_two_sizes()
    report = sparsify_(model, batch=16384, target="cuda", dry_run=True)
    assert names(report) == ["1"]
    assert reasons(report) == {
        "0": f"faster dense: {100 * report.kept[0].sparsity:.1f} % zeros, 16384 columns, on a GPU"
    }
    assert names(sparsify_(model, target="cuda", dry_run=True)) == ["0", "1"]
    assert names(sparsify_(model, batch=64, target="cpu", dry_run=True)) == ["0", "1"]
    with pytest.warns(UserWarning, match="2 faster dense"):
        sparsify_(model.bfloat16(), batch=16384, target="cuda")


@pytest.mark.parametrize("batch", [1, 8, 64, 300, 4096])
def test_a_batch_decides_as_explain_does(batch, device):
    pytest.importorskip("torch_csb._plan")
    for sparsity in (0.55, 0.65, 0.75, 0.85, 0.95):
        model = zero_out(nn.Sequential(nn.Linear(600, 400)), sparsity).to(device)
        faster_dense = torch_csb.explain(CSBLinear.from_dense(model[0]), batch).dense_faster
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = sparsify_(model, batch=batch, target=device, dry_run=True)
        assert names(report) == ([] if faster_dense else ["0"])


@pytest.mark.parametrize("batch", [0, -1, 2.0, True, "8"])
def test_a_batch_is_a_number_of_columns(batch):
    with pytest.raises(ValueError, match="batch: expected a number of columns"):
        sparsify_(zero_out(nn.Sequential(nn.Linear(64, 64))), batch=batch)


def test_auto_keeps_a_layer_that_would_not_shrink():
    # At 50 % in bfloat16 values and codes, which CPUs read, take the 2 bytes an element that the dense weight does.
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    with torch.no_grad():
        model[0].weight[:32] = 0
        model[0].weight[32:] = 1
    size = CSBLinear.from_dense(model[0], target="cpu").matrix.nbytes
    assert size >= 64 * 64 * 2
    with pytest.warns(UserWarning, match="1 not smaller"):
        report = sparsify_(model, target="cpu")
    assert report.kept[0].reason == f"not smaller: {size} bytes compressed, 8192 dense"
    assert report.kept[0].bytes_after == 8192
    assert names(sparsify_(model, min_sparsity=0.4, target="cpu")) == ["0"]


def test_exclude_takes_names_patterns_and_modules_with_everything_inside():
    def model():
        blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)])
        return zero_out(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(64, 64)}))

    assert names(sparsify_(model(), exclude="head")) == [f"blocks.{i}.{j}" for i in range(3) for j in range(2)]
    assert names(sparsify_(model(), exclude=["blocks.*.0", "blocks.2"])) == ["blocks.0.1", "blocks.1.1", "head"]
    net = model()
    report = sparsify_(net, exclude=[net["blocks"]])
    assert names(report) == ["head"] and reasons(report)["blocks.0.0"] == "excluded"
    with pytest.raises(ValueError, match="exclude: the model has no module 'haed'"):
        sparsify_(model(), exclude=("haed",))
    with pytest.raises(TypeError, match="exclude: expected names, patterns or modules, got int"):
        sparsify_(model(), exclude=[3])


class Asked(nn.Module):
    """A model that says which layer makes its logits, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(64, 64), nn.Linear(64, 64)

    def get_output_embeddings(self):
        return self.top


class Unsure(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(64, 64)

    def get_output_embeddings(self):
        raise NotImplementedError


def test_output_heads_are_kept_by_default():
    model = zero_out(nn.ModuleDict({"asked": Asked(), "unsure": Unsure(), "lm_head_norm": nn.Linear(64, 64)}))
    report = sparsify_(copy.deepcopy(model))
    assert names(report) == ["asked.body", "lm_head_norm"]
    assert reasons(report) == {
        name: f"output head: kept by default, include={name!r} converts it" for name in ("asked.top", "unsure.lm_head")
    }
    assert names(sparsify_(copy.deepcopy(model), include="*.lm_head"))[1:] == ["unsure.lm_head", "lm_head_norm"]
    report = sparsify_(model, include=[model["asked"], model["unsure"].lm_head], exclude="lm_head_norm")
    assert reasons(report) == {"lm_head_norm": "excluded"}
    with pytest.raises(TypeError, match="include: expected names, patterns or modules, got int"):
        sparsify_(model, include=[3])


def test_filter_fn_sees_name_and_module():
    model = zero_out(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)))
    report = sparsify_(model, filter_fn=lambda name, module: name == "1" and module.out_features == 32)
    assert names(report) == ["1"] and reasons(report) == {"0": "excluded: filter_fn returned false"}


def test_bad_arguments_are_refused_before_anything_changes():
    model = zero_out(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match="target: expected one of"):
        sparsify_(model, target="tpu")
    for bad in (1.5, -0.1, "half", None):
        with pytest.raises(ValueError, match="min_sparsity: expected 'auto' or a number from 0 to 1"):
            sparsify_(model, min_sparsity=bad)
    assert type(model[0]) is nn.Linear


def test_a_bare_layer_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"torch_csb.CSBLinear.from_dense\(model\)"):
        sparsify_(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"torch_csb.CSBConv2d.from_dense\(model\)"):
        sparsify_(nn.Conv2d(4, 4, 1))
    with pytest.raises(TypeError, match=r"use its to_dense\(\)"):
        densify_(CSBLinear.from_dense(nn.Linear(4, 4)))


def test_nothing_converted_warns_at_the_callers_line_with_the_reasons():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(3, 3, 3))
    with pytest.warns(UserWarning, match=r"none of 3 layers \(2 too dense; 1 not a 1x1 convolution\)") as caught:
        sparsify_(model)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the model holds no nn.Linear and no convolution"):
        sparsify_(nn.Sequential(nn.ReLU()))


def test_a_second_run_keeps_what_is_compressed():
    model = zero_out(nn.Sequential(nn.Linear(64, 64)))
    sparsify_(model)
    layer = model[0]
    with pytest.warns(UserWarning, match="1 already compressed"):
        report = sparsify_(model)
    assert model[0] is layer and report.rows[0].bytes_before == layer.matrix.nbytes


def test_conversion_goes_on_where_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(sparsify_(zero_out(nn.Sequential(nn.Linear(64, 64))))) == ["0"]


def test_the_dense_weight_and_its_gradient_are_let_go_at_once():
    model = zero_out(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))))
    model(torch.randn(2, 64)).sum().backward()
    weights = [weakref.ref(layer.weight) for layer in model]
    grads = [weakref.ref(layer.weight.grad) for layer in model]
    alive = []

    def filter_fn(name, module):
        gc.collect()
        alive.append((sum(ref() is not None for ref in weights), sum(ref() is not None for ref in grads)))
        return True

    sparsify_(model, filter_fn=filter_fn)
    assert alive == [(4, 4), (3, 3), (2, 2), (1, 1)]
    assert not any(ref() is not None for ref in weights)


def test_an_optimizer_that_holds_the_dense_weight_loses_its_gradient():
    model = zero_out(nn.Sequential(nn.Linear(64, 64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 64)).sum().backward()
    weight = model[0].weight
    sparsify_(model)
    assert weight.grad is None
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)


def test_densify_refuses_activations_and_changes_nothing():
    model = zero_out(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    sparsify_(model)
    model[1].activation = "relu"
    with pytest.raises(ValueError, match="1: a dense layer has no activation, got 'relu'"):
        densify_(model)
    assert all(isinstance(layer, CSBLayer) for layer in model)


def test_progress_bar_on_demand(capsys):
    pytest.importorskip("tqdm")
    model = zero_out(nn.Sequential(nn.Linear(64, 64)))
    sparsify_(copy.deepcopy(model), progress=True)
    assert "packing" in capsys.readouterr().err
    sparsify_(copy.deepcopy(model), progress=False)
    sparsify_(model)
    assert capsys.readouterr() == ("", "")


def test_peak_memory_is_one_layer_extra():
    if not torch.cuda.is_available():
        pytest.skip("needs torch.cuda's memory statistics")
    size, layers = 2048, 4
    model = zero_out(nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))).cuda()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sparsify_(model)
    assert torch.cuda.max_memory_allocated() - before <= size * size * 4
    assert before - torch.cuda.memory_allocated() > 0.6 * layers * size * size * 4


def test_fine_tuning_after_sparsify_lowers_the_loss(device):
    model = zero_out(Net()).to(device)
    torch_csb.sparsify_(model)
    x, target = torch.randn(8, 3, 4, 4, device=device), torch.randint(0, 80, (8,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
