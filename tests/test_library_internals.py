"""docs/overrides.md names what the project takes from inside its libraries, and the installed ones have it."""

import pytest
from library_internals import has, internals_in_use, listed


def test_every_private_name_of_a_library_is_listed_and_every_listed_one_is_in_use():
    found, table = internals_in_use(), listed()
    assert {name: sorted(files) for name, files in found.items() if name not in table} == {}, "not in docs/overrides.md"
    assert sorted(table.keys() - found.keys()) == [], "in docs/overrides.md, and no longer in use"


@pytest.mark.parametrize("name", listed())
def test_the_installed_version_has_what_is_listed(name):
    owner, use, why = listed()[name]
    assert use in ("overrides", "calls", "reads")
    assert len(why.split()) > 1
    assert has(owner, name), f"{owner} has no {name}: {why}"


def test_a_name_that_no_library_has_is_noticed():
    assert has("trl.GRPOTrainer", "_generate")  # a method
    assert has("trl.GRPOTrainer", "_buffered_inputs")  # an attribute, which a method sets
    assert has("torch.cpu", "_init_amx")
    assert not has("trl.GRPOTrainer", "_no_such_name")
    assert not has("trl.NoSuchTrainer", "_generate")
