"""Gradients of several objectives made into one by an aggregator of TorchJD (an optional package)."""

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtcl.errors import UserError
from mtcl.training.balancing import Balancer

log = logging.getLogger(__name__)

INSTALL = "pip install 'mtcl[balancing]'"


def list_aggregators() -> dict[str, type]:
    """Every aggregator that the installed TorchJD has, by name; UserError where there is none installed."""
    try:
        import torchjd.aggregation as library
    except ImportError as error:
        raise UserError(f"balancing.method=torchjd needs TorchJD: {INSTALL}") from error
    kinds = {n: k for n, k in vars(library).items() if isinstance(k, type) and issubclass(k, library.Aggregator)}
    bases = {base for kind in kinds.values() for base in kind.__mro__[1:]}
    return {name: kind for name, kind in sorted(kinds.items()) if kind not in bases}


class GradientAggregation(Balancer):
    """One gradient per objective, of the weighted losses; then one of them all by an aggregator of TorchJD.

    What a single objective reaches (a head, a projector) gets that one's gradient as it is; what several reach is one
    long vector per objective, which the aggregator sees. Batches of a step are averaged before. An objective without
    any gradient there (no label in the batch) is left out of that step; each set of objectives that occurs has an
    aggregator, and so a state, of its own. Randomness is f(seed, step). The host waits for the device once a step, and
    for what the aggregator itself solves on the host. A step that the aggregator can't solve becomes one that is not
    finite.

    Args:
        options: the aggregator's; a vector over objectives is a list in the order of ``weights``, or a mapping.
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
        kinds = list_aggregators()
        if aggregator not in kinds:
            raise UserError(f"balancing.aggregator={aggregator} is not known; choose one of {', '.join(kinds)}")
        self.name, self.kind, self.options, self.seed = aggregator, kinds[aggregator], dict(options or {}), seed
        self.device = device
        self.made: dict[tuple[str, ...], nn.Module] = {}
        self.columns = 0  # of the Jacobian
        self.rows: dict[nn.Parameter, dict[str, Tensor]] = {}  # parameter -> objective -> gradient, of this step
        self.losses: list[Tensor] = []
        self.found: dict[str, Tensor | float] = {}
        self._check()

    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:
        trained = [p for p in parameters if p.requires_grad]
        objectives = {name: self.weights[name] * losses[name] for name in self.weights if name in losses}
        outside = [loss for name, loss in losses.items() if name not in objectives]
        if outside:
            torch.stack(outside).sum().backward(retain_graph=True)
        for number, (name, loss) in enumerate(objectives.items(), start=1):
            gradients = torch.autograd.grad(loss, trained, retain_graph=number < len(objectives), allow_unused=True)
            for parameter, gradient in zip(trained, gradients):
                if gradient is not None:
                    rows = self.rows.setdefault(parameter, {})
                    rows[name] = rows[name] + gradient if name in rows else gradient
        self.losses += [loss.detach().float() for loss in losses.values()]

    def finish_step(self, step: int) -> None:
        rows, self.rows, losses, self.losses = self.rows, {}, self.losses, []
        several = []
        for parameter, own in rows.items():
            if len(own) == 1:
                _add(parameter, own.popitem()[1])
            else:
                several.append(parameter)
        names = [name for name in self.weights if any(name in rows[p] for p in several)]
        lengths = [torch.nn.utils.get_total_norm([rows[p][n] for p in several if n in rows[p]]) for n in names]
        rest = torch.nn.utils.get_total_norm([p.grad for p in rows if p.grad is not None])
        numbers = torch.stack([*lengths, rest, *losses]).tolist()  # the host waits
        norms = dict(zip(names, numbers))
        present = tuple(name for name, norm in norms.items() if norm != 0)
        self.found = {f"{name}/norm": norm for name, norm in norms.items()}
        if (
            not np.isfinite(numbers).all() or len(present) < 2
        ):  # nothing to balance; who watches sees what is not finite
            for parameter in several:
                for row in rows[parameter].values():
                    _add(parameter, row)
            return
        for parameter in several:
            _add(parameter, torch.zeros_like(parameter))
            own = rows.pop(parameter)
            parameter.jac = torch.stack(  # type: ignore[attr-defined]  # where TorchJD looks for it
                [own[name] if name in own else torch.zeros_like(parameter) for name in present]
            )
        self._aggregate(several, present, step)

    def _aggregate(self, parameters: Sequence[nn.Parameter], present: tuple[str, ...], step: int) -> None:
        """Add to ``.grad`` what the aggregator makes of ``.jac``."""
        from torchjd.aggregation import GramianWeightedAggregator
        from torchjd.autojac import jac_to_grad

        self.columns = sum(p.numel() for p in parameters)
        try:
            if present not in self.made:
                self.made[present] = self._make(present)
            aggregator = self.made[present]
            lean = {"optimize_gramian_computation": True} if isinstance(aggregator, GramianWeightedAggregator) else {}
            with _private_randomness(self.seed, step, self.device):
                weights = jac_to_grad(parameters, aggregator, **lean)  # type: ignore[call-overload]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a solver may raise
            log.warning("step %d: %s failed (%s: %s)", step, self.name, type(error).__name__, _first_line(error))
            for parameter in parameters:
                parameter.__dict__.pop("jac", None)
                _add(parameter, torch.full_like(parameter, torch.nan))
            return
        if weights is not None:
            self.found |= {f"{name}/weight": self.weights[name] * w for name, w in zip(present, weights.unbind())}

    def _make(self, names: Sequence[str]) -> nn.Module:
        """An aggregator of its own for these objectives."""
        options = {}
        for key, value in self.options.items():
            if isinstance(value, list):
                value = dict(zip(self.weights, value))
            options[key] = (
                torch.tensor([float(value[n]) for n in names], device=self.device)
                if isinstance(value, Mapping)
                else value
            )
        if "n_tasks" in inspect.signature(self.kind).parameters:
            options["n_tasks"] = len(names)
        return self.kind(**options)

    def _check(self) -> None:
        """UserError for options that the aggregator does not have, lacks or can't use, as far as a first call tells."""
        known = {n: p for n, p in inspect.signature(self.kind).parameters.items() if n != "n_tasks"}
        for key, value in self.options.items():
            if key not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise UserError(f"balancing.options.{key} is not an option of {self.name}; {has}")
            if (isinstance(value, Mapping) and set(value) != set(self.weights)) or (
                isinstance(value, list) and len(value) != len(self.weights)
            ):
                raise UserError(f"balancing.options.{key}={value} must have a number for each of {self._objectives()}")
        lacks = [n for n, p in known.items() if p.default is p.empty and n not in self.options]
        if lacks:
            raise UserError(f"balancing.aggregator={self.name} needs 'balancing.options={{{lacks[0]}: VALUE}}'")
        try:
            aggregator = self._make(list(self.weights))
            with _private_randomness(self.seed, 0, self.device):
                aggregator(torch.eye(len(self.weights), device=self.device))
        except ImportError as error:
            raise UserError(
                f"balancing.aggregator={self.name}: {_first_line(error).split('. ')[0]}; {INSTALL}"
            ) from error
        except Exception as error:
            raise UserError(
                f"balancing.aggregator={self.name} with balancing.options={self.options} can't balance "
                f"{self._objectives()}: {_first_line(error)}"
            ) from error

    def _objectives(self) -> str:
        return ", ".join(self.weights)

    def summary(self) -> dict[str, Tensor | float]:
        return self.found

    def _state(self) -> dict[str, Any]:
        from torchjd import Stateful

        kept = {",".join(names): _state_of(made) for names, made in self.made.items() if isinstance(made, Stateful)}
        return {"aggregator": self.name, "columns": self.columns, "made": kept}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.made = {}
        if state["aggregator"] != self.name:
            log.warning("the checkpoint was trained with %s: %s starts afresh", state["aggregator"], self.name)
            return
        self.columns = state["columns"]
        for key, values in state["made"].items():
            names = tuple(key.split(","))
            aggregator = self.made[names] = self._make(names)
            with _private_randomness(self.seed, 0, self.device):
                aggregator(torch.eye(len(names), self.columns, device=self.device))  # sets up what its state lives in
            _put_state(aggregator, values, self.device)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    """In the parameter's own layout: fused optimisers count on it, and neither autograd.grad nor TorchJD keep it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad += gradient


def _state_of(aggregator: nn.Module) -> dict[str, Any]:
    """``module/name`` -> what an aggregator has learnt: its buffers and numbers, but for its options."""
    found: dict[str, Any] = {}
    for path, module in aggregator.named_modules():
        options = inspect.signature(type(module)).parameters
        for name, value in {**vars(module), **module._buffers}.items():
            if name.lstrip("_") in options or isinstance(value, bool):
                continue
            if name in module._buffers or isinstance(value, Tensor | int | float):
                found[f"{path}/{name}"] = value
            elif isinstance(value, np.ndarray):
                found[f"{path}/{name}"] = torch.from_numpy(value)
    return found


def _put_state(aggregator: nn.Module, values: Mapping[str, Any], device: torch.device) -> None:
    for key, value in values.items():
        path, _, name = key.rpartition("/")
        module = aggregator.get_submodule(path)
        now = getattr(module, name)
        if isinstance(now, np.ndarray):
            value = value.cpu().numpy().copy()
        elif isinstance(value, Tensor):
            value = value.to(now.device if isinstance(now, Tensor) else device, copy=True)
        setattr(module, name, value)


@contextlib.contextmanager
def _private_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """torch's global generators are f(seed, step) inside, and as they were afterwards."""
    number = int(np.random.default_rng([0x6D74636C, seed, step, 2**32]).integers(2**63))
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(number)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(number)
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
