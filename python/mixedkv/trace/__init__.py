"""Traces: what a running model's attention got and gave, in GGUF; and their verification.

`format` reads and writes them, `record` and `llamacpp` make them, `verify` judges them by PyTorch's
arithmetic, `compare` judges the op alone. The format: docs/trace-format.md.
"""

from .format import (
    LayerInfo,
    RecordedStep,
    Step,
    StepData,
    Trace,
    TraceHeader,
    read_trace,
    write_trace,
)
from .gguf_file import TraceError

__all__ = [
    "LayerInfo",
    "RecordedStep",
    "Step",
    "StepData",
    "Trace",
    "TraceError",
    "TraceHeader",
    "read_trace",
    "write_trace",
]
