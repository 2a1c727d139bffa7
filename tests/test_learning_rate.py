"""The learning rate over a run."""

from pathlib import Path

import pytest

from mobius_train.config import RunConfig
from mobius_train.config_sections import DataConfig
from mobius_train.learning_rate import learning_rates


def config(**changes: object) -> RunConfig:
    fields = {
        "data": DataConfig(train="x"),
        "output_dir": Path("o"),
        "max_train_steps": 100,
        "learning_rate": 1e-4,
    }
    return RunConfig(**(fields | changes))


def test_warm_up_rises_to_the_rate_and_never_starts_at_zero() -> None:
    rate = learning_rates(config(lr_scheduler="constant_with_warmup", lr_warmup_steps=10), 1)
    assert rate(0) == pytest.approx(1e-5)
    assert rate(9) == rate(50) == rate(99) == pytest.approx(1e-4)


def test_cosine_falls_towards_zero_and_the_last_step_still_counts() -> None:
    rate = learning_rates(config(lr_scheduler="cosine"), 1)
    rates = [rate(step) for step in range(100)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-6


def test_scaling_is_by_batch_accumulation_and_ranks() -> None:
    scaled = learning_rates(config(scale_lr=True, train_batch_size=2, gradient_accumulation_steps=2), 4)
    assert scaled(0) == pytest.approx(1.6e-3)  # the paper's


def test_a_warm_up_that_has_no_effect_is_named(caplog: pytest.LogCaptureFixture) -> None:
    learning_rates(config(lr_scheduler="constant_with_warmup", lr_warmup_steps=10), 1)
    learning_rates(config(), 1)
    assert not caplog.text
    learning_rates(config(lr_warmup_steps=10), 1)
    assert "lr_scheduler=constant_with_warmup" in caplog.text
