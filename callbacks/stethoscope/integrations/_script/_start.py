"""Before the script: wait for torch, which the script imports when it likes, with the environment it likes."""

from __future__ import annotations

import atexit
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

from stethoscope.integrations._script._settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from stethoscope.integrations._script._script import Script


class _Waiting(MetaPathFinder):
    """Calls the script's listener to life as soon as torch has been imported.

    It must not be imported earlier: scripts set `OMP_NUM_THREADS` and the like right before, which changes results.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.script: Script | None = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        try:
            return self._find(name)
        except Exception as error:  # the import must not fail for us
            _failed(error)
            return None

    def _find(self, name: str) -> ModuleSpec | None:
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_listen(module: ModuleType) -> None:
            execute(module)
            try:
                del spec.loader.exec_module  # type: ignore[union-attr]
                from stethoscope.integrations._script._script import Script

                self.script = Script(self.settings)
                self.script.begin()
            except Exception as error:
                _failed(error)

        spec.loader.exec_module = execute_and_listen  # type: ignore[method-assign]
        return spec

    def end(self) -> None:
        """Have the last word: what is registered first is run last."""
        from stethoscope.integrations._script import _say

        if self.script is not None:
            self.script.end()
        elif _say.is_main(self.settings):
            _say.nothing(self.settings)


def begin() -> None:
    """Called by `startup/sitecustomize.py`."""
    try:
        settings = Settings.found()
        if settings is not None:
            waiting = _Waiting(settings)
            sys.meta_path.insert(0, waiting)
            atexit.register(waiting.end)
    except Exception as error:
        _failed(error)


def _failed(error: Exception) -> None:
    from stethoscope._secrets import trace_of
    from stethoscope.integrations._script import _say

    _say.say(f"`stethoscope run` has failed before the script began; nothing is observed.\n{trace_of(error)}")
