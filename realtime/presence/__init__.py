"""Who watches which topic, counted across all workers."""
