"""Static shards: worker i of n runs the chunks with chunk % n == i.

The index and the count come from a flag, from our own variables, or from the platform that started the container.
Nothing heavy is imported here, and the environment is an argument: only the command line reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from batchinfer.errors import UsageError

OUR_INDEX, OUR_COUNT = "BATCHINFER_SHARD_INDEX", "BATCHINFER_SHARD_COUNT"
SAGEMAKER_CONFIG = Path("/opt/ml/config/resourceconfig.json")

# platform → variables of index and count; None: it gives no count, which must then be passed
_PLATFORMS: dict[str, tuple[str, str | None]] = {
    "AWS Batch": ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    "GCP Batch": ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
    "Cloud Run": ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", None),
    "Slurm": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    "SkyPilot jobs": ("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS"),
    "SkyPilot cluster": ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    "Nomad": ("NOMAD_ALLOC_INDEX", None),
}


@dataclass(frozen=True, slots=True)
class Shard:
    """`source` says where index and count came from, for the log."""

    index: int = 0
    count: int = 1
    source: str = "one worker"

    def owns(self, chunk: int) -> bool:
        return chunk % self.count == self.index

    @property
    def name(self) -> str:
        return f"{self.index}-of-{self.count}"


def resolve_shard(flag: str | None, environment: Mapping[str, str], sagemaker_config: Path = SAGEMAKER_CONFIG) -> Shard:
    """Read the flag `i/n`, else BATCHINFER_SHARD_INDEX and _COUNT, else the platform's variables, else take all chunks.

    Raises UsageError for a value that is no number, an index without a count, or sources that contradict each other.
    """
    if flag is not None:
        first, slash, second = flag.partition("/")
        if not slash:
            raise UsageError(f"--shard {flag}: must be INDEX/COUNT, for example 0/8")
        return _checked(_number("--shard", first), _number("--shard", second), "--shard")
    given_index, given_count = environment.get(OUR_INDEX), environment.get(OUR_COUNT)
    if given_index is not None:
        if given_count is None:
            raise UsageError(f"{OUR_INDEX} is set and {OUR_COUNT} is not: set both, or use --shard i/n")
        return _checked(_number(OUR_INDEX, given_index), _number(OUR_COUNT, given_count), OUR_INDEX)
    count = None if given_count is None else _number(OUR_COUNT, given_count)
    found = [_from_platform(name, environment, count) for name in _PLATFORMS if _PLATFORMS[name][0] in environment]
    found += _from_sagemaker(sagemaker_config, count)
    return _agreed(found, count)


def _agreed(found: list[Shard], count: int | None) -> Shard:
    """Choose the shard that all platforms agree on: one inside another is common, and a share of one says nothing."""
    telling = [shard for shard in found if shard.count > 1]
    for shard in telling[1:]:
        if (shard.index, shard.count) != (telling[0].index, telling[0].count):
            raise UsageError(
                f"{telling[0].source} says shard {telling[0].index}/{telling[0].count}, "
                f"{shard.source} says {shard.index}/{shard.count}: choose with --shard i/n"
            )
    if telling:
        return telling[0]
    if count is not None and count > 1:
        raise UsageError(f"{OUR_COUNT} is {count} and no index is known: set {OUR_INDEX}, or use --shard i/n")
    return found[0] if found else Shard()


def _from_platform(name: str, environment: Mapping[str, str], given_count: int | None) -> Shard:
    index_name, count_name = _PLATFORMS[name]
    index = _number(index_name, environment[index_name])
    if count_name is None or count_name not in environment:
        if given_count is None:
            missing = f"{count_name} is not" if count_name else f"{name} does not say of how many"
            raise UsageError(f"{index_name} is set and {missing}: set {OUR_COUNT} (1 if this is the only worker)")
        count = given_count
    else:
        count = _number(count_name, environment[count_name])
        if given_count is not None and given_count != count:
            raise UsageError(f"{count_name} is {count} and {OUR_COUNT} is {given_count}: unset one of them")
    if name == "Slurm":
        index = _slurm_place(index, environment)
    return _checked(index, count, f"{name} ({index_name})")


def _slurm_place(task: int, environment: Mapping[str, str]) -> int:
    """Array ids may start anywhere and go in steps; lists like 1,3,7 are no even steps and are refused."""
    first = _number("SLURM_ARRAY_TASK_MIN", environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = max(1, _number("SLURM_ARRAY_TASK_STEP", environment.get("SLURM_ARRAY_TASK_STEP", "1")))
    if (task - first) % step:
        raise UsageError(f"SLURM_ARRAY_TASK_ID {task} is not a step of {step} from {first}: use --array=0-N or --shard")
    return (task - first) // step


def _from_sagemaker(config: Path, given_count: int | None) -> list[Shard]:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        hosts, current = values["hosts"], values["current_host"]
        index = hosts.index(current)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{config}: cannot tell this host's place ({error}): use --shard i/n") from None
    if given_count is not None and given_count != len(hosts):
        raise UsageError(f"{config} has {len(hosts)} hosts and {OUR_COUNT} is {given_count}: unset the latter")
    return [_checked(index, len(hosts), "SageMaker (resourceconfig.json)")]


def _checked(index: int, count: int, source: str) -> Shard:
    if count < 1 or not 0 <= index < count:
        raise UsageError(f"{source}: shard {index}/{count} does not exist; the index runs from 0 to count - 1")
    return Shard(index, count, source)


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}: {text!r} is not a whole number") from None
