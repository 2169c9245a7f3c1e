import pytest

from components.structure import COUNT, NUMBER, check_structure

STRUCTURE = {
    "count": COUNT,
    "seconds": NUMBER,
    "maybe": (None, {"name": str}),
    "rows": [{"right": bool}],
    "any": {int: str},
    "values": [float, ...],
    "either": ({"name": str}, {"number": float}, [str]),
}
GOOD = {
    "count": 0,
    "seconds": 0.5,
    "maybe": None,
    "rows": [{"right": True}],
    "any": {3: "x"},
    "values": [1, 2.5],
    "either": {"number": 3},
    "more": object(),
}


def test_what_has_all_parts_passes():
    check_structure(GOOD, STRUCTURE, "file")
    check_structure({**GOOD, "maybe": {"name": "x"}, "rows": (), "any": {}, "seconds": 2}, STRUCTURE, "file")
    for either in ({"name": "x"}, []):
        check_structure({**GOOD, "either": either}, STRUCTURE, "file")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("count", -1, f"file.count: expected a whole number from 0 to {2**63 - 1}, found -1."),
        ("count", 0.0, f"file.count: expected a whole number from 0 to {2**63 - 1}, found 0.0."),
        ("count", True, f"file.count: expected a whole number from 0 to {2**63 - 1}, found True."),
        ("count", 2**63, f"file.count: expected a whole number from 0 to {2**63 - 1}, found {2**63}."),
        ("seconds", "1", "file.seconds: expected a number, found a text."),
        ("seconds", False, "file.seconds: expected a number, found False."),
        ("seconds", float("nan"), "file.seconds: expected a number, found nan."),
        ("seconds", float("-inf"), "file.seconds: expected a number, found -inf."),
        ("seconds", 10**400, f"file.seconds: expected a number, found 1{39 * '0'}."),
        ("maybe", [], "file.maybe: expected nothing or values by their names, found a list."),
        ("maybe", {}, "file.maybe: expected name, found none."),
        ("maybe", {"name": None}, "file.maybe.name: expected a text, found nothing."),
        ("rows", {}, "file.rows: expected a list, found values by their names."),
        ("rows", [{"right": True}, {"right": 1}], r"file.rows\[1\].right: expected true or false, found 1."),
        ("any", {"x": "x"}, "file.any, the name x: expected a whole number, found a text."),
        ("any", {3: 4}, "file.any.3: expected a text, found 4."),
        ("values", [], "file.values: expected at least one, found none."),
        ("values", ["x"], r"file.values\[0\]: expected a number, found a text."),
        ("either", {"name": 1}, "file.either.name: expected a text, found 1."),
        ("either", 3, "file.either: expected values by their names or values by their names or a list, found 3."),
    ],
)
def test_the_part_that_differs_is_named(part, value, message):
    with pytest.raises(ValueError, match=f"^{message}$".replace(".$", r"\.$")):
        check_structure({**GOOD, part: value}, STRUCTURE, "file")


def test_what_is_no_dictionary_or_lacks_a_part_is_named():
    with pytest.raises(ValueError, match=r"^file: expected values by their names, found a list\.$"):
        check_structure([], STRUCTURE, "file")
    for part in STRUCTURE:
        with pytest.raises(ValueError, match=rf"^file: expected {part}, found none\.$"):
            check_structure({key: value for key, value in GOOD.items() if key != part}, STRUCTURE, "file")
