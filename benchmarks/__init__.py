"""Recipes and benchmarks: what is run, how it is recorded, and what is made of it."""
