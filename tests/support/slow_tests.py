"""Which tests are slow: measured in processor time, kept in ``tests/slow_tests.txt``, marked when tests are collected.

``pytest -p slow_tests --measure-slow`` runs the tests and writes the list again. A fixture that tests share counts for each of
them, because each may be the one that has to make it.
"""

import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

LIST = Path(__file__).parents[1] / "slow_tests.txt"
SECONDS = 2.0
"""Processor time from which a test is slow."""


def pytest_addoption(parser):
    parser.addoption(
        "--measure-slow", action="store_true", help="write tests/slow_tests.txt from the time that tests take"
    )


def pytest_configure(config):
    if config.getoption("--measure-slow"):
        config.pluginmanager.register(Measurement(config), "slow-test-measurement")


def pytest_collection_modifyitems(items):
    slow = set(LIST.read_text().split())
    for item in items:
        if function_of(item.nodeid) in slow:
            item.add_marker(pytest.mark.slow)


def function_of(nodeid):
    """Return the id of a test without its parameters."""
    return nodeid.partition("[")[0]


def processor_seconds():
    """Return the processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Measurement:
    """Processor time of tests and of fixtures; the workers of pytest-xdist send theirs with their reports."""

    def __init__(self, config):
        self.writes = not hasattr(config, "workerinput")
        self.in_fixtures = Counter()
        self.own, self.fixtures, self.used = Counter(), Counter(), defaultdict(set)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        begin, nested = processor_seconds(), sum(self.in_fixtures.values())
        try:
            return (yield)
        finally:
            seconds = processor_seconds() - begin - (sum(self.in_fixtures.values()) - nested)
            if fixturedef.scope != "function":
                self.in_fixtures[f"{fixturedef.baseid}::{fixturedef.argname}"] += seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        return (yield from self._timed(item, "setup"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        return (yield from self._timed(item, "call"))

    def _timed(self, item, phase):
        begin, shared = processor_seconds(), Counter(self.in_fixtures)
        try:
            return (yield)
        finally:
            made = dict(self.in_fixtures - shared)
            own = processor_seconds() - begin - sum(made.values())
            used = [f"{d[-1].baseid}::{d[-1].argname}" for d in item._fixtureinfo.name2fixturedefs.values()]
            item.user_properties.append(("seconds", (phase, own, made, used)))

    def pytest_runtest_logreport(self, report):
        if report.when != "teardown":
            return
        for name, value in report.user_properties:
            if name == "seconds":
                _, own, made, used = value
                self.own[report.nodeid] += own
                self.used[report.nodeid] |= set(used)
                for fixture, seconds in made.items():
                    self.fixtures[fixture] = max(self.fixtures[fixture], seconds)

    def pytest_sessionfinish(self):
        if not self.writes:
            return
        ran = {function_of(test) for test in self.own}
        slow = {
            function_of(test)
            for test, seconds in self.own.items()
            if seconds + sum(self.fixtures[fixture] for fixture in self.used[test]) > SECONDS
        }
        kept = {name for name in LIST.read_text().split() if name not in ran} if LIST.is_file() else set()
        LIST.write_text("\n".join(sorted(slow | kept)) + "\n")
