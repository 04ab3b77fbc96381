from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stethoscope.watches._streaks import confirm, listing


def told(hits_by_step, seen=("a", "b", "c", "d"), **options):
    memory, news = {}, []
    for step, hits in enumerate(hits_by_step):
        memory, new = confirm(memory, "code", 10 * step, hits, seen, **options)
        news.append(new)
    return news


def test_a_state_is_news_once_and_again_after_it_was_left():
    assert told([["a"]] * 5, times=2) == [[], ["a"], [], [], []]
    assert told([["a"], ["a"], [], ["a"], ["a"]], times=2) == [[], ["a"], [], [], ["a"]]
    assert told([["a"], [], ["a"], [], ["a"]], times=2) == [[], [], [], [], []]


def test_a_span_of_steps_must_pass():
    assert told([["a"]] * 4, times=1, steps=20) == [[], [], ["a"], []]


def test_more_modules_are_news_only_when_they_double():
    assert told([["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]], times=1) == [["a", "b"], [], ["a", "b", "c", "d"]]


def test_a_module_that_was_not_looked_at_keeps_its_count():
    memory, _ = confirm({}, "code", 0, ["a"], ["a"], times=2)
    memory, _ = confirm(memory, "code", 10, [], ["b"], times=2)
    assert confirm(memory, "code", 20, ["a"], ["a"], times=2)[1] == ["a"]


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=4), max_size=30), st.integers(1, 4))
def test_news_is_a_hit_of_this_step_and_never_comes_before_its_time(history, times):
    for i, news in enumerate(told(history, times=times)):
        assert set(news) <= set(history[i])
        for module in news:
            assert all(module in hits for hits in history[max(0, i - times + 1) : i + 1])


def test_a_listing_names_the_root():
    assert listing(["", "b"]) == "the model itself, 'b'"
