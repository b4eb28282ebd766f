"""What users write about movies: comments."""
