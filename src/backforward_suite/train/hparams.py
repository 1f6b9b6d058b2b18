"""A run's row in TensorBoard's HParams: its settings and its final metrics.

TensorBoard reads the columns of its table from one run, an arbitrary one (`Context._find_experiment_tag` in
`tensorboard/plugins/hparams/backend_context.py`), so every run of a sweep declares the same columns. It ignores their
order and sorts them: those marked as differing first, then by name (`_sort_and_reduce_to_hparams_limit` there, version
2.21). The table shows a column's display name. So method, lr and seed have names that sort first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from backforward_suite.config import Request, deciding, flatten, has_effect
from backforward_suite.runs import files

METRICS = (
    *("loss/train", "accuracy/train", "loss/validation", "accuracy/validation", "loss/test", "accuracy/test"),
    "weight_norm/total",
)
FIRST = {"method": "0 method", "lr": "1 lr", "seed": "2 seed"}  # by display name, the name to sort by
OPEN = ("method", "model", "norm", "optimizer", "schedule")  # groups whose choices have different keys

Value = bool | float | str


@rank_zero_only
def log(logger: TensorBoardLogger, folder: Path, request: Request, final: Mapping[str, Any], step: int) -> None:
    """Log a run's final metrics and its row of the table.

    Args:
        logger: TensorBoard's, of this run.
        folder: The run's folder; the plan of its sweep is in the parent folder.
        request: The run's settings.
        final: The final metrics. Those that are not finite are left blank.
        step: The last step. Points at an earlier one would hide the curves of these metrics.
    """
    # The record has logged the others. One step later: if the process is killed here and the run resumes from its last
    # checkpoint, that hides these points, so that every point appears once.
    tested = {key: final[key] for key in METRICS if key.endswith("/test") and is_finite(final.get(key))}
    logger.log_metrics(tested, step + 1)
    differing = varying(files.read_plan(folder.parent))
    values, columns = readable(request), columns_of(request, differing)
    start = SessionStartInfo()
    for key, value in values.items():
        kind, cell = columns.setdefault(key, _kind(value)), start.hparams[FIRST.get(key, key)]
        if kind == api_pb2.DATA_TYPE_BOOL and isinstance(value, bool):
            cell.bool_value = value
        elif kind == api_pb2.DATA_TYPE_FLOAT64 and not isinstance(value, str):
            cell.number_value = value
        else:
            cell.string_value = str(value)
    first = {*FIRST, *differing}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=FIRST.get(key, key), display_name=key, type=kind, differs=key in first)
            for key, kind in columns.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=key)) for key in METRICS],
    )
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    writer = logger.experiment._get_file_writer()
    for tag, content in (
        (metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment, version=0)),
        (metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start, version=0)),
        (metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end, version=0)),
    ):
        plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))]), step)


def readable(request: Request) -> dict[str, Value]:
    """Return the settings as on the command line: choices of groups, then keys that are not null."""
    values: dict[str, Value] = dict(request.choices)
    for key, value in deciding(request.values).items():
        if value is not None and _is_shown(key):
            values[key] = value if isinstance(value, bool | int | float) else str(value)
    return values


def columns_of(request: Request, differing: Sequence[str]) -> dict[str, int]:
    """Return, by key, the type of its values: keys of this run, of other choices of its groups, and of its sweep."""
    own = {key: value for key, value in deciding(request.values).items() if _is_shown(key)}
    other = _keys_of_choices(request.hydra)
    return {
        **dict.fromkeys(differing, int(api_pb2.DATA_TYPE_STRING)),
        **{key: _kind(value) for key, value in {**own, **other}.items()},
        **dict.fromkeys(request.choices, int(api_pb2.DATA_TYPE_STRING)),
    }


def varying(plan: Mapping[str, list[str]]) -> list[str]:
    """Return the keys that a sweep sets to several values, or for some of its runs only."""
    runs = [dict(override.lstrip("+").partition("=")[::2] for override in overrides) for overrides in plan.values()]
    keys = {key for run in runs for key in run if has_effect(key)}
    return sorted(key for key in keys if len({run.get(key) for run in runs}) > 1)


def _keys_of_choices(hydra: DictConfig | None) -> dict[str, Any]:
    """Return the keys, each with a value, of all choices of the groups in `OPEN`."""
    if hydra is None:
        return {}
    found: dict[str, Any] = {}
    sources = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    for group in OPEN:
        for file in sorted(path for source in sources for path in (source / group).glob("*.yaml")):
            loaded = OmegaConf.to_container(OmegaConf.load(file))
            own = loaded.get(group, loaded) if isinstance(loaded, dict) else None
            for key, value in flatten({group: own} if isinstance(own, dict) else {}):
                # ${lr} has the type of this run's value.
                if _is_shown(key) and key != f"{group}.defaults" and "${" not in str(value):
                    found.setdefault(key, value)
    return found


def _is_shown(key: str) -> bool:
    """Leave out what the name of a choice implies: targets, and when diagnostics are due."""
    return key.rpartition(".")[2] not in ("_target_", "_partial_", "_convert_") and not key.startswith("diagnostics.")


def _kind(value: object) -> int:
    if isinstance(value, bool):
        return int(api_pb2.DATA_TYPE_BOOL)
    return int(
        api_pb2.DATA_TYPE_FLOAT64 if value is None or isinstance(value, int | float) else api_pb2.DATA_TYPE_STRING
    )


def is_finite(value: object) -> bool:
    """Return whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)
