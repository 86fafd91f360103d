"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_folder(folder: Path, name: str) -> Iterator[Path]:
    """A draft beside `folder`, which gets its name at the end. After an exception neither the draft nor the folders
    that were made above it are left.

    Args:
        name: what the user calls the folder, for the message.

    Raises:
        OSError: one sentence with `name` and the folder.
    """
    above = [path for path in (folder.parent, *folder.parent.parents) if not os.path.lexists(path)]
    draft = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
        yield draft
        draft.chmod(0o755)  # mkdtemp's is for the owner alone
        draft.rename(folder)
    except BaseException as error:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        for path in above:
            with suppress(OSError):  # not made, or somebody else's files are in it
                path.rmdir()
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or error
            raise OSError(f"{name} {folder}: it could not be written: {why}") from None
        raise
