"""Which worker of how many: flags, our variables, platforms, and what contradicts itself."""

import json

import pytest

from batchinfer.errors import UsageError
from batchinfer.job.shard import Shard, resolve_shard

SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}


@pytest.mark.parametrize(
    ("flag", "environment", "place"),
    [
        (None, {}, (0, 1)),
        ("2/8", {"BATCHINFER_SHARD_INDEX": "1", "BATCHINFER_SHARD_COUNT": "3"}, (2, 8)),
        (None, {"BATCHINFER_SHARD_INDEX": "1", "BATCHINFER_SHARD_COUNT": "3", "BATCH_TASK_INDEX": "9"}, (1, 3)),
        (None, {"AWS_BATCH_JOB_ARRAY_INDEX": "1", "AWS_BATCH_JOB_ARRAY_SIZE": "3"}, (1, 3)),
        (None, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "3"}, (1, 3)),
        (None, {"CLOUD_RUN_TASK_INDEX": "0", "CLOUD_RUN_TASK_COUNT": "1"}, (0, 1)),
        (None, {"JOB_COMPLETION_INDEX": "4", "BATCHINFER_SHARD_COUNT": "6"}, (4, 6)),
        (None, {"NOMAD_ALLOC_INDEX": "0", "BATCHINFER_SHARD_COUNT": "1"}, (0, 1)),
        (None, {**SLURM, "SLURM_ARRAY_TASK_STEP": "2"}, (3, 4)),
        (None, {"SKYPILOT_JOB_RANK": "1", "SKYPILOT_NUM_JOBS": "2"}, (1, 2)),
        # one platform inside another: a share of one says nothing
        (
            None,
            {
                "SKYPILOT_JOB_RANK": "1",
                "SKYPILOT_NUM_JOBS": "2",
                "SKYPILOT_NODE_RANK": "0",
                "SKYPILOT_NUM_NODES": "1",
            },
            (1, 2),
        ),
        # a tensor-parallel rank and an attempt are no shard
        (None, {"RANK": "3", "WORLD_SIZE": "4", "AWS_BATCH_JOB_ATTEMPT": "2", "CLOUD_RUN_TASK_ATTEMPT": "1"}, (0, 1)),
    ],
)
def test_where_the_place_comes_from(flag, environment, place, tmp_path):
    shard = resolve_shard(flag, environment, tmp_path / "none.json")
    assert (shard.index, shard.count) == place
    assert shard.source


@pytest.mark.parametrize(
    ("flag", "environment", "words"),
    [
        ("3", {}, "INDEX/COUNT"),
        ("3/3", {}, "3/3"),
        ("-1/3", {}, "-1/3"),
        ("a/3", {}, "'a'"),
        (None, {"BATCHINFER_SHARD_INDEX": "1"}, "BATCHINFER_SHARD_COUNT is not"),
        (None, {"BATCHINFER_SHARD_COUNT": "4"}, "no index is known"),
        (None, {"JOB_COMPLETION_INDEX": "1"}, "set BATCHINFER_SHARD_COUNT"),
        (None, {"BATCH_TASK_INDEX": "1"}, "BATCH_TASK_COUNT is not"),
        (None, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "x"}, "BATCH_TASK_COUNT: 'x'"),
        (None, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "3", "BATCHINFER_SHARD_COUNT": "4"}, "unset one"),
        (
            None,
            {**SLURM, "SKYPILOT_JOB_RANK": "1", "SKYPILOT_NUM_JOBS": "2", "SLURM_ARRAY_TASK_ID": "1"},
            "choose with",
        ),
        (None, {**SLURM, "SLURM_ARRAY_TASK_STEP": "4"}, "SLURM_ARRAY_TASK_ID 7"),
        (None, SLURM, "6/4 does not exist"),
    ],
)
def test_what_cannot_be_right_is_refused(flag, environment, words, tmp_path):
    with pytest.raises(UsageError) as caught:
        resolve_shard(flag, environment, tmp_path / "none.json")
    assert words in str(caught.value)


def test_sagemaker(tmp_path):
    config = tmp_path / "resourceconfig.json"
    config.write_text(json.dumps({"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]}))
    shard = resolve_shard(None, {}, config)
    assert (shard.index, shard.count) == (1, 2) and "SageMaker" in shard.source
    config.write_text(json.dumps({"current_host": "algo-9", "hosts": ["algo-1"]}))
    with pytest.raises(UsageError, match="--shard"):
        resolve_shard(None, {}, config)


def test_shards_cover_every_chunk_once():
    for count in (1, 2, 7):
        owners = [[index for index in range(count) if Shard(index, count).owns(chunk)] for chunk in range(50)]
        assert all(len(owner) == 1 for owner in owners)
