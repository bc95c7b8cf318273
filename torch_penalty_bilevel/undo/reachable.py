"""What a function can reach by name: the modules and tensors its code may use, without running it.

Followed are closure cells, globals and attributes that the code names, default arguments,
``functools.partial``, bound methods, what ``torch.compile`` and ``functools.wraps`` wrapped, and
short containers of those; not into libraries. What is only found at run time (``getattr`` with a
computed name, a registry) stays unknown: see ``scope``.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

# Larger containers hold data, not modules.
_LONGEST = 100
# More is a search that got lost.
_MOST = 1_000
_CLOSED = {"builtins", "torch", "numpy", "torch_penalty_bilevel"}  # objects that hold no modules
_LIBRARIES = sys.stdlib_module_names | _CLOSED
_INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib"))
_UNFOLLOWED = (str, bytes, int, float, complex, type(None), Tensor, types.BuiltinFunctionType)


class Reached(NamedTuple):
    """What a function's code can name."""

    modules: list[nn.Module]
    """Each once; their submodules are reached through them."""
    tensors: dict[str, Tensor]
    """By the name of the variable, attribute or entry that holds them."""
    compiled: bool
    """Is anything behind ``torch.compile`` among them?"""


def reached_by(function: Callable[..., Any]) -> Reached:
    """The modules and tensors that ``function`` can reach by name."""
    search = _Search(_package(function))
    search.follow(function, getattr(function, "__name__", type(function).__name__))
    search.run()
    modules = list(search.modules.values())
    compiled = search.compiled or any(
        part._compiled_call_impl is not None for module in modules for part in module.modules()
    )
    return Reached(modules, search.tensors, compiled)


def code_of(function: Callable[..., Any]) -> types.CodeType | None:
    """The code behind a closure, the same for every closure made by one line of a program."""
    value: Any = function
    for _ in range(10):  # wrappers in wrappers
        if code := getattr(value, "__code__", None):
            inner = getattr(value, "_torchdynamo_orig_callable", None)
            if inner is None:
                return code
            value = inner
        elif isinstance(value, functools.partial):
            value = value.func
        else:
            value = getattr(value, "__func__", None) or _inherited(type(value), "__call__")
    return None


class _Search:
    def __init__(self, home: str) -> None:
        self._home = home  # the closure's own package, which may itself be an installed one
        self.compiled = False
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self._names: set[str] = set()
        self._seen: dict[int, Any] = {}  # keeps what it saw alive, so that ids are unique
        self._pending: list[tuple[Any, str]] = []
        self._holders: list[tuple[str, Mapping[str, Any]]] = []

    def follow(self, value: Any, name: str) -> None:
        """Look at ``value``, called ``name``, when its turn comes."""
        if isinstance(value, Tensor):
            self.tensors[name] = value
        elif (
            not isinstance(value, _UNFOLLOWED)
            and id(value) not in self._seen
            and len(self._seen) < _MOST
        ):
            self._seen[id(value)] = value
            self._pending.append((value, name))

    def run(self) -> None:
        """Until nothing new is found: each function adds names, which holders may have."""
        while True:
            while self._pending:
                self._look_at(*self._pending.pop())
            for name, attributes in self._holders:
                for key in self._names & attributes.keys():
                    self.follow(attributes[key], f"{name}.{key}")
            if not self._pending:
                return

    def _look_at(self, value: Any, name: str) -> None:
        if isinstance(value, nn.Module):
            self.modules[id(value)] = value
            self.compiled |= hasattr(value, "_torchdynamo_orig_callable")
            self._methods(value, name)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.follow(value.__self__, name)
            self.follow(value.__func__, name)
        elif isinstance(value, functools.partial):
            self.follow(value.func, name)
            self._entries(enumerate(value.args), name)
            self._entries(value.keywords.items(), name)
        elif isinstance(value, (staticmethod, classmethod)):
            self.follow(value.__func__, name)
        elif isinstance(value, property):
            self.follow(value.fget, name)
        elif isinstance(value, (list, tuple, set, frozenset)):
            if len(value) <= _LONGEST:
                self._entries(enumerate(value), name)
        elif isinstance(value, dict):
            if len(value) <= _LONGEST:
                self._entries(value.items(), name)
        elif isinstance(value, types.ModuleType):
            if not self._is_foreign(value):
                self._hold(value, name)
        elif _package(value) not in _CLOSED:
            self._hold(value, name)
            self._methods(value, name)

    def _entries(self, entries: Iterable[tuple[Any, Any]], name: str) -> None:
        for key, entry in list(entries):
            self.follow(entry, f"{name}[{key!r}]")

    def _hold(self, value: Any, name: str) -> None:
        if attributes := getattr(value, "__dict__", None):
            self._holders.append((name, attributes))

    def _methods(self, value: Any, name: str) -> None:
        for kind in type(value).__mro__:
            if not self._is_foreign(kind):
                self._hold(kind, name)
                slots = [s for s in getattr(kind, "__slots__", ()) if hasattr(value, s)]
                if slots:
                    self._holders.append((name, {s: getattr(value, s) for s in slots}))
        if isinstance(call := _inherited(type(value), "__call__"), types.FunctionType):
            self.follow(call, name)

    def _function(self, function: Any) -> None:
        inner = getattr(function, "_torchdynamo_orig_callable", None)
        if inner is not None:  # the wrapper's own cells hold the compiler
            self.compiled = True
            self.follow(inner, function.__name__)
            return
        if self._is_foreign(function):
            return
        self.follow(getattr(function, "__wrapped__", None), function.__name__)
        code: types.CodeType = function.__code__
        names = _names_in(code)
        self._names |= names
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.follow(cell.cell_contents, variable)
            except ValueError:  # not assigned yet
                continue
        scope = function.__globals__
        for variable in names & scope.keys():
            self.follow(scope[variable], variable)
        self._entries(enumerate(function.__defaults__ or ()), function.__name__)
        self._entries((function.__kwdefaults__ or {}).items(), function.__name__)

    def _is_foreign(self, value: Any) -> bool:
        package = _package(value)
        return package != self._home and _is_library(package)


@functools.lru_cache(maxsize=1024)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes named by the code, and by functions defined inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return frozenset(names)


def _inherited(kind: type, name: str) -> Any:
    """The attribute of a class as it is written there."""
    return next((vars(k)[name] for k in kind.__mro__ if name in vars(k)), None)


def _package(value: Any) -> str:
    """The top-level package that defines a function, class or object, or holds a Python module."""
    if isinstance(value, types.ModuleType):
        home = value.__name__
    elif isinstance(value, (type, types.FunctionType)):
        home = value.__module__
    else:
        home = type(value).__module__
    return (home or "").partition(".")[0]


@functools.lru_cache(maxsize=1024)
def _is_library(package: str) -> bool:
    """Is it torch's, Python's or anyone's but the user's, who does not install what he works on?"""
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    installed = any(place.startswith(_INSTALLED) for place in places if place)
    return package in _LIBRARIES or installed
