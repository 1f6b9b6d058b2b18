"""The written cases: small networks, each for one way in which networks are built."""

from __future__ import annotations

from tests.zoo.cases.forms import FORMS
from tests.zoo.cases.kinds import KINDS
from tests.zoo.cases.modes import MODES
from tests.zoo.cases.state import STATE
from tests.zoo.cases.statistics import STATISTICS
from tests.zoo.cases.varying import VARYING
from tests.zoo.entry import Entry

CASES: list[Entry] = [*MODES, *STATISTICS, *STATE, *VARYING, *FORMS, *KINDS]

assert len({case.id for case in CASES}) == len(CASES), "two cases have one id"
