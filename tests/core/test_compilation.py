"""Compiled potentials: the same numbers as torch, made once, and never trusted blindly."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from flowbridge.core.cache import Cache, key_of, size_limit
from flowbridge.core.compilation.building import PotentialRecipe, accelerated, compiled
from flowbridge.core.compilation.identity import source_digest
from flowbridge.core.errors import CompilationError, ConfigurationError
from flowbridge.core.potential import Particles, Potential, PotentialMetadata


class Crystal(Potential):
    """A periodic chain of springs with a global parameter: everything that a compiled call can be given."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        particles = Particles(("A",) * 5, (18,) * 5, (40.0,) * 5, ())
        self.metadata = PotentialMetadata(particles, periodic=True, global_parameters={"pull": 1.5})
        self.weights = torch.nn.Parameter(torch.linspace(0.5, 2.0, 5, dtype=dtype))

    def forward(self, positions, cell=None, pull: float = 1.5):
        shift = torch.roll(positions, -1, 1) - positions
        fractional = shift @ torch.linalg.inv(cell)
        wrapped = (fractional - torch.round(fractional).detach()) @ cell
        energy = (self.weights * torch.tanh(wrapped.square().sum(-1).to(self.weights.dtype))).sum(-1)
        return pull * energy.double()


class Box(Crystal):
    """The same in rectangular cells, without an operation that has to go through torch's loader."""

    def forward(self, positions, cell=None, pull: float = 1.5):
        lengths = cell.diagonal(dim1=1, dim2=2).unsqueeze(1)
        shift = torch.roll(positions, -1, 1) - positions
        wrapped = shift - lengths * torch.round(shift / lengths).detach()
        energy = (self.weights * torch.tanh(wrapped.square().sum(-1).to(self.weights.dtype))).sum(-1)
        return pull * energy.double()


class Undecided(Potential):
    """Looks at its data before it decides what to compute: no fixed graph can hold it."""

    def __init__(self):
        super().__init__()
        self.metadata = PotentialMetadata(Particles(("A", "B"), (1, 1), (1.0, 1.0), ()))
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, positions, cell=None):
        if bool(positions.sum() > 0):
            return self.weight * positions.square().sum((1, 2))
        return self.weight * positions.abs().sum((1, 2))


class Flat(Potential):
    """Asks for views of its positions, as one may of what is laid out in the usual way."""

    def __init__(self, dimension):
        super().__init__()
        self.metadata = PotentialMetadata(Particles(("A", "B"), (1, 1), (1.0, 1.0), ()))
        self.shape = (-1, 3 * dimension)  # of a configuration, or of all particles of all configurations
        weights = torch.linspace(0.5, 2.0, 9 * dimension, dtype=torch.float64).reshape(3 * dimension, 3)
        self.weights = torch.nn.Parameter(weights)

    def forward(self, positions, cell=None):
        return torch.tanh(positions.view(self.shape) @ self.weights).square().sum(-1).view(len(positions), -1).sum(-1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("compiled"), limit=2**30)


@pytest.fixture(scope="module")
def two_processes(cache):
    """What two processes print that compile the crystal for one configuration at the same time."""
    script = PROCESS.format(name=__name__, file=__file__, cache=str(cache.folder))
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    return answers


@pytest.fixture(scope="module")
def crystals(cache, two_processes):
    """The same potential, interpreted and compiled for 1, for 6 and for 24 configurations (these with the batch last)."""
    crystal = Crystal().requires_grad_(False)
    return crystal, *(compiled(crystal, batch=batch, cache=cache) for batch in (1, 6, 24))


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def configurations(count, generator, spread=0.3):
    positions = spread * torch.randn(count, 5, 3, generator=generator, dtype=torch.float64)
    cell = torch.eye(3, dtype=torch.float64) * 1.3 + 0.1 * torch.rand(
        count, 3, 3, generator=generator, dtype=torch.float64
    )
    return positions, cell


class TestAgreement:
    @pytest.mark.parametrize("which", [1, 2, 3])
    @pytest.mark.parametrize("count", [1, 2, 6, 17, 100])
    def test_same_numbers_as_torch(self, crystals, which, count):
        generator = torch.Generator().manual_seed(count)
        for spread in (0.01, 0.3, 50.0):  # near its minimum, as usual, and far outside
            positions, cell = configurations(count, generator, spread)
            expected = crystals[0].energy_and_forces(positions, cell, pull=0.7)
            found = crystals[which].energy_and_forces(positions, cell, pull=0.7)
            assert found.energy.shape == (count,)
            assert relative(found.energy, expected.energy) < 1e-10
            assert relative(found.forces, expected.forces) < 1e-10

    def test_results_do_not_change_afterwards(self, crystals):
        generator = torch.Generator().manual_seed(3)
        given = [configurations(1, generator) for _ in range(20)]
        held = [crystals[1].energy_and_forces(*one) for one in given]
        for one, (energy, forces) in zip(given, held, strict=True):
            expected = crystals[0].energy_and_forces(*one)
            assert relative(energy, expected.energy) < 1e-10
            assert relative(forces, expected.forces) < 1e-10

    def test_layout_and_type_of_what_is_given_do_not_matter(self, crystals):
        positions, cell = configurations(6, torch.Generator().manual_seed(4))
        expected = crystals[0].energy_and_forces(positions, cell)
        strided = positions.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        assert not strided.is_contiguous()
        for compiled_potential in crystals[1:]:
            found = compiled_potential.energy_and_forces(strided, cell.transpose(1, 2).contiguous().transpose(1, 2))
            assert relative(found.forces, expected.forces) < 1e-10
            single = compiled_potential.energy_and_forces(positions.float(), cell.float())
            assert relative(single.forces, expected.forces) < 1e-5

    def test_what_does_not_fit_is_left_to_the_original(self, crystals):
        """The program would read past the end of a smaller array, or leave out what it was not made for."""
        positions, cell = configurations(6, torch.Generator().manual_seed(5))
        with pytest.raises(RuntimeError):
            crystals[2].energy_and_forces(positions[:, :4], cell)
        with pytest.raises(TypeError):
            crystals[2].energy_and_forces(positions)
        with pytest.raises(TypeError, match="push"):
            crystals[2].energy_and_forces(positions, cell, push=1.0)
        shared = crystals[2].energy_and_forces(positions, cell[:1])  # one cell for all, as torch broadcasts it
        expected = crystals[0].energy_and_forces(positions, cell[:1])
        assert torch.equal(shared.forces, expected.forces)
        assert crystals[2].energy_and_forces(positions[:0], cell[:0]).forces.shape == (0, 5, 3)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
    def test_copies_work(self, crystals, again):
        positions, cell = configurations(6, torch.Generator().manual_seed(11))
        expected = crystals[0].energy_and_forces(positions, cell)
        assert relative(again(crystals[2]).energy_and_forces(positions, cell).forces, expected.forces) < 1e-10

    def test_not_a_number_stays_one(self, crystals):
        positions, cell = configurations(6, torch.Generator().manual_seed(6))
        positions[2, 3, 1] = float("nan")
        found = crystals[2].energy_and_forces(positions, cell)
        assert found.energy.isnan().tolist() == [False, False, True, False, False, False]

    def test_several_threads_at_once(self, crystals):
        generator = torch.Generator().manual_seed(7)
        given = [configurations(1, generator) for _ in range(200)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda one: crystals[1].energy_and_forces(*one), given))
        for one, result in zip(given, found, strict=True):
            assert relative(result.forces, crystals[0].energy_and_forces(*one).forces) < 1e-10

    def test_differentiable_energy_is_still_there(self, crystals):
        positions, cell = configurations(1, torch.Generator().manual_seed(8))
        leaf = positions.requires_grad_(True)
        (gradient,) = torch.autograd.grad(crystals[1](leaf, cell).sum(), leaf)
        assert relative(-gradient, crystals[1].energy_and_forces(positions, cell).forces) < 1e-10


@pytest.fixture(scope="module")
def boxes(cache):
    box = Box().requires_grad_(False)
    many = compiled(box, batch=24, cache=cache)
    assert many._on_cores, "this platform cannot call programs without the interpreter's lock"
    return box, many


class TestCores:
    @pytest.mark.parametrize("count", [1, 24, 100])
    def test_same_numbers_as_torch(self, boxes, count):
        positions, cell = configurations(count, torch.Generator().manual_seed(count))
        expected = boxes[0].energy_and_forces(positions, cell, pull=0.7)
        found = boxes[1].energy_and_forces(positions, cell, pull=0.7)
        assert relative(found.energy, expected.energy) < 1e-10
        assert relative(found.forces, expected.forces) < 1e-10

    @pytest.mark.parametrize("dimension", [1, 2])
    def test_views(self, cache, dimension):
        """Of each configuration: the results still lie in memory as they are read. Of all: compiled as they are."""
        flat = Flat(dimension).requires_grad_(False)
        many = compiled(flat, batch=24, cache=cache)
        positions = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        expected, found = flat.energy_and_forces(positions), many.energy_and_forces(positions)
        assert relative(found.energy, expected.energy) < 1e-10
        assert relative(found.forces, expected.forces) < 1e-10

    def test_several_share_a_batch(self, boxes):
        """The pieces of a batch are computed by several threads at once, in any order; the numbers are the same."""
        positions, cell = configurations(1000, torch.Generator().manual_seed(5))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = boxes[1].energy_and_forces(positions, cell)
            torch.set_num_threads(3)
            for _ in range(20):
                together = boxes[1].energy_and_forces(positions, cell)
                assert torch.equal(together.energy, alone.energy)
                assert torch.equal(together.forces, alone.forces)
            with ThreadPoolExecutor(4) as pool:
                for found in pool.map(lambda _: boxes[1].energy_and_forces(positions, cell), range(12)):
                    assert torch.equal(found.forces, alone.forces)
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(threads)

    def test_after_a_fork(self, boxes):
        """Threads do not survive a fork, and nobody waits for those of the parent."""
        positions, cell = configurations(100, torch.Generator().manual_seed(6))
        expected = boxes[1].energy_and_forces(positions, cell)
        child = os.fork()
        if child == 0:
            found = boxes[1].energy_and_forces(positions, cell)
            os._exit(0 if torch.equal(found.energy, expected.energy) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestTrust:
    def test_found_again(self, crystals, cache, capfd):
        again = compiled(crystals[0], batch=1, cache=cache)
        assert again.folder == crystals[1].folder
        assert "compiling" not in capfd.readouterr().err

    def test_other_parameters_are_another_program(self, crystals, cache):
        other = Crystal().requires_grad_(False)
        with torch.no_grad():
            other.weights.mul_(1.0 + 1e-12)
        assert compiled(other, batch=1, cache=cache, build=False) is None
        assert compiled(Crystal().requires_grad_(False), batch=1, cache=cache, build=False) is not None

    def test_other_batch_or_dtype_is_another_program(self, crystals, cache):
        assert compiled(crystals[0], batch=2, cache=cache, build=False) is None
        assert compiled(crystals[0], batch=1, dtype=torch.float32, cache=cache, build=False) is None

    @pytest.mark.parametrize("damage", ["cut", "flip", "remove", "check"])
    def test_a_broken_program_is_compiled_again(self, crystals, cache, damage, capfd):
        package = crystals[1].folder / ("check.safetensors" if damage == "check" else "program.pt2")
        content = package.read_bytes()
        if damage == "remove":
            package.unlink()
        else:
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
            package.write_bytes(content[:middle] if damage == "cut" else flipped)
        try:
            assert compiled(crystals[0], batch=1, cache=cache, build=False) is None
        finally:
            package.write_bytes(content)
        assert compiled(crystals[0], batch=1, cache=cache, build=False) is not None

    def test_a_program_that_gives_other_numbers_is_not_used(self, crystals, cache):
        """A valid entry whose program belongs to another potential: what a wrong key would lead to."""
        other = Crystal().requires_grad_(False)
        with torch.no_grad():
            other.weights.mul_(1.01)
        description = PotentialRecipe(other, 1, torch.float64).description()
        with cache.making(description) as folder:
            (folder / "program.pt2").write_bytes((crystals[1].folder / "program.pt2").read_bytes())
            check = safetensors.torch.load_file(crystals[1].folder / "check.safetensors")
            truth = other.energy_and_forces(check["positions"], check["cell"])
            check |= {"energy": truth.energy, "forces": truth.forces}
            safetensors.torch.save_file(check, folder / "check.safetensors")
        assert compiled(other, batch=1, cache=cache, build=False) is None

    def test_source_digest_covers_the_code(self):
        first = source_digest(Crystal())
        assert first == source_digest(Crystal(torch.float32))
        assert first != source_digest(CompiledLike())


PROBE = {
    "__init__.py": "",
    "model.py": """
from __future__ import annotations

import torch

from flowbridge.core.potential import Particles, Potential, PotentialMetadata

from . import terms, unrelated
from .terms import Settings, lazily


class Spring(Potential):
    'A spring.'

    exponent = 2

    def __init__(self):
        super().__init__()
        self.metadata = PotentialMetadata(Particles(("A", "B"), (1, 1), (1.0, 1.0)))
        self.settings = Settings()

    def forward(self, positions, cell=None):
        'Return the energy.'
        length = terms.length_of(positions)  # in nm
        return getattr(self, "_scaled")(length) + lazily(positions)

    def _scaled(self, length):
        return self.settings.strength * length**self.exponent

    def report(self):
        return "nothing " + unrelated.name()
""",
    "terms.py": """
from __future__ import annotations

from dataclasses import dataclass

AXES = frozenset({"x", "y", "z", "norm"})
UNUSED = 7


@dataclass
class Settings:
    strength: Strength = 1.0


class Strength(float):
    unit = "kJ/mol"


def length_of(positions):
    'Return the distance.'
    assert "norm" in AXES
    return (positions[:, 0] - positions[:, 1]).norm(dim=-1) if "norm" in AXES else None


def unused(positions):
    return 3 * positions


def lazily(positions):
    from .late import offset

    return offset(positions)
""",
    "late.py": "def offset(positions):\n    return 0.5\n",
    "unrelated.py": "def name():\n    return 'spring'\n",
}


class TestIdentity:
    @pytest.fixture
    def probe(self, tmp_path, monkeypatch):
        """A package with a potential, and a function that edits it and returns the digest before and after."""
        folder = tmp_path / "identity_probe"
        folder.mkdir()
        for name, content in PROBE.items():
            (folder / name).write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        potential = importlib.import_module("identity_probe.model").Spring()

        def edited(file, old, new):
            before, content = source_digest(potential), (folder / file).read_text()
            assert old in content
            (folder / file).write_text(content.replace(old, new))
            return before, source_digest(potential)

        yield edited
        for name in [name for name in sys.modules if name.startswith("identity_probe")]:
            del sys.modules[name]

    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            ("model.py", "'A spring.'", "'A stretched spring.'"),
            ("model.py", "'Return the energy.'", "'Return energies.'"),
            ("model.py", "# in nm", "# nm"),
            ("model.py", "\n\n\nclass", "\n\n\n\n# A class.\nclass"),
            ("model.py", "nothing", "something"),
            ("terms.py", "'Return the distance.'", ""),
            ("terms.py", "return 3 * positions", "return 4 * positions"),
            ("terms.py", "UNUSED = 7", "UNUSED = 8"),
            ("unrelated.py", "spring", "summer"),
        ],
    )
    def test_what_is_not_computed_does_not_count(self, probe, file, old, new):
        before, after = probe(file, old, new)
        assert before == after

    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            ("model.py", "exponent = 2", "exponent = 4"),
            ("model.py", "strength * length", "strength / length"),
            ("model.py", "+ lazily", "- lazily"),
            ("terms.py", "positions[:, 0] - positions", "positions[:, 0] + positions"),
            ("terms.py", "dim=-1", "dim=-2"),
            ("terms.py", "Strength = 1.0", "Strength = 2.0"),
            ("terms.py", "kJ/mol", "eV"),  # mentioned by an annotation alone, as in a validated configuration
            ("terms.py", '"z", "norm"', '"z", "length"'),
            ("late.py", "0.5", "0.25"),
        ],
    )
    def test_what_is_computed_counts(self, probe, file, old, new):
        before, after = probe(file, old, new)
        assert before != after

    def test_it_is_the_same_in_every_process(self, probe, tmp_path):
        script = (
            "import identity_probe.model; from flowbridge.core.compilation.identity import "
            "source_digest; print(source_digest(identity_probe.model.Spring()))"
        )
        found = set()
        for seed in ("1", "2"):
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            done = subprocess.run(
                [sys.executable, "-c", script],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            found.add(done.stdout)
        assert found == {probe("late.py", "offset", "offset")[0] + "\n"}

    def test_another_torch_or_machine_is_another_program(self, monkeypatch):
        first = PotentialRecipe(Crystal(), 1, torch.float64).outline()
        monkeypatch.setattr(torch, "__version__", "2.0.0")
        second = PotentialRecipe(Crystal(), 1, torch.float64).outline()
        assert first != second
        assert {"system", "processor", "vector", "instructions"} <= first["machine"].keys()


class CompiledLike(Potential):
    """A potential whose class lives in the same file but has a part from elsewhere."""

    def __init__(self):
        super().__init__()
        from flowbridge.flows.transforms.sinh_arcsinh import Affine

        self.part = Affine()


class TestWithout:
    def test_no_compiler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CXX", "/nowhere/g++")
        monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))
        monkeypatch.delenv("FLOWBRIDGE_COMPILE", raising=False)
        crystal = Crystal().requires_grad_(False)
        with pytest.warns(UserWarning, match=r"running without compiled code.*no C\+\+ compiler"):
            assert accelerated(crystal) is crystal
        with pytest.raises(CompilationError, match="install"):
            accelerated(crystal, mode="always")

    def test_a_compiler_that_fails_is_not_tried_at_every_start(self, monkeypatch, tmp_path):
        broken = tmp_path / "g++"
        count = tmp_path / "count"
        broken.write_text(f'#!/bin/sh\necho x >> {count}\ncase "$*" in --version) echo broken 1.0;; *) exit 3;; esac\n')
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        crystal = Crystal().requires_grad_(False)
        cache = Cache(tmp_path / "cache", limit=2**30)
        with pytest.raises(CompilationError, match="compiler failed"):
            compiled(crystal, cache=cache)
        tried = len(count.read_text())
        with pytest.raises(CompilationError, match="as when it was tried before"):
            compiled(crystal, cache=cache)
        assert len(count.read_text()) <= tried + 2  # its version only

    def test_a_compiler_that_was_stopped_is_tried_again(self, monkeypatch, tmp_path):
        stopped = tmp_path / "g++"
        stopped.write_text(
            '#!/bin/sh\ncase "$*" in --version) echo stopped 1.0;; *) kill -TERM $PPID; sleep 60;; esac\n'
        )
        stopped.chmod(0o755)
        monkeypatch.setenv("CXX", str(stopped))
        crystal = Crystal().requires_grad_(False)
        cache = Cache(tmp_path / "cache", limit=2**30)
        for _ in range(2):
            with pytest.raises(CompilationError, match=r"stopped by SIGTERM$"):
                compiled(crystal, cache=cache)

    def test_always_means_always_also_in_the_environment(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CXX", "/nowhere/g++")
        monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))
        monkeypatch.setenv("FLOWBRIDGE_COMPILE", "always")
        with pytest.raises(CompilationError, match="install"):
            accelerated(Crystal().requires_grad_(False))

    def test_a_cache_that_cannot_be_written_to(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("where a folder should be")
        monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path / "file"))
        monkeypatch.delenv("FLOWBRIDGE_COMPILE", raising=False)
        crystal = Crystal().requires_grad_(False)
        with pytest.warns(UserWarning, match="nothing can be kept in .*FLOWBRIDGE_CACHE"):
            assert accelerated(crystal) is crystal

    def test_what_cannot_be_recorded(self):
        with pytest.raises(CompilationError, match="Undecided cannot be recorded as a fixed graph"):
            accelerated(Undecided().requires_grad_(False), mode="always")

    @pytest.mark.parametrize("mode", ["never", "cached"])
    def test_nothing_is_compiled_unasked(self, monkeypatch, tmp_path, mode):
        monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))
        crystal = Crystal().requires_grad_(False)
        assert accelerated(crystal, mode=mode) is crystal
        monkeypatch.setenv("FLOWBRIDGE_COMPILE", mode)
        assert accelerated(crystal) is crystal

    def test_unknown_modes(self, monkeypatch):
        with pytest.raises(ConfigurationError, match="'sometimes'"):
            accelerated(Crystal(), mode="sometimes")
        monkeypatch.setenv("FLOWBRIDGE_COMPILE", "yes")
        with pytest.raises(ConfigurationError, match="FLOWBRIDGE_COMPILE"):
            accelerated(Crystal())


class TestCache:
    def test_appears_whole_or_not_at_all(self, tmp_path):
        cache = Cache(tmp_path, limit=2**20)

        def stopped_half_way():
            with cache.making({"a": 1}) as folder:
                (folder / "x").write_text("half")
                raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            stopped_half_way()
        assert cache.find({"a": 1}) is None
        assert not list(tmp_path.iterdir())
        with cache.making({"a": 1}) as folder:
            (folder / "x").write_text("whole")
            assert cache.find({"a": 1}) is None
        assert (cache.find({"a": 1}) / "x").read_text() == "whole"
        assert cache.find({"a": 2}) is None

    def test_a_description_must_be_the_one_asked_for(self, tmp_path):
        cache = Cache(tmp_path, limit=2**20)
        with cache.making({"a": 1}) as folder:
            (folder / "x").write_text("whole")
        record = cache.find({"a": 1}) / "record.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "description": {"a": 2}}))
        assert cache.find({"a": 1}) is None

    def test_what_is_not_used_goes_first(self, tmp_path):
        cache = Cache(tmp_path, limit=2500)
        for number in range(3):
            with cache.making({"n": number}) as folder:
                (folder / "x").write_bytes(bytes(600))
            past = time.time() - 100 + number
            os.utime(tmp_path / key_of({"n": number}) / "record.json", (past, past))
        assert cache.find({"n": 0}) is not None  # and is thereby used
        with cache.making({"n": 3}) as folder:
            (folder / "x").write_bytes(bytes(600))
        assert [cache.find({"n": n}) is not None for n in range(4)] == [True, False, True, True]
        assert sum(entry.bytes for entry in cache.entries()) <= 2500

    def test_two_that_make_the_same_at_the_same_time(self, tmp_path):
        cache = Cache(tmp_path, limit=2**20)
        with cache.making({"a": 1}) as folder:
            (folder / "x").write_text("slow")
            done = subprocess.run([sys.executable, "-c", MAKER.format(str(tmp_path))], check=False)
            assert done.returncode == 0
            assert (cache.find({"a": 1}) / "x").read_text() == "fast"
        assert (cache.find({"a": 1}) / "x").read_text() in ("slow", "fast")
        assert [path.name for path in tmp_path.iterdir()] == [key_of({"a": 1})]

    def test_a_bad_limit_is_refused(self, monkeypatch):
        monkeypatch.setenv("FLOWBRIDGE_CACHE_BYTES", "2 GB")
        with pytest.raises(ConfigurationError, match="whole number of bytes, got '2 GB'"):
            size_limit()


MAKER = """
from pathlib import Path
from flowbridge.core.cache import Cache
with Cache(Path({!r})).making({{"a": 1}}) as folder:
    (folder / "x").write_text("fast")
"""

PROCESS = """
import sys, importlib.util
from pathlib import Path
specification = importlib.util.spec_from_file_location({name!r}, {file!r})
here = sys.modules[{name!r}] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(here)
print(here.compiled(here.Crystal().requires_grad_(False), batch=1, cache=here.Cache(Path({cache!r}), limit=2**30)).folder)
"""


def test_two_processes_compile_once(two_processes, crystals):
    assert [output.strip() for output, _ in two_processes] == [str(crystals[1].folder)] * 2
    assert sum(": compiling" in error for _, error in two_processes) == 1
