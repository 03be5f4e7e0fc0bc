import pytest

from hff_modules.layers import parse_layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ([9, 3, 6], [3, 6, 9]),
        (6, [6]),
        ("all", list(range(13))),
        ("every:3", [3, 6, 9, 12]),
        ("every:5", [5, 10]),
        ("first:2", [1, 2]),
        ("last:4", [9, 10, 11, 12]),
        ("4-6", [4, 5, 6]),
        ("3, 6,9", [3, 6, 9]),
        ([0, 12], [0, 12]),
    ],
)
def test_the_grammar_gives_the_layers_it_says(spec, expected):
    assert parse_layers(spec, num_layers=12) == expected


def test_all_starts_at_the_lowest_layer_that_may_be_chosen():
    assert parse_layers("all", num_layers=3, lowest=1) == [1, 2, 3]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ([3, 13], "no layer 13.*layers 0 to 12"),
        ([-1], "no layer -1"),
        ([3, 3], "layer 3 more than once"),
        ([], "selects no layer"),
        ([2.5], "2.5 is not a layer number"),
        ([True], "True is not a layer number"),
        ("last:13", "from 1 to 12"),
        ("every:0", "from 1 to 12"),
        ("9-4", "selects no layer"),
        ("4-14", "no layer 13"),
        ("top", "not understood.*every:3"),
    ],
)
def test_a_wrong_choice_is_refused_and_says_what_there_is(spec, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_layers(spec, num_layers=12)


def test_state_zero_is_refused_where_only_layers_count():
    with pytest.raises(ValueError, match="layers 1 to 12"):
        parse_layers([0, 1], num_layers=12, lowest=1)
