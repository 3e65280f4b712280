"""Methods written as in Python: `"tgate(gate_step=10)+deepcache(interval=3)"`.

The text is parsed, never evaluated. Names are the classes that `whenwhere.methods` exports, in any case; arguments are
their dataclass fields, by position or by name, with literal values. A bare word stands for itself as a string, so that
nothing has to be quoted twice in a shell.
"""

import ast
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from .method import Method
from .methods import CFG, FewerSteps
from .position import Sigma, Timestep
from .spelling import did_you_mean
from .upstream import configuration

# Where methods are exported from; a package that does not exist yet holds none.
_PACKAGES = ("whenwhere.methods", "whenwhere.guidance")

# What stands for a value in place of a literal.
_VALUES: dict[str, Callable[..., object]] = {"timestep": Timestep, "sigma": Sigma}

_EXAMPLE = 'write methods as in Python, for example "tgate(gate_step=10)+deepcache(interval=3)"'

Item = Method | FewerSteps | CFG


def known() -> dict[str, type[Any]]:
    """All methods by the name of their class, sorted."""
    found: dict[str, type[Any]] = {}
    for name in _PACKAGES:
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        exported = (getattr(package, word) for word in getattr(package, "__all__", ()))
        found |= {cls.__name__: cls for cls in exported if isinstance(cls, type) and _is_method(cls)}
    return dict(sorted(found.items()))


def _is_method(cls: type[Any]) -> bool:
    return is_dataclass(cls) and issubclass(cls, (Method, FewerSteps, CFG))


def parse(text: str) -> tuple[Item, ...]:
    """The methods that a text names, the outermost first, as they are attached.

    Raises:
        ValueError: the text is no such expression, a name or field is unknown (the message names the nearest), or a
            field's value is out of range.
        TypeError: a field's value is of the wrong type.
    """
    classes = known()
    return tuple(_make(call, classes) for call in _terms(_read(text)))


def parse_one(text: str, classes: Mapping[str, type[Any]]) -> Any:
    """One object written as `parse` reads methods, of the classes given by name.

    Raises:
        ValueError, TypeError: as `parse`.
    """
    return _make(_read(text), classes)


def _read(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python would say of such code
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read the method {text!r}; {_EXAMPLE}.") from error


def write(items: Iterable[Item]) -> str:
    """A short text that `parse` reads back: what differs from the defaults, or the first field where nothing does."""
    return "+".join(_short(item) for item in items)


def write_full(items: Iterable[Item]) -> str:
    """The text with every field in it, which means the same when a default changes."""
    return "+".join(map(repr, items))


def _terms(node: ast.expr) -> list[ast.expr]:
    """The parts of a sum, from left to right."""
    terms: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


def _make(node: ast.expr, classes: Mapping[str, type[Any]]) -> Any:
    """One method from `name` or `name(values, field=value)`."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise ValueError(f"{ast.unparse(node)!r} is no method; {_EXAMPLE}.")
    cls = _look_up(call.func.id, classes)
    names = [field.name for field in fields(cls)]
    if len(call.args) > len(names):
        raise ValueError(f"{cls.__name__} takes {', '.join(names)}; got {len(call.args)} values.")
    values = {name: _literal(value) for name, value in zip(names, call.args, strict=False)}
    for keyword in call.keywords:
        name = _field(cls.__name__, keyword.arg, names)
        if name in values:
            raise ValueError(f"{cls.__name__}: {name} is given twice.")
        values[name] = _literal(keyword.value)
    for field in fields(cls):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{cls.__name__} needs a value for {field.name}.")
    return cls(**values)


def _look_up(name: str, known: Mapping[str, type[Any]]) -> type[Any]:
    classes = {word.lower(): cls for word, cls in known.items()}
    found = classes.get(name.replace("_", "").lower())
    if found is None:
        names = [cls.__name__ for cls in classes.values()]
        raise ValueError(f"no method is called {name!r}{did_you_mean(name, names)} Known: {', '.join(names)}.")
    return found


def _field(method: str, name: str | None, names: list[str]) -> str:
    if name in names:
        return name
    if name is None or not names:
        raise ValueError(f"{method} takes {', '.join(names) or 'no values'}; {_EXAMPLE}.")
    raise ValueError(f"{method} has no field {name!r}{did_you_mean(name, names)} It has {', '.join(names)}.")


def _literal(node: ast.expr) -> object:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        made = _VALUES.get(node.func.id.lower()) or configuration(node.func.id)
        if made is not None:
            return made(*map(_literal, node.args), **{str(k.arg): _literal(k.value) for k in node.keywords})
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"{ast.unparse(node)!r} is no plain value; numbers, strings, tuples of them, timestep(600), sigma(2) are."
        ) from error


def _short(item: Item) -> str:
    values = {field.name: getattr(item, field.name) for field in fields(item)}  # type: ignore[arg-type]
    changed = {f.name: values[f.name] for f in fields(item) if values[f.name] != f.default}  # type: ignore[arg-type]
    shown = changed or dict(list(values.items())[:1])
    return f"{type(item).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
