"""Tests, a folder for each subject."""
