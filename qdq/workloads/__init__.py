"""What knows a task: its models, its data and its metrics. One package for each task."""
