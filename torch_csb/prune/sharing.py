"""Weight sharing: the values of a CSB layer become few centroids, and training then moves the centroids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_csb._progress import progress as progress_bar
from torch_csb.nn._layer import CSBLayer

# From linear starting points real weights need some tens of steps; this only bounds the worst case.
_MAX_ITERATIONS = 1000
_PROGRESS_AFTER_S = 1.0


@dataclass
class SharedValues:
    """One layer's values as codes into a codebook: ``values[entry] == codebook[codes]``.

    Attributes:
        name, layer: where it is in the model.
        codes: uint8 ``[nnz]``, the centroid of each entry, padding left out.
        codebook: ``[n]``, n ≤ 2^bits centroids in the dtype of the values; each has at least one entry.
        entry: bool ``[stored]``, False at padding.
    """

    name: str
    layer: CSBLayer
    codes: Tensor
    codebook: Tensor
    entry: Tensor
    _hook: torch.utils.hooks.RemovableHandle | None = field(default=None, repr=False)

    def sums(self, entries: Tensor) -> Tensor:
        """float64 ``[n]``: the sum over the entries of each code. ``entries`` is ``[stored]``, like the values."""
        if entries.shape != self.entry.shape:
            raise ValueError(
                f"{self.name}.values: expected the {self.entry.numel()} stored entries that were shared, got "
                f"{entries.numel()}; call share_ again after the pattern changed"
            )
        if self.codes.device != entries.device:
            for name in ("codes", "codebook", "entry"):
                setattr(self, name, getattr(self, name).to(entries.device))
        # In 16 bits, or in float32 over millions of entries, the sum would drown its terms.
        zeros = torch.zeros(len(self.codebook), dtype=torch.float64, device=entries.device)
        return zeros.index_add(0, self.codes.int(), entries[self.entry].double())

    def expand(self, codebook: Tensor) -> Tensor:
        """``[stored]``: the centroid of each entry, 0 at padding."""
        zeros = torch.zeros(self.entry.shape, dtype=codebook.dtype, device=codebook.device)
        return zeros.masked_scatter(self.entry, codebook[self.codes.int()])

    def tied(self, grad: Tensor) -> Tensor:
        """``[stored]``: the gradient of each entry's centroid."""
        return self.expand(self.sums(grad).to(grad.dtype))

    @torch.no_grad()
    def project(self) -> None:
        values = self.layer.values
        sums = self.sums(values)
        counts = torch.bincount(self.codes, minlength=len(self.codebook))
        self.codebook = (sums / counts).to(values.dtype)
        values.copy_(self.expand(self.codebook))


class Sharing(Mapping[str, SharedValues]):
    """The shared layers by qualified name, with the verbs of every method: ``step()`` and ``finish()``.

    Until ``finish()``, backward leaves in each ``values.grad`` the gradient of the entry's centroid, the sum over its
    code: ∂L/∂c_j = Σ_{i: code_i = j} ∂L/∂w_i. Entries of one code thus take the same step in every optimizer that works
    element by element (SGD, Adam, AdamW, with momentum and weight decay); a norm over gradients counts a centroid once
    for each of its entries. Moments are held per entry: make the optimizer after :func:`share_`.
    """

    def __init__(self, layers: dict[str, SharedValues]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> SharedValues:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def step(self) -> None:
        """Once after each ``optimizer.step()``: sets every centroid to the mean of its entries, and them to it.

        Entries of a code that took the same step differ by rounding at most, which this takes away; after an optimizer
        that does not work element by element it is the projection to shared values.

        Raises:
            ValueError: a layer holds another number of entries than the one that was shared.
        """
        for shared in self._layers.values():
            shared.project()

    def finish(self) -> None:
        """A last :meth:`step`; from then on gradients are those of the single values again."""
        self.step()
        for shared in self._layers.values():
            if shared._hook is not None:
                shared._hook.remove()
                shared._hook = None


def share_(
    model: nn.Module, bits: int | Mapping[str, int] = 4, *, tie_gradients: bool = True, progress: bool | None = None
) -> Sharing:
    """Lets the entries of each CSB layer of ``model`` share at most 2^bits values, chosen by k-means.

    Per layer min Σ_i (w_i - c_{code_i})² by Lloyd's algorithm, started from centroids at equal distances over
    [min w, max w]; deterministic. A layer with no more than 2^bits different values keeps them exactly. Shapes, dtypes,
    pattern and Parameters stay, so the layers run and save as before, and :func:`save_compressed` stores the codes.

        sharing = share_(model, bits=4)
        loop: ...; loss.backward(); optimizer.step(); sharing.step()
        sharing.finish()

    Args:
        bits: 1 to 8 for every CSB layer, or ``{layer name: bits}`` for some.
        tie_gradients: train centroids. Without it the gradients stay those of the single values.
        progress: a bar on stderr; None shows it on a terminal when the work takes a while.

    Raises:
        ValueError: no CSB layer, an unknown layer name, ``bits`` out of range, or values that are not finite; no layer
            is changed then.

    Source: Han, Mao, Dally, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
    Huffman Coding", ICLR 2016.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSBLayer)}
    if not layers:
        raise ValueError("model: expected at least one CSB layer, got none; call sparsify_(model) first")
    if not isinstance(bits, Mapping):
        bits = dict.fromkeys(layers, bits)
    for name, number in bits.items():
        if name not in layers:
            raise ValueError(f"bits: expected names of CSB layers ({', '.join(layers)}), got {name!r}")
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 8:
            raise ValueError(f"bits: expected a whole number from 1 to 8, got {number!r} for {name or 'the model'}")
    chosen = {name: layer for name, layer in layers.items() if name in bits}
    for name, layer in chosen.items():
        if not bool(layer.values.detach()[layer.matrix.is_entry].isfinite().all()):
            raise ValueError(f"{name}.values: expected finite values to share, got NaN or infinity")
    delay = 0.0 if progress else _PROGRESS_AFTER_S
    found: dict[str, SharedValues] = {}
    for name in progress_bar(list(chosen), "sharing", "layers", show=progress, delay=delay):
        found[name] = _share(name, chosen[name], bits[name], tie_gradients)
    return Sharing(found)


@torch.no_grad()
def _share(name: str, layer: CSBLayer, bits: int, tie_gradients: bool) -> SharedValues:
    values, entry = layer.values, layer.matrix.is_entry
    codebook, codes = kmeans(values[entry], 2**bits)
    shared = SharedValues(name, layer, codes, codebook, entry)
    values.copy_(shared.expand(codebook))
    if tie_gradients and values.requires_grad:
        shared._hook = values.register_hook(shared.tied)
    return shared


def kmeans(values: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm for numbers: ascending centroids ``[n]``, n ≤ clusters ≤ 256, and a uint8 code of each.

    A number half-way between two centroids goes to the smaller one. Clusters that end up empty are left out.
    """
    # On the host, where sums have one order: the same weights give the same codes on every device.
    numbers = values.detach().to("cpu", torch.float64)
    ordered = numbers.sort().values
    centroids = ordered.unique_consecutive()
    if len(centroids) > clusters:
        centroids = _lloyd(ordered, clusters)
    centroids = centroids.to(values.dtype).unique()
    codes = torch.bucketize(numbers, _halfway(centroids.double()))
    used, codes = codes.unique(return_inverse=True)
    return centroids[used].to(values.device), codes.to(torch.uint8).to(values.device)


def _lloyd(ordered: Tensor, clusters: int) -> Tensor:
    """Clusters of sorted numbers are runs, so a prefix sum gives every mean at once."""
    prefix = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    ends = torch.tensor([0, len(ordered)])
    centroids = torch.linspace(float(ordered[0]), float(ordered[-1]), clusters, dtype=torch.float64)
    bounds = ends
    for _ in range(_MAX_ITERATIONS):
        last, inner = bounds, torch.searchsorted(ordered, _halfway(centroids), right=True)
        bounds = torch.cat([ends[:1], inner, ends[1:]])
        if torch.equal(bounds, last):
            break
        counts = bounds.diff()
        centroids = torch.where(counts > 0, prefix[bounds].diff() / counts.clamp(min=1), centroids)
    return centroids


def _halfway(centroids: Tensor) -> Tensor:
    return (centroids[1:] + centroids[:-1]) / 2
