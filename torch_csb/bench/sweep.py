"""Measures cases: packs a weight in every form, copies, times, judges, and makes the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_csb.bench.cases import Case, Weights
from torch_csb.bench.implementations import IMPLEMENTATIONS, Implementation, layouts_offered, replicate
from torch_csb.bench.judge import Judge, check_weight
from torch_csb.bench.limits import Limits
from torch_csb.bench.patterns import Collection, make_mask
from torch_csb.bench.report import Provenance, Row
from torch_csb.bench.timing import Call, Timing, copies_for_cold_cache, time_all

NEEDS = {"F": ("x",), "T": ("y",), "dW": ("x", "y")}


@dataclass
class Contestant:
    """One implementation in one layout, with as many copies of its inputs as a cold cache takes."""

    implementation: Implementation
    layout: str
    weights: list[Any]
    calls: list[Call]
    bytes_moved: int
    flops: float


class Bench:
    """One weight, in every form that its cases need."""

    def __init__(self, weights: Weights, device: str, seed: int, collection: Collection | None = None) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(seed)
        if weights.pattern.startswith("dlmc:"):
            assert collection is not None
            mask = collection.mask(weights.pattern, device)
        else:
            mask = make_mask(weights.pattern, weights.m, weights.k, weights.sparsity, device, generator)
        values = torch.randn(mask.shape, device=device, generator=generator).to(getattr(torch, weights.dtype))
        # A value that is rounded to zero in 16 bit would be no entry.
        self.dense = torch.where(values == 0, 1.0, values).mul_(mask)
        self._generator = generator
        self._forms: dict[tuple[str, bool], list[Any]] = {}

    def measure(
        self, case: Case, limits: Limits, provenance: Provenance, budget_s: float | None, note: Callable[[str], None]
    ) -> list[Row]:
        """The rows of a case.

        Raises:
            WrongResult: a result is wrong, or a weight changed on the way; there are no rows then.
        """
        x, y = (self._activation(features, case.n) for features in reversed(self.dense.shape))
        needed = {"x": x, "y": y}
        judge = Judge(self.dense, case.direction, *(needed[t] if t in NEEDS[case.direction] else None for t in "xy"))
        contestants = {f"{c.implementation.name} {c.layout}": c for c in self._contestants(case, needed, note)}
        errors: dict[str, float] = {}

        def check(name: str, result: Any) -> None:
            c = contestants[name]
            errors[name] = judge.relative_error(c.implementation, c.weights[0], c.layout, result)

        timings = time_all(self.device, {name: c.calls for name, c in contestants.items()}, budget_s, check)
        for c in contestants.values():
            for w in {id(w): w for w in (c.weights[0], c.weights[-1])}.values():
                check_weight(c.implementation, w, case.direction, self.dense)
        return self._rows(case, contestants, timings, errors, limits, provenance)

    def _activation(self, features: int, n: int) -> Tensor:
        return torch.randn(n, features, device=self.device, generator=self._generator).to(self.dense.dtype)

    def _contestants(self, case: Case, operands: dict[str, Tensor], note: Callable[[str], None]) -> list[Contestant]:
        contestants = []
        for name in case.implementations:
            implementation = IMPLEMENTATIONS[name]
            wanted = implementation.layouts if implementation.fastest_layout else case.layouts
            for layout in layouts_offered(name, case.direction, self.dense.dtype, self.device, case.n):
                if layout not in wanted:
                    continue
                contestant = self._contestant(implementation, case, layout, operands)
                try:
                    contestant.calls[0]()
                except RuntimeError as error:
                    if name != "torch_csr":
                        raise
                    note(f"{case}: torch's CSR can't: {str(error).splitlines()[0]}")
                    continue
                contestants.append(contestant)
        return contestants

    def _contestant(
        self, implementation: Implementation, case: Case, layout: str, operands: dict[str, Tensor]
    ) -> Contestant:
        names = NEEDS[case.direction]
        given = [operands[name] if layout == "last" else operands[name].t().contiguous() for name in names]
        moved = self._bytes_moved(implementation, case) + sum(t.nbytes for t in given)
        count = copies_for_cold_cache(moved) if self.device == "cuda" else 1
        weights = self._form(implementation, case.direction, count)[:count]
        calls = [
            _bind(implementation, w, case.direction, layout, dict(zip(names, copy, strict=True)))
            for w, copy in zip(weights, replicate(given, count), strict=True)
        ]
        return Contestant(implementation, layout, weights, calls, moved, implementation.flops(weights[0], case.n))

    def _bytes_moved(self, implementation: Implementation, case: Case) -> int:
        """Bytes of W's arrays and of the result, each counted once. SDDMM reads a pattern and writes the values."""
        w = self._form(implementation, case.direction, 1)[0]
        m, k = self.dense.shape
        arrays = sum(array.nbytes for array in implementation.arrays(w))
        if case.direction == "dW":
            return arrays
        return arrays + (m if case.direction == "F" else k) * case.n * self.dense.element_size()

    def _form(self, implementation: Implementation, direction: str, count: int) -> list[Any]:
        """At least ``count`` copies of W in a form."""
        copies = self._forms.setdefault((implementation.name, direction == "T"), [])
        if not copies:
            copies.append(implementation.pack(self.dense, direction))
        if len(copies) < count:
            arrays = replicate(implementation.arrays(copies[0]), count)
            copies[1:] = [implementation.with_arrays(copies[0], copy) for copy in arrays[1:]]
        return copies

    def _rows(
        self,
        case: Case,
        contestants: dict[str, Contestant],
        timings: dict[str, Timing],
        errors: dict[str, float],
        limits: Limits,
        provenance: Provenance,
    ) -> list[Row]:
        fastest: dict[str, str] = {}
        for name, c in contestants.items():
            if c.implementation.fastest_layout:
                best = fastest.setdefault(c.implementation.name, name)
                if timings[name].us < timings[best].us:
                    fastest[c.implementation.name] = name
        w, dense = case.weights, fastest.get("dense")
        rows = []
        for name, c in contestants.items():
            impl, timing = c.implementation.name, timings[name]
            if fastest.get(impl, name) != name:
                continue
            shortest = limits.us("tf32" if impl == "dense_tf32" else w.dtype, c.bytes_moved, c.flops)
            rows.append(
                Row(
                    **provenance.stamp(),
                    regime=case.regime,
                    m=w.m,
                    k=w.k,
                    n=case.n,
                    dtype=w.dtype,
                    pattern=w.pattern,
                    layout=c.layout,
                    sparsity=w.sparsity,
                    direction=case.direction,
                    impl=impl,
                    us=timing.us,
                    us_spread=timing.us_spread,
                    gbps=c.bytes_moved / timing.us * 1e-3,
                    tflops=c.flops / timing.us * 1e-6,
                    limit_share=shortest / timing.us,
                    ratio_to_dense=None if dense is None else timings[dense].us / timing.us,
                    rel_err=errors[name],
                )
            )
        return rows


def _bind(implementation: Implementation, w: Any, direction: str, layout: str, operands: dict[str, Tensor]) -> Call:
    x, y = operands.get("x"), operands.get("y")
    return lambda: implementation.multiply(w, direction, layout, x, y)
