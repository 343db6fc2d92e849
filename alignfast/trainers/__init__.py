"""Trainers: a config, the one loop, and what a step of each method computes."""
