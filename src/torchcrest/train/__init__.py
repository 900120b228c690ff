"""The training side: tasks, models, runs and their comparison."""
