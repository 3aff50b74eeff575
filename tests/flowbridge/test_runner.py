"""The runner of all pipelines, on stages that only count: what is done, when, and what is said of it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from flowbridge.core.errors import ConfigurationError, ConvergenceError
from flowbridge.workflows.report import Check, Page
from flowbridge.workflows.runner import FORMAT, Pipeline, Selection, run_pipeline
from flowbridge.workflows.stages import Stage, StageFolder, Written, write_json


@dataclass
class Bench:
    """A pipeline of four stages: b needs a, and is the goal; c and d are checks, of which d needs c."""

    output: Path
    settings: dict = field(default_factory=lambda: {"a": 1, "b": 1, "c": 1, "d": 1})
    faults: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    page_fault: Exception | None = None

    def stage(self, name: str, *needs: str) -> Stage:
        def work(folder, done):
            self.calls.append(name)
            if name in self.faults:
                raise self.faults[name]
            (folder / "result.txt").write_text(name)
            return {f"{name}_result": self.settings[name], "curve": [1, 2], "warnings": [f"{name} is warm"]}

        return Stage(
            name, f"does {name}", work, {name: {"setting": self.settings[name]}}, needs,
            (Written("result.txt", f"the result of {name}", f"{name}.txt"),), unlisted=("curve",),
        )  # fmt: skip

    def pipeline(self) -> Pipeline:
        def page(outcome):
            if self.page_fault is not None:
                raise self.page_fault
            return Page("Bench", "Nothing to see.")

        stages = (self.stage("a"), self.stage("b", "a"), self.stage("c", "a"), self.stage("d", "c"))
        return Pipeline(
            "bench", "a bench", self.output, stages, "b", {"molecule": "none"}, page,
            checks=lambda results: [Check("a_result", "≥ 2", str(results["a_result"]), results["a_result"] >= 2)],
        )  # fmt: skip

    def run(self, **selection):
        self.calls.clear()
        results = run_pipeline(self.pipeline(), Selection(**selection))
        assert json.loads((self.output / "results.json").read_text()) == results
        assert (self.output / "report.html").is_file()
        return results


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "out")


def test_results_are_put_together_once(bench, capsys):
    results = bench.run()
    assert bench.calls == ["a", "b", "c", "d"]
    assert list(results)[:3] == ["format", "kind", "molecule"]
    assert results["format"] == FORMAT
    assert (results["a_result"], results["d_result"]) == (1, 1)
    assert "curve" not in results
    assert results["warnings"] == ["a is warm", "b is warm", "c is warm", "d is warm"]
    assert set(results["wall_seconds"]) == {"a", "b", "c", "d", "total"}
    shown = capsys.readouterr()
    assert "NOT MET" in shown.out
    assert "b.txt: the result of b" in shown.out
    assert "warning: c is warm" in shown.err
    assert (bench.output / "b.txt").read_text() == "b"
    assert not list(bench.output.rglob("*.part"))


def test_finished_stages_are_not_repeated(bench, capsys):
    first = bench.run()
    assert bench.run() == first
    assert bench.calls == []
    assert "done before" in capsys.readouterr().err


def test_a_changed_input_repeats_what_depends_on_it_and_is_named(bench, capsys):
    bench.run()
    bench.settings["c"] = 2
    capsys.readouterr()
    bench.run()
    assert bench.calls == ["c", "d"]
    assert "changed since the last time: c.setting: 1 -> 2" in capsys.readouterr().err
    bench.settings["c"] = 1
    bench.run()
    assert bench.calls == []  # the folder of before is still there


def test_until_and_skip(bench):
    assert bench.run(until="b")["left_out"] == ["c", "d"]
    assert bench.calls == ["a", "b"]
    assert bench.run(skip=("d",))["left_out"] == ["d"]
    assert bench.calls == ["c"]
    assert bench.run(until="c", skip=("b",))["left_out"] == ["b", "d"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"until": "e"}, "no stage 'e' here; the stages are a, b, c, d"),
        ({"skip": ("e",)}, "no stage 'e'"),
        ({"skip": ("a",)}, "stage b needs a"),
        ({"skip": ("c",)}, "stage d needs c"),
    ],
)
def test_selections_with_gaps_are_refused_before_anything_is_done(bench, selection, message):
    with pytest.raises(ConfigurationError, match=message):
        run_pipeline(bench.pipeline(), Selection(**selection))
    assert not bench.output.exists()


def test_a_failed_check_keeps_nobody_from_the_goal(bench, capsys):
    bench.faults["c"] = ConvergenceError("c left its support at step 12")
    results = bench.run()
    assert bench.calls == ["a", "b", "c"]
    assert results["failed"] == {"c": "c left its support at step 12"}
    assert results["left_out"] == ["d"]  # it needs c
    assert results["b_result"] == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert "failed: c: c left its support at step 12" in shown.err
    assert "c left its support at step 12" in (bench.output / "report.html").read_text()
    (trace,) = bench.output.rglob("error.txt")
    assert "ConvergenceError" in trace.read_text()
    del bench.faults["c"]
    assert bench.run()["failed"] == {}
    assert bench.calls == ["c", "d"]


def test_any_exception_of_a_check_is_told_by_its_type(bench):
    bench.faults["d"] = ZeroDivisionError("by nothing")
    assert bench.run()["failed"] == {"d": "ZeroDivisionError: by nothing"}


@pytest.mark.parametrize("name", ["a", "b"])
def test_what_the_goal_needs_stops_the_run(bench, name):
    bench.faults[name] = ConvergenceError("no")
    with pytest.raises(ConvergenceError):
        run_pipeline(bench.pipeline())
    assert bench.calls[-1] == name
    assert not (bench.output / "results.json").exists()


def test_an_interruption_is_no_failure(bench):
    bench.faults["c"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(bench.pipeline())


def test_a_report_that_cannot_be_drawn_costs_nobody_the_results(bench):
    bench.page_fault = ValueError("no font")
    assert bench.run()["failed"] == {"report": "ValueError: no font"}


class TestFoldersOfOtherVersions:
    def test_a_newer_format_is_refused(self, bench):
        bench.run()
        write_json(bench.output / "results.json", {"format": FORMAT + 1, "kind": "bench"})
        with pytest.raises(ConfigurationError, match=f"has format {FORMAT + 1}"):
            run_pipeline(bench.pipeline())

    @pytest.mark.parametrize(
        ("found", "kind"),
        [
            ({"format": FORMAT, "kind": "density"}, "density"),
            ({"formula": "CH4O"}, "molecules"),
            ({"x": 1}, "something else"),
        ],
    )
    def test_results_of_another_kind_are_refused(self, bench, found, kind):
        bench.output.mkdir()
        write_json(bench.output / "results.json", found)
        with pytest.raises(ConfigurationError, match=rf"another kind \({kind}, not bench\)"):
            run_pipeline(bench.pipeline())
        assert bench.calls == []

    def test_results_of_the_version_before_are_recognised(self, bench, capsys):
        bench.output.mkdir()
        write_json(bench.output / "results.json", {"molecule": "alanine dipeptide"})
        run_pipeline(replace(bench.pipeline(), kind="boltzmann"))
        assert "of a former version" in capsys.readouterr().err

    def test_a_stage_by_its_former_name_is_used_when_it_was_finished(self, tmp_path):
        made = []

        def completed(setting, **names):
            return StageFolder.completed(
                tmp_path, names["name"], {"train": "d1", names["name"]: {"steps": setting}},
                lambda folder: made.append(names["name"]) or {"value": setting}, former_name=names.get("former_name", ""),
            )  # fmt: skip

        before = completed(3, name="drive")
        again = completed(3, name="dynamics", former_name="drive")
        assert again == before
        assert made == ["drive"]
        assert completed(4, name="dynamics", former_name="drive").name == "dynamics"
        (before.folder / "results.json").unlink()  # an unfinished one is not
        assert completed(3, name="dynamics", former_name="drive").name == "dynamics"


def test_results_that_stand_under_a_key(tmp_path):
    """Numbers of a second model do not take the place of those of the first."""
    stages = [Stage(name, name, lambda folder, done, name=name: {"size": len(name)}, {}) for name in ("one", "other")]
    stages.append(Stage("compared", "compared", lambda folder, done: {"error": 0.5}, {}, ("other",), under="other"))
    stages[1] = replace(stages[1], under="other")
    results = run_pipeline(Pipeline("x", "x", tmp_path, tuple(stages), "one", {}, lambda outcome: Page("x", "x")))
    assert (results["size"], results["other"]) == (3, {"size": 5, "error": 0.5})


def test_a_stage_in_the_place_of_another(tmp_path):
    """Training data from files: later stages need them by the name of the simulation."""
    read = Stage("files", "read", lambda folder, done: {"frames": 7}, {}, takes_place_of="simulate")
    train = Stage(
        "train", "train", lambda folder, done: {"seen": done["simulate"].results["frames"]}, {}, ("simulate",)
    )
    pipeline = Pipeline("x", "x", tmp_path, (read, train), "train", {}, lambda outcome: Page("x", "x"))
    assert run_pipeline(pipeline)["seen"] == 7
    assert run_pipeline(pipeline, Selection(until="files"))["left_out"] == ["train"]
    assert run_pipeline(pipeline, Selection(until="simulate"))["left_out"] == ["train"]
    (folder,) = (tmp_path / "stages").glob("train-*")
    inputs = json.loads((folder / "inputs.json").read_text())["inputs"]
    assert inputs["simulate"] == StageFolder.open(tmp_path, "files", {}).digest
