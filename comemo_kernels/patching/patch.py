"""Our operations under a model of somebody else's class: `patched`, `patch`, `unpatch`.

A model is recognised by the structure of its modules; no other package is imported. Attributes of
its modules' instances are replaced, nothing else.
"""

import threading
from types import ModuleType, TracebackType

from torch import nn

from comemo_kernels.patching import internvl, mllama, open_flamingo, published
from comemo_kernels.patching.plan import Plan, Report

KNOWN: tuple[ModuleType, ...] = (published, internvl, mllama, open_flamingo)
_PLAN = "_comemo_kernels_patch"  # the attribute of a patched model that holds its plan
_lock = threading.RLock()


def _find_plan(model: nn.Module) -> Plan | None:
    """The plan that is installed in a model or in one that it wraps."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        plan = vars(module).get(_PLAN)
        if plan is not None:
            return plan
    return None


def _hands_on(module: nn.Module) -> bool:
    """Whether a module is a wrapper that has all attributes of the model in it."""
    return type(module).__getattr__ is not nn.Module.__getattr__


def _make_plan(model: nn.Module) -> Plan:
    if isinstance(model, nn.Module):
        for module in model.modules():  # adapters and compilers wrap models
            for known in () if _hands_on(module) else KNOWN:
                if known.recognise(module):
                    plan = Plan(module, known.NAME)
                    known.make_plan(plan)
                    return plan
    names = "; ".join(known.NAME for known in KNOWN)
    raise TypeError(
        f"patched: wanted a model of a known kind, got {type(model).__name__}; known are: {names}"
    )


class patched:
    """Our operations under a model, for the length of a with-block.

        with comemo_kernels.patched(model) as patch:
            model.generate(...)
        print(patch.report())

    The model's attributes are as before after the block, whatever is raised. Blocks may be nested,
    and threads may use the same model in blocks of their own: the last one restores it. A copy or
    pickle that is made inside a block is a patched model: use `unpatch` on it.

    Args:
        model: an instance of a known kind, or a module that contains one.

    Raises:
        TypeError: a model of no known kind; the error names those that are.
        ValueError: a model that is damaged, with the reason and what to do.
    """

    def __init__(self, model: nn.Module) -> None:
        with _lock:
            self._plan = _find_plan(model) or _make_plan(model)

    def __enter__(self) -> "patched":
        with _lock:
            self._plan = _hold(self._plan)
            self._plan.holders += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            self._plan.holders -= 1
            if self._plan.holders <= 0 and not self._plan.kept:
                _release(self._plan)

    def report(self) -> Report:
        """What is replaced, what is not and why, and how many calls ran the model's own code."""
        return Report.of(self._plan)


def _hold(plan: Plan) -> Plan:
    """Install a plan, unless its model has one."""
    attributes = vars(plan.model)
    if _PLAN not in attributes:
        plan.holders = 0
        plan.install()
        attributes[_PLAN] = plan
    return attributes[_PLAN]


def _release(plan: Plan) -> None:
    if vars(plan.model).get(_PLAN) is plan:
        del vars(plan.model)[_PLAN]
        plan.remove()


def patch(model: nn.Module) -> patched:
    """Put our operations under a model until `unpatch`. Twice is the same as once.

    Args:
        model: as for `patched`.

    Returns:
        an object with `report()`.

    Raises:
        TypeError, ValueError: as `patched`.
    """
    with _lock:
        handle = patched(model)
        handle._plan = _hold(handle._plan)
        handle._plan.kept = True
    return handle


def unpatch(model: nn.Module) -> None:
    """Put back everything that `patch` or `patched` replaced in a model, a copy or a pickle of one.

    A model that is not patched is left as it is.

    Args:
        model: the model, or a module that contains it.
    """
    with _lock:
        plan = _find_plan(model)
        if plan is not None:
            plan.kept = False
            _release(plan)
