"""Tuning: the parameters of a model's schedules chosen by measurement, and the log that keeps them."""
