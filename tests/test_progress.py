"""Progress: told to whoever shows it, and to nobody otherwise."""

import contextlib

import pytest

from filterpress.progress import progress, shown_by


class Recorded(list):
    @contextlib.contextmanager
    def display(self, description, total):
        self.append((description, total))
        try:
            yield lambda: self.append("advance")
        finally:
            self.append("end")


def work():
    with progress("train", total=2) as advance:
        advance()
        advance()


def test_a_display_is_told_of_the_work_of_each_unit_and_of_the_end():
    shown = Recorded()
    with shown_by(shown.display):
        work()
    assert shown == [("train", 2), "advance", "advance", "end"]


def test_nothing_is_shown_once_the_display_is_gone():
    shown = Recorded()
    with shown_by(shown.display):
        pass
    work()
    assert shown == []


def test_the_end_is_told_when_the_work_fails():
    shown = Recorded()
    with (
        shown_by(shown.display),
        pytest.raises(ZeroDivisionError),
        progress("train", total=2),
    ):
        raise ZeroDivisionError
    assert shown == [("train", 2), "end"]
