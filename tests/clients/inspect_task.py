"""Task for inspect-ai, without tools: SmolLM2's chat template takes none, and a server must refuse them."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes


@task
def local_task():
    samples = [Sample(input="Say hello.", target="e"), Sample(input="What is 2 + 2?", target="4")]
    return Task(dataset=samples, scorer=includes())
