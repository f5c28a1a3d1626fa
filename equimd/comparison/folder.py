"""Where a comparison writes, what it leaves there until it is finished, and how it finds that again."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equimd.errors import InputError
from equimd.report import RESULTS_FILE, CompareResult, load_results
from equimd.report.comparison import CompareSettings
from equimd.results import write_text_atomically

UNFINISHED_FILE = "unfinished.json"
LABELS_ENDING = "-labels.json"
_ENDINGS = (".h5.state.json", "-nve.h5.state.json", LABELS_ENDING)


class Folder:
    """Where files are written: the folder itself if it is new, else a fresh one inside it until all is done.

    A file there says what is compared until it is finished, so that ``resume`` finds what there is and goes on with it.
    """

    def __init__(self, output: str | Path | None, overwrite: bool, resume: bool) -> None:
        self.output = None if output is None else Path(output)
        self.overwrite, self.resume, self.made = overwrite, resume, False

    def __enter__(self) -> "Folder":
        if self.output is None:
            self.path = Path(tempfile.mkdtemp(prefix="equimd-"))
            return self
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output} is a file; accepted is a new folder")
        self.made = not self.output.exists()
        in_use = not self.made and any(self.output.iterdir())
        before = unfinished(self.output)
        if self.resume and before is not None:
            self.path = before
            return self
        if in_use and not self.overwrite:
            how = "choose another (-o) or pass --overwrite"
            what = "exists and is not empty" if before is None else "holds an unfinished comparison"
            how = how if before is None else f"go on with it by --resume, {how}"
            raise InputError(f"the output folder {self.output} {what}; {how}")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix="unfinished-", dir=self.output)) if in_use else self.output
        except OSError as error:
            raise InputError(f"cannot write to {self.output}: {error.strerror}") from error
        return self

    def begin(self, settings: CompareSettings, names: list[str]) -> None:
        """Note what is compared, or check that it is what was begun here.

        Raises:
            InputError: another setting or other potentials, named with both values.
        """
        file = self.path / UNFINISHED_FILE
        if file.exists():
            before = _read(file)
            check_same(before["potentials"], before["settings"], names, settings)
        else:
            write_text_atomically(file, json.dumps({"settings": settings.model_dump(), "potentials": names}))

    def __exit__(self, kind: object, *_: object) -> None:
        if self.output is None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        if kind is None:
            clear(self.path)
            if self.path != self.output:
                clear(self.output)  # what an earlier comparison, which this one replaces, left unfinished
                for path in sorted(self.path.iterdir()):
                    os.replace(path, self.output / path.name)
        elif not any(self.path.glob("*.h5")):
            clear(self.path)  # nothing was simulated that is worth going on with
        for path in (self.path, self.output):
            # A folder that holds nothing is not worth keeping; one that holds something is not ours to remove.
            if (path == self.path or self.made) and path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def unfinished(output: Path) -> Path | None:
    """The folder in which a comparison was begun and not finished: ``output`` or one inside it."""
    if not output.is_dir():
        return None
    found = [file.parent for file in (output / UNFINISHED_FILE, *output.glob(f"unfinished-*/{UNFINISHED_FILE}"))]
    found = [folder for folder in found if (folder / UNFINISHED_FILE).exists()]
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise InputError(f"{output} holds several unfinished comparisons ({names}); remove all but one")
    return found[0] if found else None


def finished(output: Path, names: list[str], formula: str, settings: CompareSettings) -> CompareResult | None:
    """The result of a comparison that ended in this folder; None if none did.

    Raises:
        InputError: its settings, structure or potentials are others.
    """
    if unfinished(output) is not None or not (output / RESULTS_FILE).exists():
        return None
    result = load_results(output)
    check_same([p.name for p in result.potentials], result.settings.model_dump(), names, settings)
    if result.formula != formula:
        raise InputError(f"cannot resume: the structure was {result.formula} and is {formula}")
    return result


def clear(folder: Path) -> None:
    """Remove what only an unfinished comparison needs."""
    from equimd.comparison.contestants import stem_of

    file = folder / UNFINISHED_FILE
    if not file.exists():
        return
    for name in _read(file)["potentials"]:
        for ending in _ENDINGS:
            (folder / (stem_of(name) + ending)).unlink(missing_ok=True)
    file.unlink()


def check_same(names_before: list[str], before: Mapping[str, Any], names: list[str], settings: CompareSettings) -> None:
    """Refuse to go on with other potentials or settings than a comparison was begun with, by name."""
    if names_before != names:
        raise InputError(f"cannot resume: the potentials were {', '.join(names_before)} and are {', '.join(names)}")
    for key, now in settings.model_dump().items():
        if before.get(key, now) != now:
            raise InputError(f"cannot resume: {key} was {before[key]!r} and is {now!r}")


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {"settings": dict(stored["settings"]), "potentials": [str(name) for name in stored["potentials"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} does not say what is compared there; remove it, or choose another folder") from error
