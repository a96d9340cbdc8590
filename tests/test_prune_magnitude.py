"""Pruning on a schedule (magnitude, random, blocks), and what every pruner shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao.pruning import CubicSL
from torch.nn.utils import parametrizations, prune

from torch_csb.prune import BlockMagnitude, CubicSchedule, GradualMagnitude, GradualRandom


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.mix = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.relu(self.mix(torch.relu(self.conv(x)))).mean((2, 3)))


def now(final):
    """Everything when the pruner is prepared."""
    return CubicSchedule.one_shot(final, at=0)


def train(model, optimizer, pruner, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        pruner.step()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


METHODS = {
    "magnitude": GradualMagnitude,
    "random": GradualRandom,
    "block": lambda schedule, **kw: BlockMagnitude(schedule, (4, 1), **kw),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


def test_schedule_by_hand():
    schedule = CubicSchedule(0.2, 0.9, begin=10, end=50, frequency=10)
    assert [schedule.sparsity(t) for t in (0, 9)] == [0, 0]
    assert schedule.sparsity(10) == pytest.approx(0.2)
    assert schedule.sparsity(20) == schedule.sparsity(29) == pytest.approx(0.9 - 0.7 * 27 / 64)
    assert schedule.sparsity(30) == pytest.approx(0.9 - 0.7 / 8)
    assert schedule.sparsity(50) == schedule.sparsity(1000) == 0.9
    assert [t for t in range(60) if schedule.updates(t)] == [10, 20, 30, 40, 50]


def test_schedule_agrees_with_torch():
    schedule = CubicSchedule(0.1, 0.8, begin=3, end=23, frequency=4)
    for t in range(3, 24, 4):
        assert schedule.sparsity(t) == pytest.approx(CubicSL.sparsity_compute_fn(0.1, 0.8, t, 3, 4, 5))


def test_schedule_ends_at_its_end_though_the_frequency_does_not_divide():
    schedule = CubicSchedule(0.0, 0.5, begin=0, end=10, frequency=4)
    assert [t for t in range(20) if schedule.updates(t)] == [0, 4, 8, 10] and schedule.sparsity(10) == 0.5


@pytest.mark.parametrize("bad", [(0.9, 0.5, 0, 1), (0, 1.1, 0, 1), (0, 0.5, 2, 1), (0, 0.5, -1, 1), (0, 1, 0, 1, 0)])
def test_schedule_refuses(bad):
    with pytest.raises(ValueError, match="expected"):
        CubicSchedule(*bad)


def test_one_shot_prunes_in_the_first_step():
    pruner = GradualMagnitude(CubicSchedule.one_shot(0.5)).prepare(Net())
    assert set(pruner.sparsity().values()) == {0.0}
    pruner.step()
    assert pruner.sparsity() == {"conv": 0.5, "mix": 0.5, "head": 0.5}


def test_magnitude_by_hand_ties_drop_the_first():
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.tensor([[0.5, -3.0, 1.0, -1.0], [1.0, 0.0, -2.0, 4.0]])
    masks = GradualMagnitude(now(0.5)).prepare(nn.Sequential(layer)).finish()
    assert masks["0"].tolist() == [[False, True, False, False], [True, False, True, True]]
    assert layer.weight_orig.tolist() == layer.weight.tolist() == [[0, -3, 0, 0], [1, 0, -2, 4]]


def small_and_large():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 30))
    model[0].weight.data.uniform_(-1e-3, 1e-3)
    model[1].weight.data.uniform_(0.5, 1)
    return model


def test_scopes():
    assert GradualMagnitude(now(0.25)).prepare(small_and_large()).sparsity() == {"0": 0.25, "1": 0.25}
    assert GradualMagnitude(now(0.25), "global").prepare(small_and_large()).sparsity() == {"0": 1.0, "1": 0.0}
    own = GradualMagnitude(CubicSchedule(0, 0.5, 0, 2), {"1": 0.8}).prepare(small_and_large())
    own.step()
    assert own.sparsity() == pytest.approx({"0": 0.44, "1": 0.7})
    own.step()
    assert own.sparsity() == pytest.approx({"0": 0.5, "1": 0.8})
    with pytest.raises(ValueError, match="scope: expected 'uniform'"):
        GradualMagnitude(now(0.5), "local")
    model = small_and_large()
    with pytest.raises(ValueError, match="'nine'"):
        GradualMagnitude(now(0.5), {"nine": 0.5}).prepare(model)
    assert not prune.is_pruned(model)


def test_a_pruned_weight_returns_until_the_freeze():
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    pruner = GradualMagnitude(CubicSchedule(0.5, 0.5, 0, 2)).prepare(nn.Sequential(layer))
    assert pruner.masks["0"].tolist() == [[False, True]] and layer.weight_orig.tolist() == [[1, 2]]
    layer.weight_orig.data[0, 1] = 0.5
    pruner.step()
    assert pruner.masks["0"].tolist() == [[True, False]]
    pruner.step()
    assert layer.weight_orig.tolist() == [[1, 0]]
    layer.weight_orig.data[0, 0] = 0.0
    pruner.step()
    assert pruner.masks["0"].tolist() == [[True, False]]


def test_sparsity_follows_the_schedule_and_training_goes_on(method):
    model = Net()
    identities = {id(parameter) for parameter in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = CubicSchedule(0.0, 0.75, begin=1, end=5, frequency=2)
    pruner = method(schedule).prepare(model, optimizer)
    assert {id(parameter) for parameter in model.parameters()} == identities
    before = model.head.weight_orig.detach().clone()
    for t in range(1, 7):
        train(model, optimizer, pruner, 1)
        for name, sparsity in pruner.sparsity().items():
            # The last group of 4 of the head's 10 output channels is half a group.
            assert sparsity == pytest.approx(schedule.sparsity(t), abs=0.12 if name == "head" else 0.03)
    assert not torch.equal(before, model.head.weight_orig)


def test_masks_are_determined_by_the_seeds(method):
    def masks():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = method(CubicSchedule(0, 0.8, 0, 3), generator=torch.Generator().manual_seed(5))
        train(model, optimizer, pruner.prepare(model, optimizer), 3)
        return pruner.finish()

    assert same(masks(), masks())


def test_random_masks_are_nested_and_come_from_the_generator_alone():
    def masks(seed):
        model, state = Net(), torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        pruner = GradualRandom(CubicSchedule(0, 0.9, 0, 4), generator=generator).prepare(model)
        seen = [pruner.masks]
        for _ in range(4):
            pruner.step()
            seen.append(pruner.masks)
        assert torch.equal(state, torch.get_rng_state())
        return seen

    first = masks(0)
    for early, late in zip(first, first[1:], strict=False):
        assert all((late[name] <= early[name]).all() for name in late)
    assert same(first[-1], masks(0)[-1]) and not same(first[-1], masks(1)[-1])


@pytest.mark.parametrize("shape", [8, 16, 32, (1, 1), (2, 1), (4, 1)], ids=str)
def test_blocks_are_whole_and_the_weakest_go(shape):
    rows, columns = (shape, shape) if isinstance(shape, int) else shape
    layer = nn.Linear(96, 64)
    sums = layer.weight.detach().abs().view(64 // rows, rows, 96 // columns, columns).sum((1, 3))
    mask = BlockMagnitude(now(0.5), shape).prepare(nn.Sequential(layer)).finish()["0"]
    blocks = mask.view(64 // rows, rows, 96 // columns, columns).transpose(1, 2).flatten(2)
    kept = blocks.all(2)
    assert torch.equal(kept, blocks.any(2))
    assert kept.sum() == kept.numel() // 2 and sums[kept].min() >= sums[~kept].max()


def test_blocks_at_the_edge_are_ranked_by_their_mean():
    layer = nn.Linear(10, 9)  # four blocks: 8 x 8, 8 x 2, 1 x 8, 1 x 2
    layer.weight.data.fill_(1.0)
    layer.weight.data[:8, :8] = 0.5
    mask = BlockMagnitude(now(0.25), 8).prepare(nn.Sequential(layer)).finish()["0"]
    assert not mask[:8, :8].any() and mask[8:].all() and mask[:, 8:].all()


def test_blocks_of_a_convolution_group_its_output_channels():
    mask = BlockMagnitude(now(0.5), (4, 1)).prepare(nn.Sequential(nn.Conv2d(3, 8, 3))).finish()["0"]
    groups = mask.unflatten(0, (2, 4))
    assert torch.equal(groups.all(1), groups.any(1)) and (~mask).sum() == 27 * 4


@pytest.mark.parametrize("shape", [4, (8, 1), (1, 4), (8,), 0])
def test_block_shape_is_checked(shape):
    with pytest.raises(ValueError, match="block_shape: expected"):
        BlockMagnitude(now(0.5), shape)


def test_what_another_method_pruned_stays_pruned(method):
    model = Net()
    for layer in (model.mix, model.head):
        prune.random_unstructured(layer, "weight", 0.5)
    earlier = {"mix": model.mix.weight_mask.bool(), "head": model.head.weight_mask.bool()}
    pruner = method(now(0.75)).prepare(model)
    masks = pruner.finish()
    for name, mask in earlier.items():
        assert (masks[name] <= mask).all() and pruner.sparsity()[name] >= 0.7
        if not isinstance(pruner, BlockMagnitude):  # whose blocks have holes already
            assert pruner.sparsity()[name] == 0.75


def test_layers_are_chosen_as_in_sparsify():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "tied", "again")})
    model["again"].weight = model["tied"].weight
    model["mine"], model["attention"] = Mine(4, 4), nn.MultiheadAttention(4, 2)
    model["normed"] = parametrizations.weight_norm(nn.Linear(4, 4))

    def layers(**which):
        return list(GradualMagnitude(now(0.5), **which).prepare(model).layers)

    assert layers() == ["a", "b"]
    assert layers(exclude="a") == ["b"] and layers(exclude=[model["b"]]) == ["a"]
    assert layers(filter_fn=lambda name, _: name == "b") == ["b"]
    with pytest.raises(ValueError, match="no module 'zzz'"):
        layers(exclude="zzz")


def test_verbs_out_of_order_are_refused():
    pruner = GradualMagnitude(now(0.5))
    for verb in (pruner.step, pruner.finish, pruner.penalty):
        with pytest.raises(RuntimeError, match="prepare"):
            verb()
    with pytest.raises(ValueError, match=r"model: expected an nn\.Linear"):
        pruner.prepare(nn.ReLU())
    model = Net()
    with pytest.raises(ValueError, match="optimizer: expected"):
        pruner.prepare(model, torch.optim.SGD(Net().parameters()))
    pruner.prepare(model)
    assert pruner.penalty() == 0
    with pytest.raises(RuntimeError, match="second"):
        pruner.prepare(model)
    assert same(pruner.finish(), pruner.masks)
    for verb in (pruner.step, pruner.finish):
        with pytest.raises(RuntimeError, match="finished"):
            verb()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_degenerate_sizes(method):
    for final in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(0, 3), nn.Linear(5, 0))
        assert method(now(final)).prepare(model).sparsity()["0"] == final
