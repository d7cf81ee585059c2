"""What may be said about resources and errors: in metric labels little, in events more.

Laws:
    A label never holds a subject, a qualifier or a rendered key: the number of time series must
    not grow with the number of resources. Events name the resource in full.
    An event never holds an exception object, only the name of its type and one line of text.
"""

from __future__ import annotations

from coalestra.core.failures import SourceFailure, folded_message, message_of
from coalestra.core.keys import ResourceKey

Reported = BaseException | SourceFailure
"""What went wrong: an exception, or the record that was made of one."""


def labels_of(key: ResourceKey) -> dict[str, str]:
    """Return the labels that say what kind of resource ``key`` is, and not which one."""
    return {"resource_namespace": key.namespace, "resource_name": key.name}


def error_type_of(error: Reported) -> str:
    """Return the name of the exception type behind ``error``."""
    return error.error_type if isinstance(error, SourceFailure) else type(error).__name__


def error_text_of(error: Reported) -> str:
    """Return the message of ``error`` in one bounded line; never raises an ``Exception``."""
    message = error.message if isinstance(error, SourceFailure) else message_of(error)
    return folded_message(message)
