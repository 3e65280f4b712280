"""Prompts: from a text file, one a line, or the built-in ones for the models that draw emoji."""

import warnings
from pathlib import Path

_EMOJI = Path(__file__).with_name("emoji-prompts.txt")
_BUILT_IN = dict.fromkeys(("emoji-pixart", "emoji-pixart-lcm", "emoji-unet", "emoji-unet-lcm"), _EMOJI)
_BUILT_IN |= dict.fromkeys(
    ("emoji-dit", "emoji-skip-dit", "emoji-wide-dit"), Path(__file__).with_name("emoji-classes.txt")
)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file; blank ones are left out, and repeated ones with a warning.

    Raises:
        ValueError: the file does not exist, is no text in UTF-8, or holds no prompt.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} with prompts.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8; prompts are read one a line.") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line.")
    once = list(dict.fromkeys(prompts))
    if len(once) < len(prompts):
        warnings.warn(f"{path} repeats {len(prompts) - len(once)} prompts; they are run once.", stacklevel=2)
    return once


def builtin_prompts(model: str) -> list[str]:
    """The prompts that come with the library for a model of the zoo.

    Raises:
        ValueError: there are none for this model.
    """
    if model not in _BUILT_IN:
        raise ValueError(f"there are no built-in prompts for {model}; give a text file with --prompts, one a line.")
    return read_prompts(_BUILT_IN[model])
