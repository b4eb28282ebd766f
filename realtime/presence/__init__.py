"""Who watches which topic, counted over all workers."""
