"""A short form of `python -m bench.hostile`."""

from bench.gateway import RunningGateway
from bench.hostile import GROWTH_MB, attack, faults, schemathesis
from bench.observe import resident_bytes


def test_hostile_requests(gateway_process: RunningGateway) -> None:
    attack(gateway_process.address, 300)
    before = resident_bytes([gateway_process.pid])
    outcomes = attack(gateway_process.address, 700, seed=300)
    assert outcomes.total() == 700 and faults(outcomes) == {}
    assert outcomes["400"] > 100 and outcomes["200"] > 5
    assert resident_bytes([gateway_process.pid]) - before < GROWTH_MB * 2**20


def test_schemathesis(gateway_process: RunningGateway) -> None:
    assert schemathesis(gateway_process.address, 20)["generated"] > 50
