"""Instruction-level pieces that schedules use."""
