"""Build a capped amino acid (ACE-X-NME) as a PDB file: RDKit places the heavy atoms, OpenMM adds hydrogens.

python examples/build_dipeptide.py ALA examples/alanine_dipeptide.pdb
"""

import sys

import openmm
from openmm import app, unit
from rdkit import Chem
from rdkit.Chem import AllChem

# Heavy atoms in the order of the SMILES, by the names that Amber's residue templates use (L-amino acids).
CAPPED = {
    "ALA": ("CC(=O)N[C@@H](C)C(=O)NC", "N CA CB C O"),
    "PRO": ("CC(=O)N1[C@@H](CCC1)C(=O)NC", "N CA CB CG CD C O"),
}


def build(residue: str, seed: int = 1) -> tuple[app.Topology, list[openmm.Vec3]]:
    """Return the topology and the minimised positions (Amber ff96 + OBC) of ACE-residue-NME."""
    smiles, backbone = CAPPED[residue]
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=seed)
    AllChem.MMFFOptimizeMolecule(molecule)
    coordinates = molecule.GetConformer().GetPositions() / 10.0
    labels = [("ACE", name) for name in ("CH3", "C", "O")]
    labels += [(residue, name) for name in backbone.split()] + [("NME", "N"), ("NME", "C")]

    topology = app.Topology()
    chain = topology.addChain()
    residues = {name: topology.addResidue(name, chain) for name in ("ACE", residue, "NME")}
    atoms = [
        topology.addAtom(
            name, app.Element.getByAtomicNumber(molecule.GetAtomWithIdx(i).GetAtomicNum()), residues[owner]
        )
        for i, (owner, name) in enumerate(labels)
    ]
    for bond in molecule.GetBonds():
        if max(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) < len(atoms):
            topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])

    force_field = app.ForceField("amber96.xml", "amber96_obc.xml")
    modeller = app.Modeller(topology, [openmm.Vec3(*row) for row in coordinates[: len(atoms)]] * unit.nanometer)
    modeller.addHydrogens(force_field, platform=openmm.Platform.getPlatformByName("Reference"))
    simulation = app.Simulation(
        modeller.topology,
        force_field.createSystem(modeller.topology, nonbondedMethod=app.NoCutoff, constraints=None),
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    simulation.context.setPositions(modeller.positions)
    simulation.minimizeEnergy()
    return modeller.topology, simulation.context.getState(getPositions=True).getPositions()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in CAPPED:
        raise SystemExit(f"usage: python {sys.argv[0]} {'|'.join(CAPPED)} OUTPUT.pdb")
    topology, positions = build(sys.argv[1])
    with open(sys.argv[2], "w") as stream:
        app.PDBFile.writeFile(topology, positions, stream)
