"""Traces: what a running model's attention got and gave, in GGUF; and their verification.

`record` and `llamacpp` make them, `writing` and `reading` bring them into files and back, `verify`
judges them by PyTorch's arithmetic, `compare` judges the op alone. The format is told in
docs/trace-format.md.
"""

from .format import (
    LayerInfo,
    RecordedStep,
    Step,
    StepData,
    Trace,
    TraceHeader,
)
from .gguf_file import TraceError
from .reading import read_trace
from .writing import write_trace

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
