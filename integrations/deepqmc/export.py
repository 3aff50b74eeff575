"""Draw samples from a DeepQMC checkpoint and write them for flowbridge. Runs in DeepQMC's environment, without flowbridge.

    ENVIRONMENT/bin/python export.py DIRECTORY/training samples.safetensors

``flowbridge deepqmc`` calls it that way. DeepQMC needs old versions of JAX, NumPy and SciPy, hence an environment of its own
(``requirements.txt`` in this folder), and a file is exchanged. DeepQMC's checkpoint is a pickle, and reading a pickle runs
code: export only checkpoints that you trust. The written file holds numbers and JSON only; its layout is in
    ``flowbridge/calculators/qmc/files.py``.

Written for DeepQMC 1.2.0. All electrons, one molecule, the electronic ground state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLANK = "0" * 64
Arrays = dict[str, "np.ndarray[Any, Any]"]


class Restored(NamedTuple):
    """A wave function of DeepQMC with its parameters bound.

    Attributes:
        molecule: in flowbridge's format: numbers, positions in bohr, charge, spin.
        log_density: ``ln |Psi|^2`` of electrons ``(N, 3)`` in bohr, spin up first.
        local_energy: local energy of the same, Hartree.
        walkers: final positions ``(W, N, 3)`` of the training.
    """

    molecule: dict[str, Any]
    log_density: Callable[[Any], Any]
    local_energy: Callable[[Any], Any]
    walkers: Any


def restore(directory: Path, checkpoint: str) -> Restored:
    """Return the wave function of a training directory of DeepQMC; ``checkpoint`` is a file name, or LAST."""
    import deepqmc  # noqa: F401  # before JAX, because it configures JAX
    import hydra
    import jax
    import jax.numpy as jnp
    from deepqmc.app import instantiate_ansatz, task_from_workdir
    from deepqmc.parallel import select_one_device
    from deepqmc.types import PhysicalConfiguration

    if not (directory / ".hydra" / "config.yaml").is_file():
        sys.exit(
            f"{directory}: no training directory of DeepQMC: it has no .hydra/config.yaml. Give DIRECTORY/training"
        )
    config, _, state = task_from_workdir(str(directory), checkpoint)
    hamiltonian = hydra.utils.instantiate(config.task.hamil, _convert_="all")
    if bool(hamiltonian.ecp_mask.any()):
        sys.exit("this wave function has effective core potentials: its density lacks the core. Train without ecp_type")
    ansatz = instantiate_ansatz(
        hamiltonian, hydra.utils.instantiate(config.task.ansatz, _recursive_=True, _convert_="all")
    )
    parameters = jax.tree_util.tree_map(lambda leaf: leaf[0], select_one_device(state.params))
    electrons = hamiltonian.n_up + hamiltonian.n_down
    molecule = hamiltonian.mol
    places = jnp.asarray(molecule.coords)
    energy = hamiltonian.local_energy(ansatz.apply)

    def configuration(r: Any) -> Any:
        return PhysicalConfiguration(places, r, jnp.array(0))

    return Restored(
        {
            "numbers": [int(number) for number in molecule.charges],
            "positions": np.asarray(molecule.coords, dtype=float).tolist(),
            "charge": int(molecule.charge),
            "spin": int(hamiltonian.n_up - hamiltonian.n_down),
        },
        lambda r: 2.0 * ansatz.apply(parameters, configuration(r)).log,
        lambda r: energy(None, parameters, configuration(r))[0],
        state.sampler["elec"]["r"].reshape(-1, electrons, 3),
    )


def draw(found: Restored, options: argparse.Namespace) -> tuple[Arrays, float]:
    """Return samples ``(S, W, ...)`` by Metropolis-adjusted Langevin moves of all electrons, and the acceptance."""
    import jax
    import jax.numpy as jnp

    evaluate = jax.vmap(jax.value_and_grad(found.log_density))
    energies = jax.jit(jax.vmap(found.local_energy))
    key = jax.random.PRNGKey(options.seed)
    walkers = found.walkers[jnp.arange(options.walkers) % len(found.walkers)]
    charges = jnp.asarray(found.molecule["numbers"], dtype=walkers.dtype)
    nuclei = jnp.asarray(found.molecule["positions"], dtype=walkers.dtype)

    def proposal(r: Any, score: Any, step: Any) -> tuple[Any, Any]:
        square = jnp.square(r[:, :, None] - nuclei).sum(3)
        variance = step / (1.0 / 1.5 + (1.0 / (square + charges**-2)).sum(2, keepdims=True))
        size = 0.5 * jnp.square(score).sum(2, keepdims=True) * variance
        return variance, 0.5 * score * variance * (2.0 / (1.0 + jnp.sqrt(1.0 + size)))

    def forward(start: Any, end: Any, variance: Any, drift: Any) -> Any:
        return (-0.5 * jnp.square(end - start - drift) / variance - 0.5 * jnp.log(variance)).sum((1, 2))

    def move(carry: Any, key: Any) -> tuple[Any, Any]:
        r, value, score, step = carry
        one, two = jax.random.split(key)
        variance, drift = proposal(r, score, step)
        new = r + drift + jnp.sqrt(variance) * jax.random.normal(one, r.shape)
        new_value, new_score = evaluate(new)
        back_variance, back_drift = proposal(new, new_score, step)
        ratio = new_value - value + forward(new, r, back_variance, back_drift) - forward(r, new, variance, drift)
        taken = jnp.log(jax.random.uniform(two, ratio.shape)) < ratio
        chosen = (
            jnp.where(taken[:, None, None], new, r),
            jnp.where(taken, new_value, value),
            jnp.where(taken[:, None, None], new_score, score),
        )
        return (*chosen, step), taken.mean()

    moves = jax.jit(lambda carry, keys: jax.lax.scan(move, carry, keys))
    value, score = jax.jit(evaluate)(walkers)
    carry = (walkers, value, score, jnp.asarray(0.2))
    for _ in range(max(1, options.equilibration // options.interval)):
        key, part = jax.random.split(key)
        carry, accepted = moves(carry, jax.random.split(part, options.interval))
        factor = jnp.clip((accepted.mean() + 0.05) / 0.65, 0.7, 1.4)
        carry = (*carry[:3], carry[3] * factor)
    recorded: list[Arrays] = []
    rates = []
    for sweep in range(options.sweeps):
        key, part = jax.random.split(key)
        carry, accepted = moves(carry, jax.random.split(part, options.interval))
        rates.append(float(accepted.mean()))
        r, value, score, _ = (np.asarray(one, dtype=np.float64) for one in carry)
        potential = coulomb(found.molecule, r)
        total = np.asarray(energies(carry[0]), dtype=np.float64)
        recorded.append(
            {
                "positions": r,
                "scores": score,
                "kinetic": total - potential,
                "potential": potential,
                "log_absolute": 0.5 * value,
            }
        )
        if sys.stderr.isatty():
            print(f"\r{sweep + 1}/{options.sweeps} sweeps", end="", file=sys.stderr, flush=True)
    return {name: np.stack([one[name] for one in recorded]) for name in recorded[0]}, float(np.mean(rates))


def coulomb(molecule: dict[str, Any], r: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the Coulomb energy ``(W,)`` in Hartree of electrons ``(W, N, 3)`` and nuclei."""
    charges, nuclei = np.asarray(molecule["numbers"], dtype=float), np.asarray(molecule["positions"])
    attraction = (charges / np.linalg.norm(r[:, :, None] - nuclei, axis=3)).sum((1, 2))
    i, j = np.triu_indices(r.shape[1], 1)
    repulsion = (1.0 / np.linalg.norm(r[:, i] - r[:, j], axis=2)).sum(1)
    a, b = np.triu_indices(len(charges), 1)
    nuclear = (charges[a] * charges[b] / np.linalg.norm(nuclei[a] - nuclei[b], axis=1)).sum()
    return np.asarray(nuclear + repulsion - attraction)


def encode(molecule: dict[str, Any], samples: Arrays, acceptance: float) -> bytes:
    """Return the bytes of flowbridge's file of samples: safetensors with JSON and a digest of the whole file."""
    document = json.dumps(
        {
            "digest": BLANK, "format": "flowbridge-qmc", "version": 1, "kind": "samples", "molecule": molecule,
            "acceptance": acceptance, "source": "deepqmc",
        }
    )  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"flowbridge": document}}
    data, end = [], 0
    for name, array in sorted(samples.items()):
        data.append(np.ascontiguousarray(array, dtype="<f8").tobytes())
        header[name] = {"dtype": "F64", "shape": list(array.shape), "data_offsets": [end, end + len(data[-1])]}
        end += len(data[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blob = len(text).to_bytes(8, "little") + text + b"".join(data)
    return blob.replace(BLANK.encode(), hashlib.sha256(blob).hexdigest().encode(), 1)


def main() -> None:
    """Export the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="training directory of DeepQMC")
    parser.add_argument("output", type=Path, help="file of samples to write")
    parser.add_argument(
        "--checkpoint", default="LAST", help="file name, such as chkpt-1000.pt; the last one by default"
    )
    parser.add_argument("--walkers", type=int, default=512)
    parser.add_argument("--sweeps", type=int, default=60, help="recorded configurations of each walker")
    parser.add_argument("--interval", type=int, default=8, help="moves between recorded configurations")
    parser.add_argument("--equilibration", type=int, default=200, help="moves before the first one")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = restore(options.directory, options.checkpoint)
    samples, acceptance = draw(found, options)
    blob = encode(found.molecule, samples, acceptance)
    part = options.output.with_name(f".{options.output.name}.{os.getpid()}.part")
    part.write_bytes(blob)
    part.replace(options.output)
    energies = (samples["kinetic"] + samples["potential"]).mean(0)
    error = energies.std(ddof=1) / len(energies) ** 0.5
    print(f"{options.output}: energy {energies.mean():.5f} +- {error:.5f} Hartree, acceptance {acceptance:.2f}")


if __name__ == "__main__":
    main()
