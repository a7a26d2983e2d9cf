"""What small ONNX models become before any code is generated: operators after the passes, kernels after fusion."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import tvm
import tvm.ir
from onnx import numpy_helper

from optimizer.compile import CompileOptions
from optimizer.frontend.importer import import_model
from optimizer.lowering import fuse
from passes import pipeline
from passes.provenance import Bindings
from targets import get

_TARGET = get("x86-avx512")


def model(text: str, initializers: Mapping[str, np.ndarray], *, opset: int = 18) -> onnx.ModelProto:
    """Return the model whose graph is `text`, with initializers of these names."""
    header = f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    parsed = onnx.parser.parse_model(header + text)
    used = {name for node in parsed.graph.node for name in node.input}
    parsed.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items() if name in used
    )
    onnx.checker.check_model(parsed)
    return parsed


def rewritten(given: onnx.ModelProto) -> tvm.IRModule:
    """Return the module after all passes of a compile."""
    passes = pipeline.parse(CompileOptions(_TARGET).notation)
    return pipeline.run(import_model(given).module, passes)[0]


def operators_of(module: tvm.IRModule) -> list[str]:
    """Return the names of the operators that `main` calls."""
    return [call.op.name for call in _calls(module)]


def kernels_of(module: tvm.IRModule) -> list[str]:
    """Return the names of the kernels that `main` calls once the module is fused for a CPU."""
    fused = _calls(fuse(module, _TARGET).module)
    return [call.args[0].name_hint for call in fused if call.op.name == "relax.call_tir"]


def _calls(module: tvm.IRModule) -> list[tvm.ir.Call]:
    values = Bindings(module["main"]).values.values()
    return [value for value in values if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op)]
