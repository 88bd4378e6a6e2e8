"""A CUDA device without a card: tensors with shape, type and device but no memory, and a check of every operation.

``FakeTensorMode`` of torch refuses what mixes devices and what needs a value on the host (``.item()``, a branch on
data, ``nonzero``). :class:`OperationCheck` adds the copies that make the host wait, and :func:`differentiate` the
backward pass, which torch's engine does not start without a card.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._copy_from}
INDEXED_READS = {torch.ops.aten.index}
INDEXED_WRITES = {torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
UNKNOWN_TO_FAKES = {torch.ops.aten._fused_sgd_}  # they change their arguments and return nothing
SOURCES = {"index_add": 3, "index_copy": 3, "index_put": 2, "scatter_add": 3, "scatter": 3}  # argument of the same type
LAYERS = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "BmmBackward")
MOVES = {"Alias", "AsStrided", "Cat", "Clone", "Expand", "Gather", "Index", "IndexSelect", "Permute", "ReshapeAlias"}
MOVES |= {"Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "T", "Transpose", "Unbind", "UnsafeView"}
MOVES |= {"Unsqueeze", "View"}  # what they return was not computed
# Of torch.use_deterministic_algorithms' list "will throw a RuntimeError" on CUDA, by the operation that does.
NO_DETERMINISTIC_KERNEL = {
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "_upsample_bilinear2d_aa_backward",
    "upsample_bicubic2d_backward",
    "_upsample_bicubic2d_aa_backward",
    "upsample_trilinear3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "fractional_max_pool2d_backward",
    "max_unpool2d",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "cudnn_grid_sampler_backward",
    "nll_loss2d_forward",
    "nll_loss2d_backward",
    "_ctc_loss_backward",
    "put_",
    "put",
    "histc",
    "median",
    "nanmedian",
    "scatter_reduce",
    "scatter_reduce_",
}


class HostWaitError(AssertionError):
    """An operation at which the host waits for the device."""


class OperationCheck(TorchDispatchMode):
    """Counts the operations of the device, and refuses what ``FakeTensorMode`` lets pass: copies between
    host and device that wait, indices on the device of a tensor on the host, writes of another type.

    Attributes:
        counts: operation -> calls with a tensor of the device.
        may_wait: whether the host may wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.may_wait = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        result = None if packet in UNKNOWN_TO_FAKES else func(*args, **kwargs)
        if func.namespace in ("prim", "profiler"):
            return result
        inputs, outputs = _list_devices((args, kwargs)), _list_devices(result)
        if packet in UNKNOWN_TO_FAKES and len(inputs) > 1:
            raise RuntimeError(f"the arguments of {func} are on {' and '.join(sorted(inputs))}")
        if "cuda" in inputs or "cuda" in outputs:
            self.counts[packet.__name__] += 1
        number = SOURCES.get(packet.__name__.rstrip("_"), len(args))
        if number < len(args) and isinstance(args[number], Tensor) and args[number].dtype != args[0].dtype:
            raise TypeError(f"{func} writes {args[number].dtype} into {args[0].dtype}")
        if packet in INDEXED_READS | INDEXED_WRITES and "cuda" in _list_devices(args[1]) - _list_devices(args[0]):
            raise RuntimeError(f"an index of {func} is on the device, what it indexes is not")
        if not self.may_wait and self._waits(packet, inputs, outputs, args, kwargs):
            raise HostWaitError(f"the host waits in {func}")
        return result

    @staticmethod
    def _waits(packet: Any, inputs: set[str], outputs: set[str], args: Any, kwargs: Any) -> bool:
        """Tell whether torch.cuda.set_sync_debug_mode would report this call, as far as it can be seen from here."""
        if packet in COPIES:
            source = args[1] if packet is torch.ops.aten.copy_ else args[0]
            if _list_devices(source) == outputs or not source.numel():
                return False
            if packet is torch.ops.aten.copy_:
                return not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            return not kwargs.get("non_blocking", False)
        if packet in INDEXED_READS | INDEXED_WRITES and "cpu" in _list_devices(args[1]) and "cuda" in inputs:
            return True  # it is copied
        if packet in INDEXED_WRITES:  # a mask and a single value are a masked_fill
            is_masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            return is_masked and args[2].numel() > 1
        is_allocation = packet.__name__.endswith("_like") or packet.__name__.startswith("new_")
        return "cuda" in inputs and "cpu" in outputs and not is_allocation


def _list_devices(tree: Any) -> set[str]:
    return {x.fake_device.type for x in tree_leaves(tree) if isinstance(x, FakeTensor)}


class Device:
    """A fake device: its mode, its check, and the calls of torch.cuda."""

    def __init__(self, mode: FakeTensorMode, check: OperationCheck, calls: mock.MagicMock):
        self.mode, self.check, self.calls = mode, check, calls

    def fake(self, tree: Any, device: torch.device | str | None = None) -> Any:
        """Replace the tensors of nested containers by fake ones, on ``device`` or where they are."""

        def convert(x: Tensor) -> Tensor:
            copied = x if isinstance(x, FakeTensor) else self.mode.from_tensor(x)
            return copied if device is None else copied.to(device, non_blocking=True)

        return tree_map_only(Tensor, convert, tree)

    def fake_module(self, build: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
        """Build a module on the CPU (timm reads numbers while it does) and make its tensors fake ones there."""
        with _disable_current_modes():
            module = build(*arguments)
        return _apply(module, self.mode.from_tensor)

    @contextmanager
    def may_wait(self) -> Iterator[None]:
        """Allow the host to copy from the device."""
        self.check.may_wait = True
        try:
            yield
        finally:
            self.check.may_wait = False


@contextmanager
def fake_cuda() -> Iterator[Device]:
    """Make ``device="cuda"`` work without a card, for shapes, types and devices; values are never computed."""
    calls = mock.MagicMock(name="torch.cuda")
    mode, check = FakeTensorMode(), OperationCheck()
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.current_stream", calls.current_stream),
        mock.patch("torch.cuda.Stream", calls.Stream),
        mock.patch("torch.cuda.stream", calls.stream),
        mock.patch("torch.Tensor.record_stream", calls.record_stream),
        mock.patch("torch.autograd.backward", _backward),
        mock.patch("torch.autograd.grad", _grad),
        mock.patch("mtcl.data.device_batch._copy_stream", calls.Stream),
        mock.patch("torch.nn.Module._apply", _apply),
        mock.patch("timm.utils.model_ema.torch", _WithoutCudaGenerator(torch)),
        mock.patch.object(FakeTensor, "__deepcopy__", lambda x, memo: memo.setdefault(id(x), x.detach().clone())),
        mode,
        check,
    ):
        yield Device(mode, check, calls)


class _WithoutCudaGenerator:
    """torch, whose random generators are on the CPU: those of CUDA need its driver."""

    def __init__(self, module: Any):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def Generator(self, device: torch.device | None = None) -> torch.Generator:
        """Return a generator of the CPU."""
        return torch.Generator()


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stand in for ``Module._apply``, which would swap the parameters; that fails for fake ones."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                converted = function(parameter)
            if converted is not parameter:
                module._parameters[name] = nn.Parameter(converted, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def list_low_precision(root: Tensor, up_to_layers: bool = False) -> list[str]:
    """Return the operations that computed or rounded ``root`` in less than single precision, as the graph names them.

    Args:
        root: a tensor with a graph.
        up_to_layers: look no further than the last layers (convolutions and matrix products), which are included.
    """
    waiting, reached, names = [get_gradient_edge(root).node], {}, []
    while waiting:
        node = waiting.pop()
        if id(node) in reached or hasattr(node, "variable"):
            continue
        reached[id(node)] = node
        is_low = any(output.dtype in (torch.bfloat16, torch.float16) for output in node._input_metadata)
        if is_low and node.name().partition("Backward")[0] not in MOVES:
            names.append(node.name())
        if not (up_to_layers and node.name().startswith(LAYERS)):
            waiting += [successor for successor, _ in node.next_functions if successor is not None]
    return names


# The backward pass


def differentiate(roots: Sequence[Tensor], gradients: Sequence[Tensor | None], edges: Sequence[Any]) -> list[Any]:
    """Return the gradients at ``edges`` (node, number of its output) by calling the graph's nodes one by one.

    A small stand-in for torch's engine. Each gradient must have the device and the shape of its tensor, and is
    converted to its type, as the engine does.
    """
    starts = [get_gradient_edge(root) for root in roots]
    order = _sort_nodes([edge.node for edge in starts])
    targets = {id(edge.node) for edge in edges}
    is_needed: dict[int, bool] = {}
    for node in reversed(order):
        successors = (successor for successor, _ in node.next_functions if successor is not None)
        is_needed[id(node)] = id(node) in targets or any(is_needed[id(one)] for one in successors)
    sums: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)
    for root, edge, gradient in zip(roots, starts, gradients):
        _add(sums[id(edge.node)], edge.node, edge.output_nr, torch.ones_like(root) if gradient is None else gradient)
    for node in order:
        received = sums[id(node)]
        if not received or not is_needed[id(node)] or hasattr(node, "variable"):
            continue
        arguments = [received.get(number) for number in range(len(node._input_metadata))]
        with torch.no_grad():
            results = _call(node, arguments)
        for (successor, number), result in zip(node.next_functions, results):
            if successor is not None and result is not None and is_needed[id(successor)]:
                _add(sums[id(successor)], successor, number, result)
    return [sums[id(edge.node)].get(edge.output_nr) for edge in edges]


def _call(node: Any, arguments: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if hasattr(node, "apply"):  # a Python function, whose undefined gradients are zeros
        arguments = [
            torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) if x is None else x
            for x, m in zip(arguments, node._input_metadata)
        ]
        results = node.apply(*arguments)
    else:
        results = node(*arguments)
    return results if isinstance(results, tuple) else (results,)


def _sort_nodes(starts: Sequence[Any]) -> list[Any]:
    """Return all nodes that can be reached, each before those that follow it."""
    waiting = list(starts)
    reached = {id(node): node for node in starts}
    num_waiting: Counter[int] = Counter()
    while waiting:
        for successor, _ in waiting.pop().next_functions:
            if successor is None:
                continue
            num_waiting[id(successor)] += 1
            if id(successor) not in reached:
                reached[id(successor)] = successor
                waiting.append(successor)
    order, ready = [], [node for node in reached.values() if not num_waiting[id(node)]]
    while ready:
        node = ready.pop()
        order.append(node)
        for successor, _ in node.next_functions:
            if successor is not None:
                num_waiting[id(successor)] -= 1
                if not num_waiting[id(successor)]:
                    ready.append(successor)
    return order


def _add(sums: dict[int, Tensor], node: Any, number: int, gradient: Tensor) -> None:
    expected = node.variable if hasattr(node, "variable") else node._input_metadata[number]
    shape = tuple(expected.shape)
    if gradient.device != expected.device:
        raise AssertionError(f"{node.name()} gets a gradient on {gradient.device}, not on {expected.device}")
    if tuple(gradient.shape) != shape:
        gradient = gradient.sum_to_size(shape)
    gradient = gradient.to(expected.dtype)
    sums[number] = sums[number] + gradient if number in sums else gradient


def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    """Stand in for ``torch.autograd.backward``."""
    assert not create_graph
    assert inputs is None
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = list(grad_tensors) if isinstance(grad_tensors, list | tuple) else [grad_tensors] * len(roots)
    order = _sort_nodes([get_gradient_edge(root).node for root in roots])
    leaves = [node for node in order if hasattr(node, "variable")]
    edges = [get_gradient_edge(node.variable) for node in leaves]
    with torch.no_grad():
        for edge, gradient in zip(edges, differentiate(roots, gradients, edges)):
            if gradient is not None:
                parameter = edge.node.variable
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    allow_unused: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Stand in for ``torch.autograd.grad``."""
    assert not create_graph
    roots = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    sought = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    gradients = list(grad_outputs) if isinstance(grad_outputs, list | tuple) else [grad_outputs] * len(roots)
    results = differentiate(roots, gradients, [get_gradient_edge(x) for x in sought])
    assert allow_unused or all(result is not None for result in results)
    return tuple(results)
