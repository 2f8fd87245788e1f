"""The job: plan, the outer loop, commits, report."""
