"""The report of an attachment: what its guidance did in the generation that is running or ran last."""

from ..attach import Attachment
from .edits import Report, Tally
from .steering import Steering


def report(attachment: Attachment) -> Report:
    """Layers, steps, rows and norms; waits for the device.

    Raises:
        ValueError: no method of the attachment guides inside attention.
        RuntimeError: nothing was generated yet.
    """
    for number, method in enumerate(attachment.methods):
        if isinstance(method, Steering):
            return Tally.of(attachment.notes(number)).report()
    raise ValueError(f"none of {', '.join(map(str, attachment.methods))} guides inside attention")
