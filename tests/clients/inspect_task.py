"""A task of inspect-ai. It has no tools: the chat template of SmolLM2 takes none, and a server must then say so."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes


@task
def local_task():
    samples = [Sample(input="Say hello.", target="e"), Sample(input="What is 2 + 2?", target="4")]
    return Task(dataset=samples, scorer=includes())
