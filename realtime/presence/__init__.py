"""Who watches which topic, over all workers."""
