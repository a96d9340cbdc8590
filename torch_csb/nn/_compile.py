"""What torch.compile is told about the sizes of CSB layers."""

from __future__ import annotations

# Names, as the compiler spells them, of the tensors whose sizes depend on the number of entries.
DYNAMIC_SOURCES = r".*\._parameters\['values'\],.*\._buffers\['(codes|units)'\]"
