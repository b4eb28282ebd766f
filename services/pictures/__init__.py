"""Turning uploaded images into square WebP pictures."""
