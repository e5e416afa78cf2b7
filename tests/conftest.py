"""Hypothesis profiles, the option `--probe-every-batch`, and what every test may rely on."""

import os
from contextlib import ExitStack
from dataclasses import asdict

import pytest
import simulated
import torch
from hypothesis import HealthCheck, settings

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=40, derandomize=True, print_blob=True, **common)
settings.register_profile("dev", max_examples=40, **common)
settings.register_profile("thorough", max_examples=1000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)
simulated.register()  # before the first backward pass, which starts one thread for each device that is known


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption(
        "--probe-every-batch",
        action="store_true",
        help="build every batch that uses known facts once more with nothing known, and compare the two",
    )


def pytest_configure(config):
    if config.getoption("--probe-every-batch"):
        config.pluginmanager.register(ProbeEveryBatch(config), "probe-every-batch")


class ProbeEveryBatch:
    """Compares the builds of all tests with builds that know nothing, and reports how many there were."""

    def __init__(self, config):
        from long_form import Counts, counted

        self.config, self.counts, self.stack = config, Counts(), ExitStack()
        self.stack.enter_context(counted(self.counts, compares=True))

    def pytest_sessionfinish(self):
        self.stack.close()
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["facts"] = asdict(self.counts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.counts.add(getattr(node, "workeroutput", {}).get("facts", asdict(type(self.counts)())))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("known facts")
        terminalreporter.write_line(str(self.counts))
