"""A task of inspect-ai that uses what evaluations use: logprobs, several epochs, tools."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool


@tool
def add():
    async def execute(x: int, y: int) -> int:
        """Add two numbers.

        Args:
            x: First number.
            y: Second number.
        """
        return x + y

    return execute


SAMPLES = [Sample(input="Say hello.", target="e"), Sample(input="What is 2 + 2?", target="4")]


@task
def plain():
    return Task(dataset=SAMPLES, solver=generate(), scorer=includes())


@task
def tools():
    return Task(dataset=SAMPLES, solver=[use_tools(add()), generate(tool_calls="none")], scorer=includes())
