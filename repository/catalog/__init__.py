"""SQL that only movies and characters need."""
