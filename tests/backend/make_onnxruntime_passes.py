"""Write the list of plain node cases of the backend suite that onnxruntime gets right: the measure for ours.

python -m tests.backend.make_onnxruntime_passes
"""

from __future__ import annotations

import multiprocessing

import onnx
import onnxruntime

from tests.backend.cases import BackendCase, case_named, node_cases
from tests.backend.execution import first_difference
from tests.backend.report import ONNXRUNTIME_PASSES


def passes(name: str) -> bool:
    """Return whether onnxruntime's CPU kernels run the case and agree with what it expects."""
    case = case_named(name)
    try:
        return not first_difference(_run(case), case)
    except Exception:
        return False


def _run(case: BackendCase) -> list[object]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(case.model_bytes, options, providers=["CPUExecutionProvider"])
    feeds = {value.name: item for value, item in zip(case.model.graph.input, case.inputs, strict=False)}
    return session.run(None, feeds)


def main() -> None:
    """Run all plain node cases, each batch in a process of its own so that a crash costs one case."""
    names = [case.name for case in node_cases() if case.is_plain]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        right = [name for name, passed in zip(names, pool.map(passes, names, chunksize=20), strict=True) if passed]
    header = (
        f"# onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}: {len(right)} of {len(names)} cases right"
    )
    ONNXRUNTIME_PASSES.write_text("\n".join([header, *sorted(right), ""]))
    print(header[2:])


if __name__ == "__main__":
    main()
