"""Aggregate the gradients of several objectives by an aggregator of TorchJD (an optional package)."""

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtcl.errors import ParameterError, suggest
from mtcl.training.balancing import Balancer, rename_objective

log = logging.getLogger(__name__)

INSTALL = "pip install 'mtcl[balancing]'"
AUTOMATIC = ("n_tasks", "shape")  # parameters of the library's classes that the number of objectives determines


def list_aggregators() -> dict[str, type]:
    """Return the aggregators of the installed TorchJD by name; raise ``UserError`` if it is not installed."""
    try:
        import torchjd.aggregation as library
    except ImportError as error:
        raise ParameterError("method", f"=torchjd needs TorchJD: {INSTALL}") from error
    return _list_classes(library, library.Aggregator)


def list_scalarizers() -> dict[str, type]:
    """Return the scalarizers of the installed TorchJD by name; raise ``UserError`` if it is not installed."""
    try:
        import torchjd.scalarization as library
    except ImportError as error:
        raise ParameterError("method", f" needs TorchJD: {INSTALL}") from error
    return _list_classes(library, library.Scalarizer)


def _list_classes(library: ModuleType, base: type) -> dict[str, type]:
    classes = {n: c for n, c in vars(library).items() if isinstance(c, type) and issubclass(c, base)}
    bases = {parent for member in classes.values() for parent in member.__mro__[1:]}
    return {name: member for name, member in sorted(classes.items()) if member not in bases}


def choose_class(kind: str, name: str) -> type:
    """Return the library's class of this name.

    Args:
        kind: ``aggregator`` or ``scalarizer``.
        name: as the library spells it.

    Raises:
        ParameterError: there is no such class, or TorchJD is not installed.
    """
    classes = list_aggregators() if kind == "aggregator" else list_scalarizers()
    if name in classes:
        return classes[name]
    if kind == "aggregator" and name in list_scalarizers():
        raise ParameterError(kind, f"={name} is not known: it is a scalarizer; choose balancing=scalarizer for it")
    if kind == "scalarizer" and name in list_aggregators():
        raise ParameterError(kind, f"={name} is not known: it is an aggregator; choose balancing=torchjd for it")
    problem = f"={name} is not known{suggest(name, classes)}; choose one of {', '.join(classes)}"
    raise ParameterError(kind, problem)


def check_options(kind: str, name: str, options: Mapping[str, Any], objectives: Sequence[str]) -> None:
    """Refuse options that a class of the library does not have or lacks.

    Args:
        kind: ``aggregator`` or ``scalarizer``.
        name: of the class.
        options: for its constructor; a vector is a list in the order of ``objectives`` or a mapping.
        objectives: their names.

    Raises:
        ParameterError: the sentence names the option.
    """
    signature = inspect.signature(choose_class(kind, name))
    parameters = {n: p for n, p in signature.parameters.items() if n not in AUTOMATIC}
    for key, value in options.items():
        if key not in parameters:
            available = f"it has {', '.join(parameters)}" if parameters else "it has none"
            close = suggest(key, parameters)
            raise ParameterError(f"options.{key}", f" is not an option of {name}{close}; {available}")
        if (isinstance(value, Mapping) and set(value) != set(objectives)) or (
            isinstance(value, list) and len(value) != len(objectives)
        ):
            problem = f"={value} must have a number for each of {', '.join(objectives)}"
            raise ParameterError(f"options.{key}", problem)
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in options]
    if missing:
        raise ParameterError(kind, f"={name} needs the option {missing[0]}")


def build_class(
    member: type, options: Mapping[str, Any], objectives: Sequence[str], names: Sequence[str], device: torch.device
) -> nn.Module:
    """Build a class of the library for some of the objectives.

    Args:
        member: the class.
        options: for its constructor; a vector is a list in the order of ``objectives`` or a mapping.
        objectives: all of them.
        names: those that it is built for.
        device: of vectors.
    """
    arguments: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, list):
            value = dict(zip(objectives, value))
        if isinstance(value, Mapping):
            value = torch.tensor([float(value[name]) for name in names], device=device)
        arguments[key] = value
    arguments |= {key: len(names) for key in AUTOMATIC if key in inspect.signature(member).parameters}
    return member(**arguments)


class GradientAggregation(Balancer):
    """Computes a gradient per objective, of the weighted losses, and combines them by an aggregator of TorchJD.

    Parameters that a single objective depends on (a head, a projector) get its gradient unchanged. The gradients of
    shared parameters form one vector per objective, and the aggregator combines these. Batches of a step are averaged
    first. An objective without any gradient there (no label in the batch) is left out of that step; each set of
    objectives that occurs has its own aggregator with its own state. Randomness is f(seed, step). The host waits for
    the device once a step, and for what the aggregator itself solves on the host. A step for which the aggregator fails
    is one that is not finite.

    Args:
        weights: objective -> fixed factor of its loss.
        device: of the losses.
        aggregator: name of a class in ``torchjd.aggregation``.
        options: of the aggregator; a vector over objectives is a list in the order of ``weights``, or a mapping.
        seed: of the aggregator's randomness.

    Raises:
        ParameterError: the aggregator or one of its options is refused.
    """

    saved_name = "Aggregated"

    def __init__(
        self,
        weights: Mapping[str, float],
        device: torch.device,
        aggregator: str,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__(weights)
        self.name, self.aggregator_class = aggregator, choose_class("aggregator", aggregator)
        self.options, self.seed = dict(options or {}), seed
        self.device = device
        self.aggregators: dict[tuple[str, ...], nn.Module] = {}
        self.num_columns = 0  # of the Jacobian
        self.has_warned = False  # that no parameter is shared
        self.rows: dict[nn.Parameter, dict[str, Tensor]] = {}  # parameter -> objective -> gradient, of this step
        self.losses: list[Tensor] = []
        self.trained: list[nn.Parameter] = []
        self.logged: dict[str, Tensor | float] = {}
        self._check()

    def backward(
        self,
        losses: Mapping[str, Tensor],
        parameters: Iterable[nn.Parameter],
        num_batches: int = 1,  # noqa: ARG002
    ) -> None:
        """Compute and keep each objective's gradients; add those of other losses at once."""
        self.trained = [p for p in parameters if p.requires_grad]
        objectives = {name: self.weights[name] * losses[name] for name in self.weights if name in losses}
        outside = [loss for name, loss in losses.items() if name not in objectives]
        if outside:
            self.scale_loss(torch.stack(outside).sum()).backward(retain_graph=True)
        for number, (name, loss) in enumerate(objectives.items(), start=1):
            is_needed_again = number < len(objectives)
            gradients = torch.autograd.grad(
                self.scale_loss(loss), self.trained, retain_graph=is_needed_again, allow_unused=True
            )
            for parameter, gradient in zip(self.trained, gradients):
                if gradient is not None:
                    gradient = self.unscale_gradient(gradient)
                    rows = self.rows.setdefault(parameter, {})
                    rows[name] = rows[name] + gradient if name in rows else gradient
        self.losses += [loss.detach().float() for loss in losses.values()]

    def finish_step(self, step: int) -> None:
        """Aggregate the gradients of the step's batches into ``.grad``."""
        with self.unscaled_gradients(self.trained):
            self._add_gradients(step)

    def _add_gradients(self, step: int) -> None:
        rows, self.rows, losses, self.losses = self.rows, {}, self.losses, []
        shared = []
        num_objectives = len({name for gradients in rows.values() for name in gradients})
        for parameter, gradients in rows.items():
            if len(gradients) == 1:
                add_gradient(parameter, gradients.popitem()[1])
            else:
                shared.append(parameter)
        if num_objectives > 1 and not shared and not self.has_warned:
            log.warning("no trained parameter serves two objectives: %s has nothing to balance", self.name)
            self.has_warned = True
        names = [name for name in self.weights if any(name in rows[p] for p in shared)]
        row_norms = [torch.nn.utils.get_total_norm([rows[p][n] for p in shared if n in rows[p]]) for n in names]
        rest = torch.nn.utils.get_total_norm([p.grad for p in rows if p.grad is not None])
        numbers = torch.stack([*row_norms, rest, *losses]).tolist()  # the host waits
        norms = dict(zip(names, numbers))
        present = tuple(name for name, norm in norms.items() if norm != 0)
        self.logged = {f"{name}/norm": norm for name, norm in norms.items()}
        if not np.isfinite(numbers).all() or len(present) < 2:  # nothing to balance; the guard sees what is not finite
            for parameter in shared:
                for row in rows[parameter].values():
                    add_gradient(parameter, row)
            return
        for parameter in shared:
            add_gradient(parameter, torch.zeros_like(parameter))
            gradients = rows.pop(parameter)
            parameter.jac = torch.stack(  # type: ignore[attr-defined]  # where TorchJD looks for it
                [gradients[name] if name in gradients else torch.zeros_like(parameter) for name in present]
            )
        self._aggregate(shared, present, step)

    def _aggregate(self, parameters: Sequence[nn.Parameter], present: tuple[str, ...], step: int) -> None:
        """Aggregate ``.jac`` into ``.grad``."""
        from torchjd.aggregation import GramianWeightedAggregator
        from torchjd.autojac import jac_to_grad

        self.num_columns = sum(p.numel() for p in parameters)
        try:
            if present not in self.aggregators:
                self.aggregators[present] = self._build(present)
            aggregator = self.aggregators[present]
            kwargs = {"optimize_gramian_computation": True} if isinstance(aggregator, GramianWeightedAggregator) else {}
            with private_randomness(self.seed, step, self.device):
                weights = jac_to_grad(parameters, aggregator, **kwargs)  # type: ignore[call-overload]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a solver may raise
            log.warning("step %d: %s failed (%s: %s)", step, self.name, type(error).__name__, _first_line(error))
            for parameter in parameters:
                parameter.__dict__.pop("jac", None)
                add_gradient(parameter, torch.full_like(parameter, torch.nan))
            return
        if weights is not None:
            self.logged |= {f"{name}/weight": self.weights[name] * w for name, w in zip(present, weights.unbind())}

    def _build(self, names: Sequence[str]) -> nn.Module:
        """Build an aggregator for these objectives."""
        return build_class(self.aggregator_class, self.options, list(self.weights), names, self.device)

    def _check(self) -> None:
        """Refuse options that the aggregator does not have, lacks or can't use, as far as a first call shows."""
        check_options("aggregator", self.name, self.options, list(self.weights))
        try:
            aggregator = self._build(list(self.weights))
            with private_randomness(self.seed, 0, self.device):
                aggregator(torch.eye(len(self.weights), device=self.device))
        except ImportError as error:
            problem = f"={self.name}: {_first_line(error).split('. ')[0]}; {INSTALL}"
            raise ParameterError("aggregator", problem) from error
        except Exception as error:
            names = ", ".join(self.weights)
            problem = f"={self.name} with options {self.options} can't balance {names}: {_first_line(error)}"
            raise ParameterError("aggregator", problem) from error

    def summary(self) -> dict[str, Tensor | float]:
        """Return each objective's gradient norm, and the weights of aggregators that have such."""
        return self.logged

    def _state(self) -> dict[str, Any]:
        from torchjd import Stateful

        states = {
            ",".join(names): _read_state(aggregator)
            for names, aggregator in self.aggregators.items()
            if isinstance(aggregator, Stateful)
        }
        return {"aggregator": self.name, "columns": self.num_columns, "made": states}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.aggregators = {}
        if state["aggregator"] != self.name:
            log.warning("the checkpoint was trained with %s: %s starts afresh", state["aggregator"], self.name)
            return
        self.num_columns = state["columns"]
        for key, values in state["made"].items():
            names = tuple(map(rename_objective, key.split(",")))
            aggregator = self.aggregators[names] = self._build(names)
            with private_randomness(self.seed, 0, self.device):
                aggregator(torch.eye(len(names), self.num_columns, device=self.device))  # allocates its state
            _write_state(aggregator, values, self.device)


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to ``.grad`` in the parameter's memory format, which fused optimisers need and autograd.grad drops."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad += gradient


def _read_state(aggregator: nn.Module) -> dict[str, Any]:
    """Return ``module/name`` -> state of an aggregator: its buffers and numbers, except for its options."""
    state: dict[str, Any] = {}
    for path, module in aggregator.named_modules():
        options = inspect.signature(type(module)).parameters
        for name, value in {**vars(module), **module._buffers}.items():
            if name.lstrip("_") in options or isinstance(value, bool):
                continue
            if name in module._buffers or isinstance(value, Tensor | int | float):
                state[f"{path}/{name}"] = value
            elif isinstance(value, np.ndarray):
                state[f"{path}/{name}"] = torch.from_numpy(value)
    return state


def _write_state(aggregator: nn.Module, values: Mapping[str, Any], device: torch.device) -> None:
    for key, value in values.items():
        path, _, name = key.rpartition("/")
        module = aggregator.get_submodule(path)
        current = getattr(module, name)
        if isinstance(current, np.ndarray):
            value = value.cpu().numpy().copy()
        elif isinstance(value, Tensor):
            value = value.to(current.device if isinstance(current, Tensor) else device, copy=True)
        setattr(module, name, value)


@contextlib.contextmanager
def private_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators with f(seed, step) inside, and restore them afterwards."""
    number = int(np.random.default_rng([0x6D74636C, seed, step, 2**32]).integers(2**63))
    devices = [device.index or 0] if device.type == "cuda" else []
    state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(number)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(number)
        if state is not None:
            torch.mps.manual_seed(number)
        yield
        if state is not None:
            torch.mps.set_rng_state(state)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
