"""The claims of both papers: what they say, where, with which number, and by which rule it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Text = Annotated[str, Field(min_length=1)]
Rule = Literal["direction", "value", "identity", "share", "curve"]


class Claim(BaseModel):
    """One statement of a paper that can be measured.

    Attributes:
        id: Its name, unique: the experiment's name, a dot, a word.
        experiment: The experiment that measures it.
        statement: What is claimed, in our words.
        source: Paper, section, page or figure.
        rule: How it is judged; `backforward.report.verdicts` says what each rule asks.
        published: Published numbers by name, in `unit`; empty where the paper gives none.
        unit: Of `published`, `tolerance` and of our estimate: `%`, `s`, `nats`; empty for a pure number.
        tolerance: By how much ours may differ (`value`, `identity`, `curve`); how small an effect counts as none
            (`direction`); the share asked for is in `arguments` (`share`).
        tolerance_why: Why that much.
        data: Data sets the claim is about; empty: any. Runs on another one are stand-ins.
        arguments: Further ones of the rule, such as `sign`.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.[a-z0-9_]+$")]
    experiment: Name
    statement: Text
    source: Text
    rule: Rule
    published: Mapping[str, float] = {}
    unit: str = ""
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tolerance_why: str = ""
    data: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = {}
