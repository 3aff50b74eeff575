"""Models behind the i-PI protocol: i-PI, and every other program that asks for forces over a socket."""

from __future__ import annotations

from pathlib import Path

import ase.io
from ase.calculators.socketio import SocketClient

from ..calculators.potential_calculator import PotentialCalculator
from ..core.errors import ConfigurationError


def serve(
    model: Path, structure: Path, *, unix: str | None = None, host: str = "localhost", port: int | None = None
) -> None:
    """Answer a driver's questions until it hangs up.

    ASE's client (:class:`ase.calculators.socketio.SocketClient`) speaks the protocol of i-PI (V. Kapil et al., Comput. Phys.
    Commun. 236, 214 (2019)); the driver has to be listening already.

    Args:
        model: a model file.
        structure: any file ASE reads, with the model's atoms in the driver's order; positions do not matter.
        unix: name of a UNIX socket, ``/tmp/ipi_NAME`` by the protocol's custom.
        host: of the driver, for TCP.
        port: of the driver, for TCP.

    Raises:
        ConfigurationError: when neither or both of a UNIX socket and a port are given, the structure cannot be read, or nobody
            listens there.
        MoleculeMismatchError: when the structure's atoms are not the model's.
    """
    if (unix is None) == (port is None):
        raise ConfigurationError("give exactly one of a UNIX socket and a port: where the driver listens")
    try:
        atoms = ase.io.read(structure)
    except Exception as error:
        raise ConfigurationError(f"ASE cannot read one structure from {structure}: {error}") from error
    if isinstance(atoms, list):
        raise ConfigurationError(f"{structure} holds {len(atoms)} structures, expected one")
    atoms.calc = PotentialCalculator(model)
    atoms.get_potential_energy()  # compiles where that is due, and refuses another molecule, before the driver waits
    address = f"/tmp/ipi_{unix}" if unix is not None else f"{host}:{port}"
    try:
        client = SocketClient(host=host, port=port, unixsocket=unix)
    except OSError as error:
        raise ConfigurationError(f"nobody listens at {address} ({error}): start the driver first") from error
    # Stress is asked for where there is a cell to strain; a molecule has none.
    client.run(atoms, use_stress=atoms.calc.potential.metadata.periodic)
