"""Convolutions and batch normalization in numpy, of any number of spatial axes, one tap of the kernel at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tvm.ir


def convolution(call: tvm.ir.Call, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return x [N, C, *spatial] convolved with weights [O, C/groups, *taps]."""
    pads, strides, dilations, groups = _attributes(call)
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    taps = weights.shape[2:]
    spatial = [
        (extent - dilation * (count - 1) - 1) // stride + 1
        for extent, count, stride, dilation in zip(padded.shape[2:], taps, strides, dilations, strict=True)
    ]
    images = padded.reshape(x.shape[0], groups, weights.shape[1], *padded.shape[2:])
    kernels = weights.astype(np.float64).reshape(groups, -1, *weights.shape[1:])
    result = np.zeros((x.shape[0], groups, kernels.shape[1], *spatial))
    for tap, window in _windows(taps, spatial, strides, dilations):
        result += np.einsum("ngc...,goc->ngo...", images[(..., *window)], kernels[(..., *tap)])
    return result.reshape(x.shape[0], weights.shape[0], *spatial)


def transposed_convolution(call: tvm.ir.Call, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return what convolution with weights [C, O/groups, *taps] is the adjoint of, for x [N, C, *spatial]."""
    pads, strides, dilations, groups = _attributes(call)
    images = x.astype(np.float64).reshape(x.shape[0], groups, weights.shape[0] // groups, *x.shape[2:])
    kernels = weights.astype(np.float64).reshape(groups, -1, *weights.shape[1:])
    taps = weights.shape[2:]
    extra = [int(count) for count in call.attrs.output_padding]
    full = [
        (extent - 1) * stride + dilation * (count - 1) + 1 + more
        for extent, count, stride, dilation, more in zip(x.shape[2:], taps, strides, dilations, extra, strict=True)
    ]
    result = np.zeros((x.shape[0], groups, kernels.shape[2], *full))
    for tap, window in _windows(taps, x.shape[2:], strides, dilations):
        result[(..., *window)] += np.einsum("ngc...,gco->ngo...", images, kernels[(..., *tap)])
    cropped = [slice(begin, extent - end) for extent, (begin, end) in zip(full, pads, strict=True)]
    result = result[(..., *cropped)]
    return result.reshape(x.shape[0], groups * kernels.shape[2], *result.shape[3:])


def batch_norm(call: tvm.ir.Call, x: np.ndarray, *statistics: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return (x - mean) / sqrt(variance + epsilon) * gamma + beta and the running statistics as they were."""
    shape = [-1 if axis == int(call.attrs.axis) % x.ndim else 1 for axis in range(x.ndim)]
    gamma, beta, mean, variance = (part.astype(np.float64).reshape(shape) for part in statistics)
    normalized = (x.astype(np.float64) - mean) / np.sqrt(variance + call.attrs.epsilon)
    scaled = normalized * gamma if call.attrs.scale else normalized
    return scaled + beta if call.attrs.center else scaled, statistics[2], statistics[3]


def _attributes(call: tvm.ir.Call) -> tuple[list[tuple[int, int]], list[int], list[int], int]:
    assert call.attrs.data_layout.startswith("NC"), "not in plain layout"
    padding, strides, dilations = (
        [int(number) for number in numbers] for numbers in (call.attrs.padding, call.attrs.strides, call.attrs.dilation)
    )
    rank = len(strides)
    return list(zip(padding[:rank], padding[rank:], strict=True)), strides, dilations, int(call.attrs.groups)


def _windows(taps, spatial, strides, dilations) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield each tap of a kernel, and the positions of the image that it meets."""
    for tap in np.ndindex(*taps):
        starts = [number * dilation for number, dilation in zip(tap, dilations, strict=True)]
        yield (
            tap,
            tuple(
                slice(start, start + (extent - 1) * stride + 1, stride)
                for start, extent, stride in zip(starts, spatial, strides, strict=True)
            ),
        )
