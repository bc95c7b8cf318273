"""Which modules the closures of one optimizer use, and which tensors they move by themselves."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .process_wide import ProcessWide
from .reachable import code_of, reached_by

Function: TypeAlias = Callable[..., Any]


class Scope:
    """Finds the modules that closures use, so that closures need not say.

    By name, before each step (``reached_by``). What that misses is found by a global forward hook
    while the first call is ``searching``. In every other evaluation there is no hook:
    ``torch.compile`` would trace it, and compile again whenever it comes or goes. While it is
    there, compiled code runs uncompiled.
    """

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[types.CodeType, WeakSet[nn.Module]] = WeakKeyDictionary()
        self.trained: WeakSet[nn.Module] = WeakSet()
        """Modules with buffers that an evaluation has trained."""
        self.searches = False
        self.is_new = True
        """Do the closures of this step come from lines of code that no search has seen?"""
        self.has_searched = False
        """Has this object seen any closures? A copy has not, whatever the original knew."""
        self.compiled = False
        """Did the last search meet code that is compiled at other times?"""
        self.written: dict[str, None] = {}
        """Names of tensors that closures wrote into during the search, in order."""
        self.rebound: dict[str, Tensor] = {}
        """Names that closures gave to another tensor, with the last of them."""

    def __reduce__(self) -> tuple[type[Scope], tuple[()]]:
        return Scope, ()  # copies and pickles find out again

    def knows(self, *functions: Function) -> bool:
        """Has each of these lines of code been searched?"""
        return all(code is None or code in self._found for code in map(code_of, functions))

    def may_train(self, module: nn.Module) -> bool:
        """Is a module that is in evaluation mode now known to train, or is that being found out?"""
        return self.searches or module in self.trained

    def modules(self, function: Function) -> list[nn.Module]:
        """Modules that ``function`` may use; their submodules are not listed."""
        code = code_of(function)
        found = self._found.get(code, ()) if code is not None else ()
        return [*reached_by(function).modules, *found]

    @contextlib.contextmanager
    def searching(self) -> Generator[None]:
        """Find inside the block what evaluations use beyond what their functions name."""
        before = set(self._found)
        self.written, self.rebound, self.compiled = {}, {}, False
        self.searches = True
        try:
            with _UNCOMPILED:
                yield
            self.is_new, self.has_searched = False, True
        except BaseException:
            for code in set(self._found) - before:  # its next evaluation searches again
                del self._found[code]
            raise
        finally:
            self.searches = False

    @contextlib.contextmanager
    def watching(self, function: Function, use: Callable[[nn.Module], bool]) -> Generator[None]:
        """One evaluation of a search: ``use`` is told of each module that runs in it.

        ``use`` returns whether the module was not known before.
        """
        thread, code = threading.get_ident(), code_of(function)
        found: WeakSet[nn.Module] = WeakSet()
        if code is not None:
            found = self._found.setdefault(code, found)

        def note(module: nn.Module, _inputs: object) -> None:
            if threading.get_ident() == thread and use(module):
                found.add(module)

        before = _constants(function)
        self.compiled |= reached_by(function).compiled
        hook = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()
        for name, (tensor, version) in _constants(function).items():
            if name in before and before[name][0] is not tensor:
                self.rebound[name] = tensor.detach()
            elif name in before and before[name][1] != version:
                self.written[name] = None


def _constants(function: Function) -> dict[str, tuple[Tensor, int]]:
    """Tensors that ``function`` names, parameters excepted, and how often each was written into."""
    return {
        name: (tensor, 0 if tensor.is_inference() else tensor._version)
        for name, tensor in reached_by(function).tensors.items()
        if not (tensor.is_leaf and tensor.requires_grad) and not isinstance(tensor, nn.Parameter)
    }


@contextlib.contextmanager
def _uncompiled() -> Generator[None]:
    # Nothing is compiled where nobody imported the compiler, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # Compiled modules warn that they meet a hook twice, which does no harm here.
        warnings.filterwarnings("ignore", ".*global hooks on modules", UserWarning)
        yield


_UNCOMPILED = ProcessWide(_uncompiled)
