"""The modes and clip modes that YAML files name."""

import pytest

from qdq.distiller import ClipMode, LinearQuantMode, ModePair, parse_clip, parse_mode


@pytest.mark.parametrize("mode", LinearQuantMode)
def test_one_mode_is_for_both(mode):
    assert parse_mode(mode.name) == parse_mode(mode) == ModePair(mode, mode)


def test_a_mapping_names_both():
    pair = parse_mode({"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"})
    assert pair == ModePair(LinearQuantMode.ASYMMETRIC_UNSIGNED, LinearQuantMode.SYMMETRIC)
    assert parse_mode(pair) is pair


@pytest.mark.parametrize("value", ["SYM", "symmetric", ""])
def test_an_unknown_mode_is_refused_with_the_known_ones(value):
    with pytest.raises(ValueError, match=r"known are SYMMETRIC, .*ASYMMETRIC_SIGNED"):
        parse_mode(value)


@pytest.mark.parametrize("value", [None, 1, ["SYMMETRIC"], {"activations": 1, "weights": 2}])
def test_a_mode_of_another_type_is_refused(value):
    with pytest.raises(TypeError, match="expected is a name"):
        parse_mode(value)


@pytest.mark.parametrize("keys", [{"activations"}, {"activations", "weights", "bias"}])
def test_other_keys_are_refused(keys):
    with pytest.raises(ValueError, match="expected are activations and weights"):
        parse_mode(dict.fromkeys(keys, "SYMMETRIC"))


@pytest.mark.parametrize("clip", ClipMode)
def test_clip_modes_by_name(clip):
    assert parse_clip(clip.name) is parse_clip(clip) is clip


def test_an_unknown_clip_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="known are NONE, AVG, N_STD, GAUSS, LAPLACE"):
        parse_clip("MEAN")
    with pytest.raises(TypeError, match="expected is a name"):
        parse_clip(2.0)
