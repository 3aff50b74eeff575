"""Model files: what was saved comes back to the bit, and nothing that was altered comes back at all."""

import hashlib
import json
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from flowbridge.core.errors import ModelFileError
from flowbridge.core.model_files.files import (
    from_bytes,
    load,
    matches_its_file,
    read_header,
    register_kind,
    save,
    to_bytes,
)
from flowbridge.core.model_files.format import FORMAT_VERSION, encode
from flowbridge.core.potential import Particles, Potential, PotentialMetadata

MOMENT = datetime(2024, 2, 29, 12, 30, tzinfo=UTC)


@register_kind
class Springs(Potential):
    """Particles on springs, with a state of every kind of tensor that a model may have."""

    kind = "test_springs"

    def __init__(self, names, width=3):
        super().__init__()
        n = len(names)
        self.width = width
        self.metadata = PotentialMetadata(
            Particles(tuple(names), (1,) * n, (1.008,) * n),
            temperature=300.0,
            global_parameters={"scale": 1.0},
        )
        self.stiffness = torch.nn.Parameter(torch.rand(n))
        self.network = torch.nn.Linear(width, width)
        self.tied = self.network.weight
        self.register_buffer("centres", torch.randn(n, 3, dtype=torch.float64))
        self.register_buffer("scalar", torch.tensor(1.0 / 3.0, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(2**53 + 1, dtype=torch.int64))
        self.register_buffer("pairs", torch.tensor([[0, 1]], dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0, 4))

    def forward(self, positions, cell=None, scale=1.0):
        displacement = positions.double() - self.centres
        return scale * (self.stiffness.double() * displacement.square().sum(-1)).sum(-1)

    def configuration(self):
        return {
            "names": list(self.metadata.particles.names),
            "width": self.width,
            "note": 'Å, ☂ and "quotes" \\',
        }

    @classmethod
    def from_configuration(cls, configuration):
        return cls(configuration["names"], configuration["width"])


@pytest.fixture
def springs():
    torch.manual_seed(5)
    return Springs(["H1", "H2"])


@pytest.fixture
def model(springs, tmp_path):
    path = tmp_path / "springs.flow"
    save(springs, path, provenance={"epochs": 3, "loss": -1.5}, created=MOMENT)
    return path


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.detach().reshape(-1).view(torch.uint8).tolist()


def rewritten(path, **changes):
    """Seal the file again with changed header fields: a correct digest over other content."""
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["flowbridge"])
    tensors = safetensors.torch.load_file(path)
    content.pop("digest")
    tensors.update(changes.pop("tensors", {}))
    path.write_bytes(encode({**content, **changes}, tensors))


# --- what comes back ---------------------------------------------------------------------------------------


def test_every_tensor_survives_to_the_bit(springs, model):
    tiny = torch.tensor([-0.0, 5e-324], dtype=torch.float64)
    springs.centres[0, :2] = tiny  # a signed zero and a subnormal
    save(springs, model)
    loaded = load(model)
    assert type(loaded) is Springs
    assert {name: bits(t) for name, t in loaded.state_dict().items()} == {
        name: bits(t) for name, t in springs.state_dict().items()
    }
    assert loaded.scalar.shape == ()
    assert loaded.steps.item() == 2**53 + 1
    assert loaded.tied is loaded.network.weight
    assert loaded.metadata == springs.metadata
    assert not loaded.training
    assert loaded.stiffness.requires_grad


def test_energies_are_the_same_to_the_bit(springs, model):
    positions = torch.randn(7, 2, 3, dtype=torch.float64)
    assert torch.equal(load(model)(positions), springs(positions))


def test_a_model_cast_to_float64_comes_back_in_float64_with_ties_kept(springs, model):
    springs.double()
    save(springs, model)
    loaded = load(model)
    assert loaded.stiffness.dtype == torch.float64
    assert loaded.tied is loaded.network.weight
    assert bits(loaded.network.weight) == bits(springs.network.weight)


def test_transposed_memory_is_stored_in_logical_order(springs, model):
    springs.network.weight.data = springs.network.weight.data.T
    save(springs, model)
    assert torch.equal(load(model).network.weight, springs.network.weight)


def test_header_tells_what_the_file_holds(springs, model):
    header = read_header(model)
    assert header.kind == "test_springs"
    assert header.temperature == 300.0
    assert header.particles == springs.metadata.particles
    assert header.global_parameters == {"scale": 1.0}
    assert header.provenance == {"epochs": 3, "loss": -1.5}
    assert header.configuration == springs.configuration()
    assert header.created == MOMENT
    assert header.units["energy"] == "kJ/mol"
    assert header.versions["torch"] == torch.__version__
    assert header.tensors["centres"] == ("F64", (2, 3))
    assert header.tensors["scalar"] == ("F64", ())


def test_any_safetensors_reader_opens_it_and_can_check_the_digest(springs, model):
    assert torch.equal(safetensors.torch.load_file(model)["centres"], springs.centres)
    digest = read_header(model).digest
    content = model.read_bytes()
    assert content.count(digest.encode()) == 1
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert springs.model_file == (model, digest)
    assert load(model).model_file == (model, digest)


def test_same_potential_same_bytes(springs, model, tmp_path):
    again = tmp_path / "again.flow"
    assert save(load(model), again, provenance={"epochs": 3, "loss": -1.5}, created=MOMENT)
    assert again.read_bytes() == model.read_bytes()


def test_a_digest_within_the_provenance_does_not_confuse_the_file(springs, tmp_path):
    path = tmp_path / "descendant.flow"
    provenance = {"parent": "0" * 64, "text": '"flowbridge":"{\\"digest\\":\\"'}
    save(springs, path, provenance=provenance)
    assert load(path).model_file.digest == read_header(path).digest
    assert read_header(path).provenance == provenance


def test_neither_saving_nor_loading_touches_the_random_state(springs, model):
    before = torch.get_rng_state()
    save(springs, model)
    load(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_process_reads_the_file_without_this_test(model):
    code = f"import flowbridge.core.model_files.files as m; print(m.read_header({str(model)!r}).kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "test_springs"


def test_reference_to_the_file_is_dropped_once_the_model_changes(springs, model):
    loaded = load(model)
    assert matches_its_file(loaded)
    assert matches_its_file(springs)
    assert not matches_its_file(Springs(["H1", "H2"]))
    with torch.no_grad():
        loaded.stiffness[0] += 1e-6
    assert not matches_its_file(loaded)
    other = load(model)
    save(Springs(["H1", "H2"]), model)
    assert not matches_its_file(other)
    model.unlink()
    assert not matches_its_file(springs)


# --- what is refused ---------------------------------------------------------------------------------------


WAYS = ("bit in header", "bit in data", "truncation", "extension", "swap", "edit", "zeros", "lengths")


def corruptions(content, count):
    """Yield ``count`` altered copies with a name, from fixed seeds."""
    header_end = 8 + int.from_bytes(content[:8], "little")
    for seed in range(count):
        generator = random.Random(seed)
        altered = bytearray(content)
        way = ("bit in header", "bit in data", "truncation", "extension", "swap", "edit", "zeros", "lengths")[seed % 8]
        if way == "bit in header":
            altered[generator.randrange(header_end)] ^= 1 << generator.randrange(8)
        elif way == "bit in data":
            altered[generator.randrange(header_end, len(content))] ^= 1 << generator.randrange(8)
        elif way == "truncation":
            del altered[generator.randrange(len(content)) :]
        elif way == "extension":
            altered += generator.randbytes(generator.choice([1, 8, 100]))
        elif way == "swap":
            size = generator.choice([1, 4, 8, 32])
            a, b = (generator.randrange(len(content) - size) for _ in range(2))
            altered[a : a + size], altered[b : b + size] = content[b : b + size], content[a : a + size]
        elif way == "edit":
            digits = [i for i in range(8, header_end) if chr(content[i]).isdigit()]
            altered[generator.choice(digits)] = ord(generator.choice("123456789"))
        elif way == "zeros":
            start = generator.randrange(len(content) - 64)
            altered[start : start + 64] = bytes(64)
        else:
            shift = generator.choice([-9, -1, 1, 8])
            altered[:8] = generator.choice([bytes(8), b"\xff" * 8, (header_end - 8 + shift).to_bytes(8, "little")])
        yield f"{way} ({seed})", bytes(altered)


def test_none_of_200_corruptions_loads(model, tmp_path):
    content = model.read_bytes()
    path = tmp_path / "altered.flow"
    tried, reasons = 0, set()
    for name, altered in corruptions(content, 260):
        if altered == content:  # a swap of equal bytes, an edit of 3 to 3
            continue
        path.write_bytes(altered)
        for reader in (load, read_header):
            try:
                reader(path)
            except ModelFileError as error:
                message = str(error)
            except BaseException as error:
                pytest.fail(f"{name}: {reader.__name__} raised {type(error).__name__}: {error}")
            else:
                pytest.fail(f"{name}: {reader.__name__} took an altered file")
            assert message.startswith(str(path)), name
            reasons.add(message.removeprefix(str(path))[:20])
        tried += 1
    assert tried >= 200
    assert len(reasons) >= 5  # the messages tell the cases apart
    path.write_bytes(content)
    load(path)


def test_a_changed_bit_in_any_byte_of_the_header_is_noticed(model, tmp_path):
    content = model.read_bytes()
    path = tmp_path / "altered.flow"
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position in range(header_end):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x20]) + content[position + 1 :])
        with pytest.raises(ModelFileError):
            read_header(path)


def test_truncation_at_every_length_is_refused(model, tmp_path):
    content = model.read_bytes()
    path = tmp_path / "altered.flow"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError, match=r"empty|truncated|not a flowbridge"):
            load(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"ATOM      1  N   ALA A   1", "not even safetensors"),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os", "not even safetensors"),
        (b"PK\x03\x04" + bytes(200), "not even safetensors"),
        ((10**6).to_bytes(8, "little") + b"{" + bytes(20), "truncated"),
        ((2).to_bytes(8, "little") + b"{}", "without a flowbridge header"),
        ((9000).to_bytes(8, "little") + b"{" + b'"a":[' * 1799 + b"    ", "not a flowbridge model file"),
        (safetensors.torch.save({"x": torch.ones(2)}), "without a flowbridge header"),
        (safetensors.torch.save({"x": torch.ones(2)}, {"flowbridge": "hello"}), "damaged"),
        (safetensors.torch.save({"x": torch.ones(2)}, {"flowbridge": "[1]"}), "no JSON object"),
        (safetensors.torch.save({"x": torch.ones(2)}, {"flowbridge": "{}"}), "does not agree"),
    ],
)
def test_foreign_files(tmp_path, content, reason):
    path = tmp_path / "foreign.flow"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelFileError, match="no such model file"):
        load(tmp_path / "absent.flow")
    with pytest.raises(ModelFileError, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        load("a\0b")


def test_newer_format_asks_for_an_upgrade(model):
    rewritten(model, format_version=FORMAT_VERSION + 1, something_new={"a": 1})
    with pytest.raises(ModelFileError, match=r"format version 2.*Upgrade flowbridge"):
        load(model)


def test_unknown_kind_names_the_package(model):
    rewritten(model, kind="alien", implementation="xenoflow.models:Alien")
    with pytest.raises(ModelFileError, match=r"'alien'.*install the package 'xenoflow'"):
        load(model)
    assert read_header(model).kind == "alien"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"configuration": {"names": ["H1", "H2", "H3"], "width": 3}}, r"centres.*\(2, 3\).*\(3, 3\)"),
        ({"configuration": {"names": ["H1"]}}, "KeyError: 'width'"),
        ({"configuration": {"names": 5, "width": 3}}, "cannot be built"),
        ({"tensors": {"extra": torch.ones(1)}}, "extra has no place"),
        ({"tensors": {"pairs": torch.ones(1, 2)}}, r"pairs is torch.float32.*torch.int64"),
        ({"tensors": {"scalar": torch.tensor(float("nan"))}}, "scalar has 1 entries that are NaN"),
        ({"temperature": "warm"}, "temperature"),
        ({"units": {"length": "angstrom"}}, "angstrom"),
        ({"format_version": 0}, "format version 0"),
        ({"invented": 1}, "invented"),
        ({"particles": {"names": ["H1"], "atomic_numbers": [1, 1], "masses": [1.0]}}, "entries for 1 names"),
    ],
)
def test_intact_files_with_unusable_content(model, changes, reason):
    rewritten(model, **changes)
    with pytest.raises(ModelFileError, match=reason) as caught:
        load(model)
    assert str(model) in str(caught.value)


def test_only_the_file_with_the_given_digest_is_accepted(springs, model):
    digest = read_header(model).digest
    assert load(model, digest=digest).model_file.digest == digest
    save(Springs(["H1", "H2"]), model)
    with pytest.raises(ModelFileError, match="not the model that is referred to"):
        load(model, digest=digest)


def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(springs, model, monkeypatch):
    before = model.read_bytes()
    with torch.no_grad():
        springs.stiffness[1] = float("inf")
    with pytest.raises(ModelFileError, match="stiffness has 1 entries"):
        save(springs, model)
    with torch.no_grad():
        springs.stiffness[1] = 1.0
    with pytest.raises(ModelFileError, match="JSON"):
        save(springs, model, provenance={"loss": float("nan")})
    with pytest.raises(ModelFileError, match="JSON"):
        save(springs, model, provenance={"path": Path("x")})
    with pytest.raises(ModelFileError, match=r"key 1, but JSON keys are strings"):
        save(springs, model, provenance={"a": [{1: 2}]})
    with pytest.raises(ValueError, match="timezone"):
        save(springs, model, created=datetime(2024, 1, 1))
    monkeypatch.setattr(springs, "configuration", lambda: {"names": ["H1"], "width": 3})
    with pytest.raises(ModelFileError, match="do not fit"):  # what it could not load, it does not save
        save(springs, model)
    assert model.read_bytes() == before
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_unregistered_and_clashing_kinds(springs, tmp_path):
    class Heir(Springs):
        """Inherits the kind of another class."""

    with pytest.raises(ModelFileError, match="not registered"):
        save(Heir(["H1", "H2"]), tmp_path / "heir.flow")
    with pytest.raises(ValueError, match="is taken by"):
        register_kind(Heir)
    Heir.kind = ""
    with pytest.raises(ValueError, match="has no kind"):
        register_kind(Heir)


def test_saving_where_it_cannot_be_written(springs, tmp_path):
    with pytest.raises(ModelFileError, match="Check that the folder exists"):
        save(springs, tmp_path / "absent" / "a.flow")
    folder = tmp_path / "folder.flow"
    folder.mkdir()
    with pytest.raises(ModelFileError, match="cannot be written"):
        save(springs, folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert springs.model_file is None


def test_a_disk_that_fills_up_leaves_the_old_file(springs, model):
    resource = pytest.importorskip("resource")
    before = model.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # writes stop half-way with an OSError
    try:
        with pytest.raises(ModelFileError, match="cannot be written"):
            save(springs, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert model.read_bytes() == before
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_readers_never_see_half_a_file_and_a_killed_writer_leaves_a_whole_one(model):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_model_files import Springs, save\n"
        "potentials = [Springs(['H1', 'H2']), Springs(['O'])]\n"
        "while True:\n"
        "    for potential in potentials:\n"
        f"        save(potential, {str(model)!r}); print('saved', flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(20):
            assert writer.stdout.readline() == "saved\n"
            load(model)
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    load(model)


def test_bytes_of_one_potential_are_the_same_and_give_it_back(morse):
    blob = to_bytes(morse)
    assert to_bytes(morse) == blob
    again = from_bytes(blob)
    assert again.model_file is None
    assert torch.equal(again.spring_lengths, morse.spring_lengths)
    with pytest.raises(ModelFileError, match="a model in memory"):
        from_bytes(blob[:-1])
