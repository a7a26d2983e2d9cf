from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser


def test_kernels_are_counted_beside_the_peers_nodes(tmp_path: Path) -> None:
    """Two products with what follows them: ours fuse the activations, onnxruntime's keep one node for each."""
    pytest.importorskip("onnxruntime")
    from benchmarks.fusion import count_kernels

    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        two_products (float[4,16] x) => (float[8,8] y)
        {
            a = MatMul (x, w)
            b = Tanh (a)
            c = Reshape (b, shape)
            d = MatMul (c, v)
            y = Sin (d)
        }
    """)
    for name, size in (("w", 16), ("v", 8)):
        model.graph.initializer.append(numpy_helper.from_array(np.eye(size, dtype=np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([8, 8]), "shape"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    count = count_kernels(path)
    assert count.kernels == count.loop_nests == 2
    assert count.operators == {"matmul_tanh": 1, "matmul_sin": 1}
    assert count.peer_nodes == 5
    assert count.peer_views == 1
