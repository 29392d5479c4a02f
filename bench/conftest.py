"""What the stored baselines of pytest-benchmark say of the machine: versions, not its name."""

from bench.records import Settings, machine

SAME = "device", "cores", "threads", "kernels", "versions"


def pytest_benchmark_update_machine_info(config, machine_info):
    found = machine(Settings())
    machine_info.clear()
    machine_info.update({key: found[key] for key in SAME})
