"""Triton's interpreter without what it does over and over: the same numbers in a fraction of the time.

Five things take most of its time. At each call of a function in a kernel (`tl.sum` is one) it looks through all of
Triton's language for what it has to replace, though the launch around it has replaced all; a scan by a function of the
kernel's own calls that for every element; each result makes the table of types anew; each tensor its type and what
follows from that; and each sum of integers is made again in 64 bits for an assertion that is off. Here a launch
replaces once, such a function is called with whole slices, in the same order, a type is looked up once, what follows
from it is copied from the first tensor that had it, and sums are made once.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any


def hasten() -> None:
    """For this process. An interpreter that is made otherwise stays as it is."""
    from triton.runtime import interpreter

    known = (
        "_LangPatchScope",
        "_patch_lang",
        "_get_np_dtype",
        "GridExecutor",
        "ScanOps",
        "InterpreterOptions",
        "TritonSemantic",
    )
    if all(hasattr(interpreter, name) for name in known) and not hasattr(interpreter, "_hastened"):
        interpreter._hastened = True
        interpreter._get_np_dtype = _looked_up(interpreter._get_np_dtype)
        _replace_once(interpreter)
        interpreter.ScanOps.generic_scan = _scan
        _copy_what_follows()
        if not interpreter.InterpreterOptions().debug:
            interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


def _copy_what_follows() -> None:
    from triton import language as tl

    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[tuple, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type)

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor


def _looked_up(find: Any) -> Any:
    from triton import language as tl

    known = cache(find)

    def look_up(dtype: Any) -> Any:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        return find(dtype) if isinstance(dtype, tl.pointer_type) else known(dtype)

    return look_up


def _replace_once(interpreter: Any) -> None:
    from triton import language as tl

    replace, everything = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    inside = False

    def replace_once(function: Any) -> Any:
        nonlocal inside
        if inside:
            return SimpleNamespace(restore=lambda: None)
        scope, inside = replace(everything), True

        def restore() -> None:
            nonlocal inside
            inside = False
            scope.restore()

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = replace_once


def _slices(data: Any, axis: int) -> list:
    return [data.take(i, axis) for i in range(data.shape[axis])]


def _combined(ops: Any, total: list, parts: list, dtypes: list) -> list:
    """What the kernel's function makes of two slices of each operand."""
    found = ops.combine_fn.fn(*(ops.to_tensor(x, t) for x, t in zip(total + parts, 2 * dtypes, strict=True)))
    found = found if isinstance(found, tuple) else (found,)
    return [x.handle.data.reshape(part.shape) for x, part in zip(found, parts, strict=True)]


def _scan(ops: Any, operands: tuple) -> list:
    import numpy

    dtypes = [x.dtype for x in operands]
    steps = list(zip(*(_slices(x.handle.data, ops.axis) for x in operands), strict=True))
    found = [list(steps[0])]
    for parts in steps[1:]:
        found.append(_combined(ops, found[-1], list(parts), dtypes))
    of_operands = zip(*found, strict=True)
    return [ops.to_tensor(numpy.stack(x, ops.axis), t) for x, t in zip(of_operands, dtypes, strict=True)]
