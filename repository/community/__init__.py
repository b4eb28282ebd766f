"""What users write about movies: trees of comments."""
