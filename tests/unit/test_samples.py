"""Properties of records that the Knover fixtures do not show."""

from hypothesis import given
from hypothesis import strategies as st

from plato2.data.samples import (
    encode_context,
    encode_prefix,
    encode_response,
)
from plato2.data.units import Records

TURNS = st.lists(st.lists(st.integers(3, 99), max_size=12), min_size=1, max_size=8)


@given(TURNS, st.integers(3, 40))
def test_a_context_is_a_suffix_of_whole_turns(turns, max_context):
    context = encode_context(turns, max_context)
    if context is None:
        assert len(turns[-1]) + 2 > max_context
        return
    assert len(context) <= max_context
    kept = context.count(2)
    assert context == [1] + [i for turn in turns[len(turns) - kept :] for i in [*turn, 2]]
    if kept < len(turns):  # one more would not have fitted
        assert len(context) + len(turns[len(turns) - kept - 1]) + 1 > max_context


@given(TURNS, st.integers(3, 40))
def test_cut_turn_only_adds_what_would_be_lost(turns, max_context):
    plain = encode_context(turns, max_context)
    cut = encode_context(turns, max_context, cut_turn=True)
    if plain is not None:
        assert cut == plain
    else:
        assert cut == [1, *turns[-1][-(max_context - 2) :], 2]
        assert len(cut) == max_context


def test_no_turns_are_no_context():
    assert encode_context([], cut_turn=True) is None


@given(st.lists(st.integers(3, 99), max_size=20), st.integers(3, 16))
def test_responses(ids, max_response):
    response = encode_response(ids, max_response)
    assert response == [1, *ids, 2][:max_response]
    assert (response[-1] == 2) == (len(ids) + 2 <= max_response)
    assert encode_prefix(ids, max_response) == [1, *ids][:max_response]


def test_positions_types_and_roles():
    tokens = Records.of([([1, 7, 8, 2, 9, 2, 5, 2], [1, 6, 2])]).tokens()
    assert tokens.is_second.tolist() == [False] * 8 + [True] * 3
    assert tokens.positions("continuous", 4).tolist() == list(range(11))
    assert tokens.positions("relative", 4).tolist() == [11, 10, 9, 8, 7, 6, 5, 4, 0, 1, 2]
    assert tokens.positions("restart", 4).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert tokens.roles().tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]


def test_roles_of_a_truncated_context_count_from_the_last_turn():
    assert Records.of([([1, 9, 2, 5, 2], [1, 2])]).tokens().roles().tolist() == [0, 0, 0, 1, 1, 0, 0]
