"""The engine: token ids in, token ids out. The loop is `engine.Engine.step`; a step is a `plan.StepPlan`."""
