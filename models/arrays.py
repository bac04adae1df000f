"""Arrays as files."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flowsage.models.columns import Array


def write_arrays(arrays: Mapping[str, Array], path: Path) -> None:
    """Arrays as a safetensors file, for whom the umask lets read it: left alone, the library lets only its owner."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file({k: np.asarray(a, order="C") for k, a in arrays.items()}, path)
    path.chmod(mode)
