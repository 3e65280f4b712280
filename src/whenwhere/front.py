"""Something in front of a method of one object: how modules are wrapped and schedulers are listened to.

Only the instance is touched; no class is patched.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any


class Front:
    """A callable in front of a method of one object, with that method's name and signature.

    A copy of the object, deep or pickled, gets its class's own method instead: it is a plain object on its own feet.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put it in place.

        Args:
            owner: the object.
            name: of its method.
            make: from the method as it was to what is called instead.
        """
        original: Callable[..., Any] = getattr(owner, name)
        # Also copies the attributes of what is wrapped, which may be a front itself: hence before our own are set.
        functools.update_wrapper(self, original)
        self.original = original
        self.owner, self._name = owner, name
        self.removed = self.covered = False
        self.holder: Any = None  # who put it there and can take it off
        self._previous = vars(owner).get(name)
        self._run = make(self.original)
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what stands here now."""
        return self._run(*args, **kwargs)

    @property
    def reached(self) -> bool:
        """Whether calls of the method arrive here, as far as its wrappers tell what they wrap."""
        outer = vars(self.owner).get(self._name)
        while outer is not None and outer is not self:
            outer = getattr(outer, "__wrapped__", None)
        return outer is self

    def remove(self) -> None:
        """Give the method back as it was found.

        Where something was put over this since, it stays `covered`, and calls pass straight on; when that is gone it
        may be removed again.
        """
        again, self._run, self.removed = self.removed, self.original, True
        attributes = vars(self.owner)
        self.covered = attributes.get(self._name) is not self
        if self.covered:
            if not again:
                warnings.warn(
                    f"{self._name} of a {type(self.owner).__name__} was replaced after attaching; it is left as it is. "
                    "Detach in the reverse order of attaching, or detach again when what replaced it is gone "
                    "(offloading: pipe.remove_all_hooks()).",
                    stacklevel=4,
                )
        elif self._previous is None:
            del attributes[self._name]
        else:
            attributes[self._name] = self._previous

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (self.owner, self._name)
