from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from torch_csb import autograd, convert
from torch_csb.autograd import ACTIVATIONS
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _dense, _groups, _masks, _state
from torch_csb.nn._deferred import Deferred
from torch_csb.nn._origin import Converted, Origin
from torch_csb.nn._shard import refuse_sharded
from torch_csb.nn._weight import CompressedWeight


class CSBLayer(Deferred, Converted):
    """What :class:`CSBLinear` and :class:`CSBConv2d` share: one weight matrix W (m × k) in Compressed Sparse Blocks.

    Attributes:
        values: the 1-D Parameter of stored entries, the only trainable form of the weight.
        bias: Parameter ``[m]`` or None.
        codes, blk_ptr, blk_pad, layout: persistent integer buffers, the pattern (see :class:`torch_csb.CSBMatrix`).
        units: the plan, an int32 buffer that is no part of the state_dict.
        m, k, block_size: rows and columns of W, edge of its blocks.
        activation: None or the function applied to the output; like a stride it is no part of the state_dict.

    ``load_state_dict`` takes the state of any layer of the same m × k: another pattern is adopted, and a dense
    ``weight`` (or ``weight_orig`` with ``weight_mask``) is packed with its own zeros. ``values`` stays the same
    Parameter object (but with ``assign=True``); where the pattern changes, its gradient is dropped, and an optimizer
    that already holds state for it must be made anew, since its moments belong to other entries. Arrays are validated
    first: on an error the layer keeps every bit.
    """

    m: int
    k: int
    block_size: int

    _dense_type: ClassVar[type[nn.Module]]
    # Attributes that no dense twin gets from to_dense().
    _own: ClassVar[frozenset[str]] = frozenset({"m", "k", "block_size", "_layout", "_activation", "_origin"})

    def __init__(self, matrix: CSBMatrix, bias: Tensor | None = None, *, activation: str | None = None) -> None:
        super().__init__()
        if matrix.transposed:
            raise ValueError("matrix: expected an untransposed CSBMatrix, got a transposed view")
        if bias is not None and (bias.shape != (matrix.m,) or bias.dtype != matrix.dtype):
            raise ValueError(
                f"bias: expected {matrix.m} elements of {matrix.dtype}, got {tuple(bias.shape)} of {bias.dtype}"
            )
        self.m, self.k, self.block_size = matrix.m, matrix.k, matrix.block_size
        self._layout = matrix.layout
        self.activation = activation
        values = matrix.values
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values.detach())
        for name in ("codes", "blk_ptr", "blk_pad"):
            self.register_buffer(name, getattr(matrix, name))
        self.register_buffer("layout", matrix.layout.to_tensor(matrix.device))
        self.register_buffer("units", matrix.units, persistent=False)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach())
        self.register_parameter("bias", bias)

    @classmethod
    def from_dense(
        cls,
        mod: nn.Module,
        mask: Tensor | None = None,
        *,
        target: str = "auto",
        block_size: int | None = None,
        encoding: str | None = None,
        activation: str | None = None,
    ) -> Any:
        """A CSB layer that computes what ``mod`` computes; ``mod`` stays as it is and shares no tensor.

        Stored are the elements inside ``mask`` (shape of the weight), else those inside the layer's mask
        (``nn.utils.prune``, or a parametrization as ``torch.ao.pruning`` registers), else those that are not zero.
        Mode, hooks, device, dtype and each ``requires_grad`` are kept; pruning and parametrizations are resolved.

        Args:
            target: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA where torch has it), where the layer will run.
            block_size: a power of two from 2 to 256; default by ``target``.
            encoding: ``"codes"``, or ``"bitmap"`` in blocks of 64; default by target, dtype and density.
            activation: None, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"gelu"``, applied to the output.

        Raises:
            TypeError: ``mod`` is another type of layer.
            ValueError: it can't be converted, with the reason; or a bad ``mask``, ``target``, ``block_size`` or
                ``encoding``.
        """
        if not isinstance(mod, cls._dense_type):
            raise TypeError(f"mod: expected nn.{cls._dense_type.__name__}, got {type(mod).__name__}")
        if reason := _dense.obstacle(mod):
            raise ValueError(f"mod: can't convert this {_masks.layer_type(mod).__name__}: {reason}")
        matrix = pack(mod, mask, convert.choose_layout(block_size, target, encoding))
        return cls._replacing(mod, matrix, activation=activation, move=False)

    @classmethod
    def _replacing(cls, mod: nn.Module, matrix: CSBMatrix, *, activation: str | None = None, move: bool) -> Any:
        """The layer for ``mod`` with weight ``matrix``; with ``move`` it takes bias and hooks away from ``mod``."""
        bias, weight = _dense.bias_parameter(mod), _dense.weight_parameter(mod)
        layer = cls._like(mod, matrix, _dense.read_bias(mod, move=move), activation)
        layer._origin = Origin(values=weight, bias=None if bias is layer.bias else bias)
        layer.values.requires_grad_(weight.requires_grad)
        _dense.carry_over(mod, layer, _dense.DENSE_ATTRIBUTES[_masks.layer_type(mod)], move=move)
        if not move:
            layer._origin.hooks = {*layer._forward_hooks, *layer._forward_pre_hooks}
        return layer

    @classmethod
    def _like(cls, mod: Any, matrix: CSBMatrix, bias: Tensor | None, activation: str | None) -> Any:
        raise NotImplementedError

    def to_dense(self) -> Any:
        """The dense twin: same function, hyper-parameters, mode, hooks, device, dtype and ``requires_grad``.

        Raises:
            ValueError: the layer applies an activation, which the dense layer could not, or this rank holds only a
                shard of its values.
        """
        return self._to_dense(move=False)

    def _to_dense(self, *, move: bool) -> Any:
        if self.activation is not None:
            raise ValueError(
                f"activation: a dense layer has none, got {self.activation!r}; "
                "set activation=None and apply it after the layer"
            )
        refuse_sharded(self.values, "values")
        dense = self._empty_dense()
        weight = self._dense_weight().view(self._weight_shape())
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            bias = self.bias
            dense.bias = bias if move else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        _dense.carry_over(self, dense, self._own, move=move)
        return dense

    def _empty_dense(self) -> nn.Module:
        """The dense twin on the meta device, where its initialisation costs neither memory nor random numbers."""
        raise NotImplementedError

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.m, self.k)

    def _dense_weight(self) -> Tensor:
        return self.matrix.to_dense()

    def _weight_index(self) -> tuple[Tensor, Tensor]:
        """int64 (row, column) of every entry in the dense weight as a matrix, padding left out, in entry order."""
        return convert.coordinates(self.matrix)

    def _take_pattern(self, matrix: CSBMatrix) -> None:
        """The arrays of ``matrix`` but for its values."""
        for name in ("codes", "blk_ptr", "blk_pad", "units"):
            self._buffers[name] = getattr(matrix, name)
        self._buffers["layout"] = matrix.layout.to_tensor(matrix.device)
        self._layout, self.block_size = matrix.layout, matrix.block_size

    def _spmm(self, x: Tensor, dim: int) -> Tensor:
        """act(W.X + b) with the features of x in ``dim``."""
        # Dictionary reads: nn.Module.__getattr__ would cost half a microsecond for each tensor.
        parameters, buffers = self._parameters, self._buffers
        try:
            values, bias = parameters["values"], parameters["bias"]
        except KeyError:  # a plain tensor, a dual one or a parametrization stands in the place of a Parameter
            values, bias = self.values, self.bias
        return autograd.spmm(
            values,
            buffers["codes"],
            buffers["blk_ptr"],
            buffers["blk_pad"],
            buffers["units"],
            x,
            bias,
            self.m,
            self.k,
            self.block_size,
            dim,
            self._activation,
        )

    @property
    def activation(self) -> str | None:
        return next(name for name, code in ACTIVATIONS.items() if code == self._activation)

    @activation.setter
    def activation(self, name: str | None) -> None:
        if name not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
        self._activation = ACTIVATIONS[name]

    @property
    def matrix(self) -> CSBMatrix:
        """The weight as a matrix over the layer's very tensors.

        Raises:
            RuntimeError: the tensors are unfilled, after ``empty()`` or ``to_empty()``.
        """
        if self._unfilled:
            raise RuntimeError(self._no_data("it has no weight yet"))
        return CSBMatrix(
            self.values, self.codes, self.blk_ptr, self.blk_pad, self.units, m=self.m, k=self.k, layout=self._layout
        )

    @property
    def weight(self) -> Any:
        """Shape, dtype and device of the weight. Using it as data raises ``TypeError``: call :meth:`to_dense`."""
        return CompressedWeight(type(self).__name__, self._weight_shape(), self._parameters["values"])

    @weight.setter
    def weight(self, _: object) -> NoReturn:
        raise self._read_only()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # nn.Module leads an assigned Parameter here, past the setter.
        if name == "weight":
            raise self._read_only()
        super().register_parameter(name, param)

    def _read_only(self) -> TypeError:
        return TypeError(f"the weight of a {type(self).__name__} is read-only: call to_dense(), or train its `values`")

    @property
    def nnz(self) -> int:
        """Entries of the weight, padding left out."""
        return self.matrix.nnz

    @property
    def sparsity(self) -> float:
        """1 - nnz / (m · k); 0 for a weight without elements."""
        return self.matrix.sparsity

    def extra_repr(self) -> str:
        if self.values.is_meta or self._unfilled:
            size = f"stored={self.values.numel()}" + (", unfilled" if self._unfilled else "")
        else:
            size = f"nnz={self.nnz}, sparsity={self.sparsity:.4f}"
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"{self._shape_repr()}, bias={self.bias is not None}, {size}, block_size={self.block_size}{activation}"

    def _shape_repr(self) -> str:
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            if self.values.is_meta and not assign and found:
                raise ValueError(f"{prefix}values: the layer is on the meta device; load with assign=True")
            incoming = self._read_state(found, prefix, assign=assign)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if strict:
            missing_keys.extend(prefix + name for name in incoming.missing)
            unexpected_keys.extend(prefix + name for name in incoming.unexpected)
        self._adopt(incoming, assign=assign)

    def _read_state(self, tensors: dict[str, Any], prefix: str, *, assign: bool = False) -> _state.Incoming:
        """Checks ``tensors`` (names without ``prefix``) against the layer, which stays as it is."""
        if not assign:
            _state.refuse_shards(self.values, tensors, prefix)
        incoming = _state.read(tensors, _state.Expected.of(self, assign=assign), prefix)
        if not assign:
            _state.refuse_length(self.values, incoming.matrix, prefix)
        return incoming

    def _adopt(self, incoming: _state.Incoming, *, assign: bool = False) -> None:
        if incoming.matrix is not None:
            _state.adopt_matrix(self, incoming.matrix, assign=assign)
            self._mark_filled()
        if incoming.bias is not None:
            _state.adopt_bias(self, incoming.bias, assign=assign)


def pack(mod: nn.Module, mask: Tensor | None, layout: convert.LayoutRule) -> CSBMatrix:
    """The weight of a layer without an obstacle, packed."""
    dense = _dense.read_weight(mod, mask)
    if (groups := getattr(mod, "groups", 1)) > 1:
        return _groups.pack(dense.matrix, dense.mask, groups, layout)
    return CSBMatrix(**convert.pack_dense(dense.matrix, dense.mask, layout))
