"""Rates of a device: measured, and known ones."""

from dataclasses import replace

import pytest
import torch

from rlhf import measured
from rlhf.rates import Rates, device_rates, known_rates, measure_rates
from rlhf.trace import Operation


def test_a_cpu_is_measured():
    rates = measure_rates(torch.device("cpu"))
    assert {"matrix float32", "conv float32", "conv backward float32", "attention float32"} <= set(rates.flops)
    assert all(1e8 < value < 1e15 for value in rates.flops.values())
    assert 1e8 < rates.bytes < 1e13
    assert 0 < rates.call_seconds < 1e-2
    assert 0 < rates.autograd_seconds < 1e-2
    assert (rates.link, rates.waits, rates.beside, rates.between) == (None, True, 0, None)
    assert Rates(**rates.to_dict()) == rates


def test_a_device_that_is_known_is_not_measured(monkeypatch):
    row = {"flops": {"matrix float32": 1e12}, "bytes": 1e9, "call_seconds": 1e-6, "autograd_seconds": 0, "link": 1e9}
    monkeypatch.setitem(measured.RATES, "a chip", row)
    monkeypatch.setattr("rlhf.rates.describe", lambda device: "a chip")
    monkeypatch.setattr("rlhf.rates.measure_rates", lambda device: pytest.fail("measured"))
    rates, source = device_rates(torch.device("cpu"))
    assert rates == known_rates("a chip")
    assert source == "measured by bench/planner.py"
    assert known_rates("another") is None


def test_an_operation_takes_the_longer_of_computing_and_moving():
    rates = Rates("any", {"matrix float32": 1e9, "matrix bfloat16": 1e10, "conv float32": 5e8}, 1e9, 0, 0, None)
    assert rates.seconds(Operation("matrix", "bfloat16", 10**9, 10**7)) == pytest.approx(0.1)
    assert rates.seconds(Operation("matrix", "float32", 10**6, 10**9)) == pytest.approx(1.0)
    exchange = Operation("exchange", "bfloat16", 0, 10**7)
    assert rates.seconds(exchange) == pytest.approx(0.01), "one memory for all"
    assert replace(rates, link=1e8).seconds(exchange) == pytest.approx(0.1), "as to the host"
    assert replace(rates, link=1e8, between=1e10).seconds(exchange) == pytest.approx(0.001)
    assert rates.speed("conv", "bfloat16") == 5e8, "of the format that was measured"
    assert rates.speed("attention", "float16") == 1e9, "as products"
