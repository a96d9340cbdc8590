"""k-means, shared values in training, and the digits that they cost."""

from __future__ import annotations

import pytest
import torch
from compressed_cases import assert_same_state, bits_of, layer_of, state_of
from small_net import Net, sparse_net
from torch import nn
from torch.nn import functional as F

from torch_csb import CSBMatrix, sparsify_
from torch_csb.prune import load_compressed, save_compressed, share_
from torch_csb.prune.sharing import kmeans


def test_kmeans_of_six_numbers_by_hand():
    # Start 0, 5, 10; 5 attracts nothing and is left out; the means are (0 + 1 + 2)/3 and (9 + 10 + 11)/3.
    centroids, codes = kmeans(torch.tensor([9.0, 0.0, 2.0, 10.0, 1.0, 11.0]), 2)
    assert centroids.tolist() == [1.0, 10.0] and codes.tolist() == [1, 0, 0, 1, 0, 1]
    centroids, codes = kmeans(torch.tensor([0.0, 0.25, 0.5, 8.0]), 3)
    assert centroids.tolist() == [0.25, 8.0] and codes.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kmeans_keeps_few_values_and_ends_where_every_centroid_is_a_mean(dtype):
    few = torch.tensor([3.0, -1.0, 3.0, 0.5], dtype=dtype)
    centroids, codes = kmeans(few, 4)
    assert centroids.dtype == dtype and torch.equal(centroids[codes.long()], few)
    assert [len(part) for part in kmeans(few[:0], 4)] == [0, 0]
    values = torch.randn(5000).to(dtype)
    centroids, codes = kmeans(values, 16)
    assert len(centroids) <= 16 and torch.equal(codes.unique(), torch.arange(len(centroids), dtype=torch.uint8))
    distances = (values[:, None].double() - centroids.double()).abs()
    assert torch.equal(distances.min(1).values, distances[torch.arange(5000), codes.long()])
    if dtype in (torch.float64, torch.float32):
        means = torch.stack([values[codes == j].double().mean() for j in range(len(centroids))])
        torch.testing.assert_close(centroids.double(), means, rtol=1e-6, atol=1e-7)


def test_share_leaves_few_values_and_the_same_ones_each_time(device):
    model, twin = sparse_net().to(device), Net().eval().to(device)
    sparsify_(twin, min_sparsity=0)
    twin.load_state_dict(model.state_dict())
    before = {name: model.get_submodule(name).values for name in ("conv", "fc")}
    sharing = share_(model, {"conv": 8, "fc": 4})
    share_(twin, {"conv": 8, "fc": 4})
    assert list(sharing) == ["conv", "fc"]
    for name, bits in (("conv", 8), ("fc", 4)):
        layer, shared = model.get_submodule(name), sharing[name]
        assert layer.values is before[name] and shared.codes.dtype == torch.uint8
        assert len(layer.values.unique()) <= 2**bits + 1  # and the padding
        entry = layer.matrix.is_entry
        assert torch.equal(layer.values[entry], shared.codebook[shared.codes.long()])
        assert not layer.values[~entry].any()
        assert torch.equal(layer.values, twin.get_submodule(name).values)
    layer.matrix.validate()


def test_the_gradient_of_a_centroid_is_the_sum_over_its_code(device):
    model = layer_of(CSBMatrix.from_dense((torch.randn(40, 30) * (torch.rand(40, 30) > 0.8)).double().to(device)))
    layer, x = model["fc"], torch.randn(7, 30, dtype=torch.float64, device=device)
    shared = share_(model, 2)["fc"]
    codebook = shared.codebook.clone().requires_grad_()
    # The same network with the codebook as the Parameter, and autograd's own sums.
    codes = torch.full((layer.values.numel(),), -1, device=device)
    codes[layer.matrix.is_entry] = shared.codes.long()
    numbers = layer.matrix.with_values(codes.double() + 2).to_dense().long()
    weight = torch.cat([codebook.new_zeros(2), codebook])[numbers]
    F.linear(x, weight).square().sum().backward()
    layer(x).square().sum().backward()
    grad = layer.values.grad[layer.matrix.is_entry]
    torch.testing.assert_close(grad, codebook.grad[shared.codes.long()])
    assert not layer.values.grad[~layer.matrix.is_entry].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_an_optimizer_moves_centroids(make):
    model = layer_of(CSBMatrix.from_dense(torch.randn(40, 30) * (torch.rand(40, 30) > 0.8)))
    layer, x = model["fc"], torch.randn(7, 30)
    sharing = share_(model, 3)
    shared, entry = sharing["fc"], layer.matrix.is_entry
    codebook = nn.Parameter(shared.codebook.clone())
    optimizer, reference = make([layer.values]), make([codebook])
    for _ in range(5):
        row, col = layer.matrix.to_coo().indices()
        order = layer.matrix.with_values(torch.arange(len(entry)).double()).to_coo().values().long()
        codes = torch.zeros(len(entry), dtype=torch.long).masked_scatter(entry, shared.codes.long())[order]
        weight = torch.zeros(40, 30).index_put((row, col), codebook[codes])
        reference.zero_grad()
        F.linear(x, weight).square().mean().backward()
        reference.step()
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        sharing.step()
        torch.testing.assert_close(shared.codebook, codebook.detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.values[entry], shared.codebook[shared.codes.long()])
    assert not layer.values[~entry].any()
    sharing.finish()
    sharing.finish()
    layer.values.grad = None
    layer(x).square().mean().backward()
    assert len(layer.values.grad.unique()) > 8 + 1


def test_values_that_are_few_stay_as_they_are():
    dense = torch.zeros(20, 20)
    dense[3, 4:7] = torch.tensor([0.1, -0.7, 3.0])
    model = layer_of(CSBMatrix.from_dense(dense))
    sharing = share_(model, 2)
    sharing.step()
    assert torch.equal(model["fc"].matrix.to_dense(), dense)


def test_share_refuses_what_it_cannot_do_and_changes_nothing():
    model = sparse_net()
    before = state_of(model)
    for bits, message in ((0, "from 1 to 8, got 0"), (9, "got 9"), (True, "got True"), ({"norm": 4}, "got 'norm'")):
        with pytest.raises(ValueError, match=message):
            share_(model, bits)
    with pytest.raises(ValueError, match="at least one CSB layer"):
        share_(Net())
    assert_same_state(state_of(model), before)
    model.fc.values.data[0] = float("nan")
    with pytest.raises(ValueError, match="fc.values: expected finite"):
        share_(model)
    assert torch.equal(bits_of(model.conv.values), before["conv.values"][2])
    model.fc.values.data[0] = 0
    sharing = share_(model)
    model.load_state_dict(sparse_net(0.5).state_dict())
    with pytest.raises(ValueError, match="stored entries that were shared"):
        sharing.step()


def test_four_bits_cost_at_most_half_a_point_on_digits(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = (torch.from_numpy(array) for array in datasets.load_digits(return_X_y=True))
    x, order = images.float() / 16, torch.randperm(len(labels))
    train, test = order[:1000], order[1000:]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def fit(epochs, lr, after_step=lambda: None):
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for _ in range(epochs):
            for picked in train[torch.randperm(len(train))].split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[picked]), labels[picked]).backward()
                optimizer.step()
                after_step()

    def accuracy():
        with torch.no_grad():
            return 100 * (model(x[test]).argmax(1) == labels[test]).double().mean().item()

    fit(25, 2e-3)
    for layer in (model[0], model[2]):
        weight = layer.weight.data
        weight *= weight.abs() > weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values
    sparsify_(model, min_sparsity=0)
    fit(25, 2e-3)
    before = accuracy()
    sharing = share_(model, 4)
    fit(10, 2e-4, sharing.step)
    sharing.finish()
    sizes = save_compressed(model, tmp_path / "model.csbz")
    fresh = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    load_compressed(fresh, tmp_path / "model.csbz")
    assert_same_state(state_of(fresh), state_of(model))
    after = accuracy()
    print(f"accuracy {before:.2f} % at 32 bits, {after:.2f} % at 4; {sizes}")
    assert before > 90 and after >= before - 0.5
    assert sizes.dense > sizes.csb > sizes.codes > sizes.file
