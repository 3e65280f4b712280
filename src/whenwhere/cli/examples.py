"""How help is set: paragraphs that flow, and examples at the end."""

import inspect


def examples(*commands: str) -> str:
    """Commands as an epilog that rich prints one below the other."""
    return "Examples:\n\n" + "\n\n".join(f"[cyan]whenwhere {command}[/cyan]" for command in commands)


def flowing(docstring: str | None) -> str:
    """A docstring whose paragraphs are one line each, to be broken where the terminal ends."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
