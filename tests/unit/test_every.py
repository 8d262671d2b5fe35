from __future__ import annotations

from tuner.every import Every


class Clock:
    """Seconds that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_due_at_once_and_then_after_each_pause() -> None:
    clock = Clock()
    every = Every(5.0, clock=clock)
    assert every.is_due()
    for now, due in ((100.0, False), (104.9, False), (105.0, True), (105.1, False), (130.0, True)):
        clock.now = now
        assert every.is_due() is due, now


def test_the_first_pause_may_come_first() -> None:
    clock = Clock()
    every = Every(5.0, at_once=False, clock=clock)
    assert not every.is_due()
    clock.now += 5.0
    assert every.is_due()


def test_a_pause_can_be_longer_or_be_ended() -> None:
    clock = Clock()
    every = Every(5.0, clock=clock)
    every.begin_pause(at_least=20.0)
    clock.now += 19.9
    assert not every.is_due()
    every.end_pause()
    assert every.is_due()
    every.begin_pause(at_least=1.0)
    clock.now += 4.9
    assert not every.is_due()
