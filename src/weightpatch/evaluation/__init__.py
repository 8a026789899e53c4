"""Judging edits."""
