"""What torch.compile is told about the sizes of CSB layers."""

from __future__ import annotations

import torch.compiler.config

# Names, as the compiler spells them, of the tensors whose sizes depend on the number of entries.
DYNAMIC_SOURCES = r".*\._parameters\['values'\],.*\._buffers\['(codes|units)'\]"


def share_code_between_layers() -> None:
    """Adds DYNAMIC_SOURCES to what torch.compiler.config.dynamic_sources holds already.

    The compiler takes a parameter's sizes for constants. Two layers of one shape rarely have the same number of
    entries, so each of them would be compiled anew, and run uncompiled beyond torch._dynamo.config.recompile_limit."""
    known = torch.compiler.config.dynamic_sources
    if DYNAMIC_SOURCES not in known:
        torch.compiler.config.dynamic_sources = f"{known},{DYNAMIC_SOURCES}" if known else DYNAMIC_SOURCES
