"""Checks of a method's fields, in one wording: what was asked, what is allowed."""

from collections.abc import Collection


def at_least(minimum: int, **fields: int) -> None:
    """Every field is a whole number of at least `minimum`.

    Raises:
        TypeError: one is no whole number.
        ValueError: one is too small.
    """
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def position(name: str, value: float, minimum: int = 0) -> None:
    """A place in the schedule: a step as a whole number of at least `minimum`, or a fraction of the schedule in (0, 1).

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if not isinstance(value, float):
        return at_least(minimum, **{name: value})
    if not 0 < value < 1:
        raise ValueError(
            f"{name} must be a whole number of at least {minimum}, or a fraction of the schedule between 0 and 1, "
            f"got {value}"
        )
    return None


def true_or_false(name: str, value: object) -> None:
    """The field is a truth value.

    Raises:
        TypeError: it is not, as where a guidance scale is given for whether there is guidance.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """The field is one of a few words.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
