"""The report, written from stages as small as they can be: real molecules, frames, model files and samples."""

import json
import re
import shutil
from copy import copy
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from flowbridge.core.execution.executors import ProcessExecutor
from flowbridge.core.model_files.files import save
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.statistics.estimates import effective_sample_percent
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.openmm.energies.batched import OpenMMEnergy
from flowbridge.integrations.openmm.forces.particles import particles_from_topology
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, run_langevin, save_arrays
from flowbridge.workflows.boltzmann import reweight
from flowbridge.workflows.boltzmann.bonded_terms import angle_types, bond_types
from flowbridge.workflows.boltzmann.configuration import read_workflow
from flowbridge.workflows.boltzmann.figures import free_energy_map, normalised
from flowbridge.workflows.boltzmann.molecular_system import molecular_system
from flowbridge.workflows.boltzmann.report import report_page
from flowbridge.workflows.boltzmann.report_data import Torsions, gather
from flowbridge.workflows.boltzmann.requirements import Requirements, checks
from flowbridge.workflows.boltzmann.run_figures import running_effective_percent
from flowbridge.workflows.machines import Machines
from flowbridge.workflows.report import StageEntry, write_report
from flowbridge.workflows.runner import Outcome
from flowbridge.workflows.stages import Row, StageFolder

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = FlowConfiguration.model_validate(
    {"torsions": {"couplings": 2, "components": 4, "hidden": [8]}, "stiff": {"couplings": 2, "hidden": [8]}}
)
PHI_PSI = """
[molecule.torsions]
phi = ["ACE:C", "ALA:N", "ALA:CA", "ALA:C"]
psi = ["ALA:N", "ALA:CA", "ALA:C", "NME:N"]
[reweight.free_energy]
torsion = "phi"
interval = [0.0, 180.0]
[comparison.flow]
circular = "all"
[targets]
ess_percent = 90.0
"""
ONE_TORSION = '[molecule.torsions]\nomega = ["ACE:CH3", "ACE:C", "PRO:N", "PRO:CA"]\n'


class Run:
    """A finished run of a workflow, in the files that its stages leave."""

    def __init__(self, folder: Path, name: str, structure: str, tables: str):
        configuration = folder / "run.toml"
        configuration.write_text(
            f'seed = 3\noutput = "{folder / "output"}"\n[molecule]\nname = "{name}"\nstructure = "{EXAMPLES / structure}"\n'
            'force_field = ["amber96.xml", "amber96_obc.xml"]\n[reweight]\nsamples = 400\nbootstrap = 20\n' + tables
        )
        self.output = folder / "output"
        self.output.mkdir()
        self.workflow = read_workflow(configuration)
        self.molecule = molecular_system(self.workflow, folder)
        self.stages = {"simulate": self._simulate(folder)}
        self.stages["train"] = self._train("train")
        if self.workflow.comparison is not None:
            self.stages["comparison"] = self._train("comparison")
        self.stages["dynamics"] = self._dynamics()
        stage = reweight.reweighting_stage(self.workflow, self.molecule, Machines(ProcessExecutor(1)))
        self.stages["reweight"] = stage.completed(self.output, self.stages)
        self.results = self._results()

    def _simulate(self, folder: Path) -> StageFolder:
        stage = StageFolder.open(self.output, "simulate", {})
        run = LangevinRun(
            self.molecule.system_xml, self.molecule.positions, 300.0, 0.001, 5.0, 50, 5, 240, 1, folder / "frames.npz"
        )
        self.frames = run_langevin(run)
        for name, part in (("training", slice(0, 200)), ("held_out", slice(200, 240))):
            arrays = {key: getattr(self.frames, key)[part] for key in ("positions", "energies", "forces")}
            save_arrays(stage.folder / f"{name}.npz", **arrays)
        stage.finish(
            {
                "trajectories": 2, "steps": 1250, "nanoseconds": 0.00125, "training_frames": 200, "held_out_frames": 40,
                "equivalent_hydrogens": [[0, 2, 3]], "starts": ["beta", "PII"],
            }
        )  # fmt: skip
        return stage

    def _train(self, name: str) -> StageFolder:
        stage = StageFolder.open(self.output, name, {"seed": self.workflow.seed})
        particles = particles_from_topology(self.molecule.topology, self.molecule.system)
        torch.manual_seed(0)
        model = BoltzmannGenerator.untrained(particles, 300.0, self.frames.positions, TINY)
        digest = save(model, stage.folder / "model.flow")
        if name == "train":
            shutil.copyfile(stage.folder / "model.flow", self.output / "molecule.flow")
        steps = [50.0, 100.0, 150.0]
        curves = {
            "likelihood": [{"step": step, "nll": 10.0 - 0.01 * step} for step in steps],
            "refinement": [{"step": step, "effective_sample_fraction": 0.004 * step} for step in steps],
        }
        bias = {"circular": 0, "centre": 0.16, "concentration": 2.5, "height": 1.8125}
        stage.finish(
            {
                "curves": curves, "biases": [bias], "model_digest": digest,
                "parameters": sum(p.numel() for p in model.parameters()), "circular_torsions": 5,
            }
        )  # fmt: skip
        return stage

    def _dynamics(self) -> StageFolder:
        stage = StageFolder.open(self.output, "dynamics", {})
        random = np.random.default_rng(0)
        for worker in range(2):
            positions = self.frames.positions[random.integers(0, 240, (30, 8))].astype(np.float32)
            temperature = 300.0 + random.normal(0.0, 5.0, 30)
            save_arrays(stage.folder / f"langevin_{worker}_frames.npz", positions=positions, temperature=temperature)
        for name, steps in (("nve_flow_0", 500), ("nve_force_field_0", 500), ("ase_nve", 60)):
            save_arrays(stage.folder / f"{name}.npz", energy=-80.0 + random.normal(0.0, 0.4, steps))
        save_arrays(stage.folder / "ase_langevin.npz", energy=random.normal(300.0, 40.0, 60))
        results = {
            "nve_std_per_dof_kJ_mol": 0.0061875, "nve_std_per_dof_of_each_run_kJ_mol": [0.0061875],
            "force_field_nve_std_per_dof_kJ_mol": 0.0059375, "force_field_nve_std_per_dof_of_each_run_kJ_mol": [0.0059375],
            "ase_nve_std_per_dof_kJ_mol": 0.0060625, "ase_langevin_mean_temperature_K": 301.25,
            "langevin_nanoseconds": 0.5, "langevin_mean_temperature_K": 299.75,
            "force_rmse_kT_nm": 13.4375, "force_rmse_median_frame_kT_nm": 8.0625,
            "ase_openmm_max_force_difference": 2.5e-07, "openmm_direct_max_force_difference": 2.0e-07,
        }  # fmt: skip
        if len(self.workflow.molecule.torsions) > 1:
            results |= {
                "js_divergence_md_vs_samples": 0.0078125, "js_divergence_expected_from_noise": 0.0068359,
                "js_histogram_bins": 24,
            }  # fmt: skip
        stage.finish(results)
        return stage

    def _results(self) -> dict:
        done = {name: stage.results for name, stage in self.stages.items()}
        results = {"molecule": self.workflow.molecule.name, "seed": self.workflow.seed}
        for name in ("simulate", "train", "dynamics", "reweight"):
            hidden = {"wall_seconds", "profile", "curves"}
            results.update({key: value for key, value in done[name].items() if key not in hidden})
        if self.workflow.reweight.free_energy is not None:
            results |= {
                "training_delta_f_phi_kT": 1.6875, "reference_delta_f_phi_kT": 5.6875, "reference_delta_f_phi_error_kT": 0.0156
            }  # fmt: skip
        if "comparison" in self.stages:
            results["comparison"] = {
                "samples": 20000, "ess_percent": 31.5625, "force_rmse_kT_nm": 61.25,
                "force_rmse_median_frame_kT_nm": 55.5625, "parameters": 123457,
            }  # fmt: skip
        seconds = {
            "simulate": 40.25,
            "train": 200.5,
            "dynamics": 90.0,
            "comparison": 93.5,
            "reweight": 20.0,
            "total": 444.25,
        }
        return {**results, "failed": {}, "warnings": [], "wall_seconds": seconds}

    def report(self, reference: dict | None = None) -> Path:
        """Write the report as the runner does."""
        outcome = Outcome(self.stages, results=self.results)
        page = report_page(self.workflow, self.molecule, outcome, "molecule.flow", reference)
        difference = self.workflow.reweight.free_energy
        found = checks(self.results, difference and difference.torsion, self.workflow.targets)
        entries = [StageEntry("train", "likelihood", 200.5, (Row("parameters", "<12>", "a & b"),))]
        write_report(self.output / "report.html", page, self.results, entries, found)
        return self.output / "report.html"


REFERENCE = json.loads((EXAMPLES / "alanine_reference.json").read_text())


@pytest.fixture(scope="module")
def alanine_run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("alanine"), "alanine <dipeptide> & co", "alanine_dipeptide.pdb", PHI_PSI)


@pytest.fixture(scope="module")
def alanine_page(alanine_run) -> str:
    return alanine_run.report(REFERENCE).read_text("utf-8")


class Page(HTMLParser):
    """Collects what a page would load, its links and anchors, and whether its tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.loaded, self.links, self.anchors, self.text, self.open = [], [], set(), "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            assert attributes["id"] not in self.anchors, f"two elements with the id {attributes['id']}"
            self.anchors.add(attributes["id"])
        if tag in {"script", "link", "iframe", "object", "embed", "source"}:
            self.loaded.append(f"<{tag}>")
        self.loaded += [
            attributes[key] for key in ("src", "srcset", "data", "poster", "background") if key in attributes
        ]
        if tag == "a":
            self.links.append(attributes["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def numbers_of(content):
    for value in content.values() if isinstance(content, dict) else content:
        if isinstance(value, (dict, list)):
            yield from numbers_of(value)
        elif isinstance(value, (int, float)):
            yield value


def test_page_is_self_contained(alanine_page):
    page = Page(alanine_page)
    assert page.open == []
    assert page.loaded, "the page has no figures"
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert all(link.startswith("#") and link[1:] in page.anchors for link in page.links)
    without_images = re.sub(r"base64,[A-Za-z0-9+/=]+", "", alanine_page)
    assert not re.search(r"https?://|@import|url\(", without_images)


def test_page_holds_every_number(alanine_run, alanine_page):
    text = Page(alanine_page).text
    shown = {key: value for key, value in alanine_run.results.items() if key != "biases"}
    missing = [
        value for value in numbers_of(shown) if (f"{value:.6g}" if isinstance(value, float) else str(value)) not in text
    ]
    assert missing == []
    assert "1.81" in text  # the height of the bias
    assert alanine_run.stages["train"].results["model_digest"] in text


def test_names_are_escaped(alanine_page):
    assert "<h1>alanine &lt;dipeptide&gt; &amp; co</h1>" in alanine_page
    assert "&lt;12&gt;" in alanine_page
    assert "a &amp; b" in alanine_page


def test_bias_is_named_by_its_atoms(alanine_page):
    text = Page(alanine_page).text
    section = text[text.index("Biases that keep") :]
    assert re.search(r"(φ|ψ) \(\w+–\w+–\w+–\w+\)", section[:600])
    assert "58" in section[:600]  # 0.16 turns in degrees


def test_figures_are_pictures_with_something_in_them(alanine_run, alanine_page):
    files = {file.stem: file for file in (alanine_run.output / "figures").glob("*.png")}
    assert set(files) == {
        "ramachandran", "profile", "bonds", "angles", "energy", "weights", "energy_conservation", "temperature", "training",
    }  # fmt: skip
    for name, file in files.items():
        pixels = matplotlib.image.imread(file)[..., :3]
        assert pixels.shape[1] == 1500, name
        assert (pixels.min(axis=2) < 0.9).mean() > 0.005, f"{name} is nearly blank"
        assert f'id="{name}"' in alanine_page


def test_snippets_compile(alanine_page):
    blocks = re.findall(r"<pre><code>(.*?)</code></pre>", alanine_page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert "molecule.flow" in block
        compile(block.replace("&#34;", '"').replace("&amp;", "&"), "snippet", "exec")


@pytest.mark.parametrize(("name", "tables"), [("no torsions", ""), ("one torsion", ONE_TORSION)])
def test_molecule_without_torsions_or_reference(tmp_path, name, tables):
    run = Run(tmp_path, "proline dipeptide", "proline_dipeptide.pdb", tables)
    trained = run.stages["train"]
    (trained.folder / "results.json").write_text(json.dumps({**trained.results, "biases": []}))
    del run.results["biases"]
    page = Page(run.report().read_text("utf-8"))
    assert page.open == []
    assert ("torsion" in page.anchors) == bool(tables)
    assert not {"ramachandran", "profile", "free-energy"} & page.anchors
    assert "Biases that keep" not in page.text
    assert "Two architectures" not in page.text
    assert "delta_f" not in page.text
    assert "requirements" not in page.text.lower()  # none were set
    assert all(link[1:] in page.anchors for link in page.links)


@pytest.mark.parametrize("left", [("simulate", "train", "reweight"), ("simulate", "train")])
def test_what_a_run_has_not_done_is_left_out(tmp_path, alanine_run, left):
    """Skipped or failed dynamics cost the report its section, and a run that was stopped early has a report, too."""
    run = copy(alanine_run)
    run.output = tmp_path
    run.workflow = alanine_run.workflow.model_copy(update={"output": tmp_path})
    run.stages = {name: stage for name, stage in alanine_run.stages.items() if name in left}
    run.results = {**alanine_run.results, "failed": {"dynamics": "NaN in <step> 3"}, "warnings": ["a heavy sample"]}
    text = run.report(REFERENCE).read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert "dynamics failed: NaN in <step> 3" in page.text
    assert "a heavy sample" in page.text
    assert "energy_conservation" not in page.anchors
    assert ("ramachandran" in page.anchors) == ("reweight" in left)
    assert all(link[1:] in page.anchors for link in page.links)


def test_gathered_data_are_all_samples(alanine_run):
    run = alanine_run
    data = gather(run.workflow, run.molecule, run.stages)
    assert data.md_frames == 240
    assert len(data.flow.values["phi"]) == len(data.pooled_log_weights) == 800
    assert data.driven.values["psi"].shape == (2 * 30 * 8,)
    second = WeightedSamples.load(reweight.sample_file(run.stages["reweight"], 1))
    bond = data.bonds[0]
    types = {term.label: term for term in bond_types(second.particles)}
    i, j = types[bond.label].atoms[0]
    lengths = np.linalg.norm(second.positions[:, i] - second.positions[:, j], axis=1)
    np.testing.assert_allclose(bond.flow.reshape(-1, bond.terms)[400:, 0], lengths, rtol=1e-5)
    energies, _ = OpenMMEnergy(run.molecule.system, workers=1).energies_and_forces(second.positions[:5])
    np.testing.assert_allclose(data.energy.flow[400:405], energies / (0.0083144626 * 300.0), rtol=1e-6)


def test_bond_and_angle_types_of_alanine(alanine):
    bonds = {term.label: len(term.atoms) for term in bond_types(alanine.particles)}
    assert bonds == {
        "C(sp²)–C(sp³)": 2, "C(sp²)–N": 2, "C(sp³)–N": 2, "C=O": 2, "C(sp³)–C(sp³)": 1, "C–H": 10, "N–H": 2,
    }  # fmt: skip
    angles = angle_types(alanine.particles)
    assert sum(len(term.atoms) for term in angles) == 36
    carbonyl = next(term for term in bond_types(alanine.particles) if term.label == "C=O")
    assert {alanine.particles.names[j] for _, j in carbonyl.atoms} <= {"C", "O"}
    heavy = next(term for term in angles if term.label == "C–C(sp³)–N")
    assert {alanine.particles.names[vertex] for _, vertex, _ in heavy.atoms} == {"CA"}
    measured = heavy.values(alanine.positions[None])
    i, j, k = heavy.atoms[0]
    u, v = alanine.positions[i] - alanine.positions[j], alanine.positions[k] - alanine.positions[j]
    expected = np.degrees(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))
    assert measured[0, 0] == pytest.approx(expected, abs=1e-3)


def test_weights_shift_the_map():
    edges = np.arange(-180.0, 180.0, 6.0) + 3.0
    phi, psi = (grid.ravel() for grid in np.meshgrid(edges, edges, indexing="ij"))
    log_weights = np.where(phi > 0.0, -2.5, 0.0)
    torsions = Torsions({"phi": phi, "psi": psi}, log_weights)
    assert np.ptp(free_energy_map(torsions, "phi", "psi", weighted=False)) == pytest.approx(0.0)
    energies = free_energy_map(torsions, "phi", "psi", weighted=True)
    np.testing.assert_allclose(energies[:30], 0.0, atol=1e-12)
    np.testing.assert_allclose(energies[30:], 2.5)


def test_reference_profile_is_normalised_as_the_samples_are():
    edges = np.array(REFERENCE["profile_edges_degrees"])
    energies = normalised(np.array(REFERENCE["profile_kT"]) + 17.0, edges)
    share = np.exp(-energies) * np.diff(edges)
    assert share.sum() == pytest.approx(1.0)
    inside = share[edges[:-1] >= 0.0].sum()
    assert -np.log(inside / (1.0 - inside)) == pytest.approx(REFERENCE["delta_f_kT"], abs=0.02)


def test_running_effective_size_ends_at_the_whole_set():
    log_weights = np.random.default_rng(1).normal(size=5000)
    counts, percent = running_effective_percent(log_weights)
    assert counts[-1] == 5000
    assert percent[-1] == pytest.approx(effective_sample_percent(log_weights))
    assert percent[0] == pytest.approx(effective_sample_percent(log_weights[: int(counts[0])]))


GOOD = {
    "samples": 100_000, "ess_percent": 92.0, "ess_percent_of_each_set": [92.0, 91.5],
    "delta_f_phi_kT": 5.70, "delta_f_phi_error_kT": 0.03,
    "reference_delta_f_phi_kT": 5.68, "reference_delta_f_phi_error_kT": 0.014, "training_delta_f_phi_kT": 2.0,
    "nve_std_per_dof_kJ_mol": 0.0061, "force_field_nve_std_per_dof_kJ_mol": 0.0059,
    "force_rmse_kT_nm": 13.0, "js_divergence_md_vs_samples": 0.008, "ase_openmm_max_force_difference": 3e-7,
    "wall_seconds": {"train": 300.0, "total": 420.0},
}  # fmt: skip
LIMITS = Requirements(
    ess_percent=90.0, samples=100_000, delta_f_kT=0.2, delta_f_standard_errors=2.0, training_offset_kT=2.0, nve_ratio=1.2,
    force_rmse_kT_nm=20.0, js_divergence=0.02, ase_openmm_force_difference=1e-4, wall_seconds=600.0,
)  # fmt: skip


def test_all_targets_met():
    found = checks(GOOD, "phi", LIMITS)
    assert len(found) == 10
    assert all(check.met for check in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ess_percent", 89.9),
        ("ess_percent", float("nan")),
        ("delta_f_phi_kT", 5.90),
        ("training_delta_f_phi_kT", 4.0),
        ("nve_std_per_dof_kJ_mol", 0.0072),
        ("force_rmse_kT_nm", 20.1),
        ("js_divergence_md_vs_samples", 0.021),
        ("ase_openmm_max_force_difference", 2e-4),
        ("wall_seconds", {"total": 601.0}),
    ],
)
def test_missed_target_is_told(key, value):
    failed = {check.key for check in checks({**GOOD, key: value}, "phi", LIMITS) if not check.met}
    assert key in failed


def test_too_few_samples_miss_the_target():
    assert [check.key for check in checks({**GOOD, "samples": 99_999}, "phi", LIMITS) if not check.met] == ["samples"]


def test_difference_beyond_its_own_errors_is_told():
    narrow = {**GOOD, "delta_f_phi_kT": 5.75, "delta_f_phi_error_kT": 0.01}
    failed = {check.key for check in checks(narrow, "phi", LIMITS) if not check.met}
    assert failed == {"delta_f_phi_error_kT"}  # within 0.2 kT, yet four standard errors away


def test_targets_without_data_are_left_out():
    found = checks({"samples": 1000, "ess_percent": 50.0, "force_rmse_kT_nm": 5.0}, None, LIMITS)
    assert [check.key for check in found] == ["ess_percent", "samples", "force_rmse_kT_nm"]


def test_no_requirement_is_made_up():
    assert checks(GOOD, "phi", Requirements()) == []
    assert [check.key for check in checks(GOOD, "phi", Requirements(nve_ratio=1.2))] == ["nve_std_per_dof_kJ_mol"]
