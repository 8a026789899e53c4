"""Run a model with other parameters, without running again what cannot depend on them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._calling import Params
from ..errors import NotEditable
from .isolation import CHECKPOINTED, Noise, differentiable_kernels, make_differentiable, no_recomputation, preserved_rng
from .passes import CheckReplay, Diverged, Plan, Record, Recording, Replay, plan_of, without_dead
from .probe import Probe, WriteGuard, WritesParameter
from .recordings import Recordings
from .state import State, held, sites
from .tree import copied, equal, flatten_call

__all__ = ["Replayer"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
_MOST_PLANS = 8


class Replayer:
    """A structural clone, some of whose parameters are given anew in every pass.

    On the first batch a probe finds the outermost module calls that cannot depend on those parameters; a full pass
    records their outputs; later passes on the same batch return the recorded outputs in their place. A replay is
    checked once per plan against a full pass at other parameters. Where a pass does not go as recorded, a warning says
    so, and from then on every pass is a full one.

    Args:
        model: the clone.
        start: the edited parameters.
        replay: record and replay; full passes otherwise.
        fixed: names of parameters that are not edited, and yet are given anew in every pass: those of a model that is
            being trained.
    """

    def __init__(self, model: nn.Module, start: Params, *, replay: bool, fixed: Sequence[str] = ()) -> None:
        self.full_passes_because = "" if replay else "replay=False was given"
        self._model, self._start, self._fixed = model, start, fixed
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._sites = list(sites(model, {id(p): n for n, p in model.named_parameters() if n in start or n in fixed}))
        self._device = next(iter(start.values())).device
        self._attention = any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoder)) for m in model.modules())
        self._attention |= any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                make_differentiable(module)
        self._lock = threading.RLock()
        self._run: Any = None
        self._wrapped: dict[str, Any] = {}
        self._plans: dict[Any, list[Plan]] = {}
        self._recordings = Recordings()
        self._learnt = 0
        self._observed = False
        self._changes_inputs = False
        self._noise: Noise | None = None
        self._state: State | None = None
        self._own: set[str] = set()

    @property
    def shared(self) -> list[Tensor]:
        """The clone's parameters whose memory is the user's."""
        return [parameter for name, parameter in self._model.named_parameters() if name not in self._own]

    def __call__(self, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the model's answer with these parameters, replaying where this batch was recorded before."""
        with self._lock:
            tensors, rest, known = flatten_call(args, kwargs)
            if self.full_passes_because or not known or not _plain(tensors):
                return self.full(params, args, kwargs)
            key = self._recordings.key(tensors, rest, self._device)
            found = self._recordings.find(key, tensors)
            if found is not None:
                return self.replay(params, found, (args, kwargs))
            if _transformed() or not self._recordings.worthwhile(key, tensors):
                return self.full(params, args, kwargs)
            output, recording = self.record(params, (args, kwargs))
            if recording.plan is not None:
                self._recordings.add(key, tensors, recording)
            return output

    def full(self, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the model's answer with these parameters by a full pass."""
        with self._lock:
            if not self._observed and not _transformed():
                self._observe((args, kwargs))
            args, kwargs = self._fresh((args, kwargs))
            if self._state is not None:
                self._state.restore()
            if self._noise is None:
                return self._pass(params, args, kwargs, None)
            with preserved_rng(self._device):
                self._noise.restore()
                return self._pass(params, args, kwargs, None)

    def record(self, params: Params, inputs: Call) -> tuple[Any, Recording]:
        """Return the answer of a full pass and what it recorded; nothing (`plan` None) where replays do not help."""
        with self._lock:
            tensors, rest, known = flatten_call(*inputs)
            if self.full_passes_because or not known:
                return self.full(params, *inputs), Recording()
            key = _kind(tensors, rest)
            for plan in reversed(self._plans.get(key, [])):
                if not plan.sequence:
                    return self.full(params, *inputs), Recording()
                try:
                    return self._record(plan, params, inputs)
                except Diverged:
                    continue
            return self._learn(key, params, inputs)

    def idle(self, inputs: Call) -> bool:
        """Say whether it is known already that `record` would record nothing of such a batch."""
        tensors, rest, known = flatten_call(*inputs)
        plans = self._plans.get(_kind(tensors, rest), [])
        return bool(self.full_passes_because) or not known or bool(plans and not plans[-1].sequence)

    def replay(self, params: Params, recording: Recording, inputs: Call) -> Any:
        """Return the model's answer on a recorded batch, by a full pass where it cannot be replayed."""
        with self._lock:
            if recording.plan is None or self.full_passes_because:
                return self.full(params, *inputs)
            args, kwargs = self._fresh(inputs)
            try:
                return self._replayed(Replay, recording, params, (args, kwargs))[0]
            except Diverged as diverged:
                reason = str(diverged)
            except Exception as error:
                reason = f"a replayed pass raised {type(error).__name__}: {error}"
            output = self.full(params, *inputs)  # raises, where it was the model that raised
            self._give_up(reason)
            return output

    # ---------------------------------------------------------------- learning a plan

    def _learn(self, key: Any, params: Params, inputs: Call) -> tuple[Any, Recording]:
        """Probe, record and check."""
        self._learnt += 1
        if self._learnt > _MOST_PLANS:
            self._give_up("every batch takes another way through the model")
            return self.full(params, *inputs), Recording()
        for strict in (False, True):
            probe, expected = self._observe(inputs, strict=strict)
            if self.full_passes_because or probe is None:
                break
            plan = plan_of(probe.events)
            self._plans.setdefault(key, []).append(plan)
            if not plan.sequence:
                return self.full(params, *inputs), Recording()
            self._wrap(plan.names)
            here = {name: value.detach() for name, value in params.items()} if self._fixed else params
            try:
                output, recording = self._record(plan, here, inputs)
                recording = self._checked(recording, expected, here, inputs, output)
                return self._record(plan, params, inputs) if self._fixed else (output, recording)
            except Diverged as diverged:
                reason = str(diverged)
                self._plans[key].remove(plan)
        else:
            self._give_up(reason)
        return self.full(params, *inputs), Recording()

    def _record(self, plan: Plan, params: Params, inputs: Call) -> tuple[Any, Recording]:
        """Run a full pass that records; it tracks gradients even where none is wanted, to see what depends."""
        wanted = torch.is_grad_enabled() and any(value.requires_grad for value in params.values())
        tracked = self._tracked(params)
        args, kwargs = self._fresh(inputs)
        trained = any(name not in self._start and value.requires_grad for name, value in params.items())
        run = Record(plan, flatten_call(args, kwargs)[0], trained=trained)
        with torch.enable_grad():
            output = self._pass(tracked, args, kwargs, run)
        return output if wanted else pytree.tree_map_only(Tensor, torch.detach, output), run.close()

    def _checked(self, recording: Recording, expected: Any, params: Params, inputs: Call, output: Any) -> Recording:
        """Compare replays with full passes; return the recording without what no replay reads."""
        assert recording.plan is not None
        try:
            args, kwargs = self._fresh(inputs)
            again, check = self._replayed(CheckReplay, recording, self._elsewhere, (args, kwargs))
            if not equal(again, expected):
                raise Diverged("the replayed answer differs from that of a full pass")
            live = check.live(again)
            small = without_dead(recording, live)
            here = {name: value.detach() for name, value in params.items()}
            with torch.no_grad():
                again, _ = self._replayed(Replay, small, here, self._fresh(inputs))
            if not equal(again, output):
                return recording
        except Exception as error:
            raise Diverged(f"a replayed pass raised {type(error).__name__}: {error}") from error
        recording.plan.live = live
        return small

    def _replayed(self, kind: type[Replay], recording: Recording, params: Params, inputs: Call) -> tuple[Any, Any]:
        run = kind(recording, flatten_call(*inputs)[0])
        with run.flow if isinstance(run, CheckReplay) else nullcontext():
            output = self._pass(params, *inputs, run)
        run.close()
        return output, run

    # ---------------------------------------------------------------- observing a pass

    def _observe(self, inputs: Call, *, strict: bool = False) -> tuple[Probe | None, Any]:
        """Run the probe at other parameters; learn whether passes draw, remember, or write to what they are given."""
        state = State(self._model)
        try:
            probe, output, drawn = self._probe(inputs, Probe(strict=strict), state)
            places = state.changed()
            if places:
                before = State(self._model)
                watched, again, _ = self._probe(inputs, Probe(strict=strict, places=places), before)
                rewritten = before.changed()
                kept = held([place for place in places if place not in rewritten])
                if drawn or any(map(probe.depends, kept)) or not equal(again, output, exactly=True):
                    self._state = state
                probe = watched
        except NotEditable:
            state.restore()
            raise
        except Exception as error:
            state.restore()
            self._pass(self._start, *self._fresh(inputs), None)  # raises, where it was the model that raised
            self._give_up(f"its passes cannot be observed ({type(error).__name__}: {error})")
            return None, None
        finally:
            self._unwrap()
        self._observed = True
        if drawn:
            self._noise = Noise.now(self._device)
            self._give_up("its eval mode draws random numbers; each pass draws the same ones")
        if self._state is not None:
            self._give_up("its modules remember something from pass to pass; each pass starts from the same state")
        return probe, output

    def _probe(self, inputs: Call, probe: Probe, state: State) -> tuple[Probe, Any, bool]:
        """Run one observed pass; return the probe, the answer, and whether random numbers were drawn."""
        args, kwargs = copied(inputs)
        given = [(tensor, tensor._version) for tensor in flatten_call(args, kwargs)[0]]
        params = {name: value.requires_grad_() for name, value in self._elsewhere.items()}
        weights = {name: p for name, p in self._model.named_parameters() if name not in self._own} | params
        self._wrap(self._modules)
        try:
            with preserved_rng(self._device) as noise, torch.enable_grad(), WriteGuard(weights), no_recomputation():
                with probe:
                    output = self._pass(params, args, kwargs, probe)
                drawn = not noise.same(Noise.now(self._device))
        except WritesParameter as written:
            self._take(str(written), params)
            state.restore()
            return self._probe(inputs, probe.again(), state)
        except RuntimeError as error:
            if CHECKPOINTED in str(error):
                message = f"the model uses activation checkpointing in eval mode: {CHECKPOINTED}; switch it off"
                raise NotEditable(message) from None
            raise
        self._changes_inputs |= any(tensor._version != version for tensor, version in given)
        return probe, output, drawn

    def _take(self, name: str, params: Params) -> None:
        """Give the clone its own copy of a weight that forward passes write to."""
        if name in params:
            raise NotEditable(f"{name} is changed in place by every forward pass; leave it out of the edit")
        parameter = dict(self._model.named_parameters())[name]
        parameter.data = parameter.data.clone()
        self._own.add(name)

    @property
    def _elsewhere(self) -> Params:
        """Parameters near the start, where a wrongly recorded output would show."""
        random = torch.Generator().manual_seed(0)
        moved = {}
        for name, value in self._start.items():
            scale = value.abs() + (value.abs().mean() if value.numel() else 0)
            noise = torch.rand(value.shape, generator=random, device="cpu").to(value) - 0.5
            moved[name] = value + 0.1 * noise * torch.where(scale > 0, scale, 1e-2)
        return moved

    # ---------------------------------------------------------------- passes

    def _pass(self, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any) -> Any:
        """Run the clone with these parameters in place; leave nothing installed.

        The parameters in place always require grad, whether or not a gradient is wanted: torch chooses kernels by it
        (matmul folds its batch where the weight requires grad), and answers that are compared must not differ by that.
        """
        leaves = (*params.values(), *flatten_call(args, kwargs)[0])
        tracked = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
        if not _transformed():
            params = self._tracked(params)
        outer, self._run = self._run, run
        originals = [(container, key, container[key]) for container, key, name in self._sites if name in params]
        try:
            for container, key, name in self._sites:
                if name in params:
                    container[key] = params[name]
            kernels = differentiable_kernels() if self._attention else nullcontext()
            with kernels, nullcontext() if tracked else torch.no_grad():
                return self._model(*args, **kwargs)
        finally:
            for container, key, original in originals:
                container[key] = original
            self._run = outer

    def _tracked(self, params: Params) -> Params:
        """Return the same with a gradient asked of every edited one."""
        return {
            name: v if v.requires_grad or name not in self._start else v.detach().requires_grad_()
            for name, v in params.items()
        }

    def renew(self, model: nn.Module) -> None:
        """Take over the weights, for probes, and the buffers of the model that the clone was made of."""
        theirs, weights = dict(model.named_modules(remove_duplicate=False)), dict(model.named_parameters())
        copies: dict[int, Tensor] = {}
        with torch.no_grad():
            for name, module in self._model.named_modules(remove_duplicate=False):
                for key, buffer in theirs[name]._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = copies.setdefault(id(buffer), buffer.detach().clone())
            for name, parameter in self._model.named_parameters():
                if name not in self._own:
                    parameter.data = weights[name].detach()
        if self._state is not None:
            self._state = State(self._model)

    def _fresh(self, inputs: Call) -> Call:
        """Copy the inputs of a model that changes them in place, so that every pass is given the same."""
        return copied(inputs) if self._changes_inputs else inputs

    def _wrap(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._wrapped:
                module = self._modules[name]
                self._wrapped[name] = vars(module).get("forward")
                module.__dict__["forward"] = self._wrapper(name, module.forward)

    def _wrapper(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            return inner(*args, **kwargs) if run is None else run.call(name, inner, args, kwargs)

        return forward

    def _unwrap(self) -> None:
        """Leave wrappers only where a plan needs them."""
        needed = {name for plans in self._plans.values() for plan in plans for name in plan.names}
        for name in [name for name in self._wrapped if name not in needed]:
            original = self._wrapped.pop(name)
            if original is None:
                del self._modules[name].__dict__["forward"]
            else:
                self._modules[name].__dict__["forward"] = original

    def _give_up(self, reason: str) -> None:
        if not self.full_passes_because:
            self.full_passes_because = reason
            warnings.warn(
                f"{type(self._model).__name__} is run in full passes: {reason}. Answers are right, edits take longer.",
                UserWarning,
                stacklevel=2,
            )
        self._plans.clear()
        self._recordings = Recordings()
        self._unwrap()


def _kind(tensors: Sequence[Tensor], rest: list[Any]) -> tuple[Any, ...]:
    """Name what one plan may serve."""
    return (*rest, *((tensor.dtype, tensor.ndim) for tensor in tensors))


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Say whether the inputs can be told apart by identity and version, and ask for no gradient."""
    return not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)


def _transformed() -> bool:
    """Say whether a torch.func transform is active: a probe cannot run inside of it."""
    return torch._C._functorch.peek_interpreter_stack() is not None
