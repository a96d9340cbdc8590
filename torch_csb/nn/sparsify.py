from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torch_csb import convert
from torch_csb._progress import progress as progress_bar
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _dense
from torch_csb.nn._choice import Choice
from torch_csb.nn._layer import CSBLayer, pack
from torch_csb.nn._masks import layer_type
from torch_csb.nn._threshold import Threshold
from torch_csb.nn._tree import Place, places, put
from torch_csb.nn.conv import CSBConv2d
from torch_csb.nn.linear import CSBLinear
from torch_csb.nn.report import Report, ReportRow

LAYERS: dict[type[nn.Module], type[CSBLayer]] = {nn.Linear: CSBLinear, nn.Conv2d: CSBConv2d}
_WEIGHT_DECAY_NOTE = (
    "`values` are one-dimensional: parameter groups made by dimension, as timm's, would take their weight decay away; "
    "use torch_csb.param_groups(model, weight_decay)"
)
# Before this much time a progress bar is only flicker.
_PROGRESS_AFTER_S = 1.0


@torch.no_grad()
def sparsify_(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    exclude: str | nn.Module | Iterable[str | nn.Module] = (),
    include: str | nn.Module | Iterable[str | nn.Module] = (),
    min_sparsity: float | str = "auto",
    batch: int | None = None,
    target: str = "auto",
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Replaces each pruned ``nn.Linear`` by a :class:`CSBLinear` and 1×1 ``nn.Conv2d`` by a :class:`CSBConv2d`.

    A weight's zeros are its plain zeros, or those of its mask, by ``nn.utils.prune`` or a parametrization that
    multiplies by zeros and ones, as ``torch.ao.pruning`` does (zeros inside the mask stay entries; hooks,
    parametrizations, masks and originals are removed). Layers are converted one after the other, and each
    dense weight is let go with its gradient before the next, so the peak is one layer extra. Hooks, mode, device,
    dtype, ``requires_grad`` and bias Parameters are kept. Make the optimizer afterwards, or let the one of the dense
    model go on with :func:`torch_csb.migrate_optimizer_`.

    Args:
        filter_fn: called with (name, module); a layer for which it is false is kept.
        exclude: names (``"head"``), patterns (``"decoder.*.out"``) or modules to keep, with everything inside them.
        include: names, patterns or modules of output heads to convert. A language model's ``lm_head``, and what a
            Hugging Face model calls its output embeddings, is kept otherwise; one that is tied is always kept.
        min_sparsity: convert layers at least this sparse. ``"auto"`` asks for 0.5 and fewer bytes than dense.
        batch: columns that a layer will see at a time (tokens, or pixels of all images): layers whose forward would be
            faster dense are kept then, by the rule of :func:`torch_csb.explain`. None keeps none for that.
        target: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA where torch has it), where the model will run.
        dry_run: change nothing, and return the report that a real run would.
        progress: a bar on stderr; None shows it on a terminal when the work takes a while.

    Returns:
        A row for each Linear, each convolution and whatever else is pruned: shape, sparsity, bytes before and after,
        converted or kept, and why.

    Raises:
        TypeError: ``model`` is itself such a layer, which can't be replaced inside nothing.
        ValueError: an argument out of range, or a name in ``exclude`` or ``include`` that the model doesn't have.

    Warns:
        UserWarning: nothing was converted, with the reasons.
    """
    if (kind := layer_type(model)) in LAYERS:
        layer = LAYERS[kind].__name__
        raise TypeError(
            f"model: an nn.{kind.__name__} can't be replaced in place; use torch_csb.{layer}.from_dense(model)"
        )
    threshold = Threshold(min_sparsity, batch, target)
    found = places(model, _is_of_interest)
    choice = Choice(model, found, filter_fn, exclude, include)
    report = Report()
    for place in _bar(found, progress, "packing"):
        module = place.module()
        row, matrix = _judge(place, module, choice, threshold, target)
        report.rows.append(row)
        if matrix is not None and not dry_run:
            weight = _dense.weight_parameter(module)
            put(place, LAYERS[layer_type(module)]._replacing(module, matrix, move=True))
            # An optimizer that still holds the dense weight must neither keep the gradient alive nor step on.
            weight.grad = None
        # Nothing of this layer may outlive its turn.
        module = matrix = weight = None
    if report.converted:
        report.notes.append(_WEIGHT_DECAY_NOTE)
    else:
        _warn_nothing(report)
    return report


@torch.no_grad()
def densify_(model: nn.Module, *, progress: bool | None = None) -> Report:
    """The inverse of :func:`sparsify_`: replaces every CSB layer of ``model`` by its dense twin, in place.

    Returns:
        A row for each CSB layer.

    Raises:
        TypeError: ``model`` is itself a CSB layer; use its ``to_dense()``.
        ValueError: a layer applies an activation, which a dense layer could not; nothing is changed then.
    """
    if isinstance(model, CSBLayer):
        raise TypeError(f"model: a {type(model).__name__} can't be replaced in place; use its to_dense()")
    found = places(model, lambda module: isinstance(module, CSBLayer))
    for place in found:
        if (activation := place.module().activation) is not None:
            raise ValueError(f"{place.name}: a dense layer has no activation, got {activation!r}; set it to None first")
    report = Report()
    for place in _bar(found, progress, "unpacking"):
        layer = place.module()
        before = layer.matrix.nbytes
        dense = layer._to_dense(move=True)
        put(place, dense)
        layer.values.grad = None
        after = _bytes(dense.weight)
        kind = type(layer).__name__
        report.rows.append(
            ReportRow(place.name, kind, layer._weight_shape()[:2], layer.sparsity, before, after, "converted")
        )
        layer = dense = None
    return report


def _is_of_interest(module: nn.Module) -> bool:
    """A layer that may be converted, or of which a user may think so and wants to know why it was not."""
    return isinstance(module, (nn.Linear, _ConvNd, CSBLayer)) or _dense.is_pruned(module, "weight")


def _judge(
    place: Place, module: Any, choice: Choice, threshold: Threshold, target: str
) -> tuple[ReportRow, CSBMatrix | None]:
    """The report's row and, where the layer is to be converted, its packed weight."""
    if isinstance(module, CSBLayer):
        size = module.matrix.nbytes
        row = (place.name, type(module).__name__, module._weight_shape()[:2], module.sparsity, size)
        return ReportRow(*row, size, "kept", choice.obstacle(place, module)), None
    reason = choice.obstacle(place, module)
    sparsity = matrix = None
    shape, before = _shape_and_bytes(module)
    after = before
    if reason is None:
        try:
            sparsity = _sparsity(module)
        except ValueError as error:
            reason = str(error)
    if sparsity is not None:
        reason = threshold.too_dense(shape, _dense.weight_parameter(module).element_size(), sparsity)
        if reason is None:
            matrix = pack(module, None, convert.choose_layout(None, target))
            if threshold.need_smaller and matrix.nbytes >= before:
                reason = f"not smaller: {matrix.nbytes} bytes compressed, {before} dense"
                matrix = None
            else:
                after = matrix.nbytes
    action = "kept" if reason else "converted"
    kind = layer_type(module).__name__
    return ReportRow(place.name, kind, shape, sparsity, before, after, action, reason or ""), matrix


def _shape_and_bytes(module: nn.Module) -> tuple[tuple[int, ...], int]:
    weight = _dense.weight_parameter(module)
    if weight is None:  # Computed from other tensors: looked at for its shape alone.
        weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.parameter.UninitializedParameter):
        return (), 0
    shape = weight.shape[:2] if all(size == 1 for size in weight.shape[2:]) else weight.shape
    return tuple(shape), _bytes(weight)


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _sparsity(module: nn.Module) -> float:
    matrix, mask, _ = _dense.read_weight(module)
    return 1.0 - convert.count_kept(matrix, mask) / matrix.numel() if matrix.numel() else 0.0


def _warn_nothing(report: Report) -> None:
    if report.rows:
        counts = Counter(row.reason.split(":")[0] for row in report.rows)
        why = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
        message = f"sparsify_ converted none of {len(report.rows)} layers ({why}); the report tells each one's reason"
    else:
        message = "sparsify_ converted nothing: the model holds no nn.Linear and no convolution"
    # Past torch.no_grad's wrapper, at the caller's line.
    warnings.warn(message, UserWarning, stacklevel=4)


def _bar(found: list[Place], show: bool | None, what: str) -> Iterator[Place]:
    return progress_bar(found, what, "layers", show=show, delay=0.0 if show else _PROGRESS_AFTER_S)
