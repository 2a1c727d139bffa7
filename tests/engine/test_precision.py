"""The compute dtype: which devices are warned about."""

import platform
from collections.abc import Iterator

import pytest
import torch

from mobius_train.engine import precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _unwarned() -> Iterator[None]:
    precision._warn_of_emulation.cache_clear()
    yield
    precision._warn_of_emulation.cache_clear()


def _on_cpu(monkeypatch: pytest.MonkeyPatch, machine: str, avx512_bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)


def test_emulated_bf16_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _on_cpu(monkeypatch, "x86_64", avx512_bf16=False, amx=False)
    precision.check_precision("no", CPU)
    assert not caplog.records
    for _ in range(2):
        precision.check_precision("bf16", CPU)
    (record,) = caplog.records
    assert "mixed_precision='no'" in record.getMessage()


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx"),
    [("x86_64", True, False), ("x86_64", False, True), ("aarch64", False, False)],
)
def test_native_or_unknown_bf16_does_not_warn(
    machine: str, avx512_bf16: bool, amx: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _on_cpu(monkeypatch, machine, avx512_bf16, amx)
    precision.check_precision("bf16", CPU)
    assert not caplog.records


def test_only_rank_0_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _on_cpu(monkeypatch, "x86_64", avx512_bf16=False, amx=False)
    monkeypatch.setattr(precision.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(precision.dist, "get_rank", lambda: 1)
    precision.check_precision("bf16", CPU)
    assert not caplog.records


def test_a_torch_that_does_not_report_the_instructions_does_not_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _on_cpu(monkeypatch, "x86_64", avx512_bf16=False, amx=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    precision.check_precision("bf16", CPU)
    assert not caplog.records
