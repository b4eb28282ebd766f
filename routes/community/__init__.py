"""Operations for what users write about movies: comments."""
