"""From ONNX to Relax: load the file, fold its shape arithmetic, convert every node, name every dynamic dimension."""
