"""Evaluation: tasks, metrics, results that can be compared, and other models beside ours."""
