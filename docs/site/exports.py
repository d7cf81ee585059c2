"""What mkdocstrings is told of modules that make their ``__all__`` as they run."""

from __future__ import annotations

from typing import Any

import griffe


class AllThatIsThere(griffe.Extension):
    """Exports whatever is public of a module that does not say it in so many words."""

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        if mod.exports == []:
            mod.exports = None
