"""Relax to Relax rewriting, one pass per file."""
