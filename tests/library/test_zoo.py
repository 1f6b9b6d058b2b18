"""A short form of `make zoo`: the written cases and two torchvision networks."""

from __future__ import annotations

import pytest
from tests.oracles import definition
from tests.zoo.__main__ import code_of
from tests.zoo.cases import CASES
from tests.zoo.check import check, is_refusal, train
from tests.zoo.entry import Entry
from tests.zoo.networks import torchvision

OTHERS = [entry for entry in torchvision() if entry.id in {"torchvision densenet", "torchvision vit"}]

every_case = pytest.mark.parametrize("case", CASES + OTHERS, ids=lambda case: case.id)


@every_case
def test_exact_or_refused(case: Entry) -> None:
    row = check(case, optimizers=case.optimizers[:1])
    assert not row.crashed
    assert not row.wrong
    assert not row.refused or (case.refused and case.refused in row.refused)


@pytest.mark.parametrize("case", [case for case in CASES if case.oracle], ids=lambda case: case.id)
def test_naive_engine_is_the_definition(case: Entry) -> None:
    try:
        trace, _ = train(case, case.optimizers[0], engine="naive")
    except (TypeError, ValueError) as error:
        assert is_refusal(error) and case.refused and case.refused in str(error)
        return
    assert definition.compare(case, case.optimizers[0], trace) == []


def test_rows_stay_valid_under_new_comments_but_not_under_new_code() -> None:
    code = 'class A:\n    """Old."""\n\n    def f(self):\n        """Old."""\n        return 1  # old\n'
    assert code_of(code) == code_of('"""New."""\n\n' + code.replace("ld.", "ther.").replace("# old", "# new"))
    assert code_of(code) != code_of(code.replace("return 1", "return 2"))
