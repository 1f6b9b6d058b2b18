"""The claims of both papers and our own questions: source, published number, and the rule that judges them.

To add one, write an entry in `claims.yaml` and name its word (the part of its id after the dot) in the experiment that
measures it; `backforward_suite.report.experiments` explains how.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from backforward_suite.errors import BadInput

FILE = Path(__file__).parent / "claims.yaml"
PUBLISHED_RUNS = Path(__file__).parent / "published" / "bfp_runs.csv"

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Text = Annotated[str, Field(min_length=1)]
Rule = Literal["direction", "value", "identity", "share", "curve"]
Number = float | Annotated[tuple[float, float], Field(strict=False)]


class Claim(BaseModel):
    """A statement of a paper that can be measured, or a question that no paper answers.

    Attributes:
        id: Its unique name: the experiment's name, a dot, a word.
        experiment: The experiment that measures it.
        kind: `claim`: a paper states it. `question`: no paper does; it is answered, and counted separately.
        statement: What is claimed, in our words; a question ends with a question mark.
        source: Paper, section, page or figure; for a question, its motivation.
        rule: How it is judged; `backforward_suite.report.verdicts` explains the rules.
        published: Published numbers by name, in `unit`, or pairs of numbers for a published range; empty if the paper
            gives none.
        unit: The unit of `published`, `tolerance` and our estimate: `%`, `s`, `nats`; empty for a number or a ratio.
        tolerance: How far ours may differ (`value`, `identity`, `curve`), or which effect counts as none (`direction`).
            A `share` has no tolerance but `arguments["at_least"]`.
        tolerance_why: The reason for it, or how the paper's words became a number.
        post_hoc: Whether tolerance, rows or wording were set after results were known.
        data: The data sets that the claim is about; empty for any. Runs on others are stand-ins.
        least_images: The training images that a run must have seen; with fewer a row stays open.
        paper_images: Training images that a run sees under the paper's whole protocol, for estimates of its price.
        arguments: Of the rule. `sign`: the sign of the claimed effect (direction); 0 for no effect either way. `over`:
            how many rows must agree, `all` (the default), `most` or `any`. `rows`: labels of the rows that the claim is
            about; others are only shown. `negated`: the claim is that there is no effect of this sign. `relative`: the
            tolerance is relative to the number (value). `at_least`: see above. `protocol`: only rows under the paper's
            whole protocol are judged. Further arguments belong to the experiment.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.[a-z0-9_]+$")]
    experiment: Name
    kind: Literal["claim", "question"] = "claim"
    statement: Text
    source: Text
    rule: Rule
    published: Mapping[str, Number] = {}
    unit: str = ""
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tolerance_why: str = ""
    post_hoc: bool = False
    data: Annotated[tuple[str, ...], Field(strict=False)] = ()
    least_images: Annotated[int, Field(ge=0)] = 0
    paper_images: Annotated[int, Field(ge=0)] = 0
    arguments: Mapping[str, Any] = {}

    @property
    def word(self) -> str:
        """Its id within its experiment."""
        return self.id.partition(".")[2]

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if self.id.partition(".")[0] != self.experiment:
            raise ValueError(f"is filed under experiment {self.experiment}")
        if self.rule == "share":
            if not 0 <= self.arguments.get("at_least", -1) <= 1:
                raise ValueError("asks for a share: give arguments.at_least between 0 and 1")
        elif self.tolerance is None:
            raise ValueError(f"rule {self.rule} needs a tolerance")
        if not self.tolerance_why:
            raise ValueError("give the reason for the tolerance: tolerance_why")
        if self.rule == "direction" and self.arguments.get("sign") not in (-1, 0, 1):
            raise ValueError("claims a direction: give arguments.sign, 1, -1 or 0")
        if self.rule in ("value", "identity") and not self.published:
            raise ValueError(f"rule {self.rule} needs published numbers")
        if self.arguments.get("over", "all") not in ("all", "most", "any"):
            raise ValueError("arguments.over is all, most or any")
        if (self.kind == "question") != self.statement.endswith("?"):
            raise ValueError("a question ends with a question mark, and a claim does not")
        return self

    def number(self, label: str) -> float:
        """A published number that is not a range."""
        found = self.published[label]
        assert isinstance(found, float | int), f"{self.id}: {label} is a range"
        return float(found)


def read_claims(path: Path = FILE) -> tuple[Claim, ...]:
    """Read a file of claims, in its order.

    Raises:
        BadInput: The file is not a list of claims, or an entry lacks a key, has an unknown one or a duplicate id.
    """
    try:
        found = TypeAdapter(tuple[Claim, ...]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise BadInput(f"{path}: entry {where}: {fault['msg']}") from None
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: {str(error).splitlines()[0]}") from None
    ids = [claim.id for claim in found]
    taken = next((name for name in ids if ids.count(name) > 1), None)
    if taken is not None:
        raise BadInput(f"{path}: two claims are called {taken}")
    return found


@cache
def claims_of(experiment: str) -> dict[str, Claim]:
    """The claims that an experiment judges, by the word after the dot of their id."""
    return {claim.word: claim for claim in read_claims() if claim.experiment == experiment}


@cache
def published_runs() -> pd.DataFrame:
    """The published runs of Backforward Propagation; see the head of the file.

    Returns:
        Columns lr, arm (`sgd`, `bfp_poster`), epoch, train_loss_as_logged (nats), weight_norm, test_accuracy and
        test_loss (nats).
    """
    return pd.read_csv(PUBLISHED_RUNS, comment="#")
