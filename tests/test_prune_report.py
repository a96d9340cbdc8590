"""The report on a pruned model, the scratch control, and pruned models in training, sparsify_, compile and DDP."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

import torch_csb
from torch_csb.prune import CubicSchedule, GradualMagnitude, GradualRandom, report, scratch_control


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3)
        self.mix = nn.Conv2d(6, 40, 1)
        self.norm = nn.BatchNorm2d(40)
        self.head = nn.Linear(40, 30)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.mix(torch.relu(self.stem(x))))).mean((2, 3)))


def example():
    return torch.randn(3, 2, 6, 6)


def pruned(sparsity=0.9):
    model = Net()
    return model, GradualMagnitude(CubicSchedule.one_shot(sparsity, at=0)).prepare(model).finish()


def steps(model, optimizer, count=1):
    for _ in range(count):
        optimizer.zero_grad()
        model(example()).square().mean().backward()
        optimizer.step()


def test_report_counts_by_hand():
    model, masks = pruned()
    found = report(model, example(), seconds=0.02)
    weights = {"stem": 2 * 6 * 9, "mix": 6 * 40, "head": 40 * 30}
    positions = {"stem": 3 * 4 * 4, "mix": 3 * 4 * 4, "head": 3}
    assert [row.name for row in found.rows] == list(weights)
    for row in found.rows:
        assert row.size == weights[row.name] and row.nonzeros == masks[row.name].sum()
        assert row.compression == row.size / row.nonzeros
        assert row.flops == 2 * row.size * positions[row.name]
        assert row.nonzero_flops == 2 * row.nonzeros * positions[row.name]
        assert row.measured_speedup == row.dense_us / row.sparse_us > 0
    total, others = found.total, 6 + 40 + 80 + 30
    assert total.size == sum(weights.values()) + others
    assert total.nonzeros == sum(int(mask.sum()) for mask in masks.values()) + others
    assert total.theoretical_speedup == sum(r.flops for r in found.rows) / sum(r.nonzero_flops for r in found.rows)
    assert total.measured_speedup > 0


def test_report_without_an_example_counts_only():
    found = report(pruned()[0])
    assert [row.name for row in found.rows] == ["stem", "mix", "head"]
    for row in (*found.rows, found.total):
        assert row.compression > 1 and row.theoretical_speedup is None and row.measured_speedup is None


def test_report_is_the_same_for_csb_layers_and_leaves_the_model_alone():
    model, _ = pruned()
    model(example())  # leaves results of autograd in the layers, which a plain deepcopy refuses
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masked = report(model, example(), seconds=0.02)
    assert model.training and prune.is_pruned(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch_csb.sparsify_(model)
    csb = report(model, example(), seconds=0.02)
    assert [row.kind for row in csb.rows] == ["Conv2d", "CSBConv2d", "CSBLinear"]

    def counts(found):
        rows = (*found.rows, found.total)
        return [(row.name, row.size, row.nonzeros, row.flops, row.nonzero_flops) for row in rows]

    assert counts(masked) == counts(csb)


def test_report_reads_the_mask_after_a_step_not_the_weight_of_the_last_forward():
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", 0.5)
    layer.weight_orig.data.zero_()
    assert report(nn.Sequential(layer)).rows[0].nonzeros == 0


def test_report_of_edge_cases():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert report(tied).total.size == 16
    assert report(nn.ReLU()).total.compression == 1
    bare = report(nn.Linear(4, 3), torch.randn(2, 4), seconds=0.01)
    assert bare.rows[0].flops == 2 * 12 * 2 and bare.total.size == 15
    csb = torch_csb.CSBLinear.from_dense(nn.Linear(4, 3))
    assert report(csb, torch.randn(2, 4), seconds=0.01).rows[0].kind == "CSBLinear"
    with pytest.raises(ValueError, match="seconds: expected"):
        report(tied, seconds=0)


def test_report_prints_an_aligned_table():
    lines = str(report(pruned()[0], example(), seconds=0.02)).splitlines()
    assert len(lines) == 7 and len({len(line) for line in lines}) == 1
    assert lines[0].endswith("measured speed-up") and lines[-1].startswith("total") and "10.00x" in lines[4]


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_finish_a_step_with_momentum_and_decay_leaves_pruned_weights_exactly_zero(make):
    model = Net()
    optimizer = make(model.parameters())
    steps(model, optimizer, 3)  # momenta
    pruner = GradualMagnitude(CubicSchedule(0.8, 0.8, 1, 100)).prepare(model, optimizer)
    pruner.step()
    steps(model, optimizer)
    masks = pruner.finish()  # before the schedule's freeze
    optimizer.step()  # with the gradient of the step before
    for _ in range(2):
        for name, layer in pruner.layers.items():
            assert (layer.weight_orig[~masks[name]] == 0).all()
            assert layer.weight_orig[masks[name]].count_nonzero() == masks[name].sum()
        steps(model, optimizer, 2)


def test_the_gradient_of_before_the_pruning_moves_nothing():
    model = Net()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    steps(model, optimizer)
    pruner = GradualMagnitude(CubicSchedule.one_shot(0.8)).prepare(model, optimizer)
    pruner.step()
    optimizer.step()
    masks = pruner.finish()
    optimizer.step()
    assert all((layer.weight_orig[~masks[name]] == 0).all() for name, layer in pruner.layers.items())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_multiplied_by_their_mask_once_do_not_stay_zero(make):
    model = Net()
    optimizer = make(model.parameters())
    steps(model, optimizer, 3)
    masks = GradualMagnitude(CubicSchedule.one_shot(0.8, at=0)).prepare(copy.deepcopy(model)).finish()
    for name, mask in masks.items():
        model.get_submodule(name).weight.data.mul_(mask)
    steps(model, optimizer)
    assert all(model.get_submodule(name).weight[~mask].count_nonzero() > 0 for name, mask in masks.items())


def test_scratch_control_keeps_the_masks_and_nothing_of_the_weights():
    model, masks = pruned()
    model(example())
    before, state = model.head.weight_orig.detach().clone(), torch.get_rng_state()
    first, again, other = (scratch_control(model, masks, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(model.head.weight_orig, before)
    for name, mask in masks.items():
        old, new, same, differs = (m.get_submodule(name).weight_orig for m in (model, first, again, other))
        assert (new[~mask] == 0).all() and torch.equal(first.get_submodule(name).weight_mask.bool(), mask)
        assert torch.equal(new, same) and not torch.equal(new, differs) and not (new == old)[mask].any()
    assert first.norm.num_batches_tracked == 0 and model.norm.num_batches_tracked == 1
    assert len(torch_csb.sparsify_(first).converted) == 2


def test_scratch_control_refuses():
    model, masks = pruned()
    with pytest.raises(ValueError, match="'nine'"):
        scratch_control(model, {"nine": masks["head"]})
    with pytest.raises(ValueError, match="mask: expected shape"):
        scratch_control(model, {"head": masks["mix"]})
    model.scale = nn.Module()
    model.scale.register_parameter("w", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="reset_parameters"):
        scratch_control(model, masks)


def test_sparsify_takes_the_masks():
    model, masks = pruned()
    model.double().eval()
    model.head.weight_orig.data[masks["head"].nonzero()[0].unbind()] = 0  # a zero inside the mask stays an entry
    x = example().double()
    expected = model(x)
    assert [row.name for row in torch_csb.sparsify_(model).converted] == ["mix", "head"]
    torch.testing.assert_close(model(x), expected)
    assert model.head.nnz == masks["head"].sum() and model.mix.nnz == masks["mix"].sum()


def test_sparsify_takes_the_zeros_of_torch_ao_pruning():
    model = Net()
    sparsifier = WeightNormSparsifier(sparsity_level=0.9, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "head.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert [row.name for row in torch_csb.sparsify_(model).converted] == ["head"]
    assert model.head.nnz == 120


def test_pruning_goes_on_inside_torch_compile():
    torch._dynamo.reset()
    eager = Net()
    compiled = copy.deepcopy(eager)
    ran, xs = [], [example() for _ in range(4)]
    for model in (eager, compiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = GradualMagnitude(CubicSchedule(0, 0.8, 0, 3)).prepare(model, optimizer)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if model is compiled else model
        for x in xs:
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
            pruner.step()
        ran.append((pruner.finish(), run(xs[0]).detach()))
    torch.testing.assert_close(ran[0], ran[1])
    torch_csb.sparsify_(compiled, min_sparsity=0.5)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(compiled, backend="aot_eager")(xs[0]), ran[1][1], rtol=1e-4, atol=1e-5)


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule, generator = CubicSchedule(0, 0.8, 0, 3), torch.Generator().manual_seed(1)
        pruners = [
            GradualMagnitude(schedule, exclude="mix"),
            GradualRandom(schedule, filter_fn=lambda name, _: name == "mix", generator=generator),
        ]
        for pruner in pruners:
            pruner.prepare(model, optimizer)
        parallel = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(1 + rank)  # each rank has data of its own
        for _ in range(4):
            steps(parallel, optimizer)
            for pruner in pruners:
                pruner.step()
        masks = {name: mask for pruner in pruners for name, mask in pruner.finish().items()}
        steps(parallel, optimizer)
        weights = {name: model.get_submodule(name).weight_orig.detach() for name in masks}
        torch.save({"masks": masks, "weights": weights}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ranks_of_distributed_data_parallel_keep_the_same_masks(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name, mask in first["masks"].items():
        assert (~mask).sum() == round(0.8 * mask.numel()) and (first["weights"][name][~mask] == 0).all()
