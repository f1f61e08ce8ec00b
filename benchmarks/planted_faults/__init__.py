"""Faults planted in real runs, to measure how often the report of a job finds them, and how often it cries wolf."""
