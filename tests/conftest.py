"""For every test: capabilities that are probed, nothing left behind, and no skip that CI does not know."""

import os
from collections.abc import Iterator

import pytest

from tests.capabilities import ALLOWED_IN_CI, missing
from tests.leftovers import leftovers, mark_environment


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*capabilities): skip where the machine lacks one (tests/capabilities.py)")
    mark_environment()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for capability in marker.args:
            if reason := missing(capability):
                pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    found = leftovers(tmp_path_factory.getbasetemp())
    assert not found, "left behind by the tests of this module:\n" + "\n".join(found)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, fail the run for every skip that is not allowed, with its reason."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or os.environ.get("CI") != "true":
        return
    refused = [report for report in reporter.stats.get("skipped", []) if skip_reason(report) not in ALLOWED_IN_CI]
    for report in refused:
        reporter.write_line(f"CI does not allow this skip: {report.nodeid}: {skip_reason(report)}", red=True)
    if refused and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skip, without the word that pytest puts before it."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
