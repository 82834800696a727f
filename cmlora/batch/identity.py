"""Whether two tensors are the same memory with the same content, without reading it."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses import FakeTensor


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts: tensors made under torch.inference_mode()."""
    return None if tensor.is_inference() else tensor._version


def identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for views of the same memory while it is not written to.

    Writes through `.data`, and writes to tensors made under torch.inference_mode(), leave no trace: what is copied from
    weights that may be written so is compared by value, or copied anew. Hold the tensor as long as its identity: freed
    memory is given to others.
    """
    address: object = id(tensor)
    # fake tensors and wrapper subclasses have no memory of their own
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and not tensor.is_meta:
        address = tensor.data_ptr()
    elif isinstance(tensor, FakeTensor) or tensor.is_meta:
        address = (tensor.untyped_storage()._cdata, tensor.storage_offset())
    return (address, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, version(tensor))
