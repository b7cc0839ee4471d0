"""Hooks for pytest-xdist: a worker that dies ends the suite with a failure.

xdist 3.8 starts another worker in its place. With ``--dist loadfile`` it hands that one the files of the dead one, the
finished ones first; of those nothing is left to run, so nothing is ever reported, and the suite waits for ever. Were it
not so, the test that killed the first worker would kill the next.
"""

import pytest

_DEAD: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "maxworkerrestart"):
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    if error:
        _DEAD.append(f"{node}: {error}")


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport, sched: object) -> None:
    """Stop at once: the other workers would finish all the files that they have."""
    sched.config.hook.pytest_runtest_logreport(report=report)  # type: ignore[attr-defined]
    pytest.exit(f"a worker died in {crashitem}; tests that it and the others had not run are not reported", 1)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker that dies while it collects, or between tests, fails the suite, too."""
    if _DEAD and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
