"""All constitutional isomers of a formula, identified by RDKit's canonical SMILES."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...core.errors import ConfigurationError, MissingDependencyError
from ...flows.molecules.formulas import ELEMENTS, Formula
from .molecular_graphs import BOND_TYPES

try:
    from rdkit import Chem
except ImportError as error:
    raise MissingDependencyError("isomers need RDKit: pip install 'flowbridge[molecules]'") from error

_LARGEST = 200_000  # graphs of one level; more take too much memory and time

_Graphs = dict[str, Chem.RWMol]


def enumerate_isomers(formula: Formula) -> list[str]:
    """Return canonical SMILES, sorted, of all connected molecules of a formula in which every atom has its usual valence.

    Stereoisomers count once, and so do the Kekulé structures of an aromatic ring. Strained and unstable graphs are included,
    formal charges (nitro groups, carbon monoxide) are not. All trees of single bonds are grown atom by atom; then one bond is
    added or raised in order for each degree of unsaturation, and duplicates are removed each time.

    Raises:
        ConfigurationError: for a formula without heavy atoms, or with too many isomers.
    """
    if not formula.heavy_atoms:
        raise ConfigurationError(f"{formula} has no heavy atoms, and one isomer: there is nothing to enumerate")
    graphs = _trees(formula)
    for _ in range(formula.unsaturation):
        graphs = _distinct(_with_one_more_bond(graphs.values()), formula)
    return sorted({_aromatic_smiles(graph) for graph in graphs.values()})


def _trees(formula: Formula) -> _Graphs:
    left = {symbol: count for symbol, count in zip(ELEMENTS, formula.counts, strict=True) if symbol != "H" and count}
    graphs = _distinct((Chem.RWMol(Chem.MolFromSmiles(symbol)) for symbol in left), formula)
    for _ in range(formula.heavy_atoms - 1):
        graphs = _distinct(_with_one_more_atom(graphs.values(), left), formula)
    return graphs


def _with_one_more_atom(graphs: Iterable[Chem.RWMol], allowed: dict[str, int]) -> Iterator[Chem.RWMol]:
    for graph in graphs:
        present = [atom.GetSymbol() for atom in graph.GetAtoms()]
        for symbol, count in allowed.items():
            if present.count(symbol) >= count:
                continue
            for place in _unsaturated_atoms(graph):
                grown = Chem.RWMol(graph)
                grown.AddBond(place, grown.AddAtom(Chem.Atom(symbol)), BOND_TYPES[1])
                yield grown


def _with_one_more_bond(graphs: Iterable[Chem.RWMol]) -> Iterator[Chem.RWMol]:
    for graph in graphs:
        free = _unsaturated_atoms(graph)
        for number, i in enumerate(free):
            for j in free[:number]:
                grown = Chem.RWMol(graph)
                bond = grown.GetBondBetweenAtoms(i, j)
                if bond is None:
                    grown.AddBond(i, j, BOND_TYPES[1])
                elif int(bond.GetBondTypeAsDouble()) < len(BOND_TYPES):
                    bond.SetBondType(BOND_TYPES[int(bond.GetBondTypeAsDouble()) + 1])
                else:
                    continue
                yield grown


def _unsaturated_atoms(graph: Chem.RWMol) -> list[int]:
    return [atom.GetIdx() for atom in graph.GetAtoms() if atom.GetTotalNumHs() > 0]


def _distinct(graphs: Iterable[Chem.RWMol], formula: Formula) -> _Graphs:
    """Return one graph of each kind, without aromaticity: later steps depend on the positions of double bonds."""
    found: _Graphs = {}
    for graph in graphs:
        graph.UpdatePropertyCache()
        found.setdefault(Chem.MolToSmiles(graph), graph)
        if len(found) > _LARGEST:
            raise ConfigurationError(
                f"{formula} has more than {_LARGEST} partial isomers, too many to enumerate: take a smaller formula"
            )
    return found


def _aromatic_smiles(graph: Chem.RWMol) -> str:
    molecule = Chem.Mol(graph)
    Chem.SanitizeMol(molecule)
    return Chem.MolToSmiles(molecule)
