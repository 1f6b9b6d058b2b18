"""The settings of a run: types, ranges, and the part that determines its result.

Imports neither torch nor Lightning, so that a sweep skips finished runs at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from backforward_suite.errors import BadInput
from backforward_suite.hardware import cpu_count, gpu_count
from backforward_suite.targets import refuse_unread

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"  # of a sweep: a path within outputs/
Minutes = Annotated[float, Field(gt=0, le=5_000_000)]  # ten years, the range of timers


def _switched(value: object) -> object:
    """Undo YAML, which reads a bare `on` or `off` as true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switched = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switched)]

# Keys that do not change the result: they are neither in a run's name nor in the hash of its settings. `diagnostics` is
# not one of them, though it changes no weight and no metric: what it measures is part of the result, so a finished run
# without diagnostics does not answer a request with them. That run is trained in its own folder, bitwise equal.
WITHOUT_EFFECT = frozenset(
    {
        "name",
        "scale",
        "timeout_min",
        "go_on_from",  # a run whose settings differ in `max_epochs` only
        "data.root",
        "trainer.accelerator",
        "trainer.progress_bar",
        "trainer.checkpoint_minutes",
        "trainer.capture",
        "trainer.profiler",
        "logger",  # and its keys
    }
)


def has_effect(key: str) -> bool:
    """Return whether a dotted key, or a group, can change a result."""
    return key not in WITHOUT_EFFECT and key.partition(".")[0] not in WITHOUT_EFFECT


# Keys newer than the first committed results, each with the value that changes nothing. At that value a key is left out
# of the hash, so that older results stay valid.
ADDED_LATER = {
    "head_lr": None,
    "stop_loss": None,
    "patience": None,
    "min_delta": 0.0,
    "trainer.limit_train_batches": None,
    "data.layout": "auto",
    "micro_batches": 1,
}


# The names of our own classes in the hash of settings: the paths under which results were first committed. A class that
# moves gets a line here, so that finished runs and committed results stay valid. A new class needs none: its first path
# is its public name.
PUBLIC_NAMES = {
    "backforward_suite.build.switching": "backforward.training.switching",
    "backforward_suite.studies.Moments": "backforward.studies.Moments",
    "backforward_suite.studies.OneStep": "backforward.studies.OneStep",
    "backforward_suite.studies.Speed": "backforward.studies.Speed",
    "backforward_suite.study_rules.Dose": "backforward.study_rules.Dose",
    "backforward_suite.study_rules.FreshDirection": "backforward.study_rules.FreshDirection",
    "backforward_suite.study_rules.FreshLength": "backforward.study_rules.FreshLength",
    "backforward_suite.study_rules.ShiftNoise": "backforward.study_rules.ShiftNoise",
}


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Group(_Model):
    """A group whose further keys are arguments of its target."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    target: str | None = Field(alias="_target_")


class ScheduleSettings(_Group):
    """The `schedule` group."""

    interval: Literal["epoch", "step"] = "epoch"


class NormSettings(_Model):
    """The `norm` group: one of the models' own, or a function of a layer (`_target_`) and its arguments."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    kind: str
    target: str | None = Field(alias="_target_", default=None)


def _with_home(value: object) -> object:
    """Expand a leading `~`, which no shell has expanded in a config."""
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (raises for no unknown user)


class DataSettings(_Model):
    """The `data` group."""

    name: str
    root: Annotated[str, BeforeValidator(_with_home)]
    protocol: Literal["holdout", "paper", "poster"]
    size: Count | None
    shuffle: bool
    train_images: Count | None
    evaluation_images: Count | None
    augment: Literal["none", "flip"]
    layout: Literal["auto", "nhwc", "nchw"] | None = None  # of data=npz only


class TrainerSettings(_Model):
    """The `trainer` group."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Count
    precision: Literal["32-true", "64-true", "bf16-mixed"]
    matmul_precision: Literal["highest", "high", "medium"]
    progress_bar: bool | Literal["auto"]
    log_every_n_steps: Count
    checkpoint_minutes: Positive
    capture: Switched
    limit_train_batches: Count | None = None
    profiler: Literal["simple", "advanced", "pytorch"] | None = None


When = list[Literal["epoch", "log"] | Count]


class DiagnosticsSettings(_Model):
    """The `diagnostics` group: when each is due (an empty list: never), and on how many images."""

    shift: When
    update: When
    inputs: When
    gaussianity: When
    histograms: When
    jacobian: When
    proposition1: When
    sharpness: When
    pictures: When
    samples: Count | None

    def when(self) -> dict[str, When]:
        """Return, by diagnostic, when it is due."""
        return {key: value for key, value in self if key != "samples"}


class Settings(_Model):
    """All settings of a run, in the order of `conf/train.yaml`."""

    method: _Group
    model: _Group
    norm: NormSettings
    data: DataSettings
    optimizer: _Group
    schedule: ScheduleSettings
    trainer: TrainerSettings
    diagnostics: DiagnosticsSettings
    logger: _Group | None = None
    study: _Group | None
    scale: Literal["smoke", "small", "medium", "paper"] | None
    name: Annotated[str, Field(pattern=NAME)]
    lr: NonNegative
    head_lr: NonNegative | None = None
    batch_size: Count
    micro_batches: Count = 1
    max_epochs: Count
    stop_loss: Positive | None = None
    patience: Count | None = None
    min_delta: NonNegative = 0.0
    weight_decay: NonNegative
    data_norm: Literal["none", "channel", "global", "batch"]
    max_grad_norm: Positive | None
    timeout_min: Minutes | None
    go_on_from: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)]

    @classmethod
    def check(cls, values: Mapping[str, Any], here: bool = True) -> Settings:
        """Check plain values of a composed config and return them as settings.

        Args:
            values: The values.
            here: Whether the run is for this machine, whose GPUs and cores are then checked.

        Raises:
            BadInput: A value has the wrong type or range, or two values exclude each other. The message names the
                first fault in the order of `conf/train.yaml`.
        """
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            raise BadInput(_first_fault(error)) from None
        if here:
            settings._check_machine()
        if settings.go_on_from is not None and (reason := settings.why_not_go_on()):
            raise BadInput(reason)
        settings._check_combination()
        return settings

    def _check_machine(self) -> None:
        devices, accelerator, gpus = self.trainer.devices, self.trainer.accelerator, gpu_count()
        if accelerator == "gpu" and not gpus:
            raise BadInput("trainer.accelerator=gpu: this machine has no GPU; give trainer.accelerator=cpu")
        on_gpu = gpus > 0 and accelerator != "cpu"
        if self.trainer.capture == "on" and not on_gpu:
            why = "this machine has no GPU" if not gpus else "not trainer.accelerator=cpu"
            raise BadInput(f"trainer.capture=on: a CUDA graph needs a GPU, {why}; give trainer.capture=auto or off")
        have, kind = (gpus, "GPU") if on_gpu else (cpu_count(), "CPU core")
        if devices > have:
            kinds = kind if have == 1 else f"{kind}s"
            raise BadInput(f"trainer.devices={devices}: this machine has {have} {kinds}; give at most {have}")

    def _check_combination(self) -> None:
        devices = self.trainer.devices
        if self.study is not None:
            self._check_study()
        self._check_norm()
        if self.min_delta and self.patience is None:
            raise BadInput(f"min_delta={self.min_delta} belongs to patience; give patience=200, say, or no min_delta")
        if (self.method.model_extra or {}).get("engine") == "shortcut":
            if devices > 1:
                raise BadInput(f"engine=shortcut works on one device, not {devices}; give method.engine=replay")
            if self.trainer.precision == "bf16-mixed":
                raise BadInput("engine=shortcut needs full precision; give trainer.precision=32-true")
        if "shortcut" in _values(self.method.model_extra) and (self.diagnostics.shift or self.diagnostics.update):
            raise BadInput(
                "diagnostics.shift and diagnostics.update need gradients, and engine=shortcut computes none;"
                " give method.engine=replay, or diagnostics=off"
            )
        self._check_capture()
        self._check_batch()

    def _check_batch(self) -> None:
        devices, batch = self.trainer.devices, self.batch_size
        if batch % devices:
            raise BadInput(f"batch_size={batch} cannot be shared by {devices} devices; give a multiple of {devices}")
        if batch % (least := devices * self.micro_batches):
            parts = f"{least} micro-batches" + (f" on {devices} devices" if devices > 1 else "")
            raise BadInput(f"batch_size={batch} cannot be split into {parts}; give a multiple of {least}")
        if self.micro_batches > 1 and "shortcut" in _values(self.method.model_extra):
            raise BadInput("engine=shortcut computes a batch as a whole; give method.engine=replay, or micro_batches=1")
        each = "" if devices == 1 else " on each device"
        what = "batch" if self.micro_batches == 1 else "micro-batch"
        if batch == least and self.norm.kind in ("batch", "noisy_batch"):
            raise BadInput(
                f"norm={self.norm.kind} needs at least two samples per {what}{each}; "
                f"give batch_size={2 * least} or more, or norm=prop"
            )
        if batch == least and self.data_norm == "batch":
            raise BadInput(f"data_norm=batch needs at least two samples per {what}{each}; give data_norm=global")

    def _check_capture(self) -> None:
        if self.trainer.capture == "on" and self._looks_into_steps():
            raise BadInput(
                "diagnostics.shift and diagnostics.update look into a step, and trainer.capture=on replays it whole;"
                " give trainer.capture=auto or off, or diagnostics=off"
            )
        if self.trainer.capture == "on" and self.draws_anew:
            raise BadInput(
                "this method draws anew for each batch, and trainer.capture=on replays one step;"
                " give trainer.capture=auto or off"
            )
        if self.trainer.capture == "on" and self.trainer.devices > 1:
            raise BadInput(
                f"trainer.capture=on works on one device, not {self.trainer.devices}; give trainer.capture=auto or off"
            )

    def _check_norm(self) -> None:
        kind, model = self.norm.kind, self.model
        if self.norm.target is None and kind not in ("none", "batch", "prop"):
            raise BadInput(
                f"norm.kind={kind}: input should be 'none', 'batch' or 'prop', or norm._target_ a function of a layer"
            )
        if kind != "none" and (model.model_extra or {}).get("norm") != kind:
            raise BadInput(
                f"norm={kind} does not reach the model: {model.target} is not given norm=${{norm.kind}}; give norm=none"
            )

    def _looks_into_steps(self) -> bool:
        return bool(self.diagnostics.shift or self.diagnostics.update)

    @property
    def draws_anew(self) -> bool:
        """Whether the update rule draws random numbers for each batch."""
        noise = self.method.target == "backforward_suite.study_rules.ShiftNoise"
        return noise or "random" in _values(self.method.model_extra)

    @property
    def capture(self) -> Literal["auto", "on", "off"]:
        """`trainer.capture`, or `off` if diagnostics or method require it."""
        return "off" if self._looks_into_steps() or self.draws_anew else self.trainer.capture

    def why_not_go_on(self) -> str | None:
        """Why these settings leave no room for `go_on_from`; None if they do."""
        if self.study is not None:
            return "go_on_from continues a training, and this is a study; leave it out"
        if self.trainer.devices > 1:
            return f"go_on_from works on one device, not {self.trainer.devices}; give trainer.devices=1"
        if self.stop_loss is not None or self.patience is not None:
            return "go_on_from needs a run that ends at max_epochs only; leave out stop_loss and patience"
        return None

    def _check_study(self) -> None:
        if self.micro_batches > 1:
            raise BadInput("micro_batches splits the batches of a training, and a study has none; leave it out")
        if self.trainer.devices > 1:
            raise BadInput(f"a study works on one device, not {self.trainer.devices}; give trainer.devices=1")
        if self.trainer.precision == "bf16-mixed":
            raise BadInput("a study needs full precision; give trainer.precision=32-true")
        if self.stop_loss is not None or self.patience is not None:
            raise BadInput("stop_loss and patience end a training, and a study has none; leave them out")
        if any(self.diagnostics.when().values()):
            raise BadInput("diagnostics watch a training, and a study has none; give diagnostics=off")


@dataclass(frozen=True)
class Request:
    """The checked settings of a run: what was validated is what is built, hashed and recorded.

    Attributes:
        cfg: The composed config, from which objects are built.
        settings: The same, typed.
        values: The same as plain values.
        choices: By group, the chosen config, such as `method: bfp`.
        hydra: Hydra's own node; None outside Hydra.
    """

    cfg: DictConfig
    settings: Settings
    values: dict[str, Any]
    choices: dict[str, str]
    hydra: DictConfig | None = None

    @classmethod
    def of(cls, cfg: DictConfig, hydra: DictConfig | None = None, *, here: bool = True) -> Request:
        """Check a composed config.

        Args:
            cfg: The config. Hydra's node in it, if any, is left out.
            hydra: Hydra's node.
            here: As for `Settings.check`.

        Raises:
            BadInput: As for `Settings.check`.
        """
        own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        assert isinstance(own, DictConfig)
        values = plain(own)
        made = {} if hydra is None else hydra.runtime.choices
        groups = [group for group in Settings.model_fields if has_effect(group)]
        choices = {group: str(made[group]) for group in groups if made.get(group) is not None}
        settings = Settings.check(values, here)
        if hydra is not None:  # else these are the settings of an earlier run, say
            refuse_unread(own, values, {_key_of(text) for text in hydra.overrides.task})
        return cls(own, settings, values, choices, hydra)

    @property
    def hash(self) -> str:
        """SHA-256 of the settings that determine the result."""
        return fingerprint(self.values)


def _key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _values(settings: Mapping[str, Any] | None) -> list[Any]:
    """Return all values of nested settings."""
    return [value for _, value in flatten(settings or {})]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain values, with interpolations resolved.

    Raises:
        BadInput: A value is missing, or an interpolation cannot be resolved.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise BadInput(f"{error.full_key} has no value; give it one: {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise BadInput(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted key, value)` for each leaf of nested settings, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine a result: dotted key -> value, our own classes by their public names.

    Keys in `ADDED_LATER` are left out at the value that changes nothing.
    """
    return {
        key: PUBLIC_NAMES.get(value, value) if key.rpartition(".")[2] == "_target_" else value
        for key, value in flatten(values)
        if has_effect(key) and not (key in ADDED_LATER and value == ADDED_LATER[key])
    }


def fingerprint(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings that determine a result."""
    return hashlib.sha256(json.dumps(deciding(values), sort_keys=True).encode()).hexdigest()


def differing(asked: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return the keys in which two settings differ, as `key=asked (there: found)`, or ''."""
    here, there = deciding(asked), deciding(found)
    pairs = {key: (here.get(key), there.get(key)) for key in {**here, **there} if here.get(key) != there.get(key)}
    own = [pair for key, pair in pairs.items() if "." not in key]
    # `optimizer.lr` follows `lr`: name only what was set.
    named = {key: pair for key, pair in pairs.items() if "." not in key or pair not in own}
    return ", ".join(f"{key}={asked_for} (there: {there_is})" for key, (asked_for, there_is) in named.items())


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"][0].lower() + fault["msg"][1:]
    if fault["type"] == "missing":
        return f"{key} is missing; conf/train.yaml lists the keys"
    if fault["type"] == "extra_forbidden":
        return f"{key} is no key here; conf/train.yaml lists the keys"
    return f"{key}={fault['input']}: {message}"
