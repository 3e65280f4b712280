"""Small trained models that come with the library."""

from whenwhere.zoo.load import entry, load, names, path

__all__ = ["entry", "load", "names", "path"]
