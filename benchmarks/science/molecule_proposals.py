"""Molecules from builders and from what they are compared with: random placement, and random isomers of RDKit's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from rdkit import Chem

from flowbridge.core.errors import CoordinateError
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.formulas import ELEMENTS, VALENCES, Formula
from flowbridge.flows.molecules.partial_molecules import COVALENT_RADII
from flowbridge.flows.molecules.training.evaluation import Geometry
from flowbridge.integrations.rdkit.isomers import enumerate_isomers
from flowbridge.integrations.rdkit.molecular_graphs import embed

Proposals = Callable[[Formula, int], Iterator[Geometry]]
"""Gives molecules of a formula without end, by a seed."""

_RADII = dict(zip(ELEMENTS, COVALENT_RADII, strict=True))
_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_ORDERS = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
_PORTION = 100
_CLEARANCE = 1.3  # times the sum of radii, between atoms that are not bonded
_DIRECTIONS = 50  # that are tried for one atom


def from_builder(builder: MoleculeBuilder) -> Proposals:
    """Return the samples of a builder."""

    def propose(formula: Formula, seed: int) -> Iterator[Geometry]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            built = builder.sample(formula, _PORTION, generator)
            for index in range(_PORTION):
                numbers, positions = built.molecule(index)
                yield numbers.numpy(), positions.numpy()

    return propose


def random_placement(formula: Formula, seed: int) -> Iterator[Geometry]:
    """Place heavy atoms, then hydrogens, each at a bond's length from a random atom with a free valence.

    Directions are random, as long as no other atom is too near; where a formula is unsaturated, valences stay free.
    """
    generator = np.random.default_rng(seed)
    symbols = [symbol for symbol, count in zip(ELEMENTS, formula.counts, strict=True) for _ in range(count)]
    heavy, hydrogens = [s for s in symbols if s != "H"], [s for s in symbols if s == "H"]
    while True:
        placed = _place([str(symbol) for symbol in generator.permutation(heavy)] + hydrogens, generator)
        if placed is not None:
            yield placed


def _place(symbols: list[str], generator: np.random.Generator) -> Geometry | None:
    positions = np.zeros((1, 3))
    free = [VALENCES[symbols[0]]]
    for index, symbol in enumerate(symbols[1:], 1):
        open_atoms = [atom for atom in range(index) if free[atom] > 0]
        if not open_atoms:
            return None
        focus = int(generator.choice(open_atoms))
        position = _free_direction(symbols, positions, focus, symbol, generator)
        if position is None:
            return None
        positions = np.vstack([positions, position])
        free[focus] -= 1
        free.append(VALENCES[symbol] - 1)
    return np.array([_NUMBERS[symbol] for symbol in symbols]), positions


def _free_direction(
    symbols: list[str], positions: np.ndarray, focus: int, symbol: str, generator: np.random.Generator
) -> np.ndarray | None:
    reach = np.array([_RADII[s] + _RADII[symbol] for s in symbols[: len(positions)]])
    for _ in range(_DIRECTIONS):
        direction = generator.standard_normal(3)
        position = positions[focus] + reach[focus] * direction / np.linalg.norm(direction)
        near = np.linalg.norm(positions - position, axis=1) < _CLEARANCE * reach
        near[focus] = False
        if not near.any():
            placed: np.ndarray = position
            return placed
    return None


def random_isomers(formula: Formula, seed: int) -> Iterator[Geometry]:
    """Grow random molecular graphs, and embed them with RDKit (distance geometry, MMFF94), afresh each time."""
    generator = random.Random(seed)
    while True:
        smiles = _random_graph(formula, generator)
        geometry = None if smiles is None else _embedded(smiles, generator.randrange(2**31))
        if geometry is not None:
            yield geometry


def all_isomers(formula: Formula, seed: int) -> Iterator[Geometry]:
    """Embed every isomer, in random order, and then again."""
    generator = random.Random(seed)
    isomers = enumerate_isomers(formula)
    generator.shuffle(isomers)
    while True:
        for smiles in isomers:
            geometry = _embedded(smiles, generator.randrange(2**31))
            if geometry is not None:
                yield geometry


def _embedded(smiles: str, seed: int) -> Geometry | None:
    try:
        return embed(smiles, seed)
    except CoordinateError:
        return None


def _random_graph(formula: Formula, generator: random.Random) -> str | None:
    symbols = [s for s, n in zip(ELEMENTS, formula.counts, strict=True) for _ in range(n) if s != "H"]
    generator.shuffle(symbols)
    graph = Chem.RWMol()
    free = []
    for symbol in symbols:
        new = graph.AddAtom(Chem.Atom(symbol))
        if new:
            open_atoms = [atom for atom in range(new) if free[atom] > 0]
            if not open_atoms:
                return None
            focus = generator.choice(open_atoms)
            graph.AddBond(focus, new, _ORDERS[1])
            free[focus] -= 1
        free.append(VALENCES[symbol] - (1 if new else 0))
    for _ in range(formula.unsaturation):
        open_atoms = [atom for atom, left in enumerate(free) if left > 0]
        if len(open_atoms) < 2:
            return None
        i, j = generator.sample(open_atoms, 2)
        bond = graph.GetBondBetweenAtoms(i, j)
        if bond is None:
            graph.AddBond(i, j, _ORDERS[1])
        elif int(bond.GetBondTypeAsDouble()) < len(_ORDERS):
            bond.SetBondType(_ORDERS[int(bond.GetBondTypeAsDouble()) + 1])
        else:
            return None
        free[i] -= 1
        free[j] -= 1
    molecule = graph.GetMol()
    Chem.SanitizeMol(molecule)
    return str(Chem.MolToSmiles(molecule))
