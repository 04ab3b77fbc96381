"""`stethoscope audit audio`: what is wrong with audio files?"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from stethoscope.cli._show import show

if TYPE_CHECKING:
    from stethoscope.audits import AudioReport

_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"}


def audio(
    files: Annotated[list[Path], typer.Argument(help="Audio files, or folders of them.")],
    sample_rate: Annotated[int, typer.Option(help="Hz, of the model.")],
    channels: Annotated[int, typer.Option(help="Channels that the model takes.")] = 1,
    saving: Annotated[bool, typer.Option("--saving", help="These are outputs: a peak above 1 is a problem.")] = False,
    min_seconds: Annotated[float, typer.Option(help="Shortest useful item.")] = 0.025,
    max_seconds: Annotated[float | None, typer.Option(help="Longest item that the model can take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Examine audio files: rate, channels, clipping, silence, DC, duplicates."""

    def audit() -> AudioReport:
        from stethoscope import audits

        found = [path for file in files for path in (_inside(file) if file.is_dir() else [file])]
        if not found:
            raise ValueError(f"No audio files in {', '.join(map(str, files))}. Known: {', '.join(sorted(_SUFFIXES))}.")
        return audits.audio(
            found,
            sample_rate=sample_rate,
            channels=channels,
            saving=saving,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
        )

    show(audit, as_json=as_json)


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
