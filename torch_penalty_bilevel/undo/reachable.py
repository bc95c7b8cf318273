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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

# Larger containers hold data, not modules.
_LONGEST = 100
# More is a search that got lost.
_MOST = 1_000
_CLOSED = {"builtins", "torch", "numpy", "torch_penalty_bilevel"}  # objects that hold no modules
_LIBRARIES = sys.stdlib_module_names | _CLOSED
_NO_HOME = _LIBRARIES - {"torch_penalty_bilevel"}  # whose own problems are closures like any other
_INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib"))
_UNFOLLOWED = (str, bytes, int, float, complex, type(None), types.BuiltinFunctionType)
_Found: TypeAlias = tuple[Any, str]
"""Something, and its name."""


class Reached(NamedTuple):
    """What a function's code can name."""

    modules: list[nn.Module]
    """Each once; their submodules are reached through them."""
    tensors: dict[str, Tensor]
    """By the name of the variable, attribute or entry that holds them."""
    compiled_functions: bool
    """Is a function behind ``torch.compile`` among what led to them?"""

    @property
    def compiled(self) -> bool:
        """Is anything behind ``torch.compile`` there? Asks each submodule; most need not know."""
        return self.compiled_functions or any(
            hasattr(module, "_torchdynamo_orig_callable")
            or any(part._compiled_call_impl is not None for part in module.modules())
            for module in self.modules
        )


def reached_by(function: Callable[..., Any]) -> Reached:
    """The modules and tensors that ``function`` can reach by name."""
    search = _Search(_home(function))
    search.run(function, getattr(function, "__name__", type(function).__name__))
    return Reached(list(search.modules.values()), search.tensors, search.compiled_functions)


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
        self.compiled_functions = False
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self._names: set[str] = set()
        self._holders: list[tuple[str, Mapping[str, Any]]] = []

    def run(self, start: Any, called: str) -> None:
        """Until nothing new is found: each function adds names, which holders may have."""
        found: list[_Found] = [(start, called)]
        pending: list[_Found] = []
        seen: dict[int, Any] = {}  # keeps what it saw alive, so that ids are unique
        asked = False  # the holders, since something was looked at
        while True:
            # Without a call for each, and first what holders say again: every step waits for it.
            for value, name in found:
                if id(value) in seen:
                    continue
                if isinstance(value, Tensor):
                    self.tensors[name] = value
                elif not isinstance(value, _UNFOLLOWED) and len(seen) < _MOST:
                    seen[id(value)] = value
                    pending.append((value, name))
            if pending:
                value, name = pending.pop()
                is_function = isinstance(value, types.FunctionType)
                found = self._function(value) if is_function else self._other(value, name)
                asked = False
            elif not asked:
                found = [
                    (attributes[key], f"{name}.{key}")
                    for name, attributes in self._holders
                    for key in self._names & attributes.keys()
                ]
                asked = True
            else:
                return

    # What one thing leads to.

    def _function(self, function: Any) -> list[_Found]:
        name = function.__name__
        inner = getattr(function, "_torchdynamo_orig_callable", None)
        if inner is not None:  # the wrapper's own cells hold the compiler
            self.compiled_functions = True
            return [(inner, name)]
        if _is_foreign(function.__module__, self._home):
            return []
        found: list[_Found] = [(getattr(function, "__wrapped__", None), name)]
        code: types.CodeType = function.__code__
        names = _names_in(code)
        self._names |= names
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                found.append((cell.cell_contents, variable))
            except ValueError:  # not assigned yet
                continue
        scope = function.__globals__
        found += [(scope[variable], variable) for variable in names & scope.keys()]
        defaults, by_name = function.__defaults__ or (), function.__kwdefaults__ or {}
        return found + _entries([*enumerate(defaults), *by_name.items()], name)

    def _other(self, value: Any, name: str) -> list[_Found]:
        if isinstance(value, nn.Module):
            self.modules[id(value)] = value
            return self._methods(value, name)
        if isinstance(value, types.MethodType):
            return [(value.__self__, name), (value.__func__, name)]
        if isinstance(value, functools.partial):
            given = [*enumerate(value.args), *value.keywords.items()]
            return [(value.func, name), *_entries(given, name)]
        if isinstance(value, (staticmethod, classmethod)):
            return [(value.__func__, name)]
        if isinstance(value, property):
            return [(value.fget, name)]
        if isinstance(value, (list, tuple, set, frozenset)):
            return _entries(list(enumerate(value)), name) if len(value) <= _LONGEST else []
        if isinstance(value, dict):
            return _entries(list(value.items()), name) if len(value) <= _LONGEST else []
        is_module = isinstance(value, types.ModuleType)
        if _is_foreign(value.__name__, self._home) if is_module else _package(value) in _CLOSED:
            return []
        if attributes := getattr(value, "__dict__", None):
            self._holders.append((name, attributes))
        return [] if is_module else self._methods(value, name)

    def _methods(self, value: Any, name: str) -> list[_Found]:
        for kind in type(value).__mro__:
            if not _is_foreign(kind.__module__, self._home):
                self._holders.append((name, vars(kind)))
                slots = [s for s in getattr(kind, "__slots__", ()) if hasattr(value, s)]
                if slots:
                    self._holders.append((name, {s: getattr(value, s) for s in slots}))
        call = _inherited(type(value), "__call__")
        return [(call, name)] if isinstance(call, types.FunctionType) else []


def _entries(pairs: list[tuple[Any, Any]], name: str) -> list[_Found]:
    return [(entry, f"{name}[{key!r}]") for key, entry in pairs]


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


def _home(function: Any) -> str:
    """The package of the code behind a closure; none where that is Python's or torch's."""
    if isinstance(function, types.MethodType):
        return _home(function.__func__)
    if isinstance(function, functools.partial):
        return _home(function.func)
    package = _package(function)
    return "" if package in _NO_HOME else package


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
def _is_foreign(module: str | None, home: str) -> bool:
    """Is what this Python module defines torch's, Python's or anyone's but the user's?

    He does not install what he works on; the package ``home`` is his in any case.
    """
    package = (module or "").partition(".")[0]
    held = sys.modules.get(package)
    places = [getattr(held, "__file__", None), *getattr(held, "__path__", [])]
    installed = any(place.startswith(_INSTALLED) for place in places if place)
    return package != home and (package in _LIBRARIES or installed)
