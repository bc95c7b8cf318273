"""Questions to an autograd graph: what it depends on, and whether its second derivative is real."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from ..tensors import is_sharded

# Operations whose double backward runs and returns wrong numbers. torch.nn.utils'
# weight_norm: the saved norm is treated as a constant, so the Hessian with respect to the
# direction v is wrong by its own size while the gradient is exact.
_SILENTLY_WRONG = {"WeightNormInterfaceBackward0": "torch.nn.utils weight_norm"}

# Operations with a derivative that jumps where their input crosses a value or changes places with
# another. A difference of gradients sees the jumps, autograd's second derivative does not.
_KINKED = re.compile(
    r"(Relu|LeakyRelu|PreluKernel|RreluWithNoise|Threshold|Hardtanh|Hardsigmoid|Hardswish|"
    r"Softshrink|Hardshrink|Abs|Sgn|Sign|Copysign|Clamp|ClampMin|ClampMax|"
    r"(Adaptive|Fractional|Mkldnn)?MaxPool[123]D(WithIndices)?|MaxUnpool[123]D|"
    r"Max|Min|Amax|Amin|Aminmax|Maximum|Minimum|Fmax|Fmin|Cummax|Cummin|"
    r"Sort|Topk|Kthvalue|Median|Nanmedian|Mode|MultiMarginLoss|MultilabelMarginLoss|"
    r"Round|Floor|Ceil|Trunc|Frac|Remainder|Fmod|Where|Cdist|GridSampler[23]D)Backward\d*"
)


_MATRIX_PRODUCT = re.compile(
    r"(Mm|Addmm|Bmm|Addbmm|Baddbmm|Mv|Addmv|Linear|ScaledDotProduct\w+)Backward\d*"
)


def nodes(*outputs: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph behind ``outputs``, each once."""
    return _from(*(output.grad_fn for output in outputs))


def leaves(node: Any) -> Iterator[Tensor]:
    """The leaves that a node leads to."""
    return (behind.variable for behind in _from(node) if hasattr(behind, "variable"))


def _from(*starts: Any) -> Iterator[Any]:
    seen: set[Any] = set()
    stack = [*starts]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def reached(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[bool]:
    """For each leaf of ``parameters``: does any of ``outputs`` depend on it?"""
    leaves = {id(node.variable) for node in nodes(*outputs) if hasattr(node, "variable")}
    leaves |= {id(output) for output in outputs}  # an output may itself be a leaf
    # A sharded one is not in any graph: what it is gathered to is.
    return [id(parameter) in leaves or is_sharded(parameter) for parameter in parameters]


def coarsest(output: Tensor) -> torch.dtype:
    """The least precise floating-point dtype that anything behind ``output`` was computed in."""
    found = {output.dtype}
    for node in nodes(output):
        # Autocast, inside the closure or around it, shows here and nowhere else.
        found |= {part.dtype for part in node._input_metadata if part.dtype.is_floating_point}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def rounds_to_tf32(output: Tensor) -> bool:
    """Does CUDA round factors of float32 products behind ``output`` to TF32, which has 10 bits?

    By default it does so in convolutions and RNNs. What compiled code holds is not to be seen; of
    that matrix products are assumed.
    """
    return any(_is_cuda_float32(node) and _takes_tf32(node) for node in nodes(output))


def silently_wrong(output: Tensor) -> str | None:
    """Name of an operation behind ``output`` whose double backward returns wrong numbers."""
    for node in nodes(output):
        name = node.name()
        if name in _SILENTLY_WRONG:
            return _SILENTLY_WRONG[name]
        if isinstance(node, BackwardCFunction) and _once_differentiable(node):
            return f"{_function_name(node)} (marked once_differentiable)"
    return None


def has_reentrant_checkpoint(output: Tensor) -> bool:
    """Is there a ``checkpoint(use_reentrant=True)`` behind ``output``?

    Parameters used inside it are invisible: ``autograd.grad`` silently leaves them out.
    """
    return any(
        isinstance(node, BackwardCFunction) and _class_of(node) is CheckpointFunction
        for node in nodes(output)
    )


def custom_function(output: Tensor) -> str | None:
    """Name of a Python autograd Function behind ``output``; nothing vouches for its derivatives."""
    for node in nodes(output):
        if isinstance(node, BackwardCFunction) and not _compiled(node):
            return _function_name(node)
    return None


def kink(output: Tensor) -> str | None:
    """Name of an operation behind ``output`` with a derivative that jumps: ReLU, maxima, |x|.

    ELU counts where its slopes at 0 differ (SELU, alpha not 1), a vector norm where it is not the
    2-norm. Huber's loss does not: its gradient is continuous.
    """
    for node in nodes(output):
        name = node.name()
        if _KINKED.fullmatch(name) or _is_bent_elu(node) or _is_polyhedral_norm(node):
            return re.sub(r"Backward\d*$", "", name)
    return None


def has_fused_attention(output: Tensor) -> bool:
    """Is there a kernel of ``scaled_dot_product_attention`` behind ``output``?"""
    return any(node.name().startswith("ScaledDotProduct") for node in nodes(output))


def _is_bent_elu(node: Any) -> bool:
    if not node.name().startswith("EluBackward"):
        return False
    return float(node._saved_alpha) * float(node._saved_input_scale) != 1.0


def _is_polyhedral_norm(node: Any) -> bool:
    return node.name().startswith("LinalgVectorNorm") and float(node._saved_ord) != 2.0


def is_compiled(output: Tensor) -> bool:
    """Is there compiled code behind ``output``, with a compiled backward pass?"""
    return any(isinstance(node, BackwardCFunction) and _compiled(node) for node in nodes(output))


def _is_cuda_float32(node: Any) -> bool:
    parts = node._input_metadata
    return any(p.device.type == "cuda" and p.dtype == torch.float32 for p in parts)


def _takes_tf32(node: Any) -> bool:
    name, backends = node.name(), torch.backends
    if name.startswith("ConvolutionBackward"):
        return _allows_tf32(backends.cudnn, "conv")
    if name.startswith("CudnnRnnBackward"):
        return _allows_tf32(backends.cudnn, "rnn")
    is_product = _MATRIX_PRODUCT.fullmatch(name) is not None
    hides = isinstance(node, BackwardCFunction) and _compiled(node)
    return (is_product or hides) and _allows_tf32(backends.cuda.matmul)


def _allows_tf32(backend: Any, part: str | None = None) -> bool:
    # The older switch raises an error where the newer ones, from torch 2.9, were set.
    switch = getattr(backend, part, None) if part else backend
    precision = getattr(switch, "fp32_precision", None)
    return bool(backend.allow_tf32) if precision is None else precision == "tf32"


def _compiled(node: Any) -> bool:
    return _class_of(node).__module__.startswith("torch._functorch._aot_autograd")


def _once_differentiable(node: Any) -> bool:
    # The decorator wraps backward with functools.wraps, which leaves this trace.
    return hasattr(_class_of(node).backward, "__wrapped__")


def _function_name(node: Any) -> str:
    return f"autograd.Function {_class_of(node).__name__}"


def _class_of(node: Any) -> Any:
    return node._forward_cls
