"""Wave functions of DeepQMC: samples drawn in its own environment and read from a file.

DeepQMC (Z. Schätzle et al., J. Chem. Phys. 159, 094108, 2023) pins old versions of JAX, NumPy and SciPy. It is never imported
here, nor are its pickles read: :func:`export_samples` runs ``export.py`` of this folder with the Python of DeepQMC's
    environment,
which writes a file of samples: numbers and JSON with a digest.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...calculators.qmc.storage import load_samples
from ...calculators.qmc.wave_function.sampling import ElectronSamples
from ...core.errors import ConfigurationError, WorkerError

EXPORT = Path(__file__).with_name("export.py")
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
"""Compatible versions, for ``pip install -r`` into DeepQMC's environment."""


def export_samples(
    python: str | os.PathLike[str],
    training: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: Sequence[str] = (),
) -> ElectronSamples:
    """Draw samples from a checkpoint of DeepQMC, write them to ``output`` and return them.

    The checkpoint is a pickle, and DeepQMC runs the code in it. Export only checkpoints that you trust.

    Args:
        python: Python interpreter of an environment with DeepQMC.
        training: ``training`` directory of a run of DeepQMC.
        output: path of the file of samples.
        options: options of ``export.py``, such as ``["--walkers", "1024", "--sweeps", "100"]``.

    Raises:
        ConfigurationError: when interpreter or directory are missing.
        WorkerError: when the export fails; the message contains the end of its output.
        ModelFileError: when its file cannot be used.
    """
    if not Path(python).is_file():
        raise ConfigurationError(
            f"{python}: there is no such Python. Make an environment with DeepQMC: python3.11 -m venv ENV; "
            f"ENV/bin/pip install -r {REQUIREMENTS}; and give ENV/bin/python"
        )
    if not Path(training).is_dir():
        raise ConfigurationError(
            f"{training}: there is no such directory. Give the training directory of DeepQMC's run"
        )
    done = subprocess.run(
        [str(python), str(EXPORT), str(Path(training).absolute()), str(Path(output).absolute()), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        end = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise WorkerError(f"the export from {training} failed with code {done.returncode}:\n{end}")
    return load_samples(output)
